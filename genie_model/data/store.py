"""Random access to the episodes of a data set, wherever it lies."""

from __future__ import annotations

import hashlib
import io
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np
import zstandard
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem
from numpy.typing import NDArray

from genie_model import cache
from genie_model.data.shards import CHUNK_FRAMES, Index, file_sizes, read_index


@dataclass(frozen=True)
class Clips:
    """Every (episode, start) whose frames lie within one episode; found when asked for: a list of all may not fit."""

    ends_E: NDArray[np.int64]  # how many clips lie in the episodes up to each, itself included
    stride: int

    def __len__(self) -> int:
        return int(self.ends_E[-1])

    def __getitem__(self, number: int) -> tuple[int, int]:
        if not 0 <= number < len(self):
            raise IndexError(f"clip {number} of {len(self)}")
        episode = int(np.searchsorted(self.ends_E, number, side="right"))
        return episode, (number - (int(self.ends_E[episode - 1]) if episode else 0)) * self.stride


class VideoStore:
    """A read-only data set of episodes; safe to read from several threads.

    Local shards are read in place. Remote ones (gs://, s3://, memory://, ...) are downloaded whole when first touched,
    into the cache (cache.py), if that can hold the whole data set. If not, no shard is: random clips would find few of
    the shards that a bounded cache holds, and each miss would download a thousand times what it needs. Then a clip is
    one request for its one or two chunks, and the order of clips stays free of where they lie.
    """

    def __init__(self, uri: str, index: Index, digest: str) -> None:
        self.uri = uri
        self.digest = digest
        self.meta = index["meta"]
        self._maker = "train_world" if self.meta["source"] == "tokens" else "collect"
        self._fs, self._root = url_to_fs(uri)
        self._shards = index["shards"]
        self._is_local = isinstance(self._fs, LocalFileSystem)
        self._is_cached = not self._is_local and sum(shard["bytes"] for shard in self._shards) <= cache.limit()
        self._episodes = [(i, episode) for i, shard in enumerate(index["shards"]) for episode in shard["episodes"]]
        self.episode_lengths = np.array([episode["num_frames"] for _, episode in self._episodes])

    @classmethod
    def open(cls, uri: str) -> VideoStore:
        """Raises ValueError, saying what to do, when the data set is missing, empty, unfinished or truncated."""
        index, digest = read_index(uri)
        store = cls(uri, index, digest)
        sizes = file_sizes(store._fs, store._root)
        for shard in store._shards:
            size = sizes.get(shard["name"])
            if size != shard["bytes"]:
                found = "is missing" if size is None else f"has {size} bytes, not {shard['bytes']}"
                raise ValueError(f"{uri}/{shard['name']} {found}: run {store._maker} again, it remakes only that")
        return store

    @property
    def split(self) -> str:
        return self.meta["split"]

    @property
    def num_episodes(self) -> int:
        return len(self._episodes)

    @property
    def num_shards(self) -> int:
        return len(self._shards)

    def episodes_in(self, shard: int) -> range:
        """The episodes of a shard."""
        first = sum(len(other["episodes"]) for other in self._shards[:shard])
        return range(first, first + len(self._shards[shard]["episodes"]))

    @property
    def num_frames(self) -> int:
        return int(self.episode_lengths.sum())

    def frames(self, episode: int, start: int, length: int) -> NDArray[np.uint8]:
        """uint8 (T,H,W,3), T = length; a copy. Raises ValueError outside the episode, or when the shard is damaged."""
        shard, entry = self._episodes[episode]
        if start < 0 or length < 1 or start + length > entry["num_frames"]:
            raise ValueError(
                f"episode {episode} of {self.uri} has {entry['num_frames']} frames, not {length} from {start} on"
            )
        # As if the first chunk were full: then chunk boundaries are the multiples of CHUNK_FRAMES.
        lead = CHUNK_FRAMES - entry["first_chunk"]
        first, last = (lead + start) // CHUNK_FRAMES, (lead + start + length - 1) // CHUNK_FRAMES
        ends = np.cumsum([0, *entry["chunks"]])
        raw = self._decompressed(shard, entry["offset"] + int(ends[first]), entry["chunks"][first : last + 1])
        skip = start - max(first * CHUNK_FRAMES - lead, 0)
        return np.frombuffer(raw, np.uint8).reshape(-1, *self.meta["frame_shape"])[skip : skip + length]

    def clips(self, length: int, stride: int) -> Clips:
        """Those of `length` frames. Raises ValueError when no episode is that long."""
        counts_E = np.maximum((self.episode_lengths - length) // stride + 1, 0)
        if not counts_E.any():
            raise ValueError(
                f"no episode of {self.uri} has {length} frames, the longest has {self.episode_lengths.max()}: "
                "lower data.clip_length, or raise data.steps_per_level and collect again"
            )
        return Clips(counts_E.cumsum(), stride)

    def verify(self) -> None:
        """Reads every byte. Raises ValueError naming the first shard whose checksum differs from the index."""
        for number, shard in enumerate(self._shards):
            with self._fs.open(f"{self._root}/{shard['name']}", "rb") as file:
                if _sha256(file) != shard["sha256"]:
                    raise ValueError(self._damaged(number))

    def _damaged(self, shard: int) -> str:
        return f"{self._uri_of(shard)} is damaged: delete it and run {self._maker} again, it remakes only that"

    def _decompressed(self, shard: int, offset: int, sizes: Sequence[int]) -> bytearray:
        """The chunks of these sizes that follow each other from `offset` on; each carries its own checksum."""
        cuts = list(itertools.accumulate(sizes, initial=0))
        for cached in (True, False) if self._is_cached else (False,):
            data = self._read(shard, offset, cuts[-1], cached)
            decompressor = zstandard.ZstdDecompressor()
            try:
                return bytearray().join(decompressor.decompress(data[a:b]) for a, b in itertools.pairwise(cuts))
            except zstandard.ZstdError:
                if cached:  # the copy may be what is damaged, not the shard
                    cache.forget(self._uri_of(shard), self._shards[shard]["sha256"])
        raise ValueError(self._damaged(shard))

    def _read(self, shard: int, offset: int, size: int, cached: bool) -> bytes:
        if file := self._opened(shard, cached):
            with file:
                file.seek(offset)
                data = file.read(size)
        else:
            path = f"{self._root}/{self._shards[shard]['name']}"
            data = cache.try_again(
                self._uri_of(shard), lambda: self._fs.cat_file(path, start=offset, end=offset + size)
            )
        if len(data) != size:
            raise ValueError(self._damaged(shard))
        return data

    def _opened(self, shard: int, cached: bool) -> BinaryIO | None:
        """The shard as a file of this machine; None where it has to be read over the network."""
        if self._is_local:
            return open(f"{self._root}/{self._shards[shard]['name']}", "rb")
        try:
            found = self._shards[shard]
            return cache.fetch(self._uri_of(shard), found["sha256"], found["bytes"]) if cached else None
        except cache.OtherBytesError:
            raise ValueError(self._damaged(shard)) from None

    def _uri_of(self, shard: int) -> str:
        return f"{self.uri}/{self._shards[shard]['name']}"


def _sha256(file: io.BufferedReader) -> str:
    return hashlib.file_digest(file, "sha256").hexdigest()
