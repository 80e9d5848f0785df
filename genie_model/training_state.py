"""Checkpoints of a training run: in parts, written while it goes on, whole or not there.

torch.distributed.checkpoint (DCP) does the work. Each process writes its own parts of the DTensors and its share of the
other tensors, and any other number of processes reads them again. DCP's index is a pickle: unlike a model
(`checkpoint`), a training state is for its own run alone.
"""

from __future__ import annotations

import errno
import functools
import json
import pickle
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint._fsspec_filesystem import FsspecReader, FsspecWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlanner, SavePlanner
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.checkpoint.storage import WriteResult

from genie_model import files
from genie_model.optim import Optimizers

State = dict[str, Any]  # model/<parameter or buffer> and optimizer/<parameter>|<key>, tensors or what stands for them

_WAITS = (1.0, 4.0, 16.0)  # seconds before a write that failed is tried again
_LATEST, _STEP, _MODEL, _OPTIMIZER = "latest.json", "step-", "model/", "optimizer/"
# What reading half a file ends in, or the file of another model; a store that does not answer is none of these.
_BROKEN = (FileNotFoundError, EOFError, pickle.UnpicklingError, RuntimeError, ValueError, LookupError, AttributeError)

warnings.filterwarnings("ignore", "torch.distributed is disabled")  # one process needs no telling
warnings.filterwarnings("ignore", "TypedStorage is deprecated", module="torch.distributed.checkpoint")  # torch 2.9


class TrainingState:
    """Checkpoints of one training run: `<uri>/step-<n>/`, and `latest.json` that names the newest whole one.

    A kill at any instant leaves the old or the new, never half of one. Where several processes train, all of them
    call `save`, `restore` and `wait` in the same order.

    A backend with tensors that DCP does not know (XLA's) says how to copy a `State` to the host, and makes the
    planners that cut it in parts.
    """

    def __init__(
        self,
        uri: str,
        *,
        stage: Callable[[State], State] | None = None,
        save_planner: Callable[[], SavePlanner] | None = None,
        load_planner: Callable[[], LoadPlanner] | None = None,
    ) -> None:
        self.uri = uri
        self.saved_at = time.monotonic()  # seconds; what was trained since then dies with the process
        self._stage = stage or _copy_to_host()
        self._save_planner, self._load_planner = save_planner, load_planner
        self._writer = ThreadPoolExecutor(1, "checkpoint")
        self._in_flight: Future[None] | None = None

    def __enter__(self) -> TrainingState:
        return self

    def __exit__(self, *ended: object) -> None:
        """Waits for the save in flight, however the block ended."""
        self.wait()

    def save(self, step: int, module: nn.Module, optimizers: Optimizers) -> None:
        """Copies the state after `step` steps; a thread writes it. The one before it goes once this is whole.

        First waits for the last save. What that ended in is raised once this one is on its way: `wait` tells of both.
        """
        last, self._in_flight = self._in_flight, None
        if last:
            wait([last])
        staged = self._stage(_state(module, optimizers))
        self._in_flight = self._writer.submit(self._write, step, staged, self._group, time.monotonic())
        if last:
            self._raise(last)

    def wait(self) -> None:
        """Returns when no save is in flight. Raises what the last one ended in, OSError for a full disk."""
        in_flight, self._in_flight = self._in_flight, None
        if in_flight:
            self._raise(in_flight)

    def _raise(self, ended: Future[None]) -> None:
        try:
            ended.result()
        except CheckpointException as error:
            cause = _cause(error)
            raise files.explained(cause, self.uri) if isinstance(cause, OSError) else cause from None

    def latest_step(self) -> int:
        """Steps done at the newest checkpoint; 0 when there is none."""
        if not files.exists(f"{self.uri}/{_LATEST}"):
            return 0
        try:
            return int(json.loads(files.read(f"{self.uri}/{_LATEST}"))["step"])
        except (ValueError, KeyError, TypeError) as error:
            raise self._damaged(error) from None

    def restore(self, module: nn.Module, optimizers: Optimizers) -> int:
        """Loads the newest checkpoint, if there is one, and returns its step.

        The parts are cut as the module's parameters are, however they were when it was saved.
        """
        self.wait()
        step = [self.latest_step()]
        if self._group:
            dist.broadcast_object_list(step, src=0, group=self._group)
        if step[0]:
            self._load(self._folder(step[0]), module, optimizers)
        self.saved_at = time.monotonic()
        return step[0]

    def remove(self) -> None:
        """Everything; one process's to do."""
        files.remove_tree(self.uri)

    @functools.cached_property
    def _group(self) -> dist.ProcessGroup | None:
        """The processes that train, on a line of its own: a save talks on it while the training talks on others."""
        return dist.new_group(backend="gloo") if dist.is_initialized() else None

    def _write(self, step: int, staged: State, group: dist.ProcessGroup | None, taken_at: float) -> None:
        """A store's error is waited out a few times. All processes learn of it, and try again together."""
        for pause in (*_WAITS, None):
            try:
                save(
                    staged,
                    storage_writer=_Writer(self._folder(step), functools.partial(self._commit, step)),
                    planner=self._save_planner and self._save_planner(),
                    process_group=group,
                    no_dist=group is None,
                )
                break
            except CheckpointException as error:
                if pause is None or _lasts(_cause(error)):
                    raise
                print(f"the checkpoint of step {step:,} is tried again: {_cause(error)!r}", file=sys.stderr, flush=True)
            time.sleep(pause)
        self.saved_at = taken_at

    def _commit(self, step: int) -> None:
        files.write_atomic(f"{self.uri}/{_LATEST}", json.dumps({"step": step}).encode())
        for name in files.names(self.uri):  # the one before, and what killed saves have left
            other = name.startswith(_STEP) and f"{self.uri}/{name}" != self._folder(step)
            if other or name.endswith(".tmp"):
                files.remove_tree(f"{self.uri}/{name}")

    def _load(self, folder: str, module: nn.Module, optimizers: Optimizers) -> None:
        reader = FsspecReader(folder)
        try:
            state = _to_fill(module, optimizers, reader.read_metadata().state_dict_metadata)
            load(
                state,
                storage_reader=reader,
                planner=self._load_planner and self._load_planner(),
                process_group=self._group,
                no_dist=self._group is None,
            )
        except (CheckpointException, *_BROKEN) as error:
            cause = _cause(error)
            raise self._damaged(cause) if isinstance(cause, _BROKEN) else cause from None
        remembered = {name: value for name, value in state.items() if name.startswith(_OPTIMIZER)}
        optimizers.fill(module, {name.removeprefix(_OPTIMIZER): value for name, value in remembered.items()})

    def _damaged(self, error: BaseException) -> ValueError:
        return ValueError(
            f"the checkpoint at {self.uri} is damaged, or of another model ({error}): delete that folder and run again"
        )

    def _folder(self, step: int) -> str:
        return f"{self.uri}/{_STEP}{step:07d}"


class _Writer(FsspecWriter):
    """Begins with an empty folder and ends with a commit: DCP has process 0 `finish`, once all parts are there."""

    def __init__(self, folder: str, commit: Callable[[], None]) -> None:
        super().__init__(folder, sync_files=files.is_local(folder))
        self._commit = commit

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        if is_coordinator:
            files.remove_tree(str(self.path))
        super().set_up_storage_writer(is_coordinator, *args, **kwargs)

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        super().finish(metadata, results)
        self._commit()


def _copy_to_host() -> Callable[[State], State]:
    """Into memory that is kept from save to save, pinned for a GPU."""
    gpu = torch.cuda.is_available()
    options = StagingOptions(
        use_pinned_memory=gpu, use_shared_memory=False, use_async_staging=False, use_non_blocking_copy=gpu
    )
    return cast(Callable[[State], State], DefaultStager(options).stage)  # a future only where it stages asynchronously


def _state(module: nn.Module, optimizers: Optimizers) -> State:
    model = {f"{_MODEL}{name}": value for name, value in module.state_dict().items()}
    return model | {f"{_OPTIMIZER}{label}": value for label, value in optimizers.tensors(module).items()}


def _to_fill(module: nn.Module, optimizers: Optimizers, saved: Mapping[str, Any]) -> State:
    """Tensors that `saved` is loaded into: those that are there and, cut like their parameters, new ones of optimizers.

    Raises KeyError for what no module like this one has saved.
    """
    there, parameters = _state(module, optimizers), dict(module.named_parameters())
    state = {name: value for name, value in there.items() if name.startswith(_MODEL)}
    for name, tensor in saved.items():
        if name.startswith(_OPTIMIZER):
            parameter = parameters[name.removeprefix(_OPTIMIZER).rpartition("|")[0]]
            state[name] = there[name] if name in there else _like(parameter, tensor)
        elif name not in state:
            raise KeyError(name)
    return state


def _like(parameter: Tensor, saved: TensorStorageMetadata) -> Tensor:
    if saved.size == parameter.shape:
        return torch.empty_like(parameter, dtype=saved.properties.dtype, requires_grad=False)
    return torch.empty(saved.size, dtype=saved.properties.dtype)


def _lasts(error: BaseException) -> bool:
    """Whether to wait does not help: a path that is not there or not allowed, a full disk."""
    full = isinstance(error, OSError) and error.errno == errno.ENOSPC
    return full or isinstance(error, FileNotFoundError | NotADirectoryError | PermissionError)


def _cause(error: BaseException) -> BaseException:
    """What went wrong in the first of the processes in which something did."""
    return next(iter(error.failures.values()))[0] if isinstance(error, CheckpointException) else error
