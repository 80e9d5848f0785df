"""Random access to the episodes of a data set, wherever it lies."""

from __future__ import annotations

import hashlib
import io
import itertools
from pathlib import Path

import numpy as np
import zstandard
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem
from numpy.typing import NDArray

from genie_model import files
from genie_model.data.shards import CHUNK_FRAMES, Index, file_sizes, read_index


class VideoStore:
    """A read-only data set of episodes; safe to read from several threads.

    Local shards are read in place. Remote ones (gs://, s3://, memory://, ...) are downloaded whole when first touched,
    to $GENIE_CACHE_DIR (default ~/.cache/genie) under their checksum: runs and ranks share them and none is stale.
    """

    def __init__(self, uri: str, index: Index, digest: str) -> None:
        self.uri = uri
        self.digest = digest
        self.meta = index["meta"]
        self._maker = "train_world" if self.meta["source"] == "tokens" else "collect"
        self._fs, self._root = url_to_fs(uri)
        self._shards = index["shards"]
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
        data = self._read(shard, entry["offset"] + int(ends[first]), int(ends[last + 1] - ends[first]))
        cuts = ends[first : last + 2] - ends[first]
        decompressor = zstandard.ZstdDecompressor()
        try:
            raw = bytearray().join(decompressor.decompress(data[a:b]) for a, b in itertools.pairwise(cuts))
        except zstandard.ZstdError:
            raise ValueError(self._damaged(shard)) from None
        skip = start - max(first * CHUNK_FRAMES - lead, 0)
        return np.frombuffer(raw, np.uint8).reshape(-1, *self.meta["frame_shape"])[skip : skip + length]

    def clips(self, length: int, stride: int) -> NDArray[np.int32]:
        """int32 (number of clips, 2): every (episode, start) whose `length` frames lie within one episode."""
        counts = np.maximum((self.episode_lengths - length) // stride + 1, 0)
        if not counts.any():
            raise ValueError(
                f"no episode of {self.uri} has {length} frames, the longest has {self.episode_lengths.max()}: "
                "lower data.clip_length, or raise data.steps_per_level and collect again"
            )
        episode = np.repeat(np.arange(self.num_episodes), counts)
        start = (np.arange(len(episode)) - np.repeat(counts.cumsum() - counts, counts)) * stride
        return np.stack([episode, start], axis=1, dtype=np.int32, casting="same_kind")

    def verify(self) -> None:
        """Reads every byte. Raises ValueError naming the first shard whose checksum differs from the index."""
        for number, shard in enumerate(self._shards):
            with self._fs.open(f"{self._root}/{shard['name']}", "rb") as file:
                if _sha256(file) != shard["sha256"]:
                    raise ValueError(self._damaged(number))

    def _damaged(self, shard: int) -> str:
        path = f"{self.uri}/{self._shards[shard]['name']}"
        return f"{path} is damaged: delete it and run {self._maker} again, it remakes only that"

    def _read(self, shard: int, offset: int, size: int) -> bytes:
        with open(self._local_path(shard), "rb") as file:
            file.seek(offset)
            data = file.read(size)
        if len(data) != size:
            raise ValueError(self._damaged(shard))
        return data

    def _local_path(self, shard: int) -> str | Path:
        name, sha256 = self._shards[shard]["name"], self._shards[shard]["sha256"]
        if isinstance(self._fs, LocalFileSystem):
            return f"{self._root}/{name}"
        cached = files.fetch(f"{self.uri}/{name}", sha256)
        if cached is None:
            raise ValueError(self._damaged(shard))
        return cached


def _sha256(file: io.BufferedReader) -> str:
    return hashlib.file_digest(file, "sha256").hexdigest()
