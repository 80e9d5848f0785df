"""What the play service's tests share."""

from __future__ import annotations

import io
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from fastapi.testclient import TestClient
from httpx import Response
from PIL import Image

from serving.engine import Engine
from serving.model import FolderVersion
from serving.schemas import ModelVersionInfo


def picture(frame_HWC: np.ndarray, file_format: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(frame_HWC).save(buffer, file_format)
    return buffer.getvalue()


def pixels(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))


def nearly(a: np.ndarray, b: np.ndarray) -> bool:
    """Up to how a number is rounded to a byte: frames that are painted again come from other batches."""
    return int(np.abs(a.astype(int) - b.astype(int)).max()) <= 1


@dataclass
class Registry:
    """A model source whose alias a test moves by hand."""

    known: dict[str, FolderVersion] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)

    def champion(self) -> FolderVersion:
        if "champion" not in self.aliases:
            raise ValueError("no champion yet: run the pipeline")
        return self.known[self.aliases["champion"]]

    def version(self, asked: str) -> FolderVersion:
        number = self.aliases.get(asked, asked)
        if number not in self.known:
            raise LookupError(f"there is no version {asked}")
        return self.known[number]

    def versions(self) -> list[ModelVersionInfo]:
        if not self.known:
            raise ValueError("the registry does not answer")
        return [
            ModelVersionInfo(
                version=one.version,
                run_id=one.run_id,
                aliases=[alias for alias, number in self.aliases.items() if number == one.version],
                metrics={"psnr": 20.0},
            )
            for one in reversed(self.known.values())
        ]

    def of(self, version: str, folder: Path) -> FolderVersion:
        return FolderVersion("genie", version, f"run-of-{version}", str(folder))

    def set_alias(self, version: str, folder: Path) -> None:
        self.known[version] = self.of(version, folder)
        self.aliases["champion"] = version


def eventually(condition: Callable[[], bool], seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def engine_of(client: TestClient) -> Engine:
    engine: Engine = client.app.state.engine  # type: ignore[attr-defined]
    return engine


def create(client: TestClient, start_frame: str = "00", **form: object) -> str:
    response = client.post("/v1/sessions", data={"start_frame": start_frame, **form})
    assert response.status_code == 201, response.text
    return str(response.json()["id"])


def step(client: TestClient, session: str, action: int) -> Response:
    return client.post(f"/v1/sessions/{session}/step", json={"action": action})


def play(client: TestClient, actions: list[int], **form: object) -> list[bytes]:
    session = create(client, **form)
    return [step(client, session, action).content for action in actions]


def assert_error(response: Response, status: int, code: str, *words: str) -> None:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    problem = response.json()
    assert set(problem) == {"type", "title", "status", "code", "detail"}
    assert (problem["status"], problem["code"]) == (status, code)
    assert "\n" not in problem["detail"]
    for word in words:
        assert word in problem["detail"]
