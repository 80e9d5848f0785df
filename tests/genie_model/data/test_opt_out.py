"""Who opts out is gone from the data set when it is next opened: from clips, counts, views, tokens and model names."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from genie_model import cache, files
from genie_model.__main__ import main
from genie_model.data.loader import ClipLoader
from genie_model.data.opt_out import OptOuts, opt_out
from genie_model.data.shards import Episode, Meta, compress, write_index, write_shard, write_view
from genie_model.data.store import VideoStore
from genie_model.presets import get_preset
from genie_model.tokenizer import VideoTokenizer
from genie_model.tokens import tokens_of

SHAPE = (64, 64, 3)
CONFIG = get_preset("tiny")
OWNERS = ["Ann", "Ann", "Bob", "", "Bob", "Cy"]  # of clips 0 to 5, of videos v0 to v5; two in a shard


def meta(split: str) -> Meta:
    return {"source": "video", "split": split, "frame_shape": list(SHAPE), "data": {}}


def clip(number: int) -> Episode:
    """Of one colour, and of another length than the others."""
    frames = np.full((10 + number, *SHAPE), 40 * number, np.uint8)
    digest = hashlib.sha256(frames.tobytes()).hexdigest()
    return compress(frames, about={"source": f"v{number}", "owner": OWNERS[number], "digest": digest})


@pytest.fixture(params=["local", "memory"])
def data_uri(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("GENIE_CACHE_DIR", str(tmp_path / "cache"))
    root = f"memory://{tmp_path.name}" if request.param == "memory" else str(tmp_path)
    uri = f"{root}/datasets/video"
    for shard in range(3):
        write_shard(f"{uri}/train", shard, [clip(2 * shard), clip(2 * shard + 1)], SHAPE)
    write_index(f"{uri}/train", 3, meta("train"))
    write_shard(f"{uri}/eval", 0, [clip(0), clip(1)], SHAPE)
    write_index(f"{uri}/eval", 1, meta("eval"))
    yield uri
    files.remove_tree(root)


def numbers(store: VideoStore) -> list[int]:
    """Which clips it holds, told by their frames; what else it says of them fits."""
    found = [int(store.frames(episode, 0, 1)[0, 0, 0, 0]) // 40 for episode in range(store.num_episodes)]
    assert store.episode_lengths.tolist() == [10 + number for number in found]
    assert store.num_frames == sum(store.episode_lengths)
    assert [store.about(episode)["source"] for episode in range(store.num_episodes)] == [f"v{n}" for n in found]
    assert [len(store.frames(episode, 0, 10 + number)) for episode, number in enumerate(found)]
    with pytest.raises(IndexError):
        store.frames(store.num_episodes, 0, 1)
    return found


def train(data_uri: str) -> VideoStore:
    return VideoStore.open(f"{data_uri}/train")


@pytest.mark.parametrize(
    ("lines", "left"),
    [
        (["v2"], [0, 1, 3, 4, 5]),
        (["owner:Ann", "v5"], [2, 3, 4]),
        (["v0", "v1", "v3"], [2, 4, 5]),
        ([f"sha256:{clip(4).about['digest']}"], [0, 1, 2, 3, 5]),
        ([f"SHA256:{str(clip(4).about['digest']).upper()}"], [0, 1, 2, 3, 5]),
        (["owner:Dee", "v", "# v1", "", "Ann"], [0, 1, 2, 3, 4, 5]),
    ],
)
def test_no_clip_of_who_opted_out_is_read(lines: list[str], left: list[int], data_uri: str) -> None:
    before = train(data_uri)
    files.write_atomic(f"{data_uri}/opt_out.txt", "\n".join(lines).encode())
    after = train(data_uri)
    assert numbers(after) == left
    shards = [[number for number in left if number // 2 == shard] for shard in range(3)]
    assert [len(after.episodes_in(shard)) for shard in range(3)] == [len(shard) for shard in shards]
    assert list(after.clips(12, 2)) == [
        (episode, start) for episode, number in enumerate(left) for start in range(0, 10 + number - 11, 2)
    ]
    loader = ClipLoader(after, 1, 10, seed=0)
    seen = {int(loader.batch(step).frames_BTHWC[0, 0, 0, 0, 0]) // 40 for step in range(len(loader.clips))}
    assert sorted(seen) == left
    assert (after.digest != before.digest) == (left != numbers(before))
    files.write_atomic(f"{data_uri}/opt_out.txt", b"")
    assert train(data_uri).digest == before.digest


def test_a_view_honours_its_origin_s_list_and_its_own(data_uri: str) -> None:
    store, uri = train(data_uri), f"{data_uri}-curated"
    write_view(f"{uri}/train", store, (np.array([True, shard == 0]) for shard in range(3)), meta("train"))
    assert numbers(train(uri)) == [0, 1, 2, 4]
    opt_out(data_uri, ["v4", "v5"])
    assert numbers(train(uri)) == [0, 1, 2]
    assert opt_out(uri, ["v1"]) == f"2 of 4 train clips are hidden, 1 of them by this: {uri}/opt_out.txt"
    assert numbers(train(uri)) == [0, 2]
    assert numbers(train(data_uri)) == [0, 1, 2, 3]
    # a view of what is left says of that alone what it keeps
    write_view(f"{uri}2/train", train(uri), [np.array([True]), np.array([True]), np.array([], bool)], meta("train"))
    assert numbers(train(f"{uri}2")) == [0, 2]


def test_tokens_follow(data_uri: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    tokenizer = VideoTokenizer(CONFIG.tokenizer, *SHAPE[:2], CONFIG.data.clip_length)
    before = tokens_of(CONFIG, train(data_uri), tokenizer, str(tmp_path))
    opt_out(data_uri, ["owner:Ann"])
    store = train(data_uri)
    after = tokens_of(CONFIG, store, tokenizer, str(tmp_path))
    assert (before.num_episodes, after.num_episodes, after.num_shards) == (6, 4, 3)
    assert before.uri != after.uri
    assert np.array_equal(after.frames(0, 0, 8), before.frames(2, 0, 8))
    assert len(ClipLoader(store, 1, 8, seed=0, tokens=after).batch(0).frames_BTHWC) == 1


def test_all_may_opt_out(data_uri: str) -> None:
    said = opt_out(data_uri, [f"v{number}" for number in range(6)])
    assert said.startswith("6 of 6 train clips are hidden, 6 of them by this; 2 of 2 eval clips")
    with pytest.raises(ValueError, match=r"all of .*/train is opted out"):
        train(data_uri)


def test_the_command_appends(data_uri: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["opt-out", "--data", data_uri, "v1", "owner:Bob"]) == 0
    assert "3 of 6 train clips are hidden, 3 of them by this; 1 of 2 eval clips" in capsys.readouterr().out
    assert main(["opt-out", "--data", data_uri, "owner:Bob", "v2", "nobody"]) == 0
    assert "3 of 6 train clips are hidden, 0 of them by this" in capsys.readouterr().out
    assert files.read(f"{data_uri}/opt_out.txt").decode().split("\n") == ["v1", "owner:Bob", "v2", "nobody", ""]
    assert main(["opt-out", "--data", data_uri, "#1.mp4"]) == 0, "a file may be named so"
    capsys.readouterr()
    for bad, error in [
        ("sha256:abc", "64 hex digits"),
        ("", "is one line"),
        ("v1\nv2", "is one line"),
        (" # v1", "is one line"),
    ]:
        assert main(["opt-out", "--data", data_uri, bad]) == 2
        assert error in capsys.readouterr().err
    assert main(["opt-out", "--data", f"{data_uri}/nothing", "v1"]) == 2
    assert "no data set at" in capsys.readouterr().err
    assert not files.exists(f"{data_uri}/nothing/opt_out.txt")


def test_a_list_that_cannot_be_read_is_an_error(data_uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    opt_out(data_uri, ["v1"])

    def read(uri: str) -> bytes:
        raise ConnectionResetError("reset by peer")

    monkeypatch.setattr(cache, "_WAITS", ())
    monkeypatch.setattr(files, "read", read)
    with pytest.raises(OSError, match=r"opt_out\.txt could not be read"):
        train(data_uri)


def test_two_that_append_at_once_lose_nothing(data_uri: str) -> None:
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda number: opt_out(data_uri, [f"other{number}"]), range(8)))
    assert len(files.read(f"{data_uri}/opt_out.txt").decode().split()) == 8


def test_a_list_is_read_as_any_editor_writes_it_and_whatever_a_file_is_named(data_uri: str) -> None:
    files.write_atomic(f"{data_uri}/opt_out.txt", b"\xef\xbb\xbfv1\r\nv2\r\n")
    assert numbers(train(data_uri)) == [0, 3, 4, 5]
    files.write_atomic(f"{data_uri}/opt_out.txt", "Zoë".encode("latin-1"))
    with pytest.raises(ValueError, match=r"opt_out\.txt is no text in UTF-8"):
        train(data_uri)
    names = ["#1 best run.mp4", "owner:me.mp4", "a\u2028b.mp4"]
    listed = OptOuts.of(["# of 2026", *names])
    assert all(listed.hides({"source": name}) for name in names)


def test_ingest_can_ask_of_what_is_not_in_a_data_set_yet() -> None:
    listed = OptOuts.of(["a/b.mp4", "owner: Ann ", f"sha256:{'0' * 64}"])
    assert listed.hides({"source": "a/b.mp4"})
    assert listed.hides({"source": "c", "owner": "Ann"})
    assert listed.hides({"source": "c", "digest": "0" * 64})
    assert not listed.hides({"source": "b.mp4", "owner": "ann", "title": "a/b.mp4"})
    assert not listed.hides({})
