"""The registry's pipelines, with kfp.local on a real MLflow store: promotion, the way back, the champion's check."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from genie_model.tracking import register, step

Command = Callable[..., Any]  # conftest's
GOOD = {"delta_psnr_t4": 1.0, "delta_psnr_t4_ci95": 0.3, "lam_action_usage": 1.0, "rollout_psnr_t1": 20.0}


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.delenv("MLFLOW_RUN_ID", raising=False)
    return uri


def registered(model_uri: str, data_uri: str, *versions: dict[str, float], champion: str) -> None:
    """Versions with these figures; the first one that may is promoted."""
    with step("register", "tiny", root_uri="here", ends_pipeline=True) as run:
        for number, metrics in enumerate(versions, 1):
            Path(model_uri, "note.txt").write_text(f"{run.run_id} {number}")
            assert register(model_uri, GOOD | metrics, data_uri, run) == str(number)
        run.client.set_registered_model_alias("genie", "champion", champion)


def aliases(store: str) -> dict[str, str]:
    return {alias: str(n) for alias, n in MlflowClient(store).get_registered_model("genie").aliases.items()}


def test_promotion_tried_done_and_taken_back(
    command: Command, store: str, tiny_model_uri: str, tiny_data_uri: str
) -> None:
    registered(tiny_model_uri, tiny_data_uri, {}, {"delta_psnr_t4": 2.0}, champion="1")
    root = str(Path(tiny_data_uri).parents[1])  # the levels lie there
    asked = ["run", "promotion", "--preset", "tiny", "--root", root, "--state", "state"]

    tried = command(*asked, "--version", "2", "--dry-run")
    assert tried.returncode == 0, tried.stdout + tried.stderr
    assert "genie version 2 dry run, nothing changed: promoted: better" in tried.stdout
    assert aliases(store) == {"champion": "1"}

    done = command(*asked)
    assert done.returncode == 0, done.stdout + done.stderr
    assert aliases(store) == {"champion": "2", "previous": "1"}
    names = {run.info.run_name for run in MlflowClient(store).search_runs(["1"])}
    assert any(name.startswith("promotion-tiny-") for name in names), "a pipeline's run of its own"

    back = command("run", "rollback", "--state", "state")
    assert back.returncode == 0, back.stdout + back.stderr
    assert "champion went from version 2 back to 1; previous: none" in back.stdout
    assert aliases(store) == {"champion": "1"}

    assert command(*asked).stdout.count("refused: it was rolled back on") == 1
    assert aliases(store) == {"champion": "1"}


def test_rollback_is_one_command(command: Command, store: str, tiny_model_uri: str, tiny_data_uri: str) -> None:
    registered(tiny_model_uri, tiny_data_uri, {}, {}, champion="2")
    MlflowClient(store).set_registered_model_alias("genie", "previous", "1")
    tried = command("rollback", "--dry-run")
    assert (tried.returncode, tried.stderr) == (0, "")
    assert "champion would go from version 2 back to 1" in tried.stdout
    assert aliases(store) == {"champion": "2", "previous": "1"}
    assert command("rollback", "--tracking-uri", store).returncode == 0
    assert aliases(store) == {"champion": "1"}
    again = command("rollback")
    assert again.returncode == 1
    assert again.stderr.startswith("pipelines: there is nothing to go back to")
    assert again.stderr.count("\n") == 1


def test_the_champion_s_check_fails_loudly_and_keeps_its_figures(
    command: Command, store: str, tiny_model_uri: str, tiny_data_uri: str
) -> None:
    low, high = ({"delta_psnr_t4": by, "rollout_psnr_t1": by} for by in (-99.0, 99.0))
    registered(tiny_model_uri, tiny_data_uri, low, high, champion="1")
    asked = ["run", "champion", "--preset", "tiny", "--state", "state"]
    held = command(*asked)
    assert held.returncode == 0, held.stdout + held.stderr
    assert "[verdict] done in" in held.stdout

    client = MlflowClient(store)
    client.set_registered_model_alias("genie", "champion", "2")
    failed = command(*asked, "--known-levels")
    assert failed.returncode == 1
    assert "[verdict] genie version 2 is worse than it was: delta_psnr_t4 " in failed.stdout
    assert "[check-champion] done in" in failed.stdout
    assert client.get_model_version("genie", "1").tags["check"] == "held"
    assert client.get_model_version("genie", "2").tags["check"] == "worse"
    checks = client.search_runs(["1"], "tags.check != ''")
    assert {run.data.tags["check"] for run in checks} == {"held", "worse"}, "a run for each check"
    assert all("delta_psnr_t4" in run.data.metrics for run in checks)
    pages = list(Path("state").glob("kfp/outputs/*/check-champion/pictures"))
    assert len(pages) == 2
    assert all("data:image/png;base64," in page.read_text() for page in pages)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["compile", "coinrun", "--dry-run"], "--dry-run is for what changes the registry alone, not for coinrun"),
        (["compile", "champion", "--version", "3"], "--version is for promotion"),
        (["compile", "coinrun", "--source", "videos"], "--source is for video, not for coinrun"),
        (["compile", "coinrun", "--model-name", "other"], "--model-name is for what looks into the registry"),
        (["run", "video", "--labels", "labels.json"], "video needs --source, where the videos lie"),
        (["compile", "coinrun", "--known-levels"], "--known-levels is for champion"),
        (["compile", "coinrun", "--root", "here"], "--root here is a path of this machine: name a URI"),
        (
            ["compile", "video", "--source", "gs://b/v", "--labels", "a.json"],
            "--labels a.json is a path of this machine",
        ),
        (["compile", "coinrun", "--cluster", "nowhere.toml"], "nowhere.toml is no cluster's description"),
        (["compile", "lam_inputs", "--preset", "tiny", "--variant", "pixel"], "did you mean 'pixels'"),
        (["rollback"], "there is no MLflow store at"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(
    arguments: list[str], message: str, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    done = command(*arguments)
    assert done.returncode == 1
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
