"""The overlays as kustomize renders them: they are what a cluster gets."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from functools import cache

import pytest

from manifests.objects import OVERLAYS, Objects, render


@cache
def _read(overlay: str) -> Objects:
    return Objects.read(render(OVERLAYS / overlay))


@pytest.fixture(scope="session")
def rendered() -> Callable[[str], Objects]:
    """rendered(overlay): its objects, a copy that may be changed."""
    if not shutil.which("kubectl") and not shutil.which("kustomize"):
        pytest.skip("there is neither kubectl nor kustomize here: install one of them")
    return lambda overlay: Objects(copy.deepcopy(_read(overlay).all))
