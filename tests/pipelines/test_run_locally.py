"""The whole way at its smallest, with kfp.local and a real MLflow store."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mlflow import MlflowClient

STEPS = {"collect", "train-tokenizer", "train-world", "evaluate", "register", "promote"}


def test_from_video_to_champion_and_again_from_the_cache(command: Callable[..., Any], tmp_path: Path) -> None:
    # A tiny model has learnt nothing; here it may be promoted all the same.
    lenient = ["--set", "promotion.min_delta_psnr=-100", "--set", "promotion.min_action_usage=0"]
    asked = ["run", "coinrun", "--preset", "tiny", *lenient, "--state", "state"]
    asked += ["--tracking-uri", f"sqlite:///{tmp_path}/mlflow.db"]
    done = command(*asked)
    screen = done.stdout
    assert done.returncode == 0, screen + done.stderr
    assert all(f"[{step}] done in" in screen for step in STEPS)
    assert "KFP Executor" not in screen
    assert "executorInput" not in screen
    assert '"outputs"' not in screen

    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    experiment = client.get_experiment_by_name("genie")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    (parent,) = (run for run in runs if "mlflow.parentRunId" not in run.data.tags)
    steps = {run.info.run_name: run for run in runs if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id}
    assert set(steps) == STEPS
    assert {run.info.status for run in runs} == {"FINISHED"}
    assert len(client.get_metric_history(steps["train-world"].info.run_id, "loss")) >= 4
    assert len(steps["evaluate"].data.tags["dataset.eval.digest"]) >= 32
    assert steps["collect"].data.tags["dataset.train.digest"] == steps["train-world"].data.tags["dataset.train.digest"]
    assert client.list_artifacts(steps["evaluate"].info.run_id, "pictures")
    assert "delta_psnr_t4" in parent.data.metrics

    champion = client.get_model_version_by_alias("genie", "champion")
    assert champion.run_id == parent.info.run_id
    (page,) = tmp_path.glob("state/kfp/outputs/*/evaluate/pictures")
    assert page.read_text().count("data:image/png;base64,") >= 2
    (confusion,) = tmp_path.glob("state/kfp/outputs/*/evaluate/confusion")
    matrix = json.loads(confusion.read_text())["confusionMatrix"]
    assert [each["displayName"] for each in matrix["annotationSpecs"]] == ["left", "none", "right"]
    assert sum(sum(row["row"]) for row in matrix["rows"]) == 4 * 3 * 7, "each held-out transition of whole clips once"
    pictures = {file.path for file in client.list_artifacts(steps["evaluate"].info.run_id, "pictures")}
    assert "pictures/true_direction_beside_told.png" in pictures

    again = command(*asked).stdout
    assert all(f"[{step}] is finished: reused from KFP's cache" in again for step in STEPS)
    assert len(client.search_runs([experiment.experiment_id])) == len(runs)
