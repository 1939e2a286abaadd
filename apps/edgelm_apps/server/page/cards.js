// @ts-check
// The conversation on the page: a card for each message, kept in the browser until a new chat begins.

import { made, show } from "./text.js";

/** @typedef {import("./api.js").Message} Message */
/** @typedef {import("./api.js").Usage} Usage */

const KEPT = "edgelm.chat";

/** @returns {Message[]} */
export function keptMessages() {
  try {
    const found = JSON.parse(localStorage.getItem(KEPT) ?? "[]");
    return found.every((/** @type {any} */ one) => typeof one.content === "string") ? found : [];
  } catch {
    return [];
  }
}

/** @param {Message[]} messages */
export function keepMessages(messages) {
  try {
    localStorage.setItem(KEPT, JSON.stringify(messages));
  } catch {
    // no room or not allowed: the chat lasts as long as the page
  }
}

/** One message. `action` is what its first button does: a question is edited, an answer tried again. */
export class Card {
  #body = made("div");
  #footer = made("footer");
  #waiting = 0;

  /** @param {HTMLElement} log @param {Message} message @param {() => void} action */
  constructor(log, message, action) {
    const asked = message.role === "user";
    this.log = log;
    this.message = message;
    this.element = made("article");
    this.element.className = message.role;
    this.element.append(made("h2", asked ? "You" : "Answer"), this.#body, this.#footer);
    this.#footer.append(button(asked ? "Edit" : "Retry", action));
    if (!asked) this.#footer.append(button("Copy", () => this.#copy()));
    log.append(this.element);
    show(this.#body, message.content);
  }

  /** Shows what the message says now, at the next picture of the screen: several tokens may come before it. */
  grow() {
    this.#waiting ||= requestAnimationFrame(() => this.#draw());
  }

  #draw() {
    const atEnd = this.log.scrollHeight - this.log.scrollTop - this.log.clientHeight < 40;
    this.#waiting = 0;
    show(this.#body, this.message.content);
    if (atEnd) this.log.scrollTop = this.log.scrollHeight;
  }

  /** @param {boolean} busy whether it still grows: a screen reader waits for the end then */
  set busy(busy) {
    if (busy) this.element.setAttribute("aria-busy", "true");
    else this.element.removeAttribute("aria-busy");
  }

  /** @param {Usage | null} usage */
  end(usage) {
    cancelAnimationFrame(this.#waiting);
    this.#draw();
    this.busy = false;
    if (!usage) return;
    const speed = `${usage.completion_tokens} tokens, ${usage.decode_tps.toFixed(1)} tok/s`;
    this.#footer.prepend(`${speed}, first after ${usage.ttft_s.toFixed(2)} s`);
  }

  async #copy() {
    const copy = /** @type {HTMLElement} */ (this.#footer.lastElementChild);
    try {
      await navigator.clipboard.writeText(this.message.content);
      copy.textContent = "Copied";
    } catch {
      copy.textContent = "The browser does not allow it";
    }
  }
}

/** @param {string} text @param {() => void} action */
function button(text, action) {
  const found = made("button", text);
  found.setAttribute("type", "button");
  found.addEventListener("click", action);
  return found;
}
