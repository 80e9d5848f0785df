// The labelling page: a clip plays, a key labels it, the next one is there already.

import { call, persist } from "../web/service.js";

const AHEAD = 3;
const SPEEDS = [1, 2, 4, 8];
const element = (id) => document.getElementById(id);
const [screen, canvas, choices] = [".screen", "canvas", "#choices"].map((path) => document.querySelector(path));
const buttons = [...choices.querySelectorAll("button")];
const brush = canvas.getContext("2d");
const always = new AbortController().signal;

const seen = [];    // clips in the order they were shown
let at = -1;        // which of them is
let ahead = [];     // promises of those that come, each loaded
let playing = null; // the sheet on the screen
let busy = true;    // a label is on its way, or a clip
let paused = false;
let speed = SPEEDS.indexOf(Number(localStorage.getItem("speed")));
if (speed < 0) speed = 2;

const clip = () => seen[at] ?? null;

function say(text, kind = "") {
  element("message").textContent = text;
  element("message").className = `message ${kind}`;
}

/** Asks until it is answered: the service may be started again. */
function ask(path, options) {
  return persist(() => call(path, options), always, (error) => say(`${error.message} Trying again.`, "bad"));
}

function picture({ position, digest }) {
  return persist(() => call(`clips/${position}/sheet.jpg?digest=${digest}`, {}, async (response) =>
    createImageBitmap(await response.blob())), always, (error) => say(`${error.message} Trying again.`, "bad"));
}

/** The next clip without a label behind `before`, with its pictures; null where there is none. */
async function following(before) {
  const found = await before;
  if (found === null) return null;
  const { clip, progress } = await ask(`clips/next?after=${found.position}`);
  count(progress);
  return clip && { ...clip, sheet: await picture(clip) };
}

function fill() {
  while (ahead.length < AHEAD) ahead.push(following(ahead.at(-1) ?? Promise.resolve(seen.at(-1) ?? { position: -1 })));
}

function count({ clips, labelled, counts, videos }) {
  element("done").textContent = `${labelled} of ${clips} labelled; good ones of ${videos[5]} videos, bad ones of ${videos[1]}`;
  for (const button of buttons) button.querySelector("i").textContent = counts[button.value] || "";
}

/** Runs `change`, with all keys waiting until it ended. */
async function alone(change) {
  if (busy) return;
  await occupied(change);
}

async function occupied(change) {
  busy = true;
  try {
    await change();
  } catch (error) {
    say(error.message, "bad");
  }
  busy = false;
}

async function forward() {
  if (at + 1 < seen.length) return show(at + 1);
  const next = await ahead[0];
  if (next === null) {
    ahead = [];  // what was skipped may come now
    return finish();
  }
  ahead.shift();
  seen.push(next);
  fill();
  return show(seen.length - 1);
}

function finish() {
  const skipped = seen.some((clip) => clip.label === null);
  if (!clip()) say("All clips are labelled.");
  else say(`That was the last clip.${skipped ? " Load the page again for those that were skipped." : ""}`);
}

async function show(index) {
  const shown = seen[index];
  const sheet = shown.sheet ?? await picture(shown);
  shown.sheet = null;  // the browser's cache keeps it for a way back
  at = index;
  playing?.sheet.close();
  const [width, height] = [sheet.width / shown.columns, sheet.height / Math.ceil(shown.frames / shown.columns)];
  playing = { ...shown, sheet, width, height, time: 0 };
  [canvas.width, canvas.height] = [width, height];
  screen.style.setProperty("--aspect", width / height);
  element("title").textContent = shown.title || shown.source;
  element("title").title = shown.source;
  element("place").textContent = `from second ${Math.round(shown.start_seconds)}`;
  mark();
  say("");
}

function mark() {
  const label = clip()?.label ?? null;
  for (const button of buttons) button.setAttribute("aria-pressed", String(Number(button.value) === label));
  screen.classList.toggle("labelled", label !== null);
  element("back").disabled = at < 1;
  element("unlabel").disabled = label === null;
}

/** Keeps the label; only then the next clip comes. */
async function label(value) {
  const shown = clip();
  if (!shown) return;
  const body = { method: "PUT", headers: { "Content-Type": "application/json" }, body: JSON.stringify({ label: value }) };
  const kept = await ask(`clips/${shown.position}/label`, body);
  shown.label = kept.clip.label;
  count(kept.progress);
  mark();
  if (value !== null) await forward();
}

const DO = {
  back: () => alone(() => at > 0 && show(at - 1)),
  skip: () => alone(() => clip() && forward()),
  unlabel: () => alone(() => clip()?.label && label(null)),
  pause: () => {
    paused = !paused;
    element("pause").setAttribute("aria-pressed", String(paused));
  },
  speed: () => faster((speed + 1) % SPEEDS.length),
};
const KEYS = { ArrowLeft: "back", Backspace: "back", ArrowRight: "skip", s: "skip", 0: "unlabel", Delete: "unlabel", " ": "pause", f: "speed" };

function faster(index) {
  speed = index;
  localStorage.setItem("speed", SPEEDS[speed]);
  element("speed").firstChild.data = `${SPEEDS[speed]}× `;
}

window.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.altKey || event.metaKey || event.repeat) return;
  const name = KEYS[event.key.length === 1 ? event.key.toLowerCase() : event.key];
  if (/^[1-5]$/.test(event.key)) alone(() => label(Number(event.key)));
  else if (name) DO[name]();
  else return;
  event.preventDefault();
});
for (const [name, act] of Object.entries(DO)) element(name).addEventListener("click", act);
for (const button of buttons) button.addEventListener("click", () => alone(() => label(Number(button.value))));

let drawnAt = 0;
function draw(now) {
  const passed = Math.min(now - drawnAt, 200) / 1000;
  drawnAt = now;
  if (playing) {
    const whole = playing.frames * playing.seconds;
    if (!paused) playing.time = (playing.time + passed * SPEEDS[speed]) % whole;
    const frame = Math.min(Math.floor(playing.time / playing.seconds), playing.frames - 1);
    const [x, y] = [frame % playing.columns, Math.floor(frame / playing.columns)];
    const { sheet, width, height } = playing;
    brush.drawImage(sheet, x * width, y * height, width, height, 0, 0, width, height);
    element("time").style.width = `${100 * playing.time / whole}%`;
    canvas.dataset.frame = frame;
  }
  requestAnimationFrame(draw);
}

faster(speed);
fill();
requestAnimationFrame(draw);
occupied(forward);
