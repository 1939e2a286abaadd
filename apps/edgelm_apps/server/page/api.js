// @ts-check
// The server's API: requests, and the events of an answer.

/** @typedef {{role: string, content: string}} Message */
/**
 * @typedef {{
 *   completion_tokens: number, ttft_s: number, decode_tps: number, rss_bytes: number, peak_bytes: number,
 *   budget_bytes: number, bytes_streamed: number, read_s: number, wait_s: number, compute_s: number,
 *   sample_s: number, other_s: number, backend: string, simulated: string | null,
 * }} Usage as edgelm.Usage has it
 */
/** @typedef {{models: string[], model: string | null, rss_bytes: number, budget_bytes?: number, usage: Usage | null}} Status */
/** @typedef {{delta: {content?: string}, finish_reason: string | null}} Choice */

/** @param {string} path @param {string} key @param {object} [body] @param {AbortSignal} [signal] */
async function ask(path, key, body, signal) {
  const headers = { "Content-Type": "application/json", ...(key ? { Authorization: `Bearer ${key}` } : {}) };
  const response = await fetch(path, {
    method: body ? "POST" : "GET", headers, body: body ? JSON.stringify(body) : undefined, signal,
  });
  if (response.ok) return response;
  const told = await response.json().catch(() => null);
  const wait = response.headers.get("Retry-After");
  throw new Error((told?.error?.message ?? `the server answered ${response.status}`) + (wait ? ` (${wait} s)` : ""));
}

/** @param {string} key @returns {Promise<Status>} */
export async function status(key) {
  return (await ask("/v1/status", key)).json();
}

/** @param {string} key @param {string} memory @returns {Promise<Status>} */
export async function setBudget(key, memory) {
  return (await ask("/v1/budget", key, { memory })).json();
}

/**
 * @param {string} key @param {object} request @param {AbortSignal} signal
 * @returns {AsyncGenerator<{choices: Choice[], edgelm: Usage}>}
 */
export async function* answer(key, request, signal) {
  const response = await ask("/v1/chat/completions", key, request, signal);
  const reader = /** @type {ReadableStream<Uint8Array>} */ (response.body).getReader();
  const decoder = new TextDecoder();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const lines = (rest + decoder.decode(value, { stream: true })).split("\n");
    rest = lines.pop() ?? "";
    for (const line of lines) {
      if (!line.startsWith("data: ") || line === "data: [DONE]") continue;
      const event = JSON.parse(line.slice(6));
      if (event.error) throw new Error(event.error.message);
      yield event;
    }
  }
}
