"""The vector quantizer of the tokenizer and of the latent action model (van den Oord et al., 2017)."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genie_model import collectives
from genie_model.chance import Chance
from genie_model.config import CodebookConfig

_ROWS = 2048  # latents that a CPU compares with the codebook at once
_OFFERED = 4  # latents for every code, among which a restart of "ema" chooses


class Quantized(NamedTuple):
    latents: Tensor  # (..., L), straight-through: values of the codes, gradients to the encoder
    codes: Tensor  # (...), int64
    loss: Tensor  # the commitment loss, and with `learn` by gradient the codebook loss: a scalar
    logs: dict[str, Tensor]  # `usage` (share of codes used) and `perplexity`, of this batch


class VectorQuantizer(nn.Module):
    """Nearest code; gradients pass straight through.

    Codes follow their latents in one of three ways (`learn`). In the first two, a code left with too few of them
    restarts at a latent that its own code serves badly (drawn by squared distance, as k-means++ does: restarts at plain
    random latents land where codes already are).

    - "kmeans": a memory of recent latents takes one Lloyd iteration a step. A latent is always judged by today's codes,
      so codes keep up while the encoder still moves fast. For few codes: all latents they rest on must fit the memory.
    - "ema": moving averages of the latents that each code served (van den Oord et al., 2017, App. A.1). They rest on
      many more latents, at no cost, and so generalise better where codes are many and the encoder changes slowly.
    - "gradient": the codebook loss of van den Oord et al. pulls codes to the latents they serve. Nothing restarts.

    With `normalised`, latents have unit variance: codes live on a sphere of radius sqrt(L) and nothing can shrink. Else
    distances between codes are those of the latents themselves.

    For the first `continuous_steps` latents pass unquantized while the codes follow, and over the next 100 they move to
    their codes: with nothing to say yet, a codebook of six collapses onto the most common latent and never lets the
    encoder find out more.
    """

    codebook_VL: Tensor
    memory_ML: Tensor  # kmeans
    count_V1: Tensor  # ema: latents served in a step
    sum_VL: Tensor  # ema: the sum of those latents
    steps: Tensor

    def __init__(self, config: CodebookConfig) -> None:
        super().__init__()
        self.config = config
        codebook_VL = self._normalise(torch.randn(config.num_codes, config.latent_dim))
        if config.learn == "gradient":
            self.codebook_VL = nn.Parameter(codebook_VL)
        else:
            self.register_buffer("codebook_VL", codebook_VL)
        if config.learn == "kmeans":
            self.register_buffer("memory_ML", self._normalise(torch.randn(config.memory, config.latent_dim)))
        elif config.learn == "ema":
            self.register_buffer("count_V1", torch.zeros(config.num_codes, 1))
            self.register_buffer("sum_VL", torch.zeros(config.num_codes, config.latent_dim))
        self.register_buffer("steps", torch.zeros(()))

    def embed(self, codes: Tensor) -> Tensor:
        """int64 (...) -> (..., L)."""
        return F.embedding(codes, self.codebook_VL)

    def encode(self, latents: Tensor) -> Tensor:
        """(..., L) -> int64 (...), the nearest codes."""
        with torch.autocast(latents.device.type, enabled=False):
            return self._nearest(self._normalise(latents.float().flatten(0, -2))).view(latents.shape[:-1])

    def forward(self, latents: Tensor, chance: Chance | None = None) -> Quantized:
        """The codes learn where `chance` is given, as it is in training.

        Distances and codes are float32 also under autocast: near codes differ in bits that bfloat16 drops.
        """
        with torch.autocast(latents.device.type, enabled=False):
            return self._quantize(latents, chance)

    def _quantize(self, latents: Tensor, chance: Chance | None) -> Quantized:
        flat_XL = self._normalise(latents.float().flatten(0, -2))
        quantized_share: Tensor | float = 1.0
        if chance is not None:
            self.steps += 1
            if self.config.learn == "kmeans":
                self._recluster(flat_XL.detach(), chance)
            quantized_share = ((self.steps - self.config.continuous_steps) / 100).clamp(0, 1)
        codes_X = self._nearest(flat_XL.detach())
        chosen_XL = self.embed(codes_X)
        counts_V1 = collectives.total(self._per_code(codes_X, torch.ones_like(flat_XL[:, :1])))
        if chance is not None and self.config.learn == "ema":
            self._follow(flat_XL.detach(), codes_X, chosen_XL, counts_V1, chance)
        loss = self.config.commitment * quantized_share * F.mse_loss(flat_XL, chosen_XL.detach())
        if self.config.learn == "gradient":
            loss = loss + F.mse_loss(chosen_XL, flat_XL.detach())
        straight_through = flat_XL + quantized_share * (chosen_XL - flat_XL).detach()
        share_V = counts_V1.squeeze(-1) / (len(codes_X) * collectives.processes())
        logs = {
            "usage": (share_V > 0).float().mean(),
            "perplexity": (-(share_V * (share_V + 1e-10).log()).sum()).exp(),
        }
        return Quantized(straight_through.view_as(latents), codes_X.view(latents.shape[:-1]), loss, logs)

    def _normalise(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, (self.config.latent_dim,)) if self.config.normalised else x

    def _nearest(self, x_XL: Tensor) -> Tensor:
        """The nearest code of each row; on a CPU a few rows at a time: the distances to all codes stay in its cache."""
        codebook_VL = self.codebook_VL.detach()
        bias_V, twice_LV = -codebook_VL.square().sum(-1), 2 * codebook_VL.T
        # max is three times as fast as argmax here
        chunks = torch.split(x_XL, _ROWS) if x_XL.device.type == "cpu" else (x_XL,)
        return torch.cat([torch.addmm(bias_V, chunk, twice_LV).max(-1).indices for chunk in chunks])

    def _per_code(self, codes_X: Tensor, x_XL: Tensor) -> Tensor:
        """The sum of the rows of each code: (V, L)."""
        return x_XL.new_zeros(self.config.num_codes, x_XL.shape[-1]).index_add_(0, codes_X, x_XL)

    @torch.no_grad()
    def _recluster(self, flat_XL: Tensor, chance: Chance) -> None:
        """One step of k-means on the memory, into which some of the batch's latents go first.

        At most a 64th of the memory: it must outlast the batch, or codes that this batch happens not to need are lost.
        """
        M, latents = self.config.memory, len(flat_XL) * collectives.processes()
        fresh = max(M // 64, 1)
        if latents > fresh:
            chosen_F = chance.rows_of_all("remembered", latents, fresh)
        else:
            chosen_F = torch.arange(latents, device=flat_XL.device)
        self.memory_ML.copy_(torch.cat([self.memory_ML, collectives.rows(flat_XL, chosen_F)])[-M:])
        codes_M = self._nearest(self.memory_ML)
        counts_V1 = self._per_code(codes_M, torch.ones_like(self.memory_ML[:, :1]))
        mean_VL = self._per_code(codes_M, self.memory_ML) / counts_V1.clamp_min(1)
        distance_M = (self.memory_ML - self.embed(codes_M)).square().sum(-1)
        restart_VL = self._badly_served(self.memory_ML, distance_M, chance)
        moved_VL = torch.lerp(mean_VL, self.codebook_VL, self.config.ema_decay)
        self.codebook_VL.copy_(torch.where(counts_V1 < self._least(M), restart_VL, moved_VL))

    @torch.no_grad()
    def _follow(self, flat_XL: Tensor, codes_X: Tensor, chosen_XL: Tensor, counts_V1: Tensor, chance: Chance) -> None:
        """Counts and sums take in the batch, after it was quantized; the averages start short and lengthen."""
        fresh = 1 - self.config.ema_decay * (self.steps - 1) / (self.steps + 9)
        self.count_V1.lerp_(counts_V1, fresh)
        self.sum_VL.lerp_(collectives.total(self._per_code(codes_X, flat_XL)), fresh)
        latents = len(flat_XL) * collectives.processes()
        least = self._least(latents)
        # Restarts choose among some of the batch's latents: of millions, all processes know those few.
        distance_X1 = (flat_XL - chosen_XL).square().sum(-1, keepdim=True)
        offered_F = chance.rows_of_all("offered", latents, _OFFERED * self.config.num_codes)
        offered_FM = collectives.rows(torch.cat([flat_XL, distance_X1], 1), offered_F)  # M = L + 1
        restart_VL = self._badly_served(offered_FM[:, :-1], offered_FM[:, -1], chance)
        poor_V1 = self.count_V1 < least
        # A new code has time to find its latents before it counts as poor again.
        self.count_V1.copy_(torch.where(poor_V1, 2 * least, self.count_V1))
        self.sum_VL.copy_(torch.where(poor_V1, 2 * least * restart_VL, self.sum_VL))
        self.codebook_VL.copy_(torch.where(self.count_V1 > 0, self.sum_VL / self.count_V1, self.codebook_VL))

    def _least(self, latents: int) -> float:
        """A code that serves fewer of so many latents is poor."""
        return self.config.min_share * latents / self.config.num_codes

    def _badly_served(self, x_XL: Tensor, distance_X: Tensor, chance: Chance) -> Tensor:
        """V of the latents, drawn by their squared distance to their codes: (V, L)."""
        shares_X = (distance_X + 1e-6).cumsum(0)
        drawn_V = chance.of_all("restarts", self.config.num_codes) * shares_X[-1]
        drawn_V = (shares_X <= drawn_V[:, None]).sum(1)  # searchsorted, which XLA does not know
        return x_XL[drawn_V.clamp_max(len(x_XL) - 1)]
