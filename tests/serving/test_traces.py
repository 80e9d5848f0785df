"""What a collector of OpenTelemetry traces gets."""

from __future__ import annotations

import gzip
import sys
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from fastapi.testclient import TestClient
from opentelemetry import trace
from play_help import create, step

from serving.__main__ import main

Serve = Callable[..., TestClient]


def test_a_collector_gets_a_span_of_every_request_and_every_pass(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http")
    pytest.importorskip("opentelemetry.instrumentation.fastapi")
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

    spans: list[Any] = []

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            body = gzip.decompress(body) if self.headers["Content-Encoding"] == "gzip" else body
            for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
                spans.extend(span for scope in resource.scope_spans for span in scope.spans)
            self.send_response(200)
            self.end_headers()

        def log_message(self, *args: object) -> None:
            """Says nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Collector) as collector:
        threading.Thread(target=collector.serve_forever, daemon=True).start()
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{collector.server_port}")
        client = serve(traces=True)
        session = create(client)
        step(client, session, 0)
        with client.websocket_connect(f"/v1/sessions/{session}/play") as live:
            live.receive_bytes()
        client.get("/healthz")
        trace.get_tracer_provider().shutdown()  # type: ignore[attr-defined]
        collector.shutdown()
    where = "/v1/sessions/{session_id}"
    assert sorted(span.name for span in spans) == sorted(
        ["POST /v1/sessions", f"POST {where}/step", "pass of the model", f"HTTP {where}/play"]
    )
    one_pass = next(span for span in spans if span.name == "pass of the model")
    assert [(said.key, said.value.int_value) for said in one_pass.attributes] == [("worlds", 1)]


def test_traces_without_what_they_need_are_refused_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.instrumentation.fastapi", None)  # as where it is not installed
    assert main(["--traces", "--wait", "--port", "0"]) == 1
    said = capsys.readouterr().err
    assert "pip install genie-platform[otel]" in said
    assert said.count("\n") == 1
