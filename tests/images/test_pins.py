"""What the images are built from and which of them run: requirements and digests."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
IMAGES = ROOT / "manifests" / "images"


def names(target: str) -> set[str]:
    lines = (IMAGES / f"requirements-{target}.txt").read_text().splitlines()
    return {line.partition("==")[0] for line in lines if not line.startswith("#")}


def test_the_locks_are_what_pyproject_and_constraints_say() -> None:
    done = subprocess.run([sys.executable, IMAGES / "lock.py", "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_lock_says_every_version() -> None:
    for path in IMAGES.glob("requirements-*.txt"):
        lines = path.read_text().splitlines()[1:]
        assert lines
        assert [line for line in lines if not re.fullmatch(r"[a-z0-9-]+==[^=\s]+", line)] == []


@pytest.mark.parametrize(
    ("target", "has", "lacks"),
    [
        ("collect", {"kfp", "procgen-mirror", "torch", "mlflow-skinny"}, {"uvloop", "torch-xla", "mlflow"}),
        ("train", {"kfp", "torch", "mlflow-skinny"}, {"procgen-mirror", "uvloop", "torch-xla"}),
        ("train-tpu", {"kfp", "torch-xla", "libtpu", "mlflow-skinny"}, {"procgen-mirror", "uvloop"}),
        ("serve", {"fastapi", "torch", "mlflow-skinny"}, {"kfp", "procgen-mirror", "kubernetes", "mlflow"}),
        ("mlflow", {"mlflow", "psycopg-binary", "boto3", "google-cloud-storage"}, {"kfp", "procgen-mirror", "torch"}),
    ],
)
def test_an_image_gets_what_it_needs(target: str, has: set[str], lacks: set[str]) -> None:
    assert has <= names(target)
    assert lacks & names(target) == set()
    assert {"pytest", "ruff", "mypy", "fakeredis"} & names(target) == set()


def test_every_image_has_a_digest() -> None:
    component = yaml.safe_load((IMAGES / "kustomization.yaml").read_text())
    ours = {f"genie-{target}" for target in ("collect", "train", "train-tpu", "serve", "mlflow")}
    assert {image["name"] for image in component["images"]} == ours | {"postgres", "redis"}
    for image in component["images"]:
        assert set(image) == {"name", "newName", "digest"}
        assert re.fullmatch(r"sha256:[0-9a-f]{64}", image["digest"]), image["name"]
