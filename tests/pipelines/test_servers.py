"""The demo's servers: real processes, killed for real."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import psutil
import pytest
from mlflow import MlflowClient
from pydantic_settings import CliApp

from pipelines import servers
from pipelines.local import locked
from pipelines.servers import free_port, mlflow_server, play_command
from serving.settings import Settings

HOLD = "import sys, time; from pathlib import Path; from pipelines.servers import mlflow_server\n"
HOLD += "with mlflow_server(Path(sys.argv[1]), 5600) as url: print(url, flush=True); time.sleep(120)"


def test_a_server_left_by_a_killed_run_is_taken_over_and_stopped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    while not (line := holder.stdout.readline()).startswith("http"):
        assert line, "the server did not start"
    pid = json.loads((tmp_path / "mlflow" / "server.json").read_text())["pid"]
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert psutil.pid_exists(pid)
    with mlflow_server(tmp_path, 5600) as url:
        assert url == line.strip()
        assert "MLflow still runs" in capsys.readouterr().out
    assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def test_a_port_that_another_run_is_quicker_to_take_is_not_taken_for_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Healthy(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()

    with ThreadingHTTPServer(("127.0.0.1", 0), Healthy) as other:
        threading.Thread(target=other.serve_forever, daemon=True).start()
        ports = iter([other.server_port, free_port(5700, "MLflow")])  # it was free a moment ago
        monkeypatch.setattr(servers, "free_port", lambda wanted, what: next(ports))
        with mlflow_server(tmp_path, 5700) as url:
            assert url != f"http://127.0.0.1:{other.server_port}"
            assert MlflowClient(url).search_experiments()
        other.shutdown()


def test_a_port_in_use_is_passed_over(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        taken = other.getsockname()[1]
        assert free_port(taken, "MLflow") > taken
    assert f"port {taken} is in use by another program" in capsys.readouterr().out


def test_the_last_port_has_no_next_one() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 65_535))
        with pytest.raises(ValueError, match="ports 65535 to 65535 are all in use"):
            free_port(65_535, "MLflow")


def test_two_runs_do_not_share_a_folder(tmp_path: Path) -> None:
    with locked(tmp_path), pytest.raises(ValueError, match="another run works in"), locked(tmp_path):
        pass
    with locked(tmp_path):
        pass


def test_the_play_service_understands_how_the_demo_starts_it() -> None:
    module, *arguments = play_command(8123, "http://127.0.0.1:5000")[1:]
    settings = CliApp.run(Settings, cli_args=arguments)
    assert module == "serving"
    assert (settings.port, settings.tracking_uri, settings.wait) == (8123, "http://127.0.0.1:5000", True)
