"""Training batches: random clips, each once per epoch, a pure function of (data set, seed, step, rank)."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from genie_model.data.store import VideoStore


class Batch(NamedTuple):
    frames_BTHWC: NDArray[np.uint8]
    codes_BTNC: NDArray[np.int64] | None = None  # their tokens, where the loader has them
    actions_BT: NDArray[np.int64] | None = None  # what was done at each frame, where it has those
    labels_B: NDArray[np.int64] | None = None  # what people said of the clips (curation.py)


class ClipLoader:
    """Batches of clips of `clip_length` consecutive frames from the train split.

    A clip may start at any frame; where `tokens` (tokens.py) are given, at multiples of its length, and brings its
    codes along. Where `actions` are given, (T-1,) of each episode in turn, it brings along what was done at each of its
    frames: so an episode's last frame, after which nothing is known, is in none. An epoch takes every clip once, in an
    order that (seed, epoch) decides and that is computed, not stored: resuming needs the step alone. `batch_size`
    counts the clips of all ranks; the batch does not depend on `world_size`, rank r of w gets its r-th of w equal
    slices. Raises ValueError for the eval split, a batch that the ranks cannot share evenly, and clips longer than
    every episode.
    """

    def __init__(
        self,
        store: VideoStore,
        batch_size: int,
        clip_length: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        tokens: VideoStore | None = None,
        actions: Sequence[NDArray[np.int64]] | None = None,
    ) -> None:
        if store.split != "train":
            raise ValueError(f"{store.uri} is the {store.split} split, which is never trained on: open the train split")
        if batch_size % world_size:
            raise ValueError(f"batch_size={batch_size} cannot be shared by {world_size} ranks: use a multiple of it")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank={rank} is not in 0..{world_size - 1}")
        self.store, self.batch_size, self.clip_length, self.seed = store, batch_size, clip_length, seed
        self.tokens, self.actions = tokens, actions
        self.clips = store.clips(clip_length + (actions is not None), stride=clip_length if tokens else 1)
        local = batch_size // world_size
        self._slice = range(rank * local, (rank + 1) * local)

    def batch(self, step: int) -> Batch:
        """This rank's part of the batch of this step."""
        batch = self._empty()
        for row in range(len(self._slice)):
            self._read(batch, step, row)
        return batch

    def stream(
        self, start_step: int, stop_step: int, prefetch: int = 4, readers: int = 8
    ) -> Iterator[tuple[int, Batch]]:
        """(step, batch) of every step in the range; threads make up to `prefetch` of them ahead.

        A thread reads a clip at a time, so `readers` requests wait for a remote store at once; decompressing leaves the
        GIL. The order is the steps'. An error in a thread is raised here. The threads end with the iterator, however
        that ends.
        """
        with ThreadPoolExecutor(readers, thread_name_prefix="clips") as pool:
            ahead: deque[tuple[Batch, list[Future[None]]]] = deque()
            try:
                for step in range(start_step, stop_step):
                    while len(ahead) <= prefetch and step + len(ahead) < stop_step:
                        batch, rows = self._empty(), range(len(self._slice))
                        reads = [pool.submit(self._read, batch, step + len(ahead), row) for row in rows]
                        ahead.append((batch, reads))
                    batch, reads = ahead.popleft()
                    for read in reads:
                        read.result()
                    yield step, batch
            finally:
                pool.shutdown(cancel_futures=True)

    def _empty(self) -> Batch:
        shape = (len(self._slice), self.clip_length)
        return Batch(
            np.empty((*shape, *self.store.meta["frame_shape"]), np.uint8),
            np.empty((*shape, *self.tokens.meta["frame_shape"][:-1]), np.int64) if self.tokens else None,
            np.empty(shape, np.int64) if self.actions is not None else None,
        )

    def _read(self, batch: Batch, step: int, row: int) -> None:
        """Fills that row of the batch of this step."""
        epoch, position = divmod(step * self.batch_size + self._slice[row], len(self.clips))
        episode, start = self.clips[shuffled(position, len(self.clips), self.seed, epoch)]
        batch.frames_BTHWC[row] = self.store.frames(episode, start, self.clip_length)
        if self.tokens and batch.codes_BTNC is not None:
            batch.codes_BTNC[row] = _as_codes(self.tokens.frames(episode, start, self.clip_length))
        if self.actions is not None and batch.actions_BT is not None:
            batch.actions_BT[row] = self.actions[episode][start : start + self.clip_length]


def _as_codes(tokens_TNC2: NDArray[np.uint8]) -> NDArray[np.uint16]:
    """(..., 2) bytes as numbers, the lower byte first."""
    return tokens_TNC2.view("<u2")[..., 0]


def shuffled(position: int, size: int, seed: int, epoch: int) -> int:
    """Where a random permutation of range(size) sends `position`, without making the permutation.

    A Feistel network permutes the numbers of an even count of bits whatever its round function is; following it from a
    number below `size` until it comes back below `size` permutes range(size) (Black and Rogaway, 2002).
    """
    half = max((size - 1).bit_length() + 1, 2) // 2
    low = (1 << half) - 1
    keys = np.random.SeedSequence((seed, epoch)).generate_state(4, np.uint64).tolist()
    while True:
        left, right = position >> half, position & low
        for key in keys:
            left, right = right, left ^ (_mix(right ^ key) & low)
        position = left << half | right
        if position < size:
            return position


def _mix(x: int) -> int:
    """SplitMix64's finaliser: every bit of the input moves every bit of the output."""
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
    x = (x ^ x >> 27) * 0x94D049BB133111EB & 0xFFFFFFFFFFFFFFFF
    return x ^ x >> 31
