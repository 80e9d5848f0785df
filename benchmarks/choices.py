"""Compares settings of `demo` at an equal budget: every run in MLflow, and a table for docs/.

    python -m benchmarks.choices STUDY --data FOLDER --root FOLDER [--seeds 0 1 2] [--tracking-uri URI] [--set a.b=c]

A study changes one thing at a time. Each variant is trained once for every seed, unless it differs from another in
`sampling` alone: then it plays that one's model. What is trained is kept under --root and reused. The table is made
from MLflow, of the newest run of each variant and seed, so seeds may be run side by side, or later. A cell is the mean
over seeds, and of more than one seed half of their range.
"""

from __future__ import annotations

import argparse
import hashlib
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.long_session import detail, play, random_actions
from genie_model import evaluate, train
from genie_model.checkpoint import load_model
from genie_model.config import Config
from genie_model.data.held_out import HeldOut
from genie_model.evaluate import measure, measure_play
from genie_model.genie import Genie
from genie_model.presets import get_preset
from genie_model.source import code_digest
from genie_model.tracking import connect
from genie_model.train import train_tokenizer, train_world

_CODE = sorted({*evaluate._CODE, *train._GENIE_CODE})
Variants = dict[str, tuple[str, ...]]
_SHORT = (  # of a study that trains: a few minutes a run on one core
    "train_tokenizer.steps=300",
    "train_tokenizer.batch_size=2",
    "train_world.steps=500",
    "train_world.batch_size=2",
    "evaluation.clips=64",
    "evaluation.probe_steps=1",  # the supervised bound is the data's: measured once, elsewhere
    "lam.patch_size=16",  # as demo was when these studies were run
    "sampling.temperature=1",
)


def _steps(steps: int, *more: str) -> tuple[str, ...]:
    return (f"sampling.maskgit_steps={steps}", *more)


_DRAW = ("sampling.choice=draw", "sampling.order_noise=4.5", "sampling.temperature=1")
STUDIES: dict[str, Variants] = {
    "sampling": {
        "1 step (demo)": (),
        **{f"{n} steps": _steps(n) for n in (2, 4, 8)},
        "1 step, temperature 1": ("sampling.temperature=1",),
        "1 step, temperature 0.2": ("sampling.temperature=0.2",),
        "8 steps, random order": _steps(8, "sampling.order=random"),
        "8 steps, Halton order": _steps(8, "sampling.order=halton"),
        "8 steps, drawn (paper)": _steps(8, *_DRAW),
        "8 steps, drawn, temperature 1 to 0": _steps(8, *_DRAW, "sampling.last_temperature=0"),
        "8 steps, drawn, Halton order": _steps(8, *_DRAW, "sampling.order=halton"),
        "8 steps, drawn at 0.5, Halton order": _steps(8, *_DRAW, "sampling.order=halton", "sampling.temperature=0.5"),
        "1 step, float32": ("sampling.precision=fp32",),
        **{f"{n} steps": _steps(n) for n in (12, 25)},
        "25 steps, drawn (paper)": _steps(25, *_DRAW),
    },
    "dynamics": {
        "base": _SHORT,
        "action as a token": (*_SHORT, "dynamics.action=token"),
        "all frames masked (paper)": (*_SHORT, "dynamics.clean_frames=0"),
        "a quarter of frames clean": (*_SHORT, "dynamics.clean_frames=0.25"),
        "up to 20% random tokens": (*_SHORT, "dynamics.corrupt_tokens=0.2"),
        "up to 50% its own guesses, in half of the frames": (
            *_SHORT,
            "dynamics.corrupt_tokens=0.5",
            "dynamics.corrupt_by=own",
        ),
        "codes as indices alone (paper)": (*_SHORT, "dynamics.code_vectors=false"),
        "time in every second block": (*_SHORT, "dynamics.transformer.temporal_every=2"),
        "time in every fourth block": (*_SHORT, "dynamics.transformer.temporal_every=4"),
        "8 frames of history": (
            *_SHORT,
            "data.clip_length=8",
            "train_tokenizer.batch_size=4",
            "train_world.batch_size=4",
        ),
    },
    "tokenizer": {
        "base": _SHORT,
        "codes by gradient": (*_SHORT, "tokenizer.codebook.learn=gradient"),
        "codes by k-means of 8,192 latents": (*_SHORT, "tokenizer.codebook.learn=kmeans"),
        "no revival": (*_SHORT, "tokenizer.codebook.min_share=0"),
        "latents normalised": (*_SHORT, "tokenizer.codebook.normalised=true"),
    },
    "lam": {
        "base": _SHORT,
        "mean squared error (paper)": (*_SHORT, "lam.loss=mse"),
        "frames predicted, not moved (paper)": (*_SHORT, "lam.predict=frame"),
        "sees no motion (paper)": (*_SHORT, "lam.predict=frame", "lam.motion_rows=0", "lam.motion_columns=0"),
        "patches of 8 pixels (demo)": (*_SHORT, "lam.patch_size=8"),
        "quantized from the start": (*_SHORT, "lam.codebook.continuous_steps=0"),
        "codes by gradient": (*_SHORT, "lam.codebook.learn=gradient"),
    },
}
COLUMNS = {
    "tokenizer_psnr": "tokenizer PSNR",
    "rollout_over_copy_t1": "frame 1 over a copy, dB",
    "rollout_psnr_t4": "frame 4 PSNR",
    "delta_psnr_t4": "Δ₄ PSNR",
    "held_motion_explained": "motion that a held action explains",
    "direction_balanced_accuracy": "direction told",
    "displacement_x_explained": "across",
    "displacement_y_explained": "up",
    "fvd_random3d": "fvd_random3d",
    "detail_t128": "detail left after 128 frames",
    "frames_per_second": "played frames/s",
}


def run(config: Config, data_uri: str, root_uri: str, held_out: HeldOut, sampling_alone: bool) -> dict[str, float]:
    tokenizer_uri = train_tokenizer(config, data_uri, root_uri)
    genie = load_model(train_world(config, data_uri, tokenizer_uri, root_uri), config.sampling)
    genie.config = config
    found = measure_play(config, genie, held_out) if sampling_alone else measure(config, genie, held_out).metrics
    found |= {"detail_t128": detail_left(genie, held_out)}
    return found | {"frames_per_second": played_frames_per_second(genie, held_out)}


def detail_left(genie: Genie, held_out: HeldOut, frames: int = 128, worlds: int = 16) -> float:
    """How unlike neighbouring pixels are after so many frames under random actions, beside the prompt's."""
    starts_BTHWC = np.stack([episode.frames_THWC[:1] for episode in held_out.episodes[:worlds]])
    actions_BT = random_actions(genie, len(starts_BTHWC), frames)
    last_BHWC = [frame_BHWC for _, frame_BHWC in play(genie, starts_BTHWC, actions_BT)][-1]
    return detail(last_BHWC) / detail(starts_BTHWC[:, 0])


def played_frames_per_second(genie: Genie, held_out: HeldOut) -> float:
    """Of one world behind a full window of history."""
    clip = genie.config.data.clip_length
    state = genie.start(torch.from_numpy(held_out.episodes[0].frames_THWC[None, :clip].copy()))
    times = []
    for _ in range(12):
        began = time.perf_counter()
        genie.step(state, torch.zeros(1, dtype=torch.long))
        times.append(time.perf_counter() - began)
    return 1 / statistics.median(times[2:])


def budget(study: str, overrides: Sequence[str], held_out: HeldOut) -> str:
    """A digest of all that the runs of one table share: the study, the config beside it, the data and the code."""
    shared = get_preset("demo").with_overrides(*overrides)
    text = f"{STUDIES[study]} {shared.to_json()} {held_out.digest} {code_digest(_CODE)}"
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def record(client: Any, experiment_id: str, variant: str, budget: str, config: Config, found: dict[str, float]) -> None:
    tags = {"variant": variant, "seed": str(config.seed), "budget": budget}
    run_id = client.create_run(experiment_id, tags=tags, run_name=f"{variant}, seed {config.seed}").info.run_id
    for key, value in config.flat().items():
        client.log_param(run_id, key, value)
    for key, number in found.items():
        client.log_metric(run_id, key, number)
    client.set_terminated(run_id)


def recorded(client: Any, experiment_id: str, study: str, budget: str) -> dict[str, list[dict[str, float]]]:
    """The metrics of every variant's finished runs at this budget, the newest of each seed."""
    found: dict[str, dict[str, dict[str, float]]] = {variant: {} for variant in STUDIES[study]}
    finished = f"attributes.status = 'FINISHED' and tags.budget = '{budget}'"
    for run in client.search_runs([experiment_id], finished, order_by=["attributes.start_time"]):
        found[run.data.tags["variant"]][run.data.tags["seed"]] = run.data.metrics
    return {variant: list(by_seed.values()) for variant, by_seed in found.items() if by_seed}


def table(found: dict[str, list[dict[str, float]]]) -> str:
    """A row for each variant: means over its runs, with half their range."""
    shown = [name for name in COLUMNS if all(name in one for runs in found.values() for one in runs)]
    lines = ["| | seeds | " + " | ".join(COLUMNS[name] for name in shown) + " |", "|---" * (len(shown) + 2) + "|"]
    for variant, runs in found.items():
        cells = []
        for name in shown:
            values = [one[name] for one in runs]
            spread = f" ± {(max(values) - min(values)) / 2:.2g}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.3g}{spread}")
        lines.append(f"| {variant} | {len(runs)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.choices", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("--data", required=True, help="a data set that collect made, with train/ and eval/")
    parser.add_argument("--root", required=True, help="where trained models are kept")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--tracking-uri", default="sqlite:///build/choices.db", help="MLflow's (default: a file)")
    parser.add_argument(
        "--set", dest="overrides", nargs="*", action="extend", default=[], help="config fields, for every variant"
    )
    parser.add_argument("--out", type=Path, help="where to write the table; default build/choices-STUDY.md")
    arguments = parser.parse_args()
    study, out = arguments.study, arguments.out or Path(f"build/choices-{arguments.study}.md")
    try:
        held_out = HeldOut.open(f"{arguments.data}/eval", most=128)
        same = budget(study, arguments.overrides, held_out)
        out.parent.mkdir(parents=True, exist_ok=True)
        client = connect(arguments.tracking_uri)
    except ValueError as error:
        parser.error(str(error))
    experiment = client.get_experiment_by_name(f"choices-{study}")
    experiment_id = experiment.experiment_id if experiment else client.create_experiment(f"choices-{study}")
    for seed in arguments.seeds:
        for variant, overrides in STUDIES[study].items():
            config = get_preset("demo").with_overrides(f"seed={seed}", *overrides, *arguments.overrides)
            print(f"--- {variant}, seed {seed}", flush=True)
            found = run(config, arguments.data, arguments.root, held_out, study == "sampling")
            record(client, experiment_id, variant, same, config, found)
            out.write_text(table(recorded(client, experiment_id, study, same)) + "\n")
    print(out.read_text())
    print(f"written to {out}")


if __name__ == "__main__":
    main()
