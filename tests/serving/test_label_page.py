"""The labelling page: what it keeps and gives, and how it is used by keys in a headless Chromium."""

from __future__ import annotations

import io
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import uvicorn
from chromium import EXECUTABLE, Chromium, wait_for
from curation_help import LENGTH, SIDE, write_videos
from fastapi.testclient import TestClient
from filelock import FileLock
from PIL import Image

from genie_model.data.labels import read_labels
from serving.__main__ import bind
from serving.label.__main__ import main
from serving.label.app import create_app
from serving.label.clips import Clips

SHOWN = "document.querySelector('#title').textContent + document.querySelector('#place').textContent"
PRESSED = "document.querySelector('.choices [aria-pressed=true]')?.value"
FRAME = "Number(document.querySelector('canvas')?.dataset.frame)"


@pytest.fixture(scope="module")
def data_uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_videos(str(tmp_path_factory.mktemp("videos")), range(4), clips=2)


@pytest.fixture
def labels(tmp_path: Path) -> str:
    return str(tmp_path / "labels.json")


@pytest.fixture
def client(data_uri: str, labels: str) -> TestClient:
    return TestClient(create_app(Clips(data_uri, labels)), base_url="http://localhost")


def test_clips_come_once_in_a_mixed_order_and_labels_are_kept_at_once(client: TestClient, labels: str) -> None:
    position, sources = -1, []
    while clip := client.get(f"/clips/next?after={position}").json()["clip"]:
        position = clip["position"]
        sources.append(clip["source"])
        kept = client.put(f"/clips/{position}/label", json={"label": 1 + position % 5}).json()
        assert kept["clip"]["label"] == 1 + position % 5
        said = read_labels(labels)[clip["digest"]]
        assert (said.source, said.start_seconds, said.label) == (
            clip["source"],
            clip["start_seconds"],
            1 + position % 5,
        )
    assert len(sources) == 8
    assert sources != sorted(sources)
    assert kept["progress"] == {
        "clips": 8,
        "labelled": 8,
        "counts": {"1": 2, "2": 2, "3": 2, "4": 1, "5": 1},
        "videos": {"1": len({sources[0], sources[5]}), "5": 1},
    }
    assert client.get("/labels.json").content == Path(labels).read_bytes()


def test_what_was_labelled_is_not_asked_again_and_can_be_changed_or_taken_back(
    client: TestClient, data_uri: str, labels: str
) -> None:
    for position in (0, 2):
        client.put(f"/clips/{position}/label", json={"label": 5})
    again = TestClient(create_app(Clips(data_uri, labels)), base_url="http://localhost")
    assert again.get("/clips/next").json()["clip"]["position"] == 1
    assert again.get("/clips/next?after=1").json()["clip"]["position"] == 3
    again.put("/clips/2/label", json={"label": 1})
    assert sorted(said.label for said in read_labels(labels).values()) == [1, 5]
    again.put("/clips/0/label", json={"label": None})
    assert again.get("/clips/next").json()["clip"]["position"] == 0
    assert [said.label for said in read_labels(labels).values()] == [1]


def test_a_sheet_holds_the_clip_s_frames_in_rows(client: TestClient, data_uri: str, labels: str) -> None:
    clip = client.get("/clips/3").json()["clip"]
    sheet = np.asarray(Image.open(io.BytesIO(client.get(f"/clips/3/sheet.jpg?digest={clip['digest']}").content)))
    columns = clip["columns"]
    assert sheet.shape == (-(-LENGTH // columns) * SIDE, columns * SIDE, 3)
    frames = Clips(data_uri, labels).store.frames(Clips(data_uri, labels)._episode(3), 0, LENGTH)
    down, right = divmod(7, columns)
    shown = sheet[down * SIDE : (down + 1) * SIDE, right * SIDE : (right + 1) * SIDE]
    assert np.abs(shown.astype(int) - frames[7]).mean() < 8
    assert client.get("/clips/3/sheet.jpg?digest=0").status_code == 404


def test_what_cannot_be_is_refused(client: TestClient, data_uri: str) -> None:
    assert client.get("/clips/8").status_code == 404
    assert client.put("/clips/8/label", json={"label": 3}).status_code == 404
    for label in (0, 6, "good"):
        assert client.put("/clips/0/label", json={"label": label}).status_code == 422
    assert client.get("/clips/next", headers={"Host": "evil.example"}).status_code == 400


def test_the_command_says_what_is_wrong_in_one_line(
    data_uri: str, labels: str, tiny_data_uri: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(*arguments: str) -> str:
        assert main(["--port", "0", *arguments]) == 1
        (line,) = capsys.readouterr().err.splitlines()
        return line

    assert "there is no data set at nowhere/train" in refused("--data", "nowhere", "--labels", labels)
    assert "does not say which videos its clips are from" in refused("--data", tiny_data_uri, "--labels", labels)
    Path(labels).write_text("[]")
    assert "is no file of labels" in refused("--data", data_uri, "--labels", labels)
    with FileLock(f"{labels}.lock"):
        assert "another process labels into" in refused("--data", data_uri, "--labels", labels)


@pytest.fixture
def page(data_uri: str, labels: str, browser: Chromium) -> Iterator[Chromium]:
    """The page of a running service, its first clip playing; nothing may be on the console in the end."""
    server = uvicorn.Server(uvicorn.Config(create_app(Clips(data_uri, labels)), log_config=None))
    with bind("127.0.0.1", 0) as listener:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        browser.open(f"http://127.0.0.1:{listener.getsockname()[1]}")
        browser.wait_until(f"{FRAME} >= 0")
        yield browser
        server.should_exit = True
        thread.join(timeout=20)
    assert browser.errors == []


@pytest.mark.skipif(EXECUTABLE is None, reason="no chromium on PATH: install it to test the page")
def test_keys_label_go_back_and_skip(page: Chromium, labels: str) -> None:
    def shown_after(key: str) -> str:
        before = page.evaluate(SHOWN)
        page.press(key)
        page.wait_until(f"{SHOWN} !== {before!r}")
        return str(page.evaluate(SHOWN))

    first = page.evaluate(SHOWN)
    frames = set[int]()
    wait_for(lambda: frames.add(page.evaluate(FRAME)) or len(frames) >= 3, "the clip to play", 15)
    page.press(" ")
    stood = page.evaluate(FRAME)
    page.evaluate("new Promise((done) => setTimeout(done, 200))")
    assert page.evaluate(FRAME) == stood, "paused"

    second = shown_after("5")
    assert [said.label for said in read_labels(labels).values()] == [5]
    third = shown_after("ArrowRight")
    assert len({first, second, third}) == 3
    assert shown_after("ArrowLeft") == second
    assert page.evaluate(PRESSED) is None
    assert shown_after("Backspace") == first
    assert page.evaluate(PRESSED) == "5"
    assert shown_after("1") == second
    assert [said.label for said in read_labels(labels).values()] == [1]
    shown_after("ArrowLeft")
    page.press("0")
    page.wait_until(f"{PRESSED} === undefined")
    assert read_labels(labels) == {}


@pytest.mark.skipif(EXECUTABLE is None, reason="no chromium on PATH: install it to test the page")
def test_the_last_clip_is_told_and_a_new_page_brings_those_that_were_skipped(page: Chromium, labels: str) -> None:
    first = page.evaluate(SHOWN)
    page.press("ArrowRight")
    page.wait_until(f"{SHOWN} !== {first!r}")
    for count in range(1, 8):
        page.wait_until(f"document.querySelector('#done').textContent.startsWith('{count - 1} of 8')")
        page.wait_until("!document.querySelector('.screen').classList.contains('labelled')")
        page.press("2")
        page.wait_until(f"document.querySelector('#done').textContent.startsWith('{count} of 8')")
    page.wait_until("document.querySelector('#message').textContent.startsWith('That was the last clip')")
    page.send("Page.reload")
    page.wait_until("document.querySelector('#done')?.textContent.startsWith('7 of 8')")
    page.wait_until(f"{FRAME} >= 0")
    page.press("3")
    page.wait_until("document.querySelector('#message').textContent === 'That was the last clip.'")
    assert len(read_labels(labels)) == 8
