// Keys, dropped and pasted pictures.

const NUMBERS = "1234567890";

/** `press(action)` and `release(action)` as number keys go down and up; `keys` is {key: what it does}. Letters held do it once. */
export function followKeys(press, release, releaseAll, keys) {
  window.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || event.target.closest?.("input, select, dialog")) return;
    const action = NUMBERS.indexOf(event.key);
    const command = keys[event.key.length === 1 ? event.key.toLowerCase() : event.key];
    if (action >= 0 && !event.repeat) press(action);
    if (!command || (event.repeat && event.key.length === 1)) return;
    event.preventDefault();
    command();
  });
  window.addEventListener("keyup", (event) => release(NUMBERS.indexOf(event.key)));
  window.addEventListener("blur", releaseAll);
}

/** `take(file)` is called with what is dropped on the page or pasted into it. */
export function followPictures(take) {
  const dropping = (yes) => document.body.classList.toggle("dropping", yes);
  window.addEventListener("dragover", (event) => { event.preventDefault(); dropping(true); });
  window.addEventListener("dragleave", (event) => { if (!event.relatedTarget) dropping(false); });
  window.addEventListener("drop", (event) => {
    event.preventDefault();
    dropping(false);
    take(event.dataTransfer.files[0]);
  });
  window.addEventListener("paste", (event) => take(event.clipboardData.files[0]));
}
