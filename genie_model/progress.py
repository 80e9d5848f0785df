"""What a long job tells the person who waits for it: a progress bar, and a log that a tracker can implement."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol, TextIO

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

# Set for its steps by `python -m pipelines run`.
TERMINAL_VARIABLE = "GENIE_TERMINAL"  # the terminal to draw progress bars on
RUNNER_VARIABLE = "GENIE_RUNNER"  # the process whose death ends its steps


class RunLog(Protocol):
    """Where a job's params, curves and pictures go. `tracking.StepRun` sends them to MLflow."""

    def params(self, values: Mapping[str, Any]) -> None: ...

    def metrics(self, values: Mapping[str, float], step: int = 0) -> None: ...

    def image(self, name: str, image_HWC: NDArray[np.uint8]) -> None:
        """`image_HWC` is uint8 RGB; `name` has no extension."""


class NoLog:
    """A RunLog that keeps nothing."""

    def params(self, values: Mapping[str, Any]) -> None:
        pass

    def metrics(self, values: Mapping[str, float], step: int = 0) -> None:
        pass

    def image(self, name: str, image_HWC: NDArray[np.uint8]) -> None:
        pass


def bar(
    iterable: Iterable[Any] | None = None, *, desc: str, unit: str, total: int | None = None, initial: int = 0
) -> Any:
    """A tqdm bar with rate and time left: redrawn twice a second on a terminal, a line every ten seconds in a log."""
    screen = _screen()
    drawn, seconds = (tqdm, 0.5) if screen.isatty() else (_Lines, 10.0)
    return drawn(
        iterable,
        desc=desc,
        unit=unit,
        total=total,
        initial=initial,
        mininterval=seconds,
        maxinterval=seconds,
        dynamic_ncols=True,
        file=screen,
    )


def _screen() -> TextIO:
    """The terminal that a local pipeline was started from (it relays its steps' output by whole lines), else stderr."""
    terminal = os.environ.get(TERMINAL_VARIABLE) if speaks() else os.devnull
    return open(terminal, "w") if terminal else sys.stderr


class _Lines(tqdm):  # type: ignore[misc]
    """A bar for a log, where nothing can be redrawn."""

    @staticmethod
    def status_printer(file: TextIO) -> Callable[[str], None]:
        def write(status: str) -> None:
            if status.strip():
                file.write(status.strip() + "\n")
                file.flush()

        return write


def summary(step: str, text: str) -> None:
    """The one line that stays on the screen when a step is done."""
    if speaks():
        print(f"[{step}] {text}", flush=True)


def speaks() -> bool:
    """Of processes that torchrun started, or that run on a TPU slice's hosts, the first speaks for all."""
    return os.environ.get("RANK", os.environ.get("TPU_WORKER_ID", "0")) == "0"
