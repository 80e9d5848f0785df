"""Training on CUDA without its launches: a step's forward and backward pass, captured once, start as one graph."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn

from genie_model.backend import native
from genie_model.chance import Chance

_LAUNCHED = 3  # steps before the capture: by then libraries have chosen their kernels, and what compiles has compiled


class CapturedGradients:
    """A step's loss and logs, and its gradients, of one module: of the first steps launched kernel by kernel.

    The graph reads its inputs from buffers of its own, and leaves the gradients in memory of its own. All that a step
    depends on is in its inputs, in parameters and in buffers, whose places stay: so a replay is the step itself.
    """

    def __init__(self, module: nn.Module, precision: str) -> None:
        self._module, self._precision = module, precision
        self._steps = itertools.count()
        self._stream: torch.cuda.Stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        self._graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, inputs: list[Tensor], chance: Chance) -> tuple[Tensor, dict[str, Tensor]]:
        """Inputs have the shapes of the first step's."""
        if next(self._steps) < _LAUNCHED:
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                loss, logs = native.gradients(self._module, inputs, chance, self._precision)
            torch.cuda.current_stream().wait_stream(self._stream)
            return loss, logs
        if self._graph is None:
            self._capture(inputs, chance)
        assert self._graph is not None
        torch._foreach_copy_(self._inputs, [*inputs, *chance])
        for parameter, gradient in self._gradients:  # the optimizer forgot it
            parameter.grad = gradient
        self._graph.replay()
        return self._loss.clone(), {name: value.clone() for name, value in self._logs.items()}

    def _capture(self, inputs: list[Tensor], chance: Chance) -> None:
        """Records a step, which takes no effect: its kernels do not run."""
        self._inputs = [x.clone() for x in (*inputs, *chance)]
        count = len(inputs)
        self._module.zero_grad(set_to_none=True)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, stream=self._stream, capture_error_mode="thread_local"):
            own, chance = self._inputs[:count], Chance(*self._inputs[count:])
            self._loss, self._logs = native.gradients(self._module, own, chance, self._precision)
        self._gradients = [(p, p.grad) for p in self._module.parameters() if p.grad is not None]
