"""From video files and labels to a champion, at its smallest, with kfp.local and a real MLflow store."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from renew_golden import compiled

from examples.make_videos import Recording, Scene, label, make
from genie_model.data.ingest import ingest
from genie_model.data.store import VideoStore
from genie_model.presets import get_preset

STEPS = {"ingest", "train-curator", "score", "curate", "train-tokenizer", "train-world", "evaluate", "play-prompts"}
SET = [
    "ingest.clip_seconds=2",
    "ingest.eval_share=0.4",
    "ingest.workers=1",
    "curation.width=8",
    "curation.steps=12",
    "curation.batch_size=4",
    "curation.frames=1",
    "curation.lr=0.01",
    "prompts.hold_longer=4",
    # A tiny model has learnt nothing; here it may be promoted all the same.
    "promotion.min_delta_psnr=-100",
    "promotion.min_action_usage=0",
]


def test_from_files_to_champion(command: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GENIE_CACHE_DIR", str(tmp_path / "cache"))
    videos, root = tmp_path / "videos", str(tmp_path / "state")
    videos.mkdir()
    recordings = [
        Recording(f"{kind} {n}.mp4", "", "", "", "", (Scene(kind, "coinrun", 4),), seed=n, fps=10)
        for n in range(6)
        for kind in ("game", "menu")
    ]
    for recording in recordings:
        make(recording, str(videos))
    (videos / "made.json").write_text(json.dumps({r.name: [vars(s) for s in r.scenes] for r in recordings}))
    (videos / "a text.mp4").write_text("no video")
    data_uri = ingest(get_preset("tiny").with_overrides(*SET), str(videos), root)
    label(videos, data_uri, str(tmp_path / "labels.json"), count=100, seed=0)

    asked = ["run", "video", "--preset", "tiny", "--state", "state"]
    asked += ["--source", str(videos), "--labels", str(tmp_path / "labels.json")]
    asked += ["--tracking-uri", f"sqlite:///{tmp_path}/mlflow.db", *(w for s in SET for w in ("--set", s))]
    done = command(*asked)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "24 clips of 14 videos" in done.stdout

    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    champion = client.get_model_version_by_alias("genie-video", "champion")
    parent = client.get_run(champion.run_id)
    assert parent.data.tags["mlflow.source.name"] == "pipelines/video.py"
    assert {"delta_psnr_t4", "curator_precision"} <= set(parent.data.metrics)
    assert not [name for name in parent.data.metrics if name.startswith(("direction", "displacement"))]
    (experiment,) = (e for e in client.search_experiments() if e.name == "genie")
    runs = client.search_runs([experiment.experiment_id], f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'")
    assert {run.info.run_name for run in runs} == STEPS | {"register", "promote"}
    (entered,) = (run for run in runs if run.info.run_name == "play-prompts")
    assert {"direction_explained", "held_out/direction_explained"} <= set(entered.data.metrics)
    (world,) = (run for run in runs if run.info.run_name == "train-world")
    (curated,) = (Path(root) / "datasets").glob("curated-*")
    assert world.data.tags["dataset.train.digest"] == VideoStore.open(f"{curated}/train").digest


def test_what_looks_at_videos_and_labels_is_never_cached_and_the_rest_goes_by_content() -> None:
    spec = compiled("video")[0]
    tasks = spec["root"]["dag"]["tasks"]
    branches = [name for name in tasks if name.startswith("condition-branches")]
    assert len(branches) == 1
    cached = {name for name, task in tasks.items() if task.get("cachingOptions", {}).get("enableCache")}
    assert cached - set(branches) == {"train-tokenizer", "train-world", "evaluate"}
    for name in ("train-tokenizer", "train-world", "evaluate"):
        digest = tasks[name]["inputs"]["parameters"]["data_digest"]["taskOutputParameter"]
        assert digest["producerTask"] == branches[0], "of what was kept"
