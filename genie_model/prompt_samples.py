"""Prompts to try without any of one's own: photos, drawings, and landscapes that a generator made up.

The photos are parts of scikit-learn's two sample images (china.jpg by danielbuechele, flower.jpg by vultilion, both
CC BY 2.0); the rest is drawn here, always the same.
"""

from __future__ import annotations

import io
import itertools
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

_WIDTH, _HEIGHT = 320, 240
_PAPER, _INK = (252, 250, 244), (40, 40, 48)
Points = Sequence[tuple[float, float]]


def samples() -> dict[str, bytes]:
    """PNG files by name: photos/, drawings/ and generated/."""
    made = {f"photos/{name}": image for name, image in _photos().items()}
    made |= {f"drawings/{draw.__name__.strip('_')}": draw() for draw in (_platforms, _house, _stairs, _boat, _caves)}
    made |= {f"generated/landscape_{seed}": _landscape(seed) for seed in range(6)}
    files = {}
    for name, image in made.items():
        png = io.BytesIO()
        image.save(png, "png")
        files[f"{name}.png"] = png.getvalue()
    return files


def _photos() -> dict[str, Image.Image]:
    """Each whole, and its left and right halves."""
    from sklearn.datasets import load_sample_image  # a second that few need

    parts = {}
    for name in ("china", "flower"):
        photo_HWC = load_sample_image(f"{name}.jpg")
        middle = photo_HWC.shape[1] // 2
        for part, pixels in {"": photo_HWC, "_left": photo_HWC[:, :middle], "_right": photo_HWC[:, middle:]}.items():
            parts[name + part] = Image.fromarray(pixels)
    return parts


# --- drawings: ink on paper, by a hand that shakes ---


class _Sheet:
    def __init__(self, seed: int) -> None:
        self.image = Image.new("RGB", (_WIDTH, _HEIGHT), _PAPER)
        self._draw, self._rng = ImageDraw.Draw(self.image), np.random.default_rng(seed)

    def line(self, *points: tuple[float, float], width: int = 3) -> None:
        shaky: list[tuple[float, float]] = []
        for (x0, y0), (x1, y1) in itertools.pairwise(points):
            steps = max(int(np.hypot(x1 - x0, y1 - y0) / 8), 1)
            for t in np.linspace(0, 1, steps + 1):
                dx, dy = self._rng.normal(0, 0.8, 2)
                shaky.append((float(x0 + t * (x1 - x0) + dx), float(y0 + t * (y1 - y0) + dy)))
        self._draw.line(shaky, _INK, width, joint="curve")

    def round(self, x: float, y: float, radius: float) -> None:
        turns = np.linspace(0, 2 * np.pi, 24)
        self.line(*((x + radius * float(np.cos(a)), y + radius * float(np.sin(a))) for a in turns))

    def figure(self, x: float, ground: float) -> None:
        """A stick figure that stands there."""
        self.round(x, ground - 42, 8)
        self.line((x, ground - 34), (x, ground - 14))
        self.line((x - 10, ground - 22), (x, ground - 30), (x + 10, ground - 22))
        self.line((x - 8, ground), (x, ground - 14), (x + 8, ground))


def _platforms() -> Image.Image:
    sheet = _Sheet(0)
    for x, y, length in ((0, 210, 320), (30, 150, 90), (160, 110, 120), (60, 70, 70)):
        sheet.line((x, y), (x + length, y), width=5)
    sheet.figure(75, 150)
    for x in (180, 210, 240):
        sheet.round(x, 90, 7)
    return sheet.image


def _house() -> Image.Image:
    sheet = _Sheet(1)
    sheet.line((0, 190), (80, 180), (200, 195), (320, 185), width=4)
    sheet.line((60, 185), (60, 110), (140, 110), (140, 188))
    sheet.line((50, 112), (100, 65), (150, 112))
    sheet.line((92, 186), (92, 150), (114, 150), (114, 187))
    sheet.line((245, 190), (245, 130))
    sheet.round(245, 105, 28)
    sheet.round(285, 40, 18)
    sheet.figure(185, 194)
    return sheet.image


def _stairs() -> Image.Image:
    sheet = _Sheet(2)
    corners = [(20 + 40 * (i // 2 + i % 2), 215 - 28 * (i // 2)) for i in range(12)]
    sheet.line(*corners, width=5)
    sheet.figure(120, 159)
    sheet.line((270, 75), (270, 20))
    sheet.line((270, 20), (300, 32), (270, 44))
    return sheet.image


def _boat() -> Image.Image:
    sheet = _Sheet(3)
    for y, shift in ((170, 0), (195, 12), (220, 5)):
        sheet.line(*((x, y + 6 * float(np.sin((x + shift) / 14))) for x in range(0, _WIDTH + 8, 8)))
    sheet.line((100, 140), (125, 168), (205, 168), (230, 140), (100, 140), width=4)
    sheet.line((165, 140), (165, 40))
    sheet.line((165, 45), (220, 120), (165, 125))
    return sheet.image


def _caves() -> Image.Image:
    sheet = _Sheet(4)
    sheet.line((0, 50), (60, 70), (120, 35), (190, 75), (260, 40), (320, 60), width=5)
    sheet.line((0, 200), (90, 200), (90, 170), (150, 170), (150, 215), (220, 215), (220, 180), (320, 180), width=5)
    sheet.figure(120, 170)
    for x in (240, 260, 280):
        sheet.line((x, 180), (x + 8, 160), (x + 16, 180))
    return sheet.image


# --- generated: ridges of noise under a sky, with blocks to stand on ---


def _landscape(seed: int) -> Image.Image:
    rng = np.random.default_rng(seed)
    sky, far, near = rng.integers(40, 256, (3, 3))
    down_H1 = np.linspace(0, 1, _HEIGHT)[:, None]
    pixels_HWC = (down_H1[..., None] * 255 + (1 - down_H1[..., None]) * sky).repeat(_WIDTH, axis=1)
    for depth in np.linspace(0.2, 1, 4):
        ridge_W = _HEIGHT * (0.35 + 0.4 * depth) - 60 * _noise(rng, _WIDTH, octaves=5)
        below_HW = np.arange(_HEIGHT)[:, None] > ridge_W
        shade_HW = 1 - 0.3 * _noise(rng, _WIDTH, octaves=6)
        pixels_HWC = np.where(below_HW[..., None], shade_HW[:, None] * (far + depth * (near - far)), pixels_HWC)
    image = Image.fromarray(pixels_HWC.clip(0, 255).astype(np.uint8))
    draw, side = ImageDraw.Draw(image), 24
    block, edge = (tuple(int(c) for c in rng.integers(low, low + 120, 3)) for low in (100, 0))
    for _ in range(4):
        x, y = (int(rng.integers(0, n // side)) * side for n in (_WIDTH - 4 * side, _HEIGHT))
        for i in range(int(rng.integers(2, 5))):
            draw.rectangle((x + i * side, y, x + (i + 1) * side, y + side), fill=block, outline=edge, width=2)
        draw.ellipse((x + 4, y - side, x + side - 4, y - 2), fill=edge)
    return image


def _noise(rng: np.random.Generator, length: int, octaves: int) -> NDArray[np.float64]:
    """Smooth noise in [-1, 1]: each octave twice as fine and half as strong."""
    total = np.zeros(length)
    for octave in range(octaves):
        knots = 2 + 2**octave
        total += np.interp(np.linspace(0, knots - 1, length), range(knots), rng.uniform(-1, 1, knots)) / 2**octave
    return total / 2
