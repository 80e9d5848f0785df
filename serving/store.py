"""Where sessions outlive the process: of every frame its tokens and the action that led to it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from serving.model import FolderVersion

Codes = NDArray[np.uint16]
_REDIS = ("redis", "rediss", "unix")


@dataclass(frozen=True)
class SessionRecord:
    """What a session is, apart from its frames. `prompt` is the PNG of frame 0; `sampling` is SamplingConfig's JSON."""

    id: str
    name: str
    version: str
    run_id: str
    folder: str
    seed: int
    sampling: str
    prompt: bytes

    @property
    def model(self) -> FolderVersion:
        return FolderVersion(self.name, self.version, self.run_id, self.folder)


@dataclass(frozen=True)
class Frame:
    """Frame t of a session: its codes (N, C), and the action that led to it, NO_ACTION to the first."""

    session: str
    t: int
    action: int
    codes_NC: Codes


class SessionStore(Protocol):
    """A frame is in the store before anybody sees it, so a kill at any instant loses none and repeats none.

    A session expires where nobody created, appended to or reopened it for the idle time of the service that did so
    last; from then on it is gone from every answer. One thread at a time. All but `close` raise StoreError where the
    store cannot be used now: what was to be written may be in then, all of it or, of several sessions, that of some.
    """

    def create(self, record: SessionRecord, frames: Sequence[Frame]) -> None:
        """A session with its first frames, from 0 on: all of it or nothing."""

    def append(self, frames: Sequence[Frame]) -> list[bool]:
        """The next frames of some sessions. Of each: is it in?

        It is not where the session has ended, or it is not the very next: another process has taken that step.
        """

    def reopen(self, session_id: str) -> tuple[SessionRecord, int] | None:
        """The session, and how many frames there are of it, the prompt included. Its idle time begins anew."""

    def record(self, session_id: str) -> SessionRecord | None: ...

    def frames(self, session_id: str, shape: tuple[int, ...], start: int = 0, stop: int | None = None) -> list[Frame]:
        """Frames start..stop of a session, in order; `shape` is that of a frame's codes."""

    def delete(self, session_id: str) -> bool:
        """Was there such a session?"""

    def delete_expired(self) -> None:
        """Frees what they took."""

    def close(self) -> None: ...


def open_store(where: str, idle_seconds: float) -> SessionStore:
    """A SQLite file, ":memory:", or Redis by its URL. Raises ValueError, saying what to do, when it cannot be used."""
    # here, as both import the records above; and who keeps a file needs no Redis client in memory
    scheme, is_url, _ = where.partition("://")
    if not is_url:
        from serving.sqlite_store import SqliteStore

        return SqliteStore(where, idle_seconds)
    if scheme not in _REDIS:
        raise ValueError(f"session_store is a file, :memory:, or a redis://, rediss:// or unix:// URL, not {scheme}://")
    from serving.redis_store import RedisStore

    return RedisStore(where, idle_seconds)
