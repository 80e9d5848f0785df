"""Tokenizer, LAM and dynamics: what each may see, what trains what, and that nothing goes untrained."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from variants import VARIANTS

from genie_model import dynamics
from genie_model.chance import Chance
from genie_model.config import CodebookConfig, TransformerConfig
from genie_model.genie import Genie
from genie_model.lam import block_matching
from genie_model.layers import STTransformer, TemporalAttention
from genie_model.presets import get_preset
from genie_model.quantizer import VectorQuantizer
from genie_model.tokenizer import cosine_transform

CONFIG = get_preset("tiny")


@pytest.fixture(params=VARIANTS)
def genie(request: pytest.FixtureRequest) -> Genie:
    torch.manual_seed(0)
    return Genie(CONFIG.with_overrides(*VARIANTS[request.param]))


@pytest.fixture
def clips(genie: Genie) -> Tensor:
    return torch.rand(2, 6, *genie.config.frame_shape, generator=torch.Generator().manual_seed(1))


def untrained(module: nn.Module) -> list[str]:
    return [n for n, p in module.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]


def test_every_parameter_of_the_tokenizer_gets_a_gradient(genie: Genie, clips: Tensor) -> None:
    genie.tokenizer(clips)[0].backward()
    assert untrained(genie.tokenizer) == []


def test_every_parameter_of_lam_and_dynamics_gets_a_gradient(genie: Genie, clips: Tensor) -> None:
    genie.tokenizer.requires_grad_(False)
    genie.train()
    for step in range(3):  # output layers that start at zero hide their inputs' gradients for a step
        loss, _ = genie(clips, chance=Chance.of_step(0, step, 2))
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
        genie.lam.infer(genie.lam_input(changed))
    at_action = [z[:, 2] for z in latents]  # from frame 2 to frame 3
    assert not torch.allclose(at_action[0], at_action[1])
    torch.testing.assert_close(at_action[0], at_action[2])


def test_the_lam_decoder_sees_the_next_frame_through_the_action_alone(genie: Genie, clips: Tensor) -> None:
    genie.eval()
    genie.lam.quantizer.codebook_VL.data[:] = genie.lam.quantizer.codebook_VL.data[:1]  # one code: it can say nothing
    changed = clips.clone()
    changed[:, 3:] = 1 - changed[:, 3:]
    before, after = (genie.lam.predict(genie.lam_input(x))[:, :3] for x in (clips, changed))
    torch.testing.assert_close(before, after)


def test_dynamics_does_not_train_the_lam(genie: Genie, clips: Tensor) -> None:
    _, actions, _ = genie.lam(genie.lam_input(clips))
    codes = genie.tokenizer.encode(clips)
    loss, _ = genie.dynamics(codes, actions.latents_BTL, genie.tokenizer.quantizer.codebook_VL, Chance.of_step(0, 0, 2))
    loss.backward()
    assert all(p.grad is None for p in genie.lam.parameters())
    assert genie.dynamics.action_in.weight.grad is not None


def test_dynamics_is_causal_and_hears_the_action(genie: Genie, clips: Tensor) -> None:
    codes = genie.tokenizer.encode(clips)
    actions = torch.randn(2, 6, 32)
    codebook = genie.tokenizer.quantizer.codebook_VL
    base = genie.dynamics.hidden(codes, actions, codebook)
    other = actions.clone()
    other[:, 3] += 1
    heard = genie.dynamics.hidden(codes, other, codebook)
    torch.testing.assert_close(base[:, :3], heard[:, :3])
    assert not torch.allclose(base[:, 3], heard[:, 3])


def test_the_loss_counts_masked_tokens_of_later_frames_only(genie: Genie, clips: Tensor) -> None:
    codes = genie.tokenizer.encode(clips)
    seen: list[Tensor] = []
    genie.dynamics.token_in.register_forward_hook(lambda module, args, output: seen.append(args[0]))
    rates = []
    for seed in range(40):
        genie.dynamics(codes, torch.zeros(2, 5, 32), genie.tokenizer.quantizer.codebook_VL, Chance.of_step(seed, 0, 2))
        masked = (seen[-1] - genie.dynamics.slot_C) == genie.dynamics.mask_token
        assert not masked[:, 0].any()
        rates += masked[:, 1:].float().mean((1, 2, 3)).tolist()
    assert min(rates) > 0.4
    assert max(rates) <= 1.0
    assert 0.7 < sum(rates) / len(rates) < 0.8  # the mean of U[0.5, 1)


def test_corrupted_tokens_are_seen_but_never_the_target(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = Genie(CONFIG.with_overrides("dynamics.corrupt_tokens=0.4")).dynamics
    codes, seen, targets = torch.randint(16, (8, 6, 16, 4)), [], []
    model.token_in.register_forward_hook(lambda module, args, output: seen.append(args[0] - model.slot_C))
    loss = dynamics._MaskedCrossEntropy.apply
    monkeypatch.setattr(dynamics._MaskedCrossEntropy, "apply", lambda *args: (targets.append(args[3]), loss(*args))[1])
    model(codes, torch.zeros(8, 5, 32), torch.zeros(16, 32), Chance.of_step(0, 0, 8))
    known = seen[0] != model.mask_token
    wrong = (seen[0] != codes)[known].float().mean()
    assert 0.1 < wrong / (15 / 16) < 0.3  # the mean of U[0, 0.4), and one random code in 16 is the true one
    assert sorted(targets[0].flatten().tolist()) == sorted(codes[:, 1:].flatten().tolist())


def test_its_own_guesses_stand_in_for_frames_but_never_for_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = Genie(CONFIG.with_overrides("dynamics.corrupt_tokens=1", "dynamics.corrupt_by=own")).dynamics
    codes, guess = torch.randint(15, (8, 6, 16, 4)), 15  # a code that no frame has
    monkeypatch.setattr(dynamics, "nearest_to_mean", lambda log_probs, _: (log_probs[..., 0].long() * 0 + guess, None))
    seen: list[Tensor] = []
    model.token_in.register_forward_hook(lambda module, args, output: seen.append(args[0] - model.slot_C))
    model(codes, torch.zeros(8, 5, 32), torch.zeros(16, 32), Chance.of_step(0, 0, 8))
    asked, trained = seen
    whole = (asked == model.mask_token).flatten(2).all(-1)
    assert (whole.sum(1) == 2).all()  # half of the frames are guessed, at one glance,
    assert not whole[:, 0].any()
    assert (trained[:, 0] == codes[:, 0]).all()
    guessed = trained == guess
    assert guessed.flatten(2).any(-1).sum() > 10
    assert not guessed.flatten(2).any(-1)[~whole].any()  # and only they
    assert (trained[~guessed & (trained != model.mask_token)] == codes[~guessed & (trained != model.mask_token)]).all()


def test_guesses_are_drawn_as_often_as_they_are_likely() -> None:
    probs = torch.tensor([0.1, 0.0, 0.6, 0.3])
    drawn = dynamics.draw(probs.expand(20_000, 4), (torch.arange(20_000) + 0.5) / 20_000)
    torch.testing.assert_close(drawn.bincount(minlength=4) / 20_000, probs, atol=1e-4, rtol=0)


@pytest.mark.parametrize("by", ["own", "drawn"])
def test_guessing_takes_no_weight_s_gradient_away_under_autocast(by: str) -> None:
    model = Genie(CONFIG.with_overrides("dynamics.corrupt_tokens=1", f"dynamics.corrupt_by={by}")).dynamics
    with torch.autocast("cpu", torch.bfloat16):
        codes = torch.randint(16, (2, 6, 16, 4))
        loss, _ = model(codes, torch.randn(2, 5, 32), torch.randn(16, 32), Chance.of_step(0, 0, 2))
    loss.backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in model.parameters())


def test_time_is_attended_to_in_every_nth_block_alone() -> None:
    def layers(**fields: int) -> int:
        transformer = STTransformer(TransformerConfig(d_model=8, num_heads=1, head_dim=8, **fields), window=4)
        return sum(isinstance(layer, TemporalAttention) for layer in transformer.sublayers)

    assert [layers(num_layers=8, temporal_every=n) for n in (1, 2, 3, 4)] == [4, 2, 1, 1]
    with pytest.raises(ValueError, match="leaves no temporal attention in num_layers=8: at most 4"):
        layers(num_layers=8, temporal_every=5)
    with pytest.raises(ValueError, match="vit has no temporal_every"):
        CONFIG.with_overrides(
            "tokenizer.architecture=vit", "tokenizer.encoder.num_layers=4", "tokenizer.encoder.temporal_every=2"
        )


def test_the_masked_loss_is_torchs_cross_entropy(monkeypatch: pytest.MonkeyPatch) -> None:
    """In value, accuracy and every gradient, although it holds a few rows of logits at a time."""
    monkeypatch.setattr(dynamics, "_ROWS", 6)
    torch.manual_seed(0)
    hidden, layer = torch.randn(2, 8, 5, requires_grad=True), nn.Linear(5, 2 * 7)
    codes, weights = torch.randint(7, (2, 8, 2)), torch.rand(2, 8, 2)
    wanted = (hidden, layer.weight, layer.bias)
    loss, accuracy = dynamics._MaskedCrossEntropy.apply(*wanted, codes, weights)
    logits = layer(hidden).view(2, 8, 2, 7)
    reference = (F.cross_entropy(logits.movedim(-1, 1), codes, reduction="none") * weights).sum()
    torch.testing.assert_close(loss, reference)
    torch.testing.assert_close(accuracy, ((logits.argmax(-1) == codes) * weights).sum())
    for ours, theirs in zip(
        torch.autograd.grad(3 * loss, wanted), torch.autograd.grad(3 * reference, wanted), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


def test_dead_codes_revive() -> None:
    torch.manual_seed(0)
    quantizer = VectorQuantizer(CodebookConfig(num_codes=8, latent_dim=4, memory=1024, ema_decay=0.0))
    with torch.no_grad():
        quantizer.codebook_VL[:] = quantizer.codebook_VL[:1]  # collapsed: code 0 takes everything
    for step in range(90):
        out = quantizer(torch.randn(64, 4), Chance.of_step(0, step, 64))
    assert float(out.logs["usage"]) == 1.0
    assert float(out.logs["perplexity"]) > 5


def test_quantizer_passes_latents_first_and_codes_later() -> None:
    torch.manual_seed(0)
    config = CodebookConfig(num_codes=4, latent_dim=8, memory=1024, continuous_steps=10)
    quantizer = VectorQuantizer(config)
    latents = torch.randn(16, 8, requires_grad=True)
    early = quantizer(latents, Chance.of_step(0, 0, 16))
    torch.testing.assert_close(early.latents, torch.nn.functional.layer_norm(latents, (8,)))
    assert float(early.loss.detach()) == 0.0
    for step in range(120):
        late = quantizer(latents, Chance.of_step(0, step, 16))
    torch.testing.assert_close(late.latents, quantizer.embed(late.codes))
    assert float(late.loss.detach()) > 0.0
    late.latents.square().sum().backward()
    assert latents.grad is not None
    assert latents.grad.any()


@pytest.mark.parametrize("min_share", [0.05, 0.0])
def test_moving_averages_find_the_clusters_and_dead_codes_revive(min_share: float) -> None:
    torch.manual_seed(0)
    config = CodebookConfig(
        num_codes=16, latent_dim=4, learn="ema", ema_decay=0.9, normalised=False, min_share=min_share
    )
    quantizer, centres = VectorQuantizer(config), 10 + torch.randn(8, 4)
    for step in range(60):
        quantizer(centres[torch.randint(8, (256,))] + 0.02 * torch.randn(256, 4), Chance.of_step(0, step, 256))
    distance = torch.cdist(centres, quantizer.codebook_VL).amin(-1)
    assert torch.isfinite(quantizer.codebook_VL).all()
    assert (distance.max() < 0.05) == (min_share > 0)  # one code of the first draw is nearest to all


def test_latents_that_keep_their_scale_are_quantized_as_they_are() -> None:
    config = CodebookConfig(num_codes=4, latent_dim=2, normalised=False)
    quantizer = VectorQuantizer(config)
    quantizer.codebook_VL.copy_(torch.tensor([[0.0, 0.0], [10.0, 10.0], [0.0, 9.0], [3.0, 3.0]]))
    assert quantizer(torch.tensor([[8.0, 8.0], [4.0, 4.0], [-1.0, 6.0]])).codes.tolist() == [1, 3, 2]


def test_the_cosine_transform_is_orthonormal_and_starts_with_the_mean() -> None:
    basis = cosine_transform(4)
    torch.testing.assert_close(basis @ basis.T, torch.eye(48))
    torch.testing.assert_close(basis[0], torch.full((48,), 48**-0.5))


def test_a_tokenizer_of_squares_starts_by_showing_them() -> None:
    """Without what the transformers add, low frequencies come back as they went in."""
    tokenizer = Genie(CONFIG).tokenizer
    with torch.no_grad():
        tokenizer.to_latent.weight.zero_()
        tokenizer.patch_out.weight.zero_()
        ramp = torch.linspace(0, 1, 64)
        x_BTHWC = torch.stack([ramp[:, None].expand(64, 64), ramp.expand(64, 64), torch.full((64, 64), 0.3)], -1)
        shown = tokenizer.decode_latents(tokenizer._encode(x_BTHWC[None, None]))[0, 0]
        checkers = (torch.arange(64)[:, None] + torch.arange(64)).remainder(2).float()[..., None].expand(64, 64, 3)
        blurred = tokenizer.decode_latents(tokenizer._encode(checkers[None, None]))[0, 0]
    torch.testing.assert_close(shown, x_BTHWC, atol=0.02, rtol=0)
    torch.testing.assert_close(blurred, torch.full_like(checkers, 0.5), atol=0.1, rtol=0)


def test_quantizer_does_not_learn_without_chance() -> None:
    quantizer = VectorQuantizer(CodebookConfig(num_codes=8, latent_dim=4))
    before = quantizer.codebook_VL.clone()
    out = quantizer(torch.randn(16, 4))
    assert torch.equal(before, quantizer.codebook_VL)
    torch.testing.assert_close(out.latents, quantizer.embed(out.codes))


def test_block_matching_finds_a_shift() -> None:
    torch.manual_seed(0)
    frame = torch.rand(1, 1, 64, 64, 3)
    clip = torch.cat([frame, frame.roll((2, -1), (2, 3))], 1)  # 2 down, 1 left
    closeness = block_matching(clip, patch=16, rows=3, columns=2)
    assert closeness.shape == (1, 2, 16, 35)
    best = closeness[0, 1].argmax(-1)[[5, 6, 9, 10]]  # inner patches: the roll wraps at the border
    assert (best == (3 - 2) * 5 + (2 + 1)).all()
    window, target = frame[0, 0, 15:31, 17:33], clip[0, 1, 16:32, 16:32]  # row offset -1, column offset +1
    errors = -(window.mean(-1) - target.mean(-1)).square().mean().add(1e-4).log()
    others = closeness[0, 1, 5] - closeness[0, 1, 5, (3 - 1) * 5 + (2 + 1)] + errors
    assert float(others.max()) == pytest.approx(-np.log(1e-4), rel=1e-3)  # the true shift leaves no error at all
