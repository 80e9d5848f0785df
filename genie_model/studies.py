"""The paper's comparisons as variants of one config: what changes, and what is held equal.

A cell is one variant with one seed: it is trained and measured like any other model. `tracking/studies.py` makes tables
and plots of the cells from MLflow; `pipelines/study.py` runs them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from torch._subclasses.fake_tensor import FakeTensorMode

from genie_model.config import Config, TransformerConfig, _did_you_mean
from genie_model.describe import num_parameters
from genie_model.paper import TABLE_10, TABLE_11, TABLE_11_HARDWARE
from genie_model.presets import get_preset
from genie_model.tokenizer import VideoTokenizer

Overrides = tuple[str, ...]
Row = tuple[str, ...]
_TOLERANCE = 0.03  # of the parameters that variants are matched to


class Curve(NamedTuple):
    """Metrics `<prefix><x>` over x, a whole number; each also a column, whose heading says x at its braces."""

    prefix: str
    heading: str
    x: str  # its label
    y: str
    beside: tuple[str, ...]  # metrics that hang on no x


class Study(NamedTuple):
    """One table or figure of the paper."""

    title: str
    source: str
    variants: Callable[[Config], dict[str, Overrides]]
    columns: dict[str, str]  # metric of a cell -> heading
    paper: tuple[Row, ...]  # the paper's own figures, a row of headings first
    scale: str  # of what the paper compares, in a sentence
    plot: tuple[str, str, str] | None = None  # a power law: metrics x and y, and how variants outside it begin
    curve: Curve | None = None
    stages: Mapping[str, str] = {"train_tokenizer": "tokenizer", "train_world": "world"}  # that the report tells
    video: bool = False  # its data are people's videos, not CoinRun


def _lam_inputs(config: Config) -> dict[str, Overrides]:
    """The paper's LAM with either input; where the preset's LAM is another one, that beside them."""
    plain = ("lam.predict=frame", "lam.motion_rows=0", "lam.motion_columns=0")
    variants: dict[str, Overrides] = {
        "pixels": ("lam.inputs=pixels", *plain),
        "tokens": ("lam.inputs=tokens", *plain),
    }
    if config not in (config.with_overrides(*changes) for changes in variants.values()):
        variants[f"{config.lam.inputs}, as {config.name} has it"] = ()
    return variants


def _tokenizers(config: Config) -> dict[str, Overrides]:
    """Patches of 10 pixels where they fit the frame, else of the closest size; widths solved from st_vivit's count."""
    height, width = config.data.frame_height, config.data.frame_width
    fitting = [patch for patch in range(1, min(height, width) + 1) if height % patch == width % patch == 0]
    patch = min(fitting, key=lambda patch: (abs(patch - 10), patch))
    shared = [f"tokenizer.patch_size={patch}"]
    if patch % math.isqrt(config.tokenizer.codes_per_patch):
        shared.append("tokenizer.codes_per_patch=1")
    st_vivit = config.with_overrides(*shared, "tokenizer.architecture=st_vivit")
    aim = tokenizer_parameters(st_vivit)
    variants = {
        name: (*shared, f"tokenizer.architecture={name}", *_matched(st_vivit, name, aim)) for name in ("vit", "c_vivit")
    }
    return variants | {"st_vivit": (*shared, "tokenizer.architecture=st_vivit")}


def _matched(config: Config, architecture: str, aim: int) -> Overrides:
    """Widths at which the architecture has `aim` parameters. Raises ValueError where none comes within 3%."""
    encoder, decoder = config.tokenizer.encoder.d_model, config.tokenizer.decoder.d_model

    def at(times: float) -> Overrides:
        return (
            f"tokenizer.encoder.d_model={_width(encoder * times)}",
            f"tokenizer.decoder.d_model={_width(decoder * times)}",
        )

    def count(times: float) -> int:
        return tokenizer_parameters(config.with_overrides(f"tokenizer.architecture={architecture}", *at(times)))

    low, high = 0.25, 4.0
    for _ in range(12):  # the count grows with the width
        middle = (low + high) / 2
        low, high = (middle, high) if count(middle) < aim else (low, middle)
    off, times = min((abs(count(times) / aim - 1), times) for times in (low, high))
    if off > _TOLERANCE:
        raise ValueError(f"no width brings {architecture} within {_TOLERANCE:.0%} of {aim:,} parameters")
    return at(times)


def _width(wanted: float) -> int:
    """Where it is large it can be what hardware likes."""
    return max(8 * round(wanted / 8) if wanted > 256 else round(wanted), 8)


def tokenizer_parameters(config: Config) -> int:
    with FakeTensorMode():
        return num_parameters(VideoTokenizer(config.tokenizer, *config.frame_shape[:2], config.data.clip_length))


def _scaling(config: Config) -> dict[str, Overrides]:
    """Sizes and batch sizes of the dynamics: Tables 10 and 11 for a platformers preset, else multiples of its own."""
    stage, shape = config.train_world, config.dynamics.transformer
    if config.name.startswith("platformers"):
        sizes = {f"size {name}": _shape(row.shape) for name, row in TABLE_10.items()}
        return sizes | {f"batch {batch}": (*_shape(TABLE_11), _batch(batch)) for batch in TABLE_11_HARDWARE}
    own, width = stage.batch_size, shape.d_model
    widths = {f"width {round(width * fraction)}": _scaled(shape, fraction) for fraction in (0.25, 0.5, 1, 2)}
    sizes = {f"{name}, batch {own}": _shape(scaled) for name, scaled in widths.items()}
    batches = sorted({max(round(own * fraction), 1) for fraction in (0.25, 0.5)} - {own})
    return sizes | {f"batch {batch}, width {width}": (_batch(batch),) for batch in batches}


def _scaled(shape: TransformerConfig, fraction: float) -> TransformerConfig:
    heads = max(round(shape.num_heads * fraction), 1)
    return shape.model_copy(update={"d_model": max(8 * round(shape.d_model * fraction / 8), 8), "num_heads": heads})


def _modes(config: Config) -> dict[str, Overrides]:
    """CoinRun's."""
    return {mode: (f"cloning.mode={mode}",) for mode in ("easy", "hard")}


def _curation(config: Config) -> dict[str, Overrides]:
    """The rule that keeps everything, beside the preset's. Raises ValueError where that is the same."""
    variants: dict[str, Overrides] = {"original": ("curation.threshold=0", "curation.confidence=0"), "curated": ()}
    if config == config.with_overrides(*variants["original"]):
        raise ValueError("curation.threshold=0 and curation.confidence=0 keep every clip: raise one to compare")
    return variants


def _shape(shape: TransformerConfig) -> Overrides:
    fields = ("num_layers", "d_model", "num_heads", "head_dim")
    return tuple(f"dynamics.transformer.{field}={getattr(shape, field)}" for field in fields)


def _batch(batch_size: int) -> str:
    return f"train_world.batch_size={batch_size}"


_PLAY = {
    "fvd_i3d": "FVD (I3D)",
    "fvd_random3d": "FVD (random 3D net)",
    "delta_psnr_t4": "Δ₄ PSNR, dB",
    "rollout_psnr_t4": "PSNR of frame 4, dB",
}
STUDIES = {
    "lam_inputs": Study(
        "What the latent action model sees: pixels or tokens",
        "Table 2",
        _lam_inputs,
        {"parameters": "parameters", **_PLAY, "direction_balanced_accuracy": "direction told"},
        (
            ("", "parameters", "FVD", "Δ₄ PSNR, dB"),
            ("tokens, Platformers", "2.3B", "38.8", "1.33"),
            ("pixels, Platformers", "2.5B", "40.1", "1.91"),
            ("tokens, Robotics", "1B", "257.8", "1.65"),
            ("pixels, Robotics", "1B", "136.4", "2.07"),
        ),
        "models of 1B to 2.5B parameters on 6.8 million clips of 16 s at 160x90 (Platformers) and on robot videos; "
        "its FVD is by a trained I3D, which no random net's compares with",
    ),
    "tokenizers": Study(
        "Which tokenizer: frames alone, all of space and time at once, or one after the other",
        "Table 3",
        _tokenizers,
        {
            "parameters_tokenizer": "tokenizer's parameters",
            "peak_memory_mb_train_tokenizer": "peak memory of the process that trained it, MB",
            "tokenizer_psnr": "its PSNR, dB",
            **_PLAY,
        },
        (
            ("", "parameters", "memory", "FVD", "Δ₄ PSNR, dB"),
            ("vit", "230M", "0.3 GB", "114.5", "1.39"),
            ("c_vivit", "225M", "1.6 GB", "272.7", "1.37"),
            ("st_vivit", "205M", "0.9 GB", "81.4", "1.66"),
        ),
        "tokenizers of 205M to 230M parameters, patches of 10 pixels, batches of 128 clips of 160x90; its FVD is by a "
        "trained I3D, which no random net's compares with, and its memory is not a whole process's",
    ),
    "scaling": Study(
        "What size and batch size buy",
        "Figure 9, Tables 10 and 11",
        _scaling,
        {
            "parameters_dynamics": "dynamics' parameters",
            "flops_dynamics": "dynamics' training FLOPs",
            "final_dynamics_cross_entropy": "final training loss",
            **_PLAY,
        },
        (
            ("", "dynamics' parameters", "dynamics' training FLOPs"),
            *((f"size {name}", name.upper(), f"{row.flops:.3g}") for name, row in TABLE_10.items()),
        ),
        "200,000 steps of 256 clips of 160x90 for sizes of 41M to 2.7B parameters, and of 128 to 448 clips for 2.3B",
        ("flops_dynamics", "final_dynamics_cross_entropy", "batch"),
    ),
    "cloning": Study(
        "What latent actions are worth to an agent: share of held-out levels solved",
        "section 3.3, Figure 15",
        _modes,
        {
            "solved_expert": "expert",
            "solved_oracle": "oracle",
            "solved_right_up": "RIGHT and UP held",
            "solved_random": "random agent",
            "map_agreement": "real actions that the map of the most labels gives back of these",
        },
        (
            ("", "LAM-based policy"),
            ("easy and hard", "the oracle's score given as few as 200 expert samples; the figure prints no numbers"),
        ),
        "a LAM that was trained on videos of other games, policies of 12 layers of width 512, an R2D2 agent as expert, "
        "and 100 levels played for each of 5 seeds. All seeds here play the same levels: a share of n levels is itself "
        "only good to ± 1/√n, 10 points for 100, beside the interval over seeds",
        curve=Curve(
            "solved_latent_",
            "LAM-based policy, {} labels",
            "labelled expert transitions",
            "share of levels solved",
            ("solved_oracle", "solved_right_up", "solved_random"),
        ),
        stages={"train_policy": "policy"},
    ),
    "curation": Study(
        "What curation is worth: all clips, or those that a learned filter keeps",
        "Table 4",
        _curation,
        {
            "curated_clips": "clips",
            "curated_hours": "hours",
            "curator_precision": "of held-out labels that the rule keeps, share that is good",
            "curator_recall": "of good held-out labels, share that it keeps",
            "parameters": "parameters",
            **_PLAY,
        },
        (
            ("", "clips", "hours", "parameters", "FVD"),
            ("original", "55M", "244k", "580M", "61.4"),
            ("curated", "6.8M", "30k", "580M", "54.8"),
        ),
        "55 million clips of 16 s at 160x90 and 10 frames a second from public videos, 10,000 labels, a model of 580M "
        "parameters for each; its FVD is by a trained I3D, which no random net's compares with",
        video=True,
    ),
}


def study(name: str) -> Study:
    """Raises ValueError that lists the names and offers the closest."""
    if name not in STUDIES:
        raise ValueError(f"unknown study {name!r}{_did_you_mean(name, list(STUDIES))} Studies: {', '.join(STUDIES)}")
    return STUDIES[name]


class Cell(NamedTuple):
    """A variant with a seed: overrides of the preset that the study was asked for."""

    variant: str
    seed: int
    overrides: list[str]


def cells(
    name: str, preset: str, overrides: Sequence[str], seeds: Sequence[int], only: Sequence[str] = ()
) -> list[Cell]:
    """Of a study at that preset, all variants or those named in `only`, the first seed first.

    Raises ValueError where a name is unknown, a config cannot be, or there are no seeds.
    """
    if not seeds:
        raise ValueError("a study needs seeds, as in 0 1 2")
    variants = study(name).variants(get_preset(preset).with_overrides(*overrides))
    for variant in only:
        if variant not in variants:
            known = f"Variants of {name}: {', '.join(variants)}"
            raise ValueError(f"unknown variant {variant!r}{_did_you_mean(variant, list(variants))} {known}")
    return [
        Cell(variant, seed, [*overrides, *changes, f"seed={seed}"])
        for seed in dict.fromkeys(seeds)
        for variant, changes in variants.items()
        if not only or variant in only
    ]
