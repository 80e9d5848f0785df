"""The learned filter (App. B.1): people label some clips, a classifier learns from them, a rule keeps what it likes.

    train_classifier  labels + data  ->  <root>/models/curator-...     a ResNet-18, and what it says of held-out labels
    score             + data         ->  <root>/scores/scores-...      the probability of every clip, part by part
    curate            + data         ->  <root>/datasets/curated-...   the same shards, of which fewer clips are listed

Made for 55 million clips: a part of the scores is all that is in memory, whole parts are not made again, the processes
that torchrun started share the parts, and no frame is copied.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import torch
from fsspec.core import url_to_fs
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score

from genie_model import checkpoint, collectives, files, metrics
from genie_model.backend import native
from genie_model.config import Config, CurationConfig, OptimizerConfig, StageConfig
from genie_model.data.labels import BAD, GOOD, held_out_sources, read_labels
from genie_model.data.loader import Batch, ClipLoader, _shuffled
from genie_model.data.shards import file_sizes, has_index, write_view
from genie_model.data.store import VideoStore
from genie_model.pictures import frame_table
from genie_model.progress import NoLog, RunLog, bar, speaks, summary
from genie_model.resnet import ClipClassifier
from genie_model.source import code_digest
from genie_model.train import TRAINER_CODE, model_name, train_once

CODE = ("data/curation.py", "data/labels.py", "resnet.py")  # what decides a clip's probability, beside the trainer
_BATCH = 64  # clips at a time
_READERS = 8  # threads
_MOST_PARTS = 1024
_BINS = 10  # of probability
_SHOWN = 6  # clips of each
_HELD_OUT, _SCORES = "held_out.json", "scores.json"


class Labelled(NamedTuple):
    """A labelled clip that the data set has."""

    episode: int
    digest: str
    source: str
    good: bool


def labelled_clips(store: VideoStore, labels_uri: str) -> list[Labelled]:
    """Those labelled 5 or 1, in order of their digests. Raises ValueError where the data set has none of them."""
    labels = {digest: label for digest, label in read_labels(labels_uri).items() if label.label in (GOOD, BAD)}
    found = store.find(labels)
    clips = [
        Labelled(found[digest], digest, label.source, label.label == GOOD)
        for digest, label in sorted(labels.items())
        if digest in found
    ]
    if not clips:
        raise ValueError(f"none of the {len(labels)} clips labelled 5 or 1 in {labels_uri} is in {store.uri}: another data set's?")
    return clips


class LabelledLoader(ClipLoader):
    """Batches of labelled clips, good and bad in turn, as pure functions of (clips, seed, step, rank).

    Of each clip `frames` frames, one drawn from every equal stretch of it.
    """

    def __init__(self, store: VideoStore, clips: Sequence[Labelled], part: CurationConfig, rank: int, size: int) -> None:
        super().__init__(store, part.batch_size, part.frames, part.seed, rank, size)
        self.by_kind = [[clip for clip in clips if clip.good == kind] for kind in (False, True)]

    def _empty(self) -> Batch:
        return super()._empty()._replace(labels_B=np.empty(len(self._slice), np.int64))

    def _read(self, batch: Batch, step: int, row: int) -> None:
        turn, kind = divmod(step * self.batch_size + self._slice[row], 2)
        clips = self.by_kind[kind]
        epoch, position = divmod(turn, len(clips))
        clip = clips[_shuffled(position, len(clips), self.seed, epoch)]
        drawn = np.random.default_rng((self.seed, kind, turn)).random(self.clip_length)
        batch.frames_BTHWC[row] = spread_frames(self.store, clip.episode, drawn)
        assert batch.labels_B is not None
        batch.labels_B[row] = kind


def spread_frames(store: VideoStore, episode: int, at_T: NDArray[np.float64]) -> NDArray[np.uint8]:
    """One frame of each of T equal stretches of an episode: uint8 (T, H, W, C); `at_T` in [0, 1) says where in each."""
    length = int(store.episode_lengths[episode])
    places_T = (np.arange(len(at_T)) + at_T) / len(at_T) * length
    return np.concatenate([store.frames(episode, int(place), 1) for place in places_T])


def train_classifier(config: Config, data_uri: str, labels_uri: str, root_uri: str, log: RunLog | None = None) -> str:
    """Learns 5 from 1 by the one trainer (train.py); returns the classifier's URI.

    The videos of `config.curation.held_out` measure it, and none of their clips teaches it. A finished classifier of the
    same labelled clips is reused, a killed run carries on. Raises ValueError for labels or data that are missing or too
    few.
    """
    part = config.curation
    store = VideoStore.open(f"{data_uri}/train")
    clips = labelled_clips(store, labels_uri)
    kinds = dict[str, set[bool]]()
    for clip in clips:
        kinds.setdefault(clip.source, set()).add(clip.good)
    held_out = held_out_sources(kinds, part.held_out, part.seed)
    taught = [clip for clip in clips if clip.source not in held_out]
    measured = [clip for clip in clips if clip.source in held_out]

    # By what it learns from, not by where that lies; the rule may change without a new classifier.
    asked = config.with_overrides("curation.threshold=0", "curation.confidence=0", f"seed={part.seed}")
    learnt_from = hashlib.sha256(json.dumps([clip[1:] for clip in clips]).encode())
    torch.manual_seed(part.seed)
    classifier = ClipClassifier(asked)
    if part.weights_uri:
        learnt_from.update(files.read(part.weights_uri))
        classifier.net.load_pretrained(part.weights_uri)
    name = model_name("curator", learnt_from.hexdigest(), asked, ("curation",), (*TRAINER_CODE, *CODE))

    def loader(rank: int, world_size: int) -> ClipLoader:
        return LabelledLoader(store, taught, part, rank, world_size)

    uri = train_once("train-curator", name, classifier, classifier, _stage(part), loader, root_uri, log)
    if not speaks():
        return uri
    if not files.exists(f"{uri}/{_HELD_OUT}"):
        found_N = probabilities(load_classifier(uri), store, [clip.episode for clip in measured])
        rows = [
            {"digest": clip.digest, "source": clip.source, "good": clip.good, "probability": float(probability)}
            for clip, probability in zip(measured, found_N, strict=True)
        ]
        files.write_atomic(f"{uri}/{_HELD_OUT}", json.dumps(rows, indent=1).encode())
    found = held_out_metrics(config, uri)
    if log:
        log.params({"labels_uri": labels_uri, "labelled_clips": len(clips), "labelled_videos": len(kinds)})
        log.metrics(found)
        for percent in range(5, 100, 5):
            rule = config.with_overrides(f"curation.threshold={percent / 100}", "curation.confidence=0")
            at = held_out_metrics(rule, uri)
            log.metrics({f"by_threshold/{name}": at[f"curator_{name}"] for name in ("precision", "recall")}, percent)
    shown = ", ".join(f"{name} {found[f'curator_{name}']:.2f}" for name in ("precision", "recall", "base_rate", "auc"))
    summary("train-curator", f"{len(measured)} held-out labels of {len(held_out)} videos: {shown}")
    return uri


def _stage(part: CurationConfig) -> StageConfig:
    rates = OptimizerConfig(max_lr=part.lr, min_lr=part.lr / 100, beta2=0.99, warmup_steps=part.steps // 10)
    return StageConfig(steps=part.steps, batch_size=part.batch_size, optimizer=rates, checkpoint_every=100)


def load_classifier(uri: str) -> ClipClassifier:
    """In evaluation mode, on the accelerator if there is one. Raises ValueError as `checkpoint.load_model` does."""
    classifier = ClipClassifier(checkpoint.load_config(uri))
    checkpoint.load_weights(classifier, f"{uri}/{checkpoint.WEIGHTS}")
    return classifier.to(native.device()).eval()


def keeps(part: CurationConfig, probability_N: NDArray[np.floating[Any]]) -> NDArray[np.bool_]:
    """The decision rule, on prediction and confidence; a clip without a probability (NaN) is dropped."""
    sure_N = np.abs(2 * probability_N - 1) >= part.confidence
    return np.asarray(sure_N & (probability_N >= part.threshold))


def held_out_metrics(config: Config, classifier_uri: str) -> dict[str, float]:
    """What the rule does to labels that the classifier never saw, with intervals over their videos.

    `curator_precision`: of the clips that are kept, the share that is good; `_base_rate` is that of keeping all.
    `_recall`: of the good clips, the share that is kept. `_auc`: how often a good clip is above a bad one.
    """
    rows = json.loads(files.read(f"{classifier_uri}/{_HELD_OUT}"))
    good_N, probability_N = (np.array([row[key] for row in rows]) for key in ("good", "probability"))
    source_N, kept_N = np.array([row["source"] for row in rows]), keeps(config.curation, probability_N)
    found = metrics.flatten(
        {
            "precision": metrics.ratio_over_levels(good_N & kept_N, kept_N, source_N),
            "recall": metrics.ratio_over_levels(good_N & kept_N, good_N, source_N),
            "base_rate": metrics.mean_over_levels(good_N, source_N),
            "auc": float(roc_auc_score(good_N, probability_N)),
            "labels": float(len(rows)),
            "videos": float(len(set(source_N))),
        }
    )
    return {f"curator_{name}": value for name, value in found.items()}


def held_out_confusion(config: Config, classifier_uri: str) -> list[list[int]]:
    """Counts of [bad, good] labels that are [dropped, kept]."""
    rows = json.loads(files.read(f"{classifier_uri}/{_HELD_OUT}"))
    kept_N = keeps(config.curation, np.array([row["probability"] for row in rows]))
    table = metrics.contingency_table([row["good"] for row in rows], kept_N, 2, 2)
    return [list(map(int, row)) for row in table]


def probabilities(classifier: ClipClassifier, store: VideoStore, episodes: Sequence[int]) -> NDArray[np.float32]:
    """Of being good, of each of these clips. Threads read the next clips meanwhile; two batches are in memory."""
    middles_T = np.full(classifier.config.curation.frames, 0.5)
    found = [np.empty(0, np.float32)]
    with ThreadPoolExecutor(_READERS, thread_name_prefix="clips") as pool:
        for reads in _ahead(pool, store, episodes, middles_T):
            frames_BTHWC = native.to_unit_frames(np.stack([read.result() for read in reads]))
            with torch.inference_mode(), native.autocast("bf16"):
                found.append(torch.sigmoid(classifier.logit(frames_BTHWC)).cpu().numpy())
    return np.concatenate(found)


def _ahead(
    pool: ThreadPoolExecutor, store: VideoStore, episodes: Sequence[int], at_T: NDArray[np.float64]
) -> Iterator[list[Future[NDArray[np.uint8]]]]:
    waiting = deque[list[Future[NDArray[np.uint8]]]]()
    for begin in range(0, len(episodes), _BATCH):
        some = episodes[begin : begin + _BATCH]
        waiting.append([pool.submit(spread_frames, store, int(episode), at_T) for episode in some])
        if len(waiting) > 1:
            yield waiting.popleft()
    yield from waiting


def score(
    config: Config,
    data_uri: str,
    classifier_uri: str,
    root_uri: str,
    log: RunLog = NoLog(),  # noqa: B008
    share: tuple[int, int] = (0, 1),
) -> str:
    """What the classifier says of every train clip; returns the scores' URI.

    A part holds the probabilities of the clips of some shards, float32, NaN where a clip is opted out. Whole parts are
    reused. `share` (i, n): this is the i-th of n jobs, each of which makes every n-th part; whichever ends last declares
    the scores whole. Raises ValueError for a classifier or data that are missing or broken.
    """
    store, classifier = VideoStore.open(f"{data_uri}/train"), load_classifier(classifier_uri)
    weights = files.read(f"{classifier_uri}/{checkpoint.WEIGHTS}")
    asked = hashlib.sha256(weights + f"{classifier.config.curation.frames} {store.digest}".encode()).hexdigest()
    uri = f"{root_uri.rstrip('/')}/scores/scores-{asked[:12]}-{code_digest(CODE)}"
    parts = _parts(store)
    missing = _missing(uri, len(parts))
    own = [part for part in missing if part % share[1] == share[0]]
    sheet = _Sheet(config.curation.seed)
    clips = sum(len(_episodes(store, parts[part])) for part in own)
    with bar(desc="score", unit="clip", total=clips) as progress:
        for part in own:
            episodes = _episodes(store, parts[part])
            shown_E = store.episode_lengths[episodes.start : episodes.stop] > 0
            found_E = np.full(len(episodes), np.nan, np.float32)
            found_E[shown_E] = probabilities(classifier, store, np.flatnonzero(shown_E) + episodes.start)
            sheet.see(found_E, episodes.start)
            packed = io.BytesIO()
            np.save(packed, found_E)
            files.write_atomic(f"{uri}/{_part_name(part)}", packed.getvalue())
            progress.update(len(episodes))
    if not _missing(uri, len(parts)):
        told = {"data_digest": store.digest, "classifier_uri": classifier_uri, "parts": len(parts)}
        files.write_atomic(f"{uri}/{_SCORES}", json.dumps(told).encode())
    if own:
        log.image("clips_by_score", sheet.drawn(store))
    log.params({"scores_uri": uri})
    summary("score", f"{f'made {len(own)} of' if own else 'reused'} {len(parts)} parts: {uri}")
    return uri


def curate(
    config: Config,
    data_uri: str,
    scores_uri: str,
    root_uri: str,
    log: RunLog = NoLog(),  # noqa: B008
) -> str:
    """The data set whose train clips the rule keeps; returns its URI, or `data_uri` where the rule keeps everything.

    It is an index of its own over the same shards. Its eval split is the whole one, so that what is trained on either
    compares. Raises ValueError where no clip is kept, or the scores are unfinished or of other data.
    """
    part = config.curation
    if part.threshold == part.confidence == 0:
        summary("curate", f"keeps everything: {data_uri}")
        return data_uri
    stores = {split: VideoStore.open(f"{data_uri}/{split}") for split in ("train", "eval")}
    scores = _Scores(scores_uri, stores["train"])
    kept = sum(int(keeps(part, found_E).sum()) for found_E in scores)
    if not kept:
        rule = f"curation.threshold={part.threshold:g} and curation.confidence={part.confidence:g}"
        raise ValueError(f"no clip is kept by {rule}: lower them; {scores_uri} has the probabilities")
    rule = {"threshold": part.threshold, "confidence": part.confidence, "scores": scores_uri.rpartition("/")[2]}
    asked = hashlib.sha256(f"{rule} {[store.digest for store in stores.values()]}".encode()).hexdigest()
    uri = f"{root_uri.rstrip('/')}/datasets/curated-{asked[:12]}"
    everything = (np.ones(len(episodes), bool) for episodes in _shards(stores["eval"]))
    for split, keep in (("train", (keeps(part, found_E) for found_E in scores.by_shard())), ("eval", everything)):
        if not has_index(f"{uri}/{split}"):
            meta = stores[split].meta
            write_view(f"{uri}/{split}", stores[split], keep, {**meta, "data": {**meta["data"], "curation": rule}})
    found = {
        "curated_clips": float(kept),
        "curated_share": kept / stores["train"].num_episodes,
        "curated_hours": VideoStore.open(f"{uri}/train").num_frames / config.ingest.fps / 3600,
    }
    log.params({"data_uri": uri, "curation_rule": json.dumps(rule)})
    log.metrics(found)
    summary("curate", f"{kept:,} of {stores['train'].num_episodes:,} clips ({found['curated_share']:.0%}): {uri}")
    return uri


class _Scores:
    """The parts, one after the other."""

    def __init__(self, uri: str, store: VideoStore) -> None:
        if not files.exists(f"{uri}/{_SCORES}"):
            raise ValueError(f"the scores at {uri} are missing or unfinished: run score again, it carries on")
        told = json.loads(files.read(f"{uri}/{_SCORES}"))
        if told["data_digest"] != store.digest:
            raise ValueError(f"the scores at {uri} are not of {store.uri} as it is now: run score again")
        self.uri, self.store, self.parts = uri, store, _parts(store)

    def __iter__(self) -> Iterator[NDArray[np.float32]]:
        for part in range(len(self.parts)):
            yield np.load(io.BytesIO(files.read(f"{self.uri}/{_part_name(part)}")), allow_pickle=False)

    def by_shard(self) -> Iterator[NDArray[np.float32]]:
        for shards, found_E in zip(self.parts, self, strict=True):
            ends = np.cumsum([len(self.store.episodes_in(shard)) for shard in shards])
            yield from np.split(found_E, ends[:-1])


def _parts(store: VideoStore) -> list[range]:
    """Shards that are scored together: one by one, or where they are many as many as make a thousand parts."""
    size = -(-store.num_shards // _MOST_PARTS)
    return [range(begin, min(begin + size, store.num_shards)) for begin in range(0, store.num_shards, size)]


def _shards(store: VideoStore) -> Iterator[range]:
    return (store.episodes_in(shard) for shard in range(store.num_shards))


def _episodes(store: VideoStore, shards: range) -> range:
    return range(store.episodes_in(shards[0]).start, store.episodes_in(shards[-1]).stop)


def _part_name(part: int) -> str:
    return f"part-{part:05d}.npy"


def _missing(uri: str, parts: int) -> list[int]:
    there = file_sizes(*url_to_fs(uri))
    return [part for part in range(parts) if _part_name(part) not in there]


class _Sheet:
    """A few clips of every tenth of probability, drawn at random from however many pass by."""

    def __init__(self, seed: int) -> None:
        self._random = np.random.default_rng(seed)
        self._drawn: list[list[tuple[float, int]]] = [[] for _ in range(_BINS)]  # lowest of random numbers, its episode

    def see(self, found_E: NDArray[np.float32], first: int) -> None:
        drawn_E = self._random.random(len(found_E))
        for tenth, held in enumerate(self._drawn):
            own = np.flatnonzero((found_E * _BINS).clip(max=_BINS - 1) // 1 == tenth)
            some = own[np.argsort(drawn_E[own])[:_SHOWN]]
            held.extend(zip(drawn_E[some].tolist(), (some + first).tolist(), strict=True))
            held[:] = sorted(held)[:_SHOWN]

    def drawn(self, store: VideoStore) -> NDArray[np.uint8]:
        """Their middle frames, the best on top."""
        tenths = [tenth for tenth in reversed(range(_BINS)) if self._drawn[tenth]]
        sheet = np.full((len(tenths), _SHOWN, *store.meta["frame_shape"]), 255, np.uint8)
        for row, tenth in enumerate(tenths):
            for column, (_, episode) in enumerate(self._drawn[tenth]):
                sheet[row, column] = spread_frames(store, episode, np.array([0.5]))[0]
        labels = [f"{tenth / _BINS:.1f} to {(tenth + 1) / _BINS:.1f}" for tenth in tenths]
        return frame_table(sheet, labels, [""] * _SHOWN, scale=max(1, 96 // sheet.shape[2]))
