"""Slices of TPUs as Google Kubernetes Engine sells them: the one place that knows chips, hosts and labels of each.

From cloud.google.com/tpu/docs/{v5e,v5p,v6e} and cloud.google.com/kubernetes-engine/docs/concepts/plan-tpus.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

RESOURCE = "google.com/tpu"  # chips that a container asks for
NODE_POOL = "cloud.google.com/gke-nodepool"  # a slice of several hosts is a node pool of its own
_SPOT = "cloud.google.com/gke-spot"


class TPU(NamedTuple):
    """A generation."""

    name: str
    label: str  # GKE's name of it
    topologies: tuple[str, ...]  # chips along each axis; of v5p GKE sells more, larger ones
    one_host: int  # the most chips that one machine holds; of larger slices each holds 4
    memory: float  # bytes of HBM, of each chip
    flops: float  # a second, bfloat16
    sends: float  # bytes a second to other chips: half of the interconnect's figure, which counts both ways

    @property
    def sizes(self) -> list[int]:
        """Chips of each slice, rising."""
        return [_chips(topology) for topology in self.topologies]


_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16", "16x16x16")
TPUS = {
    "tpu-v5e": TPU("v5e", "tpu-v5-lite-podslice", _FLAT, 8, 16e9, 197e12, 200e9),
    "tpu-v5p": TPU("v5p", "tpu-v5p-slice", _CUBES, 4, 95e9, 459e12, 600e9),
    "tpu-v6e": TPU("v6e", "tpu-v6e-slice", _FLAT, 8, 32e9, 918e12, 400e9),
}


class Slice(NamedTuple):
    """What a job of this shape asks of the cluster: a pod on each of its hosts."""

    tpu: TPU
    topology: str

    @property
    def chips(self) -> int:
        return _chips(self.topology)

    @property
    def chips_per_host(self) -> int:
        """Of `google.com/tpu` for each pod."""
        return self.chips if self.chips <= self.tpu.one_host else 4

    @property
    def hosts(self) -> int:
        return self.chips // self.chips_per_host

    def node_selector(self, spot: bool = False) -> dict[str, str]:
        labels = {"cloud.google.com/gke-tpu-accelerator": self.tpu.label}
        labels["cloud.google.com/gke-tpu-topology"] = self.topology
        return labels | ({_SPOT: "true"} if spot else {})

    def tolerations(self, spot: bool = False) -> list[dict[str, Any]]:
        """TPU nodes, and Spot ones, keep away what does not ask for them."""
        taint = {"key": RESOURCE, "operator": "Exists", "effect": "NoSchedule"}
        return [taint, *([taint | {"key": _SPOT, "operator": "Equal", "value": "true"}] if spot else [])]


def slice_of(accelerator: str, topology: str) -> Slice:
    """Raises ValueError that lists what there is."""
    tpu = TPUS.get(accelerator)
    if tpu is None:
        raise ValueError(f"accelerator {accelerator!r} is no TPU: allowed are {', '.join(TPUS)}")
    if topology not in tpu.topologies:
        raise ValueError(f"topology {topology!r} is none of {accelerator}: allowed are {', '.join(tpu.topologies)}")
    return Slice(tpu, topology)


def _chips(topology: str) -> int:
    return math.prod(map(int, topology.split("x")))
