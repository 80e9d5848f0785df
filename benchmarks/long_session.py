"""Plays one long session: time and memory a frame, and what it looks like. Writes a picture and a JSON file.

    python -m benchmarks.long_session MODEL_FOLDER [--frames 2000] [--worlds 4] [--out build/long_session]

The worlds start from the model's held-out start frames. A random action is held for 8 frames, as in demo's data.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import torch
from PIL import Image

from benchmarks.__main__ import machine
from genie_model import pictures
from genie_model.checkpoint import load_config, load_model
from genie_model.genie import Genie
from genie_model.progress import bar

SHOWN = (1, 16, 50, 100, 250, 500, 1000, 2000)
HELD = 8


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.long_session",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", help="a folder with config.json, model.safetensors and start_frames/")
    parser.add_argument("--frames", type=_positive, default=2000)
    parser.add_argument("--worlds", type=_positive, default=4)
    parser.add_argument("--set", dest="overrides", nargs="*", default=[], help="e.g. sampling.maskgit_steps=4")
    parser.add_argument("--out", type=Path, default=Path("build/long_session"))
    arguments = parser.parse_args()
    try:
        config = load_config(arguments.model).with_overrides(*arguments.overrides)
        genie = load_model(arguments.model, config.sampling)
    except ValueError as error:
        parser.error(str(error))
    starts = sorted(Path(arguments.model, "start_frames").glob("*.png"))[: arguments.worlds]
    if not starts:
        parser.error(f"no start frames in {arguments.model}: evaluate the model first, it writes them")
    prompt_BTHWC = np.stack([np.asarray(Image.open(path).convert("RGB")) for path in starts])[:, None]
    process, seen, seconds, memory = psutil.Process(), {0: prompt_BTHWC[:, 0]}, [], []
    for t, (took, frame_BHWC) in enumerate(play(genie, prompt_BTHWC, arguments.frames), 1):
        seconds.append(took)
        memory.append(process.memory_info().rss / 2**20)
        if t in SHOWN:
            seen[t] = frame_BHWC
    tenth = max(arguments.frames // 10, 1)
    found = {
        **machine(),
        "worlds": len(starts),
        "frames": arguments.frames,
        "frame_ms_by_tenth": [1e3 * statistics.median(seconds[i : i + tenth]) for i in range(0, len(seconds), tenth)],
        "memory_mb_by_tenth": [max(memory[i : i + tenth]) for i in range(0, len(memory), tenth)],
        # how unlike neighbouring pixels are, beside the prompt's: falls to 0 as a picture becomes one colour
        "detail_over_prompt": {t: detail(frame_BHWC) / detail(seen[0]) for t, frame_BHWC in seen.items()},
    }
    picture = pictures.frame_table(
        np.stack(list(seen.values()), 1), [str(i + 1) for i in range(len(starts))], [f"frame {t}" for t in seen]
    )
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture).save(arguments.out.with_suffix(".png"))
    arguments.out.with_suffix(".json").write_text(json.dumps(found, indent=2))
    print(json.dumps(found, indent=2))


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number of at least 1")
    return int(text)


def play(genie: Genie, prompt_BTHWC: np.ndarray, frames: int) -> Iterator[tuple[float, np.ndarray]]:
    """The seconds that each frame took, and the frames (B, H, W, 3), under random actions."""
    state = genie.start(torch.from_numpy(prompt_BTHWC), seed=range(len(prompt_BTHWC)))
    random = np.random.default_rng(0)
    for t in bar(range(frames), desc="play", unit="frame"):
        if t % HELD == 0:
            action_B = torch.from_numpy(random.integers(genie.config.num_actions, size=len(prompt_BTHWC)))
        began = time.perf_counter()
        frame_BHWC = genie.step(state, action_B).numpy()
        yield time.perf_counter() - began, frame_BHWC


def detail(frames_BHWC: np.ndarray) -> float:
    frames = frames_BHWC.astype(np.float32)
    return float(np.abs(np.diff(frames, axis=1)).mean() + np.abs(np.diff(frames, axis=2)).mean())


if __name__ == "__main__":
    main()
