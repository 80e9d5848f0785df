"""Which model is served, and bringing it into memory."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Protocol

import fsspec
import torch

from genie_model.checkpoint import load_model
from genie_model.genie import Genie
from serving.schemas import ModelInfo, ModelVersionInfo
from serving.settings import Settings

log = logging.getLogger(__name__)


class ModelVersion(Protocol):
    """What identifies a version, and the folder that holds it. `genie_model.tracking.ModelVersion` is one."""

    @property
    def name(self) -> str: ...
    @property
    def version(self) -> str: ...
    @property
    def run_id(self) -> str: ...
    @property
    def folder(self) -> str: ...


class ModelSource(Protocol):
    """Says which version is to be served now."""

    def champion(self) -> ModelVersion:
        """Raises ValueError, saying what to do, when there is none."""

    def version(self, number: str) -> ModelVersion:
        """One that was served before. Raises ValueError when it is not to be had any more."""

    def versions(self) -> list[ModelVersionInfo]:
        """All there are, the newest first. Raises ValueError when they cannot be asked for."""


@dataclass(frozen=True)
class FolderVersion:
    name: str
    version: str
    run_id: str
    folder: str


@dataclass(frozen=True)
class FolderSource:
    """Always the model in one folder."""

    uri: str

    def champion(self) -> ModelVersion:
        return FolderVersion(PurePosixPath(self.uri.rstrip("/")).name, "folder", "", self.uri)

    def version(self, number: str) -> ModelVersion:
        return self.champion()

    def versions(self) -> list[ModelVersionInfo]:
        return [ModelVersionInfo(version="folder", run_id="", aliases=[], metrics={})]


@dataclass(frozen=True)
class RegistrySource:
    """The version that carries the alias in MLflow's registry."""

    model_name: str
    alias: str
    tracking_uri: str | None

    def champion(self) -> ModelVersion:
        from genie_model import tracking  # mlflow takes seconds to import, and a folder needs none of it

        return tracking.champion(self.model_name, self.alias, self.tracking_uri or "")

    def version(self, number: str) -> ModelVersion:
        from genie_model import tracking

        return tracking.numbered(number, self.model_name, self.tracking_uri or "")

    def versions(self) -> list[ModelVersionInfo]:
        from genie_model import tracking

        return [ModelVersionInfo(**found) for found in tracking.versions(self.model_name, self.tracking_uri or "")]


def model_source(settings: Settings) -> ModelSource:
    if settings.model_uri:
        return FolderSource(settings.model_uri)
    return RegistrySource(settings.model_name, settings.alias, settings.tracking_uri)


@dataclass(frozen=True)
class LoadedModel:
    """A version in memory, with the start frames (PNG files by name) that travel with it."""

    genie: Genie
    info: ModelInfo
    folder: str
    start_frames: dict[str, bytes]

    @property
    def identity(self) -> tuple[str, str, str]:
        return identity(self.info)

    def is_of(self, version: ModelVersion) -> bool:
        return self.identity == identity(version)


def identity(version: ModelVersion | ModelInfo) -> tuple[str, str, str]:
    """What tells one version from all others."""
    return version.name, version.version, version.run_id


def load(version: ModelVersion) -> LoadedModel:
    """Raises ValueError when the folder holds no whole model."""
    genie = load_model(version.folder)
    return LoadedModel(
        genie=genie,
        info=ModelInfo(
            name=version.name,
            version=version.version,
            run_id=version.run_id,
            num_actions=genie.config.num_actions,
            frame_height=genie.config.data.frame_height,
            frame_width=genie.config.data.frame_width,
        ),
        folder=version.folder,
        start_frames=_read_start_frames(version.folder),
    )


def warm(model: LoadedModel) -> None:
    """Dreams one frame, so that the first player waits no longer than the second. Raises ValueError if it is none."""
    began = time.perf_counter()
    shape = model.genie.config.frame_shape
    state = model.genie.start(torch.zeros(1, 1, *shape, dtype=torch.uint8), seed=0)
    frame_BHWC = model.genie.step(state, torch.zeros(1, dtype=torch.long))
    if frame_BHWC.shape != (1, *shape) or frame_BHWC.dtype != torch.uint8:
        raise ValueError(f"the model dreams {frame_BHWC.dtype} {tuple(frame_BHWC.shape)}, not frames of {shape}")
    log.info("warmed up in %.2f s", time.perf_counter() - began)


def _read_start_frames(folder: str) -> dict[str, bytes]:
    filesystem, path = fsspec.core.url_to_fs(folder)
    files = sorted(filesystem.glob(f"{path}/start_frames/*.png"))
    return {PurePosixPath(file).stem: filesystem.cat_file(file) for file in files}
