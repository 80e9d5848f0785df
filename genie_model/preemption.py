"""SIGTERM, as a machine sends it that is taken away: training saves and ends, and the same command carries on."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType

import torch
import torch.distributed as dist

_AT_ONCE = 2.0  # seconds


class Preempted(SystemExit):
    """Training ended early with all of it saved.

    The exit code is 128 + 15, as of any program that SIGTERM ended. A pipeline's task is retried after every code but
    0; a Kubeflow training job with `restartPolicy: ExitCode` only after those from 128, which say that the machine
    failed and not the program.
    """

    def __init__(self) -> None:
        super().__init__(128 + signal.SIGTERM)


@contextlib.contextmanager
def preemption() -> Iterator[Callable[[], bool]]:
    """Gives what tells whether SIGTERM has come to any of the processes; all of them ask after the same steps.

    A SIGTERM some seconds later does what it did before; at once it is the same one, which torchrun passes on to
    processes that got it already. Ctrl-C always does what it did. Outside the main thread signals are left alone.
    """
    asked_at: float | None = None
    group = dist.new_group(backend="gloo") if dist.is_initialized() else None

    def ask(number: int, frame: FrameType | None) -> None:
        nonlocal asked_at
        if asked_at is None:
            asked_at = time.monotonic()
        elif time.monotonic() - asked_at > _AT_ONCE:
            signal.signal(signal.SIGTERM, before)
            signal.raise_signal(signal.SIGTERM)

    def agreed() -> bool:
        if group is None:
            return asked_at is not None
        anywhere = torch.tensor(asked_at is not None, dtype=torch.int32)
        dist.all_reduce(anywhere, dist.ReduceOp.MAX, group=group)
        return bool(anywhere)

    if threading.current_thread() is not threading.main_thread():
        yield agreed
        return
    before = signal.signal(signal.SIGTERM, ask) or signal.SIG_DFL  # None: not Python's
    try:
        yield agreed
    finally:
        signal.signal(signal.SIGTERM, before)
