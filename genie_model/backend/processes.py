"""Training on CPU and CUDA, by one process for each device where torchrun started several (over gloo on CPUs)."""

from __future__ import annotations

import atexit
import contextlib
import functools
import math
import os
from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from genie_model import collectives
from genie_model.backend import native, sharding
from genie_model.backend.capture import CapturedGradients
from genie_model.chance import Chance
from genie_model.config import ParallelConfig, StageConfig
from genie_model.data.loader import Batch
from genie_model.layers import recompute, sublayers
from genie_model.optim import Optimizers
from genie_model.training_state import TrainingState


class Native:
    """`seam.Backend` for CPU and CUDA: FSDP2, and tensor parallelism by DTensor (sharding.py)."""

    def __init__(self, parallel: ParallelConfig) -> None:
        self.parallel = parallel
        self._sizes = parallel.mesh(int(os.environ.get("WORLD_SIZE", 1)))
        self.share, self.first = (0, 1), True
        self._captured: CapturedGradients | None = None
        self._exit = contextlib.ExitStack()

    def __enter__(self) -> Native:
        native.keep_freed_memory()
        if "WORLD_SIZE" in os.environ and self._sizes != (1, 1, 1):
            self._meet()
        return self

    def __exit__(self, *ended: object) -> None:
        self._exit.close()

    def _meet(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))  # set by torchrun, not by Kubeflow
        if not dist.is_initialized():
            dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
            atexit.register(dist.destroy_process_group)  # not before: the processes meet once
        data, fsdp, tensor = self._sizes
        self.share, self.first = (dist.get_rank() // tensor, data * fsdp), dist.get_rank() == 0
        groups = [dist.new_group(range(i, dist.get_world_size(), tensor)) for i in range(tensor)]
        self._exit.enter_context(collectives.shared_by(groups[dist.get_rank() % tensor]))

    def prepare(self, module: nn.Module, stage: StageConfig) -> Optimizers:
        module.to(native.device()).train()
        if dist.is_initialized() and self._sizes != (1, 1, 1):
            mesh = sharding.Mesh(*self._sizes)
            mesh.check(module, stage.batch_size)
            sharding.shard(module, mesh.over(native.device().type), stage.precision)
        if self.parallel.remat:
            recompute(module, functools.partial(checkpoint, use_reentrant=False, preserve_rng_state=False))
        if self.parallel.compile:
            for sublayer in sublayers(module):
                sublayer.compile()
        if self.parallel.capture and native.device().type == "cuda" and self._sizes == (1, 1, 1):
            self._captured = CapturedGradients(module, stage.precision)
        return Optimizers(module, stage.optimizer)

    def inputs(self, batch: Batch, chance: Chance) -> tuple[list[Tensor], Chance]:
        index, count = self.share
        key_B = chance.key_B.chunk(count)[index]
        return native.inputs(*batch), Chance(
            *(key.to(native.device(), non_blocking=True) for key in (chance.key, key_B))
        )

    def gradients(
        self, module: nn.Module, inputs: list[Tensor], chance: Chance, precision: str
    ) -> tuple[Tensor, dict[str, Tensor]]:
        if self._captured:
            return self._captured(inputs, chance)
        return native.gradients(module, inputs, chance, precision)

    def state(self, uri: str) -> TrainingState:
        return TrainingState(uri)

    def whole(self, tensor: Tensor) -> Tensor:
        return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().cpu()

    def clip(self, module: nn.Module, max_norm: float) -> Tensor:
        norm = nn.utils.clip_grad_norm_(module.parameters(), max_norm)
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    def end_step(self) -> None:
        pass

    def numbers(self, tensors: Mapping[str, Tensor]) -> dict[str, float]:
        means = collectives.mean(torch.stack([tensor.detach().float() for tensor in tensors.values()]))
        return dict(zip(tensors, means.tolist(), strict=True))

    def device_name(self) -> str:
        return native.device_name()

    def num_devices(self) -> int:
        return math.prod(self._sizes)

    def compile_count(self) -> int:
        return native.compile_count()

    def peak_memory_mb(self) -> float:
        return native.peak_memory_mb()
