"""Whose turn it is: players go first, and no client takes what is everybody's."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import pytest
from fastapi.testclient import TestClient
from PIL import Image
from play_help import assert_error, create, engine_of, eventually, picture, step
from starlette.websockets import WebSocketDisconnect
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

from serving.images import frame_from_upload, png

Serve = Callable[..., TestClient]


@pytest.fixture
def keys(tmp_path: Path) -> str:
    """Of the clients a, b and c, whose keys are their names."""
    file = tmp_path / "keys.toml"
    file.write_text("".join(f'[{a}]\nsha256 = "{hashlib.sha256(a.encode()).hexdigest()}"\n' for a in "abc"))
    return str(file)


def of(client: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {client}"}


def test_a_step_waits_for_one_painted_frame_at_most_however_many_are_asked_for(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serving.engine._ALONE_SECONDS", 60.0)  # the sweep for idle worlds is in line too
    client = serve()
    session, other = create(client), create(client)
    step(client, session, 0)
    order: list[str] = []
    keeper = engine_of(client)._keeper
    paint, take = keeper.painting, keeper.step
    go = threading.Event()

    def painting(*args: object) -> Iterator[object]:
        go.wait(10)
        order.append("painted")
        yield from paint(*args)

    monkeypatch.setattr(keeper, "painting", painting)
    monkeypatch.setattr(keeper, "step", lambda *a: (order.append("step"), take(*a))[1])
    with ThreadPoolExecutor(6) as pool:
        frames = [pool.submit(client.get, f"/v1/sessions/{session}/frames/0")]
        eventually(lambda: engine_of(client)._worker._behind.locked())
        frames += [pool.submit(client.get, f"/v1/sessions/{session}/frames/0") for _ in range(4)]
        in_line = engine_of(client)._worker._thread._work_queue.qsize
        eventually(lambda: in_line() == 1)  # whether the session still stands where it stood
        stepped = pool.submit(step, client, other, 1)
        eventually(lambda: in_line() == 2)
        go.set()
        assert stepped.result().status_code == 200
        assert {frame.result().status_code for frame in frames} == {200}
    assert order.index("step") == 1, order


def test_what_waits_behind_players_too_long_is_refused(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    client = serve()
    session = create(client)
    engine = engine_of(client)
    keeper, go = engine._keeper, threading.Event()
    paint = keeper.painting

    def painting(*args: object) -> Iterator[object]:
        go.wait(10)
        yield from paint(*args)

    monkeypatch.setattr(keeper, "painting", painting)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(client.get, f"/v1/sessions/{session}/frames/0")
        eventually(lambda: engine._worker._behind.locked())
        monkeypatch.setattr(engine, "_settings", engine._settings.model_copy(update={"max_step_seconds": 0.3}))
        refused = client.get(f"/v1/sessions/{session}/frames/0")
        assert_error(refused, 503, "step_too_slow", "send it again")
        assert int(refused.headers["retry-after"]) > 0
        go.set()
        assert first.result().status_code == 200


def test_one_client_may_wait_for_few_rollouts_and_leaves_places_to_others(
    serve: Serve, keys: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    client, form = serve(api_keys=keys, max_rollouts=3, client_rollouts=2), {"start_frame": "00", "actions": "0,1"}
    go, genie = threading.Event(), engine_of(client).model.genie
    start = genie.start
    monkeypatch.setattr(genie, "start", lambda *args, **kwargs: (go.wait(10), start(*args, **kwargs))[1])
    with ThreadPoolExecutor(5) as pool:
        greedy = [pool.submit(client.post, "/v1/rollouts", data=form, headers=of("a")) for _ in range(3)]
        eventually(lambda: sum(answer.done() for answer in greedy) == 1)
        other = pool.submit(client.post, "/v1/rollouts", data=form, headers=of("b"))
        eventually(lambda: engine_of(client).long_jobs._of_client.total() == 3)
        late = client.post("/v1/rollouts", data=form, headers=of("c"))
        assert_error(late, 429, "too_many_requests", "3 rollouts")
        go.set()
        assert sorted(answer.result().status_code for answer in greedy) == [200, 200, 429]
        assert other.result().status_code == 200
    refused = next(answer.result() for answer in greedy if answer.result().status_code == 429)
    assert_error(refused, 429, "too_many_requests", "of yours")
    assert int(refused.headers["retry-after"]) > 0


def test_a_rollout_that_takes_too_long_is_refused_and_gives_up_its_place(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = serve()
    jobs = engine_of(client).long_jobs
    genie = engine_of(client).model.genie
    dream = genie.step
    with monkeypatch.context() as slow:
        slow.setattr(jobs, "_settings", jobs._settings.model_copy(update={"max_rollout_seconds": 0.3}))
        slow.setattr(genie, "step", lambda *args: (time.sleep(0.1), dream(*args))[1])
        refused = client.post("/v1/rollouts", data={"start_frame": "00", "actions": ",".join("0" * 20)})
    assert_error(refused, 503, "job_too_slow", "0.3 seconds", "fewer frames")
    assert int(refused.headers["retry-after"]) > 0
    assert client.post("/v1/rollouts", data={"start_frame": "00", "actions": "0"}).status_code == 200


@pytest.mark.parametrize(("clients", "at_once"), [("a", 1), ("abc", 2)])
def test_two_uploads_are_decoded_at_once_and_of_one_client_one(
    clients: str, at_once: int, serve: Serve, keys: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    busy, most, lock = 0, 0, threading.Lock()

    def watched(upload: bytes, height: int, width: int, max_pixels: int) -> np.ndarray:
        nonlocal busy, most
        with lock:
            busy, most = busy + 1, max(most, busy + 1)
        eventually(lambda: most >= at_once)
        time.sleep(0.05)  # for one too many
        with lock:
            busy -= 1
        return frame_from_upload(upload, height, width, max_pixels)

    monkeypatch.setattr("serving.routes.frame_from_upload", watched)
    client, image = serve(api_keys=keys), picture(np.zeros((64, 64, 3), np.uint8))

    def upload(number: int) -> int:
        name = clients[number % len(clients)]
        return client.post("/v1/sessions", files={"image": image}, headers=of(name)).status_code

    with ThreadPoolExecutor(6) as pool:
        assert set(pool.map(upload, range(6))) == {201}
    assert most == at_once


def test_an_upload_that_waits_too_long_is_refused(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    client, image, go = serve(), picture(np.zeros((64, 64, 3), np.uint8)), threading.Event()
    monkeypatch.setattr(engine_of(client).decoding, "_seconds", 0.3)
    monkeypatch.setattr("serving.routes.frame_from_upload", lambda *args: (go.wait(10), frame_from_upload(*args))[1])
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(client.post, "/v1/sessions", files={"image": image})
        eventually(lambda: engine_of(client).decoding._two._value == 1)
        assert_error(client.post("/v1/sessions", files={"image": image}), 503, "decoding_too_slow", "try again")
        go.set()
        assert first.result().status_code == 201


def test_a_large_photograph_looks_the_same_though_little_of_it_is_decoded() -> None:
    small_HWC = np.random.default_rng(0).integers(0, 256, (8, 12, 3), dtype=np.uint8)
    photo, buffer = Image.fromarray(small_HWC).resize((3000, 2000), Image.Resampling.BICUBIC), io.BytesIO()
    photo.save(buffer, "JPEG", quality=95)
    found, expected = (
        frame_from_upload(data, 64, 64, 10**8) for data in (buffer.getvalue(), picture(np.asarray(photo)))
    )
    assert np.abs(found.astype(int) - expected).max() < 12


@pytest.mark.parametrize("shape", [(64, 64, 3), (90, 160, 3), (3, 1, 3)])
def test_what_is_packed_as_png_reads_as_it_was(shape: tuple[int, int, int]) -> None:
    frame_HWC = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    with Image.open(io.BytesIO(png(frame_HWC))) as found:
        assert found.mode == "RGB"
        assert (np.array(found) == frame_HWC).all()


def test_a_session_has_few_connections(serve: Serve) -> None:
    client = serve(max_sockets=2)
    session = create(client)
    path = f"/v1/sessions/{session}/play"
    with client.websocket_connect(path) as first, client.websocket_connect(path) as second:
        first.receive_bytes(), second.receive_bytes()
        with client.websocket_connect(path) as third, pytest.raises(WebSocketDisconnect) as closed:
            third.receive_bytes()
        assert closed.value.code == 4429
        first.send_text(json.dumps({"action": 0}))
        first.receive_bytes()
    with client.websocket_connect(path) as again:
        again.receive_bytes()
    assert not engine_of(client).sockets


def test_a_connection_that_brings_no_request_is_closed(
    address: Callable[..., tuple[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    host, port = address()
    session = create(httpx.Client(base_url=f"http://{host}:{port}"))
    monkeypatch.setattr("serving.connections.HEADER_SECONDS", 0.5)
    whole = b"GET /healthz HTTP/1.1\r\nHost: a\r\n\r\n"
    upgrade = (
        f"GET /v1/sessions/{session}/play HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
        "Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
    ).encode()
    for begun in (b"", whole[:20], whole + whole[:20]):
        began = time.monotonic()
        with socket.create_connection((host, port), timeout=10) as connection:
            connection.sendall(begun)
            while connection.recv(10_000):
                pass
            assert 0.3 < time.monotonic() - began < 4
    with socket.create_connection((host, port), timeout=10) as live:
        live.sendall(upgrade)
        while b"milliseconds" not in live.recv(10_000):
            pass
        live.settimeout(1)  # a player thinks for longer
        with pytest.raises(TimeoutError):
            live.recv(10_000)


def test_more_connections_than_may_be_open_are_told_so_but_not_those_of_a_probe(
    address: Callable[..., tuple[str, int]],
) -> None:
    for limit, word in (("max_connections", "try again later"), ("client_connections", "of yours")):
        host, port = address(**{limit: 2})
        base = f"http://{host}:{port}"
        players = [httpx.Client(base_url=base) for _ in range(2)]
        assert [player.get("/v1/model").status_code for player in players] == [200, 200]
        session = create(players[0])
        with httpx.Client(base_url=base) as third:
            assert third.get("/healthz").status_code == 200
            refused = third.get("/v1/model")
            assert_error(refused, 503, "too_many_connections", word)
            assert int(refused.headers["retry-after"]) > 0
            assert refused.headers["connection"] == "close"
            with pytest.raises(InvalidStatus) as denied:
                connect(f"ws://{host}:{port}/v1/sessions/{session}/play")
            assert denied.value.response.status_code == 503
            assert b"too_many_connections" in denied.value.response.body
            assert [player.get("/v1/model").status_code for player in players] == [200, 200], "who came first plays on"
            players[0].close()
            eventually(lambda: third.get("/v1/model").status_code == 200)
        players[1].close()


def test_what_is_parsed_at_once_is_short_and_a_data_url_may_be_as_large_as_an_upload(serve: Serve) -> None:
    client = serve()
    session = create(client)
    long = {"action": 0, "x": "x" * 70_000}
    assert_error(client.post(f"/v1/sessions/{session}/step", json=long), 413, "upload_too_large", "application/json")
    noise_HWC = np.random.default_rng(0).integers(0, 256, (1200, 1200, 3), dtype=np.uint8)
    url = "data:image/png;base64," + base64.b64encode(picture(noise_HWC)).decode()
    assert len(url) > 2**22
    assert client.post("/v1/sessions", files={"image_url": (None, url)}).status_code == 201
    assert_error(client.post("/v1/sessions", data={"image_url": url}), 413, "upload_too_large", "urlencoded")
    sketch = json.dumps({"canvas": [["#ffffff"]], "strokes": [], "x": "x" * 2**19})
    assert_error(client.post("/v1/sessions", files={"sketch": (None, sketch)}), 422, "invalid_request", "letters")


def test_a_misspelt_field_is_no_silent_default(serve: Serve) -> None:
    client = serve()
    for path, form in (("/v1/sessions", {}), ("/v1/rollouts", {"actions": "0"})):
        wrong = client.post(path, data={"start_frame": "00", "sead": "3", **form})
        assert_error(wrong, 422, "invalid_request", "no field sead", "seed")
    files = [("frames", ("a.png", b"x")), ("versions", (None, "1"))]
    assert_error(client.post("/v1/actions/infer", files=files), 422, "invalid_request", "no field versions")


def test_many_requests_for_a_session_of_the_store_open_it_once(serve: Serve, tmp_path: Path) -> None:
    store = str(tmp_path / "sessions.db")
    first = serve(session_store=store)
    session = create(first)
    step(first, session, 1)
    second = serve(session_store=store, client_sessions=1)
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda t: second.get(f"/v1/sessions/{session}/frames/{t % 2}"), range(16)))
    assert {answer.status_code for answer in answers} == {200}
    assert second.get("/readyz").json()["sessions"] == 1
    assert_error(second.get("/v1/sessions/nobody"), 404, "unknown_session")  # though all places are taken


def test_a_session_that_is_deleted_while_it_is_opened_stays_deleted(
    serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = str(tmp_path / "sessions.db")
    session = create(serve(session_store=store))
    client = serve(session_store=store)
    keeper, go = engine_of(client)._keeper, threading.Event()
    paint = keeper.painting

    def painting(*args: object) -> Iterator[object]:
        found = list(paint(*args))
        go.wait(10)
        yield from found

    monkeypatch.setattr(keeper, "painting", painting)
    with ThreadPoolExecutor(2) as pool:
        opening = pool.submit(client.get, f"/v1/sessions/{session}")
        eventually(lambda: engine_of(client)._worker._behind.locked())
        deleting = pool.submit(client.delete, f"/v1/sessions/{session}")
        go.set()
        assert deleting.result().status_code == 204
        opening.result()
    assert_error(client.get(f"/v1/sessions/{session}"), 404, "unknown_session")
    assert client.get("/readyz").json()["sessions"] == 0


def test_a_session_that_another_replica_ended_gives_up_its_place(serve: Serve, tmp_path: Path) -> None:
    store = str(tmp_path / "sessions.db")
    here, there = serve(session_store=store, idle_seconds=60), serve(session_store=store)
    sessions = [create(here) for _ in range(2)]
    for session in sessions:
        assert there.delete(f"/v1/sessions/{session}").status_code == 204
    assert_error(here.get(f"/v1/sessions/{sessions[0]}/frames/0"), 404, "unknown_session")
    assert here.get("/readyz").json()["sessions"] <= 1  # on a slow machine the idle were looked for meanwhile
    eventually(lambda: here.get("/readyz").json()["sessions"] == 0)


def test_half_a_character_is_no_server_error(serve: Serve) -> None:
    body = b'--x\r\nContent-Disposition: form-data; name="+2AA-"\r\n\r\n1\r\n--x--\r\n'
    kind = {"Content-Type": "multipart/form-data; charset=utf-7; boundary=x"}
    assert_error(serve().post("/v1/sessions", content=body, headers=kind), 422, "invalid_request", "no field")


def test_pictures_are_turned_upright_and_sixteen_bits_of_grey_are_grey() -> None:
    half_HWC = np.zeros((64, 64, 3), np.uint8)
    half_HWC[:32] = 255
    buffer, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6  # the camera was held on its side: what is stored has to be turned to the right
    Image.fromarray(half_HWC).save(buffer, "PNG", exif=exif)
    np.testing.assert_array_equal(frame_from_upload(buffer.getvalue(), 64, 64, 10**6), np.rot90(half_HWC, -1))
    buffer = io.BytesIO()
    Image.fromarray(np.full((64, 64), 0x8000, np.uint16)).save(buffer, "PNG")
    assert np.all(frame_from_upload(buffer.getvalue(), 64, 64, 10**6) == 128)
