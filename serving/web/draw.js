// A small drawing panel: a prompt that nobody has photographed.

const COLOURS = {
  black: "#1b1c20", white: "#ffffff", grey: "#8b929c", brown: "#7b4f2c",
  green: "#3f9d4f", blue: "#55aee6", yellow: "#f3c63a", red: "#d8483f",
};
const BRUSHES = { fine: 1 / 64, medium: 1 / 22, broad: 1 / 8 };   // of the canvas's width
const LONGER_SIDE = 512;
const UNDOS = 20;

/** `frame()` is the canvas on the screen; `play(file)` is given the drawing. Returns what opens the panel. */
export function drawingPanel(dialog, frame, play) {
  const find = (name) => dialog.querySelector(`[name=${name}]`);
  const canvas = dialog.querySelector("canvas");
  const context = canvas.getContext("2d", { willReadFrequently: true });
  const custom = find("custom");
  let past = [];
  let last = null;   // where the stroke under way has come to

  dialog.querySelector(".palette").prepend(...Object.entries(COLOURS).map(([name, colour], i) => {
    const choice = radio("colour", name, i === 0, colour);
    choice.lastElementChild.style.background = colour;
    return choice;
  }));
  dialog.querySelector(".brushes").append(...Object.keys(BRUSHES).map((name) => radio("brush", `${name} brush`, name === "medium", name)));

  const chosen = (group) => dialog.querySelector(`[name=${group}]:checked`);
  const colour = () => chosen("colour")?.value ?? custom.value;
  // "input" does not come when the colour it already has is picked again
  for (const event of ["click", "input"]) {
    custom.addEventListener(event, () => { const other = chosen("colour"); if (other) other.checked = false; });
  }

  // ---- the drawing

  function remember() {
    past = [...past.slice(1 - UNDOS), context.getImageData(0, 0, canvas.width, canvas.height)];
    find("undo").disabled = false;
  }

  function undo() {
    if (past.length) context.putImageData(past.pop(), 0, 0);
    find("undo").disabled = !past.length;
  }

  function paint(fill) {
    context.fillStyle = fill;
    context.fillRect(0, 0, canvas.width, canvas.height);
  }

  function stroke(to) {
    context.strokeStyle = colour();
    context.lineWidth = BRUSHES[chosen("brush").value] * canvas.width;
    context.lineCap = context.lineJoin = "round";
    context.beginPath();
    context.moveTo(last.x, last.y);
    context.lineTo(to.x, to.y);   // a line to itself is a dot
    context.stroke();
    last = to;
  }

  function place(event) {
    const box = canvas.getBoundingClientRect();
    return {
      x: (event.clientX - box.left) * canvas.width / box.width,
      y: (event.clientY - box.top) * canvas.height / box.height,
    };
  }

  canvas.addEventListener("pointerdown", (event) => {
    if (event.button !== 0 || last) return;   // a second finger does not draw
    canvas.setPointerCapture(event.pointerId);
    remember();
    last = place(event);
    stroke(last);
  });
  canvas.addEventListener("pointermove", (event) => {
    if (!last || !canvas.hasPointerCapture(event.pointerId)) return;
    for (const part of event.getCoalescedEvents?.() ?? []) stroke(place(part));
    stroke(place(event));
  });
  canvas.addEventListener("lostpointercapture", () => { last = null; });

  // ---- its buttons

  find("undo").addEventListener("click", undo);
  find("fill").addEventListener("click", () => { remember(); paint(colour()); });
  find("clear").addEventListener("click", () => { remember(); paint("white"); });
  find("frame").addEventListener("click", () => {
    remember();
    context.imageSmoothingEnabled = false;
    context.drawImage(frame(), 0, 0, canvas.width, canvas.height);
  });
  find("close").addEventListener("click", () => dialog.close());
  find("play").addEventListener("click", () => canvas.toBlob((blob) => {
    dialog.close();
    play(new File([blob], "drawing.png", { type: "image/png" }));
  }));
  dialog.addEventListener("keydown", (event) => {
    if (event.key.toLowerCase() === "z" && (event.ctrlKey || event.metaKey)) { event.preventDefault(); undo(); }
  });

  return () => {
    const { width, height } = frame();
    const scale = LONGER_SIDE / Math.max(width, height);
    const size = [Math.round(width * scale), Math.round(height * scale)];
    if (canvas.width !== size[0] || canvas.height !== size[1] || !dialog.dataset.used) {   // else the last drawing is still there
      [canvas.width, canvas.height] = size;
      dialog.dataset.used = "yes";
      past = [];
      find("undo").disabled = true;
      paint("white");
    }
    dialog.showModal();
  };
}

function radio(group, name, checked, value) {
  const label = document.createElement("label");
  const input = document.createElement("input");
  const look = document.createElement("span");
  Object.assign(input, { type: "radio", name: group, value, checked });
  input.setAttribute("aria-label", name);
  label.title = name;
  look.className = `${group} ${value.startsWith("#") ? "" : value}`.trim();
  label.append(input, look);
  return label;
}
