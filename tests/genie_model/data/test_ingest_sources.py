"""Folders, buckets and manifests as lists of videos, and which of them the keywords want."""

from __future__ import annotations

import json
import pickle

import fsspec
import pytest

pq = pytest.importorskip("pyarrow.parquet", reason="pyarrow (the video extra) is not installed")

import pyarrow as pa  # noqa: E402

from genie_model.data.keywords import Keywords  # noqa: E402
from genie_model.data.sources import videos_at  # noqa: E402

ROWS = [
    {"path": "a.mp4", "title": "A, with a comma", "description": "two\nlines", "owner": "ann", "licence": "CC0"},
    {"path": "sub/b.mp4", "title": "B", "description": "", "owner": "", "licence": "", "channel": "7"},
]


def write_csv(path, rows):
    import csv

    with path.open("w", newline="", encoding="utf-8-sig") as file:  # as a spreadsheet saves it
        writer = csv.DictWriter(file, list(dict.fromkeys(name for row in rows for name in row)))
        writer.writeheader()
        writer.writerows(rows)


def test_every_file_of_a_folder_is_listed(tmp_path):
    for name in ("b/2.mp4", "b/1.webm", "a.txt", "my_first-level.mp4", ".hidden", "list.csv"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    listing = videos_at(f"{tmp_path}/")
    assert listing.kind == "folder"
    assert [video.id for video in listing] == ["a.txt", "b/1.webm", "b/2.mp4", "my_first-level.mp4"]
    assert [video.id for video in listing] == [video.id for video in listing], "read as often as is needed"
    last = list(listing)[-1]
    assert (last.title, last.uri) == ("my first level", f"{tmp_path}/my_first-level.mp4")
    assert pickle.loads(pickle.dumps(last)) == last, "other processes decode it"
    (tmp_path / "a.txt").write_bytes(b"xy")
    assert next(iter(listing)).version != last.version, "a change is seen"


def test_a_bucket_s_prefix():
    fs = fsspec.filesystem("memory")
    for name in ("a.mp4", "deep/er/b.mp4"):
        fs.pipe_file(f"/bucket/videos/{name}", b"x")
    fs.pipe_file("/bucket/other/c.mp4", b"x")
    found = list(videos_at("memory://bucket/videos"))
    assert [video.uri for video in found] == ["memory://bucket/videos/a.mp4", "memory://bucket/videos/deep/er/b.mp4"]
    with fsspec.open(found[1].uri) as file:
        assert file.read() == b"x"


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_a_manifest(tmp_path, kind):
    if kind == "csv":
        write_csv(tmp_path / "list.csv", ROWS)
    else:
        pq.write_table(
            pa.Table.from_pylist([ROWS[1], ROWS[0]][::-1]).append_column("year", [[1990, None]]),
            tmp_path / "list.parquet",
        )
    first, second = videos_at(f"{tmp_path}/list.{kind}")
    assert (first.id, first.uri, first.title, first.description) == (
        "a.mp4", f"{tmp_path}/a.mp4", "A, with a comma", "two\nlines"
    )  # fmt: skip
    assert (first.owner, first.licence) == ("ann", "CC0")
    assert second.uri == f"{tmp_path}/sub/b.mp4"
    assert first.provenance()["source"] == "a.mp4"
    if kind == "csv":
        assert second.provenance() == {"source": "sub/b.mp4", "uri": second.uri, "title": "B", "channel": "7"}
    else:
        assert first.about == {"year": "1990"}


def test_a_manifest_names_ids_and_any_place(tmp_path):
    write_csv(tmp_path / "list.csv", [{"id": "x1", "uri": "memory://bucket/a.mp4"}, {"id": "", "uri": "/data/b.mp4"}])
    found = [(video.id, video.uri) for video in videos_at(f"{tmp_path}/list.csv")]
    assert found == [("x1", "memory://bucket/a.mp4"), ("/data/b.mp4", "/data/b.mp4")]


def test_what_is_no_source(tmp_path):
    with pytest.raises(ValueError, match="there is no folder or manifest"):
        videos_at(f"{tmp_path}/nothing")
    (tmp_path / "list.csv").write_text("title\nA\n")
    with pytest.raises(ValueError, match="row 1 has no uri or path"):
        list(videos_at(f"{tmp_path}/list.csv"))
    (tmp_path / "list.csv").write_text("id,path\nx,a.mp4\n,b.mp4\nx,c.mp4\nb.mp4,d.mp4\n")
    with pytest.raises(ValueError, match=r"rows 1, 3 have the same id, x: give each"):
        list(videos_at(f"{tmp_path}/list.csv"))
    (tmp_path / "list.csv").write_bytes(b"path\n\xff\xfe.mp4\n")
    with pytest.raises(ValueError, match="is no CSV in UTF-8"):
        list(videos_at(f"{tmp_path}/list.csv"))
    (tmp_path / "list.parquet").write_bytes(b"no Parquet")
    with pytest.raises(ValueError, match=r"list\.parquet is no Parquet file"):
        list(videos_at(f"{tmp_path}/list.parquet"))


@pytest.mark.parametrize(
    ("title", "description", "refused"),
    [
        ("My favourite Platformer - level 3", "", ""),
        ("A 2D  PLATFORMER", "my first speedrun", ""),
        ("Let\N{RIGHT SINGLE QUOTATION MARK}s play a platformer", "", ""),
        ("Cooking rice", "a walkthrough", "no word of the genre"),
        ("Platformerish playthrough", "", "no word of the genre"),
        ("A platformer", "talk about games", "has an action word"),
        ("A platformer: unboxing the gameplay", "", "'unboxing'"),
        ("A platformer, the movie gameplay", "", "'movie'"),
        ("A platformer, gameplay", "not the movie", ""),
    ],
)
def test_the_paper_s_three_rules(title, description, refused):
    why = Keywords.read("platformers").refusal(title, description)
    assert refused in why
    assert bool(refused) == bool(why)


def test_keywords_are_data(tmp_path):
    (tmp_path / "own.json").write_text(json.dumps({"title": ["Élan"]}))
    own = Keywords.read(f"{tmp_path}/own.json")
    assert own.refusal("the ÉLAN of it", "") == ""
    assert own.refusal("élans", "") != ""
    assert Keywords().refusal("anything", "") == ""
    (tmp_path / "own.toml").write_text('titel = ["a"]')
    with pytest.raises(ValueError, match=r"own.toml.*title, action and negation.*titel"):
        Keywords.read(f"{tmp_path}/own.toml")
    (tmp_path / "own.toml").write_text("title = [")
    with pytest.raises(ValueError, match="is no TOML"):
        Keywords.read(f"{tmp_path}/own.toml")
    with pytest.raises(ValueError, match="there is no file"):
        Keywords.read(f"{tmp_path}/none.toml")
