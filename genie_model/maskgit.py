"""The MaskGIT sampler (Chang et al., 2022; section 2.2): all tokens of a frame in a fixed number of parallel steps."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from genie_model.config import SamplingConfig
from genie_model.dynamics import DynamicsModel, draw, nearest_to_mean
from genie_model.layers import TemporalCache


def sample_frame(
    dynamics: DynamicsModel,
    config: SamplingConfig,
    cache: TemporalCache,
    action_BL: Tensor,
    grid: tuple[int, int],
    codebook_VL: Tensor,
    chances_SBNC: Tensor,
) -> Tensor:
    """The next frame's codes (B, 1, N, C), given the past in `cache` and the action's latent; the cache is not changed.

    `grid` is the patches' rows and columns, N in all.

    Every step samples all unknown tokens, keeps those it is surest of and masks the rest again; the share that stays
    masked falls as a cosine. Confidence carries Gumbel noise that anneals to zero, else the surest, dullest tokens come
    first every time. Two other orders do without confidence: a random one, and the Halton sequence's (Besnier et al.,
    2025), in which the tokens of a step lie far apart, so that each tells the others most.

    With `choice` "mean" nothing is drawn: unsure whether a wall moved by one pixel or by two, it takes the code between
    them, of all codes the one with the least expected squared distance to the true one. A draw flickers, and the
    likeliest code may lie far off. Confidence is then minus that expected distance.

    `chances_SBNC` are `draw_chances`', used up one S after the other: what a world becomes does not hang on what is
    batched beside it, and nothing here waits for the host.
    """
    chances = iter(chances_SBNC)
    shape = (action_BL.shape[0], 1, math.prod(grid), dynamics.codes_per_patch)
    device = action_BL.device
    tokens = math.prod(shape[1:])
    last = config.temperature if config.last_temperature is None else config.last_temperature
    codes = torch.full(shape, dynamics.mask_token, device=device)
    weight_ED = dynamics.logits_weight(codebook_VL)
    for step in range(config.maskgit_steps):
        progress = (step + 1) / config.maskgit_steps
        temperature = config.temperature + (last - config.temperature) * step / max(config.maskgit_steps - 1, 1)
        logits = dynamics.logits(dynamics.hidden(codes, action_BL[:, None], codebook_VL, cache), weight_ED)
        logits = logits.float().div_(max(temperature, 1e-4))
        unknown = codes == dynamics.mask_token
        if config.choice == "mean":
            sampled, confidence = nearest_to_mean(logits.softmax(-1), codebook_VL)
        else:
            probs = logits.softmax(-1)
            sampled = draw(probs, next(chances)[:, None]) if temperature > 0 else logits.argmax(-1)
            confidence = probs.gather(-1, sampled[..., None]).squeeze(-1).log()
        sampled = torch.where(unknown, sampled, codes)
        masked_next = min(int(tokens * math.cos(progress * math.pi / 2)), tokens - step - 1)
        if masked_next <= 0:  # the last step keeps all
            codes = sampled
            break
        if config.order == "random":
            confidence = _gumbel(next(chances)).expand(shape)
        elif config.order == "halton":
            confidence = -_halton_rank(*grid, device)[:, None].expand(shape)
        elif config.order_noise > 0:
            confidence = confidence + config.order_noise * (1 - progress) * _gumbel(next(chances))
        confidence = torch.where(unknown, confidence, torch.inf)
        rank = confidence.flatten(1).argsort(-1).argsort(-1).view(shape)
        codes = torch.where(rank < masked_next, dynamics.mask_token, sampled)
    return codes


def draw_chances(config: SamplingConfig, tokens: tuple[int, int], generators: Sequence[torch.Generator]) -> Tensor:
    """All that a frame of N x C `tokens` leaves to chance: uniform, (S, B, N, C), of each world's own generator.

    One generator alone is for all worlds of a batch: B is 1 then.
    """
    drawn = config.choice != "mean" and max(config.temperature, config.last_temperature or 0.0) > 0
    ordered = config.order == "random" or (config.order == "confidence" and config.order_noise > 0)
    numbers = config.maskgit_steps * (drawn + ordered)
    return torch.stack([torch.rand(numbers, *tokens, generator=generator) for generator in generators], 1)


@functools.cache
def _halton_rank(rows: int, columns: int, device: torch.device) -> Tensor:
    """When each cell of the grid is first visited by the Halton sequence in bases 2 and 3: (rows * columns) float32."""
    seen: dict[int, None] = {}
    n = 0
    while len(seen) < rows * columns:
        n += 1
        seen.setdefault(int(_radical_inverse(n, 2) * rows) * columns + int(_radical_inverse(n, 3) * columns))
    return torch.tensor(list(seen)).argsort().float().to(device)


def _radical_inverse(n: int, base: int) -> float:
    """The digits of n mirrored at the point."""
    value, place = 0.0, 1.0
    while n:
        n, digit = divmod(n, base)
        place /= base
        value += digit * place
    return value


def _gumbel(uniform: Tensor) -> Tensor:
    return -(-(uniform[:, None] + 1e-10).log() + 1e-10).log()
