"""Videos to clips, in processes: a video's clips go into a file of this machine, and come out in the videos' order.

This is what each process imports: it stays light, and a process is there in a second.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import pickle
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from genie_model.data.codecs import Codec, Episode, compress
from genie_model.data.opt_out import OptOuts
from genie_model.data.sources import Framing, Rejected, Video


@dataclass(frozen=True)
class Rules:
    """How videos are cut."""

    framing: Framing
    clip_frames: int
    clip_seconds: float
    codec: Codec
    quality: int
    opt_outs: OptOuts


class Outcome(NamedTuple):
    """What became of a video: its clips lie in a file, or it was rejected."""

    path: Path | None
    clips: int
    seconds: float
    notes: list[str]
    rejected: Rejected | None

    def read(self) -> Iterator[Episode]:
        if self.path:
            with self.path.open("rb") as file:
                for _ in range(self.clips):
                    yield pickle.load(file)

    def report(self) -> dict[str, Any]:
        told: dict[str, Any] = {"clips": self.clips, "seconds": round(self.seconds, 3), "notes": self.notes}
        if self.rejected:
            told |= {"reason": self.rejected.reason, "detail": self.rejected.detail}
        return told

    def forget(self) -> None:
        if self.path:
            self.path.unlink()


def outcomes(
    videos: Iterator[Video], rules: Rules, refusal: Callable[[Video], Rejected | None], workers: int, folder: Path
) -> Generator[tuple[Video, Outcome], None, None]:
    """Of each video in turn; those that come next are decoded meanwhile. `refusal` says which are not even opened.

    A video that ends its process (a fault of a decoder, or no memory left) is rejected: with it go all processes, so
    each of those that were waited for is tried once alone.
    """
    names = itertools.count()
    waiting: deque[tuple[Video, Future[Outcome]]] = deque()

    def start(pool: ProcessPoolExecutor, video: Video) -> Future[Outcome]:
        known: Future[Outcome] = Future()
        if why := refusal(video):
            known.set_result(_rejected(why))
            return known
        try:
            return pool.submit(_decode, video, rules, folder / f"{os.getpid()}-{next(names)}.clips")
        except BrokenProcessPool as error:  # by one that is waited for
            known.set_exception(error)
            return known

    pool = _pool(workers)
    try:
        while True:
            for video in itertools.islice(videos, max(2 * workers - len(waiting), 0)):
                waiting.append((video, start(pool, video)))
            if not waiting:
                return
            video, future = waiting.popleft()
            try:
                outcome = future.result()
            except BrokenProcessPool:
                pool.shutdown()
                with _pool(1) as alone:
                    try:
                        outcome = start(alone, video).result()
                    except BrokenProcessPool:
                        outcome = _rejected(Rejected("crashed", "the process that decoded it was ended"))
                pool = _pool(workers)
                waiting = deque((video, start(pool, video)) for video, _ in waiting)
            yield video, outcome
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _pool(workers: int) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(workers, get_context("spawn"), initializer=_end_with_parent)


def _end_with_parent() -> None:
    """A process of a run that was killed does not stay."""
    parent = parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _rejected(why: Rejected, seconds: float = 0.0) -> Outcome:
    return Outcome(None, 0, seconds, [], why)


def _decode(video: Video, rules: Rules, path: Path) -> Outcome:
    """In a process of its own: all clips of a video, into the file."""
    notes: dict[str, None] = {}
    clips = frames = hidden = 0
    rejected: Rejected | None = None
    try:
        with path.open("wb") as file:
            for clip_THWC in _cut(
                video.frames(rules.framing, lambda text: notes.update({text: None})), rules.clip_frames
            ):
                frames += len(clip_THWC)
                if len(clip_THWC) < rules.clip_frames:
                    break  # the rest
                about = {
                    **video.provenance(),
                    "start_seconds": round((clips + hidden) * rules.clip_seconds, 3),
                    "digest": hashlib.sha256(clip_THWC.data).hexdigest(),
                }
                if rules.opt_outs.hides(about):
                    hidden += 1
                    continue
                pickle.dump(compress(clip_THWC, rules.codec, rules.quality, rules.framing.fps, about), file)
                clips += 1
                if not path.exists():
                    raise KeyboardInterrupt  # the run has ended, and taken its folder away
        seconds = frames / rules.framing.fps
        if hidden:
            notes[f"{hidden} clips opted out"] = None
            if not clips:
                raise Rejected("opted out", f"all of its {hidden} clips")
        if not clips:
            raise Rejected("too short", f"{seconds:.1f} s, a clip takes {rules.clip_seconds:g} s")
    except Rejected as why:
        rejected = why
    except (OSError, AssertionError):
        raise  # of a bucket or a disk, or ours
    except Exception as error:  # what a library makes of a file that its authors did not think of
        rejected = Rejected("corrupt", f"{type(error).__name__}: {error}")
    if rejected:
        path.unlink(missing_ok=True)
        return _rejected(rejected, frames / rules.framing.fps)
    return Outcome(path, clips, seconds, list(notes), None)


def _cut(frames: Iterator[NDArray[np.uint8]], length: int) -> Iterator[NDArray[np.uint8]]:
    """uint8 (T,H,W,3), T = length, or less for the rest."""
    while clip := list(itertools.islice(frames, length)):
        yield np.stack(clip)
