"""The rendered Deployment of serving, run by podman as Kubernetes would run it, and played."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from manifests.objects import Objects

IMAGE = "localhost/genie-serve:test"  # tests/images builds it
CONTAINER = "genie-serving-pod-0-serving"
# runc works with any cgroup, and containers may not raise their own limits above ours.
CONFIG = """
[containers]
default_ulimits = ["nofile=20000:20000", "nproc=4096:4096"]
[engine]
runtime = "runc"
cgroup_manager = "cgroupfs"
events_logger = "file"
"""
PLAY = """
import http.client, json, time
def ask(method, path, body=None, **headers):
    service = http.client.HTTPConnection("127.0.0.1", 8000, timeout=30)
    service.request(method, path, body, headers)
    answer = service.getresponse()
    return answer.status, answer.read()
def ready():
    try:
        return ask("GET", "/readyz")[0] == 200
    except ConnectionRefusedError:
        return False
end = time.monotonic() + 90
while not ready() and time.monotonic() < end:
    time.sleep(0.2)
start = json.loads(ask("GET", "/v1/starts")[1])["start_frames"][0]["name"]
form = {"Content-Type": "application/x-www-form-urlencoded"}
session = json.loads(ask("POST", "/v1/sessions", f"start_frame={start}", **form)[1])["id"]
status, frame = ask("POST", f"/v1/sessions/{session}/step", '{"action": 0}', **{"Content-Type": "application/json"})
print(status, frame[1:4])
"""
CONFINED = """
touch /made 2>/dev/null && echo root is writable
touch /tmp/made /cache/made && echo "$(id -u):$(id -g) $GENIE_THREADS $GENIE_TRACKING_URI"
grep -E 'CapEff|NoNewPrivs|Seccomp:' /proc/1/status
"""


@pytest.fixture
def podman(tmp_path: Path) -> Callable[..., str]:
    """podman(*arguments): what it printed."""
    if os.geteuid() or not shutil.which("podman") or not shutil.which("runc"):
        pytest.skip("pods are played by root with podman and runc: install them")
    (tmp_path / "containers.conf").write_text(CONFIG)
    environment = {**os.environ, "CONTAINERS_CONF": str(tmp_path / "containers.conf")}

    def run(*arguments: str) -> str:
        done = subprocess.run(["podman", *arguments], env=environment, capture_output=True, text=True)
        assert not done.returncode, f"podman {' '.join(arguments)[:100]}: {done.stdout[-2000:]}{done.stderr[-2000:]}"
        return done.stdout

    if subprocess.run(["podman", "image", "exists", IMAGE], env=environment).returncode:
        pytest.skip(f"there is no image {IMAGE}: pytest tests/images makes it")
    return run


def test_the_rendered_deployment_plays(
    rendered: Callable[[str], Objects], podman: Callable[..., str], tiny_model_uri: str, tmp_path: Path
) -> None:
    """All as rendered, but for the image, and a model in a folder in place of the registry's."""
    objects = rendered("dev")
    deployment = objects.get("Deployment", "genie-serving")
    assert deployment
    (config,) = (one for one in objects.of("ConfigMap") if one["metadata"]["name"].startswith("genie-serving"))
    model = shutil.copytree(tiny_model_uri, tmp_path / "model")
    for path in (model, *model.rglob("*")):
        path.chmod(path.stat().st_mode | (0o755 if path.is_dir() else 0o644))
    pod = deployment["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    container |= {"image": IMAGE, "imagePullPolicy": "Never"}
    del container["ports"]  # this pod has no network: it is played from inside
    config["data"]["GENIE_MODEL_URI"] = "/model"
    container["volumeMounts"].append({"name": "model", "mountPath": "/model", "readOnly": True})
    pod["volumes"].append({"name": "model", "hostPath": {"path": str(model)}})
    file = tmp_path / "pod.yaml"
    file.write_text(yaml.safe_dump_all([config, deployment]))

    podman("kube", "play", "--network=none", str(file))
    try:
        assert podman("exec", CONTAINER, "python3", "-c", PLAY) == "200 b'PNG'\n"
        threads = container["resources"]["limits"]["cpu"]
        confined = " ".join(podman("exec", CONTAINER, "sh", "-c", CONFINED).split())
        kernel = "CapEff: 0000000000000000 NoNewPrivs: 1 Seccomp: 2"
        assert confined == f"10001:10001 {threads} http://mlflow:5000 {kernel}"
    finally:
        podman("kube", "down", str(file))
