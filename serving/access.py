"""A number for every request, and a line in the log when it is answered."""

from __future__ import annotations

import json
import logging
import re
import secrets
import time

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.errors import ServiceError, answer
from serving.metrics import Metrics

log = logging.getLogger(__name__)
_HEADER = b"x-request-id"
_ALWAYS = [(b"x-content-type-options", b"nosniff"), (b"referrer-policy", b"no-referrer")]
_ONLY_OURS = (
    b"content-security-policy",
    b"default-src 'self'; img-src 'self' data: blob:; media-src 'self' blob:; frame-ancestors 'self'",
)
_DOCS = ("/docs", "/redoc")  # the API's page is FastAPI's, with scripts from elsewhere
_METHODS = {"GET", "HEAD", "POST", "DELETE", "OPTIONS"}  # a client may send any word
_SAFE = re.compile(rb"[\w.:-]{1,64}")  # what a proxy may have given; anything else is replaced


class Access:
    """Counts and logs answers, a WebSocket once it is closed.

    A request keeps the X-Request-ID that it came with, and its answer carries it.

    What the application did not expect is logged with the request's number, and answered with it.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app = app
        self.metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        given = dict(scope["headers"]).get(_HEADER, b"")
        request_id = given if _SAFE.fullmatch(given) else secrets.token_hex(8).encode()
        began, status = time.perf_counter(), 0
        always = _ALWAYS if scope["path"].startswith(_DOCS) else [*_ALWAYS, _ONLY_OURS]

        async def numbered(message: Message) -> None:
            nonlocal status
            if message["type"].endswith("http.response.start"):  # a WebSocket may be refused so, too
                status = message["status"]
                message["headers"] = [*message.get("headers", []), (_HEADER, request_id), *always]
            elif message["type"] == "websocket.accept":
                status = 101
                message["headers"] = [*message.get("headers", []), (_HEADER, request_id)]
            elif message["type"] == "websocket.close":
                status = message.get("code", 1000)
            await send(message)

        try:
            await self.app(scope, receive, numbered)
        except Exception:
            route = _route(scope)
            log.exception("%s %s failed", _method(scope), route, extra={"request_id": request_id.decode()})
            if not status:
                error = ServiceError("the service failed; its log says why, beside this answer's X-Request-ID")
                await answer(error)(scope, receive, numbered)
        finally:
            route = _route(scope)
            method = _method(scope)
            self.metrics.answers.labels(method, route, status).inc()
            log.info(
                "%s %s %d",
                method,
                route,
                status,
                extra={
                    "request_id": request_id.decode(),
                    "method": method,
                    "route": route,
                    "status": status,
                    "milliseconds": round(1e3 * (time.perf_counter() - began), 1),
                },
            )


def _method(scope: Scope) -> str:
    if scope["type"] == "websocket":
        return "WS"
    return scope["method"] if scope["method"] in _METHODS else "other"


def _route(scope: Scope) -> str:
    """Not the path: a session's id is a secret."""
    return getattr(scope.get("route"), "path", "unknown")


class JsonLines(logging.Formatter):
    """A log record as one line of JSON: what it says, and the fields of its `extra`."""

    _OWN = frozenset(logging.makeLogRecord({}).__dict__) | {"message", "asctime", "taskName"}

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        line |= {key: value for key, value in record.__dict__.items() if key not in self._OWN}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)
