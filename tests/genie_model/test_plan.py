"""`describe --mesh`: what is told of a step without making anything agrees with processes that make it."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import plan_cut
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

from genie_model import collectives
from genie_model import plan as planning
from genie_model.__main__ import main
from genie_model.backend.sharding import Mesh, shard, transformers
from genie_model.chance import Chance
from genie_model.config import Config
from genie_model.genie import Genie
from genie_model.layers import STTransformer, recompute
from genie_model.ledger import Ledger, num_bytes
from genie_model.mesh_report import _least_peak, smallest
from genie_model.optim import Optimizers
from genie_model.plan import cut, measured_step, plan
from genie_model.presets import get_preset
from genie_model.slices import TPU

CONFIG = get_preset("tiny").with_overrides(
    "train_world.optimizer.muon_lr=0", "train_world.batch_size=4", "dynamics.transformer.num_layers=6"
)
MESHES = {"fsdp=2": "bf16", "tensor=2": "fp32", "data=2": "bf16"}  # and their precisions


def at(precision: str) -> Config:
    return CONFIG.with_overrides(f"train_world.precision={precision}")


# What each of two real processes does


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2, init_method=f"file://{folder}/store")
    for text, precision in MESHES.items():
        found = trained(Mesh.parse(text), at(precision))
        if rank == 0:
            Path(folder, f"{text}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def trained(mesh: Mesh, config: Config) -> dict[str, Any]:
    devices, share = mesh.over("cpu"), config.train_world.batch_size // (mesh.data * mesh.fsdp)
    torch.manual_seed(0)
    clips, chance = torch.rand(share, config.data.clip_length, *config.frame_shape), Chance.of_step(0, 0, share)
    whole, genie = made(config), made(config)
    shard(genie, devices, config.train_world.precision)
    step(whole, clips, chance, config, again=False)
    optimizers = step(genie, clips, chance, config, again=True)
    after = dict(whole.named_parameters())
    drift = max(
        float((p.full_tensor() - after[name]).abs().max())
        for name, p in genie.named_parameters()
        if isinstance(p, DTensor)
    )
    found: dict[str, Any] = {"drift": drift}
    group = dist.new_group(range(dist.get_rank() % mesh.tensor, 2, mesh.tensor))
    for again in (False, True):
        with collectives.shared_by(group):
            with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
                step(genie, clips, chance, config, again, optimizers)
            tally = measured_step(genie, optimizers, config, [clips], chance, Ledger(devices), again)
        found[str(again)] = {"allocated": allocated(profiler), "cost": planning._cost(tally)._asdict()}
    found["held"] = num_bytes([*genie.buffers(), clips, *chance])
    found["parameters"], found["optimizer"] = held(genie.parameters()), held(optimizers.tensors(genie).values())
    return found


def made(config: Config) -> Genie:
    torch.manual_seed(1)
    genie = Genie(config)
    with torch.no_grad():
        for name, parameter in genie.named_parameters():
            if name.endswith("qk_scale"):  # its gradient comes from each device's own heads
                parameter += 0.1 * torch.randn_like(parameter)
    genie.tokenizer.requires_grad_(False)
    return genie.train()


def step(
    genie: nn.Module,
    clips: torch.Tensor,
    chance: Chance,
    config: Config,
    again: bool,
    optimizers: Optimizers | None = None,
) -> Optimizers:
    optimizers = optimizers or Optimizers(genie, config.train_world.optimizer)
    if again:
        recompute(genie, functools.partial(checkpoint, use_reentrant=False))
    with torch.autocast("cpu", torch.bfloat16, enabled=config.train_world.precision == "bf16"):
        loss, logs = genie(clips, chance=chance)
    loss.backward()
    for module in genie.modules() if again else ():
        if isinstance(module, STTransformer):
            del module.block
    del loss, logs
    nn.utils.clip_grad_norm_(genie.parameters(), config.train_world.optimizer.clip_norm)
    optimizers.step()
    return optimizers


def held(tensors: Any) -> int:
    return sum(x.to_local().nbytes if isinstance(x, DTensor) else x.nbytes for x in tensors)


def allocated(profiler: profile) -> int:
    """The most that was allocated at once since profiling began, as PyTorch's allocator tells."""
    total = most = 0
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]  # type: ignore[union-attr]
    for event in sorted(events, key=lambda event: event.start_ns()):
        total += event.nbytes()
        most = max(most, total)
    return most


# The tests


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(work, args=(str(folder),), nprocs=2)
    return {text: json.loads((folder / f"{text}.json").read_text()) for text in MESHES}


@pytest.mark.parametrize("text", MESHES)
def test_a_plan_is_what_two_processes_then_take(text: str, real: dict[str, Any]) -> None:
    found = real[text]
    costs = plan(at(MESHES[text]), Mesh.parse(text), device_type="cpu")
    for cost, made in zip(costs, (found["False"], found["True"]), strict=True):
        assert (cost.parameters, cost.optimizer) == (found["parameters"], found["optimizer"])
        for name in ("parameters", "gradients", "optimizer", "flops", "sent"):
            assert getattr(cost, name) == made["cost"][name], name
        # up to the statistics that a CPU's norms keep in another precision than is told of them
        assert cost.activations == pytest.approx(made["cost"]["activations"], rel=0.01)
        beyond = cost.peak - cost.parameters - cost.optimizer - found["held"]
        assert beyond == pytest.approx(
            made["allocated"], rel=0.1
        )  # in which gloo's buffers come and go as its threads do
    assert costs[1].activations < costs[0].activations
    assert costs[1].flops > costs[0].flops


def test_tensor_parallel_training_is_that_of_one_process(real: dict[str, Any]) -> None:
    assert real["tensor=2"]["drift"] < 2e-4  # a step moves parameters by 3e-3 / 2


def test_blocks_left_out_of_the_trace_are_counted_all_the_same() -> None:
    mesh = Mesh(fsdp=2, tensor=2)
    deep = CONFIG.with_overrides(
        "lam.decoder.num_layers=7", "dynamics.transformer.num_layers=12", "dynamics.transformer.temporal_every=2"
    )
    with planning._pretended(mesh) as devices:
        traced = [planning._cost(tally) for tally in planning._trace(deep, devices, (False, True))]
    assert plan(deep, mesh, device_type="cpu") == traced


def test_a_cut_keeps_widths_and_is_a_step_of_the_plan_of_the_whole() -> None:
    whole, mesh = CONFIG.with_overrides("dynamics.transformer.num_layers=10"), Mesh(fsdp=2)
    assert {t.num_layers for _, t in transformers(cut(whole))} == {2}
    assert cut(whole).dynamics.transformer.d_model == whole.dynamics.transformer.d_model
    two, four, ten = (plan(config, mesh, [True])[0] for config in (cut(whole), cut(whole, 4), whole))
    for name in ("parameters", "gradients", "optimizer", "flops"):
        small, larger, full = (getattr(cost, name) for cost in (two, four, ten))
        assert full - small == 4 * (larger - small) > 0, name


def test_the_plan_of_the_cut_that_runs_on_virtual_devices() -> None:
    (cost,) = plan(plan_cut.CONFIG, plan_cut.MESH, [True])
    assert {"parameters": cost.parameters, "optimizer": cost.optimizer} == plan_cut.PLANNED


def test_states_halve_when_fsdp_doubles() -> None:
    config = cut(get_preset("coinrun")).with_overrides("train_world.batch_size=8")
    two, four = (plan(config, Mesh(fsdp=n), [True])[0] for n in (2, 4))
    for name in ("parameters", "gradients", "optimizer"):
        assert getattr(two, name) / getattr(four, name) == pytest.approx(2, rel=0.01), name
    # replicas over `data` hold the same states, and only share the clips
    replicated = plan(config, Mesh(data=2, fsdp=2), [True])[0]
    assert replicated.states == two.states
    assert replicated.activations < two.activations


def test_the_smallest_slice_that_holds_it() -> None:
    shallow = cut(CONFIG)
    one, two, four = ((mesh, plan(shallow, mesh, [True])[0]) for mesh in (Mesh(), Mesh(fsdp=2), Mesh(fsdp=4)))
    assert _least_peak(one[0], dict([two, four])) <= 1.01 * one[1].peak
    assert _least_peak(four[0], dict([one, two])) <= 1.01 * four[1].peak
    known = dict([one, four, (Mesh(tensor=2), one[1])])
    least = two[1].peak

    def tpu(name: str, memory: float) -> TPU:
        return TPU(name, "", ("1x1", "1x2", "2x2"), 4, memory, 1e12, 1e9)

    assert smallest(shallow, tpu("roomy", least), dict(known)) == Mesh(fsdp=2)
    assert smallest(shallow, tpu("a byte short", least - 1), dict(known)) == Mesh(fsdp=4)
    assert smallest(shallow, tpu("small", least / 10), dict(known)) is None


def test_the_report_names_what_a_device_takes_and_slices(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["describe", "tiny", "--mesh", "fsdp=2,tensor=2", "--set", "train_world.optimizer.muon_lr=0"]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    for line in ("4 devices, data=1,fsdp=2,tensor=2; 1 clips", "all-reduce tensor backward", "4 v5p", "1 v6e"):
        assert line in printed


@pytest.mark.parametrize(
    ("mesh", "why"),
    [
        ("tensor=8", "tensor=8 must divide the heads of all"),
        ("tensor=8", "dynamics.transformer 36): allowed are 1, 2, 4"),
        ("data=2,fsdp=3", "data*fsdp=6 must divide batch_size=512: allowed are 1, 2, 4"),
        ("fdsp=2", "unknown mesh axis 'fdsp'; did you mean 'fsdp'?"),
        ("fsdp=0", "fsdp=N with N at least 1"),
        ("fsdp=2,fsdp=4", "fsdp once"),
    ],
)
def test_a_mesh_that_does_not_fit_is_one_line(mesh: str, why: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["describe", "genie_11b", "--mesh", mesh]) == 2
    error = capsys.readouterr().err
    assert why in error
    assert error.count("\n") == 1
