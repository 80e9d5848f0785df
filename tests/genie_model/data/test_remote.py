"""Training from a remote store: each rank reads what its rows need, whoever answers first, and nothing is lost."""

from __future__ import annotations

import itertools
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.throttled import ThrottledFileSystem
from genie_model import cache, files
from genie_model.data.loader import ClipLoader
from genie_model.data.shards import CHUNK_FRAMES, compress, write_index, write_shard
from genie_model.data.store import VideoStore

SHARDS, EPISODES, FRAMES, SHAPE = 4, 2, 70, (4, 4, 3)
CLIP = 8


def write(uri: str) -> str:
    """No two frames are alike: the first four bytes number them through."""
    number = 0
    for shard in range(SHARDS):
        episodes = []
        for _ in range(EPISODES):
            frames = np.zeros((FRAMES, *SHAPE), np.uint8)
            frames.reshape(FRAMES, -1)[:, :4] = np.arange(number, number + FRAMES, dtype="<u4")[:, None].view(np.uint8)
            number += FRAMES
            episodes.append(compress(frames))
        write_shard(uri, shard, episodes, SHAPE)
    write_index(uri, SHARDS, {"source": "test", "split": "train", "frame_shape": list(SHAPE), "data": {}})
    return uri


def first_frames(frames_BTHWC: np.ndarray) -> list[int]:
    """The numbers of the clips' first frames."""
    return frames_BTHWC[:, 0].reshape(len(frames_BTHWC), -1)[:, :4].copy().view("<u4")[:, 0].tolist()


@pytest.fixture
def store(tmp_path: Path) -> VideoStore:
    return VideoStore.open(write(str(tmp_path / "local")))


@pytest.fixture
def uri(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("GENIE_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(cache, "_WAITS", (0.001, 0.001))
    ThrottledFileSystem.reads.clear()
    yield write(f"throttled://{tmp_path.name}")
    files.remove_tree(f"throttled://{tmp_path.name}")


@pytest.fixture
def by_ranges(uri: str, monkeypatch: pytest.MonkeyPatch) -> VideoStore:
    """A data set one byte larger than the cache."""
    size = int(VideoStore.open(uri).columns.shard_bytes.sum())
    monkeypatch.setenv("GENIE_CACHE_BYTES", str(size - 1))
    store = VideoStore.open(uri)
    ThrottledFileSystem.reads.clear()
    return store


def test_a_data_set_larger_than_the_cache_is_read_by_ranges(by_ranges: VideoStore, store: VideoStore) -> None:
    for episode, start, length in [(0, 0, FRAMES), (3, CHUNK_FRAMES - 1, 2), (7, 5, 1)]:
        assert np.array_equal(by_ranges.frames(episode, start, length), store.frames(episode, start, length))
    assert [first is not None for _, first, _ in ThrottledFileSystem.reads] == [True] * 3
    assert not list(files.cache_dir().glob("*.tar"))


def test_one_that_fits_is_downloaded_once(uri: str) -> None:
    for _ in range(2):  # two runs
        list(ClipLoader(VideoStore.open(uri), 8, CLIP, seed=0).stream(0, 30))
    shards = [path.rpartition("/")[2] for path, _, _ in ThrottledFileSystem.reads if path.endswith(".tar")]
    assert sorted(shards) == [f"shard-{number:05d}.tar" for number in range(SHARDS)]


def test_a_rank_reads_only_what_its_rows_need(by_ranges: VideoStore, store: VideoStore) -> None:
    loader = ClipLoader(by_ranges, 16, CLIP, seed=0, rank=3, world_size=8)
    firsts = [first for _, batch in loader.stream(0, 5) for first in first_frames(batch.frames_BTHWC)]
    expected = Counter[tuple[str, int, int]]()
    for first in firsts:
        episode, start = divmod(first, FRAMES)
        shard, _ = store.file_of(episode)
        chunks = range(start // CHUNK_FRAMES, (start + CLIP - 1) // CHUNK_FRAMES + 1)
        sizes = store.columns.chunks_of(episode).tolist()
        begin = int(store.columns.offset[episode]) + sum(sizes[: chunks.start])
        size = sum(sizes[chunk] for chunk in chunks)
        expected[f"shard-{shard:05d}.tar", begin, size] += 1
    assert len(firsts) == 10
    assert Counter((path.rpartition("/")[2], first, n) for path, first, n in ThrottledFileSystem.reads) == expected


def test_a_rank_downloads_only_shards_that_its_rows_lie_in(uri: str) -> None:
    loader = ClipLoader(VideoStore.open(uri), 8, CLIP, seed=0, rank=5, world_size=8)
    ThrottledFileSystem.reads.clear()
    (first,) = first_frames(loader.batch(0).frames_BTHWC)
    names = [path.rpartition("/")[2] for path, _, _ in ThrottledFileSystem.reads]
    assert names == [f"shard-{first // FRAMES // EPISODES:05d}.tar"]


def test_a_damaged_copy_is_replaced_by_the_whole_shard(uri: str, store: VideoStore) -> None:
    remote = VideoStore.open(uri)
    remote.frames(0, 0, CLIP)
    (copy,) = files.cache_dir().glob("*.tar")
    whole = copy.read_bytes()
    copy.write_bytes(bytes(len(whole)))
    for _ in range(2):
        assert np.array_equal(remote.frames(0, 0, CLIP), store.frames(0, 0, CLIP))
    assert copy.read_bytes() == whole


def test_a_damaged_shard_that_is_read_by_ranges_is_named(by_ranges: VideoStore) -> None:
    path = f"{by_ranges.uri}/shard-00000.tar"
    files.write_atomic(path, bytes(len(files.read(path))))
    with pytest.raises(ValueError, match=r"shard-00000\.tar is damaged"):
        by_ranges.frames(0, 0, CLIP)
    files.write_atomic(path, b"")
    with pytest.raises(ValueError, match=r"shard-00000\.tar is damaged"):
        by_ranges.frames(0, 0, CLIP)


def before_each_read(monkeypatch: pytest.MonkeyPatch, act: Callable[[int], object]) -> None:
    """The store calls `act` with the number of each read of a shard, which may fail it or hold it up."""
    read, numbers = ThrottledFileSystem.cat_file, itertools.count()

    def cat_file(self: ThrottledFileSystem, path: str, *args: Any, **kwargs: Any) -> bytes:
        if path.endswith(".tar"):
            act(next(numbers))
        return read(self, path, *args, **kwargs)

    monkeypatch.setattr(ThrottledFileSystem, "cat_file", cat_file)


def test_several_clips_are_waited_for_at_once(by_ranges: VideoStore, monkeypatch: pytest.MonkeyPatch) -> None:
    together = threading.Barrier(4)
    before_each_read(monkeypatch, lambda number: together.wait(timeout=20))  # breaks unless four come
    assert len(list(ClipLoader(by_ranges, 2, CLIP, seed=0).stream(0, 8, readers=4))) == 8


def test_the_order_of_answers_changes_nothing(
    by_ranges: VideoStore, store: VideoStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    before_each_read(monkeypatch, lambda number: time.sleep(0.01 * (number % 3)))
    local = ClipLoader(store, 4, CLIP, seed=0)
    for step, batch in ClipLoader(by_ranges, 4, CLIP, seed=0).stream(7, 20):
        assert np.array_equal(batch.frames_BTHWC, local.batch(step).frames_BTHWC)


def test_a_store_that_fails_now_and_then_loses_nothing(
    by_ranges: VideoStore, store: VideoStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    failed = []

    def act(number: int) -> None:
        if number % 5 in (1, 2):
            failed.append(number)
            raise ConnectionResetError("reset by peer")

    monkeypatch.setattr(cache, "_WAITS", (0.001,) * 9)
    before_each_read(monkeypatch, act)
    local = ClipLoader(store, 4, CLIP, seed=0)
    for step, batch in ClipLoader(by_ranges, 4, CLIP, seed=0).stream(0, 10):
        assert np.array_equal(batch.frames_BTHWC, local.batch(step).frames_BTHWC)
    assert failed


@pytest.mark.parametrize("cached", [False, True])
def test_a_store_that_stays_away_is_named(uri: str, cached: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GENIE_CACHE_BYTES", str(10**9 * cached))
    loader = ClipLoader(VideoStore.open(uri), 4, CLIP, seed=0)

    def act(number: int) -> None:
        if number >= 3:
            raise ConnectionResetError("reset by peer")

    before_each_read(monkeypatch, act)
    with pytest.raises(OSError, match=r"throttled://.*/shard-0000\d\.tar could not be read in 3 tries.*reset by peer"):
        list(loader.stream(0, 1000))
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("clips")]


@pytest.mark.parametrize("batch_size", [12, 20])  # an epoch is 504 clips: it ends with a batch, and within one
def test_a_changed_world_size_loses_and_repeats_nothing(store: VideoStore, batch_size: int) -> None:
    clips = len(ClipLoader(store, batch_size, CLIP, seed=3).clips)
    steps = -(-2 * clips // batch_size)
    seen: list[int] = []
    for world_size, start, stop in [(4, 0, 11), (2, 11, 30), (1, 30, 45), (4, 45, steps)]:  # the third crosses an epoch
        streams = [
            ClipLoader(store, batch_size, CLIP, seed=3, rank=rank, world_size=world_size).stream(start, stop)
            for rank in range(world_size)
        ]
        for batches in zip(*streams, strict=True):
            for _, batch in batches:
                seen += first_frames(batch.frames_BTHWC)
    every = [episode * FRAMES + i for episode in range(SHARDS * EPISODES) for i in range(FRAMES - CLIP + 1)]
    assert sorted(seen[:clips]) == sorted(seen[clips : 2 * clips]) == every
    assert seen[:clips] != seen[clips : 2 * clips]
