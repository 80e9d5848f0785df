"""Recurring runs, against a real HTTP server that keeps them as Kubeflow's API does."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest

from pipelines.kubeflow import kubeflow_cron

Command = Callable[..., Any]  # conftest's


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


def schedule(command: Command, kubeflow: Kubeflow, cron: str, *more: str) -> Any:
    asked = ["schedule", "champion", "--preset", "tiny", "--root", "gs://b/genie", "--host", kubeflow.url]
    return command(*asked, "--cron", cron, *more)


def test_a_schedule_replaces_the_one_of_its_name_and_can_be_dropped(kubeflow: Kubeflow, command: Command) -> None:
    done = schedule(command, kubeflow, "0 3 * * *")
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

    other = schedule(command, kubeflow, "0 4 * * 1", "--name", "weekly")
    again = schedule(command, kubeflow, "30 2 * * *")
    assert (other.returncode, again.returncode) == (0, 0), other.stderr + again.stderr
    assert "in place of what was scheduled" in again.stdout
    assert kubeflow.names() == ["weekly", "genie-champion"], "found behind the first page too"
    assert [run["trigger"]["cron_schedule"]["cron"] for run in kubeflow.recurring.values()][-1] == "0 30 2 * * *"
    assert list(kubeflow.experiments.values()) == ["genie"]

    dropped = command("unschedule", "champion", "--host", kubeflow.url)
    assert dropped.returncode == 0, dropped.stderr
    assert kubeflow.names() == ["weekly"]
    gone = command("unschedule", "champion", "--host", kubeflow.url)
    assert gone.returncode == 1
    assert "has no recurring run 'genie-champion' in experiment 'genie'" in gone.stderr


def test_a_schedule_that_the_host_refuses_leaves_the_one_before(kubeflow: Kubeflow, command: Command) -> None:
    assert schedule(command, kubeflow, "0 3 * * *").returncode == 0
    kubeflow.refuses = "the cron schedule is invalid"
    refused = schedule(command, kubeflow, "0 5 * * *")
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
    cron: str, problem: str, kubeflow: Kubeflow, command: Command
) -> None:
    with pytest.raises(ValueError, match=problem):
        kubeflow_cron(cron)
    if cron == "nightly":
        done = schedule(command, kubeflow, cron)
        assert done.returncode == 1
        assert problem in done.stderr
        assert "e.g. '0 3 * * *'" in done.stderr
        assert done.stderr.count("\n") == 1
        assert kubeflow.made == 0
