"""From an upload of any size to a frame of the model's, and from a frame to PNG."""

from __future__ import annotations

import base64
import io

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

from serving.errors import BadRequestError, NotAnImageError, UploadTooLargeError

Pixels = npt.NDArray[np.uint8]
_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")


def frame_from_upload(upload: bytes, height: int, width: int, max_pixels: int) -> Pixels:
    """The picture, its middle cropped to the frame's aspect and resized: uint8 (height, width, 3).

    Transparent parts become white; of an animation the first picture is taken. Raises NotAnImageError,
    UploadTooLargeError (before anything is decoded), or BadRequestError for a damaged file.
    """
    try:
        image = Image.open(io.BytesIO(upload), formats=_FORMATS)
    except Image.DecompressionBombError:
        raise _too_many_pixels(max_pixels) from None
    except UnidentifiedImageError:
        raise NotAnImageError(f"this is no picture that can be read: send {', '.join(_FORMATS)}") from None
    except (OSError, SyntaxError, ValueError):  # a known format whose header is broken
        raise BadRequestError("this picture is damaged: save it anew and send that") from None
    if image.width * image.height > max_pixels:
        raise _too_many_pixels(max_pixels)
    try:
        rgba = ImageOps.exif_transpose(image).convert("RGBA")
    except (OSError, SyntaxError, ValueError):  # what Pillow's decoders raise on broken data
        raise BadRequestError(f"this {image.format} file is damaged: save it anew and send that") from None
    fitted = ImageOps.fit(rgba, (width, height), Image.Resampling.LANCZOS)
    return np.asarray(Image.alpha_composite(Image.new("RGBA", fitted.size, "white"), fitted).convert("RGB"))


def png(frame_HWC: Pixels) -> bytes:
    """A uint8 frame as PNG; packed lightly, since it is sent once and at once."""
    buffer = io.BytesIO()
    Image.fromarray(frame_HWC).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def packed(frame_HWC: Pixels, picture: str) -> bytes:
    """A uint8 frame as "png", "webp" or "jpeg"."""
    if picture == "png":
        return png(frame_HWC)
    buffer = io.BytesIO()
    Image.fromarray(frame_HWC).save(buffer, picture, quality=90)
    return buffer.getvalue()


def frame_from_png(packed: bytes) -> Pixels:
    """What `png` packed."""
    return np.array(Image.open(io.BytesIO(packed)).convert("RGB"))


def png_data_url(frame_HWC: Pixels) -> str:
    return "data:image/png;base64," + base64.b64encode(png(frame_HWC)).decode()


def gif(frames_THWC: Pixels, frames_per_second: int) -> bytes:
    """uint8 frames as a GIF that goes round for ever. Its clock ticks in hundredths of a second."""
    first, *more = (Image.fromarray(frame_HWC) for frame_HWC in frames_THWC)
    buffer = io.BytesIO()
    first.save(buffer, "GIF", save_all=True, append_images=more, duration=round(100 / frames_per_second) * 10, loop=0)
    return buffer.getvalue()


def _too_many_pixels(max_pixels: int) -> UploadTooLargeError:
    return UploadTooLargeError(f"the picture has too many pixels: at most {max_pixels:,}; make it smaller")
