"""The dynamics model (section 2.1, Figure 7): a decoder-only MaskGIT over the tokens of the next frame."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx

from genie_model import collectives
from genie_model.chance import Chance
from genie_model.config import DynamicsConfig
from genie_model.layers import STTransformer, TemporalCache, TokenLinear

_ROWS, _PARTS = 256, 4  # positions whose logits a CPU holds at once, and the parts in which other devices take all


class DynamicsModel(nn.Module):
    """Predicts the masked tokens of frame t from all earlier frames, the frame's own known tokens, and action t-1.

    Actions are added to every token of the frame they lead to, not concatenated (section 2.1), unless the config makes
    each a token of its frame. The first frame has none. A patch with C codes is one position of the transformer: their
    embeddings are summed, and C heads read it.

    With `code_vectors` the codebook enters too: a code's embedding and its row of the output are each the sum of one of
    its own (the paper's) and a linear map of its vector. So what is learnt of one code holds for all that look like it,
    rare ones too, and a token that is guessed wrong is at least close.
    """

    slot_C: Tensor

    def __init__(
        self,
        config: DynamicsConfig,
        num_codes: int,
        codes_per_patch: int,
        num_patches: int,
        code_dim: int,
        action_dim: int,
        window: int,
    ) -> None:
        """`code_dim` and `action_dim` are the lengths of the two codebooks' vectors."""
        super().__init__()
        self.config, self.num_codes, self.codes_per_patch = config, num_codes, codes_per_patch
        width = config.transformer.d_model
        self.mask_token, self._dirty_share = num_codes, 1 - config.clean_frames
        self.token_in = nn.Embedding(codes_per_patch * (num_codes + 1), width)
        nn.init.normal_(self.token_in.weight, std=0.02)
        self.register_buffer("slot_C", torch.arange(codes_per_patch) * (num_codes + 1), persistent=False)
        self.position = nn.Parameter(0.02 * torch.randn(num_patches, width))
        self.action_in = nn.Linear(action_dim, width, bias=False)
        self.transformer = STTransformer(config.transformer, window)
        if config.action == "token":
            self.action_position = nn.Parameter(0.02 * torch.randn(width))
        self.logits_out = TokenLinear(width, codes_per_patch * num_codes)
        if config.code_vectors:
            self.vectors_in = TokenLinear(codes_per_patch * code_dim, width, bias=False)
            self.vectors_out = TokenLinear(width, codes_per_patch * code_dim, bias=False)
            nn.init.orthogonal_(self.vectors_in.weight)
            nn.init.orthogonal_(self.vectors_out.weight)

    def forward(
        self, codes_BTNC: Tensor, actions_BTL: Tensor, codebook_VL: Tensor, chance: Chance
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and logs. `actions_BTL` holds T-1 latents, stop-gradient here: the LAM learns from its own loss alone.

        Every clip draws one masking rate from U[min, max); its tokens of frames 2..T are masked independently at it.
        The paper masks all frames alike, so the past is never as whole as it is in play; `clean_frames` leaves that
        share of a clip's frames unmasked.
        """
        low, high = self.config.mask_rate_min, self.config.mask_rate_max
        rate_B111 = low + (high - low) * chance.of_clips("mask rate", 1, 1, 1)
        mask_BTNC = chance.of_clips("mask", *codes_BTNC.shape[1:]) < rate_B111
        dirty_BK, dirty_BT11 = _some_frames(chance.of_clips("dirty", codes_BTNC.shape[1] - 1), self._dirty_share)
        mask_BTNC = mask_BTNC & dirty_BT11
        actions_BTL = F.pad(actions_BTL.detach(), (0, 0, 1, 0))
        known_BTNC = self._corrupt(codes_BTNC, actions_BTL, codebook_VL, chance)
        hidden_BTND = self.hidden(torch.where(mask_BTNC, self.mask_token, known_BTNC), actions_BTL, codebook_VL)
        hidden_BKND, codes_BKNC, weight_BKNC = (
            _take(x, dirty_BK) for x in (hidden_BTND, codes_BTNC, mask_BTNC.float())
        )
        weight_BKNC = weight_BKNC * collectives.processes() / collectives.total(weight_BKNC.sum()).clamp_min(1)
        loss, accuracy = _MaskedCrossEntropy.apply(  # type: ignore[no-untyped-call]
            hidden_BKND.flatten(1, 2),
            self.logits_weight(codebook_VL),
            self.logits_out.bias,
            codes_BKNC.flatten(1, 2),
            weight_BKNC.flatten(1, 2),
        )
        return loss, {"cross_entropy": loss.detach(), "masked_accuracy": accuracy}

    def hidden(
        self, codes_BTNC: Tensor, actions_BTL: Tensor, codebook_VL: Tensor, cache: TemporalCache | None = None
    ) -> Tensor:
        """Codes, `mask_token` where unknown, and the latents of the actions that led to each frame -> (B, T, N, D)."""
        hidden_BTND: Tensor = self.transformer(self._tokens(codes_BTNC, actions_BTL, codebook_VL), cache)
        return hidden_BTND[:, :, -self.position.shape[0] :]

    def remember(self, codes_BTNC: Tensor, actions_BTL: Tensor, codebook_VL: Tensor, cache: TemporalCache) -> None:
        """Frames become past: their keys and values go into the cache; what lies behind the last is not computed."""
        self.transformer.remember(self._tokens(codes_BTNC, actions_BTL, codebook_VL), cache)

    def _tokens(self, codes_BTNC: Tensor, actions_BTL: Tensor, codebook_VL: Tensor) -> Tensor:
        tokens_BTND: Tensor = self.token_in(codes_BTNC + self.slot_C).sum(-2) + self.position
        if self.config.code_vectors:
            vectors_BTNCL = F.embedding(codes_BTNC, F.pad(codebook_VL, (0, 0, 0, 1)))  # zero where masked
            tokens_BTND = tokens_BTND + self.vectors_in(vectors_BTNCL.flatten(-2))
        action_BTD = self.action_in(actions_BTL)  # under autocast in bfloat16, and so then is the residual stream
        tokens_BTND, action_BT1D = tokens_BTND.to(action_BTD.dtype), action_BTD[:, :, None]
        if self.config.action == "token":
            front_BT1D = action_BT1D + self.action_position.to(action_BTD.dtype)
            return torch.cat([front_BT1D, tokens_BTND], 2)
        tokens_BTND = tokens_BTND + action_BT1D
        return tokens_BTND

    def _corrupt(self, codes_BTNC: Tensor, actions_BTL: Tensor, codebook_VL: Tensor, chance: Chance) -> Tensor:
        """Some known tokens become wrong ones, so that errors in play's past are nothing new (Valevski et al., 2024).

        Those of all frames become random codes, or those of half of the frames the model's guesses, as play has them:
        the code nearest to their mean, or drawn.
        """
        if not self.config.corrupt_tokens:
            return codes_BTNC
        shape = codes_BTNC.shape[1:]
        rate_B111 = self.config.corrupt_tokens * chance.of_clips("corruption rate", 1, 1, 1)
        if self.config.corrupt_by == "random":
            wrong_BTNC = chance.codes_of_clips("wrong codes", self.num_codes, *shape)
        else:
            wrong_BTNC = self._dream(codes_BTNC, actions_BTL, codebook_VL, chance)
        return torch.where(chance.of_clips("corruption", *shape) < rate_B111, wrong_BTNC, codes_BTNC)

    @torch.no_grad()
    def _dream(self, codes_BTNC: Tensor, actions_BTL: Tensor, codebook_VL: Tensor, chance: Chance) -> Tensor:
        """The codes, but half of the frames after the first as the model now sees them come, at one glance.

        Where two of them follow each other, the second rests on what is only guessed, as in play.
        """
        dreamt_BK, dreamt_BT11 = _some_frames(chance.of_clips("dreamt", codes_BTNC.shape[1] - 1), 0.5)
        masked_BTNC = torch.where(dreamt_BT11, self.mask_token, codes_BTNC)
        hidden_BKND = _take(self.hidden(masked_BTNC, actions_BTL, codebook_VL), dreamt_BK)
        weight_ED = self.logits_weight(codebook_VL)
        uniform_BKNC = chance.of_clips("guesses", dreamt_BK.shape[1], *codes_BTNC.shape[2:])

        def guess(hidden_BND: Tensor, uniform_BNC: Tensor) -> Tensor:
            probs_BNCV = self.logits(hidden_BND, weight_ED).float().softmax(-1)
            if self.config.corrupt_by == "drawn":
                return draw(probs_BNCV, uniform_BNC)
            return nearest_to_mean(probs_BNCV, codebook_VL)[0]

        # a frame at a time: its logits stay in the CPU's cache
        guessed = map(guess, hidden_BKND.unbind(1), uniform_BKNC.unbind(1))
        guessed_BKNC = torch.stack(list(guessed), 1)
        torch.clear_autocast_cache()  # it holds the weights' casts without their graph (pytorch#112583)
        return codes_BTNC.scatter(1, dreamt_BK[:, :, None, None].expand_as(guessed_BKNC), guessed_BKNC)

    def logits(self, hidden_BTND: Tensor, weight_ED: Tensor) -> Tensor:
        """(..., D) -> (..., C, V), by the matrix that `logits_weight` makes."""
        logits = F.linear(hidden_BTND, weight_ED, self.logits_out.bias)
        return logits.view(*logits.shape[:-1], self.codes_per_patch, self.num_codes)

    def logits_weight(self, codebook_VL: Tensor) -> Tensor:
        """(C * V, D): one matrix for both parts, so that the logits, the largest of all, are written once."""
        if not self.config.code_vectors:
            return self.logits_out.weight
        vectors_CLD = self.vectors_out.weight.view(self.codes_per_patch, *codebook_VL.shape[1:], -1)
        return self.logits_out.weight + (codebook_VL @ vectors_CLD).flatten(0, 1)


def _some_frames(chance_BU: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """That share of each clip's frames, at random, never the first: which (B, K), and whether a frame is (B, T, 1, 1).

    As many in every clip and at every step, so that shapes do not change and every clip stays where it is.
    """
    B, U = chance_BU.shape
    frames_BK = chance_BU.argsort(dim=-1, stable=True)[:, : max(round(share * U), 1)] + 1
    chosen_BT = torch.zeros(B, U + 1, dtype=torch.bool, device=chance_BU.device).scatter(1, frames_BK, True)
    return frames_BK, chosen_BT[:, :, None, None]


def _take(x_BTNX: Tensor, frames_BK: Tensor) -> Tensor:
    """Those frames of each clip: (B, K, N, X). All that `_some_frames` could choose are taken as they lie."""
    if frames_BK.shape[1] == x_BTNX.shape[1] - 1:
        return x_BTNX[:, 1:]
    return x_BTNX.gather(1, frames_BK[:, :, None, None].expand(-1, -1, *x_BTNX.shape[2:]))


def draw(probs: Tensor, uniform: Tensor) -> Tensor:
    """(..., V) -> (...): the code at which the cumulated probability passes a uniform number in [0, 1)."""
    cumulated = probs.cumsum(-1)
    passed = (cumulated[..., -1] * uniform)[..., None]
    if probs.device.type == "xla":  # which knows no searchsorted
        codes = (cumulated <= passed).sum(-1)
    else:
        codes = torch.searchsorted(cumulated, passed, right=True)[..., 0]
    return codes.clamp_max(probs.shape[-1] - 1)


def nearest_to_mean(probs: Tensor, codebook_VL: Tensor) -> tuple[Tensor, Tensor]:
    """Of a distribution over codes (..., V), the code nearest to the mean of their vectors: (...), int64.

    Of all codes it has the least expected squared distance to the true one. Also minus that distance.
    """
    with torch.autocast(probs.device.type, enabled=False):  # near codes differ in bits that bfloat16 drops
        length_V = codebook_VL.square().sum(-1)
        mean_XL = (probs @ codebook_VL).flatten(0, -2)
        closeness, codes = torch.addmm(-length_V, 2 * mean_XL, codebook_VL.T).view_as(probs).max(-1)
        return codes, closeness - probs @ length_V


def _positions_at_once(B: int, X: int, device_type: str) -> int:
    """Of each clip's X."""
    return max(_ROWS // B, 1) if device_type == "cpu" else -(-X // _PARTS)


class _MaskedCrossEntropy(torch.autograd.Function):
    """The weighted cross-entropy of a linear layer's outputs, and their weighted accuracy.

    Logits are the largest tensors of the model (V times its tokens). Here they live a few positions of every clip at a
    time and their gradient is taken on the spot, so they never leave the CPU's cache, nor fill an accelerator's memory.
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx, hidden_BXD: Tensor, weight_ED: Tensor, bias_E: Tensor, codes_BXC: Tensor, weight_BXC: Tensor
    ) -> tuple[Tensor, Tensor]:
        """E = C * V outputs; each of the C groups of a position names one code."""
        B, X, _ = hidden_BXD.shape
        rows = _positions_at_once(B, X, hidden_BXD.device.type)
        loss, right = hidden_BXD.new_zeros((), dtype=torch.float32), hidden_BXD.new_zeros((), dtype=torch.float32)
        cast_ED, bias_E = weight_ED.to(hidden_BXD.dtype), bias_E.to(hidden_BXD.dtype)
        hidden_grad, weight_grad, bias_grad = [], torch.zeros_like(weight_ED), torch.zeros_like(weight_ED[:, 0])
        for part in zip(*(torch.split(x, rows, 1) for x in (hidden_BXD, codes_BXC, weight_BXC)), strict=True):
            hidden, codes, weight = (x.flatten(0, 1) for x in part)
            logits_XCV = torch.addmm(bias_E, hidden, cast_ED.T).view(*codes.shape, -1).float()
            log_probs_XCV = logits_XCV.log_softmax(-1)
            true_XC1 = log_probs_XCV.gather(-1, codes[..., None])
            loss -= (true_XC1[..., 0] * weight).sum()
            right += ((true_XC1[..., 0] >= log_probs_XCV.amax(-1)) * weight).sum()
            grad_XCV = log_probs_XCV.exp_()
            grad_XCV.scatter_add_(-1, codes[..., None], -torch.ones_like(true_XC1))
            grad_XE = grad_XCV.mul_(weight[..., None]).flatten(1).to(hidden.dtype)
            hidden_grad.append((grad_XE @ cast_ED).view(B, -1, hidden.shape[-1]))
            weight_grad += grad_XE.T @ hidden
            bias_grad += grad_XCV.flatten(1).sum(0)
        ctx.save_for_backward(torch.cat(hidden_grad, 1), weight_grad, bias_grad)
        ctx.mark_non_differentiable(right)
        return loss, right

    @staticmethod
    def backward(ctx: Any, loss_grad: Tensor, right_grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden_grad, weight_grad, bias_grad = ctx.saved_tensors
        return hidden_grad * loss_grad.to(hidden_grad.dtype), weight_grad * loss_grad, bias_grad * loss_grad, None, None
