"""The house's import rules: who may import whom, read from the source without running it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = ("genie_model", "components", "pipelines", "serving")
LAYERS = ["config", "layers", ("tokenizer", "lam", "dynamics"), "genie", ("train", "evaluate")]
# A library that only one place may touch.
OWNERS = {
    "mlflow": ("genie_model/tracking/",),
    "redis": ("serving/redis_store.py",),
    "kfp": ("components/", "pipelines/"),
    "torch_xla": ("genie_model/backend/xla.py",),
    "prometheus_client": ("genie_model/exporter.py", "serving/metrics.py"),
    "kubernetes": ("genie_model/jobset_client.py",),  # its role allows what this file asks for, and no more
    "procgen": ("genie_model/data/coinrun.py",),
    # files of strangers are opened in one place, which limits what they can do; the others read and write own video
    "av": ("genie_model/data/video.py", "genie_model/data/codecs.py", "serving/images.py"),
    "gymnasium": ("genie_model/env.py",),
    "genie_model.data.truth": ("genie_model/data/held_out.py", "genie_model/cloning.py"),
    "genie_model.data.held_out": (
        "genie_model/beside_truth.py",
        "genie_model/evaluate.py",
        "genie_model/tracking/promotion.py",
    ),
}


def sources() -> list[str]:
    return [path.relative_to(ROOT).as_posix() for room in ROOMS for path in sorted((ROOT / room).rglob("*.py"))]


def imported(source: str, *, top_level: bool = False) -> set[str]:
    """Full dotted names of all modules that the file imports, and of the names it takes from them."""
    tree = ast.parse((ROOT / source).read_text())
    nodes: Iterator[ast.AST] | list[ast.stmt] = tree.body if top_level else ast.walk(tree)
    names: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{source}: relative import"
            names |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def uses(source: str, module: str, *, top_level: bool = False) -> bool:
    return any(name == module or name.startswith(module + ".") for name in imported(source, top_level=top_level))


def test_the_rules_see_the_source() -> None:
    assert uses("genie_model/tracking/runs.py", "mlflow")
    assert uses("components/collect.py", "genie_model")
    assert not uses("components/collect.py", "genie_model", top_level=True)


@pytest.mark.parametrize("library", OWNERS)
def test_a_library_has_one_owner(library: str) -> None:
    assert [s for s in sources() if uses(s, library) and not s.startswith(OWNERS[library])] == []


@pytest.mark.parametrize(
    ("room", "forbidden"),
    [
        ("genie_model", ("components", "pipelines", "serving", "fastapi", "uvicorn")),
        ("serving", ("components", "pipelines")),
        ("components", ("pipelines", "serving")),
        ("pipelines", ("serving", "torch")),
    ],
)
def test_rooms_depend_one_way(room: str, forbidden: tuple[str, ...]) -> None:
    assert [(s, f) for s in sources() if s.startswith(f"{room}/") for f in forbidden if uses(s, f)] == []


def test_components_import_the_library_inside_their_bodies() -> None:
    modules = ("genie_model", "torch", "numpy")
    assert [
        s for s in sources() if s.startswith("components/") and any(uses(s, m, top_level=True) for m in modules)
    ] == []


def test_the_model_s_layers_depend_one_way() -> None:
    order = [layer if isinstance(layer, tuple) else (layer,) for layer in LAYERS]
    wrong = []
    for depth, layer in enumerate(order):
        later = [module for names in order[depth + 1 :] for module in names]
        beside = [module for module in layer if depth < len(order) - 1]
        for name in layer:
            source = f"genie_model/{name}.py"
            wrong += [(source, m) for m in (*later, *beside) if m != name and uses(source, f"genie_model.{m}")]
    assert wrong == []


def test_component_bodies_are_short() -> None:
    for source in (s for s in sources() if s.startswith("components/")):
        for node in ast.walk(ast.parse((ROOT / source).read_text())):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno is not None
                assert node.end_lineno - node.body[0].lineno < 30, source
