"""How remote files are read: a failing store is tried again, and whole files are kept on this machine within a bound.

The cache is $GENIE_CACHE_DIR; the processes of a machine, and later ones, share it. A file lies there under its
checksum, which was checked before it was renamed into place, so none is stale or half written.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import random
import re
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import BinaryIO, TypeVar

from filelock import FileLock
from fsspec.core import url_to_fs

from genie_model.files import cache_dir, explained, is_local

_K = TypeVar("_K")
_T = TypeVar("_T")
_AT_ONCE = 16  # files
_WAITS = (0.5, 1.0, 2.0, 4.0)  # seconds, after each try that failed but the last
_IN_USE = 3600.0  # seconds for which a file that was read stays, whatever needs room
_ABANDONED = 86_400.0  # seconds without a byte after which a download is nobody's
_TOUCH = 60.0  # a file that is read is marked as used no more often than this, in seconds
_OWN = re.compile(r"[0-9a-f]{64}(\.\w+)*")


class OtherBytesError(ValueError):
    """A remote file does not have the checksum that was asked for."""


def limit() -> int:
    """How many bytes the cache may hold: $GENIE_CACHE_BYTES, by default 50 GB. Raises ValueError for no number."""
    text = os.environ.get("GENIE_CACHE_BYTES") or "50_000_000_000"
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"GENIE_CACHE_BYTES={text} is not a number of bytes, such as 50_000_000_000") from None


def try_again(uri: str, read: Callable[[], _T]) -> _T:
    """What `read` returns. A store's error is waited out a few times, then raised as an OSError that names `uri`.

    A missing file, a refused one and a full disk stay what they are: they are raised at once.
    """
    for wait in (*_WAITS, None):
        try:
            return read()
        except (FileNotFoundError, PermissionError):
            raise
        except Exception as error:  # each store has its own, and few are OSErrors
            if isinstance(error, OSError) and error.errno == errno.ENOSPC:
                raise explained(error, str(cache_dir())) from None
            if wait is None:
                tries = len(_WAITS) + 1
                raise OSError(f"{uri} could not be read in {tries} tries, the last: {error!r}") from error
        time.sleep(wait * random.SystemRandom().uniform(0.5, 1.5))  # else all hosts come back at the same moment
    raise AssertionError("the last try returns or raises")


def each(uri: str, read: Callable[[_K], _T], keys: Iterable[_K]) -> Iterator[_T]:
    """What `read` returns of each key, in their order. A remote store at `uri` is asked for a few at once, since each
    answer takes its time and there may be a file for every shard; as many results are in memory."""
    if is_local(uri):
        yield from map(read, keys)
        return
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        waiting = deque[Future[_T]]()
        for key in keys:
            waiting.append(pool.submit(read, key))
            if len(waiting) == _AT_ONCE:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def fetch(uri: str, sha256: str, size: int | None = None) -> BinaryIO | None:
    """The remote file with that checksum, open, from the cache; None where the cache has no room for it.

    `size` is its bytes, where known: a copy of another size is not taken. One process or thread downloads a file that
    several ask for. Room is made by what was read longest ago, but not by what was read within the hour: files that do
    not fit in together would push each other out for ever. What is being downloaded comes on top of the bound. Raises
    OtherBytesError, FileNotFoundError, and OSError when the store keeps failing.
    """
    cached = _path(uri, sha256)
    if (file := _opened(cached, size)) is not None:
        return file
    fs, path = url_to_fs(uri)
    if size is None:
        size = int(fs.size(path) or 0)
    locks = cached.parent / "locks"
    locks.mkdir(parents=True, exist_ok=True)
    if not _make_room(size):
        return None
    with FileLock(locks / sha256[:2]):
        if (file := _opened(cached, size)) is not None:
            return file  # who had the lock before has downloaded it
        partial = cached.with_name(f"{cached.name}.part")
        try:
            try_again(uri, lambda: fs.get_file(path, str(partial)))
            with partial.open("rb+") as download:
                if hashlib.file_digest(download, "sha256").hexdigest() != sha256:
                    raise OtherBytesError(f"the file at {uri} has another SHA-256 than {sha256}")
                os.fsync(download.fileno())
            with FileLock(locks / "room"):
                if not _make_room(size):  # others have taken it meanwhile
                    return None
                partial.replace(cached)
        finally:
            partial.unlink(missing_ok=True)
        return _opened(cached, size)


def forget(uri: str, sha256: str) -> None:
    """Drops the copy of that file."""
    _path(uri, sha256).unlink(missing_ok=True)


def _path(uri: str, sha256: str) -> Path:
    return cache_dir() / f"{sha256}{PurePosixPath(uri).suffix}"


def _opened(cached: Path, size: int | None) -> BinaryIO | None:
    """The file in the cache, now marked as used; None when there is none, or one of another size."""
    try:
        file = cached.open("rb")
    except FileNotFoundError:
        return None
    found = os.fstat(file.fileno())
    if size is not None and found.st_size != size:
        file.close()
        return None
    if time.time() - found.st_mtime > _TOUCH:
        with contextlib.suppress(FileNotFoundError):  # it was pushed out just now, and can be read until it is closed
            os.utime(cached)
    return file


def _make_room(size: int) -> bool:
    """Whether the cache has room for so many bytes, once it has let go what was not read for longest, if that helps."""
    kept, old, now = 0, [], time.time()
    for path in cache_dir().iterdir():
        if not _OWN.fullmatch(path.name):
            continue
        with contextlib.suppress(FileNotFoundError):  # another process has just renamed it or let it go
            found = path.stat()
            if path.suffix == ".part":
                if now - found.st_mtime > _ABANDONED:
                    path.unlink()
                continue
            kept += found.st_size
            if now - found.st_mtime > _IN_USE:
                old.append((found.st_mtime, found.st_size, path))
    excess = kept + size - limit()
    if excess > sum(size for _, size, _ in old):
        return False
    for _, freed, path in sorted(old):
        if excess <= 0:
            break
        path.unlink(missing_ok=True)
        excess -= freed
    return True
