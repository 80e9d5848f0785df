"""The clips in the order in which they are shown, and what was said of them."""

from __future__ import annotations

import io
import math
import threading
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from genie_model import files
from genie_model.data.labels import BAD, GOOD, Label, episodes_of, read_labels, write_labels
from genie_model.data.loader import shuffled
from genie_model.data.store import VideoStore

_SHEET_PIXELS = 12e6  # of one picture: about as many as browsers like


@dataclass(frozen=True)
class Clip:
    """`position` is its place in the order; `label` what was said of it, None for nothing yet."""

    position: int
    digest: str
    source: str
    title: str
    start_seconds: float
    label: int | None
    frames: int  # in its sheet, `columns` a row, each shown for `seconds`
    columns: int
    seconds: float


class Clips:
    """Those of a data set's train split, shuffled, so that the first hundred are of all of it. Safe for threads.

    Raises ValueError for data without provenance, and for a file that holds no labels.
    """

    def __init__(self, data_uri: str, labels_uri: str) -> None:
        self.store = VideoStore.open(f"{data_uri.rstrip('/')}/train")
        self.labels_uri = labels_uri
        self.labels = read_labels(labels_uri) if files.exists(labels_uri) else {}
        self._changing = threading.Lock()
        self._fps = float(self.store.meta["data"].get("fps", 10))
        self._about(0)
        self._labelled = set(episodes_of(self.store, self.labels).values())

    def __len__(self) -> int:
        return self.store.num_episodes

    def clip(self, position: int) -> Clip:
        """Raises IndexError for a position that there is not."""
        about = self._about(position)
        said = self.labels.get(about["digest"])
        shown, columns, every = self._layout(position)
        return Clip(
            position, about["digest"], about["source"], str(about.get("title") or ""), float(about["start_seconds"]),
            said.label if said else None, shown, columns, every / self._fps,
        )  # fmt: skip

    def following(self, after: int) -> Clip | None:
        """The first one behind that position that has no label yet; None where there is none."""
        left = (at for at in range(after + 1, len(self)) if self._episode(at) not in self._labelled)
        position = next(left, None)
        return None if position is None else self.clip(position)

    def say(self, position: int, label: int | None) -> Clip:
        """Labels the clip, or takes its label back; the file is whole when this returns."""
        about = self._about(position)
        with self._changing:
            labels = {digest: said for digest, said in self.labels.items() if digest != about["digest"]}
            if label is not None:
                labels[about["digest"]] = Label(
                    digest=about["digest"], source=about["source"], start_seconds=about["start_seconds"], label=label
                )
            write_labels(self.labels_uri, labels.values())
            self.labels = labels
            (self._labelled.discard if label is None else self._labelled.add)(self._episode(position))
        return self.clip(position)

    def progress(self) -> dict[str, Any]:
        """How many have which label, and of how many videos there are good and bad ones: they are split by video."""
        said = list(self.labels.values())
        return {
            "clips": len(self),
            "labelled": len(said),
            "counts": {label: sum(one.label == label for one in said) for label in range(BAD, GOOD + 1)},
            "videos": {label: len({one.source for one in said if one.label == label}) for label in (BAD, GOOD)},
        }

    def sheet(self, position: int) -> bytes:
        """The clip's frames in rows, as one JPEG: it plays in every browser, at any speed, without a codec."""
        shown, columns, every = self._layout(position)
        episode = self._episode(position)
        frames_THWC = self.store.frames(episode, 0, self.store.length_of(episode))[::every]
        rows, (height, width) = -(-shown // columns), frames_THWC.shape[1:3]
        sheet = np.zeros((rows * columns, height, width, 3), np.uint8)
        sheet[:shown] = frames_THWC
        picture = (
            sheet.reshape(rows, columns, height, width, 3).swapaxes(1, 2).reshape(rows * height, columns * width, 3)
        )
        packed = io.BytesIO()
        Image.fromarray(picture).save(packed, "JPEG", quality=90, subsampling=0)  # small frames are shown large
        return packed.getvalue()

    def _layout(self, position: int) -> tuple[int, int, int]:
        """Frames that are shown, how many a row, and every how-manieth of the clip's that is."""
        length = self.store.length_of(self._episode(position))
        height, width, _ = self.store.meta["frame_shape"]
        every = math.ceil(length * height * width / _SHEET_PIXELS)
        shown = -(-length // every)
        return shown, math.ceil(math.sqrt(shown * height / width)), every

    def _episode(self, position: int) -> int:
        if not 0 <= position < len(self):
            raise IndexError(f"there is no clip {position}: the data set has {len(self)}")
        return shuffled(position, len(self), seed=0, epoch=0)

    def _about(self, position: int) -> dict[str, Any]:
        about = self.store.about(self._episode(position))
        if not {"digest", "source", "start_seconds"} <= about.keys():
            raise ValueError(f"{self.store.uri} does not say which videos its clips are from: label what was ingested")
        return about
