// The service as the page asks it.

const FIRST_WAIT_MS = 500;
const LONGEST_WAIT_MS = 8000;
const LASTING = ["too_many_sessions", "too_many_versions", "version_broken"];

export class ServiceError extends Error {
  constructor(status, message, code) {
    super(message);
    this.status = status;
    // No answer, a gateway's, or a model that still loads: what was asked may be asked again
    this.passing = status === 0 || ([502, 503, 504].includes(status) && !LASTING.includes(code));
    // The service itself said no, for a reason that a moment may not mend
    this.refused = Boolean(code) && code !== "step_too_slow";
  }
}

/** The answer to one request, read by `read`; a connection lost while it is read counts as no answer. */
export async function call(path, options, read = (response) => response.json()) {
  let response;
  try {
    response = await fetch(path, options);
    if (response.ok) return await read(response);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServiceError(0, "The service does not answer.");
  }
  const problem = await response.json().catch(() => null);
  throw new ServiceError(response.status, problem?.detail ?? `The service answered ${response.status}.`, problem?.code);
}

/** What `call` reads a frame with. */
export async function picture(response) {
  const blob = await response.blob();
  return { t: Number(response.headers.get("X-Steps")), blob, bitmap: await createImageBitmap(blob) };
}

export function json(body) {
  return { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) };
}

/** Makes `request` until it is answered, ever more slowly; `waiting` is told of each time it was not. */
export async function persist(request, signal, waiting) {
  for (let wait = FIRST_WAIT_MS; ; wait = Math.min(wait * 2, LONGEST_WAIT_MS)) {
    try {
      return await request();
    } catch (error) {
      signal.throwIfAborted();
      if (!error.passing) throw error;
      waiting(error);
      await pause(wait, signal);
    }
  }
}

/** Waits; a network that comes back cuts it short. */
function pause(milliseconds, signal) {
  return new Promise((resolve, reject) => {
    const done = new AbortController();
    const finish = (settle) => { clearTimeout(timer); done.abort(); settle(); };
    const timer = setTimeout(() => finish(resolve), milliseconds);
    window.addEventListener("online", () => finish(resolve), { signal: done.signal });
    signal.addEventListener("abort", () => finish(() => reject(signal.reason)), { signal: done.signal });
  });
}
