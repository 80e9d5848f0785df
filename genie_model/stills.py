"""From a picture of any shape, kind and size to a frame of a model's: what is played is what was measured."""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
Aspect = Literal["crop", "pad", "stretch"]
_ORIENTATION = 0x0112  # in EXIF: which way the camera was held
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def frame_of(image: Image.Image, height: int, width: int, aspect: Aspect = "crop") -> NDArray[np.uint8]:
    """The picture, upright, resized to uint8 (height, width, 3).

    Of another shape than the frame's, "crop" takes its middle, "pad" puts black bars beside it, "stretch" squeezes it.
    Transparent parts become white; of an animation the first picture is taken. A damaged file raises whatever its
    decoder does, which may be anything.
    """
    image.draft("RGB", (4 * max(height, width),) * 2)  # of a JPEG only as much is decoded as the frame can show
    turn = _TURNS.get(image.getexif().get(_ORIENTATION, 1))
    upright = image if turn is None else image.transpose(turn)
    if upright.mode.startswith("I"):  # 16 bits of grey
        upright = Image.fromarray((np.asarray(upright).clip(0, 65535) >> 8).astype(np.uint8))
    rgba, size = upright.convert("RGBA"), (width, height)
    if aspect == "stretch":
        fitted = rgba.resize(size, Image.Resampling.LANCZOS)
    else:
        fit = ImageOps.fit if aspect == "crop" else ImageOps.contain
        fitted = fit(rgba, size, Image.Resampling.LANCZOS)
    opaque = Image.alpha_composite(Image.new("RGBA", fitted.size, "white"), fitted).convert("RGB")
    return np.asarray(ImageOps.pad(opaque, size), np.uint8)
