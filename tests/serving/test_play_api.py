"""The HTTP surface, on a real tiny model."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from fastapi.testclient import TestClient
from httpx import Response
from PIL import Image
from play_help import assert_error, create, eventually, picture, pixels, play, step

from genie_model.checkpoint import load_model

Serve = Callable[..., TestClient]


def upload(client: TestClient, image: bytes) -> Response:
    return client.post("/v1/sessions", files={"image": ("image", image)})


# ---- playing


def test_a_session_is_created_stepped_and_deleted(serve: Serve, start_frames: dict[str, np.ndarray]) -> None:
    client = serve()
    session = create(client, "01")
    info = client.get(f"/v1/sessions/{session}").json()
    assert info["model"]["version"] == "1"
    assert info["model"]["num_actions"] == 4
    np.testing.assert_array_equal(pixels(client.get(f"/v1/sessions/{session}/frame").content), start_frames["01"])

    answer = step(client, session, 3)
    assert answer.headers["content-type"] == "image/png"
    assert answer.headers["x-steps"] == "1"
    assert pixels(answer.content).shape == (64, 64, 3)
    assert client.get(f"/v1/sessions/{session}/frame").content == answer.content
    assert client.get(f"/v1/sessions/{session}").json()["steps"] == 1

    assert client.delete(f"/v1/sessions/{session}").status_code == 204
    assert_error(step(client, session, 0), 404, "unknown_session", "create a new one")
    assert_error(client.delete(f"/v1/sessions/{session}"), 404, "unknown_session")


def test_start_frames_are_listed_with_their_pictures(serve: Serve, start_frames: dict[str, np.ndarray]) -> None:
    client = serve()
    listed = client.get("/v1/starts").json()["start_frames"]
    assert [frame["name"] for frame in listed] == ["00", "01", "02", "03"]
    for frame in listed:
        np.testing.assert_array_equal(pixels(client.get(frame["url"]).content), start_frames[frame["name"]])


def test_a_list_of_actions_is_taken_in_one_request(serve: Serve) -> None:
    client, actions = serve(), [0, 1, 2, 3, 3]
    one_by_one = play(client, actions, seed=7)
    session = create(client, seed=7)
    here = f"/v1/sessions/{session}/step"
    answer = client.post(here, json={"actions": actions[:3], "step": 1})
    assert (answer.headers["x-steps"], answer.content) == ("3", one_by_one[2])
    again = client.post(here, json={"actions": actions[:3], "step": 1})
    assert (again.headers["x-steps"], again.content) == ("3", one_by_one[2]), "sent again, nothing is taken twice"
    rest = client.post(here, json={"actions": actions[1:], "step": 2})
    assert (rest.headers["x-steps"], rest.content) == ("5", one_by_one[4]), "the part that was not taken yet is"
    for taken, at in (([0, 0], 4), ([3], 4), ([3], 7), ([0, 1, 2, 3, 0, 0], 1)):
        asked = client.post(here, json={"actions": taken, "step": at})
        assert_error(asked, 409, "session_moved", "step 6 is next")
    for wrong in ([], [0] * 65, [0, 4], "01"):
        assert_error(client.post(here, json={"actions": wrong}), 422, "invalid_request", "actions")
    assert_error(client.post(here, json={"actions": [0], "action": 0}), 422, "invalid_request", "either")
    assert client.get(f"/v1/sessions/{session}").json()["steps"] == 5


def test_the_seed_decides_the_world(serve: Serve) -> None:
    client, actions = serve(), [0, 1, 2, 3]
    assert play(client, actions, seed=7) == play(client, actions, seed=7)
    assert play(client, actions, seed=7) != play(client, actions, seed=8)


def test_previews_show_each_action_and_leave_the_session_where_it_is(serve: Serve) -> None:
    client = serve()
    undisturbed = play(client, [1, 2], seed=5)
    session = create(client, seed=5)
    assert step(client, session, 1).content == undisturbed[0]
    previews = client.get(f"/v1/sessions/{session}/previews", params={"repeats": 2}).json()
    assert (previews["steps"], previews["repeats"], len(previews["images"])) == (1, 2, 4)
    for image in previews["images"]:
        assert pixels(base64.b64decode(image.removeprefix("data:image/png;base64,"))).shape == (64, 64, 3)
    assert step(client, session, 2).content == undisturbed[1]


def test_steps_sent_at_once_are_taken_one_by_one(serve: Serve) -> None:
    client = serve()
    sessions = [create(client, seed=3) for _ in range(2)]
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda i: step(client, sessions[i % 2], 1), range(16)))
    for mine in (answers[0::2], answers[1::2]):
        assert sorted(int(answer.headers["x-steps"]) for answer in mine) == list(range(1, 9))
    frames = [{answer.headers["x-steps"]: answer.content for answer in answers[i::2]} for i in range(2)]
    assert frames[0] == frames[1]


# ---- uploads


@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "WEBP"])
def test_an_upload_is_cropped_to_its_centre_square(serve: Serve, file_format: str) -> None:
    wide_HWC = np.zeros((200, 600, 3), np.uint8)
    wide_HWC[:, :200], wide_HWC[:, 200:400], wide_HWC[:, 400:] = (250, 0, 0), (0, 250, 0), (0, 0, 250)
    client = serve()
    created = upload(client, picture(wide_HWC, file_format))
    assert created.status_code == 201
    frame_HWC = pixels(client.get(f"/v1/sessions/{created.json()['id']}/frame").content)
    inner = frame_HWC[:, 4:-4].astype(int)  # lossy formats bleed at the edges
    assert np.abs(inner - [0, 250, 0]).max() < 8


def test_transparent_parts_become_white(serve: Serve) -> None:
    client = serve()
    created = upload(client, picture(np.zeros((10, 10, 4), np.uint8)))
    assert pixels(client.get(f"/v1/sessions/{created.json()['id']}/frame").content).min() == 255


def bad_uploads() -> Iterator[object]:
    noise_HWC = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    bomb = io.BytesIO()
    Image.new("1", (9000, 9000)).save(bomb, "PNG")
    yield pytest.param(b"hello", 415, "not_an_image", "PNG, JPEG", id="text")
    yield pytest.param(b"", 415, "not_an_image", "PNG, JPEG", id="empty")
    yield pytest.param(picture(noise_HWC)[:-4000], 422, "invalid_request", "damaged", id="truncated")
    yield pytest.param(bomb.getvalue(), 413, "upload_too_large", "40,000,000", id="pixel bomb")
    yield pytest.param(bytes(150_000), 413, "upload_too_large", "at most 0.1 MB", id="too many bytes")


@pytest.mark.parametrize(("image", "status", "code", "word"), list(bad_uploads()))
def test_a_bad_upload_gets_one_clear_line(serve: Serve, image: bytes, status: int, code: str, word: str) -> None:
    assert_error(upload(serve(max_upload_bytes=100_000), image), status, code, word)


def test_an_endless_upload_is_refused_while_it_is_read(serve: Serve) -> None:
    sent = 0

    def endless() -> Iterator[bytes]:
        nonlocal sent
        yield b'--x\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\n'
        for _ in range(1000):
            sent += 10_000
            yield bytes(10_000)

    headers = {"Content-Type": "multipart/form-data; boundary=x"}
    response = serve(max_upload_bytes=100_000).post("/v1/sessions", content=endless(), headers=headers)
    assert_error(response, 413, "upload_too_large")


# ---- other prompts


def first_frame(client: TestClient, **form: object) -> np.ndarray:
    created = client.post("/v1/sessions", data=form)
    assert created.status_code == 201, created.text
    return pixels(client.get(f"/v1/sessions/{created.json()['id']}/frame").content)


def test_a_data_url_is_a_prompt(serve: Serve, start_frames: dict[str, np.ndarray]) -> None:
    client = serve()
    url = "data:image/png;base64," + base64.b64encode(picture(start_frames["02"])).decode()
    np.testing.assert_array_equal(first_frame(client, image_url=url), start_frames["02"])
    for wrong in ("http://example.com/a.png", "data:image/png;base64,@@", "data:text/plain,hello"):
        assert_error(client.post("/v1/sessions", data={"image_url": wrong}), 422, "invalid_request", "data URL")
    text = "data:image/png;base64," + base64.b64encode(b"hello").decode()
    assert_error(client.post("/v1/sessions", data={"image_url": text}), 415, "not_an_image")


def test_colours_and_strokes_are_a_prompt(serve: Serve) -> None:
    client = serve()
    canvas = [["#0000ff"], ["#00ff00", "#ff0000"]]
    stroke = {"colour": "#ffffff", "width": 0.1, "points": [[0.1, 0.25], [0.9, 0.25]]}
    frame_HWC = first_frame(client, sketch=json.dumps({"canvas": canvas, "strokes": [stroke]}))
    for (y, x), colour in {
        (4, 32): (0, 0, 255),
        (60, 4): (0, 255, 0),
        (60, 60): (255, 0, 0),
        (16, 32): (255, 255, 255),
        (16, 2): (0, 0, 255),
    }.items():
        assert tuple(frame_HWC[y, x]) == colour, (y, x)
    assert np.all(first_frame(client, sketch="{}") == 255), "an empty canvas is white"
    for wrong, word in (
        ("{", "sketch"),
        ('{"canvas": []}', "canvas"),
        ('{"canvas": [["red"]]}', "canvas"),
        ('{"strokes": [{"points": [[2, 0]]}]}', "points"),
        ('{"strokes": [{"points": []}]}', "points"),
    ):
        assert_error(client.post("/v1/sessions", data={"sketch": wrong}), 422, "invalid_request", word)


def test_films_are_h264_and_show_what_was_seen(serve: Serve) -> None:
    client = serve()
    session = create(client, seed=3)
    seen = [pixels(step(client, session, action).content).astype(int) for action in (1, 2, 0)]
    answer = client.get(f"/v1/sessions/{session}/animation.mp4?frames_per_second=5")
    assert answer.headers["content-type"] == "video/mp4"
    form = {"start_frame": "00", "seed": 3, "actions": "1,2,0", "format": "mp4", "frames_per_second": 5}
    for film in (answer.content, client.post("/v1/rollouts", data=form).content):
        with av.open(io.BytesIO(film)) as opened:
            stream = opened.streams.video[0]
            assert (stream.codec_context.name, stream.average_rate) == ("h264", 5)
            frames = [frame.to_ndarray(format="rgb24") for frame in opened.decode(stream)]
        assert [frame_HWC.shape for frame_HWC in frames] == [(256, 256, 3)] * 4
        for large_HWC, expected in zip(frames[1:], seen, strict=True):
            small_HWC = large_HWC.reshape(64, 4, 64, 4, 3).mean((1, 3))
            assert np.abs(small_HWC - expected).mean() < 12
    assert_error(client.get(f"/v1/sessions/{session}/animation.avi"), 422, "invalid_request", "gif")


# ---- without a session


def test_a_rollout_is_what_a_session_would_show(serve: Serve) -> None:
    client = serve()
    seen = [pixels(frame).astype(int) for frame in play(client, [1, 2, 2, 0], seed=3)]
    form = {"start_frame": "00", "seed": 3, "actions": "1,2,2,0", "frames_per_second": 5}
    answer = client.post("/v1/rollouts", data=form)
    assert answer.headers["content-type"] == "image/gif"
    animation = Image.open(io.BytesIO(answer.content))
    assert (animation.n_frames, animation.info["duration"]) == (5, 200)
    for t, expected in enumerate(seen, 1):
        animation.seek(t)
        assert np.abs(np.asarray(animation.convert("RGB")).astype(int) - expected).mean() < 12, "256 colours"
    assert client.get("/metrics").text.count("genie_sessions 1.0") == 1
    for actions, word in (("9", "from 0 to 3"), ("1,,2", "whole numbers"), ("", "actions"), ("0," * 600 + "0", "500")):
        assert_error(client.post("/v1/rollouts", data=form | {"actions": actions}), 422, "invalid_request", word)


def test_actions_are_inferred_from_frames(serve: Serve, model_folder: Path) -> None:
    client, genie = serve(), load_model(str(model_folder))
    frames_THWC = np.random.default_rng(0).integers(0, 256, (5, 64, 64, 3), dtype=np.uint8)
    files = [("frames", (f"{t}.png", picture(frame_HWC))) for t, frame_HWC in enumerate(frames_THWC)]
    found = client.post("/v1/actions/infer", files=files).json()
    assert found["actions"] == genie.infer_actions(torch.from_numpy(frames_THWC)[None])[0].tolist()
    assert found["model"]["version"] == "1"
    assert_error(client.post("/v1/actions/infer", files=files[:1]), 422, "invalid_request", "2 to 8 frames")
    assert_error(client.post("/v1/actions/infer", files=files * 2), 422, "invalid_request", "2 to 8 frames")
    assert_error(client.post("/v1/actions/infer", files=[files[0], ("frames", ("x", b"x"))]), 415, "not_an_image")


# ---- other bad requests


def test_a_bad_request_gets_one_clear_line(serve: Serve) -> None:
    client = serve()
    session = create(client)
    assert_error(step(client, session, 4), 422, "invalid_request", "from 0 to 3")
    assert_error(step(client, session, -1), 422, "invalid_request", "from 0 to 3")
    assert_error(client.post(f"/v1/sessions/{session}/step", json={"action": "up"}), 422, "invalid_request", "action")
    assert_error(client.post(f"/v1/sessions/{session}/step", content=b"{"), 422, "invalid_request")
    assert_error(client.get(f"/v1/sessions/{session}/previews?repeats=99"), 422, "invalid_request", "repeats")
    assert_error(step(client, "nobody", 0), 404, "unknown_session")
    assert_error(client.post("/v1/sessions"), 422, "invalid_request", "start_frame")
    assert_error(client.post("/v1/sessions", data={"start_frame": "00"}, files={"image": b"x"}), 422, "invalid_request")
    assert_error(
        client.post("/v1/sessions", data={"start_frame": "nowhere"}), 404, "unknown_start_frame", "00, 01, 02, 03"
    )
    assert_error(client.get("/v1/nowhere"), 404, "not_found")
    assert client.get(f"/v1/sessions/{session}").json()["steps"] == 0


def test_the_number_of_sessions_is_limited(serve: Serve) -> None:
    client = serve(max_sessions=2)
    first, _ = create(client), create(client)
    refused = client.post("/v1/sessions", data={"start_frame": "00"})
    assert_error(refused, 503, "too_many_sessions", "2 sessions")
    assert int(refused.headers["retry-after"]) > 0
    client.delete(f"/v1/sessions/{first}")
    create(client)


def test_an_idle_session_ends(serve: Serve) -> None:
    client = serve(idle_seconds=0.3)
    session = create(client)
    eventually(lambda: client.get(f"/v1/sessions/{session}").status_code == 404)
