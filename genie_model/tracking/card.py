"""A study's model card (Mitchell et al., 2019): what its models are, came from, are good for, and are not."""

from __future__ import annotations

import ast
import json
import shlex
from collections.abc import Iterable, Mapping, Sequence

from mlflow.entities import Run

from genie_model.presets import get_preset
from genie_model.report import markdown_table
from genie_model.studies import Row, Study

MADE = "made."  # tags: where what a step made lies
_PLAY = (
    "A world's folder plays with `python -m serving --model-uri FOLDER`, and is a Gymnasium environment. It shows what "
    "looks likely, and an action does what it did in the videos as far as the model could tell. "
)
_NOBODY = "No people, text or sound are in it."
_DRIFT = "- What was never in the data cannot be dreamt. A dream drifts from the game as it goes on.\n"


def model_card(study: Study, name: str, own: Run, cells: Sequence[Run]) -> str:
    """Markdown, of the finished cells' runs."""
    params, worlds = own.data.params, "train_world" in study.stages
    made = list(dict.fromkeys(tag for cell in cells for tag in cell.data.tags if tag.startswith(MADE)))
    rows: list[Row] = [("variant", "seed", *(tag.removeprefix(MADE) for tag in made), "MLflow run")]
    for cell in cells:
        places = (f"`{place}`" if (place := _tag(cell, tag)) else "-" for tag in made)
        rows.append((_tag(cell, "variant"), _tag(cell, "seed"), *places, f"`{cell.info.run_id}`"))
    size = f"{params['data.frame_width']}x{params['data.frame_height']}"
    parts = [
        f"# Model card: the models of {study.source}",
        f"Models of Genie (Bruce et al., 2024), trained to be compared: {study.title[0].lower()}{study.title[1:]}. "
        f"None was chosen or promoted. {_versions(cells)}",
        markdown_table(rows),
        "## Use",
        f"For research: to see what the variants change. {_PLAY if worlds else ''}Not for deciding anything about a "
        "real game, machine or person.",
        "## Training data",
        f"{_data(study, params)} {_digests(cells)}",
        "## Training",
        *(_stage(params, stage, words) for stage, words in study.stages.items()),
        "## Evaluation",
        f"{_evaluation(study, params)} The report beside this card has the figures, and what was not finished.",
        "## Limits",
        f"- {'Few videos' if study.video else 'One game'} at {size} pixels, at the budget above: an order between "
        "variants need not hold at the paper's.\n"
        f"{_DRIFT if worlds else ''}"
        "- Latent actions are named by number only; which is which differs from seed to seed.",
        "## Again",
        f"```sh\n{_command(study, name, own, cells)}\n```",
    ]
    return "\n\n".join(parts) + "\n"


def _versions(cells: Sequence[Run]) -> str:
    own, torch = (_all(_tag(cell, f"version.{library}") for cell in cells) for library in ("genie-platform", "torch"))
    commits = _all(_tag(cell, "mlflow.source.git.commit")[:8] for cell in cells) or "unknown"
    return f"genie-platform {own}, commit {commits}, torch {torch}; Apache License 2.0."


def _data(study: Study, params: Mapping[str, str]) -> str:
    if study.video:
        return (
            f"Videos, as clips of {params['ingest.clip_seconds']} s at {params['ingest.fps']} frames a second, without "
            "sound; some variants see only those that a filter keeps. The data set's card says whose they are. No "
            "actions are known."
        )
    if "train_policy" in study.stages:
        return (
            f"An expert that plans, recorded on {_count(params['cloning.levels'])} levels of CoinRun (Procgen). The "
            "oracle sees its true actions; the other policy the labels of a frozen LAM, and of the true actions as "
            f"many as the report's columns say: {params['cloning.labelled'].strip('()[]')}. {_NOBODY}"
        )
    levels, steps = (_count(params[f"data.{field}"]) for field in ("train_levels", "steps_per_level"))
    return (
        f"{levels} levels of CoinRun (Procgen, hard mode), {steps} frames each, under a random policy that holds an "
        f"action for {params['data.action_hold']} frames. What it did is recorded, and not shown to any model. "
        f"{_NOBODY}"
    )


def _digests(cells: Sequence[Run]) -> str:
    known = ((split, _tag(cell, f"dataset.{split}.digest")) for cell in cells for split in ("train", "eval"))
    found = _all(f"{split} `{digest[:12]}`" for split, digest in known if digest)
    return f"Digests: {found}." if found else ""


def _stage(params: Mapping[str, str], stage: str, words: str) -> str:
    """As the study was asked for it; what a variant changes stands in its runs."""
    steps, batch_size = (_count(params[f"{stage}.{field}"]) for field in ("steps", "batch_size"))
    rate = params[f"{stage}.optimizer.max_lr"]
    return f"- {words}: {steps} steps of {batch_size} clips, learning rate at most {rate}."


def _evaluation(study: Study, params: Mapping[str, str]) -> str:
    if "train_policy" in study.stages:
        return f"{params['cloning.eval_levels']} levels of CoinRun that nothing was trained on, each played once."
    what = "videos" if study.video else "levels"
    return f"{params['evaluation.clips']} clips of {what} that nothing was trained on."


def _command(study: Study, name: str, own: Run, cells: Sequence[Run]) -> str:
    """Makes the study again."""
    preset = own.data.tags["preset"]
    base = {field: str(value) for field, value in get_preset(preset).flat().items()}
    changed = {field: value for field, value in own.data.params.items() if base.get(field, value) != value}
    words = ["python", "-m", "pipelines", "run", name, "--preset", preset]
    words += ["--seeds", *dict.fromkeys(_tag(cell, "seed") for cell in cells)]
    for variant in dict.fromkeys(_tag(cell, "variant") for cell in cells):
        words += ["--variant", variant]
    for field, value in changed.items():
        plain = json.dumps(ast.literal_eval(value)) if value.startswith("(") else value  # a tuple, as a list
        words += ["--set", f"{field}={plain}"]
    if world := own.data.tags.get(f"{MADE}world"):
        words += ["--model", world]
    given = " --data URI --labels FILE" if study.video else ""  # which MLflow knows of their steps alone
    return shlex.join(words) + given


def _tag(cell: Run, name: str) -> str:
    return str(cell.data.tags.get(name, ""))


def _all(texts: Iterable[str]) -> str:
    return ", ".join(dict.fromkeys(text for text in texts if text))


def _count(number: str) -> str:
    return f"{int(number):,}"
