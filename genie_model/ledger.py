"""What a pass costs one device: bytes that live, FLOPs, bytes that it sends to others. Of real tensors or fake ones."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor
from torch._guards import active_fake_mode
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

# By their names in c10d and in its functional twin: what it is called here, and how often a ring of n devices passes on
# (n-1)/n of the larger of what goes in and what comes out.
_COLLECTIVES = {
    "_allgather_base_": ("all-gather", 1),
    "all_gather_into_tensor": ("all-gather", 1),
    "_reduce_scatter_base_": ("reduce-scatter", 1),
    "reduce_scatter_tensor": ("reduce-scatter", 1),
    "allreduce_": ("all-reduce", 2),
    "all_reduce": ("all-reduce", 2),
}


class Ledger(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts while it is entered. Who runs the pass says in which `phase` it is, and in which `place` of the model.

    Everything is kept by place, so that what deeper transformers cost can be told from shallow ones.
    """

    def __init__(self, mesh: DeviceMesh) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.phase = self.place = ""
        self.live = Counter[str]()  # bytes, by the place that they were made in
        self.flops = Counter[tuple[str, str]]()  # by phase and place
        self.sent = Counter[tuple[str, str]]()  # bytes, by "collective axis phase" and place
        self.peaks = dict[tuple[str, str], Counter[str]]()  # `live` at its largest, of each phase and place
        names = mesh.mesh_dim_names or ()
        self._axes = {str(mesh.get_group(name).group_name): (name, mesh[name].size()) for name in names}
        self._storages = dict[int, tuple[str, int]]()  # their places and sizes
        self._total, self._largest = 0, Counter[tuple[str, str]]()

    def hold(self, tensors: Iterable[Tensor], place: str = "") -> None:
        """They live already, and were made in that place."""
        self.place = place
        for x in tensors:
            self._meet(local(x))
        self.place = ""

    def __enter__(self) -> Ledger:
        self._depth, ledger, resize = _fake_depth(), self, torch.UntypedStorage.resize_

        def resize_(storage: torch.UntypedStorage, size: int) -> None:
            resize(storage, size)
            ledger._count(storage)

        # So FSDP2 frees and refills parameters, by no operation that is dispatched.
        self._resizes = patch.object(torch.UntypedStorage, "resize_", resize_)
        self._resizes.start()
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *args: Any) -> None:
        super().__exit__(*args)  # type: ignore[no-untyped-call]
        self._resizes.stop()

    def __torch_dispatch__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # it comes again, as what it does with local tensors
        if func is torch.ops._c10d_functional.wait_tensor.default and self._depth:
            return args[0]  # as of real tensors; of a fake one it would make another
        out = func(*args, **(kwargs or {}))
        if _fake_depth() > self._depth:
            return out  # a DTensor finds out the shape of what all ranks have
        packet = func.overloadpacket
        if packet in flop_registry:
            self.flops[self.phase, self.place] += flop_registry[packet](*args, **(kwargs or {}), out_val=out)
        if packet.__name__ in _COLLECTIVES and func.namespace in ("c10d", "_c10d_functional"):
            self._send(packet.__name__, args, out)
        for x in tree_leaves(out):
            if isinstance(x, Tensor):
                self._meet(x)
        return out

    def _meet(self, x: Tensor) -> None:
        storage = x.untyped_storage()
        if storage._cdata not in self._storages:
            self._storages[storage._cdata] = self.place, 0
            weakref.finalize(storage, self._forget, storage._cdata).atexit = False
            self._count(storage)

    def _count(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata in self._storages:
            place, before = self._storages[storage._cdata]
            self._storages[storage._cdata] = place, storage.nbytes()
            self.live[place] += storage.nbytes() - before
            self._total += storage.nbytes() - before
            moment = self.phase, self.place
            if self._total > self._largest[moment]:
                self._largest[moment], self.peaks[moment] = self._total, self.live.copy()

    def _forget(self, key: int) -> None:
        place, size = self._storages.pop(key)
        self.live[place] -= size
        self._total -= size

    def _send(self, name: str, args: tuple[Any, ...], out: Any) -> None:
        kind, passes = _COLLECTIVES[name]
        axis, devices = next(group for group in map(self._group, args) if group is not None)
        if devices > 1:
            larger = max(x.numel() * x.element_size() for x in tree_leaves((args, out)) if isinstance(x, Tensor))
            self.sent[f"{kind} {axis} {self.phase}", self.place] += passes * larger * (devices - 1) // devices

    def _group(self, argument: object) -> tuple[str, int] | None:
        """The axis that it names, and its size. What is no axis of the mesh shares the batch (collectives.py)."""
        if isinstance(argument, torch.ScriptObject):
            group = dist.ProcessGroup.unbox(argument)
            return self._axes.get(str(group.group_name), ("batch", group.size()))
        return self._axes.get(argument) if isinstance(argument, str) else None


def _fake_depth() -> int:
    """How often fake tensors were turned on, one inside the other."""
    mode = active_fake_mode()
    return len(mode.enter_stack) if mode is not None else 0


def local(x: Tensor) -> Tensor:
    """What this rank has of it."""
    return x._local_tensor if isinstance(x, DTensor) else x


def num_bytes(tensors: Iterable[Tensor]) -> int:
    """That this rank has of them, every storage once."""
    storages = [local(x).untyped_storage() for x in tensors]
    return sum({storage._cdata: storage.nbytes() for storage in storages}.values())
