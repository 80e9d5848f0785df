"""Files that are whole or not there, on any fsspec file system."""

from __future__ import annotations

import contextlib
import errno
import os
import uuid
from pathlib import Path, PurePosixPath

from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem


def write_atomic(uri: str, data: bytes) -> None:
    """All of the file or none of it, whoever else writes it. An object store's upload is atomic already; a local file
    is renamed into place. A kill may leave one beside it that ends in .tmp, which nothing reads."""
    fs, path = url_to_fs(uri)
    if not is_local(uri):
        fs.pipe_file(path, data)
        return
    os.makedirs(os.path.dirname(path), exist_ok=True)
    temporary = _temporary(path)
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise explained(error, path) from None
    finally:
        with contextlib.suppress(FileNotFoundError):  # it has been renamed, unless something went wrong
            os.remove(temporary)


def _temporary(path: str) -> str:
    """Of this one writer: two hosts that shared it would rename each other's half."""
    return f"{path}.{uuid.uuid4().hex}.tmp"


def is_local(uri: str) -> bool:
    """Whether it is a path of this machine."""
    return isinstance(url_to_fs(uri)[0], LocalFileSystem)


def explained(error: OSError, path: str) -> OSError:
    """The error of writing to `path`, or one that says what to do about it."""
    if error.errno != errno.ENOSPC:
        return error
    return OSError(errno.ENOSPC, "the disk is full; free some space and run again, what was finished is kept", path)


def read(uri: str) -> bytes:
    fs, path = url_to_fs(uri)
    data: bytes = fs.cat_file(path)
    return data


def exists(uri: str) -> bool:
    fs, path = url_to_fs(uri)
    return bool(fs.exists(path))


def names(uri: str) -> list[str]:
    """Of what lies in the folder, sorted; none when there is no such folder."""
    fs, path = url_to_fs(uri)
    return sorted(PurePosixPath(entry).name for entry in fs.ls(path, detail=False)) if fs.exists(path) else []


def remove_tree(uri: str) -> None:
    fs, path = url_to_fs(uri)
    if fs.exists(path):
        fs.rm(path, recursive=True)


def cache_dir() -> Path:
    """Where what was downloaded is kept ($GENIE_CACHE_DIR): it may be deleted at any time."""
    return Path(os.environ.get("GENIE_CACHE_DIR") or "~/.cache/genie").expanduser()
