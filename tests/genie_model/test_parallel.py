"""Two processes over gloo train as one does; what cannot be shared evenly is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from genie_model.backend.seam import training
from genie_model.backend.sharding import Mesh
from genie_model.genie import Genie
from genie_model.presets import get_preset

PROGRAM = Path(__file__).parents[1] / "loss_curve.py"
EMA = "tokenizer.codebook.learn=ema tokenizer.codebook.normalised=false"
VARIED = "dynamics.code_vectors=true dynamics.corrupt_tokens=0.5 dynamics.corrupt_by=own dynamics.clean_frames=0.5"
CASES = {  # what is trained: how two processes share it
    "tokenizer": "parallel.fsdp=2",
    f"tokenizer {EMA}": "parallel.data=2",
    "world": "parallel.fsdp=2",
    f"world {VARIED}": "parallel.tensor=2 parallel.remat=true",
}
CONFIG = get_preset("tiny")


def curves(cases: list[str], *launcher: str) -> list[dict[str, Any]]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(PROGRAM.parents[1])}
    run = subprocess.run(
        [sys.executable, *launcher, str(PROGRAM), *cases],
        env=environment,
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return [json.loads(line) for line in run.stdout.splitlines() if line.startswith("{")]


def test_two_processes_train_as_one() -> None:
    alone = curves(list(CASES))
    together = curves(
        [f"{part} {shared}" for part, shared in CASES.items()],
        *("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"),
    )
    for one, two in zip(alone, together, strict=True):
        assert one["loss"][-1] < one["loss"][0]
        for what in ("loss", "gradient_norm", "sums"):
            assert two[what] == pytest.approx(one[what], rel=1e-5, abs=1e-6), what
        assert two["logs"] == pytest.approx(one["logs"], rel=1e-3, abs=1e-5)


def test_what_cannot_be_shared_evenly_is_refused() -> None:
    genie = Genie(CONFIG)
    with pytest.raises(ValueError, match=r"data\*fsdp=3 must divide batch_size=2: allowed are 1, 2"):
        Mesh(fsdp=3).check(genie, batch_size=2)
    with pytest.raises(
        ValueError, match=r"tensor=4 must divide the heads of all .*dynamics\.transformer 2.*allowed are 1, 2"
    ):
        Mesh(tensor=4).check(genie, batch_size=2)
    with pytest.raises(ValueError, match="1 \\* 2 \\* 1 devices are asked for, and there are 1"):
        training(CONFIG.with_overrides("parallel.fsdp=2").parallel)
