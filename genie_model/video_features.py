"""Features that a Frechet video distance compares. Each set's name goes into the metric's: they do not mix."""

from __future__ import annotations

import itertools

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from genie_model import cache


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


class I3DFeatures:
    """What published Frechet video distances compare (Unterthiner et al., 2018): I3D's, trained on Kinetics-400.

    The network is the TorchScript file that StyleGAN-V made of it (`i3d_torchscript.pt`), or one that is called alike:
    `network(x_BCTHW, rescale=False, resize=False, return_features=True)` with x in [-1, 1], 224 x 224 pixels. Here
    frames are resized bilinearly. Papers differ in that, in how many frames a clip has and in how many clips they
    compare, so name all three beside a distance. TorchScript holds code: only the file with the named checksum is run.
    """

    name = "i3d"

    def __init__(self, uri: str, sha256: str) -> None:
        """Raises ValueError when there is no such file, when it has another checksum, or when it is no TorchScript."""
        try:
            file = cache.fetch(uri, sha256.lower())
        except FileNotFoundError:
            raise ValueError(f"no I3D network at {uri}: check evaluation.i3d_uri") from None
        except cache.OtherBytesError:
            raise ValueError(f"the file at {uri} has another SHA-256 than evaluation.i3d_sha256={sha256}") from None
        if file is None:
            raise ValueError(f"the cache has no room for the I3D network at {uri}: raise GENIE_CACHE_BYTES")
        try:
            with file:
                self._network = torch.jit.load(file, map_location="cpu").eval()  # type: ignore[no-untyped-call]
        except RuntimeError as error:
            raise ValueError(f"the file at {uri} is no TorchScript: {str(error).splitlines()[0]}") from None

    @torch.inference_mode()
    def __call__(self, videos_BTHWC: NDArray[np.uint8]) -> NDArray[np.float64]:
        """Features (B, 400) of uint8 videos of at least 9 frames, which I3D's pooling needs."""
        features = []
        for video_THWC in videos_BTHWC:  # one at a time: 16 frames of 224 x 224 take a gigabyte of activations
            x_TCHW = torch.from_numpy(np.ascontiguousarray(video_THWC)).permute(0, 3, 1, 2).float() / 127.5 - 1
            x_TCHW = nn.functional.interpolate(x_TCHW, (224, 224), mode="bilinear")
            x_BCTHW = x_TCHW.transpose(0, 1)[None]
            features.append(self._network(x_BCTHW, rescale=False, resize=False, return_features=True))
        features_BD: NDArray[np.float64] = torch.cat(features).double().numpy()
        return features_BD
