"""What a model must know of the whole batch when processes share it: sums, means and single rows.

Each process has as many clips, in the order of their ranks. In one process, and under XLA whose program is written for
the whole batch, these are the identity. No gradients pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

_group: dist.ProcessGroup | None = None


@contextmanager
def shared_by(group: dist.ProcessGroup | None) -> Iterator[None]:
    """Inside, the processes of this group share every batch; None: this one has all of it."""
    global _group
    before, _group = _group, group
    try:
        yield
    finally:
        _group = before


def place() -> tuple[int, int]:
    """(i, n): this is the i-th of all n processes that train together, whether they share the batch or a model."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def meet() -> None:
    """Returns when all of them have called it."""
    if dist.is_initialized():
        dist.barrier()


def processes() -> int:
    """How many share the batch."""
    return 1 if _group is None else _group.size()


@torch.no_grad()
def total(x: Tensor) -> Tensor:
    """The sum over the processes."""
    if _group is None:
        return x.detach()
    x = x.detach().clone()
    dist.all_reduce(x, group=_group)
    return x


def mean(x: Tensor) -> Tensor:
    """The mean over the processes: of what is a mean over a process's clips, that over all clips."""
    return total(x) / processes()


@torch.no_grad()
def rows(x_XL: Tensor, index_F: Tensor) -> Tensor:
    """Rows of all processes' x, one behind the other, at indices that are the same in each process: (F, L)."""
    if _group is None:
        return x_XL.detach()[index_F]
    index_F = index_F - _group.rank() * len(x_XL)
    own_F1 = ((index_F >= 0) & (index_F < len(x_XL)))[:, None]
    return total(torch.where(own_F1, x_XL[index_F.clamp(0, len(x_XL) - 1)], 0))
