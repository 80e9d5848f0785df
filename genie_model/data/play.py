"""Playing CoinRun with a policy: which levels there are to learn from and to be judged on, and how many it solves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from genie_model.data.coinrun import NUM_ACTIONS, Mode, enter_levels, simulator

# Frames (B, H, W, 3) of B levels, and which of those are over, to their actions (B,): integers of 0..14.
Policy = Callable[[NDArray[np.uint8], NDArray[np.bool_]], NDArray[np.integer[Any]]]

EPISODE_STEPS = 1_000  # then Procgen ends an episode
FIRST_HELD_OUT = 1_000_000  # as data.eval_first_level
_TRAINING_LEVELS = 10_000  # as data.train_levels


def training_levels(count: int) -> range:
    """The first seeds that demonstrations may come from; no held-out level is among them."""
    if not 1 <= count <= _TRAINING_LEVELS:
        raise ValueError(f"{count} training levels: 1 to {_TRAINING_LEVELS}")
    return range(count)


def held_out_levels(count: int) -> range:
    """The first seeds to evaluate a policy on."""
    if count < 1:
        raise ValueError(f"{count} held-out levels: at least 1")
    return range(FIRST_HELD_OUT, FIRST_HELD_OUT + count)


def play_levels(policy: Policy, levels: Sequence[int], mode: Mode, max_steps: int = EPISODE_STEPS) -> NDArray[np.bool_]:
    """bool (B,): in which of the B levels (seeds) the policy reaches the coin in its first life, within `max_steps`.

    All are played side by side, one simulator (about 2 MB) each; what the policy does in those that are over counts for
    nothing. Raises ValueError for an unknown mode, no levels, or a policy that returns anything but B actions.
    """
    check(levels, mode)
    solved_B, done_B = np.zeros(len(levels), np.bool_), np.zeros(len(levels), np.bool_)
    env = simulator(len(levels), mode)
    try:
        enter_levels(env, levels)
        frames_BHWC = env.observe()[1]["rgb"]
        for _ in range(max_steps):
            action_B = np.asarray(policy(frames_BHWC, done_B.copy()))
            if action_B.shape != done_B.shape or not np.isin(action_B, range(NUM_ACTIONS)).all():
                raise ValueError(
                    f"the policy must return {len(levels)} actions of 0..{NUM_ACTIONS - 1}, not {action_B}"
                )
            env.act(action_B.astype(np.int32))
            reward_B, observation, first_B = env.observe()
            frames_BHWC = observation["rgb"]
            solved_B |= ~done_B & (reward_B > 0)  # CoinRun rewards the coin, and nothing else
            done_B |= first_B
            if done_B.all():
                break
    finally:
        env.close()
    return solved_B


def random_policy(seed: int) -> Policy:
    """Uniform over the 15 actions."""
    generator = np.random.default_rng(seed)
    return lambda frames_BHWC, done_B: generator.integers(NUM_ACTIONS, size=len(done_B))


def check(levels: Sequence[int], mode: str) -> None:
    """Raises ValueError for an unknown mode or no levels."""
    if mode not in get_args(Mode):
        raise ValueError(f"mode {mode!r}: one of {', '.join(get_args(Mode))}")
    if not len(levels):
        raise ValueError("no levels: at least one level seed")
