"""What curating millions of clips costs beside looking at frames, and how fast frames are looked at.

    python -m benchmarks.curation [--clips 4000000] [--json FILE]
    python -m benchmarks.curation --score DATA_URI --classifier URI

The first goes over an index as data_index.py makes it, with random scores beside it; the second says how many clips of
a data set a classifier scores a second.
"""

from __future__ import annotations

import argparse
import io
import json
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from benchmarks.data_index import CLIPS, META, OF_A_SHARD, Cost, cost, table, write_manifests
from genie_model.data import curation
from genie_model.data.labels import episodes_of
from genie_model.data.shards import write_index
from genie_model.data.store import VideoStore
from genie_model.files import write_atomic
from genie_model.presets import get_preset

LABELS = 10_000  # as many as the paper's
CONFIG = get_preset("tiny").with_overrides("curation.threshold=0.9")


def costs(clips: int) -> Iterator[Cost]:
    with TemporaryDirectory() as root:
        data_uri, scores_uri = f"{root}/datasets/video", f"{root}/scores"
        for split, share in (("train", 1.0), ("eval", 0.05)):
            num_shards = int(clips * share) // OF_A_SHARD
            write_manifests(Path(data_uri, split), num_shards)
            write_index(f"{data_uri}/{split}", num_shards, {**META, "split": split})
        store = VideoStore.open(f"{data_uri}/train")
        yield cost(f"name the parts to score of {store.num_episodes:,} clips", lambda: curation.parts_of(store))
        step = max(4 * store.num_shards // LABELS, 1)
        shards = [range(shard, shard + 1) for shard in range(0, store.num_shards, step)]
        digests = [
            f"{value:016x}{0:048x}" for shard in shards for value in store.hashes_in("digest", shard)[:4].tolist()
        ]
        yield cost(f"find {len(digests):,} labelled clips", lambda: episodes_of(store, digests))
        _write_scores(scores_uri, store)
        keep = "keep a tenth by their scores, as a data set"
        yield cost(keep, lambda: curation.curate(CONFIG, data_uri, scores_uri, root))
        (curated,) = Path(root, "datasets").glob("curated-*")
        yield cost("open that", lambda: VideoStore.open(f"{curated}/train"))


def _write_scores(uri: str, store: VideoStore) -> None:
    random = np.random.default_rng(1)
    for part in curation.parts_of(store):
        packed = io.BytesIO()
        np.save(packed, random.random(len(part.episodes), np.float32))
        write_atomic(f"{uri}/{part.name}", packed.getvalue())
    held_out = [{"good": good, "probability": 0.05 + 0.9 * good, "source": str(i)} for i in range(4) for good in (0, 1)]
    write_atomic(f"{uri}/held_out.json", json.dumps(held_out).encode())
    write_atomic(f"{uri}/scores.json", json.dumps({"classifier_uri": uri}).encode())


def scored_a_second(data_uri: str, classifier_uri: str) -> float:
    store, classifier = VideoStore.open(f"{data_uri}/train"), curation.load_classifier(classifier_uri)
    curation.probabilities(classifier, store, range(min(store.num_episodes, 64)))
    began = time.perf_counter()
    curation.probabilities(classifier, store, range(store.num_episodes))
    return store.num_episodes / (time.perf_counter() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=CLIPS, help=f"rows of the index (default: {CLIPS:,})")
    parser.add_argument("--score", metavar="URI", help="only how fast this data set's train clips are scored")
    parser.add_argument("--classifier", metavar="URI", help="by this")
    parser.add_argument("--json", type=Path, help="where to write the same figures")
    args = parser.parse_args()
    if args.score:
        print(f"{scored_a_second(args.score, args.classifier):,.1f} clips/s")
        return
    found = list(costs(args.clips))
    print(table(found))
    if args.json:
        args.json.write_text(json.dumps([asdict(one) for one in found], indent=2))


if __name__ == "__main__":
    main()
