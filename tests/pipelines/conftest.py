"""`python -m pipelines` in the test's own process, for commands that start no other: a start takes seconds."""

from __future__ import annotations

import builtins
import functools
import inspect
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from pipelines.__main__ import main


@pytest.fixture(autouse=True)
def _printing(monkeypatch: pytest.MonkeyPatch) -> None:
    """KFP's runner indents print() while a task runs; of two tasks at once one restores the other's, for good."""
    monkeypatch.setattr(builtins, "print", print)


@pytest.fixture(autouse=True)
def _stacks_without_source(monkeypatch: pytest.MonkeyPatch) -> None:
    """KFP asks for the stack at every setting of a task, and to find pytest's source lines takes seconds a pipeline."""
    monkeypatch.setattr(inspect, "stack", functools.partial(inspect.stack, 0))


class Done(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Callable[..., Done]]:
    """Runs the command with these arguments, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}

    def run(*arguments: str) -> Done:
        capsys.readouterr()
        return Done(main(list(arguments)), *capsys.readouterr())

    yield run
    for number, handler in handlers.items():
        signal.signal(number, handler)
