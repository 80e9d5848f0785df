"""The device seam. The trainer and the models know a `Backend`, never which: native (CPU, CUDA) or xla (TPU)."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Protocol

from torch import Tensor, nn

from genie_model.config import ParallelConfig, StageConfig

if TYPE_CHECKING:
    from genie_model.chance import Chance
    from genie_model.data.loader import Batch
    from genie_model.optim import Optimizers
    from genie_model.training_state import TrainingState


class Backend(Protocol):
    """How one process trains a module together with the others, if there are any. All call everything alike."""

    @property
    def share(self) -> tuple[int, int]:
        """(i, n): this process loads the i-th of n equal parts of every batch."""

    @property
    def first(self) -> bool:
        """Whether this process speaks and writes for all."""

    def prepare(self, module: nn.Module, stage: StageConfig) -> Optimizers:
        """Puts the module where it trains, cut as the config says, in training mode. ValueError where it cannot be."""

    def inputs(self, batch: Batch, chance: Chance) -> tuple[list[Tensor], Chance]:
        """What a module in training takes: of this process's part of the batch, and of the whole batch's chance."""

    def gradients(
        self, module: nn.Module, inputs: list[Tensor], chance: Chance, precision: str
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and logs of a prepared module for what `inputs` gave; the gradients are then in its parameters.

        Under "bf16" matmuls are bfloat16; norms, softmax and losses keep float32 accumulation either way.
        """

    def state(self, uri: str) -> TrainingState:
        """The checkpoints there, of what `prepare` gave."""

    def whole(self, tensor: Tensor) -> Tensor:
        """All of a prepared module's tensor, on the host."""

    def clip(self, module: nn.Module, max_norm: float) -> Tensor:
        """Scales the gradients down to that norm of them all; returns the norm they had."""

    def end_step(self) -> None:
        """What was asked for in a step is done, or under way."""

    def numbers(self, tensors: Mapping[str, Tensor]) -> dict[str, float]:
        """Of scalars that are means over a process's clips, those over all clips."""

    def device_name(self) -> str:
        """Of one device, as its vendor calls it; "CPU"."""

    def num_devices(self) -> int:
        """That train together, of all processes."""

    def compile_count(self) -> int:
        """Programs compiled so far."""

    def peak_memory_mb(self) -> float:
        """Of one device."""


def training(parallel: ParallelConfig) -> AbstractContextManager[Backend]:
    """The backend that the config names, for as long as the context. Raises ValueError for devices it has not."""
    if parallel.backend == "xla":
        if importlib.util.find_spec("torch_xla") is None:
            raise ValueError("parallel.backend=xla needs torch-xla: pip install '.[tpu]'")
        from genie_model.backend.xla import XLA

        return XLA(parallel)
    from genie_model.backend.processes import Native

    return Native(parallel)
