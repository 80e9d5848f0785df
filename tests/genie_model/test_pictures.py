"""Pictures have the geometry that they promise, and show the frames that they were given."""

import numpy as np
import pytest

from genie_model import pictures
from genie_model.pictures import GAP, SCALE

SIZE = 16


@pytest.fixture
def frames():
    return np.random.default_rng(0).integers(0, 200, (3, 5, SIZE, SIZE, 3), dtype=np.uint8)


def cells(picture, rows, columns, size=SIZE * SCALE):
    """The picture's cells, counted from its lower right corner: (rows, columns, size, size, 3)."""
    pitch = size + GAP
    bottom, right = picture.shape[0] - rows * pitch, picture.shape[1] - columns * pitch
    body = picture[bottom:, right:].reshape(rows, pitch, columns, pitch, 3).transpose(0, 2, 1, 3, 4)
    return body[:, :, :size, :size]


def test_frames_are_enlarged_without_smoothing_and_stand_in_their_cells(frames):
    picture = pictures.frame_table(frames, ["a", "b", "c"], list("12345"))
    np.testing.assert_array_equal(cells(picture, 3, 5)[:, :, ::SCALE, ::SCALE], frames)
    np.testing.assert_array_equal(cells(picture, 3, 5)[:, :, 1::SCALE, 2::SCALE], frames)


def test_labels_are_written_outside_the_cells(frames):
    picture = pictures.frame_table(frames, ["real", "dreamt", "c"], list("12345"))
    header, margin = picture[: -3 * (SIZE * SCALE + GAP)], picture[:, : -5 * (SIZE * SCALE + GAP)]
    assert header.min() < 100 < 200 < np.median(header)
    assert margin.min() < 100 < 200 < np.median(margin)


def test_a_label_too_few_is_refused(frames):
    with pytest.raises(ValueError, match="2 row and 5 column labels for 3 x 5 cells"):
        pictures.frame_table(frames, ["a", "b"], list("12345"))


def test_reconstruction_strip_puts_each_clip_over_its_reconstruction(frames):
    picture = pictures.reconstruction_strip(frames, 255 - frames, columns=3)
    shown = cells(picture, 6, 3)[:, :, ::SCALE, ::SCALE]
    np.testing.assert_array_equal(shown[::2], frames[:, [0, 2, 4]])
    np.testing.assert_array_equal(shown[1::2], 255 - frames[:, [0, 2, 4]])


def test_action_grid_has_a_prompt_and_a_column_for_each_action(frames):
    picture = pictures.action_grid(frames[:, 0], frames[:, 1:], repeats=5)
    np.testing.assert_array_equal(cells(picture, 3, 5)[:, :, ::SCALE, ::SCALE], frames)


def test_rollout_strip_has_three_rows_for_each_clip(frames):
    picture = pictures.rollout_strip(frames[:2], frames[1:], frames[:2] // 2, prompt_frames=1)
    shown = cells(picture, 6, 5)[:, :, ::SCALE, ::SCALE]
    np.testing.assert_array_equal(shown[[0, 3]], frames[:2])
    np.testing.assert_array_equal(shown[[1, 4]], frames[1:])
    np.testing.assert_array_equal(shown[[2, 5]], frames[:2] // 2)


def test_share_table_is_darker_where_the_share_is_larger():
    picture = pictures.share_table([[8, 1, 1], [0, 0, 0]], ["action 1", "action 2"], ["left", "none", "right"])
    body = picture[-2 * (40 + GAP) :, -3 * (96 + GAP) :]
    brightness = [body[4, 4 + column * (96 + GAP)].mean() for column in range(3)]
    assert brightness[0] < brightness[1] == brightness[2]
    assert body[4 + 40 + GAP, 4].mean() == 255  # an action never seen has no shares


def test_most_different_frames_are_one_of_each_kind():
    kinds = np.random.default_rng(1).integers(0, 256, (4, SIZE, SIZE, 3), dtype=np.uint8)
    chosen = pictures.most_different(np.repeat(kinds, 5, axis=0), 4)
    assert sorted(index // 5 for index in chosen) == [0, 1, 2, 3]
    assert len(pictures.most_different(kinds, 9)) == 4


def test_line_plots_draw_a_panel_each_and_bands_as_wide_as_the_interval():
    sure, unsure = ([(value, ci95) for value in (0.0, 2.0, 4.0)] for ci95 in (0.01, 1.0))
    one = pictures.line_plots({"a": sure}, {"a": []})
    two = pictures.line_plots({"a": sure, "b": sure}, {"a": ["b"], "b": []})
    wide = pictures.line_plots({"a": unsure}, {"a": []})
    assert one.dtype == np.uint8
    assert two.shape[1] == 2 * one.shape[1]
    coloured = [((p.max(-1) - p.min(-1)) > 20).mean() for p in (one, wide)]
    assert coloured[1] > 2 * coloured[0]
