"""The program of the paper's largest model, cut to two layers: four virtual devices run it as the plan says."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import plan_cut
import pytest

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("torch_xla") is None, reason="no torch-xla here: make test-xla has an environment with it"
)


def test_it_trains_and_every_device_holds_and_sends_what_is_planned(tmp_path: Path) -> None:
    """Takes 12 GB, and three minutes of two cores."""
    run = subprocess.run(
        [sys.executable, plan_cut.__file__],
        env=os.environ
        | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(plan_cut.__file__).parents[1])}
        | {"PJRT_DEVICE": "CPU", "CPU_NUM_DEVICES": str(plan_cut.MESH.devices)}
        | {
            "XLA_FLAGS": "--xla_llvm_disable_expensive_passes=true --xla_backend_optimization_level=0 "
            f"--xla_dump_hlo_as_text --xla_dump_to={tmp_path}"
        },
        capture_output=True,
        text=True,
        timeout=1200,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    found = json.loads(run.stdout.splitlines()[-1])
    assert all(map(math.isfinite, found["loss"] + found["gradient_norm"]))
    assert found["loss"][1] < found["loss"][0]
    assert found["compiles"][0] == found["compiles"][1]

    config = plan_cut.CONFIG.dynamics.transformer
    width, outputs = config.d_model, 3 * config.num_heads * config.head_dim
    assert found["weight"] == [[outputs // 2, width // 2]] * 4
    assert found["parameters"] == [plan_cut.PLANNED["parameters"] + found["vectors"]] * 4
    assert found["optimizer"] == [plan_cut.PLANNED["optimizer"] + found["vectors' moments"]] * 4

    step = max(tmp_path.glob("*.cpu_after_optimizations.txt"), key=lambda path: path.stat().st_size).read_text()
    fsdp, tensor = r"replica_groups=\{\{0,2\},\{1,3\}\}", r"replica_groups=\{\{0,1\},\{2,3\}\}"
    positions = 2 * 920  # of one clip
    # parameters are gathered over fsdp, what heads and hidden units come to is summed over tensor
    assert re.search(rf"f32\[({outputs // 2},{width}|{width},{outputs // 2})\]\S* all-gather\(.*{fsdp}", step)
    assert re.search(rf"f32\[{positions},{width}\]\S* all-reduce\(.*{tensor}", step)
    # and no device has both clips, nor all heads of one
    assert not re.search(rf"\[(\d+,)*({2 * positions}|2,2,920),{width}\]", step)
    assert f",{config.num_heads // 2},920,920]" in step
    assert f",{config.num_heads},920,920]" not in step
