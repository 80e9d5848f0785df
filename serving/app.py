"""The app factory."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import version
from pathlib import Path

from fastapi import FastAPI
from fastapi.responses import FileResponse
from fastapi.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.access import Access
from serving.engine import Engine
from serving.errors import UploadTooLargeError, install_error_handlers
from serving.live import live
from serving.metrics import Metrics
from serving.model import ModelSource, model_source
from serving.routes import health, v1
from serving.settings import Settings

WEB = Path(__file__).parent / "web"
_FORM_BYTES = 4096  # what a multipart form adds to the file it carries
_PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data: blob:; frame-ancestors 'self'",
    "Cache-Control": "no-cache",
}


def create_app(settings: Settings | None = None, source: ModelSource | None = None) -> FastAPI:
    """The play service. `source` says which model is served; by default `settings` do.

    The model loads in the background once the app runs (/readyz says when); `app.state.engine.models.refresh()` before
    that loads it at once, or raises ValueError saying what is missing.
    """
    settings = settings or Settings()
    metrics = Metrics()
    engine = Engine(settings, source or model_source(settings), metrics)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        engine.models.follow()
        tasks = [asyncio.create_task(work) for work in (engine.play(), engine.expire_idle())]
        yield
        for task in tasks:
            task.cancel()
        engine.close()

    app = FastAPI(title="Genie", summary="Play a world learned from video", version=version("genie-platform"),
                  lifespan=lifespan)  # fmt: skip
    app.state.settings, app.state.engine, app.state.metrics = settings, engine, metrics
    app.add_middleware(BodyLimit, max_bytes=settings.max_upload_bytes + _FORM_BYTES)
    app.add_middleware(Access, metrics=metrics)
    install_error_handlers(app)
    for router in (health, v1, live):
        app.include_router(router)

    @app.get("/", include_in_schema=False)
    async def page() -> FileResponse:
        return FileResponse(WEB / "index.html", headers=_PAGE_HEADERS)

    app.mount("/web", StaticFiles(directory=WEB), name="web")
    return app


class BodyLimit:
    """Refuses a request body while it is read, as soon as it is too long: nothing huge is ever kept."""

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self.app = app
        self.max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        received = 0

        async def limited_receive() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self.max_bytes:
                raise UploadTooLargeError(f"the upload is too large: at most {self.max_bytes / 1e6:.1f} MB")
            return message

        await self.app(scope, limited_receive, send)
