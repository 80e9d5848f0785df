"""Recurring runs, against a real HTTP server that keeps them as Kubeflow's API does."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest

from pipelines.kubeflow import kubeflow_cron


class Kubeflow(ThreadingHTTPServer):
    """The calls that scheduling makes, a recurring run a page."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.experiments: dict[str, str] = {}
        self.recurring: dict[str, dict[str, Any]] = {}
        self.made = 0
        self.refuses = ""  # a recurring run, with this

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def names(self) -> list[str]:
        return [run["display_name"] for run in self.recurring.values()]


class _Handler(BaseHTTPRequestHandler):
    server: Kubeflow

    def do_GET(self) -> None:
        parts = urlsplit(self.path)
        query = {name: values[0] for name, values in parse_qs(parts.query).items()}
        if parts.path.endswith("/healthz"):
            self._answer(200, {"multi_user": False})
        elif parts.path.endswith("/experiments"):
            wanted = json.loads(query["filter"])["predicates"][0]["stringValue"]
            found = [{"experiment_id": i, "display_name": n} for i, n in self.server.experiments.items() if n == wanted]
            self._answer(200, {"experiments": found})
        else:
            mine = [run for run in self.server.recurring.values() if run["experiment_id"] == query["experiment_id"]]
            at = int(query.get("page_token") or 0)
            more = {"next_page_token": str(at + 1)} if at + 1 < len(mine) else {}
            self._answer(200, {"recurringRuns": mine[at : at + 1], **more})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.made += 1
        if self.path.endswith("/experiments"):
            self.server.experiments[f"e{self.server.made}"] = body["display_name"]
            self._answer(200, {"experiment_id": f"e{self.server.made}", **body})
        elif self.server.refuses:
            self._answer(400, {"message": self.server.refuses})
        else:
            run = {"recurring_run_id": f"r{self.server.made}", **body}
            self.server.recurring[run["recurring_run_id"]] = run
            self._answer(200, run)

    def do_DELETE(self) -> None:
        del self.server.recurring[self.path.rpartition("/")[2]]
        self._answer(200, {})

    def _answer(self, status: int, body: dict[str, Any]) -> None:
        text = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def kubeflow() -> Iterator[Kubeflow]:
    server = Kubeflow()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def pipelines(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pipelines", *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=60)


def schedule(kubeflow: Kubeflow, cron: str, folder: Path, *more: str) -> subprocess.CompletedProcess[str]:
    asked = ["schedule", "champion", "--preset", "tiny", "--root", "gs://b/genie", "--host", kubeflow.url]
    return pipelines(*asked, "--cron", cron, *more, cwd=folder)


def test_a_schedule_replaces_the_one_of_its_name_and_can_be_dropped(kubeflow: Kubeflow, tmp_path: Path) -> None:
    done = schedule(kubeflow, "0 3 * * *", tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "03:00 UTC: " in done.stdout.splitlines()[-1]
    (run,) = kubeflow.recurring.values()
    assert run["display_name"] == "genie-champion"
    assert run["trigger"]["cron_schedule"]["cron"] == "0 0 3 * * *", "Kubeflow's first field are seconds"
    assert run["no_catchup"] is True
    assert run["mode"] == "ENABLE"
    assert int(run["max_concurrency"]) == 1
    form = run["pipeline_spec"]["pipeline_spec"]["root"]["inputDefinitions"]["parameters"]
    assert (form["root_uri"]["defaultValue"], form["preset"]["defaultValue"]) == ("gs://b/genie", "tiny")
    assert "platforms" in run["pipeline_spec"]["platform_spec"]

    other = schedule(kubeflow, "0 4 * * 1", tmp_path, "--name", "weekly")
    again = schedule(kubeflow, "30 2 * * *", tmp_path)
    assert (other.returncode, again.returncode) == (0, 0), other.stderr + again.stderr
    assert "in place of what was scheduled" in again.stdout
    assert kubeflow.names() == ["weekly", "genie-champion"], "found behind the first page too"
    assert [run["trigger"]["cron_schedule"]["cron"] for run in kubeflow.recurring.values()][-1] == "0 30 2 * * *"
    assert list(kubeflow.experiments.values()) == ["genie"]

    dropped = pipelines("unschedule", "champion", "--host", kubeflow.url, cwd=tmp_path)
    assert dropped.returncode == 0, dropped.stderr
    assert kubeflow.names() == ["weekly"]
    gone = pipelines("unschedule", "champion", "--host", kubeflow.url, cwd=tmp_path)
    assert gone.returncode == 1
    assert "has no recurring run 'genie-champion' in experiment 'genie'" in gone.stderr


def test_a_schedule_that_the_host_refuses_leaves_the_one_before(kubeflow: Kubeflow, tmp_path: Path) -> None:
    assert schedule(kubeflow, "0 3 * * *", tmp_path).returncode == 0
    kubeflow.refuses = "the cron schedule is invalid"
    refused = schedule(kubeflow, "0 5 * * *", tmp_path)
    assert refused.returncode == 1
    assert refused.stderr.startswith(f"pipelines: {kubeflow.url} did not take the schedule: ")
    assert "the cron schedule is invalid" in refused.stderr
    assert refused.stderr.count("\n") == 1
    assert [run["trigger"]["cron_schedule"]["cron"] for run in kubeflow.recurring.values()] == ["0 0 3 * * *"]


@pytest.mark.parametrize(
    ("cron", "problem"),
    [
        ("nightly", "has 1 fields, not five"),
        ("0 0 3 * * *", "has 6 fields, not five"),
        ("61 3 * * *", "is no cron expression"),
        ("0 3 * * moonday", "is no cron expression"),
    ],
)
def test_a_wrong_expression_is_refused_before_anything_is_asked(
    cron: str, problem: str, kubeflow: Kubeflow, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=problem):
        kubeflow_cron(cron)
    if cron == "nightly":
        done = schedule(kubeflow, cron, tmp_path)
        assert done.returncode == 1
        assert problem in done.stderr
        assert "e.g. '0 3 * * *'" in done.stderr
        assert done.stderr.count("\n") == 1
        assert kubeflow.made == 0
