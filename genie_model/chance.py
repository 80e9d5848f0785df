"""Chance as an input: the random numbers of a training step are a pure function of keys that come with its batch.

So a step has the same numbers on every device, and each clip its own however many processes share the batch; nothing is
drawn in a forward pass, and nothing is carried from one step to the next.
"""

from __future__ import annotations

import zlib
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

_32 = (1 << 32) - 1


class Chance(NamedTuple):
    """What a module draws from in a step. Every use has a name, and so a stream of its own."""

    key: Tensor  # (), of the step: int64 of 62 random bits
    key_B: Tensor  # (B,), of each clip

    @staticmethod
    def of_step(seed: int, step: int, clips: int) -> Chance:
        """For the whole batch."""
        keys = np.random.SeedSequence((seed, step)).generate_state(1 + clips, np.uint64) >> 2
        drawn = torch.from_numpy(keys.astype(np.int64))
        return Chance(drawn[0], drawn[1:])

    @staticmethod
    def of_shapes(clips: int) -> Chance:
        """For a batch that is only traced."""
        return Chance(torch.zeros((), dtype=torch.long), torch.zeros(clips, dtype=torch.long))

    def of_clips(self, name: str, *shape: int) -> Tensor:
        """Uniform in [0, 1): float32 (B, *shape)."""
        return (_bits(self.key_B, name, shape) >> 8).float() * 2**-24

    def of_all(self, name: str, *shape: int) -> Tensor:
        """Uniform in [0, 1), the same for all that share the batch: float32 `shape`."""
        return (_bits(self.key, name, shape) >> 8).float() * 2**-24

    def codes_of_clips(self, name: str, below: int, *shape: int) -> Tensor:
        """Uniform in 0..below-1: int64 (B, *shape)."""
        return _bits(self.key_B, name, shape) * below >> 32

    def rows_of_all(self, name: str, below: int, count: int) -> Tensor:
        """Uniform in 0..below-1, the same for all that share the batch: int64 (count,)."""
        return _bits(self.key, name, (count,)) * below >> 32


def _bits(key: Tensor, name: str, shape: tuple[int, ...]) -> Tensor:
    """32 random bits for each place: a counter, hashed with both halves of the key."""
    places = torch.arange(int(np.prod(shape)), device=key.device).view(shape)
    key = key.view(*key.shape, *(1,) * len(shape))
    return _hash(_hash(places ^ (key & _32)) ^ (key >> 32) ^ zlib.crc32(name.encode()))


def _hash(x: Tensor) -> Tensor:
    """Of 32 bits, a permutation in which every bit of the input moves every bit of the output (hash-prospector).

    In int64, and with factors below 2^31: no product overflows, whatever an accelerator makes of one that does.
    """
    x = (x ^ x >> 16) * 0x21F0AAAD & _32
    x = (x ^ x >> 15) * 0x735A2D97 & _32
    return x ^ x >> 15
