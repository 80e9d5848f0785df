"""The server of HTTP, and what it does not put up with."""

from __future__ import annotations

import asyncio
import socket
from typing import Any, Literal

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

HEADER_SECONDS = 10.0
_UNSENT_BYTES = 16 * 1024  # of a WebSocket: a few frames


def server_of(app: FastAPI, lifespan: Literal["on", "off"] = "on") -> uvicorn.Server:
    """What serves `app`; its logs are the program's own."""
    return uvicorn.Server(
        uvicorn.Config(
            app,
            lifespan=lifespan,
            log_config=None,
            log_level="warning",
            access_log=False,
            timeout_graceful_shutdown=5,
            http=ImpatientProtocol,
            ws_max_size=65_536,
            ws_per_message_deflate=False,  # pictures are packed already
            forwarded_allow_ips=app.state.settings.trusted_proxies,
        )
    )


class ImpatientProtocol(HttpToolsProtocol):
    """uvicorn's, which by itself would wait for ever for the end of a request's headers, and let in any number.

    A connection too many is told why, whatever it asks for, by `clients.Door`; those that were there before go on.
    """

    refused = ""
    _overdue: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.refused = self._too_many()
        self.app_state = {**self.app_state, "refused": self.refused}
        self._expect_headers()

    def handle_websocket_upgrade(self) -> None:
        """What a slow reader was not sent yet waits where a newer frame can take its place (live.Outbox)."""
        self.transport.set_write_buffer_limits(high=0)
        self.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _UNSENT_BYTES)
        super().handle_websocket_upgrade()

    def _too_many(self) -> str:
        """Why it is one; or nothing. Those that were refused do not count."""
        settings: Any = self.config.app.state.settings  # type: ignore[union-attr]
        others: list[Any] = [one for one in self.connections - {self} if not getattr(one, "refused", "")]
        if len(others) >= settings.max_connections:
            return f"{settings.max_connections} connections are open: try again later"
        most, own = settings.client_connections, [one for one in others if _address(one) == _address(self)]
        if most and len(own) >= most and not settings.trusted_proxies:  # behind a proxy all come from one address
            return f"{most} connections of yours are open: close one"
        return ""

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


def _address(connection: Any) -> str:
    return str(connection.client[0]) if connection.client else ""
