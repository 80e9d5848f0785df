"""Larger frames, of a version that has a larger decoder: the same world, and only where they are asked for."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from chromium import EXECUTABLE, Chromium
from fastapi.testclient import TestClient
from page_help import PREVIEWED, serving, shown, step_to
from PIL import Image, ImageSequence
from play_help import Registry, assert_error, create, engine_of, eventually, nearly, pixels, step
from starlette.websockets import WebSocketDisconnect

from genie_model import checkpoint
from genie_model.enlarging import Enlarging
from genie_model.layers import TemporalCache

SIZE = 128
ACTIONS = [1, 0, 3, 2, 2, 1, 0, 3, 1, 2, 3]  # more than the window holds
Serve = Callable[..., TestClient]


@pytest.fixture(scope="module")
def large_folder(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with a larger decoder, which shows its pictures enlarged, and more."""
    folder = tmp_path_factory.mktemp("large") / "genie"
    shutil.copytree(model_folder, folder)
    torch.manual_seed(0)
    whole = Enlarging(checkpoint.load_config(str(folder)), checkpoint.load_tokenizer(str(folder)))
    torch.nn.init.normal_(whole.decoder.patch_out.weight, std=0.02)
    checkpoint.save_model(f"{folder}/large_decoder", whole, whole.decoder)
    return folder


@pytest.fixture
def registry(large_folder: Path, model_folder: Path) -> Registry:
    registry = Registry()
    registry.known["2"] = registry.of("2", model_folder)
    registry.set_alias("1", large_folder)
    return registry


@pytest.fixture
def expected(large_folder: Path, serve: Serve) -> list[np.ndarray]:
    """What the whole clip of a session's codes shows."""
    client = serve()
    session = create(client, seed=7)
    for action in ACTIONS:
        step(client, session, action)
    engine = engine_of(client)
    kept = engine._keeper._kept(engine._sessions[session], 0, len(ACTIONS) + 1)
    model = engine.model
    codes_BNC = [torch.from_numpy(frame.codes_NC.astype(np.int64))[None] for frame in kept]
    past = TemporalCache()
    return [model.larger().show(codes, past)[0].numpy() for codes in codes_BNC]


def large_step(client: TestClient, session: str, action: int) -> np.ndarray:
    answer = client.post(f"/v1/sessions/{session}/step?large=true", json={"action": action})
    assert answer.status_code == 200, answer.text
    return pixels(answer.content)


def test_steps_and_past_frames_come_large(serve: Serve, expected: list[np.ndarray]) -> None:
    client = serve()
    assert client.get("/v1/model").json()["large_height"] == SIZE
    session = create(client, seed=7)
    for action, frame_HWC in zip(ACTIONS, expected[1:], strict=True):
        assert nearly(large_step(client, session, action), frame_HWC)
    newest = client.get(f"/v1/sessions/{session}/frame?large=true")
    assert newest.headers["X-Steps"] == str(len(ACTIONS))
    assert nearly(pixels(newest.content), expected[-1])
    for t in (0, 4):
        past = client.get(f"/v1/sessions/{session}/frames/{t}?large=true")
        assert nearly(pixels(past.content), expected[t])
    assert pixels(client.get(f"/v1/sessions/{session}/frame").content).shape == (64, 64, 3)


def test_a_session_begins_and_ends_to_draw_large_in_its_middle(serve: Serve, expected: list[np.ndarray]) -> None:
    client = serve()
    engine = engine_of(client)
    session = create(client, seed=7)
    small = [pixels(step(client, session, action).content) for action in ACTIONS[:5]]
    assert not engine._sessions[session].large
    assert nearly(pixels(client.get(f"/v1/sessions/{session}/frame?large=true").content), expected[5])
    assert not engine._sessions[session].large, "a look keeps nothing"
    assert nearly(large_step(client, session, ACTIONS[5]), expected[6])
    assert engine._sessions[session].large
    step(client, session, ACTIONS[6])
    assert not engine._sessions[session].large
    assert engine._sessions[session].picture.large is None
    assert nearly(large_step(client, session, ACTIONS[7]), expected[8])
    again = create(client, seed=7)
    for action, frame_HWC in zip(ACTIONS[:5], small, strict=True):
        large_step(client, again, action)
        assert np.array_equal(pixels(client.get(f"/v1/sessions/{again}/frame").content), frame_HWC)


def test_sessions_share_passes_with_those_that_draw_alike(serve: Serve, expected: list[np.ndarray]) -> None:
    client = serve()
    engine = engine_of(client)
    large = [create(client, seed=7) for _ in range(3)]
    small = [create(client, seed=7) for _ in range(2)]
    with ThreadPoolExecutor(5) as players:

        def play(session: str) -> list[np.ndarray]:
            if session in small:
                return [pixels(step(client, session, action).content) for action in ACTIONS]
            return [large_step(client, session, action) for action in ACTIONS]

        games = dict(zip([*large, *small], players.map(play, [*large, *small]), strict=True))
    for session in large:
        assert all(nearly(seen, frame_HWC) for seen, frame_HWC in zip(games[session], expected[1:], strict=True))
    assert len({id(engine._sessions[session].world.state) for session in small} & {  # type: ignore[union-attr]
        id(engine._sessions[session].world.state) for session in large  # type: ignore[union-attr]
    }) == 0  # fmt: skip
    assert [engine._sessions[session].large for session in (*large, *small)] == [True] * 3 + [False] * 2


def test_a_parked_session_and_its_branch_go_on_large(serve: Serve, expected: list[np.ndarray]) -> None:
    client = serve()
    engine = engine_of(client)
    session = create(client, seed=7)
    for action in ACTIONS[:9]:
        large_step(client, session, action)
    engine._sessions[session].world = None
    assert nearly(large_step(client, session, ACTIONS[9]), expected[10])
    branch = client.post(f"/v1/sessions/{session}/branch", json={"t": 6}).json()["id"]
    assert nearly(large_step(client, branch, ACTIONS[6]), expected[7])
    previews = client.get(f"/v1/sessions/{branch}/previews").json()
    assert previews["steps"] == 7
    assert nearly(large_step(client, branch, ACTIONS[7]), expected[8])


def test_several_actions_and_a_step_sent_again(serve: Serve, expected: list[np.ndarray]) -> None:
    client = serve()
    session = create(client, seed=7)
    for _ in range(2):
        body = {"actions": ACTIONS[:4], "step": 1}
        answer = client.post(f"/v1/sessions/{session}/step?large=true", json=body)
        assert (answer.headers["X-Steps"], answer.status_code) == ("4", 200)
        assert nearly(pixels(answer.content), expected[4])


def test_the_socket_streams_large_frames(serve: Serve, expected: list[np.ndarray]) -> None:
    client = serve()
    session = create(client, seed=7)
    with client.websocket_connect(f"/v1/sessions/{session}/play?large=true") as socket:
        for t, frame_HWC in enumerate(expected):
            packed = socket.receive_bytes()
            head = int.from_bytes(packed[:4], "little")
            assert json.loads(packed[4 : 4 + head])["step"] == t
            assert nearly(pixels(packed[4 + head :]), frame_HWC)
            if t < len(ACTIONS):
                socket.send_json({"action": ACTIONS[t]})


@pytest.mark.parametrize("kind", ["gif", "mp4"])
def test_animations_and_rollouts_are_large(kind: str, serve: Serve) -> None:
    client = serve()
    session = create(client, seed=7)
    step(client, session, 1)
    form = {"start_frame": "00", "actions": "1", "format": kind, "seed": 7, "large": True}
    for answer in (
        client.get(f"/v1/sessions/{session}/animation.{kind}?large=true"),
        client.post("/v1/rollouts", data=form),
    ):
        assert answer.status_code == 200, answer.text
        if kind == "gif":
            with Image.open(BytesIO(answer.content)) as film:
                sizes = [frame.size for frame in ImageSequence.Iterator(film)]
        else:
            with av.open(BytesIO(answer.content)) as film:
                sizes = [(frame.width, frame.height) for frame in film.decode(video=0)]
        assert sizes == [(SIZE, SIZE)] * 2 if kind == "gif" else [(2 * SIZE, 2 * SIZE)] * 2


def test_a_rollout_shows_what_the_session_does(serve: Serve, expected: list[np.ndarray]) -> None:
    client = serve()
    engine = engine_of(client)
    seen = []
    room = engine._room

    def kept(*args: object) -> np.ndarray:
        seen.append(room(*args))  # type: ignore[arg-type]
        return seen[-1]

    engine._room = kept  # type: ignore[method-assign]
    actions = ",".join(map(str, ACTIONS))
    form = {"start_frame": "00", "actions": actions, "seed": 7, "large": True}
    assert client.post("/v1/rollouts", data=form).status_code == 200
    assert all(nearly(frame, other) for frame, other in zip(seen[0], expected, strict=True))


def test_a_version_without_one_says_so(serve: Serve, model_folder: Path) -> None:
    client = serve()
    session = create(client, version="2")
    info = client.get(f"/v1/sessions/{session}").json()["model"]
    assert (info["version"], info["large_height"], info["large_width"]) == ("2", None, None)
    at = f"/v1/sessions/{session}"
    answers = [
        client.post(f"{at}/step?large=true", json={"action": 0}),
        *(client.get(f"{at}/{what}?large=true") for what in ("frame", "frames/0", "animation.gif")),
        client.post("/v1/rollouts", data={"start_frame": "00", "actions": "0", "version": "2", "large": True}),
    ]
    for answer in answers:
        assert_error(answer, 422, "no_large_frames", "version 2 has no larger decoder", "without large=true")
    with (
        pytest.raises(WebSocketDisconnect) as closed,
        client.websocket_connect(f"{at}/play?large=true") as socket,
    ):
        socket.receive_bytes()
    assert closed.value.code == 4422
    assert step(client, session, 0).headers["X-Steps"] == "1"


def test_no_more_frames_than_memory_is_set_aside_for(serve: Serve) -> None:
    client = serve(max_animation_pixels=4 * SIZE * SIZE)
    form = {"start_frame": "00", "actions": "0,0,0,0", "large": True}
    assert_error(client.post("/v1/rollouts", data=form), 422, "invalid_request", "at most 4 frames of 128 x 128, not 5")
    assert client.post("/v1/rollouts", data=form | {"large": False}).status_code == 200


def test_one_of_another_tokenizer_is_a_broken_version(
    serve: Serve, registry: Registry, large_folder: Path, tmp_path: Path
) -> None:
    client = serve()
    other = tmp_path / "other"
    shutil.copytree(large_folder, other)
    whole = Enlarging(checkpoint.load_config(str(other)), checkpoint.load_tokenizer(str(other)))
    whole.decoder.codebook_VL += 1
    checkpoint.save_model(f"{other}/large_decoder", whole, whole.decoder)
    registry.set_alias("3", other)
    engine = engine_of(client)
    eventually(lambda: "trained on another tokenizer" in engine.models.problem)
    assert client.get("/v1/model").json()["version"] == "1"


@pytest.mark.skipif(EXECUTABLE is None, reason="no chromium on PATH: install it to test the page")
def test_the_page_s_button_makes_frames_large_and_small_again(
    large_folder: Path, registry: Registry, browser: Chromium, tmp_path: Path
) -> None:
    width = "document.querySelector('#played .screen canvas').width === {}"
    with serving(large_folder, registry=registry) as (url, engine):
        browser.open(f"{url}/?beside=2")
        browser.wait_until(PREVIEWED)
        step_to(browser, "1", 1)
        assert shown(browser).shape == (64, 64, 3)
        browser.evaluate("document.querySelector('#large').click()")  # two worlds push it off this screen
        browser.wait_until(width.format(SIZE))
        assert browser.evaluate("document.querySelector('#large').ariaPressed") == "true"
        step_to(browser, "2", 2)
        (session,) = (session for session in engine._sessions.values() if session.model.large)
        assert session.large
        assert session.picture.large is not None
        assert np.array_equal(shown(browser), session.picture.large.frame_HWC)
        assert shown(browser, "beside").shape == (64, 64, 3), "its version has none"

        browser.send("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(tmp_path))
        browser.press("g")
        file = tmp_path / "genie-2.gif"
        eventually(file.exists)
        assert Image.open(file).size == (SIZE, SIZE)

        browser.press("r")  # anew, and large from its prompt on
        browser.wait_until("Number(document.querySelector('.steps').textContent) === 0")
        browser.wait_until(width.format(SIZE))
        step_to(browser, "1", 1)
        browser.press("l")
        browser.wait_until(width.format(64))
        step_to(browser, "1", 2)
        assert not any(session.large for session in engine._sessions.values())

        browser.open(f"{url}/?version=2")
        browser.wait_until(PREVIEWED)
        assert browser.evaluate("document.querySelector('#large').hidden")
        assert browser.errors == []
