"""The videos of the worked example: what is asked for, and that broken ones are broken as they say."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np
import pytest

from examples import make_videos
from examples.make_videos import Recording, Scene, make, pictures, plan


def recording(broken: str = "", suffix: str = "mp4", kind: str = "menu") -> Recording:
    return Recording(f"some.{suffix}", "", "", "", "", (Scene(kind, "coinrun", 1),), seed=0, broken=broken)


def decoded(path: Path) -> list[av.VideoFrame]:
    with av.open(str(path)) as container:
        return list(container.decode(video=0))


def test_the_plan_has_everything_and_is_repeatable() -> None:
    recordings = plan(1.0, seed=0)
    assert recordings == plan(1.0, seed=0) != plan(1.0, seed=1)
    assert len({r.name for r in recordings}) == len(recordings) >= 100
    scenes = [scene for r in recordings for scene in r.scenes]
    assert {scene.kind for scene in scenes} == {"game", "other", "menu", "face", "slides"}
    assert {scene.game for scene in scenes} >= {*make_videos.PLATFORMERS, *make_videos.OTHERS}
    assert all("platformer" in r.title and r.owner for r in recordings if not r.name.startswith("telling"))


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "webm"])
def test_an_ordinary_file_has_its_rate_and_size(suffix: str, tmp_path: Path) -> None:
    make(recording(suffix=suffix), str(tmp_path))
    frames = decoded(tmp_path / f"some.{suffix}")
    assert len(frames) == 20
    assert (frames[0].width, frames[0].height) == (256, 256)
    assert [float(frame.time) for frame in frames] == pytest.approx(np.arange(20) / 20, abs=1e-3)


def test_a_game_is_played_and_a_face_hides_it() -> None:
    game, again, face = (np.stack(list(pictures(Scene(k, "coinrun", 1), 3))) for k in ("game", "game", "face"))
    assert game.shape == (10, 256, 256, 3)
    np.testing.assert_array_equal(game, again)
    assert len({frame.tobytes() for frame in game}) > 5
    assert 0.2 < (game != face).any(-1).mean() <= 1


def test_odd_files_are_as_odd_as_they_say(tmp_path: Path) -> None:
    def made(way: str) -> list[av.VideoFrame]:
        make(recording(way), str(tmp_path))
        return decoded(tmp_path / "some.mp4")

    assert made("turned")[0].rotation == -90
    assert made("hdr")[0].color_trc == 16
    assert len(made("one frame")) == 1
    assert made("tiny")[0].width == 12
    assert np.diff([frame.time for frame in made("variable rate")]).std() > 0.01
    for way in ("cut off", "header alone", "empty", "a text"):
        with pytest.raises(av.error.InvalidDataError):
            made(way)
    make(recording("sound alone"), str(tmp_path))
    with av.open(str(tmp_path / "some.mp4")) as container:
        assert (len(container.streams.video), len(container.streams.audio)) == (0, 1)
    make(recording("again"), str(tmp_path))
    assert (tmp_path / "again, by another.mp4").read_bytes() == (tmp_path / "some.mp4").read_bytes()
    make(recording("missing"), str(tmp_path))
    assert not (tmp_path / "some.mp4").exists()


def test_labels_of_other_videos_are_refused_in_a_line(
    tiny_data_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*arguments: str) -> str:
        monkeypatch.setattr(
            "sys.argv", ["make_videos.py", "label", str(tmp_path), *arguments, str(tmp_path / "to.json")]
        )
        with pytest.raises(SystemExit) as ended:
            make_videos.main()
        return str(ended.value)

    assert "there is no data set at nowhere" in refused("nowhere")
    assert "No such file" in refused(tiny_data_uri)
    (tmp_path / "made.json").write_text("{}")
    assert refused(tiny_data_uri).startswith("make_videos: the data set has clips of other videos")
    assert not (tmp_path / "to.json").exists()
