// @ts-check
// Markdown as elements. marked (vendor/) finds the parts; each becomes an element of its kind, and all that was written
// becomes text nodes: an answer can never become markup of its own.

import { lexer } from "./vendor/marked.esm.js";

/** @typedef {import("marked").Token} Token */
/** @typedef {import("marked").Tokens.List} List */
/** @typedef {import("marked").Tokens.Table} Table */

/** @param {string} name @param {string} [text] */
export function made(name, text = "") {
  const element = document.createElement(name);
  element.textContent = text;
  return element;
}

const ENTITIES = /** @type {Record<string, string>} */ ({ amp: "&", lt: "<", gt: ">", quot: '"', "#39": "'" });
/** Resolves the entities that Markdown knows, too. @param {string} text */
const plain = (text) => text.replace(/&(amp|lt|gt|quot|#39);/g, (_, name) => ENTITIES[name]);

const INLINE = /** @type {Record<string, string>} */ ({ strong: "strong", em: "em", del: "del" });

/** @param {HTMLElement} parent @param {Token[]} tokens */
function put(parent, tokens) {
  for (const token of tokens) parent.append(element(token));
  return parent;
}

/** @param {Token} token @returns {HTMLElement | string} */
function element(token) {
  const inner = "tokens" in token ? (token.tokens ?? []) : [];
  switch (token.type) {
    case "space":
      return "";
    case "heading":
      return put(made(`h${Math.min(token.depth + 2, 6)}`), inner);
    case "paragraph":
      return put(made("p"), inner);
    case "strong":
    case "em":
    case "del":
      return put(made(INLINE[token.type]), inner);
    case "codespan":
      return made("code", token.text);
    case "code":
      return code(token.text);
    case "blockquote":
      return put(made("blockquote"), inner);
    case "list":
      return list(/** @type {List} */ (token));
    case "table":
      return table(/** @type {Table} */ (token));
    case "hr":
    case "br":
      return made(token.type);
    case "link":
      return link(token.href, inner);
    case "escape":
      return token.text;
    case "text":
      return inner.length ? put(made("span"), inner) : plain(token.text);
    default: // markup, pictures and the like stay what was written
      return token.raw;
  }
}

/** @param {string} text */
function code(text) {
  const pre = made("pre");
  pre.tabIndex = 0; // so that the keyboard can scroll it
  pre.append(made("code", text));
  return pre;
}

/** @param {List} token */
function list(token) {
  const found = made(token.ordered ? "ol" : "ul");
  if (token.ordered && Number(token.start) !== 1) found.setAttribute("start", String(token.start));
  for (const item of token.items) found.append(put(made("li", item.task ? (item.checked ? "☑ " : "☐ ") : ""), item.tokens));
  return found;
}

/** @param {Table} token */
function table(token) {
  const box = made("div"), found = made("table"), head = made("thead"), body = made("tbody");
  const row = (/** @type {string} */ kind, /** @type {Table["header"]} */ cells) => {
    const line = made("tr");
    line.append(...cells.map((cell) => put(made(kind), cell.tokens)));
    return line;
  };
  head.append(row("th", token.header));
  body.append(...token.rows.map((cells) => row("td", cells)));
  found.append(head, body);
  box.className = "wide";
  box.tabIndex = 0;
  box.append(found);
  return box;
}

/** @param {string} href @param {Token[]} inner */
function link(href, inner) {
  const found = /** @type {HTMLAnchorElement} */ (made("a"));
  if (!/^https?:\/\//i.test(href)) return put(made("span"), inner);
  found.href = href;
  found.rel = "noreferrer noopener";
  found.target = "_blank";
  return put(found, inner);
}

/** Shows a Markdown text in `parent`, instead of what is there. @param {HTMLElement} parent @param {string} text */
export function show(parent, text) {
  const found = made("div");
  try {
    put(found, lexer(text));
  } catch { // nested deeper than the stack reaches: what was written, as it is
    found.replaceChildren(code(text));
  }
  parent.replaceChildren(...found.childNodes);
}
