"""Robot episodes as video: RLDS and LeRobot folders as their own tools write them, whole and broken, actions unread."""

from __future__ import annotations

import io
import json
import pickle
import struct
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import av
import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from genie_model.data.ingest import ingest
from genie_model.data.robotics import RldsEpisode
from genie_model.data.sources import FileVideo, Framing, Rejected, Video, videos_at
from genie_model.data.store import VideoStore
from genie_model.presets import get_preset

FRAMING = Framing(fps=10, height=24, width=32)
Frames = np.ndarray[Any, np.dtype[np.uint8]]


def frames_of(video: Video, framing: Framing = FRAMING) -> Frames:
    return np.stack(list(video.frames(framing)))


def reason(video: Video) -> str:
    with pytest.raises(Rejected) as rejected:
        list(video.frames(FRAMING))
    return rejected.value.reason


# ---- RLDS: a TFRecord writer with no code of the reader's


def crc32c(data: bytes) -> int:
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def masked(data: bytes) -> bytes:
    crc = crc32c(data)
    return struct.pack("<I", ((crc >> 15 | crc << 17 & 0xFFFFFFFF) + 0xA282EAD8) % 2**32)


def record(payload: bytes) -> bytes:
    length = struct.pack("<Q", len(payload))
    return length + masked(length) + payload + masked(payload)


def varint(number: int) -> bytes:
    low, rest = number & 0x7F, number >> 7
    return bytes([low | 0x80]) + varint(rest) if rest else bytes([low])


def part(number: int, content: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(content)) + content


def texts(values: Sequence[bytes]) -> bytes:
    return part(1, b"".join(part(1, value) for value in values))


def floats(values: Sequence[float]) -> bytes:
    return part(2, part(1, struct.pack(f"<{len(values)}f", *values)))


def example(features: Mapping[str, bytes]) -> bytes:
    """A tf.train.Example: of each feature its name and its tf.train.Feature."""
    return part(1, b"".join(part(1, part(1, name.encode()) + part(2, value)) for name, value in features.items()))


def picture(frame: Frames, kind: str = "png") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(frame).save(buffer, kind)
    return buffer.getvalue()


def noise(episode: int, steps: int = 5, height: int = 24, width: int = 32) -> Frames:
    return np.random.default_rng(episode).integers(0, 256, (steps, height, width, 3), dtype=np.uint8)


def episode(number: int, **features: bytes) -> bytes:
    """As TFDS flattens RT-1's steps: lists as long as the episode, named by their path."""
    frames = noise(number)
    found = {
        "steps/action/world_vector": floats([0.5] * 15),
        "steps/observation/image": texts([picture(frame) for frame in frames]),
        "steps/observation/natural_language_instruction": texts([b"pick up the can"] * len(frames)),
        "steps/is_last": part(3, part(1, bytes([0, 0, 0, 0, 1]))),
    }
    return example(found | {name.replace("__", "/"): value for name, value in features.items()})


def image_feature(*dimensions: int) -> dict[str, Any]:
    return {
        "pythonClassName": "tensorflow_datasets.core.features.image_feature.Image",
        "image": {
            "shape": {"dimensions": [str(n) for n in dimensions]},
            "dtype": "uint8",
            "encodingFormat": "png",
        },
    }


def dictionary(**features: dict[str, Any]) -> dict[str, Any]:
    name = "tensorflow_datasets.core.features.features_dict.FeaturesDict"
    return {"pythonClassName": name, "featuresDict": {"features": features}}


def write_rlds(folder: Path, shards: Mapping[str, bytes], lengths: Sequence[int], **cameras: dict[str, Any]) -> str:
    action = {"tensor": {"shape": {"dimensions": ["3"]}, "dtype": "float32", "encoding": "none"}}
    cameras = cameras or {"hand": image_feature(24, 32, 3), "image": image_feature(24, 32, 3)}
    step = dictionary(action=dictionary(world_vector=action), observation=dictionary(**cameras))
    steps = {
        "pythonClassName": "tensorflow_datasets.core.features.dataset_feature.Dataset",
        "sequence": {"feature": step, "length": "-1"},
    }
    info = {
        "name": "toy_robot",
        "version": "0.1.0",
        "fileFormat": "tfrecord",
        "description": "A toy that moves.",
        "redistributionInfo": {"license": "CC BY 4.0"},
        "splits": [{"name": "train", "shardLengths": [str(length) for length in lengths]}],
    }
    folder.mkdir(parents=True)
    (folder / "features.json").write_text(json.dumps(dictionary(steps=steps)))
    (folder / "dataset_info.json").write_text(json.dumps(info))
    for name, content in shards.items():
        (folder / f"toy_robot-train.tfrecord-{name}").write_bytes(content)
    return str(folder)


def test_the_checksum_is_crc32c() -> None:
    assert crc32c(b"123456789") == 0xE3069283  # the check value of CRC-32C's definition


def test_every_record_of_every_shard_is_an_episode_of_its_pictures(tmp_path: Path) -> None:
    shards = {
        "00000-of-00002": record(episode(0)) + record(episode(1)),
        "00001-of-00002": record(episode(2)),
    }
    uri = write_rlds(tmp_path / "0.1.0", shards, [2, 1])
    listing = videos_at(uri)
    assert listing.kind == "RLDS"
    videos = list(listing)
    assert [video.id for video in videos] == [
        "toy_robot-train.tfrecord-00000-of-00002#00000/observation/image",
        "toy_robot-train.tfrecord-00000-of-00002#00001/observation/image",
        "toy_robot-train.tfrecord-00001-of-00002#00000/observation/image",
    ]
    for number, video in enumerate(videos):
        np.testing.assert_array_equal(frames_of(pickle.loads(pickle.dumps(video))), noise(number))
    told = videos[0].provenance()
    assert told["title"] == "toy robot"
    assert told["licence"] == "CC BY 4.0"
    assert told["camera"] == "observation/image"


def test_no_action_is_read(tmp_path: Path) -> None:
    """Where the actions should be is what no reader understands."""
    garbage = {"steps__action__world_vector": b"\xff" * 40}
    uri = write_rlds(tmp_path / "0.1.0", {"00000-of-00001": record(episode(0, **garbage))}, [1])
    (video,) = videos_at(uri)
    np.testing.assert_array_equal(frames_of(video), noise(0))
    assert "world_vector" not in str(video)


def test_another_camera_is_asked_for_by_name(tmp_path: Path) -> None:
    hand = texts([picture(frame, "jpeg") for frame in noise(7, 2, 48, 48)])
    shards = {"00000-of-00001": record(episode(0, steps__observation__hand=hand))}
    uri = write_rlds(tmp_path / "0.1.0", shards, [1])
    (video,) = videos_at(f"{uri}#hand")
    assert frames_of(video).shape == (2, 24, 32, 3)
    assert np.all(frames_of(video)[:, :, :4] == 0), "a square picture between black bars"
    (default,) = videos_at(uri)
    assert default.id != video.id
    with pytest.raises(ValueError, match=r"no camera 'foot'; what it has: .*observation/hand"):
        videos_at(f"{uri}#foot")


def test_depth_is_no_camera(tmp_path: Path) -> None:
    uri = write_rlds(tmp_path / "a", {}, [], depth=image_feature(24, 32, 1), rgb=image_feature(-1, -1, 3))
    (tmp_path / "a" / "toy_robot-train.tfrecord-00000-of-00001").write_bytes(record(episode(0)))
    (video,) = videos_at(uri)
    assert isinstance(video, RldsEpisode)
    assert video.feature == "steps/observation/rgb"
    assert reason(video) == "no picture"
    with pytest.raises(ValueError, match="no colour camera"):
        videos_at(write_rlds(tmp_path / "b", {}, [], depth=image_feature(24, 32, 1)))


BROKEN_PICTURE = texts([picture(noise(0)[0]), picture(noise(0)[1])[:-40]])
WHOLE = record(episode(0))


@pytest.mark.parametrize(
    ("broken", "reasons"),
    [
        (WHOLE[:-1], ["truncated"]),
        (WHOLE[:7], ["truncated"]),
        (b"", ["truncated"]),
        (WHOLE + WHOLE[:100], ["", "truncated"]),
        (WHOLE[:200] + b"!" + WHOLE[201:] + WHOLE, ["corrupt", ""]),  # its neighbour is found all the same
        (b"!" + WHOLE[1:] + WHOLE, ["corrupt"]),  # where the next one begins nobody knows
        (struct.pack("<Q", 1 << 40) + masked(struct.pack("<Q", 1 << 40)) + WHOLE, ["corrupt"]),  # a terabyte
        (record(b"\x0f no protobuf") + WHOLE, ["corrupt", ""]),
        (record(part(1, b"\x0a\xff")) + WHOLE, ["corrupt", ""]),
        (record(b"") + WHOLE, ["no picture", ""]),
        (record(episode(0, steps__observation__image=BROKEN_PICTURE)) + WHOLE, ["corrupt", ""]),
        (record(episode(0, steps__observation__image=texts([b"no picture"]))), ["corrupt"]),
        (record(episode(0, steps__observation__image=texts([picture(noise(0)[0, :8])]))), ["too narrow"]),
    ],
)
def test_broken_records_are_rejected_and_whole_ones_are_not(tmp_path: Path, broken: bytes, reasons: list[str]) -> None:
    videos = list(videos_at(write_rlds(tmp_path / "0.1.0", {"00000-of-00001": broken}, [len(reasons)])))
    assert len(videos) == len(reasons)
    for video, wanted in zip(videos, reasons, strict=True):
        if wanted:
            assert reason(video) == wanted
        else:
            np.testing.assert_array_equal(frames_of(video), noise(0))


def test_what_is_promised_and_not_there_is_rejected_one_by_one(tmp_path: Path) -> None:
    uri = write_rlds(tmp_path / "0.1.0", {"00001-of-00002": WHOLE}, [2, 3])
    first, second, whole, *lost = videos_at(uri)
    assert [reason(video) for video in (first, second)] == ["missing", "truncated"]
    np.testing.assert_array_equal(frames_of(whole), noise(0))
    assert [reason(video) for video in lost] == ["truncated", "truncated"]
    assert len({video.id for video in videos_at(uri)}) == 5


def test_files_that_are_no_tfrecords_and_a_folder_of_versions_are_one_clear_error(tmp_path: Path) -> None:
    uri = write_rlds(tmp_path / "toy_robot" / "0.1.0", {}, [])
    with pytest.raises(ValueError, match=r"holds versions of an RLDS data set \(0\.1\.0\): name one"):
        videos_at(str(tmp_path / "toy_robot"))
    info = tmp_path / "toy_robot" / "0.1.0" / "dataset_info.json"
    info.write_text(json.dumps({"fileFormat": "array_record"}))
    with pytest.raises(ValueError, match="holds array_record files: only RLDS in TFRecord"):
        videos_at(uri)
    for text in ("{", "[]"):
        info.write_text(text)
        with pytest.raises(ValueError, match=r"dataset_info\.json is broken"):
            videos_at(uri)


# ---- LeRobot

CAMERA, NATIVE_FPS = "observation.images.top", 10


def shade(number: int, length: int) -> list[int]:
    """Of the frames of an episode: each its own grey, and far from its neighbours'."""
    return [(40 + 70 * number + 16 * step) % 256 for step in range(length)]


def write_mp4(path: Path, shades: Sequence[int]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as file:
        stream = file.add_stream("libx264", NATIVE_FPS, options={"crf": "1", "g": "2"})
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for grey in shades:
            frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), grey, np.uint8), "rgb24")
            file.mux(stream.encode(frame))
        file.mux(stream.encode())


def write_info(folder: Path, version: str, video_path: str, **more: Any) -> None:
    video = {"dtype": "video", "shape": [3, 48, 64], "info": {"video.fps": NATIVE_FPS, "video.is_depth_map": False}}
    features = {
        "observation.images.depth": video | {"info": {"video.is_depth_map": True}},
        CAMERA: video,
        "observation.images.wrist": video,
        "action": {"dtype": "float32", "shape": [6]},
    }
    info = {"codebase_version": version, "robot_type": "so100", "fps": NATIVE_FPS, "features": features}
    (folder / "meta").mkdir(parents=True)
    (folder / "meta" / "info.json").write_text(json.dumps(info | {"video_path": video_path} | more))
    (folder / "README.md").write_text("---\ntags:\n- LeRobot\nlicense: apache-2.0\n---\nA toy.\n")
    data = folder / "data" / "chunk-000"
    data.mkdir(parents=True)
    for name in ("episode_000000.parquet", "file-000.parquet"):
        (data / name).write_bytes(b"here would be the actions")


def lerobot_v2(folder: Path) -> str:
    """Three episodes of 6, 4 and 5 frames, each a file; two to a chunk."""
    path = "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4"
    write_info(folder, "v2.1", path, chunks_size=2)
    lines = []
    for number, length in enumerate((6, 4, 5)):
        place = path.format(episode_chunk=number // 2, video_key=CAMERA, episode_index=number)
        write_mp4(folder / place, shade(number, length))
        lines.append(json.dumps({"episode_index": number, "tasks": [f"task {number}"], "length": length}))
    (folder / "meta" / "episodes.jsonl").write_text("\n".join(lines) + "\n")
    return str(folder)


def lerobot_v3(folder: Path) -> str:
    """The same three: two of them in one file, and what the robot did in a column that cannot be read."""
    write_info(folder, "v3.0", "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4")
    videos = folder / "videos" / CAMERA / "chunk-000"
    write_mp4(videos / "file-000.mp4", shade(0, 6) + shade(1, 4))
    write_mp4(videos / "file-001.mp4", shade(2, 5))
    columns = {
        "episode_index": [0, 1, 2],
        "tasks": [["task 0"], ["task 1"], ["task 2"]],
        "length": [6, 4, 5],
        f"videos/{CAMERA}/chunk_index": [0, 0, 0],
        f"videos/{CAMERA}/file_index": [0, 0, 1],
        f"videos/{CAMERA}/from_timestamp": [0.0, 0.6000004, 0.0],  # a sum of rounded durations
        f"videos/{CAMERA}/to_timestamp": [0.6000004, 1.0, 0.5],
        "stats/action/mean": [[0.5] * 6] * 3,
    }
    file = folder / "meta" / "episodes" / "chunk-000" / "file-000.parquet"
    file.parent.mkdir(parents=True)
    pq.write_table(pa.table(columns), file, compression="none", use_dictionary=False)
    group = pq.ParquetFile(file).metadata.row_group(0)
    (of_action,) = (group.column(i) for i in range(group.num_columns) if "action" in group.column(i).path_in_schema)
    content = bytearray(file.read_bytes())
    start, size = of_action.data_page_offset, of_action.total_compressed_size
    content[start : start + size] = b"\xff" * size
    file.write_bytes(content)
    with pytest.raises((OSError, pa.ArrowException)):
        pq.read_table(file)
    return str(folder)


@pytest.mark.parametrize("write", [lerobot_v2, lerobot_v3])
def test_each_episode_is_its_own_frames_and_no_action_is_read(write: Callable[[Path], str], tmp_path: Path) -> None:
    listing = videos_at(write(tmp_path / "set"))
    assert listing.kind in ("LeRobot v2.1", "LeRobot v3.0")
    videos = list(listing)
    assert [video.id for video in videos] == [f"episode_{number:06d}/{CAMERA}" for number in range(3)]
    for number, (video, length) in enumerate(zip(videos, (6, 4, 5), strict=True)):
        greys = frames_of(pickle.loads(pickle.dumps(video))).mean((1, 2, 3))
        np.testing.assert_allclose(greys, shade(number, length), atol=3)
        assert video.title == f"task {number}"
        assert video.licence == "apache-2.0"
        assert video.about == {"camera": CAMERA, "robot": "so100"}
    twice, half = (
        frames_of(videos[1], Framing(fps=fps, height=24, width=32)).mean((1, 2, 3))
        for fps in (2 * NATIVE_FPS, NATIVE_FPS / 2)
    )
    np.testing.assert_allclose(twice, np.repeat(shade(1, 4), 2), atol=3)
    np.testing.assert_allclose(half, shade(1, 4)[::2], atol=3)


def test_a_file_of_lerobot_that_is_missing_or_broken_rejects_its_own_episodes(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    uri = lerobot_v3(folder)
    (folder / "videos" / CAMERA / "chunk-000" / "file-001.mp4").write_bytes(b"no video")
    first, second, broken = videos_at(uri)
    assert len(frames_of(first)) == 6
    assert len(frames_of(second)) == 4
    assert reason(broken) == "not a video"
    (folder / "videos" / CAMERA / "chunk-000" / "file-000.mp4").unlink()
    assert reason(second) == "missing"


def test_a_version_or_camera_that_is_not_known_is_one_clear_error(tmp_path: Path) -> None:
    uri = lerobot_v2(tmp_path / "set")
    with pytest.raises(ValueError, match=rf"no camera 'front'; what it has: {CAMERA}, observation\.images\.wrist"):
        videos_at(f"{uri}#front")
    info = tmp_path / "set" / "meta" / "info.json"
    info.write_text(info.read_text().replace("v2.1", "v1.6"))
    with pytest.raises(ValueError, match=r"LeRobot's version v1\.6: v2 and v3 are read"):
        videos_at(uri)


def test_a_list_of_episodes_that_is_damaged_is_one_clear_error(tmp_path: Path) -> None:
    listed = Path(lerobot_v2(tmp_path / "v2"), "meta", "episodes.jsonl")
    for text in ('{"episode_index": ', '{"length": 6}'):
        listed.write_text(text)
        with pytest.raises(ValueError, match=r"v2/meta says of the episodes is damaged"):
            list(videos_at(str(tmp_path / "v2")))
    table = Path(lerobot_v3(tmp_path / "v3"), "meta", "episodes", "chunk-000", "file-000.parquet")
    table.write_bytes(b"no Parquet")
    with pytest.raises(ValueError, match=r"v3/meta says of the episodes is damaged"):
        list(videos_at(str(tmp_path / "v3")))


def test_a_data_set_is_made_of_them_and_says_where_each_clip_is_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GENIE_CACHE_DIR", str(tmp_path / "cache"))
    episodes = [noise(number, 20, 32, 32) for number in range(8)]
    records = [
        record(episode(0, steps__observation__image=texts([picture(frame) for frame in frames]))) for frames in episodes
    ]
    broken = records[3][:500] + b"!" + records[3][501:]
    shard = b"".join([*records[:3], broken, *records[4:]])
    uri = write_rlds(tmp_path / "0.1.0", {"00000-of-00001": shard}, [9])
    settings = ["ingest.fps=3", "ingest.clip_seconds=3", "ingest.eval_share=0.3", "ingest.workers=1"]
    config = get_preset("tiny").with_overrides("data.frame_height=32", "data.frame_width=32", *settings)
    data_uri = ingest(config, uri, str(tmp_path))

    clips = {}
    for split in ("train", "eval"):
        store = VideoStore.open(f"{data_uri}/{split}")
        for number in range(store.num_episodes):
            about = store.about(number)
            begin = round(about["start_seconds"] * 3)
            record_number = int(about["source"].partition("#")[2].partition("/")[0])
            clips[record_number, begin] = store.frames(number, 0, 9)
            assert about["licence"] == "CC BY 4.0"
            assert about["camera"] == "observation/image"
    assert set(clips) == {(number, begin) for number in range(8) if number != 3 for begin in (0, 9)}
    for (number, begin), frames in clips.items():
        np.testing.assert_array_equal(frames, episodes[number][begin : begin + 9])
    report = json.loads((Path(data_uri) / "report.json").read_text())
    assert report["rejected"] == {"corrupt": 1, "truncated": 1}


def test_both_are_read_from_a_bucket(tmp_path: Path) -> None:
    bucket = fsspec.filesystem("memory")
    rlds = write_rlds(tmp_path / "rlds", {"00000-of-00001": WHOLE}, [1])
    for name, folder in (("rlds", rlds), ("lerobot", lerobot_v3(tmp_path / "lerobot"))):
        bucket.put(folder, f"/robots/{name}", recursive=True)
    try:
        (episode_0,) = videos_at("memory://robots/rlds")
        np.testing.assert_array_equal(frames_of(episode_0), noise(0))
        videos = list(videos_at("memory://robots/lerobot"))
        assert all(isinstance(video, FileVideo) for video in videos)
        np.testing.assert_allclose(frames_of(videos[1]).mean((1, 2, 3)), shade(1, 4), atol=3)
    finally:
        bucket.rm("/robots", recursive=True)
