"""Training that is killed, at any moment or by SIGTERM: resumed it is the training that was not."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch
from processes import ended, join, start

from genie_model.backend.processes import Native
from genie_model.config import ParallelConfig
from genie_model.data.loader import ClipLoader
from genie_model.data.store import VideoStore
from genie_model.genie import Genie
from genie_model.preemption import Preempted, preemption
from genie_model.presets import get_preset
from genie_model.progress import NoLog
from genie_model.train import fit
from genie_model.training_state import TrainingState

CONFIG = get_preset("tiny")
PREEMPTED = 143


class Lines(NoLog):
    """Appends the loss of every logged step to a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def metrics(self, values, step=0) -> None:  # type: ignore[no-untyped-def]
        with self.path.open("a") as file:
            file.write(json.dumps([step, values["loss"]]) + "\n")


def losses(folder: Path) -> list[tuple[int, float]]:
    path = folder / "loss.jsonl"
    return [tuple(json.loads(line)) for line in path.read_text().splitlines()] if path.exists() else []


def train_tokenizer(folder: Path, data_uri: str, steps: int, wait_at: int | None = None, where: str = "") -> None:
    """Carries on in `folder`, a checkpoint every other step, and leaves the weights there when it is done.

    Every step is logged; `wait_at` names one that takes a minute, or until there is a file `go`, `where` a folder
    inside for the log.
    """
    torch.set_num_threads(1)
    torch.manual_seed(0)
    module = Genie(CONFIG).tokenizer
    stage = CONFIG.train_tokenizer.model_copy(update={"steps": steps, "log_every": 1, "checkpoint_every": 2})
    log = Lines(folder / where / "loss.jsonl")
    log.path.parent.mkdir(parents=True, exist_ok=True)

    def on_step(step: int) -> None:
        if step == wait_at:
            (folder / "waits").touch()
            until = time.monotonic() + 60
            while time.monotonic() < until and not (folder / "go").exists():
                time.sleep(0.01)

    with Native(ParallelConfig()) as backend:
        store, length = VideoStore.open(f"{data_uri}/train"), CONFIG.data.clip_length
        fit(
            module,
            stage,
            ClipLoader(store, stage.batch_size, length, 0, *backend.share),
            TrainingState(str(folder / "training")),
            backend,
            desc="test",
            seed=0,
            log=log,
            on_step=on_step,
        )
    torch.save(module.state_dict(), folder / where / "weights.pt")


def wait_for_step(process: BaseProcess, folder: Path, more_than: int = 0) -> None:
    deadline = time.monotonic() + 60
    while len(losses(folder)) <= more_than:
        assert process.is_alive()
        assert time.monotonic() < deadline
        time.sleep(0.002)


def wait_in_step(folder: Path) -> None:
    """Until the one that waits has begun."""
    deadline = time.monotonic() + 60
    while not (folder / "waits").exists():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def assert_resumed_equals_uninterrupted(broken: Path, whole: Path) -> None:
    curve = dict(losses(whole))
    assert dict(losses(broken)) == curve
    assert all(curve[step] == loss for step, loss in losses(broken)), "also where a step was made twice"
    found, expected = torch.load(broken / "weights.pt"), torch.load(whole / "weights.pt")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_killed_at_twenty_moments_and_resumed_equals_uninterrupted(tiny_data_uri: str, tmp_path: Path) -> None:
    whole, broken, steps = tmp_path / "whole", tmp_path / "broken", 100
    began = time.monotonic()
    assert ended(start(train_tokenizer, whole, tiny_data_uri, steps)) == [0]
    seconds = time.monotonic() - began
    moments, begins = random.Random(0), []
    for _ in range(20):
        made = len(losses(broken))
        process = start(train_tokenizer, broken, tiny_data_uri, steps)
        wait_for_step(process, broken, more_than=made + moments.randrange(7))
        time.sleep(moments.random() * seconds / steps)
        process.kill()
        assert ended(process) == [-signal.SIGKILL]
        begins.append(losses(broken)[made][0])
    assert begins == sorted(begins)
    assert begins[-1] > 10, "checkpoints were made, and found"
    assert ended(start(train_tokenizer, broken, tiny_data_uri, steps)) == [0]
    assert_resumed_equals_uninterrupted(broken, whole)


def test_sigterm_ends_the_step_saves_and_exits_for_another_try(tiny_data_uri: str, tmp_path: Path) -> None:
    whole, broken, steps = tmp_path / "whole", tmp_path / "broken", 20
    process = start(train_tokenizer, broken, tiny_data_uri, steps, 4)
    wait_in_step(broken)
    process.terminate()
    (broken / "go").touch()
    assert ended(process) == [PREEMPTED]
    last = losses(broken)[-1][0]
    assert TrainingState(str(broken / "training")).latest_step() == last < steps
    assert ended(start(train_tokenizer, broken, tiny_data_uri, steps)) == [0]
    assert ended(start(train_tokenizer, whole, tiny_data_uri, steps)) == [0]
    assert len(losses(broken)) == steps, "no step was made twice"
    assert_resumed_equals_uninterrupted(broken, whole)


def test_a_second_sigterm_ends_it_at_once(tiny_data_uri: str, tmp_path: Path) -> None:
    process = start(train_tokenizer, tmp_path, tiny_data_uri, 40, 4)  # the step after a save
    wait_in_step(tmp_path)
    began = time.monotonic()
    process.terminate()
    time.sleep(0.05)
    process.terminate()  # the same one, passed on by a launcher
    time.sleep(3)  # by then it is another one
    assert process.is_alive()
    process.terminate()
    assert ended(process) == [-signal.SIGTERM]
    assert time.monotonic() - began < 30


def test_the_signal_is_taken_only_meanwhile() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with preemption() as must_stop:
        assert signal.getsignal(signal.SIGTERM) != before
        assert not must_stop()
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)  # at once: the same one
        assert must_stop()
    assert signal.getsignal(signal.SIGTERM) == before
    assert Preempted().code == PREEMPTED


def train_together(rank: int, folder: Path, data_uri: str) -> None:
    join(rank, 2, folder)
    os.environ["WORLD_SIZE"] = "2"  # as torchrun says
    train_tokenizer(folder, data_uri, 1000, where=str(rank))


def test_sigterm_to_one_of_two_processes_ends_both_after_the_same_step(tiny_data_uri: str, tmp_path: Path) -> None:
    processes = [start(train_together, rank, tmp_path, tiny_data_uri) for rank in range(2)]
    wait_for_step(processes[0], tmp_path / "0", more_than=2)
    processes[1].terminate()
    assert ended(*processes) == [PREEMPTED, PREEMPTED]
    steps = {losses(tmp_path / str(rank))[-1][0] for rank in range(2)}
    assert steps == {TrainingState(str(tmp_path / "training")).latest_step()}
