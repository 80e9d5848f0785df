"""Sessions in Redis, which services of many machines can share."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from struct import Struct
from typing import cast

import numpy as np
from redis import Redis, RedisError
from redis.backoff import NoBackoff
from redis.retry import Retry

from serving.errors import StoreError
from serving.store import Frame, SessionRecord

log = logging.getLogger(__name__)
# A session is one list: its record, then its frames. So frame t is at t + 1, and all of it expires at once.
_APPEND = """
if redis.call('LLEN', KEYS[1]) ~= tonumber(ARGV[1]) + 1 then return 0 end
redis.call('RPUSH', KEYS[1], ARGV[2])
return redis.call('PEXPIRE', KEYS[1], ARGV[3])
"""
_REOPEN = """
local record = redis.call('LINDEX', KEYS[1], 0)
if not record then return false end
if redis.call('PTTL', KEYS[1]) < tonumber(ARGV[1]) then redis.call('PEXPIRE', KEYS[1], ARGV[1]) end
return {record, redis.call('LLEN', KEYS[1]) - 1}
"""
_ACTION = Struct("<i")  # before a frame's codes
_SECONDS = 2  # to wait for an answer: meanwhile nobody plays


class RedisStore:
    """A SessionStore. It keeps sessions as well as Redis is set up to: give it an append-only file, and no eviction.

    Times are Redis's own, so the clocks of the services need not agree.
    """

    def __init__(self, url: str, idle_seconds: float) -> None:
        """Raises ValueError, which names the host but not the password, when the URL is wrong or Redis not there."""
        self._idle_ms = max(round(1000 * idle_seconds), 1)
        try:
            # A command whose answer was lost is never sent again unasked: it may have been carried out.
            self._redis = Redis.from_url(
                url, socket_timeout=_SECONDS, socket_connect_timeout=_SECONDS, retry=Retry(NoBackoff(), 0)
            )
        except ValueError:  # its text may quote from the password
            raise ValueError(
                "session_store is no URL of Redis: it reads redis://user:password@host:6379/0, in user and password"
                " signs like / and @ as %2F and %40"
            ) from None
        found = self._redis.connection_pool.connection_kwargs
        self._password = found.get("password")
        self._place = found.get("path") or f"{found.get('host', 'localhost')}:{found.get('port', 6379)}"
        try:
            self._redis.ping()
        except (RedisError, TypeError, OSError) as error:  # TypeError: an option in the URL that there is not
            raise ValueError(
                f"sessions cannot be kept in Redis at {self._place}: {self._reason(error)};"
                " start it, or name another --session-store"
            ) from None

    def create(self, record: SessionRecord, frames: Sequence[Frame]) -> None:
        fields = asdict(record)
        prompt = fields.pop("prompt")
        with self._reached() as redis, redis.pipeline(transaction=True) as pipe:
            pipe.rpush(_key(record.id), json.dumps(fields).encode() + b"\n" + prompt, *map(_packed, frames))
            pipe.pexpire(_key(record.id), self._idle_ms)
            pipe.execute()

    def append(self, frames: Sequence[Frame]) -> list[bool]:
        with self._reached() as redis, redis.pipeline(transaction=False) as pipe:
            for frame in frames:
                pipe.eval(_APPEND, 1, _key(frame.session), frame.t, _packed(frame), self._idle_ms)
            return [kept == 1 for kept in pipe.execute()]

    def reopen(self, session_id: str) -> tuple[SessionRecord, int] | None:
        with self._reached() as redis:
            found = redis.eval(_REOPEN, 1, _key(session_id), self._idle_ms)
        return (_record(found[0]), found[1]) if found else None

    def record(self, session_id: str) -> SessionRecord | None:
        with self._reached() as redis:
            found = cast(bytes | None, redis.lindex(_key(session_id), 0))
        return _record(found) if found else None

    def frames(self, session_id: str, shape: tuple[int, ...], start: int = 0, stop: int | None = None) -> list[Frame]:
        with self._reached() as redis:
            found = cast(list[bytes], redis.lrange(_key(session_id), start + 1, -1 if stop is None else stop))
        return [
            Frame(
                session_id,
                t,
                _ACTION.unpack_from(one)[0],
                np.frombuffer(one, "<u2", offset=_ACTION.size).reshape(shape),
            )
            for t, one in enumerate(found, start)
        ]

    def delete(self, session_id: str) -> bool:
        with self._reached() as redis:
            return redis.delete(_key(session_id)) == 1

    def delete_expired(self) -> None:
        """Redis frees it by itself."""

    def close(self) -> None:
        self._redis.close()

    @contextmanager
    def _reached(self) -> Iterator[Redis]:
        """Raises StoreError."""
        try:
            yield self._redis
        except RedisError as error:
            log.warning("sessions cannot be kept in Redis at %s: %s", self._place, self._reason(error))
            self._redis.connection_pool.disconnect()  # its name may lead to another by now, that can be written to
            raise StoreError from None

    def _reason(self, error: Exception) -> str:
        """In one line. An old Redis quotes what it did not understand, and that may be the password."""
        reason = " ".join(str(error).split())
        return reason.replace(self._password, "***") if self._password else reason


def _key(session_id: str) -> str:
    return f"genie:session:{session_id}"


def _packed(frame: Frame) -> bytes:
    return _ACTION.pack(frame.action) + frame.codes_NC.astype("<u2").tobytes()


def _record(packed: bytes) -> SessionRecord:
    fields, _, prompt = packed.partition(b"\n")
    return SessionRecord(**json.loads(fields), prompt=prompt)
