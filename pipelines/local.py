"""The same pipelines without a cluster: kfp.local runs each step as a process of this machine."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import io
import logging
import os
import re
import shutil
import signal
import sys
import threading
import time
import warnings
from collections import defaultdict, deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

import psutil

import genie_model
from genie_model.config import Config
from genie_model.progress import RUNNER_VARIABLE, TERMINAL_VARIABLE, summary
from pipelines.catalog import STUDIES, pipeline_named

_COLOR = re.compile(r"\x1b\[\d+m")
_STARTED = re.compile(r"Executing task '(.+)'")
_CACHED = re.compile(r"Task (.+) cache hit")
_ENDED = re.compile(r"Task '(.+)' finished with status (SUCCESS|FAILURE)")
_SKIPPED = re.compile("Tried to get output '.+' from task '.+'")  # by one that runs whatever became of those before it
_OUTPUTS = re.compile(r"Task '.+' outputs:")
_OUTCOMES = {"SUCCESS": "done in", "FAILURE": "failed after"}
_EXECUTOR = re.compile(
    r"\[KFP Executor |[{}\[\]],?$|\"|[\d.]+,?$|(true|false|null),?$|-{20}"
)  # its log, its input as JSON


class PipelineError(Exception):
    """A step failed; it has said why in a line of its own."""


def run_locally(
    name: str,
    arguments: dict[str, Any],
    config: Config,
    tracking_uri: str,
    state: Path,
    cache: bool,
    recorded_in: str,
) -> None:
    """Runs the pipeline of that name; steps that are in KFP's cache are skipped, an interrupted one carries on.

    `state` keeps KFP's cache, its outputs and the full log; `recorded_in` names the MLflow store, for a step that was
    recorded in another one is not finished here. Raises PipelineError.
    """
    from kfp import local

    pipeline, root_uri = pipeline_named(name), arguments.get("root_uri", str(state))
    warnings.filterwarnings("ignore", module="kfp.*")  # that resources and images mean nothing here
    local.init(
        runner=local.SubprocessRunner(use_venv=False),
        pipeline_root=str(state / "kfp" / "outputs"),
        enable_caching=cache and (bool(arguments.get("model_uri")) or _still_whole(name, config, root_uri)),
        # A cached result is what this code made of this config, and told that MLflow store.
        cache_root=str(state / "kfp" / "cache" / f"{config.digest()}-{_code_digest()}-{_digest(recorded_in)}"),
    )
    log_path = state / "logs" / f"{time.strftime('%Y-%m-%d-%H%M%S')}.log"
    log_path.parent.mkdir(parents=True, exist_ok=True)
    # The server's address is no argument of the steps: on another port a cached step is still the same step.
    environment = {"MLFLOW_TRACKING_URI": tracking_uri, RUNNER_VARIABLE: str(os.getpid())}
    scratch = state / "kfp" / "tmp"  # KFP leaves each step's program there
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    environment["TMPDIR"] = str(scratch)
    if name in STUDIES:  # which run two cells at once
        environment["OMP_NUM_THREADS"] = str(max((os.cpu_count() or 2) // 2, 1))
    elif sys.stderr.isatty():
        environment[TERMINAL_VARIABLE] = os.ttyname(sys.stderr.fileno())
    with log_path.open("w") as log, _environment(environment), _relayed(sys.stdout, log):
        try:
            pipeline(**arguments, tracking_uri="")
        except (RuntimeError, ValueError) as error:
            if isinstance(error, ValueError) and not _SKIPPED.match(str(error)):
                raise
            reason = _COLOR.sub("", str(error)).partition("Inner task failed: ")[2] or str(error)
            which = "cells or a step before them" if name in STUDIES else f"step {reason.strip('.')}"
            raise PipelineError(
                f"{which} failed, for the reason above; mend it and run again, what is finished is kept. Full log: "
                f"{log_path}"
            ) from None
        except KeyboardInterrupt:
            _end_steps()
            raise


def _still_whole(name: str, config: Config, root_uri: str) -> bool:
    """Whether what cached steps would point to is there; if not, they must run, and make what is missing anew."""
    from genie_model import files
    from genie_model.data.store import VideoStore

    if name == "video":  # its data sets are made whole by steps that no cache answers for
        return files.exists(f"{root_uri}/models") or not files.exists(f"{root_uri}/datasets")
    data_uri = f"{root_uri}/datasets/coinrun-{config.digest('data')}"
    if not files.exists(data_uri):
        return not files.exists(f"{root_uri}/models")
    try:
        for split in ("train", "eval"):
            VideoStore.open(f"{data_uri}/{split}")
    except ValueError:
        return False
    return files.exists(f"{root_uri}/models")


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]


@contextlib.contextmanager
def locked(state: Path) -> Iterator[None]:
    """Only one run works in `state`. The kernel drops the lock with its holder, kill -9 included."""
    state.mkdir(parents=True, exist_ok=True)
    with (state / "lock").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"another run works in {state}: wait for it, or name another folder with --state"
            ) from None
        yield


def interrupt_on_signals() -> None:
    """SIGTERM and a closed terminal end a run as Ctrl-C does, and all three end its steps at once."""

    def interrupt(signum: int, frame: object) -> None:
        threading.Thread(target=_keep_ending_steps, daemon=True).start()
        raise KeyboardInterrupt

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as a shell has it for what runs behind
            signal.signal(number, interrupt)


class _Screen(io.TextIOBase):
    """Writes every line to the log, and to the screen those that a person waits for.

    kfp.local prints its own log, its executor's, and the steps' output to stdout; only the last is shown, between a
    line for each step's begin and one for its end with the time it took.
    """

    def __init__(self, screen: TextIO, log: TextIO) -> None:
        self._screen = screen
        self._log = log
        self._partial = ""
        self._in_outputs = False  # which kfp.local shows of a step that ended
        self._running = defaultdict[str, deque[float]](deque)  # when they started; in a loop there are several

    def write(self, text: str) -> int:
        *lines, self._partial = (self._partial + text).split("\n")
        for line in lines:
            self._line(_COLOR.sub("", line).rstrip())
        return len(text)

    def flush(self) -> None:
        self._screen.flush()
        self._log.flush()

    def _line(self, line: str) -> None:
        self._log.write(line + "\n")
        if started := _STARTED.search(line):
            self._running[started[1]].append(time.monotonic())
            self._show(f"[{started[1]}] starts")
        elif cached := _CACHED.search(line):
            self._show(f"[{cached[1]}] is finished: reused from KFP's cache")
        elif (ended := _ENDED.search(line)) and self._running[ended[1]]:
            self._show(
                f"[{ended[1]}] {_OUTCOMES[ended[2]]} {time.monotonic() - self._running[ended[1]].popleft():.0f} s"
            )
        elif _OUTPUTS.search(line) or self._in_outputs:
            self._in_outputs = not line.strip().startswith("----")
        elif any(self._running.values()) and line.startswith("    "):  # a step's, the deeper the more loops it is in
            said = line.strip()
            if said and not _EXECUTOR.match(said):
                self._show(said)

    def _show(self, line: str) -> None:
        self._screen.write(line + "\n")
        self.flush()


@contextlib.contextmanager
def _relayed(screen: TextIO, log: TextIO) -> Iterator[None]:
    root = logging.getLogger()
    level = root.level
    relay = _Screen(screen, log)
    handler = logging.StreamHandler(relay)
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    try:
        with contextlib.redirect_stdout(relay):
            yield
    finally:
        root.removeHandler(handler)
        root.setLevel(level)


@contextlib.contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _keep_ending_steps() -> None:
    """kfp.local would first run all cells of a loop to their end, those too that have not begun."""
    while True:
        _end_steps()
        time.sleep(0.2)


def _end_steps() -> None:
    """Waits for the interrupted steps to record their end; kills those that take too long."""
    steps = []
    for process in psutil.process_iter(["environ"]):
        if (process.info["environ"] or {}).get(RUNNER_VARIABLE) == str(os.getpid()):
            steps.append(process)
            with contextlib.suppress(psutil.NoSuchProcess):
                process.terminate()
    for late in psutil.wait_procs(steps, timeout=20)[1]:
        with contextlib.suppress(psutil.NoSuchProcess):
            late.kill()


def _code_digest() -> str:
    """Of the library's source: what a cached step was made with."""
    digest = hashlib.sha256()
    folder = Path(genie_model.__file__).parent
    for path in sorted(folder.rglob("*.py")):
        digest.update(str(path.relative_to(folder)).encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def say(text: str) -> None:
    summary("genie", text)
