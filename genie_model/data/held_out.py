"""The held-out videos in memory, with what really happened in them where that is known: evaluation alone reads this."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from genie_model.data.store import VideoStore
from genie_model.data.truth import PrivilegedTruth

Frames = NDArray[np.uint8]


class Truth(NamedTuple):
    """`action_T[t]` leads from frame t to t + 1, one fewer than frames; positions are in cells of the level's grid."""

    action_T: NDArray[np.int64]
    x_T: NDArray[np.float64]
    y_T: NDArray[np.float64]


class Episode(NamedTuple):
    """`level` is the seed of its level; of ordinary video, where nothing else is known, a number of its source."""

    level: int
    frames_THWC: Frames
    truth: Truth | None = None


@dataclass(frozen=True)
class HeldOut:
    """Held-out episodes in memory, in order of level."""

    uri: str
    digest: str
    episodes: list[Episode]

    @classmethod
    def open(cls, uri: str, most: int, drawn: Sequence[int] = ()) -> HeldOut:
        """All recorded episodes, with their truth; of ordinary video at most so many clips, spread over its sources.

        `drawn` is the shape of the frames (H, W, C) that they are to be compared with, if any. Raises ValueError where
        theirs is another, or no data set is.
        """
        store = VideoStore.open(uri)
        if drawn:
            store.check_frames(drawn, "the model draws")
        truth = PrivilegedTruth(store)
        if truth.is_known:
            episodes = [_recorded(store, truth, number) for number in range(store.num_episodes)]
        else:
            source_N = store.hashes_in("source", range(store.num_shards))
            episodes = [_of_video(store, int(number), int(source_N[number])) for number in _spread(source_N, most)]
        return cls(uri, store.digest, sorted(episodes, key=lambda episode: episode.level))

    @property
    def has_truth(self) -> bool:
        return all(episode.truth is not None for episode in self.episodes)

    def windows(self, length: int, stride: int) -> list[tuple[Episode, int]]:
        """Every (episode, start) whose `length` frames lie within the episode, in order of level and time."""
        found = [
            (episode, start)
            for episode in self.episodes
            for start in range(0, len(episode.frames_THWC) - length + 1, stride)
        ]
        if len({episode.level for episode, _ in found}) < 2:
            raise ValueError(
                f"fewer than 2 levels, or videos, of {self.uri} have {length} frames in one episode: lower "
                "data.clip_length, or hold out more: data.eval_levels or data.eval_steps_per_level of CoinRun, "
                "ingest.eval_share of video"
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


def _recorded(store: VideoStore, truth: PrivilegedTruth, number: int) -> Episode:
    true = truth.episode(number)
    frames_THWC = store.frames(number, 0, store.length_of(number))
    return Episode(true["level_seed"], frames_THWC, Truth(true["action"], true["agent_x"], true["agent_y"]))


def _of_video(store: VideoStore, number: int, source: int) -> Episode:
    """`source` is a hash of 64 bits; levels are signed integers."""
    return Episode(source >> 1, store.frames(number, 0, store.length_of(number)))


def _spread(source_N: NDArray[np.uint64], most: int) -> NDArray[np.int64]:
    """Up to so many rows, in order: one of every source, then a second one of those that have it, and so on."""
    shuffled = np.random.default_rng(0).permutation(len(source_N))  # a video's first clip is not like its others
    by_source = shuffled[np.argsort(source_N[shuffled], kind="stable")]
    _, begin, count = np.unique(source_N[by_source], return_index=True, return_counts=True)
    turn = np.arange(len(by_source)) - begin.repeat(count)
    return np.sort(by_source[np.argsort(turn, kind="stable")][:most])
