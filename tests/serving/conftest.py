"""A real model that a tiny run trained: its pictures mean little, but every part of it works."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import uvicorn
from chromium import Chromium
from fakeredis import TcpFakeServer
from fastapi.testclient import TestClient
from play_help import Registry, eventually, pixels
from redis_server import EXECUTABLE, RedisServer

from serving.__main__ import bind
from serving.app import create_app
from serving.connections import server_of
from serving.settings import Settings


@pytest.fixture(scope="session", autouse=True)
def no_sessions_kept() -> Iterator[None]:
    """Unless a test names a file."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GENIE_SESSION_STORE", ":memory:")
        yield


@pytest.fixture
def redis_server(tmp_path: Path) -> Iterator[RedisServer]:
    if EXECUTABLE is None:
        pytest.skip("no redis-server here: install redis-server")
    with RedisServer(tmp_path / "redis") as server:
        yield server


@pytest.fixture
def fake_redis() -> Iterator[str]:
    """The URL of one that needs no redis-server."""
    server = TcpFakeServer(("127.0.0.1", 0))
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield f"redis://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture(params=["sqlite", "fake redis", "redis"])
def any_store(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """What `session_store` names, of each kind."""
    if request.param == "redis":
        server: RedisServer = request.getfixturevalue("redis_server")
        return server.url
    return str(tmp_path / "sessions.db" if request.param == "sqlite" else request.getfixturevalue("fake_redis"))


@pytest.fixture(scope="session")
def model_folder(tiny_model_uri: str) -> Path:
    return Path(tiny_model_uri)


@pytest.fixture(scope="session")
def start_frames(model_folder: Path) -> dict[str, np.ndarray]:
    return {path.stem: pixels(path.read_bytes()) for path in sorted((model_folder / "start_frames").glob("*.png"))}


@pytest.fixture
def registry(model_folder: Path) -> Registry:
    registry = Registry()
    registry.set_alias("1", model_folder)
    return registry


@pytest.fixture
def serve(registry: Registry) -> Iterator[Callable[..., TestClient]]:
    """serve(**settings): a client of a running service; unless `wait` is set, its model is loaded."""
    clients: list[TestClient] = []

    def start(**overrides: object) -> TestClient:
        settings = Settings(**{"poll_seconds": 0.05, **overrides})
        app = create_app(settings, registry)
        if not settings.wait:
            app.state.engine.models.refresh()
        clients.append(TestClient(app).__enter__())
        return clients[-1]

    yield start
    for client in clients:
        client.__exit__(None, None, None)


@pytest.fixture
def address(serve: Callable[..., TestClient]) -> Iterator[Callable[..., tuple[str, int]]]:
    """address(**settings): where a running service listens."""
    servers: list[tuple[uvicorn.Server, threading.Thread]] = []

    def start(**settings: object) -> tuple[str, int]:
        client = serve(**settings)
        server, listener = server_of(client.app, lifespan="off"), bind("127.0.0.1", 0)  # type: ignore[arg-type]
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        servers.append((server, thread))
        eventually(lambda: server.started)
        return listener.getsockname()[:2]

    yield start
    for server, thread in servers:
        server.should_exit = True
        thread.join(10)


@pytest.fixture(scope="session")
def browser() -> Iterator[Chromium]:
    browser = Chromium()
    yield browser
    browser.close()
