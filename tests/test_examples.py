"""The examples run: their figures are not tested, since chance and machines differ."""

import numpy as np
import pytest

from examples import train_in_a_dream


def test_a_picture_s_scroll_is_measured_in_pixels():
    y, x = np.mgrid[:64, :70] / 8
    wide = (127 * (1 + np.sin(x) * np.cos(y)))[None, ..., None].repeat(3, -1).astype(np.uint8)
    none = np.zeros(1, np.int64)
    for pixels in (-2, -1, 0, 1, 2):
        before, after = wide[:, :, 3:67], wide[:, :, 3 + pixels : 67 + pixels]
        assert train_in_a_dream.scrolled(before, none, after) == pytest.approx(pixels, abs=0.2)
        down, right = (frame.swapaxes(1, 2) for frame in (before, after))
        assert train_in_a_dream.scrolled(down, none, right) == pytest.approx(0, abs=0.2)
    assert train_in_a_dream.scrolled(np.zeros_like(before), none, np.zeros_like(after)) == 0


def test_a_policy_is_trained_in_a_dream_and_set_beside_others(tiny_model_uri, monkeypatch, capsys):
    small = ["--updates", "2", "--worlds", "2", "--steps", "4", "--episodes", "3"]
    monkeypatch.setattr("sys.argv", ["train_in_a_dream.py", tiny_model_uri, *small])
    train_in_a_dream.main()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("±")[0].rsplit(maxsplit=1)[0].strip() for line in lines[1:7]] == [
        "trained",
        "random",
        *(f"always {action}" for action in range(4)),
    ]
    assert lines[7].startswith("  trained over always ")


def test_a_missing_model_is_said_in_a_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["train_in_a_dream.py", str(tmp_path)])
    with pytest.raises(SystemExit):
        train_in_a_dream.main()
    assert "no model at" in capsys.readouterr().err
