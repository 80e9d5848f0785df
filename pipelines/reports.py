"""A study's report, made from MLflow and written to files."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.local import say

if TYPE_CHECKING:
    from genie_model.tracking import Reported


def write_report(found: Reported, name: str, folder: Path) -> None:
    """NAME.html, NAME.md with its pictures, and the models' card."""
    from PIL import Image

    comparison = found.comparison
    folder.mkdir(parents=True, exist_ok=True)
    for picture, image_HWC in comparison.pictures.items():
        Image.fromarray(image_HWC).save(folder / f"{name}_{picture}.png")
    files = {f"{name}.html": comparison.html(), f"{name}_model_card.md": found.card}
    files[f"{name}.md"] = comparison.markdown(f"{name}_{{}}.png")
    for file, text in files.items():
        (folder / file).write_text(text)
    print(files[f"{name}.md"])
    say(f"written to {folder}: {', '.join(files)} and its pictures")
