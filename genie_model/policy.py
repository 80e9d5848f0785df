"""The policy of behavioural cloning (App. E.2): which action would the expert take now?"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from genie_model.backend import native
from genie_model.chance import Chance
from genie_model.config import Config
from genie_model.layers import PatchGrid, STTransformer

# Actions of the policy (B,) and as many uniform numbers in [0, 1) to actions that the game knows.
Translate = Callable[[NDArray[np.int64], NDArray[np.float64]], NDArray[np.int64]]


class Policy(nn.Module):
    """An ST-transformer over the last frames and the actions between them, latent or real; a head at every frame.

    The action that led to a frame is a one-hot vector whose linear map is added to all of the frame's patches. The
    first frame of a sequence has none, whatever was done before: so in play as in training.
    """

    def __init__(self, config: Config, num_actions: int) -> None:
        super().__init__()
        self.config, self.num_actions = config, num_actions
        part, width = config.policy, config.policy.transformer.d_model
        self.grid = PatchGrid(*config.frame_shape[:2], part.patch_size)
        self.patch_in = nn.Linear(part.patch_size**2 * 3, width)
        self.position = nn.Parameter(0.02 * torch.randn(self.grid.num_patches, width))
        self.action_in = nn.Embedding(num_actions, width)  # a one-hot vector times a matrix
        nn.init.normal_(self.action_in.weight, std=0.02)
        self.transformer = STTransformer(part.transformer, part.context)
        self.linear = nn.Linear(width, part.linear_layer)
        self.logits_out = nn.Linear(part.linear_layer, num_actions)

    def forward(
        self, x_BTHWC: Tensor, actions_BT: Tensor, chance: Chance | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and logs of clips in [0, 1] and what the expert did at each of their frames, int64 (B, T).

        Nothing here is left to chance.
        """
        logits_BTA = self.logits(x_BTHWC, actions_BT[:, :-1])
        loss = F.cross_entropy(logits_BTA.flatten(0, 1), actions_BT.flatten())
        accuracy = (logits_BTA.argmax(-1) == actions_BT).float().mean()
        return loss, {"cross_entropy": loss.detach(), "accuracy": accuracy}

    def logits(self, x_BTHWC: Tensor, previous_BT: Tensor) -> Tensor:
        """Of the action at every frame, float32 (B, T, A), from the actions (B, T-1) that led to frames 2..T."""
        h_BTND = self.patch_in(self.grid.cut(x_BTHWC) - 0.5)
        action_BTD = F.pad(self.action_in(previous_BT), (0, 0, 1, 0)).to(h_BTND.dtype)
        h_BTND = self.transformer(h_BTND + self.position.to(h_BTND.dtype) + action_BTD[:, :, None])
        logits_BTA: Tensor = self.logits_out(F.gelu(self.linear(h_BTND.mean(2))))
        return logits_BTA.float()


class Player:
    """A policy at play, one call a step for B levels side by side: a `data.play.Policy` for one `play_levels`.

    It samples from the logits, and keeps the last frames of every level and what it did at them. `translate` makes its
    actions the game's; a `random_share` of its steps is drawn uniformly from its own. What it does in a level does not
    hang on which others are over, rounding of the batch aside.
    """

    def __init__(
        self,
        policy: Policy,
        seed: int,
        translate: Translate = lambda action_B, chance_B: action_B,
        random_share: float = 0.0,
    ) -> None:
        self.policy, self.translate, self.random_share = policy, translate, random_share
        self._generator = np.random.default_rng(seed)
        self._frames: list[NDArray[np.uint8]] = []  # of the last steps, (B, H, W, 3) each, at most the context
        self._actions: list[NDArray[np.int64]] = []  # what was done at each of those

    def __call__(self, frames_BHWC: NDArray[np.uint8], done_B: NDArray[np.bool_]) -> NDArray[np.integer[Any]]:
        past = self.policy.config.policy.context - 1
        self._actions = self._actions[-past:]
        self._frames = [*self._frames[-past:], frames_BHWC]
        chance_3B = self._generator.random((3, len(done_B)))  # drawn for levels that are over too
        alive = np.flatnonzero(~done_B)
        action_B = np.zeros(len(done_B), np.int64)
        action_B[alive] = _sampled(self._probs(alive), chance_3B[0, alive])
        random_B = chance_3B[1] < self.random_share
        # Below the share, the same number is uniform again once it is divided by it.
        action_B[random_B] = (chance_3B[1, random_B] / self.random_share * self.policy.num_actions).astype(np.int64)
        self._actions.append(action_B)
        return self.translate(action_B, chance_3B[2])

    @torch.inference_mode()
    def _probs(self, alive: NDArray[np.intp]) -> NDArray[np.float64]:
        """Of the next action in each of these levels, (B, A)."""
        frames_BTHWC = np.stack([frames_BHWC[alive] for frames_BHWC in self._frames], 1)
        previous_BT = np.array([action_B[alive] for action_B in self._actions], np.int64).reshape(-1, len(alive)).T
        with native.autocast(self.policy.config.train_policy.precision):
            logits_BTA = self.policy.logits(*native.inputs(frames_BTHWC, previous_BT))
        probs_BA: NDArray[np.float64] = logits_BTA[:, -1].double().softmax(-1).cpu().numpy()
        return probs_BA


def _sampled(probs_BA: NDArray[np.float64], chance_B: NDArray[np.float64]) -> NDArray[np.int64]:
    """The action in whose share of [0, 1) the chance falls."""
    over_B: NDArray[np.int64] = (probs_BA.cumsum(1) <= chance_B[:, None]).sum(1)
    return np.minimum(over_B, probs_BA.shape[1] - 1)  # where rounding leaves the sum below 1
