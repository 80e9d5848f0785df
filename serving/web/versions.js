// Which versions are played: the next world's, and one beside it. Both are in the address: ?version=3&beside=2.

import { call } from "./service.js";

const HEADLINES = {   // of all held-out metrics the few PSNRs that tell a player most, at their furthest horizon
  delta_psnr_t: (t) => `Δ${t}`,
  rollout_psnr_t: (t) => `frame ${t}`,
  tokenizer_psnr: () => "tokenizer",
};

export class Versions {
  #known = [];   // the newest first

  /** `changed()` is called when the player chooses. */
  constructor(box, changed) {
    const asked = new URLSearchParams(location.search);
    this.box = box;
    [this.playedList, this.besideList] = box.querySelectorAll("select");
    this.version = asked.get("version") ?? "";   // "": whatever the service serves
    this.beside = asked.get("beside") ?? "";     // "": nothing
    this.playedList.addEventListener("change", () => this.#choose("version", this.playedList, changed));
    this.besideList.addEventListener("change", () => this.#choose("beside", this.besideList, changed));
  }

  async load() {
    this.#known = await call("v1/models").catch(() => []);   // without a registry there is nothing to choose from
    this.#fill();
  }

  /** A world of this version is played. */
  show(version) {
    this.playing = version;
    this.#fill();
  }

  /** [[name, value], …] of a version's held-out metrics. */
  figures(version) {
    const { metrics = {} } = this.#find(version) ?? {};
    return Object.entries(HEADLINES).flatMap(([name, label]) => {
      const horizons = Object.keys(metrics).filter((key) => key.startsWith(name)).map((key) => key.slice(name.length));
      const furthest = horizons.filter((t) => /^\d*$/.test(t)).sort((a, b) => b - a)[0];
      if (furthest === undefined) return [];
      const [value, interval] = [metrics[name + furthest], metrics[`${name}${furthest}_ci95`]];
      return [[label(furthest), `${value.toFixed(1)}${interval ? ` ± ${interval.toFixed(1)}` : ""} dB`]];
    });
  }

  #find(asked) { return this.#known.find(({ version, aliases }) => version === asked || aliases.includes(asked)); }

  #fill() {
    const { playing = this.version, beside } = this;
    this.#options(this.playedList, [], playing);
    this.#options(this.besideList, [new Option("nothing", "")], beside);
    for (const option of this.besideList.options) option.disabled = option.value === playing && option.value !== beside;
    this.box.hidden = this.#known.length < 2 && !beside;
  }

  /** What is asked for is among them, even where the registry does not know it. */
  #options(list, first, asked) {
    const value = this.#find(asked)?.version ?? asked;
    const known = this.#known.map(({ version, aliases }) => new Option([version, ...aliases].join(" · "), version));
    const strange = [...first, ...known].some((option) => option.value === value) ? [] : [new Option(value, value)];
    list.replaceChildren(...first, ...known, ...strange);
    list.value = value;
  }

  #choose(name, list, changed) {
    this[name] = list.value;
    const address = new URL(location.href);
    if (list.value) address.searchParams.set(name, list.value);
    else address.searchParams.delete(name);
    history.replaceState(null, "", address);
    list.blur();   // the number keys are the player's again
    changed();
  }
}
