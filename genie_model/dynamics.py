"""The dynamics model (section 2.1, Figure 7): a decoder-only MaskGIT over the tokens of the next frame."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx

from genie_model.config import DynamicsConfig
from genie_model.layers import STTransformer, TemporalCache, TokenLinear

_ROWS = 256  # positions whose logits are held at once


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
        self.mask_token = num_codes
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

    def forward(self, codes_BTNC: Tensor, actions_BTL: Tensor, codebook_VL: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and logs. `actions_BTL` holds T-1 latents, stop-gradient here: the LAM learns from its own loss alone.

        Every clip draws one masking rate from U[min, max); its tokens of frames 2..T are masked independently at it.
        The paper masks all frames alike, so the past is never as whole as it is in play; `clean_frames` leaves that
        share of the frames unmasked.
        """
        low, high = self.config.mask_rate_min, self.config.mask_rate_max
        B, T, device = *codes_BTNC.shape[:2], codes_BTNC.device
        rate_B = low + (high - low) * torch.rand(B, 1, 1, 1, device=device)
        mask_BTNC = torch.rand(codes_BTNC.shape, device=device) < rate_B
        # A fixed number of frames of the whole batch are masked, so that shapes do not change from step to step.
        dirty_F = _some_frames(B, T, 1 - self.config.clean_frames, device)
        mask_FNC = mask_BTNC.flatten(0, 1)[dirty_F]
        mask_BTNC = torch.zeros_like(mask_BTNC).flatten(0, 1).index_copy(0, dirty_F, mask_FNC).view_as(mask_BTNC)
        actions_BTL = F.pad(actions_BTL.detach(), (0, 0, 1, 0))
        seen_BTNC = torch.where(mask_BTNC, self.mask_token, self._corrupt(codes_BTNC, actions_BTL, codebook_VL))
        hidden_BTND = self.hidden(seen_BTNC, actions_BTL, codebook_VL)
        weight_XC = mask_FNC.flatten(0, 1).float()
        weight_XC = weight_XC / weight_XC.sum().clamp_min(1)
        loss, accuracy = _MaskedCrossEntropy.apply(  # type: ignore[no-untyped-call]
            hidden_BTND.flatten(0, 1)[dirty_F].flatten(0, 1),
            self.logits_weight(codebook_VL),
            self.logits_out.bias,
            codes_BTNC.flatten(0, 1)[dirty_F].flatten(0, 1),
            weight_XC,
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

    def _corrupt(self, codes_BTNC: Tensor, actions_BTL: Tensor, codebook_VL: Tensor) -> Tensor:
        """Some known tokens become wrong ones, so that errors in play's past are nothing new (Valevski et al., 2024).

        Those of all frames become random codes, or those of half of the frames the model's guesses.
        """
        if not self.config.corrupt_tokens:
            return codes_BTNC
        rate_B111 = self.config.corrupt_tokens * torch.rand(len(codes_BTNC), 1, 1, 1, device=codes_BTNC.device)
        if self.config.corrupt_by == "random":
            wrong_BTNC = torch.randint_like(codes_BTNC, self.num_codes)
        else:
            wrong_BTNC = self._dream(codes_BTNC, actions_BTL, codebook_VL)
        return torch.where(torch.rand(codes_BTNC.shape, device=codes_BTNC.device) < rate_B111, wrong_BTNC, codes_BTNC)

    @torch.no_grad()
    def _dream(self, codes_BTNC: Tensor, actions_BTL: Tensor, codebook_VL: Tensor) -> Tensor:
        """The codes, but half of the frames after the first as the model now sees them come, at one glance.

        Where two of them follow each other, the second rests on what is only guessed, as in play.
        """
        B, T = codes_BTNC.shape[:2]
        dreamt_F = _some_frames(B, T, 0.5, codes_BTNC.device)
        flat_FNC = codes_BTNC.flatten(0, 1)
        masked_BTNC = flat_FNC.index_fill(0, dreamt_F, self.mask_token).view_as(codes_BTNC)
        hidden_FND = self.hidden(masked_BTNC, actions_BTL, codebook_VL).flatten(0, 1)[dreamt_F]
        weight_ED = self.logits_weight(codebook_VL)
        guessed = [
            nearest_to_mean(self.logits(hidden_ND, weight_ED).float().softmax(-1), codebook_VL)[0]
            for hidden_ND in hidden_FND  # a frame at a time: its logits stay in the CPU's cache
        ]
        torch.clear_autocast_cache()  # it holds the weights' casts without their graph (pytorch#112583)
        return flat_FNC.index_copy(0, dreamt_F, torch.stack(guessed)).view_as(codes_BTNC)

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


def _some_frames(B: int, T: int, share: float, device: torch.device) -> Tensor:
    """That share of the B * T frames, at random, never a first one: indices into all of them, as many every time."""
    chosen_F = torch.randperm(B * (T - 1), device=device)[: max(round(share * B * (T - 1)), 1)]
    return chosen_F // (T - 1) * T + chosen_F % (T - 1) + 1


def nearest_to_mean(probs: Tensor, codebook_VL: Tensor) -> tuple[Tensor, Tensor]:
    """Of a distribution over codes (..., V), the code nearest to the mean of their vectors: (...), int64.

    Of all codes it has the least expected squared distance to the true one. Also minus that distance.
    """
    with torch.autocast(probs.device.type, enabled=False):  # near codes differ in bits that bfloat16 drops
        length_V = codebook_VL.square().sum(-1)
        mean_XL = (probs @ codebook_VL).flatten(0, -2)
        closeness, codes = torch.addmm(-length_V, mean_XL, codebook_VL.T, alpha=2).view_as(probs).max(-1)
        return codes, closeness - probs @ length_V


class _MaskedCrossEntropy(torch.autograd.Function):
    """The weighted cross-entropy of a linear layer's outputs, and their weighted accuracy.

    Logits are the largest tensors of the model (V times its tokens). Here they live a few rows at a time and their
    gradient is taken on the spot, so they never leave the CPU's cache, nor fill an accelerator's memory.
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx, hidden_XD: Tensor, weight_ED: Tensor, bias_E: Tensor, codes_XC: Tensor, weight_XC: Tensor
    ) -> tuple[Tensor, Tensor]:
        """E = C * V outputs; each of the C groups of a row names one code."""
        loss, right = hidden_XD.new_zeros((), dtype=torch.float32), hidden_XD.new_zeros((), dtype=torch.float32)
        cast_ED, bias_E = weight_ED.to(hidden_XD.dtype), bias_E.to(hidden_XD.dtype)
        hidden_grad, weight_grad, bias_grad = [], torch.zeros_like(weight_ED), torch.zeros_like(weight_ED[:, 0])
        for start in range(0, len(hidden_XD), _ROWS):
            hidden, codes, weight = (x[start : start + _ROWS] for x in (hidden_XD, codes_XC, weight_XC))
            logits_XCV = torch.addmm(bias_E, hidden, cast_ED.T).view(*codes.shape, -1).float()
            log_probs_XCV = logits_XCV.log_softmax(-1)
            true_XC1 = log_probs_XCV.gather(-1, codes[..., None])
            loss -= (true_XC1[..., 0] * weight).sum()
            right += ((true_XC1[..., 0] >= log_probs_XCV.amax(-1)) * weight).sum()
            grad_XCV = log_probs_XCV.exp_()
            grad_XCV.scatter_add_(-1, codes[..., None], -torch.ones_like(true_XC1))
            grad_XE = grad_XCV.mul_(weight[..., None]).flatten(1).to(hidden.dtype)
            hidden_grad.append(grad_XE @ cast_ED)
            weight_grad += grad_XE.T @ hidden
            bias_grad += grad_XCV.flatten(1).sum(0)
        ctx.save_for_backward(torch.cat(hidden_grad), weight_grad, bias_grad)
        ctx.mark_non_differentiable(right)
        return loss, right

    @staticmethod
    def backward(ctx: Any, loss_grad: Tensor, right_grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden_grad, weight_grad, bias_grad = ctx.saved_tensors
        return hidden_grad * loss_grad.to(hidden_grad.dtype), weight_grad * loss_grad, bias_grad * loss_grad, None, None
