"""`python -m pipelines demo`, the command behind `make demo`, with the tiny preset and all its real processes."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
from mlflow import MlflowClient

from pipelines.servers import free_port

# Long enough to be killed in, and refused in the end: nothing reaches 1,000 dB.
SETTINGS = ("train_world.steps=300", "train_world.checkpoint_every=20", "promotion.min_delta_psnr=1000")


@contextlib.contextmanager
def demo(folder: Path, mlflow_port: int, page_port: int) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "pipelines", "demo", "--preset", "tiny", "--state", str(folder)]
    command += ["--mlflow-port", str(mlflow_port), "--port", str(page_port)]
    command += [word for setting in SETTINGS for word in ("--set", setting)]
    with (folder / "screen.txt").open("a") as screen:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=screen,
            stderr=screen,
            text=True,
            env={**os.environ, "GENIE_POLL_SECONDS": "0.2"},
        )
        try:
            yield process
        finally:
            process.terminate()  # as Ctrl-C; a shell that runs the tests behind has that ignored
            process.wait(timeout=60)


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str], screen: Path) -> None:
    deadline = time.monotonic() + 480
    while not condition():
        assert process.poll() is None, screen.read_text()
        assert time.monotonic() < deadline, screen.read_text()
        time.sleep(0.05)


def answer(url: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(url, timeout=20) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def test_killed_run_again_refused_and_promoted_by_hand(tmp_path: Path) -> None:
    mlflow_port, page_port, screen = free_port(5700, "MLflow"), free_port(8700, "the page"), tmp_path / "screen.txt"
    with demo(tmp_path, mlflow_port, page_port) as killed:
        wait_for(lambda: any(tmp_path.glob("training/genie-*/latest.json")), killed, screen)
        killed.kill()
        killed.wait()
    first = screen.read_text()
    assert "[train-tokenizer] done in" in first
    assert "[train-world] done in" not in first

    with demo(tmp_path, mlflow_port, page_port) as again:
        wait_for(lambda: "play at http" in screen.read_text(), again, screen)
        second = screen.read_text()[len(first) :]
        assert "[train-tokenizer] is finished: reused from KFP's cache" in second
        assert "(carried on from step" in second
        assert "refused: collapsed" in second
        mlflow, page = f"http://127.0.0.1:{mlflow_port}", f"http://127.0.0.1:{page_port}"
        assert f"MLflow still runs: {mlflow}" in second
        wait_for(lambda: "champion" in answer(f"{page}/readyz")[1], again, screen)
        status, reason = answer(f"{page}/readyz")
        assert status == 503
        assert mlflow in reason, "it says where a version can be promoted"
        assert answer(page)[0] == 200

        MlflowClient(mlflow).set_registered_model_alias("genie", "champion", "1")
        wait_for(lambda: answer(f"{page}/readyz")[0] == 200, again, screen)
        assert json.loads(answer(f"{page}/v1/model")[1])["version"] == "1"
        servers = psutil.Process(again.pid).children(recursive=True)
    assert servers
    assert psutil.wait_procs(servers, timeout=20)[1] == []
