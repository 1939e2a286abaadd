// @ts-check
// What memory and time go into: the meter, the figures beside it, and a bar for each token.

/** @typedef {import("./api.js").Usage} Usage */

const PARTS = /** @type {const} */ (["wait", "compute", "sample", "other"]);
const MAX_BARS = 160;
const meter = /** @type {HTMLMeterElement} */ (document.getElementById("memory"));
const memory = /** @type {HTMLElement} */ (document.getElementById("memory-text"));
const speed = /** @type {HTMLElement} */ (document.getElementById("speed-text"));
const bars = /** @type {HTMLElement} */ (document.getElementById("tokens"));

/** @param {number} bytes */
export const megabytes = (bytes) => `${(bytes / 1e6).toFixed(0)} MB`;

/** @param {number} resident @param {number} budget both in bytes, of the whole process */
export function showMemory(resident, budget) {
  const of = `${megabytes(resident)} of ${megabytes(budget)}`;
  meter.max = budget;
  meter.value = resident;
  meter.setAttribute("aria-valuetext", of);
  memory.textContent = `${of}.`;
}

/** @param {Usage} usage */
export function showSpeed(usage) {
  const flash = usage.read_s ? `, flash ${megabytes(usage.bytes_streamed / usage.read_s)}/s` : "";
  const simulated = usage.simulated ? `, simulated ${usage.simulated}` : "";
  speed.textContent =
    `Peak ${megabytes(usage.peak_bytes)}, ${usage.decode_tps.toFixed(1)} tok/s${flash}, ${usage.backend}${simulated}.`;
}

/** What each token of one answer waited for flash, computed, sampled and spent otherwise. */
export class Spent {
  /** @type {number[][]} */
  #tokens = [];
  #before = [0, 0, 0, 0];

  /** @param {Usage} usage after the next token */
  add(usage) {
    const now = PARTS.map((part) => usage[`${part}_s`]);
    this.#tokens.push(now.map((value, i) => Math.max(0, value - this.#before[i])));
    this.#before = now;
  }

  draw() {
    const shown = this.#tokens.slice(-MAX_BARS);
    const most = Math.max(...shown.map((parts) => parts.reduce((sum, part) => sum + part, 0)), 1e-6);
    bars.setAttribute("viewBox", `0 0 ${MAX_BARS} 1`);
    bars.replaceChildren(...shown.flatMap((parts, x) => bar(parts.map((part) => part / most), x)));
  }
}

/** @param {number[]} heights @param {number} x */
function bar(heights, x) {
  let top = 1;
  return heights.map((height, i) => {
    const part = document.createElementNS("http://www.w3.org/2000/svg", "rect");
    top -= height;
    for (const [name, value] of Object.entries({ x, y: top, width: 0.8, height, class: PARTS[i] })) {
      part.setAttribute(name, String(value));
    }
    return part;
  });
}
