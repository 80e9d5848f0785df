"""The app factory."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import version
from pathlib import Path

from fastapi import FastAPI, Security
from fastapi.responses import FileResponse
from fastapi.security import HTTPBearer
from fastapi.staticfiles import StaticFiles
from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving import traces
from serving.access import Access
from serving.clients import Clients, Door
from serving.engine import Engine
from serving.errors import UploadTooLargeError, UploadTooSlowError, install_error_handlers
from serving.live import live, play
from serving.metrics import Metrics
from serving.model import ModelSource, model_source
from serving.routes import health, v1
from serving.settings import Settings

WEB = Path(__file__).parent / "web"
_FORM_BYTES = 4096  # what a multipart form adds to the file it carries
_PARSED_AT_ONCE = {"application/json": 2**16, "application/x-www-form-urlencoded": 2**20}  # in the event loop
_PAGE_HEADERS = {"Cache-Control": "no-cache"}
_SHOWN_ELSEWHERE = ["X-Steps", "X-Request-ID", "Server-Timing", "Retry-After"]


def create_app(settings: Settings | None = None, source: ModelSource | None = None) -> FastAPI:
    """The play service. `source` says which model is served; by default `settings` do.

    The model loads in the background once the app runs (/readyz says when); `app.state.engine.models.refresh()` before
    that loads it at once, or raises ValueError saying what is missing.
    """
    settings = settings or Settings()
    metrics = Metrics()
    clients = Clients(settings)
    engine = Engine(settings, source or model_source(settings), metrics)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        engine.models.follow()
        app.state.tasks = [asyncio.create_task(work) for work in (engine.passes.run(), engine.expire_idle())]
        yield
        for task in app.state.tasks:
            task.cancel()
        engine.close()

    body_bytes = settings.max_upload_bytes * 4 // 3 + _FORM_BYTES  # a data URL takes four letters for three bytes
    app = FastAPI(
        title="Genie",
        summary="Play a world learned from video",
        description=f"`WS /v1/sessions/{{session_id}}/play`: {inspect.getdoc(play)}",
        version=version("genie-platform"),
        lifespan=lifespan,
        form_limits={"max_part_size": body_bytes},
    )
    app.state.settings, app.state.engine, app.state.metrics, app.state.clients = settings, engine, metrics, clients
    # The last one that is added is the first one that a request meets.
    app.add_middleware(BodyLimit, max_bytes=body_bytes, max_seconds=settings.max_upload_seconds)
    app.add_middleware(Door, clients=clients, origins=settings.cors_origins)
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=settings.cors_origins, allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["Authorization", "Content-Type", "X-Request-ID"], expose_headers=_SHOWN_ELSEWHERE,
        )  # fmt: skip
    app.add_middleware(Access, metrics=metrics)
    if settings.traces:
        traces.send(app)
    install_error_handlers(app)
    keys = [Security(HTTPBearer(auto_error=False, description="an API key"))] if settings.api_keys else []
    app.include_router(v1, dependencies=keys)  # which `Door` has looked at: here for who reads the API's description
    for router in (health, live):
        app.include_router(router)

    @app.get("/", include_in_schema=False)
    async def page() -> FileResponse:
        return FileResponse(WEB / "index.html", headers=_PAGE_HEADERS)

    app.mount("/web", StaticFiles(directory=WEB), name="web")
    return app


class BodyLimit:
    """Refuses a request body while it is read, as soon as it is too long or takes too long: nothing huge is kept."""

    def __init__(self, app: ASGIApp, max_bytes: int, max_seconds: float) -> None:
        self.app, self.max_bytes, self.max_seconds = app, max_bytes, max_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        received, whole, began = 0, False, asyncio.get_running_loop().time()
        kind = Headers(scope=scope).get("content-type", "").partition(";")[0].strip().lower()
        most = min(self.max_bytes, _PARSED_AT_ONCE.get(kind, self.max_bytes))

        async def limited_receive() -> Message:
            nonlocal received, whole
            try:  # behind the body nothing comes but the news that the client left
                async with asyncio.timeout_at(None if whole else began + self.max_seconds):
                    message = await receive()
            except TimeoutError:
                raise UploadTooSlowError(f"the upload took longer than {self.max_seconds:g} seconds") from None
            whole = not message.get("more_body", False)
            received += len(message.get("body", b""))
            if received > most:
                raise UploadTooLargeError(f"the upload is too large: at most {most / 1e6:.1f} MB as {kind or 'this'}")
            return message

        await self.app(scope, limited_receive, send)
