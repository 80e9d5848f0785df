"""Procgen CoinRun as the paper records it (App. F.1): hard mode, a uniform random policy, each training level once."""

from __future__ import annotations

import datetime
import itertools
import os
import struct
import time
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Literal

import numpy as np
import zstandard
from gym_notices import notices  # type: ignore[import-untyped]
from numpy.typing import NDArray

from genie_model.config import Config, DataConfig
from genie_model.data.shards import (
    CHUNK_FRAMES,
    Episode,
    Meta,
    has_index,
    missing_shards,
    read_index,
    write_index,
    write_shard,
)
from genie_model.data.store import VideoStore
from genie_model.progress import NoLog, RunLog, bar, summary

notices.notices.clear()  # gym's advertisement for its successor, printed at import; real warnings still show
from procgen import ProcgenGym3Env as ProcgenGym3Env  # noqa: E402  # for the types of others

Mode = Literal["easy", "hard"]  # Procgen's distribution_mode
Split = Literal["train", "eval"]
SPLITS: tuple[Split, Split] = ("train", "eval")
NUM_ACTIONS = 15
FRAME_SHAPE = (64, 64, 3)  # that agents play on
_SIZES = (64, 128, 256, 512)  # Procgen draws 512 for people to look at: each pixel the mean of some of those
_RESET = -1  # the action that makes Procgen start a new episode
_MAX_WAITING = 4  # blocks of CHUNK_FRAMES x levels_per_shard frames that wait to be compressed

# Procgen's saved state, little-endian: version, the name "coinrun" after its length, 12 options, grid step, range
# of levels (low, high), game type and number, two random generators, ..., the entities.
_LEVEL_RANGE = 4 + (4 + 7) + 13 * 4
_RANDOM_GENERATORS = _LEVEL_RANGE + 4 * 4
_WORDS_TO_ENTITIES = 16
_ENTITY = np.dtype(
    [("x", "<f4"), ("y", "<f4"), ("vx", "<f4"), ("vy", "<f4"), ("radii", "<f4", 2), ("kind", "<i4"), ("rest", "V96")]
)
_AGENT_KIND = 0
_AGENT = ("agent_x", "agent_y", "agent_vx", "agent_vy")


def collect(
    config: Config,
    root_uri: str,
    log: RunLog = NoLog(),  # noqa: B008
    splits: Sequence[Split] = SPLITS,
) -> str:
    """Records these splits of `config.data` and returns the data set's URI, <root_uri>/datasets/coinrun-<digest>.

    The splits are the stores <uri>/train and <uri>/eval. Whole shards are reused and only missing or truncated ones are
    made, to the same bytes whatever was interrupted before. Raises ValueError when the config asks for what Procgen
    cannot do or the data set there has another config, OSError when the disk is full (finished shards are kept).
    """
    height, width, _ = config.frame_shape
    if height != width or height not in _SIZES:
        raise ValueError(
            f"Procgen renders 64 x 64 pixels, and for a larger decoder 128, 256 or 512, not {width} x {height}: set "
            "data.frame_height=64, data.frame_width=64"
        )
    uri = f"{root_uri.rstrip('/')}/datasets/coinrun-{config.digest('data')}"
    log.params({"data_uri": uri})
    for split in splits:
        _collect_split(config, split, uri, log)
    return uri


def of_today(config: Config) -> Config:
    """The config with held-out levels of this day's own (UTC), far from those that versions are registered with."""
    data = config.data
    first = (
        data.eval_first_level + 1_000_000 + datetime.datetime.now(datetime.UTC).date().toordinal() * data.eval_levels
    )
    return config.with_overrides(f"data.eval_first_level={first}")


def collect_shard(config: Config, split: Split, shard: int, uri: str) -> None:
    """Records one shard of the data set at `uri`: the unit of work when many workers share a collection.

    What it writes depends on (config.data, split, shard) alone. `collect` makes what is missing and declares the whole.
    """
    with ThreadPoolExecutor(1) as pool:
        _start_shard(config.data, split, shard, uri, pool, lambda frames: None).result()


def num_shards(data: DataConfig, split: Split) -> int:
    return -(-len(levels(data, split)) // data.levels_per_shard)


def levels(data: DataConfig, split: Split) -> range:
    """The level seeds of a split; the config keeps the two apart."""
    if split == "train":
        return range(data.train_levels)
    return range(data.eval_first_level, data.eval_first_level + data.eval_levels)


def random_actions(data: DataConfig, split: Split, level: int, steps: int) -> NDArray[np.int32]:
    """int32 (steps,): uniform over the 15 actions, each held for data.action_hold steps; a function of the arguments.

    The first one's hold is cut at random, so that not all levels change their action on the same frames.
    """
    generator = np.random.default_rng((data.seed, SPLITS.index(split), level))
    phase = generator.integers(data.action_hold)
    drawn = generator.integers(NUM_ACTIONS, size=steps // data.action_hold + 2, dtype=np.int32)
    return drawn.repeat(data.action_hold)[phase : phase + steps]


def _collect_split(config: Config, split: Split, uri: str, log: RunLog) -> None:
    data, split_uri = config.data, f"{uri}/{split}"
    meta: Meta = {
        "source": "coinrun",
        "split": split,
        "frame_shape": [data.frame_height, data.frame_width, 3],
        "data": data.model_dump(mode="json"),
    }
    declared = has_index(split_uri)
    if declared and read_index(split_uri)[0]["meta"] != meta:
        raise ValueError(f"{split_uri} was collected with another config: delete it, or collect elsewhere")
    missing = missing_shards(split_uri, num_shards(data, split))
    how = "reused"
    if missing:
        frames_per_second = _collect_shards(data, split, missing, uri)
        how = f"collected at {frames_per_second:,.0f} frames/s"
        log.metrics({f"collect_{split}_frames_per_second": frames_per_second})
    if missing or not declared:
        write_index(split_uri, num_shards(data, split), meta)
    store = VideoStore.open(split_uri)
    summary(f"collect {split}", f"{how}: {store.num_frames:,} frames, {len(levels(data, split)):,} levels, {split_uri}")
    log.params({f"data_{split}_digest": store.digest})
    log.metrics({f"data_{split}_frames": store.num_frames, f"data_{split}_episodes": store.num_episodes})


def _collect_shards(data: DataConfig, split: Split, shards: list[int], uri: str) -> float:
    """Records these shards; returns the rate in frames/s. While one is compressed and written the next is simulated."""
    frames = sum(len(_shard_levels(data, split, shard)) for shard in shards) * _steps(data, split)
    started = time.perf_counter()
    writing: deque[Future[None]] = deque()
    with ThreadPoolExecutor(1) as pool, bar(desc=f"collect {split}", unit="frame", total=frames) as progress:
        for shard in shards:
            writing.append(_start_shard(data, split, shard, uri, pool, progress.update))
            if len(writing) > 1:
                writing.popleft().result()
        for future in writing:
            future.result()
    return frames / (time.perf_counter() - started)


def _start_shard(
    data: DataConfig, split: Split, shard: int, uri: str, pool: ThreadPoolExecutor, advance: Callable[[int], object]
) -> Future[None]:
    """Simulates a shard's levels side by side. The one-threaded `pool` compresses meanwhile and writes (the future)."""
    seeds, steps = _shard_levels(data, split, shard), _steps(data, split)
    action_NT = np.stack([random_actions(data, split, seed, steps) for seed in seeds])
    first_NT = np.zeros(action_NT.shape, bool)
    agent_NT4 = np.zeros((*action_NT.shape, len(_AGENT)), np.float32)
    blocks: list[Future[list[list[bytes]]]] = []
    shape = (data.frame_height, data.frame_width, 3)
    env = simulator(len(seeds), large=shape != FRAME_SHAPE)
    try:
        enter_levels(env, seeds)
        for start in range(0, steps, CHUNK_FRAMES):
            stop = min(start + CHUNK_FRAMES, steps)
            block_NTHWC = np.empty((len(seeds), stop - start, *shape), np.uint8)
            for t in range(start, stop):
                # After the step that ends an episode Procgen already shows, and flags, the first frame of the next one.
                _, observation, first_NT[:, t] = env.observe()
                if split == "eval":
                    agent_NT4[:, t] = [agent(state) for state in env.callmethod("get_state")]
                large = [] if shape == FRAME_SHAPE else [_shrunk(info["rgb"], shape[0]) for info in env.get_info()]
                if t + 1 < steps:
                    env.act(action_NT[:, t])  # the simulator's threads step on while this one copies the frames
                block_NTHWC[:, t - start] = large or observation["rgb"]
            if len(blocks) >= _MAX_WAITING:
                blocks[-_MAX_WAITING].result()  # bounds memory where compression is slower than the simulator
            blocks.append(pool.submit(_compress, block_NTHWC, first_NT[:, start:stop]))
            advance(len(seeds) * (stop - start))
    finally:
        env.close()

    def write() -> None:
        """Cuts every level into its episodes. One frame alone shows no motion: it is dropped."""
        episodes: list[Episode] = []
        columns: dict[str, list[NDArray[np.generic]]] = defaultdict(list)
        for n, seed in enumerate(seeds):
            chunks = itertools.chain.from_iterable(block.result()[n] for block in blocks)
            for start, stop in itertools.pairwise([*np.flatnonzero(first_NT[n]).tolist(), steps]):
                offset = start % CHUNK_FRAMES
                own_chunks = list(itertools.islice(chunks, -(-(offset + stop - start) // CHUNK_FRAMES)))
                if stop - start < 2:
                    continue
                episodes.append(Episode(stop - start, CHUNK_FRAMES - offset, own_chunks))
                columns["level_seed"].append(np.array([seed]))
                columns["action"].append(action_NT[n, start:stop])
                if split == "eval":
                    for column, name in enumerate(_AGENT):
                        columns[name].append(agent_NT4[n, start:stop, column])
        truth = {name: np.concatenate(parts) for name, parts in columns.items()}
        write_shard(f"{uri}/{split}", shard, episodes, shape, truth)

    return pool.submit(write)


def _compress(block_NTHWC: NDArray[np.uint8], first_NT: NDArray[np.bool_]) -> list[list[bytes]]:
    """Per level the block's chunks; one ends where an episode does. Each carries its checksum."""
    compressor = zstandard.ZstdCompressor(level=1, write_checksum=True)
    cuts = [[0, *(np.flatnonzero(first[1:]) + 1).tolist(), len(first)] for first in first_NT]
    return [
        [compressor.compress(frames_THWC[a:b]) for a, b in itertools.pairwise(cut)]
        for frames_THWC, cut in zip(block_NTHWC, cuts, strict=True)
    ]


def _shrunk(frame_HWC: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    """What Procgen draws for people to look at, in `size` x `size` pixels: each the mean of as many as fit."""
    side = len(frame_HWC) // size
    total_HWC = np.full((size, size, 3), side**2 // 2, np.uint16)
    for y in range(side):
        for x in range(side):
            total_HWC += frame_HWC[y::side, x::side]
    return (total_HWC // side**2).astype(np.uint8)


def simulator(num: int, mode: Mode = "hard", large: bool = False) -> ProcgenGym3Env:
    """`large`: `info["rgb"]` of each has 512 x 512 pixels, too."""
    return ProcgenGym3Env(
        num=num,
        env_name="coinrun",
        distribution_mode=mode,
        num_threads=min(os.cpu_count() or 1, num),
        rand_seed=0,
        render_mode="rgb_array" if large else None,
    )


def enter_levels(env: ProcgenGym3Env, seeds: Sequence[int]) -> None:
    """Makes simulator i play level seeds[i], again and again.

    Procgen has no call for it, but its saved state holds the range that the next level is drawn from: narrow that to
    one level, and force a reset.
    """
    states = env.callmethod("get_state")
    low_high = [struct.pack("<ii", seed, seed + 1) for seed in seeds]
    patched = [s[:_LEVEL_RANGE] + r + s[_LEVEL_RANGE + len(r) :] for s, r in zip(states, low_high, strict=True)]
    env.callmethod("set_state", patched)
    env.act(np.full(len(seeds), _RESET, np.int32))
    entered = [info["level_seed"] for info in env.get_info()]
    if entered != list(seeds):
        raise RuntimeError(f"Procgen entered levels {entered} instead of {list(seeds)}: its state format has changed")


def agent(state: bytes) -> tuple[float, float, float, float]:
    """The agent's x, y (grid cells, y upwards), vx, vy (cells per step), read from a state that Procgen saved."""
    position = _RANDOM_GENERATORS
    for _ in range(2):  # each: a flag, a length, and that many bytes of text
        position += 8 + int.from_bytes(state[position + 4 : position + 8], "little")
    position += _WORDS_TO_ENTITIES * 4
    count = int.from_bytes(state[position : position + 4], "little")
    entities = np.frombuffer(state, _ENTITY, count, position + 4)
    agent = entities[entities["kind"] == _AGENT_KIND][0]
    return agent["x"], agent["y"], agent["vx"], agent["vy"]


def _shard_levels(data: DataConfig, split: Split, shard: int) -> range:
    return levels(data, split)[shard * data.levels_per_shard : (shard + 1) * data.levels_per_shard]


def _steps(data: DataConfig, split: Split) -> int:
    return data.steps_per_level if split == "train" else data.eval_steps_per_level
