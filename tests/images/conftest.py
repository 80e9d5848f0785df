"""The images, built once for all tests that run them."""

from __future__ import annotations

import pytest
from containers import Podman


@pytest.fixture(scope="session")
def podman(tmp_path_factory: pytest.TempPathFactory) -> Podman:
    return Podman(tmp_path_factory.mktemp("podman"))


@pytest.fixture(scope="session")
def serve_image(podman: Podman) -> str:
    podman.build("serve")
    return "localhost/genie-serve:test"


@pytest.fixture(scope="session")
def collect_image(podman: Podman) -> str:
    podman.build("collect")
    return "localhost/genie-collect:test"
