"""Worlds as Gymnasium environments: an agent acts, and may learn to, inside a dream.

    gymnasium.make("genie_model.env:Genie-v0", model_uri=..., reward=...)
    gymnasium.make_vec("genie_model.env:Genie-v0", num_envs=8, model_uri=..., reward=...)

Observations are frames, uint8 (H, W, 3); actions are the latent actions that the model found. A world learned from
video has no reward and no end: what is worth doing is the caller's to say, as a function of what is seen, and episodes
are cut off after `max_steps`. The same seed and actions give the same world.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium import spaces
from gymnasium.error import ResetNeeded
from gymnasium.utils import seeding
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from numpy.typing import ArrayLike, NDArray
from PIL import Image

from genie_model import files
from genie_model.checkpoint import load_model
from genie_model.genie import Genie, PlayState

Frames = NDArray[np.uint8]
Flags = NDArray[np.bool_]
# previous frames (B, H, W, 3), actions (B), frames (B, H, W, 3) -> rewards (B)
Reward = Callable[[Frames, NDArray[np.int64], Frames], ArrayLike]

MAX_STEPS = 100  # about as long as the pictures of a small model hold
_METADATA: dict[str, Any] = {"render_modes": ["rgb_array"], "render_fps": 10}


def no_reward(before_BHWC: Frames, action_B: NDArray[np.int64], frames_BHWC: Frames) -> NDArray[np.float64]:
    return np.zeros(len(action_B))


class GenieVectorEnv(VectorEnv[Frames, NDArray[np.int64], NDArray[Any]]):
    """Worlds side by side, which step in one pass of the model.

    Each becomes what a GenieEnv of its seed becomes, up to the rounding of matmuls over more rows. All episodes begin
    and end together. The step after the last ignores its actions, earns nothing, and returns the first frames of the
    next episodes (Gymnasium's NEXT_STEP).
    """

    metadata = _METADATA | {"autoreset_mode": AutoresetMode.NEXT_STEP}

    def __init__(
        self,
        model_uri: str | Genie,
        num_envs: int = 1,
        *,
        reward: Reward = no_reward,
        max_steps: int | None = MAX_STEPS,
        start_frames: Frames | None = None,
        render_mode: str | None = None,
    ) -> None:
        """`model_uri` is a model's folder, or a Genie that is loaded already: give that its `start_frames`.

        `reward` is called once a step, for all worlds that took it together. Episodes have `max_steps` frames after
        the first; None: no end. Of `start_frames`, uint8 (N, H, W, 3), by default the model's own, episodes begin at
        random ones. Raises ValueError for a model that is not there, and for settings that cannot be.
        """
        if num_envs < 1 or (max_steps is not None and max_steps < 1):
            raise ValueError(f"num_envs and max_steps must be at least 1, got {num_envs} and {max_steps}")
        if render_mode not in (None, *_METADATA["render_modes"]):
            raise ValueError(f"render_mode must be None or one of {_METADATA['render_modes']}, got {render_mode!r}")
        self._genie = model_uri if isinstance(model_uri, Genie) else load_model(model_uri)
        shape = self._genie.config.frame_shape
        if start_frames is None:
            start_frames = _start_frames(model_uri)
        start_frames = np.asarray(start_frames)
        if start_frames.dtype != np.uint8 or start_frames.shape[1:] != shape or not len(start_frames):
            raise ValueError(f"start_frames must be uint8 of shape (at least 1, *{shape}), got {_kind(start_frames)}")
        self._start_frames, self._reward, self._max_steps = start_frames, reward, max_steps
        self.num_envs, self.render_mode = num_envs, render_mode
        self.single_observation_space = spaces.Box(0, 255, shape, np.uint8)
        self.single_action_space = spaces.Discrete(self._genie.config.num_actions)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self.randoms = [seeding.np_random()[0] for _ in range(num_envs)]  # what decides each world's episodes
        self._state: PlayState | None = None
        self._frames_BHWC = np.zeros((num_envs, *shape), np.uint8)
        self._steps = 0  # of the episode, which all worlds begin and end together

    def reset(
        self, *, seed: int | Sequence[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Frames, dict[str, Any]]:
        """`seed` is the first world's, and each next one's is one more; or a list, one for each. Without, all go on.

        `options["frame"]` is where to start, uint8: (H, W, 3) for all worlds, or (B, H, W, 3). The episodes after start
        at random again. Raises ValueError for another number of seeds, another frame and any other option.
        """
        if isinstance(seed, Sequence | np.ndarray):
            seeds = list(seed)
        else:
            seeds = [None if seed is None else seed + world for world in range(self.num_envs)]
        if len(seeds) != self.num_envs:
            raise ValueError(f"{len(seeds)} seeds for {self.num_envs} worlds: give one, or one for each")
        given_BHWC = self._given(options or {})
        super().reset(seed=seeds[0])  # np_random is nothing to the worlds, but may be drawn from by others
        for world, of_world in enumerate(seeds):
            if of_world is not None:
                self.randoms[world] = seeding.np_random(of_world)[0]
        self._enter(given_BHWC)
        return self._frames_BHWC.copy(), {}

    def step(self, actions: ArrayLike) -> tuple[Frames, NDArray[np.float64], Flags, Flags, dict[str, Any]]:
        """Integer actions (B) -> frames (B, H, W, 3), rewards, terminations (never), truncations (B) and no infos.

        Raises ValueError for other actions, and ResetNeeded before the first `reset`.
        """
        action_B = np.asarray(actions)
        if action_B.shape != (self.num_envs,) or action_B.dtype.kind not in "iu":
            raise ValueError(f"actions must be integers of shape ({self.num_envs},), got {_kind(action_B)}")
        rewards_B, never_B = np.zeros(self.num_envs), np.zeros(self.num_envs, np.bool_)
        if self.over:
            self._enter()
            return self._frames_BHWC.copy(), rewards_B, never_B, never_B.copy(), {}
        before_BHWC, action_B = self._frames_BHWC, action_B.astype(np.int64)
        self._frames_BHWC = self._genie.step(self._playing, torch.from_numpy(action_B)).numpy()
        self._steps += 1
        rewards_B = np.array(self._reward(before_BHWC, action_B, self._frames_BHWC.copy()), np.float64)
        if rewards_B.shape != never_B.shape:
            raise ValueError(f"the reward must be of shape {never_B.shape}, one a world, got {rewards_B.shape}")
        return self._frames_BHWC.copy(), rewards_B, never_B, np.full(self.num_envs, self.over), {}

    def render(self) -> tuple[Frames, ...] | None:
        """The worlds' frames (H, W, 3); None without a render mode. Raises ResetNeeded before the first `reset`."""
        return tuple(self._frames_BHWC.copy()) if self.render_mode and self._playing else None

    @property
    def over(self) -> bool:
        """Whether the episode has had all its steps."""
        return self._steps == self._max_steps

    @property
    def _playing(self) -> PlayState:
        if self._state is None:
            raise ResetNeeded("no world was entered yet: call reset first")
        return self._state

    def _given(self, options: dict[str, Any]) -> Frames | None:
        """The frames (B, H, W, 3) to start from, if any. Raises ValueError."""
        if unknown := sorted(options.keys() - {"frame"}):
            raise ValueError(f"unknown options {unknown}: there is 'frame', the frame to start from")
        if options.get("frame") is None:
            return None
        frame, shape = np.asarray(options["frame"]), self._frames_BHWC.shape
        if frame.dtype != np.uint8 or frame.shape not in (shape, shape[1:]):
            raise ValueError(f"options['frame'] must be uint8 of shape {shape[1:]} or {shape}, got {_kind(frame)}")
        return np.broadcast_to(frame, shape)

    def _enter(self, given_BHWC: Frames | None = None) -> None:
        """Lets all worlds begin anew."""
        seeds = [int(random.integers(2**31)) for random in self.randoms]
        if given_BHWC is None:
            given_BHWC = self._start_frames[[random.integers(len(self._start_frames)) for random in self.randoms]]
        self._frames_BHWC, self._steps = given_BHWC.copy(), 0
        self._state = self._genie.start(torch.from_numpy(self._frames_BHWC[:, None]), seeds)


class GenieEnv(gymnasium.Env[Frames, np.int64]):
    """One world: a GenieVectorEnv of one, that is reset by hand."""

    metadata = _METADATA

    def __init__(
        self,
        model_uri: str | Genie,
        *,
        reward: Reward = no_reward,
        max_steps: int | None = MAX_STEPS,
        start_frames: Frames | None = None,
        render_mode: str | None = None,
    ) -> None:
        """As of GenieVectorEnv: `reward` takes and returns batches, here of one."""
        self._worlds = GenieVectorEnv(
            model_uri, reward=reward, max_steps=max_steps, start_frames=start_frames, render_mode=render_mode
        )
        self.render_mode = render_mode
        self.observation_space = self._worlds.single_observation_space
        self.action_space = self._worlds.single_action_space

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Frames, dict[str, Any]]:
        """`options["frame"]`, uint8 (H, W, 3), is where to start. Raises ValueError for another, or other options."""
        super().reset(seed=seed)
        self._worlds.randoms = [self.np_random]
        frames_BHWC, info = self._worlds.reset(options=options)
        return frames_BHWC[0], info

    def step(self, action: int | np.integer[Any]) -> tuple[Frames, float, bool, bool, dict[str, Any]]:
        """Raises ValueError for an action that there is not, and ResetNeeded when no episode is under way."""
        if self._worlds.over:
            raise ResetNeeded("the episode is over: call reset")
        frames_BHWC, rewards_B, _, _, info = self._worlds.step(np.asarray([action]))
        return frames_BHWC[0], float(rewards_B[0]), False, self._worlds.over, info

    def render(self) -> Frames | None:
        """The frame (H, W, 3); None without a render mode. Raises ResetNeeded before the first `reset`."""
        frames = self._worlds.render()
        return frames[0] if frames else None


def _start_frames(model_uri: str | Genie) -> Frames:
    """Those that lie with the model. Raises ValueError when there are none."""
    if isinstance(model_uri, Genie):
        raise ValueError("a loaded Genie has no start frames with it: give start_frames, uint8 (N, H, W, 3)")
    folder = f"{model_uri.rstrip('/')}/start_frames"
    pngs = [files.read(f"{folder}/{name}") for name in files.names(folder) if name.endswith(".png")]
    if not pngs:
        raise ValueError(f"no start frames in {folder}: evaluate the model first, it writes them, or give start_frames")
    return np.stack([np.asarray(Image.open(io.BytesIO(png)).convert("RGB")) for png in pngs])


def _kind(array: NDArray[Any]) -> str:
    return f"{array.dtype} of shape {array.shape}"


gymnasium.register(
    "Genie-v0", entry_point="genie_model.env:GenieEnv", vector_entry_point="genie_model.env:GenieVectorEnv"
)
