"""Curation of millions of clips: time and memory of all that goes over the whole index, on rows made up for it.

    python -m benchmarks.curation [--millions 8] [--json FILE]

The index is written shard by shard, 256 clips of 160 frames each, with random scores beside it; no frame exists. Each
line is a process of its own. Memory is what the process alone holds (RssAnon) at its peak, above what it held once all
was imported: pages of the mapped columns are the system's, which drops them when memory runs short. Scoring itself is
measured on frames: `--score URI --classifier URI` says how many clips of that data set a second.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from genie_model.data import columns, curation, labels, shards
from genie_model.data.store import VideoStore
from genie_model.files import write_atomic
from genie_model.presets import get_preset

CLIPS, FRAMES, CHUNKS = 256, 160, 6  # of a shard; of a clip
LABELS = 10_000
CONFIG = get_preset("tiny").with_overrides("curation.threshold=0.9")


def write_rows(uri: str, count: int, split: str) -> None:
    """An index of so many clips, of videos of 32 clips, whose shards are holes."""
    random = np.random.default_rng(0)
    meta: shards.Meta = {"source": "video", "split": split, "frame_shape": [90, 160, 3], "data": {}}
    with columns.writing(uri) as writer:
        for shard in range(count // CLIPS):
            first = shard * CLIPS
            sizes = random.integers(20_000, 60_000, (CLIPS, CHUNKS))
            with Path(uri, shards.shard_name(shard)).open("wb") as empty:
                empty.truncate(int(sizes.sum()))  # takes no disk
            writer.add(
                {
                    "number": range(CLIPS),
                    "offset": 512 + np.cumsum(sizes.sum(1)),
                    "num_frames": np.full(CLIPS, FRAMES),
                    "first_chunk": np.full(CLIPS, shards.CHUNK_FRAMES),
                    "source": 1 + np.arange(first, first + CLIPS, dtype=np.uint64) // 32,
                    "owner": 1 + np.arange(first, first + CLIPS, dtype=np.uint64) // 3200,
                    "digest": _digests(first, CLIPS),
                    "chunk_bytes": sizes.ravel(),
                    "shard": [shard],
                    "shard_bytes": [int(sizes.sum())],
                    "shard_sha256": [bytes(32)],
                }
            )
        index = shards.Index(
            format=shards.FORMAT, meta=meta, origin="", episodes=writer.episodes, frames=writer.frames, dropped=0,
            columns=writer.publish(uri),
        )  # fmt: skip
    write_atomic(f"{uri}/index.json", json.dumps(index).encode())


def _digests(first: int, count: int) -> np.ndarray:
    """As a clip's SHA-256 would be hashed."""
    return np.array([columns.hash_of_digest(_sha256(clip)) for clip in range(first, first + count)], np.uint64)


def _sha256(clip: int) -> str:
    return hashlib.sha256(clip.to_bytes(8, "little")).hexdigest()


def write_scores(uri: str, store: VideoStore) -> None:
    random = np.random.default_rng(1)
    for part in curation._parts(store):
        packed = io.BytesIO()
        np.save(packed, random.random(len(part.episodes), np.float32))
        write_atomic(f"{uri}/{part.name}", packed.getvalue())
    held_out = [{"good": good, "probability": 0.1 + 0.8 * good, "source": str(i)} for i in range(4) for good in (0, 1)]
    write_atomic(f"{uri}/held_out.json", json.dumps(held_out).encode())
    write_atomic(f"{uri}/scores.json", json.dumps({"classifier_uri": uri}).encode())


def stages(root: str) -> dict[str, Callable[[], object]]:
    data_uri = f"{root}/datasets/video"

    def find_labels() -> None:
        store = VideoStore.open(f"{data_uri}/train")
        wanted = [_sha256(clip) for clip in range(0, store.num_episodes, store.num_episodes // LABELS)]
        assert len(labels.episodes_of(store, wanted)) == len(wanted)

    def curate() -> None:
        curation.curate(CONFIG, data_uri, f"{root}/scores", root)

    return {
        "open the data set": lambda: VideoStore.open(f"{data_uri}/train"),
        "list the parts to score": lambda: curation._parts(VideoStore.open(f"{data_uri}/train")),
        f"find {LABELS:,} labelled clips": find_labels,
        "curate: keep a tenth": curate,
        "open the curated one": lambda: VideoStore.open(str(next(Path(root, "datasets").glob("curated-*"))) + "/train"),
    }


def measured(run: Callable[[], object]) -> dict[str, float]:
    """Seconds, and MB above what the process held before."""
    before, over, most = _anonymous_mb(), threading.Event(), 0.0

    def watch() -> None:
        nonlocal most
        while not over.wait(0.01):
            most = max(most, _anonymous_mb())

    watcher = threading.Thread(target=watch)
    watcher.start()
    began = time.perf_counter()
    run()
    seconds = time.perf_counter() - began
    most = max(most, _anonymous_mb())
    over.set()
    watcher.join()
    return {"seconds": seconds, "peak_mb": most - before}


def _anonymous_mb() -> float:
    status = Path("/proc/self/status").read_text()
    return int(status.partition("RssAnon:")[2].split()[0]) / 1024


def scoring(data_uri: str, classifier_uri: str) -> float:
    """Clips a second, all of the train split's."""
    store = VideoStore.open(f"{data_uri}/train")
    began = time.perf_counter()
    curation.probabilities(curation.load_classifier(classifier_uri), store, range(store.num_episodes))
    return store.num_episodes / (time.perf_counter() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--millions", type=float, default=8.0, help="of clips (default: 8; 54 bytes of disk each, twice)"
    )
    parser.add_argument("--json", type=Path, help="where to write the same figures")
    parser.add_argument("--score", metavar="URI", help="a data set: only how fast its clips are scored")
    parser.add_argument("--classifier", metavar="URI", help="by this")
    parser.add_argument("--stage", nargs=2, metavar=("ROOT", "NAME"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.score:
        print(f"{scoring(args.score, args.classifier):,.1f} clips/s")
        return
    if args.stage:
        print(json.dumps(measured(stages(args.stage[0])[args.stage[1]])))
        return
    found: dict[str, object] = {}
    with tempfile.TemporaryDirectory() as root:
        count = round(args.millions * 1e6) // CLIPS * CLIPS
        began = time.perf_counter()
        write_rows(f"{root}/datasets/video/train", count, "train")
        write_rows(f"{root}/datasets/video/eval", max(count // 20 // CLIPS, 1) * CLIPS, "eval")
        write_scores(f"{root}/scores", VideoStore.open(f"{root}/datasets/video/train"))
        found["clips"], found["write"] = count, time.perf_counter() - began
        print(f"{count:,} clips; made up and written in {found['write']:.0f} s")
        for name in stages(root):
            command = [sys.executable, "-m", "benchmarks.curation", "--stage", root, name]
            line = json.loads(subprocess.check_output(command, text=True).splitlines()[-1])
            found[name] = line
            print(f"{name:30} {line['seconds']:8.2f} s {line['peak_mb']:8.1f} MB", flush=True)
    if args.json:
        args.json.write_text(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
