"""The server of HTTP, and what it does not put up with."""

from __future__ import annotations

import asyncio
from typing import Literal

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

HEADER_SECONDS = 10.0


def server_of(app: FastAPI, lifespan: Literal["on", "off"] = "on") -> uvicorn.Server:
    """What serves `app`, which learns how many connections there are."""
    server = uvicorn.Server(
        uvicorn.Config(
            app,
            lifespan=lifespan,
            log_level="warning",
            access_log=False,
            timeout_graceful_shutdown=5,
            http=ImpatientProtocol,
            ws_max_size=65_536,
            ws_per_message_deflate=False,  # pictures are packed already
            forwarded_allow_ips=app.state.settings.trusted_proxies,
        )
    )
    app.state.clients.connections = server.server_state.connections
    return server


class ImpatientProtocol(HttpToolsProtocol):
    """uvicorn's, which by itself would wait for ever for the end of a request's headers."""

    _overdue: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._expect_headers()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._expect_headers()

    def on_headers_complete(self) -> None:
        self._expect_nothing()
        super().on_headers_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        self._expect_nothing()
        super().connection_lost(exc)

    def _expect_headers(self) -> None:
        self._expect_nothing()
        self._overdue = self.loop.call_later(HEADER_SECONDS, self.transport.close)

    def _expect_nothing(self) -> None:
        if self._overdue:
            self._overdue.cancel()
