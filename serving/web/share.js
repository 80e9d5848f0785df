// The world as an animation, for others.

import { call } from "./service.js";

const FRAMES_PER_SECOND = 10;

/** Hands it to the system's share sheet where there is one, else downloads it. */
export async function shareAnimation(path, name, large) {
  const asked = new URLSearchParams({ frames_per_second: FRAMES_PER_SECOND, large });
  const blob = await call(`${path}?${asked}`, {}, (response) => response.blob());
  const file = new File([blob], name, { type: blob.type });
  if (!await shared(file)) download(file);
}

/** Whether the system took it; a player who thinks better of it counts. */
async function shared(file) {
  if (!navigator.canShare?.({ files: [file] })) return false;
  try {
    await navigator.share({ files: [file] });
    return true;
  } catch (error) {
    return error.name === "AbortError";
  }
}

function download(file) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(file);
  link.download = file.name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60000);
}
