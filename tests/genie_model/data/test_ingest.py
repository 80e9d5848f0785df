"""Videos become a data set: every video is in the report, and a run that is killed loses and doubles nothing."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec
import numpy as np
import pytest

pytest.importorskip("av", reason="PyAV (the video extra) is not installed")

from films import PQ, Deadly, Hanging, film, sound

from genie_model import cache
from genie_model.data import clipping
from genie_model.data.ingest import ingest
from genie_model.data.opt_out import OptOuts, opt_out
from genie_model.data.sources import FileVideo, Framing, videos_at
from genie_model.data.store import VideoStore
from genie_model.data.video import decode
from genie_model.presets import get_preset

CLIP = 16
CONFIG = get_preset("tiny").with_overrides(
    "ingest.clip_seconds=1.6", "ingest.clips_per_shard=4", "ingest.eval_share=0.25", "ingest.workers=2",
    "ingest.seed=9", "data.frame_height=32", "data.frame_width=48",
)  # fmt: skip


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("GENIE_CACHE_DIR", str(tmp_path / "cache"))


@pytest.fixture
def threads(monkeypatch):
    """Threads in place of processes, which take a second to start."""
    monkeypatch.setattr(clipping, "_pool", ThreadPoolExecutor)


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """A folder with nine good videos of one clip to six, a copy of one, and what goes wrong."""
    folder = tmp_path_factory.mktemp("videos")
    for number in range(9):
        film(folder / f"good{number}.mp4", frames=17 + 16 * (number % 6), fps=10, size=(32, 48), first=number * 100)
    (folder / "copy.mp4").write_bytes((folder / "good5.mp4").read_bytes())
    film(folder / "hdr.mp4", frames=20, fps=10, size=(32, 48), codec="libx264", transfer=PQ)
    film(folder / "single.mp4", frames=1)
    (folder / "cut.mp4").write_bytes((folder / "good5.mp4").read_bytes()[:2000])
    (folder / "empty.mp4").write_bytes(b"")
    (folder / "notes.txt").write_text("not a video")
    sound(folder / "sound.mp4")
    return folder


def contents(data_uri):
    """Digest of every file, but for what a killed writer leaves."""
    paths = sorted(path for path in Path(data_uri).rglob("*") if path.is_file() and path.suffix != ".tmp")
    return {str(path.relative_to(data_uri)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def report(data_uri):
    """Lines by the videos' ids."""
    parts = sorted((Path(data_uri) / "report").iterdir())
    lines = [json.loads(line) for part in parts for line in part.read_text().splitlines()[1:]]
    assert len({line["source"] for line in lines}) == len(lines), "each video is told of once"
    return {line["source"]: line for line in lines}


def clips(data_uri):
    """(split, video, start) of every listed clip, and its frames."""
    for split in ("train", "eval"):
        store = VideoStore.open(f"{data_uri}/{split}")
        for episode in range(store.num_episodes):
            about = store.about(episode)
            yield (split, about["source"], about["start_seconds"]), store.frames(episode, 0, CLIP), about


def test_every_video_becomes_clips_or_has_a_reason(videos, tmp_path):
    data_uri = ingest(CONFIG, str(videos), str(tmp_path))
    lines = report(data_uri)
    assert set(lines) == {path.name for path in videos.iterdir()}
    assert {name: line["reason"] for name, line in lines.items() if "reason" in line} == {
        "cut.mp4": "truncated", "empty.mp4": "empty", "notes.txt": "not a video", "single.mp4": "too short",
        "sound.mp4": "no picture",
    }  # fmt: skip
    assert lines["hdr.mp4"]["notes"] == ["HDR (PQ) made SDR"]
    assert [lines[f"good{n}.mp4"]["clips"] for n in range(9)] == [1, 2, 3, 4, 5, 6, 1, 2, 3]
    seen = set()
    for (split, source, start), frames_THWC, about in clips(data_uri):
        assert about["digest"] == hashlib.sha256(frames_THWC.tobytes()).hexdigest()
        assert about["digest"] not in seen, "a clip is listed once"
        seen.add(about["digest"])
        assert lines[source]["split"] == split, "a video is held out whole, or not at all"
        with open(videos / source, "rb") as file:
            whole = np.stack(list(decode(file, Framing(10.0, 32, 48))))
        first = round(start * 10)
        assert (whole[first : first + CLIP] == frames_THWC).all()
    assert len(seen) == 27 + 1, "those of good0 to good8, and hdr's"


def test_the_card_says_what_is_there(videos, tmp_path, threads):
    rows = "id,path,title,description,owner,licence\n" + "".join(
        f"{name},{videos}/{name},{title},,{owner},{licence}\n"
        for name, title, owner, licence in (
            ("good5.mp4", "A <platformer> speedrun", "ann", '"CC-BY-4.0\n\n# All rights"'),
            ("good4.mp4", "Platformer: all levels", "bob", "CC0"),
            ("good2.mp4", "Platformer: all levels", "cid", "CC0"),
            ("good3.mp4", "Platformer: the movie", "bob", "CC0"),
            ("gone.mp4", "Platformer: all levels", "bob", "CC0"),
        )
    )
    (tmp_path / "list.csv").write_text(rows)
    config = CONFIG.with_overrides("ingest.keywords=platformers")
    data_uri = ingest(config, f"{tmp_path}/list.csv", str(tmp_path))
    found = json.loads((Path(data_uri) / "report.json").read_text())
    assert found["clips"] == 14
    assert found["hours"] == pytest.approx(14 * 1.6 / 3600)
    assert found["rejected"] == {"missing": 1, "keywords": 1}
    assert found["owners"] == {"ann": 1, "bob": 1, "cid": 1}
    card, page = (Path(data_uri, name).read_text() for name in ("card.md", "card.html"))
    for text in (card, page):
        assert "CC-BY-4.0 # All rights" in text
        assert VideoStore.open(f"{data_uri}/train").digest in text
        assert "Files of true actions: 0" in text
    assert "<img" in page
    assert Path(data_uri, "contact_sheet.png").read_bytes()[:4] == b"\x89PNG"
    assert not list(Path(data_uri).rglob("truth*"))
    opt_out(data_uri, ["owner:bob"])
    ingest(config, f"{tmp_path}/list.csv", str(tmp_path))
    assert "bob" not in Path(data_uri, "card.md").read_text()
    assert json.loads((Path(data_uri) / "report.json").read_text())["rejected"]["opted out"] == 1


def test_a_length_that_is_no_multiple_of_a_frame_s(videos, tmp_path, threads):
    """A clip has whole frames, and says when its own first one is shown."""
    data_uri = ingest(CONFIG.with_overrides("ingest.clip_seconds=1.64"), str(videos), str(tmp_path))
    starts = {start for (_, source, start), *_ in clips(data_uri) if source in ("good5.mp4", "copy.mp4")}
    assert starts == {0.0, 1.6, 3.2, 4.8, 6.4, 8.0}


def test_what_decides_the_clips_names_the_data_set(videos, tmp_path, threads):
    made = {ingest(CONFIG, str(videos), str(tmp_path))}
    made.add(ingest(CONFIG.with_overrides("ingest.workers=1", "seed=5"), str(videos), str(tmp_path)))
    assert len(made) == 1
    for change in ("ingest.aspect=crop", "data.frame_width=40", "ingest.seed=1"):
        made.add(ingest(CONFIG.with_overrides(change), str(videos), str(tmp_path)))
    assert len(made) == 4


def test_opted_out_from_the_beginning(videos, tmp_path, threads):
    data_uri = ingest(CONFIG, str(videos), str(tmp_path))
    gone = next(about for _, _, about in clips(data_uri) if about["source"] == "good4.mp4")
    (tmp_path / "out.txt").write_text(f"# people\ngood5.mp4\ncopy.mp4\nsha256:{gone['digest']}\n")
    again = ingest(CONFIG.with_overrides(f"ingest.opt_out={tmp_path}/out.txt"), str(videos), str(tmp_path))
    assert again != data_uri
    left = {(about["source"], about["digest"]) for _, _, about in clips(again)}
    before = {(about["source"], about["digest"]) for _, _, about in clips(data_uri)}
    assert before - left == {(source, digest) for source, digest in before
                             if source in ("good5.mp4", "copy.mp4") or digest == gone["digest"]}  # fmt: skip
    assert report(again)["good5.mp4"]["reason"] == "opted out"


def test_a_split_without_a_clip(tmp_path, threads):
    (tmp_path / "videos").mkdir()
    film(tmp_path / "videos" / "a.mp4", frames=40, fps=10)
    with pytest.raises(ValueError, match=r"makes a clip for the train split, of 0 videos.*train-00000.jsonl says why"):
        ingest(CONFIG, f"{tmp_path}/videos", str(tmp_path))


def test_junk_that_would_be_held_out_is_not_all_that_is(videos, tmp_path, threads, monkeypatch):
    """However few videos, and whenever it is stopped: the next one that makes a clip is held out."""
    (tmp_path / "videos").mkdir()
    for number in range(6):
        (tmp_path / "videos" / f"notes{number}.txt").write_text("not a video")
    for number in range(1, 4):
        film(tmp_path / "videos" / f"{number}.mp4", frames=40, fps=10, size=(32, 48), first=number * 100)
    write, stopped, others = os.replace, 0, 0
    for seed in range(8):
        config = CONFIG.with_overrides(f"ingest.seed={seed}", "ingest.eval_share=0.01")
        whole = ingest(config, f"{tmp_path}/videos", f"{tmp_path}/whole")
        assert sorted(line["clips"] for line in report(whole).values()) == [0] * 6 + [2] * 3
        assert [VideoStore.open(f"{whole}/{split}").num_episodes for split in ("eval", "train")] == [2, 4]
        others += Path(whole, "report", "held_out.txt").exists()
        for stop in range(4 if others == 1 and not stopped else 0):
            writes = itertools.count()

            def stopping(source, target, writes=writes, stop=stop):
                write(source, target)
                if next(writes) == stop:
                    raise KilledError

            monkeypatch.setattr(os, "replace", stopping)
            with pytest.raises(KilledError):
                ingest(config, f"{tmp_path}/videos", f"{tmp_path}/{stop}")
            monkeypatch.setattr(os, "replace", write)
            stopped += contents(ingest(config, f"{tmp_path}/videos", f"{tmp_path}/{stop}")) == contents(whole)
    assert others > 1
    assert stopped == 4


def test_a_manifest_s_columns_are_not_taken_for_the_report_s(videos, tmp_path, threads):
    rows = "".join(f"{videos}/good{n}.mp4,because,CC0\n" for n in range(4))
    (tmp_path / "list.csv").write_text("path,reason,licence\n" + rows)
    data_uri = ingest(CONFIG, f"{tmp_path}/list.csv", str(tmp_path))
    assert not any("reason" in line for line in report(data_uri).values())
    assert json.loads((Path(data_uri) / "report.json").read_text())["licences"] == {"CC0": 4}
    assert all(about["reason"] == "because" for _, _, about in clips(data_uri))


def test_files_of_any_name_and_links(videos, tmp_path, threads):
    folder = tmp_path / "videos"
    folder.mkdir()
    names = [b"a::b.mp4", b"\xff\xfe.mp4", b"new\nline.mp4", b"#1 [x]?.mp4"]
    for number, name in enumerate(names):
        film(folder / "new.mp4", frames=20, fps=10, size=(32, 48), first=100 * number)
        os.rename(folder / "new.mp4", os.path.join(os.fsencode(folder), name))
    (folder / "link.mp4").symlink_to(videos / "good5.mp4")
    (folder / "broken.mp4").symlink_to("nowhere")
    (folder / "itself.mp4").symlink_to("itself.mp4")
    (folder / "above").symlink_to(tmp_path)
    os.mkfifo(folder / "pipe.mp4")
    data_uri = ingest(CONFIG, str(folder), str(tmp_path))
    told = {name: line.get("reason", line["clips"]) for name, line in report(data_uri).items()}
    assert told == {
        "a::b.mp4": 1, r"\udcff\udcfe.mp4": 1, r"new\nline.mp4": 1, "#1 [x]?.mp4": 1, "link.mp4": 6,
        "broken.mp4": "missing", "itself.mp4": "missing", "above": "missing",
    }  # fmt: skip
    opt_out(data_uri, ["#1 [x]?.mp4", r"new\nline.mp4", r"\udcff\udcfe.mp4"])
    assert {about["source"] for *_, about in clips(data_uri)} == {"a::b.mp4", "link.mp4"}


def test_a_row_that_names_no_file_costs_that_row_alone(videos, tmp_path, threads):
    places = [*(f"{videos}/good{n}.mp4" for n in range(4)), str(videos), "/dev/zero", "nothing://x/y.mp4"]
    (tmp_path / "list.csv").write_text("path\n" + "\n".join(places))
    told = report(ingest(CONFIG, f"{tmp_path}/list.csv", str(tmp_path)))
    assert {name: line["reason"] for name, line in told.items() if "reason" in line} == {
        str(videos): "missing", "/dev/zero": "missing", "nothing://x/y.mp4": "missing"
    }  # fmt: skip


class DeadStore(fsspec.AbstractFileSystem):
    """A bucket that still lists what it has, and gives and takes nothing."""

    protocol = "dead"

    def ls(self, path, detail=True, **kwargs):
        found = [
            {"name": f"bucket/{n}.mp4", "size": 9, "type": "file"} for n in range(8) if path.strip("/") == "bucket"
        ]
        return found if detail else [info["name"] for info in found]

    def _open(self, path, mode="rb", **kwargs):
        raise ConnectionError("no answer")


def test_a_dead_bucket_costs_its_own_videos_and_a_dead_root_the_run(videos, tmp_path, threads, monkeypatch):
    monkeypatch.setattr(cache, "_WAITS", (0.0,))
    fsspec.register_implementation("dead", DeadStore, clobber=True)
    rows = ["uri", *(f"{videos}/good{n}.mp4" for n in range(9)), "dead://bucket/a.mp4"]
    (tmp_path / "list.csv").write_text("\n".join(rows))
    data_uri = ingest(CONFIG, f"{tmp_path}/list.csv", str(tmp_path))
    line = report(data_uri)["dead://bucket/a.mp4"]
    assert line["reason"] == "unreachable"
    assert "could not be read in 2 tries, the last: ConnectionError('no answer')" in line["detail"]
    with pytest.raises(OSError, match="no answer"):
        ingest(CONFIG, f"{tmp_path}/list.csv", "dead://bucket/root")
    with pytest.raises(OSError, match="could not be read in 2 tries"):  # it is the source itself
        ingest(CONFIG, "dead://bucket", f"{tmp_path}/prefix")


def test_a_clip_shorter_than_training_s(videos, tmp_path):
    with pytest.raises(ValueError, match=r"has 10 frames, and training takes data\.clip_length=16"):
        ingest(CONFIG.with_overrides("ingest.clip_seconds=1", "data.clip_length=16"), str(videos), str(tmp_path))


def test_a_bucket(videos, tmp_path, threads):
    """From a bucket to a bucket; the same clips."""
    fs = fsspec.filesystem("memory")
    fs.put(str(videos), "/ingest-source", recursive=True)
    data_uri = ingest(CONFIG, "memory://ingest-source", "memory://ingest-root")
    here = ingest(CONFIG, str(videos), str(tmp_path))
    assert sorted(name for name, *_ in clips(data_uri)) == sorted(name for name, *_ in clips(here))


class KilledError(BaseException):
    pass


def test_a_stop_at_any_write_is_made_good(videos, tmp_path, threads, monkeypatch):
    """Before and after each file that is put in its place."""
    whole = contents(ingest(CONFIG, str(videos), f"{tmp_path}/whole"))
    replace, writes = os.replace, itertools.count()
    for stop in range(1000):
        writes = itertools.count()

        def stopping(source, target, writes=writes, stop=stop):
            now = next(writes)
            if now == stop and stop % 2:
                raise KilledError
            replace(source, target)
            if now == stop:
                raise KilledError

        monkeypatch.setattr(os, "replace", stopping)
        try:
            data_uri = ingest(CONFIG, str(videos), f"{tmp_path}/{stop % 7}")
        except KilledError:
            continue
        finally:
            monkeypatch.setattr(os, "replace", replace)
        break
    assert stop > 20, "so many files were written"
    for root in range(7):
        assert contents(ingest(CONFIG, str(videos), f"{tmp_path}/{root}")) == whole
    assert data_uri


def test_a_lost_shard_is_made_again(videos, tmp_path, threads):
    data_uri = ingest(CONFIG, str(videos), str(tmp_path))
    whole = contents(data_uri)
    for lost in ("train/shard-00001.tar", "train/shard-00002.json", "eval/shard-00000.tar"):
        Path(data_uri, lost).unlink()
    assert contents(ingest(CONFIG, str(videos), str(tmp_path))) == whole


RUN = """
import sys
from genie_model.config import Config
from genie_model.data.ingest import ingest
if __name__ == "__main__":
    ingest(Config.from_json(sys.argv[1]), sys.argv[2], sys.argv[3])
"""


def test_kill_9(videos, tmp_path, threads):
    """Of the whole run, its processes left to themselves; then it goes on."""
    (tmp_path / "run.py").write_text(RUN)
    command = [sys.executable, str(tmp_path / "run.py"), CONFIG.to_json(), str(videos), f"{tmp_path}/killed"]
    generator, shards = random.Random(0), 0
    for _ in range(2):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None and len(list(tmp_path.glob("killed/datasets/*/report/*"))) <= shards:
            time.sleep(0.01)
        time.sleep(generator.random() * 0.1)
        process.send_signal(signal.SIGKILL)
        process.wait()
        shards = len(list(tmp_path.glob("killed/datasets/*/report/*")))
    data_uri = ingest(CONFIG, str(videos), f"{tmp_path}/killed")
    assert contents(data_uri) == contents(ingest(CONFIG, str(videos), f"{tmp_path}/whole"))


def test_a_video_that_ends_its_process_or_hangs_in_it(videos, tmp_path):
    """Those beside it are made as ever."""
    good = [FileVideo(f"good{n}", f"{videos}/good{n}.mp4") for n in range(4)]
    listed = [good[0], Deadly("deadly", "nowhere"), good[1], Hanging("hanging", "nowhere"), *good[2:]]
    rules = clipping.Rules(Framing(10.0, 32, 48), CLIP, 1.6, "zstd", 18, OptOuts.of([]), stall_seconds=3)
    with clipping.Crew(rules, 2, tmp_path) as crew:
        found = {
            video.id: (outcome.clips, outcome.rejected and outcome.rejected.reason, len(list(outcome.read())))
            for video, outcome in crew.outcomes(iter(listed), lambda video: None)
        }
    assert list(found) == ["good0", "deadly", "good1", "hanging", "good2", "good3"]
    assert found.pop("deadly") == (0, "crashed", 0)
    assert found.pop("hanging") == (0, "stalled", 0)
    assert list(found.values()) == [(n + 1, None, n + 1) for n in range(4)]
    for never in ("inf", "1e12"):  # what no timer takes would end the run
        with pytest.raises(ValueError, match="stall_seconds"):
            CONFIG.with_overrides(f"ingest.stall_seconds={never}")


def test_a_list_of_any_length_is_read_as_it_goes(videos, tmp_path, threads):
    """What is decoded is a few videos ahead of what is written, however many follow."""
    asked = itertools.count()
    endless = (FileVideo(f"{next(asked)}", f"{videos}/good0.mp4") for _ in itertools.repeat(None))
    rules = clipping.Rules(Framing(10.0, 32, 48), CLIP, 1.6, "zstd", 18, OptOuts.of([]), stall_seconds=60)
    with clipping.Crew(rules, 2, tmp_path) as crew:
        for _, outcome in itertools.islice(crew.outcomes(endless, lambda video: None), 40):
            outcome.forget()
    assert next(asked) <= 40 + 2 * 8
    assert len(list(tmp_path.glob("*.clips"))) <= 2 * 8
    assert videos_at(str(videos)).kind == "folder"
