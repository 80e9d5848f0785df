"""How fast Genie trains and plays here, each figure beside the floor of this machine, in one table of one run.

    python -m benchmarks [--only WORD ...] [--json FILE] [--set a.b=c ...]

The floor of a line is its FLOPs, counted by torch and not estimated, over the rate of a bfloat16 matmul of its shape:
4,096 rows by 512 by 512 for training, one frame's rows for play. That rate is measured before and after every line,
since neighbours on a shared machine swing it, and the share is of the mean of the two. Times are medians after warm-up.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.configs import CONFIGS
from genie_model.backend import native
from genie_model.backend.graphs import prepare_play
from genie_model.backend.processes import Native
from genie_model.chance import Chance
from genie_model.checkpoint import save_model
from genie_model.config import Config, StageConfig
from genie_model.data.loader import Batch
from genie_model.genie import Genie
from genie_model.layers import sublayers
from genie_model.speed import TRAINING_ROWS, matmul_rate, seconds_of

_FIRST_FRAME = """
import sys, time
began = time.perf_counter()
import torch
from genie_model.checkpoint import load_model
genie = load_model(sys.argv[1])
state = genie.start(torch.zeros(1, 1, *genie.config.frame_shape, dtype=torch.uint8))
genie.step(state, torch.zeros(1, dtype=torch.long))
print(time.perf_counter() - began)
"""


@dataclass(frozen=True)
class Line:
    """A row of the table; rates are in FLOP/s, times in seconds."""

    config: str
    what: str
    frames_per_second: float
    seconds: float
    repeats: int
    flops: float
    matmul_rate_before: float
    matmul_rate_after: float

    @property
    def floor(self) -> float:
        return 2 * self.flops / (self.matmul_rate_before + self.matmul_rate_after)

    @property
    def share(self) -> float:
        return self.floor / self.seconds

    def row(self) -> str:
        rates = f"{self.matmul_rate_before / 1e9:,.0f}, {self.matmul_rate_after / 1e9:,.0f}"
        return (
            f"| {self.config} | {self.what} | {self.flops / 1e9:,.1f} | {self.seconds * 1e3:,.0f} ms "
            f"| {self.frames_per_second:,.3g} | {rates} | {self.floor * 1e3:,.1f} ms | {self.share:.0%} |"
        )


HEADER = (
    "| config | what | GFLOP | time | frames/s | GFLOP/s of a matmul before, after | floor | share |\n"
    "|---|---|---|---|---|---|---|---|"
)


def median_seconds(run: Callable[[], object], budget: float = 15.0) -> tuple[float, int]:
    """The median and of how many: two runs to warm up, then 3 to 15, as many as the budget of seconds holds."""
    once = min(seconds_of(run) for _ in range(2))
    repeats = min(max(int(budget / once), 3), 15)
    return statistics.median(seconds_of(run) for _ in range(repeats)), repeats


def measure(
    config: str,
    what: str,
    run: Callable[[], object],
    frames: int,
    rows: int,
    prepare: Callable[[], object] = lambda: None,
) -> Line:
    """`prepare` comes between counting FLOPs and timing: a graph's capture would count them twice, its replay never."""
    with FlopCounterMode(display=False) as counter:
        run()
    prepare()
    before = matmul_rate(rows)
    seconds, repeats = median_seconds(run)
    flops = counter.get_total_flops()
    return Line(config, what, frames / seconds, seconds, repeats, flops, before, matmul_rate(rows))


def training_step(
    module: torch.nn.Module, config: Config, stage: StageConfig, codes_BTNC: np.ndarray | None = None
) -> Callable[[], None]:
    shape = (stage.batch_size, config.data.clip_length, *config.frame_shape)
    batch = Batch(np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8), codes_BTNC)
    backend, steps = Native(config.parallel), itertools.count()
    optimizers = backend.prepare(module, stage)

    def run() -> None:
        inputs, chance = backend.inputs(batch, Chance.of_step(0, next(steps), stage.batch_size))
        backend.gradients(module, inputs, chance, stage.precision)
        backend.clip(module, stage.optimizer.clip_norm)
        optimizers.step()

    return run


def lines(name: str, config: Config) -> Iterator[tuple[str, Callable[[], Line]]]:
    """What is measured of a config, each line to be called in turn."""
    clip = config.data.clip_length

    @functools.cache
    def model() -> Genie:
        torch.manual_seed(0)
        return Genie(config)

    def train(what: str, stage: StageConfig, tokenizer_alone: bool, cached_tokens: bool = False) -> Line:
        genie = model()
        module = genie.tokenizer if tokenizer_alone else genie
        genie.tokenizer.requires_grad_(tokenizer_alone)
        codes_BTNC = None
        if cached_tokens:
            shape = (stage.batch_size, clip, genie.tokenizer.num_patches, config.tokenizer.codes_per_patch)
            codes_BTNC = np.random.default_rng(0).integers(config.tokenizer.codebook.num_codes, size=shape)
        plain = config.with_overrides("parallel.compile=false")
        step = training_step(module, plain, stage, codes_BTNC)

        def prepare() -> None:
            if config.parallel.compile:  # not before: what runs while FLOPs are counted is never compiled
                for sublayer in sublayers(module):
                    sublayer.compile()

        return measure(name, what, step, stage.batch_size * clip, TRAINING_ROWS, prepare)

    def tokenize(what: str, stage: StageConfig) -> Line:
        tokenizer = model().tokenizer.to(native.device()).eval()
        shape = (stage.batch_size, clip, *config.frame_shape)
        batch = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)

        def run() -> None:
            with torch.inference_mode(), native.autocast(stage.precision):
                tokenizer.encode(native.to_unit_frames(batch))

        return measure(name, what, run, stage.batch_size * clip, TRAINING_ROWS)

    def play(what: str, steps: int) -> Line:
        torch.manual_seed(0)
        genie = Genie(config)  # of its own: FLOPs are counted before it is prepared
        sampling = config.sampling.model_copy(update={"maskgit_steps": steps})
        genie.config = config.model_copy(update={"sampling": sampling})
        genie.to(native.device()).eval()
        prompt = torch.randint(0, 256, (1, clip, *config.frame_shape), dtype=torch.uint8)
        state, action = genie.start(prompt), torch.zeros(1, dtype=torch.long)
        genie.step(state, action)  # each of those that follow begins by making this one past
        rows, prepare = genie.tokenizer.num_patches, functools.partial(prepare_play, genie)
        return measure(name, what, lambda: genie.step(state, action), 1, rows, prepare)

    tokenizer, world = config.train_tokenizer, config.train_world
    what = f"tokenizer training step, {tokenizer.batch_size} x {clip} frames"
    yield what, functools.partial(train, what, tokenizer, tokenizer_alone=True)
    what = f"LAM + dynamics training step, {world.batch_size} x {clip} frames"
    yield what, functools.partial(train, what, world, tokenizer_alone=False)
    what = f"LAM + dynamics training step from cached tokens, {world.batch_size} x {clip} frames"
    yield what, functools.partial(train, what, world, tokenizer_alone=False, cached_tokens=True)
    what = f"tokens computed once, {world.batch_size} x {clip} frames"
    yield what, functools.partial(tokenize, what, world)
    for steps in sorted({config.sampling.maskgit_steps, 8, 25}):
        what = f"played frame, {steps} MaskGIT step{'s' if steps > 1 else ''}, {clip - 1} frames of history"
        yield what, functools.partial(play, what, steps)


def first_frame_seconds(config: Config) -> float:
    """From the start of Python's imports to the first played frame, files warm: the median of three processes."""
    with tempfile.TemporaryDirectory() as folder:
        save_model(folder, Genie(config))
        command = [sys.executable, "-c", _FIRST_FRAME, folder]
        return statistics.median(float(subprocess.check_output(command)) for _ in range(3))


def machine() -> dict[str, object]:
    cpuinfo = Path("/proc/cpuinfo")
    rows = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    cpu = next((row.partition(": ")[2] for row in rows if row.startswith("model name")), platform.processor())
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else cpu,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def _named(text: str, words: list[str]) -> bool:
    return all(word in text for word in words)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="*", default=[], help="words: lines whose config or name holds all of them")
    parser.add_argument("--json", type=Path, default=Path("build/benchmarks.json"))
    parser.add_argument(
        "--set", dest="overrides", nargs="*", action="extend", default=[], help="config fields, for every config"
    )
    arguments = parser.parse_args()
    try:
        configs = {name: make().with_overrides(*arguments.overrides) for name, make in CONFIGS.items()}
    except ValueError as error:
        parser.error(str(error))
    asked = {
        name: [(what, run) for what, run in lines(name, config) if _named(f"{name} {what}", arguments.only)]
        for name, config in configs.items()
    }
    started = [name for name in configs if _named(f"{name} first", arguments.only)]
    if not started and not any(asked.values()):
        parser.error(f"nothing is called {' '.join(arguments.only)}")
    native.keep_freed_memory()
    print(", ".join(f"{name} {value}" for name, value in machine().items()))
    print(HEADER)
    measured: list[Line] = []
    for _, run in itertools.chain.from_iterable(asked.values()):
        measured.append(run())
        print(measured[-1].row(), flush=True)
    first = {}
    for name in started:
        first[name] = first_frame_seconds(configs[name])
        print(f"{name}: {first[name]:.1f} s from starting to import torch to the first played frame", flush=True)
    rows = [asdict(line) | {"floor": line.floor, "share": line.share} for line in measured]
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_text(json.dumps({"machine": machine(), "lines": rows, "first_frame_seconds": first}, indent=2))
    print(f"written to {arguments.json}")


if __name__ == "__main__":
    main()
