"""Builds the platform's images; with --push also pushes them and pins their digests in kustomization.yaml.

`make images` runs it. It takes the first of podman, buildah and docker that works here. pip in the build reads what the
file in PIP_CONFIG_FILE says, if there is one.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[2]
PINS = Path(__file__).with_name("kustomization.yaml")
TARGETS = ("collect", "train", "train-tpu", "serve", "mlflow")
ENGINES = ("podman", "buildah", "docker")


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(prog="make images", description=__doc__)
    parser.add_argument("--images", nargs="*", default=TARGETS, metavar="TARGET", help=f"of {', '.join(TARGETS)}")
    parser.add_argument("--registry", default="localhost", help="what goes before /genie-serve, e.g. ghcr.io/example")
    parser.add_argument("--push", action="store_true", help="push, and write the digests into kustomization.yaml")
    parser.add_argument("--arg", action="append", default=[], metavar="NAME=VALUE", help="an ARG of the Dockerfile")
    parser.add_argument("--option", action="append", default=[], help="of the engine's build command")
    args = parser.parse_args(arguments)
    try:
        if unknown := set(args.images) - set(TARGETS):
            raise ValueError(f"there is no image {', '.join(sorted(unknown))}: {', '.join(TARGETS)}")
        if args.push and args.registry == "localhost":
            raise ValueError("say where to push: REGISTRY=ghcr.io/example")
        engine, tag = working_engine(), _version()
        for target in args.images:
            name = f"{args.registry}/genie-{target}"
            build(engine, target, f"{name}:{tag}", args.arg, args.option)
            if args.push:
                pin(f"genie-{target}", name, push(engine, f"{name}:{tag}"))
            print(f"[images] {name}:{tag}", flush=True)
    except subprocess.CalledProcessError as error:
        print(f"images: {' '.join(error.cmd[:2])} failed, see above", file=sys.stderr)
        return 1
    except ValueError as error:
        print(f"images: {error}", file=sys.stderr)
        return 1
    return 0


def working_engine() -> str:
    """Raises ValueError where there is none. A docker without its daemon does not count."""
    for engine in ENGINES:
        if shutil.which(engine) and not subprocess.run([engine, "info"], capture_output=True).returncode:
            return engine
    raise ValueError("no podman, buildah or docker works here: install one (Debian: apt install podman)")


def build(engine: str, target: str, image: str, arguments: list[str], options: list[str]) -> None:
    """Raises CalledProcessError, after the engine said why."""
    version, _, revision = _version().partition("-")
    stamped = [f"VERSION={version}", f"REVISION={revision}", *arguments]
    command = [engine, "build", "--file", "Dockerfile", "--target", target, "--tag", image, *options]
    command += [word for argument in stamped for word in ("--build-arg", argument)]
    if engine != "docker":
        command += ["--format", "docker", "--layers"]  # OCI's own format has no HEALTHCHECK
    if config := os.environ.get("PIP_CONFIG_FILE"):
        command += ["--secret", f"id=pip,src={Path(config).resolve()}"]
    subprocess.run([*command, "."], cwd=ROOT, check=True, env={**os.environ, "DOCKER_BUILDKIT": "1"})


def push(engine: str, image: str) -> str:
    """The digest that the registry has it by."""
    if engine == "docker":
        subprocess.run(["docker", "push", image], check=True)
        asked = ["docker", "image", "inspect", "--format", "{{json .RepoDigests}}", image]
        digests = json.loads(subprocess.run(asked, check=True, capture_output=True, text=True).stdout)
        name = image.rpartition(":")[0].removeprefix("docker.io/")  # as docker shortens it
        found = [digest.partition("@")[2] for digest in digests if digest.startswith(f"{name}@")]
        if not found:
            raise ValueError(
                f"docker knows no digest of {name}, which it pushed: it says {', '.join(digests) or 'none'}"
            )
        return str(found[0])
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch, "digest")
        subprocess.run([engine, "push", "--digestfile", str(file), image], check=True)
        return file.read_text().strip()


def pin(base: str, name: str, digest: str, pins: Path = PINS) -> None:
    """Has `base` run as `name`@`digest`; the comment that the file begins with stays."""
    text = pins.read_text()
    comment = "".join(line for line in text.splitlines(keepends=True) if line.startswith("#"))
    component = yaml.safe_load(text)
    next(image for image in component["images"] if image["name"] == base).update(newName=name, digest=digest)
    half = pins.with_suffix(".tmp")
    half.write_text(comment + yaml.safe_dump(component, sort_keys=False))
    half.replace(pins)


def _version() -> str:
    """pyproject.toml's and git's, as in 0.1.0-4de612e (-dirty where files differ from it); the tag of the images."""
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    described = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    found = subprocess.run(described, capture_output=True, text=True)
    return f"{version}-{found.stdout.strip()}" if not found.returncode else str(version)


if __name__ == "__main__":
    sys.exit(main())
