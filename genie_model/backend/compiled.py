"""Play on a CPU with `sampling.compile`: a frame's way through a transformer as one program, compiled ahead of time.

Eager, a small model spends more time between its matmuls than in them. torch.compile takes out half as much as this:
it checks its guards at every step, and traces again in every process. Programs know no weights: what was compiled for
one model serves every other of its shape, on this machine from then on.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from genie_model import files
from genie_model.config import TransformerConfig
from genie_model.layers import STTransformer, TemporalCache, Time
from genie_model.progress import bar
from genie_model.source import code_digest


class CompiledFrame:
    """`STTransformer.through`, in which a single frame that follows a past runs compiled, one world at a time.

    So there is one shape, whoever plays beside whom and however old the worlds are: nothing is compiled while players
    wait, and a world's bits hang on itself alone. A batch would save little: the rows of one frame fill a CPU.
    """

    def __init__(self, transformer: STTransformer, patches: int, precision: str) -> None:
        """Takes the weights as they are now. Raises ValueError where it cannot be compiled, saying why."""
        self._transformer: Any = weakref.proxy(transformer)  # whose attribute this is: it is to leave memory at once
        shape = {
            "config": transformer.config.model_dump(mode="json"),
            "window": transformer.window,
            "attention": transformer.attention,
            "patches": patches,
            "precision": precision,
        }
        example = _example(transformer, patches, precision)
        self._empty = {layer: (torch.zeros_like(k), torch.zeros_like(v)) for layer, (k, v) in example.rings.items()}
        look = _Look(transformer, list(example.rings), precision)
        program = _program(shape)
        weights = dict(look.named_parameters()) | dict(look.named_buffers())
        # The program reads these in place, so they are kept.
        self._weights = {name: weights[name].detach() for name in program.get_constant_fqns()}
        program.load_constants(self._weights, False, True, True)  # all of them, which the caller keeps
        self._run = program.boxed_run

    def __call__(self, x_BTND: Tensor, cache: TemporalCache | None, commit: bool, sublayers: int) -> Tensor:
        B, T = x_BTND.shape[:2]
        if cache is None or T > 1:
            return STTransformer.through(self._transformer, x_BTND, cache, commit, sublayers)
        self._transformer.time(x_BTND.device, B, T, cache)
        if not cache.rings:
            cache.rings = {
                layer: (k.repeat_interleave(B, 0), v.repeat_interleave(B, 0)) for layer, (k, v) in self._empty.items()
            }
        # The stream between sublayers is float32: norms of bfloat16 are compiled without vector instructions.
        frames = enumerate(x_BTND.float().contiguous())
        y_BTND = torch.cat([self._run([x_1ND[None], *_past(cache, world)])[0] for world, x_1ND in frames])
        if commit:  # the look has written the frame's keys and values in their places
            cache.positions, cache.next = [position + 1 for position in cache.positions], None
        return y_BTND


class _Look(nn.Module):
    """What is compiled: a function of tensors alone, which writes into the rings."""

    def __init__(self, transformer: STTransformer, layers: Sequence[int], precision: str) -> None:
        super().__init__()
        self.layers, self.transformer, self.in_bf16 = layers, transformer, precision == "bf16"
        if self.in_bf16:  # else they are cast at every look
            self.transformer = copy.deepcopy(transformer)
            for linear in (module for module in self.transformer.modules() if isinstance(module, nn.Linear)):
                linear.bfloat16()

    def forward(self, x_11ND: Tensor, *past: Tensor) -> Tensor:
        (cos, sin, place, bias), rings = past[:4], past[4:]
        cache = TemporalCache([0])
        cache.next = Time(cos, sin, place, bias, self.transformer.window)
        cache.rings = dict(zip(self.layers, zip(rings[::2], rings[1::2], strict=True), strict=True))
        with torch.autocast("cpu", torch.bfloat16, enabled=self.in_bf16):
            return self.transformer.through(x_11ND, cache, False, len(self.transformer.sublayers))


def _past(cache: TemporalCache, world: int) -> list[Tensor]:
    """What a look reads besides its frame: one world's time, always with a bias, and its rings, in place."""
    time, own = cache.next, slice(world, world + 1)
    assert time is not None
    bias_BTS = time.cos_BT.new_zeros(1, 1, time.window) if time.bias_BTS is None else time.bias_BTS
    rings = (ring for both in cache.rings.values() for ring in both)
    known = (time.cos_BT, time.sin_BT, time.place_BT, bias_BTS, *rings)
    return [x if len(x) == 1 else x[own] for x in known]


def _example(transformer: STTransformer, patches: int, precision: str) -> TemporalCache:
    """The past of one world, a frame long, before the next."""
    x_11ND, cache = torch.zeros(1, 1, patches, transformer.config.d_model), TemporalCache()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        transformer.remember(x_11ND, cache)
    transformer.time(x_11ND.device, 1, 1, cache)
    return cache


def _program(shape: dict[str, Any]) -> Any:
    """The one for a transformer of that shape; compiled where this machine has none, or none that loads."""
    path = files.cache_dir() / "compiled" / f"{_name(shape)}.pt2"
    if path.exists():
        try:
            return _loaded(path)
        except RuntimeError:  # cut off by a crash, or made for another C library
            path.unlink(missing_ok=True)
    _compile(shape, path)
    return _loaded(path)


def _loaded(path: Path) -> Any:
    """What torch's aoti_load_package wraps: that imports the compiler (3 s), and parses its signature at every call."""
    return torch._C._aoti.AOTIModelPackageLoader(str(path), "model", False, 1, -1)


def _name(shape: dict[str, Any]) -> str:
    """Of all that decides the program: its code, its shapes, and who compiles it for which CPU."""
    code = code_digest(["layers.py", "backend/compiled.py"])
    decides = json.dumps([code, shape, torch.__version__, dict(torch.cpu.get_capabilities())], sort_keys=True)
    return hashlib.sha256(decides.encode()).hexdigest()[:16]


def _compile(shape: dict[str, Any], path: Path) -> None:
    """In a process of its own: what traces a model switches oneDNN off for all threads, and with it the bits of worlds
    that are played meanwhile."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with (
        bar(desc="compiled for play", unit="transformer", total=1) as compiled,
        tempfile.TemporaryDirectory(dir=path.parent) as folder,
    ):
        made = Path(folder, "look.pt2")
        command = [sys.executable, "-m", "genie_model.backend.compiled", json.dumps(shape), str(made)]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode or not made.exists():
            why = (done.stderr.strip().splitlines() or [f"its process ended with {done.returncode}"])[-1]
            raise ValueError(f"sampling.compile on a CPU: {why}")
        os.replace(made, path)
        compiled.update()


def _main(shape_json: str, path: str) -> None:
    """Compiles a transformer of that shape: weights are none of a program's."""
    from torch._inductor import aoti_compile_and_package
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        raise SystemExit("a C++ compiler is needed: install g++, or set it to false") from None
    torch.set_num_threads(os.cpu_count() or 1)  # what is compiled is for as many, or fewer
    shape = json.loads(shape_json)
    config, patches, precision = TransformerConfig.model_validate(shape["config"]), shape["patches"], shape["precision"]
    transformer = STTransformer(config, shape["window"], shape["attention"]).eval()
    past, x_11ND = _example(transformer, patches, precision), torch.zeros(1, 1, patches, config.d_model)
    options = {"aot_inductor.package_constants_in_so": False, "cpp.dynamic_threads": True}
    with torch.no_grad():
        look = _Look(transformer, list(past.rings), precision).eval()
        program = torch.export.export(look, (x_11ND, *_past(past, 0)))
        aoti_compile_and_package(program, package_path=path, inductor_configs=options)


if __name__ == "__main__":
    _main(*sys.argv[1:])
