"""Can one host's loader keep up with the paper's largest training? A part of `python -m benchmarks.data`.

What a host must deliver follows from the preset `genie_11b` on the paper's 256 TPUv5p, 64 hosts of 4 chips: a step's
FLOPs, counted by torch and not estimated, at half of the chips' bfloat16 peak; a lower MFU needs less. The tokenizer
is far smaller, so the same slice would eat its data far faster: that is the hard case.

Frames have 160 x 90 pixels and so much noise that they compress 2.3 to one (Procgen's do fourteen to one); h264 drops
the noise. The throttled store takes 50 ms to answer and gives a host 100 MB/s in all, a small part of what buckets
give. "by ranges" is how a data set larger than the cache is read, a request for every clip.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.throttled import ThrottledFileSystem
from genie_model.data.codecs import Codec, compress
from genie_model.data.loader import ClipLoader
from genie_model.data.shards import Meta, write_index, write_shard
from genie_model.data.store import VideoStore
from genie_model.describe import training_cost
from genie_model.genie import Genie
from genie_model.presets import get_preset

CONFIG = get_preset("genie_11b")
CHIPS, HOSTS, PEAK, MFU = 256, 64, 459e12, 0.5
LATENCY, BANDWIDTH = 0.05, 100e6
SHARDS, EPISODES, FRAMES = 8, 4, 160  # an episode is 16 seconds at 10 frames/s (section 3, Datasets)
SECONDS = 6.0


def needs() -> dict[str, float]:
    """Frames/s that a host must deliver for each training."""
    with FakeTensorMode():
        genie = Genie(CONFIG)
        found = {}
        for name, module, stage in (
            ("tokenizer", genie.tokenizer, CONFIG.train_tokenizer),
            ("LAM + dynamics", genie, CONFIG.train_world),
        ):
            cost = training_cost(module, CONFIG, stage.batch_size, stage.precision)
            seconds = cost.flops / (CHIPS * PEAK * MFU)
            found[name] = stage.batch_size * CONFIG.data.clip_length / seconds / HOSTS
            genie.tokenizer.requires_grad_(False)
    return found


@dataclass(frozen=True)
class Rate:
    """What one host's loader delivered."""

    what: str
    frames_per_second: float
    cpu_seconds_per_frame: float
    first_batch_seconds: float
    requests_per_second: float  # to the throttled store
    store_bytes_per_second: float


def video(rng: np.random.Generator) -> NDArray[np.uint8]:
    """(T, H, W, 3): a smooth world scrolls by, and a camera adds noise."""
    height, width, _ = CONFIG.frame_shape
    coarse = rng.integers(0, 252, (height // 8 + 2, (width + FRAMES) // 8 + 2, 3))
    world = coarse.repeat(8, 0).repeat(8, 1)
    frames = np.stack([world[t % 8 : t % 8 + height, t : t + width] for t in range(FRAMES)])
    return (frames + (rng.random(frames.shape) < 0.2)).astype(np.uint8)


def write(uri: str, codec: Codec = "zstd") -> None:
    for shard in range(SHARDS):
        rng = np.random.default_rng(shard)
        write_shard(uri, shard, (compress(video(rng), codec) for _ in range(EPISODES)), CONFIG.frame_shape)
    shape = list(CONFIG.frame_shape)
    meta: Meta = {"source": "benchmark", "split": "train", "frame_shape": shape, "data": {}, "codec": codec}
    write_index(uri, SHARDS, meta)


@contextmanager
def cache(size: int) -> Iterator[None]:
    with tempfile.TemporaryDirectory() as folder:
        old = {name: os.environ.get(name) for name in ("GENIE_CACHE_DIR", "GENIE_CACHE_BYTES")}
        os.environ |= {"GENIE_CACHE_DIR": folder, "GENIE_CACHE_BYTES": str(size)}
        try:
            yield
        finally:
            for name, value in old.items():
                os.environ.pop(name)
                if value is not None:
                    os.environ[name] = value


def rate(what: str, uri: str, readers: int = 8) -> Rate:
    """Of the first of 64 hosts, for some seconds."""
    loader = ClipLoader(VideoStore.open(uri), CONFIG.train_world.batch_size, CONFIG.data.clip_length, 0, 0, HOSTS)
    ThrottledFileSystem.reads.clear()
    began, cpu, frames, first = time.perf_counter(), time.process_time(), 0, 0.0
    for _, batch in loader.stream(0, 10**9, readers=readers):
        first = first or time.perf_counter() - began
        frames += batch.frames_BTHWC.shape[0] * batch.frames_BTHWC.shape[1]
        if (seconds := time.perf_counter() - began) > SECONDS:
            break
    reads = ThrottledFileSystem.reads
    total = sum(size for _, _, size in reads)
    cpu = (time.process_time() - cpu) / frames
    return Rate(what, frames / seconds, cpu, first, len(reads) / seconds, total / seconds)


def rates() -> Iterator[Rate]:
    ThrottledFileSystem.latency, ThrottledFileSystem.bandwidth = LATENCY, BANDWIDTH
    remote = "throttled://video"
    write(remote)
    write("memory://video")
    with tempfile.TemporaryDirectory() as folder:
        write(folder)
        yield rate("local disk", folder)
    with tempfile.TemporaryDirectory() as folder:
        write(folder, "h264")
        yield rate("local disk, h264", folder)
    with cache(0):
        yield rate("memory://, by ranges", "memory://video")
        yield rate("throttled, by ranges", remote)
        yield rate("throttled, by ranges, one reader", remote, readers=1)
    with cache(10**12):
        yield rate("memory://, through the cache", "memory://video")
    with cache(10**12):
        yield rate("throttled, into an empty cache", remote)
        yield rate("throttled, from the cache", remote)


def table(rates: list[Rate], needs: dict[str, float]) -> str:
    bytes_per_frame = int(np.prod(CONFIG.frame_shape))
    lines = [
        f"a host needs {need:,.1f} frames/s = {need * bytes_per_frame / 1e6:,.2f} MB/s of pixels for the {name}"
        for name, need in needs.items()
    ]
    lines += [
        "",
        "| store | frames/s | MB/s of pixels | MB/s read | requests/s | first batch | CPU per frame | "
        + " | ".join(f"times the need of the {name}" for name in needs)
        + " |",
        "|---" * (7 + len(needs)) + "|",
    ]
    for line in rates:
        times = " | ".join(f"{line.frames_per_second / need:,.1f}" for need in needs.values())
        lines.append(
            f"| {line.what} | {line.frames_per_second:,.0f} | {line.frames_per_second * bytes_per_frame / 1e6:,.0f} "
            f"| {line.store_bytes_per_second / 1e6:,.0f} | {line.requests_per_second:,.0f} "
            f"| {line.first_batch_seconds:.2f} s | {line.cpu_seconds_per_frame * 1e3:.2f} ms | {times} |"
        )
    return "\n".join(lines)
