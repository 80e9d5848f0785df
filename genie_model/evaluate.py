"""How good a Genie is on video it was never trained on (section 3, Metrics).

Where true actions are known, also what its latent ones tell of them (beside_truth.py). Where nobody knows them, as of
ordinary video, that is not measured; and what is called a level here, the unit of every interval, is a source video.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from genie_model import files, metrics, pictures
from genie_model.beside_truth import measure_beside_truth
from genie_model.checkpoint import load_model
from genie_model.config import Config
from genie_model.data.held_out import HeldOut
from genie_model.data.store import VideoStore
from genie_model.genie import Genie
from genie_model.metrics import Estimate, VideoFeatures
from genie_model.progress import NoLog, RunLog, bar, summary
from genie_model.source import code_digest
from genie_model.video_features import I3DFeatures, Random3DFeatures

_BATCH = 16  # clips at a time
_CODE = (  # what decides the figures of given weights
    "backend/compiled.py",
    "backend/graphs.py",
    "backend/native.py",
    "beside_truth.py",
    "data/codecs.py",
    "data/held_out.py",
    "data/store.py",
    "data/truth.py",
    "dynamics.py",
    "evaluate.py",
    "genie.py",
    "lam.py",
    "layers.py",
    "maskgit.py",
    "metrics.py",
    "probe.py",
    "quantizer.py",
    "tokenizer.py",
    "video_features.py",
)

Frames = NDArray[np.uint8]
Findings = dict[str, Estimate | float]


@dataclass(frozen=True)
class Evaluation:
    """`metrics` by name, those with an interval over levels beside a `_ci95`; `pictures` are uint8 (H, W, 3).

    `curves` are over t, the frames since the prompt: entry i of each is for t = i + 1. `confusion` counts (true, told)
    how often latent actions told which of `metrics.DIRECTIONS`; there is none where true actions are not known.
    """

    metrics: dict[str, float]
    curves: dict[str, list[float]]
    pictures: dict[str, Frames]
    confusion: NDArray[np.int64] | None

    def log_to(self, log: RunLog) -> None:
        log.metrics(self.metrics)
        for t, values in enumerate(zip(*self.curves.values(), strict=True), 1):
            log.metrics({f"by_t/{name}": value for name, value in zip(self.curves, values, strict=True)}, t)
        for name, picture_HWC in self.pictures.items():
            log.image(name, picture_HWC)


def evaluate(config: Config, model_uri: str, data_uri: str, log: RunLog = NoLog()) -> Evaluation:  # noqa: B008
    """Measures the model at `model_uri` on `data_uri`/eval as `config.evaluation` says, and logs what it finds.

    Frames are sampled as `config.sampling` says, whatever the model was trained beside. Also writes the held-out start
    frames into the model's folder. Raises ValueError when model or data are missing or broken, or too few for what is
    asked.
    """
    genie = load_model(model_uri, config.sampling)
    held_out = HeldOut.open(f"{data_uri}/eval", config.evaluation.clips, genie.config.frame_shape)
    evaluation = measure(config, genie, held_out)
    save_start_frames(model_uri, held_out, genie)
    evaluation.log_to(log)
    summary("evaluate", _headline(config, evaluation.metrics))
    return evaluation


def measure(config: Config, genie: Genie, held_out: HeldOut) -> Evaluation:
    """All metrics and pictures of a Genie in memory. The same config, model and data give the same figures."""
    features = _video_features(config)  # a wrong URI shows before the work, not after
    frames_BTHWC, levels_B = held_out.clips(config.data.clip_length, config.evaluation.clips, config.seed)
    found: Findings = {}
    curves: dict[str, list[float]] = {}
    drawn: dict[str, Frames] = {}
    _measure_tokenizer(config, genie, frames_BTHWC, levels_B, found, drawn)
    _measure_rollouts(config, genie, frames_BTHWC, levels_B, features, found, curves, drawn)
    _measure_held_actions(config, genie, frames_BTHWC, levels_B, found)
    confusion = _measure_latent_actions(config, genie, held_out, found, drawn)
    found["lam_mse_over_copy"] = _lam_mse_over_copy(genie, frames_BTHWC, levels_B)
    drawn["action_grid"] = _action_grid(config, genie, frames_BTHWC)
    return Evaluation(metrics.flatten(found), curves, drawn, confusion)


def measure_play(config: Config, genie: Genie, held_out: HeldOut) -> dict[str, float]:
    """Those metrics alone that `config.sampling` changes, as `measure` has them."""
    frames_BTHWC, levels_B = held_out.clips(config.data.clip_length, config.evaluation.clips, config.seed)
    found: Findings = {}
    _measure_rollouts(config, genie, frames_BTHWC, levels_B, _video_features(config), found, {}, {})
    _measure_held_actions(config, genie, frames_BTHWC, levels_B, found)
    return metrics.flatten(found)


def measured_on(config: Config, data_uri: str) -> str:
    """A digest of what decides a model's figures besides the model: only where it is the same do two models compare."""
    asked = json.dumps([config.evaluation.model_dump(mode="json"), config.data.clip_length, config.seed])
    held_out = VideoStore.open(f"{data_uri}/eval").digest
    return hashlib.sha256(f"{held_out} {asked} {code_digest(_CODE)}".encode()).hexdigest()[:12]


def save_start_frames(model_uri: str, held_out: HeldOut, genie: Genie, count: int = 8) -> list[str]:
    """Writes `count` held-out first frames that look unlike each other to <model_uri>/start_frames/00.png, ....

    They are what play starts from when nobody uploads an image. Of ordinary video they are among the half that the
    tokenizer draws best: the menus and faces that a filter took out of training are held out still. Returns their URIs;
    the same data and model give the same files.
    """
    firsts_BHWC = np.stack([episode.frames_THWC[0] for episode in held_out.episodes])
    if not held_out.has_truth:
        drawn_BTHWC = _in_batches(genie.reconstruct, firsts_BHWC[:, None], "start frames")
        closeness_B = metrics.psnr(firsts_BHWC, drawn_BTHWC[:, 0])
        firsts_BHWC = firsts_BHWC[np.sort(np.argsort(-closeness_B)[: -(-len(firsts_BHWC) // 2)])]
    uris = []
    for number, index in enumerate(pictures.most_different(firsts_BHWC, count)):
        png = io.BytesIO()
        Image.fromarray(firsts_BHWC[index]).save(png, "png")
        uris.append(f"{model_uri.rstrip('/')}/start_frames/{number:02d}.png")
        files.write_atomic(uris[-1], png.getvalue())
    return uris


# --- the parts of a Genie ---


def _measure_tokenizer(
    config: Config,
    genie: Genie,
    frames_BTHWC: Frames,
    levels_B: NDArray[np.int64],
    found: Findings,
    drawn: dict[str, Frames],
) -> None:
    reconstructed_BTHWC = _in_batches(genie.reconstruct, frames_BTHWC, "reconstruct")
    codes_BTN = _in_batches(genie.tokenize, frames_BTHWC, "tokenize")
    found["tokenizer_psnr"] = _over_levels(metrics.psnr(frames_BTHWC, reconstructed_BTHWC), levels_B)
    found["tokenizer_ssim"] = _over_levels(metrics.ssim(frames_BTHWC, reconstructed_BTHWC), levels_B)
    found["tokenizer_code_usage"] = metrics.code_usage(codes_BTN, config.tokenizer.codebook.num_codes)
    found["tokenizer_code_perplexity"] = metrics.code_perplexity(codes_BTN, config.tokenizer.codebook.num_codes)
    drawn["reconstruction"] = pictures.reconstruction_strip(frames_BTHWC[:2], reconstructed_BTHWC[:2])


def _measure_rollouts(
    config: Config,
    genie: Genie,
    frames_BTHWC: Frames,
    levels_B: NDArray[np.int64],
    video_features: Sequence[VideoFeatures],
    found: Findings,
    curves: dict[str, list[float]],
    drawn: dict[str, Frames],
) -> None:
    """From a real prompt to the clip's end, with the actions that the LAM infers from the truth and with random ones.

    Delta-t PSNR is the difference of the two in closeness to the truth (section 3); `horizon` is the t of the headline.
    """
    prompt, horizon = config.evaluation.prompt_frames, config.evaluation.horizon
    prompt_BTHWC, truth_BTHWC = frames_BTHWC[:, :prompt], frames_BTHWC[:, prompt:]
    inferred_BT = _in_batches(genie.infer_actions, frames_BTHWC, "infer actions")[:, prompt - 1 :]
    random_BT = np.random.default_rng(config.seed).integers(config.num_actions, size=inferred_BT.shape)
    inferred_BTHWC = rollout(genie, prompt_BTHWC, inferred_BT, config.seed, "inferred actions")
    random_BTHWC = rollout(genie, prompt_BTHWC, random_BT, config.seed, "random actions")
    copy_BTHWC = np.repeat(prompt_BTHWC[:, -1:], truth_BTHWC.shape[1], axis=1)

    rollout_BT = metrics.mean_squared_error(truth_BTHWC, inferred_BTHWC)
    copy_BT = metrics.mean_squared_error(truth_BTHWC, copy_BTHWC)
    by_t: dict[str, list[Estimate]] = {
        "delta_psnr": [
            _over_levels(delta_B, levels_B)
            for delta_B in metrics.delta_psnr(truth_BTHWC, inferred_BTHWC, random_BTHWC).T
        ],
        "rollout_psnr": [metrics.pooled_psnr(error_B, levels_B) for error_B in rollout_BT.T],
        "copy_psnr": [metrics.pooled_psnr(error_B, levels_B) for error_B in copy_BT.T],
        "rollout_over_copy": [
            metrics.pooled_psnr_gain(ours_B, copy_B, levels_B)
            for ours_B, copy_B in zip(rollout_BT.T, copy_BT.T, strict=True)
        ],
        "rollout_ssim": [_over_levels(ssim_B, levels_B) for ssim_B in metrics.ssim(truth_BTHWC, inferred_BTHWC).T],
    }
    for name, estimates in by_t.items():
        found.update({f"{name}_t{t}": estimates[t - 1] for t in sorted({1, horizon})})
        curves[name] = [estimate.value for estimate in estimates]
    drawn["by_t"] = pictures.line_plots(by_t, {"rollout_psnr": ["copy_psnr"], "delta_psnr": [], "rollout_ssim": []})

    dreamt_BTHWC = np.concatenate([prompt_BTHWC, inferred_BTHWC], axis=1)
    frozen_BTHWC = np.concatenate([prompt_BTHWC, copy_BTHWC], axis=1)
    for features in video_features:
        fvd = f"fvd_{features.name}"
        found[fvd] = metrics.frechet_video_distance(frames_BTHWC, dreamt_BTHWC, features)
        found[f"{fvd}_copy"] = metrics.frechet_video_distance(frames_BTHWC, frozen_BTHWC, features)

    imagined_BTHWC = np.concatenate([prompt_BTHWC, random_BTHWC], axis=1)
    shown = np.argsort(-copy_BT[:, horizon - 1])[:2]  # where most moves
    until = prompt + horizon
    drawn["rollout"] = pictures.rollout_strip(
        frames_BTHWC[shown, :until], dreamt_BTHWC[shown, :until], imagined_BTHWC[shown, :until], prompt
    )


def _video_features(config: Config) -> list[VideoFeatures]:
    found: list[VideoFeatures] = [Random3DFeatures()]
    if config.evaluation.i3d_uri:
        found.append(I3DFeatures(config.evaluation.i3d_uri, config.evaluation.i3d_sha256))
    return found


def _measure_latent_actions(
    config: Config, genie: Genie, held_out: HeldOut, found: Findings, drawn: dict[str, Frames]
) -> NDArray[np.int64] | None:
    """The latent actions of all held-out transitions, and the true ones they tell; returns `Evaluation.confusion`."""
    windows = held_out.windows(config.data.clip_length, stride=config.data.clip_length - 1)  # each transition once
    frames_WTHWC = np.stack(
        [episode.frames_THWC[start : start + config.data.clip_length] for episode, start in windows]
    )
    latents_N = _in_batches(genie.infer_actions, frames_WTHWC, "latent actions").ravel()
    least = metrics.MIN_ACTION_SHARE
    found["lam_action_usage"] = metrics.code_usage(latents_N, config.num_actions, min_share=least)
    found["lam_action_perplexity"] = metrics.code_perplexity(latents_N, config.num_actions)
    return measure_beside_truth(config, held_out, windows, latents_N, found, drawn) if held_out.has_truth else None


def _lam_mse_over_copy(genie: Genie, frames_BTHWC: Frames, levels_B: NDArray[np.int64]) -> Estimate:
    """The LAM decoder's error on the next frame over that of repeating the last one: 1 means that it learnt nothing."""
    predicted_BTHWC = _in_batches(genie.lam_reconstruct, frames_BTHWC, "latent action model")
    truth_BTHWC, copy_BTHWC = frames_BTHWC[:, 1:], frames_BTHWC[:, :-1]
    error_B = metrics.mean_squared_error(truth_BTHWC, predicted_BTHWC).mean(axis=1)
    return metrics.ratio_over_levels(
        error_B, metrics.mean_squared_error(truth_BTHWC, copy_BTHWC).mean(axis=1), levels_B
    )


def _measure_held_actions(
    config: Config, genie: Genie, frames_BTHWC: Frames, levels_B: NDArray[np.int64], found: Findings
) -> None:
    """Figure 17 as a number: how much of the screen's motion is explained by which action is held. Needs no labels.

    A world in which an action does the same everywhere scores near 1, one that does what it likes scores 0.
    """
    prompts, repeats = config.evaluation.held_prompts, config.evaluation.grid_repeats
    prompts_BTHWC = frames_BTHWC[:prompts, : config.evaluation.prompt_frames].repeat(config.num_actions, axis=0)
    actions_B = np.tile(np.arange(config.num_actions), len(frames_BTHWC[:prompts]))
    dreamt_BTHWC = rollout(
        genie, prompts_BTHWC, actions_B[:, None].repeat(repeats, axis=1), config.seed, "held actions"
    )
    seen_BTHWC = np.concatenate([prompts_BTHWC[:, -1:], dreamt_BTHWC], axis=1)
    steps = [metrics.screen_motion(seen_BTHWC[:, t], seen_BTHWC[:, t + 1]) for t in range(repeats)]
    motion_B2, held_levels_B = np.sum(steps, axis=0), levels_B[:prompts].repeat(config.num_actions)
    for name, truth in (("", motion_B2), ("_y", motion_B2[:, 0]), ("_x", motion_B2[:, 1])):
        found[f"held_motion{name}_explained"] = metrics.explained_variance(actions_B, truth, held_levels_B)


def _action_grid(config: Config, genie: Genie, frames_BTHWC: Frames) -> Frames:
    """Figure 17, from prompts that look unlike each other."""
    prompts_BTHWC = frames_BTHWC[:, : config.evaluation.prompt_frames]
    prompts_BTHWC = prompts_BTHWC[pictures.most_different(prompts_BTHWC[:, -1], config.evaluation.grid_prompts)]
    repeats = config.evaluation.grid_repeats
    actions_BT = np.tile(np.arange(config.num_actions), len(prompts_BTHWC))[:, None].repeat(repeats, axis=1)
    each_BTHWC = prompts_BTHWC.repeat(config.num_actions, axis=0)
    last_BHWC = rollout(genie, each_BTHWC, actions_BT, config.seed, "action grid")[:, -1]
    outcomes_BAHWC = last_BHWC.reshape(len(prompts_BTHWC), config.num_actions, *last_BHWC.shape[1:])
    return pictures.action_grid(prompts_BTHWC[:, -1], outcomes_BAHWC, repeats)


def rollout(genie: Genie, prompts_BTHWC: Frames, actions_BT: NDArray[np.int64], seed: int, desc: str) -> Frames:
    """What is dreamt after the prompts when these latent actions are taken: uint8, a frame for each action."""
    dreamt = []
    with bar(desc=f"evaluate: {desc}", unit="frame", total=actions_BT.size) as progress:
        for begin in range(0, len(prompts_BTHWC), _BATCH):
            prompts = torch.from_numpy(prompts_BTHWC[begin : begin + _BATCH])
            # Chances of their own: the bootstrap takes levels for independent.
            state = genie.start(prompts, seed=range(seed + begin, seed + begin + len(prompts)))
            frames = []
            for action_B in torch.from_numpy(actions_BT[begin : begin + _BATCH]).unbind(1):
                frames.append(genie.step(state, action_B).numpy())
                progress.update(len(action_B))
            dreamt.append(np.stack(frames, axis=1))
    return np.concatenate(dreamt)


def _in_batches(call: Callable[[Tensor], Tensor], frames_BTHWC: Frames, desc: str) -> NDArray[Any]:
    begins = bar(range(0, len(frames_BTHWC), _BATCH), desc=f"evaluate: {desc}", unit="batch")
    with torch.inference_mode():
        return np.concatenate(
            [call(torch.from_numpy(frames_BTHWC[begin : begin + _BATCH])).numpy() for begin in begins]
        )


def _over_levels(values: NDArray[np.float64], levels_B: NDArray[np.int64]) -> Estimate:
    """The mean of (B) or (B, T) values and its interval."""
    return metrics.mean_over_levels(values.reshape(len(levels_B), -1).mean(axis=1), levels_B)


def _headline(config: Config, found: dict[str, float]) -> str:
    """The key figures, each beside what chance or a copy would score."""

    def shown(name: str, digits: int) -> str:
        return f"{found[name]:.{digits}f} ± {found[f'{name}_ci95']:.{digits}f}"

    horizon = config.evaluation.horizon
    told = (
        f"tokenizer {shown('tokenizer_psnr', 1)} dB with {found['tokenizer_code_usage']:.0%} of codes; "
        f"delta-{horizon} PSNR {shown(f'delta_psnr_t{horizon}', 2)} dB; "
        f"frame 1 {found['rollout_psnr_t1']:.1f} dB (copy {found['copy_psnr_t1']:.1f}); "
        f"{found['lam_action_usage']:.0%} of {config.num_actions} actions in use, "
        f"LAM error {found['lam_mse_over_copy']:.2f} of copying"
    )
    if "direction_balanced_accuracy" not in found:
        return f"{told}; motion explained by the action that is held: {shown('held_motion_explained', 2)}"
    return (
        f"{told}; direction {shown('direction_balanced_accuracy', 2)} "
        f"(chance {found['direction_chance']:.2f}, codes of the true displacement "
        f"{found['direction_of_displacement']:.2f}, supervised {found['direction_supervised_bound']:.2f}); "
        f"motion explained: {found['displacement_x_explained']:.0%} across, {found['displacement_y_explained']:.0%} up"
    )
