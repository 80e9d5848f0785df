"""Sessions in one SQLite file, which services of one machine can share."""

from __future__ import annotations

import logging
import sqlite3
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from serving.errors import StoreError
from serving.store import Frame, SessionRecord

log = logging.getLogger(__name__)
_VERSION = 1  # of the tables, the file's user_version; 0 had the time of last use where `expires` is now
_TABLES = (
    """CREATE TABLE IF NOT EXISTS sessions (
        id TEXT PRIMARY KEY, name TEXT NOT NULL, version TEXT NOT NULL, run_id TEXT NOT NULL, folder TEXT NOT NULL,
        seed INTEGER NOT NULL, sampling TEXT NOT NULL, prompt BLOB NOT NULL, expires REAL NOT NULL
    )""",
    """CREATE TABLE IF NOT EXISTS frames (
        session TEXT NOT NULL REFERENCES sessions(id) ON DELETE CASCADE,
        t INTEGER NOT NULL, action INTEGER NOT NULL, codes BLOB NOT NULL, PRIMARY KEY (session, t)
    ) WITHOUT ROWID""",
)
_RECORD = "id, name, version, run_id, folder, seed, sampling, prompt"


class SqliteStore:
    """A SessionStore. ":memory:" keeps nothing beyond the process."""

    def __init__(self, path: str, idle_seconds: float) -> None:
        """Raises ValueError when the file cannot be used."""
        self._path, self._idle_seconds = path, idle_seconds
        try:
            if path != ":memory:":
                Path(path).parent.mkdir(parents=True, exist_ok=True)
            # Others that write hold the file for milliseconds; while one waits for it, nobody plays.
            self._db = sqlite3.connect(path, check_same_thread=False, timeout=5)
            # A write-ahead log without a sync to disk for each frame: whole after a kill of the process at any instant;
            # a loss of power may take the last frames, never the file.
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.execute("PRAGMA synchronous = NORMAL")
            self._db.execute("PRAGMA foreign_keys = ON")
            with self._db:
                self._db.execute("BEGIN IMMEDIATE")  # one of the services that start on it
                self._migrate()
        except (sqlite3.Error, OSError) as error:
            raise ValueError(f"sessions cannot be kept in {path}: {error}") from None

    def create(self, record: SessionRecord, frames: Sequence[Frame]) -> None:
        with self._transaction() as db:
            db.execute(
                "INSERT INTO sessions VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (record.id, record.name, record.version, record.run_id, record.folder, record.seed, record.sampling,
                 record.prompt, time.time() + self._idle_seconds),
            )  # fmt: skip
            db.executemany(
                "INSERT INTO frames VALUES (?, ?, ?, ?)", [(f.session, f.t, f.action, _packed(f)) for f in frames]
            )

    def append(self, frames: Sequence[Frame]) -> list[bool]:
        now = time.time()
        with self._transaction() as db:
            kept = [
                db.execute(
                    "INSERT INTO frames SELECT id, ?, ?, ? FROM sessions WHERE id = ? AND expires > ?"
                    " AND ? = (SELECT MAX(t) + 1 FROM frames WHERE session = id)",
                    (frame.t, frame.action, _packed(frame), frame.session, now, frame.t),
                ).rowcount
                == 1
                for frame in frames
            ]
            db.executemany(
                "UPDATE sessions SET expires = ? WHERE id = ?",
                [(now + self._idle_seconds, frame.session) for frame, mine in zip(frames, kept, strict=True) if mine],
            )
        return kept

    def reopen(self, session_id: str) -> tuple[SessionRecord, int] | None:
        now = time.time()
        with self._transaction() as db:
            row = db.execute(
                # never sooner than the service that stepped it would have it
                f"UPDATE sessions SET expires = MAX(expires, ?) WHERE id = ? AND expires > ? RETURNING {_RECORD}",
                (now + self._idle_seconds, session_id, now),
            ).fetchone()
            (length,) = db.execute("SELECT COUNT(*) FROM frames WHERE session = ?", (session_id,)).fetchone()
        return (SessionRecord(*row), length) if row else None

    def record(self, session_id: str) -> SessionRecord | None:
        with self._transaction() as db:
            row = db.execute(
                f"SELECT {_RECORD} FROM sessions WHERE id = ? AND expires > ?", (session_id, time.time())
            ).fetchone()
        return SessionRecord(*row) if row else None

    def frames(self, session_id: str, shape: tuple[int, ...], start: int = 0, stop: int | None = None) -> list[Frame]:
        with self._transaction() as db:
            rows = db.execute(
                "SELECT t, action, codes FROM frames JOIN sessions ON id = session"
                " WHERE session = ? AND expires > ? AND t >= ? AND t < ? ORDER BY t",
                (session_id, time.time(), start, 2**62 if stop is None else stop),
            ).fetchall()
        return [Frame(session_id, t, action, np.frombuffer(codes, "<u2").reshape(shape)) for t, action, codes in rows]

    def delete(self, session_id: str) -> bool:
        with self._transaction() as db:
            gone = db.execute("DELETE FROM sessions WHERE id = ? AND expires > ?", (session_id, time.time()))
        return gone.rowcount == 1

    def delete_expired(self) -> None:
        with self._transaction() as db:
            db.execute("DELETE FROM sessions WHERE expires <= ?", (time.time(),))

    def close(self) -> None:
        self._db.close()

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        """All of it is in the file at the end, or nothing. Raises StoreError."""
        try:
            with self._db:
                yield self._db
        except sqlite3.Error as error:
            log.warning("sessions cannot be kept in %s: %s", self._path, error)
            raise StoreError from None

    def _migrate(self) -> None:
        """Raises ValueError when a newer service wrote the file."""
        (version,) = self._db.execute("PRAGMA user_version").fetchone()
        if version > _VERSION:
            raise ValueError(f"{self._path} was written by a newer version: serve it with that, or name another file")
        if self._db.execute("SELECT 1 FROM pragma_table_info('sessions') WHERE name = 'last_used'").fetchone():
            self._db.execute("ALTER TABLE sessions RENAME COLUMN last_used TO expires")
            self._db.execute("UPDATE sessions SET expires = expires + ?", (self._idle_seconds,))
        for table in _TABLES:
            self._db.execute(table)
        self._db.execute(f"PRAGMA user_version = {_VERSION}")


def _packed(frame: Frame) -> bytes:
    return frame.codes_NC.astype("<u2").tobytes()
