"""Ordinary video becomes a data set of clips (App. B.1): 16 s at 10 frames a second, of the frame's size.

    <root>/datasets/video-<digest>/eval/, train/      the clips, as shards.py lays them out; videos are held out whole
    <root>/datasets/video-<digest>/report/            of every video its clips, or why it has none (JSON lines);
                                                      held_out.txt where chance would have held out no clip
    <root>/datasets/video-<digest>/report.json        the same in numbers
    <root>/datasets/video-<digest>/card.md, card.html, contact_sheet.png       (card.py)

The digest is of all that decides the clips: the rules, the list of videos with their sizes and times, the filter's
words, the opt-outs. So what is there under a name never changes, and a source that has grown makes another data set.

Processes decode videos, each into a file of this machine; their order is the source's. One process takes the clips in
that order and fills shard after shard. Behind each it writes a part of the report, which says where the next one
begins: a run that was killed goes on there, whichever moment it was, and makes the same bytes. What is in memory is a
shard, and a clip in each process, however long the source and its videos are.
"""

from __future__ import annotations

import hashlib
import heapq
import itertools
import json
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

from filelock import FileLock

from genie_model import cache, files
from genie_model.config import Config
from genie_model.data import card
from genie_model.data.clipping import Crew, Rules
from genie_model.data.codecs import Episode
from genie_model.data.keywords import Keywords
from genie_model.data.opt_out import OptOuts, lines_at
from genie_model.data.shards import Meta, has_index, missing_shards, write_index, write_shard
from genie_model.data.sources import Framing, Listing, Rejected, Video, videos_at
from genie_model.data.store import VideoStore
from genie_model.progress import NoLog, RunLog, bar, summary

Split = Literal["eval", "train"]
SPLITS: tuple[Split, ...] = get_args(Split)  # in this order: a clip that is in both stays in eval


def ingest(config: Config, source_uri: str, root_uri: str, log: RunLog = NoLog()) -> str:  # noqa: B008
    """Makes the clips of the videos at `source_uri` (sources.py) and returns the data set's URI.

    A video without clips is no error: the report says why. A run that was interrupted goes on, a finished data set is
    reused. Raises ValueError for a source or a filter that cannot be read, and where no video makes a clip; OSError
    when the disk is full, or the root or the source itself does not answer (finished shards are kept). A bucket that a
    manifest names costs its own videos alone.
    """
    job = _Job.plan(config, videos_at(source_uri), root_uri)
    log.params({"data_uri": job.uri, "source_uri": source_uri, "source_kind": job.listing.kind})
    folder = files.cache_dir() / "ingest" / job.uri.rpartition("-")[2]
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_suffix(".lock")):  # two at a time would decode the same
        shutil.rmtree(folder, ignore_errors=True)  # of a run that was killed
        folder.mkdir(exist_ok=True)
        workers = config.ingest.workers or os.cpu_count() or 1
        try:
            with Crew(job.rules, workers, folder) as crew:
                for split in SPLITS:
                    has_clips = _ingest_split(job, split, crew, log)
                    if not has_clips and split == "eval" and _hold_out_another(job, crew):
                        job = _Job.plan(config, job.listing, root_uri)
                        has_clips = _ingest_split(job, split, crew, log)
                    if not has_clips:
                        raise ValueError(
                            f"no video of {job.listing.uri} makes a clip for the {split} split, of {job.videos[split]} "
                            f"videos: {job.part_uri(split, 0)} says why; a data set takes two that do, one held out"
                        )
        finally:
            shutil.rmtree(folder, ignore_errors=True)  # which stops the processes, too
    stores = [VideoStore.open(f"{job.uri}/{split}") for split in SPLITS]
    found = card.write(job.uri, _report_lines(job), stores)
    for store in stores:
        log.params({f"data_{store.split}_digest": store.digest})
        log.metrics(
            {f"data_{store.split}_frames": store.num_frames, f"data_{store.split}_episodes": store.num_episodes}
        )
    log.metrics({name: found[name] for name in ("videos", "clips", "hours")})
    log.metrics({f"rejected_{reason.replace(' ', '_')}": count for reason, count in found["rejected"].items()})
    log.image("contact_sheet", card.contact_sheet(stores[-1]))
    summary("ingest", f"{found['clips']:,} clips of {found['videos']:,} videos, {found['hours']:.2f} hours: {job.uri}")
    return job.uri


@dataclass(frozen=True)
class _Job:
    config: Config
    listing: Listing
    rules: Rules
    keywords: Keywords
    uri: str
    videos: dict[Split, int]  # of each split
    least: int  # a place: that video is held out whatever the share, for no data set is without one

    @classmethod
    def plan(cls, config: Config, listing: Listing, root_uri: str) -> _Job:
        """Reads the whole list, once, and opens no video."""
        own, data = config.ingest, config.data
        framing = Framing(own.fps, data.frame_height, data.frame_width, own.aspect, own.max_pixels)
        clip_frames = round(own.fps * own.clip_seconds)
        if clip_frames < data.clip_length:
            raise ValueError(
                f"a clip of ingest.clip_seconds={own.clip_seconds:g} has {clip_frames} frames, and training takes "
                f"data.clip_length={data.clip_length}: make it longer"
            )
        keywords = Keywords.read(own.keywords) if own.keywords else Keywords()
        if own.opt_out and not files.exists(own.opt_out):
            raise ValueError(f"ingest.opt_out: there is no file {own.opt_out}")
        lines = lines_at(own.opt_out) if own.opt_out else []
        opt_outs = OptOuts.of(lines)
        rules = Rules(framing, clip_frames, own.clip_seconds, own.codec, own.quality, opt_outs, own.stall_seconds)
        decides = {
            "format": 1,
            "rules": own.model_dump(mode="json", exclude={"workers", "keywords", "opt_out"}),
            "frame": [data.frame_height, data.frame_width],
            "keywords": keywords.model_dump(mode="json"),
            "opt_outs": sorted(set(lines)),
        }
        digest = hashlib.sha256(json.dumps(decides, sort_keys=True).encode())
        videos, least = dict.fromkeys(SPLITS, 0), _PLACES
        job = cls(config, listing, rules, keywords, "", videos, -1)
        for video in bar(listing, desc="list videos", unit="video"):
            digest.update(json.dumps([video.version, video.provenance()], sort_keys=True).encode())
            videos[job.split_of(video)] += 1
            if job.refusal(video) is None:
                least = min(least, job.place(video))
        uri = f"{root_uri.rstrip('/')}/datasets/video-{digest.hexdigest()[:12]}"
        if files.exists(f"{uri}/{_INSTEAD}"):
            least = int(files.read(f"{uri}/{_INSTEAD}"))
        if own.eval_share * _PLACES <= least < _PLACES:
            videos["eval"], videos["train"] = videos["eval"] + 1, videos["train"] - 1
        return cls(config, listing, rules, keywords, uri, videos, least)

    def place(self, video: Video) -> int:
        """A number below _PLACES that depends on the video's id and the seed alone."""
        name = f"{self.config.ingest.seed} {video.id}"
        return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")

    def split_of(self, video: Video) -> Split:
        """The same in every data set that the video is in, however many others there are."""
        place = self.place(video)
        return "eval" if place < self.config.ingest.eval_share * _PLACES or place == self.least else "train"

    def refusal(self, video: Video) -> Rejected | None:
        """Why a video is not even opened."""
        if self.rules.opt_outs.hides({"source": video.id, "owner": video.owner}):
            return Rejected("opted out")
        why = self.keywords.refusal(video.title, video.description)
        return Rejected("keywords", why) if why else None

    def meta(self, split: Split) -> Meta:
        data = {
            "ingest": self.config.ingest.model_dump(mode="json", exclude={"workers"}),
            "source_uri": self.listing.uri,
            "source_kind": self.listing.kind,
        }
        shape = list(self.config.frame_shape)
        return {"source": "video", "split": split, "frame_shape": shape, "data": data, "codec": self.rules.codec}

    def part_uri(self, split: Split, number: int) -> str:
        return f"{self.uri}/report/{split}-{number:05d}.jsonl"


_PLACES = 1 << 64
_INSTEAD = "report/held_out.txt"  # the place of the video that is held out where the one of the least place has no clip
_TRIED = 1000  # videos, until one has


def _hold_out_another(job: _Job, crew: Crew) -> bool:
    """Of a few videos those that would be held out may all be junk: then the next one is that makes a clip, if any."""
    share = job.config.ingest.eval_share * _PLACES
    others = (video for video in job.listing if share <= job.place(video) != job.least and not job.refusal(video))
    for video in heapq.nsmallest(_TRIED, others, key=job.place):
        for _, outcome in crew.outcomes(iter([video]), job.refusal):
            outcome.forget()
            if outcome.clips:
                files.write_atomic(f"{job.uri}/{_INSTEAD}", f"{job.place(video)}".encode())
                return True
    return False


class _Head(NamedTuple):
    """The first line of a part of the report, of which each shard has one: where the next shard begins."""

    episodes: int  # in the shard; a last part may have none, and then no shard
    videos: int  # of the split that are done
    clips: int  # of the next one that are in this shard and those before
    last: bool


def _ingest_split(job: _Job, split: Split, crew: Crew, log: RunLog) -> bool:
    """Whether the split has a clip."""
    uri, heads = f"{job.uri}/{split}", _heads(job, split)
    shards = sum(head.episodes > 0 for head in heads)
    if not shards:
        heads = []  # there may be another video in it now
    missing = missing_shards(uri, shards)
    started, made = time.perf_counter(), 0
    for shard in missing:
        made += _make_shards(job, split, crew, heads[shard - 1] if shard else _BEGINNING, shard, only_one=True)
    if not heads or not heads[-1].last:
        made += _make_shards(job, split, crew, heads[-1] if heads else _BEGINNING, len(heads))
        shards = sum(head.episodes > 0 for head in _heads(job, split))
    if made:
        frames = made * job.rules.clip_frames
        log.metrics({f"ingest_{split}_frames_per_second": frames / (time.perf_counter() - started)})
    if shards and (made or not has_index(uri)):
        others = [VideoStore.open(f"{job.uri}/eval")] if split == "train" else []
        dropped = write_index(uri, shards, job.meta(split), others)
        summary(f"ingest {split}", f"{made:,} clips made, {dropped:,} not listed: they are copies of others")
    return shards > 0


_BEGINNING = _Head(0, 0, 0, False)


def _heads(job: _Job, split: Split) -> list[_Head]:
    """Of the parts that are there without a gap."""
    present = set(files.names(f"{job.uri}/report"))
    uris = (job.part_uri(split, number) for number in itertools.count())
    there = itertools.takewhile(lambda uri: uri.rpartition("/")[2] in present, uris)
    return [_Head(**json.loads(data.partition(b"\n")[0])) for data in cache.each(job.uri, files.read, there)]


def _report_lines(job: _Job) -> Iterator[dict[str, Any]]:
    """Of every video, a part at a time."""
    for split in SPLITS:
        uris = [job.part_uri(split, number) for number in range(len(_heads(job, split)))]
        for data in cache.each(job.uri, files.read, uris):
            yield from map(json.loads, data.splitlines()[1:])


def _make_shards(job: _Job, split: Split, crew: Crew, begin: _Head, shard: int, only_one: bool = False) -> int:
    """Writes the shard, and those behind it if it is not the `only_one`; how many clips they have."""
    frame_shape = job.config.frame_shape
    clips: list[Episode] = []
    lines: list[str] = []
    made = 0

    def write(videos: int, of_next: int, last: bool) -> None:
        head = _Head(len(clips), videos, of_next, last)
        if clips:
            write_shard(f"{job.uri}/{split}", shard, clips, frame_shape)
        text = "\n".join([json.dumps(head._asdict()), *lines]) + "\n"
        files.write_atomic(job.part_uri(split, shard), text.encode())
        clips.clear()
        lines.clear()

    videos = itertools.islice((v for v in job.listing if job.split_of(v) == split), begin.videos, None)
    progress = bar(desc=f"ingest {split}", unit="video", total=job.videos[split], initial=begin.videos)
    with progress:
        for number, (video, outcome) in enumerate(crew.outcomes(videos, job.refusal), begin.videos):
            if outcome.rejected and outcome.rejected.reason == "unreachable" and job.listing.kind != "manifest":
                raise OSError(outcome.rejected.detail)  # the source that was listed is gone: a later run goes on
            done = begin.clips if number == begin.videos else 0
            for clip in itertools.islice(outcome.read(), done, None):
                clips.append(clip)
                done, made = done + 1, made + 1
                if len(clips) == job.config.ingest.clips_per_shard:
                    write(number, done, last=False)
                    if only_one:
                        return made
                    shard += 1
            known = {name: value for name, value in video.provenance().items() if name not in ("reason", "detail")}
            lines.append(json.dumps({**known, "split": split, **outcome.report()}))
            outcome.forget()
            progress.update()
        write(job.videos[split], 0, last=True)
    return made
