"""On CUDA: what the CPU's tests hold, of the kernels and the captured graphs that only run there."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from variants import VARIANTS

from genie_model.backend import native
from genie_model.backend.graphs import GraphLauncher
from genie_model.backend.processes import Native
from genie_model.chance import Chance
from genie_model.config import ParallelConfig
from genie_model.data.loader import Batch
from genie_model.genie import Genie, PlayState
from genie_model.layers import TemporalCache
from genie_model.presets import get_preset

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
CONFIG = get_preset("tiny").with_overrides("sampling.maskgit_steps=3", "sampling.precision=fp32")


def model(*overrides: str) -> Genie:
    torch.manual_seed(0)
    return Genie(CONFIG.with_overrides(*overrides)).to(native.device()).eval()


@pytest.mark.parametrize("variant", VARIANTS)
def test_fused_attention_is_the_cpu_s(variant: str) -> None:
    genie = model(*VARIANTS[variant])
    x_BTHWC = torch.rand(2, 8, *genie.config.frame_shape)
    found = genie.tokenizer.decode(genie.tokenizer.encode(x_BTHWC.cuda()))
    codes_BTNC = genie.tokenizer.encode(x_BTHWC.cuda()).cpu()
    expected = genie.cpu().tokenizer.decode(codes_BTNC)
    torch.testing.assert_close(found.cpu(), expected, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("variant", VARIANTS)
def test_cached_equals_uncached(variant: str) -> None:
    genie = model(*VARIANTS[variant])
    dynamics, codebook_VL = genie.dynamics, genie.tokenizer.quantizer.codebook_VL
    past = TemporalCache()
    with torch.inference_mode():
        codes_BTNC = genie.tokenizer.encode(torch.rand(3, 8, *genie.config.frame_shape, device="cuda"))
        actions_BTL = torch.randn(3, 8, 32, device="cuda")
        for t in range(8):
            now, action = codes_BTNC[:, t : t + 1], actions_BTL[:, t : t + 1]
            cached = dynamics.hidden(now, action, codebook_VL, past)
            whole = dynamics.hidden(codes_BTNC[:, : t + 1], actions_BTL[:, : t + 1], codebook_VL)[:, -1:]
            torch.testing.assert_close(cached, whole, atol=1e-4, rtol=1e-4)
            dynamics.remember(now, action, codebook_VL, past)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("sampling", [(), ("sampling.choice=mean",), ("sampling.order=halton",)])
def test_a_captured_frame_is_the_launched_one(sampling: tuple[str, ...], precision: str) -> None:
    """Worlds of one age and of several, young and old, forked and joined: the same tokens and pictures."""
    genie = model(*sampling, f"sampling.precision={precision}")
    frames = torch.randint(0, 256, (2, 3, 64, 64, 3), dtype=torch.uint8)
    plain = genie.launch

    def play() -> list[torch.Tensor]:
        state, seen = genie.start(frames, seed=[3, 4]), []
        for t in range(12):
            seen.append(genie.step(state, torch.tensor([t % 4, 1])))
        genie.remember(state)
        young = genie.start(frames[:1], seed=5)
        both = PlayState.stack([state.fork(), young])
        for t in range(12):
            seen.append(genie.step(both, torch.tensor([t % 4, 1, 2])))
        seen.append(both.codes_BNC.cpu())
        seen.append(genie.step(state, torch.tensor([0, 1])))  # the fork went its own way
        return seen

    expected = play()
    genie.launch = GraphLauncher(genie)
    found = [play(), play()][-1]  # captured, and then replayed alone
    genie.launch = plain
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)
    assert {p.dtype for p in genie.parameters()} == {torch.float32}  # as before


def test_a_compiled_frame_is_the_launched_one_up_to_rounding() -> None:
    plain, compiled = model("sampling.order_noise=0", "sampling.temperature=0"), model("sampling.compile=true")
    compiled.config = plain.config.with_overrides("sampling.compile=true")
    compiled.launch = GraphLauncher(compiled)
    frames = torch.randint(0, 256, (2, 3, 64, 64, 3), dtype=torch.uint8)
    states = [genie.start(frames) for genie in (plain, compiled)]
    for t in range(3):
        a, b = (genie.step(state, torch.tensor([t, 1])) for genie, state in zip((plain, compiled), states, strict=True))
        assert (a.float() - b.float()).abs().mean() < 1


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("part", ["tokenizer", "genie"])
def test_a_captured_training_step_is_the_launched_one(part: str, precision: str) -> None:
    """Up to rounding: sums over codes add up in any order on CUDA, and what follows from it soon differs."""

    def losses(capture: bool) -> list[float]:
        genie = model("dynamics.corrupt_tokens=1", "dynamics.corrupt_by=drawn", "tokenizer.codebook.learn=ema")
        genie.tokenizer.requires_grad_(part == "tokenizer")
        module = genie.tokenizer if part == "tokenizer" else genie
        stage = CONFIG.train_world.model_copy(update={"precision": precision})
        backend = Native(ParallelConfig(capture=capture))
        optimizers, seen = backend.prepare(module, stage), []
        for step in range(5):
            clips = np.random.default_rng(step).integers(0, 256, (2, 8, 64, 64, 3), dtype=np.uint8)
            inputs, chance = backend.inputs(Batch(clips), Chance.of_step(0, step, 2))
            loss, logs = backend.gradients(module, inputs, chance, precision)
            norm = backend.clip(module, 1.0)
            optimizers.step()
            seen += [loss, norm, *logs.values()]  # each step's own, read at the end
        return [float(x) for x in seen]

    found, expected = losses(capture=True), losses(capture=False)
    assert len(set(found)) > 5 * 3
    np.testing.assert_allclose(found, expected, rtol=0.05 if precision == "bf16" else 0.01, atol=1e-3)


def test_a_training_step_moves_every_parameter() -> None:
    genie = model().train()
    frames = torch.rand(2, 8, 64, 64, 3, device="cuda")
    with native.autocast("bf16"):
        loss, _ = genie(frames, chance=Chance(*(key.cuda() for key in Chance.of_step(0, 0, 2))))
    loss.backward()
    named = [name for name, p in genie.named_parameters() if not name.startswith("tokenizer.")]
    assert named
    assert [name for name in named if not genie.get_parameter(name).grad.isfinite().all()] == []
