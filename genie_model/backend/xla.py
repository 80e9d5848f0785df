"""TPU, and what else torch-xla knows: one program for the whole mesh (SPMD), which XLA cuts by its inputs' shardings.

So nothing here communicates, and sums over the batch are over all of it (collectives.py is idle). A step is traced,
compiled once and run as one program: every step must be the same but for its inputs, and tensors that it starts from
must be cut alike from the first on.

TorchTPU, announced to follow torch-xla, would be a third file like this one: a `Backend` whose `prepare` cuts by
`sharding.cut` and whose `inputs` make global arrays of what each host loads. Models, trainer and tests stay.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Mapping, Sequence

import numpy as np
import torch
import torch.distributed as dist
import torch_xla
import torch_xla.core.xla_model as xm
import torch_xla.debug.metrics as metrics
import torch_xla.distributed.spmd as spmd
import torch_xla.distributed.xla_backend  # registers xla://
import torch_xla.experimental.distributed_checkpoint as xc
import torch_xla.runtime as runtime
from torch import Tensor, nn
from torch_xla._internal import tpu
from torch_xla.experimental.distributed_checkpoint._helpers import _CpuShards, _sharded_cpu_state_dict
from torch_xla.utils.checkpoint import checkpoint

from genie_model.backend.sharding import Mesh, check_xla, cut
from genie_model.chance import Chance
from genie_model.config import ParallelConfig, StageConfig
from genie_model.data.loader import Batch
from genie_model.layers import STTransformer, recompute, sublayers
from genie_model.optim import Optimizers
from genie_model.training_state import State, TrainingState

_AXES = ("data", "fsdp", "tensor")
_BATCH = ("data", "fsdp")  # the axes that share the clips


def _layer_norm(
    x: Tensor,
    shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Tensor:
    """torch-xla makes one axis of all that are not normalised, and so clips and heads whole on every device."""
    dims = tuple(range(-len(shape), 0))
    centred = x.float() - x.float().mean(dims, keepdim=True)
    y = centred * (centred.square().mean(dims, keepdim=True) + eps).rsqrt()
    y = y if weight is None else y * weight
    return (y if bias is None else y + bias).to(x.dtype)


def _matmul(a: Tensor, b: Tensor) -> Tensor:
    """torch-xla makes one axis of all but the last two, and so clips and heads whole on every device."""
    if a.ndim < 3 or a.shape[:-2] != b.shape[:-2]:
        product: Tensor = torch.ops.aten.matmul.default.decompose(a, b)
        return product
    batch = "abcdefg"[: a.ndim - 2]
    return torch.einsum(f"{batch}xy,{batch}yz->{batch}xz", a, b)


_ops = torch.library.Library("aten", "IMPL")  # type: ignore[no-untyped-call]  # goes with the variable
_ops.impl("layer_norm", _layer_norm, "AutogradXLA")  # type: ignore[no-untyped-call]
_ops.impl("matmul", _matmul, "AutogradXLA")  # type: ignore[no-untyped-call]


class XLA:
    """`seam.Backend` for torch-xla."""

    def __init__(self, parallel: ParallelConfig) -> None:
        self.parallel = parallel
        runtime.use_spmd()
        if parallel.compilation_cache:
            runtime.initialize_cache(parallel.compilation_cache, readonly=runtime.process_index() > 0)
        devices = runtime.global_runtime_device_count()
        self._sizes = parallel.mesh(devices)
        self._mesh = spmd.Mesh(np.arange(devices), self._sizes, _AXES)
        self._device = torch_xla.device()
        self.share, self.first = (runtime.process_index(), runtime.process_count()), runtime.process_index() == 0
        if int(os.environ.get("WORLD_SIZE", 1)) > self.share[1]:
            raise ValueError("parallel.backend=xla: one process trains on all devices of a host, so without torchrun")
        if self.share[1] > 1 and not dist.is_initialized():
            dist.init_process_group("gloo", init_method="xla://")  # for checkpoints, and to stop after the same step

    def __enter__(self) -> XLA:
        return self

    def __exit__(self, *ended: object) -> None:
        torch_xla.sync(wait=True)

    def prepare(self, module: nn.Module, stage: StageConfig) -> Optimizers:
        check_xla(Mesh(*self._sizes), module, stage)
        module.to(self._device).train()
        if self.parallel.remat:
            recompute(module, functools.partial(checkpoint, preserve_rng_state=False))
        self._share_clips(module)
        optimizers = Optimizers(module, stage.optimizer, traced=True)
        self.cut(module, optimizers)
        optimizers.start()
        self.cut(module, optimizers)
        torch_xla.sync(wait=True)
        return optimizers

    def cut(self, module: nn.Module, optimizers: Optimizers) -> None:
        """Shards parameters and what optimizers remember of them; to be called again when they were loaded."""
        tensors = optimizers.tensors(module)
        for name, parameter in module.named_parameters():
            spec: list[str | None] = [None] * parameter.ndim
            for axis, dim in zip(("fsdp", "tensor"), cut(name, parameter), strict=True):
                if dim is not None:
                    spec[dim] = axis
            moments = [t for label, t in tensors.items() if label.rpartition("|")[0] == name and t.ndim]
            for tensor in (parameter, *moments):
                spmd.clear_sharding(tensor)
                spmd.mark_sharding(tensor, self._mesh, tuple(spec))
        for buffer in module.buffers():
            spmd.clear_sharding(buffer)
            spmd.mark_sharding(buffer, self._mesh, (None,) * buffer.ndim)

    def _share_clips(self, module: nn.Module) -> None:
        """Each device keeps to its own clips, and gathers parameters to them.

        Untold, XLA takes the parameters' cut over `fsdp` for one of the activations' width: every device then has all
        clips.
        """

        def mark(x_B: Tensor) -> Tensor:
            spec = (_BATCH, *(None,) * (x_B.ndim - 1))
            marked: Tensor = spmd.mark_sharding_with_gradients(x_B, self._mesh, spec)
            return marked

        for part in (*sublayers(module), *(m for m in module.modules() if isinstance(m, STTransformer))):
            part.register_forward_pre_hook(lambda _, args: (mark(args[0]), *args[1:]))
            part.register_forward_hook(lambda _, args, x: mark(x))

    def inputs(self, batch: Batch, chance: Chance) -> tuple[list[Tensor], Chance]:
        index, count = self.share
        frames, *others = (self._send(torch.from_numpy(part)) for part in batch if part is not None)
        key_B = self._send(chance.key_B.chunk(count)[index][:, None])[:, 0]  # torch-xla cuts no vector over two axes
        return [frames.float() / 255, *others], Chance(chance.key.to(self._device), key_B)

    def _send(self, x_B: Tensor) -> Tensor:
        """To the devices, while the last step still runs; of several hosts each sends its own clips."""
        spec = spmd.ShardingSpec(self._mesh, (_BATCH, *(None,) * (x_B.ndim - 1)), minibatch=self.share[1] > 1)
        sent: Tensor = xm.send_cpu_data_to_device([x_B], self._device, spec)[0]
        return sent

    def gradients(
        self, module: nn.Module, inputs: list[Tensor], chance: Chance, precision: str
    ) -> tuple[Tensor, dict[str, Tensor]]:
        with torch.autocast("xla", torch.bfloat16, enabled=precision == "bf16"):
            loss, logs = module(*inputs, chance=chance)
        loss.backward()
        return loss.detach(), logs

    def state(self, uri: str) -> TrainingState:
        return _State(uri, self)

    def whole(self, tensor: Tensor) -> Tensor:
        copy = tensor.detach() * 1  # to all devices: of another host's part this one could read nothing
        spmd.mark_sharding(copy, self._mesh, (None,) * copy.ndim)
        torch_xla.sync(wait=True)
        return copy.cpu()

    def clip(self, module: nn.Module, max_norm: float) -> Tensor:
        return nn.utils.clip_grad_norm_(module.parameters(), max_norm)

    def end_step(self) -> None:
        torch_xla.sync()

    def numbers(self, tensors: Mapping[str, Tensor]) -> dict[str, float]:
        return dict(zip(tensors, map(float, xm._maybe_convert_to_cpu(list(tensors.values()))), strict=True))

    def device_name(self) -> str:
        if runtime.device_type() != "TPU":
            return str(runtime.device_type())
        kind = os.environ.get("TPU_ACCELERATOR_TYPE") or tpu.get_tpu_env().get("ACCELERATOR_TYPE", "")
        return f"TPU {kind.partition('-')[0]}"  # v5p-256: of a slice of 256 cores

    def num_devices(self) -> int:
        return math.prod(self._sizes)

    def compile_count(self) -> int:
        compiled = metrics.metric_data("CompileTime")
        return int(compiled[0]) if compiled else 0

    def peak_memory_mb(self) -> float:
        if runtime.device_type() == "CPU":
            from genie_model.backend.native import peak_memory_mb

            return peak_memory_mb()
        return float(xm.get_memory_info(self._device)["peak_bytes_used"]) / 2**20


class _State(TrainingState):
    """Of tensors that XLA cuts: torch-xla's planners know their parts."""

    def __init__(self, uri: str, backend: XLA) -> None:
        planners = {"save_planner": xc.SPMDSavePlanner, "load_planner": xc.SPMDLoadPlanner}
        super().__init__(uri, stage=_copy_to_host, **planners)
        self._backend = backend

    def restore(self, module: nn.Module, optimizers: Optimizers) -> int:
        step = super().restore(module, optimizers)
        if step:  # what was loaded is cut as what the first step starts from, or the second had another program
            self._backend.cut(module, optimizers)
            torch_xla.sync(wait=True)
        return step


def _copy_to_host(state: State) -> State:
    """Each part once: of what several devices hold alike, DCP would take every copy for another's, and keep none."""
    staged: State = _sharded_cpu_state_dict(state)
    for parts in staged.values():
        if isinstance(parts, _CpuShards):
            parts.shards = [shard for shard in parts.shards if shard.replica_id == 0]
    return staged
