"""OpenTelemetry, where an operator asks for it: a span for every request, and one for every pass of the model."""

from __future__ import annotations

from fastapi import FastAPI
from opentelemetry import trace

tracer = trace.get_tracer("genie")  # its spans go nowhere until `send`


def send(app: FastAPI) -> None:
    """To the collector that OTEL_EXPORTER_OTLP_ENDPOINT names. Raises ValueError without the extra `otel`."""
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.instrumentation.fastapi import FastAPIInstrumentor
        from opentelemetry.sdk.resources import SERVICE_NAME, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError:
        raise ValueError("traces need what the extra `otel` brings: pip install genie-platform[otel]") from None
    provider = TracerProvider(resource=Resource.create({SERVICE_NAME: "genie-serving"}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    trace.set_tracer_provider(provider)
    # One span a request: those of every message received and sent would be two a frame on a WebSocket
    FastAPIInstrumentor.instrument_app(
        app, tracer_provider=provider, excluded_urls="healthz,readyz,metrics", exclude_spans=["receive", "send"]
    )
