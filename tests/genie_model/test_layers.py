"""The ST-transformer: time is causal, and the past may be kept instead of computed again."""

import pytest
import torch

from genie_model.config import TransformerConfig
from genie_model.layers import PatchGrid, STTransformer, TemporalCache

CONFIG = TransformerConfig(num_layers=5, d_model=16, num_heads=2, head_dim=6)  # odd: ends on a lone spatial layer
WINDOW = 4


@pytest.fixture
def model() -> STTransformer:
    torch.manual_seed(0)
    return STTransformer(CONFIG, WINDOW)


def frames(T: int) -> torch.Tensor:
    return torch.randn(2, T, 3, 16, generator=torch.Generator().manual_seed(1))


def test_the_future_changes_nothing_before_it(model: STTransformer) -> None:
    x = frames(WINDOW)
    changed = x.clone()
    changed[:, 2] = torch.randn_like(changed[:, 2])
    before, after = model(x), model(changed)
    torch.testing.assert_close(before[:, :2], after[:, :2])
    assert (before[:, 2:] - after[:, 2:]).abs().amax((0, 2, 3)).gt(1e-3).all()


@pytest.mark.parametrize("prompt", [1, 2, 4, 7])
def test_cached_equals_uncached_also_past_the_window(model: STTransformer, prompt: int) -> None:
    x, cache = frames(11), TemporalCache()
    whole = model(x)
    parts = [model(x[:, :prompt], cache, commit=True)]
    for t in range(prompt, 11):
        model(torch.randn_like(x[:, :1]), cache)  # a look without commit leaves no trace
        parts.append(model(x[:, t : t + 1], cache, commit=True))
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-5, rtol=1e-5)
    assert all(k.shape[-2] == WINDOW for k, _ in cache.rings.values())


def test_a_fork_goes_its_own_way(model: STTransformer) -> None:
    x, cache = frames(4), TemporalCache()
    model(x[:, :2], cache, commit=True)
    fork = cache.fork()
    model(x[:, 3:], fork, commit=True)
    torch.testing.assert_close(model(x[:, 2:3], cache), model(x[:, :3])[:, 2:], atol=1e-5, rtol=1e-5)
    assert (cache.positions, fork.positions) == ([2, 2], [3, 3])


def test_positions_do_not_drift(model: STTransformer) -> None:
    """Rotary time sees differences only: frame 2,000 is what it is to a session that began a few frames before."""
    x, early, late = frames(2_000), TemporalCache(), TemporalCache()
    for t in range(2_000):
        last = model(x[:, t : t + 1], late, commit=True)
    seen = 2 * (WINDOW - 1) + 1  # two temporal layers
    torch.testing.assert_close(model(x[:, -seen:], early, commit=True)[:, -1:], last, atol=1e-3, rtol=1e-3)


def test_worlds_of_any_age_step_together(model: STTransformer) -> None:
    """Side by side in one pass, each at its own position, they are what they are alone; the others stay."""
    x, caches = frames(11), []
    for age in (1, 3, 9):
        caches.append(TemporalCache())
        model(x[:, :age], caches[-1], commit=True)
    table = TemporalCache.stack(caches)
    together = table.take([1, 2, 5])
    now = torch.cat([x[1:, 1:2], x[:1, 3:4], x[1:, 9:10]])
    found = model(now, together, commit=True)
    for cache, world, t, row in zip(caches, (1, 0, 1), (1, 3, 9), range(3), strict=True):
        alone = model(x[:, t : t + 1], cache.fork(), commit=True)[world]
        torch.testing.assert_close(found[row], alone, atol=1e-5, rtol=1e-5)
    assert table.positions == [1, 1, 3, 3, 9, 9]


@pytest.mark.parametrize(("height", "width", "num_patches"), [(8, 8, 4), (9, 16, 12), (5, 7, 4)])
def test_patches_round_trip_also_where_they_do_not_fit(height: int, width: int, num_patches: int) -> None:
    grid, x = PatchGrid(height, width, 4), torch.rand(2, 3, height, width, 3)
    patches = grid.cut(x)
    assert patches.shape == (2, 3, num_patches, 48)
    assert grid.num_patches == num_patches
    assert torch.equal(grid.join(patches), x)
    assert torch.equal(patches[0, 0, 0].view(4, 4, 3), x[0, 0, :4, :4])
    last = patches[0, 0, -1].view(4, 4, 3)[(height - 1) % 4 :, (width - 1) % 4 :]
    assert torch.equal(last, x[0, 0, -1, -1].expand_as(last)), "the last pixel goes on to the patch's end"
