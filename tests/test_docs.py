"""What the documentation tells people to type is understood, and what it points to is there."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from pipelines.arguments import parser

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("manifests/**/*.md")])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_a_page_is_of_this_checkout(page: Path) -> None:
    text = page.read_text()
    links = [link for link in re.findall(r"\]\(([^)#\s]+)", text) if "://" not in link]
    assert [link for link in links if not (page.parent / link).exists()] == []
    paths = re.findall(r"(?<![\w/.-])(?:manifests|docs|genie_model|pipelines|components|serving)/[\w./-]*+(?!\*)", text)
    paths = [path.rstrip("./-") for path in paths if "NAME" not in path]
    places = (ROOT, ROOT / "manifests")  # its README is read there
    assert [path for path in paths if not any((place / path).exists() for place in places)] == []
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert set(re.findall(r"(?m)(?:`|^)make ([a-z-]+)", text)) <= set(targets)
    blocks = "\n".join(re.findall(r"```sh\n(.*?)```", text, re.DOTALL)).replace("\\\n", " ")
    inline = [" ".join(found.split()) for found in re.findall(r"`(python -m pipelines [^`]+)`", text)]
    for line in [*blocks.splitlines(), *inline]:
        if line.startswith("python -m pipelines ") and "..." not in line and "STUDY" not in line:
            parser("").parse_args(shlex.split(line, comments=True)[3:])
