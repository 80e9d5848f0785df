"""What a long job tells the person who waits for it: a progress bar, and a log that a tracker can implement."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import numpy as np
from tqdm import tqdm


class RunLog(Protocol):
    """Where a job's params, curves and pictures go. `tracking.StepRun` sends them to MLflow."""

    def params(self, values: Mapping[str, Any]) -> None: ...

    def metrics(self, values: Mapping[str, float], step: int = 0) -> None: ...

    def image(self, name: str, image_HWC: np.ndarray) -> None:
        """`image_HWC` is uint8 RGB; `name` has no extension."""


class NoLog:
    """A RunLog that keeps nothing."""

    def params(self, values: Mapping[str, Any]) -> None:
        pass

    def metrics(self, values: Mapping[str, float], step: int = 0) -> None:
        pass

    def image(self, name: str, image_HWC: np.ndarray) -> None:
        pass


def bar(iterable: Iterable[Any] | None = None, *, desc: str, unit: str, total: int | None = None, initial: int = 0) -> Any:
    """A tqdm bar with rate and time left, redrawn at most twice a second."""
    return tqdm(iterable, desc=desc, unit=unit, total=total, initial=initial, mininterval=0.5, dynamic_ncols=True)


def summary(step: str, text: str) -> None:
    """The one line that stays on the screen when a step is done."""
    print(f"[{step}] {text}", flush=True)
