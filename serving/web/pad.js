// Gamepads: button i takes action i; the d-pad and the left stick take the actions of the four directions.

const NUM_BUTTONS = 10;
const STICK_THRESHOLD = 0.5;
const DPAD = { up: 12, down: 13, left: 14, right: 15 };   // of the standard mapping

/** `actionOf(direction)` says which action "up", "down", "left" or "right" takes, or undefined. */
export function followGamepads(press, release, actionOf) {
  let taken = new Set();
  let polling = false;

  function poll() {
    const pads = navigator.getGamepads().filter((pad) => pad?.connected);
    const down = new Set(pads.flatMap((pad) => pressed(pad, actionOf)));
    for (const action of taken) if (!down.has(action)) release(action);
    for (const action of down) if (!taken.has(action)) press(action);
    taken = down;
    polling = pads.length > 0;
    if (polling) requestAnimationFrame(poll);
  }

  window.addEventListener("gamepadconnected", () => { if (!polling) { polling = true; poll(); } });
}

function pressed(pad, actionOf) {
  const actions = [];
  for (let i = 0; i < NUM_BUTTONS; i++) if (pad.buttons[i]?.pressed) actions.push(i);
  const [x = 0, y = 0] = pad.axes;
  const sideways = Math.abs(x) >= Math.abs(y);   // the stick points one way at a time
  const stick = Math.max(Math.abs(x), Math.abs(y)) < STICK_THRESHOLD ? null
    : sideways ? (x < 0 ? "left" : "right") : (y < 0 ? "up" : "down");
  for (const [direction, button] of Object.entries(DPAD)) {
    if (stick === direction || pad.buttons[button]?.pressed) actions.push(actionOf(direction));
  }
  return actions.filter((action) => action !== undefined);
}
