"""How fast video becomes clips: `python -m benchmarks.ingest [--seconds N] [--json FILE]`. A minute or two.

Two floors, on as many processes as cores: FFmpeg's libraries decode the same files and do nothing with the pictures
(one thread for each file, as ingest), and the ffmpeg program does, where it is installed (`-threads 1 -f null -`). A
round measures all of them, so that a busy machine slows all; figures are medians, in seconds of video for a second.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import av
import numpy as np

from genie_model.data.ingest import ingest
from genie_model.presets import get_preset

ROUNDS = 3
FILES = 8
KINDS = {  # of ordinary video: name -> (height, width, frames a second, codec)
    "360p H.264": (360, 640, 30, "libx264"),
    "1080p H.264": (1080, 1920, 30, "libx264"),
    "720p VP9": (720, 1280, 30, "libvpx-vp9"),
}


def film(path: Path, height: int, width: int, fps: int, codec: str, seconds: int) -> None:
    """A game's pictures for a codec: a textured ground that scrolls, and things that move over it."""
    generator = np.random.default_rng(int(path.stem.rpartition("-")[2]))
    coarse = generator.integers(0, 255, (height // 8, width // 4, 3), dtype=np.uint8)
    ground_HWC = coarse.repeat(8, axis=0).repeat(8, axis=1)[:height]
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=fps)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        fast = {"preset": "veryfast"} if codec == "libx264" else {"deadline": "realtime", "cpu-used": "8"}
        stream.options = {**fast, "crf": "23"}
        for number in range(seconds * fps):
            picture_HWC = np.roll(ground_HWC, -4 * number, axis=1)[:, :width].copy()
            for thing in range(12):
                top, left = (37 * thing + 3 * number) % (height - 32), (97 * thing + 7 * number) % (width - 32)
                picture_HWC[top : top + 32, left : left + 32] = 20 * thing
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture_HWC, "rgb24")))
        container.mux(stream.encode(None))


def decode(path: str) -> int:
    """Every picture, and nothing more."""
    with av.open(path) as container:
        container.streams.video[0].codec_context.thread_count = 1
        return sum(1 for _ in container.decode(video=0))


def program(path: str) -> None:
    subprocess.run(["ffmpeg", "-v", "error", "-threads", "1", "-i", path, "-an", "-f", "null", "-"], check=True)


def rate(seconds: float, job: Callable[[], object]) -> float:
    started = time.perf_counter()
    job()
    return seconds / (time.perf_counter() - started)


def measure(kind: str, seconds: int) -> dict[str, float]:
    height, width, fps, codec = KINDS[kind]
    config = get_preset("tiny").with_overrides(
        "data.frame_height=90", "data.frame_width=160", "ingest.clip_seconds=16", "ingest.eval_share=0.2"
    )
    rates: dict[str, list[float]] = {"libraries": [], "ingest": []}
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root, "videos")
        folder.mkdir()
        paths = [str(folder / f"film-{number}.{'webm' if 'vp9' in codec else 'mp4'}") for number in range(FILES)]
        for path in paths:
            film(Path(path), height, width, fps, codec, seconds)
        cores, total = os.cpu_count() or 1, float(FILES * seconds)
        with ProcessPoolExecutor(cores, get_context("spawn")) as pool, ThreadPoolExecutor(cores) as programs:
            list(pool.map(decode, paths[:cores]))  # the processes are there
            for number in range(ROUNDS):
                rates["libraries"].append(rate(total, lambda: list(pool.map(decode, paths))))
                if shutil.which("ffmpeg"):
                    rates.setdefault("ffmpeg", []).append(rate(total, lambda: list(programs.map(program, paths))))
                rates["ingest"].append(rate(total, lambda to=f"{root}/{number}": ingest(config, str(folder), to)))
    found = {name: statistics.median(values) for name, values in rates.items()}
    for floor in set(found) - {"ingest"}:
        ratios = [own / bare for own, bare in zip(rates["ingest"], rates[floor], strict=True)]
        found[f"ingest_over_{floor}"] = statistics.median(ratios)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=int, default=64, help="of each of the eight files of a kind; 64 by default")
    parser.add_argument("--json", type=Path, help="where to write the same figures")
    args = parser.parse_args()
    found: dict[str, Any] = {"machine": platform.processor() or platform.machine(), "cores": os.cpu_count()}
    for kind in KINDS:
        found[kind] = measure(kind, args.seconds)
        print(f"{kind:<12}" + ", ".join(f"{name} {value:,.2f}" for name, value in found[kind].items()), flush=True)
    if args.json:
        args.json.write_text(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
