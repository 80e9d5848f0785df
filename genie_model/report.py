"""Metrics and pictures as one HTML page without outside references: what the Kubeflow UI shows for a run."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image

_PAGE = """<!doctype html><meta charset="utf-8"><title>{title}</title>
<style>body {{ font: 15px system-ui; margin: 2em }}
td, th {{ padding: 2px 1.5em 2px 0; text-align: left; font-variant-numeric: tabular-nums }}
img {{ image-rendering: pixelated; max-width: 100%; border: 1px solid #8888 }}</style>
<h1>{title}</h1>{body}
"""


def html_page(title: str, metrics: Mapping[str, float], pictures: Mapping[str, NDArray[np.uint8]]) -> str:
    """`pictures` are uint8 (H, W, 3); a metric with a `<name>_ci95` twin is shown with its 95% interval."""
    rows = "".join(
        f"<tr><td>{html.escape(name)}<td>{value:.4g}"
        + (f" ± {metrics[f'{name}_ci95']:.2g}" if f"{name}_ci95" in metrics else "")
        for name, value in metrics.items()
        if not name.endswith("_ci95")
    )
    return page(title, pictures, f"<table>{rows}</table>", pictures_first=True)


def page(title: str, pictures: Mapping[str, NDArray[np.uint8]], body: str, pictures_first: bool = False) -> str:
    """`body` is HTML, with the `pictures` before or behind it."""
    shown = "".join(
        f'<h2>{html.escape(name.replace("_", " "))}</h2><img alt="{html.escape(name)}" src="{_data_uri(picture)}">'
        for name, picture in pictures.items()
    )
    return _PAGE.format(title=html.escape(title), body=shown + body if pictures_first else body + shown)


def markdown_table(rows: Sequence[tuple[str, ...]]) -> str:
    """The first row is the head."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]])


def html_table(rows: Sequence[tuple[str, ...]]) -> str:
    """The first row is the head."""
    head, *body = ("".join(f"<td>{html.escape(cell)}" for cell in row) for row in rows)
    return f"<table><tr>{head.replace('<td>', '<th>')}" + "".join(f"<tr>{row}" for row in body) + "</table>"


def _data_uri(picture_HWC: NDArray[np.uint8]) -> str:
    png = io.BytesIO()
    Image.fromarray(picture_HWC).save(png, "PNG")
    return "data:image/png;base64," + base64.b64encode(png.getvalue()).decode()
