"""Checkpoints: whole or not there, in parts that any number of processes reads."""

from __future__ import annotations

import errno
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import ended, join, start
from safetensors.torch import load_file
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from genie_model import files, training_state
from genie_model.backend.processes import Native
from genie_model.checkpoint import save_model
from genie_model.config import ParallelConfig
from genie_model.genie import Genie
from genie_model.optim import Optimizers
from genie_model.presets import get_preset
from genie_model.training_state import TrainingState

CONFIG = get_preset("tiny")

# One process, one layer.


def layer(steps: int = 0) -> tuple[torch.nn.Linear, Optimizers]:
    torch.manual_seed(0)
    module = torch.nn.Linear(3, 3)
    optimizers = Optimizers(module, CONFIG.train_world.optimizer)
    train_layer(module, optimizers, steps)
    return module, optimizers


def train_layer(module: torch.nn.Linear, optimizers: Optimizers, steps: int) -> None:
    for step in range(steps):
        module(torch.full((1, 3), step + 1.0)).square().sum().backward()
        optimizers.step()


def tensors(module: torch.nn.Module, optimizers: Optimizers) -> dict[str, torch.Tensor]:
    both = {**module.state_dict(), **optimizers.tensors(module)}
    return {name: t.full_tensor() if isinstance(t, DTensor) else t.clone() for name, t in both.items()}


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize("root", ["memory://training", "{tmp}"])
def test_a_save_keeps_the_state_at_its_step_while_training_goes_on(root: str, tmp_path: Path) -> None:
    module, optimizers = layer(steps=2)
    expected = tensors(module, optimizers)
    with TrainingState(root.format(tmp=tmp_path)) as state:
        state.save(2, module, optimizers)
        train_layer(module, optimizers, steps=3)
    assert not torch.equal(module.weight, expected["weight"])
    for steps in (0, 1):  # with optimizers that remember nothing, or something else
        other = layer(steps)
        assert TrainingState(state.uri).restore(*other) == 2
        assert_same(tensors(*other), expected)
    state.save(5, module, optimizers)
    state.wait()
    assert files.names(state.uri) == ["latest.json", "step-0000005"]
    state.remove()
    assert state.latest_step() == 0


def test_age_counts_from_when_the_newest_whole_checkpoint_was_taken(tmp_path: Path) -> None:
    state, before = TrainingState(str(tmp_path)), time.monotonic()
    assert state.saved_at <= before
    state.save(1, *layer(steps=1))
    copied = time.monotonic()
    state.wait()
    assert before < state.saved_at <= copied


def test_an_error_in_the_thread_is_raised_at_the_next_save_or_at_the_end(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    state = TrainingState(str(tmp_path / "file"))
    module, optimizers = layer(steps=1)
    state.save(1, module, optimizers)
    with pytest.raises(NotADirectoryError):
        state.save(2, module, optimizers)
    with pytest.raises(NotADirectoryError), state:
        state.save(3, module, optimizers)


def test_a_store_s_error_is_waited_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(training_state, "_WAITS", (0.01, 0.01))
    state, sync, broken = TrainingState(str(tmp_path)), os.fsync, [1, 2]

    def late(descriptor: int) -> None:
        if broken:
            raise OSError(errno.EIO, f"no answer {broken.pop()}")
        sync(descriptor)

    monkeypatch.setattr("os.fsync", late)
    state.save(1, *layer(steps=1))
    state.wait()
    assert state.latest_step() == 1
    assert capsys.readouterr().err.count("the checkpoint of step 1 is tried again: OSError(5, 'no answer") == 2

    broken += [1, 2, 3]
    state.save(2, *layer(steps=1))
    with pytest.raises(OSError, match="no answer 1"):
        state.save(3, *layer(steps=1))  # is written all the same
    state.wait()
    assert state.latest_step() == 3


def test_a_full_disk_is_one_clear_line_and_keeps_the_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = TrainingState(str(tmp_path))
    module, optimizers = layer(steps=1)
    state.save(1, module, optimizers)
    state.wait()

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    state.save(2, module, optimizers)
    with pytest.raises(OSError, match="the disk is full; free some space and run again"):
        state.wait()
    assert state.latest_step() == 1


@pytest.mark.parametrize("file", ["latest.json", ".metadata", "__0_0.distcp"])
def test_a_damaged_checkpoint_says_so(tmp_path: Path, file: str) -> None:
    with TrainingState(str(tmp_path)) as state:
        state.save(4, *layer(steps=1))
    (path,) = tmp_path.rglob(file)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"is damaged, .*: delete that folder and run again"):
        state.restore(*layer())


@pytest.mark.parametrize("other", [torch.nn.Linear(3, 4), torch.nn.Linear(3, 3, bias=False), torch.nn.PReLU()])
def test_the_checkpoint_of_another_model_is_refused(tmp_path: Path, other: torch.nn.Module) -> None:
    with TrainingState(str(tmp_path)) as state:
        state.save(4, *layer(steps=1))
    with pytest.raises(ValueError, match=r"or of another model"):
        state.restore(other, Optimizers(other, CONFIG.train_world.optimizer))


def test_a_backend_gives_its_own_planners_and_copy(tmp_path: Path) -> None:
    used = []

    class Save(DefaultSavePlanner):
        def create_local_plan(self) -> Any:
            used.append("save")
            return super().create_local_plan()

    class Load(DefaultLoadPlanner):
        def create_local_plan(self) -> Any:
            used.append("load")
            return super().create_local_plan()

    def stage(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        used.append("stage")
        return {name: 2 * value.detach() for name, value in state.items()}

    module, optimizers = layer(steps=1)
    with TrainingState(str(tmp_path), stage=stage, save_planner=Save, load_planner=Load) as state:
        state.save(1, module, optimizers)
    other = layer()
    state.restore(*other)
    assert used == ["stage", "save", "load"]
    assert torch.equal(other[0].weight, 2 * module.weight)


# Killed.


def save_and_die(uri: str, number: int) -> None:
    """Saves step 8 over what is there; dies before its `number`th change of the folder."""
    done = iter(range(number))

    def die(event: str, arguments: tuple[Any, ...]) -> None:
        writes = event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree") or (
            event == "open" and arguments[1] is not None and not set(str(arguments[1])).isdisjoint("wax+")
        )
        if writes and uri in str(arguments[0]) and next(done, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)

    module, optimizers = layer(steps=8)
    with TrainingState(uri) as state:
        sys.addaudithook(die)
        state.save(8, module, optimizers)
    os._exit(0)


def test_a_kill_at_any_write_leaves_the_old_or_the_new_checkpoint(tmp_path: Path) -> None:
    expected = {step: tensors(*layer(steps=step)) for step in (4, 8)}
    found = []
    for number in range(100):
        uri = str(tmp_path / str(number))
        with TrainingState(uri) as state:
            state.save(4, *layer(steps=4))
        (exitcode,) = ended(start(save_and_die, uri, number))
        other = layer()
        found.append(state.restore(*other))
        assert_same(tensors(*other), expected[found[-1]])
        with state:  # and the next save leaves nothing of it
            state.save(9, *layer(steps=1))
        assert files.names(uri) == ["latest.json", "step-0000009"]
        if exitcode == 0:
            break
        assert exitcode == -signal.SIGKILL
    assert found == sorted(found)
    assert found.count(4) >= 6  # the folder, the parts, the index and its name, the mark and its name
    assert found.count(8) >= 3  # the folder before goes


# Parts.


def genie(processes: int = 0, seed: int = 0) -> tuple[Genie, Optimizers]:
    """In as many parts as there are processes; whole in one that is alone."""
    torch.manual_seed(seed)
    module = Genie(CONFIG)
    if processes:
        fully_shard(module, mesh=init_device_mesh("cpu", (processes,)))
    return module, Optimizers(module, CONFIG.train_world.optimizer.model_copy(update={"muon_lr": 0.0}))


def trained(module: Genie, optimizers: Optimizers) -> tuple[Genie, Optimizers]:
    """A step along gradients that need no forward pass."""
    for number, parameter in enumerate(module.parameters()):
        parameter.grad = torch.full_like(parameter, 1.0 + number % 7)
    optimizers.step()
    return module, optimizers


def save_in_parts(rank: int, size: int, folder: Path) -> None:
    join(rank, size, folder)
    module, optimizers = trained(*genie(size))
    with TrainingState(str(folder / "training")) as state:
        state.save(3, module, optimizers)
    save_model(str(folder / "model"), module, gather=Native(ParallelConfig()).whole)
    assert (folder / "model/config.json").exists()


def load_in_parts(rank: int, size: int, folder: Path) -> None:
    join(rank, size, folder)
    module, optimizers = genie(size, seed=1)
    assert TrainingState(str(folder / "training")).restore(module, optimizers) == 3
    assert isinstance(module.dynamics.position, DTensor)
    assert_same(tensors(module, optimizers), tensors(*trained(*genie())))


def test_saved_by_four_processes_and_loaded_by_one_and_two(tmp_path: Path) -> None:
    assert ended(*(start(save_in_parts, rank, 4, tmp_path) for rank in range(4))) == [0] * 4
    expected = trained(*genie())

    index = FileSystemReader(tmp_path / "training/step-0000003").read_metadata()
    parts: dict[str, set[str]] = {}
    for item, stored in index.storage_data.items():
        parts.setdefault(item.fqn, set()).add(stored.relative_path)
    assert len(parts["model/dynamics.transformer.norm.weight"]) == 4
    assert len(parts["optimizer/dynamics.transformer.norm.weight|exp_avg"]) == 4
    plain = {name for name, _ in expected[0].named_buffers()} & expected[0].state_dict().keys()
    assert plain
    assert {len(parts[f"model/{name}"]) for name in plain} == {1}

    alone = genie(seed=1)
    assert TrainingState(str(tmp_path / "training")).restore(*alone) == 3
    assert_same(tensors(*alone), tensors(*expected))
    assert_same(load_file(tmp_path / "model/model.safetensors"), expected[0].state_dict())
    assert ended(*(start(load_in_parts, rank, 2, tmp_path) for rank in range(2))) == [0, 0]
