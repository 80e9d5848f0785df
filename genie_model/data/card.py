"""A data set's card (Gebru et al., 2021, in short): what is in it, what is not, from whom, and how it came about.

Everything in it is read off the finished data set, so that it cannot say what is not so.
"""

from __future__ import annotations

import html
import io
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from genie_model import files
from genie_model.data.columns import Columns
from genie_model.data.opt_out import OptOuts
from genie_model.data.sources import REASONS
from genie_model.data.store import VideoStore
from genie_model.report import html_table, markdown_table, page

Rows = list[tuple[str, ...]]

SHEET = (6, 8)  # clips in a column and in a row of the contact sheet
_LOOKED_AT = 64  # clips of each split whose provenance is read for the card
_MOST = 20  # licences, owners and notes that are named


def summarise(data_uri: str, lines: Iterable[Mapping[str, Any]], stores: Sequence[VideoStore]) -> dict[str, Any]:
    """The report in numbers; `lines` are of every video, read once, one after the other. Who opted out is not named."""
    opt_outs = OptOuts.read(data_uri)
    counts: Counter[str] = Counter()
    rejected, notes, licences, owners = Counter[str](), Counter[str](), Counter[str](), Counter[str]()
    for line in lines:
        counts["videos"] += 1
        counts["made"] += line["clips"]
        notes.update(note.partition(":")[0] for note in line["notes"])
        if "reason" in line:
            rejected[line["reason"]] += 1
        elif opt_outs.hides({"source": line["source"], "owner": line.get("owner", "")}):
            rejected["opted out"] += 1
        else:
            licences[line.get("licence", "not said")] += 1
            owners[line.get("owner", "not said")] += 1
    clips = sum(store.num_episodes for store in stores)
    fps = stores[0].meta["data"]["ingest"]["fps"]
    return {
        "videos": counts["videos"],
        "clips": clips,
        "hours": sum(store.num_frames for store in stores) / fps / 3600,
        "not_listed": counts["made"] - clips,  # copies of others, and what was opted out since
        "rejected": {reason: rejected[reason] for reason in REASONS if rejected[reason]},
        "notes": dict(notes.most_common(_MOST)),
        "licences": dict(licences.most_common(_MOST)),
        "owners": dict(owners.most_common(_MOST)),
        "splits": {store.split: _of_split(store, fps) for store in stores},
    }


def write(data_uri: str, lines: Iterable[Mapping[str, Any]], stores: Sequence[VideoStore]) -> dict[str, Any]:
    """Writes report.json, card.md, card.html and contact_sheet.png; returns the report."""
    found = summarise(data_uri, lines, stores)
    sections, sheet = _sections(data_uri, found, stores), contact_sheet(stores[-1])
    title = f"Data set card: {data_uri.rpartition('/')[2]}"
    markdown, body = [f"# {title}"], []
    for heading, text, rows in sections:
        markdown += [f"## {heading}", text, *([markdown_table(rows)] if rows else [])]
        body += [f"<h2>{html.escape(heading)}</h2><p>{html.escape(text)}</p>", html_table(rows) if rows else ""]
    png = io.BytesIO()
    Image.fromarray(sheet).save(png, "PNG")
    parts = {
        "report.json": json.dumps(found, indent=2),
        "card.md": "\n\n".join([*(part for part in markdown if part), "![contact sheet](contact_sheet.png)"]) + "\n",
        "card.html": page(title, {"contact_sheet": sheet}, "".join(body)),
    }
    files.write_atomic(f"{data_uri}/contact_sheet.png", png.getvalue())
    for name, text in parts.items():
        files.write_atomic(f"{data_uri}/{name}", text.encode())
    return found


def contact_sheet(store: VideoStore) -> NDArray[np.uint8]:
    """uint8 (H, W, 3): the middle frame of clips spread evenly over the store, in its order."""
    rows, columns = SHEET
    height, width, _ = store.meta["frame_shape"]
    sheet_HWC = np.zeros((rows * height, columns * width, 3), np.uint8)
    middle = store.num_frames // store.num_episodes // 2  # all have the same length
    for place, episode in enumerate(_spread(store, rows * columns)):
        row, column = (place // columns) * height, (place % columns) * width
        sheet_HWC[row : row + height, column : column + width] = store.frames(episode, middle, 1)[0]
    used = -(-min(store.num_episodes, rows * columns) // columns)
    return sheet_HWC[: used * height]


def _spread(store: VideoStore, number: int) -> list[int]:
    """At most so many episodes, evenly spread."""
    return sorted({int(x) for x in np.linspace(0, store.num_episodes - 1, number)})


def _of_split(store: VideoStore, fps: float) -> dict[str, Any]:
    return {
        "clips": store.num_episodes,
        "frames": store.num_frames,
        "hours": store.num_frames / fps / 3600,
        "shards": store.num_shards,
        "digest": store.digest,
    }


def _sections(data_uri: str, found: Mapping[str, Any], stores: Sequence[VideoStore]) -> list[tuple[str, str, Rows]]:
    """Heading, a paragraph, and a table that may be empty."""
    meta = stores[0].meta
    asked, (height, width, _) = meta["data"]["ingest"], meta["frame_shape"]
    clip = f"{asked['clip_seconds']:g} s at {asked['fps']:g} frames a second, {width} x {height} pixels"
    splits = [
        (name, f"{of['clips']:,}", f"{of['hours']:.2f}", f"{of['frames']:,}", str(of["shards"]), of["digest"])
        for name, of in found["splits"].items()
    ]
    return [
        (
            "What is in it",
            f"{found['clips']:,} clips, {found['hours']:.2f} hours, of {found['videos']:,} videos. A clip is {clip}. "
            "Videos are held out whole. A digest names the listed clips, with what was opted out.",
            [("split", "clips", "hours", "frames", "shards", "digest"), *splits],
        ),
        (
            "How it came about",
            f"A {meta['data']['source_kind']} at {meta['data']['source_uri']}; code and format: genie_model ingest.",
            [("rule", "value"), *((name, str(value)) for name, value in asked.items())],
        ),
        (
            "What was left out",
            f"{sum(found['rejected'].values()):,} videos make no clip, for these reasons; report/ names each. "
            f"{found['not_listed']:,} clips lie in the shards unlisted: copies of others, or opted out since.",
            _counted("reason", found["rejected"]),
        ),
        ("What was done to videos", "So that all frames are alike.", _counted("what", found["notes"])),
        ("No actions", *_no_actions(data_uri, stores)),
        (
            "From whom",
            f"As the source says; at most {_MOST} of each are named. Each clip carries its own provenance.",
            [
                ("field", "says", "videos with clips"),
                *(("licence", *row) for row in _counted("", found["licences"])[1:]),
                *(("owner", *row) for row in _counted("", found["owners"])[1:]),
            ],
        ),
        (
            "Who does not want to be in it",
            "A line in opt_out.txt beside this card (a video's id, owner:NAME or sha256:DIGEST of a clip) hides clips "
            "from everything that reads the data set: python -m genie_model opt-out --data URI ID. The same ingest "
            "again renews this card and its contact sheet.",
            [],
        ),
    ]


def _counted(what: str, counts: Mapping[str, int]) -> Rows:
    return (
        [
            (what, "videos"),
            *((" ".join(name.replace("|", "/").split()), f"{count:,}") for name, count in counts.items()),
        ]
        if counts
        else []
    )


def _no_actions(data_uri: str, stores: Sequence[VideoStore]) -> tuple[str, Rows]:
    """That nothing but frames is there to learn from, as far as the files say."""
    truth = [name for s in stores for name in files.names(f"{data_uri}/{s.split}") if name.startswith("truth")]
    looked_at = [store.about(episode) for store in stores for episode in _spread(store, _LOOKED_AT)]
    about = sorted({name for each in looked_at for name in each})
    text = (
        "Training reads frames and nothing else: what lies beside them is listed here, and none of it is an input of "
        f"any model. Files of true actions: {len(truth)}."
    )
    return text, [
        ("where", "what"),
        ("index, of each clip", ", ".join(field.name for field in fields(Columns))),
        (f"shards, of {len(looked_at)} clips that were looked at", ", ".join(about)),
        ("files of true actions", ", ".join(truth) or "none"),
    ]
