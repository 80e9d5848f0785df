"""How fast video becomes clips: `python -m benchmarks.ingest [--seconds N] [--json FILE]`. A minute or two.

Two floors, on as many processes as cores: FFmpeg's libraries decode the same files and do nothing with the pictures
(one thread for each file, as ingest), and the ffmpeg program does, where it is installed (`-threads 1 -f null -`). A
round measures all of them, so that a busy machine slows all; figures are medians, in seconds of video for a second of
the clock and for one of a core. ingest's have the start of Python in them, three seconds of a core.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import av
import numpy as np

ROUNDS = 3
FILES = 4
KINDS = {  # of ordinary video: name -> (height, width, frames a second, codec)
    "360p H.264": (360, 640, 30, "libx264"),
    "1080p H.264": (1080, 1920, 30, "libx264"),
    "720p VP9": (720, 1280, 30, "libvpx-vp9"),
}


def film(path: Path, height: int, width: int, fps: int, codec: str, seconds: int) -> None:
    """A game's pictures for a codec: a textured ground that scrolls, and things that move over it."""
    generator = np.random.default_rng(int(path.stem.rpartition("-")[2]))
    coarse = generator.integers(0, 255, (height // 8, width // 4, 3), dtype=np.uint8)
    ground_HWC = np.tile(coarse.repeat(8, axis=0).repeat(8, axis=1)[:height], (1, 2, 1))
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=fps)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        fast = {"preset": "veryfast"} if codec == "libx264" else {"deadline": "realtime", "cpu-used": "8"}
        stream.options = {**fast, "crf": "23"}
        for number in range(seconds * fps):
            left = 4 * number % (2 * width)
            picture_HWC = ground_HWC[:, left : left + width].copy()
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


def decode_all(paths: list[str]) -> None:
    with ProcessPoolExecutor(os.cpu_count(), get_context("spawn")) as pool:
        list(pool.map(decode, paths))


def program(paths: list[str]) -> None:
    command = ["ffmpeg", "-v", "error", "-threads", "1", "-i"]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda path: subprocess.run([*command, path, "-an", "-f", "null", "-"], check=True), paths))


class Rates(NamedTuple):
    """Seconds of video for a second of the clock, and for a second of a core."""

    clock: float
    core: float


def rate(seconds: float, job: Callable[[], object]) -> Rates:
    """Of a job in processes of its own, which have ended with it."""
    before, started = os.times(), time.perf_counter()
    job()
    elapsed, after = time.perf_counter() - started, os.times()
    spent = after.children_user + after.children_system - before.children_user - before.children_system
    return Rates(seconds / elapsed, seconds / spent)


def ingest(folder: Path, root: str) -> None:
    settings = ["data.frame_height=90", "data.frame_width=160", "ingest.clip_seconds=16", "ingest.eval_share=0.2"]
    command = [sys.executable, "-m", "genie_model", "ingest", "tiny", "--source", str(folder), "--root", root]
    subprocess.run(
        [*command, *(word for each in settings for word in ("--set", each))], check=True, capture_output=True
    )


def measure(kind: str, seconds: int) -> dict[str, Any]:
    height, width, fps, codec = KINDS[kind]
    rates: dict[str, list[Rates]] = {"libraries": [], "ffmpeg": [], "ingest": []}
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root, "videos")
        folder.mkdir()
        paths = [str(folder / f"film-{number}.{'webm' if 'vp9' in codec else 'mp4'}") for number in range(FILES)]
        for path in paths:
            film(Path(path), height, width, fps, codec, seconds)
        for number in range(ROUNDS):
            total = float(FILES * seconds)
            rates["libraries"].append(rate(total, lambda: decode_all(paths)))
            if shutil.which("ffmpeg"):
                rates["ffmpeg"].append(rate(total, lambda: program(paths)))
            rates["ingest"].append(rate(total, lambda to=f"{root}/{number}": ingest(folder, to)))
    found: dict[str, Any] = {}
    for name, each in rates.items():
        if each:
            found[name] = {field: statistics.median(getattr(one, field) for one in each) for field in Rates._fields}
            shares = [
                (own.clock / bare.clock, own.core / bare.core) for own, bare in zip(rates["ingest"], each, strict=True)
            ]
            found[name] |= {
                "ingest_over_it_clock": statistics.median(clock for clock, _ in shares),
                "ingest_over_it_core": statistics.median(core for _, core in shares),
            }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=int, default=64, help="of each of the four files of a kind; 64 by default")
    parser.add_argument("--only", choices=tuple(KINDS), action="append", help="a kind of video; by default all")
    parser.add_argument("--json", type=Path, help="where to write the same figures")
    args = parser.parse_args()
    found: dict[str, Any] = {"machine": platform.processor() or platform.machine(), "cores": os.cpu_count()}
    for kind in args.only or KINDS:
        found[kind] = measure(kind, args.seconds)
        for name, figures in found[kind].items():
            rates = f"{figures['clock']:8.1f} s/s {figures['core']:8.1f} s/core-s"
            shares = f"ingest is {figures['ingest_over_it_clock']:.0%} and {figures['ingest_over_it_core']:.0%} of it"
            print(f"{kind:<12} {name:<10} {rates}   {shares}", flush=True)
    if args.json:
        args.json.write_text(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
