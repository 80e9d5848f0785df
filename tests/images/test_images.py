"""The images as a cluster runs them: hardened, and each doing its real work."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import yaml
from containers import HARDENED, Podman, eventually
from kfp import compiler
from mlflow import MlflowClient
from PIL import Image

from pipelines.catalog import pipeline_named
from pipelines.placement import Cluster
from pipelines.servers import free_port, mlflow_server

USER = 10001


def looks(podman: Podman, image: str, expression: str) -> Any:
    """What a Python expression is in the image."""
    program = f"import json, importlib.util, shutil, os; print(json.dumps({expression}))"
    return json.loads(podman("run", "--rm", *HARDENED, "--network=none", "--entrypoint=python3", image, "-c", program))


@pytest.fixture
def shared(tmp_path: Path) -> Path:
    """A folder that the containers' user can write."""
    shutil.chown(tmp_path, USER, USER)
    return tmp_path


def readable(source: Path, folder: Path) -> Path:
    """A copy of `source` that the containers' user can read, whatever the test runner's umask is."""
    target = shutil.copytree(source, folder / source.name)
    for path in (folder, target, *target.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)
    return target


@pytest.mark.parametrize("target", ["serve", "collect"])
def test_an_image_says_what_it_is_and_holds_no_more_than_it_needs(
    target: str, podman: Podman, request: pytest.FixtureRequest
) -> None:
    image = request.getfixturevalue(f"{target}_image")
    found = podman.inspect(image)
    labels = {name.removeprefix("org.opencontainers.image."): value for name, value in found["Labels"].items()}
    assert found["Config"]["User"] == "10001:10001"
    assert labels["title"] == f"genie-{target}"
    assert labels["version"] == "0.1.0"
    assert {"description", "source", "revision", "licenses"} <= labels.keys()
    assert ("Healthcheck" in found) == (target == "serve")

    programs = ("gcc", "cc", "g++", "pip", "pip3", "curl")
    assert looks(podman, image, f"[p for p in {programs} if shutil.which(p)]") == []
    modules = ("kfp", "procgen", "fastapi", "mlflow", "torch", "pytest", "pip")
    there = looks(podman, image, f"[m for m in {modules} if importlib.util.find_spec(m)]")
    assert set(there) == {"mlflow", "torch", "fastapi"} | ({"kfp", "procgen"} if target == "collect" else set())
    assert not looks(podman, image, "os.path.exists('/etc/pip.conf') or os.path.exists('/root/.cache/pip')")
    assert looks(
        podman, image, "[p for p in ('/', '/opt', '/opt/genie', '/tmp', '/cache') if os.access(p, os.W_OK)]"
    ) == [
        "/tmp",
        "/cache",
    ]


def test_the_serving_image_plays(serve_image: str, podman: Podman, tiny_model_uri: str, tmp_path: Path) -> None:
    model, port = readable(Path(tiny_model_uri), tmp_path), free_port(8000, "serving")
    where = ["--network=host", "--volume", f"{model}:/model:ro", "--env", "GENIE_MODEL_URI=/model"]
    command = ["--host", "127.0.0.1", "--port", str(port), "--log-format", "json", "--wait"]
    with (
        podman.running(*HARDENED, "--tmpfs", "/tmp", *where, serve_image, *command) as name,
        httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30) as client,
    ):
        eventually(lambda: client.get("/readyz").status_code == 200)
        session = client.post("/v1/sessions", data={"start_frame": "00"}).raise_for_status().json()["id"]
        frame = client.post(f"/v1/sessions/{session}/step", json={"action": 1}).raise_for_status()
        assert np.asarray(Image.open(io.BytesIO(frame.content)).convert("RGB")).shape == (64, 64, 3)
        if port == 8000:  # the port that the image is asked for its health on
            podman("healthcheck", "run", name)


def test_the_health_check_fails_where_nobody_serves(serve_image: str, podman: Podman) -> None:
    idle = ["--network=none", "--entrypoint", "sleep", serve_image, "60"]
    with podman.running(*HARDENED, *idle) as name, pytest.raises(AssertionError):
        podman("healthcheck", "run", name)


def test_a_pipeline_step_runs_as_kubeflow_runs_it(collect_image: str, podman: Podman, shared: Path) -> None:
    compiler.Compiler().compile(pipeline_named("coinrun", Cluster()), str(shared / "coinrun.yaml"))
    package = next(yaml.safe_load_all((shared / "coinrun.yaml").read_text()))
    container = package["deploymentSpec"]["executors"]["exec-collect"]["container"]
    server = shared / "server"
    with mlflow_server(server, 5000) as tracking_uri:
        inputs = {
            "preset": "tiny",
            "overrides": ["data.levels_per_shard=2"],
            "root_uri": "/data",
            "tracking_uri": tracking_uri,
            "experiment": "images",
            "study": {},
        }
        names = ("data_uri", "data_digest")
        outputs = {"parameters": {name: {"outputFile": f"/data/kfp/{name}"} for name in names}}
        outputs["outputFile"] = "/data/kfp/output.json"
        executor_input = json.dumps({"inputs": {"parameterValues": inputs}, "outputs": outputs})
        command = [word.replace("{{$}}", executor_input) for word in (*container["command"], *container["args"])]
        where = ["--network=host", "--tmpfs", "/tmp", "--volume", f"{shared}:/data"]
        podman("run", "--rm", *HARDENED, *where, collect_image, *command)

        made = json.loads((shared / "kfp" / "output.json").read_text())["parameterValues"]
        client = MlflowClient(tracking_uri)
        experiment = client.get_experiment_by_name("images")
        assert experiment
        runs = client.search_runs([experiment.experiment_id], "tags.`genie.step` = 'collect'")
    assert made["data_uri"].startswith("/data/datasets/coinrun-")
    assert (shared / made["data_uri"].removeprefix("/data/") / "train").is_dir()
    assert len(made["data_digest"]) >= 32
    assert [run.info.status for run in runs] == ["FINISHED"]
    assert runs[0].data.tags["version.procgen-mirror"] == "0.10.7"
