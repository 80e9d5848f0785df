"""The latent action model (section 2.1, Figure 5, App. C.1): finds the controls of a video nobody labelled."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from genie_model import collectives
from genie_model.chance import Chance
from genie_model.config import LAMConfig
from genie_model.layers import PatchGrid, STTransformer
from genie_model.quantizer import VectorQuantizer


class LatentActions(NamedTuple):
    codes_BT: Tensor  # (B, T-1) int64: entry t leads from frame t to frame t+1
    latents_BTL: Tensor  # (B, T-1, L), straight-through


class LatentActionModel(nn.Module):
    """The encoder sees x_1..t+1 and names what happened; the decoder must rebuild x_t+1 from x_1..t and that name.

    The paper's is the default; tokens instead of pixels are its ablation (Table 2). What the other settings of
    LAMConfig are for: in a scrolling game a press of a button moves the picture by half a pixel and a fall by four.
    Plain squared error spends all codes on falls, a transformer over 16 x 16 patches takes long to see half a pixel at
    all, and longer to learn to move patches by it. So it may be shown how well shifted patches match, and may predict
    by shifting them.
    """

    def __init__(
        self, config: LAMConfig, height: int, width: int, window: int, num_tokens: int, token_dim: int
    ) -> None:
        """`num_tokens` of `token_dim` numbers make a frame where `config.inputs` are tokens."""
        super().__init__()
        self.config, self.grid = config, PatchGrid(height, width, config.patch_size)
        pixels, patches = config.patch_size**2 * 3, self.grid.num_patches
        if config.inputs == "tokens":
            pixels, patches = token_dim, num_tokens
        self.sees_motion = config.motion_rows + config.motion_columns > 0
        shifts = (2 * config.motion_rows + 1) * (2 * config.motion_columns + 1)
        seen = 2 * pixels + shifts if self.sees_motion else pixels
        self.encoder_in = nn.Linear(seen, config.encoder.d_model)
        self.encoder_position = nn.Parameter(0.02 * torch.randn(patches, config.encoder.d_model))
        self.encoder = STTransformer(config.encoder, window)
        self.to_latent = nn.Linear(config.encoder.d_model, config.codebook.latent_dim)
        self.quantizer = VectorQuantizer(config.codebook)
        self.action_in = nn.Linear(config.codebook.latent_dim, config.decoder.d_model)
        self.decoder_in = nn.Linear(seen, config.decoder.d_model)
        self.decoder_position = nn.Parameter(0.02 * torch.randn(patches, config.decoder.d_model))
        self.decoder = STTransformer(config.decoder, window)
        self.patch_out = nn.Linear(config.decoder.d_model, pixels)
        if config.predict == "motion":  # starts as a copy of the frame before, blurred
            nn.init.zeros_(self.patch_out.weight)
            nn.init.zeros_(self.patch_out.bias)
            self.shift_out = nn.Linear(config.decoder.d_model, shifts)
            # The camera moves all patches alike: an action may say so at once, not only through the transformer.
            self.action_shift = nn.Linear(config.codebook.latent_dim, shifts, bias=False)
            nn.init.zeros_(self.shift_out.weight)
            nn.init.zeros_(self.shift_out.bias)
            self.shift_out.bias.data[shifts // 2] = math.log(shifts)  # half the weight on no shift at all

    def forward(self, clips: Tensor, chance: Chance | None = None) -> tuple[Tensor, LatentActions, dict[str, Tensor]]:
        """Loss, actions and logs of clips in [0, 1] (B, T, H, W, 3), or of their tokens' vectors (B, T, N, C * L).

        The actions' codes learn where `chance` is given.
        """
        patches = self._patches(clips)
        seen = self._see(patches)
        actions, quantizer_loss, logs = self._infer(seen, chance)
        predicted = self._predict(patches[:, :-1], seen[:, :-1], actions.latents_BTL).float()
        target, previous = patches[:, 1:].float(), patches[:, :-1].float()
        error_BT = (predicted - target).square().mean((2, 3))
        copy_error_BT = (previous - target).square().mean((2, 3))
        error, copy_error = error_BT.mean(), copy_error_BT.mean()
        loss = error
        if self.config.loss == "relative":  # a step aside counts as much as a fall; where nothing moves, nothing counts
            loss = (error_BT / (copy_error_BT + 1e-3)).mean()
        mse_over_copy = collectives.mean(error) / (collectives.mean(copy_error) + 1e-6)
        logs |= {"mse": error, "mse_over_copy": mse_over_copy, "quantizer_loss": quantizer_loss}
        return loss + quantizer_loss, actions, {name: value.detach() for name, value in logs.items()}

    def infer(self, clips: Tensor) -> LatentActions:
        """The latent actions between the frames of clips, given as to `forward`."""
        return self._infer(self._see(self._patches(clips)))[0]

    def predict(self, clips: Tensor) -> Tensor:
        """Frames 2..T as the decoder rebuilds them, of the kind that was given."""
        patches = self._patches(clips)
        seen = self._see(patches)
        predicted = self._predict(patches[:, :-1], seen[:, :-1], self._infer(seen)[0].latents_BTL)
        return predicted.float() if self.config.inputs == "tokens" else self.grid.join(predicted.float())

    def _patches(self, clips: Tensor) -> Tensor:
        return clips if self.config.inputs == "tokens" else self.grid.cut(clips)

    def _see(self, patches_BTNP: Tensor) -> Tensor:
        """What both transformers see of every frame: its patches, and their motion since the frame before."""
        if not self.sees_motion:
            return patches_BTNP
        before = torch.cat([patches_BTNP[:, :1], patches_BTNP[:, :-1]], 1)
        x_BTHWC = self.grid.tile(patches_BTNP)
        matches = block_matching(x_BTHWC, self.config.patch_size, self.config.motion_rows, self.config.motion_columns)
        return torch.cat([patches_BTNP, patches_BTNP - before, matches], -1)

    def _infer(self, seen: Tensor, chance: Chance | None = None) -> tuple[LatentActions, Tensor, dict[str, Tensor]]:
        h_BTND = self.encoder_in(seen)
        h_BTND = self.encoder(h_BTND + self.encoder_position.to(h_BTND.dtype))
        quantized = self.quantizer(self.to_latent(h_BTND[:, 1:].mean(2)), chance)
        logs = {f"action_{name}": value for name, value in quantized.logs.items()}
        return LatentActions(quantized.codes, quantized.latents), quantized.loss, logs

    def _predict(self, patches_BTNP: Tensor, seen: Tensor, latents_BTL: Tensor) -> Tensor:
        h_BTND = self.decoder_in(seen)
        action_BTD = self.action_in(latents_BTL.to(h_BTND.dtype))
        h_BTND = self.decoder(h_BTND + self.decoder_position.to(h_BTND.dtype) + action_BTD[:, :, None])
        out_BTNP: Tensor = self.patch_out(h_BTND).float()
        if self.config.inputs == "tokens":
            return out_BTNP
        if self.config.predict == "motion":
            shifts_BTNS = self.shift_out(h_BTND) + self.action_shift(latents_BTL)[:, :, None]
            moved_BTNP = self._move(patches_BTNP, shifts_BTNS.float().softmax(-1))
            out_BTNP = out_BTNP + _logit(moved_BTNP)
        return torch.sigmoid(out_BTNP)

    def _move(self, patches_BTNP: Tensor, weights_BTNS: Tensor) -> Tensor:
        """Patches whose every pixel is the weighted mean of the pixels around it, S = shifts by rows and columns.

        Convolutional dynamic neural advection (Finn et al., 2016), a kernel for every patch.
        """
        P, rows, columns = self.config.patch_size, self.config.motion_rows, self.config.motion_columns
        frames_XCHW = self.grid.tile(patches_BTNP.float()).flatten(0, 1).movedim(-1, 1)
        padded = F.pad(frames_XCHW, (columns, columns, rows, rows), mode="replicate")
        windows = _windows(_windows(padded, 2, P + 2 * rows, P), 4, P + 2 * columns, P)
        windows_YCRS = rearrange(windows, "x c h r w s -> (x h w) c r s")
        kernels_YKL = weights_BTNS.reshape(-1, 2 * rows + 1, 2 * columns + 1)
        moved: Tensor = _Correlate.apply(windows_YCRS, kernels_YKL)  # type: ignore[no-untyped-call]
        return rearrange(moved, "y c p q -> y (p q c)").view_as(patches_BTNP)


def _logit(x: Tensor) -> Tensor:
    """torch.logit(x, eps=0.01), whose gradient XLA does not know."""
    x = x.clamp(0.01, 0.99)
    return (x / (1 - x)).log()


def _windows(x: Tensor, dim: int, size: int, stride: int) -> Tensor:
    """Cuts `dim` into (windows, size) as Tensor.unfold does, which XLA does not know; `size` follows at once."""
    places = torch.arange(0, x.shape[dim] - size + 1, stride, device=x.device)[:, None]
    places = places + torch.arange(size, device=x.device)
    windows = x.index_select(dim, places.flatten())
    return windows.view(*x.shape[:dim], *places.shape, *x.shape[dim + 1 :])


@torch.no_grad()
def block_matching(x_BTHWC: Tensor, patch: int, rows: int, columns: int) -> Tensor:
    """How well each grey patch matches the frame before, shifted by up to `rows` and `columns` pixels either way.

    (B, T, N, (2 rows + 1) * (2 columns + 1)): minus the log of the mean squared error, less its mean over the shifts.
    It is the classic motion search of video codecs, here a cross-correlation: |a - b|^2 = |a|^2 - 2ab + |b|^2.
    """
    with torch.autocast(x_BTHWC.device.type, enabled=False):
        B, T = x_BTHWC.shape[:2]
        grey = x_BTHWC.float().mean(-1)
        before = torch.cat([grey[:, :1], grey[:, :-1]], 1)
        now_X1PQ = rearrange(grey, "b t (h p) (w q) -> (b t h w) 1 p q", p=patch, q=patch)
        padded = F.pad(before, (columns, columns, rows, rows), mode="replicate")
        windows = _windows(_windows(padded, 2, patch + 2 * rows, patch), 4, patch + 2 * columns, patch)
        windows_1XRS = rearrange(windows, "b t h r w s -> 1 (b t h w) r s")
        offset_X = now_X1PQ.mean((1, 2, 3))  # taken from both: the differences below lose no digits
        windows_1XRS, now_X1PQ = windows_1XRS - offset_X[:, None, None], now_X1PQ - offset_X[:, None, None, None]
        product = F.conv2d(windows_1XRS, now_X1PQ, groups=len(now_X1PQ)) / patch**2
        rows_1XRS = F.avg_pool2d(windows_1XRS.square(), (patch, 1), stride=1)  # an axis at a time: fewer sums
        energy = F.avg_pool2d(rows_1XRS, (1, patch), stride=1)
        error_1XRS = energy - 2 * product + now_X1PQ.square().mean((1, 2, 3))[:, None, None]
        closeness = -(error_1XRS.clamp_min(0) + 1e-4).log().view(B, T, -1, (2 * rows + 1) * (2 * columns + 1))
        return closeness - closeness.mean(-1, keepdim=True)


class _Correlate(torch.autograd.Function):
    """(Y, C, R, S) windows, each correlated with a (Y, K, L) kernel of its own. Gradients go to the kernels alone."""

    @staticmethod
    def forward(ctx: Any, windows_YCRS: Tensor, kernels_YKL: Tensor) -> Tensor:
        ctx.save_for_backward(windows_YCRS)
        return _depthwise(windows_YCRS, kernels_YKL[:, None].expand(-1, windows_YCRS.shape[1], -1, -1))

    @staticmethod
    def backward(ctx: Any, grad_YCPQ: Tensor) -> tuple[None, Tensor]:
        (windows_YCRS,) = ctx.saved_tensors
        return None, _depthwise(windows_YCRS, grad_YCPQ).sum(1)


def _depthwise(x_YCRS: Tensor, kernels_YCKL: Tensor) -> Tensor:
    with torch.autocast(x_YCRS.device.type, enabled=False):
        channels = x_YCRS.float().flatten(0, 1)
        out = F.conv2d(channels[None], kernels_YCKL.float().flatten(0, 1)[:, None], groups=len(channels))[0]
        return out.view(*x_YCRS.shape[:2], *out.shape[1:])
