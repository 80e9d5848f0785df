"""What latent actions tell of the true ones, where those are known: only here are they read to judge a model."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from genie_model import metrics, pictures
from genie_model.config import Config
from genie_model.data.held_out import Episode, HeldOut
from genie_model.metrics import Estimate
from genie_model.probe import supervised_bound


def measure_beside_truth(
    config: Config,
    held_out: HeldOut,
    windows: Sequence[tuple[Episode, int]],
    latents_N: NDArray[np.int64],
    found: dict[str, Estimate | float],
    drawn: dict[str, NDArray[np.uint8]],
) -> NDArray[np.int64]:
    """Adds metrics to `found` and tables to `drawn`; returns counts (true, told) of `metrics.DIRECTIONS`.

    `latents_N` are of the windows' transitions, in order.
    """
    length = config.data.clip_length
    known = [(episode.truth, start) for episode, start in windows if episode.truth is not None]
    actions_N = np.concatenate([truth.action_T[start : start + length - 1] for truth, start in known])
    dx_N = np.concatenate([np.diff(truth.x_T[start : start + length]) for truth, start in known])
    dy_N = np.concatenate([np.diff(truth.y_T[start : start + length]) for truth, start in known])
    levels_N = np.repeat([episode.level for episode, _ in windows], length - 1)
    found.update(metrics.latents_beside_truth(latents_N, actions_N, dx_N, dy_N, levels_N, config.num_actions))
    for axis in ("x", "y"):
        change_N = np.concatenate([_change(getattr(truth, f"{axis}_T"), start, length) for truth, start in known])
        known_N = np.isfinite(change_N)
        found[f"displacement_change_{axis}_explained"] = metrics.explained_variance(
            latents_N[known_N], change_N[known_N], levels_N[known_N]
        )
    found["direction_supervised_bound"] = _direction_bound(held_out, config)

    directions_N = metrics.coinrun_direction(actions_N)
    table_AC = metrics.contingency_table(latents_N, directions_N, config.num_actions, len(metrics.DIRECTIONS))
    rows = [f"action {a + 1} ({share:.0%} of all)" for a, share in enumerate(table_AC.sum(axis=1) / table_AC.sum())]
    drawn["actions_beside_truth"] = pictures.share_table(table_AC, rows, metrics.DIRECTIONS)
    confusion_CC = metrics.direction_confusion(latents_N, directions_N, levels_N)
    shares = [
        f"{name} ({share:.0%} of all)"
        for name, share in zip(metrics.DIRECTIONS, confusion_CC.sum(axis=1) / len(latents_N), strict=True)
    ]
    drawn["true_direction_beside_told"] = pictures.share_table(confusion_CC, shares, metrics.DIRECTIONS)
    return confusion_CC


def _change(place_T: NDArray[np.float64], start: int, length: int) -> NDArray[np.float64]:
    """By how much each displacement between frames start..start + length - 1 differs from the one before it.

    An episode's first has none before it: NaN.
    """
    if start:
        return np.diff(place_T[start - 1 : start + length], n=2)
    return np.diff(place_T[:length], n=2, prepend=np.nan)


def _direction_bound(held_out: HeldOut, config: Config) -> Estimate:
    """Every transition that has a frame before it, told by a supervised net."""
    known = [(e.level, e.frames_THWC, e.truth) for e in held_out.episodes if e.truth and len(e.frames_THWC) > 2]
    starts = np.cumsum([0, *[len(frames_THWC) for _, frames_THWC, _ in known]])
    return supervised_bound(
        np.concatenate([frames_THWC for _, frames_THWC, _ in known]),
        np.concatenate([start + np.arange(1, len(f) - 1) for start, (_, f, _) in zip(starts, known, strict=False)]),
        np.concatenate([metrics.coinrun_direction(truth.action_T[1:]) for _, _, truth in known]),
        np.repeat([level for level, _, _ in known], [len(frames_THWC) - 2 for _, frames_THWC, _ in known]),
        steps=config.evaluation.probe_steps,
        seed=config.seed,
    )
