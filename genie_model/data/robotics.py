"""Robot episodes as video alone (section 3, Robotics): RLDS as TFDS writes it, and LeRobot's v2 and v3.

No TensorFlow is needed. What a robot did lies in the same records and folders, and is never read: of an RLDS record
the parts beside the camera's pictures are stepped over by their length, and of LeRobot's Parquet files none but
meta/episodes is opened, and there only the columns that say where an episode's video is.

One camera of each episode is taken, so that no scene is both trained on and held out: the one named `image`, as RT-1's,
else the first. Another one is asked for behind a `#`: gs://bucket/droid/1.0.0#wrist_image_left.
"""

from __future__ import annotations

import functools
import io
import itertools
import json
import re
import struct
from array import array
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import numpy as np
from fsspec.core import url_to_fs
from numpy.typing import NDArray
from PIL import Image

from genie_model import cache, files
from genie_model.data.sources import FileVideo, Framing, Listing, Note, Rejected, Video, no_note, version_of

_SHARD = re.compile(r"(.+-([^-]+)\.tfrecord)-\d{5}-of-(\d{5})")  # what comes before the number, split, shards
_HEAD = 12  # bytes of a record before its payload: the length, and its checksum
_MAX_RECORD = 1 << 31  # bytes: protobuf's own limit
_SHARDS_AT_ONCE = 16
_LEN = 2  # protobuf's wire type of what brings its length
_EPISODE_TEXTS = ["episode_index", "tasks", "length"]


def episodes_at(source_uri: str) -> Listing | None:
    """The episodes of an RLDS or LeRobot folder, or None where there is neither.

    Raises ValueError for a version or file format that is not known, and where there is no such camera.
    """
    uri, _, camera = source_uri.partition("#")
    uri = uri.rstrip("/")
    if files.exists(f"{uri}/meta/info.json"):
        return _lerobot(uri, camera)
    if files.exists(f"{uri}/features.json") and files.exists(f"{uri}/dataset_info.json"):
        return _rlds(uri, camera)
    fs, root = url_to_fs(uri)
    if below := fs.glob(f"{root}/*/features.json") if fs.isdir(root) else []:
        versions = ", ".join(sorted(PurePosixPath(path).parent.name for path in below))
        raise ValueError(f"{uri} holds versions of an RLDS data set ({versions}): name one of these folders")
    return None


def _camera(cameras: list[str], wanted: str, uri: str) -> str:
    """Of cameras by full name, as observation/image or observation.images.top, the wanted one or the default."""
    fits = [name for name in cameras if name == wanted or re.split(r"[./]", name)[-1] == (wanted or "image")]
    if fits or (cameras and not wanted):
        return [*fits, *cameras][0]
    asked = f"no camera {wanted!r}" if wanted else "no colour camera"
    raise ValueError(f"{uri} has {asked}; what it has: {', '.join(cameras) or 'none as images or video'}")


def _json(uri: str) -> Any:
    try:
        found = json.loads(files.read(uri))
    except ValueError as error:
        raise ValueError(f"{uri} is broken: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{uri} is broken: it holds no JSON object")
    return found


def _files_in(uri: str) -> dict[str, Mapping[str, Any]]:
    """What a listing tells of each file in the folder, by name: one request for them all."""
    fs, path = url_to_fs(uri)
    return {PurePosixPath(info["name"]).name: info for info in fs.ls(path, detail=True)} if fs.exists(path) else {}


# --- RLDS: an episode is a record, its steps are lists in one tf.train.Example ---


@dataclass(frozen=True)
class RldsEpisode(Video):
    """A record of a TFRecord shard. RLDS names no rate: every step is a frame, so ingest.fps is to be the robot's."""

    offset: int = 0
    size: int = 0  # of the whole record, bytes
    feature: str = ""

    def frames(self, framing: Framing, note: Note = no_note) -> Iterator[NDArray[np.uint8]]:
        fs, path = url_to_fs(self.uri.partition("#")[0])
        try:
            end = self.offset + self.size
            record = cache.try_again(self.uri, lambda: fs.cat_file(path, self.offset, end)) if self.size else b""
        except (FileNotFoundError, PermissionError) as error:
            raise Rejected("missing", f"{type(error).__name__}: {error}") from None
        note("every step is a frame: RLDS names no rate")
        steps = _steps(_payload(record), self.feature)
        if not steps:
            raise Rejected("no picture", f"the record has no {self.feature}")
        for number, step in enumerate(steps):
            yield framing.fit(_decoded(step, framing, number))


def _rlds(uri: str, camera: str) -> Listing:
    info = _json(f"{uri}/dataset_info.json")
    if (kind := info.get("fileFormat", "tfrecord")) != "tfrecord":
        raise ValueError(f"{uri} holds {kind} files: only RLDS in TFRecord files is read; convert it by TFDS")
    cameras = [name for name in _colour_images(_json(f"{uri}/features.json"), "") if name.startswith("steps/")]
    feature = _camera(cameras, camera, uri)
    texts = {
        "title": str(info.get("name", "")).replace("_", " "),
        "description": str(info.get("description", "")),
        "licence": str((info.get("redistributionInfo") or {}).get("license", "")),
    }
    lengths = {split["name"]: [int(n) for n in split.get("shardLengths", [])] for split in info.get("splits", [])}
    return Listing(uri, "RLDS", functools.partial(_of_rlds, uri, feature, texts, lengths))


def _colour_images(node: Mapping[str, Any], path: str) -> Iterator[str]:
    """Names of the features with three (or unsaid) channels, as TFDS flattens them: steps/observation/image."""
    if "image" in node:
        channels = node["image"].get("shape", {}).get("dimensions", [-1])[-1]
        if int(channels) in (-1, 3):
            yield path
    if "sequence" in node:
        yield from _colour_images(node["sequence"]["feature"], path)
    for name, child in node.get("featuresDict", {}).get("features", {}).items():
        yield from _colour_images(child, f"{path}/{name}".lstrip("/"))


def _of_rlds(
    uri: str, feature: str, texts: Mapping[str, str], lengths: Mapping[str, list[int]]
) -> Iterator[RldsEpisode]:
    """All records of all shards, those too that dataset_info.json promises and that are not there: to be rejected."""
    present, camera = _files_in(uri), feature.removeprefix("steps/")
    stems = sorted({(match[1], match[2], int(match[3])) for name in present if (match := _SHARD.fullmatch(name))})
    shards = [(f"{stem}-{i:05d}-of-{total:05d}", split, i) for stem, split, total in stems for i in range(total)]
    versions = [version_of(present[name]) if name in present else "missing" for name, _, _ in shards]
    pool = ThreadPoolExecutor(_SHARDS_AT_ONCE)
    try:
        scanned = pool.map(_record_sizes, [f"{uri}/{name}" for name, _, _ in shards], versions)
        for (name, split, index), version, sizes in zip(shards, versions, scanned, strict=True):
            lost = sum(lengths.get(split, [])[index : index + 1]) - len(sizes)
            offset = 0
            for number, size in enumerate(itertools.chain(sizes, itertools.repeat(0, max(lost, 0)))):
                yield RldsEpisode(
                    f"{name}#{number:05d}/{camera}",
                    f"{uri}/{name}#{number:05d}",
                    version=version,
                    about={"camera": camera, "split": split},
                    offset=offset,
                    size=size,
                    feature=feature,
                    **texts,
                )
                offset += size
    finally:
        pool.shutdown(cancel_futures=True)


@functools.cache  # 8 bytes a record: a source is listed several times, and each head is a request to a bucket
def _record_sizes(uri: str, version: str) -> array[int]:
    """Bytes of every record, by their heads alone; a broken one hides those behind it, and is the last."""
    if version == "missing":
        return array("Q", [_HEAD])
    fs, path = url_to_fs(uri)
    sizes, offset, end = array("Q"), 0, fs.size(path)
    while offset < end:
        length = _length(cache.try_again(uri, functools.partial(fs.cat_file, path, offset, min(offset + _HEAD, end))))
        sizes.append(_HEAD if length is None else length + 16)
        offset = end if length is None else offset + sizes[-1]
    return sizes


def _length(head: bytes) -> int | None:
    """The payload's, as a record's head says; None where it is broken."""
    if len(head) < _HEAD or _masked_crc(head[:8]) != struct.unpack("<I", head[8:12])[0]:
        return None
    length = int(struct.unpack("<Q", head[:8])[0])
    return length if length < _MAX_RECORD else None


def _payload(record: bytes) -> memoryview:
    """Raises Rejected where a checksum is wrong, or something is missing."""
    if len(record) < _HEAD:
        raise Rejected("truncated", "the shard ends before this record")
    if (length := _length(record)) is None:
        raise Rejected("corrupt", "the record's length is broken")
    if len(record) < length + 16:
        raise Rejected("truncated", f"{len(record):,} bytes of a record of {length + 16:,}")
    if _masked_crc(record[_HEAD:-4]) != struct.unpack("<I", record[-4:])[0]:
        raise Rejected("corrupt", "the record fails its checksum")
    return memoryview(record)[_HEAD:-4]


def _masked_crc(data: bytes) -> int:
    import google_crc32c  # the video extra's

    crc = int(google_crc32c.value(data))
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def _steps(example: memoryview, feature: str) -> list[memoryview]:
    """The byte strings of one feature of a tf.train.Example; no other one's content is looked at."""
    try:
        for entry in (e for features in _parts(example, 1) for e in _parts(features, 1)):  # of a map: key 1, value 2
            if [bytes(key) for key in _parts(entry, 1)] == [feature.encode()]:
                return [step for value in _parts(entry, 2) for texts in _parts(value, 1) for step in _parts(texts, 1)]
    except (IndexError, ValueError) as error:
        raise Rejected("corrupt", f"no tf.train.Example: {error}") from None
    return []


def _parts(message: memoryview, wanted: int) -> Iterator[memoryview]:
    """The fields of that number of a protobuf message. Raises ValueError or IndexError where it is none."""
    at = 0
    while at < len(message):
        tag, at = _varint(message, at)
        if (kind := tag & 7) == _LEN:
            length, at = _varint(message, at)
            if at + length > len(message):
                raise ValueError("a field is longer than its message")
            if tag >> 3 == wanted:
                yield message[at : at + length]
            at += length
        elif kind == 0:
            _, at = _varint(message, at)
        elif kind in (1, 5):
            at += 8 if kind == 1 else 4
        else:
            raise ValueError(f"wire type {kind}")


def _varint(message: memoryview, at: int) -> tuple[int, int]:
    """The number that begins there, and where it ends."""
    value = shift = 0
    while True:
        byte = message[at]
        value, shift, at = value | (byte & 0x7F) << shift, shift + 7, at + 1
        if byte < 0x80:
            return value, at


def _decoded(step: memoryview, framing: Framing, number: int) -> NDArray[np.uint8]:
    """A step's JPEG or PNG. Raises Rejected."""
    try:
        image = Image.open(io.BytesIO(step), formats=("JPEG", "PNG"))
        framing.check_size(image.height, image.width)
        return np.asarray(image.convert("RGB"))
    except (OSError, SyntaxError, ValueError, struct.error, Image.DecompressionBombError) as error:
        raise Rejected("corrupt", f"step {number}: {error}") from None


# --- LeRobot: an episode is a video file (v2), or a range of one (v3) ---


def _lerobot(uri: str, camera: str) -> Listing:
    info = _json(f"{uri}/meta/info.json")
    version = str(info.get("codebase_version", ""))
    if not re.match(r"v[23]\.", version):
        raise ValueError(f"{uri} is of LeRobot's version {version or 'unknown'}: v2 and v3 are read; convert it")
    feature = _camera(
        [name for name, about in info.get("features", {}).items() if _is_colour_video(about)], camera, uri
    )
    return Listing(uri, f"LeRobot {version}", functools.partial(_of_lerobot, uri, info, feature))


def _is_colour_video(feature: Mapping[str, Any]) -> bool:
    told = {**(feature.get("video_info") or {}), **(feature.get("info") or {})}
    return feature.get("dtype") == "video" and not (told.get("is_depth_map") or told.get("video.is_depth_map"))


def _of_lerobot(uri: str, info: Mapping[str, Any], camera: str) -> Iterator[Video]:
    try:
        yield from _episodes(uri, info, camera)
    except (LookupError, TypeError, ValueError) as error:
        raise ValueError(f"what {uri}/meta says of the episodes is damaged: {type(error).__name__}: {error}") from None


def _episodes(uri: str, info: Mapping[str, Any], camera: str) -> Iterator[FileVideo]:
    licence, fps = _licence(f"{uri}/README.md"), float(info["fps"])
    about = {"camera": camera, "robot": str(info.get("robot_type") or "unknown")}
    is_v2 = info["codebase_version"].startswith("v2.")
    folder, present = "", dict[str, Mapping[str, Any]]()
    for row in _v2_episodes(uri) if is_v2 else _v3_episodes(uri, camera):
        number = int(row["episode_index"])
        place = {"episode_chunk": number // int(info.get("chunks_size", 1000)), "episode_index": number}
        if not is_v2:
            place = {name: int(row[f"videos/{camera}/{name}"]) for name in ("chunk_index", "file_index")}
        file = f"{uri}/{info['video_path'].format(video_key=camera, **place)}"
        if file.rpartition("/")[0] != folder:  # those of one folder follow each other
            folder = file.rpartition("/")[0]
            present = _files_in(folder)
        found = present.get(file.rpartition("/")[2])
        version = version_of(found) if found else "missing"
        known: dict[str, Any] = {"licence": licence, "about": about, "title": "; ".join(row.get("tasks") or [])}
        name = f"episode_{number:06d}/{camera}"
        if is_v2:
            yield FileVideo(name, file, version=version, **known)
        else:
            # Half a frame earlier: the times are sums of rounded ones, and each frame is to be on one side.
            start = float(row[f"videos/{camera}/from_timestamp"]) - 0.5 / fps
            stop = start + int(row["length"]) / fps
            of_range = f"{version} {start:.3f}-{stop:.3f}"
            yield FileVideo(name, file, version=of_range, start=max(start, 0.0), stop=stop, **known)


def _v2_episodes(uri: str) -> Iterator[Mapping[str, Any]]:
    fs, path = url_to_fs(f"{uri}/meta/episodes.jsonl")
    with fs.open(path, "rt", encoding="utf-8") as file:
        yield from (json.loads(line) for line in file if line.strip())


def _v3_episodes(uri: str, camera: str) -> Iterator[Mapping[str, Any]]:
    import pyarrow.parquet as pq  # the video extra's

    places = [f"videos/{camera}/{name}" for name in ("chunk_index", "file_index", "from_timestamp")]
    fs, root = url_to_fs(uri)
    for path in sorted(fs.glob(f"{root}/meta/episodes/*/*.parquet")):
        with fs.open(path, "rb") as file:
            for batch in pq.ParquetFile(file).iter_batches(1024, columns=_EPISODE_TEXTS + places):
                yield from batch.to_pylist()


def _licence(uri: str) -> str:
    """As the head of a data set's card says it."""
    text = files.read(uri).decode("utf-8", "replace") if files.exists(uri) else ""
    found = re.match(r"---\n(?:.*\n)*?license: *(\S+)", text)
    return found[1] if found else ""
