"""Pushing to a registry, and pinning there what overlays then run."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import shutil
import tarfile
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType

import pytest
import yaml
from containers import ROOT, Podman

IMAGES = ROOT / "manifests" / "images"


class Registry(ThreadingHTTPServer):
    """A registry that takes what is pushed, over HTTP as the OCI's distribution spec has it, and keeps it in memory."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.blobs = dict[str, bytes]()
        self.manifests = dict[str, bytes]()
        self.address = f"127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Registry

    def _answer(self, status: int, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def do_GET(self) -> None:
        self._answer(200 if self.path == "/v2/" else 404)

    def do_HEAD(self) -> None:
        self._answer(200 if self.path.rpartition("/")[2] in self.server.blobs else 404)

    def do_POST(self) -> None:
        self._answer(202, Location=f"{self.path}upload-{len(self.server.blobs)}", Docker_Upload_UUID="upload")

    def do_PATCH(self) -> None:
        self.server.blobs[self.path] = self._body()
        self._answer(202, Location=self.path, Range=f"0-{len(self.server.blobs[self.path])}")

    def do_PUT(self) -> None:
        body = self._body()
        if "/manifests/" in self.path:
            digest = f"sha256:{hashlib.sha256(body).hexdigest()}"
            self.server.manifests[digest] = body
        else:
            upload, _, digest = self.path.partition("?digest=")
            digest = digest.replace("%3A", ":")
            self.server.blobs[digest] = self.server.blobs.pop(upload, b"") + body
        self._answer(201, Location=self.path, Docker_Content_Digest=digest)

    def log_message(self, *_: object) -> None:
        """Nothing: a test's screen is pytest's."""


@pytest.fixture
def registry() -> Iterator[Registry]:
    with Registry() as registry:
        thread = threading.Thread(target=registry.serve_forever, args=(0.01,))
        thread.start()
        yield registry
        registry.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def images() -> ModuleType:
    """What `make images` runs."""
    spec = importlib.util.spec_from_file_location("build", IMAGES / "build.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_what_is_pushed_is_pinned_by_the_registry_s_digest(
    registry: Registry, images: ModuleType, podman: Podman, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "hello").write_text("hello")
    with tarfile.open(tmp_path / "image.tar", "w") as tar:
        tar.add(tmp_path / "hello", "hello")
    (tmp_path / "registries.conf").write_text(f'[[registry]]\nlocation = "{registry.address}"\ninsecure = true\n')
    for name, value in podman.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("CONTAINERS_REGISTRIES_CONF", str(tmp_path / "registries.conf"))
    name = f"{registry.address}/example/genie-serve"
    podman("import", str(tmp_path / "image.tar"), f"{name}:1")
    try:
        digest = images.push("podman", f"{name}:1")
    finally:
        podman("rmi", f"{name}:1")
    assert list(registry.manifests) == [digest]

    pins = Path(shutil.copy(IMAGES / "kustomization.yaml", tmp_path))
    images.pin("genie-serve", name, digest, pins)
    before, after = ((folder / "kustomization.yaml").read_text() for folder in (IMAGES, tmp_path))
    changed = {image["name"]: image for image in yaml.safe_load(after)["images"]}
    assert changed.pop("genie-serve") == {"name": "genie-serve", "newName": name, "digest": digest}
    assert changed == {i["name"]: i for i in yaml.safe_load(before)["images"] if i["name"] != "genie-serve"}
    comments = [[line for line in text.splitlines() if line.startswith("#")] for text in (before, after)]
    assert comments[0] == comments[1] == after.splitlines()[: len(comments[0])]
    assert sorted(path.name for path in tmp_path.glob("kustomization*")) == ["kustomization.yaml"]


@pytest.mark.parametrize("registry_name", ["docker.io/example", "ghcr.io/example"])
def test_docker_says_the_digest_of_what_it_pushed(
    registry_name: str, images: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A docker of two lines, which shortens its own hub's names as the real one does."""
    name, digest = f"{registry_name}/genie-serve", f"sha256:{'1' * 64}"
    known = [f"localhost/other@sha256:{'2' * 64}", f"{name.removeprefix('docker.io/')}@{digest}"]
    docker = tmp_path / "docker"
    docker.write_text(f"#!/bin/sh\n[ $1 = push ] || echo '{json.dumps(known)}'\n")
    docker.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    assert images.push("docker", f"{name}:1") == digest
    with pytest.raises(ValueError, match="docker knows no digest of ghcr"):
        images.push("docker", "ghcr.io/else/genie-serve:1")


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--images", "server"], "there is no image server: collect, train, train-tpu, serve, mlflow"),
        (["--push"], "say where to push: REGISTRY="),
    ],
)
def test_a_wrong_wish_is_refused_in_one_line(
    arguments: list[str], reason: str, images: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    assert images.main(arguments) == 1
    assert reason in capsys.readouterr().err


def test_a_machine_without_an_engine_says_what_to_install(
    images: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match="no podman, buildah or docker works here: install one"):
        images.working_engine()
