"""Where video comes from, whatever its container: a folder, a bucket's prefix or a manifest of files.

A source is a `Listing` of `Video`s, read one after the other, so that it may have millions. A video gives frames at a
constant rate and size (`Framing`), or is rejected with a reason of `Reason`.
"""

from __future__ import annotations

import abc
import csv
import errno
import io
import math
import os.path
import stat
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any, Literal, get_args

import numpy as np
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem
from numpy.typing import NDArray
from PIL import Image

from genie_model import cache

Reason = Literal[
    "missing",  # no such file, it may not be read, or it is no file but a folder or a device
    "unreachable",  # its store does not answer, or not to the end
    "empty",  # a file of zero bytes
    "not a video",  # no container of video, or one whose head is broken or missing
    "no picture",  # audio only, or a cover picture
    "too large",  # of more pixels than ingest.max_pixels
    "too narrow",  # a side under 16 pixels
    "tilted",  # to be shown at an angle that is no multiple of 90 degrees
    "timestamps",  # none, backwards, a gap of over a minute, or more than a thousand frames a second
    "truncated",  # it ends before the time that its head announces
    "corrupt",  # a part of it cannot be decoded
    "crashed",  # its decoder ended the process that ran it
    "stalled",  # its decoder gave no clip for ingest.stall_seconds
    "too short",  # for one clip
    "keywords",  # the filter's words did not want its title or description
    "opted out",
]
REASONS: tuple[Reason, ...] = get_args(Reason)
Note = Callable[[str], object]  # is told what was done to a video that is not plain, as "turned by 90 degrees"

_TEXTS = ("title", "description", "owner", "licence")
_MANIFESTS = {".csv", ".parquet"}
_NOT_IN_A_LINE = {"Cc", "Cs", "Zl", "Zp"}  # Unicode's control characters, halves of pairs, ends of lines and paragraphs


def no_note(text: str) -> None:
    """For who does not want to know."""


class Rejected(Exception):  # noqa: N818 - it is no error of the program
    """The video makes no clips; `detail` is one line for people."""

    def __init__(self, reason: Reason, detail: str = "") -> None:
        assert reason in REASONS, reason
        super().__init__(reason, detail)
        self.reason: Reason = reason
        self.detail = " ".join(detail.split())[:300]


@dataclass(frozen=True)
class Framing:
    """What every source's frames become: `fps` of them a second, of height x width pixels.

    A picture of another shape than the frame's is shown whole between black bars ("pad"), or its middle fills the frame
    ("crop"), or it is squeezed ("stretch").
    """

    fps: float
    height: int
    width: int
    aspect: Literal["pad", "crop", "stretch"] = "pad"
    max_pixels: int = 8192 * 4320

    def inner(self, height: float, width: float) -> tuple[int, int]:
        """(height, width) that a picture of this display size is scaled to, for `place`."""
        if self.aspect == "stretch":
            return self.height, self.width
        scales = self.height / height, self.width / width
        scale = min(scales) if self.aspect == "pad" else max(scales)
        return max(round(height * scale), 1), max(round(width * scale), 1)

    def place(self, inner_HWC: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """The frame, uint8 (height, width, 3), with the middle of the scaled picture in its middle."""
        frame_HWC = np.zeros((self.height, self.width, 3), np.uint8)
        (top, height), (left, width) = (
            ((outer - size) // 2, min(size, outer))
            for outer, size in ((self.height, inner_HWC.shape[0]), (self.width, inner_HWC.shape[1]))
        )
        frame_HWC[max(top, 0) : max(top, 0) + height, max(left, 0) : max(left, 0) + width] = inner_HWC[
            max(-top, 0) : max(-top, 0) + height, max(-left, 0) : max(-left, 0) + width
        ]
        return frame_HWC

    def fit(self, image_HWC: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """A uint8 RGB picture of any size as a frame; for sources that PyAV does not decode. Raises Rejected."""
        height, width = image_HWC.shape[:2]
        self.check_size(height, width)
        inner_height, inner_width = self.inner(height, width)
        picture = Image.fromarray(image_HWC).resize((inner_width, inner_height), Image.Resampling.BILINEAR)
        return self.place(np.asarray(picture))

    def check_size(self, height: int, width: int) -> None:
        """Raises Rejected for pictures of an absurd size."""
        if height * width > self.max_pixels:
            raise Rejected("too large", f"{width} x {height} pixels, at most {self.max_pixels:,} are taken")
        if min(height, width) < 16:
            raise Rejected("too narrow", f"{width} x {height} pixels")


@dataclass(frozen=True)
class Video(abc.ABC):
    """One video of a source. It can be pickled: other processes decode it."""

    id: str  # stable: of the manifest, else the path below the source; one line, so that it can be opted out
    uri: str
    title: str = ""
    description: str = ""
    owner: str = ""
    licence: str = ""
    version: str = ""  # changes when the bytes do: size and time, or the store's checksum; names the data set
    about: Mapping[str, str] = field(default_factory=dict)  # further provenance

    @abc.abstractmethod
    def frames(self, framing: Framing, note: Note = no_note) -> Iterator[NDArray[np.uint8]]:
        """uint8 (height, width, 3) at the constant framing.fps, from the video's first frame on. Raises Rejected."""

    def provenance(self) -> dict[str, str]:
        """What its clips tell of it; empty fields are left out."""
        known = {**self.about, "source": self.id, "uri": self.uri, **{name: getattr(self, name) for name in _TEXTS}}
        return {name: value for name, value in known.items() if value}


@dataclass(frozen=True)
class Listing:
    """The videos at a place, in an order that does not change. Iterating reads the place anew."""

    uri: str
    kind: str  # folder, manifest, ...
    each: Callable[[], Iterator[Video]]

    def __iter__(self) -> Iterator[Video]:
        return self.each()


@dataclass(frozen=True)
class FileVideo(Video):
    """A file of any container and codec that FFmpeg's libraries read, or the seconds of one from `start` to `stop`."""

    start: float = 0.0
    stop: float = math.inf

    def frames(self, framing: Framing, note: Note = no_note) -> Iterator[NDArray[np.uint8]]:
        from genie_model.data.video import decode  # PyAV is the video extra's

        try:
            fs, path = _at(self.uri)
            if isinstance(fs, LocalFileSystem) and not stat.S_ISREG(os.stat(path).st_mode):
                raise Rejected("missing", "a folder, a pipe or a device, no file")  # which might be waited for
            file = cache.try_again(self.uri, lambda: fs.open(path, "rb", block_size=1 << 20))
        except (FileNotFoundError, NotADirectoryError, PermissionError) as error:
            raise Rejected("missing", f"{type(error).__name__}: {error}") from None
        except ValueError as error:  # of fsspec, for a kind of store that it does not know
            raise Rejected("missing", str(error)) from None
        except OSError as error:
            reason: Reason = "missing" if error.errno == errno.ELOOP else "unreachable"
            raise Rejected(reason, f"{type(error).__name__}: {error}") from None
        with file:
            try:
                yield from decode(file, framing, note, self.start, self.stop)
            except OSError as error:
                raise Rejected("unreachable", f"{type(error).__name__}: {error}") from None


def videos_at(source_uri: str) -> Listing:
    """What lies there: a manifest (.csv or .parquet) of video files, or a folder or bucket prefix of them.

    A manifest's columns are uri (or path), relative to its own folder or not, and title, description, owner, licence
    and id where there are such; others become provenance. Every file of a folder is a video, or is rejected with a
    reason; its title is its name. Hidden ones, manifests, pipes and devices are passed over. A link to a file is that
    file; one to a folder is not followed, and the report says so. A bucket's files that a manifest names are not asked
    for their size one by one: where they change under their names, a column (etag, say) has to tell. Robot episodes
    (RLDS and LeRobot folders) are told by what lies there (robotics.py). Raises ValueError when nothing is there, and,
    as it is read, for a manifest that is damaged or names a video twice.
    """
    from genie_model.data.robotics import episodes_at  # it is built on this file

    source_uri = source_uri.rstrip("/")
    if episodes := episodes_at(source_uri):
        return episodes
    fs, root = url_to_fs(source_uri)
    if PurePosixPath(root).suffix.lower() in _MANIFESTS and fs.isfile(root):
        return Listing(source_uri, "manifest", lambda: _of_manifest(source_uri))
    if not fs.isdir(root):
        raise ValueError(f"there is no folder or manifest (.csv, .parquet) of videos at {source_uri}: correct the path")
    return Listing(source_uri, "folder", lambda: _of_folder(source_uri))


def _of_folder(source_uri: str) -> Iterator[Video]:
    fs, root = url_to_fs(source_uri)
    for info in _files_below(fs, root.rstrip("/")):
        below = PurePosixPath(info["name"]).relative_to(root.rstrip("/") or "/")
        title = one_line(below.stem.replace("_", " ").replace("-", " "))
        yield FileVideo(one_line(str(below)), f"{source_uri}/{below}", title, version=version_of(info))


def _files_below(fs: Any, folder: str) -> Iterator[Mapping[str, Any]]:
    """In the order of their names; of a bucket with millions of files, a folder at a time is in memory."""
    for info in sorted(fs.ls(folder, detail=True), key=lambda info: str(info["name"])):
        path = PurePosixPath(info["name"])
        if path.name.startswith(".") or info["name"].rstrip("/") == folder:
            continue
        if info["type"] == "directory":
            yield from _files_below(fs, info["name"].rstrip("/"))
        elif info.get("islink"):
            yield _followed(info)
        elif info["type"] != "other" and path.suffix.lower() not in _MANIFESTS:  # a pipe would be waited for
            yield info


def _followed(info: Mapping[str, Any]) -> Mapping[str, Any]:
    """Of a link of this machine, with size and time of what it leads to; where that is nothing, the report says so."""
    return {**info, **_info(info["name"])}


def one_line(text: str) -> str:
    """With what cannot be in a line of UTF-8 written as Python would: a file's name may have any bytes."""
    odd = {c for c in text if unicodedata.category(c) in _NOT_IN_A_LINE}
    return text.translate({ord(c): c.encode("unicode_escape").decode() for c in odd})


def _of_manifest(manifest_uri: str) -> Iterator[Video]:
    folder, known = manifest_uri.rpartition("/")[0] or ".", {"uri", "path", "id", *_TEXTS}
    seen = set[int]()  # hashes: there may be millions
    for number, row in enumerate(_rows(manifest_uri)):
        place = _place(row)
        if not place:
            raise ValueError(f"{manifest_uri}: row {number + 1} has no uri or path")
        name = one_line(row.get("id") or place)
        if hash(name) in seen:
            _check_is_one(manifest_uri, name)
        seen.add(hash(name))
        uri = place if "://" in place or place.startswith("/") else f"{folder}/{place}"
        about = {name: value for name, value in row.items() if name not in known}
        texts: dict[str, Any] = {name: row.get(name, "") for name in _TEXTS}
        texts["owner"] = one_line(texts["owner"])
        version = version_of(info) if (info := _info(uri)) else ""
        yield FileVideo(name, uri, version=version, about=about, **texts)


def _place(row: Mapping[str, str]) -> str:
    return row.get("uri") or row.get("path") or ""


def _check_is_one(manifest_uri: str, name: str) -> None:
    """Raises ValueError where two rows have that id: what is held out and opted out goes by it."""
    names = (one_line(row.get("id") or _place(row)) for row in _rows(manifest_uri))
    rows = [str(number) for number, other in enumerate(names, 1) if other == name]
    if len(rows) > 1:
        raise ValueError(
            f"{manifest_uri}: rows {', '.join(rows[:5])} have the same id, {name}: give each video one of its own, or "
            "leave the others out"
        )


def _at(uri: str) -> tuple[Any, str]:
    """As url_to_fs, but for paths of this machine, where it takes a `::` in a name for the end of one."""
    return url_to_fs(uri) if "://" in uri else (LocalFileSystem(), os.path.abspath(uri))


def _info(uri: str) -> Mapping[str, Any]:
    """What is known of a file of this machine; of others nothing, without a request."""
    try:
        fs, path = _at(uri)
        found: Mapping[str, Any] = fs.info(path) if isinstance(fs, LocalFileSystem) else {}
    except (OSError, ValueError):  # the report will say so
        return {}
    return found


def _rows(manifest_uri: str) -> Iterator[dict[str, str]]:
    """Of a CSV or Parquet file, as texts, without what is empty."""
    fs, path = url_to_fs(manifest_uri)
    rows: Iterable[Mapping[Any, Any]]
    with fs.open(path, "rb") as file:
        is_parquet = path.lower().endswith(".parquet")
        try:
            if is_parquet:
                import pyarrow.parquet as pq  # the video extra's

                rows = (row for batch in pq.ParquetFile(file).iter_batches(1024) for row in batch.to_pylist())
            else:
                rows = csv.DictReader(io.TextIOWrapper(file, "utf-8-sig", newline=""))
            for row in rows:
                yield {str(name): str(value).strip() for name, value in row.items() if name and value not in (None, "")}
        except (csv.Error, ValueError) as error:  # PyArrow's errors are ValueErrors, too
            kind = "Parquet file" if is_parquet else "CSV in UTF-8"
            raise ValueError(f"{manifest_uri} is no {kind}: {error}") from None


def version_of(info: Mapping[str, Any]) -> str:
    """A file's size and checksum, or its time of change where its store has none."""
    marks = ("ETag", "etag", "md5Hash", "crc32c", "mtime", "LastModified", "updated", "created")
    mark = next((str(info[name]) for name in marks if info.get(name)), "")
    return f"{info.get('size')} {mark}"
