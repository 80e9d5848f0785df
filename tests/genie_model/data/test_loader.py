"""A batch is a pure function of (data set, seed, step, rank), and training cannot see the truth."""

import ast
import importlib.util
import threading
from pathlib import Path

import numpy as np
import pytest

from genie_model.data.loader import ClipLoader, shuffled
from genie_model.data.store import VideoStore
from genie_model.data.truth import PrivilegedTruth


@pytest.fixture
def store(recorded):
    return VideoStore.open(f"{recorded}/train")


def prefetch_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("clips")]


def test_a_batch_depends_on_the_step_alone_not_on_what_was_read_before(store, recorded):
    straight = ClipLoader(store, 4, 8, seed=5)
    batches = {step: straight.batch(step).frames_BTHWC for step in range(6)}
    other = ClipLoader(VideoStore.open(f"{recorded}/train"), 4, 8, seed=5)
    for step in (5, 0, 3):
        assert np.array_equal(other.batch(step).frames_BTHWC, batches[step])
    assert batches[0].shape == (4, 8, 64, 64, 3)
    assert batches[0].dtype == np.uint8
    assert not np.array_equal(batches[0], batches[1])
    assert not np.array_equal(batches[0], ClipLoader(store, 4, 8, seed=6).batch(0).frames_BTHWC)


@pytest.mark.parametrize("world_size", [2, 3, 6])
def test_the_ranks_together_have_the_same_batch_whatever_their_number(store, world_size):
    whole = ClipLoader(store, 6, 8, seed=1)
    ranks = [ClipLoader(store, 6, 8, seed=1, rank=rank, world_size=world_size) for rank in range(world_size)]
    for step in (0, 7, 1000):
        assert np.array_equal(
            np.concatenate([rank.batch(step).frames_BTHWC for rank in ranks]), whole.batch(step).frames_BTHWC
        )


def test_every_clip_is_seen_once_an_epoch_in_another_order(store):
    loader = ClipLoader(store, batch_size=1, clip_length=398, seed=0)  # long clips are few
    size = len(loader.clips)
    clips = {store.frames(episode, start, 398).tobytes() for episode, start in loader.clips}
    epochs = [
        [loader.batch(step).frames_BTHWC[0].tobytes() for step in range(e * size, (e + 1) * size)] for e in range(2)
    ]
    assert set(epochs[0]) == set(epochs[1]) == clips
    assert len(clips) == size > 15
    assert epochs[0] != epochs[1]


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 17, 64, 65, 1000])
def testshuffled_is_a_permutation(size):
    assert sorted(shuffled(i, size, seed=3, epoch=2) for i in range(size)) == list(range(size))


def testshuffled_has_no_order():
    size = 5000
    order = np.array([shuffled(i, size, seed=0, epoch=0) for i in range(size)])
    again = np.array([shuffled(i, size, seed=0, epoch=1) for i in range(size)])
    for a, b in [(order, np.arange(size)), (order[1:], order[:-1]), (order, again)]:
        assert abs(np.corrcoef(a, b)[0, 1]) < 0.06  # four standard deviations of chance
    assert len(np.unique(np.diff(order))) > size / 4


def test_a_clip_lies_within_one_episode(store):
    loader = ClipLoader(store, 4, 24, seed=0)
    assert all(start + 24 <= store.episode_lengths[episode] for episode, start in loader.clips)


def test_the_stream_is_the_batches_in_order(store):
    loader = ClipLoader(store, 2, 8, seed=0)
    for prefetch in (0, 1, 8):
        streamed = list(loader.stream(3, 9, prefetch=prefetch))
        assert [step for step, _ in streamed] == [3, 4, 5, 6, 7, 8]
        assert all(np.array_equal(batch.frames_BTHWC, loader.batch(step).frames_BTHWC) for step, batch in streamed)
    assert list(loader.stream(4, 4)) == []
    assert not prefetch_threads()


def test_leaving_the_stream_ends_its_threads(store):
    stream = ClipLoader(store, 2, 8, seed=0).stream(0, 10**9)
    next(stream)
    assert prefetch_threads()
    stream.close()
    assert not prefetch_threads()


def test_an_error_in_the_prefetch_thread_reaches_the_trainer(copied):
    loader = ClipLoader(VideoStore.open(f"{copied[1]}/train"), 2, 8, seed=0)
    for path in (copied[1] / "train").glob("*.tar"):
        path.write_bytes(b"")
    with pytest.raises(ValueError, match="is damaged: delete it and run collect again"):
        list(loader.stream(0, 5))
    assert not prefetch_threads()


def test_bad_input(store, recorded):
    with pytest.raises(ValueError, match="eval split, which is never trained on"):
        ClipLoader(VideoStore.open(f"{recorded}/eval"), 2, 8, seed=0)
    with pytest.raises(ValueError, match=r"no episode .* has 401 frames, the longest has 400: lower data\.clip_length"):
        ClipLoader(store, 2, 401, seed=0)
    with pytest.raises(ValueError, match="batch_size=5 cannot be shared by 2 ranks"):
        ClipLoader(store, 5, 8, seed=0, world_size=2)
    with pytest.raises(ValueError, match=r"rank=2 is not in 0\.\.1"):
        ClipLoader(store, 4, 8, seed=0, rank=2, world_size=2)


def test_batches_are_the_same_when_the_truth_is_gone(copied, store):
    for path in (copied[1] / "train").glob("truth-*"):
        path.unlink()
    stripped = VideoStore.open(f"{copied[1]}/train")
    for step in range(4):
        assert np.array_equal(
            ClipLoader(stripped, 4, 8, seed=0).batch(step).frames_BTHWC,
            ClipLoader(store, 4, 8, seed=0).batch(step).frames_BTHWC,
        )
    with pytest.raises(ValueError, match=r"truth-00000\.npz is missing"):
        PrivilegedTruth.open(stripped.uri).episode(0)


def imported_by(module):
    """Modules of this library that importing `module`, or running any function in it, imports."""
    names = {module.rpartition(".")[0]}
    for node in ast.walk(ast.parse(Path(importlib.util.find_spec(module).origin).read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in names if name.startswith("genie_model.") and exists(name)}


def exists(module):
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def test_no_training_path_imports_the_truth():
    reached, waiting = set(), {"genie_model.train", "genie_model.data.loader"}
    while waiting:
        module = waiting.pop()
        reached.add(module)
        waiting |= imported_by(module) - reached
    assert "genie_model.data.store" in reached
    assert "genie_model.data.truth" not in reached
