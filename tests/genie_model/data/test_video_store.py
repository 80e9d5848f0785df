"""Clips of video: where they are from, each once, some of them as a data set of its own, and none that is opted out."""

from __future__ import annotations

import hashlib
import io
import shutil
import tarfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from genie_model import files
from genie_model.data import columns
from genie_model.data.shards import (
    CHUNK_FRAMES,
    Codec,
    Episode,
    Meta,
    compress,
    missing_shards,
    read_index,
    write_index,
    write_shard,
    write_view,
)
from genie_model.data.store import VideoStore
from genie_model.data.truth import PrivilegedTruth

SHAPE = (34, 47, 3)  # odd: h264 pads it
LENGTH = 40


def meta(split: str = "train", codec: Codec = "zstd") -> Meta:
    return {"source": "video", "split": split, "frame_shape": list(SHAPE), "data": {}, "codec": codec}


def frames_of(number: int, length: int = LENGTH) -> NDArray[np.uint8]:
    """A square on a smooth ground, that moves; no two numbers look alike."""
    y, x = np.mgrid[: SHAPE[0], : SHAPE[1]]
    ground = np.stack([(4 * x + 77 * number) % 200, 5 * y + 20, 3 * x + 2 * y], -1)
    frames = np.tile(ground, (length, 1, 1, 1)).astype(np.uint8)
    for t in range(length):
        frames[t, 4:20, (t + 5 * number) % 30 : (t + 5 * number) % 30 + 16] = 97 * number % 250
    return frames


def clip(number: int, video: str, owner: str = "", codec: Codec = "zstd") -> Episode:
    frames = frames_of(number)
    about = {"source": video, "owner": owner, "digest": hashlib.sha256(frames.tobytes()).hexdigest(), "title": "Ü"}
    return compress(frames, codec, about=about)


@pytest.fixture(params=["local", "memory"])
def data_uri(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Three shards of two videos' clips, one of them twice, and an eval split that shares two clips with them."""
    monkeypatch.setenv("GENIE_CACHE_DIR", str(tmp_path / "cache"))
    root = f"memory://{tmp_path.name}" if request.param == "memory" else str(tmp_path)
    uri = f"{root}/datasets/video"
    write_shard(f"{uri}/train", 0, [clip(0, "a.mp4"), clip(1, "a.mp4"), clip(2, "a.mp4")], SHAPE)
    write_shard(f"{uri}/train", 1, [clip(3, "b.mp4", "Ann"), clip(1, "b.mp4", "Ann")], SHAPE)
    write_shard(f"{uri}/train", 2, [clip(4, "c.mp4", "Bob"), clip(5, "d.mp4", "Ann")], SHAPE)
    assert write_index(f"{uri}/train", 3, meta()) == 1
    write_shard(f"{uri}/eval", 0, [clip(5, "e.mp4"), clip(6, "e.mp4"), clip(0, "e.mp4"), clip(6, "f.mp4")], SHAPE)
    assert write_index(f"{uri}/eval", 1, meta("eval"), not_in=[VideoStore.open(f"{uri}/train")]) == 3
    yield uri
    files.remove_tree(root)


def numbers(store: VideoStore) -> list[int]:
    """Which clips it holds, told by their frames."""
    return [
        next(n for n in range(7) if np.array_equal(store.frames(episode, 0, LENGTH), frames_of(n)))
        for episode in range(store.num_episodes)
    ]


def test_each_clip_is_listed_once_and_none_in_both_splits(data_uri: str) -> None:
    train, held_out = VideoStore.open(f"{data_uri}/train"), VideoStore.open(f"{data_uri}/eval")
    assert numbers(train) == [0, 1, 2, 3, 4, 5]
    assert [train.episodes_in(shard) for shard in range(3)] == [range(3), range(3, 4), range(4, 6)]
    assert (train.num_frames, train.episode_lengths.tolist()) == (6 * LENGTH, [LENGTH] * 6)
    assert numbers(held_out) == [6]
    assert read_index(held_out.uri)[0]["dropped"] == 3


def test_clips_without_a_digest_are_all_listed(tmp_path: Path) -> None:
    write_shard(str(tmp_path), 0, [compress(frames_of(0)), compress(frames_of(0))], SHAPE)
    assert write_index(str(tmp_path), 1, meta()) == 0
    store = VideoStore.open(str(tmp_path))
    assert (store.num_episodes, store.about(1)) == (2, {})


def test_duplicates_are_found_whatever_part_they_are_sorted_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(columns, "_SORTED", 64)
    monkeypatch.setattr(columns, "_BLOCK", 50)
    rng = np.random.default_rng(0)
    digests, other = rng.integers(0, 300, (2, 1000), dtype=np.uint64)
    seen, expected = set(other[:200].tolist()), []
    for value in digests.tolist():
        expected.append(value == 0 or value not in seen)
        seen.add(value)
    assert columns.first_of_each(digests, [other[:200]]).tolist() == expected
    assert 100 < sum(expected) < 900


def test_what_is_known_of_a_clip_lies_beside_it(data_uri: str) -> None:
    store = VideoStore.open(f"{data_uri}/train")
    for episode, (number, video, owner) in enumerate([(0, "a.mp4", ""), (1, "a.mp4", ""), (2, "a.mp4", "")]):
        assert store.about(episode) == clip(number, video, owner).about
    assert [store.about(episode)["source"] for episode in (3, 4, 5)] == ["b.mp4", "c.mp4", "d.mp4"]


def test_there_is_no_truth_to_read(data_uri: str) -> None:
    assert not [name for name in files.names(f"{data_uri}/train") if name.startswith("truth")]
    assert missing_shards(f"{data_uri}/train", 4) == [3]
    with pytest.raises(ValueError, match="is video: what was done in it is not known"):
        PrivilegedTruth.open(f"{data_uri}/train").episode(0)


@pytest.mark.parametrize("digest", ["abc", "g" * 64])
def test_a_digest_is_sha256(digest: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"digest .* 64 hex digits"):
        write_shard(str(tmp_path), 0, [compress(frames_of(0), about={"digest": digest})], SHAPE)


# --- views ---


def view_of(store: VideoStore, *kept: int, name: str = "curated") -> VideoStore:
    uri = f"{store.uri.rpartition('/video')[0]}/{name}/train"
    episodes = (np.array(store.episodes_in(shard), int) for shard in range(store.num_shards))
    write_view(uri, store, (np.isin(numbers, kept) for numbers in episodes), meta())
    return VideoStore.open(uri)


def test_a_view_holds_what_is_kept_and_copies_nothing(data_uri: str) -> None:
    store = VideoStore.open(f"{data_uri}/train")
    view = view_of(store, 1, 4, 5)
    assert numbers(view) == [1, 4, 5]
    assert [len(view.episodes_in(shard)) for shard in range(3)] == [1, 0, 2]
    assert view.about(1)["source"] == "c.mp4"
    assert view.digest != store.digest
    assert not [name for name in files.names(view.uri) if name.endswith(".tar")]
    assert {clip for clip, _ in view.clips(LENGTH, 1)} == {0, 1, 2}
    view.verify()
    again = view_of(view, 0, 2, name="again")
    assert (numbers(again), again.home) == ([1, 5], store.home)
    (column,) = (name for name in files.names(again.uri) if name.startswith("number-"))
    files.write_atomic(f"{again.uri}/{column}", b"")
    with pytest.raises(ValueError, match=r"/number-.*\.bin is missing or damaged: delete .* and run curate again"):
        VideoStore.open(again.uri)


def test_who_makes_the_same_view_at_once_finds_it_whole(data_uri: str) -> None:
    store = VideoStore.open(f"{data_uri}/train")
    with ThreadPoolExecutor(8) as pool:
        views = list(pool.map(lambda _: view_of(store, 1, 4, 5), range(24)))
    assert all(numbers(view) == [1, 4, 5] for view in views)
    assert not [name for name in files.names(views[0].uri) if name.startswith(".")]


def test_a_view_moves_with_its_origin(tmp_path: Path) -> None:
    uri = f"{tmp_path}/old/datasets/video/train"
    write_shard(uri, 0, [clip(0, "a.mp4"), clip(1, "a.mp4")], SHAPE)
    write_index(uri, 1, meta())
    view_of(VideoStore.open(uri), 1)
    (tmp_path / "old").rename(tmp_path / "new")
    view = VideoStore.open(f"{tmp_path}/new/datasets/curated/train")
    assert numbers(view) == [1]
    shutil.rmtree(tmp_path / "new" / "datasets" / "video")
    with pytest.raises(ValueError, match=r"datasets/video/train/shard-00000\.tar is missing: run ingest again"):
        VideoStore.open(view.uri)


def test_a_view_may_lie_in_another_store_of_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GENIE_CACHE_DIR", str(tmp_path / "cache"))
    origin, uri = str(tmp_path / "video"), f"memory://{tmp_path.name}/view"
    write_shard(origin, 0, [clip(0, "a.mp4"), clip(1, "a.mp4")], SHAPE)
    write_index(origin, 1, meta())
    write_view(uri, VideoStore.open(origin), [np.array([False, True])], meta())
    assert numbers(VideoStore.open(uri)) == [1]
    write_view(f"{tmp_path}/back", VideoStore.open(uri), [np.array([True])], meta())
    assert numbers(VideoStore.open(f"{tmp_path}/back")) == [1]
    files.remove_tree(f"memory://{tmp_path.name}")


def test_a_view_that_does_not_fit_is_refused(data_uri: str) -> None:
    store, uri = VideoStore.open(f"{data_uri}/train"), f"{data_uri}/view"
    fits = [np.ones(len(store.episodes_in(shard)), bool) for shard in range(3)]
    for keep, error in [
        (fits[:2], "fewer arrays than"),
        ([*fits, fits[0]], "more arrays than"),
        ([fits[1], fits[1], fits[2]], r"bool \(1,\) for shard 0 with 3 episodes"),
        ([part.astype(int) for part in fits], "int64"),
        ([~part for part in fits], "no episode is kept"),
    ]:
        with pytest.raises(ValueError, match=error):
            write_view(uri, store, keep, meta())
        assert not files.exists(f"{uri}/index.json")


# --- h264 ---


@pytest.fixture(scope="module")
def filmed(tmp_path_factory: pytest.TempPathFactory) -> VideoStore:
    pytest.importorskip("av", reason="h264 is PyAV's: install the extra `video`")
    uri = str(tmp_path_factory.mktemp("filmed"))
    write_shard(uri, 0, [clip(number, "a.mp4", codec="h264") for number in (0, 1)], SHAPE)
    write_index(uri, 1, meta(codec="h264"))
    return VideoStore.open(uri)


def test_any_part_of_a_filmed_clip_is_that_part_of_the_whole(filmed: VideoStore) -> None:
    whole = filmed.frames(1, 0, LENGTH)
    assert np.abs(whole.astype(int) - frames_of(1)).mean() < 4
    assert np.abs(whole.astype(int) - frames_of(0)).mean() > 8
    for start, length in [(0, 1), (CHUNK_FRAMES - 1, 2), (CHUNK_FRAMES, 8), (3, LENGTH - 3)]:
        assert np.array_equal(filmed.frames(1, start, length), whole[start : start + length])


def test_players_open_a_filmed_clip_out_of_the_tar(filmed: VideoStore) -> None:
    av = pytest.importorskip("av")
    with tarfile.open(f"{filmed.uri}/shard-00000.tar") as tar:
        member = tar.extractfile("00000-00001.mp4")
        assert member is not None
        with av.open(io.BytesIO(member.read())) as container:
            shown = [
                (frame.pts * frame.time_base, frame.to_ndarray(format="rgb24")) for frame in container.decode(video=0)
            ]
    assert [time for time, _ in shown] == pytest.approx(np.arange(LENGTH) / 10)
    frames = np.stack([frame[: SHAPE[0], : SHAPE[1]] for _, frame in shown])
    assert np.array_equal(frames, filmed.frames(1, 0, LENGTH))


def test_equal_frames_are_equal_bytes_and_changed_bytes_are_noticed(filmed: VideoStore, tmp_path: Path) -> None:
    assert clip(0, "a.mp4", codec="h264").chunks == clip(0, "a.mp4", codec="h264").chunks
    path = Path(shutil.copytree(filmed.uri, tmp_path / "copy"), "shard-00000.tar")
    data = bytearray(path.read_bytes())
    offset, size = int(filmed.columns.offset[0]), int(filmed.columns.chunks_of(0)[0])
    for place in (offset + 5, offset + size // 2, offset + size - 1):
        path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        with pytest.raises(ValueError, match=r"shard-00000\.tar is damaged: delete it and run ingest again"):
            VideoStore.open(str(path.parent)).frames(0, 0, 1)


def test_the_index_says_the_codec_that_the_shards_have(filmed: VideoStore, tmp_path: Path) -> None:
    write_shard(str(tmp_path), 0, [clip(0, "a.mp4", codec="h264")], SHAPE)
    with pytest.raises(ValueError, match=r"shard-00000\.tar is h264: say so"):
        write_index(str(tmp_path), 1, meta())
    with pytest.raises(ValueError, match="several codecs, h264, zstd"):
        write_shard(str(tmp_path), 1, [clip(0, "a.mp4", codec="h264"), clip(1, "a.mp4")], SHAPE)
    with pytest.raises(ValueError, match="codec=mjpeg: one of zstd, h264"):
        compress(frames_of(0), "mjpeg")  # type: ignore[arg-type]
