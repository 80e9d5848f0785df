"""Real containers for tests, made and run by podman; what a machine lacks for that is said once, as a skip's reason."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

ROOT = Path(__file__).parents[2]
BASE = "localhost/genie-test-base:1"
# As Kubernetes runs them: Pod Security "restricted", with a read-only root.
HARDENED = ["--read-only", "--read-only-tmpfs=false", "--cap-drop=all", "--security-opt=no-new-privileges"]
# Containers here may not raise their own limits above ours, and runc works with any cgroup.
_CONFIG = """
[containers]
default_ulimits = ["nofile=20000:20000", "nproc=4096:4096"]
[engine]
runtime = "runc"
cgroup_manager = "cgroupfs"
events_logger = "file"
"""


def need_podman(folder: Path) -> dict[str, str]:
    """The environment that podman runs in. Skips the test where there is none that works."""
    missing = [tool for tool in ("podman", "runc", "mmdebstrap") if not shutil.which(tool)]
    if missing or os.geteuid():
        pytest.skip(f"images are built by root with podman, runc and mmdebstrap; missing: {missing or 'root'}")
    config = folder / "containers.conf"
    config.write_text(_CONFIG)
    environment = {**os.environ, "CONTAINERS_CONF": str(config)}
    asked = subprocess.run(["podman", "info"], env=environment, capture_output=True, text=True)
    if asked.returncode:
        pytest.skip(f"podman does not work here: {asked.stderr.strip()[-200:]}")
    return environment


class Podman:
    """podman with one configuration."""

    def __init__(self, folder: Path) -> None:
        self.environment = need_podman(folder)
        self._folder = folder

    def __call__(self, *arguments: str) -> str:
        done = subprocess.run(["podman", *arguments], env=self.environment, capture_output=True, text=True)
        assert not done.returncode, f"podman {' '.join(arguments)[:200]}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
        return done.stdout

    def has(self, image: str) -> bool:
        return not subprocess.run(["podman", "image", "exists", image], env=self.environment).returncode

    def make_base(self) -> None:
        """Debian with a Python, from apt's own sources; it is kept among podman's images for the next session."""
        if self.has(BASE):
            return
        tar, packages = self._folder / "base.tar", "python3.11,python3.11-venv,ca-certificates"
        sources = [str(path) for path in (Path("/etc/apt/sources.list"), *Path("/etc/apt/sources.list.d").glob("*"))]
        sources = [path for path in sources if path.endswith((".list", ".sources")) and Path(path).is_file()]
        command = ["mmdebstrap", "--variant=minbase", f"--include={packages}", "bookworm", str(tar), *sources]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"no base image: {done.stderr.strip()[-200:]}")
        self("import", str(tar), BASE)
        tar.unlink()

    def build(self, *targets: str) -> None:
        """localhost/genie-<target>:<version>, by what `make images` runs, and with the packages that pip finds here."""
        self.make_base()
        settings, folders = _pip()
        config = self._folder / "pip.conf"
        config.write_text(settings)
        command = [sys.executable, "manifests/images/build.py", "--images", *targets]
        command += ["--arg", f"BASE={BASE}", "--arg", "TORCH_INDEX=", "--option=--network=host"]
        command += [f"--option=--volume={folder}:{folder}:ro" for folder in folders]
        environment = {**self.environment, "PIP_CONFIG_FILE": str(config)}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        assert not done.returncode, done.stdout[-4000:] + done.stderr[-4000:]
        for line in done.stdout.splitlines():
            if line.startswith("[images] "):
                name = line.removeprefix("[images] ")
                self("tag", name, f"{name.rpartition(':')[0]}:test")
                self("untag", name, name)  # or every commit leaves one

    @contextmanager
    def running(self, *arguments: str) -> Iterator[str]:
        """A container in the background, by name; what it printed is shown when the test fails."""
        name = f"genie-test-{uuid.uuid4().hex[:8]}"
        self("run", "--detach", "--name", name, *arguments)
        try:
            yield name
        finally:
            print(subprocess.run(["podman", "logs", name], env=self.environment, capture_output=True, text=True).stdout)
            self("rm", "--force", "--volumes", "--time", "1", name)

    def inspect(self, image: str) -> dict[str, Any]:
        return dict(json.loads(self("image", "inspect", image))[0])


def _pip() -> tuple[str, list[str]]:
    """A pip.conf of all that pip is told on this machine, and what it names of this machine's files and folders."""
    asked = subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True)
    values = dict[str, str]()
    for line in asked.stdout.splitlines():
        key, _, value = line.partition("=")
        if (option := key.rpartition(".")[2]) not in ("constraint", "config-file"):  # the locks say every version
            values[option] = " ".join(str(ast.literal_eval(value)).split())
    paths = re.findall(r"(?:(?<=\s)|(?<=file://)|^)/[^\s]+", "\n".join(values.values()), re.MULTILINE)
    named = {str(parent) for path in paths if (parent := Path(path)).exists()}
    # an index's files lie beside it
    named = {str(Path(path).parent) if path.endswith("/simple") else path for path in named}
    return "[global]\n" + "".join(f"{option} = {value}\n" for option, value in values.items()), sorted(named)


def eventually(answers: Callable[[], bool], seconds: float = 90) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            if answers():
                return
        except httpx.TransportError as error:
            last: object = error
        else:
            last = "it said no"
        time.sleep(0.2)
    raise AssertionError(f"nothing after {seconds:g} s: {last}")
