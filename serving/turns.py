"""Whose turn it is at what takes long, so that players go first and no client crowds out the others."""

from __future__ import annotations

import asyncio
import math
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from weakref import WeakValueDictionary

from serving.clients import Client
from serving.errors import BadRequestError, SlowJobError, SlowUploadError, TooManyRequestsError
from serving.settings import Settings

_LOOK_SECONDS = 2.0  # how often it is seen whether somebody who waits has left
_GONE = "the client left"  # for the log alone


class LongJobs:
    """Rollouts and animations: made one at a time; only so many may wait, and of each client only so many."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._of_client = Counter[str]()  # made or waiting
        self._one = asyncio.Semaphore(1)
        self._last_seconds = 5.0  # that one took; at first a guess

    @asynccontextmanager
    async def turn(self, client: Client, gone: Callable[[], Awaitable[bool]]) -> AsyncIterator[None]:
        """Raises TooManyRequestsError, SlowJobError, and BadRequestError once the client is `gone`."""
        most, own = self._settings.max_rollouts, self._settings.client_rollouts
        mine, waiting = self._of_client[client.name], self._of_client.total()
        if waiting >= most or (own and mine >= own):
            whose = (
                f"{waiting} rollouts or animations" if waiting >= most else f"{mine} rollouts or animations of yours"
            )
            raise TooManyRequestsError(f"{whose} are being made: try again later", math.ceil(self._last_seconds))
        self._of_client[client.name] += 1
        try:
            async with asyncio.timeout(self._settings.max_rollout_seconds):
                await self._wait(gone)
                began = time.monotonic()
                try:
                    yield
                finally:
                    self._last_seconds = time.monotonic() - began
                    self._one.release()
        except TimeoutError:
            most_seconds = self._settings.max_rollout_seconds
            raise SlowJobError(f"not made within {most_seconds:g} seconds: ask for fewer frames, or later") from None
        finally:
            self._of_client -= Counter([client.name])  # drops what comes to nothing

    async def _wait(self, gone: Callable[[], Awaitable[bool]]) -> None:
        while True:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._one.acquire(), _LOOK_SECONDS)
                return
            await leave_if(gone)


async def leave_if(gone: Callable[[], Awaitable[bool]]) -> None:
    """Raises BadRequestError, which nobody will read, where the client left."""
    if await gone():
        raise BadRequestError(_GONE)


class Decoding:
    """Uploads are decoded two at a time, of each client one: a picture of 40 megapixels takes a second and 300 MB."""

    def __init__(self, settings: Settings) -> None:
        self._seconds = settings.max_upload_seconds
        self._two = asyncio.Semaphore(2)
        self._of_client = WeakValueDictionary[str, asyncio.Lock]()

    @asynccontextmanager
    async def turn(self, client: Client) -> AsyncIterator[None]:
        """Raises SlowUploadError where it does not come in time."""
        own = self._of_client.setdefault(client.name, asyncio.Lock())
        try:
            async with asyncio.timeout(self._seconds):
                await own.acquire()
                try:
                    await self._two.acquire()
                except BaseException:
                    own.release()
                    raise
        except TimeoutError:
            raise SlowUploadError(f"other pictures took longer than {self._seconds:g} seconds: try again") from None
        try:
            yield
        finally:
            self._two.release()
            own.release()
