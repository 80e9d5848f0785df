// The action buttons, and the names that the player gives them: the model learned its actions without any.

const DIRECTIONS = ["left", "right", "up", "down"];
const LONGEST_NAME = 16;

export class Actions {
  /** `press(action)` and `release(action)` are called as buttons go down and up. */
  constructor(list, toggle, press, release) {
    Object.assign(this, { list, toggle, press, release, names: [], key: "" });
    toggle.addEventListener("click", () => this.edit(!this.editing));
  }

  get editing() { return this.list.classList.contains("naming"); }

  /** Shows the buttons of `model`, under the names they were given for this version of it. */
  show(model) {
    this.edit(false);
    this.key = `genie-names ${model.name} ${model.version}`;
    this.names = stored(this.key);
    if (this.list.childElementCount !== model.num_actions) {
      this.list.replaceChildren(...Array.from({ length: model.num_actions }, (_, action) => this.#cell(action)));
      this.list.classList.toggle("fours", model.num_actions === 4 || model.num_actions > 6);
    }
    this.#label();
  }

  held(action) { this.#buttons.forEach((button, i) => button.classList.toggle("held", i === action)); }

  stale(yes) { this.list.classList.toggle("stale", yes); }

  pictures(images) {
    this.#buttons.forEach((button, action) => { button.querySelector("img").src = images[action]; });
  }

  /** The action whose name says `direction`; of nameless ones the first four are left, right, up and down. */
  ofDirection(direction) {
    const named = this.#buttons.findIndex((_, action) => this.names[action]?.toLowerCase().includes(direction));
    if (named >= 0) return named;
    const action = DIRECTIONS.indexOf(direction);
    return action < this.list.childElementCount && !this.names[action] ? action : undefined;
  }

  edit(on, action = 0) {
    this.list.classList.toggle("naming", on);
    this.toggle.setAttribute("aria-pressed", String(on));
    this.toggle.textContent = on ? "Done" : "Name";
    for (const field of this.#fields) field.hidden = !on;
    if (on) this.#fields[action]?.select();
  }

  get #buttons() { return [...this.list.querySelectorAll("button")]; }
  get #fields() { return [...this.list.querySelectorAll("input")]; }

  #label() {
    this.#buttons.forEach((button, action) => {
      const name = this.names[action] ?? "";
      button.setAttribute("aria-label", name ? `${name}, action ${action + 1}` : `action ${action + 1}`);
      button.querySelector(".name").textContent = this.#fields[action].value = name;
    });
  }

  #rename(action, name) {
    this.names[action] = name.trim();
    try {
      localStorage.setItem(this.key, JSON.stringify(this.names));
    } catch {
      // storage that is full or off: the names last as long as the page
    }
    this.#label();
  }

  #cell(action) {
    const cell = document.createElement("div");
    const field = document.createElement("input");
    field.hidden = true;
    field.maxLength = LONGEST_NAME;
    field.placeholder = "name";
    field.enterKeyHint = "done";
    field.autocomplete = "off";
    field.setAttribute("aria-label", `name of action ${action + 1}`);
    field.addEventListener("change", () => this.#rename(action, field.value));
    field.addEventListener("keydown", (event) => {
      if (event.key === "Escape") field.value = this.names[action] ?? "";
      if (event.key !== "Enter" && event.key !== "Escape") return;
      event.preventDefault();
      event.stopPropagation();
      this.#rename(action, field.value);
      this.edit(false);
      this.#buttons[action].focus();
    });
    cell.append(this.#button(action), field);
    return cell;
  }

  #button(action) {
    const { press, release } = this;
    const button = document.createElement("button");
    const picture = document.createElement("img");
    const key = document.createElement("kbd");
    const name = document.createElement("span");
    button.type = "button";
    picture.alt = "";
    name.className = "name";
    key.textContent = String(action + 1);
    button.append(picture, key, name);
    button.addEventListener("pointerdown", (event) => { button.setPointerCapture(event.pointerId); press(action); });
    for (const event of ["pointerup", "pointercancel", "lostpointercapture", "blur"]) button.addEventListener(event, () => release(action));
    button.addEventListener("contextmenu", (event) => event.preventDefault());
    button.addEventListener("keydown", (event) => {
      if (event.key === " " || event.key === "Enter") { event.preventDefault(); press(action); }
      if (event.key === "F2") this.edit(true, action);
    });
    button.addEventListener("keyup", (event) => { if (event.key === " " || event.key === "Enter") release(action); });
    // A click without a pointer is a screen reader's
    button.addEventListener("click", (event) => { if (event.detail === 0) { press(action); release(action); } });
    return button;
  }
}

function stored(key) {
  try {
    const names = JSON.parse(localStorage.getItem(key));
    return Array.isArray(names) ? names.map((name) => String(name ?? "").slice(0, LONGEST_NAME)) : [];
  } catch {
    return [];
  }
}
