"""What is imported is declared: a transitive dependency may go with the next release of what brought it."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OWN = {"genie_model", "components", "pipelines", "serving", "benchmarks", "examples", "manifests", "tests"}


def imported(*rooms: str) -> set[str]:
    """Top-level names of the modules from outside that any file of the rooms imports."""
    files = [path for room in rooms for path in (ROOT / room).rglob("*.py")]
    names = set[str]()
    for path in files:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                names.add((node.module or "").partition(".")[0])
    beside = {path.stem for path in files}  # tests import their helpers by bare names
    return names - OWN - sys.stdlib_module_names - (beside if "tests" in rooms else set())


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


@pytest.mark.parametrize(
    ("rooms", "extras"),
    [
        (("genie_model",), ("collect", "video", "steps", "tpu")),
        (("serving",), ("serve", "otel")),
        (("components",), ("steps",)),
        (("pipelines",), ("steps", "pipelines")),
        (("benchmarks", "examples"), ("collect", "video", "serve")),
        (("tests", "manifests"), ("collect", "video", "serve", "otel", "steps", "pipelines", "tpu", "dev")),
    ],
)
def test_every_import_is_declared(rooms: tuple[str, ...], extras: tuple[str, ...]) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = [*project["dependencies"], *(line for extra in extras for line in project["optional-dependencies"][extra])]
    declared = {normal(re.split(r"[<>=!~\[; ]", line)[0]) for line in lines}
    owners = packages_distributions()
    undeclared = {
        name for name in imported(*rooms) if not declared & {normal(owner) for owner in owners.get(name, [name])}
    }
    assert undeclared == set()
