"""The held-out levels in memory, with what really happened in them: evaluation alone reads this."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from genie_model.data.store import VideoStore
from genie_model.data.truth import PrivilegedTruth

Frames = NDArray[np.uint8]


class Episode(NamedTuple):
    """`action_T[t]` leads from frame t to t + 1, one fewer than frames; positions are in cells of the level's grid."""

    level: int
    frames_THWC: Frames
    action_T: NDArray[np.int64]
    x_T: NDArray[np.float64]
    y_T: NDArray[np.float64]


@dataclass(frozen=True)
class HeldOut:
    """The held-out episodes in memory, in order of level, with what really happened in them."""

    uri: str
    digest: str
    episodes: list[Episode]

    @classmethod
    def open(cls, uri: str) -> HeldOut:
        store, truth = VideoStore.open(uri), PrivilegedTruth.open(uri)
        episodes = []
        for number, length in enumerate(store.episode_lengths):
            true = truth.episode(number)
            frames_THWC = store.frames(number, 0, int(length))
            episodes.append(Episode(true["level_seed"], frames_THWC, true["action"], true["agent_x"], true["agent_y"]))
        return cls(uri, store.digest, sorted(episodes, key=lambda episode: episode.level))

    def windows(self, length: int, stride: int) -> list[tuple[Episode, int]]:
        """Every (episode, start) whose `length` frames lie within the episode, in order of level and time."""
        found = [
            (episode, start)
            for episode in self.episodes
            for start in range(0, len(episode.frames_THWC) - length + 1, stride)
        ]
        if len({episode.level for episode, _ in found}) < 2:
            raise ValueError(
                f"fewer than 2 levels of {self.uri} have {length} frames in one episode: lower data.clip_length, "
                "or raise data.eval_levels or data.eval_steps_per_level and collect again"
            )
        return found

    def clips(self, length: int, count: int, seed: int) -> tuple[Frames, NDArray[np.int64]]:
        """Up to `count` clips, none overlapping, spread evenly over levels: uint8 (B, T, H, W, 3) and their levels."""
        windows = self.windows(length, stride=length)
        turns: dict[int, int] = {}
        order = []  # (how many clips of its level came before, clip)
        for index in np.random.default_rng(seed).permutation(len(windows)):
            level = windows[index][0].level
            turns[level] = turns.get(level, -1) + 1
            order.append((turns[level], int(index)))
        chosen = [windows[index] for _, index in sorted(order)[:count]]
        frames_BTHWC = np.stack([episode.frames_THWC[start : start + length] for episode, start in chosen])
        return frames_BTHWC, np.array([episode.level for episode, _ in chosen])
