"""What an evaluation says of a real Genie, and of worlds whose score is known beforehand."""

import dataclasses
import hashlib
import io

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from genie_model import beside_truth
from genie_model.checkpoint import load_model, save_model
from genie_model.data.coinrun import collect
from genie_model.data.held_out import Episode, HeldOut, Truth
from genie_model.data.store import VideoStore
from genie_model.evaluate import evaluate, measure, measure_play
from genie_model.files import read
from genie_model.genie import Genie
from genie_model.presets import get_preset
from genie_model.tracking import decide

CONFIG = get_preset("tiny").with_overrides(
    "lam.codebook.num_codes=3", "evaluation.clips=12", "evaluation.probe_steps=10"
)
SIZE, LEVELS, FRAMES = 64, 6, 33
WITH_INTERVAL = [
    "tokenizer_psnr",
    "tokenizer_ssim",
    "rollout_ssim_t1",
    "delta_psnr_t4",
    "rollout_psnr_t1",
    "copy_psnr_t1",
    "rollout_over_copy_t1",
    "held_motion_explained",
    "held_motion_x_explained",
    "held_motion_y_explained",
    "lam_mse_over_copy",
    "direction_balanced_accuracy",
    "direction_supervised_bound",
    "action_accuracy",
    "action_mutual_information_bits",
    "displacement_x_explained",
    "displacement_y_explained",
]
PLAIN = [
    "tokenizer_code_usage",
    "tokenizer_code_perplexity",
    "lam_action_usage",
    "lam_action_perplexity",
    "direction_chance",
    "action_chance",
    "fvd_random3d",
    "fvd_random3d_copy",
]


class Recorder:
    """A RunLog that remembers."""

    def __init__(self):
        self.values, self.curves, self.images = {}, {}, {}

    def params(self, values):
        pass

    def metrics(self, values, step=0):
        if step == 0:
            self.values.update(values)
        for name, value in values.items() if step else ():
            self.curves.setdefault(name, []).append(value)

    def image(self, name, image_HWC):
        self.images[name] = image_HWC


@pytest.fixture(scope="module")
def held_out():
    """Levels of one scrolling texture each: left, none and right move the view by -3, 0 and 3 pixels."""
    rng = np.random.default_rng(0)
    episodes = []
    for level in range(LEVELS):
        texture = np.repeat(rng.integers(0, 256, (16, 100, 3), dtype=np.uint8), 4, axis=0).repeat(4, axis=1)
        direction = rng.integers(0, 3, FRAMES - 1)
        x = 150 + np.concatenate([[0], 3 * (direction - 1).cumsum()])
        frames = np.stack([texture[:, begin : begin + SIZE] for begin in x])
        action = 3 * direction + rng.integers(0, 3, FRAMES - 1)
        episodes.append(Episode(level, frames, Truth(action, x.astype(float), rng.normal(size=FRAMES))))
    return HeldOut("memory://scrolling", "none", episodes)


class ScrollingWorld:
    """A Genie's API over the true rule of `held_out`: it finds the prompt in the levels and scrolls it."""

    def __init__(self, held_out, heeds_actions=True):
        self.frames = np.concatenate([episode.frames_THWC for episode in held_out.episodes])
        self.heeds_actions = heeds_actions

    def reconstruct(self, frames):
        return frames.clone()

    def tokenize(self, frames):
        return torch.zeros(*frames.shape[:2], 4, dtype=torch.long)

    def infer_actions(self, frames):
        candidates = torch.stack([self._scroll(frames[:, :-1], action) for action in range(3)])
        valid = slice(4, -4)
        error = (candidates[..., valid, :].float() - frames[:, 1:][..., valid, :].float()).square().mean((-3, -2, -1))
        return error.argmin(0)

    def lam_reconstruct(self, frames):
        return frames[:, 1:].float() / 255

    def start(self, frames, seed):
        return {"frame": frames[:, -1]}

    def step(self, state, action_B):
        if self.heeds_actions:
            moved = [self._scroll(frame, int(action)) for frame, action in zip(state["frame"], action_B, strict=True)]
            state["frame"] = torch.stack(moved)
        return state["frame"]

    @staticmethod
    def _scroll(frames, action):
        return frames.roll(-3 * (action - 1), dims=-2)


def test_a_world_that_heeds_its_actions_scores_high(held_out):
    found = measure(CONFIG, ScrollingWorld(held_out), held_out).metrics
    assert found["delta_psnr_t4"] - found["delta_psnr_t4_ci95"] > 1
    assert found["rollout_over_copy_t1"] > 1
    assert found["held_motion_x_explained"] > 0.9
    assert abs(found["held_motion_y_explained"]) < 0.2
    assert found["direction_balanced_accuracy"] > 0.99
    assert found["displacement_x_explained"] > 0.99
    assert abs(found["displacement_y_explained"]) < 0.2
    assert found["action_mutual_information_bits"] == pytest.approx(np.log2(3), abs=0.1)
    assert found["lam_action_usage"] == 1
    assert found["lam_mse_over_copy"] == pytest.approx(0, abs=1e-6)
    assert found["tokenizer_psnr"] == 100
    assert found["tokenizer_code_usage"] == 1 / 16
    assert found["fvd_random3d"] < found["fvd_random3d_copy"]


def test_a_world_that_ignores_its_actions_scores_as_a_copy(held_out):
    found = measure(CONFIG, ScrollingWorld(held_out, heeds_actions=False), held_out).metrics
    assert found["delta_psnr_t4"] == found["delta_psnr_t4_ci95"] == 0
    assert found["rollout_over_copy_t1"] == 0
    assert found["held_motion_explained"] <= 0
    assert found["fvd_random3d"] == pytest.approx(found["fvd_random3d_copy"])


def test_without_true_actions_the_rest_is_measured_the_same(held_out):
    """As of ordinary video: nothing is made up for what nobody knows."""
    world, unknown = ScrollingWorld(held_out), [episode._replace(truth=None) for episode in held_out.episodes]
    known, found = (
        measure(CONFIG, world, held_out),
        measure(CONFIG, world, dataclasses.replace(held_out, episodes=unknown)),
    )
    assert found.confusion is None
    assert found.metrics == {name: known.metrics[name] for name in found.metrics}
    assert found.curves == known.curves
    needs_truth = ("direction_", "action_accuracy", "action_chance", "action_mutual", "displacement_")
    assert set(known.metrics) - set(found.metrics) == {n for n in known.metrics if n.startswith(needs_truth)}
    assert set(known.pictures) - set(found.pictures) == {"actions_beside_truth", "true_direction_beside_told"}
    assert decide(found.metrics, None, CONFIG)[0], "the rule of promotion needs none of it"


class MeanColour(nn.Module):
    """Is called as an I3D is."""

    def forward(self, x: Tensor, rescale: bool, resize: bool, return_features: bool) -> Tensor:
        return x.mean((2, 3, 4))


def test_with_an_i3d_of_the_user_s_its_distance_is_measured_too(held_out, tmp_path, monkeypatch):
    monkeypatch.setenv("GENIE_CACHE_DIR", str(tmp_path / "cache"))
    torch.jit.save(torch.jit.script(MeanColour()), str(tmp_path / "i3d.pt"))
    sha256 = hashlib.sha256((tmp_path / "i3d.pt").read_bytes()).hexdigest()
    named = [f"evaluation.i3d_uri={tmp_path}/i3d.pt", f'evaluation.i3d_sha256="{sha256}"', "evaluation.clips=2"]
    found = measure(CONFIG.with_overrides("data.clip_length=16", *named), ScrollingWorld(held_out), held_out).metrics
    assert found["fvd_i3d"] >= 0
    assert found["fvd_i3d_copy"] >= 0
    with pytest.raises(ValueError, match=r"I3D needs 9 frames, and data\.clip_length=8"):
        CONFIG.with_overrides(*named)
    with pytest.raises(ValueError, match="set both or neither"):
        CONFIG.with_overrides("data.clip_length=16", named[0])


def test_more_prompt_frames_leave_the_actions_in_step_with_the_frames(held_out):
    config = CONFIG.with_overrides("evaluation.prompt_frames=3")
    found = measure(config, ScrollingWorld(held_out), held_out).metrics
    assert found["rollout_over_copy_t1"] > 1
    assert found["delta_psnr_t4"] > 1


def test_clips_are_spread_over_levels_and_repeatable(held_out):
    frames, levels = held_out.clips(8, 2 * LEVELS, seed=0)
    assert frames.shape == (2 * LEVELS, 8, SIZE, SIZE, 3)
    np.testing.assert_array_equal(np.bincount(levels), np.full(LEVELS, 2))
    np.testing.assert_array_equal(frames, held_out.clips(8, 2 * LEVELS, seed=0)[0])
    assert len({clip.tobytes() for clip in frames}) == 2 * LEVELS


def test_levels_too_short_for_a_clip_are_refused(held_out):
    few = dataclasses.replace(held_out, episodes=held_out.episodes[:1])
    with pytest.raises(ValueError, match=r"lower data\.clip_length"):
        few.windows(8, 8)
    with pytest.raises(ValueError, match=r"lower data\.clip_length"):
        held_out.windows(FRAMES + 1, 1)


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """A real, untrained Genie and a real recording."""
    root = tmp_path_factory.mktemp("root")
    torch.manual_seed(0)
    save_model(f"{root}/model", Genie(CONFIG))
    return f"{root}/model", collect(CONFIG, str(root))


def test_a_real_genie_is_evaluated_logged_and_given_its_start_frames(real, capsys):
    model_uri, data_uri = real
    log = Recorder()
    found = evaluate(CONFIG, model_uri, data_uri, log)
    names = {*WITH_INTERVAL, *(f"{name}_ci95" for name in WITH_INTERVAL), *PLAIN}
    assert names <= set(found.metrics)
    assert all(np.isfinite(value) for value in found.metrics.values())
    assert log.values == found.metrics
    assert log.curves == {f"by_t/{name}": values for name, values in found.curves.items()}
    assert set(found.curves) == {"delta_psnr", "rollout_psnr", "copy_psnr", "rollout_over_copy", "rollout_ssim"}
    for name, values in found.curves.items():
        assert len(values) == CONFIG.data.clip_length - 1
        assert values[3] == found.metrics[f"{name}_t4"]
    tables = {"actions_beside_truth", "true_direction_beside_told"}
    assert set(log.images) == {"by_t", "reconstruction", "rollout", "action_grid", *tables}
    recalls = np.diag(found.confusion) / found.confusion.sum(axis=1)
    assert recalls.mean() == pytest.approx(found.metrics["direction_balanced_accuracy"])
    assert all(picture.dtype == np.uint8 and picture.shape[2] == 3 for picture in log.images.values())
    assert "[evaluate] tokenizer" in capsys.readouterr().out

    store = VideoStore.open(f"{data_uri}/eval")
    firsts = {store.frames(episode, 0, 1)[0].tobytes() for episode in range(store.num_episodes)}
    for number in range(CONFIG.data.eval_levels):
        png = Image.open(io.BytesIO(read(f"{model_uri}/start_frames/{number:02d}.png")))
        assert np.asarray(png).tobytes() in firsts


def test_an_evaluation_is_repeatable_and_its_part_on_play_agrees(real):
    model_uri, data_uri = real
    genie, held_out = load_model(model_uri), HeldOut.open(f"{data_uri}/eval", CONFIG.evaluation.clips)
    first, second = (measure(CONFIG, genie, held_out).metrics for _ in range(2))
    assert first == second
    play = measure_play(CONFIG, genie, held_out)
    assert {"delta_psnr_t4", "fvd_random3d", "held_motion_explained"} <= set(play)
    assert play == {name: first[name] for name in play}


def test_frames_are_sampled_as_the_evaluation_s_config_says(real, tmp_path):
    model_uri, data_uri = real
    greedy = CONFIG.with_overrides("sampling.temperature=0", "sampling.order_noise=0")
    torch.manual_seed(0)
    save_model(f"{tmp_path}/greedy", Genie(greedy))
    reused = evaluate(greedy, model_uri, data_uri).metrics
    assert reused == evaluate(greedy, f"{tmp_path}/greedy", data_uri).metrics
    assert reused != evaluate(CONFIG, model_uri, data_uri).metrics


def test_missing_model_or_data_is_one_clear_error(real, tmp_path):
    model_uri, data_uri = real
    with pytest.raises(ValueError, match="no model at"):
        evaluate(CONFIG, f"{tmp_path}/nothing", data_uri)
    with pytest.raises(ValueError, match="collect"):
        evaluate(CONFIG, model_uri, f"{tmp_path}/nothing")
    save_model(f"{tmp_path}/larger", Genie(CONFIG.with_overrides("data.frame_height=128", "data.frame_width=128")))
    with pytest.raises(ValueError, match="eval has frames of 64x64, and the model draws 128x128"):
        evaluate(CONFIG, f"{tmp_path}/larger", data_uri)


def test_a_displacement_s_change_is_from_the_one_before_it_also_across_windows() -> None:
    place_T = np.array([0.0, 1.0, 3.0, 6.0, 6.0, 5.0])
    first, second = beside_truth._change(place_T, 0, 4), beside_truth._change(place_T, 3, 3)  # as windows() cuts them
    np.testing.assert_array_equal(first, [np.nan, 1, 1])
    np.testing.assert_array_equal(second, [-3, -1])
