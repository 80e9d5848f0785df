"""The random features order what is done to a video by how much is done."""

import hashlib
import io
import itertools

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from genie_model import files
from genie_model.metrics import frechet_video_distance
from genie_model.video_features import I3DFeatures, Random3DFeatures

VIDEOS, TIME, SIZE = 32, 8, 32


@pytest.fixture(scope="module")
def videos():
    """Blocky textures that scroll at a steady speed of their own."""
    rng = np.random.default_rng(0)
    clips = []
    for _ in range(VIDEOS):
        texture = rng.integers(0, 256, (8, 24, 3), dtype=np.uint8).repeat(4, axis=0).repeat(4, axis=1)
        speed = rng.integers(2, 6)
        clips.append(np.stack([texture[:, t * speed : t * speed + SIZE] for t in range(TIME)]))
    return np.stack(clips)


def blur(videos, times):
    x = videos.astype(np.float64)
    for _ in range(times):
        for axis in (2, 3):
            x = (np.roll(x, 1, axis) + 2 * x + np.roll(x, -1, axis)) / 4
    return x.round().astype(np.uint8)


def noise(videos, amount):
    noisy = videos + 12.0 * amount * np.random.default_rng(1).normal(size=videos.shape)
    return noisy.clip(0, 255).astype(np.uint8)


def freeze(videos, frames):
    kept = TIME - 2 * frames
    return np.concatenate([videos[:, :kept], videos[:, kept - 1 : kept].repeat(2 * frames, axis=1)], axis=1)


def shuffle(videos, frames):
    moved = 2 * frames
    return (
        np.concatenate([videos[:, np.roll(np.arange(moved), moved // 2)], videos[:, moved:]], axis=1)
        if frames
        else videos
    )


@pytest.mark.parametrize("degrade", [blur, noise, freeze, shuffle])
def test_more_of_a_degradation_is_farther_from_the_real_videos(videos, degrade):
    features = Random3DFeatures()
    distances = [frechet_video_distance(videos, degrade(videos, amount), features) for amount in range(4)]
    assert distances[0] == pytest.approx(0, abs=1e-6)
    assert all(nearer < farther for nearer, farther in itertools.pairwise(distances)), distances


def test_features_are_the_same_each_time_and_another_network_is_another_metric(videos):
    np.testing.assert_array_equal(Random3DFeatures()(videos), Random3DFeatures()(videos))
    assert not np.allclose(Random3DFeatures(seed=1)(videos), Random3DFeatures()(videos))


def test_any_features_with_a_name_can_be_compared(videos):
    class Brightness:
        name = "brightness"

        def __call__(self, videos_BTHWC):
            return videos_BTHWC.mean(axis=(1, 2, 3)) / 255

    brighter = np.minimum(videos + 51.0, 306).astype(np.float64)  # by 0.2 in each of three channels
    assert frechet_video_distance(videos, brighter, Brightness()) == pytest.approx(3 * 0.2**2)


class Means(nn.Module):
    """Is called as the I3D is, and its features are known: the mean of each channel."""

    def forward(self, x: Tensor, rescale: bool = True, resize: bool = True, return_features: bool = False) -> Tensor:
        assert not rescale
        assert not resize
        assert return_features
        assert x.shape[1:] == (3, 16, 224, 224)
        return x.mean((2, 3, 4))


@pytest.fixture
def network(tmp_path, monkeypatch):
    """(uri, checksum) of a TorchScript file that lies where it must be downloaded from."""
    monkeypatch.setenv("GENIE_CACHE_DIR", str(tmp_path / "cache"))
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.script(Means()), buffer)
    uri = f"memory://{tmp_path.name}/i3d.pt"
    files.write_atomic(uri, buffer.getvalue())
    yield uri, hashlib.sha256(buffer.getvalue()).hexdigest()
    files.remove_tree(f"memory://{tmp_path.name}")


def test_i3d_is_downloaded_once_and_sees_large_frames_around_zero(network):
    videos = np.zeros((2, 16, 20, 20, 3), np.uint8)
    videos[1, ..., 2] = 255
    np.testing.assert_allclose(I3DFeatures(*network)(videos), [[-1, -1, -1], [-1, -1, 1]], atol=1e-6)
    files.remove_tree(network[0])
    np.testing.assert_allclose(I3DFeatures(*network)(videos[:1]), [[-1, -1, -1]], atol=1e-6)


def test_only_the_named_i3d_is_run(network, tmp_path):
    uri, _ = network
    with pytest.raises(ValueError, match="has another SHA-256"):
        I3DFeatures(uri, "0" * 64)
    with pytest.raises(ValueError, match="no I3D network at memory://nowhere"):
        I3DFeatures("memory://nowhere", "0" * 64)
    text = tmp_path / "text.pt"
    text.write_bytes(b"no network")
    with pytest.raises(ValueError, match="is no TorchScript"):
        I3DFeatures(str(text), hashlib.sha256(b"no network").hexdigest())
