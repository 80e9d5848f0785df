"""The plan of a config on a mesh, in words and figures, and the smallest slices of TPUs that hold it."""

from __future__ import annotations

from genie_model.backend.sharding import Mesh, divisors
from genie_model.config import Config
from genie_model.describe import short
from genie_model.paper import PAPER_PRESETS
from genie_model.plan import Cost, plan
from genie_model.slices import TPU, TPUS

_EFFICIENCY = 0.4  # of the peak FLOPs, recomputation included


def smallest(config: Config, tpu: TPU, costs: dict[Mesh, Cost]) -> Mesh | None:
    """The mesh, of `fsdp` and `tensor`, on the fewest chips that hold a step; none where no slice does.

    `costs` has meshes of each `tensor` that may be, best two, and gets what is traced here. Only what those rule out is
    not traced.
    """
    for chips in tpu.sizes:
        for tensor in sorted({mesh.tensor for mesh in costs}):
            mesh = Mesh(fsdp=chips // tensor, tensor=tensor)
            if mesh.devices != chips or config.train_world.batch_size % mesh.fsdp:
                continue
            if mesh not in costs and _least_peak(mesh, costs) <= 1.01 * tpu.memory:
                (costs[mesh],) = plan(config, mesh, [True])
            if mesh in costs and costs[mesh].peak <= tpu.memory:
                return mesh
    return None


def _least_peak(mesh: Mesh, costs: dict[Mesh, Cost]) -> float:
    """No less is the peak of the mesh, as other meshes of its `tensor` tell, but for padding: a part in a thousand.

    States shrink with `fsdp`. The rest is, of each moment of a step, so much and so much more for each clip; so of the
    largest moment it lies above the line through two that are known, outside of these.
    """
    known = {1 / (m.data * m.fsdp): (m, cost) for m, cost in costs.items() if m.tensor == mesh.tensor}
    few, many = min(known), max(known)
    (one, cost), (_, other) = known[few], known[many]
    rest, more = cost.peak - cost.states, other.peak - other.states
    clips, states = 1 / mesh.fsdp, cost.states * one.fsdp / mesh.fsdp
    if not few <= clips <= many and few < many:
        return states + rest + (more - rest) * (clips - few) / (many - few)
    return states


def report(config: Config, mesh: Mesh) -> str:
    """What a step takes of each device of the mesh, and of TPUs. Raises ValueError as `plan` does."""
    kept, again = plan(config, mesh)
    costs, batch = {mesh: again}, config.train_world.batch_size
    for tensor in {1, mesh.tensor}:
        for fsdp in [n for n in divisors(batch) if n * tensor <= mesh.devices][-2:]:
            known = Mesh(fsdp=fsdp, tensor=tensor)
            if known not in costs:
                (costs[known],) = plan(config, known, [True])
    clips = batch // (mesh.data * mesh.fsdp)
    lines = [
        f"{config.name}, a step of train_world: {mesh.devices} devices, {mesh}; {clips} clips for each tensor group",
        "",
        f"{'of each device':<32}{'all kept':>12}{'recomputed':>12}",
    ]
    for title, name in (
        ("parameters", "parameters"),
        ("gradients", "gradients"),
        ("optimizer's states", "optimizer"),
        ("activations after the forward", "activations"),
        ("peak", "peak"),
        ("FLOPs", "flops"),
    ):
        lines.append(_row(title, getattr(kept, name), getattr(again, name)))
    lines += ["sent to other devices", *(_row(f"  {kind}", kept.sent[kind], again.sent[kind]) for kind in again.sent)]
    lines += [
        "Bytes. Recomputed: the backward pass makes an ST block's activations anew from what went into the block;",
        f"the peak is then in {again.moment}.",
        "",
        f"{'TPUs':<14}{'mesh':<28}{'peak':>8}{'of HBM':>8}{'compute':>11}{'sends':>11}{'all steps':>16}",
    ]
    for tpu in TPUS.values():
        if mesh.devices in tpu.sizes:
            lines.append(_slice(config, tpu, mesh, again))
        least = smallest(config, tpu, costs)
        if least is None:
            lines.append(
                f"no slice of {tpu.name} holds it, with tensor={' or '.join(map(str, sorted({1, mesh.tensor})))}"
            )
        elif least != mesh:
            lines.append(_slice(config, tpu, least, costs[least]) + "  the smallest")
    lines += [
        f"Estimates, and floors: of a step, at {_EFFICIENCY:.0%} of the chips' peak FLOPs and at the full rate of",
        "their interconnect; of all steps, at the longer of the two.",
    ]
    if paper := PAPER_PRESETS.get(config.name):
        lines += [f"the paper, {paper.tables}: {paper.reported}"]
    return "\n".join(lines)


def _row(title: str, *numbers: float) -> str:
    return f"{title:<32}" + "".join(f"{short(number):>12}" for number in numbers)


def _slice(config: Config, tpu: TPU, mesh: Mesh, cost: Cost) -> str:
    compute = cost.flops / (_EFFICIENCY * tpu.flops)
    sends = sum(cost.sent.values()) / tpu.sends
    days = max(compute, sends) * config.train_world.steps / 86_400
    too_much = "  more than they hold" if cost.peak > tpu.memory else ""
    return (
        f"{f'{mesh.devices} {tpu.name}':<14}{mesh!s:<28}{short(cost.peak):>8}{cost.peak / tpu.memory:>8.0%}"
        f"{f'{compute:.3g} s':>11}{f'{sends:.2g} s':>11}{f'{days:.3g} days':>16}{too_much}"
    )
