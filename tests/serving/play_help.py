"""What the play service's tests share."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from serving.model import FolderVersion


def picture(frame_HWC: np.ndarray, file_format: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(frame_HWC).save(buffer, file_format)
    return buffer.getvalue()


def pixels(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))


@dataclass
class Registry:
    """A model source whose alias a test moves by hand."""

    version: FolderVersion | None = None

    def champion(self) -> FolderVersion:
        if self.version is None:
            raise ValueError("no champion yet: run the pipeline")
        return self.version

    def set_alias(self, version: str, folder: Path) -> None:
        self.version = FolderVersion("genie", version, f"run-of-{version}", str(folder))
