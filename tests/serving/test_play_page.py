"""The play page in a headless Chromium, on a live service with a real tiny model."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import uvicorn
from chromium import EXECUTABLE, Chromium
from play_help import Registry

from serving.app import create_app
from serving.settings import Settings

pytestmark = pytest.mark.skipif(EXECUTABLE is None, reason="no chromium on PATH: install it to test the page")

PICTURE = "document.querySelector('#canvas').toDataURL()"
STEPS = "Number(document.querySelector('#steps').textContent)"
PREVIEWED = (
    "document.querySelectorAll('#actions img[src]').length === 4"
    " && !document.querySelector('#actions').classList.contains('stale')"
)
DROP = """(() => {
  const surface = new OffscreenCanvas(300, 100);
  surface.getContext("2d").fillRect(0, 0, 300, 100);
  return surface.convertToBlob().then((blob) => {
    const dropped = new DataTransfer();
    dropped.items.add(new File([blob], "black.png", { type: "image/png" }));
    window.dispatchEvent(new DragEvent("drop", { dataTransfer: dropped, cancelable: true }));
  });
})()"""


@pytest.fixture(scope="module")
def url(model_folder: Path) -> Iterator[str]:
    registry = Registry()
    registry.set_alias("3", model_folder)
    app = create_app(Settings(), registry)
    app.state.engine.refresh()
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        server.should_exit = True
        thread.join(timeout=20)


@pytest.fixture(scope="module")
def browser() -> Iterator[Chromium]:
    browser = Chromium()
    yield browser
    browser.close()


@pytest.fixture
def page(url: str, browser: Chromium, request: pytest.FixtureRequest) -> Iterator[Chromium]:
    """The page with its previews drawn; nothing may be on the console in the end."""
    browser.open(url, **getattr(request, "param", {}))
    browser.wait_until(PREVIEWED)
    yield browser
    assert browser.errors == []


def test_keys_play_the_world(page: Chromium) -> None:
    assert page.evaluate("document.querySelector('#version').textContent") == "genie · version 3"
    before, previews = page.evaluate(PICTURE), page.evaluate("document.querySelector('#actions').innerHTML")

    page.press("2")
    page.wait_until(f"{STEPS} >= 1")
    page.wait_until(PREVIEWED)
    assert page.evaluate(PICTURE) != before
    assert page.evaluate("document.querySelector('#actions').innerHTML") != previews

    page.key_down("1")  # held: it steps until it is let go
    page.wait_until(f"{STEPS} >= 8")
    page.key_up("1")
    page.wait_until(PREVIEWED)
    assert float(page.evaluate("document.querySelector('#rate').textContent")) > 0
    steps = page.evaluate(STEPS)
    page.press("9")  # no such action
    page.press("R")
    page.wait_until(f"{STEPS} === 0")
    page.wait_until(PREVIEWED)
    assert steps >= 8
    assert page.evaluate(PICTURE) == before

    page.press("N")
    page.wait_until(f"{PICTURE} !== {before!r}")


def test_the_keyboard_reaches_every_button(page: Chromium) -> None:
    page.evaluate("document.querySelector('#actions button').focus()")
    page.key_down("Enter")
    page.wait_until(f"{STEPS} >= 2")
    page.key_up("Enter")
    names = page.evaluate("[...document.querySelectorAll('button')].map((b) => b.ariaLabel || b.textContent.trim())")
    assert all(names)
    assert page.evaluate("[...document.querySelectorAll('button')].every((b) => b.tabIndex === 0)")


def test_a_dropped_image_starts_a_world(page: Chromium) -> None:
    page.evaluate(DROP)
    page.wait_until(
        "[...document.querySelector('#canvas').getContext('2d').getImageData(9, 9, 1, 1).data].join() === '0,0,0,255'"
    )
    page.press("3")
    page.wait_until(f"{STEPS} >= 1")


@pytest.mark.parametrize("page", [{"width": 390, "height": 844, "mobile": True}], indirect=True)
def test_a_touch_plays_on_a_phone(page: Chromium) -> None:
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    box = page.evaluate("document.querySelectorAll('#actions button')[3].getBoundingClientRect().toJSON()")
    assert box["bottom"] <= 844  # the world and all its buttons on one screen
    page.send("Input.dispatchTouchEvent", type="touchStart", touchPoints=[{"x": box["x"] + 20, "y": box["y"] + 20}])
    page.wait_until(f"{STEPS} >= 1")
    page.send("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])
    page.wait_until(PREVIEWED)
    page.evaluate("document.querySelectorAll('#starts button')[1].click()")
    page.wait_until(f"{STEPS} === 0")
