"""Who may play, how much, and what a service in the open refuses."""

from __future__ import annotations

import hashlib
import json
import logging
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from fastapi.testclient import TestClient
from play_help import assert_error, create, engine_of, eventually, step
from pydantic_settings import CliApp
from starlette.testclient import WebSocketDenialResponse
from starlette.websockets import WebSocketDisconnect

from genie_model.genie import Genie
from serving import worlds
from serving.__main__ import main
from serving.clients import Clients
from serving.settings import Settings

Serve = Callable[..., TestClient]


def hashed(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


@pytest.fixture
def keys(tmp_path: Path) -> str:
    file = tmp_path / "keys.toml"
    file.write_text(
        f'[ada]\nsha256 = "{hashed("ada-key")}"\n'
        f'[bob]\nsha256 = "{hashed("bob-key")}"\nsessions = 1\nsteps_per_minute = 3\n'
    )
    return str(file)


# ---- keys


def test_without_a_key_nothing_is_shown_but_health(serve: Serve, keys: str) -> None:
    client = serve(api_keys=keys)
    for path in ("/", "/web/play.js", "/docs", "/openapi.json", "/v1/model", "/v1/sessions/x"):
        answer = client.get(path)
        assert_error(answer, 401, "unauthorized", "Authorization: Bearer")
        assert answer.headers["www-authenticate"].startswith("Basic ")
    for path in ("/healthz", "/readyz", "/metrics"):
        assert client.get(path).status_code == 200
    hash_itself = f"Bearer {hashed('bob-key')}"
    for wrong in ("Bearer bob", "Bearer", "Basic !!", "Basic Ym9i", "Basic ö", "Digest bob-key", hash_itself):
        assert client.get("/v1/model", headers={"Authorization": wrong.encode("latin-1")}).status_code == 401
    with pytest.raises(WebSocketDisconnect), client.websocket_connect("/v1/sessions/x/play"):
        pass


def test_a_key_opens_everything_as_a_token_or_as_a_password(serve: Serve, keys: str) -> None:
    client = serve(api_keys=keys)
    assert client.get("/v1/model", auth=("anybody", "ada-key")).status_code == 200
    client.headers["Authorization"] = "Bearer ada-key"
    session = create(client)
    assert step(client, session, 0).status_code == 200
    assert client.get("/").status_code == 200
    with client.websocket_connect(f"/v1/sessions/{session}/play") as live:
        live.receive_bytes()


def test_the_api_describes_itself_with_examples_and_says_that_it_wants_a_key(serve: Serve, keys: str) -> None:
    described = serve(api_keys=keys).get("/openapi.json", headers={"Authorization": "Bearer ada-key"}).json()
    schemas = described["components"]["schemas"]
    bare = []
    for path, methods in described["paths"].items():
        for method, operation in methods.items():
            assert bool(operation.get("security")) == path.startswith("/v1/"), path
            bare += [
                f"{method} {path} {parameter['name']}"
                for parameter in operation.get("parameters", [])
                if not parameter["schema"].get("examples") and not parameter.get("examples")
            ]
    for name, schema in schemas.items():
        if not schema.get("examples"):
            bare += [
                f"{name}.{field}"
                for field, value in schema.get("properties", {}).items()
                if not value.get("examples")
                and "$ref" not in json.dumps(value)
                and "octet-stream" not in json.dumps(value)
            ]
    assert [field for field in bare if "ValidationError" not in field] == []
    assert described["components"]["securitySchemes"]["HTTPBearer"]["scheme"] == "bearer"
    assert "securitySchemes" not in serve().get("/openapi.json").json()["components"]


def test_a_key_is_any_string(serve: Serve, tmp_path: Path) -> None:
    key, file = "Schlüssel: ☂", tmp_path / "keys.toml"
    file.write_text(f'["Jürgen"]\nsha256 = "{hashed(key)}"\n', "utf-8")
    client = serve(api_keys=str(file))
    assert client.get("/v1/model", headers={"Authorization": f"Bearer {key}".encode()}).status_code == 200
    assert client.get("/v1/model", auth=(b"", key.encode())).status_code == 200


def test_every_key_has_its_own_quota(serve: Serve, keys: str) -> None:
    client = serve(api_keys=keys, client_sessions=2)
    ada, bob = {"Authorization": "Bearer ada-key"}, {"Authorization": "Bearer bob-key"}
    start = {"start_frame": "00"}
    session = client.post("/v1/sessions", data=start, headers=bob).json()["id"]
    refused = client.post("/v1/sessions", data=start, headers=bob)
    assert_error(refused, 429, "too_many_sessions_of_client", "at most 1 sessions")
    assert 0 < int(refused.headers["retry-after"]) <= 902
    assert client.post(f"/v1/sessions/{session}/branch", json={"t": 0}, headers=bob).status_code == 429
    assert [client.post("/v1/sessions", data=start, headers=ada).status_code for _ in range(3)] == [201, 201, 429]

    here = f"/v1/sessions/{session}/step"
    assert client.post(here, json={"actions": [0, 0]}, headers=bob).status_code == 200
    refused = client.post(here, json={"actions": [0, 0]}, headers=bob)
    assert_error(refused, 429, "too_many_requests", "3 steps a minute")
    assert 0 < int(refused.headers["retry-after"]) <= 60
    never = client.post(here, json={"actions": [0] * 4}, headers=bob)
    assert_error(never, 422, "invalid_request", "at most 3 steps a minute, and this asks for 4")
    assert "retry-after" not in never.headers
    with client.websocket_connect(f"/v1/sessions/{session}/play", headers=bob) as live:
        live.receive_bytes()
        for _ in range(2):
            live.send_text(json.dumps({"action": 0}))
        live.receive_bytes()
        assert live.receive_json()["code"] == "too_many_requests"
    assert client.post(here, json={"action": 0}, headers=ada).status_code == 200, "whoever knows a session plays it"

    client.delete(f"/v1/sessions/{session}", headers=bob)
    assert client.post("/v1/sessions", data=start, headers=bob).status_code == 201


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("", "nobody could play"),
        ("[ada", "cannot be read"),
        ("[ada]\n", "ada.sha256"),
        ('[ada]\nsha256 = "ada-key"\n', "ada.sha256"),
        (f'[ada]\nsha256 = "{hashed("x")}"\nstep_per_minute = 3\n', "step_per_minute"),
        ("ada = 3\n", "ada"),
        (f'[ada]\nsha256 = "{hashed("")}"\n', "hash of an empty key"),
    ],
)
def test_a_file_of_keys_that_is_none_is_refused_at_the_start(
    text: str, word: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "keys.toml"
    file.write_text(text)
    assert main(["--api-keys", str(file), "--wait", "--port", "0"]) == 1
    said = capsys.readouterr().err
    assert word in said
    assert "ada-key" not in said
    assert said.count("\n") == 1
    with pytest.raises(ValueError, match="cannot be read"):
        Clients(Settings(api_keys=str(tmp_path / "none.toml")))


# ---- limits without keys


def test_addresses_are_clients_and_a_household_is_one() -> None:
    clients = Clients(Settings())
    names = [clients.of("", address).name for address in ("10.0.0.1", "10.0.0.2", "2001:db8::1", "2001:db8::2:3")]
    assert names == ["10.0.0.1", "10.0.0.2", "2001:db8::/64", "2001:db8::/64"]
    assert clients.of("", "fe80::1%eth0").name == "fe80::/64"


def test_worlds_are_counted_for_every_client(serve: Serve) -> None:
    client = serve(client_worlds_per_minute=2)
    start, rollout = {"start_frame": "00"}, {"start_frame": "00", "actions": "0"}
    assert client.post("/v1/rollouts", data=rollout).status_code == 200
    create(client)
    for path, form in (("/v1/rollouts", rollout), ("/v1/sessions", start)):
        assert_error(client.post(path, data=form), 429, "too_many_requests", "2 worlds a minute")


def test_a_step_that_waits_too_long_is_refused_and_safe_to_send_again(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = serve(max_step_seconds=1)
    slow, other = create(client), create(client)
    began, go, together = threading.Event(), threading.Event(), worlds.step
    monkeypatch.setattr(worlds, "step", lambda *args: (began.set(), go.wait(10), together(*args))[2])
    with ThreadPoolExecutor(2) as pool:
        in_pass = pool.submit(client.post, f"/v1/sessions/{slow}/step", json={"action": 1, "step": 1})
        assert began.wait(10)
        queued = pool.submit(client.post, f"/v1/sessions/{other}/step", json={"action": 1, "step": 1})
        for answer in (in_pass.result(), queued.result()):
            assert_error(answer, 503, "step_too_slow", "send it again")
            assert int(answer.headers["retry-after"]) > 0
    go.set()
    eventually(lambda: client.get(f"/v1/sessions/{slow}").json()["steps"] == 1)
    assert client.get(f"/v1/sessions/{other}").json()["steps"] == 0, "what was still queued is not taken"
    sent_early = threading.Event()
    monkeypatch.setattr(worlds, "step", lambda *args: (sent_early.wait(10), together(*args))[1])
    with ThreadPoolExecutor(2) as pool:  # sent again while the pass that takes it still goes on
        assert_error(client.post(f"/v1/sessions/{slow}/step", json={"action": 2, "step": 2}), 503, "step_too_slow")
        early = pool.submit(client.post, f"/v1/sessions/{slow}/step", json={"action": 2, "step": 2})
        time.sleep(0.1)
        sent_early.set()
        assert early.result().status_code in (200, 409)
    assert client.get(f"/v1/sessions/{slow}").json()["steps"] == 2, "taken once"
    for session, action, number in ((slow, 2, 2), (other, 1, 1)):
        again = client.post(f"/v1/sessions/{session}/step", json={"action": action, "step": number})
        assert (again.status_code, again.headers["x-steps"]) == (200, str(number))


# ---- a service of its own, to which one can be rude


def test_an_upload_that_dawdles_is_refused(address: Callable[..., tuple[str, int]]) -> None:
    began = time.monotonic()
    with socket.create_connection(address(max_upload_seconds=0.5), timeout=10) as connection:
        connection.sendall(
            b"POST /v1/actions/infer HTTP/1.1\r\nHost: a\r\nContent-Length: 1000\r\n"
            b"Content-Type: multipart/form-data; boundary=x\r\n\r\n--x\r\n"
        )
        answer = connection.recv(10_000)
    assert answer.startswith(b"HTTP/1.1 408")
    assert b"upload_too_slow" in answer
    assert time.monotonic() - began < 8


def of_clients(port: int) -> list[object]:
    """The service's ends of its connections."""
    ends = psutil.Process().net_connections("tcp")
    return [end for end in ends if end.laddr.port == port and end.status != psutil.CONN_LISTEN]


def test_a_rollout_ends_when_its_client_hangs_up(
    address: Callable[..., tuple[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    where = address()  # its model is warm: that takes a step too
    passes, go, take = [0], threading.Event(), Genie.step

    def counted(*args: Any) -> Any:
        passes[0] += 1
        go.wait(10)
        return take(*args)

    monkeypatch.setattr(Genie, "step", counted)
    form = "start_frame=00&actions=" + ",".join(["0"] * 100)
    head = "POST /v1/rollouts HTTP/1.1\r\nHost: a\r\nContent-Type: application/x-www-form-urlencoded\r\n"
    with socket.create_connection(where, timeout=10) as connection:
        connection.sendall(f"{head}Content-Length: {len(form)}\r\n\r\n{form}".encode())
        eventually(lambda: passes[0] == 1)
    eventually(lambda: not of_clients(where[1]))  # it has arrived that the client left
    go.set()
    httpx.post(f"http://{where[0]}:{where[1]}/v1/rollouts", data={"start_frame": "00", "actions": "0"}, timeout=30)
    assert passes[0] == 2, "of the first, and of the one that waited for it"


@pytest.mark.parametrize(("proxies", "status"), [("", 429), ("127.0.0.1", 200)])
def test_only_a_proxy_that_is_named_says_which_client_it_is(
    address: Callable[..., tuple[str, int]], proxies: str, status: int
) -> None:
    host, port = address(trusted_proxies=proxies, client_worlds_per_minute=1)
    form = {"start_frame": "00", "actions": "0"}
    for number, expected in enumerate((200, status), 1):
        said = {"X-Forwarded-For": f"203.0.113.{number}"}
        answer = httpx.post(f"http://{host}:{port}/v1/rollouts", data=form, headers=said, timeout=30)
        assert answer.status_code == expected


# ---- other sites' pages


def test_other_sites_play_only_where_they_are_named(serve: Serve) -> None:
    here, there = {"Origin": "https://good.example"}, {"Origin": "https://bad.example"}
    client = serve(cors_origins="https://good.example,https://fine.example")
    asked = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "content-type"}
    preflight = client.options("/v1/sessions", headers=here | asked)
    assert (preflight.status_code, preflight.headers["access-control-allow-origin"]) == (200, "https://good.example")
    answer = client.get("/v1/model", headers=here)
    assert answer.headers["access-control-allow-origin"] == "https://good.example"
    assert "X-Steps" in answer.headers["access-control-expose-headers"]
    assert "access-control-allow-origin" not in client.get("/v1/model", headers=there).headers
    session = create(client)
    for allowed in (here, {"Origin": "http://testserver"}, {}):
        with client.websocket_connect(f"/v1/sessions/{session}/play", headers=allowed) as live:
            live.receive_bytes()
    for refused in (there, {"Origin": "null"}):
        with (
            pytest.raises(WebSocketDenialResponse) as denied,
            client.websocket_connect(f"/v1/sessions/{session}/play", headers=refused),
        ):
            pass
        assert_error(denied.value, 403, "foreign_page", "--cors-origins")
    assert "access-control-allow-origin" not in serve().get("/v1/model", headers=here).headers


def test_where_every_site_may_play_a_websocket_may_too(serve: Serve) -> None:
    client = serve(cors_origins="*")
    there = {"Origin": "https://any.example"}
    assert client.get("/v1/model", headers=there).headers["access-control-allow-origin"] == "*"
    with client.websocket_connect(f"/v1/sessions/{create(client)}/play", headers=there) as live:
        live.receive_bytes()


def test_an_origin_is_written_as_browsers_send_it(capsys: pytest.CaptureFixture[str]) -> None:
    named = CliApp.run(Settings, cli_args=["--cors-origins", "https://good.example, http://localhost:5173"])
    assert named.cors_origins == ["https://good.example", "http://localhost:5173"]
    for wrong in ("https://good.example/", "good.example", "null"):
        assert main(["--cors-origins", wrong, "--wait", "--port", "0"]) == 1
        assert "cors_origins" in capsys.readouterr().err


def test_a_refusal_can_be_read_by_the_sites_that_may_play(serve: Serve, keys: str) -> None:
    client = serve(api_keys=keys, cors_origins="https://good.example")
    refused = client.get("/v1/model", headers={"Origin": "https://good.example"})
    assert (refused.status_code, refused.headers["access-control-allow-origin"]) == (401, "https://good.example")


def test_every_answer_is_what_it_says_and_the_page_loads_nothing_from_elsewhere(serve: Serve) -> None:
    client = serve()
    for path in ("/", "/web/play.js", "/v1/model", "/nowhere", "/docs"):
        headers = client.get(path).headers
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["referrer-policy"] == "no-referrer"
        assert ("content-security-policy" in headers) == (path != "/docs")


# ---- what nobody expected


def test_a_service_whose_worlds_stand_still_says_so(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    client = serve(max_step_seconds=0.3)
    session = create(client)
    assert client.get("/healthz").status_code == 200
    monkeypatch.setattr(engine_of(client).passes, "_next_batch", lambda: 1 / 0)
    assert step(client, session, 0).status_code == 503
    assert_error(client.get("/healthz"), 500, "internal", "see the log")


def test_an_unexpected_error_is_answered_and_logged_with_the_request_s_number(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    client = serve()
    session = create(client)
    monkeypatch.setattr(engine_of(client)._keeper, "painting", lambda *args: 1 / 0)
    with caplog.at_level(logging.ERROR):
        answer = client.get(f"/v1/sessions/{session}/frames/0", headers={"X-Request-ID": "my-number"})
    assert_error(answer, 500, "internal", "X-Request-ID")
    assert answer.headers["x-request-id"] == "my-number"
    failed = next(record for record in caplog.records if record.exc_info)
    assert failed.request_id == "my-number"  # type: ignore[attr-defined]
    assert "division" not in answer.text


@pytest.mark.parametrize(
    "body",
    ['{"action": true}', '{"action": "1"}', '{"action": 1.0}', '{"action": 1e9}', f'{{"action": {10**30}}}',
     '{"action": NaN}', f'{{"action": {"1" * 5000}}}', "[" * 50_000, '{"action": 0, "step": -1}',
     '{"action": 0, "stepp": 1}', f'{{"action": 0, "step": {10**30}}}', "[0]", "null"],
    ids=lambda body: body[:30],
)  # fmt: skip
def test_a_body_is_taken_at_its_word(serve: Serve, body: str) -> None:
    client = serve()
    session = create(client)
    answer = client.post(f"/v1/sessions/{session}/step", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code in (409, 422)
    assert client.get(f"/v1/sessions/{session}").json()["steps"] == 0
    assert_error(client.get(f"/v1/sessions/{session}/frames/{10**30}"), 422, "invalid_request")


def test_other_bodies_are_taken_at_their_word_too(serve: Serve) -> None:
    client = serve()
    session = create(client)
    for body in ({"t": True}, {"t": "0"}, {"t": 0.0}, {"t": 10**30}, {"t": 0, "tt": 1}):
        assert_error(client.post(f"/v1/sessions/{session}/branch", json=body), 422, "invalid_request")
    sketch = json.dumps({"canvas": [["#ffffff"]], "stroke": []})
    assert_error(client.post("/v1/sessions", data={"sketch": sketch}), 422, "invalid_request", "stroke")
    for seed in ("-1", str(2**31), "1" * 5000, "true"):
        form = {"start_frame": "00", "seed": seed}
        assert_error(client.post("/v1/sessions", data=form), 422, "invalid_request", "seed")
