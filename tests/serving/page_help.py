"""What the page's tests share: a live service, and the page as they read and press it."""

from __future__ import annotations

import base64
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from chromium import Chromium
from play_help import Registry, pixels

from serving.__main__ import bind
from serving.app import create_app
from serving.connections import server_of
from serving.engine import Engine
from serving.settings import Settings

PICTURE = "document.querySelector('.screen canvas').toDataURL()"
STEPS = "Number(document.querySelector('.steps').textContent)"
PREVIEWED = (
    "document.querySelectorAll('#actions img[src]').length === 4"
    " && !document.querySelector('#actions').classList.contains('stale')"
)


@contextmanager
def serving(
    model_folder: Path, port: int = 0, registry: Registry | None = None, **settings: Any
) -> Iterator[tuple[str, Engine]]:
    """A service on `port` (0: a free one): its address and its engine. Unless a registry is given, version 3 plays."""
    if registry is None:
        registry = Registry()
        registry.set_alias("3", model_folder)
    app = create_app(Settings(**settings), registry)
    app.state.engine.models.refresh()
    server = server_of(app)
    with bind("127.0.0.1", port) as listener:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", app.state.engine
        server.should_exit = True
        thread.join(timeout=20)


def shown(page: Chromium, world: str = "played") -> np.ndarray:
    """The frame on the screen."""
    picture = page.evaluate(f"document.querySelector('#{world} .screen canvas').toDataURL()")
    return pixels(base64.b64decode(picture.partition(",")[2]))


def step_to(page: Chromium, key: str, steps: int) -> None:
    page.press(key)
    page.wait_until(f"{STEPS} === {steps}")


def mouse(page: Chromium, kind: str, x: float, y: float) -> None:
    page.send("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", buttons=1, clickCount=1)


def click(page: Chromium, selector: str) -> None:
    """A real click in the middle of it."""
    box = page.evaluate(f"document.querySelector({selector!r}).getBoundingClientRect().toJSON()")
    for kind in ("mousePressed", "mouseReleased"):
        mouse(page, kind, box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
