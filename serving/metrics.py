"""What Prometheus reads at /metrics. Every app has a registry of its own."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS = (0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1, 2.5, 5, 10)


class Metrics:
    """The names that dashboards and alerts go by."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.phase_seconds = Histogram(
            "genie_step_seconds",
            "Seconds of a step by phase: queue (waits for its pass), model (the pass), total (both)",
            ["phase"], buckets=_SECONDS, registry=self.registry,
        )  # fmt: skip
        self.batch_size = Histogram(
            "genie_batch_size", "Sessions in a pass of the model", buckets=(1, 2, 4, 8, 16, 32), registry=self.registry
        )
        self.frames = Counter("genie_frames", "Frames dreamt for players", registry=self.registry)
        self.sessions = Gauge("genie_sessions", "Open sessions", registry=self.registry)
        self.queue = Gauge("genie_queue", "Steps that wait for a pass", registry=self.registry)
        self.serving = Gauge(
            "genie_model_info", "1 for the version that new sessions play", ["name", "version"], registry=self.registry
        )
        self.refused = Gauge(
            "genie_model_refused", "1 while the alias's version is not the one served; /readyz says why",
            registry=self.registry,
        )  # fmt: skip
        self.reloads = Counter("genie_model_reloads", "Tries to load a version", ["result"], registry=self.registry)
        for result in ("loaded", "refused"):
            self.reloads.labels(result)
        self.answers = Counter(
            "genie_http_answers", "Answers by route and status", ["method", "route", "status"], registry=self.registry
        )

    def text(self) -> bytes:
        """In the exposition format that Prometheus scrapes."""
        return generate_latest(self.registry)
