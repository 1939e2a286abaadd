// @ts-check
// The page: a conversation, and beside it what memory and time go into.

import { answer, setBudget, status } from "./api.js";
import { made, show } from "./text.js";

/** @typedef {import("./api.js").Message} Message */

const byId = (/** @type {string} */ id) => /** @type {any} */ (document.getElementById(id));
const chat = byId("chat"), question = byId("question"), told = byId("told");
const KEPT = ["system", "temperature", "max-tokens", "key"];
const PARTS = ["wait", "compute", "sample", "other"];
const MAX_BARS = 160;

/** @type {Message[]} */
let messages = [];
/** @type {AbortController | null} */
let running = null;
/** @type {number[][]} */
let spent = [];

const megabytes = (/** @type {number} */ bytes) => `${(bytes / 1e6).toFixed(0)} MB`;

/** @param {string} text @param {boolean} [bad] */
function tell(text, bad = false) {
  told.textContent = text;
  told.classList.toggle("bad", bad);
}

/** @param {any} usage @param {number} [budget] */
function showUsage(usage, budget) {
  const most = budget ?? usage?.budget_bytes;
  if (!usage || !most) return;
  const meter = byId("memory");
  meter.setAttribute("aria-valuemax", String(most));
  meter.setAttribute("aria-valuenow", String(usage.rss_bytes));
  meter.setAttribute("aria-valuetext", `${megabytes(usage.rss_bytes)} of ${megabytes(most)}`);
  meter.firstElementChild.style.width = `${Math.min(100, (100 * usage.rss_bytes) / most)}%`;
  byId("memory-text").textContent =
    `${megabytes(usage.rss_bytes)} of ${megabytes(most)}, peak ${megabytes(usage.peak_bytes)}.`;
  const flash = usage.read_s ? `, flash ${megabytes(usage.bytes_streamed / usage.read_s)}/s` : "";
  byId("speed-text").textContent = `${usage.decode_tps.toFixed(1)} tok/s${flash}, ${usage.backend}` +
    (usage.simulated ? `, simulated ${usage.simulated}` : "") + ".";
}

/** Draws a bar for each token: what it waited for flash, computed, sampled and the rest. */
function showSpent() {
  const svg = byId("tokens"), shown = spent.slice(-MAX_BARS);
  const most = Math.max(...shown.map((parts) => parts.reduce((sum, part) => sum + part, 0)), 1e-6);
  svg.setAttribute("viewBox", `0 0 ${MAX_BARS} 1`);
  svg.replaceChildren(...shown.flatMap((parts, x) => {
    let top = 1;
    return parts.map((part, i) => {
      const bar = document.createElementNS("http://www.w3.org/2000/svg", "rect");
      const height = part / most;
      top -= height;
      for (const [name, value] of Object.entries({ x, y: top, width: 0.8, height, class: PARTS[i] })) {
        bar.setAttribute(name, String(value));
      }
      return bar;
    });
  }));
}

/** @param {Message} message @param {number} index */
function card(message, index) {
  const article = made("article"), body = made("div"), footer = made("footer");
  article.className = message.role;
  article.append(made("h2", message.role === "user" ? "You" : "Answer"), body, footer);
  show(body, message.content);
  const action = made("button", message.role === "user" ? "Edit" : "Retry");
  action.addEventListener("click", () => (message.role === "user" ? edit(index) : retry(index)));
  footer.append(action);
  if (message.role !== "user") {
    const copy = made("button", "Copy");
    copy.addEventListener("click", () => navigator.clipboard.writeText(message.content));
    footer.append(copy);
  }
  chat.append(article);
  return { article, body, footer };
}

function redraw() {
  chat.replaceChildren();
  messages.forEach(card);
}

/** @param {number} index */
function edit(index) {
  if (running) return;
  question.value = messages[index].content;
  messages = messages.slice(0, index);
  redraw();
  question.focus();
}

/** @param {number} index */
function retry(index) {
  if (running) return;
  messages = messages.slice(0, index);
  redraw();
  write();
}

/** Lets the model answer the messages so far. */
async function write() {
  const request = {
    model: byId("model").value,
    messages: [...(byId("system").value ? [{ role: "system", content: byId("system").value }] : []), ...messages],
    stream: true,
    stream_options: { include_stats: true },
    ...(byId("temperature").value ? { temperature: Number(byId("temperature").value) } : {}),
    ...(byId("max-tokens").value ? { max_tokens: Number(byId("max-tokens").value) } : {}),
  };
  const message = { role: "assistant", content: "" };
  const { article, body, footer } = card(message, messages.length);
  const aborting = (running = new AbortController());
  let before = [0, 0, 0, 0], usage = null, why = "";
  spent = [];
  byId("send").hidden = true;
  byId("stop").hidden = false;
  article.setAttribute("aria-busy", "true");
  tell("Waiting for the first token …");
  try {
    for await (const event of answer(byId("key").value, request, aborting.signal)) {
      const choice = event.choices[0], stuck = chat.scrollHeight - chat.scrollTop - chat.clientHeight < 40;
      message.content += choice?.delta?.content ?? "";
      usage = event.edgelm;
      const now = PARTS.map((part) => usage[`${part}_s`]);
      spent.push(now.map((value, i) => Math.max(0, value - before[i])));
      before = now;
      show(body, message.content);
      showUsage(usage);
      showSpent();
      tell("");
      if (stuck) chat.scrollTop = chat.scrollHeight;
      if (choice?.finish_reason === "length") why = "The answer reached its limit.";
    }
    tell(why);
  } catch (error) {
    const stopped = aborting.signal.aborted;
    tell(stopped ? "Stopped." : String(/** @type {Error} */ (error).message), !stopped);
  } finally {
    running = null;
    byId("send").hidden = false;
    byId("stop").hidden = true;
    article.removeAttribute("aria-busy");
    if (usage) {
      footer.prepend(`${usage.completion_tokens} tokens, ${usage.decode_tps.toFixed(1)} tok/s, first after ` +
        `${usage.ttft_s.toFixed(2)} s`);
    }
    if (message.content) messages.push(message);
    else article.remove();
    chat.scrollTop = chat.scrollHeight;
    question.focus();
  }
}

byId("ask").addEventListener("submit", (/** @type {Event} */ event) => {
  event.preventDefault();
  const text = question.value.trim();
  if (!text || running) return;
  question.value = "";
  messages.push({ role: "user", content: text });
  card(messages[messages.length - 1], messages.length - 1);
  chat.scrollTop = chat.scrollHeight;
  write();
});
question.addEventListener("keydown", (/** @type {KeyboardEvent} */ event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    byId("ask").requestSubmit();
  }
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") running?.abort();
});
byId("stop").addEventListener("click", () => running?.abort());
byId("clear").addEventListener("click", () => {
  running?.abort();
  messages = [];
  redraw();
  tell("A new chat.");
  question.focus();
});
byId("settings-open").addEventListener("click", () => byId("settings").showModal());
byId("settings").addEventListener("close", () => {
  for (const name of KEPT) localStorage.setItem(`edgelm.${name}`, byId(name).value);
  refresh();
});
byId("budget-form").addEventListener("submit", async (/** @type {Event} */ event) => {
  event.preventDefault();
  try {
    const now = await setBudget(byId("key").value, byId("budget").value);
    tell(`The budget is ${megabytes(now.budget_bytes)} now.`);
    showUsage(now.usage, now.budget_bytes);
  } catch (error) {
    tell(String(/** @type {Error} */ (error).message), true);
  }
});

async function refresh() {
  try {
    const now = await status(byId("key").value);
    const chosen = byId("model").value;
    byId("model").replaceChildren(...now.models.map((/** @type {string} */ name) => new Option(name, name)));
    byId("model").value = now.models.includes(chosen) ? chosen : (now.model ?? now.models[0]);
    if (now.budget_bytes && document.activeElement !== byId("budget")) byId("budget").value = megabytes(now.budget_bytes).replace(" ", "");
    showUsage(now.usage, now.budget_bytes);
  } catch (error) {
    tell(String(/** @type {Error} */ (error).message), true);
  }
}

for (const name of KEPT) byId(name).value = localStorage.getItem(`edgelm.${name}`) ?? "";
refresh();
