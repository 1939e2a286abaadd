// @ts-check
// The page: questions and answers, the settings, and the model and budget that are chosen.

import { answer, setBudget, status } from "./api.js";
import { Card, keepMessages, keptMessages } from "./cards.js";
import { megabytes, showMemory, showSpeed, Spent } from "./live.js";

/** @typedef {import("./api.js").Message} Message */
/** @typedef {HTMLInputElement & HTMLSelectElement & HTMLFormElement & HTMLDialogElement} Field */

const byId = (/** @type {string} */ id) => /** @type {Field} */ (document.getElementById(id));
const log = byId("chat"), question = byId("question"), told = byId("told");
const KEPT = ["system", "temperature", "max-tokens", "key"];
const REFRESH_MS = 3000;

let messages = keptMessages();
/** @type {AbortController | null} */
let running = null;

/** @param {string} text @param {boolean} [bad] */
function tell(text, bad = false) {
  told.textContent = text;
  told.classList.toggle("bad", bad);
}

/** @param {unknown} error */
const tellError = (error) => tell(error instanceof TypeError ? "The server does not answer." : /** @type {Error} */ (error).message, true);

/** @param {Message} message @param {number} index */
const card = (message, index) => new Card(log, message, () => (message.role === "user" ? edit(index) : retry(index)));

/** Shows and keeps the first messages only. @param {number} n */
function cut(n) {
  messages = messages.slice(0, n);
  keepMessages(messages);
  log.replaceChildren();
  messages.forEach(card);
  log.scrollTop = log.scrollHeight;
}

/** @param {number} index */
function edit(index) {
  if (running) return;
  question.value = messages[index].content;
  cut(index);
  question.focus();
}

/** @param {number} index */
async function retry(index) {
  if (running) return;
  const before = messages;
  cut(index);
  await write();
  if (messages.length > index) return;
  messages = before; // nothing came: the old answer stays
  cut(before.length);
}

/** The request that answers the messages so far. */
function request() {
  const system = byId("system").value, temperature = byId("temperature").value, most = byId("max-tokens").value;
  return {
    model: byId("model").value,
    messages: [...(system ? [{ role: "system", content: system }] : []), ...messages],
    stream: true,
    stream_options: { include_stats: true },
    ...(temperature ? { temperature: Number(temperature) } : {}),
    ...(most ? { max_tokens: Number(most) } : {}),
  };
}

/** Lets the model answer the messages so far. */
async function write() {
  const message = { role: "assistant", content: "" }, asked = request();
  const shown = card(message, messages.length), spent = new Spent(), aborting = new AbortController();
  /** @type {import("./api.js").Usage | null} */
  let usage = null;
  let why = "";
  running = aborting;
  shown.busy = true;
  byId("send").hidden = true;
  byId("stop").hidden = false;
  log.scrollTop = log.scrollHeight;
  tell("Waiting for the first token …");
  try {
    for await (const event of answer(byId("key").value, asked, aborting.signal)) {
      const choice = event.choices[0];
      message.content += choice?.delta.content ?? "";
      usage = event.edgelm;
      spent.add(usage);
      shown.grow();
      showMemory(usage.rss_bytes, usage.budget_bytes);
      showSpeed(usage);
      spent.draw();
      tell("");
      if (choice?.finish_reason === "length") why = "The answer reached its limit.";
    }
    tell(why);
  } catch (error) {
    if (aborting.signal.aborted) tell("Stopped.");
    else tellError(error);
  } finally {
    running = null;
    byId("send").hidden = false;
    byId("stop").hidden = true;
    shown.end(usage);
    if (message.content) messages.push(message);
    else shown.element.remove();
    keepMessages(messages);
    question.focus();
  }
}

byId("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = question.value.trim();
  if (!text || running) return;
  question.value = "";
  messages.push({ role: "user", content: text });
  keepMessages(messages);
  card(messages[messages.length - 1], messages.length - 1);
  write();
});
question.addEventListener("keydown", (event) => {
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
  if (running) return tell("Stop the answer first.");
  cut(0);
  tell("A new chat.");
  question.focus();
});
byId("settings-open").addEventListener("click", () => byId("settings").showModal());
byId("settings").addEventListener("close", () => {
  for (const name of KEPT) localStorage.setItem(`edgelm.${name}`, byId(name).value);
  refresh();
});
byId("budget-form").addEventListener("submit", async (event) => {
  event.preventDefault();
  try {
    const now = await setBudget(byId("key").value, byId("budget").value);
    tell(`The budget is ${megabytes(now.budget_bytes ?? 0)} now.`);
    showStatus(now);
  } catch (error) {
    tellError(error);
  }
});

/** @param {import("./api.js").Status} now */
function showStatus(now) {
  if (!now.budget_bytes) return;
  showMemory(now.rss_bytes, now.budget_bytes);
  if (now.usage) showSpeed(now.usage);
  if (document.activeElement !== byId("budget")) byId("budget").value = megabytes(now.budget_bytes).replace(" ", "");
}

/** Asks the server which models and which budget there are. */
async function refresh() {
  try {
    const now = await status(byId("key").value), model = byId("model");
    const chosen = now.models.includes(model.value) ? model.value : (now.model ?? now.models[0]);
    model.replaceChildren(...now.models.map((name) => new Option(name, name)));
    model.value = chosen;
    showStatus(now);
    if (told.classList.contains("bad")) tell(""); // what was wrong is not any more: a key, a server that was away
  } catch (error) {
    tellError(error);
  }
}

/** Keeps the memory current while nothing is answered here: others may ask the same server. */
async function watch() {
  if (running || document.hidden) return;
  const now = await status(byId("key").value).catch(() => null);
  if (now && !running) showStatus(now);
}

for (const name of KEPT) byId(name).value = localStorage.getItem(`edgelm.${name}`) ?? "";
cut(messages.length);
question.focus();
refresh();
setInterval(watch, REFRESH_MS);
