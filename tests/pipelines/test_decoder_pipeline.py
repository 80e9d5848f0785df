"""A larger decoder joins a world's version, with kfp.local on a real MLflow store."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from genie_model.checkpoint import load_model, load_training
from genie_model.data.coinrun import collect
from genie_model.large_decoder import load_large_decoder
from genie_model.presets import get_preset
from genie_model.tracking import numbered, versions


def test_it_is_trained_and_registered_with_its_world(
    tiny_model_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: Callable[..., Any]
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.setenv("GENIE_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("MLFLOW_RUN_ID", raising=False)
    larger = get_preset("tiny").with_overrides("data.frame_height=128", "data.frame_width=128")
    data_uri = collect(larger, str(tmp_path))
    asked = ["--preset", "tiny", "--state", "state", "--data", data_uri]

    refused = command("run", "decoder", *asked)
    assert refused.returncode == 1
    assert "decoder needs --data, a data set of larger frames, and --model" in refused.stderr

    done = command("run", "decoder", *asked, "--model", tiny_model_uri)
    assert done.returncode == 0, done.stdout + done.stderr
    version = numbered("1")
    genie = load_model(version.folder)
    assert load_large_decoder(f"{version.folder}/large_decoder", genie).grid.height == 128

    (listed,) = versions()
    trained = load_training(f"{version.folder}/large_decoder")
    assert listed["metrics"]["large_psnr_gain"] == pytest.approx(trained["large_psnr_gain"])
    client = MlflowClient()
    assert "measured_on" not in client.get_model_version("genie", "1").tags, "promotion measures it first"
    run = client.get_run(version.run_id)
    assert run.info.run_name.startswith("decoder-tiny-")
    assert run.info.status == "FINISHED"
    assert "large_psnr" in run.data.metrics
    (step,) = client.search_runs(["1"], "tags.`mlflow.runName` = 'train-decoder'")
    assert client.list_artifacts(step.info.run_id, "pictures")[0].path == "pictures/large_frames.png"
