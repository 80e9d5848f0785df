"""Training, seen while it runs: where a step's time goes, in MLflow and Prometheus, and a step that does not end.

Nothing here waits for the device. An accelerator's work runs behind the program, so a step's time is a mean between two
readings of the device's values, which `fit` makes every `log_every` steps.
"""

from __future__ import annotations

import statistics
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple, Self

import torch
from torch import nn

from genie_model import speed
from genie_model.backend import native
from genie_model.backend.seam import Backend
from genie_model.config import StageConfig
from genie_model.data.loader import Batch
from genie_model.exporter import Exporter
from genie_model.progress import NoLog, RunLog

_TIMES_AS_LONG = 10  # as a step takes, is a stall
_BEFORE_READING = 30  # times `stall_seconds`: the first steps compile
_DATA, _DEVICE = "the next batch (the loader)", "the device (its work, or other processes)"


class _Moment(NamedTuple):
    """What the training thread is at."""

    step: int
    waits_for: str
    began: float  # when the step did, later by what was done aside in it
    allowed: float  # seconds of it before it counts as stalled


class Watch:
    """Goes along with one `fit`: `with Watch(...) as watch: for step, batch in watch.steps(...): ...`

    `module` as it is before it is sharded or compiled. Of a step that takes longer than `stage.stall_seconds`, and than
    ten times the usual, a thread writes to stderr what it waits for and where every thread stands: once, and again when
    it ended. Prometheus has `genie_training_stalled`, MLflow `stalled_seconds`.
    """

    def __init__(
        self,
        desc: str,
        module: nn.Module,
        stage: StageConfig,
        clip_length: int,
        log: RunLog,
        backend: Backend,
        saved_at: Callable[[], float],
    ) -> None:
        self.backend = backend
        self.stage, self.desc, self.clip_length, self.log = stage, desc, clip_length, log
        self._saved_at = saved_at  # when the newest checkpoint was taken
        self.exporter = Exporter(desc, lambda: time.monotonic() - saved_at())
        seen = self.exporter.port is not None or type(log) is not NoLog  # else nobody reads the figure
        self._peak = speed.peak_flops(backend.device_name(), stage.precision) if seen else None
        self._count_flops = speed.flops_counter(module, stage.precision) if self._peak else None
        self._flops = 0.0  # of a step, by all devices
        self._now: _Moment | None = None  # no moment, no stall
        self._waits: list[tuple[float, torch.cuda.Event | None, torch.cuda.Event | None]] = []
        self._means: deque[float] = deque(maxlen=21)  # seconds of a step, of the last readings
        self._usual: float | None = None  # their median
        self._thread = threading.Thread(target=self._look_out, name="watch", daemon=True)
        self._over = threading.Event()

    def __enter__(self) -> Self:
        self.exporter.open()
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._thread.join(timeout=5)  # it may be telling a server that does not answer
        self.exporter.close()

    def steps(self, start: int, stream: Iterator[tuple[int, Batch]]) -> Iterator[tuple[int, Batch]]:
        """The loader's stream from step `start` on; what happens between two of its items is a step."""
        self._read_step = step = start
        self._read_at, self._aside = time.monotonic(), 0.0
        try:
            while True:
                began, before = time.monotonic(), native.mark()
                self._now = _Moment(step, _DATA, began, self._allowed(step, began))
                if (item := next(stream, None)) is None:
                    return
                self._waits.append((time.monotonic() - began, before, native.mark()))
                if self._count_flops:
                    with self.aside():
                        self._flops = self._count_flops(item[1]) * self.stage.batch_size
                    self._count_flops = None
                self._now = self._now._replace(waits_for=_DEVICE)
                yield item
                step += 1
        finally:
            self._now = None

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Around what belongs to no step, however long it takes: a checkpoint, a validation."""
        began, moment, self._now = time.monotonic(), self._now, None
        yield
        seconds = time.monotonic() - began
        self._aside += seconds
        self._now = moment and moment._replace(began=moment.began + seconds)

    def reading(self, done: int) -> dict[str, float]:
        """Of the steps since the last one, to log after `done` steps; when the device's values were just read."""
        steps, elapsed = done - self._read_step, time.monotonic() - self._read_at
        step_seconds = (elapsed - self._aside) / steps
        found = {
            "step_seconds": step_seconds,
            "frames_per_second": steps * self.stage.batch_size * self.clip_length / elapsed,
            "data_wait_share": sum(_idle(*wait) for wait in self._waits) / steps / step_seconds,
            "compiles": float(self.backend.compile_count()),
            "peak_memory_mb": self.backend.peak_memory_mb(),
        }
        if self._peak:
            found["mfu"] = self._flops / (step_seconds * self._peak * self.backend.num_devices())
        self.exporter.read(found, done)
        self._means.append(step_seconds)
        self._usual = statistics.median(self._means)
        self._waits.clear()
        self._read_step, self._read_at, self._aside = done, time.monotonic(), 0.0
        return found | {"checkpoint_age_seconds": time.monotonic() - self._saved_at()}

    def _allowed(self, step: int, now: float) -> float:
        if self._usual is None:
            return _BEFORE_READING * self.stage.stall_seconds
        # The program may be steps ahead of the device; to read its values takes their time too.
        ahead = (step - self._read_step) * self._usual - (now - self._read_at - self._aside)
        return max(self.stage.stall_seconds, _TIMES_AS_LONG * self._usual) + max(ahead, 0.0)

    def _look_out(self) -> None:
        stalled: _Moment | None = None
        over = False
        while not over:
            over = self._over.wait(min(self.stage.stall_seconds / 4, 1.0))
            now, moment = time.monotonic(), self._now
            if stalled and (moment is None or moment.step != stalled.step):
                self.exporter.stalled.set(0)
                self._tell(f"step {stalled.step:,} goes on: it took {now - stalled.began:.0f} s", stalled, now)
                stalled = None
            elif not stalled and moment and now - moment.began > moment.allowed:
                stalled = moment
                self.exporter.stalled.set(1)
                self.exporter.stalls.inc()
                usual = f", {self._usual:.3g} s is usual" if self._usual else ""
                text = f"step {moment.step:,} has taken {now - moment.began:.0f} s{usual}: it waits for "
                self._tell(f"{text}{moment.waits_for}\n{_stacks()}", moment, now)

    def _tell(self, text: str, moment: _Moment, now: float) -> None:
        print(f"\n[{self.desc}] {text}", file=sys.stderr, flush=True)
        try:
            self.log.metrics({"stalled_seconds": now - moment.began}, moment.step)
        except Exception as error:  # of any tracker: whoever waits for this step must hear of the next one too
            print(f"[{self.desc}] the run's log could not be told: {error}", file=sys.stderr, flush=True)


def _idle(waited: float, before: torch.cuda.Event | None, after: torch.cuda.Event | None) -> float:
    """Seconds of a wait for a batch; of an accelerator's time those alone in which it had nothing else to do."""
    return min(waited, native.seconds_between(before, after)) if before and after else waited


def _stacks() -> str:
    """Of all threads but this one, innermost call last; a loader's thread tells why there is no batch."""
    frames, own = sys._current_frames(), threading.get_ident()
    return "\n".join(
        f"  {thread.name}:\n" + "".join(traceback.format_stack(frames[thread.ident], limit=12)).rstrip()
        for thread in threading.enumerate()
        if thread.ident != own and thread.ident in frames
    )
