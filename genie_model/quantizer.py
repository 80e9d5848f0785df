"""The vector quantizer of the tokenizer and of the latent action model (van den Oord et al., 2017)."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genie_model.config import CodebookConfig


class Quantized(NamedTuple):
    latents: Tensor  # (..., L), straight-through: values of the codes, gradients to the encoder
    codes: Tensor  # (...), int64
    loss: Tensor  # the commitment loss, a scalar
    logs: dict[str, Tensor]  # `usage` (share of codes used) and `perplexity`, of this batch


class VectorQuantizer(nn.Module):
    """Nearest code on the unit sphere; codes follow the encoder as a moving average, and none stays dead.

    Latents and codes are normalised (Yu et al., 2021), which alone keeps most of a small codebook in use. A code that
    no latent chose for `revive_after` steps restarts at a random latent of the batch: the known cure of collapse.
    """

    codebook: Tensor
    moving_sum: Tensor
    idle_steps: Tensor

    def __init__(self, config: CodebookConfig) -> None:
        super().__init__()
        self.config = config
        codes = F.normalize(torch.randn(config.num_codes, config.latent_dim), dim=-1)
        self.register_buffer("codebook", codes)
        self.register_buffer("moving_sum", codes.clone())
        self.register_buffer("idle_steps", torch.zeros(config.num_codes))

    def embed(self, codes: Tensor) -> Tensor:
        """int64 (...) -> (..., L)."""
        return F.embedding(codes, self.codebook)

    def forward(self, latents: Tensor) -> Quantized:
        """Distances and moving averages are float32 also under autocast: near codes differ in bits bfloat16 drops."""
        with torch.autocast(latents.device.type, enabled=False):
            return self._quantize(latents)

    def _quantize(self, latents: Tensor) -> Quantized:
        flat_ML = F.normalize(latents.float().flatten(0, -2), dim=-1)
        codes_M = (flat_ML.detach() @ self.codebook.T).argmax(-1)
        one_hot_MV = F.one_hot(codes_M, self.config.num_codes).float()
        counts_V = one_hot_MV.sum(0)
        chosen_ML = self.embed(codes_M)
        if self.training:
            self._follow(flat_ML.detach(), one_hot_MV, counts_V)
        loss = self.config.commitment * (flat_ML - chosen_ML).square().sum(-1).mean()
        share_V = counts_V / counts_V.sum()
        logs = {
            "usage": (counts_V > 0).float().mean(),
            "perplexity": (-(share_V * (share_V + 1e-10).log()).sum()).exp(),
        }
        straight_through = flat_ML + (chosen_ML - flat_ML).detach()
        return Quantized(straight_through.view_as(latents), codes_M.view(latents.shape[:-1]), loss, logs)

    @torch.no_grad()
    def _follow(self, flat_ML: Tensor, one_hot_MV: Tensor, counts_V: Tensor) -> None:
        used_V = counts_V > 0
        self.idle_steps.copy_(torch.where(used_V, 0.0, self.idle_steps + 1))
        dead_V1 = (self.idle_steps >= self.config.revive_after)[:, None]
        mean_VL = F.normalize(one_hot_MV.T @ flat_ML, dim=-1)
        decay = self.config.ema_decay
        moving_VL = torch.where(used_V[:, None], decay * self.moving_sum + (1 - decay) * mean_VL, self.moving_sum)
        restart_VL = flat_ML[torch.randint(flat_ML.shape[0], (self.config.num_codes,), device=flat_ML.device)]
        self.moving_sum.copy_(torch.where(dead_V1, restart_VL, moving_VL))
        self.idle_steps.copy_(torch.where(dead_V1[:, 0], 0.0, self.idle_steps))
        self.codebook.copy_(F.normalize(self.moving_sum, dim=-1))
