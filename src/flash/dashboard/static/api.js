// Requests to the server that these pages came from, with the reader's key, and asking again while a page is open.
// The key lives in this browser's storage for this address (host and port) alone and is sent as a header, never as a
// cookie: no other site, and no other port of this machine, can use or see it.

const STORED = "flash.key";

export class ApiError extends Error {
  constructor(status, { code = "error", message = `the server answered ${status}`, remedy = null } = {}) {
    super(message);
    Object.assign(this, { status, code, remedy });
  }
}

export function hasKey() {
  return Boolean(localStorage.getItem(STORED));
}

export function useKey(key) {
  localStorage.setItem(STORED, key);
}

export function forgetKey() {
  localStorage.removeItem(STORED);
}

/** The key behind a one-time code of `flash dashboard`. */
export async function redeem(code) {
  const answer = await request("POST", "/api/dashboard/session", { body: { code } });
  useKey(answer.key);
}

export const get = (path, query, signal) => request("GET", path, { query, signal });
export const post = (path, body, options = {}) => request("POST", path, { body, ...options });
export const remove = (path) => request("DELETE", path);

export async function request(method, path, { query, body, signal, headers } = {}) {
  const answer = await send(method, path, { query, body, signal, headers });
  if (answer.status === 204) return null;
  return answer.json();
}

/** The raw answer, for those who read it as it comes. Throws ApiError for all but a good one. */
export async function send(method, path, { query, body, signal, headers } = {}) {
  const wanted = Object.entries(query ?? {}).filter(([, value]) => value !== null && value !== undefined && value !== "");
  const address = wanted.length ? `${path}?${new URLSearchParams(wanted)}` : path;
  const key = localStorage.getItem(STORED);
  const options = { method, signal, cache: "no-store", headers: { ...headers } };
  if (key) options.headers.Authorization = `Bearer ${key}`;
  if (body !== undefined) {
    options.body = JSON.stringify(body);
    options.headers["Content-Type"] = "application/json";
  }
  let answer;
  try {
    answer = await fetch(address, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError(0, { code: "unreachable", message: "the server can't be reached", remedy: "it may have stopped: run `flash dashboard` to start it" });
  }
  if (answer.ok) return answer;
  let told = {};
  try {
    told = (await answer.json()).error ?? {};
  } catch { /* not JSON: the status says enough */ }
  throw new ApiError(answer.status, told);
}

/**
 * Calls `ask` now and every so many seconds until `signal` ends: `ask` returns them, or nothing to stop. A hidden page
 * asks nothing, so that forgotten tabs neither cost a run time nor keep an idle server awake. `trouble(error | null)`
 * hears of failures and of their end; a first answer that is a refusal is thrown.
 */
export function poll(ask, { signal, trouble }) {
  let timer = null;
  let failures = 0;
  let busy = false;
  let answered = false;
  const again = (seconds) => {
    clearTimeout(timer);
    if (!signal.aborted) timer = setTimeout(() => tick().catch(trouble), seconds * 1000);
  };
  async function tick() {
    if (signal.aborted || busy) return;
    if (document.hidden) return; // `visibilitychange` comes back to it
    busy = true;
    try {
      const next = await ask();
      if (failures) trouble(null);
      failures = 0;
      answered = true;
      if (next) again(next);
      else stop();
    } catch (error) {
      if (signal.aborted || error.name === "AbortError") return;
      const passing = error.status === 0 || error.status >= 429;
      if (!passing) stop();
      if (!passing && !answered) throw error; // there is no such thing: the whole page says so
      failures += 1;
      trouble(error);
      if (passing) again(Math.min(30, 2 ** failures));
    } finally {
      busy = false;
    }
  }
  const back = () => { if (!document.hidden) again(0); };
  const stop = () => {
    clearTimeout(timer);
    document.removeEventListener("visibilitychange", back);
  };
  document.addEventListener("visibilitychange", back);
  signal.addEventListener("abort", stop);
  return tick();
}
