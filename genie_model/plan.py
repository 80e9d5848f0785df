"""What training the world model takes of each device of a mesh, before there is one: a step is traced, not computed.

One process plays rank 0 of any number: its process group only pretends, and its tensors are fake. The model, its
sharding and its optimizer are those of training. Of deep transformers two short cuts are traced, one an ST block deeper
than the other: all that is counted grows by the same with every block, so what the other blocks take is exact too.
"""

from __future__ import annotations

import functools
import logging
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from genie_model import collectives, dynamics
from genie_model.backend.sharding import Mesh, shard, transformers
from genie_model.chance import Chance
from genie_model.config import Config
from genie_model.genie import Genie
from genie_model.layers import STTransformer, recompute
from genie_model.ledger import Ledger, local, num_bytes
from genie_model.optim import Optimizers

Tally = Counter[tuple[str, str]]  # of each thing that is counted, how much each place of the model takes


class Cost(NamedTuple):
    """Of a step, for one device, in bytes where nothing else is said."""

    parameters: int
    gradients: int
    optimizer: int
    activations: int  # what the forward pass leaves for the backward pass, gathered parameters of the root included
    peak: int
    moment: str  # of the peak: the phase, and the part of the model
    flops: int
    sent: dict[str, int]  # by "collective axis phase", around a ring

    @property
    def states(self) -> int:
        return self.parameters + self.gradients + self.optimizer


def cut(config: Config, layers: int = 2) -> Config:
    """The config with transformers of at most `layers` layers, at their full widths: a program to lower and run."""
    return _with_layers(config, {name: min(t.num_layers, layers) for name, t in transformers(config)})


def plan(
    config: Config, mesh: Mesh, passes: Sequence[bool] = (False, True), device_type: str = "accelerator"
) -> list[Cost]:
    """The costs of a step of train_world where all activations are kept, and where each block's are computed again.

    `passes` says which of the two are wanted, by whether blocks are computed again. On a CPU the dynamics' loss takes
    more and smaller parts of the logits. Raises ValueError for a mesh that does not divide the config (`Mesh.check`).
    """
    left_out, short, longer = dict[str, int](), dict[str, int](), dict[str, int]()
    for name, transformer in transformers(config):
        period = 2 * transformer.temporal_every  # layers that repeat
        left_out[name] = max(transformer.num_layers // period - 2, 0)
        short[name] = transformer.num_layers - left_out[name] * period
        longer[name] = short[name] + period * (left_out[name] > 0)
    with torch.device("meta"):
        mesh.check(Genie(_with_layers(config, short)), config.train_world.batch_size)
    positions = dynamics._positions_at_once
    with (
        _pretended(mesh) as devices,
        patch.object(dynamics, "_positions_at_once", lambda B, X, _device: positions(B, X, device_type)),
    ):
        one, two = (_trace(_with_layers(config, layers), devices, passes) for layers in (short, longer))
    return [_cost(_extended(a, b, left_out)) for a, b in zip(one, two, strict=True)]


def _with_layers(config: Config, layers: Mapping[str, int]) -> Config:
    return config.with_overrides(*(f"{name}.num_layers={number}" for name, number in layers.items()))


def _extended(one: Tally, two: Tally, left_out: Mapping[str, int]) -> Tally:
    """One and, for each block left out of a transformer, what the second has more of there."""
    return Counter(
        {key: n + left_out.get(key[1], 0) * (two[key] - n) for key, n in (one | two).items() for n in [one[key]]}
    )


def _cost(tally: Tally) -> Cost:
    totals = Counter[str]()
    for (what, _place), number in tally.items():
        totals[what] += number
    peaks = {what.removeprefix("peak "): number for what, number in totals.items() if what.startswith("peak ")}
    moment = max(peaks, key=lambda name: peaks[name])
    return Cost(
        totals["parameters"],
        totals["gradients"],
        totals["optimizer"],
        totals["activations"],
        peaks[moment],
        moment,
        sum(number for what, number in totals.items() if what.startswith("flops ")),
        {what.removeprefix("sent "): number for what, number in totals.items() if what.startswith("sent ")},
    )


@contextmanager
def _pretended(mesh: Mesh) -> Iterator[DeviceMesh]:
    """As if this process were rank 0 of it."""
    dist.init_process_group("fake", rank=0, world_size=mesh.devices)
    redistributing = logging.getLogger("torch.distributed.tensor._redistribute")
    level = redistributing.level
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")  # none is changed in place
            redistributing.setLevel(logging.ERROR)  # that a norm is summed over one axis after the other
            with collectives.shared_by(dist.new_group(range(0, mesh.devices, mesh.tensor))):
                yield mesh.over("cpu")
    finally:
        redistributing.setLevel(level)
        dist.destroy_process_group()


def _trace(config: Config, devices: DeviceMesh, passes: Sequence[bool]) -> list[Tally]:
    """A step of rank 0, once for each of the passes."""
    stage = config.train_world
    with torch.device("meta"):
        genie = Genie(config)
    genie.tokenizer.requires_grad_(False)
    shard(genie, devices, stage.precision)  # of meta tensors, as cutting fake ones into hundreds takes a minute
    fake = FakeTensorMode()
    _become_fake(genie, fake)
    optimizers = Optimizers(genie.train(), stage.optimizer)
    with fake:
        for parameter in genie.parameters():
            parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
        optimizers.step()  # from now on it has its states
        batch = stage.batch_size // (devices["data"].size() * devices["fsdp"].size())
        inputs = [torch.zeros(batch, config.data.clip_length, *config.frame_shape)]
        if config.cached_tokens:
            patches, codes = genie.tokenizer.num_patches, config.tokenizer.codes_per_patch
            inputs.append(torch.zeros(batch, config.data.clip_length, patches, codes, dtype=torch.long))
        chance = Chance(torch.zeros((), dtype=torch.long), torch.zeros(batch, dtype=torch.long))
        return [measured_step(genie, optimizers, config, inputs, chance, Ledger(devices), again) for again in passes]


def _become_fake(module: nn.Module, mode: FakeTensorMode) -> None:
    """In place of tensors without a device come fake ones on the CPU."""

    def fake(x: Tensor) -> Tensor:
        with mode:
            made = torch.empty(local(x).shape, dtype=x.dtype, device="cpu")
        if isinstance(x, DTensor):
            return DTensor.from_local(made, x.device_mesh, x.placements, shape=x.shape, stride=x.stride())
        return made

    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False):
            part.register_parameter(name, nn.Parameter(fake(parameter), parameter.requires_grad))
        for name, buffer in part.named_buffers(recurse=False):
            part._buffers[name] = fake(buffer)


def measured_step(
    genie: Genie,
    optimizers: Optimizers,
    config: Config,
    inputs: Sequence[Tensor],
    chance: Chance,
    ledger: Ledger,
    again: bool,
) -> Tally:
    """A step of train_world on what is there, real or fake: the sharded model and the optimizer's states."""
    tally = Tally()
    parts = {name: part for name, part in genie.named_modules() if isinstance(part, STTransformer)}

    def by_place(named: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, list[Tensor]]]:
        placed = defaultdict[str, list[Tensor]](list)
        for name, tensor in named:
            placed[next((place for place in parts if name.startswith(f"{place}.")), "")].append(tensor)
        yield from placed.items()

    for place, tensors in by_place(genie.named_parameters()):
        tally["parameters", place] = num_bytes(tensors)
        ledger.hold(tensors, place)
    for place, tensors in by_place(optimizers.tensors(genie).items()):
        tally["optimizer", place] = num_bytes(tensors)
        ledger.hold(tensors, place)
    for place, tensors in by_place(genie.named_buffers()):
        ledger.hold(tensors, place)
    ledger.hold([*inputs, *chance])
    before = ledger.live.copy()
    if again:
        recompute(genie, functools.partial(checkpoint, use_reentrant=False, preserve_rng_state=False))
    with ledger, _places(parts, ledger):
        ledger.phase = "forward"
        with torch.autocast("cpu", torch.bfloat16, enabled=config.train_world.precision == "bf16"):
            loss, _ = genie(*inputs, chance=chance)
        for place in ledger.live:
            tally["activations", place] = ledger.live[place] - before[place]
        ledger.phase = "backward"
        loss.backward()
        del loss, _
        for place, tensors in by_place((name, p.grad) for name, p in genie.named_parameters() if p.grad is not None):
            tally["gradients", place] = num_bytes(tensors)
        ledger.phase, ledger.place = "optimizer", ""
        nn.utils.clip_grad_norm_(genie.parameters(), config.train_world.optimizer.clip_norm)
        optimizers.step()
    if again:
        for part in parts.values():
            del part.block
    for (phase, place), number in ledger.flops.items():
        if phase != "optimizer":
            tally[f"flops {phase}", place] = number
    for (what, place), number in ledger.sent.items():
        if not what.endswith("optimizer"):
            tally[f"sent {what}", place] = number
    for (phase, at), live in ledger.peaks.items():
        for place, number in live.items():
            tally[f"peak {phase} {at}".strip(), place] = number
    return tally


@contextmanager
def _places(parts: Mapping[str, nn.Module], ledger: Ledger) -> Iterator[None]:
    """The ledger's place is the transformer that is running, and in the backward pass the last that began to."""

    def go(place: str) -> None:
        ledger.place = place

    hooks = []
    for name, part in parts.items():
        hooks.append(part.register_forward_pre_hook(lambda *_, name=name: go(name)))
        hooks.append(part.register_forward_hook(lambda *_: go("")))
        hooks.append(part.register_full_backward_pre_hook(lambda *_, name=name: go(name)))
    yield
    for hook in hooks:
        hook.remove()
