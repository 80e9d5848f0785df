"""A program: two steps of train_world on torch-xla, of a cut of genie_11b, on as many devices as MESH has.

A line of JSON: losses, gradient norms, compiled programs, and the bytes that each device holds at the end. Clips are
noise, all else is what training does.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from genie_model.backend.seam import training
from genie_model.backend.sharding import Mesh
from genie_model.chance import Chance
from genie_model.data.loader import Batch
from genie_model.genie import Genie
from genie_model.plan import cut
from genie_model.presets import get_preset

MESH = Mesh(fsdp=2, tensor=2)
# As few clips and frames as there can be. Of the paper's widths one is halved, the dynamics' 5120: with it all four
# devices' parts of the program are 17 GiB, and a step's matmuls minutes.
CONFIG = cut(get_preset("genie_11b")).with_overrides(
    "train_world.batch_size=2",
    "data.clip_length=2",
    "evaluation.prompt_frames=1",
    "evaluation.horizon=1",
    "dynamics.transformer.d_model=2560",
    "parallel.backend=xla",
    "parallel.fsdp=2",
    "parallel.tensor=2",
    "parallel.remat=true",
)
# What `plan` tells of a device, in bytes. Written down, as torch-xla's torch is too old for it: test_plan.py holds the
# plan to this, tests/xla the devices.
PLANNED = {"parameters": 224_978_656, "optimizer": 401_812_868}
WEIGHT = "dynamics.transformer.sublayers.0.heads_in.weight"


def trained() -> dict[str, Any]:
    stage = CONFIG.train_world
    torch.manual_seed(0)
    genie = Genie(CONFIG)
    genie.tokenizer.requires_grad_(False)
    # XLA keeps vectors whole, where the plan's FSDP2 halves them
    halves = {name: p.numel() // MESH.fsdp * p.itemsize for name, p in genie.named_parameters() if p.ndim < 2}
    losses, norms, compiles = list[float](), list[float](), list[int]()
    with training(CONFIG.parallel) as backend:
        optimizers = backend.prepare(genie, stage)
        for step in range(2):
            shape = (stage.batch_size, CONFIG.data.clip_length, *CONFIG.frame_shape)
            clips = np.random.default_rng(step).integers(0, 256, shape, dtype=np.uint8)
            inputs, chance = backend.inputs(Batch(clips), Chance.of_step(0, step, stage.batch_size))
            loss, _ = backend.gradients(genie, inputs, chance, stage.precision)
            norm = backend.clip(genie, stage.optimizer.clip_norm)
            optimizers.step()
            backend.end_step()
            numbers = backend.numbers({"loss": loss, "norm": norm})
            losses.append(numbers["loss"])
            norms.append(numbers["norm"])
            compiles.append(backend.compile_count())
        states = optimizers.tensors(genie)
        return {
            "loss": losses,
            "gradient_norm": norms,
            "compiles": compiles,
            "parameters": held(genie.parameters()),
            "optimizer": held(states.values()),
            "vectors": sum(halves.values()),
            "vectors' moments": sum(halves.get(label.rpartition("|")[0], 0) for label, t in states.items() if t.ndim),
            "weight": [list(part.shape) for part in parts(genie.get_parameter(WEIGHT))],
            "peak_memory_mb": backend.peak_memory_mb(),
        }


def parts(tensor: Tensor) -> list[Tensor]:
    """What each device holds of it."""
    from torch_xla.distributed.spmd import wrap_if_sharded

    return [shard.data for shard in wrap_if_sharded(tensor).local_shards] if tensor.ndim else [tensor] * MESH.devices


def held(tensors: Iterable[Tensor]) -> list[int]:
    """Bytes, of each device."""
    return [sum(device) for device in zip(*([part.nbytes for part in parts(t)] for t in tensors), strict=True)]


if __name__ == "__main__":
    print(json.dumps(trained()), flush=True)
