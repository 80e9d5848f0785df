"""Which code made a thing."""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Iterable
from pathlib import Path

_FOLDER = Path(__file__).parent
_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def code_digest(names: Iterable[str], folder: Path = _FOLDER) -> str:
    """8 hex digits of the source files `names` below `folder`; comments, docstrings and layout do not count."""
    digest = hashlib.sha256()
    for name in sorted(names):
        digest.update(f"{name}\0{_bare((folder / name).read_text())}\0".encode())
    return digest.hexdigest()[:8]


def _bare(source: str) -> str:
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, _DOCUMENTED) and ast.get_docstring(node, clean=False) is not None:
            del node.body[0]
    return ast.unparse(tree)
