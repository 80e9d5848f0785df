"""Ingestion as a command and as a pipeline's step: what the two say, and what MLflow and Kubeflow show."""

from __future__ import annotations

import functools
import json
from concurrent.futures import ThreadPoolExecutor

import pytest

pytest.importorskip("av", reason="PyAV (the video extra) is not installed")

from films import film
from kfp import dsl

from components.ingest import ingest as component
from genie_model.__main__ import main
from genie_model.data import clipping
from genie_model.data.store import VideoStore
from genie_model.tracking import connect

SHORT = ["ingest.clip_seconds=1.6", "data.frame_height=32", "data.frame_width=48", "ingest.eval_share=0.5"]


@pytest.fixture
def videos(tmp_path, monkeypatch):
    monkeypatch.setenv("GENIE_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(clipping, "_pool", ThreadPoolExecutor)
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "videos"
    folder.mkdir()
    for number in range(4):
        film(folder / f"{number}.mp4", frames=40, fps=10, size=(32, 48), first=100 * number)
    (folder / "empty.mp4").write_bytes(b"")
    return folder


def test_the_command(videos, tmp_path, capsys):
    settings = [word for assignment in SHORT for word in ("--set", assignment)]
    assert main(["ingest", "tiny", "--source", str(videos), "--root", str(tmp_path), *settings]) == 0
    data_uri = capsys.readouterr().out.splitlines()[-1]
    assert VideoStore.open(f"{data_uri}/train").num_episodes + VideoStore.open(f"{data_uri}/eval").num_episodes == 8
    assert main(["ingest", "tiny", "--source", str(videos / "nothing"), "--root", str(tmp_path)]) == 2
    assert "there is no folder or manifest" in capsys.readouterr().err


def test_the_step(videos, tmp_path, capsys):
    server = f"sqlite:///{tmp_path}/mlflow.db"
    card, metrics = dsl.HTML(uri=str(tmp_path / "card")), dsl.Metrics(uri=str(tmp_path / "metrics"))
    step = functools.partial(
        component.python_func, source_uri=str(videos), preset="tiny", overrides=SHORT, root_uri=str(tmp_path),
        tracking_uri=server, experiment="videos", card=card, metrics=metrics, study={"pipeline": "video"},
    )  # fmt: skip
    with pytest.raises(SystemExit):
        step(prompts_uri=str(videos))
    assert "prompts need at least 2" in capsys.readouterr().err
    assert not (tmp_path / "datasets").exists(), "pictures for the last steps are looked at first"
    data_uri, digest = step()
    assert "Data set card" in (tmp_path / "card").read_text()
    assert metrics.metadata == {"videos": 5, "clips": 8, "hours": pytest.approx(8 * 1.6 / 3600), "empty": 1}
    assert json.loads((tmp_path / "metrics").read_text()) == metrics.metadata
    assert len(digest) == 64
    client = connect(server)
    (experiment,) = client.search_experiments(filter_string="name = 'videos'")
    (run,) = client.search_runs([experiment.experiment_id], "attributes.run_name = 'ingest'")
    assert {each.dataset.digest for each in run.inputs.dataset_inputs} == {
        VideoStore.open(f"{data_uri}/{split}").digest[:36] for split in ("train", "eval")
    }
    assert run.data.metrics["rejected_empty"] == 1
    artifacts = {artifact.path for artifact in client.list_artifacts(run.info.run_id)}
    assert {"card.md", "card.html", "report.json", "pictures"} <= artifacts
