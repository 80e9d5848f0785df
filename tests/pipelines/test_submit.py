"""`submit` to a host that is no Kubeflow: one line that says what to do."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest


@contextmanager
def host(status: int, body: str, content_type: str = "text/html") -> Iterator[str]:
    """A web server that gives every request the same answer."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            self.send_response(status)
            self.send_header("Content-Type", content_type)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body.encode())

        do_POST = do_GET

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


SUBMIT = ("submit", "coinrun", "--preset", "tiny", "--root", "gs://b/genie", "--host")


@pytest.mark.parametrize(
    ("status", "body", "content_type"),
    [
        (404, "not found", "text/html"),
        (502, "bad gateway", "text/html"),
        (200, "<html>Welcome to nginx</html>", "text/html"),
        (200, '{"name": "MLflow"}', "application/json"),
        (200, "null", "application/json"),
        (200, "[]", "application/json"),
    ],
)
def test_a_host_that_is_no_kubeflow_is_told_in_one_line(
    status: int, body: str, content_type: str, command: Callable[..., Any]
) -> None:
    with host(status, body, content_type) as url:
        done = command(*SUBMIT, url)
    assert done.returncode == 1
    assert done.stderr.startswith(f"pipelines: {url} ")
    assert done.stderr.count("\n") == 1
    assert "Traceback" not in done.stdout
    assert "details/None" not in done.stdout
    if body.startswith("<") or status != 200:
        assert "check --host, e.g. http://localhost:8080 after `kubectl port-forward" in done.stderr


def test_a_host_without_a_scheme_is_told_so(command: Callable[..., Any]) -> None:
    done = command(*SUBMIT, "localhost:8080")
    assert done.returncode == 1
    assert done.stderr == "pipelines: --host localhost:8080 is no URL: it begins with http:// or https://\n"


def test_the_run_that_the_host_started_is_named(command: Callable[..., Any]) -> None:
    experiment = '{"experiment_id": "e1", "display_name": "genie"}'
    with host(
        200, f'{{"multi_user": false, "experiments": [{experiment}], "run_id": "r1"}}', "application/json"
    ) as url:
        done = command(*SUBMIT, url)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[-1] == f"[genie] run r1: {url}/#/runs/details/r1"
