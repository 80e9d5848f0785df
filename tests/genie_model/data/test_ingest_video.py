"""Every kind of file becomes frames of one size and rate, or is rejected with its reason."""

from __future__ import annotations

import io
import itertools
import random
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest

av = pytest.importorskip("av", reason="PyAV (the video extra) is not installed")

from films import HLG, PQ, film, picture, sound  # noqa: E402

from genie_model.data.sources import REASONS, FileVideo, Framing, Rejected  # noqa: E402
from genie_model.data.video import decode, tone_mapped  # noqa: E402

FRAMING = Framing(10.0, 45, 80)
RED, GREEN, BLUE, WHITE, BLACK = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0)


def frames_of(path, framing=FRAMING, **span):
    """(frames, what was noted)."""
    notes = {}
    with open(path, "rb") as file:
        return np.stack(list(decode(file, framing, lambda text: notes.update({text: None}), **span))), list(notes)


def reason_of(path, framing=FRAMING):
    with pytest.raises(Rejected) as caught:
        frames_of(path, framing)
    assert caught.value.detail, "a reason for people"
    return caught.value.reason


def corners(frame_HWC):
    """The colours near the corners: top left, top right, bottom left, bottom right."""
    height, width = frame_HWC.shape[:2]
    rows, columns = (height // 4, height - 1 - height // 4), (width // 2 - 6, width - 1 - width // 8)
    return [frame_HWC[row, column].astype(int) for row, column in itertools.product(rows, columns)]


def same(colours, expected, tolerance=12):
    return all(np.abs(np.subtract(a, b)).max() <= tolerance for a, b in zip(colours, expected, strict=True))


@pytest.mark.parametrize(
    ("name", "codec"),
    [
        ("plain.mp4", "libx264"),
        ("plain.webm", "libvpx"),
        ("plain.avi", "mpeg4"),
        ("plain.mkv", "mpeg4"),
        ("plain.ts", "mpeg2video"),
        ("plain.flv", "flv"),
        ("plain.wmv", "wmv2"),
        ("plain.mov", "mpeg4"),
        ("plain.gif", "gif"),
    ],
)
def test_ordinary_files(tmp_path, name, codec):
    fps = 25 if codec == "gif" else 30
    frames_THWC, notes = frames_of(film(tmp_path / name, frames=2 * fps, fps=fps, codec=codec))
    assert frames_THWC.shape == (20, 45, 80, 3)
    assert notes == []
    assert same(corners(frames_THWC[0]), [RED, GREEN, BLUE, WHITE], 40 if codec in ("gif", "libvpx") else 15)


def test_a_frame_is_shown_at_the_nearest_instant(tmp_path):
    """At 10 frames a second of 30, the instants are those of every third frame."""
    frames_THWC, _ = frames_of(film(tmp_path / "a.mp4"), Framing(10.0, 90, 160))
    for t in range(20):
        alike = min(range(20), key=lambda n: np.abs(picture(n).astype(int) - frames_THWC[t]).mean())
        assert (alike - 3 * t) % 20 == 1, "the last of those that are nearest to it"


def test_a_variable_rate_becomes_constant(tmp_path):
    """A second at 30 frames, then two pictures that stand for a second each, then 30 frames again."""
    seconds = [n / 30 for n in range(30)] + [1.0, 2.0] + [3 + n / 30 for n in range(30)]
    frames_THWC, notes = frames_of(film(tmp_path / "a.mkv", frames=len(seconds), seconds=seconds))
    assert len(frames_THWC) == 40
    assert notes == ["variable frame rate"]
    assert all((frames_THWC[t] == frames_THWC[11]).all() for t in range(11, 19))
    assert not (frames_THWC[21] == frames_THWC[11]).all()


def test_thousands_of_timestamps_a_second(tmp_path):
    path = film(tmp_path / "a.mkv", frames=2000, size=(16, 16), seconds=[n / 1000 for n in range(2000)])
    assert len(frames_of(path)[0]) == 20
    path = film(tmp_path / "b.nut", frames=1500, fps=3000, size=(16, 16), codec="ffv1")
    assert reason_of(path) == "timestamps"


def test_a_gap_of_minutes(tmp_path):
    path = film(tmp_path / "a.mkv", frames=3, seconds=[0.0, 0.1, 300.0])
    assert reason_of(path) == "timestamps"


@pytest.mark.parametrize(
    ("rotation", "expected", "note"),
    [
        ((90, False), [GREEN, WHITE, RED, BLUE], "turned by 90 degrees"),
        ((180, False), [WHITE, BLUE, GREEN, RED], "turned by 180 degrees"),
        ((-90, False), [BLUE, RED, WHITE, GREEN], "turned by 270 degrees"),
        ((0, True), [GREEN, RED, WHITE, BLUE], "mirrored"),
    ],
)
def test_a_picture_is_turned_upright(tmp_path, rotation, expected, note):
    path = film(tmp_path / "a.mp4", frames=6, rotation=rotation)
    frames_THWC, notes = frames_of(path, Framing(10.0, 80, 80, "stretch"))
    assert note in notes
    height, width = 20, 20
    seen = [frames_THWC[0][r, c].astype(int) for r in (height, 79 - height) for c in (width + 12, 79 - width + 12)]
    assert same(seen, expected, 25)


def test_a_tilted_picture(tmp_path):
    assert reason_of(film(tmp_path / "a.mp4", frames=6, rotation=(30, False))) == "tilted"


@pytest.mark.parametrize(
    ("aspect", "shape", "expected"),
    [
        ("pad", (90, 90), [BLACK, BLACK]),  # bars left and right
        ("crop", (90, 90), [RED, GREEN]),
        ("stretch", (90, 90), [RED, GREEN]),
        ("pad", (90, 160), [RED, GREEN]),
    ],
)
def test_another_shape_is_handled_as_documented(tmp_path, aspect, shape, expected):
    frames_THWC, _ = frames_of(film(tmp_path / "a.mp4", 6, 10, shape, first=4), Framing(10.0, 45, 80, aspect))
    assert same([frames_THWC[0][15, 3].astype(int), frames_THWC[0][15, 76].astype(int)], expected, 40)
    fitted_HWC = Framing(10.0, 45, 80, aspect).fit(picture(4, *shape))
    assert np.abs(fitted_HWC.astype(int) - frames_THWC[0]).mean() < 6, "still pictures are fitted alike"


def test_pixels_that_are_not_square(tmp_path):
    """90 x 80 pixels of twice their height in width are as wide as 160."""
    frames_THWC, notes = frames_of(film(tmp_path / "a.mkv", frames=6, size=(90, 80), pixel=Fraction(2)))
    assert "pixels made square" in notes
    assert same(corners(frames_THWC[0])[1:], [GREEN, BLUE, WHITE], 20)


@pytest.mark.parametrize(("transfer", "name"), [(PQ, "PQ"), (HLG, "HLG")])
def test_hdr_is_toned_down(tmp_path, transfer, name):
    frames_THWC, notes = frames_of(film(tmp_path / "a.mp4", frames=6, codec="libx264", transfer=transfer))
    assert notes == [f"HDR ({name}) made SDR"]
    red, green, blue, white = corners(frames_THWC[0])
    assert white.min() > 240, "the brightest light is white"
    assert red[0] > 200 > 100 > red[1]
    assert green[1] > 200
    assert blue[2] > 200


def test_tones():
    """Reference white (203 cd/m2: 58% of PQ's scale, 75% of HLG's) is bright, not burnt out; greys keep their order."""
    for transfer, white in ((PQ, 0.581), (HLG, 0.75)):
        ramp_HWC = np.repeat((np.linspace(0, 1, 101) * 65535).astype(np.uint16)[None, :, None], 3, axis=-1)
        toned = tone_mapped(ramp_HWC, transfer, 9)[0, :, 1].astype(int)
        assert (np.diff(toned) >= 0).all()
        assert toned[0] == 0
        assert toned[-1] >= 250
        assert 200 < toned[round(white * 100)] < 240


def test_4k_and_more(tmp_path):
    path = film(tmp_path / "a.mp4", frames=2, size=(2160, 3840), codec="libx264")
    assert frames_of(path, Framing(10.0, 90, 160))[1] == ["larger than 1080p: 3840 x 2160"]
    assert reason_of(path, Framing(10.0, 90, 160, max_pixels=1920 * 1080)) == "too large"
    assert reason_of(film(tmp_path / "b.mkv", frames=2, size=(8, 3000))) == "too narrow"


@pytest.mark.parametrize(
    ("name", "data", "reason"),
    [
        ("a.mp4", b"", "empty"),
        ("a.mp4", b"no video at all" * 100, "not a video"),
        ("a.m3u8", b"#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\nother.mp4\n#EXT-X-ENDLIST\n", "not a video"),
        ("a.txt", b"ffconcat version 1.0\nfile other.mp4\n", "not a video"),
    ],
)
def test_what_is_no_video(tmp_path, name, data, reason):
    """Playlists least of all: they would have other files opened."""
    film(tmp_path / "other.mp4", frames=3)
    (tmp_path / name).write_bytes(data)
    assert reason_of(tmp_path / name) == reason


def test_sound_alone(tmp_path):
    assert reason_of(sound(tmp_path / "a.mp4")) == "no picture"


def test_a_missing_file(tmp_path):
    with pytest.raises(Rejected) as caught:
        next(FileVideo("a", f"{tmp_path}/a.mp4").frames(FRAMING))
    assert caught.value.reason == "missing"


@pytest.mark.parametrize(
    ("name", "options"), [("a.mp4", {"movflags": "faststart"}), ("a.mp4", {}), ("a.webm", {}), ("a.avi", {})]
)
def test_a_file_that_was_cut_off(tmp_path, name, options):
    path = film(tmp_path / name, frames=300, codec="libvpx" if name == "a.webm" else "mpeg4", options=options)
    data = path.read_bytes()
    for share in (0.8, 0.5):  # the last tenth of an AVI may be its index, which nobody needs
        path.write_bytes(data[: int(len(data) * share)])
        assert reason_of(path) == "truncated"


def test_damage_is_found_and_ends_nothing(tmp_path):
    """Whatever bytes are wrong: frames of the right size, or a reason."""
    generator, found = random.Random(0), Counter()
    for codec, name in (("libx264", "a.mp4"), ("mpeg4", "a.avi"), ("libvpx", "a.webm"), ("mpeg2video", "a.ts")):
        data = film(tmp_path / name, codec=codec).read_bytes()
        for _ in range(40):
            damaged = bytearray(data)
            for _ in range(generator.choice((1, 10, 100))):
                damaged[generator.randrange(len(data))] = generator.randrange(256)
            try:
                frames = list(decode(io.BytesIO(damaged), FRAMING))
                assert all(frame.shape == (45, 80, 3) for frame in frames)
                found["taken"] += 1
            except Rejected as why:
                found[why.reason] += 1
    assert found["corrupt"] > found["taken"]
    assert set(found) <= {"taken", *REASONS}


def test_a_stretch_of_a_file(tmp_path):
    """As several episodes lie in one file of LeRobot's."""
    path = film(tmp_path / "a.mp4", frames=120, codec="libx264")
    whole, _ = frames_of(path)
    part, _ = frames_of(path, start=1.0, stop=3.0)
    assert len(part) == 20
    assert (part == whole[10:30]).all()
