"""`python -m genie_model describe`: traced shapes agree with the real model."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from genie_model.__main__ import main
from genie_model.chance import Chance
from genie_model.describe import num_parameters, play_flops, short, training_cost
from genie_model.genie import Genie
from genie_model.large_decoder import LargeDecoder
from genie_model.presets import get_preset

CONFIG = get_preset("tiny")


def test_traced_flops_are_those_of_the_real_model() -> None:
    with FakeTensorMode():
        genie = Genie(CONFIG)
        genie.tokenizer.requires_grad_(False)
        traced, traced_play = training_cost(genie, CONFIG, 1, "fp32"), play_flops(genie, CONFIG)
    real = Genie(CONFIG)
    real.tokenizer.requires_grad_(False)
    real.train()
    with FlopCounterMode(display=False) as counter:
        real(torch.rand(1, CONFIG.data.clip_length, *CONFIG.frame_shape), chance=Chance.of_step(0, 0, 1))[0].backward()
    assert traced.flops == counter.get_total_flops()
    state = real.eval().start(torch.zeros(1, CONFIG.data.clip_length - 1, *CONFIG.frame_shape, dtype=torch.uint8))
    real.step(state, torch.zeros(1, dtype=torch.long))
    with FlopCounterMode(display=False) as counter:  # of a step in the middle: the frame before becomes past
        real.step(state, torch.zeros(1, dtype=torch.long))
    assert traced_play == counter.get_total_flops()


def test_activations_grow_with_the_batch_and_shrink_with_precision() -> None:
    with FakeTensorMode():
        tokenizer = Genie(CONFIG).tokenizer
        one, two = (training_cost(tokenizer, CONFIG, batch, "fp32").activation_bytes for batch in (1, 2))
        half = training_cost(tokenizer, CONFIG, 1, "bf16").activation_bytes
    assert two == 2 * one
    assert half < one


def test_describe_prints_the_tree_the_costs_and_the_paper(capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        main(["describe", "coinrun", "--set", "train_world.batch_size=1", "--set", "train_tokenizer.batch_size=1"]) == 0
    )
    printed = capsys.readouterr().out
    assert "num_layers=12 d_model=512 num_heads=8 head_dim=64" in printed
    assert "Tables 15, 16, 17" in printed
    rows = {line.split("  ")[0]: line.split() for line in printed.splitlines()}
    assert rows["all"][1] == "95.1M"
    assert len(rows["LAM + dynamics"]) == 9
    with FakeTensorMode():
        own = num_parameters(LargeDecoder(get_preset("coinrun")))
    assert f"larger decoder{short(own):>18}  beside it" in printed
    assert len(rows["larger decoder"]) == 8, "its training, too"


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["conrun"], "did you mean 'coinrun'"),
        (["coinrun", "--set", "lam.patchsize=3"], "did you mean 'lam.patch_size'"),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], why: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["describe", *arguments]) == 2
    error = capsys.readouterr().err
    assert why in error
    assert error.count("\n") == 1
