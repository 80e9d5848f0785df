"""How fast a device can be, and how much work a training step is: what MFU is made of.

MFU is model FLOPs utilization (Chowdhery et al., 2022): the FLOPs that a step asks for, over what the devices could do
in its time. Whatever a backend computes twice to save memory counts once.
"""

from __future__ import annotations

import copy
import functools
import statistics
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from genie_model.backend import native
from genie_model.chance import Chance

# Dense bfloat16 FLOP/s of one device, as its vendor states them, by a part of its name; the first that fits.
_PEAK_FLOPS = (
    ("H100 PCIe", 756e12),
    ("H100 NVL", 835e12),
    ("H200 NVL", 835e12),
    ("H100", 989e12),
    ("H200", 989e12),
    ("A100", 312e12),
    ("TPU v4", 275e12),
    ("TPU v5p", 459e12),
    ("TPU v6e", 918e12),
)
_SLICE = "MIG"  # in the name of a GPU of which a part is lent
TRAINING_ROWS = 4096


def seconds_of(run: Callable[[], object]) -> float:
    began = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began


def matmul_rate(rows: int, dtype: torch.dtype = torch.bfloat16) -> float:
    """FLOP/s of a matmul of so many rows, 512 by 512: the median of 50, after 10 to warm up."""
    own = torch.Generator().manual_seed(0)  # nobody's random numbers become others
    a, b = (torch.randn(n, 512, generator=own).to(native.device(), dtype) for n in (rows, 512))
    for _ in range(10):
        a @ b
    at_once = 50 if a.is_cuda else 1  # else a launch is timed, not what it launches
    times = [seconds_of(lambda: [a @ b for _ in range(at_once)]) for _ in range(50)]
    return at_once * 2 * rows * 512 * 512 / statistics.median(times)


@functools.cache
def peak_flops(device: str, precision: str) -> float | None:
    """FLOP/s of one device of that name (`Backend.device_name`), or None for one that is not known.

    Of an accelerator in dense bfloat16, whatever the precision, as is the custom; of a CPU measured once, a third of a
    second long, in the precision that is trained in.
    """
    if device == "CPU":
        return matmul_rate(TRAINING_ROWS, torch.bfloat16 if precision == "bf16" else torch.float32)
    return vendor_peak(device)


def vendor_peak(name: str) -> float | None:
    """Of the device that its driver calls so."""
    return None if _SLICE in name else next((flops for part, flops in _PEAK_FLOPS if part in name), None)


def flops_counter(module: nn.Module, precision: str) -> Callable[[Sequence[NDArray[np.generic] | None]], float]:
    """What counts the FLOPs, forward and backward, of one clip of a batch, by its arrays' shapes alone.

    It keeps a copy of the module without its weights, so it is to be made before that is sharded or compiled.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)

    def fake(x: Tensor) -> Tensor:
        with mode:
            shape = torch.empty(x.shape, dtype=x.dtype)
            return nn.Parameter(shape, x.requires_grad) if isinstance(x, nn.Parameter) else shape

    copied = copy.deepcopy(module, {id(x): fake(x) for x in (*module.parameters(), *module.buffers())}).train()

    def count(batch: Sequence[NDArray[np.generic] | None]) -> float:
        frames, *known = [array for array in batch if array is not None]
        with mode, FlopCounterMode(display=False) as counter:
            inputs = [torch.empty(1, *frames.shape[1:])]
            inputs += [torch.empty(1, *array.shape[1:], dtype=torch.long) for array in known]
            chance = Chance.of_shapes(1)
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
                loss, _ = copied(*inputs, chance=chance)
            loss.backward()
        return float(counter.get_total_flops())

    return count
