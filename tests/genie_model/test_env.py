"""Worlds as environments: Gymnasium's own rules, one world or many alike, and bad input named."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.error import ResetNeeded
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from gymnasium.wrappers.vector import RecordEpisodeStatistics
from PIL import Image

from genie_model.checkpoint import load_model, save_model
from genie_model.env import GenieEnv, GenieVectorEnv
from genie_model.genie import Genie

SHAPE, ACTIONS = (64, 64, 3), 4


@pytest.fixture(scope="module")
def genie(tiny_model_uri: str) -> Genie:
    return load_model(tiny_model_uri)


@pytest.fixture(scope="module")
def starts(tiny_model_uri: str) -> np.ndarray:
    paths = sorted(Path(tiny_model_uri, "start_frames").glob("*.png"))
    return np.stack([np.asarray(Image.open(path).convert("RGB")) for path in paths])


def brighter(before_BHWC: np.ndarray, action_B: np.ndarray, frames_BHWC: np.ndarray) -> np.ndarray:
    """A reward in which each of the three counts."""
    return frames_BHWC.mean((1, 2, 3)) - before_BHWC.mean((1, 2, 3)) + 1000 * action_B


@pytest.mark.filterwarnings("error")
def test_gymnasium_s_own_checker_finds_nothing(tiny_model_uri: str) -> None:
    env = gymnasium.make("genie_model.env:Genie-v0", model_uri=tiny_model_uri, render_mode="rgb_array")
    check_env(env.unwrapped)  # of the wrappers around it, it would warn
    assert env.observation_space == gymnasium.spaces.Box(0, 255, SHAPE, np.uint8)
    assert env.action_space == gymnasium.spaces.Discrete(ACTIONS)


@pytest.mark.filterwarnings("error")
def test_gymnasium_makes_worlds_side_by_side(tiny_model_uri: str) -> None:
    env = gymnasium.make_vec("genie_model.env:Genie-v0", num_envs=3, model_uri=tiny_model_uri, max_steps=2)
    assert isinstance(env, GenieVectorEnv)
    assert env.metadata["autoreset_mode"] is AutoresetMode.NEXT_STEP
    env = RecordEpisodeStatistics(env)  # it keeps account of episodes by the mode that is declared
    env.reset(seed=0)
    for step in range(1, 7):
        frames_BHWC, *_, infos = env.step(env.action_space.sample())
        assert frames_BHWC in env.observation_space
        assert ("episode" in infos) == (step in (2, 5))
    assert list(env.length_queue) == [2] * 6


def test_worlds_side_by_side_are_those_of_single_environments(genie: Genie, starts: np.ndarray) -> None:
    """Gymnasium's own vector environment, of one-world ones, is the rule: frames, rewards, and episodes to come."""
    given = {"reward": brighter, "max_steps": 3, "start_frames": starts}
    together = GenieVectorEnv(genie, 3, **given)
    apart = SyncVectorEnv([lambda: GenieEnv(genie, **given)] * 3)
    random = np.random.default_rng(0)
    for seed in (7, [3, 1, 3], None):
        found, expected = together.reset(seed=seed), apart.reset(seed=seed) if seed is not None else apart.reset()
        np.testing.assert_array_equal(found[0], expected[0])
        for _ in range(9):
            actions = random.integers(ACTIONS, size=3)
            found, expected = together.step(actions), apart.step(actions)
            for one, other in zip(found[:4], expected[:4], strict=True):
                np.testing.assert_allclose(one, other)
                assert one.dtype == other.dtype


def test_the_reward_is_told_what_was_seen_what_was_done_and_what_came_of_it(genie: Genie, starts: np.ndarray) -> None:
    told, rewards_B = [], np.zeros(2)

    def reward(*given: np.ndarray) -> np.ndarray:
        told.append(given)
        rewards_B[:] = len(told)
        return rewards_B  # the same array each time

    env = GenieVectorEnv(genie, 2, start_frames=starts, reward=reward)
    shown, earned = [env.reset(seed=0)[0]], []
    for actions in ([0, 1], [2, 3]):
        frames_BHWC, found_B, *_ = env.step(actions)
        shown.append(frames_BHWC)
        earned.append(found_B)
    np.testing.assert_array_equal(earned, [[1, 1], [2, 2]])
    for t, (before_BHWC, action_B, frames_BHWC) in enumerate(told):
        np.testing.assert_array_equal(before_BHWC, shown[t])
        np.testing.assert_array_equal(action_B, [2 * t, 2 * t + 1])
        np.testing.assert_array_equal(frames_BHWC, shown[t + 1])


def test_all_worlds_step_in_one_pass_of_the_model(
    genie: Genie, starts: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes, step = [], genie.step
    monkeypatch.setattr(genie, "step", lambda state, action_B: (passes.append(len(action_B)), step(state, action_B))[1])
    env = GenieVectorEnv(genie, 5, start_frames=starts)
    env.reset(seed=0)
    env.step(np.zeros(5, np.int64))
    assert passes == [5]


def test_an_episode_is_a_function_of_its_seed_and_actions(genie: Genie, starts: np.ndarray) -> None:
    env = GenieEnv(genie, start_frames=starts, max_steps=3)

    def episode(seed: int | None, action: int) -> np.ndarray:
        return np.stack([env.reset(seed=seed)[0], *(env.step(action)[0] for _ in range(3))])

    first, second = episode(5, 1), episode(None, 1)
    assert not np.array_equal(first, second)
    np.testing.assert_array_equal(episode(5, 1), first)
    np.testing.assert_array_equal(episode(None, 1), second)
    assert not np.array_equal(episode(5, 2), first)
    assert {env.reset(seed=seed)[0].tobytes() for seed in range(40)} == {frame.tobytes() for frame in starts}


def test_the_model_dreams_what_the_environment_shows(genie: Genie, starts: np.ndarray) -> None:
    env = GenieEnv(genie, start_frames=starts, render_mode="rgb_array")
    shown = [env.reset(seed=3)[0], *(env.step(action)[0] for action in (1, 2))]
    random = np.random.default_rng(3)  # which Gymnasium seeds in the same way
    seed, start = int(random.integers(2**31)), starts[random.integers(len(starts))]
    state = genie.start(torch.from_numpy(start[None, None]), seed)
    expected = [start, *(genie.step(state, torch.tensor([action])).numpy()[0] for action in (1, 2))]
    np.testing.assert_array_equal(shown, expected)
    np.testing.assert_array_equal(env.render(), expected[-1])


def test_an_episode_is_cut_off_and_the_next_one_begins(genie: Genie, starts: np.ndarray) -> None:
    env = GenieEnv(genie, start_frames=starts, max_steps=2)
    env.reset(seed=0)
    assert env.step(0)[1:] == (0.0, False, False, {})
    assert env.step(0)[2:4] == (False, True)
    with pytest.raises(ResetNeeded, match="the episode is over"):
        env.step(0)
    assert env.reset()[0] in env.observation_space
    assert not env.step(0)[3]

    many = GenieVectorEnv(genie, 2, start_frames=starts, max_steps=2, reward=brighter)
    many.reset(seed=0)
    cut = [many.step([1, 1])[1:4] for _ in range(6)]
    assert [truncated.tolist() for *_, truncated in cut] == [[step % 3 == 1] * 2 for step in range(6)]
    assert not any(terminated.any() for _, terminated, _ in cut)
    assert [(rewards == 0).all() for rewards, *_ in cut] == [step % 3 == 2 for step in range(6)]

    endless = GenieEnv(genie, start_frames=starts, max_steps=None)
    endless.reset(seed=0)
    assert not any(endless.step(0)[3] for _ in range(20))


def test_a_world_begins_where_it_is_told(genie: Genie, starts: np.ndarray) -> None:
    frame = np.random.default_rng(0).integers(256, size=SHAPE, dtype=np.uint8)
    env = GenieEnv(genie, start_frames=starts)
    np.testing.assert_array_equal(env.reset(seed=0, options={"frame": frame})[0], frame)
    dreamt = env.step(1)[0]
    many = GenieVectorEnv(genie, 2, start_frames=starts, max_steps=1)
    np.testing.assert_array_equal(many.reset(seed=0, options={"frame": frame})[0], [frame, frame])
    np.testing.assert_array_equal(many.step([1, 0])[0][0], dreamt)
    assert {first.tobytes() for first in many.step([0, 0])[0]} <= {start.tobytes() for start in starts}
    np.testing.assert_array_equal(many.reset(options={"frame": starts[:2]})[0], starts[:2])


def test_whoever_keeps_a_frame_may_change_it(genie: Genie, starts: np.ndarray) -> None:
    played = []
    for spoil in (False, True):
        given = starts.copy()
        env = GenieVectorEnv(genie, 2, start_frames=given, reward=brighter, render_mode="rgb_array")
        frames_BHWC, _ = env.reset(seed=0, options={"frame": given[:2]})
        for _ in range(3):
            if spoil:
                for kept in (frames_BHWC, *env.render(), given[:2]):
                    kept[:] = 0
            frames_BHWC, rewards_B, *_ = env.step([1, 2])
            played.append((frames_BHWC.copy(), rewards_B))
    for (frames, rewards), (spoilt_frames, spoilt_rewards) in zip(played[:3], played[3:], strict=True):
        np.testing.assert_array_equal(frames, spoilt_frames)
        np.testing.assert_array_equal(rewards, spoilt_rewards)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"num_envs": 0}, "at least 1, got 0"),
        ({"max_steps": 0}, "at least 1, got 1 and 0"),
        ({"render_mode": "human"}, r"one of \['rgb_array'\], got 'human'"),
        ({"start_frames": None}, "give start_frames"),
        ({"start_frames": np.zeros((0, *SHAPE), np.uint8)}, r"at least 1, .*got uint8 of shape \(0, 64"),
        ({"start_frames": np.zeros((2, *SHAPE))}, "must be uint8 .*got float64"),
        ({"start_frames": np.zeros((2, 32, 32, 3), np.uint8)}, r"64, 64, 3.*got uint8 of shape \(2, 32"),
    ],
)
def test_settings_that_cannot_be_are_named(genie: Genie, starts: np.ndarray, given: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        GenieVectorEnv(genie, **({"start_frames": starts} | given))


def test_a_model_without_weights_or_start_frames_is_named(genie: Genie, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no model at"):
        GenieEnv(str(tmp_path))
    save_model(str(tmp_path), genie)
    with pytest.raises(ValueError, match=r"no start frames in .*evaluate the model first"):
        GenieEnv(str(tmp_path))


def test_steps_and_resets_that_cannot_be_are_named_and_change_nothing(genie: Genie, starts: np.ndarray) -> None:
    env = GenieVectorEnv(genie, 2, start_frames=starts, render_mode="rgb_array")
    for early in (lambda: env.step([0, 0]), env.render):
        with pytest.raises(ResetNeeded, match="call reset first"):
            early()
    env.reset(seed=0)
    expected = env.step([0, 1])[0]
    env.reset(seed=0)
    for actions, said in [
        ([0, 4], r"in 0..3, got \[0, 4\]"),
        ([-1, 0], "in 0..3"),
        ([0], r"of shape \(2,\), got int64 of shape \(1,\)"),
        ([0.0, 1.0], "must be integers .*got float64"),
        ("ab", "must be integers"),
    ]:
        with pytest.raises(ValueError, match=said):
            env.step(actions)
    for seed, options, said in [
        ([1], None, "1 seeds for 2 worlds"),
        (None, {"frames": starts[0]}, r"unknown options \['frames'\]: there is 'frame'"),
        (None, {"frame": starts[0] / 255}, "must be uint8 .*got float64"),
        (None, {"frame": starts[0][:32]}, r"\(64, 64, 3\) or \(2, 64, 64, 3\), got uint8 of shape \(32, 64, 3\)"),
    ]:
        with pytest.raises(ValueError, match=said):
            env.reset(seed=seed, options=options)
    np.testing.assert_array_equal(env.step([0, 1])[0], expected)
    one = GenieEnv(genie, start_frames=starts, reward=lambda before, action, frames: 1.0)
    one.reset(seed=0)
    with pytest.raises(ValueError, match=r"in 0\.\.3, got \[9\]"):
        one.step(9)
    with pytest.raises(ValueError, match=r"must be of shape \(1,\), one a world, got \(\)"):
        one.step(0)


def test_an_agent_needs_no_mlflow() -> None:
    code = "import sys, genie_model.env; sys.exit('mlflow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
