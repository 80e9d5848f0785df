"""The columns of a data set's index: plain little-endian arrays in files that are mapped into memory, not read.

    <uri>/offset-0123456789abcdef.bin     one per column, named by its bytes: an index finds its own, or none

A clip of 160 frames takes 50 bytes and 4 for each of its 5 chunks: 55 million take 3.9 GB of disk. Opening them costs
what opening one costs (3 ms), since the system loads a page when it is touched, and lets go of it when memory runs
short. Of 55 million in shards of 256 it took 0.7 s to count the clips that start at any frame, 19 us to find one of
these, and 400 MB at most to write the index, 3 minutes after the manifests were read (`python -m benchmarks.data --only
index` has the same of 4 million). A remote index is downloaded to the cache (cache.py), or, where that has no room,
read into memory.

Sources, owners and digests are looked up by 64-bit hashes. That any two of 55 million distinct clips share one has a
probability of 55e6^2 / 2^65 = 8e-5; then one clip too many is taken for a duplicate.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from filelock import FileLock
from fsspec.core import url_to_fs
from numpy.typing import NDArray
from typing_extensions import TypedDict  # the one that pydantic reads before Python 3.12

from genie_model import cache, files
from genie_model.data.codecs import CHUNK_FRAMES

_SORTED = 1 << 22  # hashes that are sorted at a time
_SHA256 = re.compile("[0-9a-f]{64}")
_BLOCK = 1 << 20  # rows that are looked at at a time
_EPISODE = {
    "number": "<u4",
    "offset": "<i8",
    "num_frames": "<i4",
    "first_chunk": "<i2",
    "source": "<u8",
    "owner": "<u8",
    "digest": "<u8",
}
_SHARD = {"shard": "<u4", "shard_bytes": "<i8", "shard_sha256": "V32"}
_DTYPES = {**_EPISODE, "chunk": "<i8", "chunk_bytes": "<u4", **_SHARD, "shard_end": "<i8"}


class File(TypedDict):
    name: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Columns:
    """Of a data set: a row of the first ones is an episode, of `chunk_bytes` a chunk, of the last ones a shard."""

    number: NDArray[np.uint32]  # of the episode in its shard's tar
    offset: NDArray[np.int64]  # of its first chunk in the tar
    num_frames: NDArray[np.int32]
    first_chunk: NDArray[np.int16]
    source: NDArray[np.uint64]  # hashes; 0 where nothing is known
    owner: NDArray[np.uint64]
    digest: NDArray[np.uint64]
    chunk: NDArray[np.int64]  # the row of its first chunk
    chunk_bytes: NDArray[np.uint32]
    shard: NDArray[np.uint32]  # its number: 17 for shard-00017.tar
    shard_bytes: NDArray[np.int64]
    shard_sha256: NDArray[np.void]  # 32 bytes
    shard_end: NDArray[np.int64]  # the row after its last episode

    @property
    def num_shards(self) -> int:
        return len(self.shard)

    def rows_of(self, shards: range) -> slice:
        """The episodes of the shards in these rows."""
        begin, end = (int(self.shard_end[shard - 1]) if shard else 0 for shard in (shards.start, shards.stop))
        return slice(begin, end)

    def chunks_of(self, row: int) -> NDArray[np.uint32]:
        """The sizes of the episode's chunks in bytes."""
        first = int(self.chunk[row])
        return self.chunk_bytes[first : first + int(num_chunks(self.num_frames[row], self.first_chunk[row]))]


def num_chunks(num_frames: Any, first_chunk: Any) -> Any:
    """How many chunks hold an episode; numbers or arrays."""
    return -(-(CHUNK_FRAMES - first_chunk + num_frames) // CHUNK_FRAMES)


def hash64(text: str) -> int:
    """Of a source or an owner; never 0."""
    return hash_of_digest(hashlib.sha256(text.encode()).hexdigest())


def hash_of_digest(digest: str) -> int:
    """Of a SHA-256 in hex; never 0. Raises ValueError for what is none."""
    if not _SHA256.fullmatch(digest):
        raise ValueError(f"digest {digest}: a SHA-256 is 64 hex digits, in lower case")
    return int(digest[:16], 16) or 1


class Writer:
    """Columns that grow a shard at a time, in `folder`; `columns` maps what is there."""

    def __init__(self, folder: Path) -> None:
        self._paths = {name: folder / f"{name}.tmp" for name in _DTYPES}
        self._files = {name: path.open("wb") for name, path in self._paths.items()}
        self._hashes = {name: hashlib.sha256() for name in _DTYPES}
        self.episodes = self.frames = self._chunks = 0

    def add(self, shard: dict[str, Any]) -> None:
        """A column's rows by its name, as in Columns; "chunk" and "shard_end" follow from the others."""
        counts_E = num_chunks(np.asarray(shard["num_frames"], np.int32), np.asarray(shard["first_chunk"], np.int32))
        chunk_E = self._chunks + np.cumsum(counts_E) - counts_E
        self.episodes += len(counts_E)
        self.frames += int(np.sum(shard["num_frames"]))
        self._chunks += len(shard["chunk_bytes"])
        for name, column in {**shard, "chunk": chunk_E, "shard_end": [self.episodes]}.items():
            data = np.asarray(column, _DTYPES[name]).tobytes()
            self._files[name].write(data)
            self._hashes[name].update(data)

    def columns(self) -> Columns:
        for file in self._files.values():
            file.flush()
        return Columns(**{name: _mapped(path, _DTYPES[name]) for name, path in self._paths.items()})

    def close(self) -> None:
        for file in self._files.values():
            file.close()

    def publish(self, uri: str) -> dict[str, File]:
        """Names the files by their bytes, in the folder at `uri`; which they are."""
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())  # the index that names them is on the disk no sooner
            file.close()
        fs, root = url_to_fs(uri)
        found: dict[str, File] = {}
        for name, path in self._paths.items():
            digest = self._hashes[name].hexdigest()
            found[name] = {"name": f"{name}-{digest[:16]}.bin", "bytes": path.stat().st_size, "sha256": digest}
            target = f"{root}/{found[name]['name']}"
            if files.is_local(uri):
                path.replace(target)
            else:
                cache.try_again(target, partial(fs.put_file, str(path), target))
        return found


@contextlib.contextmanager
def writing(uri: str = "") -> Iterator[Writer]:
    """Columns that shall lie at `uri`; without one they are for the time being. An OSError says when a disk is full."""
    with TemporaryDirectory(ignore_cleanup_errors=True) as folder, contextlib.ExitStack() as stack:
        own = Path(folder)
        if uri and files.is_local(uri):
            # Where they shall lie: a file is renamed within a disk. What a killed process left there is overwritten.
            own = Path(url_to_fs(uri)[1], ".columns").absolute()
            lock = files.cache_dir() / "locks" / f"columns-{hash64(str(own)):016x}"
            lock.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(FileLock(lock))  # two at a time would write into each other's files
        try:
            own.mkdir(parents=True, exist_ok=True)
            writer = Writer(own)
            try:
                yield writer
            finally:
                writer.close()
                shutil.rmtree(own)
        except OSError as error:
            raise files.explained(error, str(own)) from None


def copy(columns: Columns, writer: Writer, keep: Iterator[NDArray[np.bool_]]) -> None:
    """Writes the episodes of which `keep` says so, an array for each shard in turn."""
    for shard, keep_E in zip(range(columns.num_shards), keep, strict=True):
        rows = columns.rows_of(range(shard, shard + 1))
        counts_E = num_chunks(columns.num_frames[rows], columns.first_chunk[rows])
        first = int(columns.chunk[rows.start]) if len(counts_E) else 0
        sizes = columns.chunk_bytes[first : first + int(counts_E.sum())]
        writer.add(
            {
                **{name: getattr(columns, name)[rows][keep_E] for name in _EPISODE},
                **{name: getattr(columns, name)[shard : shard + 1] for name in _SHARD},
                "chunk_bytes": sizes[keep_E.repeat(counts_E)],
            }
        )


def open_columns(uri: str, found: dict[str, File]) -> Columns:
    """Those at `uri`. Raises ValueError when one is missing or damaged."""
    return Columns(**{name: _opened(f"{uri}/{found[name]['name']}", found[name], _DTYPES[name]) for name in _DTYPES})


def first_of_each(digest_N: NDArray[np.uint64], others: Sequence[NDArray[np.uint64]] = ()) -> NDArray[np.bool_]:
    """Which rows hold a digest for the first time, here and in `others`; rows that hold none (0) are all kept.

    Takes a byte a row, and sorts a part of the hashes at a time.
    """
    keep_N = np.ones(len(digest_N), bool)
    parts = -(-len(digest_N) // _SORTED)
    for part in range(parts):
        rows = _rows_of_part(digest_N, part, parts)
        values = digest_N[rows]
        _, firsts = np.unique(values, return_index=True)
        is_first = np.zeros(len(rows), bool)
        is_first[firsts] = True
        for other in others:
            is_first &= ~np.isin(values, other[_rows_of_part(other, part, parts)])
        keep_N[rows] = is_first
    return keep_N


def is_among(column_N: NDArray[np.uint64], hashes: Sequence[int]) -> NDArray[np.bool_]:
    """Rows with one of these hashes; a byte a row."""
    wanted = np.array(sorted(hashes), np.uint64)
    blocks = range(0, len(column_N), _BLOCK)
    return np.concatenate([np.empty(0, bool), *(np.isin(column_N[i : i + _BLOCK], wanted) for i in blocks)])


def _rows_of_part(digest_N: NDArray[np.uint64], part: int, parts: int) -> NDArray[np.int64]:
    found = [np.empty(0, np.int64)]
    for begin in range(0, len(digest_N), _BLOCK):
        block = digest_N[begin : begin + _BLOCK]
        found.append(begin + np.flatnonzero((block % np.uint64(parts) == part) & (block != 0)))
    return np.concatenate(found)


def _opened(uri: str, file: File, dtype: str) -> NDArray[Any]:
    fs, path = url_to_fs(uri)
    try:
        if files.is_local(uri):
            column = _mapped(Path(path), dtype)
        elif (cached := cache.fetch(uri, file["sha256"], file["bytes"])) is not None:
            with cached:
                column = _mapped(Path(cached.name), dtype)
        else:
            data: bytes = cache.try_again(uri, lambda: fs.cat_file(path))
            if hashlib.sha256(data).hexdigest() != file["sha256"]:
                raise cache.OtherBytesError(uri)
            column = np.frombuffer(data, dtype)
    except (FileNotFoundError, cache.OtherBytesError):
        column = np.empty(0, dtype)
    if column.nbytes != file["bytes"]:
        raise ValueError(f"{uri} is missing or damaged")
    return column


def _mapped(path: Path, dtype: str) -> NDArray[Any]:
    size = path.stat().st_size
    count = size // np.dtype(dtype).itemsize
    return np.asarray(np.memmap(path, dtype, "r", shape=count)) if count else np.empty(0, dtype)
