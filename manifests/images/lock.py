"""Writes requirements-*.txt beside this file: every package of an image, to the exact version (`make lock`).

The names come from pyproject.toml, and their own requirements from what is installed here, the versions from
constraints.txt. `--check` writes nothing: it fails when a file is not what would be written.
"""

from __future__ import annotations

import re
import sys
import tomllib
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import NormalizedName, canonicalize_name

FOLDER = Path(__file__).parent
ROOT = FOLDER.parents[1]
# Extras of pyproject.toml by image; "library" is its `dependencies`.
IMAGES = {
    "collect": ("library", "collect", "video", "steps"),
    "train": ("library", "video", "steps"),  # h264 is decoded where it is trained on
    "train-tpu": ("library", "video", "steps", "tpu"),
    "serve": ("library", "serve", "otel"),
    "mlflow": ("mlflow",),
    "torch-tpu": ("tpu",),  # this and torch are layers of the images above
}
PYTHON = {"python_version": "3.11", "python_full_version": "3.11.0"}  # a base may have any 3.11: Debian's is 3.11.2
# What these require, that may not be installed here: torch-xla wants another torch, and Python 3.11.3 no async-timeout.
REQUIRED = {
    "torch-xla": ["absl-py>=1", "numpy", "pyyaml", "requests"],
    "libtpu": [],
    "absl-py": [],
    "async-timeout": [],
}
CUDA = re.compile(r"nvidia-|cuda-|triton")  # of CUDA's torch, which pins them itself; CPU's has none


def main(arguments: list[str]) -> int:
    """Returns the exit status."""
    wanted = {FOLDER / f"requirements-{name}.txt": text for name, text in locks().items()}
    if arguments == ["--check"]:
        stale = [path.name for path, text in wanted.items() if not path.exists() or path.read_text() != text]
        print(f"{', '.join(stale)}: not what pyproject.toml and constraints.txt say; run make lock" if stale else "ok")
        return 1 if stale else 0
    for path, text in wanted.items():
        path.write_text(text)
    return 0


def locks() -> dict[str, str]:
    """The text of each file, by image. Raises ValueError for a package without a pin."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"] | {"library": project["dependencies"]}
    roots = {name: [line for part in parts for line in extras[part]] for name, parts in IMAGES.items()}
    return {name: _text(lines) for name, lines in (roots | {"torch": ["torch"]}).items()}


def _text(lines: list[str]) -> str:
    requirements = [Requirement(line) for line in lines]
    pins = [Requirement(line) for line in (ROOT / "constraints.txt").read_text().splitlines()]
    pins += [requirement for requirement in requirements if str(requirement.specifier).startswith("==")]  # these win
    version = {canonicalize_name(pin.name): str(pin.specifier) for pin in pins}
    names = sorted(_closure(requirements))
    if missing := [name for name in names if name not in version]:
        raise ValueError(f"no pin for {', '.join(missing)}: add it to constraints.txt")
    return "# Made by `make lock`.\n" + "".join(f"{name}{version[name]}\n" for name in names)


def _closure(requirements: Iterable[Requirement]) -> set[NormalizedName]:
    todo, seen = list(requirements), set[tuple[NormalizedName, str]]()
    while todo:
        requirement = todo.pop()
        name = canonicalize_name(requirement.name)
        for extra in {"", *requirement.extras} if not CUDA.match(name) else ():
            if (name, extra) not in seen:
                seen.add((name, extra))
                asked = [Requirement(line) for line in _requires(name)]
                todo += [one for one in asked if one.marker is None or one.marker.evaluate(PYTHON | {"extra": extra})]
    return {name for name, _ in seen}


def _requires(name: str) -> list[str]:
    try:
        return REQUIRED[name] if name in REQUIRED else metadata.requires(name) or []
    except metadata.PackageNotFoundError:
        raise ValueError(f"{name} is not installed: make setup") from None


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except ValueError as error:
        sys.exit(f"lock: {error}")
