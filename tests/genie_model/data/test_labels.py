"""The file of labels, and how labelled videos are divided."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from genie_model.data.labels import Label, held_out_sources, read_labels, write_labels

DIGESTS = [f"{number:064x}" for number in range(3)]


def test_labels_come_back_as_they_were_and_of_two_the_later(tmp_path: Path) -> None:
    path = str(tmp_path / "below" / "labels.json")
    labels = [Label(digest=digest, source="a.mp4", start_seconds=16.0, label=5) for digest in DIGESTS]
    write_labels(path, labels)
    assert list(read_labels(path).values()) == labels
    write_labels(path, [*labels, labels[0].model_copy(update={"label": 1})])
    assert [label.label for label in read_labels(path).values()] == [1, 5, 5]
    first = json.loads(Path(path).read_text())["labels"][0]
    assert set(first) == {"digest", "source", "start_seconds", "label", "labelled_at"}


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("not JSON", "Invalid JSON"),
        ('{"version": 2, "labels": []}', "version"),
        ('{"version": 1}', "labels: Field required"),
        (
            '{"version": 1, "labels": [{"digest": "x", "source": "a", "start_seconds": 0, "label": 5}]}',
            "labels.0.digest",
        ),
    ],
)
def test_what_are_no_labels_is_said_in_one_line(text: str, problem: str, tmp_path: Path) -> None:
    path = tmp_path / "labels.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=problem) as refused:
        read_labels(str(path))
    assert "\n" not in str(refused.value)
    with pytest.raises(ValueError, match=r"make some with `python -m serving\.label`"):
        read_labels(str(tmp_path / "nowhere.json"))


def test_whole_videos_are_held_out_of_either_kind() -> None:
    sources = {f"good {i}": {True} for i in range(10)} | {f"bad {i}": {False} for i in range(4)}
    sources |= {f"both {i}": {True, False} for i in range(2)}
    found = held_out_sources(sources, 0.2, seed=0)
    assert len([source for source in found if source.startswith("good")]) == 2
    assert len(found) == 3
    assert found == held_out_sources(dict(reversed(sources.items())), 0.2, seed=0)
    assert found != held_out_sources(sources, 0.2, seed=1)


def test_too_few_videos_are_told() -> None:
    with pytest.raises(ValueError, match="labels of 3 videos with a 5 and of 1 with a 1 cannot be split by video"):
        held_out_sources({"a": {True}, "b": {True}, "c": {True}, "d": {False}}, 0.2, seed=0)
    assert len(held_out_sources({"a": {True}, "b": {True}, "c": {False}, "d": {False}}, 0.01, seed=0)) == 2
    assert len(held_out_sources({"a": {True, False}, "b": {True, False}}, 0.9, seed=0)) == 2 - 1
