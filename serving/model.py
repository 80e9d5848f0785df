"""Which model is served, and bringing it into memory."""

from __future__ import annotations

import ctypes
import hashlib
import logging
import platform
import time
from dataclasses import dataclass
from functools import cached_property
from pathlib import PurePosixPath
from typing import Protocol

import fsspec
import torch

from genie_model.checkpoint import CONFIG, WEIGHTS, is_model, load_model
from genie_model.genie import Genie
from genie_model.large_decoder import FOLDER, LargeDecoder, load_large_decoder
from genie_model.layers import TemporalCache
from serving.errors import NoLargeFramesError
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

    def version(self, asked: str) -> ModelVersion:
        """Of that number or alias. Raises LookupError when there is none, ValueError when it is not to be had."""

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
    """Always the model in one folder. What it holds when it is first looked at is its version."""

    uri: str

    def champion(self) -> ModelVersion:
        return self._found

    def version(self, asked: str) -> ModelVersion:
        if asked != self._found.version:
            raise LookupError(f"there is no version {asked!r}: this service has one model, {self._found.version}")
        return self._found

    def versions(self) -> list[ModelVersionInfo]:
        return [ModelVersionInfo(version=self._found.version, run_id="", aliases=[], metrics={})]

    @cached_property
    def _found(self) -> FolderVersion:
        return FolderVersion(PurePosixPath(self.uri.rstrip("/")).name, folder_digest(self.uri), "", self.uri)


@dataclass(frozen=True)
class RegistrySource:
    """The version that carries the alias in MLflow's registry."""

    model_name: str
    alias: str
    tracking_uri: str | None

    def champion(self) -> ModelVersion:
        from genie_model import tracking  # mlflow takes seconds to import, and a folder needs none of it

        return tracking.champion(self.model_name, self.alias, self.tracking_uri or "")

    def version(self, asked: str) -> ModelVersion:
        from genie_model import tracking

        if asked.isdecimal() and len(asked) > 9:
            raise LookupError(f"there is no version {asked}")
        if asked.isdecimal():
            return tracking.numbered(asked, self.model_name, self.tracking_uri or "")
        return tracking.champion(self.model_name, asked, self.tracking_uri or "")

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
    large: LargeDecoder | None = None

    @property
    def identity(self) -> tuple[str, str, str]:
        return identity(self.info)

    def larger(self) -> LargeDecoder:
        """What draws its frames large. Raises NoLargeFramesError."""
        if self.large is None:
            raise NoLargeFramesError(
                f"version {self.info.version} has no larger decoder: ask without large=true, or for another version"
            )
        return self.large

    def is_of(self, version: ModelVersion) -> bool:
        return self.identity == identity(version)


def identity(version: ModelVersion | ModelInfo) -> tuple[str, str, str]:
    """What tells one version from all others."""
    return version.name, version.version, version.run_id


def folder_digest(uri: str) -> str:
    """Of the weights and the config in a folder: what it holds, in eight letters. Raises ValueError without them."""
    digest = hashlib.sha256()
    filesystem, path = fsspec.core.url_to_fs(uri)
    try:
        for name in (CONFIG, WEIGHTS):
            with filesystem.open(f"{path.rstrip('/')}/{name}", "rb") as file:
                while block := file.read(2**22):
                    digest.update(block)
    except FileNotFoundError:
        raise ValueError(f"no model at {uri} (no {name} there): train one first, or check the URI") from None
    return digest.hexdigest()[:8]


def load(version: ModelVersion) -> LoadedModel:
    """Raises ValueError when the folder holds no whole model."""
    genie, large_folder = load_model(version.folder), f"{version.folder}/{FOLDER}"
    large = load_large_decoder(large_folder, genie) if is_model(large_folder) else None
    give_back_large_buffers()
    return LoadedModel(
        genie=genie,
        info=ModelInfo(
            name=version.name,
            version=version.version,
            run_id=version.run_id,
            num_actions=genie.config.num_actions,
            frame_height=genie.config.data.frame_height,
            frame_width=genie.config.data.frame_width,
            large_height=large and large.grid.height,
            large_width=large and large.grid.width,
        ),
        folder=version.folder,
        start_frames=_read_start_frames(version.folder),
        large=large,
    )


def give_back_large_buffers() -> None:
    """Lets glibc return buffers from 2 MB on to the kernel once they are freed, though `load_model` had it keep all.

    Worlds of many players are tensors of some MB, of another size whenever a player comes or goes: kept, they would
    tear holes into the heap, which would grow for hours. What a pass needs beside them is kept.
    """
    if platform.libc_ver()[0] == "glibc":
        libc, m_trim_threshold, m_mmap_threshold = ctypes.CDLL("libc.so.6"), -1, -3
        libc.mallopt(m_mmap_threshold, 2 << 20)
        libc.mallopt(m_trim_threshold, 64 << 20)


def warm(model: LoadedModel) -> None:
    """Dreams one frame, so that the first player waits no longer than the second. Raises ValueError if it is none."""
    began = time.perf_counter()
    parts = [part for part in (model.genie, model.large) if part]
    broken = [name for part in parts for name, weight in part.named_parameters() if not weight.isfinite().all()]
    if broken:
        raise ValueError(f"the model's weights are not all numbers: {', '.join(broken[:3])}")
    shape = model.genie.config.frame_shape
    state = model.genie.start(torch.zeros(1, 1, *shape, dtype=torch.uint8), seed=0)
    frame_BHWC = model.genie.step(state, torch.zeros(1, dtype=torch.long))
    if frame_BHWC.shape != (1, *shape) or frame_BHWC.dtype != torch.uint8:
        raise ValueError(f"the model dreams {frame_BHWC.dtype} {tuple(frame_BHWC.shape)}, not frames of {shape}")
    if model.large:
        model.large.show(state.codes_BNC, TemporalCache([0]))
    log.info("warmed up in %.2f s", time.perf_counter() - began)


def _read_start_frames(folder: str) -> dict[str, bytes]:
    filesystem, path = fsspec.core.url_to_fs(folder)
    files = sorted(filesystem.glob(f"{path}/start_frames/*.png"))
    return {PurePosixPath(file).stem: filesystem.cat_file(file) for file in files}
