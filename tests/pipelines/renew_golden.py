"""Writes what every pipeline compiles to into golden/: `python tests/pipelines/renew_golden.py`, then read the diff."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import yaml
from kfp import compiler

from pipelines.catalog import PIPELINES, pipeline_named
from pipelines.placement import Cluster

GOLDEN = Path(__file__).with_name("golden")
_IMAGES = str(GOLDEN / "images.yaml")
_CLOUD = {"images": _IMAGES, "root_uri": "gs://bucket/genie", "mlflow_secret": "mlflow-login", "spot": True}
CASES = {name: (name, Cluster(images=_IMAGES)) for name in PIPELINES} | {
    "coinrun_tpu": ("coinrun", Cluster(**_CLOUD, accelerator="tpu-v6e", topology="2x2", labels={"team": "worlds"})),
    "coinrun_tpu_hosts": ("coinrun", Cluster(**_CLOUD, accelerator="tpu-v5e", topology="4x4")),
    "coinrun_gpu": ("coinrun", Cluster(images=_IMAGES, accelerator="nvidia-l4")),
}


def compiled(case: str) -> list[dict[str, Any]]:
    """The pipeline and what Kubernetes is told of it; without the version of kfp that wrote them."""
    name, cluster = CASES[case]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "pipeline.yaml")
        compiler.Compiler().compile(pipeline_named(name, cluster), str(path))
        documents: list[dict[str, Any]] = list(yaml.safe_load_all(path.read_text()))
    documents[0].pop("sdkVersion")
    return documents


if __name__ == "__main__":
    for case in CASES:
        (GOLDEN / f"{case}.yaml").write_text(yaml.safe_dump_all(compiled(case), width=120))
