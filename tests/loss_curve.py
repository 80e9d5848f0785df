"""A program: what training comes to, step by step, on the backend that each case's config names.

    python loss_curve.py 'tokenizer a.b=c ...' 'world ...'

With STATE=FOLDER checkpoints lie there, one every five steps, and with STOP=N the program ends before step N.

A line of JSON for each case, from the first process: loss and gradient norm of every step, how many programs were
compiled up to it, and the sum of every parameter at the end. Clips are made up; all else is the trainer's own.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from genie_model.backend.seam import training
from genie_model.data.loader import Batch
from genie_model.exporter import READINGS
from genie_model.genie import Genie
from genie_model.presets import get_preset
from genie_model.progress import NoLog
from genie_model.train import fit

STEPS, CLIPS = 20, 4
SEEN = {*READINGS, "checkpoint_age_seconds"}  # of the run, and not of what it learns
EXACT = ("train_world.precision=fp32", "train_world.optimizer.muon_lr=0", f"train_world.batch_size={CLIPS}")


class MovingSquares:
    """In the place of a ClipLoader: a bright square drifts over noise, another in every clip."""

    clip_length = 8

    def __init__(self, index: int, count: int) -> None:
        self.index, self.count = index, count

    def stream(self, start: int, stop: int) -> Iterator[tuple[int, Batch]]:
        for step in range(start, stop):
            generator = np.random.default_rng(step)
            clips = generator.integers(0, 64, (CLIPS, self.clip_length, 64, 64, 3), dtype=np.uint8)
            corners, speeds = generator.integers(8, 32, (CLIPS, 2)), generator.integers(-1, 3, (CLIPS, 2))
            for clip, corner, speed in zip(clips, corners, speeds, strict=True):
                for t, frame in enumerate(clip):
                    y, x = corner + t * speed
                    frame[y : y + 16, x : x + 16] = 255
            yield step, Batch(np.array_split(clips, self.count)[self.index])


class Kept(NoLog):
    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []

    def metrics(self, values: Any, step: int = 0) -> None:
        self.steps.append(dict(values))


def curve(part: str, *overrides: str) -> dict[str, Any]:
    config = get_preset("tiny").with_overrides(*EXACT, *overrides)
    torch.manual_seed(0)
    genie = Genie(config)
    module = genie.tokenizer if part == "tokenizer" else genie
    genie.tokenizer.requires_grad_(part == "tokenizer")
    stage = config.train_world.model_copy(update={"steps": STEPS, "log_every": 1, "checkpoint_every": 5})
    kept, compiles = Kept(), list[int]()
    with training(config.parallel) as backend, tempfile.TemporaryDirectory() as folder:

        def on_step(step: int) -> None:
            if step == int(os.environ.get("STOP", -1)):
                raise SystemExit
            compiles.append(backend.compile_count())

        fit(
            module,
            stage,
            MovingSquares(*backend.share),  # type: ignore[arg-type]
            backend.state(os.environ.get("STATE", folder)),
            backend,
            desc=part,
            seed=0,
            log=kept,
            on_step=on_step,
        )
        sums = [float(backend.whole(p).double().abs().sum()) for p in module.state_dict().values()]
    return {
        "loss": [step["loss"] for step in kept.steps],
        "gradient_norm": [step["gradient_norm"] for step in kept.steps],
        "logs": {name: value for name, value in kept.steps[-1].items() if name not in SEEN},
        "compiles": compiles,
        "sums": sums,
        "first": backend.first,
    }


if __name__ == "__main__":
    if "WORLD_SIZE" in os.environ:
        torch.distributed.init_process_group("gloo")  # once for all cases
    for case in sys.argv[1:]:
        result = curve(*case.split())
        if result["first"]:
            print(json.dumps(result), flush=True)
