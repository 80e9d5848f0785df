"""Genie: tokenizer, latent actions and dynamics as one world model, and its play."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from genie_model.config import Config
from genie_model.dynamics import DynamicsModel
from genie_model.lam import LatentActionModel
from genie_model.layers import TemporalCache
from genie_model.maskgit import sample_frame
from genie_model.tokenizer import VideoTokenizer


@dataclass
class PlayState:
    """A world in play: the pasts of both transformers, and what decides its chances."""

    seeds: tuple[int, ...]  # one for all worlds, or one for each
    t: int  # frames so far, prompt included
    frame_BHWC: Tensor  # uint8, the latest
    dynamics: TemporalCache = field(repr=False)
    decoder: TemporalCache = field(repr=False)

    def fork(self) -> PlayState:
        """A copy that may go another way. Cheap: what is past is shared."""
        return replace(self, dynamics=self.dynamics.fork(), decoder=self.decoder.fork())

    def repeat(self, times: int) -> PlayState:
        """`times` copies of every world side by side (B becomes B * times), to take another action in each."""
        return replace(
            self,
            seeds=self.seeds if len(self.seeds) == 1 else tuple(s for s in self.seeds for _ in range(times)),
            frame_BHWC=self.frame_BHWC.repeat_interleave(times, 0),
            dynamics=self.dynamics.repeat(times),
            decoder=self.decoder.repeat(times),
        )


class Genie(nn.Module):
    """The whole model. Training uses `forward`, play uses `start` and `step`.

    Outside, frames are uint8 on the CPU; what play keeps lies where the model is.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        (height, width, _), window = config.frame_shape, config.data.clip_length
        self.tokenizer = VideoTokenizer(config.tokenizer, height, width, window)
        self.lam = LatentActionModel(
            config.lam, height, width, window, self.tokenizer.num_patches, config.tokenizer.token_dim
        )
        self.dynamics = DynamicsModel(
            config.dynamics,
            num_codes=config.tokenizer.codebook.num_codes,
            codes_per_patch=config.tokenizer.codes_per_patch,
            num_patches=self.tokenizer.num_patches,
            code_dim=config.tokenizer.codebook.latent_dim,
            action_dim=config.lam.codebook.latent_dim,
            window=window,
        )

    def train(self, mode: bool = True) -> Genie:
        """The tokenizer stays in evaluation mode: it is frozen here, its moving codebook too."""
        super().train(mode)
        self.tokenizer.eval()
        return self

    def forward(self, x_BTHWC: Tensor, codes_BTNC: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """Co-training (section 2.1): LAM and dynamics in one step, the tokenizer frozen.

        Clips in [0, 1]; their codes, if known, are not computed again.
        """
        if codes_BTNC is None:
            with torch.no_grad():
                codes_BTNC = self.tokenizer.encode(x_BTHWC)
        lam_loss, actions, lam_logs = self.lam(self.lam_input(x_BTHWC, codes_BTNC))
        dynamics_loss, dynamics_logs = self.dynamics(
            codes_BTNC, actions.latents_BTL, self.tokenizer.quantizer.codebook_VL.detach()
        )
        logs = {f"lam/{name}": value for name, value in lam_logs.items()}
        logs |= {f"dynamics/{name}": value for name, value in dynamics_logs.items()}
        return lam_loss + dynamics_loss, logs

    @torch.no_grad()
    def start(self, frames_BTHWC: Tensor, seed: int | Sequence[int] = 0) -> PlayState:
        """Enters the world of a prompt: T >= 1 uint8 frames. The actions between several are inferred by the LAM.

        `seed` decides the chances: one for all worlds of the batch, or one for each (ValueError for another number).
        """
        seeds = (seed,) if isinstance(seed, int) else tuple(seed)
        if len(seeds) not in (1, len(frames_BTHWC)):
            raise ValueError(f"{len(seeds)} seeds for {len(frames_BTHWC)} worlds: give one, or one for each")
        frames_BTHWC = frames_BTHWC.to(self.device)
        actions_BTL = torch.zeros(*frames_BTHWC.shape[:2], self.config.lam.codebook.latent_dim, device=self.device)
        if frames_BTHWC.shape[1] > 1:
            actions_BTL[:, 1:] = self.lam.quantizer.embed(self.infer_actions(frames_BTHWC).to(self.device))
        state = PlayState(seeds, 0, frames_BTHWC[:, -1], TemporalCache(), TemporalCache())
        with self._play_precision():
            self._commit(state, self.tokenizer.encode(_to_unit(frames_BTHWC)), actions_BTL)
        return state

    @torch.no_grad()
    def step(self, state: PlayState, action_B: Tensor) -> Tensor:
        """Takes int64 actions in [0, |A|); returns, and makes the state's, the next uint8 frames (B, H, W, 3).

        A frame is a pure function of the prompt, the actions so far and its seed. Raises ValueError for an action
        out of range.
        """
        if not 0 <= int(action_B.min()) <= int(action_B.max()) < self.config.num_actions:
            raise ValueError(f"actions must be in 0..{self.config.num_actions - 1}, got {action_B.tolist()}")
        return self.advance(state, action_B.to(self.device)).cpu()

    def advance(self, state: PlayState, action_B: Tensor) -> Tensor:
        """`step` without a look at the actions' values: they, and the frames, are on the device."""
        action_BL = self.lam.quantizer.embed(action_B)
        chances = [torch.Generator().manual_seed((seed * 1_000_003 + state.t) % 2**63) for seed in state.seeds]
        with self._play_precision():
            codes_B1NC = sample_frame(
                self.dynamics,
                self.config.sampling,
                state.dynamics,
                action_BL,
                (self.tokenizer.grid.rows, self.tokenizer.grid.columns),
                self.tokenizer.quantizer.codebook_VL,
                chances,
            )
            self._commit(state, codes_B1NC, action_BL[:, None])
        return state.frame_BHWC

    @property
    def device(self) -> torch.device:
        return self.tokenizer.quantizer.codebook_VL.device

    def _play_precision(self) -> torch.autocast:
        """One context for all of a frame: weights are cast once, not in each of its steps."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.sampling.precision == "bf16")

    def _commit(self, state: PlayState, codes_BTNC: Tensor, actions_BTL: Tensor) -> None:
        """Frames become past: their keys and values are computed from their final tokens, once."""
        codebook_VL = self.tokenizer.quantizer.codebook_VL
        self.dynamics.hidden(codes_BTNC, actions_BTL, codebook_VL, state.dynamics, commit=True)
        state.frame_BHWC = _to_uint8(self.tokenizer.decode(codes_BTNC, state.decoder)[:, -1])
        state.t += codes_BTNC.shape[1]

    @torch.inference_mode()
    def infer_actions(self, frames_BTHWC: Tensor) -> Tensor:
        """uint8 clips -> the latent actions between their frames, int64 (B, T-1)."""
        return self.lam.infer(self.lam_input(_to_unit(frames_BTHWC.to(self.device)))).codes_BT.cpu()

    @torch.inference_mode()
    def lam_reconstruct(self, frames_BTHWC: Tensor) -> Tensor:
        """uint8 clips -> frames 2..T as the LAM's decoder rebuilds them, in [0, 1]."""
        predicted = self.lam.predict(self.lam_input(_to_unit(frames_BTHWC.to(self.device))))
        if self.config.lam.inputs == "pixels":
            return predicted.cpu()
        tokenizer = self.config.tokenizer
        latents_BTNCL = predicted.view(*predicted.shape[:-1], tokenizer.codes_per_patch, tokenizer.codebook.latent_dim)
        return self.tokenizer.decode(self.tokenizer.quantizer(latents_BTNCL).codes).cpu()

    def lam_input(self, x_BTHWC: Tensor, codes_BTNC: Tensor | None = None) -> Tensor:
        """Clips in [0, 1] as the LAM takes them; their codes, if known, are not computed again."""
        if self.config.lam.inputs == "pixels":
            return x_BTHWC
        codes_BTNC = self.tokenizer.encode(x_BTHWC) if codes_BTNC is None else codes_BTNC
        return self.tokenizer.quantizer.embed(codes_BTNC).flatten(-2)

    @torch.inference_mode()
    def tokenize(self, frames_BTHWC: Tensor) -> Tensor:
        """uint8 clips -> codes (B, T, N * C)."""
        return self.tokenizer.encode(_to_unit(frames_BTHWC.to(self.device))).flatten(2).cpu()

    @torch.inference_mode()
    def reconstruct(self, frames_BTHWC: Tensor) -> Tensor:
        """uint8 clips through the tokenizer and back."""
        return _to_uint8(self.tokenizer.decode(self.tokenizer.encode(_to_unit(frames_BTHWC.to(self.device))))).cpu()


def _to_unit(frames: Tensor) -> Tensor:
    return frames.float() / 255


def _to_uint8(x: Tensor) -> Tensor:
    return (x * 255).round().clamp(0, 255).to(torch.uint8)
