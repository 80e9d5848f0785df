"""What the manifests start, started here as they say: the same command, the same variables."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from redis import Redis, RedisError

from manifests.objects import Object, Objects


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def started(objects: Objects, kind: str, name: str) -> tuple[Object, list[str], dict[str, str]]:
    """Its container, command and variables, with those of a Secret as <NAME>."""
    found = objects.get(kind, name)
    assert found
    container = found["spec"]["template"]["spec"]["containers"][0]
    return container, list(container["command"]), objects.environment(container)


@contextmanager
def running(command: list[str], log: Path, **options: object) -> Iterator[None]:
    with log.open("wb") as output, subprocess.Popen(command, stdout=output, stderr=output, **options) as process:  # type: ignore[call-overload]
        try:
            yield
        finally:
            process.terminate()


def eventually(check: Callable[[], object], log: Path, seconds: float = 90) -> None:
    end = time.monotonic() + seconds
    while True:
        try:
            if check():
                return
        except (httpx.HTTPError, RedisError):
            pass  # not there yet
        assert time.monotonic() < end, log.read_text()
        time.sleep(0.1)


@pytest.fixture
def postgres() -> Iterator[dict[str, str]]:
    """libpq's variables for a server with an empty database `mlflow`, and a password that no URL would take."""
    pytest.importorskip("psycopg")
    if not (initdb := shutil.which("initdb")):
        pytest.skip("no PostgreSQL here: install postgresql")
    create = [str(Path(initdb).resolve().with_name("createdb")), "mlflow", "--maintenance-db=postgres"]
    user = {"user": "postgres", "group": "postgres"} if os.getuid() == 0 else {}  # it refuses to be root
    password, port = "p@ss/w:rd%", free_port()
    with tempfile.TemporaryDirectory() as name:  # not pytest's, which only its owner may enter
        folder = Path(name)
        (folder / "password").write_text(password)
        for path in (folder, folder / "password"):
            path.chmod(0o755)
            if user:
                shutil.chown(path, **user)
        data, log = str(folder / "data"), folder / "log"
        make = ["initdb", "-D", data, "-U", "mlflow", "--pwfile", str(folder / "password"), "-A", "scram-sha-256", "-N"]
        subprocess.run(make, check=True, capture_output=True, cwd=folder, **user)  # type: ignore[call-overload]
        serve = ["postgres", "-D", data, "-p", str(port), "-k", name, "-h", "127.0.0.1", "-F"]
        variables = {"PGHOST": "127.0.0.1", "PGPORT": str(port), "PGUSER": "mlflow", "PGPASSWORD": password}
        with running(serve, log, cwd=folder, **user):
            eventually(lambda: not subprocess.run(create, env=variables, capture_output=True).returncode, log)
            yield variables


def test_mlflow_keeps_runs_and_answers_to_its_names(
    rendered: Callable[[str], Objects], postgres: dict[str, str], tmp_path: Path
) -> None:
    objects, port = rendered("dev"), free_port()
    _, command, environment = started(objects, "Deployment", "mlflow")
    upgrade = objects.get("Deployment", "mlflow")
    assert upgrade
    (upgrade_command,) = (one["command"] for one in upgrade["spec"]["template"]["spec"]["initContainers"])
    environment = {
        name: value.replace("<NAMESPACE>", "genie-dev") for name, value in environment.items() if name[:2] != "PG"
    }
    assert environment["MLFLOW_ARTIFACTS_DESTINATION"] == "gs://example-genie-dev/mlflow"
    environment |= postgres | {"MLFLOW_ARTIFACTS_DESTINATION": str(tmp_path / "artifacts"), "HOME": str(tmp_path)}
    environment["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    command = [f"--port={port}" if word == "--port=5000" else word for word in command]
    command = [word.replace("0.0.0.0", "127.0.0.1") for word in command]
    subprocess.run(upgrade_command, check=True, env=environment, cwd=tmp_path, capture_output=True)
    log = tmp_path / "log"
    with (
        running(command, log, env=environment, cwd=tmp_path),
        httpx.Client(base_url=f"http://127.0.0.1:{port}") as asks,
    ):
        eventually(lambda: asks.get("/health", headers={"Host": "10.0.0.7:5000"}).status_code == 200, log)
        asked = "/api/2.0/mlflow/experiments/create"
        for i, host in enumerate(("mlflow", "mlflow.genie-dev.svc", "mlflow.genie-dev.svc.cluster.local", "localhost")):
            answer = asks.post(asked, json={"name": f"studies {i}"}, headers={"Host": f"{host}:5000"})
            assert answer.status_code == 200, answer.text
        assert asks.post(asked, json={"name": "x"}, headers={"Host": "elsewhere.example"}).status_code == 403
        found = asks.get(
            "/api/2.0/mlflow/experiments/get-by-name?experiment_name=studies%203", headers={"Host": "mlflow:5000"}
        )
        assert found.json()["experiment"]["artifact_location"].startswith("mlflow-artifacts:/")


def test_redis_keeps_sessions(rendered: Callable[[str], Objects], tmp_path: Path) -> None:
    if not shutil.which("redis-server"):
        pytest.skip("no redis-server here: install redis-server")
    objects = rendered("prod")
    _, command, environment = started(objects, "StatefulSet", "redis")
    (config,) = (one for one in objects.of("ConfigMap") if "redis.conf" in one["data"])
    (tmp_path / "redis.conf").write_text(config["data"]["redis.conf"].replace("/data", str(tmp_path)))
    port = free_port()
    command[-1] = f"{command[-1]} --port {port}".replace("/etc/redis", str(tmp_path))
    log = tmp_path / "log"
    with running(command, log, env={"PATH": os.environ["PATH"], **environment}):
        redis = Redis(port=port, password=environment["REDISCLI_AUTH"])
        eventually(redis.ping, log)
        assert redis.config_get("maxmemory-policy") == {"maxmemory-policy": "noeviction"}
        assert redis.config_get("appendonly") == {"appendonly": "yes"}
        with pytest.raises(RedisError, match="authenticat"):
            Redis(port=port).ping()
