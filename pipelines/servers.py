"""The servers that `demo` keeps: found again after a kill -9, stopped with the run that started them."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

from pipelines.local import say

_HOST = "127.0.0.1"
_START_SECONDS = 300


@contextlib.contextmanager
def mlflow_server(state: Path, port: int) -> Iterator[str]:
    """The URL of an MLflow server on `state`'s SQLite store; one that a killed run left behind is taken over."""
    folder = state / "mlflow"
    folder.mkdir(parents=True, exist_ok=True)
    note = folder / "server.json"
    left = _left_behind(note)
    if left and _answers(left["port"]):
        say(f"MLflow still runs: {_url(left['port'])}")
        pid, port = left["pid"], left["port"]
    else:
        if left:
            _stop(left["pid"])
        pid = 0
        while not pid:
            port = free_port(port, "MLflow")
            pid = _start_mlflow(folder, note, port)
        say(f"MLflow: {_url(port)}")
    try:
        yield _url(port)
    finally:
        _stop(pid)
        note.unlink(missing_ok=True)


def play_server(state: Path, tracking_uri: str, port: int) -> int:
    """Serves the champion in the foreground until it ends; returns its exit status."""
    note = state / "serving.json"
    if left := _left_behind(note):
        _stop(left["pid"])
    port = free_port(port, "the play page")
    environment = {"GENIE_CACHE_DIR": str(state / "cache"), **os.environ}
    # A session of its own: Ctrl-C reaches this process, which then ends it in good order.
    process = subprocess.Popen(
        [sys.executable, *play_command(port, tracking_uri)], env=environment, start_new_session=True
    )
    try:
        _write_note(note, process.pid, port)
        return process.wait()
    finally:
        _stop(process.pid)
        note.unlink(missing_ok=True)


def play_command(port: int, tracking_uri: str) -> list[str]:
    """Python's arguments. --wait: after a refused first model the page opens all the same, for a promotion by hand."""
    return ["-m", "serving", "--host", _HOST, "--port", str(port), "--tracking-uri", tracking_uri, "--wait"]


def free_port(wanted: int, what: str) -> int:
    """`wanted`, or the next free port, which it then says. Raises ValueError when twenty are taken."""
    for port in range(wanted, min(wanted + 20, 65_536)):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((_HOST, port))
            except OSError as error:
                if error.errno == errno.EADDRINUSE:
                    continue
                raise ValueError(f"port {port} cannot be used for {what}: {error.strerror}") from None
            if port != wanted:
                say(f"port {wanted} is in use by another program: {what} takes {port}")
            return port
    raise ValueError(f"ports {wanted} to {min(wanted + 19, 65_535)} are all in use: name another one for {what}")


def _start_mlflow(folder: Path, note: Path, port: int) -> int:
    """Its process once it answers; 0 where another program was quicker to take the port."""
    log_path = folder / "server.log"
    command = [sys.executable, "-m", "mlflow", "server", "--host", _HOST, "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{folder / 'mlflow.db'}"]
    command += ["--artifacts-destination", str(folder / "artifacts")]
    # Its job runner is for LLM evaluation: eight processes and 1.2 GB that nothing here uses.
    environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    with log_path.open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)
    try:
        _write_note(note, process.pid, port)
        deadline = time.monotonic() + _START_SECONDS
        while not (_listens(process.pid, port) and _answers(port)):
            if process.poll() is not None and _answers(port):
                note.unlink()
                return 0
            if process.poll() is not None or time.monotonic() > deadline:
                how = "did not answer in time" if process.returncode is None else f"ended with {process.returncode}"
                raise ValueError(f"the MLflow server {how}; its last words are in {log_path}")
            time.sleep(0.2)
    except BaseException:
        _stop(process.pid)
        note.unlink(missing_ok=True)
        raise
    return process.pid


def _listens(pid: int, port: int) -> bool:
    """Whether it is this process that answers there, and not the server of another run that began with it."""
    try:
        family = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
        return any(c.status == psutil.CONN_LISTEN and c.laddr.port == port for p in family for c in p.net_connections())
    except psutil.NoSuchProcess:
        return False


def _url(port: int) -> str:
    return f"http://{_HOST}:{port}"


def _answers(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"{_url(port)}/health", timeout=5) as response:
            return bool(response.status == 200)
    except OSError:
        return False


def _write_note(note: Path, pid: int, port: int) -> None:
    """Remembers a process so that no other one, given the same number later, is taken for it."""
    half = note.with_suffix(".tmp")
    half.write_text(json.dumps({"pid": pid, "created": psutil.Process(pid).create_time(), "port": port}))
    half.replace(note)


def _left_behind(note: Path) -> dict[str, Any] | None:
    """The process of the note if it lives still."""
    try:
        left: dict[str, Any] = json.loads(note.read_text())
        return left if psutil.Process(left["pid"]).create_time() == left["created"] else None
    except (FileNotFoundError, json.JSONDecodeError, psutil.NoSuchProcess):
        return None


def _stop(pid: int) -> None:
    """Ends the process and its workers, which are one process group."""
    try:
        family = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
        os.killpg(pid, signal.SIGTERM)
    except (psutil.NoSuchProcess, ProcessLookupError):
        return
    for late in psutil.wait_procs(family, timeout=15)[1]:
        late.kill()
    psutil.wait_procs(family, timeout=5)
