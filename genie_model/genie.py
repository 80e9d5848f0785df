"""Genie: tokenizer, latent actions and dynamics as one world model, and its play."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from genie_model.chance import Chance
from genie_model.config import Config, SamplingConfig
from genie_model.dynamics import DynamicsModel
from genie_model.lam import LatentActionModel
from genie_model.layers import STTransformer, TemporalAttention, TemporalCache
from genie_model.maskgit import draw_chances, sample_frame
from genie_model.tokenizer import VideoTokenizer

NO_ACTION = -1  # of a frame that no action led to: a world's first


class Launch(Protocol):
    """How a step of play is run: the function of the pasts that it goes on from, of tensors, and of what is constant.

    A backend may put one in its place that runs the same kernels with less ado.
    """

    def __call__(
        self,
        run: Callable[[Sequence[TemporalCache], Sequence[Tensor], Any], tuple[Tensor, ...]],
        caches: Sequence[TemporalCache],
        tensors: Sequence[Tensor],
        constant: Hashable,
    ) -> tuple[Tensor, ...]: ...


def _call(
    run: Callable[..., tuple[Tensor, ...]],
    caches: Sequence[TemporalCache],
    tensors: Sequence[Tensor],
    constant: Hashable,
) -> tuple[Tensor, ...]:
    return run(caches, tensors, constant)


@dataclass
class PlayState:
    """Worlds in play: the pasts of both transformers, and what decides their chances."""

    seeds: list[int]  # of each world
    t: list[int]  # frames of each world so far, prompt included
    frame_BHWC: Tensor  # uint8, the latest
    codes_BNC: Tensor  # its tokens
    dynamics: TemporalCache = field(repr=False)
    decoder: TemporalCache = field(repr=False)
    pending_BL: Tensor | None = field(default=None, repr=False)  # its action, until `Genie.remember`
    large: TemporalCache | None = field(default=None, repr=False)  # of a larger decoder, where one follows the worlds

    def fork(self) -> PlayState:
        """A copy that may go another way."""
        return self.repeat(1)

    def repeat(self, times: int) -> PlayState:
        """`times` copies of every world side by side (B becomes B * times), to take another action in each."""
        return self.take([world for world in range(len(self.seeds)) for _ in range(times)])

    def take(self, worlds: list[int]) -> PlayState:
        """A copy of these worlds, in this order."""
        return PlayState(
            [self.seeds[world] for world in worlds],
            [self.t[world] for world in worlds],
            self.frame_BHWC[worlds],
            self.codes_BNC[worlds],
            self.dynamics.take(worlds),
            self.decoder.take(worlds),
            None if self.pending_BL is None else self.pending_BL[worlds],
            self.large and self.large.take(worlds),
        )

    @staticmethod
    def stack(states: Sequence[PlayState]) -> PlayState:
        """All their worlds side by side. Raises ValueError for a state that `Genie.remember` has yet to see."""
        if any(state.pending_BL is not None for state in states):
            raise ValueError("states are joined once their newest frames are remembered: call Genie.remember on each")
        large = [state.large for state in states if state.large]  # followed are all or none
        return PlayState(
            [seed for state in states for seed in state.seeds],
            [t for state in states for t in state.t],
            torch.cat([state.frame_BHWC for state in states]),
            torch.cat([state.codes_BNC for state in states]),
            TemporalCache.stack([state.dynamics for state in states]),
            TemporalCache.stack([state.decoder for state in states]),
            large=TemporalCache.stack(large) if len(large) == len(states) else None,
        )


class Genie(nn.Module):
    """The whole model. Training uses `forward`, play uses `start` and `step`.

    Outside, frames are uint8 on the CPU; what play keeps lies where the model is.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.launch: Launch = _call
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

    def forward(
        self, x_BTHWC: Tensor, codes_BTNC: Tensor | None = None, *, chance: Chance
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Co-training (section 2.1): LAM and dynamics in one step, the tokenizer frozen.

        Clips in [0, 1]; their codes, if known, are not computed again.
        """
        if codes_BTNC is None:
            with torch.no_grad():
                codes_BTNC = self.tokenizer.encode(x_BTHWC)
        lam_loss, actions, lam_logs = self.lam(self.lam_input(x_BTHWC, codes_BTNC), chance)
        dynamics_loss, dynamics_logs = self.dynamics(
            codes_BTNC, actions.latents_BTL, self.tokenizer.quantizer.codebook_VL.detach(), chance
        )
        logs = {f"lam/{name}": value for name, value in lam_logs.items()}
        logs |= {f"dynamics/{name}": value for name, value in dynamics_logs.items()}
        return lam_loss + dynamics_loss, logs

    @torch.no_grad()
    def start(self, frames_BTHWC: Tensor, seed: int | Sequence[int] = 0) -> PlayState:
        """Enters the world of a prompt: T >= 1 uint8 frames. The actions between several are inferred by the LAM.

        `seed` decides the chances: one for all worlds of the batch, or one for each (ValueError for another number).
        """
        seeds = [seed] * len(frames_BTHWC) if isinstance(seed, int) else list(seed)
        if len(seeds) != len(frames_BTHWC):
            raise ValueError(f"{len(seeds)} seeds for {len(frames_BTHWC)} worlds: give one, or one for each")
        frames_BTHWC = frames_BTHWC.to(self.device)
        actions_BT = torch.full(frames_BTHWC.shape[:2], NO_ACTION)
        if frames_BTHWC.shape[1] > 1:
            actions_BT[:, 1:] = self.infer_actions(frames_BTHWC)
        with self._play_precision():
            codes_BTNC = self.tokenizer.encode(_to_unit(frames_BTHWC))
        state = self._empty(seeds, [frames_BTHWC.shape[1]] * len(seeds), frames_BTHWC.shape[1])
        self._replay(state, codes_BTNC, actions_BT)
        state.frame_BHWC = frames_BTHWC[:, -1]  # itself, not what the tokenizer keeps of it
        return state

    def resume(self, codes_BTNC: Tensor, actions_BT: Tensor, seeds: Sequence[int], t: Sequence[int]) -> PlayState:
        """Enters worlds where they were left: from the codes of their last frames and the actions that led to each.

        int64; NO_ACTION where none led to a frame, the very first one. `t` counts all frames of each world. From its
        last `memory` frames, or from all, a world goes on exactly as if it had never been left.
        """
        *_, state = self.resuming(codes_BTNC, actions_BT, seeds, t)
        return state

    @torch.no_grad()
    def resuming(
        self, codes_BTNC: Tensor, actions_BT: Tensor, seeds: Sequence[int], t: Sequence[int]
    ) -> Iterator[PlayState]:
        """`resume` frame by frame, so that whoever calls can do something else in between; the last state is whole.

        Every frame is computed as when it was dreamt, alone and at its own position. So the bits are the same too where
        those of a row do not hang on the number of rows (bfloat16 matmuls), and elsewhere up to rounding.
        """
        frames = codes_BTNC.shape[1]
        state = self._empty(seeds, t, frames)
        for frame in range(frames):
            self._replay(state, codes_BTNC[:, frame : frame + 1].to(self.device), actions_BT[:, frame : frame + 1])
            yield state

    def _empty(self, seeds: Sequence[int], t: Sequence[int], frames: int) -> PlayState:
        """Worlds whose last frames are yet to be replayed."""
        dynamics, decoder = (TemporalCache([n - frames for n in t]) for _ in range(2))
        return PlayState(list(seeds), list(t), torch.empty(0), torch.empty(0), dynamics, decoder)

    def _replay(self, state: PlayState, codes_BTNC: Tensor, actions_BT: Tensor) -> None:
        """The frames that follow the state's, and the actions that led to them."""
        actions_BT = actions_BT.to(self.device)
        actions_BTL = self.lam.quantizer.embed(actions_BT.clamp_min(0)) * (actions_BT != NO_ACTION)[..., None]
        with self._play_precision():
            self.dynamics.remember(codes_BTNC, actions_BTL, self.tokenizer.quantizer.codebook_VL, state.dynamics)
            self._show(state, codes_BTNC)

    @property
    def memory(self) -> int:
        """Frames that the next one may hang on: every temporal layer looks a window further back."""
        return max(frames_remembered(self.dynamics), self.picture_memory)

    @property
    def picture_memory(self) -> int:
        """Frames whose codes decide one picture, its own among them."""
        return frames_remembered(self.tokenizer.decoder)

    @torch.no_grad()
    def step(self, state: PlayState, action_B: Tensor, sampling: SamplingConfig | None = None) -> Tensor:
        """Takes int64 actions in [0, |A|); returns, and makes the state's, the next uint8 frames (B, H, W, 3).

        A frame is a pure function of the prompt, the actions so far, its seed and `sampling` (by default the config's).
        Raises ValueError for an action out of range.
        """
        if not 0 <= int(action_B.min()) <= int(action_B.max()) < self.config.num_actions:
            raise ValueError(f"actions must be in 0..{self.config.num_actions - 1}, got {action_B.tolist()}")
        return self.advance(state, action_B.to(self.device), sampling or self.config.sampling).cpu()

    def advance(self, state: PlayState, action_B: Tensor, sampling: SamplingConfig) -> Tensor:
        """`step` without a look at the actions' values: they, and the frames, are on the device."""
        self.remember(state)
        generators = [
            torch.Generator().manual_seed((seed * 1_000_003 + t) % 2**63)
            for seed, t in zip(state.seeds, state.t, strict=True)
        ]
        tokens = (self.tokenizer.num_patches, self.config.tokenizer.codes_per_patch)
        chances_SBNC = draw_chances(sampling, tokens, generators).to(self.device)
        state.pending_BL = self.lam.quantizer.embed(action_B)
        self._ahead(state.dynamics, self.dynamics.transformer)
        self._ahead(state.decoder, self.tokenizer.decoder)
        state.codes_BNC, state.frame_BHWC = self.launch(
            self._dream, (state.dynamics, state.decoder), (state.pending_BL, chances_SBNC), sampling
        )
        state.t = [t + 1 for t in state.t]
        return state.frame_BHWC

    def _dream(
        self, caches: Sequence[TemporalCache], tensors: Sequence[Tensor], sampling: SamplingConfig
    ) -> tuple[Tensor, ...]:
        """The codes (B, N, C) and the picture of the frame that follows the caches' past; the decoder's takes it in."""
        (dynamics, decoder), (action_BL, chances_SBNC) = caches, tensors
        grid, codebook_VL = self.tokenizer.grid, self.tokenizer.quantizer.codebook_VL
        with self._play_precision():
            codes_B1NC = sample_frame(
                self.dynamics, sampling, dynamics, action_BL, (grid.rows, grid.columns), codebook_VL, chances_SBNC
            )
            return codes_B1NC[:, 0], to_uint8(self.tokenizer.decode(codes_B1NC, decoder)[:, -1])

    @torch.no_grad()
    def remember(self, state: PlayState) -> None:
        """The newest frames become past: their keys and values are computed from their final tokens, once.

        `step` leaves that to the next one, so that whoever plays sees the frame before it is done. To call this in
        between, while they look, saves them the time.
        """
        if state.pending_BL is not None:
            self._ahead(state.dynamics, self.dynamics.transformer)
            self.launch(self._commit, (state.dynamics,), (state.codes_BNC, state.pending_BL), self.config.sampling)
            state.pending_BL = None

    def _commit(self, caches: Sequence[TemporalCache], tensors: Sequence[Tensor], _: Hashable) -> tuple[Tensor, ...]:
        (dynamics,), (codes_BNC, action_BL) = caches, tensors
        with self._play_precision():
            codebook_VL = self.tokenizer.quantizer.codebook_VL
            self.dynamics.remember(codes_BNC[:, None], action_BL[:, None], codebook_VL, dynamics)
        return ()

    def _ahead(self, cache: TemporalCache, transformer: STTransformer) -> None:
        """Puts into the cache what is known of the next frame's time, which hangs on numbers of the host's."""
        transformer.time(self.device, len(cache.positions), 1, cache)

    @property
    def device(self) -> torch.device:
        return self.tokenizer.quantizer.codebook_VL.device

    def _play_precision(self) -> torch.autocast:
        """One context for all of a frame: weights are cast once, not in each of its steps."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.sampling.precision == "bf16")

    def _show(self, state: PlayState, codes_BTNC: Tensor) -> None:
        """The last of these frames, which follow the state's, become its newest."""
        state.codes_BNC = codes_BTNC[:, -1]
        state.frame_BHWC = to_uint8(self.tokenizer.decode(codes_BTNC, state.decoder)[:, -1])

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
        return self.tokenizer.decode(self.tokenizer.quantizer.encode(latents_BTNCL)).cpu()

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

    @torch.no_grad()
    def painting(self, codes_BTNC: Tensor, cache: TemporalCache) -> Iterator[Tensor]:
        """The uint8 frames (B, H, W, 3) that play showed, one by one, of codes that follow, and join, the cache's past.

        Those behind the first `picture_memory`, or behind frame 0, are what was seen, as exactly as `resuming`'s.
        """
        for frame in range(codes_BTNC.shape[1]):
            with self._play_precision():
                x_B1HWC = self.tokenizer.decode(codes_BTNC[:, frame : frame + 1].to(self.device), cache)
            yield to_uint8(x_B1HWC[:, 0]).cpu()

    @torch.inference_mode()
    def reconstruct(self, frames_BTHWC: Tensor) -> Tensor:
        """uint8 clips through the tokenizer and back."""
        return to_uint8(self.tokenizer.decode(self.tokenizer.encode(_to_unit(frames_BTHWC.to(self.device))))).cpu()


def frames_remembered(part: nn.Module) -> int:
    """How many frames back, its own among them, one may hang on in it."""
    return 1 + sum(module.window - 1 for module in part.modules() if isinstance(module, TemporalAttention))


def _to_unit(frames: Tensor) -> Tensor:
    return frames.float() / 255


def to_uint8(x: Tensor) -> Tensor:
    """From [0, 1]."""
    return (x * 255).round().clamp(0, 255).to(torch.uint8)
