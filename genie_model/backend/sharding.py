"""How a model is cut over a mesh of devices: batch parallelism, stage-3 ZeRO and tensor parallelism (App. C.3).

Three axes. `data` and `fsdp` share the batch; `fsdp` also cuts every parameter, its gradient and its optimizer state
(Rajbhandari et al., 2020). `tensor` cuts attention between its heads and the feed-forward between its hidden units
(Shoeybi et al., 2019): so the devices of one `tensor` group see the same clips, and join twice in a sublayer's pass.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.distributed.tensor.placement_types import Placement

from genie_model.config import Config, StageConfig, TransformerConfig, _did_you_mean
from genie_model.layers import STTransformer, sublayers

# The dimension that `tensor` cuts, by the layer whose weight it is: outputs (0), or inputs (1). All others are whole.
# `heads_in` and `out` lie head by head.
TENSOR_DIMENSION = {"heads_in": 0, "up": 0, "out": 1, "down": 1}
_OF_OWN_HEADS = "qk_scale"  # whole too, but each device's gradient comes from its own heads


def cut(name: str, parameter: Tensor) -> tuple[int | None, int | None]:
    """The dimensions of a parameter that lie on `fsdp` and on `tensor`; None: on all of the axis alike.

    Vectors are whole: to gather one alone would take longer than to keep it. (FSDP2 packs a sublayer's into one.)
    """
    layer = name.removesuffix(".weight").rpartition(".")[2]
    tensor = TENSOR_DIMENSION.get(layer) if ".sublayers." in name else None
    return (None if parameter.ndim < 2 else 1 if tensor == 0 else 0), tensor


class Mesh(NamedTuple):
    """Devices on each axis."""

    data: int = 1
    fsdp: int = 1
    tensor: int = 1

    @staticmethod
    def parse(text: str) -> Mesh:
        """`data=1,fsdp=128,tensor=2`; what is not named is 1. Raises ValueError with the closest name or the form."""
        sizes = dict[str, int]()
        for part in text.split(","):
            name, _, size = part.partition("=")
            if name not in Mesh._fields:
                raise ValueError(f"unknown mesh axis {name!r}{_did_you_mean(name, [*Mesh._fields])}")
            if not (size.isascii() and size.isdecimal()) or int(size) < 1 or name in sizes:
                raise ValueError(f"mesh {text!r}: {name} once, as {name}=N with N at least 1")
            sizes[name] = int(size)
        return Mesh(**sizes)

    @property
    def devices(self) -> int:
        return math.prod(self)

    def __str__(self) -> str:
        return ",".join(f"{name}={size}" for name, size in self._asdict().items())

    def check(self, module: nn.Module, batch_size: int) -> None:
        """Raises ValueError, with what is allowed, where it does not divide the clips or the module's heads."""
        shares = self.data * self.fsdp
        if batch_size % shares:
            raise ValueError(f"data*fsdp={shares} must divide batch_size={batch_size}: {_allowed(batch_size)}")
        found = {name: m.config for name, m in module.named_modules() if isinstance(m, STTransformer)}
        widths = math.gcd(*(math.gcd(t.num_heads, t.mlp_ratio * t.d_model) for t in found.values()))
        if widths % self.tensor:
            heads = ", ".join(f"{name or 'it'} {transformer.num_heads}" for name, transformer in found.items())
            raise ValueError(f"tensor={self.tensor} must divide the heads of all ({heads}): {_allowed(widths)}")

    def over(self, device_type: str) -> DeviceMesh:
        """Of this process's group, which has as many ranks."""
        return init_device_mesh(device_type, tuple(self), mesh_dim_names=self._fields)


def check_xla(mesh: Mesh, module: nn.Module, stage: StageConfig) -> None:
    """What backend=xla trains on, and whoever asks for the chips beforehand. Raises ValueError for what it cannot."""
    mesh.check(module, stage.batch_size)
    if stage.optimizer.muon_lr:
        raise ValueError("optimizer.muon_lr: torch-xla hands Muon's products to the CPU; set it to 0 for backend=xla")


def transformers(config: Config) -> Iterator[tuple[str, TransformerConfig]]:
    """Those of the world model, by their dotted names in the config."""
    for part in ("tokenizer", "lam"):
        for name in ("encoder", "decoder"):
            yield f"{part}.{name}", getattr(getattr(config, part), name)
    yield "dynamics.transformer", config.dynamics.transformer


def divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def _allowed(n: int) -> str:
    return f"allowed are {', '.join(map(str, divisors(n)))}"


def shard(module: nn.Module, mesh: DeviceMesh, precision: str) -> None:
    """Leaves of `module`, in place, what this rank holds. A sublayer's parameters are whole only while it runs.

    Under "bf16" they are gathered as bfloat16, half the bytes, and gradients are summed in float32 all the same.
    """
    tensor, batch = mesh["tensor"], mesh["data", "fsdp"] if mesh["data"].size() > 1 else mesh["fsdp"]
    units = sublayers(module)
    if tensor.size() > 1:
        styles = [ColwiseParallel(), RowwiseParallel()]
        for sublayer in units:
            parallelize_module(
                sublayer, tensor, {n: styles[d] for n, d in TENSOR_DIMENSION.items() if hasattr(sublayer, n)}
            )
        for unit in (*units, module):
            _keep_whole(unit, tensor)
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    for sublayer in units:
        fully_shard(sublayer, mesh=batch, mp_policy=policy if precision == "bf16" else MixedPrecisionPolicy())
    fully_shard(module, mesh=batch)


def _keep_whole(unit: nn.Module, tensor: DeviceMesh) -> None:
    """Puts what `tensor` does not cut on its mesh too, where optimizers want all; its passes see plain tensors."""
    whole = list[tuple[nn.Module, str, Placement]]()
    for module in unit.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if not isinstance(parameter, DTensor):
                replicated = DTensor.from_local(parameter.detach(), tensor, [Replicate()], run_check=False)
                module.register_parameter(name, nn.Parameter(replicated, parameter.requires_grad))
                whole.append((module, name, Partial() if name == _OF_OWN_HEADS else Replicate()))
    forward = unit.forward

    def with_plain_tensors(*args: Any, **kwargs: Any) -> Any:
        parameters = [module._parameters[name] for module, name, _ in whole]
        try:
            for (module, name, placement), parameter in zip(whole, parameters, strict=True):
                assert isinstance(parameter, DTensor)
                module._parameters[name] = parameter.to_local(grad_placements=[placement])
            return forward(*args, **kwargs)
        finally:  # recomputation ends a pass by an exception, as soon as it has all it needs
            for (module, name, _), parameter in zip(whole, parameters, strict=True):
                module._parameters[name] = parameter

    unit.forward = with_plain_tensors
