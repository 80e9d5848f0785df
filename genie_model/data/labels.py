"""What people said of clips, 5 (best) to 1 (worst): the file that the labelling page writes and the classifier reads.

    {"version": 1, "labels": [{"digest", "source", "start_seconds", "label", "labelled_at"}, ...]}

A label is of the clip with that digest of its frames, wherever a data set has it.
"""

from __future__ import annotations

import datetime
import hashlib
from collections.abc import Iterable, Mapping
from typing import Literal

import numpy as np
from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError

from genie_model import files
from genie_model.data.columns import hash_of_digest, is_among
from genie_model.data.store import VideoStore

GOOD, BAD = 5, 1  # what lies between teaches nothing (App. B.1)
_SHARDS = 1024  # whose clips are looked at at a time


class Label(BaseModel):
    """`source` is the id of the clip's video, `start_seconds` where in it the clip starts."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    digest: str = Field(pattern="^[0-9a-f]{64}$")
    source: str
    start_seconds: float = Field(ge=0)
    label: int = Field(ge=BAD, le=GOOD)
    labelled_at: AwareDatetime = Field(default_factory=lambda: datetime.datetime.now(datetime.UTC))


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid")

    version: Literal[1] = 1
    labels: list[Label]


def read_labels(uri: str) -> dict[str, Label]:
    """By digest; of two labels of one clip the later in the file. Raises ValueError where none lie there, or others."""
    try:
        found = _File.model_validate_json(files.read(uri))
    except (FileNotFoundError, IsADirectoryError):
        raise ValueError(f"there are no labels at {uri}: make some with `python -m serving.label`") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise ValueError(f"{uri} is no file of labels: {where}: {first['msg']}") from None
    return {label.digest: label for label in found.labels}


def write_labels(uri: str, labels: Iterable[Label]) -> None:
    """All of them or, where that fails, what was there before."""
    files.write_atomic(uri, as_json(labels))


def as_json(labels: Iterable[Label]) -> bytes:
    """As they lie in a file."""
    return _File(labels=list(labels)).model_dump_json(indent=1).encode()


def episodes_of(store: VideoStore, digests: Iterable[str]) -> dict[str, int]:
    """Where in the data set the clips with these digests are, by digest; those that it has. 64 bits are looked at."""
    wanted = {hash_of_digest(digest): digest for digest in digests}
    hashes, found = list(wanted), dict[str, int]()
    for begin in range(0, store.num_shards, _SHARDS):
        shards = range(begin, min(begin + _SHARDS, store.num_shards))
        hash_E = store.hashes_in("digest", shards)
        first = store.episodes_in(begin).start
        found |= {wanted[int(hash_E[i])]: first + int(i) for i in np.flatnonzero(is_among(hash_E, hashes))}
    return found


def held_out_sources(sources: Mapping[str, set[bool]], share: float, seed: int) -> set[str]:
    """Which videos measure the classifier; `sources` says of each whether it has good clips (True), bad ones, or both.

    About that share of the videos with bad clips and of those without, but one of each at least, on either side: whole
    videos, for a clip gives away the others of its video. Raises ValueError where either side would lack good or bad
    clips.
    """

    def drawn(source: str) -> bytes:
        return hashlib.sha256(f"{seed} {source}".encode()).digest()

    held_out = set[str]()
    for has_bad in (True, False):
        some = sorted((s for s, kinds in sources.items() if (False in kinds) == has_bad), key=drawn)
        held_out |= set(some[: min(max(round(share * len(some)), 1), len(some) - 1)])
    for side in (held_out, sources.keys() - held_out):
        kinds = set[bool]().union(*(sources[source] for source in side))
        if kinds != {True, False}:
            good, bad = (sum(kind in own for own in sources.values()) for kind in (True, False))
            raise ValueError(
                f"labels of {good} videos with a {GOOD} and of {bad} with a {BAD} cannot be split by video into those "
                "that teach and those that measure: label clips of two more videos of each kind"
            )
    return held_out
