from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipelines.catalog import own_preset

Command = Callable[..., Any]  # conftest's
ROOT = Path(__file__).parents[2]


def pipelines(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pipelines", *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, stdin=subprocess.DEVNULL)


def test_compile_writes_the_pipeline_with_its_form(command: Command, tmp_path: Path) -> None:
    done = command("compile", "coinrun", "--preset", "demo", "--set", "seed=7", "--root", "gs://b/genie")
    assert (done.returncode, done.stderr) == (0, "")
    pipeline, _ = yaml.safe_load_all((tmp_path / "build" / "coinrun.yaml").read_text())
    form = pipeline["root"]["inputDefinitions"]["parameters"]
    assert {name: field.get("defaultValue") for name, field in form.items()} == {
        "root_uri": "gs://b/genie",
        "preset": "demo",
        "overrides": ["seed=7"],
        "tracking_uri": "",
        "experiment": "genie",
    }
    assert all(field["description"] for field in form.values())
    tasks = pipeline["root"]["dag"]["tasks"]
    assert {name for name, task in tasks.items() if "retryPolicy" in task} == {"train-tokenizer", "train-world"}
    assert set(tasks) == {
        "collect",
        "train-tokenizer",
        "train-world",
        "evaluate",
        "register",
        "promote",
    }


def test_compiling_needs_no_torch() -> None:
    program = "import sys, pipelines.coinrun; assert not {'torch', 'mlflow', 'procgen'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--preset", "demmo"], "did you mean 'demo'"),
        (["--preset", "tiny", "--set", "train_world.step=1"], "did you mean 'train_world.steps'"),
        (["--preset", "tiny", "--set", "train_world.steps=0"], "train_world.steps"),
    ],
)
@pytest.mark.parametrize("what", ["compile", "run"])
def test_a_wrong_name_ends_before_anything_starts(
    what: str, arguments: list[str], message: str, command: Command, tmp_path: Path
) -> None:
    done = command(what, "coinrun", *arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_submit_says_at_once_that_no_host_answers(command: Command) -> None:
    began = time.monotonic()
    host = ["--host", "http://127.0.0.1:9"]
    done = command("submit", "coinrun", "--preset", "tiny", "--root", "gs://b/genie", *host)
    assert done.returncode == 1
    assert "no Kubeflow host answers at http://127.0.0.1:9" in done.stderr
    assert done.stderr.count("\n") == 1
    assert time.monotonic() - began < 20


def test_run_says_that_no_tracking_server_answers(tmp_path: Path) -> None:
    done = pipelines("run", "coinrun", "--preset", "tiny", "--tracking-uri", "http://127.0.0.1:9", cwd=tmp_path)
    assert done.returncode == 1
    assert "[collect] error: no MLflow server answers at http://127.0.0.1:9" in done.stdout
    assert done.stderr.startswith("pipelines: step 'collect' failed")
    assert "Traceback" not in done.stdout + done.stderr


def test_a_pipeline_takes_its_own_preset_where_none_is_named(command: Command, tmp_path: Path) -> None:
    done = command("compile", "video")
    assert (done.returncode, done.stderr) == (0, "")
    form = next(yaml.safe_load_all((tmp_path / "build" / "video.yaml").read_text()))["root"]["inputDefinitions"][
        "parameters"
    ]
    assert form["preset"]["defaultValue"] == own_preset("video") == "platformers_404m"
    assert own_preset("coinrun") == own_preset("rollback") == "coinrun"
