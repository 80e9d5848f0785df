"""The play page in a headless Chromium, on a live service with a real tiny model."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from chromium import EXECUTABLE, Chromium, wait_for
from page_help import PICTURE, PREVIEWED, STEPS, click, mouse, serving, shown, step_to
from PIL import Image, ImageSequence
from play_help import pixels

from serving.engine import Engine

pytestmark = pytest.mark.skipif(EXECUTABLE is None, reason="no chromium on PATH: install it to test the page")

DROP = """(() => {
  const surface = new OffscreenCanvas(300, 100);
  surface.getContext("2d").fillRect(0, 0, 300, 100);
  return surface.convertToBlob().then((blob) => {
    const dropped = new DataTransfer();
    dropped.items.add(new File([blob], "black.png", { type: "image/png" }));
    window.dispatchEvent(new DragEvent("drop", { dataTransfer: dropped, cancelable: true }));
  });
})()"""

FETCH_FRAME = """fetch("v1/sessions/%s/frames/%d").then((response) => response.blob()).then((blob) =>
  new Promise((resolve) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.readAsDataURL(blob);
  }))"""
GAMEPAD = """(() => {
  const buttons = Array.from({ length: 17 }, () => ({ pressed: false }));
  window.pad = { connected: true, buttons, axes: [0, 0, 0, 0] };
  navigator.getGamepads = () => [null, window.pad];
  window.dispatchEvent(new Event("gamepadconnected"));
})()"""

LOSE_AN_ANSWER = """(() => {
  const real = window.fetch;
  window.asked = 0;
  window.fetch = async (path, options) => {
    const response = await real(path, options);
    if (path.endsWith("/step") && ++window.asked === 1) throw new TypeError("the connection was lost");
    return response;
  };
})()"""


@pytest.fixture(scope="module")
def service(model_folder: Path) -> Iterator[tuple[str, Engine]]:
    with serving(model_folder) as running:
        yield running


@pytest.fixture
def url(service: tuple[str, Engine]) -> str:
    return service[0]


@pytest.fixture
def engine(service: tuple[str, Engine]) -> Engine:
    return service[1]


@pytest.fixture
def page(url: str, browser: Chromium, request: pytest.FixtureRequest) -> Iterator[Chromium]:
    """The page with its previews drawn; nothing may be on the console in the end."""
    browser.open(url, **getattr(request, "param", {}))
    browser.wait_until(PREVIEWED)
    yield browser
    assert browser.errors == []


def test_keys_play_the_world(page: Chromium) -> None:
    assert page.evaluate("document.querySelector('.version').textContent") == "genie · version 3"
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
    assert float(page.evaluate("document.querySelector('.rate').textContent")) > 0
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
        "[...document.querySelector('.screen canvas').getContext('2d').getImageData(9, 9, 1, 1).data].join()"
        " === '0,0,0,255'"
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


def test_the_past_is_looked_at_and_branched_from(page: Chromium, engine: Engine) -> None:
    wait_for(lambda: engine.num_sessions == 1, "the session of the page before to end", 10)
    frames = [shown(page)]
    for steps in range(1, 6):
        step_to(page, "2", steps)
        frames.append(shown(page))
    page.wait_until(PREVIEWED)
    (old,) = engine._sessions
    strip = "[...document.querySelectorAll('#played-film [role=option]')].map((option) => option.ariaLabel)"
    assert page.evaluate(strip) == ["frame 0, the prompt", *(f"frame {t}" for t in range(1, 6))]

    page.press("ArrowLeft")
    page.press("Backspace")
    assert page.evaluate(STEPS) == 3
    assert (shown(page) == frames[3]).all()
    page.press("Escape")  # back where it was: nothing has happened to the world
    assert page.evaluate(STEPS) == 5
    assert page.evaluate(PREVIEWED)
    assert list(engine._sessions) == [old]

    page.evaluate("document.querySelector('#played-film').focus()")
    page.press("Home")
    assert (shown(page) == frames[0]).all()
    page.evaluate("document.querySelector('#played-film [data-t=\"2\"]').click()")
    step_to(page, "4", 3)
    wait_for(lambda: old not in engine._sessions, "the old session to end", 10)
    (new,) = engine._sessions
    assert page.evaluate(strip)[1:] == ["frame 1", "frame 2", "frame 3"]
    for t in range(3):
        kept = page.evaluate(FETCH_FRAME % (new, t))
        assert (pixels(base64.b64decode(kept.partition(",")[2])) == frames[t]).all()
    assert (shown(page) == engine._sessions[new].picture.frame_HWC).all()
    assert (shown(page) != frames[3]).any()
    step_to(page, "4", 4)


def test_a_drawing_starts_a_world(page: Chromium) -> None:
    page.press("D")
    page.wait_until("document.querySelector('#draw').open")
    page.press("1")  # no action is taken behind the panel
    click(page, "[name=colour][aria-label=blue]")
    click(page, "#draw [name=fill]")
    click(page, "[name=colour][aria-label=red]")
    click(page, "[name=brush][aria-label='broad brush']")
    box = page.evaluate("document.querySelector('#draw canvas').getBoundingClientRect().toJSON()")
    middle = box["y"] + box["height"] / 2
    for kind, across in (("mousePressed", 0.3), ("mouseMoved", 0.5), ("mouseMoved", 0.7), ("mouseReleased", 0.7)):
        mouse(page, kind, box["x"] + across * box["width"], middle)
    click(page, "#draw [name=clear]")
    click(page, "#draw [name=undo]")
    click(page, "#draw [name=play]")
    page.wait_until("document.querySelector('#sketch').ariaPressed === 'true'")
    frame_HWC = shown(page)
    height, width, _ = frame_HWC.shape
    assert np.abs(frame_HWC[height // 2, width // 2] - np.array([0xD8, 0x48, 0x3F])).max() < 8
    assert np.abs(frame_HWC[2, 2] - np.array([0x55, 0xAE, 0xE6])).max() < 8
    assert page.evaluate(STEPS) == 0
    step_to(page, "1", 1)
    page.press("R")  # the same drawing once more
    page.wait_until(f"{STEPS} === 0")
    assert (shown(page) == frame_HWC).all()


def test_a_name_stays_with_its_action(page: Chromium, url: str) -> None:
    click(page, "#name")
    page.send("Input.insertText", text="jump 2")
    page.press("Enter")
    label = "document.querySelector('#actions button').ariaLabel"
    assert page.evaluate(label) == "jump 2, action 1"
    assert page.evaluate("document.activeElement === document.querySelector('#actions button')")
    assert page.evaluate(STEPS) == 0  # no key was an action
    page.open(url)
    page.wait_until(PREVIEWED)
    assert page.evaluate(label) == "jump 2, action 1"
    assert page.evaluate("document.querySelector('#actions .name').textContent") == "jump 2"
    page.evaluate("localStorage.clear()")


def test_a_gamepad_plays(page: Chromium) -> None:
    page.evaluate(GAMEPAD)
    page.evaluate("pad.buttons[2].pressed = true")
    page.wait_until(f"{STEPS} >= 1")
    page.wait_until("document.querySelectorAll('#actions button')[2].classList.contains('held')")
    page.evaluate("pad.buttons[2].pressed = false")
    page.wait_until(PREVIEWED)
    page.evaluate("pad.axes[0] = 0.9")  # right: of nameless actions the second
    page.wait_until("document.querySelectorAll('#actions button')[1].classList.contains('held')")
    page.evaluate("pad.connected = false")
    page.wait_until("!document.querySelector('#actions .held')")


def test_the_world_is_shared_as_an_animation(page: Chromium, tmp_path: Path) -> None:
    page.send("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(tmp_path))
    step_to(page, "1", 1)
    step_to(page, "2", 2)
    click(page, "#gif")
    file = tmp_path / "genie-2.gif"
    wait_for(file.exists, "the download", 10)
    assert len(list(ImageSequence.Iterator(Image.open(io.BytesIO(file.read_bytes()))))) == 3
    page.press("m")
    film = tmp_path / "genie-2.mp4"
    wait_for(film.exists, "the film's download", 10)
    assert film.read_bytes()[4:8] == b"ftyp"


def test_a_step_whose_answer_is_lost_is_not_taken_twice(page: Chromium, engine: Engine) -> None:
    wait_for(lambda: engine.num_sessions == 1, "the session of the page before to end", 10)
    page.evaluate(LOSE_AN_ANSWER)
    step_to(page, "2", 1)
    page.wait_until(PREVIEWED)
    assert page.evaluate("window.asked") == 2
    (session,) = engine._sessions.values()
    assert session.steps == 1
    assert (shown(page) == session.picture.frame_HWC).all()


def test_a_world_that_has_ended_begins_anew(page: Chromium, engine: Engine) -> None:
    wait_for(lambda: engine.num_sessions == 1, "the session of the page before to end", 10)
    before = shown(page)
    step_to(page, "2", 1)
    page.wait_until(PREVIEWED)
    (ended,) = engine._sessions
    page.evaluate(f"fetch('v1/sessions/{ended}', {{ method: 'DELETE' }}).then(() => null)")
    page.press("2")
    page.wait_until("document.querySelector('#message').textContent.includes('anew')")
    assert page.evaluate(STEPS) == 0
    assert (shown(page) == before).all()
    page.wait_until(PREVIEWED)
    assert all("404" in error for error in page.errors)
    page.errors.clear()
    step_to(page, "2", 1)


def test_play_goes_on_after_the_service_was_away(model_folder: Path, browser: Chromium, tmp_path: Path) -> None:
    store = str(tmp_path / "sessions.db")
    with serving(model_folder, session_store=store) as (url, engine):
        browser.open(url)
        browser.wait_until(PREVIEWED)
        for steps in range(1, 4):
            step_to(browser, "2", steps)
        browser.wait_until(PREVIEWED)
        (session_id,) = engine._sessions
    before = shown(browser)
    browser.press("3")
    browser.wait_until("document.querySelector('#message').textContent.includes('Trying again')")
    assert browser.evaluate("document.querySelector('#worlds').classList.contains('lost')")
    assert (shown(browser) == before).all()

    with serving(model_folder, int(url.rpartition(":")[2]), session_store=store) as (_, engine):
        browser.wait_until(f"{STEPS} === 4")
        assert "back" in browser.evaluate("document.querySelector('#message').textContent")
        browser.wait_until(PREVIEWED)
        step_to(browser, "1", 5)
        assert {id: session.steps for id, session in engine._sessions.items()} == {session_id: 5}
        assert (shown(browser) == engine._sessions[session_id].picture.frame_HWC).all()
        assert all("ERR_CONNECTION_REFUSED" in error for error in browser.errors), browser.errors
        browser.open("about:blank")
