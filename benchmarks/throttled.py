"""A remote store as slow as one likes: memory behind a latency and a bandwidth, `throttled://...` for fsspec."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any, ClassVar

import fsspec
from fsspec.implementations.memory import MemoryFileSystem


class ThrottledFileSystem(MemoryFileSystem):  # type: ignore[misc]
    """Reads take `latency` seconds each, side by side, share `bandwidth` bytes/s, and are counted."""

    protocol = "throttled"
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]
    latency = 0.0
    bandwidth = float("inf")
    reads: ClassVar[list[tuple[str, int | None, int]]] = []  # path, first byte (None: the whole file), bytes
    _line = threading.Lock()
    _free_at = 0.0

    @classmethod
    def _strip_protocol(cls, path: Any) -> Any:
        return super()._strip_protocol(str(path).removeprefix("throttled://"))

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **kwargs: Any) -> bytes:
        data: bytes = super().cat_file(path, start, end, **kwargs)
        cls = ThrottledFileSystem
        with self._line:
            cls.reads.append((path, start, len(data)))
            cls._free_at = max(cls._free_at, time.monotonic()) + len(data) / self.bandwidth
            ready = cls._free_at + self.latency
        time.sleep(max(ready - time.monotonic(), 0.0))
        return data

    def get_file(self, rpath: str, lpath: str, **kwargs: Any) -> None:
        Path(lpath).write_bytes(self.cat_file(rpath))


fsspec.register_implementation("throttled", ThrottledFileSystem, clobber=True)
