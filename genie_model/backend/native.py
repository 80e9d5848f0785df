"""The device seam for CPU and CUDA: where tensors live, in which precision, and how the process is set up for it."""

from __future__ import annotations

import contextlib
import ctypes
import platform
import resource
import sys
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from genie_model.chance import Chance


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


def gradients(
    module: nn.Module, inputs: list[Tensor], chance: Chance, precision: str
) -> tuple[Tensor, dict[str, Tensor]]:
    """A training step's loss and logs; its gradients are then in the parameters."""
    with autocast(precision):
        loss, logs = module(*inputs, chance=chance)
    loss.backward()
    return loss.detach(), logs


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
