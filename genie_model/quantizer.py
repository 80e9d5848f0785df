"""The vector quantizer of the tokenizer and of the latent action model (van den Oord et al., 2017)."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genie_model.config import CodebookConfig

_ROWS = 2048  # latents compared with the codebook at once


class Quantized(NamedTuple):
    latents: Tensor  # (..., L), straight-through: values of the codes, gradients to the encoder
    codes: Tensor  # (...), int64
    loss: Tensor  # the commitment loss, a scalar
    logs: dict[str, Tensor]  # `usage` (share of codes used) and `perplexity`, of this batch


class VectorQuantizer(nn.Module):
    """Nearest code, by k-means over the latents of the last steps; gradients pass straight through.

    - Latents are normalised to unit variance, so codes live on a sphere of radius sqrt(L) and nothing can shrink.
    - Codes do not learn by gradient. A memory of recent latents takes one Lloyd iteration a step: a latent is always
      judged by today's codes, which a plain moving average does not do while the encoder still moves fast.
    - A code left with too few latents restarts at one that its own code serves badly (drawn by squared distance, as
      k-means++ does). Restarts at plain random latents land where the codes already are.
    - For the first `continuous_steps` latents pass unquantized while the codes follow: with nothing to say yet, a
      codebook of six collapses onto the most common latent and never lets the encoder find out more.
    """

    codebook_VL: Tensor
    memory_ML: Tensor
    steps: Tensor

    def __init__(self, config: CodebookConfig) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("codebook_VL", self._normalise(torch.randn(config.num_codes, config.latent_dim)))
        self.register_buffer("memory_ML", self._normalise(torch.randn(config.memory, config.latent_dim)))
        self.register_buffer("steps", torch.zeros(()))

    def embed(self, codes: Tensor) -> Tensor:
        """int64 (...) -> (..., L)."""
        return F.embedding(codes, self.codebook_VL)

    def forward(self, latents: Tensor) -> Quantized:
        """Distances and codes are float32 also under autocast: near codes differ in bits that bfloat16 drops."""
        with torch.autocast(latents.device.type, enabled=False):
            return self._quantize(latents)

    def _quantize(self, latents: Tensor) -> Quantized:
        flat_XL = self._normalise(latents.float().flatten(0, -2))
        quantized_share = torch.ones(())
        if self.training:
            self._learn(flat_XL.detach())
            quantized_share = ((self.steps - self.config.continuous_steps) / 100).clamp(0, 1)
        codes_X = self._nearest(flat_XL.detach())
        chosen_XL = self.embed(codes_X)
        loss = self.config.commitment * quantized_share * F.mse_loss(flat_XL, chosen_XL)
        straight_through = flat_XL + quantized_share * (chosen_XL - flat_XL).detach()
        share_V = self._per_code(codes_X, torch.ones_like(flat_XL[:, :1])).squeeze(-1) / len(codes_X)
        logs = {
            "usage": (share_V > 0).float().mean(),
            "perplexity": (-(share_V * (share_V + 1e-10).log()).sum()).exp(),
        }
        return Quantized(straight_through.view_as(latents), codes_X.view(latents.shape[:-1]), loss, logs)

    def _normalise(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, (self.config.latent_dim,))

    def _nearest(self, x_XL: Tensor) -> Tensor:
        """The nearest code of each row, a few rows at a time: the distances to all codes stay in the CPU's cache."""
        bias_V, twice_LV = -self.codebook_VL.square().sum(-1), 2 * self.codebook_VL.T
        starts = range(0, len(x_XL), _ROWS)
        # max is three times as fast as argmax here
        return torch.cat([torch.addmm(bias_V, x_XL[i : i + _ROWS], twice_LV).max(-1).indices for i in starts])

    def _per_code(self, codes_X: Tensor, x_XL: Tensor) -> Tensor:
        """The sum of the rows of each code: (V, L)."""
        return x_XL.new_zeros(self.config.num_codes, x_XL.shape[-1]).index_add_(0, codes_X, x_XL)

    @torch.no_grad()
    def _learn(self, flat_XL: Tensor) -> None:
        """One step of k-means on the memory, into which some of the batch's latents go first.

        At most a 64th of the memory: it must outlast the batch, or codes that this batch happens not to need are lost.
        """
        self.steps += 1
        M = self.config.memory
        fresh = max(M // 64, 1)
        if flat_XL.shape[0] > fresh:
            flat_XL = flat_XL[torch.randint(flat_XL.shape[0], (fresh,), device=flat_XL.device)]
        self.memory_ML.copy_(torch.cat([self.memory_ML, flat_XL])[-M:])
        codes_M = self._nearest(self.memory_ML)
        counts_V1 = self._per_code(codes_M, torch.ones_like(self.memory_ML[:, :1]))
        mean_VL = self._per_code(codes_M, self.memory_ML) / counts_V1.clamp_min(1)
        distance_M = (self.memory_ML - self.embed(codes_M)).square().sum(-1)
        restart_VL = self.memory_ML[torch.multinomial(distance_M + 1e-6, self.config.num_codes, replacement=True)]
        poor_V1 = counts_V1 < self.config.min_share * M / self.config.num_codes
        moved_VL = torch.lerp(mean_VL, self.codebook_VL, self.config.ema_decay)
        self.codebook_VL.copy_(torch.where(poor_V1, restart_VL, moved_VL))
