"""Random access to the episodes of a data set, wherever it lies."""

from __future__ import annotations

import hashlib
import itertools
import json
import tarfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, BinaryIO, Literal, Self, TypeVar

import numpy as np
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem
from numpy.typing import NDArray

from genie_model import cache
from genie_model.data.codecs import CHUNK_FRAMES, DamagedChunkError, decompress
from genie_model.data.columns import open_columns
from genie_model.data.opt_out import OptOuts, data_set_of
from genie_model.data.shards import Index, file_sizes, origin_of, read_index, shard_name

_LISTED = 10_000  # shards; a larger data set is not checked file by file when it is opened, but as it is read
_BLOCK = 1024  # shards whose episodes are counted at a time
_MAKERS = {"tokens": "train_world", "video": "ingest"}  # of a data set whose source this is; of all others: collect
_Number = TypeVar("_Number", bound=np.generic)


@dataclass(frozen=True)
class Clips:
    """Every (episode, start) whose frames lie within one episode; found when asked for: a list of all may not fit."""

    store: VideoStore
    length: int
    stride: int
    ends_S: NDArray[np.int64]  # how many clips lie in the shards up to each, itself included

    def __len__(self) -> int:
        return int(self.ends_S[-1])

    def __getitem__(self, number: int) -> tuple[int, int]:
        if not 0 <= number < len(self):
            raise IndexError(f"clip {number} of {len(self)}")
        shard = int(np.searchsorted(self.ends_S, number, side="right"))
        if shard:
            number -= int(self.ends_S[shard - 1])
        ends_E = self.counts(range(shard, shard + 1)).cumsum()
        episode = int(np.searchsorted(ends_E, number, side="right"))
        start = (number - (int(ends_E[episode - 1]) if episode else 0)) * self.stride
        return self.store.episodes_in(shard)[episode], start

    def counts(self, shards: range) -> NDArray[np.int64]:
        """How many clips each episode of these shards has."""
        lengths_E = self.store.lengths_in(shards).astype(np.int64)
        return np.maximum((lengths_E - self.length) // self.stride + 1, 0)


class VideoStore:
    """A read-only data set of episodes; safe to read from several threads.

    Local shards are read in place. Remote ones (gs://, s3://, memory://, ...) are downloaded whole when first touched,
    into the cache (cache.py), if that can hold the whole data set. If not, no shard is: random clips would find few of
    the shards that a bounded cache holds, and each miss would download a thousand times what it needs. Then a clip is
    one request for its one or two chunks, and the order of clips stays free of where they lie.

    What is kept for each episode lies in mapped files (columns.py), what is kept in memory is two numbers per shard; a
    list of opt-outs that hides something costs a byte per episode.
    """

    def __init__(self, uri: str, index: Index, digest: str) -> None:
        self.uri = uri
        self.home = origin_of(uri, index)  # where the shards lie
        self.meta = index["meta"]
        self._maker = _MAKERS.get(self.meta["source"], "collect")
        self.codec = self.meta.get("codec", "zstd")
        self._index = index
        try:
            self.columns = open_columns(uri, index["columns"])
        except ValueError as error:
            raise ValueError(self._damaged_index(error)) from None
        self._fs, self._root = url_to_fs(self.home)
        self._is_local = isinstance(self._fs, LocalFileSystem)
        self._is_cached = not self._is_local and int(self.columns.shard_bytes.sum()) <= cache.limit()
        split = self.meta["split"]
        opt_outs = OptOuts.read(*{data_set_of(uri, split), data_set_of(self.home, split)})
        self._hidden_N = opt_outs.hidden(self.columns)
        self.digest, self.num_frames, self._ends_S = digest, index["frames"], self.columns.shard_end
        if (hidden_N := self._hidden_N) is not None:
            self.digest = hashlib.sha256(digest.encode() + np.packbits(hidden_N).tobytes()).hexdigest()
            self.num_frames = int(self.episode_lengths.sum())
            self._ends_S = _ends(self.columns.shard_end, lambda shards: ~hidden_N[self.columns.rows_of(shards)])

    @classmethod
    def open(cls, uri: str) -> Self:
        """Raises ValueError, saying what to do, when the data set is missing, empty, unfinished or truncated, or when
        all of it is opted out."""
        store = cls(uri, *read_index(uri))
        if not store.num_episodes:
            raise ValueError(f"all of {uri} is opted out: take another data set")
        if store.num_shards <= _LISTED:
            sizes = file_sizes(store._fs, store._root)
            for shard, expected in enumerate(store.columns.shard_bytes.tolist()):
                size = sizes.get(shard_name(int(store.columns.shard[shard])))
                if size != expected:
                    found = "is missing" if size is None else f"has {size} bytes, not {expected}"
                    raise ValueError(f"{store._uri_of(shard)} {found}: run {store._maker} again, it remakes only that")
        return store

    def check_frames(self, shape: Sequence[int], said: str) -> None:
        """Raises ValueError where its frames are not of that shape (H, W, C), which is what `said` says."""
        has, wanted = ("x".join(map(str, size[1::-1])) for size in (self.meta["frame_shape"], shape))
        if has != wanted:
            raise ValueError(f"{self.uri} has frames of {has}, and {said} {wanted}: name a data set of that size")

    @property
    def split(self) -> str:
        return self.meta["split"]

    @property
    def num_episodes(self) -> int:
        return int(self._ends_S[-1])

    @property
    def num_shards(self) -> int:
        return self.columns.num_shards

    @property
    def episode_lengths(self) -> NDArray[np.int32]:
        """Frames of every episode, (E,); mapped, not in memory, where nothing is opted out."""
        return self._seen(self.columns.num_frames, slice(None))

    def episodes_in(self, shard: int) -> range:
        """The episodes of a shard."""
        return range(int(self._ends_S[shard - 1]) if shard else 0, int(self._ends_S[shard]))

    def lengths_in(self, shards: range) -> NDArray[np.int32]:
        """Frames of the episodes of these shards, in order."""
        return self._seen(self.columns.num_frames, self.columns.rows_of(shards))

    def length_of(self, episode: int) -> int:
        """Its frames; `episode_lengths` would go over all episodes, where some are opted out."""
        return int(self.columns.num_frames[self._place(episode)[1]])

    def hashes_in(self, name: Literal["source", "owner", "digest"], shards: range) -> NDArray[np.uint64]:
        """The hashes (columns.py) of what the episodes of these shards have there, in order; 0: nothing."""
        return self._seen(getattr(self.columns, name), self.columns.rows_of(shards))

    def frames(self, episode: int, start: int, length: int) -> NDArray[np.uint8]:
        """uint8 (T,H,W,3), T = length; a copy. Raises ValueError outside the episode, or when the shard is damaged."""
        shard, row = self._place(episode)
        num_frames, first_chunk = int(self.columns.num_frames[row]), int(self.columns.first_chunk[row])
        if start < 0 or length < 1 or start + length > num_frames:
            raise ValueError(f"episode {episode} of {self.uri} has {num_frames} frames, not {length} from {start} on")
        # As if the first chunk were full: then chunk boundaries are the multiples of CHUNK_FRAMES.
        lead = CHUNK_FRAMES - first_chunk
        first, last = (lead + start) // CHUNK_FRAMES, (lead + start + length - 1) // CHUNK_FRAMES
        sizes = self.columns.chunks_of(row).tolist()
        raw = self._decompressed(shard, int(self.columns.offset[row]) + sum(sizes[:first]), sizes[first : last + 1])
        skip = start - max(first * CHUNK_FRAMES - lead, 0)
        return np.frombuffer(raw, np.uint8).reshape(-1, *self.meta["frame_shape"])[skip : skip + length]

    def about(self, episode: int) -> dict[str, Any]:
        """Where its frames are from (codecs.Episode); empty where nothing is known. Raises ValueError for damage."""
        shard, row = self._place(episode)
        end = int(self.columns.offset[row]) + int(self.columns.chunks_of(row).sum())
        place = -(-end // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE  # the JSON is the tar's next member
        try:
            header = tarfile.TarInfo.frombuf(self._read(shard, place, tarfile.BLOCKSIZE, self._is_cached), "utf-8", "")
            found = json.loads(self._read(shard, place + tarfile.BLOCKSIZE, header.size, self._is_cached))
        except (tarfile.HeaderError, json.JSONDecodeError):
            raise ValueError(self._damaged(shard)) from None
        about: dict[str, Any] = found["about"]
        return about

    def file_of(self, episode: int) -> tuple[int, int]:
        """The number of the shard's file, and that of the episode in it."""
        shard, row = self._place(episode)
        return int(self.columns.shard[shard]), int(self.columns.number[row])

    def clips(self, length: int, stride: int) -> Clips:
        """Those of `length` frames. Raises ValueError when no episode is that long."""
        clips = Clips(self, length, stride, self._ends_S)
        clips = replace(clips, ends_S=_ends(self._ends_S, clips.counts))
        if not len(clips):
            raise ValueError(
                f"no episode of {self.uri} has {length} frames, the longest has {self.episode_lengths.max()}: "
                "lower data.clip_length, or raise data.steps_per_level and collect again"
            )
        return clips

    def kept_rows(self, keep: Iterable[NDArray[np.bool_]]) -> Iterator[NDArray[np.bool_]]:
        """A shard's rows in the columns after the other, where `keep` says so of its episodes. Raises ValueError where
        that does not fit."""
        for shard, keep_E in itertools.zip_longest(range(self.num_shards), keep):
            if shard is None or keep_E is None:
                raise ValueError(f"keep has {'fewer' if keep_E is None else 'more'} arrays than {self.uri} has shards")
            if (keep_E.shape, keep_E.dtype) != ((len(self.episodes_in(shard)),), bool):
                found = f"{keep_E.dtype} {keep_E.shape}"
                raise ValueError(f"keep has {found} for shard {shard} with {len(self.episodes_in(shard))} episodes")
            if self._hidden_N is not None:
                seen_N = ~self._hidden_N[self.columns.rows_of(range(shard, shard + 1))]
                seen_N[seen_N] = keep_E
                keep_E = seen_N
            yield keep_E

    def verify(self) -> None:
        """Reads every byte. Raises ValueError naming the first column or shard whose checksum is another."""
        for name, file in self._index["columns"].items():
            if hashlib.sha256(getattr(self.columns, name).view(np.uint8)).hexdigest() != file["sha256"]:
                raise ValueError(self._damaged_index(f"{self.uri}/{file['name']} is damaged"))
        for shard in range(self.num_shards):
            path = f"{self._root}/{shard_name(int(self.columns.shard[shard]))}"
            with self._fs.open(path, "rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != self._sha256(shard):
                    raise ValueError(self._damaged(shard))

    def _seen(self, column_N: NDArray[_Number], rows: slice) -> NDArray[_Number]:
        """Of these rows those that are not opted out."""
        return column_N[rows] if self._hidden_N is None else column_N[rows][~self._hidden_N[rows]]

    def _place(self, episode: int) -> tuple[int, int]:
        """An episode's shard and its own row in the columns."""
        if not 0 <= episode < self.num_episodes:
            raise IndexError(f"episode {episode} of {self.num_episodes} in {self.uri}")
        shard = int(np.searchsorted(self._ends_S, episode, side="right"))
        if self._hidden_N is None:
            return shard, episode
        rows = self.columns.rows_of(range(shard, shard + 1))
        seen = np.flatnonzero(~self._hidden_N[rows])
        return shard, rows.start + int(seen[episode - self.episodes_in(shard).start])

    def _damaged_index(self, what: object) -> str:
        maker = "curate" if self._index["origin"] else self._maker
        return f"{what}: delete {self.uri}/index.json and run {maker} again"

    def _damaged(self, shard: int) -> str:
        return f"{self._uri_of(shard)} is damaged: delete it and run {self._maker} again, it remakes only that"

    def _decompressed(self, shard: int, offset: int, sizes: Sequence[int]) -> bytearray:
        """The chunks of these sizes that follow each other from `offset` on; each carries its own checksum."""
        cuts, shape = list(itertools.accumulate(sizes, initial=0)), self.meta["frame_shape"]
        for cached in (True, False) if self._is_cached else (False,):
            data = self._read(shard, offset, cuts[-1], cached)
            try:
                return bytearray().join(decompress(data[a:b], self.codec, shape) for a, b in itertools.pairwise(cuts))
            except DamagedChunkError:
                if cached:  # the copy may be what is damaged, not the shard
                    cache.forget(self._uri_of(shard), self._sha256(shard))
        raise ValueError(self._damaged(shard))

    def _read(self, shard: int, offset: int, size: int, cached: bool) -> bytes:
        file = self._opened(shard, cached)
        if file is not None:
            with file:
                file.seek(offset)
                data = file.read(size)
        else:
            uri, path = self._uri_of(shard), f"{self._root}/{shard_name(int(self.columns.shard[shard]))}"
            data = cache.try_again(uri, lambda: self._fs.cat_file(path, start=offset, end=offset + size))
        if len(data) != size:
            raise ValueError(self._damaged(shard))
        return data

    def _opened(self, shard: int, cached: bool) -> BinaryIO | None:
        """The shard as a file of this machine; None where it has to be read over the network."""
        if self._is_local:
            return open(f"{self._root}/{shard_name(int(self.columns.shard[shard]))}", "rb")
        try:
            size = int(self.columns.shard_bytes[shard])
            return cache.fetch(self._uri_of(shard), self._sha256(shard), size) if cached else None
        except cache.OtherBytesError:
            raise ValueError(self._damaged(shard)) from None

    def _uri_of(self, shard: int) -> str:
        return f"{self.home}/{shard_name(int(self.columns.shard[shard]))}"

    def _sha256(self, shard: int) -> str:
        return bytes(self.columns.shard_sha256[shard]).hex()


def _ends(ends_S: NDArray[np.int64], counts: Callable[[range], NDArray[Any]]) -> NDArray[np.int64]:
    """How much lies in the shards up to each; `ends_S` says the same of their episodes, `counts` how much each has."""
    found, total = [], 0
    for begin in range(0, len(ends_S), _BLOCK):
        shards = range(begin, min(begin + _BLOCK, len(ends_S)))
        sums = np.concatenate([[0], counts(shards).cumsum()])
        found.append(total + sums[ends_S[shards.start : shards.stop] - (ends_S[begin - 1] if begin else 0)])
        total = int(found[-1][-1])
    return np.concatenate(found)
