"""How a data set lies on disk or in a bucket: the one place that knows the format.

    <uri>/shard-00000.tar     WebDataset layout: <key>.rgb.zst (the frames) and <key>.json per episode
    <uri>/truth-00000.npz     what a model must never see; only truth.py opens it
    <uri>/shard-00000.json    the shard's manifest; written last: the shard is whole
    <uri>/index.json          all manifests, and what was collected; written last of all: the data set is whole

An episode's frames are consecutive zstd frames ("chunks") of up to CHUNK_FRAMES uint8 RGB pictures. That is lossless,
takes a fourteenth of the raw size, costs less to make than the simulation, and a random clip decompresses one or two
chunks, not the episode. Any streaming zstd reader reads the whole member.
"""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import fsspec
import numpy as np
import zstandard
from fsspec.core import url_to_fs
from numpy.typing import NDArray
from pydantic import TypeAdapter, ValidationError
from typing_extensions import TypedDict  # the one that pydantic reads before Python 3.12

from genie_model.files import write_atomic

FORMAT = 1
CHUNK_FRAMES = 32


class File(TypedDict):
    name: str
    bytes: int
    sha256: str


class Chunks(TypedDict):
    """How an episode is cut; `chunks` are sizes in bytes."""

    num_frames: int
    first_chunk: int
    chunks: list[int]


class Entry(Chunks):
    offset: int  # of the first chunk in the tar


class Manifest(File):
    """A shard-00000.json; name, bytes and sha256 are the tar's."""

    format: int
    truth: File
    episodes: list[Entry]


class Meta(TypedDict):
    """What was collected."""

    source: str
    split: str
    frame_shape: list[int]
    data: dict[str, Any]


class Index(TypedDict):
    format: int
    meta: Meta
    shards: list[Manifest]


_MANIFEST, _INDEX = TypeAdapter(Manifest), TypeAdapter(Index)


@dataclass(frozen=True)
class Episode:
    """One episode's compressed frames: up to `first_chunk` in the first chunk, up to CHUNK_FRAMES in each later one."""

    num_frames: int
    first_chunk: int
    chunks: Sequence[bytes]


def compress(frames: NDArray[np.generic]) -> Episode:
    """A whole episode of frames (T, ...), cut at every multiple of CHUNK_FRAMES. Each chunk carries its checksum."""
    compressor = zstandard.ZstdCompressor(level=1, write_checksum=True)
    starts = range(0, len(frames), CHUNK_FRAMES)
    return Episode(
        len(frames), CHUNK_FRAMES, [compressor.compress(frames[i : i + CHUNK_FRAMES].tobytes()) for i in starts]
    )


def write_shard(
    uri: str,
    shard: int,
    episodes: Sequence[Episode],
    frame_shape: tuple[int, int, int],
    truth: Mapping[str, NDArray[np.generic]],
) -> None:
    """Writes one shard; the manifest goes last. The bytes depend on the arguments alone."""
    tar_bytes = io.BytesIO()
    entries: list[Entry] = []
    with tarfile.open(fileobj=tar_bytes, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for number, episode in enumerate(episodes):
            key = f"{shard:05d}-{number:05d}"
            entry: Chunks = {
                "num_frames": episode.num_frames,
                "first_chunk": episode.first_chunk,
                "chunks": [len(chunk) for chunk in episode.chunks],
            }
            offset = _add(tar, f"{key}.rgb.zst", b"".join(episode.chunks))
            _add(tar, f"{key}.json", json.dumps({**entry, "frame_shape": frame_shape, "dtype": "uint8"}).encode())
            entries.append({"offset": offset, **entry})
    truth_bytes = io.BytesIO()
    np.savez(truth_bytes, **truth)
    tar_name, truth_name, manifest_name = _names(shard)
    manifest: Manifest = {
        "format": FORMAT,
        "name": tar_name,
        "bytes": len(tar_bytes.getbuffer()),
        "sha256": hashlib.sha256(tar_bytes.getbuffer()).hexdigest(),
        "truth": {
            "name": truth_name,
            "bytes": len(truth_bytes.getbuffer()),
            "sha256": hashlib.sha256(truth_bytes.getbuffer()).hexdigest(),
        },
        "episodes": entries,
    }
    write_atomic(f"{uri}/{tar_name}", tar_bytes.getvalue())
    write_atomic(f"{uri}/{truth_name}", truth_bytes.getvalue())
    write_atomic(f"{uri}/{manifest_name}", json.dumps(manifest).encode())


def missing_shards(uri: str, num_shards: int) -> list[int]:
    """The shards of `range(num_shards)` that are not whole: no manifest, or files of another size than it says."""
    fs, root = url_to_fs(uri)
    sizes = file_sizes(fs, root)
    return [shard for shard in range(num_shards) if not _is_whole(fs, root, sizes, shard)]


def _is_whole(fs: fsspec.AbstractFileSystem, root: str, sizes: Mapping[str, int], shard: int) -> bool:
    tar_name, truth_name, manifest_name = _names(shard)
    if manifest_name not in sizes:
        return False
    try:
        manifest = _MANIFEST.validate_json(fs.cat_file(f"{root}/{manifest_name}"))
    except ValidationError:
        return False
    expected = (FORMAT, manifest["bytes"], manifest["truth"]["bytes"])
    return expected == (manifest["format"], sizes.get(tar_name), sizes.get(truth_name))


def write_index(uri: str, num_shards: int, meta: Meta) -> None:
    """Declares the data set whole."""
    fs, root = url_to_fs(uri)
    manifests = [json.loads(fs.cat_file(f"{root}/{_names(shard)[2]}")) for shard in range(num_shards)]
    write_atomic(f"{uri}/index.json", json.dumps({"format": FORMAT, "meta": meta, "shards": manifests}).encode())


def has_index(uri: str) -> bool:
    """Whether the data set is declared whole."""
    fs, root = url_to_fs(uri)
    return bool(fs.exists(f"{root}/index.json"))


def read_index(uri: str) -> tuple[Index, str]:
    """The index and its digest.

    Raises ValueError when the data set is missing, unfinished, damaged or of another format.
    """
    fs, root = url_to_fs(uri)
    try:
        data = fs.cat_file(f"{root}/index.json")
    except (FileNotFoundError, NotADirectoryError):
        present = file_sizes(fs, root)
        if any(fs.exists(f"{root}/{split}/index.json") for split in ("train", "eval")):
            raise ValueError(f"{uri} holds a train and an eval split: open {uri}/train or {uri}/eval") from None
        if any(name.startswith("shard-") for name in present):
            raise ValueError(f"the data set at {uri} is unfinished: run collect again, it carries on") from None
        raise ValueError(f"there is no data set at {uri}: run collect first, or correct the path") from None
    try:
        found = json.loads(data)
        if found["format"] == FORMAT:
            index = _INDEX.validate_python(found)
    except (ValueError, KeyError, TypeError):  # ValueError: not JSON, not even text, or other fields than an index has
        raise ValueError(f"{uri}/index.json is damaged: delete it and run collect again") from None
    if found["format"] != FORMAT:
        raise ValueError(
            f"{uri} has data format {found['format']}, this version reads {FORMAT}: delete it and run collect again"
        )
    if not any(shard["episodes"] for shard in index["shards"]):
        raise ValueError(f"the data set at {uri} is empty: delete it and run collect again with more levels or steps")
    return index, hashlib.sha256(data).hexdigest()


def file_sizes(fs: fsspec.AbstractFileSystem, root: str) -> dict[str, int]:
    """Name -> bytes of the files below `root`, in one listing; empty if there is no such folder."""
    fs.invalidate_cache(root)
    try:
        return {info["name"].rsplit("/", 1)[-1]: info["size"] for info in fs.ls(root, detail=True)}
    except (FileNotFoundError, NotADirectoryError):
        return {}


def _names(shard: int) -> tuple[str, str, str]:
    """File names of a shard's frames, truth and manifest."""
    return f"shard-{shard:05d}.tar", f"truth-{shard:05d}.npz", f"shard-{shard:05d}.json"


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> int:
    """Appends a member (owner and time are zero, so that equal data are equal bytes); where its data start."""
    info = tarfile.TarInfo(name)
    info.size = len(data)
    offset = tar.offset + tarfile.BLOCKSIZE
    tar.addfile(info, io.BytesIO(data))
    return offset
