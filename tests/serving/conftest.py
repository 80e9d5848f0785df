"""A real model, tiny and untrained: its pictures mean nothing, but every part of it works."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from fastapi.testclient import TestClient
from play_help import Registry, picture

from genie_model.checkpoint import save_model
from genie_model.genie import Genie
from genie_model.presets import get_preset
from serving.app import create_app
from serving.settings import Settings


@pytest.fixture(scope="session")
def start_frames() -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    return {name: random.integers(0, 256, (64, 64, 3), dtype=np.uint8) for name in ("level-1", "level-2")}


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory, start_frames: dict[str, np.ndarray]) -> Path:
    """What training leaves: config.json, model.safetensors, start_frames/*.png."""
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    save_model(str(folder), Genie(get_preset("tiny")))
    (folder / "start_frames").mkdir()
    for name, frame_HWC in start_frames.items():
        (folder / "start_frames" / f"{name}.png").write_bytes(picture(frame_HWC))
    return folder


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
            app.state.engine.refresh()
        clients.append(TestClient(app).__enter__())
        return clients[-1]

    yield start
    for client in clients:
        client.__exit__(None, None, None)
