"""Pictures for people: labelled tables of frames, and a table of numbers. All return uint8 (H, W, 3) RGB."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image, ImageDraw, ImageFont

Picture = NDArray[np.uint8]

SCALE = 3  # nearest-neighbour enlargement of frames
GAP = 6  # pixels between cells
_PAPER, _INK, _FULL = (255, 255, 255), (34, 38, 46), (38, 98, 160)
_FONT = ImageFont.load_default(16)


def frame_table(
    frames_RCHWC: ArrayLike, row_labels: Sequence[str], column_labels: Sequence[str], scale: int = SCALE
) -> Picture:
    """R rows by C columns of uint8 frames, enlarged without smoothing, under a header and beside row labels."""
    frames = np.asarray(frames_RCHWC, np.uint8)
    rows, columns, height, width, _ = frames.shape
    image, _, corner = _table(row_labels, column_labels, rows, columns, height * scale, width * scale)
    for row in range(rows):
        for column in range(columns):
            cell = Image.fromarray(frames[row, column])
            cell = cell.resize((width * scale, height * scale), Image.Resampling.NEAREST)
            image.paste(cell, corner(row, column))
    return np.asarray(image, np.uint8)


def reconstruction_strip(real_BTHWC: ArrayLike, reconstructed_BTHWC: ArrayLike, columns: int = 8) -> Picture:
    """Real frames over what the tokenizer makes of them, every few frames of each clip."""
    real, reconstructed = np.asarray(real_BTHWC), np.asarray(reconstructed_BTHWC)
    shown = np.linspace(0, real.shape[1] - 1, min(columns, real.shape[1])).round().astype(int)
    rows = np.stack([real[:, shown], reconstructed[:, shown]], axis=1).reshape(-1, len(shown), *real.shape[2:])
    return frame_table(rows, ["real", "reconstructed"] * len(real), [f"frame {t + 1}" for t in shown])


def action_grid(
    prompts_BHWC: ArrayLike, outcomes_BAHWC: ArrayLike, repeats: int, labels: Sequence[str] | None = None
) -> Picture:
    """Figure 17: each row a prompt, then where each latent action leads when it is taken `repeats` times.

    `labels` name the prompts; by default they are numbered.
    """
    prompts, outcomes = np.asarray(prompts_BHWC), np.asarray(outcomes_BAHWC)
    frames = np.concatenate([prompts[:, None], outcomes], axis=1)
    header = ["prompt", *[f"action {a + 1}, {repeats} times" for a in range(outcomes.shape[1])]]
    return frame_table(frames, labels or [str(row + 1) for row in range(len(frames))], header)


def rollout_strip(
    truth_BTHWC: ArrayLike, inferred_BTHWC: ArrayLike, random_BTHWC: ArrayLike, prompt_frames: int
) -> Picture:
    """What happened, and what is dreamt from the same prompt with inferred and with random latent actions."""
    clips = np.stack([np.asarray(truth_BTHWC), np.asarray(inferred_BTHWC), np.asarray(random_BTHWC)], axis=1)
    rows = clips.reshape(-1, *clips.shape[2:])
    header = ["prompt" if t < prompt_frames else f"t = {t - prompt_frames + 1}" for t in range(rows.shape[1])]
    return frame_table(rows, ["truth", "inferred actions", "random actions"] * len(clips), header)


def share_table(counts_KC: ArrayLike, row_labels: Sequence[str], column_labels: Sequence[str]) -> Picture:
    """A heat map of counts as shares of their row: what the truth was when the latent said this."""
    counts = np.asarray(counts_KC, np.float64)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    (rows, columns), height, width = counts.shape, 40, 96
    image, draw, corner = _table(row_labels, column_labels, rows, columns, height, width)
    for row in range(rows):
        for column in range(columns):
            left, top = corner(row, column)
            share = float(shares[row, column])
            fill = tuple(round(paper + share * (full - paper)) for paper, full in zip(_PAPER, _FULL, strict=True))
            draw.rectangle((left, top, left + width - 1, top + height - 1), fill=fill, outline=(210, 214, 220))
            ink = _PAPER if share > 0.5 else _INK
            draw.text((left + width // 2, top + height // 2), f"{share:.0%}", ink, _FONT, anchor="mm")
    return np.asarray(image, np.uint8)


def line_plots(estimates: Mapping[str, Sequence[tuple[float, float]]], beside: Mapping[str, Sequence[str]]) -> Picture:
    """A plot for each key of `beside`, with the curves it names drawn in: values and 95% bands over t = 1, 2, ..."""
    canvas = _canvas(4.2 * len(beside), 3.2)
    figure = canvas.figure
    for axes, (name, others) in zip(figure.subplots(1, len(beside), squeeze=False)[0], beside.items(), strict=True):
        for curve in (name, *others):
            value_T, ci95_T = np.asarray(estimates[curve], np.float64).T
            t = np.arange(1, len(value_T) + 1)
            axes.plot(t, value_T, marker=".", label=curve.replace("_", " "))
            axes.fill_between(t, value_T - ci95_T, value_T + ci95_T, alpha=0.15)
        axes.set_xlabel("t, frames since the prompt")
        axes.legend(frameon=False)
        axes.grid(alpha=0.3)
    return _drawn(canvas)


def dot_plots(values: Mapping[str, Mapping[str, tuple[float, float]]]) -> Picture:
    """A plot for each heading: of every row the value, and where it is known its 95% interval."""
    rows = list(dict.fromkeys(row for by_row in values.values() for row in by_row))
    canvas = _canvas(1.6 + 2.6 * len(values), 0.9 + 0.4 * len(rows))
    figure = canvas.figure
    for axes, (heading, by_row) in zip(
        figure.subplots(1, len(values), squeeze=False, sharey=True)[0], values.items(), strict=True
    ):
        for place, row in enumerate(rows):
            if row in by_row:
                value, ci95 = by_row[row]
                axes.errorbar(value, place, xerr=np.nan_to_num(ci95), fmt="o", color="tab:blue", capsize=3)
        axes.set_yticks(range(len(rows)), rows)
        axes.set_title(heading, fontsize="medium")
        axes.grid(alpha=0.3)
        axes.margins(0.15)
    figure.axes[0].invert_yaxis()
    return _drawn(canvas)


def curves(
    points: Mapping[str, Sequence[tuple[int, float, float]]],
    beside: Mapping[str, Mapping[str, tuple[float, float]]],
    x: str,
    y: str,
) -> Picture:
    """A plot for each row: its curve of (x, value, 95% half width), and lines for the values that hang on no x.

    The points are evenly spaced: their x may be 0, and grows as a logarithm does.
    """
    canvas = _canvas(1.6 + 4.2 * len(points), 3.6)
    figure = canvas.figure
    panels = figure.subplots(1, len(points), squeeze=False, sharey=True)[0]
    for axes, (row, triples) in zip(panels, points.items(), strict=True):
        x_N, value_N, ci95_N = zip(*triples, strict=True) if triples else ((), (), ())
        axes.errorbar(range(len(x_N)), value_N, yerr=np.nan_to_num(ci95_N), fmt="o-", capsize=3)
        for number, (name, (value, ci95)) in enumerate(beside[row].items(), start=1):
            axes.axhline(value, color=f"C{number}", linestyle="--", label=name)
            axes.axhspan(value - np.nan_to_num(ci95), value + np.nan_to_num(ci95), color=f"C{number}", alpha=0.12)
        axes.set_xticks(range(len(x_N)), x_N)
        axes.set_xlabel(x)
        axes.set_title(row, fontsize="medium")
        axes.grid(alpha=0.3)
    panels[0].set_ylabel(y)
    panels[-1].legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    return _drawn(canvas)


def scatter(
    points: Mapping[str, Sequence[tuple[float, float]]], x: str, y: str, law: tuple[float, float] | None = None
) -> Picture:
    """The points of every row on axes with logarithms, and the line y = factor * x ** exponent of `law`."""
    canvas = _canvas(6.4, 4.2)
    axes = canvas.figure.subplots()
    for row, pairs in points.items():
        if pairs:
            axes.loglog(*zip(*pairs, strict=True), "o", label=row)
    if law:
        ends = np.array(
            [min(a for some in points.values() for a, _ in some), max(a for some in points.values() for a, _ in some)]
        )
        axes.loglog(ends, law[0] * ends ** law[1], color="0.4", linewidth=1)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.legend(frameon=False)
    axes.grid(alpha=0.3, which="both")
    return _drawn(canvas)


def arrows(motion_PA2: ArrayLike) -> Picture:
    """How far and where the screen moved: for each action a plot of one arrow (down, right) for each prompt.

    The median is red. The longest twentieth run out of the plot: few that go astray would leave the others no room.
    """
    motion = np.asarray(motion_PA2, np.float64)
    reach = max(1.2 * float(np.quantile(np.abs(motion), 0.95)), 1.0)
    canvas = _canvas(2.0 * motion.shape[1], 2.3)
    figure = canvas.figure
    panels = figure.subplots(1, motion.shape[1], squeeze=False, sharey=True)[0]
    for action, axes in enumerate(panels):
        down_P, right_P = motion[:, action].T
        still_P = np.zeros_like(down_P)
        axes.quiver(still_P, still_P, right_P, down_P, angles="xy", scale_units="xy", scale=1, alpha=0.5, width=0.015)
        axes.quiver(
            0, 0, np.median(right_P), np.median(down_P), angles="xy", scale_units="xy", scale=1, color="C3", width=0.03
        )
        axes.set(xlim=(-reach, reach), ylim=(reach, -reach), aspect="equal", title=f"action {action + 1}")
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("pixels on screen")
    return _drawn(canvas)


def _canvas(width: float, height: float) -> Any:
    """Matplotlib's, of that size in inches, which becomes a picture; a second to import, that few need."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    return FigureCanvasAgg(Figure(figsize=(width, height), dpi=100, layout="constrained"))


def _drawn(canvas: Any) -> Picture:
    canvas.draw()
    return np.asarray(canvas.buffer_rgba(), np.uint8)[..., :3].copy()


def most_different(frames_BHWC: ArrayLike, count: int) -> list[int]:
    """Indices of up to `count` frames that look unlike each other: the most typical one, then always the farthest."""
    frames = np.asarray(frames_BHWC)
    small = np.stack([np.asarray(Image.fromarray(frame).resize((8, 8), Image.Resampling.BOX)) for frame in frames])
    points = small.reshape(len(frames), -1).astype(np.float64)
    distances = np.linalg.norm(points[:, None] - points[None], axis=-1)
    chosen = [int(distances.sum(axis=1).argmin())]
    while len(chosen) < min(count, len(frames)):
        chosen.append(int(distances[:, chosen].min(axis=1).argmax()))
    return chosen


def _table(
    row_labels: Sequence[str], column_labels: Sequence[str], rows: int, columns: int, cell_height: int, cell_width: int
) -> tuple[Image.Image, ImageDraw.ImageDraw, Callable[[int, int], tuple[int, int]]]:
    """A page with both kinds of labels and empty cells, and where the cell of a row and column begins: (left, top)."""
    if (len(row_labels), len(column_labels)) != (rows, columns):
        raise ValueError(f"{len(row_labels)} row and {len(column_labels)} column labels for {rows} x {columns} cells")
    label_width = round(max(_FONT.getlength(label) for label in row_labels)) + 2 * GAP
    header_height = 2 * GAP + 16

    def corner(row: int, column: int) -> tuple[int, int]:
        return label_width + column * (cell_width + GAP), header_height + row * (cell_height + GAP)

    right, bottom = corner(rows, columns)
    image = Image.new("RGB", (right, bottom), _PAPER)
    draw = ImageDraw.Draw(image)
    for row, label in enumerate(row_labels):
        draw.text((label_width - GAP, corner(row, 0)[1] + cell_height // 2), label, _INK, _FONT, anchor="rm")
    for column, label in enumerate(column_labels):
        draw.text((corner(0, column)[0] + cell_width // 2, header_height // 2), label, _INK, _FONT, anchor="mm")
    return image, draw, corner
