"""From an upload of any size, or a sketch, to a frame of the model's; from frames to PNG, GIF and MP4."""

from __future__ import annotations

import base64
import io
import math
import struct
import zlib
from dataclasses import dataclass
from typing import Literal

import av
import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, UnidentifiedImageError

from genie_model.stills import FORMATS, frame_of
from serving.errors import BadRequestError, NotAnImageError, UploadTooLargeError
from serving.schemas import Sketch

Pixels = npt.NDArray[np.uint8]
Animation = Literal["gif", "mp4"]
_SMOOTH = 4
_MP4_HEIGHT = 256  # at least


@dataclass(frozen=True, eq=False)
class Picture:
    """A frame as it is, and as most are sent it."""

    frame_HWC: Pixels
    png: bytes
    large: Picture | None = None  # by the version's larger decoder, where the session's passes draw it

    def packed(self, file_format: str) -> bytes:
        """As "png", "webp" or "jpeg"."""
        if file_format == "png":
            return self.png
        buffer = io.BytesIO()
        Image.fromarray(self.frame_HWC).save(buffer, file_format, quality=90)
        return buffer.getvalue()


def picture_of(frame_HWC: Pixels, large_HWC: Pixels | None = None) -> Picture:
    return Picture(frame_HWC, png(frame_HWC), None if large_HWC is None else picture_of(large_HWC))


def frame_from_upload(upload: bytes, height: int, width: int, max_pixels: int) -> Pixels:
    """The picture, its middle cropped to the frame's aspect and resized: uint8 (height, width, 3).

    Transparent parts become white; of an animation the first picture is taken. Raises NotAnImageError,
    UploadTooLargeError (before anything is decoded), or BadRequestError for a damaged file.
    """
    try:
        image = Image.open(io.BytesIO(upload), formats=FORMATS)
    except Image.DecompressionBombError:
        raise _too_many_pixels(max_pixels) from None
    except UnidentifiedImageError:
        raise NotAnImageError(f"this is no picture that can be read: send {', '.join(FORMATS)}") from None
    except (OSError, SyntaxError, ValueError, struct.error):  # a known format whose header is broken
        raise BadRequestError("this picture is damaged: save it anew and send that") from None
    if image.width * image.height > max_pixels:
        raise _too_many_pixels(max_pixels)
    try:
        return frame_of(image, height, width)
    except Exception:  # decoders raise anything on broken data
        raise BadRequestError(f"this {image.format} file is damaged: save it anew and send that") from None


def frame_from_data_url(data_url: str, height: int, width: int, max_pixels: int) -> Pixels:
    """As `frame_from_upload`, of the file that a data URL holds."""
    head, comma, packed = data_url.partition(",")
    if not (comma and head.startswith("data:image/") and head.endswith(";base64")):
        raise BadRequestError("image_url must be a data URL: data:image/png;base64,... ; others are not fetched")
    try:
        upload = base64.b64decode(packed, validate=True)
    except ValueError:
        raise BadRequestError("the data URL is broken: what comes after its comma is not base64") from None
    return frame_from_upload(upload, height, width, max_pixels)


def frame_from_sketch(sketch: Sketch, height: int, width: int) -> Pixels:
    """The sketch as a frame: uint8 (height, width, 3); painted larger and shrunk, for smooth edges."""
    size = width * _SMOOTH, height * _SMOOTH
    image = Image.new("RGB", size)
    draw = ImageDraw.Draw(image)
    for y, row in enumerate(sketch.canvas):
        top, bottom = (size[1] * edge // len(sketch.canvas) for edge in (y, y + 1))
        for x, colour in enumerate(row):
            left, right = (size[0] * edge // len(row) for edge in (x, x + 1))
            if left < right and top < bottom:
                draw.rectangle((left, top, right - 1, bottom - 1), fill=colour)
    for stroke in sketch.strokes:
        points = [(x * size[0], y * size[1]) for x, y in stroke.points]
        radius = max(stroke.width * size[0] / 2, 1)
        draw.line(points, fill=stroke.colour, width=round(2 * radius))
        for across, down in points:  # round ends and corners
            box = (across - radius, down - radius, across + radius, down + radius)
            draw.ellipse(box, fill=stroke.colour)
    return np.asarray(image.resize((width, height), Image.Resampling.BOX))


def png(frame_HWC: Pixels) -> bytes:
    """A uint8 frame as PNG; packed lightly, since it is sent once and at once.

    Pillow tries all of PNG's filters on every row: it would take 2.4 times as long, for files 10% smaller.
    """
    height, width, _ = frame_HWC.shape
    rows = np.empty((height, 1 + 3 * width), np.uint8)
    rows[:, 0] = 1  # filter "Sub": each pixel's difference from the one to its left
    rows[:, 1:4] = frame_HWC[:, 0]
    np.subtract(frame_HWC[:, 1:], frame_HWC[:, :-1], out=rows[:, 4:].reshape(height, width - 1, 3))
    packer = zlib.compressobj(1, strategy=zlib.Z_HUFFMAN_ONLY)
    data = packer.compress(rows.data) + packer.flush()
    header = struct.pack(">2I5B", width, height, 8, 2, 0, 0, 0)  # 8 bits of each colour
    return b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", header) + _chunk(b"IDAT", data) + _chunk(b"IEND", b"")


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def frame_from_png(packed: bytes) -> Pixels:
    """What `png` packed."""
    return np.array(Image.open(io.BytesIO(packed)).convert("RGB"))


def png_data_url(frame_HWC: Pixels) -> str:
    return "data:image/png;base64," + base64.b64encode(png(frame_HWC)).decode()


def animation(frames_THWC: Pixels, kind: Animation, frames_per_second: int) -> bytes:
    """uint8 frames as a GIF that goes round for ever (its clock ticks in hundredths of a second), or as an MP4 (H.264).

    Small frames are enlarged in an MP4, whose colours are kept at half their resolution.
    """
    buffer = io.BytesIO()
    if kind == "gif":
        first, *more = (Image.fromarray(frame_HWC) for frame_HWC in frames_THWC)
        ticks = round(100 / frames_per_second) * 10
        first.save(buffer, "GIF", save_all=True, append_images=more, duration=ticks, loop=0)
        return buffer.getvalue()
    height, width = frames_THWC.shape[1:3]
    times = math.ceil(_MP4_HEIGHT / height)
    times += times * height % 2 or times * width % 2  # even, as H.264 wants its sizes
    with av.open(buffer, "w", "mp4") as film:
        stream = film.add_stream("libx264", frames_per_second, options={"crf": "18", "preset": "veryfast"})
        stream.width, stream.height, stream.pix_fmt = width * times, height * times, "yuv420p"
        stream.thread_count = 1  # what players need goes first
        for frame_HWC in frames_THWC:
            large_HWC = frame_HWC.repeat(times, 0).repeat(times, 1)
            film.mux(stream.encode(av.VideoFrame.from_ndarray(large_HWC, "rgb24")))
        film.mux(stream.encode())
    return buffer.getvalue()


def _too_many_pixels(max_pixels: int) -> UploadTooLargeError:
    return UploadTooLargeError(f"the picture has too many pixels: at most {max_pixels:,}; make it smaller")
