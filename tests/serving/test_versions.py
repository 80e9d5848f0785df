"""Which version is played: the alias's, or the one that is asked for."""

from __future__ import annotations

import gc
import shutil
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from fastapi.testclient import TestClient
from play_help import Registry, assert_error, create, engine_of, eventually, play, step

from serving.model import FolderSource, LoadedModel, load

Serve = Callable[..., TestClient]


def played(client: TestClient, session: str) -> str:
    return str(client.get(f"/v1/sessions/{session}").json()["model"]["version"])


def test_ready_only_once_a_model_is_loaded(serve: Serve, registry: Registry, model_folder: Path) -> None:
    registry.aliases.clear()
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
    ready = client.get("/readyz").json()
    assert ready["model"]["version"] == "1"
    assert "no model" in ready["problem"]
    assert "genie_model_refused 1.0" in client.get("/metrics").text
    create(client)
    registry.set_alias("1", Path(engine_of(client).model.folder))
    eventually(lambda: client.get("/readyz").json()["problem"] == "")


def test_a_version_that_dreams_nonsense_is_refused(
    serve: Serve, registry: Registry, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its smoke step fails, in the thread where the open sessions go on."""
    client = serve()
    session = create(client)

    def broken(version: object) -> LoadedModel:
        model = load(version)  # type: ignore[arg-type]
        monkeypatch.setattr(model.genie, "step", lambda *args: 1 / 0)
        return model

    monkeypatch.setattr("serving.models.load", broken)
    registry.set_alias("2", model_folder)
    eventually(lambda: "division" in client.get("/readyz").json()["problem"])
    assert step(client, session, 0).status_code == 200
    assert played(client, create(client)) == "1"


# ---- others


def test_a_session_may_ask_for_a_version_by_number_or_alias(
    serve: Serve, registry: Registry, model_folder: Path
) -> None:
    client = serve()
    registry.known["2"] = registry.of("2", model_folder)
    registry.aliases["challenger"] = "2"
    assert played(client, create(client)) == "1"
    assert played(client, create(client, version="2")) == "2"
    assert played(client, create(client, version="challenger")) == "2"
    assert played(client, create(client, version="1")) == "1"
    held = engine_of(client)._sessions.values()
    assert len({id(session.model) for session in held}) == 2, "each is in memory once"
    for wrong in ("3", "nobody"):
        refused = client.post("/v1/sessions", data={"start_frame": "00", "version": wrong})
        assert_error(refused, 404, "unknown_version", "/v1/models")
    assert_error(client.post("/v1/sessions", data={"start_frame": "00", "version": "a/b"}), 422, "invalid_request")
    rolled = client.post("/v1/rollouts", data={"start_frame": "00", "version": "3", "actions": "0"})
    assert_error(rolled, 404, "unknown_version")
    del registry.known["2"]  # the registry is away: what is in memory is played
    assert played(client, create(client, version="2")) == "2"


def test_a_version_that_is_asked_for_and_does_not_load_is_tried_rarely_and_its_folder_is_not_told(
    serve: Serve, registry: Registry, model_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    client = serve(poll_seconds=0.2)
    registry.known["2"] = registry.of("2", tmp_path)
    for _ in range(2):
        refused = client.post("/v1/sessions", data={"start_frame": "00", "version": "2"})
        assert_error(refused, 503, "version_broken", "version 2 does not work")
        assert str(tmp_path) not in refused.text
    assert f"no model at {tmp_path}" in caplog.text
    shutil.copytree(model_folder, tmp_path, dirs_exist_ok=True)
    eventually(lambda: client.post("/v1/sessions", data={"start_frame": "00", "version": "2"}).status_code == 201)


def test_a_broken_champion_is_not_loaded_at_every_look(
    serve: Serve, registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads: list[object] = []
    monkeypatch.setattr("serving.models.load", lambda version: (loads.append(version), load(version))[1])
    client = serve(poll_seconds=0.01)
    loads.clear()
    registry.set_alias("2", tmp_path)
    time.sleep(1)
    assert "no model" in client.get("/readyz").json()["problem"]
    assert 2 <= len(loads) <= 10


def test_versions_that_nobody_plays_leave_memory_and_those_in_play_stay(
    serve: Serve, registry: Registry, model_folder: Path
) -> None:
    client = serve(max_models=2)
    for number in "234":
        registry.known[number] = registry.of(number, model_folder)
    second = create(client, version="2")
    refused = client.post("/v1/sessions", data={"start_frame": "00", "version": "3"})
    assert_error(refused, 503, "too_many_versions", "2 versions")
    assert int(refused.headers["retry-after"]) > 0
    client.delete(f"/v1/sessions/{second}")
    for number in "343":
        session = create(client, version=number)
        assert played(client, session) == number
        client.delete(f"/v1/sessions/{session}")
    gc.collect()
    assert len(engine_of(client).models._in_memory) == 2


def test_players_go_on_while_another_version_loads(
    serve: Serve, registry: Registry, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = serve()
    registry.known["2"] = registry.of("2", model_folder)
    session, loading, go = create(client), threading.Event(), threading.Event()

    def slow(version: object) -> LoadedModel:
        loading.set()
        go.wait(10)
        return load(version)  # type: ignore[arg-type]

    monkeypatch.setattr("serving.models.load", slow)
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(create, client, version="2")
        assert loading.wait(10)
        assert [step(client, session, 1).status_code for _ in range(3)] == [200] * 3
        assert not asked.done()
        go.set()
        assert played(client, asked.result()) == "2"


def test_the_alias_moves_under_load_and_no_step_fails(serve: Serve, registry: Registry, model_folder: Path) -> None:
    client = serve()
    actions = [t % 4 for t in range(40)]
    undisturbed = play(client, actions, seed=9)
    with ThreadPoolExecutor(3) as pool:
        players = [pool.submit(play, client, actions, seed=9) for _ in range(3)]
        for number in range(2, 8):
            registry.set_alias(str(number), model_folder)
            eventually(lambda number=number: client.get("/v1/model").json()["version"] == str(number))
        for player in players:
            assert player.result() == undisturbed


def test_versions_are_listed(serve: Serve, registry: Registry, model_folder: Path) -> None:
    client = serve()
    registry.set_alias("2", model_folder)
    listed = client.get("/v1/models").json()
    assert [one["version"] for one in listed] == ["2", "1"]
    assert listed[0] == {"version": "2", "run_id": "run-of-2", "aliases": ["champion"], "metrics": {"psnr": 20.0}}
    registry.known.clear()
    eventually(lambda: client.get("/v1/models").status_code == 503)
    assert_error(client.get("/v1/models"), 503, "not_ready", "does not answer")


def test_a_folder_s_version_is_what_it_holds(model_folder: Path, tmp_path: Path) -> None:
    other = tmp_path / model_folder.name
    other.mkdir()
    for name in ("config.json", "model.safetensors"):
        (other / name).write_bytes((model_folder / name).read_bytes())
    version = FolderSource(str(model_folder)).champion().version
    assert FolderSource(f"{other}/").champion().version == version
    weights = np.fromfile(other / "model.safetensors", np.uint8)
    weights[-1] ^= 1
    weights.tofile(other / "model.safetensors")
    assert FolderSource(str(other)).champion().version != version
    with pytest.raises(ValueError, match="no model at"):
        FolderSource(str(tmp_path)).champion()
