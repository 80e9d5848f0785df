"""The latent action model (section 2.1, Figure 5, App. C.1): finds the controls of a video nobody labelled."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from genie_model.config import LAMConfig
from genie_model.layers import STTransformer, patchify, unpatchify
from genie_model.quantizer import VectorQuantizer


class LatentActions(NamedTuple):
    codes_BT: Tensor  # (B, T-1) int64: entry t leads from frame t to frame t+1
    latents_BTL: Tensor  # (B, T-1, L), straight-through


class LatentActionModel(nn.Module):
    """The encoder sees x_1..t+1 and names what happened; the decoder must rebuild x_t+1 from x_1..t and that name."""

    def __init__(self, config: LAMConfig, frame_size: int, window: int) -> None:
        super().__init__()
        self.config, self.frame_size = config, frame_size
        pixels, patches = config.patch_size**2 * 3, (frame_size // config.patch_size) ** 2
        self.encoder_in = nn.Linear(pixels, config.encoder.d_model)
        self.encoder_position = nn.Parameter(0.02 * torch.randn(patches, config.encoder.d_model))
        self.encoder = STTransformer(config.encoder, window)
        self.to_latent = nn.Linear(config.encoder.d_model, config.codebook.latent_dim)
        self.quantizer = VectorQuantizer(config.codebook)
        self.action_in = nn.Linear(config.codebook.latent_dim, config.decoder.d_model)
        self.decoder_in = nn.Linear(pixels, config.decoder.d_model)
        self.decoder_position = nn.Parameter(0.02 * torch.randn(patches, config.decoder.d_model))
        self.decoder = STTransformer(config.decoder, window)
        self.patch_out = nn.Linear(config.decoder.d_model, pixels)

    def forward(self, x_BTHWC: Tensor) -> tuple[Tensor, LatentActions, dict[str, Tensor]]:
        """Loss, actions and logs of clips in [0, 1]."""
        patches = patchify(x_BTHWC, self.config.patch_size)
        actions, quantizer_loss, logs = self._infer(patches)
        predicted = self._predict(patches[:, :-1], actions.latents_BTL).float()
        target, previous = patches[:, 1:].float(), patches[:, :-1].float()
        error = (predicted - target).square().mean()
        copy_error = (previous - target).square().mean()
        logs |= {"mse": error, "mse_over_copy": error / (copy_error + 1e-6), "commitment": quantizer_loss}
        return error + quantizer_loss, actions, {name: value.detach() for name, value in logs.items()}

    def infer(self, x_BTHWC: Tensor) -> LatentActions:
        """The latent actions between the frames of clips in [0, 1]."""
        return self._infer(patchify(x_BTHWC, self.config.patch_size))[0]

    def predict(self, x_BTHWC: Tensor) -> Tensor:
        """Frames 2..T as the decoder rebuilds them, in [0, 1]."""
        patches = patchify(x_BTHWC, self.config.patch_size)
        predicted = self._predict(patches[:, :-1], self._infer(patches)[0].latents_BTL)
        return unpatchify(predicted.float(), self.config.patch_size, self.frame_size)

    def _infer(self, patches_BTNP: Tensor) -> tuple[LatentActions, Tensor, dict[str, Tensor]]:
        h_BTND = self.encoder_in(patches_BTNP)
        h_BTND = self.encoder(h_BTND + self.encoder_position.to(h_BTND.dtype))
        quantized = self.quantizer(self.to_latent(h_BTND[:, 1:].mean(2)))
        logs = {f"action_{name}": value for name, value in quantized.logs.items()}
        return LatentActions(quantized.codes, quantized.latents), quantized.loss, logs

    def _predict(self, patches_BTNP: Tensor, latents_BTL: Tensor) -> Tensor:
        h_BTND = self.decoder_in(patches_BTNP)
        action_BTD = self.action_in(latents_BTL.to(h_BTND.dtype))
        h_BTND = self.decoder(h_BTND + self.decoder_position.to(h_BTND.dtype) + action_BTD[:, :, None])
        return torch.sigmoid(self.patch_out(h_BTND))
