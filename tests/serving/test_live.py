"""Play over a WebSocket, and what an operator reads of it."""

from __future__ import annotations

import asyncio
import io
import json
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from fastapi.testclient import TestClient
from page_help import serving
from PIL import Image
from play_help import assert_error, create, engine_of, eventually, pixels, play, step
from starlette.testclient import WebSocketDenialResponse, WebSocketTestSession
from starlette.websockets import WebSocketDisconnect
from websockets.sync.client import connect

from serving import worlds
from serving.access import JsonLines
from serving.live import Outbox

Serve = Callable[..., TestClient]


def received(socket: WebSocketTestSession) -> tuple[dict[str, object], bytes]:
    message = socket.receive_bytes()
    length = int.from_bytes(message[:4], "little")
    return json.loads(message[4 : 4 + length]), message[4 + length :]


def test_actions_go_in_and_frames_come_out(serve: Serve) -> None:
    client, actions = serve(), [1, 2, 3, 0]
    undisturbed = play(client, actions, seed=9)
    session = create(client, seed=9)
    with client.websocket_connect(f"/v1/sessions/{session}/play") as socket:
        head, prompt = received(socket)
        assert (head["step"], head["version"]) == (0, "1")
        assert prompt == client.get(f"/v1/sessions/{session}/frame").content
        for t, action in enumerate(actions[:2]):
            socket.send_json({"action": action})
            head, frame = received(socket)
            assert (head["step"], frame) == (t + 1, undisturbed[t])
            assert 0 < float(str(head["milliseconds"])) < 10_000
    with client.websocket_connect(f"/v1/sessions/{session}/play") as socket:  # again: it stands where it was left
        assert received(socket) == ({"step": 2, "milliseconds": 0.0, "version": "1"}, undisturbed[1])
        socket.send_json({"action": 3, "step": 3})
        assert received(socket)[1] == undisturbed[2]
    assert step(client, session, 0).content == undisturbed[3]


@pytest.mark.parametrize(("picture", "kind"), [("png", "PNG"), ("webp", "WEBP"), ("jpeg", "JPEG")])
def test_frames_come_in_the_format_that_was_asked_for(serve: Serve, picture: str, kind: str) -> None:
    client = serve()
    session = create(client)
    with client.websocket_connect(f"/v1/sessions/{session}/play?format={picture}") as socket:
        image = Image.open(io.BytesIO(received(socket)[1]))
    assert image.format == kind
    shown = pixels(client.get(f"/v1/sessions/{session}/frame").content)
    assert np.abs(np.asarray(image.convert("RGB")).astype(int) - shown).mean() < 12


def test_what_is_wrong_is_said_and_the_connection_stays(serve: Serve) -> None:
    client = serve()
    session = create(client)
    with client.websocket_connect(f"/v1/sessions/{session}/play") as socket:
        received(socket)
        for sent, word in (("up", "JSON"), ("{}", "action"), ('{"action": 9}', "from 0 to 3"), ("[]", "object")):
            socket.send_text(sent)
            problem = socket.receive_json()
            assert problem["code"] == "invalid_request"
            assert word in problem["detail"]
        socket.send_bytes(b"0")
        assert socket.receive_json()["code"] == "invalid_request"
        socket.send_json({"action": 0, "step": 5})
        assert socket.receive_json()["code"] == "session_moved"
        socket.send_json({"action": 0})
        assert received(socket)[0]["step"] == 1
        client.delete(f"/v1/sessions/{session}")
        socket.send_json({"action": 0})
        with pytest.raises(WebSocketDisconnect) as closed:
            socket.receive_bytes()
        assert closed.value.code == 4404
    with client.websocket_connect("/v1/sessions/nobody/play") as socket, pytest.raises(WebSocketDisconnect) as closed:
        socket.receive_bytes()
    assert closed.value.code == 4404
    with (
        pytest.raises((WebSocketDisconnect, WebSocketDenialResponse)),
        client.websocket_connect(f"/v1/sessions/{session}/play?format=bmp") as socket,
    ):
        socket.receive_bytes()


def test_a_slow_reader_gets_the_newest_frame() -> None:
    class Slow:
        """A socket that takes a message only when it is told to."""

        def __init__(self) -> None:
            self.sent: list[bytes] = []
            self.may = asyncio.Semaphore(0)

        async def send_bytes(self, message: bytes) -> None:
            await self.may.acquire()
            self.sent.append(message)

    async def run() -> list[bytes]:
        socket = Slow()
        outbox = Outbox(socket)  # type: ignore[arg-type]
        sending = asyncio.create_task(outbox.send())
        for number in range(10):
            outbox.put(bytes([number]))
            await asyncio.sleep(0)
        for _ in range(3):
            socket.may.release()
            await asyncio.sleep(0.01)
        sending.cancel()
        return socket.sent

    assert asyncio.run(run()) == [bytes([0]), bytes([9])]


def test_a_session_that_ended_elsewhere_disturbs_no_other(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    client = serve()
    undisturbed = play(client, [1, 2], seed=2)
    session, other = create(client), create(client, seed=2)
    store = engine_of(client)._keeper.store
    gathered = worlds.step

    def step_while_another_replica_ends_it(*args: Any) -> Any:
        store.delete(session)
        return gathered(*args)

    monkeypatch.setattr(worlds, "step", step_while_another_replica_ends_it)
    with ThreadPoolExecutor(2) as pool:
        answers = list(pool.map(lambda id: step(client, id, 1), (session, other)))
    assert_error(answers[0], 409, "session_moved", "ended or went on")
    assert answers[1].content == undisturbed[0]
    assert_error(step(client, session, 1), 404, "unknown_session")
    assert step(client, other, 2).content == undisturbed[1]


def test_two_processes_do_not_take_the_same_step(serve: Serve, tmp_path: Path) -> None:
    first, second = (serve(session_store=str(tmp_path / "sessions.db")) for _ in range(2))
    undisturbed = play(first, [0, 1, 2], seed=5)
    session = create(first, seed=5)
    assert step(first, session, 0).content == undisturbed[0]
    assert step(second, session, 1).headers["x-steps"] == "2"
    assert_error(step(first, session, 3), 409, "session_moved")  # the first did not know
    assert first.get(f"/v1/sessions/{session}").json()["steps"] == 2
    again = step(first, session, 2)
    assert again.headers["x-steps"] == "3"
    assert np.abs(pixels(again.content).astype(int) - pixels(undisturbed[2])).max() <= 1


def test_prometheus_reads_what_happened(serve: Serve) -> None:
    client = serve()
    play(client, [0, 1, 2])
    client.get("/v1/sessions/nobody")
    lines = client.get("/metrics").text.splitlines()
    for expected in (
        "genie_frames_total 3.0",
        "genie_sessions 1.0",
        "genie_queue 0.0",
        'genie_model_info{name="genie",version="1"} 1.0',
        'genie_model_reloads_total{result="loaded"} 1.0',
        'genie_model_reloads_total{result="refused"} 0.0',
        "genie_batch_size_sum 3.0",
        'genie_step_seconds_count{phase="total"} 3.0',
        'genie_http_answers_total{method="GET",route="/v1/sessions/{session_id}",status="404"} 1.0',
    ):
        assert expected in lines


def test_every_answer_has_a_number_and_a_line(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    client = serve()
    with caplog.at_level(logging.INFO, "serving.access"):
        assert (
            client.get("/healthz", headers={"X-Request-ID": "from-a.proxy:1"}).headers["x-request-id"]
            == "from-a.proxy:1"
        )
        strange = client.get("/nowhere", headers={"X-Request-ID": 'in"jected\t'}).headers["x-request-id"]
    assert len(strange) == 16
    first, second = (
        json.loads(JsonLines().format(record)) for record in caplog.records if record.name == "serving.access"
    )
    assert (first["request_id"], first["route"], first["status"]) == ("from-a.proxy:1", "/healthz", 200)
    assert (second["request_id"], second["status"], second["level"]) == (strange, 404, "info")
    assert second["milliseconds"] >= 0


def test_a_websocket_has_a_number_and_a_line_when_it_is_closed(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    client = serve(max_sockets=1)
    path = f"/v1/sessions/{create(client)}/play"
    with (
        caplog.at_level(logging.INFO, "serving.access"),
        client.websocket_connect(path, headers={"X-Request-ID": "mine"}) as socket,
    ):
        assert dict(socket.extra_headers)[b"x-request-id"] == b"mine"  # type: ignore[arg-type]
        received(socket)
        with client.websocket_connect(path) as second, pytest.raises(WebSocketDisconnect):
            second.receive_bytes()
    lines = [record.__dict__ for record in caplog.records if record.name == "serving.access"]
    assert [(line["method"], line["route"], line["status"]) for line in lines] == [
        ("WS", "/v1/sessions/{session_id}/play", 4429),
        ("WS", "/v1/sessions/{session_id}/play", 101),
    ]
    assert lines[1]["request_id"] == "mine"


def test_a_slow_reader_s_frames_do_not_pile_up_on_the_way(model_folder: Path) -> None:
    steps, seen = 100, list[int]()
    with (
        serving(model_folder) as (url, _),
        httpx.Client(base_url=url) as client,
        connect(
            f"ws{url.removeprefix('http')}/v1/sessions/{(session := create(client))}/play",  # type: ignore[arg-type]
            max_queue=1,
            ping_interval=None,
        ) as socket,
    ):
        for number in range(1, steps + 1):
            socket.send(json.dumps({"action": number % 4, "step": number}))
        eventually(lambda: client.get(f"/v1/sessions/{session}").json()["steps"] == steps, 60)
        while not seen or seen[-1] < steps:
            frame = socket.recv(10)
            assert isinstance(frame, bytes)
            seen.append(json.loads(frame[4 : 4 + int.from_bytes(frame[:4], "little")])["step"])
    assert seen == sorted(set(seen))
    assert len(seen) < steps / 2


def test_a_session_s_id_is_a_secret_and_in_no_line(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    client = serve()
    with caplog.at_level(logging.INFO, "serving.access"):
        session = create(client)
        step(client, session, 0)
        with client.websocket_connect(f"/v1/sessions/{session}/play") as socket:
            received(socket)
    lines = [JsonLines().format(record) for record in caplog.records if record.name.startswith("serving")]
    assert any('"route": "/v1/sessions/{session_id}/step"' in line for line in lines)
    assert session not in "".join(lines)
