// The play page: one session at a time; a held key steps it as fast as the model answers.

const PREVIEW_REPEATS = 3;
const PREVIEW_AFTER_MS = 200;   // previews cost the model |A| frames per repeat: only when the player pauses
const KEYS = "1234567890";

const $ = (id) => document.getElementById(id);
const context = $("canvas").getContext("2d");

let session = null;             // {id, model, seed, steps} as the service tells it
let start = null;               // what the session began from: {start_frame} or {image}
let maxUploadBytes = Infinity;
let held = [];                  // actions whose key or button is down; the newest is taken
let tapped = null;              // an action pressed and not yet taken, so that the shortest tap counts
let stepping = false;
let frameTimes = [];            // when the frames of the present run arrived
let previewTimer = 0;
let previewRequest = new AbortController();

// ---- the service

class ServiceError extends Error {
  constructor(status, message) { super(message); this.status = status; }
}

async function call(path, options) {
  let response;
  try {
    response = await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServiceError(0, "The service does not answer. Is it still running?");
  }
  if (response.ok) return response;
  const body = await response.json().catch(() => null);
  throw new ServiceError(response.status, body?.error?.message ?? `The service answered ${response.status}.`);
}

function title(model) {
  return model.run_id ? `${model.name} · version ${model.version}` : model.name;
}

function say(text, bad = false) {
  $("message").textContent = text;
  $("message").classList.toggle("bad", bad);
}

// ---- sessions

async function begin(from) {
  if (from.image && from.image.size > maxUploadBytes) {
    return say(`This image is too large: at most ${Math.floor(maxUploadBytes / 2 ** 20)} MiB.`, true);
  }
  const form = new FormData();
  for (const [name, value] of Object.entries(from)) form.append(name, value);
  try {
    const created = await (await call("v1/sessions", { method: "POST", body: form })).json();
    end();
    session = created;
  } catch (error) {
    return say(error.message, true);
  }
  start = from;
  frameTimes = [];
  $("latency").textContent = $("rate").textContent = "–";
  $("version").textContent = title(session.model);
  if ($("actions").childElementCount !== session.model.num_actions) makeActionButtons(session.model.num_actions);
  for (const button of $("starts").querySelectorAll("button")) {
    button.setAttribute("aria-pressed", String(from.image ? button.id === "upload" : button.dataset.name === from.start_frame));
  }
  say("");
  await draw(await call(`v1/sessions/${session.id}/frame`));
  staleUntilPreviewed(0);
}

function end() {
  previewRequest.abort();
  if (session) fetch(`v1/sessions/${session.id}`, { method: "DELETE", keepalive: true }).catch(() => {});
  session = null;
}

async function draw(response) {
  const bitmap = await createImageBitmap(await response.blob());
  const { canvas } = context;
  if (canvas.width !== bitmap.width || canvas.height !== bitmap.height) {
    [canvas.width, canvas.height] = [bitmap.width, bitmap.height];
    document.documentElement.style.setProperty("--aspect", bitmap.width / bitmap.height);
  }
  context.drawImage(bitmap, 0, 0);
  $("steps").textContent = response.headers.get("X-Steps");
}

// ---- stepping

function press(action) {
  if (held.includes(action)) return;
  held.push(action);
  tapped = action;
  showHeld();
  if (!stepping) run();
}

function release(action) {
  held = held.filter((other) => other !== action);
  showHeld();
}

async function run() {
  stepping = true;
  frameTimes = [];
  clearTimeout(previewTimer);
  previewRequest.abort();
  while (session && (tapped !== null || held.length)) {
    const action = tapped ?? held.at(-1);
    tapped = null;
    try {
      await step(action);
    } catch (error) {
      held = [];
      showHeld();
      if (error.status !== 404) { say(error.message, true); break; }
      await begin(start);
      say("The world had ended after a long pause: here it is anew.");
    }
  }
  tapped = null;
  stepping = false;
  if (session) staleUntilPreviewed(PREVIEW_AFTER_MS);
}

async function step(action) {
  $("actions").classList.add("stale");
  const began = performance.now();
  await draw(await call(`v1/sessions/${session.id}/step`, {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ action }),
  }));
  const now = performance.now();
  $("latency").textContent = Math.round(now - began);
  frameTimes = [...frameTimes.slice(-20), now];
  if (frameTimes.length > 2) {
    $("rate").textContent = ((frameTimes.length - 1) * 1000 / (now - frameTimes[0])).toFixed(1);
  }
}

// ---- what each action would do

function staleUntilPreviewed(delay) {
  $("actions").classList.add("stale");
  clearTimeout(previewTimer);
  previewTimer = setTimeout(preview, delay);
}

async function preview() {
  previewRequest = new AbortController();
  try {
    const response = await call(`v1/sessions/${session.id}/previews?repeats=${PREVIEW_REPEATS}`, { signal: previewRequest.signal });
    const { images } = await response.json();
    [...$("actions").children].forEach((button, action) => { button.querySelector("img").src = images[action]; });
    $("actions").classList.remove("stale");
  } catch (error) {
    if (error.name !== "AbortError") say(error.message, true);
  }
}

// ---- controls

function makeActionButtons(count) {
  $("actions").replaceChildren(...Array.from({ length: count }, (_, action) => {
    const button = document.createElement("button");
    const picture = document.createElement("img");
    const key = document.createElement("kbd");
    button.type = "button";
    button.setAttribute("aria-label", `action ${action + 1}`);
    picture.alt = "";
    key.textContent = String(action + 1);
    button.append(picture, key);
    button.addEventListener("pointerdown", (event) => { button.setPointerCapture(event.pointerId); press(action); });
    for (const name of ["pointerup", "pointercancel", "lostpointercapture", "blur"]) button.addEventListener(name, () => release(action));
    button.addEventListener("contextmenu", (event) => event.preventDefault());
    button.addEventListener("keydown", (event) => {
      if (event.key === " " || event.key === "Enter") { event.preventDefault(); press(action); }
    });
    button.addEventListener("keyup", (event) => { if (event.key === " " || event.key === "Enter") release(action); });
    // A click without a pointer is a screen reader's
    button.addEventListener("click", (event) => { if (event.detail === 0) { press(action); release(action); } });
    return button;
  }));
}

function showHeld() {
  [...$("actions").children].forEach((button, action) => button.classList.toggle("held", held.at(-1) === action));
}

function makeStartButtons(startFrames) {
  $("upload").before(...startFrames.map(({ name, url }) => {
    const button = document.createElement("button");
    const picture = document.createElement("img");
    button.type = "button";
    button.dataset.name = name;
    button.setAttribute("aria-label", `start frame ${name}`);
    picture.src = url;
    picture.alt = "";
    button.append(picture);
    button.addEventListener("click", () => begin({ start_frame: name }));
    return button;
  }));
}

function nextStart() {
  const names = [...$("starts").querySelectorAll("[data-name]")].map((button) => button.dataset.name);
  if (names.length) begin({ start_frame: names[(names.indexOf(start?.start_frame) + 1) % names.length] });
}

const restart = () => start && begin(start);
const COMMANDS = { r: restart, n: nextStart, u: () => $("file").click() };
$("restart").addEventListener("click", restart);
$("next").addEventListener("click", nextStart);
$("upload").addEventListener("click", COMMANDS.u);
$("file").addEventListener("change", () => {
  if ($("file").files.length) begin({ image: $("file").files[0] });
  $("file").value = "";   // so that choosing the same file again counts
});

window.addEventListener("keydown", (event) => {
  if (event.repeat || event.ctrlKey || event.metaKey || event.altKey) return;
  const action = KEYS.indexOf(event.key);
  if (action >= 0 && action < session?.model.num_actions) press(action);
  else COMMANDS[event.key.toLowerCase()]?.();
});
window.addEventListener("keyup", (event) => release(KEYS.indexOf(event.key)));
window.addEventListener("blur", () => { held = []; showHeld(); });

window.addEventListener("dragover", (event) => { event.preventDefault(); document.body.classList.add("dropping"); });
window.addEventListener("dragleave", (event) => { if (!event.relatedTarget) document.body.classList.remove("dropping"); });
window.addEventListener("drop", (event) => {
  event.preventDefault();
  document.body.classList.remove("dropping");
  const image = event.dataTransfer.files[0];
  if (image) begin({ image });
});
window.addEventListener("paste", (event) => {
  const image = event.clipboardData.files[0];
  if (image) begin({ image });
});
window.addEventListener("pagehide", end);
window.addEventListener("pageshow", (event) => { if (event.persisted) restart(); });

// A new champion serves new sessions only: say so to whoever plays an older one
setInterval(async () => {
  if (!session || document.hidden) return;
  try {
    const newest = await (await call("v1/model")).json();
    if (session && title(newest) !== title(session.model)) say(`${title(newest)} is here: Restart plays it.`);
  } catch (error) {
    say(error.message, true);
  }
}, 15000);

// ---- begin

async function open() {
  try {
    const starts = await (await call("v1/starts")).json();
    maxUploadBytes = starts.max_upload_bytes;
    makeStartButtons(starts.start_frames);
    if (starts.start_frames.length) nextStart();
    else say("This model brought no start frames: drop an image on the page, or choose one with U.");
  } catch (error) {
    say(error.message, true);
    setTimeout(open, 3000);   // the model may still be loading
  }
}

open();
