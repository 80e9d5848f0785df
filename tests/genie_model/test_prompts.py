"""Worlds entered from pictures: figures of worlds whose consistency is known, and a real Genie on real files."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from kfp import dsl
from mlflow import MlflowClient
from PIL import Image

from components.play_prompts import play_prompts as component
from genie_model.__main__ import main
from genie_model.presets import get_preset
from genie_model.prompt_samples import samples
from genie_model.prompts import Prompts, _agreement, consistency, measure, play_prompts
from genie_model.stills import frame_of

CONFIG = get_preset("tiny").with_overrides("prompts.hold=2", "prompts.hold_longer=3", "prompts.shown=2")
MOVES = torch.tensor([[0, -2], [0, 2], [2, 0], [-2, 0]])  # (down, right) of each action


class World:
    """A Genie's API over pictures that scroll: as the action says, or each its own way."""

    config = CONFIG

    def __init__(self, heeds: bool) -> None:
        self.heeds = heeds

    def reconstruct(self, frames: torch.Tensor) -> torch.Tensor:
        return frames

    def start(self, frames: torch.Tensor, seed: range) -> dict[str, torch.Tensor]:
        return {"frame": frames[:, -1]}

    def step(self, state: dict[str, torch.Tensor], action_B: torch.Tensor) -> torch.Tensor:
        own_B = state["frame"].sum((1, 2, 3)) % 4  # as it scrolls, a picture's sum stays
        moves = MOVES[action_B if self.heeds else (action_B + own_B) % 4]
        rolled = [frame.roll(move.tolist(), (0, 1)) for frame, move in zip(state["frame"], moves, strict=True)]
        state["frame"] = torch.stack(rolled)
        return state["frame"]


@pytest.fixture(scope="module")
def prompts() -> Prompts:
    """Blocks of noise, of four kinds by the sum of their pixels."""
    small = np.random.default_rng(0).integers(0, 256, (8, 16, 16, 3), dtype=np.uint8)
    frames = small.repeat(4, axis=1).repeat(4, axis=2)
    for kind, frame in enumerate(frames):
        frame[0, 0, 0] = (kind - int(frame.sum()) + int(frame[0, 0, 0])) % 4  # each kind twice
    return Prompts([f"drawings/{n}" for n in range(8)], ["drawings"] * 6 + ["photos"] * 2, frames)


def test_a_world_whose_actions_do_the_same_everywhere_scores_high(prompts: Prompts) -> None:
    played = measure(CONFIG, World(heeds=True), prompts)  # type: ignore[arg-type]
    found = played.metrics
    assert found["motion_explained"] > 0.98
    assert found["direction_explained"] > 0.98
    assert found["direction_agreement"] > 0.98
    assert found["direction_of_others"] == pytest.approx(-1 / 3, abs=0.02)  # one of the three others is opposite
    assert found["moved"] == 1
    assert found["motion_pixels"] == pytest.approx(4, abs=0.2)
    assert found["drawings/motion_explained"] > 0.98
    assert found["photos/direction_agreement"] > 0.98
    assert set(played.pictures) == {"motion_of_prompts", "prompts_held_2", "prompts_held_3"}


def test_a_world_whose_actions_differ_from_prompt_to_prompt_scores_low(prompts: Prompts) -> None:
    found = measure(CONFIG, World(heeds=False), prompts).metrics  # type: ignore[arg-type]
    assert found["moved"] == 1
    assert found["motion_explained"] < 0.1
    assert found["direction_explained"] < 0.1
    assert found["direction_agreement"] < 0.3
    assert found["direction_agreement_ci95"] > 0


def test_the_grid_shows_where_each_action_leads(prompts: Prompts) -> None:
    one = Prompts(prompts.names[:2], ["", ""], prompts.frames_PHWC[:2])
    grid = measure(CONFIG, World(heeds=True), one).pictures["prompts_held_3"]  # type: ignore[arg-type]
    pitch, size = 64 * 3 + 6, 64 * 3
    last_row = grid[-pitch : -pitch + size]
    for action, move in enumerate(MOVES.tolist()):
        left = grid.shape[1] - (4 - action) * pitch
        shown = last_row[::3, left : left + size : 3]
        moved = np.roll(one.frames_PHWC[1], [3 * pixels for pixels in move], (0, 1))
        np.testing.assert_array_equal(shown, moved)


def test_agreement_is_the_mean_over_pairs_of_prompts() -> None:
    rng = np.random.default_rng(1)
    unit = rng.normal(size=(5, 3, 2))
    unit /= np.linalg.norm(unit, axis=-1, keepdims=True)
    unit[2, 1] = unit[4] = 0  # did not move
    pairs: dict[bool, list[float]] = {True: [], False: []}
    for p in range(5):
        for q in range(5):
            for a in range(3):
                for b in range(3):
                    if p != q and unit[p, a].any() and unit[q, b].any():
                        pairs[a == b].append(float(unit[p, a] @ unit[q, b]))
    assert _agreement(unit) == pytest.approx((np.mean(pairs[True]), np.mean(pairs[False])))


def test_a_prompt_that_goes_astray_does_not_outweigh_the_others() -> None:
    motion = np.stack([MOVES.numpy() * (1 + prompt / 10) for prompt in range(10)])
    motion[3] = [[90, 0], [-90, 0], [0, 90], [0, -90]]
    found = consistency(motion)
    for name, low, high in (("motion_explained", -1, 0.1), ("direction_explained", 0.7, 0.9)):
        value, ci95 = np.ravel(found[name])
        assert low < value < high
        assert ci95 > 0


def test_where_nothing_moves_nothing_agrees() -> None:
    found = consistency(np.zeros((4, 3, 2)))
    assert {float(np.ravel(value)[0]) for value in found.values()} == {0.0}


def test_a_picture_of_another_shape_is_fitted_as_asked() -> None:
    wide = np.zeros((32, 96, 3), np.uint8)
    wide[:, :32, 0] = wide[:, 32:64, 1] = wide[:, 64:, 2] = 255  # red, green, blue
    image = Image.fromarray(wide)
    crop, pad, stretch = (frame_of(image.copy(), 60, 60, aspect) for aspect in ("crop", "pad", "stretch"))
    assert np.all(crop[:, 8:-8] == (0, 255, 0))
    assert np.all(pad[:18] == 0)
    assert np.all(pad[-18:] == 0)
    assert tuple(pad[30, 5]) == (255, 0, 0)
    assert tuple(pad[30, 55]) == (0, 0, 255)
    assert tuple(stretch[2, 5]) == (255, 0, 0)
    assert tuple(stretch[58, 55]) == (0, 0, 255)


def test_the_samples_are_photos_drawings_and_generated_and_always_the_same() -> None:
    made = samples()
    assert made == samples()
    assert {name.partition("/")[0] for name in made} == {"photos", "drawings", "generated"}
    firsts = {frame_of(Image.open(io.BytesIO(png)), 32, 32).tobytes() for png in made.values()}
    assert len(firsts) == len(made)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Two pictures of the user's, and a file that is none."""
    folder = tmp_path / "images"
    (folder / "photos").mkdir(parents=True)
    for number, name in enumerate(("a.png", "photos/b.jpg")):
        noise = np.random.default_rng(number).integers(0, 256, (50, 80, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / name)
    (folder / "notes.txt").write_text("no picture")
    return folder


SHORT = ["--set", "prompts.hold=1", "--set", "prompts.hold_longer=2"]


def test_the_command_leaves_a_page_and_says_what_is_wrong(
    tiny_model_uri: str, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    where = ["prompts", "tiny", "--model", tiny_model_uri, "--out", str(tmp_path / "out"), *SHORT]
    assert main([*where, "--images", str(images)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"{tmp_path}/out/index.html"
    assert (tmp_path / "out" / "index.html").read_text().count("data:image/png;base64,") == 3
    found = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert all(np.isfinite(value) for value in found.values())
    assert {"motion_explained", "held_out/motion_explained"} <= set(found)  # the model has start frames
    assert Image.open(tmp_path / "out" / "prompts_held_2.png").width > 4 * 64 * 3

    whole = (images / "a.png").read_bytes()
    for broken in (whole[: len(whole) // 2], b"no picture"):
        (images / "a.png").write_bytes(broken)
        assert main([*where, "--images", str(images)]) == 2
        said = capsys.readouterr().err
        assert f"{images}/a.png " in said
        assert "read: repair or remove it" in said
    (images / "a.png").unlink()
    assert main([*where, "--images", str(images)]) == 2
    assert "at least 2" in capsys.readouterr().err


def test_figures_are_repeatable(tiny_model_uri: str, images: Path) -> None:
    config = get_preset("tiny").with_overrides(*SHORT[1::2])
    first, second = (play_prompts(config, tiny_model_uri, str(images)).metrics for _ in range(2))
    assert first == second


def test_the_component_shows_them_in_mlflow_and_in_kubeflow(
    tiny_model_uri: str, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_RUN_ID", raising=False)
    store = f"sqlite:///{tmp_path}/mlflow.db"
    metrics, page = (kind(uri=str(tmp_path / kind.__name__)) for kind in (dsl.Metrics, dsl.HTML))
    found = component.python_func(
        "tiny", SHORT[1::2], str(tmp_path), store, "genie", tiny_model_uri, str(images), metrics, page
    )
    client = MlflowClient(store)
    experiment = client.get_experiment_by_name("genie")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id], "attributes.run_name = 'play-prompts'")
    assert run.data.metrics == pytest.approx(found)
    assert metrics.metadata == found
    pictures = {file.path for file in client.list_artifacts(run.info.run_id, "pictures")}
    assert {"pictures/prompts_held_1.png", "pictures/prompts_held_2.png"} <= pictures
    assert (tmp_path / "HTML").read_text().count("data:image/png;base64,") == 3
