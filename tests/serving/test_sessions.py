"""Sessions: they step together, go back, branch, and outlive the process."""

from __future__ import annotations

import io
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch
from fastapi.testclient import TestClient
from PIL import Image
from play_help import Registry, assert_error, create, engine_of, eventually, nearly, pixels, play, step

from serving import worlds
from serving.sessions import Session
from serving.worlds import World

Serve = Callable[..., TestClient]


def frame(client: TestClient, session: str, t: int) -> np.ndarray:
    answer = client.get(f"/v1/sessions/{session}/frames/{t}")
    assert answer.status_code == 200, answer.text
    assert answer.headers["x-steps"] == str(t)
    return pixels(answer.content)


def test_players_share_passes_and_dream_what_they_would_alone(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    client = serve()
    actions = [[(i + t) % 4 for t in range(12)] for i in range(4)]
    alone = [play(client, actions[i], seed=i) for i in range(4)]
    sizes: list[int] = []
    together = worlds.step
    monkeypatch.setattr(
        worlds, "step", lambda genie, group, *rest: (sizes.append(len(group)), together(genie, group, *rest))[1]
    )

    def player(i: int) -> list[bytes]:
        time.sleep(0.05 * i)  # they come at different times
        return play(client, actions[i], seed=i)

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(player, range(4))) == alone
    assert max(sizes) > 1
    assert sum(sizes) == 48


def test_sessions_that_sample_otherwise_take_passes_of_their_own(serve: Serve) -> None:
    client = serve()
    alone = [play(client, [1, 2, 3], seed=1, maskgit_steps=n) for n in (1, 3)]
    assert alone[0] != alone[1]
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(lambda n: play(client, [1, 2, 3], seed=1, maskgit_steps=n), (1, 3))) == alone
    info = client.post("/v1/sessions", data={"start_frame": "00", "temperature": 0.5, "maskgit_steps": 4}).json()
    assert (info["temperature"], info["maskgit_steps"]) == (0.5, 4)
    for field, value in (("maskgit_steps", 0), ("maskgit_steps", 26), ("temperature", -1), ("temperature", "nan")):
        refused = client.post("/v1/sessions", data={"start_frame": "00", field: value})
        assert_error(refused, 422, "invalid_request", field)


def test_any_past_frame_can_be_seen_again(serve: Serve) -> None:
    client = serve()
    session = create(client, "01")
    seen = [pixels(client.get(f"/v1/sessions/{session}/frame").content)]
    seen += [pixels(step(client, session, t % 4).content) for t in range(12)]  # past the model's window of 8
    assert np.array_equal(frame(client, session, 0), seen[0]), "the prompt itself"
    for t in range(1, 13):
        assert np.array_equal(frame(client, session, t), seen[t]), t
    assert_error(client.get(f"/v1/sessions/{session}/frames/13"), 422, "invalid_request", "frames 0 to 12")
    assert_error(client.get(f"/v1/sessions/{session}/frames/-1"), 422, "invalid_request")

    animation = Image.open(io.BytesIO(client.get(f"/v1/sessions/{session}/animation.gif?frames_per_second=20").content))
    assert (animation.n_frames, animation.size, animation.info["duration"]) == (13, (64, 64), 50)
    last = Image.open(io.BytesIO(client.get(f"/v1/sessions/{session}/animation.gif?last=3").content))
    assert last.n_frames <= 3  # equal frames are one


def test_a_branch_shares_the_past_and_goes_its_own_way(serve: Serve) -> None:
    client = serve()
    session = create(client, seed=5)
    trunk = [step(client, session, action).content for action in (0, 1, 2, 3)]
    branched = client.post(f"/v1/sessions/{session}/branch", json={"t": 2})
    assert branched.status_code == 201
    info = branched.json()
    assert (info["steps"], info["seed"]) == (2, 5)
    assert info["id"] != session
    assert np.array_equal(pixels(client.get(f"/v1/sessions/{info['id']}/frame").content), pixels(trunk[1]))
    again = step(client, info["id"], 2)
    assert again.headers["x-steps"] == "3"
    assert np.array_equal(pixels(again.content), pixels(trunk[2])), "the same action leads to the same frame"
    other = client.post(f"/v1/sessions/{session}/branch", json={"t": 2}).json()["id"]
    assert not nearly(pixels(step(client, other, 0).content), pixels(trunk[2]))
    assert client.get(f"/v1/sessions/{session}").json()["steps"] == 4
    client.delete(f"/v1/sessions/{session}")
    assert np.array_equal(frame(client, other, 1), pixels(trunk[0])), "a branch outlives its trunk"
    assert_error(client.post(f"/v1/sessions/{other}/branch", json={"t": 9}), 422, "invalid_request", "frames 0 to 3")


def test_a_step_that_is_sent_again_is_not_taken_twice(serve: Serve) -> None:
    client = serve()
    session = create(client)
    first = client.post(f"/v1/sessions/{session}/step", json={"action": 1, "step": 1})
    again = client.post(f"/v1/sessions/{session}/step", json={"action": 1, "step": 1})
    assert (again.headers["x-steps"], again.content) == ("1", first.content)
    for action, wrong in ((1, 3), (1, 7), (2, 1)):
        asked = client.post(f"/v1/sessions/{session}/step", json={"action": action, "step": wrong})
        assert_error(asked, 409, "session_moved", "step 2 is next")
    assert client.get(f"/v1/sessions/{session}").json()["steps"] == 1


def test_one_session_may_not_fill_the_queue(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    client = serve(max_waiting=2)
    session, go = create(client), threading.Event()
    together = worlds.step
    monkeypatch.setattr(worlds, "step", lambda *args: (go.wait(10), together(*args))[1])
    with ThreadPoolExecutor(6) as pool:
        answers = [pool.submit(step, client, session, 1) for _ in range(6)]
        while sum(answer.done() for answer in answers) < 4:
            time.sleep(0.01)
        go.set()
    refused = [answer.result() for answer in answers if answer.result().status_code != 200]
    assert len(refused) == 4
    for answer in refused:
        assert_error(answer, 429, "too_many_requests")
        assert int(answer.headers["retry-after"]) > 0
    assert client.get(f"/v1/sessions/{session}").json()["steps"] == 2


def test_a_pass_that_fails_fails_alone(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    client = serve()
    undisturbed = play(client, [1, 2], seed=1)
    session = create(client, seed=1)
    assert step(client, session, 1).content == undisturbed[0]
    with monkeypatch.context() as broken:
        broken.setattr(worlds, "step", lambda *args: 1 / 0)
        assert_error(step(client, session, 2), 500, "model_failed", "send it again")
    after = step(client, session, 2)
    assert after.headers["x-steps"] == "2"
    assert np.array_equal(pixels(after.content), pixels(undisturbed[1]))


def test_a_parked_world_comes_back(serve: Serve) -> None:
    client = serve()
    actions = [t % 4 for t in range(12)]
    undisturbed = play(client, actions, seed=1)
    session = create(client, seed=1)
    engine = engine_of(client)
    held: Session = engine._sessions[session]
    for action, expected in zip(actions, undisturbed, strict=True):
        held.world = None
        assert np.array_equal(pixels(step(client, session, action).content), pixels(expected))


def test_an_idle_world_lets_go_of_those_it_stepped_beside(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serving.engine._ALONE_SECONDS", 0.1)
    client = serve()
    undisturbed = play(client, [1, 2], seed=1)
    sessions = [create(client, seed=1) for _ in range(3)]
    engine = engine_of(client)
    states = [engine._sessions[session].world.state for session in sessions]  # type: ignore[union-attr]
    together = worlds.PlayState.stack(states)
    for row, session in enumerate(sessions):
        engine._sessions[session].world = World(together, row)
    deadline = time.monotonic() + 10
    while any(len(engine._sessions[session].world.state.seeds) > 1 for session in sessions):  # type: ignore[union-attr]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert [step(client, sessions[2], action).content for action in (1, 2)] == undisturbed


def test_a_state_that_most_have_left_is_let_go(serve: Serve) -> None:
    client = serve()
    genie = engine_of(client).model.genie
    prompt = torch.zeros(1, 1, 64, 64, 3, dtype=torch.uint8)
    group = [World(genie.start(prompt, seed=seed)) for seed in range(5)]
    sampling = genie.config.sampling
    worlds.step(genie, group, [0] * 5, sampling)
    shared = group[0].state
    assert all(world.state is shared for world in group)
    worlds.step(genie, group[:2], [1, 1], sampling)
    assert all(world.state is shared for world in group[2:]), "three of five: the larger part"
    del group[2]
    worlds.step(genie, [*group[:2], group[2]], [2, 2, 2], sampling)
    assert [len(world.state.seeds) for world in group] == [3, 3, 3, 1]
    alone = World(genie.start(prompt, seed=4))
    for action in (0, 3):
        (expected_HWC, *_), *_ = worlds.step(genie, [alone], [action], sampling)
    (last_HWC, *_), *_ = worlds.step(genie, [group[3]], [3], sampling)
    assert np.array_equal(last_HWC, expected_HWC)


def test_a_parked_session_that_ended_elsewhere_disturbs_no_other(serve: Serve) -> None:
    client = serve()
    undisturbed = play(client, [1], seed=2)
    parked, other = create(client), create(client, seed=2)
    engine = engine_of(client)
    engine._sessions[parked].world = None
    engine._keeper.store.delete(parked)
    with ThreadPoolExecutor(2) as pool:
        answers = list(pool.map(lambda id: step(client, id, 1), (parked, other)))
    assert_error(answers[0], 409, "session_moved")
    assert answers[1].content == undisturbed[0]
    assert_error(step(client, parked, 1), 404, "unknown_session")


def test_branches_and_reopened_sessions_count(serve: Serve, tmp_path: Path) -> None:
    kept = {"session_store": str(tmp_path / "sessions.db")}
    client = serve(**kept, max_sessions=4)
    sessions = [create(client) for _ in range(3)]
    with ThreadPoolExecutor(6) as pool:
        branch = f"/v1/sessions/{sessions[0]}/branch"
        answers = list(pool.map(lambda _: client.post(branch, json={"t": 0}).status_code, range(6)))
    assert sorted(answers) == [201, *[503] * 5]
    client.__exit__(None, None, None)
    client = serve(**kept, max_sessions=2)
    assert [client.get(f"/v1/sessions/{session}").status_code for session in sessions] == [200, 200, 503]
    models = {id(held.model) for held in engine_of(client)._sessions.values()}
    assert len(models) == 1
    assert client.delete(f"/v1/sessions/{sessions[2]}").status_code == 204, "without a place for it"


def test_ending_the_idle_goes_on_after_a_failure(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    client = serve(idle_seconds=0.2)
    session, failed = create(client), threading.Event()
    store = engine_of(client)._keeper.store
    delete_expired = store.delete_expired

    def fail_once() -> None:
        if not failed.is_set():
            failed.set()
            raise OSError("no space left")
        delete_expired()

    monkeypatch.setattr(store, "delete_expired", fail_once)
    assert failed.wait(10)
    deadline = time.monotonic() + 10
    while store._db.execute("SELECT 1 FROM sessions WHERE id = ?", (session,)).fetchone():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_previews_of_one_session_are_drawn_one_after_another(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    client = serve()
    session = create(client)
    step(client, session, 0)
    keeper, go = engine_of(client)._keeper, threading.Event()
    copies = keeper.copies
    monkeypatch.setattr(keeper, "copies", lambda *args: (go.wait(10), copies(*args))[1])
    with ThreadPoolExecutor(12) as pool:
        asked = [pool.submit(client.get, f"/v1/sessions/{session}/previews?repeats=8") for _ in range(12)]
        eventually(lambda: any(answer.done() for answer in asked))  # too many wait
        go.set()
        answers = [answer.result() for answer in asked]
    assert {answer.status_code for answer in answers} == {200, 429}
    assert all(answer.json()["steps"] == 1 for answer in answers if answer.status_code == 200)


def test_sessions_survive_the_process(serve: Serve, registry: Registry, tmp_path: Path, model_folder: Path) -> None:
    kept = {"session_store": str(tmp_path / "new" / "sessions.db")}
    client = serve(**kept)
    undisturbed = play(client, [0, 1, 2, 3], seed=4)
    session, ended = create(client, seed=4, temperature=0.7), create(client)
    undisturbed = [step(client, session, action).content for action in (0, 1)]
    fork = client.post(f"/v1/sessions/{session}/branch", json={"t": 2}).json()["id"]
    expected = step(client, fork, 2).content
    client.delete(f"/v1/sessions/{ended}")
    client.__exit__(None, None, None)

    registry.set_alias("2", model_folder)  # another version is served by now: a session keeps its own
    client = serve(**kept)
    info = client.get(f"/v1/sessions/{session}").json()
    assert (info["steps"], info["seed"], info["temperature"], info["model"]["version"]) == (2, 4, 0.7, "1")
    assert np.array_equal(pixels(client.get(f"/v1/sessions/{session}/frame").content), pixels(undisturbed[1]))
    assert np.array_equal(pixels(step(client, session, 2).content), pixels(expected))
    assert_error(step(client, ended, 0), 404, "unknown_session")


def test_another_machine_fetches_a_session_s_model_from_the_registry(
    serve: Serve, registry: Registry, tmp_path: Path, model_folder: Path
) -> None:
    kept = {"session_store": str(tmp_path / "sessions.db")}
    here, there = tmp_path / "here", tmp_path / "there"
    shutil.copytree(model_folder, here)
    registry.set_alias("1", here)
    client = serve(**kept)
    session = create(client)
    client.__exit__(None, None, None)
    here.rename(there)
    registry.set_alias("2", model_folder)
    client = serve(**kept)
    assert_error(step(client, session, 0), 503, "not_ready", "not to be had")
    registry.set_alias("1", there)
    assert step(client, session, 0).headers["x-steps"] == "1"
    assert client.get(f"/v1/sessions/{session}").json()["model"]["version"] == "1"


def test_an_idle_session_ends_in_the_store_too(serve: Serve, tmp_path: Path) -> None:
    kept = {"session_store": str(tmp_path / "sessions.db")}
    client = serve(**kept, idle_seconds=0.2)
    session = create(client)
    client.__exit__(None, None, None)
    client = serve(**kept)
    deadline = time.monotonic() + 10
    while engine_of(client)._keeper.store.record(session):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert_error(step(client, session, 0), 404, "unknown_session")


@pytest.mark.parametrize("kind", ["sqlite", "redis"])
def test_a_kill_at_any_moment_loses_no_step_and_repeats_none(
    kind: str, model_folder: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """A player who sends a step again after a lost answer plays on as if nothing had been."""
    store = request.getfixturevalue("redis_server").url if kind == "redis" else str(tmp_path / "sessions.db")
    moments = np.random.default_rng(0).uniform(0, 0.25, 20 if kind == "sqlite" else 3)
    actions = [int(a) for a in np.random.default_rng(1).integers(4, size=12 * (len(moments) + 1))]
    with Served(model_folder, ":memory:") as served:
        calm = served.play(served.create(), actions)
    served = Served(model_folder, store)
    with served:
        session = served.create()
    frames: list[bytes] = []
    for moment in moments:
        with served:
            killer = threading.Timer(moment, served.kill)
            killer.start()
            frames += served.play(session, actions, begin=len(frames))
            killer.join()
    with served:
        assert httpx.get(f"{served.url}/v1/sessions/{session}").json()["steps"] in (len(frames), len(frames) + 1)
        frames += served.play(session, actions, begin=len(frames))
    assert len(frames) == len(calm)
    assert all(nearly(pixels(a), pixels(b)) for a, b in zip(frames, calm, strict=True))


class Served:
    """The service as a process of its own, started anew by every `with`."""

    def __init__(self, model_folder: Path, store: str) -> None:
        self._command = [sys.executable, "-m", "serving", "--port", "0", "--model-uri", str(model_folder)]
        self._command += ["--session-store", store]

    def __enter__(self) -> Served:
        self._process = subprocess.Popen(self._command, stdout=subprocess.PIPE, text=True)
        said = ""
        while "http://" not in said:
            assert self._process.stdout
            said = self._process.stdout.readline()
            assert said, "the service ended"
        self.url = "http://" + said.split("http://")[1].split()[0]
        return self

    def __exit__(self, *error: object) -> None:
        self._process.send_signal(signal.SIGKILL)
        self._process.communicate(timeout=20)

    def kill(self) -> None:
        self._process.send_signal(signal.SIGKILL)

    def create(self) -> str:
        answer = httpx.post(f"{self.url}/v1/sessions", data={"start_frame": "00", "seed": "3"}, timeout=30)
        return str(answer.raise_for_status().json()["id"])

    def play(self, session: str, actions: list[int], begin: int = 0) -> list[bytes]:
        """The frames of actions[begin:], as many as are answered."""
        frames: list[bytes] = []
        for t in range(begin, len(actions)):
            try:
                body = {"action": actions[t], "step": t + 1}
                answer = httpx.post(f"{self.url}/v1/sessions/{session}/step", json=body, timeout=30)
            except httpx.TransportError:
                return frames
            frames.append(answer.raise_for_status().content)
        return frames
