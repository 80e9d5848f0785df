"""How a data set lies on disk or in a bucket: the one place that knows the format.

    <uri>/shard-00000.tar     WebDataset layout: <key>.rgb.zst or <key>.mp4 (the frames, codecs.py) and <key>.json per
                              episode: how it is cut, and about it, where it is from
    <uri>/truth-00000.npz     what a model must never see, where it is known; only truth.py opens it
    <uri>/shard-00000.json    the shard's manifest; written last: the shard is whole
    <uri>/offset-<hash>.bin   where every episode lies, and more such columns (columns.py)
    <uri>/index.json          what was collected, and its columns; written last of all: the data set is whole

A view is an index alone, of some episodes of another data set: its `origin` says where that lies. So curation copies no
frames. The origin is named relative to the view where both lie in one bucket or file system: they may move together.
"""

from __future__ import annotations

import hashlib
import io
import json
import os.path
import tarfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NotRequired

import fsspec
import numpy as np
from fsspec.core import url_to_fs
from numpy.typing import NDArray
from pydantic import TypeAdapter, ValidationError
from typing_extensions import TypedDict  # the one that pydantic reads before Python 3.12

from genie_model import cache
from genie_model.data import columns
from genie_model.data.codecs import CHUNK_FRAMES as CHUNK_FRAMES
from genie_model.data.codecs import EXTENSIONS, Codec
from genie_model.data.codecs import Episode as Episode
from genie_model.data.codecs import compress as compress
from genie_model.data.columns import File
from genie_model.files import write_atomic

if TYPE_CHECKING:
    from genie_model.data.store import VideoStore

FORMAT = 2
MAKERS = "collect or ingest"  # what an error tells to run, where it is not known which made the data set


class Chunks(TypedDict):
    """How an episode is cut; `chunks` are sizes in bytes."""

    num_frames: int
    first_chunk: int
    chunks: list[int]


class Entry(Chunks):
    offset: int  # of the first chunk in the tar
    source: int  # hashes (columns.py)
    owner: int
    digest: int


class Manifest(File):
    """A shard-00000.json; name, bytes and sha256 are the tar's."""

    format: int
    codec: Codec
    truth: NotRequired[File]
    episodes: list[Entry]


class Meta(TypedDict):
    """What was collected."""

    source: str
    split: str
    frame_shape: list[int]
    data: dict[str, Any]
    codec: NotRequired[Codec]  # "zstd" where nothing is said


class Index(TypedDict):
    format: int
    meta: Meta
    origin: str  # of a view, else empty
    episodes: int
    frames: int
    dropped: int  # episodes that were listed already
    columns: dict[str, File]


_MANIFEST, _INDEX = TypeAdapter(Manifest), TypeAdapter(Index)


def write_shard(
    uri: str,
    shard: int,
    episodes: Iterable[Episode],
    frame_shape: tuple[int, int, int],
    truth: Mapping[str, NDArray[np.generic]] | None = None,
) -> None:
    """Writes one shard; the manifest goes last. The bytes depend on the arguments alone.

    Of `episodes` one is asked for at a time; the tar is made in memory. Raises ValueError for a digest that is none.
    """
    tar_name, truth_name, manifest_name = _names(shard)
    file, entries, codecs = io.BytesIO(), [], set[Codec]()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for number, episode in enumerate(episodes):
            codecs.add(episode.codec)
            cut: Chunks = {
                "num_frames": episode.num_frames,
                "first_chunk": episode.first_chunk,
                "chunks": [len(chunk) for chunk in episode.chunks],
            }
            assert len(cut["chunks"]) == columns.num_chunks(episode.num_frames, episode.first_chunk)
            key = f"{shard:05d}-{number:05d}"
            offset = _add(tar, f"{key}.{EXTENSIONS[episode.codec]}", b"".join(episode.chunks))
            about = {**cut, "frame_shape": frame_shape, "dtype": "uint8", "about": episode.about}
            _add(tar, f"{key}.json", json.dumps(about).encode())
            entries.append(Entry(offset=offset, **cut, **hashes(episode.about)))
    if len(codecs) > 1:
        raise ValueError(f"shard {shard} has episodes of several codecs, {', '.join(sorted(codecs))}: take one")
    data = file.getvalue()
    tar_file = _file(tar_name, data)
    manifest: Manifest = {
        "format": FORMAT,
        "codec": codecs.pop() if codecs else "zstd",
        "name": tar_name,
        "bytes": tar_file["bytes"],
        "sha256": tar_file["sha256"],
        "episodes": entries,
    }
    write_atomic(f"{uri}/{tar_name}", data)
    if truth is not None:
        table = io.BytesIO()
        np.savez(table, **truth)
        manifest["truth"] = _file(truth_name, table.getvalue())
        write_atomic(f"{uri}/{truth_name}", table.getvalue())
    write_atomic(f"{uri}/{manifest_name}", json.dumps(manifest).encode())


class Hashes(TypedDict):
    source: int
    owner: int
    digest: int


def hashes(about: Mapping[str, Any]) -> Hashes:
    """What an episode is looked up by; 0 where `about` does not say. Raises ValueError for a digest that is none."""
    source, owner, digest = (str(about.get(name) or "").strip() for name in ("source", "owner", "digest"))
    return {
        "source": columns.hash64(source) if source else 0,
        "owner": columns.hash64(owner) if owner else 0,
        "digest": columns.hash_of_digest(digest) if digest else 0,
    }


def missing_shards(uri: str, num_shards: int) -> list[int]:
    """The shards of `range(num_shards)` that are not whole: no manifest, or files of another size than it says."""
    fs, root = url_to_fs(uri)
    sizes = file_sizes(fs, root)
    whole = cache.each(uri, partial(_is_whole, fs, root, sizes), range(num_shards))
    return [shard for shard, is_whole in enumerate(whole) if not is_whole]


def _is_whole(fs: fsspec.AbstractFileSystem, root: str, sizes: Mapping[str, int], shard: int) -> bool:
    tar_name, truth_name, manifest_name = _names(shard)
    if manifest_name not in sizes:
        return False
    try:
        manifest = _MANIFEST.validate_json(fs.cat_file(f"{root}/{manifest_name}"))
    except ValidationError:
        return False
    expected = {tar_name: manifest["bytes"]}
    if "truth" in manifest:
        expected[truth_name] = manifest["truth"]["bytes"]
    return manifest["format"] == FORMAT and all(sizes.get(name) == size for name, size in expected.items())


def write_index(uri: str, num_shards: int, meta: Meta, not_in: Sequence[VideoStore] = ()) -> int:
    """Declares the data set whole; how many episodes it does not list, though they lie in its shards.

    Those are the ones whose digest an earlier episode has, or one of the stores `not_in`: so no clip of the train split
    is in the eval split. Episodes without a digest are all listed. Memory is bounded (columns.first_of_each).
    """
    with columns.writing() as every:
        for shard, manifest in enumerate(cache.each(uri, partial(read_manifest, uri), range(num_shards))):
            if manifest["episodes"] and manifest["codec"] != meta.get("codec", "zstd"):
                raise ValueError(f"{uri}/{manifest['name']} is {manifest['codec']}: say so in the index's meta")
            every.add(_rows(manifest, shard))
        found = every.columns()
        keep_N = columns.first_of_each(found.digest, [store.columns.digest for store in not_in])
        keep = (keep_N[found.rows_of(range(shard, shard + 1))] for shard in range(num_shards))
        return _declare(uri, found, keep, meta)


def write_view(uri: str, store: VideoStore, keep: Iterable[NDArray[np.bool_]], meta: Meta) -> None:
    """Declares a data set of some of another store's episodes, whose frames stay where they are.

    `keep` says of each of the store's shards in turn which episodes, bool (E,). A view of a view is one of the first
    store. Opt-outs of the store's data set hold for the view. Raises ValueError where `keep` does not fit, or keeps no
    episode at all.
    """
    _declare(uri, store.columns, store.kept_rows(keep), meta, _relative(store.home, uri))


def _declare(uri: str, found: columns.Columns, keep: Iterator[NDArray[np.bool_]], meta: Meta, origin: str = "") -> int:
    with columns.writing(uri) as listed:
        columns.copy(found, listed, keep)
        if origin and not listed.episodes:
            raise ValueError(f"no episode is kept for {uri}: a data set needs one, keep more")
        dropped = 0 if origin else len(found.number) - listed.episodes
        index = Index(
            format=FORMAT, meta=meta, origin=origin, episodes=listed.episodes, frames=listed.frames, dropped=dropped,
            columns=listed.publish(uri),
        )  # fmt: skip
    write_atomic(f"{uri}/index.json", json.dumps(index).encode())
    return dropped


def read_manifest(uri: str, shard: int) -> Manifest:
    """Of a shard that is whole."""
    fs, root = url_to_fs(uri)
    return _MANIFEST.validate_json(fs.cat_file(f"{root}/{_names(shard)[2]}"))


def _rows(manifest: Manifest, shard: int) -> dict[str, Any]:
    """Of the columns."""
    entries: Sequence[Mapping[str, Any]] = manifest["episodes"]
    names = ("offset", "num_frames", "first_chunk", "source", "owner", "digest")
    return {
        "number": range(len(entries)),
        **{name: [entry[name] for entry in entries] for name in names},
        "chunk_bytes": [size for entry in entries for size in entry["chunks"]],
        "shard": [shard],
        "shard_bytes": [manifest["bytes"]],
        "shard_sha256": [bytes.fromhex(manifest["sha256"])],
    }


def _relative(origin: str, uri: str) -> str:
    """How the view at `uri` names its origin: from where it lies itself, if both are of one store of files."""
    (scheme, path), (own_scheme, own_path) = _split(origin), _split(uri)
    if scheme != own_scheme:
        return origin if scheme else os.path.abspath(path)
    return os.path.relpath(path, own_path)


def origin_of(uri: str, index: Index) -> str:
    """Where the shards of the data set at `uri` lie."""
    origin, (scheme, path) = index["origin"], _split(uri)
    if not origin:
        return uri
    return origin if "://" in origin or os.path.isabs(origin) else scheme + os.path.normpath(f"{path}/{origin}")


def _split(uri: str) -> tuple[str, str]:
    """gs:// and bucket/folder; a path has no scheme."""
    head, separator, path = uri.rpartition("://")
    return head + separator, path


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
            raise ValueError(f"the data set at {uri} is unfinished: run {MAKERS} again, it carries on") from None
        raise ValueError(f"there is no data set at {uri}: run {MAKERS} first, or correct the path") from None
    try:
        found = json.loads(data)
        if found["format"] == FORMAT:
            index = _INDEX.validate_python(found)
    except (ValueError, KeyError, TypeError):  # ValueError: not JSON, not even text, or other fields than an index has
        raise ValueError(f"{uri}/index.json is damaged: delete it and run {MAKERS} again") from None
    if found["format"] != FORMAT:
        raise ValueError(
            f"{uri} has data format {found['format']}, this version reads {FORMAT}: delete it and run {MAKERS} again"
        )
    if not index["episodes"]:
        raise ValueError(f"the data set at {uri} is empty: delete it and run {MAKERS} again with more to take from")
    return index, hashlib.sha256(data).hexdigest()


def file_sizes(fs: fsspec.AbstractFileSystem, root: str) -> dict[str, int]:
    """Name -> bytes of the files below `root`, in one listing; empty if there is no such folder."""
    fs.invalidate_cache(root)
    try:
        return {info["name"].rsplit("/", 1)[-1]: info["size"] for info in fs.ls(root, detail=True)}
    except (FileNotFoundError, NotADirectoryError):
        return {}


def shard_name(shard: int) -> str:
    return f"shard-{shard:05d}.tar"


def _names(shard: int) -> tuple[str, str, str]:
    """File names of a shard's frames, truth and manifest."""
    return shard_name(shard), f"truth-{shard:05d}.npz", f"shard-{shard:05d}.json"


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> int:
    """Appends a member (owner and time are zero, so that equal data are equal bytes); where its data start."""
    info = tarfile.TarInfo(name)
    info.size = len(data)
    offset = tar.offset + tarfile.BLOCKSIZE
    tar.addfile(info, io.BytesIO(data))
    return offset


def _file(name: str, data: bytes) -> File:
    return {"name": name, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
