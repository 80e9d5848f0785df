"""Where sessions outlive the process: of every frame its tokens and the action that led to it, in one SQLite file."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Sequence, Set
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from serving.model import FolderVersion

_SCHEMA = """
CREATE TABLE IF NOT EXISTS sessions (
    id TEXT PRIMARY KEY, name TEXT NOT NULL, version TEXT NOT NULL, run_id TEXT NOT NULL, folder TEXT NOT NULL,
    seed INTEGER NOT NULL, sampling TEXT NOT NULL, prompt BLOB NOT NULL, last_used REAL NOT NULL
);
CREATE TABLE IF NOT EXISTS frames (
    session TEXT NOT NULL REFERENCES sessions(id) ON DELETE CASCADE,
    t INTEGER NOT NULL, action INTEGER NOT NULL, codes BLOB NOT NULL, PRIMARY KEY (session, t)
) WITHOUT ROWID;
"""
Codes = NDArray[np.uint16]


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


class SessionStore:
    """A frame is in the file before anybody sees it, so a kill at any instant loses none and repeats none.

    One thread at a time. ":memory:" keeps nothing beyond the process.
    """

    def __init__(self, path: str) -> None:
        """Raises ValueError when the file cannot be used."""
        try:
            if path != ":memory:":
                Path(path).parent.mkdir(parents=True, exist_ok=True)
            self._db = sqlite3.connect(path, check_same_thread=False, timeout=30)
            # A write-ahead log without a sync to disk for each frame: whole after a kill of the process at any instant;
            # a loss of power may take the last frames, never the file.
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.execute("PRAGMA synchronous = NORMAL")
            self._db.execute("PRAGMA foreign_keys = ON")
            self._db.executescript(_SCHEMA)
        except (sqlite3.Error, OSError) as error:
            raise ValueError(f"sessions cannot be kept in {path}: {error}") from None

    def create(self, record: SessionRecord, frames: Sequence[Frame]) -> None:
        with self._db:
            self._db.execute(
                "INSERT INTO sessions VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (record.id, record.name, record.version, record.run_id, record.folder, record.seed, record.sampling,
                 record.prompt, time.time()),
            )  # fmt: skip
            for frame in frames:
                self._insert(frame)

    def append(self, frames: Sequence[Frame]) -> list[bool]:
        """The next frames of some sessions, in one transaction. Of each: is it in?

        It is not where the session has ended, or another process has taken that step.
        """
        with self._db:
            kept = [self._insert(frame) for frame in frames]
            now = time.time()
            self._db.executemany(
                "UPDATE sessions SET last_used = ? WHERE id = ?", [(now, frame.session) for frame in frames]
            )
        return kept

    def record(self, session_id: str) -> SessionRecord | None:
        row = self._db.execute(
            "SELECT id, name, version, run_id, folder, seed, sampling, prompt FROM sessions WHERE id = ?", (session_id,)
        ).fetchone()
        return SessionRecord(*row) if row else None

    def frames(self, session_id: str, shape: tuple[int, ...], start: int = 0, stop: int | None = None) -> list[Frame]:
        """Frames start..stop of a session, in order; `shape` is that of a frame's codes."""
        rows = self._db.execute(
            "SELECT t, action, codes FROM frames WHERE session = ? AND t >= ? AND t < ? ORDER BY t",
            (session_id, start, 2**62 if stop is None else stop),
        )
        return [Frame(session_id, t, action, np.frombuffer(codes, "<u2").reshape(shape)) for t, action, codes in rows]

    def length(self, session_id: str) -> int:
        """How many frames there are of it, the prompt included."""
        return int(self._db.execute("SELECT COUNT(*) FROM frames WHERE session = ?", (session_id,)).fetchone()[0])

    def delete(self, session_id: str) -> bool:
        """Was there such a session?"""
        with self._db:
            return self._db.execute("DELETE FROM sessions WHERE id = ?", (session_id,)).rowcount == 1

    def delete_unused(self, oldest: float, open_here: Set[str]) -> None:
        """All that no process has stepped since that time.time(), and that are not open in this one."""
        unused = self._db.execute("SELECT id FROM sessions WHERE last_used < ?", (oldest,)).fetchall()
        with self._db:  # asked once more with each: another process may have stepped it meanwhile
            self._db.executemany(
                "DELETE FROM sessions WHERE id = ? AND last_used < ?",
                [(session_id, oldest) for (session_id,) in unused if session_id not in open_here],
            )

    def close(self) -> None:
        self._db.close()

    def _insert(self, frame: Frame) -> bool:
        found = self._db.execute(
            "INSERT OR IGNORE INTO frames SELECT ?, ?, ?, ? WHERE EXISTS (SELECT 1 FROM sessions WHERE id = ?)",
            (frame.session, frame.t, frame.action, frame.codes_NC.astype("<u2").tobytes(), frame.session),
        )
        return found.rowcount == 1
