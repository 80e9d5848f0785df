// The play page: a held key steps the world, and the one beside it, as fast as the models answer.

import { Actions } from "./actions.js";
import { Beside } from "./beside.js";
import { followKeys, followPictures } from "./controls.js";
import { drawingPanel } from "./draw.js";
import { followGamepads } from "./pad.js";
import { call, persist } from "./service.js";
import { shareAnimation } from "./share.js";
import { Starts } from "./starts.js";
import { Versions } from "./versions.js";
import { title, World } from "./world.js";

const PREVIEW_REPEATS = 3;
const PREVIEW_AFTER_MS = 200;   // previews cost the model |A| frames per repeat: only when the player pauses
const LOOK_FOR_NEWER_MS = 15000;

const $ = (id) => document.getElementById(id);

let start = null;               // what the world began from: {image, button}
let opening = Promise.resolve();   // the world beside it, which takes every action too
let maxUploadBytes = Infinity;
let held = [];                  // actions whose key or button is down; the newest is taken
let tapped = null;              // an action pressed and not yet taken, so that the shortest tap counts
let stepping = false;
let resized = false;            // the newest frame is of the size that was wanted before
let previewTimer = 0;
let previewRequest = new AbortController();
let previewed = null;           // the step whose previews the buttons show

const played = new World("played", show, insist);
const beside = new Beside(show, lost, found);
const versions = new Versions($("versions"), restart);
const actions = new Actions($("actions"), $("name"), press, release);
const starts = new Starts($("starts"), begin, say);
$("worlds").prepend(played.figure, beside.world.figure);

// ---- what is said

function say(text, look = "") {
  $("message").textContent = text;
  $("message").className = `message ${look}`.trim();
}

function lost(error) {
  $("worlds").classList.add("lost");
  say(`${error.message} Trying again …`, "bad");
}

function found() {
  if (!$("worlds").classList.contains("lost")) return;
  $("worlds").classList.remove("lost");
  say("The service is back.");
}

async function insist(request, signal) {
  const answer = await persist(request, signal, lost);
  found();
  return answer;
}

// ---- worlds

async function begin(image, button) {
  begin.latest?.abort();
  const { signal } = begin.latest = new AbortController();
  start ??= { image, button };   // another version may take what this one refuses
  let created;
  try {
    created = await played.create({ image, version: versions.version }, signal);
  } catch (error) {
    if (!signal.aborted) say(error.message, "bad");
    return;
  }
  start = { image, button };
  previewRequest.abort();
  played.enter(created);
  const { model } = played.session;
  document.documentElement.style.setProperty("--aspect", model.frame_width / model.frame_height);
  $("large").hidden = !model.large_height;
  versions.show(model.version);
  actions.show(model);
  starts.mark(button);
  compare();
  say("");
  staleUntilPreviewed(0);
}

function compare() {
  document.body.classList.toggle("comparing", versions.beside !== "");
  opening = beside.open(versions.beside, played);
  played.figures(versions.beside ? versions.figures(played.session.model.version) : []);
  beside.world.figures(versions.figures(versions.beside));
}

function restart() {
  if (start) begin(start.image, start.button);
}

function leave() {
  previewRequest.abort();
  played.leave();
  beside.world.leave();
}

/** Only a world that the service no longer knows begins anew. */
async function anew() {
  const ended = played.session;
  await begin(start.image, start.button);
  if (played.session !== ended) say("The world had ended after a long pause: here it is anew.");
}

// ---- looking back

function show(t) {
  if (!played.session || !played.look(t)) return;
  beside.look(t);
  if (played.past !== null) {
    clearTimeout(previewTimer);
    previewRequest.abort();
    actions.stale(true);
    say(`Step ${t} of ${played.session.steps}: the next action goes on from here.`, "quiet");
  } else {
    say("");
    if (previewed === t) actions.stale(false);
    else if (!stepping) staleUntilPreviewed(PREVIEW_AFTER_MS);
  }
}

async function back() {
  const t = played.shown - 1;
  if (!(t >= 0)) return;
  if (t < played.film.oldest && !back.asking) {   // further than the strip remembers
    const { signal } = played;
    back.asking = true;
    try {
      await played.recall(t);
      await beside.follow((world) => world.recall(t));
    } catch (error) {
      if (!signal.aborted) say(error.message, "bad");
    } finally {
      back.asking = false;
    }
    if (signal.aborted) return;
  }
  show(t);
}

const forward = () => played.past !== null && show(played.past + 1);
const toNewest = () => played.past !== null && show(played.session.steps);

// ---- stepping

function press(action) {
  if (held.includes(action) || !played.session || action >= played.session.model.num_actions || $("draw").open) return;
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
  played.rest();
  beside.world.rest();
  clearTimeout(previewTimer);
  previewRequest.abort();
  while (played.session && (tapped !== null || held.length)) {
    const action = tapped ?? held.at(-1);
    const { signal } = played;
    tapped = null;
    try {
      await step(action, signal);
    } catch (error) {
      if (signal.aborted) continue;   // another world is played by now
      releaseAll();
      if (error.status === 404) await anew();
      else if (error.status === 409) await catchUp();
      else { say(error.message, "bad"); break; }
    }
  }
  tapped = null;
  stepping = false;
  if (played.session && resized) fetchResized();
  if (played.session && played.past === null) staleUntilPreviewed(PREVIEW_AFTER_MS);
}

/** One after the other: each world's latency is its own model's, and none is ahead of the played one. */
async function step(action, signal) {
  actions.stale(true);
  previewed = null;
  await opening;
  signal.throwIfAborted();
  while (played.past !== null) {
    const t = played.past;
    await played.branch(t);
    await beside.follow((world) => world.branch(t));
    say("");
  }
  await played.step(action);
  await beside.follow((world) => world.step(action));
}

async function catchUp() {
  const { signal } = played;
  try {
    await played.catchUp();
    await beside.follow((world) => world.catchUp());
    await beside.follow(async (world) => {
      if (world.session.steps !== played.session.steps) throw new Error("It is at another step by now: Restart begins both anew.");
    });
    say("The world was elsewhere: this is where it is now.");
  } catch (error) {
    if (!signal.aborted) say(error.message, "bad");
  }
}

/** The frames to come are large, or small again, and the newest is fetched so, once no step is under way. */
function resize() {
  if (!played.session || $("large").hidden) return;
  played.large = beside.world.large = !played.large;
  $("large").setAttribute("aria-pressed", played.large);
  resized = true;
  if (!stepping) fetchResized();
}

async function fetchResized() {
  const { signal } = played;
  resized = false;
  try {
    await played.catchUp();
    await beside.follow((world) => world.catchUp());
  } catch (error) {
    if (!signal.aborted) say(error.message, "bad");
  }
}

// ---- what each action would do

function staleUntilPreviewed(delay) {
  actions.stale(true);
  clearTimeout(previewTimer);
  previewTimer = setTimeout(preview, delay);
}

async function preview() {
  if (!played.session) return;
  const { signal } = previewRequest = new AbortController();
  const { id } = played.session;
  try {
    const { images, steps } = await insist(() => call(`v1/sessions/${id}/previews?repeats=${PREVIEW_REPEATS}`, { signal }), signal);
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

async function share(kind) {
  if (!played.session) return;
  const { id, model, steps } = played.session;
  $(kind).disabled = true;
  try {
    await shareAnimation(`v1/sessions/${id}/animation.${kind}`, `${model.name}-${steps}.${kind}`, played.isLarge());
  } catch (error) {
    say(error.message, "bad");
  } finally {
    $(kind).disabled = false;
  }
}

// ---- controls

function upload(image) {
  if (!image) return;
  if (image.size > maxUploadBytes) say(`This image is too large: at most ${Math.floor(maxUploadBytes / 2 ** 20)} MiB.`, "bad");
  else begin(image, $("upload"));
}

const openPanel = drawingPanel($("draw"), () => played.canvas, (image) => begin(image, $("sketch")));
const BUTTONS = {
  restart,
  large: resize,
  gif: () => share("gif"),
  mp4: () => share("mp4"),
  next: () => starts.next(),
  upload: () => $("file").click(),
  sketch: () => { releaseAll(); openPanel(); },
};
for (const [id, command] of Object.entries(BUTTONS)) $(id).addEventListener("click", command);
followKeys(press, release, releaseAll, {
  r: BUTTONS.restart, n: BUTTONS.next, g: BUTTONS.gif, m: BUTTONS.mp4, l: resize, u: BUTTONS.upload, d: BUTTONS.sketch,
  ArrowLeft: back, Backspace: back, ArrowRight: forward, Escape: toNewest,
});
followGamepads(press, release, (direction) => actions.ofDirection(direction));
followPictures(upload);
$("file").addEventListener("change", () => {
  upload($("file").files[0]);
  $("file").value = "";   // so that choosing the same file again counts
});
window.addEventListener("pagehide", leave);
window.addEventListener("pageshow", (event) => { if (event.persisted) restart(); });

// ---- newer versions

/** A new champion serves new sessions only: say so to whoever plays an older one unasked. */
async function lookForNewer() {
  if (!played.session || document.hidden) return;
  try {
    const newest = await call("v1/model");
    found();
    if (!played.session || title(newest) === lookForNewer.last) return;
    lookForNewer.last = title(newest);
    await versions.load();
    if (title(newest) === title(played.session.model)) return;
    say(`${title(newest)} is here: ${versions.version ? "choose it above" : "Restart plays it"}.`);
  } catch (error) {
    if (error.passing) lost(error);
    else say(error.message, "bad");
  }
}

setInterval(lookForNewer, LOOK_FOR_NEWER_MS);
document.addEventListener("visibilitychange", lookForNewer);

// ---- begin

async function open() {
  try {
    const [{ start_frames, max_upload_bytes }] = await Promise.all([call("v1/starts"), versions.load()]);
    maxUploadBytes = max_upload_bytes;
    starts.show(start_frames);
    if (start_frames.length) starts.next();
    else say("This model brought no start frames: drop an image on the page, draw one with D, or choose one with U.");
  } catch (error) {
    say(error.message, "bad");
    setTimeout(open, 3000);   // the model may still be loading
  }
}

open();
