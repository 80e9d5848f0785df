"""The learned filter (App. B.1): people label some clips, a classifier learns from them, a rule keeps what it likes.

    train_classifier  labels + data  ->  <root>/models/curator-...     a ResNet-18, and what it says of held-out labels
    score             + data         ->  <root>/scores/scores-...      the probability of every clip, part by part
    curate            + data         ->  <root>/datasets/curated-...   the same shards, of which fewer clips are listed

Made for 55 million clips: the columns of the index are mapped, not read (columns.py), a part of the scores is all that
is in memory, whole parts are not made again, several jobs can share them, and no frame is copied.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from fsspec.core import url_to_fs
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score

from genie_model import checkpoint, files, metrics
from genie_model.backend import native
from genie_model.config import Config, OptimizerConfig, StageConfig
from genie_model.data.labels import BAD, GOOD, episodes_of, held_out_sources, read_labels
from genie_model.data.loader import Batch, ClipLoader, shuffled
from genie_model.data.shards import file_sizes, has_index, write_view
from genie_model.data.store import VideoStore
from genie_model.pictures import frame_table
from genie_model.progress import NoLog, RunLog, bar, speaks, summary
from genie_model.resnet import ClipClassifier
from genie_model.source import code_digest
from genie_model.train import TRAINER_CODE, model_name, train_once
from genie_model.video_config import CurationConfig

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
    labels = {
        digest: said.label == GOOD for digest, said in read_labels(labels_uri).items() if said.label in (GOOD, BAD)
    }
    found = sorted(episodes_of(store, labels).items())
    with ThreadPoolExecutor(_READERS, thread_name_prefix="clips") as pool:  # of a bucket it is two requests for each
        abouts = pool.map(store.about, (episode for _, episode in found))
        clips = [
            Labelled(episode, digest, about["source"], labels[digest])
            for (digest, episode), about in zip(found, abouts, strict=True)
            if about["digest"] == digest  # and not only its hash
        ]
    if not clips:
        raise ValueError(
            f"{store.uri} has none of the {len(labels)} clips that {labels_uri} labels {GOOD} or {BAD}: label its own"
        )
    return clips


class LabelledLoader(ClipLoader):
    """Batches of labelled clips, good and bad in turn, as pure functions of (clips, seed, step, rank).

    Of each clip `frames` frames, one drawn from every equal stretch of it.
    """

    def __init__(
        self, store: VideoStore, clips: Sequence[Labelled], part: CurationConfig, rank: int, size: int
    ) -> None:
        super().__init__(store, part.batch_size, part.frames, part.seed, rank, size)
        self.by_kind = [[clip for clip in clips if clip.good == kind] for kind in (False, True)]

    def _empty(self) -> Batch:
        return super()._empty()._replace(labels_B=np.empty(len(self._slice), np.int64))

    def _read(self, batch: Batch, step: int, row: int) -> None:
        turn, kind = divmod(step * self.batch_size + self._slice[row], 2)
        clips = self.by_kind[kind]
        epoch, position = divmod(turn, len(clips))
        clip = clips[shuffled(position, len(clips), self.seed, epoch)]
        drawn = np.random.default_rng((self.seed, kind, turn)).random(self.clip_length)
        batch.frames_BTHWC[row] = spread_frames(self.store, clip.episode, drawn)
        assert batch.labels_B is not None
        batch.labels_B[row] = kind


def spread_frames(store: VideoStore, episode: int, at_T: NDArray[np.float64]) -> NDArray[np.uint8]:
    """One frame of each of T equal stretches of an episode: uint8 (T, H, W, C); `at_T` in [0, 1) says where in each."""
    places_T = (np.arange(len(at_T)) + at_T) / len(at_T) * store.length_of(episode)
    return np.concatenate([store.frames(episode, int(place), 1) for place in places_T])


def train_classifier(config: Config, data_uri: str, labels_uri: str, root_uri: str, log: RunLog | None = None) -> str:
    """Learns 5 from 1 by the one trainer (train.py); returns the classifier's URI.

    The videos of `config.curation.held_out` measure it, and none of their clips teaches it. A finished classifier of
    the same labelled clips is reused, a killed run carries on. Raises ValueError for labels or data that are missing or
    too few.
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
    learnt_from = hashlib.sha256(json.dumps([clip[1:] for clip in clips]).encode())  # digests, sources, labels
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
            log.metrics({f"by_threshold/{name}": value for name, value in _at(percent / 100, uri).items()}, percent)
    shown = ", ".join(f"{name} {found.get(f'curator_{name}', np.nan):.2f}" for name in ("precision", "recall", "auc"))
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
    """The decision rule, on prediction and confidence; a clip without a probability (NaN) is dropped.

    Confidence is that a clip is good: a classifier that is sure of a bad one keeps it under no threshold.
    """
    sure_N = (2 * probability_N - 1 >= part.confidence) | (part.confidence == 0)
    return np.asarray(sure_N & (probability_N >= part.threshold))


def held_out_metrics(config: Config, classifier_uri: str) -> dict[str, float]:
    """What the rule does to labels that the classifier never saw, with intervals over their videos.

    `curator_precision`: of the clips that are kept, the share that is good; `_base_rate` is that of keeping all.
    `_recall`: of the good clips, the share that is kept. `_auc`: how often a good clip is above a bad one. All are of
    labels 5 and 1 alone: of what lies between, which other data have too, they say nothing, and a rule that was chosen
    by them looks better than it is.
    """
    good_N, probability_N, source_N = _held_out(classifier_uri)
    kept_N = keeps(config.curation, probability_N)
    videos, video_N = np.unique(source_N, return_inverse=True)
    columns = (good_N & kept_N, kept_N, good_N, np.ones(len(good_N)))
    totals_V4 = np.stack([np.bincount(video_N, weights=column) for column in columns], axis=1)

    def share(part: int, of: int) -> metrics.Estimate | float:
        if not totals_V4[:, of].any():  # of none kept, no share is good
            return np.nan
        return metrics.bootstrap(totals_V4, lambda total: total[part] / total[of] if total[of] else np.nan)

    found = metrics.flatten(
        {
            "precision": share(0, 1),
            "recall": share(0, 2),
            "base_rate": share(2, 3),
            "auc": float(roc_auc_score(good_N, probability_N)),
            "labels": float(len(good_N)),
            "videos": float(len(videos)),
        }
    )
    return {
        f"curator_{name}": value for name, value in found.items() if np.isfinite(value)
    }  # of none kept, none is good


def held_out_confusion(config: Config, classifier_uri: str) -> list[list[int]]:
    """Counts of [bad, good] labels that are [dropped, kept]."""
    good_N, probability_N, _ = _held_out(classifier_uri)
    table: list[list[int]] = metrics.contingency_table(good_N, keeps(config.curation, probability_N), 2, 2).tolist()
    return table


def _at(threshold: float, classifier_uri: str) -> dict[str, float]:
    """What a threshold alone would do; to choose one by."""
    good_N, probability_N, _ = _held_out(classifier_uri)
    kept_N = probability_N >= threshold
    both = float((good_N & kept_N).sum())
    return {"recall": both / good_N.sum()} | ({"precision": both / kept_N.sum()} if kept_N.any() else {})


def _held_out(classifier_uri: str) -> tuple[NDArray[np.bool_], NDArray[np.float64], NDArray[np.str_]]:
    """Of every held-out label: whether it says good, the probability of that, and its video."""
    rows = json.loads(files.read(f"{classifier_uri}/{_HELD_OUT}"))
    good_N, probability_N, source_N = (
        np.array([row[key] for row in rows]) for key in ("good", "probability", "source")
    )
    return good_N, probability_N, source_N


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

    A part holds the probabilities of the clips of some shards, float32, and is named by their digests: whole parts are
    reused, and where clips were opted out only the parts are made anew that held them. `share` (i, n): this is the i-th
    of n jobs, each of which makes every n-th missing part. Raises ValueError for a classifier or data that are missing
    or broken, or clips without digests.
    """
    store, classifier = VideoStore.open(f"{data_uri}/train"), load_classifier(classifier_uri)
    weights = files.read(f"{classifier_uri}/{checkpoint.WEIGHTS}")
    asked = hashlib.sha256(weights + f"{classifier.config.curation.frames}".encode()).hexdigest()
    uri = f"{root_uri.rstrip('/')}/scores/scores-{asked[:12]}-{code_digest(CODE)}"
    files.write_atomic(f"{uri}/{_SCORES}", json.dumps({"classifier_uri": classifier_uri}).encode())
    parts = parts_of(store)
    missing = _missing(uri, parts)
    own = [part for part in missing if part.number % share[1] == share[0]]
    sheet, clips = _Sheet(config.curation.seed), sum(len(part.episodes) for part in own)
    with bar(desc="score", unit="clip", total=clips) as progress:
        for part in own:
            found_E = probabilities(classifier, store, part.episodes)
            sheet.see(found_E, part.episodes.start)
            packed = io.BytesIO()
            np.save(packed, found_E)
            files.write_atomic(f"{uri}/{part.name}", packed.getvalue())
            progress.update(len(part.episodes))
    if clips:
        log.image("clips_by_score", sheet.drawn(store))
    log.params({"scores_uri": uri})
    summary("score", f"{f'made {len(own)} of' if own else 'reused all'} {len(parts)} parts: {uri}")
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
    train, parts = stores["train"], parts_of(stores["train"])
    if missing := _missing(scores_uri, parts):
        raise ValueError(
            f"{len(missing)} of {len(parts)} parts are missing at {scores_uri}: the scores are unfinished, or of other "
            "data; run score again, it carries on"
        )
    kept = np.zeros(2, np.int64)  # clips, frames
    for some in parts:
        keep_E = keeps(part, some.read(scores_uri))
        kept += keep_E.sum(), train.lengths_in(some.shards)[keep_E].sum()
    if not kept[0]:
        raise ValueError(
            f"no clip is kept by curation.threshold={part.threshold:g} and curation.confidence={part.confidence:g}: "
            f"lower them; {scores_uri} has the probabilities"
        )
    rule = {"threshold": part.threshold, "confidence": part.confidence, "scores": scores_uri.rpartition("/")[2]}
    asked = hashlib.sha256(f"{rule} {[store.digest for store in stores.values()]}".encode()).hexdigest()
    uri = f"{root_uri.rstrip('/')}/datasets/curated-{asked[:12]}"
    by_shard = (keeps(part, found_E) for some in parts for found_E in some.by_shard(scores_uri, train))
    whole = (np.ones(len(stores["eval"].episodes_in(shard)), bool) for shard in range(stores["eval"].num_shards))
    for split, keep in (("train", by_shard), ("eval", whole)):
        if not has_index(f"{uri}/{split}"):
            meta = stores[split].meta
            write_view(f"{uri}/{split}", stores[split], keep, {**meta, "data": {**meta["data"], "curation": rule}})
    log.params({"data_uri": uri, "curation_rule": json.dumps(rule)})
    log.metrics(figures(config, data_uri, uri, scores_uri))
    summary("curate", f"{kept[0]:,} of {train.num_episodes:,} clips ({kept[0] / train.num_episodes:.0%}): {uri}")
    return uri


def figures(config: Config, data_uri: str, curated_uri: str, scores_uri: str) -> dict[str, float]:
    """What was kept, `curated_clips`, `_share` and `_hours`; unless that is everything, with `held_out_metrics`."""
    before, after = (VideoStore.open(f"{uri}/train") for uri in (data_uri, curated_uri))
    found = {
        "curated_clips": float(after.num_episodes),
        "curated_share": after.num_episodes / before.num_episodes,
        "curated_hours": after.num_frames / config.ingest.fps / 3600,
    }
    if curated_uri == data_uri:
        return found
    return found | held_out_metrics(config, json.loads(files.read(f"{scores_uri}/{_SCORES}"))["classifier_uri"])


@dataclass(frozen=True)
class Part:
    """Clips that are scored together, of consecutive shards."""

    number: int
    shards: range
    episodes: range
    name: str

    def read(self, uri: str) -> NDArray[np.float32]:
        found_E: NDArray[np.float32] = np.load(io.BytesIO(files.read(f"{uri}/{self.name}")), allow_pickle=False)
        return found_E

    def by_shard(self, uri: str, store: VideoStore) -> list[NDArray[np.float32]]:
        ends = [store.episodes_in(shard).stop - self.episodes.start for shard in self.shards]
        return np.split(self.read(uri), ends[:-1])


def parts_of(store: VideoStore) -> list[Part]:
    """A shard each, or where they are many as many as make a thousand parts."""
    size, parts = -(-store.num_shards // _MOST_PARTS), list[Part]()
    for begin in range(0, store.num_shards, size):
        shards = range(begin, min(begin + size, store.num_shards))
        episodes = range(store.episodes_in(shards[0]).start, store.episodes_in(shards[-1]).stop)
        digest_E = store.hashes_in("digest", shards)
        if not digest_E.all():
            raise ValueError(f"clips of {store.uri} have no digests: curate what was ingested from video")
        digest = hashlib.sha256(digest_E.tobytes()).hexdigest()
        parts.append(Part(len(parts), shards, episodes, f"part-{len(parts):05d}-{digest[:16]}.npy"))
    return parts


def _missing(uri: str, parts: Sequence[Part]) -> list[Part]:
    there = file_sizes(*url_to_fs(uri))
    return [part for part in parts if part.name not in there]


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
