"""Frames come back bit for bit from anywhere, to anybody's reader, and a broken data set says what to do."""

import json
import tarfile

import fsspec
import numpy as np
import pytest
import zstandard

from genie_model import files
from genie_model.data.coinrun import collect
from genie_model.data.shards import CHUNK_FRAMES
from genie_model.data.store import VideoStore
from genie_model.data.truth import PrivilegedTruth


@pytest.fixture
def store(recorded):
    return VideoStore.open(f"{recorded}/train")


def test_any_part_of_an_episode_equals_that_part_of_the_whole(store):
    generator = np.random.default_rng(0)
    shifted = np.flatnonzero(store.columns.first_chunk != CHUNK_FRAMES).tolist()
    assert shifted  # episodes that start within a chunk
    for episode in [0, *shifted]:
        length = int(store.episode_lengths[episode])
        whole = store.frames(episode, 0, length)
        assert whole.shape == (length, 64, 64, 3)
        assert whole.dtype == np.uint8
        assert whole.flags.writeable  # torch.from_numpy warns of arrays that are not
        for _ in range(50):
            start = int(generator.integers(length))
            count = int(generator.integers(1, length - start + 1))
            assert np.array_equal(store.frames(episode, start, count), whole[start : start + count])


def test_frames_outside_the_episode_are_refused(store):
    length = int(store.episode_lengths[0])
    for start, count in [(-1, 2), (0, 0), (length - 1, 2), (length, 1)]:
        with pytest.raises(ValueError, match=f"has {length} frames"):
            store.frames(0, start, count)


@pytest.mark.parametrize(("length", "stride"), [(1, 1), (8, 1), (8, 8), (50, 3)])
def test_clips_are_all_starts_that_stay_within_an_episode(store, length, stride):
    expected = [
        (episode, start)
        for episode, frames in enumerate(store.episode_lengths)
        for start in range(0, frames - length + 1, stride)
    ]
    clips = store.clips(length, stride)
    assert list(clips) == expected
    assert len(clips) == len(expected)


def test_other_webdataset_readers_see_the_frames(store, recorded):
    samples = {}
    with tarfile.open(f"{recorded}/train/shard-00000.tar") as tar:
        for member in tar:
            key, extension = member.name.split(".", 1)
            samples.setdefault(key, {})[extension] = tar.extractfile(member).read()
    for episode, sample in enumerate(samples.values()):
        assert sample.keys() == {"rgb.zst", "json"}
        raw = zstandard.ZstdDecompressor().stream_reader(sample["rgb.zst"], read_across_frames=True).read()
        frames = np.frombuffer(raw, np.uint8).reshape(-1, *json.loads(sample["json"])["frame_shape"])
        assert np.array_equal(frames, store.frames(episode, 0, int(store.episode_lengths[episode])))


@pytest.fixture
def in_memory(recording_config, tmp_path, monkeypatch):
    monkeypatch.setenv("GENIE_CACHE_DIR", str(tmp_path / "cache"))
    root = f"memory://{tmp_path.name}"
    yield collect(recording_config, root)
    fsspec.filesystem("memory").rm(root, recursive=True)


def test_an_object_store_holds_the_same_data_set(in_memory, store, tmp_path):
    remote = VideoStore.open(f"{in_memory}/train")
    assert remote.digest == store.digest
    for episode, length in enumerate(store.episode_lengths):
        assert np.array_equal(remote.frames(episode, 0, int(length)), store.frames(episode, 0, int(length)))
    assert len(list((tmp_path / "cache").glob("*.tar*"))) == 3  # the three shards
    remote.verify()
    truth = PrivilegedTruth.open(f"{in_memory}/eval").episode(1)
    assert np.array_equal(truth["agent_x"], PrivilegedTruth.open(f"{store.uri[:-5]}eval").episode(1)["agent_x"])


def test_a_cached_shard_serves_without_the_network(in_memory):
    first = VideoStore.open(f"{in_memory}/train").frames(0, 0, 8)
    remote = VideoStore.open(f"{in_memory}/train")
    fsspec.filesystem("memory").rm(f"{in_memory}/train/shard-00000.tar")
    assert np.array_equal(remote.frames(0, 0, 8), first)


def test_a_damaged_download_is_not_cached(in_memory, tmp_path):
    remote = VideoStore.open(f"{in_memory}/train")
    memory, path = fsspec.filesystem("memory"), f"{in_memory}/train/shard-00000.tar"
    memory.pipe_file(path, memory.cat_file(path)[:-1] + b"x")
    with pytest.raises(ValueError, match=r"shard-00000\.tar is damaged"):
        remote.frames(0, 0, 8)
    assert not list((tmp_path / "cache").glob("*.tar*"))


def test_missing_data_set(tmp_path):
    with pytest.raises(ValueError, match=r"no data set at .*: run collect"):
        VideoStore.open(f"{tmp_path}/nothing")


def test_the_folder_of_both_splits_is_not_a_store(recorded):
    with pytest.raises(ValueError, match=r"open .*/train or .*/eval"):
        VideoStore.open(recorded)


def test_empty_data_set(copied):
    path = copied[1] / "train" / "index.json"
    index = json.loads(path.read_text())
    path.write_text(json.dumps({**index, "episodes": 0}))
    with pytest.raises(ValueError, match="is empty"):
        VideoStore.open(str(path.parent))


def test_damaged_index(copied):
    path = copied[1] / "train" / "index.json"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError, match=r"index\.json is damaged: delete it and run collect"):
        VideoStore.open(str(path.parent))


@pytest.mark.parametrize("damage", [lambda path: path.unlink(), lambda path: path.write_bytes(path.read_bytes()[:-8])])
def test_a_damaged_column_is_named_and_made_anew(copied, recording_config, damage):
    root, folder = copied
    (path,) = (folder / "train").glob("offset-*.bin")
    damage(path)
    error = rf"{path} is missing or damaged: delete .*/train/index\.json and run collect again"
    with pytest.raises(ValueError, match=error):
        VideoStore.open(f"{folder}/train")
    (folder / "train" / "index.json").unlink()
    collect(recording_config, root)
    VideoStore.open(f"{folder}/train").verify()


def test_verify_reads_the_columns_too(copied):
    (path,) = (copied[1] / "train").glob("source-*.bin")
    path.write_bytes(b"\x01" + path.read_bytes()[1:])
    with pytest.raises(ValueError, match=rf"{path} is damaged: delete .*/index\.json and run collect again"):
        VideoStore.open(f"{copied[1]}/train").verify()


@pytest.mark.parametrize("room", [0, 10**9])
def test_a_damaged_column_of_a_remote_data_set_is_noticed(in_memory, room, monkeypatch, store):
    monkeypatch.setenv("GENIE_CACHE_BYTES", str(room))
    remote = VideoStore.open(f"{in_memory}/train")
    assert np.array_equal(remote.frames(5, 1, 8), store.frames(5, 1, 8))
    memory = fsspec.filesystem("memory")
    (path,) = memory.glob(f"{in_memory}/train/offset-*.bin")
    memory.pipe_file(path, bytes(len(memory.cat_file(path))))
    monkeypatch.setenv("GENIE_CACHE_DIR", str(files.cache_dir()) + "2")
    with pytest.raises(ValueError, match=r"offset-.*\.bin is missing or damaged"):
        VideoStore.open(f"{in_memory}/train")


def test_clips_are_counted_a_few_shards_at_a_time(store, monkeypatch):
    clips = list(store.clips(8, 3))
    monkeypatch.setattr("genie_model.data.store._BLOCK", 2)
    assert store.num_shards > 2
    assert list(store.clips(8, 3)) == clips


def without(tree, path):
    """A copy of the JSON `tree` that lacks what lies at `path`."""
    name, *rest = path
    copy = tree.copy()
    copy[name] = without(tree[name], rest) if rest else None
    if not rest:
        del copy[name]
    return copy


@pytest.mark.parametrize(
    "path",
    [
        ("format",),
        ("meta",),
        ("meta", "split"),
        ("meta", "frame_shape"),
        ("origin",),
        ("episodes",),
        ("columns",),
        ("columns", "offset", "sha256"),
    ],
)
def test_an_index_that_lacks_something_is_damaged(copied, path):
    file = copied[1] / "train" / "index.json"
    file.write_text(json.dumps(without(json.loads(file.read_text()), path)))
    with pytest.raises(ValueError, match=r"train/index\.json is damaged: delete it and run collect"):
        VideoStore.open(str(file.parent))


@pytest.mark.parametrize("path", [("bytes",), ("truth", "bytes"), ("episodes",), ("episodes", 0, "chunks")])
def test_a_shard_whose_manifest_lacks_something_is_made_anew(copied, recording_config, path):
    root, folder = copied
    file = folder / "train" / "shard-00001.json"
    whole = file.read_bytes()
    file.write_text(json.dumps(without(json.loads(whole), path)))
    (folder / "train" / "index.json").unlink()
    collect(recording_config, root)
    assert file.read_bytes() == whole
    VideoStore.open(f"{folder}/train").verify()


def test_truncated_and_missing_shards(copied):
    path = copied[1] / "train" / "shard-00001.tar"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"shard-00001\.tar has \d+ bytes, not \d+: run collect again"):
        VideoStore.open(str(path.parent))
    path.unlink()
    with pytest.raises(ValueError, match=r"shard-00001\.tar is missing: run collect again"):
        VideoStore.open(str(path.parent))


def test_changed_bytes_are_noticed_by_reading_and_by_verify(copied, recording_config):
    root, folder = copied
    store = VideoStore.open(f"{folder}/train")
    store.verify()
    path = folder / "train" / "shard-00000.tar"
    data = bytearray(path.read_bytes())
    data[int(store.columns.offset[0]) + 2000] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"shard-00000\.tar is damaged: delete it and run collect"):
        VideoStore.open(f"{folder}/train").frames(0, 0, CHUNK_FRAMES)
    with pytest.raises(ValueError, match=r"shard-00000\.tar is damaged"):
        store.verify()
    path.unlink()
    collect(recording_config, root)
    VideoStore.open(f"{folder}/train").verify()
