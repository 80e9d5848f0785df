"""How fast the `demo` model trains and plays here, beside this machine's measured matmul rate.

    python -m benchmarks.model [--preset NAME] [--set a.b=c ...]

FLOPs are counted by torch, not estimated. The rate of a 4,096 x 512 x 512 bfloat16 matmul is measured before and after
every line, since neighbours on a shared machine swing it; the share is of the mean of the two. Medians after warm-up.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from genie_model.backend import native
from genie_model.config import Config, StageConfig
from genie_model.genie import Genie
from genie_model.optim import Optimizers
from genie_model.presets import get_preset


def median_seconds(run: Callable[[], object], warmup: int, repeats: int) -> float:
    for _ in range(warmup):
        run()
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        run()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def matmul_rate() -> float:
    """FLOP/s of a bfloat16 matmul of training's shape."""
    a, b = torch.randn(4096, 512).bfloat16(), torch.randn(512, 512).bfloat16()
    return 2 * 4096 * 512 * 512 / median_seconds(lambda: a @ b, warmup=10, repeats=50)


def report(name: str, run: Callable[[], object], frames: int) -> None:
    with FlopCounterMode(display=False) as counter:
        run()
    before = matmul_rate()
    seconds = median_seconds(run, warmup=3, repeats=9)
    rate = (before + matmul_rate()) / 2
    flops = counter.get_total_flops()
    floor = flops / rate
    print(
        f"| {name} | {flops / 1e9:.2f} GFLOP | {1e3 * seconds:.0f} ms | {frames / seconds:,.1f} frames/s "
        f"| {rate / 1e9:,.0f} GFLOP/s | {1e3 * floor:.1f} ms | {floor / seconds:.0%} |"
    )


def training_step(module: torch.nn.Module, config: Config, stage: StageConfig) -> Callable[[], None]:
    shape = (stage.batch_size, config.data.clip_length, *config.frame_shape)
    batch = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    optimizers = Optimizers(module, stage.optimizer)
    module.train()

    def run() -> None:
        with native.autocast(stage.precision):
            loss, _ = module(native.to_unit_frames(batch))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), stage.optimizer.clip_norm)
        optimizers.step()

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="demo")
    parser.add_argument("--set", dest="overrides", nargs="*", default=[])
    arguments = parser.parse_args()
    config = get_preset(arguments.preset).with_overrides(*arguments.overrides)
    native.keep_freed_memory()
    torch.manual_seed(0)
    clip = config.data.clip_length
    print(f"{config.name}, torch {torch.__version__}, {torch.get_num_threads()} threads")
    print("| what | work | time | rate | bf16 matmul here | floor | share |\n|---|---|---|---|---|---|---|")
    genie = Genie(config)
    stage = config.train_tokenizer
    report("tokenizer training step", training_step(genie.tokenizer, config, stage), stage.batch_size * clip)
    genie.tokenizer.requires_grad_(False)
    stage = config.train_world
    report("LAM + dynamics training step", training_step(genie, config, stage), stage.batch_size * clip)
    genie.eval()
    state = genie.start(torch.randint(0, 256, (1, clip, *config.frame_shape), dtype=torch.uint8))
    action = torch.zeros(1, dtype=torch.long)
    steps = config.sampling.maskgit_steps
    report(f"one played frame, {steps} MaskGIT steps (float32)", lambda: genie.step(state, action), 1)


if __name__ == "__main__":
    main()
