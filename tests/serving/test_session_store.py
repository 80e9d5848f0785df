"""Where sessions are kept: SQLite and Redis hold to one contract, and what is out of reach is a 503."""

from __future__ import annotations

import io
import logging
import socket
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from fastapi.testclient import TestClient
from PIL import Image
from play_help import assert_error, create, engine_of, pixels, play, step
from redis import Redis
from redis_server import PASSWORD, RedisServer

from genie_model.genie import NO_ACTION
from serving.__main__ import main
from serving.errors import StoreError
from serving.settings import Settings
from serving.sqlite_store import SqliteStore
from serving.store import Frame, SessionRecord, SessionStore, open_store

Serve = Callable[..., TestClient]
SHAPE = (4, 2)


def record(id: str) -> SessionRecord:
    return SessionRecord(id, "génie", "1", "run", "a folder", 2**31 - 1, '{"temperature":0.7}', b"\x89PNG\n\x00\n\xff")


def a_frame(session: str, t: int, action: int | None = None) -> Frame:
    codes_NC = np.random.default_rng(t).integers(2**16, size=SHAPE).astype(np.uint16)
    return Frame(session, t, (NO_ACTION if t == 0 else t % 4) if action is None else action, codes_NC)


def assert_frames(found: list[Frame], expected: list[Frame]) -> None:
    assert [(f.session, f.t, f.action) for f in found] == [(f.session, f.t, f.action) for f in expected]
    assert all(np.array_equal(a.codes_NC, b.codes_NC) for a, b in zip(found, expected, strict=True))


# ---- the contract


def test_a_session_is_read_as_it_was_kept(any_store: str) -> None:
    store = open_store(any_store, 60)
    frames = [a_frame("a", t) for t in range(9)]
    store.create(record("a"), frames[:3])  # as a branch is
    for frame in frames[3:]:
        assert store.append([frame]) == [True]
    store.close()
    store = open_store(any_store, 60)
    assert store.record("a") == record("a")
    assert store.reopen("a") == (record("a"), 9)
    assert_frames(store.frames("a", SHAPE), frames)
    for start, stop in ((0, 1), (2, 5), (8, 9), (7, 12), (3, 3), (0, 0)):
        assert_frames(store.frames("a", SHAPE, start, stop), frames[start:stop])
    assert store.record("b") is None
    assert store.reopen("b") is None
    assert store.frames("b", SHAPE) == []
    store.close()


def test_only_the_very_next_frame_of_a_session_is_let_in(any_store: str) -> None:
    first, second = (open_store(any_store, 60) for _ in range(2))
    for id in ("a", "b"):
        first.create(record(id), [a_frame(id, 0)])
    assert first.append([a_frame("a", 1), a_frame("b", 1), a_frame("nobody", 1)]) == [True, True, False]
    again = [a_frame("a", 1, action=3), a_frame("b", 2), a_frame("nobody", 0), a_frame("a", 3), a_frame("a", 0)]
    assert second.append(again) == [False, True, False, False, False]
    assert_frames(first.frames("a", SHAPE), [a_frame("a", t) for t in range(2)])
    assert_frames(first.frames("b", SHAPE), [a_frame("b", t) for t in range(3)])
    assert first.record("nobody") is None
    assert first.append([]) == []
    for store in (first, second):
        store.close()


def test_what_is_deleted_is_gone(any_store: str) -> None:
    store = open_store(any_store, 60)
    store.create(record("a"), [a_frame("a", 0)])
    store.create(record("b"), [a_frame("b", 0)])
    assert [store.delete("a"), store.delete("a")] == [True, False]
    assert_gone(store, "a")
    assert store.reopen("b") == (record("b"), 1)
    store.close()


def test_a_session_expires_by_whoever_used_it_last(any_store: str) -> None:
    patient, hasty = open_store(any_store, 60), open_store(any_store, 1)
    for id in ("taken over", "stepped", "seen"):
        patient.create(record(id), [a_frame(id, 0)])
    for id in ("hasty's", "reopened"):
        hasty.create(record(id), [a_frame(id, 0)])
    assert hasty.append([a_frame("taken over", 1), a_frame("stepped", 1)]) == [True, True]
    assert patient.append([a_frame("stepped", 2)]) == [True]
    assert hasty.append([a_frame("seen", 7)]) == [False], "which uses nothing"
    assert hasty.reopen("seen")
    assert patient.reopen("reopened")
    time.sleep(1.05)
    for id in ("taken over", "hasty's"):
        assert_gone(patient, id)
        assert patient.append([a_frame(id, 2), a_frame(id, 1)]) == [False, False]
    hasty.delete_expired()
    for id, length in (("stepped", 3), ("seen", 1), ("reopened", 1)):
        assert patient.reopen(id) == (record(id), length)
    for store in (patient, hasty):
        store.close()


def assert_gone(store: SessionStore, id: str) -> None:
    assert store.record(id) is None
    assert store.reopen(id) is None
    assert store.frames(id, SHAPE) == []
    assert store.delete(id) is False


# ---- SQLite


def test_a_file_of_the_service_before_is_brought_up_to_date(tmp_path: Path) -> None:
    file = tmp_path / "sessions.db"
    old = sqlite3.connect(file)
    old.executescript("""
        PRAGMA journal_mode = WAL;
        CREATE TABLE sessions (
            id TEXT PRIMARY KEY, name TEXT NOT NULL, version TEXT NOT NULL, run_id TEXT NOT NULL, folder TEXT NOT NULL,
            seed INTEGER NOT NULL, sampling TEXT NOT NULL, prompt BLOB NOT NULL, last_used REAL NOT NULL
        );
        CREATE TABLE frames (
            session TEXT NOT NULL REFERENCES sessions(id) ON DELETE CASCADE,
            t INTEGER NOT NULL, action INTEGER NOT NULL, codes BLOB NOT NULL, PRIMARY KEY (session, t)
        ) WITHOUT ROWID;
    """)
    for id, idle in (("recent", 10), ("old", 70)):
        kept = record(id)
        values = (*(getattr(kept, name) for name in kept.__dataclass_fields__), time.time() - idle)
        old.execute(f"INSERT INTO sessions VALUES ({', '.join('?' * 9)})", values)
        for t in range(3):
            f = a_frame(id, t)
            old.execute("INSERT INTO frames VALUES (?, ?, ?, ?)", (id, t, f.action, f.codes_NC.tobytes()))
    old.commit()
    old.close()
    for _ in range(2):  # once is enough
        store = SqliteStore(str(file), 60)
        assert store.record("recent") == record("recent")
        assert_gone(store, "old")
        store.close()
    (expires,) = sqlite3.connect(file).execute("SELECT expires FROM sessions WHERE id = 'recent'").fetchone()
    assert expires == pytest.approx(time.time() + 50, abs=5)
    store = SqliteStore(str(file), 60)
    assert store.append([a_frame("recent", 3)]) == [True]
    store.delete_expired()
    store.close()
    assert sqlite3.connect(file).execute("SELECT COUNT(*) FROM frames").fetchone() == (4,), "the old one's are gone"


def test_a_file_of_a_newer_service_is_left_alone(tmp_path: Path) -> None:
    file = tmp_path / "sessions.db"
    sqlite3.connect(file).executescript("PRAGMA user_version = 99").close()
    with pytest.raises(ValueError, match="newer"):
        open_store(str(file), 60)


def test_a_full_disk_keeps_all_of_a_session_or_nothing(tmp_path: Path) -> None:
    store = SqliteStore(str(tmp_path / "sessions.db"), 60)
    store.create(record("a"), [a_frame("a", 0)])
    (pages,) = store._db.execute("PRAGMA page_count").fetchone()
    store._db.execute(f"PRAGMA max_page_count = {pages + 1}")
    with pytest.raises(StoreError):
        store.create(record("b"), [a_frame("b", t) for t in range(500)])
    assert_gone(store, "b")
    store._db.execute("PRAGMA max_page_count = 1000000")
    assert store.append([a_frame("a", 1)]) == [True]
    store.close()


def test_a_locked_file_is_a_503_and_the_step_comes_after(serve: Serve, tmp_path: Path) -> None:
    file = str(tmp_path / "sessions.db")
    client = serve(session_store=file)
    engine_of(client)._keeper.store._db.execute("PRAGMA busy_timeout = 50")
    undisturbed = play(client, [1, 2, 3], seed=4)
    session = create(client, seed=4)
    step(client, session, 1)
    with sqlite3.connect(file) as other:
        other.execute("BEGIN IMMEDIATE")
        assert_unavailable(client, session, 2)
    assert_goes_on(client, session, {2: 2, 3: 3}, undisturbed)


# ---- Redis


def test_a_session_goes_on_in_another_replica(serve: Serve, any_store: str) -> None:
    a, b = (serve(session_store=any_store) for _ in range(2))
    actions = [t % 4 for t in range(12)]  # past the model's window of 8
    undisturbed = play(a, actions, seed=6)
    session = create(a, seed=6)
    assert [step(a, session, action).content for action in actions[:10]] == undisturbed[:10]
    assert_goes_on(b, session, {11: actions[10], 12: actions[11]}, undisturbed)
    assert_error(step(a, session, 0), 409, "session_moved")  # it did not know
    here = f"/v1/sessions/{session}"
    assert a.get(here).json()["steps"] == 12
    newest = step(b, session, 3).content
    assert a.get(f"{here}/frame").content == newest  # who asks where it stands is told, whoever stepped it
    step(b, session, 3)
    assert a.get(here).json()["steps"] == 14
    step(b, session, 3)
    with a.websocket_connect(f"{here}/play") as live:
        assert b'"step": 15' in live.receive_bytes()
    assert b.delete(here).status_code == 204
    step(a, session, 0)
    assert_error(step(a, session, 0), 404, "unknown_session")


def test_an_overtaken_replica_answers_as_the_store_has_it(serve: Serve, any_store: str) -> None:
    a, b = (serve(session_store=any_store) for _ in range(2))
    session = create(a, seed=6)
    here, played = f"/v1/sessions/{session}", play(b, [1, 2, 3, 0], seed=6)

    def overtake(action: int, t: int) -> None:
        assert b.post(f"{here}/step", json={"action": action, "step": t}).headers["x-steps"] == str(t)

    step(a, session, 1)
    overtake(2, 2)
    assert a.get(f"{here}/frames/2").content == played[1]
    overtake(3, 3)
    with Image.open(io.BytesIO(a.get(f"{here}/animation.gif").content)) as film:
        assert getattr(film, "n_frames", 1) == 4
    overtake(0, 4)
    assert a.get(f"{here}/previews?repeats=1").json()["steps"] == 4
    overtake(1, 5)
    assert a.post(f"{here}/branch", json={"t": 5}).json()["steps"] == 5
    overtake(2, 6)
    again = a.post(f"{here}/step", json={"action": 2, "step": 6})  # b's answer was lost
    assert again.headers["x-steps"] == "6"
    overtake(1, 7)
    onward = a.post(f"{here}/step", json={"action": 3, "step": 8})
    assert onward.headers["x-steps"] == "8"
    overtake(0, 9)
    other = a.post(f"{here}/step", json={"action": 1, "step": 9})
    assert_error(other, 409, "session_moved", "this is not step 9 again")


def test_replicas_do_not_end_each_other_s_sessions(serve: Serve, any_store: str) -> None:
    patient, hasty = serve(session_store=any_store), serve(session_store=any_store, idle_seconds=0.3)
    long, short = create(patient), create(hasty)
    store = open_store(any_store, 60)
    deadline = time.monotonic() + 10
    while store.record(short):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    store.close()
    assert_error(step(patient, short, 0), 404, "unknown_session")
    assert step(hasty, long, 0).headers["x-steps"] == "1"


def test_play_goes_on_after_redis_was_away(
    serve: Serve, redis_server: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    client = serve(session_store=redis_server.url)
    undisturbed = play(client, [1, 2, 3], seed=4)
    session, other = create(client, seed=4), create(client)
    step(client, session, 1)
    redis_server.stop()
    assert_unavailable(client, session, 2)
    assert_unavailable(client, session, 2)
    assert_error(client.post("/v1/sessions", data={"start_frame": "00"}), 503, "store_unavailable")
    assert_error(client.post(f"/v1/sessions/{other}/branch", json={"t": 0}), 503, "store_unavailable")
    assert_error(client.delete(f"/v1/sessions/{other}"), 503, "store_unavailable")
    with client.websocket_connect(f"/v1/sessions/{session}/play") as live:
        assert live.receive()["code"] == 4503
    redis_server.start()
    assert_goes_on(client, session, {2: 2, 3: 3}, undisturbed)
    assert client.delete(f"/v1/sessions/{other}").status_code == 204
    warned = [one for one in caplog.records if one.levelno >= logging.WARNING and one.name == "serving.redis_store"]
    assert warned
    assert all(f"127.0.0.1:{redis_server.port}" in one.getMessage() for one in warned)
    assert PASSWORD not in caplog.text


def test_a_step_whose_answer_from_redis_was_lost_is_not_taken_twice(serve: Serve, redis_server: RedisServer) -> None:
    client = serve(session_store=redis_server.url)
    undisturbed = play(client, [1, 2, 3], seed=4)
    session = create(client, seed=4)
    step(client, session, 1)
    redis = Redis.from_url(redis_server.url)
    sent = redis.info("commandstats")["cmdstat_eval"]["calls"]  # type: ignore[index]
    with redis_server.frozen():
        assert_unavailable(client, session, 2)
    store = open_store(redis_server.url, 60)
    deadline = time.monotonic() + 10
    while len(store.frames(session, (-1,))) < 3:  # Redis did what it had been sent
        assert time.monotonic() < deadline
        time.sleep(0.02)
    store.close()
    assert redis.info("commandstats")["cmdstat_eval"]["calls"] == sent + 1  # type: ignore[index]
    redis.close()
    assert_goes_on(client, session, {2: 2, 3: 3}, undisturbed)


def assert_unavailable(client: TestClient, session: str, t: int) -> None:
    answer = client.post(f"/v1/sessions/{session}/step", json={"action": t, "step": t})
    assert_error(answer, 503, "store_unavailable", "again")
    assert int(answer.headers["retry-after"]) > 0


def assert_goes_on(client: TestClient, session: str, actions: dict[int, int], undisturbed: list[bytes]) -> None:
    """`actions` by step; a step that is sent again after a failure is the one that would have been."""
    for t, action in actions.items():
        answer = client.post(f"/v1/sessions/{session}/step", json={"action": action, "step": t})
        assert answer.headers.get("x-steps") == str(t), answer.text
        assert np.array_equal(pixels(answer.content), pixels(undisturbed[t - 1]))


# ---- what is refused at the start


def refused(store: str, model_folder: Path, capsys: pytest.CaptureFixture[str]) -> str:
    assert main(["--port", "0", "--model-uri", str(model_folder), "--session-store", store]) == 1
    said = capsys.readouterr()
    assert PASSWORD not in said.out + said.err
    assert said.err.startswith("serving: ")
    assert said.err.count("\n") == 1
    return said.err


@pytest.mark.parametrize(
    ("url", "words"),
    [
        (f"redis://:{PASSWORD}/x@127.0.0.1", "%2F"),
        (f"redis://user:{PASSWORD}@127.0.0.1?socket_timeout=soon", "redis://user:password@host"),
        (f"redis://user:{PASSWORD}@127.0.0.1?sockets=2", "127.0.0.1:6379"),
        (f"unix://user:{PASSWORD}@/nowhere/redis.sock", "/nowhere/redis.sock"),
        (f"postgres://user:{PASSWORD}@127.0.0.1", "rediss://"),
    ],
)
def test_a_store_that_cannot_be(url: str, words: str, model_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert words in refused(url, model_folder, capsys)


def test_no_redis_there(model_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        place = f"127.0.0.1:{free.getsockname()[1]}"
    for scheme in ("redis", "rediss"):
        line = refused(f"{scheme}://:{PASSWORD}@{place}/0", model_folder, capsys)
        assert place in line
        assert "--session-store" in line


def test_redis_wants_another_password(
    redis_server: RedisServer, model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = refused(redis_server.url.replace(PASSWORD, f"not-{PASSWORD}"), model_folder, capsys)
    assert f"127.0.0.1:{redis_server.port}" in line
    assert "invalid" in line


def test_settings_do_not_show_the_password() -> None:
    assert PASSWORD not in repr(Settings(session_store=f"redis://:{PASSWORD}@127.0.0.1"))
