"""The supervised bound is high where the direction can be seen and chance where it cannot."""

import numpy as np
import pytest

from genie_model.probe import supervised_bound

LEVELS, FRAMES, SIZE = 8, 60, 32


@pytest.fixture(scope="module")
def scrolling():
    rng = np.random.default_rng(0)
    direction = rng.integers(0, 3, (LEVELS, FRAMES))
    frames = []
    for level in range(LEVELS):
        texture = rng.integers(0, 256, (16, 200, 3), dtype=np.uint8).repeat(2, axis=0).repeat(2, axis=1)
        x = 180 + 2 * np.concatenate([[0], (direction[level, :-1] - 1).cumsum()])
        frames += [texture[:, begin : begin + SIZE] for begin in x]
    middle = np.concatenate([level * FRAMES + np.arange(1, FRAMES - 1) for level in range(LEVELS)])
    return np.stack(frames), middle, direction.ravel()[middle], middle // FRAMES


def test_a_visible_direction_is_told(scrolling):
    assert supervised_bound(*scrolling, steps=100).value > 0.65


def test_an_invisible_direction_is_chance(scrolling):
    frames, middle, direction, levels = scrolling
    unrelated = np.random.default_rng(1).permutation(direction)
    assert supervised_bound(frames, middle, unrelated, levels, steps=100).value == pytest.approx(1 / 3, abs=0.12)
