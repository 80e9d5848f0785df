"""MLflow's database saved and restored by the very scripts that the cluster's jobs run, on a real PostgreSQL."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from mlflow import MlflowClient

SCRIPTS = Path(__file__).parents[2] / "manifests" / "components" / "backup"
_FOUND = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
_BIN = shutil.which("initdb") or (str(_FOUND[-1]) if _FOUND else "")

pytestmark = [
    pytest.mark.skipif(not _BIN, reason="no PostgreSQL server here (Debian: apt install postgresql)"),
    pytest.mark.skipif(os.getuid() == 0 and not shutil.which("runuser"), reason="PostgreSQL does not run as root"),
]


class Postgres:
    """A server of its own, on a free port of this machine, with an empty database `mlflow`."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.bin = folder, Path(_BIN).resolve().parent
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.env = {
            **os.environ,
            "PATH": f"{self.bin}:{os.environ['PATH']}",
            "PGHOST": "127.0.0.1",
            "PGPORT": str(self.port),
            "PGUSER": "genie",
            "PGPASSWORD": "unused",
            "PGDATABASE": "mlflow",
        }
        self.uri = f"postgresql+psycopg://genie:unused@127.0.0.1:{self.port}/mlflow"
        self._as = []
        if os.getuid() == 0:
            self._as = ["runuser", "-u", "postgres", "--"]
            shutil.chown(folder, "postgres")

    def start(self) -> None:
        data = self.folder / "data"
        self._run("initdb", "--pgdata", data, "--username", "genie", "--auth", "trust", "--no-sync", "-E", "UTF8")
        options = f"-p {self.port} -c listen_addresses=127.0.0.1 -c unix_socket_directories={self.folder} -c fsync=off"
        self._run("pg_ctl", "--pgdata", data, "--wait", "--log", self.folder / "log", "--options", options, "start")
        self._run("createdb", "mlflow")

    def stop(self) -> None:
        self._run("pg_ctl", "--pgdata", self.folder / "data", "--mode", "immediate", "stop")

    def _run(self, name: str, *arguments: object) -> None:
        command = [*self._as, str(self.bin / name), *map(str, arguments)]
        subprocess.run(command, env=self.env, check=True, cwd=self.folder, stdout=subprocess.DEVNULL)


@pytest.fixture(scope="module")
def postgres() -> Iterator[Postgres]:
    with tempfile.TemporaryDirectory() as folder:  # pytest's own folders are closed to other users
        server = Postgres(Path(folder))
        server.start()
        yield server
        server.stop()


def script(postgres: Postgres, name: str, *arguments: object, **variables: str) -> subprocess.CompletedProcess[str]:
    runner = [sys.executable] if name.endswith(".py") else ["/bin/sh"]
    command = [*runner, str(SCRIPTS / name), *map(str, arguments)]
    return subprocess.run(command, env=postgres.env | variables, text=True, capture_output=True, timeout=120)


def champion(client: MlflowClient) -> tuple[str, dict[str, float]]:
    version = client.get_model_version_by_alias("genie", "champion")
    assert version.run_id
    return str(version.version), client.get_run(version.run_id).data.metrics


def test_what_was_saved_comes_back_and_nothing_else(postgres: Postgres, tmp_path: Path) -> None:
    client = MlflowClient(postgres.uri)
    run = client.create_run(client.create_experiment("genie", artifact_location=str(tmp_path / "artifacts")))
    client.log_metric(run.info.run_id, "delta_psnr_t4", 5.8)
    client.create_registered_model("genie")
    version = client.create_model_version("genie", str(tmp_path / "artifacts"), run.info.run_id)
    client.set_registered_model_alias("genie", "champion", version.version)

    bucket = {"BACKUP_URI": f"file://{tmp_path}/bucket", "KEEP": "2"}
    for night in ("mlflow-1.dump", "mlflow-2.dump", "mlflow-3.dump"):
        (taken := tmp_path / night.removesuffix(".dump")).mkdir()
        for done in (script(postgres, "dump.sh", taken, night), script(postgres, "copy.py", "push", taken, **bucket)):
            assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in (tmp_path / "bucket").iterdir()) == ["mlflow-2.dump", "mlflow-3.dump"]

    client.delete_registered_model("genie")
    client.create_experiment("made after the backup")
    (back := tmp_path / "back").mkdir()
    for done in (script(postgres, "copy.py", "fetch", back, **bucket), script(postgres, "restore.sh", back)):
        assert done.returncode == 0, done.stderr
    assert "restored mlflow from mlflow-3.dump" in done.stdout
    assert champion(MlflowClient(postgres.uri)) == ("1", {"delta_psnr_t4": 5.8})
    assert client.get_experiment_by_name("made after the backup") is None


def test_a_restore_that_fails_changes_nothing(postgres: Postgres, tmp_path: Path) -> None:
    client = MlflowClient(postgres.uri)
    client.create_experiment("kept")
    assert script(postgres, "dump.sh", tmp_path, "mlflow-1.dump").returncode == 0
    whole = (tmp_path / "mlflow-1.dump").read_bytes()
    (tmp_path / "mlflow-1.dump").write_bytes(whole[: len(whole) // 2])
    done = script(postgres, "restore.sh", tmp_path)
    assert done.returncode != 0
    assert client.get_experiment_by_name("kept") is not None


def test_what_is_missing_is_said(postgres: Postgres, tmp_path: Path) -> None:
    done = script(postgres, "restore.sh", tmp_path)
    assert (done.returncode, done.stderr) == (2, f"there must be exactly one *.dump in {tmp_path}\n")
    done = script(postgres, "copy.py", "fetch", tmp_path, "mlflow-9.dump", BACKUP_URI=f"file://{tmp_path}/bucket")
    assert done.returncode == 1
    assert "there is no backup mlflow-9.dump" in done.stderr
    done = script(postgres, "copy.py", "push", tmp_path, BACKUP_URI="")
    assert "BACKUP_URI is not set: name a folder in a bucket" in done.stderr
    done = script(postgres, "dump.sh", tmp_path, PGPASSWORD="", PGPORT="1")
    assert done.returncode != 0
    assert list(tmp_path.glob("*.dump")) == []
