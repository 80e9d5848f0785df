"""The dynamics model (section 2.1, Figure 7): a decoder-only MaskGIT over the tokens of the next frame."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genie_model.config import DynamicsConfig
from genie_model.layers import STTransformer, TemporalCache


class DynamicsModel(nn.Module):
    """Predicts the masked tokens of frame t from all earlier frames, the frame's own known tokens, and action t-1.

    Actions are added to every token of the frame they lead to, not concatenated (section 2.1). The first frame has
    none. A patch with C codes is one position of the transformer: their embeddings are summed, and C heads read it.
    """

    slot_C: Tensor

    def __init__(
        self,
        config: DynamicsConfig,
        num_codes: int,
        codes_per_patch: int,
        num_patches: int,
        action_dim: int,
        window: int,
    ) -> None:
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
        self.logits_out = nn.Linear(width, codes_per_patch * num_codes)

    def forward(self, codes_BTNC: Tensor, actions_BTL: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and logs. `actions_BTL` holds T-1 latents, stop-gradient here: the LAM learns from its own loss alone.

        Every clip draws one masking rate from U[min, max); its tokens of frames 2..T are masked independently at it.
        The paper masks all frames alike, so the past is never as whole as it is in play; `clean_frames` leaves that
        share of the frames unmasked.
        """
        low, high = self.config.mask_rate_min, self.config.mask_rate_max
        B = codes_BTNC.shape[0]
        rate_B = low + (high - low) * torch.rand(B, 1, 1, 1, device=codes_BTNC.device)
        mask_BTNC = torch.rand(codes_BTNC.shape, device=codes_BTNC.device) < rate_B
        dirty_BT11 = (
            torch.rand(codes_BTNC.shape[:2], device=codes_BTNC.device)[..., None, None] >= self.config.clean_frames
        )
        mask_BTNC = mask_BTNC & dirty_BT11
        mask_BTNC[:, 0] = False
        seen_BTNC = torch.where(mask_BTNC, self.mask_token, codes_BTNC)
        actions_BTL = F.pad(actions_BTL.detach(), (0, 0, 1, 0))
        logits_BTNCV = self.logits(self.hidden(seen_BTNC, actions_BTL)[:, 1:])
        loss_BTNC = F.cross_entropy(
            logits_BTNCV.float().flatten(0, -2), codes_BTNC[:, 1:].flatten(), reduction="none"
        ).view_as(codes_BTNC[:, 1:])
        weight_BTNC = mask_BTNC[:, 1:].float()
        weight_BTNC = weight_BTNC / weight_BTNC.sum().clamp_min(1)
        loss = (loss_BTNC * weight_BTNC).sum()
        # The true code's logit is the largest; bfloat16 argmax is ten times slower than max here.
        true_BTNC = logits_BTNCV.gather(-1, codes_BTNC[:, 1:, ..., None]).squeeze(-1)
        right_BTNC = (true_BTNC >= logits_BTNCV.amax(-1)).float()
        accuracy = (right_BTNC * weight_BTNC).sum()
        return loss, {"cross_entropy": loss.detach(), "masked_accuracy": accuracy.detach()}

    def hidden(
        self, codes_BTNC: Tensor, actions_BTL: Tensor, cache: TemporalCache | None = None, commit: bool = False
    ) -> Tensor:
        """Codes, `mask_token` where unknown, and the latents of the actions that led to each frame -> (B, T, N, D)."""
        tokens_BTND = self.token_in(codes_BTNC + self.slot_C).sum(-2) + self.position
        action_BTD = self.action_in(actions_BTL)  # under autocast in bfloat16, and so then is the residual stream
        hidden_BTND: Tensor = self.transformer(tokens_BTND.to(action_BTD.dtype) + action_BTD[:, :, None], cache, commit)
        return hidden_BTND

    def logits(self, hidden_BTND: Tensor) -> Tensor:
        """(..., D) -> (..., C, V)."""
        logits: Tensor = self.logits_out(hidden_BTND)
        return logits.reshape(*logits.shape[:-1], self.codes_per_patch, self.num_codes)
