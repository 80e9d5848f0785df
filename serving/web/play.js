// The play page: one world at a time; a held key steps it as fast as the model answers.

import { Actions } from "./actions.js";
import { drawingPanel } from "./draw.js";
import { Filmstrip } from "./filmstrip.js";
import { followGamepads } from "./pad.js";
import { call, json, persist, picture } from "./service.js";
import { shareAnimation } from "./share.js";

const PREVIEW_REPEATS = 3;
const PREVIEW_AFTER_MS = 200;   // previews cost the model |A| frames per repeat: only when the player pauses
const STEP_TIMEOUT_MS = 30000;  // a connection may die without a word; the step is then sent again under its number
const KEYS = "1234567890";

const $ = (id) => document.getElementById(id);
const context = $("canvas").getContext("2d");

let session = null;             // {id, model, seed, steps} as the service tells it
let world = new AbortController();   // aborted when the player leaves for another world; a branch stays in it
let start = null;               // what the world began from: {form, button}
let past = null;                // the past frame on the screen, from which the next action branches
let maxUploadBytes = Infinity;
let held = [];                  // actions whose key or button is down; the newest is taken
let tapped = null;              // an action pressed and not yet taken, so that the shortest tap counts
let stepping = false;
let frameTimes = [];            // when the frames of the present run arrived
let previewTimer = 0;
let previewRequest = new AbortController();
let previewed = null;           // the step whose previews the buttons show

const actions = new Actions($("actions"), $("name"), press, release);
const film = new Filmstrip($("film"), show);

// ---- what is said

function say(text, look = "") {
  $("message").textContent = text;
  $("message").className = `message ${look}`.trim();
}

function title(model) {
  return model.run_id ? `${model.name} · version ${model.version}` : model.name;
}

function lost(error) {
  $("screen").classList.add("lost");
  say(`${error.message} Trying again …`, "bad");
}

function found() {
  if (!$("screen").classList.contains("lost")) return;
  $("screen").classList.remove("lost");
  say("The service is back.");
}

async function insist(request, { signal }) {
  const answer = await persist(request, signal, lost);
  found();
  return answer;
}

// ---- worlds

async function begin(form, button) {
  if (form.image && form.image.size > maxUploadBytes) {
    return say(`This image is too large: at most ${Math.floor(maxUploadBytes / 2 ** 20)} MiB.`, "bad");
  }
  const body = new FormData();
  for (const [name, value] of Object.entries(form)) body.append(name, value);
  begin.latest?.abort();
  const mine = begin.latest = new AbortController();
  let created, first;
  try {
    created = await insist(() => call("v1/sessions", { method: "POST", body }), mine);
    first = await insist(() => call(`v1/sessions/${created.id}/frame`, {}, picture), mine);
  } catch (error) {
    if (created) drop(created.id);
    if (!mine.signal.aborted) say(error.message, "bad");
    return;
  }
  if (mine.signal.aborted) return drop(created.id);   // another was asked for meanwhile
  end();
  session = created;
  world = new AbortController();
  start = { form, button };
  look(null);
  frameTimes = [];
  $("latency").textContent = $("rate").textContent = "–";
  $("version").textContent = title(session.model);
  actions.show(session.model);
  for (const other of $("starts").querySelectorAll("button")) other.setAttribute("aria-pressed", String(other === button));
  film.clear();
  say("");
  took(first);
  staleUntilPreviewed(0);
}

function end() {
  world.abort();
  previewRequest.abort();
  if (session) drop(session.id);
  session = null;
}

function drop(id) {
  fetch(`v1/sessions/${id}`, { method: "DELETE", keepalive: true }).catch(() => {});
}

/** Only a world that the service no longer knows begins anew. */
async function anew() {
  const ended = session;
  await begin(start.form, start.button);
  if (session !== ended) say("The world had ended after a long pause: here it is anew.");
}

/** Frame t came from the service; it is shown unless the player looks back. */
function took({ t, bitmap }) {
  session.steps = t;
  previewed = null;
  film.add(t, bitmap);
  if (past === null) paint(t);
}

function paint(t) {
  const frame = film.frame(t);
  const { canvas } = context;
  if (canvas.width !== frame.width || canvas.height !== frame.height) {
    [canvas.width, canvas.height] = [frame.width, frame.height];
    document.documentElement.style.setProperty("--aspect", frame.width / frame.height);
  }
  context.drawImage(frame, 0, 0);
  $("steps").textContent = t;
  film.mark(t);
}

// ---- looking back

/** The next action branches from frame t, unless it is the newest, or null. */
function look(t) {
  past = t !== null && t < session.steps ? t : null;
  $("screen").classList.toggle("past", past !== null);
  $("newest").textContent = past === null ? "" : `/${session.steps}`;
}

function show(t) {
  if (!session || !film.frame(t) || t === (past ?? session.steps)) return;
  look(t);
  paint(t);
  if (past !== null) {
    clearTimeout(previewTimer);
    previewRequest.abort();
    actions.stale(true);
    say(`Step ${t} of ${session.steps}: the next action goes on from here.`, "quiet");
  } else {
    say("");
    if (previewed === t) actions.stale(false);
    else if (!stepping) staleUntilPreviewed(PREVIEW_AFTER_MS);
  }
}

async function back() {
  const t = (past ?? session?.steps) - 1;
  if (t < 0 || !session) return;
  if (t < film.oldest && !back.asking) {   // further than the strip remembers
    back.asking = true;
    const { id } = session;
    try {
      const frame = await call(`v1/sessions/${id}/frames/${t}`, {}, picture);
      if (session?.id === id && t === film.oldest - 1) film.prepend(t, frame.bitmap);
    } catch (error) {
      say(error.message, "bad");
    } finally {
      back.asking = false;
    }
  }
  show(t);
}

const forward = () => past !== null && show(past + 1);
const toNewest = () => past !== null && show(session.steps);

/** The world goes on from frame t in a session of its own; what came after t is let go. */
async function branch(t) {
  const mine = world;
  const branched = await insist(() => call(`v1/sessions/${session.id}/branch`, json({ t })), mine);
  if (mine.signal.aborted) drop(branched.id);
  mine.signal.throwIfAborted();
  drop(session.id);
  session = branched;
  film.cut(t);
  look(past);   // the player may have looked further back meanwhile
  say("");
}

// ---- stepping

function press(action) {
  if (held.includes(action) || !session || action >= session.model.num_actions || $("draw").open) return;
  held.push(action);
  tapped = action;
  actions.held(action);
  if (!stepping) run();
}

function release(action) {
  held = held.filter((other) => other !== action);
  actions.held(held.at(-1));
}

function releaseAll() {
  held = [];
  actions.held(undefined);
}

async function run() {
  stepping = true;
  frameTimes = [];
  clearTimeout(previewTimer);
  previewRequest.abort();
  while (session && (tapped !== null || held.length)) {
    const action = tapped ?? held.at(-1);
    const mine = world;
    tapped = null;
    try {
      await step(action);
    } catch (error) {
      if (mine.signal.aborted) continue;   // another world is played by now
      releaseAll();
      if (error.status === 404) await anew();
      else if (error.status === 409) await catchUp();
      else { say(error.message, "bad"); break; }
    }
  }
  tapped = null;
  stepping = false;
  if (session && past === null) staleUntilPreviewed(PREVIEW_AFTER_MS);
}

async function step(action) {
  actions.stale(true);
  while (past !== null) await branch(past);
  const mine = world;
  const began = performance.now();
  const { id, steps } = session;
  const frame = await insist(() => call(`v1/sessions/${id}/step`, {
    ...json({ action, step: steps + 1 }),   // the number keeps a repeated request from being taken twice
    signal: AbortSignal.timeout(STEP_TIMEOUT_MS),
  }, picture), mine);
  mine.signal.throwIfAborted();
  took(frame);
  const now = performance.now();
  $("latency").textContent = Math.round(now - began);
  frameTimes = [...frameTimes.slice(-20), now];
  if (frameTimes.length > 2) {
    $("rate").textContent = ((frameTimes.length - 1) * 1000 / (now - frameTimes[0])).toFixed(1);
  }
}

/** The service is at another step than the page: the service is right. */
async function catchUp() {
  const mine = world;
  try {
    const newest = await insist(() => call(`v1/sessions/${session.id}/frame`, {}, picture), mine);
    if (newest.t > session.steps + 1) film.clear();   // what lies between was never here
    look(null);
    took(newest);
    say("The world was elsewhere: this is where it is now.");
  } catch (error) {
    if (!mine.signal.aborted) say(error.message, "bad");
  }
}

// ---- what each action would do

function staleUntilPreviewed(delay) {
  actions.stale(true);
  clearTimeout(previewTimer);
  previewTimer = setTimeout(preview, delay);
}

async function preview() {
  if (!session) return;
  const mine = previewRequest = new AbortController();
  const { signal } = mine;
  const { id } = session;
  try {
    const { images, steps } = await insist(() => call(`v1/sessions/${id}/previews?repeats=${PREVIEW_REPEATS}`, { signal }), mine);
    if (signal.aborted) return;
    actions.pictures(images);
    actions.stale(false);
    previewed = steps;
  } catch (error) {
    if (signal.aborted) return;
    if (error.status === 404) await anew();
    else say(error.message, "bad");
  }
}

// ---- sharing

async function share() {
  if (!session) return;
  const { id, model, steps } = session;
  $("share").disabled = true;
  try {
    await shareAnimation(`v1/sessions/${id}/animation.gif`, `${model.name}-${steps}.gif`);
  } catch (error) {
    say(error.message, "bad");
  } finally {
    $("share").disabled = false;
  }
}

// ---- controls

function makeStartButtons(startFrames) {
  $("sketch").before(...startFrames.map(({ name, url }) => {
    const button = document.createElement("button");
    const picture = document.createElement("img");
    button.type = "button";
    button.dataset.name = name;
    button.setAttribute("aria-label", `start frame ${name}`);
    picture.src = url;
    picture.alt = "";
    button.append(picture);
    button.addEventListener("click", () => begin({ start_frame: name }, button));
    return button;
  }));
}

function nextStart() {
  const buttons = [...$("starts").querySelectorAll("[data-name]")];
  buttons[(buttons.indexOf(start?.button) + 1) % buttons.length]?.click();
}

function upload(image) {
  if (image) begin({ image }, $("upload"));
}

const restart = () => start && begin(start.form, start.button);
const draw = drawingPanel($("draw"), () => context.canvas, (image) => begin({ image }, $("sketch")));
const COMMANDS = { r: restart, n: nextStart, u: () => $("file").click(), d: () => { releaseAll(); draw(); }, g: share };
const REWINDS = { ArrowLeft: back, Backspace: back, ArrowRight: forward, Escape: toNewest };

$("restart").addEventListener("click", restart);
$("next").addEventListener("click", nextStart);
$("share").addEventListener("click", share);
$("sketch").addEventListener("click", COMMANDS.d);
$("upload").addEventListener("click", COMMANDS.u);
$("file").addEventListener("change", () => {
  upload($("file").files[0]);
  $("file").value = "";   // so that choosing the same file again counts
});

window.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.target.closest?.("input, dialog")) return;
  if (REWINDS[event.key]) { event.preventDefault(); return REWINDS[event.key](); }
  if (event.repeat) return;
  const action = KEYS.indexOf(event.key);
  if (action >= 0) press(action);
  else COMMANDS[event.key.toLowerCase()]?.();
});
window.addEventListener("keyup", (event) => release(KEYS.indexOf(event.key)));
window.addEventListener("blur", releaseAll);
followGamepads(press, release, (direction) => actions.ofDirection(direction));

window.addEventListener("dragover", (event) => { event.preventDefault(); document.body.classList.add("dropping"); });
window.addEventListener("dragleave", (event) => { if (!event.relatedTarget) document.body.classList.remove("dropping"); });
window.addEventListener("drop", (event) => {
  event.preventDefault();
  document.body.classList.remove("dropping");
  upload(event.dataTransfer.files[0]);
});
window.addEventListener("paste", (event) => upload(event.clipboardData.files[0]));
window.addEventListener("pagehide", end);
window.addEventListener("pageshow", (event) => { if (event.persisted) restart(); });

// A new champion serves new sessions only: say so to whoever plays an older one
setInterval(async () => {
  if (!session || document.hidden) return;
  try {
    const newest = await call("v1/model");
    found();
    if (session && title(newest) !== title(session.model)) say(`${title(newest)} is here: Restart plays it.`);
  } catch (error) {
    if (error.passing) lost(error);
    else say(error.message, "bad");
  }
}, 15000);

// ---- begin

async function open() {
  try {
    const starts = await call("v1/starts");
    maxUploadBytes = starts.max_upload_bytes;
    makeStartButtons(starts.start_frames);
    if (starts.start_frames.length) nextStart();
    else say("This model brought no start frames: drop an image on the page, draw one with D, or choose one with U.");
  } catch (error) {
    say(error.message, "bad");
    setTimeout(open, 3000);   // the model may still be loading
  }
}

open();
