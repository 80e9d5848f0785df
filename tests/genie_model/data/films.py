"""Video files made here, plain ones and odd ones. Each picture has a red, a green, a blue and a white quarter."""

from __future__ import annotations

import ctypes
import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from numpy.typing import NDArray

from genie_model.data.sources import Framing, Note, Video, no_note

PQ, HLG, BT2020 = 16, 18, 9  # FFmpeg's numbers


def picture(number: int, height: int = 90, width: int = 160) -> np.ndarray:
    """Red top left, green top right, blue bottom left, white bottom right; a grey bar's place and shade tell which."""
    picture_HWC = np.zeros((height, width, 3), np.uint8)
    top, left = height // 2, width // 2
    picture_HWC[:top, :left, 0] = picture_HWC[:top, left:, 1] = picture_HWC[top:, :left, 2] = 255
    picture_HWC[top:, left:] = 255
    bar = number * 4 % (width // 2)
    picture_HWC[:, bar : bar + 4] = 40 + number % 170
    return picture_HWC


def film(
    path: Path,
    frames: int = 60,
    fps: int = 30,
    size: tuple[int, int] = (90, 160),
    codec: str = "mpeg4",
    seconds: list[float] | None = None,
    rotation: tuple[float, bool] | None = None,
    transfer: int = 0,
    pixel: Fraction | None = None,
    first: int = 0,
    options: dict[str, str] | None = None,
) -> Path:
    """A file in the container that its name says. `seconds` are the frames' times, else they have a constant rate.

    `rotation` is (degrees, whether flipped left to right), `transfer` PQ or HLG, `pixel` the width over the height of a
    pixel, `first` the number of the first picture.
    """
    height, width = size
    with av.open(str(path), "w", options=options or {}) as container:
        stream = container.add_stream(codec, rate=fps)
        stream.width, stream.height, stream.pix_fmt = width, height, "rgb8" if codec == "gif" else "yuv420p"
        stream.options = {"threads": "1", "preset": "ultrafast"} if codec == "libx264" else {"qscale": "2"}
        stream.codec_context.thread_count = 1
        if seconds:
            stream.time_base = stream.codec_context.time_base = Fraction(1, 1000)
        if rotation:
            stream.set_display_rotation(rotation[0], hflip=rotation[1])
        if transfer:
            stream.color_trc, stream.color_primaries, stream.colorspace = transfer, BT2020, BT2020
        if pixel:
            stream.sample_aspect_ratio = pixel
        for number in range(frames):
            frame = av.VideoFrame.from_ndarray(picture(first + number, height, width), "rgb24")
            frame.pts = round(seconds[number] * 1000) if seconds else number
            frame.time_base = Fraction(1, 1000) if seconds else Fraction(1, fps)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


@dataclass(frozen=True)
class Deadly(Video):
    """A video that ends the process that decodes it, as a decoder's fault does."""

    def frames(self, framing: Framing, note: Note = no_note) -> Iterator[NDArray[np.uint8]]:
        os.kill(os.getpid(), signal.SIGKILL)
        yield from ()


class Hanging(Video):
    """A video whose decoder hangs in C and, at worst, lets no thread of Python run."""

    def frames(self, framing: Framing, note: Note = no_note) -> Iterator[NDArray[np.uint8]]:
        ctypes.PyDLL(None).sleep(1000)
        yield from ()


def sound(path: Path) -> Path:
    """A second of silence in a file for video."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=48_000, layout="mono")
        for number in range(47):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
            frame.sample_rate, frame.pts = 48_000, number * 1024
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path
