"""A training step as a pod runs it: the command of the compiled pipeline, taken away by SIGTERM and tried again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
from renew_golden import compiled

STEPS = 150


def pod(folder: Path, data_uri: str) -> subprocess.Popen[str]:
    """The step's process, with what KFP's driver would hand it; its output goes to folder/screen.txt."""
    container = compiled("coinrun")[0]["deploymentSpec"]["executors"]["exec-train-tokenizer"]["container"]
    where = {"root_uri": str(folder), "tracking_uri": f"sqlite:///{folder}/mlflow.db", "experiment": "genie"}
    steps = [f"train_tokenizer.steps={STEPS}", "train_tokenizer.checkpoint_every=5"]
    told = {
        "inputs": {
            "parameterValues": {"preset": "tiny", "overrides": steps, **where, "data_uri": data_uri, "machine": []}
        },
        "outputs": {
            "parameters": {"Output": {"outputFile": str(folder / "Output")}},
            "outputFile": str(folder / "output.json"),
        },
    }
    arguments = [json.dumps(told) if word == "{{$}}" else word for word in container["args"]]
    with (folder / "screen.txt").open("a") as screen:
        return subprocess.Popen(
            [*container["command"], *arguments],
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=screen,
            stderr=screen,
            text=True,
            env={**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "HOME": str(folder)},
        )


def test_a_step_that_is_taken_away_exits_143_and_its_retry_carries_on(tmp_path: Path, tiny_data_uri: str) -> None:
    screen = tmp_path / "screen.txt"
    first = pod(tmp_path, tiny_data_uri)
    try:
        deadline = time.monotonic() + 120
        while not any(tmp_path.glob("training/*/latest.json")):
            assert first.poll() is None, screen.read_text()
            assert time.monotonic() < deadline, screen.read_text()
            time.sleep(0.02)
        for process in [*psutil.Process(first.pid).children(recursive=True), psutil.Process(first.pid)]:
            if "executor_main" in " ".join(process.cmdline()) and process.name().startswith("python"):
                process.send_signal(signal.SIGTERM)
        assert first.wait(timeout=60) == 143, screen.read_text()
    finally:
        first.kill()
    assert not (tmp_path / "output.json").exists(), "it has made nothing yet"
    said = screen.read_text()

    again = pod(tmp_path, tiny_data_uri)
    assert again.wait(timeout=120) == 0, screen.read_text()
    assert "(carried on from step " in screen.read_text()[len(said) :]
    uri = json.loads((tmp_path / "output.json").read_text())["parameterValues"]["Output"]
    assert Path(uri, "model.safetensors").exists()
