"""torch-xla on four virtual devices of the CPU: the same numbers as native, and one program for all steps."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("torch_xla") is None, reason="no torch-xla here: make test-xla has an environment with it"
)
PROGRAM = Path(__file__).parents[1] / "loss_curve.py"
VARIED = "dynamics.code_vectors=true dynamics.corrupt_tokens=0.5 dynamics.corrupt_by=own dynamics.clean_frames=0.5"
PARTS = ("tokenizer", f"world {VARIED}", "tokenizer tokenizer.codebook.learn=ema", "world")


def curves(cases: list[str], devices: int = 1, **environment: str) -> list[dict[str, Any]]:
    """In a process of its own: the number of virtual devices cannot change in one."""
    run = subprocess.run(
        [sys.executable, str(PROGRAM), *cases],
        env=os.environ
        | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(PROGRAM.parents[1])}
        | {"PJRT_DEVICE": "CPU", "CPU_NUM_DEVICES": str(devices)}
        # compiles in seconds instead of a minute; the arithmetic stays
        | {"XLA_FLAGS": "--xla_llvm_disable_expensive_passes=true --xla_backend_optimization_level=0"}
        | environment,
        capture_output=True,
        text=True,
        timeout=1200,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return [json.loads(line) for line in run.stdout.splitlines() if line.startswith("{")]


@pytest.fixture(scope="module")
def native() -> list[dict[str, Any]]:
    return curves(list(PARTS))


@pytest.mark.parametrize(
    ("devices", "shared", "parts"),
    [
        (1, "", PARTS[:2]),
        (2, "parallel.fsdp=2", PARTS[:2]),
        (2, "parallel.tensor=2", PARTS[:2]),
        (4, "parallel.fsdp=2 parallel.tensor=2", PARTS),
    ],
)
def test_the_curve_is_that_of_native_and_every_step_is_one_program(
    native: list[dict[str, Any]], devices: int, shared: str, parts: tuple[str, ...]
) -> None:
    ours = curves([f"{part} parallel.backend=xla {shared}" for part in parts], devices)
    for part, one, other in zip(parts, native, ours, strict=False):
        assert other["loss"] == pytest.approx(one["loss"], rel=5e-5), part
        assert other["gradient_norm"] == pytest.approx(one["gradient_norm"], rel=1e-3), part
        assert other["logs"] == pytest.approx(one["logs"], rel=1e-2, abs=1e-4), part
        first, second, *later = other["compiles"]
        assert second == first + 1, part  # the first step's program
        assert set(later) == {second}, part


def test_bfloat16_and_recomputation_train(native: list[dict[str, Any]]) -> None:
    (half,) = curves(["tokenizer parallel.backend=xla train_world.precision=bf16"])
    assert half["loss"] == pytest.approx(native[0]["loss"], rel=0.05)
    assert half["loss"] != pytest.approx(native[0]["loss"], rel=1e-5)
    (again,) = curves(["tokenizer parallel.backend=xla parallel.remat=true"])
    assert again["loss"] == pytest.approx(native[0]["loss"], rel=5e-5)


def test_every_program_goes_into_the_cache(tmp_path: Path) -> None:
    """From where TPU takes it the next time; XLA's CPU only writes, and says so."""
    (only,) = curves([f"tokenizer parallel.backend=xla parallel.compilation_cache={tmp_path}"])
    assert len(list(tmp_path.iterdir())) >= only["compiles"][-1] == 2


def test_what_four_devices_saved_any_others_carry_on(native: list[dict[str, Any]], tmp_path: Path) -> None:
    shared = "world parallel.backend=xla parallel.fsdp=2 parallel.tensor=2"
    varied = shared.replace("world", f"world {VARIED}")
    assert curves([varied], 4, STATE=str(tmp_path / "four"), STOP="10") == []
    for name, case, devices in (
        ("same", varied, 4),
        ("two", f"world {VARIED} parallel.backend=xla parallel.fsdp=2", 2),
        ("one", f"world {VARIED} parallel.backend=xla", 1),
        ("native", f"world {VARIED}", 1),
    ):
        shutil.copytree(tmp_path / "four", tmp_path / name)
        (resumed,) = curves([case], devices, STATE=str(tmp_path / name))
        assert len(resumed["loss"]) == 10
        assert resumed["loss"] == pytest.approx(native[1]["loss"][10:], rel=5e-5), name
        assert resumed["sums"] == pytest.approx(native[1]["sums"], rel=1e-4, abs=1e-4), name
        _first, second, *later = resumed["compiles"]
        assert set(later) == {second}, name
