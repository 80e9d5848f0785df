"""Play on CUDA without its launches: a frame's thousands of small kernels, captured once, start as one graph."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from genie_model.backend.compiled import CompiledFrame
from genie_model.genie import Genie
from genie_model.layers import TemporalCache, Time

Run = Callable[[Sequence[TemporalCache], Sequence[Tensor], Any], tuple[Tensor, ...]]
_KEPT = 64  # graphs; of more, those not used for longest are forgotten


def prepare_play(genie: Genie) -> None:
    """Of a model that lies where it is to be played, as its weights and its config's sampling now are.

    Raises ValueError where `sampling.compile` cannot be.
    """
    sampling = genie.config.sampling
    if genie.device.type == "cuda":
        genie.launch = GraphLauncher(genie)
        return
    patches = genie.tokenizer.num_patches
    tokens = patches + (genie.config.dynamics.action == "token")
    for part, rows in ((genie.dynamics.transformer, tokens), (genie.tokenizer.decoder, patches)):
        part.__dict__.pop("through", None)  # it may have been prepared for another sampling
        if sampling.compile:
            part.through = CompiledFrame(part, rows, sampling.precision)  # type: ignore[method-assign]


class GraphLauncher:
    """Genie's `launch` on CUDA: a graph for every function, number of worlds and sampling, captured when first asked.

    A graph works on buffers of its own. The pasts are copied in and out: 0.2 GB a frame at the case study's size, a
    tenth of a millisecond, and for it a state may be forked, joined and dropped as on any device. It holds the
    transformers' weights in the precision of play, cast once.
    """

    def __init__(self, genie: Genie) -> None:
        self._genie, self._half = genie, list[tuple[Tensor, Tensor]]()
        self._look = torch.compile(genie.dynamics.transformer.through, dynamic=False)
        self._graphs: OrderedDict[Hashable, _Graph] = OrderedDict()
        self._pool = torch.cuda.graph_pool_handle()  # one replay at a time: they can share what they work in
        self._lock = threading.Lock()

    def __call__(
        self, run: Run, caches: Sequence[TemporalCache], tensors: Sequence[Tensor], constant: Hashable
    ) -> tuple[Tensor, ...]:
        shapes = tuple((x.shape, x.dtype) for x in _flat(caches, tensors))
        key = (run.__name__, constant, shapes)
        with self._lock:
            if key not in self._graphs:
                with self._dressed():
                    self._graphs[key] = _Graph(run, caches, tensors, constant, self._pool)
                if len(self._graphs) > _KEPT:
                    self._graphs.popitem(last=False)
            self._graphs.move_to_end(key)
            return self._graphs[key].replay(caches, tensors)

    @contextmanager
    def _dressed(self) -> Iterator[None]:
        """The model as it is captured; whoever else looks at it finds the old one again."""
        sampling, transformer = self._genie.config.sampling, self._genie.dynamics.transformer
        whole = [(weight, weight.data) for weight, _ in self._half_weights()]
        through = transformer.through

        def look(x_BTND: Tensor, cache: TemporalCache | None, commit: bool, sublayers: int) -> Tensor:
            x_BTND = (through if commit else self._look)(x_BTND, cache, commit, sublayers)
            return x_BTND

        try:
            if sampling.precision == "bf16":
                for weight, half in self._half:
                    weight.data = half
            if sampling.compile:
                transformer.through = look  # type: ignore[method-assign]
            yield
        finally:
            transformer.__dict__.pop("through", None)
            for weight, data in whole:
                weight.data = data

    def _half_weights(self) -> list[tuple[Tensor, Tensor]]:
        if not self._half:
            for part in (self._genie.dynamics.transformer, self._genie.tokenizer.decoder):
                linear = [module for module in part.modules() if isinstance(module, nn.Linear)]
                self._half += [(layer.weight, layer.weight.detach().bfloat16()) for layer in linear]
        return self._half


class _Graph:
    @torch.inference_mode(False)
    @torch.no_grad()
    def __init__(
        self, run: Run, caches: Sequence[TemporalCache], tensors: Sequence[Tensor], constant: Hashable, pool: Any
    ) -> None:
        self._tensors = [x.clone() for x in tensors]
        self._caches = [_copy(cache) for cache in caches]
        stream: torch.cuda.Stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            run([_copy(cache) for cache in caches], self._tensors, constant)
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        self._inputs = _flat(self._caches, self._tensors)  # before the run moves the pasts on
        with torch.cuda.graph(self._graph, pool=pool, capture_error_mode="thread_local"):
            self._outputs = run(self._caches, self._tensors, constant)
        self._commits = [
            captured.positions[0] - cache.positions[0] for captured, cache in zip(self._caches, caches, strict=True)
        ]

    @torch.no_grad()
    def replay(self, caches: Sequence[TemporalCache], tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        torch._foreach_copy_(self._inputs, _flat(caches, tensors))
        self._graph.replay()
        for captured, cache, frames in zip(self._caches, caches, self._commits, strict=True):
            torch._foreach_copy_(_rings(cache), _rings(captured))
            if frames:
                cache.positions, cache.next = [position + frames for position in cache.positions], None
        return tuple(x.clone() for x in self._outputs)


def _rings(cache: TemporalCache) -> list[Tensor]:
    return [ring for rings in cache.rings.values() for ring in rings]


def _flat(caches: Sequence[TemporalCache], tensors: Sequence[Tensor]) -> list[Tensor]:
    """Every tensor that a run reads: rings, what is known of the next frames' time, and the rest."""
    flat = list(tensors)
    for cache in caches:
        assert cache.next is not None
        flat += [*_rings(cache), *(x for x in cache.next if isinstance(x, Tensor))]
    return flat


def _copy(cache: TemporalCache) -> TemporalCache:
    copy, time = cache.fork(), cache.next
    assert time is not None
    copy.next = Time(
        time.cos_BT.clone(),
        time.sin_BT.clone(),
        time.place_BT.clone(),
        None if time.bias_BTS is None else time.bias_BTS.clone(),
        time.window,
    )
    return copy
