"""Pictures unlike any training data as prompts (Figure 10): what each latent action does in them, and whether alike.

A prompt is one picture: a photo, a drawing, what an image generator made. No label says what an action should do there,
so what can be told is whether an action does the same from every picture.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import PurePosixPath

import numpy as np
import torch
from fsspec.core import url_to_fs
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from genie_model import files, metrics, pictures
from genie_model.checkpoint import load_model
from genie_model.config import Config
from genie_model.evaluate import rollout
from genie_model.genie import Genie
from genie_model.metrics import Estimate
from genie_model.progress import NoLog, RunLog, summary
from genie_model.prompt_samples import samples
from genie_model.report import html_page
from genie_model.stills import FORMATS, Aspect, frame_of

Frames = NDArray[np.uint8]
Floats = NDArray[np.float64]

HELD_OUT = "held_out"  # the kind of the model's own start frames: what prompts like the training data come to
_SUFFIXES = {suffix for suffix, name in Image.registered_extensions().items() if name in FORMATS}
_AT_ONCE = 16  # prompts
_MOVED = 0.5  # pixels; less has no direction to speak of


@dataclass(frozen=True)
class Prompts:
    """`kinds` say which sort of picture each is: the folder that it lay in."""

    names: list[str]
    kinds: list[str]
    frames_PHWC: Frames

    @classmethod
    def read(cls, images_uri: str, height: int, width: int, aspect: Aspect) -> Prompts:
        """All pictures in the folder and those below it, fitted to the frame; without a URI the samples made here.

        Raises ValueError for a broken picture, or where there are fewer than two: consistency is between prompts.
        """
        found = _pictures_in(images_uri) if images_uri else samples()
        if len(found) < 2:
            asked = f"{', '.join(sorted(_SUFFIXES))} files"
            raise ValueError(f"{len(found)} pictures below {images_uri}: prompts need at least 2 {asked} there")
        names = sorted(found)
        frames = []
        for name in names:
            try:
                picture = Image.open(io.BytesIO(found[name]), formats=FORMATS)
                frames.append(frame_of(picture, height, width, aspect))
            except UnidentifiedImageError:
                raise ValueError(f"{images_uri}/{name} is no picture that can be read: repair or remove it") from None
            except Exception as error:  # decoders raise anything on broken data
                raise ValueError(f"{images_uri}/{name} cannot be read: repair or remove it ({error})") from None
        kinds = [re.sub(r"[^\w.-]", "_", name.rpartition("/")[0]) for name in names]  # as MLflow takes names
        return cls([str(PurePosixPath(name).with_suffix("")) for name in names], kinds, np.stack(frames))


@dataclass(frozen=True)
class Played:
    """`metrics` by name, those with an interval over prompts beside a `_ci95`; `pictures` are uint8 (H, W, 3).

    A kind of prompts has its own under KIND/, where there are at least two of it and others beside them.
    """

    metrics: dict[str, float]
    pictures: dict[str, Frames]

    def save(self, uri: str, title: str) -> None:
        """A page for people, and its figures and pictures one by one, into the folder `uri`."""
        files.write_atomic(f"{uri}/metrics.json", json.dumps(self.metrics, indent=2).encode())
        for name, picture_HWC in self.pictures.items():
            png = io.BytesIO()
            Image.fromarray(picture_HWC).save(png, "png")
            files.write_atomic(f"{uri}/{name}.png", png.getvalue())
        files.write_atomic(f"{uri}/index.html", html_page(title, self.metrics, self.pictures).encode())


def play_prompts(config: Config, model_uri: str, images_uri: str = "", log: RunLog = NoLog()) -> Played:  # noqa: B008
    """Enters the model at `model_uri` from every picture below `images_uri`, holds each latent action, and measures.

    Frames are sampled as `config.sampling` says, pictures fitted as `config.prompts` does. The model's own start
    frames, where it has some, are measured beside them. Raises ValueError when model or pictures are missing or broken.
    """
    genie = load_model(model_uri, config.sampling)
    height, width, _ = genie.config.frame_shape
    played = measure(config, genie, Prompts.read(images_uri, height, width, config.prompts.aspect))
    starts_uri = f"{model_uri.rstrip('/')}/start_frames"
    if len(files.names(starts_uri)) > 1:
        starts = Prompts.read(starts_uri, height, width, config.prompts.aspect)
        played.metrics.update(_named(HELD_OUT, _hold(config, genie, starts)[1]))
    log.metrics(played.metrics)
    for name, picture_HWC in played.pictures.items():
        log.image(name, picture_HWC)
    summary("prompts", _headline(config, played.metrics))
    return played


def measure(config: Config, genie: Genie, prompts: Prompts) -> Played:
    """All figures and pictures of a Genie in memory. The same config, model and prompts give the same."""
    outcomes, motion_PA2 = _hold(config, genie, prompts)
    found = _named("", motion_PA2)
    for kind in sorted({kind for kind in prompts.kinds if kind}):
        of_kind_P = np.array(prompts.kinds) == kind
        if 1 < of_kind_P.sum() < len(of_kind_P):
            found |= _named(kind, motion_PA2[of_kind_P])
    shown = np.sort(pictures.most_different(prompts.frames_PHWC, config.prompts.shown))
    names = [prompts.names[prompt] for prompt in shown]
    drawn = {"motion_of_prompts": pictures.arrows(motion_PA2)}
    for times, outcomes_PAHWC in outcomes.items():
        grid = pictures.action_grid(prompts.frames_PHWC[shown], outcomes_PAHWC[shown], times, names)
        drawn[f"prompts_held_{times}"] = grid
    return Played(found, drawn)


def _hold(config: Config, genie: Genie, prompts: Prompts) -> tuple[dict[int, Frames], Floats]:
    """Every action held from every prompt: after how many times which frames (P, A, H, W, C), and the screen's motion.

    Motion is what `metrics.screen_motion` finds from frame to frame, in pixels (down, right), summed up over `hold`. It
    begins at what the tokenizer keeps of the prompt: the loss of what it cannot say is no motion.
    """
    num_actions, hold = genie.config.num_actions, config.prompts.hold
    outcomes: dict[int, list[Frames]] = {hold: [], config.prompts.hold_longer: []}
    motion = []
    for begin in range(0, len(prompts.names), _AT_ONCE):
        prompts_P1HWC = prompts.frames_PHWC[begin : begin + _AT_ONCE, None]
        actions_BT = np.tile(np.arange(num_actions), len(prompts_P1HWC))[:, None].repeat(max(outcomes), axis=1)
        each_B1HWC = prompts_P1HWC.repeat(num_actions, axis=0)
        dreamt_BTHWC = rollout(genie, each_B1HWC, actions_BT, config.seed + begin * num_actions, "prompts")
        kept_B1HWC = genie.reconstruct(torch.from_numpy(prompts_P1HWC)).numpy().repeat(num_actions, axis=0)
        seen_BTHWC = np.concatenate([kept_B1HWC, dreamt_BTHWC[:, :hold]], axis=1)
        steps = [metrics.screen_motion(seen_BTHWC[:, t], seen_BTHWC[:, t + 1]) for t in range(hold)]
        motion.append(np.sum(steps, axis=0))
        for times, frames in outcomes.items():
            frames.append(dreamt_BTHWC[:, times - 1])
    cells = len(prompts.names), num_actions
    by_times = {times: np.concatenate(f).reshape(*cells, *f[0].shape[1:]) for times, f in outcomes.items()}
    return by_times, np.concatenate(motion).reshape(*cells, 2)


# --- how alike actions are ---


def consistency(motion_PA2: Floats) -> dict[str, Estimate | float]:
    """What the motion (down, right) of the screen says about actions held from several prompts.

    `motion_explained`: the share of its variance that the action explains, fitted on half of the prompts and tried on
    the rest: 1 where an action does the same everywhere, about 0 where it does what it likes. `direction_explained`:
    the same of directions, whose length is 1 or, where nothing moved, 0, so that no prompt that goes astray outweighs
    the others. `direction_agreement`: the mean cosine between one action's directions in two prompts, and
    `direction_of_others` that between different actions', which a world that heeds none scores as well. `moved`: the
    share of prompts and actions where anything moved.
    """
    num_prompts, num_actions, _ = motion_PA2.shape
    actions_N, prompts_N = np.tile(np.arange(num_actions), num_prompts), np.arange(num_prompts).repeat(num_actions)
    length_PA = np.linalg.norm(motion_PA2, axis=-1)
    moved_PA = length_PA >= _MOVED
    unit_PA2 = motion_PA2 * (moved_PA / np.maximum(length_PA, _MOVED))[..., None]
    return {
        "motion_explained": metrics.explained_variance(actions_N, motion_PA2.reshape(-1, 2), prompts_N),
        "direction_explained": metrics.explained_variance(actions_N, unit_PA2.reshape(-1, 2), prompts_N),
        "direction_agreement": _jackknife(lambda keep_P: _agreement(unit_PA2[keep_P])[0], num_prompts),
        "direction_of_others": _jackknife(lambda keep_P: _agreement(unit_PA2[keep_P])[1], num_prompts),
        "moved": metrics.mean_over_levels(moved_PA.ravel(), prompts_N),
        "motion_pixels": metrics.mean_over_levels(length_PA.ravel(), prompts_N),
    }


def _agreement(unit_PA2: Floats) -> tuple[float, float]:
    """The mean cosine over pairs of prompts, of the same action and of different ones; unit vectors, or zeros: still.

    The sum over pairs is the square of the sum less the pairs of a prompt with itself.
    """

    def pairs(x_PK: Floats) -> float:
        return float(np.square(x_PK.sum(0)).sum() - np.square(x_PK).sum())

    counts_PA = np.square(unit_PA2).sum(-1)
    same = pairs(unit_PA2), pairs(counts_PA)
    every = pairs(unit_PA2.sum(1)), pairs(counts_PA.sum(1))
    others = every[0] - same[0], every[1] - same[1]
    same_mean, others_mean = (cosines / count if count > 0.5 else 0.0 for cosines, count in (same, others))
    return same_mean, others_mean


def _jackknife(statistic: Callable[[NDArray[np.bool_]], float], num_prompts: int) -> Estimate:
    """With the interval from leaving out each prompt in turn: a bootstrap would pair a prompt with itself."""
    everyone = np.ones(num_prompts, bool)
    without_P = np.array([statistic(np.arange(num_prompts) != left_out) for left_out in range(num_prompts)])
    error = np.sqrt((num_prompts - 1) * without_P.var())
    return Estimate(statistic(everyone), float(1.96 * error))


def _named(kind: str, motion_PA2: Floats) -> dict[str, float]:
    """`consistency` as flat metrics; of a kind of prompts under its name."""
    found = metrics.flatten(consistency(motion_PA2))
    return {f"{kind}/{name}" if kind else name: value for name, value in found.items()}


def _headline(config: Config, found: dict[str, float]) -> str:
    def shown(name: str) -> str:
        return f"{found[name]:.2f} ± {found[f'{name}_ci95']:.2f}"

    text = (
        f"each action held {config.prompts.hold} times explains {shown('direction_explained')} of where the screen "
        f"moves; its directions agree by {shown('direction_agreement')} "
        f"(different actions' {found['direction_of_others']:.2f}); {found['moved']:.0%} moved"
    )
    starts = f"{HELD_OUT}/direction_explained"
    return f"{text}; from held-out frames {shown(starts)} is explained" if starts in found else text


def _pictures_in(uri: str) -> dict[str, bytes]:
    """All files that are named as pictures, by their path below the folder."""
    fs, folder = url_to_fs(uri)
    paths = [path for path in fs.find(folder) if PurePosixPath(path).suffix.lower() in _SUFFIXES]
    return {str(PurePosixPath(path).relative_to(folder)): fs.cat_file(path) for path in paths}
