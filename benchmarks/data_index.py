"""What a large data set's index costs in time and memory. A part of `python -m benchmarks.data`.

Millions of clips of 160 frames, of which one in sixteen is there twice, in shards of 256. They have real manifests, but
their tars are empty files of the right size, so that no frame can be read. Memory is what the process took beyond what
it had, mapped files left out, for the system takes those pages back whenever it needs to.
"""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import psutil

from genie_model.data.columns import hash64
from genie_model.data.opt_out import opt_out
from genie_model.data.shards import FORMAT, Manifest, Meta, shard_name, write_index, write_view
from genie_model.data.store import VideoStore

CLIPS, OF_A_SHARD, OF_A_VIDEO, OF_AN_OWNER = 4_000_000, 256, 64, 4096
FRAMES, CHUNKS = 160, 5
CHUNK_BYTES = 60_000
META: Meta = {"source": "video", "split": "train", "frame_shape": [90, 160, 3], "data": {}}
LOOKUPS = 10_000


@dataclass(frozen=True)
class Cost:
    what: str
    seconds: float
    megabytes: float


def costs(clips: int = CLIPS) -> Iterator[Cost]:
    with TemporaryDirectory() as folder:
        uri, num_shards = f"{folder}/video/train", clips // OF_A_SHARD
        write_manifests(Path(uri), num_shards)
        yield cost(f"index {clips:,} clips", lambda: write_index(uri, num_shards, META))
        yield cost("open", lambda: VideoStore.open(uri))
        store = VideoStore.open(uri)
        yield cost("count the clips of 16 frames", lambda: store.clips(16, 1))
        random, numbers = store.clips(16, 1), np.random.default_rng(0)
        places = numbers.integers(len(random), size=LOOKUPS).tolist()
        yield cost(f"find {LOOKUPS:,} random clips", lambda: [random[place] for place in places])
        halves = (np.arange(len(store.episodes_in(shard))) % 2 == 0 for shard in range(num_shards))
        yield cost("a view of every second one", lambda: write_view(f"{folder}/view/train", store, halves, META))
        yield cost("opt out an owner and a video", lambda: opt_out(f"{folder}/video", ["owner:3", "7"]))
        yield cost("open, with opt-outs", lambda: VideoStore.open(uri))
        hidden = VideoStore.open(uri)
        yield cost("count the clips, with opt-outs", lambda: hidden.clips(16, 1))


def table(costs: list[Cost]) -> str:
    lines = [f"| {cost.what} | {cost.seconds:,.2f} s | {cost.megabytes:,.0f} MB |" for cost in costs]
    return "\n".join(["| what | time | memory |", "|---|---|---|", *lines])


def write_manifests(folder: Path, num_shards: int) -> None:
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    episode_bytes = CHUNKS * CHUNK_BYTES + 1536
    for shard in range(num_shards):
        first = shard * OF_A_SHARD
        same = rng.random(OF_A_SHARD) < 1 / 16
        digests = np.where(same, rng.integers(1, max(first, 2), OF_A_SHARD), np.arange(first, first + OF_A_SHARD) + 1)
        scrambled = (digests.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)).tolist()
        name, size = shard_name(shard), OF_A_SHARD * episode_bytes
        manifest: Manifest = {
            "format": FORMAT,
            "codec": "zstd",
            "name": name,
            "bytes": size,
            "sha256": hashlib.sha256(name.encode()).hexdigest(),
            "episodes": [
                {
                    "offset": i * episode_bytes,
                    "num_frames": FRAMES,
                    "first_chunk": 32,
                    "chunks": [CHUNK_BYTES] * CHUNKS,
                    "source": hash64(str((first + i) // OF_A_VIDEO)),
                    "owner": hash64(str((first + i) // OF_AN_OWNER)),
                    "digest": scrambled[i],
                }
                for i in range(OF_A_SHARD)
            ],
        }
        (folder / f"shard-{shard:05d}.json").write_text(json.dumps(manifest))
        with (folder / name).open("wb") as tar:
            tar.truncate(size)


def cost(what: str, do: Callable[[], object]) -> Cost:
    with _peak() as peak:
        started = time.perf_counter()
        do()
        seconds = time.perf_counter() - started
    return Cost(what, seconds, peak[0] / 1e6)


@contextmanager
def _peak() -> Iterator[list[float]]:
    """The most bytes that this process took for itself meanwhile, beyond what it had."""
    process, over = psutil.Process(), threading.Event()

    def own() -> float:
        info = process.memory_info()
        return float(info.rss - info.shared)

    before, peak = own(), [0.0]

    def watch() -> None:
        while not over.wait(0.005):
            peak[0] = max(peak[0], own() - before)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield peak
    finally:
        over.set()
        watcher.join()
        peak[0] = max(peak[0], own() - before)
