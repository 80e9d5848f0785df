"""Worlds of ordinary video: measured, registered and promoted with what can be known of it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from curation_help import CONFIG as SMALL
from curation_help import write_videos

from genie_model.checkpoint import save_model
from genie_model.data.held_out import HeldOut
from genie_model.evaluate import evaluate, measured_on
from genie_model.files import names
from genie_model.genie import Genie
from genie_model.presets import get_preset
from genie_model.tracking import check_champion, promote, register, step

TINY = get_preset("tiny")
LENIENT = ["promotion.min_delta_psnr=-100", "promotion.min_action_usage=0"]
CONFIG = SMALL.with_overrides(*LENIENT)


@pytest.fixture(scope="module")
def data_uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_videos(str(tmp_path_factory.mktemp("video")), range(4), clips=2)


def test_held_out_clips_are_spread_over_their_sources(data_uri: str) -> None:
    every = HeldOut.open(f"{data_uri}/eval", most=100)
    assert not every.has_truth
    assert len(every.episodes) == 8
    assert [number for number in np.unique([e.level for e in every.episodes], return_counts=True)[1]] == [2, 2, 2, 2]
    some = HeldOut.open(f"{data_uri}/eval", most=5)
    assert len(some.episodes) == 5
    assert len({episode.level for episode in some.episodes}) == 4, "of each source one before any has two"
    again = HeldOut.open(f"{data_uri}/eval", most=5)
    assert all((a.frames_THWC == b.frames_THWC).all() for a, b in zip(some.episodes, again.episodes, strict=True))
    _, levels_B = every.clips(8, 4, seed=0)
    assert len(set(levels_B)) == 4


def test_what_is_opted_out_is_not_measured_and_measures_anew(tmp_path: Path) -> None:
    uri = write_videos(str(tmp_path), range(4), clips=2)
    before, gone = measured_on(CONFIG, uri), HeldOut.open(f"{uri}/eval", most=100)
    Path(uri, "opt_out.txt").write_text("video-2.mp4\n")
    held_out = HeldOut.open(f"{uri}/eval", most=100)
    assert len(held_out.episodes) == 6
    assert {e.level for e in held_out.episodes} < {e.level for e in gone.episodes}
    assert measured_on(CONFIG, uri) != before


def test_a_world_of_video_is_measured_registered_promoted_and_checked(
    data_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.setenv("GENIE_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("MLFLOW_RUN_ID", raising=False)
    torch.manual_seed(0)
    save_model("model", Genie(CONFIG))
    changes = [f"{name}={value}" for name, value in CONFIG.flat().items() if TINY.flat()[name] != value]
    with step("evaluate", "tiny", changes, root_uri="here") as run:
        found = evaluate(CONFIG, "model", data_uri, run)
        assert found.confusion is None
        assert not [name for name in found.metrics if name.startswith(("direction", "action_", "displacement"))]
        assert all(np.isfinite(value) for value in found.metrics.values())
        assert len(names("model/start_frames")) == CONFIG.evaluation.clips // 2, "those that it draws best"
        version = register("model", found.metrics, data_uri, run, "genie-video")
        decided = promote(version, data_uri, run, "genie-video")
        assert decided.promoted
        assert "first champion" in decided.reason
        assert check_champion(data_uri, run, "genie-video").held
