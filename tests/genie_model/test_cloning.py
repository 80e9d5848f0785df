"""Cloning: labels belong to their frames, the map draws from what was seen, training resumes, and all of it runs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from genie_model.backend.processes import Native
from genie_model.checkpoint import load_model
from genie_model.cloning import (
    ActionMap,
    evaluate_policies,
    labelled_transitions,
    latent_actions,
    load_policy,
    train_policy,
    true_actions,
)
from genie_model.config import Config, ParallelConfig
from genie_model.data.coinrun import FRAME_SHAPE, NUM_ACTIONS
from genie_model.data.expert import collect_demonstrations
from genie_model.data.loader import ClipLoader
from genie_model.data.shards import compress, write_index, write_shard
from genie_model.data.store import VideoStore
from genie_model.genie import Genie
from genie_model.policy import Policy
from genie_model.presets import get_preset
from genie_model.progress import NoLog
from genie_model.train import fit
from genie_model.training_state import TrainingState

CONFIG = get_preset("tiny")
LENGTHS = (6, 9, 30)
LAST = 255  # the colour of an episode's last frame


@pytest.fixture(scope="module")
def coloured(tmp_path_factory: pytest.TempPathFactory) -> VideoStore:
    """Three episodes in which every frame's colour says what is done at it: action a is 10 a."""
    uri, generator = str(tmp_path_factory.mktemp("coloured")), np.random.default_rng(0)
    # As the expert's, the truth has a row for the last frame too.
    actions = [generator.integers(NUM_ACTIONS, size=length, dtype=np.int32) for length in LENGTHS]
    colours = [np.append(10 * action_T[:-1], LAST).astype(np.uint8) for action_T in actions]
    episodes = [compress(np.tile(colour_T[:, None, None, None], FRAME_SHAPE)) for colour_T in colours]
    write_shard(uri, 0, episodes, FRAME_SHAPE, {"level_seed": np.arange(3), "action": np.concatenate(actions)})
    write_index(uri, 1, {"source": "coinrun", "split": "train", "frame_shape": list(FRAME_SHAPE), "data": {}})
    return VideoStore.open(uri)


@pytest.fixture(scope="module")
def demonstrations(tmp_path_factory: pytest.TempPathFactory) -> str:
    root = str(tmp_path_factory.mktemp("demonstrations"))
    return collect_demonstrations(CONFIG.cloning.levels, CONFIG.cloning.mode, root)


@pytest.fixture(scope="module")
def genie(tiny_model_uri: str) -> Genie:
    return load_model(tiny_model_uri)


def test_a_clip_s_actions_are_those_done_at_its_frames(coloured: VideoStore) -> None:
    context = CONFIG.policy.context
    loader = ClipLoader(coloured, 1, context, seed=0, actions=true_actions(coloured, range(3)))
    seen = set()
    for step in range(len(loader.clips)):
        batch = loader.batch(step)
        assert batch.actions_BT is not None
        assert batch.actions_BT.dtype == np.int64
        assert np.array_equal(batch.frames_BTHWC[..., 0, 0, 0], 10 * batch.actions_BT)
        seen.add(batch.frames_BTHWC.tobytes())
    assert len(loader.clips) == sum(length - context for length in LENGTHS), "every start, less the last frame's"


def test_a_clip_without_labels_has_none(coloured: VideoStore) -> None:
    assert ClipLoader(coloured, 1, 4, seed=0).batch(0).actions_BT is None


class Noisy(VideoStore):
    """Frames of which no two are alike."""

    def frames(self, episode: int, start: int, length: int) -> np.ndarray:
        noise_THWC = np.random.default_rng(episode).integers(0, 256, (30, *FRAME_SHAPE), np.uint8)
        return noise_THWC[start : start + length]


def talkative(store: VideoStore) -> Genie:
    """A world model that has a code for almost every transition of the last episode's first window."""
    torch.manual_seed(0)
    genie = Genie(CONFIG.with_overrides("lam.codebook.num_codes=7")).eval()
    latents: list[torch.Tensor] = []
    handle = genie.lam.to_latent.register_forward_hook(lambda module, inputs, latent: latents.append(latent))
    genie.infer_actions(torch.from_numpy(store.frames(2, 0, 8))[None])
    handle.remove()
    genie.lam.quantizer.codebook_VL.copy_(torch.nn.functional.layer_norm(latents[0][0], latents[0].shape[-1:]))
    return genie


def test_latent_actions_are_what_the_lam_says_of_windows_as_it_was_trained(coloured: VideoStore) -> None:
    assert CONFIG.data.clip_length == 8
    store = Noisy.open(coloured.uri)
    genie = talkative(store)

    def codes(episode: int, start: int, length: int) -> list[int]:
        return genie.infer_actions(torch.from_numpy(store.frames(episode, start, length))[None])[0].tolist()

    short, longer, long = latent_actions(genie, store, range(3))

    assert [len(short), len(longer), len(long)] == [length - 1 for length in LENGTHS]
    assert short.tolist() == codes(0, 0, 6), "shorter than a window"
    assert longer.tolist() == codes(1, 0, 8) + codes(1, 1, 8)[-1:]
    assert long.tolist() == codes(2, 0, 8) + codes(2, 7, 8) + codes(2, 14, 8) + codes(2, 21, 8) + codes(2, 22, 8)[-1:]
    assert long[:7].tolist() == list(range(7))


def test_latent_and_true_actions_of_one_index_lead_on_from_the_same_frame(coloured: VideoStore) -> None:
    store = Noisy.open(coloured.uri)
    genie, frames_THWC = talkative(store), torch.from_numpy(store.frames(2, 0, 8))
    before_T = genie.infer_actions(frames_THWC[None])[0]
    frames_THWC[4:] = 0
    unchanged_T = genie.infer_actions(frames_THWC[None])[0] == before_T
    assert unchanged_T[:3].all(), "transitions up to the one that ends on frame 3"
    assert not unchanged_T[3], "the one from frame 3 to frame 4"
    for number, actions in enumerate(true_actions(coloured, range(3))):
        assert len(actions) == len(latent_actions(genie, store, [number])[0]) == LENGTHS[number] - 1
        colour_T = coloured.frames(number, 0, LENGTHS[number])[:, 0, 0, 0]
        assert [*(10 * actions), LAST] == colour_T.tolist(), "an action and the frame that it was chosen at"


def test_the_map_draws_evenly_from_what_was_seen() -> None:
    translate = ActionMap(np.array([0, 0, 0, 2]), np.array([7, 7, 8, 1]), num_latents=4)
    chance = (np.arange(300) + 0.5) / 300
    drawn = {latent: np.bincount(translate(np.full(300, latent), chance), minlength=9) for latent in range(4)}
    assert drawn[0][[7, 8]].tolist() == [200, 100]
    assert drawn[2][1] == 300
    for unseen in (1, 3):
        assert drawn[unseen][[1, 7, 8]].tolist() == [75, 150, 75], "all labels"
    assert translate.agreement(np.array([0, 0, 2]), np.array([7, 8, 1])) == pytest.approx((2 / 3 + 1 / 3 + 1) / 3)


def test_without_labels_every_action_is_as_likely() -> None:
    nothing = np.array([], np.int64)
    translate, chance = ActionMap(nothing, nothing, num_latents=2), (np.arange(150) + 0.5) / 150
    for latent in (0, 1):
        assert np.bincount(translate(np.full(150, latent), chance)).tolist() == [10] * NUM_ACTIONS


def test_fewer_labels_are_the_first_of_more_and_an_order_is_a_seed_s(genie: Genie, demonstrations: str) -> None:
    store = VideoStore.open(demonstrations)
    latent, real = labelled_transitions(genie, store, 80, seed=1)
    assert len(latent) == len(real) == 80
    assert [part.tolist() for part in labelled_transitions(genie, store, 20, seed=1)] == [
        latent[:20].tolist(),
        real[:20].tolist(),
    ]
    first = int(np.random.default_rng(1).permutation(store.num_episodes)[0])
    length = min(80, int(store.episode_lengths[first]) - 1)
    assert real[:length].tolist() == true_actions(store, [first])[0][:length].tolist()
    others = {tuple(labelled_transitions(genie, store, 80, seed)[1].tolist()) for seed in range(4)}
    assert len(others) > 1
    assert [len(part) for part in labelled_transitions(genie, store, 0, seed=1)] == [0, 0]


class Killed(BaseException):
    pass


def test_resumed_equals_uninterrupted(coloured: VideoStore, tmp_path: Path) -> None:
    def run(state: TrainingState, kill_at: int | None = None) -> Policy:
        torch.manual_seed(0)
        policy = Policy(CONFIG, NUM_ACTIONS)
        loader = ClipLoader(coloured, 2, CONFIG.policy.context, seed=0, actions=true_actions(coloured, range(3)))

        def on_step(step: int) -> None:
            if step == kill_at:
                raise Killed

        fit(
            policy,
            CONFIG.train_policy,
            loader,
            state,
            Native(ParallelConfig()),
            desc="test",
            seed=0,
            log=NoLog(),
            on_step=on_step,
        )
        return policy

    whole, broken = run(TrainingState(str(tmp_path / "whole"))), TrainingState(str(tmp_path / "broken"))
    with pytest.raises(Killed):
        run(broken, kill_at=6)
    assert broken.latest_step() == 4
    resumed = run(broken).state_dict()
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed[name]), name


def test_the_whole_experiment_at_its_smallest(
    demonstrations: str, tiny_model_uri: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = str(tmp_path)
    latent_uri = train_policy(CONFIG, demonstrations, root, tiny_model_uri)
    oracle_uri = train_policy(CONFIG, demonstrations, root)
    assert load_policy(latent_uri, CONFIG.num_actions).config == CONFIG
    assert load_policy(oracle_uri, NUM_ACTIONS).num_actions == NUM_ACTIONS
    found = evaluate_policies(CONFIG, demonstrations, tiny_model_uri, latent_uri, oracle_uri)
    names = {"right_up", "random", "oracle", "expert", *(f"latent_{n}" for n in CONFIG.cloning.labelled)}
    assert set(found) == {f"solved_{name}" for name in names} | {"map_agreement"}
    assert all(0 <= share <= 1 for share in found.values())
    assert evaluate_policies(CONFIG, demonstrations, tiny_model_uri, latent_uri, oracle_uri) == found
    longer = CONFIG.with_overrides("cloning.max_steps=1000", "cloning.labelled=[0]")
    assert evaluate_policies(longer, demonstrations, tiny_model_uri, latent_uri, oracle_uri)["solved_expert"] == 1
    capsys.readouterr()
    judged_otherwise = CONFIG.with_overrides("cloning.eval_levels=2", "train_policy.log_every=1")
    assert train_policy(judged_otherwise, demonstrations, root) == oracle_uri
    assert "reused" in capsys.readouterr().out
    assert train_policy(CONFIG.with_overrides("seed=1", "train_policy.steps=1"), demonstrations, root) != oracle_uri


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("policy.patch_size=65", "policy.patch_size=65 is larger than the frame: at most 64"),
        ("policy.context=1", "policy.context"),
        ("cloning.mode=medium", "'easy' or 'hard'"),
        ("cloning.labelled=[0,-1]", "cloning.labelled.1"),
        ("cloning.labelled=[]", "cloning.labelled"),
        ("cloning.levels=10001", "less than or equal to 10000"),
        ("cloning.random_share=1.1", "less than or equal to 1"),
    ],
)
def test_a_wrong_setting_says_what_is_allowed(override: str, message: str) -> None:
    with pytest.raises(ValueError, match=r".") as raised:
        CONFIG.with_overrides(override)
    assert message in str(raised.value)


def test_what_cannot_be_is_refused_with_what_can(
    demonstrations: str, coloured: VideoStore, tiny_model_uri: str, genie: Genie, tmp_path: Path
) -> None:
    root = str(tmp_path)
    with pytest.raises(ValueError, match="no data set at"):
        train_policy(CONFIG, f"{root}/nowhere", root)
    with pytest.raises(ValueError, match="no model at"):
        train_policy(CONFIG, demonstrations, root, f"{root}/nowhere")
    with pytest.raises(ValueError, match=r"frames of 64x64, and data\.frame_width .* say 64x32"):
        train_policy(CONFIG.with_overrides("data.frame_height=32"), demonstrations, root)
    with pytest.raises(ValueError, match=r"no episode .* has 31 frames, the longest has 30"):
        train_policy(CONFIG.with_overrides("policy.context=30"), coloured.uri, root)
    with pytest.raises(ValueError, match=r"cloning\.labelled: 43 transitions, .* has 42: at most that"):
        labelled_transitions(genie, coloured, 43, seed=0)
    with pytest.raises(ValueError, match="2 latent and 1 real actions"):
        ActionMap(np.array([0, 1]), np.array([7]), 2)
    with pytest.raises(ValueError, match="no model at"):
        load_policy(f"{root}/nowhere", NUM_ACTIONS)
    with pytest.raises(ValueError, match="do not fit their config"):
        load_policy(train_policy(CONFIG, coloured.uri, root), NUM_ACTIONS + 1)


def test_paper_s_tables_are_the_default() -> None:
    config: Config = get_preset("coinrun")
    rates, shape = config.train_policy.optimizer, config.policy.transformer
    assert (rates.max_lr, rates.min_lr, rates.beta1, rates.beta2, rates.weight_decay) == (3e-5, 3e-6, 0.9, 0.96, 1e-4)
    assert (rates.warmup_steps, config.train_policy.batch_size, config.policy.context) == (5_000, 16, 4)
    assert (shape.num_layers, shape.d_model, config.policy.patch_size, config.policy.linear_layer) == (12, 512, 4, 512)
