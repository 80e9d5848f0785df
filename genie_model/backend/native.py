"""CPU and CUDA: where tensors live, in which precision, how the process is set up for it; and training there.

Several processes train together where torchrun started them: one for each GPU, or on CPUs over gloo.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import math
import os
import platform
import resource
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from genie_model import collectives
from genie_model.chance import Chance
from genie_model.config import ParallelConfig, StageConfig
from genie_model.data.loader import Batch
from genie_model.layers import sublayers
from genie_model.optim import Optimizers


def device() -> torch.device:
    """The accelerator when there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def device_name() -> str:
    """As its vendor calls it."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"


def autocast(precision: str) -> contextlib.AbstractContextManager[None]:
    """bfloat16 matmuls under "bf16"; norms, softmax and losses keep float32 accumulation either way."""
    context: contextlib.AbstractContextManager[None] = torch.autocast(
        device().type, torch.bfloat16, enabled=precision == "bf16"
    )
    return context


def to_unit_frames(batch_BTHWC: NDArray[np.uint8]) -> Tensor:
    """A uint8 batch from the loader as float32 in [0, 1] on the device."""
    return torch.from_numpy(batch_BTHWC).to(device(), non_blocking=True).float() / 255


def inputs(frames_BTHWC: NDArray[np.uint8], *known: NDArray[np.int64] | None) -> list[Tensor]:
    """What a model in training takes of a batch: its frames as above, and what else is known of them."""
    others = [torch.from_numpy(one).to(device(), non_blocking=True) for one in known if one is not None]
    return [to_unit_frames(frames_BTHWC), *others]


def peak_memory_mb() -> float:
    """Of the accelerator, as tensors were given it; else of this process, with all its libraries."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    with contextlib.suppress(OSError, IndexError):  # where there is no such file, or no such line in it
        # Linux; getrusage would count what the parent held before this program began.
        status = Path("/proc/self/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0]) / 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def compile_count() -> int:
    """Graphs that torch.compile has made in this process, again for another shape included."""
    dynamo = sys.modules.get("torch._dynamo.utils")  # takes a second to import, and whoever compiles has done so
    return int(dynamo.counters["stats"]["unique_graphs"]) if dynamo else 0


def mark() -> torch.cuda.Event | None:
    """This moment in the order of the accelerator's work, which runs behind the program; None where nothing does."""
    if not torch.cuda.is_available():
        return None
    event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    event.record()
    return event


def seconds_between(first: torch.cuda.Event, second: torch.cuda.Event) -> float:
    """Of the accelerator's time, between two marks that it has passed."""
    return float(first.elapsed_time(second)) / 1e3


def keep_freed_memory() -> None:
    """Lets glibc keep what a step frees, instead of returning it to the kernel and faulting it in again.

    All threads share it: a service's memory would grow for hours while each of its many threads kept its own.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL("libc.so.6")
        m_trim_threshold, m_mmap_threshold, m_arena_max = -1, -3, -8
        libc.mallopt(m_arena_max, 1)
        libc.mallopt(m_mmap_threshold, 1 << 30)
        libc.mallopt(m_trim_threshold, 1 << 30)


class Native:
    """`backend.Backend` for CPU and CUDA: FSDP2, and tensor parallelism by DTensor (sharding.py)."""

    def __init__(self, parallel: ParallelConfig) -> None:
        self.parallel = parallel
        self._sizes = parallel.mesh(int(os.environ.get("WORLD_SIZE", 1)))
        self.share, self.first = (0, 1), True
        self._exit = contextlib.ExitStack()

    def __enter__(self) -> Native:
        keep_freed_memory()
        if "WORLD_SIZE" in os.environ and self._sizes != (1, 1, 1):
            self._meet()
        return self

    def __exit__(self, *ended: object) -> None:
        self._exit.close()

    def _meet(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        if not dist.is_initialized():
            dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
            self._exit.callback(dist.destroy_process_group)
        data, fsdp, tensor = self._sizes
        self.share, self.first = (dist.get_rank() // tensor, data * fsdp), dist.get_rank() == 0
        groups = [dist.new_group(range(i, dist.get_world_size(), tensor)) for i in range(tensor)]
        self._exit.enter_context(collectives.shared_by(groups[dist.get_rank() % tensor]))

    def prepare(self, module: nn.Module, stage: StageConfig) -> Optimizers:
        module.to(device()).train()
        for sublayer in sublayers(module):
            if self.parallel.remat:
                again = functools.partial(checkpoint, sublayer.forward, use_reentrant=False, preserve_rng_state=False)
                sublayer.forward = again
            if self.parallel.compile:
                sublayer.compile()
        if dist.is_initialized() and self._sizes != (1, 1, 1):
            from genie_model.backend import sharding  # takes a second to import

            sharding.check(module, stage, *self._sizes)
            sharding.shard(module, sharding.Mesh(*self._sizes).over(device().type), stage.precision)
        return Optimizers(module, stage.optimizer)

    def inputs(self, batch: Batch, chance: Chance) -> tuple[list[Tensor], Chance]:
        index, count = self.share
        key_B = chance.key_B.chunk(count)[index]
        return inputs(*batch), Chance(*(key.to(device(), non_blocking=True) for key in (chance.key, key_B)))

    def autocast(self, precision: str) -> contextlib.AbstractContextManager[None]:
        return autocast(precision)

    def clip(self, module: nn.Module, max_norm: float) -> Tensor:
        norm = nn.utils.clip_grad_norm_(module.parameters(), max_norm)
        whole: Tensor = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        return whole

    def end_step(self) -> None:
        pass

    def numbers(self, tensors: Mapping[str, Tensor]) -> dict[str, float]:
        means = collectives.mean(torch.stack([tensor.detach().float() for tensor in tensors.values()]))
        return dict(zip(tensors, means.tolist(), strict=True))

    def device_name(self) -> str:
        return device_name()

    def num_devices(self) -> int:
        return math.prod(self._sizes)

    def compile_count(self) -> int:
        return compile_count()

    def peak_memory_mb(self) -> float:
        return peak_memory_mb()
