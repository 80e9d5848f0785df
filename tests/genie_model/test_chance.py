"""A step's random numbers: uniform, the same again, of each clip its own, and by no clip's place in a process."""

import torch

from genie_model.chance import Chance


def test_numbers_are_uniform_and_streams_do_not_hang_together() -> None:
    chance = Chance.of_step(seed=1, step=2, clips=64)
    draws = [chance.of_clips(name, 4096).double() for name in ("one", "two")]
    draws.append(Chance.of_step(seed=1, step=3, clips=64).of_clips("one", 4096).double())
    for draw in draws:
        assert 0 <= draw.min() < 1e-4
        assert 0.9999 < draw.max() < 1
        counts = torch.histc(draw, 64, 0, 1)
        assert (counts - 4096).square().sum() / 4096 < 110  # chi-square, 63 degrees: 1 in 5,000
    for a, b in [(draws[0], draws[1]), (draws[0], draws[2]), (draws[0][:-1], draws[0][1:]), (draws[0].T, draws[1].T)]:
        assert torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1].abs() < 0.01
        assert not torch.equal(a, b)
    lagged = torch.corrcoef(torch.stack([draws[0][:, :-1].flatten(), draws[0][:, 1:].flatten()]))
    assert lagged[0, 1].abs() < 0.01
    assert chance.codes_of_clips("codes", 7, 100).unique().tolist() == list(range(7))
    assert chance.rows_of_all("rows", 5, 100).unique().tolist() == list(range(5))


def test_a_part_of_the_batch_has_its_own_clips_numbers() -> None:
    whole = Chance.of_step(seed=0, step=5, clips=8)
    part = Chance(whole.key, whole.key_B[4:])
    assert torch.equal(part.of_clips("mask", 3, 2), whole.of_clips("mask", 3, 2)[4:])
    assert torch.equal(part.of_all("restarts", 9), whole.of_all("restarts", 9))
    assert torch.equal(Chance.of_step(0, 5, 8).of_clips("mask", 3), whole.of_clips("mask", 3))
