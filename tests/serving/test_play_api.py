"""The HTTP surface, on a real tiny model."""

from __future__ import annotations

import base64
import io
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from fastapi.testclient import TestClient
from httpx import Response
from PIL import Image
from play_help import Registry, assert_error, create, picture, pixels, play, step

from genie_model.checkpoint import load_model
from serving.images import frame_from_upload

Serve = Callable[..., TestClient]


def upload(client: TestClient, image: bytes) -> Response:
    return client.post("/v1/sessions", files={"image": ("image", image)})


def eventually(condition: Callable[[], bool], seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


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


def test_only_two_uploads_are_decoded_at_once(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    busy, most, lock = 0, 0, threading.Lock()

    def watched(upload: bytes, height: int, width: int, max_pixels: int) -> np.ndarray:
        nonlocal busy, most
        with lock:
            busy, most = busy + 1, max(most, busy + 1)
        time.sleep(0.05)
        with lock:
            busy -= 1
        return frame_from_upload(upload, height, width, max_pixels)

    monkeypatch.setattr("serving.routes.frame_from_upload", watched)
    client, image = serve(), picture(np.zeros((64, 64, 3), np.uint8))
    with ThreadPoolExecutor(8) as pool:
        assert {answer.status_code for answer in pool.map(lambda _: upload(client, image), range(8))} == {201}
    assert most == 2


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


def test_versions_are_listed(serve: Serve, registry: Registry, model_folder: Path) -> None:
    client = serve()
    registry.set_alias("2", model_folder)
    listed = client.get("/v1/models").json()
    assert [one["version"] for one in listed] == ["2", "1"]
    assert listed[0] == {"version": "2", "run_id": "run-of-2", "aliases": [], "metrics": {"psnr": 20.0}}
    registry.known.clear()
    assert_error(client.get("/v1/models"), 503, "not_ready", "does not answer")


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


# ---- following the champion


def test_ready_only_once_a_model_is_loaded(serve: Serve, registry: Registry, model_folder: Path) -> None:
    registry.current = None
    client = serve(wait=True)
    assert client.get("/healthz").status_code == 200
    eventually(lambda: "run the pipeline" in client.get("/readyz").text)
    assert_error(client.get("/readyz"), 503, "not_ready")
    assert_error(client.post("/v1/sessions", data={"start_frame": "00"}), 503, "not_ready")
    registry.set_alias("1", model_folder)
    eventually(lambda: client.get("/readyz").status_code == 200)
    assert client.get("/readyz").json()["model"]["version"] == "1"


def test_new_sessions_follow_the_alias_and_open_ones_keep_their_version(
    serve: Serve, registry: Registry, model_folder: Path
) -> None:
    client = serve()
    undisturbed = play(client, [0, 1], seed=1)
    old = create(client, seed=1)
    assert step(client, old, 0).content == undisturbed[0]
    registry.set_alias("2", model_folder)
    eventually(lambda: client.get("/v1/model").json()["version"] == "2")
    assert client.get(f"/v1/sessions/{create(client)}").json()["model"]["version"] == "2"
    assert client.get(f"/v1/sessions/{old}").json()["model"]["version"] == "1"
    assert step(client, old, 1).content == undisturbed[1]


def test_a_version_that_does_not_load_is_refused(
    serve: Serve, registry: Registry, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    client = serve()
    registry.set_alias("2", tmp_path)  # an empty folder
    eventually(lambda: "no new model" in caplog.text)
    assert client.get("/readyz").json()["model"]["version"] == "1"
    create(client)
