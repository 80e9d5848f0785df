// One world: a session of the service, the frames it led to, and the figure that shows them.

import { Filmstrip } from "./filmstrip.js";
import { call, json, picture } from "./service.js";

const STEP_TIMEOUT_MS = 30000;  // a connection may die without a word; the step is then sent again under its number
const RATED_FRAMES = 20;

export class World {
  session = null;                 // {id, model, seed, steps, …} as the service tells it
  prompt = null;                  // frame 0, as PNG
  large = false;                  // the player wants larger frames; they come where the version has them
  past = null;                    // the past frame that is shown, from which the next action branches
  #life = new AbortController();  // aborted when the world is left for another; a branch stays in it
  #frameTimes = [];               // when the frames of the present run arrived

  /** `choose(t)` is called when the player picks a past frame; `insist(request, signal)` asks until it is answered. */
  constructor(name, choose, insist) {
    this.figure = document.getElementById("world").content.firstElementChild.cloneNode(true);
    this.figure.id = name;
    const list = this.#find(".film");
    list.id = `${name}-film`;
    this.film = new Filmstrip(list, choose);
    this.canvas = this.#find("canvas");
    this.insist = insist;
  }

  get signal() { return this.#life.signal; }
  get shown() { return this.past ?? this.session?.steps; }

  // ---- its session

  /** A new session and its first frame; the figure goes on to show what it did. */
  async create(fields, signal) {
    const body = new FormData();
    for (const [name, value] of Object.entries(fields)) if (value !== "") body.append(name, value);
    const session = await this.insist(() => call("v1/sessions", { method: "POST", body }), signal);
    try {
      const prompt = await this.insist(() => call(`v1/sessions/${session.id}/frame`, {}, picture), signal);
      const frame = this.isLarge(session) ? await this.insist(() => this.#picture("frame", {}, session), signal) : prompt;
      signal.throwIfAborted();   // another was asked for meanwhile
      return { session, prompt: prompt.blob, frame };
    } catch (error) {
      drop(session.id);
      throw error;
    }
  }

  /** The figure shows what `create` brought, in place of what it did. */
  enter({ session, prompt, frame }) {
    this.leave();
    this.session = session;
    this.prompt = prompt;
    this.name(title(session.model));
    this.#took(frame);
  }

  leave() {
    this.#life.abort();
    this.#life = new AbortController();
    if (this.session) drop(this.session.id);
    this.session = this.past = null;
    this.film.clear();
    this.rest();
    this.tell("");
    this.#write(".rate", "–");
    this.#write(".latency", "–");
  }

  async step(action) {
    const { signal } = this;
    const { steps } = this.session;
    const began = performance.now();
    const frame = await this.insist(() => this.#picture("step", {
      ...json({ action, step: steps + 1 }),   // the number keeps a repeated request from being taken twice
      signal: AbortSignal.timeout(STEP_TIMEOUT_MS),
    }), signal);
    signal.throwIfAborted();
    this.#took(frame);
    this.#measure(began, performance.now());
  }

  /** It goes on from frame t in a session of its own; what came after t is let go. */
  async branch(t) {
    const { signal } = this;
    const branched = await this.insist(() => call(`v1/sessions/${this.session.id}/branch`, json({ t })), signal);
    if (signal.aborted) drop(branched.id);
    signal.throwIfAborted();
    drop(this.session.id);
    this.session = branched;
    this.film.cut(t);
    if (this.past >= t) this.past = null;   // unless the player looked further back meanwhile
    this.#paint();
  }

  /** The service is at another step than the page: the service is right. */
  async catchUp() {
    const { signal } = this;
    const newest = await this.insist(() => this.#picture("frame"), signal);
    signal.throwIfAborted();
    if (newest.t > this.session.steps + 1) this.film.clear();   // what lies between was never here
    this.past = null;
    this.#took(newest);
  }

  isLarge(session = this.session) { return this.large && Boolean(session.model.large_height); }

  /** What the session answers there: a frame, large where the player wants it. */
  #picture(path, options = {}, session = this.session) {
    return call(`v1/sessions/${session.id}/${path}${this.isLarge(session) ? "?large=true" : ""}`, options, picture);
  }

  // ---- what is shown

  /** Frame t, if it is not shown already: the next action branches from it, unless it is the newest. */
  look(t) {
    if (t === this.shown || !this.film.frame(t)) return false;
    this.past = t < this.session.steps ? t : null;
    this.#paint();
    return true;
  }

  /** Fetches frame t where the strip no longer has it. */
  async recall(t) {
    const { signal } = this;
    const { id } = this.session;
    if (t >= this.film.oldest) return;
    const frame = await this.insist(() => this.#picture(`frames/${t}`), signal);
    if (this.session?.id === id && t === this.film.oldest - 1) this.film.prepend(t, frame.bitmap);
  }

  /** A run of steps begins: how long the player rested before is no part of the rate. */
  rest() { this.#frameTimes = []; }

  name(text) { this.#write(".version", text); }

  /** Why there is no picture; "" where there is one. */
  tell(reason) { this.#write(".reason", reason); }

  /** [[name, value], …] */
  figures(rows) {
    this.#find(".figures").replaceChildren(...rows.map(([name, value]) => {
      const row = document.createElement("div");
      const [term, figure] = [document.createElement("dt"), document.createElement("dd")];
      [term.textContent, figure.textContent] = [name, value];
      row.append(term, figure);
      return row;
    }));
  }

  #took({ t, bitmap }) {
    this.session.steps = t;
    this.film.add(t, bitmap);
    this.#paint();
  }

  #paint() {
    const frame = this.film.frame(this.shown);
    const { canvas } = this;
    if (canvas.width !== frame.width || canvas.height !== frame.height) {
      [canvas.width, canvas.height] = [frame.width, frame.height];
      this.figure.style.setProperty("--aspect", frame.width / frame.height);
    }
    canvas.getContext("2d").drawImage(frame, 0, 0);
    this.film.mark(this.shown);
    this.figure.classList.toggle("past", this.past !== null);
    this.#write(".steps", this.shown);
    this.#write(".newest", this.past === null ? "" : `/${this.session.steps}`);
  }

  #measure(began, now) {
    const times = this.#frameTimes = [...this.#frameTimes.slice(-RATED_FRAMES), now];
    this.#write(".latency", Math.round(now - began));
    if (times.length > 2) this.#write(".rate", ((times.length - 1) * 1000 / (now - times[0])).toFixed(1));
  }

  #find(selector) { return this.figure.querySelector(selector); }
  #write(selector, text) { this.#find(selector).textContent = text; }
}

export function title(model) {
  return model.run_id ? `${model.name} · version ${model.version}` : model.name;
}

export function drop(id) {
  fetch(`v1/sessions/${id}`, { method: "DELETE", keepalive: true }).catch(() => {});
}
