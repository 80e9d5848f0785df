"""Features that a Frechet video distance compares. Each set's name goes into the metric's: they do not mix."""

from __future__ import annotations

import itertools

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn


class Random3DFeatures:
    """A fixed random 3-D convolutional network: no weights to download, the same on every machine with one torch.

    Three convolutions over time and space with He-initialised weights from one seed; the features are the mean and the
    spread over time and space of each layer's activations, so all sizes of detail and motion count. Random features
    order degradations of one data set well, but nobody has calibrated them against human judgement, and their distances
    compare with no published one.
    """

    name = "random3d"

    def __init__(self, widths: tuple[int, ...] = (16, 32, 64), seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self._layers = [
            nn.init.kaiming_normal_(torch.empty(wide, narrow, 3, 3, 3), generator=generator)
            for narrow, wide in itertools.pairwise((3, *widths))
        ]

    @torch.inference_mode()
    def __call__(self, videos_BTHWC: NDArray[np.uint8]) -> NDArray[np.float64]:
        """Features (B, D) of uint8 videos of at least 8 x 8 pixels and any length."""
        videos_BTHWC = np.ascontiguousarray(videos_BTHWC)
        batches = [torch.from_numpy(videos_BTHWC[i : i + 16]) for i in range(0, len(videos_BTHWC), 16)]
        return np.concatenate([self._features(batch).double().numpy() for batch in batches])

    def _features(self, videos_BTHWC: Tensor) -> Tensor:
        x = videos_BTHWC.permute(0, 4, 1, 2, 3).float() / 127.5 - 1  # channels before time and space
        features = []
        for weight in self._layers:
            padded = nn.functional.pad(x, (1, 1, 1, 1, 1, 1), mode="replicate")
            x = nn.functional.conv3d(padded, weight, stride=(1, 2, 2)).relu()
            features += [x.mean((2, 3, 4)), x.std((2, 3, 4))]
        return torch.cat(features, dim=1)
