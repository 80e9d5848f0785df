"""A real model that a tiny run trained: its pictures mean little, but every part of it works."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from fastapi.testclient import TestClient
from play_help import Registry, pixels

from serving.app import create_app
from serving.settings import Settings


@pytest.fixture(scope="session", autouse=True)
def no_sessions_kept() -> Iterator[None]:
    """Unless a test names a file."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GENIE_SESSION_STORE", ":memory:")
        yield


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
