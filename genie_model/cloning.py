"""Behavioural cloning from latent actions (section 3.3, App. E, Figure 15), from an expert's videos to solved levels.

A frozen LAM labels the videos, a policy learns to predict the labels, and a few true actions map latent to real ones.
Beside it: an oracle that learns from the true actions, the expert, a random agent, and RIGHT and UP held down.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from genie_model import checkpoint
from genie_model.backend import native
from genie_model.config import Config
from genie_model.data import play
from genie_model.data.coinrun import NUM_ACTIONS
from genie_model.data.expert import solve
from genie_model.data.loader import ClipLoader
from genie_model.data.store import VideoStore
from genie_model.data.truth import PrivilegedTruth
from genie_model.genie import Genie
from genie_model.policy import Player, Policy
from genie_model.progress import NoLog, RunLog, bar, summary
from genie_model.train import TRAINER_CODE, model_name, train_once

RIGHT_UP = 8  # of Procgen's 15
_BATCH = 16  # windows that the LAM sees at once


def train_policy(
    config: Config, demonstrations_uri: str, root_uri: str, model_uri: str = "", log: RunLog | None = None
) -> str:
    """Clones the expert of `expert.collect_demonstrations`; returns the policy's URI.

    From the latent actions of the Genie at `model_uri`; without one from the true actions: that is the oracle. As in
    `train`, a finished policy is reused and a killed run carries on. Raises ValueError for what is missing or does not
    fit.
    """
    store = VideoStore.open(demonstrations_uri)
    store.check_frames(config.frame_shape, "data.frame_width and data.frame_height say")
    episodes = range(store.num_episodes)
    if model_uri:
        genie = checkpoint.load_model(model_uri)
        kind, num_actions, actions = "latent", genie.config.num_actions, latent_actions(genie, store, episodes)
    else:
        kind, num_actions, actions = "oracle", NUM_ACTIONS, true_actions(store, episodes)
    learnt_from = hashlib.sha256(store.digest.encode() + np.concatenate(actions).tobytes()).hexdigest()
    code = (*TRAINER_CODE, "policy.py")
    name = model_name(f"policy-{kind}", learnt_from, config, ("policy", "train_policy", "seed"), code)
    torch.manual_seed(config.seed)
    policy, stage = Policy(config, num_actions), config.train_policy

    def loader(rank: int, world_size: int) -> ClipLoader:
        return ClipLoader(
            store, stage.batch_size, config.policy.context, config.seed, rank, world_size, actions=actions
        )

    return train_once(f"train-policy-{kind}", name, policy, policy, stage, loader, root_uri, log)


def load_policy(uri: str, num_actions: int) -> Policy:
    """In evaluation mode, on the accelerator if there is one. Raises ValueError as `checkpoint.load_model` does."""
    policy = Policy(checkpoint.load_config(uri), num_actions)
    checkpoint.load_weights(policy, f"{uri}/{checkpoint.WEIGHTS}")
    return policy.to(native.device()).eval()


def latent_actions(genie: Genie, store: VideoStore, episodes: Sequence[int]) -> list[NDArray[np.int64]]:
    """Of each episode the latent actions (T-1,): entry t leads from frame t to t + 1.

    The LAM sees windows as long as those it was trained on. Each begins with the frame that the one before ended on,
    the last one ends with the episode, and a transition is named by the first window that has it. As the encoder is
    causal, an episode shorter than a window is one window of its own length. Raises ValueError for frames of a size
    that the model does not know.
    """
    store.check_frames(genie.config.frame_shape, "the world model was trained on")
    window, found = genie.config.data.clip_length, []
    for episode in bar(episodes, desc="label with latent actions", unit="episode"):
        length = store.length_of(episode)
        frames_THWC = torch.from_numpy(store.frames(episode, 0, length))
        last = max(length - window, 0)
        starts = [*range(0, last, window - 1), last]
        windows = [frames_THWC[start : start + window] for start in starts]
        codes = [genie.infer_actions(torch.stack(windows[i : i + _BATCH])) for i in range(0, len(windows), _BATCH)]
        action_T = np.empty(length - 1, np.int64)
        for start, codes_T in reversed(list(zip(starts, torch.cat(codes).numpy(), strict=True))):
            action_T[start : start + window - 1] = codes_T
        found.append(action_T)
    return found


def true_actions(store: VideoStore, episodes: Sequence[int]) -> list[NDArray[np.int64]]:
    """Of each episode what the expert did, (T-1,), as `latent_actions`: for the oracle, the map and evaluation only."""
    truth = PrivilegedTruth.open(store.uri)
    return [truth.episode(episode)["action"].astype(np.int64) for episode in episodes]


class ActionMap:
    """App. E.1's dictionary: of each latent action the real ones that it was seen with, to draw from uniformly.

    A latent action that was never seen draws from all that were; without any labels, from all of the game's actions.
    """

    def __init__(self, latent_N: NDArray[np.int64], real_N: NDArray[np.int64], num_latents: int) -> None:
        if len(latent_N) != len(real_N):
            raise ValueError(f"{len(latent_N)} latent and {len(real_N)} real actions: one of each for every transition")
        anything = real_N if len(real_N) else np.arange(NUM_ACTIONS)
        seen = [real_N[latent_N == latent] for latent in range(num_latents)]
        self.lists = [reals if len(reals) else anything for reals in seen]

    def __call__(self, latent_B: NDArray[np.int64], chance_B: NDArray[np.float64]) -> NDArray[np.int64]:
        """Real actions; `chance_B` are uniform numbers in [0, 1)."""
        lists = [self.lists[latent] for latent in latent_B]
        return np.array([reals[int(chance * len(reals))] for reals, chance in zip(lists, chance_B, strict=True)])

    def agreement(self, latent_N: NDArray[np.int64], real_N: NDArray[np.int64]) -> float:
        """How often a draw gives the real action back, on average over these transitions."""
        return float(
            np.mean([(self.lists[latent] == real).mean() for latent, real in zip(latent_N, real_N, strict=True)])
        )


def labelled_transitions(
    genie: Genie, store: VideoStore, count: int, seed: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Latent and real actions (N,) of the first `count` transitions of whole episodes, these in an order of `seed`.

    So fewer labels are the first of more. Raises ValueError when the store has not that many.
    """
    lengths = store.episode_lengths - 1
    if count > lengths.sum():
        raise ValueError(
            f"cloning.labelled: {count} transitions, but {store.uri} has {lengths.sum()}: at most that, or raise "
            "cloning.levels"
        )
    order = np.random.default_rng(seed).permutation(store.num_episodes)
    needed = order[: int(np.searchsorted(lengths[order].cumsum(), count)) + 1].tolist()
    latent_N, real_N = (np.concatenate(a) for a in (latent_actions(genie, store, needed), true_actions(store, needed)))
    return latent_N[:count], real_N[:count]


def evaluate_policies(
    config: Config,
    demonstrations_uri: str,
    model_uri: str,
    latent_uri: str,
    oracle_uri: str,
    log: RunLog = NoLog(),  # noqa: B008
) -> dict[str, float]:
    """Shares of the held-out levels that each policy solves: `solved_<who>`, and `solved_latent_<N>` for N labels.

    Also `map_agreement`: how often the map of the most labels gives its own transitions' true actions back. The levels
    are the same for every policy and seed. Raises ValueError for what is missing or does not fit.
    """
    part, seed = config.cloning, config.seed
    genie, store = checkpoint.load_model(model_uri), VideoStore.open(demonstrations_uri)
    latent, oracle = load_policy(latent_uri, genie.config.num_actions), load_policy(oracle_uri, NUM_ACTIONS)
    latent_N, real_N = labelled_transitions(genie, store, max(part.labelled), seed)
    maps = {n: ActionMap(latent_N[:n], real_N[:n], genie.config.num_actions) for n in part.labelled}
    levels = play.held_out_levels(part.eval_levels)
    policies: dict[str, play.Policy] = {
        "right_up": lambda frames_BHWC, done_B: np.full(len(done_B), RIGHT_UP),
        "random": play.random_policy(seed),
        "oracle": Player(oracle, seed, random_share=part.random_share),
        **{f"latent_{n}": Player(latent, seed, translate) for n, translate in maps.items()},
    }
    found = {}
    for name in bar(policies, desc="play held-out levels", unit="policy"):
        found[f"solved_{name}"] = float(play.play_levels(policies[name], levels, part.mode, part.max_steps).mean())
    ways = [solution.actions for solution in solve(levels, part.mode)]
    found["solved_expert"] = float(np.mean([way is not None and len(way) <= part.max_steps for way in ways]))
    if len(latent_N):
        found["map_agreement"] = maps[len(latent_N)].agreement(latent_N, real_N)
    log.metrics(found)
    shown = ", ".join(f"{name.removeprefix('solved_')} {share:.0%}" for name, share in found.items())
    summary("evaluate-policies", f"{part.eval_levels} held-out {part.mode} levels: {shown}")
    return found
