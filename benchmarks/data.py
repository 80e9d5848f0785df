"""How fast data are made and read: `python -m benchmarks.data [--only collect | loader | rate | index] [--json FILE]`.

About five minutes; no training may run beside it. `rate` is what the paper's largest training asks (data_rate.py),
`index` what millions of clips cost before a frame of them is read (data_index.py).

Raw Procgen (64 simulators, the step and nothing else) and collect alternate, so that a busy machine slows both; the
figures are medians. collect's aim is 60% of raw Procgen, the loader's is 5 times what training here consumes.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import data_index, data_rate
from genie_model.data import coinrun
from genie_model.data.loader import ClipLoader
from genie_model.data.store import VideoStore
from genie_model.presets import get_preset

ROUNDS = 5
LEVELS, STEPS = 256, 128
CONFIG = get_preset("demo").with_overrides(
    f"data.train_levels={LEVELS}", f"data.steps_per_level={STEPS}", "data.eval_levels=1", "data.eval_steps_per_level=2"
)


def raw_procgen() -> float:
    """Steps/s of as many simulators and threads as a shard has, on the same levels with the same actions."""
    num = CONFIG.data.levels_per_shard
    frames, seconds = 0, 0.0
    for shard in range(LEVELS // num):
        seeds = range(shard * num, (shard + 1) * num)
        actions = np.stack([coinrun.random_actions(CONFIG.data, "train", seed, STEPS) for seed in seeds], axis=1)
        env = coinrun.simulator(num)
        coinrun.enter_levels(env, seeds)
        started = time.perf_counter()
        for action in actions:
            env.observe()
            env.act(action)
        env.observe()
        seconds += time.perf_counter() - started
        frames += actions.size
        env.close()
    return frames / seconds


def collect() -> float:
    """Frames/s of the whole job: simulate, compress, hash, write."""
    with tempfile.TemporaryDirectory() as root:
        started = time.perf_counter()
        coinrun.collect(CONFIG, root)
        return LEVELS * STEPS / (time.perf_counter() - started)


def loader(readers: int) -> float:
    """Frames/s that the reader threads deliver, random clips in random shards of this machine's disk."""
    with tempfile.TemporaryDirectory() as root:
        store = VideoStore.open(f"{coinrun.collect(CONFIG, root)}/train")
        clips = ClipLoader(store, batch_size=16, clip_length=CONFIG.data.clip_length, seed=0)
        rates = []
        for _ in range(ROUNDS):
            started = time.perf_counter()
            batches = clips.stream(0, 50, readers=readers)
            frames = sum(batch.frames_BTHWC.shape[0] * batch.frames_BTHWC.shape[1] for _, batch in batches)
            rates.append(frames / (time.perf_counter() - started))
        return statistics.median(rates)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("collect", "loader", "rate", "index"))
    parser.add_argument("--json", type=Path, help="where to write the same figures")
    args = parser.parse_args()
    found: dict[str, Any] = {"machine": platform.processor() or platform.machine(), "cores": os.cpu_count()}
    if args.only in (None, "collect"):
        raw_procgen()  # the first simulator of a process draws its pictures, for seconds
        pairs = [(raw_procgen(), collect()) for _ in range(ROUNDS)]
        found["raw_procgen"] = statistics.median(raw for raw, _ in pairs)
        found["collect"] = statistics.median(made for _, made in pairs)
        found["collect_over_raw"] = statistics.median(made / raw for raw, made in pairs)
        print(f"raw Procgen       {found['raw_procgen']:10,.0f} frames/s")
        print(f"collect           {found['collect']:10,.0f} frames/s")
        print(f"collect/raw       {found['collect_over_raw']:10.0%}")
    if args.only in (None, "loader"):
        for readers in (1, 2, 8):
            found[f"loader_{readers}"] = loader(readers)
            print(f"loader, {readers} readers {found[f'loader_{readers}']:10,.0f} frames/s")
    if args.only in (None, "rate"):
        needs, rates = data_rate.needs(), list(data_rate.rates())
        print(data_rate.table(rates, needs))
        found |= {"needs": needs, "rates": [asdict(rate) for rate in rates]}
    if args.only in (None, "index"):
        costs = list(data_index.costs())
        print(data_index.table(costs))
        found["index"] = [asdict(cost) for cost in costs]
    if args.json:
        args.json.write_text(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
