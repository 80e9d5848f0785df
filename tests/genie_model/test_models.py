"""Tokenizer, LAM and dynamics: what each may see, what trains what, and that nothing goes untrained."""

import pytest
import torch
from torch import Tensor, nn

from genie_model.config import CodebookConfig
from genie_model.genie import Genie
from genie_model.presets import get_preset
from genie_model.quantizer import VectorQuantizer

CONFIG = get_preset("tiny")


@pytest.fixture
def genie() -> Genie:
    torch.manual_seed(0)
    return Genie(CONFIG)


@pytest.fixture
def clips() -> Tensor:
    return torch.rand(2, 6, 64, 64, 3, generator=torch.Generator().manual_seed(1))


def untrained(module: nn.Module) -> list[str]:
    return [n for n, p in module.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]


def test_every_parameter_of_the_tokenizer_gets_a_gradient(genie: Genie, clips: Tensor) -> None:
    genie.tokenizer(clips)[0].backward()
    assert untrained(genie.tokenizer) == []


def test_every_parameter_of_lam_and_dynamics_gets_a_gradient(genie: Genie, clips: Tensor) -> None:
    genie.tokenizer.requires_grad_(False)
    genie.train()
    for _ in range(3):  # output layers that start at zero hide their inputs' gradients for a step
        loss, _ = genie(clips)
        genie.zero_grad()
        loss.backward()
        with torch.no_grad():
            for p in genie.parameters():
                p -= 0.01 * p.grad if p.grad is not None else 0.0
    assert untrained(genie) == []
    assert all(p.grad is None for p in genie.tokenizer.parameters())


def test_codes_see_the_past_only(genie: Genie, clips: Tensor) -> None:
    changed = clips.clone()
    changed[:, 4:] = 1 - changed[:, 4:]
    before, after = genie.tokenizer._encode(clips), genie.tokenizer._encode(changed)
    torch.testing.assert_close(before[:, :4], after[:, :4])
    assert not torch.allclose(before[:, 4], after[:, 4])


def test_the_action_sees_the_next_frame_and_no_later_one(genie: Genie, clips: Tensor) -> None:
    genie.eval()
    latents = []
    genie.lam.to_latent.register_forward_hook(lambda module, args, output: latents.append(output))
    for frame in (None, 3, 4):
        changed = clips.clone()
        if frame is not None:
            changed[:, frame] = 1 - changed[:, frame]
        genie.lam.infer(changed)
    at_action = [z[:, 2] for z in latents]  # from frame 2 to frame 3
    assert not torch.allclose(at_action[0], at_action[1])
    torch.testing.assert_close(at_action[0], at_action[2])


def test_the_lam_decoder_sees_the_next_frame_through_the_action_alone(genie: Genie, clips: Tensor) -> None:
    genie.eval()
    genie.lam.quantizer.codebook[:] = genie.lam.quantizer.codebook[:1]  # one code: it can say nothing
    changed = clips.clone()
    changed[:, 3:] = 1 - changed[:, 3:]
    torch.testing.assert_close(genie.lam.predict(clips)[:, :3], genie.lam.predict(changed)[:, :3])


def test_dynamics_does_not_train_the_lam(genie: Genie, clips: Tensor) -> None:
    _, actions, _ = genie.lam(clips)
    codes = genie.tokenizer.encode(clips)
    loss, _ = genie.dynamics(codes, actions.latents_BTL)
    loss.backward()
    assert all(p.grad is None for p in genie.lam.parameters())
    assert genie.dynamics.action_in.weight.grad is not None


def test_dynamics_is_causal_and_hears_the_action(genie: Genie, clips: Tensor) -> None:
    codes = genie.tokenizer.encode(clips)
    actions = torch.randn(2, 6, 32)
    base = genie.dynamics.hidden(codes, actions)
    other = actions.clone()
    other[:, 3] += 1
    heard = genie.dynamics.hidden(codes, other)
    torch.testing.assert_close(base[:, :3], heard[:, :3])
    assert not torch.allclose(base[:, 3], heard[:, 3])


def test_the_loss_counts_masked_tokens_of_later_frames_only(genie: Genie, clips: Tensor) -> None:
    codes = genie.tokenizer.encode(clips)
    seen: list[Tensor] = []
    genie.dynamics.token_in.register_forward_hook(lambda module, args, output: seen.append(args[0]))
    rates = []
    for seed in range(40):
        torch.manual_seed(seed)
        genie.dynamics(codes, torch.zeros(2, 5, 32))
        masked = (seen[-1] - genie.dynamics.slot_C) == genie.dynamics.mask_token
        assert not masked[:, 0].any()
        rates += masked[:, 1:].float().mean((1, 2, 3)).tolist()
    assert min(rates) > 0.4
    assert max(rates) <= 1.0
    assert 0.7 < sum(rates) / len(rates) < 0.8  # the mean of U[0.5, 1)


def test_quantizer_is_straight_through_and_revives_dead_codes() -> None:
    torch.manual_seed(0)
    quantizer = VectorQuantizer(CodebookConfig(num_codes=8, latent_dim=4, revive_after=3)).train()
    latents = torch.randn(64, 4, requires_grad=True)
    with torch.no_grad():
        quantizer.codebook[:] = quantizer.codebook[:1]  # collapsed: code 0 takes everything
    out = quantizer(latents)
    out.latents.sum().backward()
    assert latents.grad is not None
    assert float(out.logs["usage"]) == 1 / 8
    torch.testing.assert_close(out.latents.detach(), quantizer.embed(out.codes), atol=1e-5, rtol=0.5)
    for _ in range(12):
        out = quantizer(torch.randn(64, 4))
    assert float(out.logs["usage"]) == 1.0


def test_quantizer_does_not_learn_in_evaluation() -> None:
    quantizer = VectorQuantizer(CodebookConfig(num_codes=8, latent_dim=4)).eval()
    before = quantizer.codebook.clone()
    quantizer(torch.randn(16, 4))
    assert torch.equal(before, quantizer.codebook)
