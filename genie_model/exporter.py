"""What Prometheus reads of a training while it runs, from each of its processes."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, start_http_server

PORT_VARIABLE = "GENIE_METRICS_PORT"
# Of the steps since the last reading; MLflow has them under the same names.
READINGS = {
    "step_seconds": "Mean seconds of a step, checkpoints aside",
    "frames_per_second": "Frames trained on, by all processes, checkpoints included",
    "data_wait_share": "Share of the steps' time in which there was no batch to work on",
    "mfu": "FLOPs that the steps ask for, over what the devices could do in their time",
    "compiles": "Graphs that were compiled so far",
    "peak_memory_mb": "Most MiB held so far, of the accelerator or else of the process",
}


class Exporter:
    """`genie_training_*`, labelled by stage, at /metrics of a port from `open` to `close`.

    The port is GENIE_METRICS_PORT (not set: none; 0: any free one) plus LOCAL_RANK, which torchrun sets: each process
    of a machine has waits and stalls of its own. Raises ValueError where it is no port.
    """

    def __init__(self, stage: str, checkpoint_age: Callable[[], float]) -> None:
        self.stage, self.port = stage, _port()
        self.address = ""  # while it is open
        self.registry = CollectorRegistry()
        self._readings = {name: self._gauge(name, text) for name, text in READINGS.items()}
        self._step = self._gauge("step", "Steps done at the last reading")
        self.stalled = self._gauge("stalled", "1 while a step takes far longer than others").labels(stage)
        stalls = Counter("genie_training_stalls", "Steps that stalled", ["stage"], registry=self.registry)
        self.stalls = stalls.labels(stage)
        age = self._gauge(
            "checkpoint_age_seconds", "Since the newest whole checkpoint, or the start: what a kill costs"
        )
        age.labels(stage).set_function(checkpoint_age)

    def _gauge(self, name: str, text: str) -> Gauge:
        return Gauge(f"genie_training_{name}", text, ["stage"], registry=self.registry)

    def read(self, readings: Mapping[str, float], step: int) -> None:
        """Shows those of the `readings` that have a gauge."""
        for name in readings.keys() & self._readings.keys():
            self._readings[name].labels(self.stage).set(readings[name])
        self._step.labels(self.stage).set(step)

    def open(self) -> None:
        """A port that cannot be had leaves a line on stderr: no training is given up for its curves."""
        if self.port is None:
            return
        try:
            self._server, _ = start_http_server(self.port, registry=self.registry)
        except (OSError, OverflowError) as error:  # the latter: with LOCAL_RANK it lies above all ports
            print(f"[{self.stage}] no metrics on port {self.port}: {error}", file=sys.stderr, flush=True)
            return
        self.address = f"http://127.0.0.1:{self._server.server_port}/metrics"
        print(f"[{self.stage}] metrics at {self.address}", file=sys.stderr, flush=True)

    def close(self) -> None:
        if self.address:
            self._server.shutdown()
            self._server.server_close()
            self.address = ""


def _port() -> int | None:
    text = os.environ.get(PORT_VARIABLE, "")
    if not text:
        return None
    if not (text.isascii() and text.isdecimal()) or int(text) > 65535:
        raise ValueError(f"{PORT_VARIABLE}={text} is no port: a number up to 65535, 0 for any that is free")
    return int(text) + int(os.environ.get("LOCAL_RANK", "0")) if int(text) else 0
