// @ts-check
// Markdown as far as small models write it: fences, inline code, bold, lists and headings. Everything becomes text
// nodes, so that an answer can never become markup of its own.

/** @param {HTMLElement} parent @param {string} text */
function inline(parent, text) {
  for (const part of text.split(/(`[^`\n]+`|\*\*[^*\n]+\*\*)/)) {
    if (/^`.+`$/.test(part)) parent.append(made("code", part.slice(1, -1)));
    else if (/^\*\*.+\*\*$/.test(part)) parent.append(made("strong", part.slice(2, -2)));
    else if (part) parent.append(part);
  }
}

/** @param {string} name @param {string} [text] */
export function made(name, text = "") {
  const element = document.createElement(name);
  element.textContent = text;
  return element;
}

/** @param {HTMLElement} parent @param {string} text */
export function show(parent, text) {
  parent.replaceChildren();
  text.split(/^```/m).forEach((block, number) => {
    if (number % 2) {
      const pre = made("pre");
      pre.tabIndex = 0;
      pre.append(made("code", block.replace(/^[^\n]*\n/, "").replace(/\n$/, "")));
      parent.append(pre);
      return;
    }
    for (const paragraph of block.split(/\n{2,}/)) {
      const trimmed = paragraph.replace(/^\n+|\n+$/g, "");
      if (!trimmed) continue;
      const lines = trimmed.split("\n");
      if (lines.every((line) => /^\s*([-*]|\d+[.)])\s+/.test(line))) {
        const list = made(/^\s*\d/.test(lines[0]) ? "ol" : "ul");
        for (const line of lines) {
          const item = made("li");
          inline(item, line.replace(/^\s*([-*]|\d+[.)])\s+/, ""));
          list.append(item);
        }
        parent.append(list);
      } else {
        const heading = /^#{1,6}\s+/.test(trimmed) && lines.length === 1;
        const element = made(heading ? "h3" : "p");
        inline(element, heading ? trimmed.replace(/^#+\s+/, "") : trimmed);
        parent.append(element);
      }
    }
  });
}
