"""Videos to clips, in processes: a video's clips go into a file of this machine, and come out in the videos' order.

This is what each process imports: it stays light, and a process is there in a second.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import pickle
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import active_children, get_context, parent_process
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from genie_model.data.codecs import Codec, Episode, compress
from genie_model.data.opt_out import OptOuts
from genie_model.data.sources import Framing, Rejected, Video

_AHEAD = 8  # videos for each process: their clips lie on disk while a long one before them is still decoded


@dataclass(frozen=True)
class Rules:
    """How videos are cut."""

    framing: Framing
    clip_frames: int
    clip_seconds: float
    codec: Codec
    quality: int
    opt_outs: OptOuts
    stall_seconds: float


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


class Crew:
    """The processes, and the folder of this machine that their clips go through."""

    def __init__(self, rules: Rules, workers: int, folder: Path) -> None:
        self._rules, self._workers, self._folder = rules, workers, folder
        self._names = itertools.count()
        self._pool = _pool(workers)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    def outcomes(
        self, videos: Iterator[Video], refusal: Callable[[Video], Rejected | None]
    ) -> Iterator[tuple[Video, Outcome]]:
        """Of each video in turn; those that come next are decoded meanwhile. `refusal` says which are not even opened.

        A video that ends its process (a fault of a decoder, no memory left, or `stall_seconds` without a clip) is
        rejected. All processes go with it, and which one it was is not told: so the one that is waited for is tried
        again alone, and the others together.
        """
        waiting: deque[tuple[Video, Future[Outcome]]] = deque()
        while True:
            for video in itertools.islice(videos, max(_AHEAD * self._workers - len(waiting), 0)):
                waiting.append((video, self._start(video, refusal)))
            if not waiting:
                return
            video, future = waiting.popleft()
            try:
                outcome = future.result()
            except BrokenProcessPool:
                outcome = self._alone(video)
                for place, (later, known) in enumerate(waiting):
                    if not known.done() or known.exception():
                        waiting[place] = later, self._start(later, refusal)
            yield video, outcome

    def _start(self, video: Video, refusal: Callable[[Video], Rejected | None]) -> Future[Outcome]:
        if why := refusal(video):
            return _known(_rejected(why))
        try:
            return self._pool.submit(_decode, video, self._rules, self._next_path())
        except BrokenProcessPool as error:  # by one that is waited for
            return _known(error)

    def _alone(self, video: Video) -> Outcome:
        """And with new processes for the others."""
        self._pool.shutdown()
        with _pool(1) as pool:
            future, processes = pool.submit(_decode, video, self._rules, self._next_path()), active_children()
        self._pool = _pool(self._workers)
        if not isinstance(future.exception(), BrokenProcessPool):
            return future.result()
        if any(process.exitcode == -signal.SIGALRM for process in processes):
            return _rejected(Rejected("stalled", f"no clip for {self._rules.stall_seconds:g} s, twice"))
        return _rejected(Rejected("crashed", "the process that decoded it was ended"))

    def _next_path(self) -> Path:
        return self._folder / f"{os.getpid()}-{next(self._names)}.clips"


def _known(outcome: Outcome | BrokenProcessPool) -> Future[Outcome]:
    future: Future[Outcome] = Future()
    if isinstance(outcome, Outcome):
        future.set_result(outcome)
    else:
        future.set_exception(outcome)
    return future


def _pool(workers: int) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(workers, get_context("spawn"), initializer=_end_with_parent)


def _end_with_parent() -> None:
    """A process of a run that was killed does not stay. Ctrl-C is the run's alone: it takes the folder away."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
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
    _expect_a_clip(rules.stall_seconds)
    try:
        with path.open("wb") as file:
            for clip_THWC in _cut(
                video.frames(rules.framing, lambda text: notes.update({text: None})), rules.clip_frames
            ):
                _expect_a_clip(rules.stall_seconds)
                frames += len(clip_THWC)
                if len(clip_THWC) < rules.clip_frames:
                    break  # the rest
                about = {
                    **video.provenance(),
                    "start_seconds": round((clips + hidden) * rules.clip_frames / rules.framing.fps, 3),
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
    finally:
        _expect_a_clip(0)
    if rejected:
        path.unlink(missing_ok=True)
        return _rejected(rejected, frames / rules.framing.fps)
    return Outcome(path, clips, seconds, list(notes), None)


def _expect_a_clip(seconds: float) -> None:
    """Within that time, or SIGALRM ends the process, whatever a library's code hangs in; 0: no longer."""
    signal.setitimer(signal.ITIMER_REAL, seconds)


def _cut(frames: Iterator[NDArray[np.uint8]], length: int) -> Iterator[NDArray[np.uint8]]:
    """uint8 (T,H,W,3), T = length, or less for the rest."""
    while clip := list(itertools.islice(frames, length)):
        yield np.stack(clip)
