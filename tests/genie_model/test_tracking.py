"""Runs and registry on a real MLflow store (SQLite)."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import mlflow
import numpy as np
import pytest
import torch
from mlflow import MlflowClient
from mlflow.entities import Run

from genie_model.checkpoint import load_model, save_model
from genie_model.genie import Genie
from genie_model.preemption import Preempted
from genie_model.presets import get_preset
from genie_model.progress import RUNNER_VARIABLE
from genie_model.tracking import StepRun, champion, decide, numbered, promote, register, step, versions

GOOD = {"delta_psnr_t4": 1.0, "delta_psnr_t4_ci95": 0.3, "lam_action_usage": 1.0, "rollout_psnr_t1": 20.0}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("mlflow")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder}/mlflow.db")
        patch.setenv("GENIE_CACHE_DIR", str(folder / "cache"))
        patch.delenv("MLFLOW_RUN_ID", raising=False)
        yield folder


@pytest.fixture(scope="module")
def model_uri(store: Path) -> str:
    torch.manual_seed(0)
    save_model(str(store / "model"), Genie(get_preset("tiny")))
    return str(store / "model")


def children(client: MlflowClient, parent_id: str) -> dict[str, Run]:
    experiment = client.get_run(parent_id).info.experiment_id
    runs = client.search_runs([experiment], f"tags.`mlflow.parentRunId` = '{parent_id}'")
    return {run.info.run_name: run for run in runs}


def test_a_pipeline_is_one_run_and_its_steps_nest_below_it(store: Path) -> None:
    with step("first", "tiny", ["seed=1"], root_uri="here") as first:
        first.metrics({"loss": 2.0}, step=0)
        first.metrics({"loss": 1.0}, step=1)
        first.image("grid", np.zeros((4, 6, 3), np.uint8))
    with step("second", "tiny", ["seed=1"], root_uri="here", ends_pipeline=True) as second:
        pass
    client = first.client
    assert first.parent_id == second.parent_id
    assert set(children(client, first.parent_id)) == {"first", "second"}
    run = client.get_run(first.run_id)
    assert run.data.params["train_world.steps"] == "8"
    assert run.data.tags["version.torch"] == torch.__version__
    assert [metric.value for metric in client.get_metric_history(first.run_id, "loss")] == [2.0, 1.0]
    assert [file.path for file in client.list_artifacts(first.run_id, "pictures")] == ["pictures/grid.png"]
    assert client.get_run(first.parent_id).info.status == "FINISHED"
    with step("first", "tiny", ["seed=1"], root_uri="here") as again:
        pass
    assert again.parent_id != first.parent_id, "a finished pipeline run again is a new run"


def test_what_is_logged_while_another_thread_sends_is_not_lost(store: Path) -> None:
    with step("both", "tiny", root_uri="threads") as run, ThreadPoolExecutor(1) as pool:

        def log() -> None:
            for number in range(200):
                run.metrics({"loss": 1.0}, number)
                time.sleep(0.001)

        logging = pool.submit(log)
        while not logging.done():
            run.flush()
    assert len(run.client.get_metric_history(run.run_id, "loss")) == 200


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, "the runner's death"])
def test_a_killed_step_carries_on_its_run(store: Path, how: signal.Signals | str) -> None:
    arguments = f"'train', 'tiny', ['seed=2'], root_uri={str(how)!r}"
    program = (
        "import time; from genie_model.tracking import step\n"
        f"with step({arguments}) as run:\n"
        "    run.metrics({'loss': 3.0}, step=0); run.flush(); print(run.run_id, flush=True); time.sleep(60)"
    )
    runner = subprocess.Popen(["sleep", "60"])
    environment = {**os.environ, RUNNER_VARIABLE: str(runner.pid)}
    killed = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, env=environment)
    assert killed.stdout is not None
    run_id = killed.stdout.readline().strip()
    if isinstance(how, signal.Signals):
        killed.send_signal(how)
    runner.kill()
    runner.wait()
    assert killed.wait(timeout=30) == (-signal.SIGKILL if how == signal.SIGKILL else 130)

    with step("train", "tiny", ["seed=2"], root_uri=str(how)) as run:
        assert run.client.get_run(run.run_id).info.status == "RUNNING"
        run.metrics({"loss": 2.0}, step=1)
    assert run.run_id == run_id
    assert [metric.value for metric in run.client.get_metric_history(run_id, "loss")] == [3.0, 2.0]


def test_training_that_saved_itself_is_killed_and_exits_for_another_try(store: Path) -> None:
    with pytest.raises(SystemExit) as ended, step("train", "tiny", ["seed=2"], root_uri="spot") as run:
        raise Preempted
    assert ended.value.code == 143
    assert run.client.get_run(run.run_id).info.status == "KILLED"


def test_a_user_s_error_is_one_line(store: Path, capfd: pytest.CaptureFixture[str]) -> None:
    seen: list[StepRun] = []

    def collect() -> None:
        with step("collect", "tiny", ["seed=3"], root_uri="here") as run:
            seen.append(run)
            raise ValueError("no data set at here:\nrun collect")

    with pytest.raises(SystemExit) as ended:
        collect()
    assert ended.value.code == 2
    assert capfd.readouterr().err == "[collect] error: no data set at here: run collect\n"
    client = seen[0].client
    assert client.get_run(seen[0].run_id).info.status == "FAILED"
    assert "Traceback" in Path(client.download_artifacts(seen[0].run_id, "error.txt")).read_text()


def test_kubeflow_s_run_is_adopted(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with step("outer", "tiny", ["seed=4"], root_uri="here") as outer:
        given = outer.client.create_run("1", tags={"mlflow.parentRunId": outer.run_id}).info.run_id
        monkeypatch.setenv("MLFLOW_RUN_ID", given)
        with step("inner", "tiny", ["seed=4"], root_uri="here") as inner:
            assert (inner.run_id, inner.parent_id) == (given, outer.run_id)


def test_metrics_wait_for_each_other(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A request to MLflow takes as long as a training step may: it must not be one for each step."""
    with step("fast", "tiny", ["seed=5"], root_uri="here") as run:
        send, requests = run.client.log_batch, list[int]()
        monkeypatch.setattr(run.client, "log_batch", lambda *a, **k: (requests.append(1), send(*a, **k)))
        for i in range(1000):
            run.metrics({"loss": 1.0, "psnr": 2.0}, step=i)
    assert len(run.client.get_metric_history(run.run_id, "psnr")) == 1000
    assert 2 <= len(requests) <= 10


@pytest.mark.parametrize(
    ("candidate", "reigning", "promoted", "why"),
    [
        (GOOD, None, True, "first champion"),
        ({**GOOD, "delta_psnr_t4": 0.0}, None, False, "not above 0"),
        ({**GOOD, "lam_action_usage": 0.25}, None, False, "25% of its latent actions"),
        ({**GOOD, "delta_psnr_t4": float("nan")}, None, False, "not a number"),
        ({}, None, False, "delta_psnr_t4, lam_action_usage, rollout_psnr_t1 missing"),
        ({**GOOD, "delta_psnr_t4": 1.5}, GOOD, True, "better"),
        ({**GOOD, "delta_psnr_t4": 0.5}, GOOD, False, "worse"),
        ({**GOOD, "delta_psnr_t4": 0.7, "rollout_psnr_t1": 21.0}, GOOD, True, "draws as well or better"),
        ({**GOOD, "delta_psnr_t4": 1.3, "rollout_psnr_t1": 19.0}, GOOD, False, "draws worse"),
        (GOOD, {"delta_psnr_t8": 1.0}, False, "nothing to compare"),
    ],
)
def test_the_promotion_rule(
    candidate: dict[str, float], reigning: dict[str, float] | None, promoted: bool, why: str
) -> None:
    decision, reason = decide(candidate, reigning, get_preset("tiny"))
    assert decision is promoted
    assert why in reason
    assert "\n" not in reason


def test_registry_and_alias(store: Path, model_uri: str, tiny_data_uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="has the alias 'champion': run the pipeline"):
        champion()
    with step("register", "tiny", root_uri="here") as run:
        client = run.client
        first = register(model_uri, GOOD, tiny_data_uri, run)
        assert register(model_uri, GOOD, tiny_data_uri, run) == first, "the same files are the same version"
        assert promote(first, tiny_data_uri, run).promoted
        Path(model_uri, "note.txt").write_text("another model")
        second = register(model_uri, {**GOOD, "delta_psnr_t4": -0.5}, tiny_data_uri, run)
        refused = promote(second, tiny_data_uri, run)
    assert (first, second) == ("1", "2")
    assert not refused.promoted
    assert client.get_model_version("genie", second).tags["reason"] == refused.reason
    served = champion()
    assert (served.version, served.run_id) == (first, run.parent_id)
    assert Path(served.folder, "model.safetensors").read_bytes() == Path(model_uri, "model.safetensors").read_bytes()
    assert champion() == served
    assert numbered(served.version) == served
    with pytest.raises(ValueError, match="no version 77"):
        numbered("77")
    listed = versions()
    assert [int(one["version"]) for one in listed] == sorted((int(one["version"]) for one in listed), reverse=True)
    mine = next(one for one in listed if one["version"] == served.version)
    assert mine["aliases"] == ["champion"]
    assert mine["run_id"] == served.run_id
    assert mine["metrics"]["delta_psnr_t4"] == GOOD["delta_psnr_t4"]

    client.set_registered_model_alias("genie", "champion", second)  # by hand, as in MLflow's UI
    server = os.environ["MLFLOW_TRACKING_URI"]
    with pytest.MonkeyPatch.context() as elsewhere:
        elsewhere.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{store}/another.db")
        mlflow.set_tracking_uri(None)
        assert champion(tracking_uri=server).version == second

    monkeypatch.setenv("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "false")
    loaded = mlflow.pyfunc.load_model("models:/genie@champion")
    prompt = np.full((1, 64, 64, 3), 128, np.uint8)
    dreamt = loaded.predict({"frames": prompt, "actions": np.array([0, 3])}, params={"seed": 7})
    assert dreamt.shape == (2, 64, 64, 3)
    assert dreamt.dtype == np.uint8
    with pytest.raises(ValueError, match=r"numbers in 0\.\.3"):
        loaded.predict({"frames": prompt, "actions": np.array([4])})


def test_a_champion_that_was_measured_otherwise_is_measured_again(
    store: Path, model_uri: str, tiny_data_uri: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its figures say 99 dB on other levels; what counts is what it reaches where the candidate was measured."""
    with step("register", "tiny", root_uri="here") as run:
        first = register(model_uri, {**GOOD, "delta_psnr_t4": 99.0}, tiny_data_uri, run, name="again")
        assert promote(first, tiny_data_uri, run, name="again").promoted
    Path(model_uri, "note.txt").write_text("a third model")
    with step("register", "tiny", ["evaluation.clips=3"], root_uri="here") as run:
        second = register(model_uri, {**GOOD, "delta_psnr_t4": 50.0}, tiny_data_uri, run, name="again")
        decision = promote(second, tiny_data_uri, run, name="again")
        assert decision.promoted, decision.reason
        assert "version 1 was measured otherwise" in capsys.readouterr().out
        Path(model_uri, "note.txt").write_text("a fourth model")
        third = register(model_uri, {**GOOD, "delta_psnr_t4": 49.0}, tiny_data_uri, run, name="again")
        assert not promote(third, tiny_data_uri, run, name="again").promoted
        assert "measured otherwise" not in capsys.readouterr().out, "the same levels were asked in the same way"
    Path(model_uri, "note.txt").write_text("a fifth model")
    with step("register", "tiny", ["data.frame_height=32"], root_uri="here") as run:
        fourth = register(model_uri, GOOD, tiny_data_uri, run, name="again")
        run.client.set_model_version_tag("again", fourth, "measured_on", "elsewhere")
        refused = promote(fourth, tiny_data_uri, run, name="again")
    assert not refused.promoted
    assert "version 2 draws 64 x 64 pixels, the config says 64 x 32); move the alias by hand" in refused.reason


def test_a_champion_that_this_code_cannot_load_stays_and_the_reason_says_so(
    store: Path, model_uri: str, tiny_data_uri: str
) -> None:
    with step("register", "tiny", root_uri="here") as run:
        Path(model_uri, "note.txt").write_text("an old model")
        first = register(model_uri, GOOD, tiny_data_uri, run, name="old")
        assert promote(first, tiny_data_uri, run, name="old").promoted
        run.client.set_model_version_tag("old", first, "measured_on", "by old code")
        config = Path(champion("old").folder, "config.json")
        config.write_text(config.read_text().replace("frame_height", "frame_size"))
        Path(model_uri, "note.txt").write_text("a new model")
        refused = promote(register(model_uri, GOOD, tiny_data_uri, run, name="old"), tiny_data_uri, run, name="old")
    assert not refused.promoted
    assert "is not one that this code makes" in refused.reason
    assert "move the alias by hand" in refused.reason


def test_a_version_samples_as_its_run_s_config_says(store: Path, model_uri: str, tiny_data_uri: str) -> None:
    with step("register", "tiny", ["sampling.temperature=0.25"], root_uri="here") as run:
        version = register(model_uri, GOOD, tiny_data_uri, run, name="sampled")
        assert register(model_uri, GOOD, tiny_data_uri, run, name="sampled") == version
        run.client.set_registered_model_alias("sampled", "champion", version)
    trained, registered = load_model(model_uri).config, load_model(champion("sampled").folder).config
    assert registered == trained.with_overrides("sampling.temperature=0.25") != trained


def test_no_server_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(ValueError, match="no MLflow server named"):
        champion()
    with pytest.raises(ValueError, match=r"no MLflow server answers at http://127\.0\.0\.1:9"):
        champion(tracking_uri="http://127.0.0.1:9")
