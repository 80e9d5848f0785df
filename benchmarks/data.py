"""How fast data are made and read: `python -m benchmarks.data`. About a minute; no training may run beside it.

Raw Procgen (64 simulators, the step and nothing else) and collect alternate, so that a busy machine slows both; the
figures are medians. collect's aim is 60% of raw Procgen, the loader's is 5 times what training consumes.
"""

from __future__ import annotations

import statistics
import tempfile
import time

import numpy as np

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


def loader() -> float:
    """Frames/s that the one prefetch thread delivers, random clips in random shards."""
    with tempfile.TemporaryDirectory() as root:
        store = VideoStore.open(f"{coinrun.collect(CONFIG, root)}/train")
        clips = ClipLoader(store, batch_size=16, clip_length=CONFIG.data.clip_length, seed=0)
        rates = []
        for _ in range(ROUNDS):
            started = time.perf_counter()
            frames = sum(batch.frames_BTHWC.shape[0] * batch.frames_BTHWC.shape[1] for _, batch in clips.stream(0, 50))
            rates.append(frames / (time.perf_counter() - started))
        return statistics.median(rates)


def main() -> None:
    raw_procgen()  # the first simulator of a process draws its pictures, for seconds
    pairs = [(raw_procgen(), collect()) for _ in range(ROUNDS)]
    print(f"raw Procgen   {statistics.median(raw for raw, _ in pairs):10,.0f} frames/s")
    print(f"collect       {statistics.median(made for _, made in pairs):10,.0f} frames/s")
    print(f"collect/raw   {statistics.median(made / raw for raw, made in pairs):10.0%}")
    print(f"loader        {loader():10,.0f} frames/s")


if __name__ == "__main__":
    main()
