// The start frames that a model brings along.

import { call } from "./service.js";

export class Starts {
  /** They go before the first of `list`'s own buttons; `begin(picture, button)` is called for the one that is chosen. */
  constructor(list, begin, say) { Object.assign(this, { list, begin, say }); }

  show(frames) {
    this.list.prepend(...frames.map(({ name, url }) => {
      const button = document.createElement("button");
      const picture = document.createElement("img");
      button.type = "button";
      button.dataset.name = name;
      button.setAttribute("aria-label", `start frame ${name}`);
      picture.src = url;
      picture.alt = "";
      button.append(picture);
      button.addEventListener("click", () => this.#choose(url, button));
      return button;
    }));
  }

  /** The button that the world began with. */
  mark(button) {
    for (const other of this.list.querySelectorAll("button")) other.setAttribute("aria-pressed", String(other === button));
  }

  next() {
    const buttons = [...this.list.querySelectorAll("[data-name]")];
    const last = buttons.findIndex((button) => button.getAttribute("aria-pressed") === "true");
    buttons[(last + 1) % buttons.length]?.click();
  }

  /** The picture goes to the service, not its name: another version may have another under that name. */
  async #choose(url, button) {
    try {
      this.begin(await call(url, { cache: "force-cache" }, (response) => response.blob()), button);
    } catch (error) {
      this.say(error.message, "bad");
    }
  }
}
