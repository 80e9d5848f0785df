"""Who does not want to be in a data set: <data set>/opt_out.txt, honoured whenever a store of it is opened.

A line is a source's id, `owner:NAME`, or `sha256:DIGEST` of a clip's frames; notes are lines that begin with "# ".
The data set is the folder that holds train/ and eval/; a view honours its origin's list and its own. What is opted out
is not in the store: no clip, no picture, no count has it, episodes are numbered without it, and the store's digest is
another one, so that models and tokens are made anew. The tars keep it, until whoever owns them deletes them, and so do
models and pictures that were made before; the same ingest again renews the card's. A clip that two videos share is
listed as the first one's: name its digest to hide it whoever shows it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray

from genie_model import cache, files
from genie_model.data.columns import Columns, hash64, hash_of_digest, is_among, open_columns
from genie_model.data.shards import has_index, hashes, origin_of, read_index

NAME = "opt_out.txt"


@dataclass(frozen=True)
class OptOuts:
    """64-bit hashes of sources, owners and clips."""

    source: frozenset[int]
    owner: frozenset[int]
    digest: frozenset[int]

    @classmethod
    def of(cls, lines: Iterable[str]) -> OptOuts:
        """Raises ValueError for a digest that is none."""
        found: dict[str, set[int]] = {"source": set(), "owner": set(), "digest": set()}
        for line in (line.strip() for line in lines):
            kind, _, name = line.partition(":")
            if not line:
                continue
            found["source"].add(hash64(line))  # whatever else it says: a file may be named "#1.mp4" or "owner:me.mp4"
            if kind.lower() == "owner":
                found["owner"].add(hash64(name.strip()))
            elif kind.lower() == "sha256":
                found["digest"].add(hash_of_digest(name.strip().lower()))
        return cls(*(frozenset(found[name]) for name in ("source", "owner", "digest")))

    @classmethod
    def read(cls, *data_uris: str) -> OptOuts:
        """Those of these data sets. Raises ValueError for a line that says nothing."""
        return cls.of(line for uri in data_uris for line in lines_at(f"{uri}/{NAME}"))

    def hides(self, about: Mapping[str, Any]) -> bool:
        """Whether an episode about which this is known is opted out."""
        found = hashes(about)
        return found["source"] in self.source or found["owner"] in self.owner or found["digest"] in self.digest

    def hidden(self, columns: Columns) -> NDArray[np.bool_] | None:
        """Which rows are opted out; None where none is. A byte a row, and only where there are opt-outs."""
        hidden_N = None
        for name in ("source", "owner", "digest"):
            if own := getattr(self, name):
                found_N = is_among(getattr(columns, name), own)
                hidden_N = found_N if hidden_N is None else hidden_N | found_N
        return hidden_N if hidden_N is not None and hidden_N.any() else None


def data_set_of(uri: str, split: str) -> str:
    """The data set that the store at `uri` belongs to: the folder above it, if its own bears its split's name."""
    return uri.rstrip("/").removesuffix(f"/{split}")


def opt_out(data_uri: str, ids: Sequence[str]) -> str:
    """Appends to the list of the data set at `data_uri`; a sentence that says how many clips the list now hides.

    Raises ValueError for an id that is none, and where no data set is.
    """
    if not ids or any(not line.strip() or line.strip().startswith("# ") or "\n" in line for line in ids):
        raise ValueError("an opt-out is one line: a source's id, owner:NAME or sha256:DIGEST")
    OptOuts.of(ids)
    before = _hidden(data_uri)
    uri = f"{data_uri.rstrip('/')}/{NAME}"
    lock = files.cache_dir() / "locks" / "opt-out"
    lock.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(lock):  # two at a time would each write their own alone
        lines = lines_at(uri)
        lines += [line.strip() for line in ids if line.strip() not in lines]
        files.write_atomic(uri, "".join(f"{line}\n" for line in lines).encode())
    after = _hidden(data_uri)
    parts = [
        f"{hidden:,} of {total:,} {split} clips are hidden, {hidden - before[split][0]:,} of them by this"
        for split, (hidden, total) in after.items()
    ]
    return f"{'; '.join(parts)}: {uri}"


def lines_at(uri: str) -> list[str]:
    """None where there is no such file; but a store that does not answer is an error, for the list might be there.

    Raises ValueError for a list that is not in UTF-8: no name in it could be found.
    """
    try:
        text = cache.try_again(uri, lambda: files.read(uri)).decode("utf-8-sig")  # as Windows' editors write it
    except FileNotFoundError:
        return []
    except UnicodeDecodeError as error:
        raise ValueError(f"{uri} is no text in UTF-8: {error}") from None
    return [line.strip() for line in text.split("\n") if line.strip()]


def _hidden(data_uri: str) -> dict[str, tuple[int, int]]:
    """Of each split how many episodes are hidden, and of how many. Raises ValueError where no data set is."""
    found = {}
    for split in ("train", "eval", ""):
        uri = f"{data_uri.rstrip('/')}/{split}".rstrip("/")
        if not has_index(uri):
            continue
        index = read_index(uri)[0]
        origin = data_set_of(origin_of(uri, index), index["meta"]["split"])
        hidden_N = OptOuts.read(*{data_uri.rstrip("/"), origin}).hidden(open_columns(uri, index["columns"]))
        found[split or "all"] = (0 if hidden_N is None else int(hidden_N.sum()), index["episodes"])
    if not found:
        raise ValueError(f"there is no data set at {data_uri}: name the folder that holds train/ and eval/")
    return found
