// The session's latest frames, kept as they came: to look back asks the service nothing.

const KEPT = 24;

export class Filmstrip {
  /** `choose(t)` is called when the player picks frame t. */
  constructor(list, choose) {
    this.list = list;
    list.addEventListener("click", (event) => {
      const option = event.target.closest("[role=option]");
      if (option) choose(Number(option.dataset.t));
    });
    list.addEventListener("keydown", (event) => {
      const end = { Home: list.firstElementChild, End: list.lastElementChild }[event.key];
      if (!end) return;
      event.preventDefault();
      choose(Number(end.dataset.t));
    });
  }

  get oldest() { return Number(this.list.firstElementChild?.dataset.t ?? NaN); }

  /** The canvas that holds frame t, or undefined when it is no longer kept. */
  frame(t) { return this.#option(t)?.firstElementChild; }

  add(t, bitmap) {
    this.cut(t - 1);
    this.list.append(this.#made(t, bitmap));
    while (this.list.childElementCount > KEPT) this.list.firstElementChild.remove();
  }

  /** Frame t, fetched from before the oldest that is kept. */
  prepend(t, bitmap) { this.list.prepend(this.#made(t, bitmap)); }

  /** Frames after t are no longer this world's past. */
  cut(t) {
    while (this.list.lastElementChild?.dataset.t > t) this.list.lastElementChild.remove();
  }

  clear() { this.cut(-1); }

  /** Marks frame t as the one on the screen. */
  mark(t) {
    this.list.querySelector("[aria-selected=true]")?.setAttribute("aria-selected", "false");
    const marked = this.#option(t);
    marked.setAttribute("aria-selected", "true");
    this.list.setAttribute("aria-activedescendant", marked.id);
    // scrollIntoView would scroll the page too
    const { offsetLeft: left, offsetWidth: width } = marked;
    const { scrollLeft, clientWidth } = this.list;
    if (left < scrollLeft) this.list.scrollLeft = left - width;
    else if (left + width > scrollLeft + clientWidth) this.list.scrollLeft = left + 2 * width - clientWidth;
  }

  #option(t) { return this.list.querySelector(`[data-t="${t}"]`); }

  #made(t, bitmap) {
    const item = document.createElement("div");
    const canvas = document.createElement("canvas");
    const number = document.createElement("span");
    item.id = `${this.list.id}-${t}`;
    item.dataset.t = t;
    item.setAttribute("role", "option");
    item.setAttribute("aria-label", t ? `frame ${t}` : "frame 0, the prompt");
    item.setAttribute("aria-selected", "false");
    [canvas.width, canvas.height] = [bitmap.width, bitmap.height];
    canvas.getContext("2d").drawImage(bitmap, 0, 0);
    number.textContent = t;
    item.append(canvas, number);
    return item;
  }
}
