"""Cells of a study compared: means over seeds with their intervals, a fitted power law, and a page of it all."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from genie_model import pictures
from genie_model.report import html_table, markdown_table, page
from genie_model.studies import Curve, Row, Study

Findings = Mapping[str, Sequence[Mapping[str, float]]]  # variant -> the metrics of each of its seeds


class Spread(NamedTuple):
    """A mean over seeds and the half width of its 95% interval (Student's t); NaN where one seed tells none."""

    mean: float
    ci95: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        if len(values) < 2:
            return cls(float(np.mean(values)), float("nan"))
        half = _t975(len(values) - 1) * np.std(values, ddof=1) / np.sqrt(len(values))
        return cls(float(np.mean(values)), float(half))

    def __str__(self) -> str:
        shown = _shown(self.mean)
        return f"{shown} ± {self.ci95:.2g}" if self.ci95 > 1e-6 * abs(self.mean) else shown


class PowerLaw(NamedTuple):
    """y = factor * x ** exponent, and the half width of the exponent's 95% interval; NaN with two points."""

    factor: float
    exponent: float
    ci95: float

    @classmethod
    def fitted(cls, x_N: Sequence[float], y_N: Sequence[float]) -> PowerLaw:
        """By least squares of the logarithms. Raises ValueError below two sizes."""
        if len(set(x_N)) < 2:
            raise ValueError("a power law needs points at two sizes at least")
        from scipy import stats  # a second that few need

        line = stats.linregress(np.log(x_N), np.log(y_N))
        half = _t975(len(x_N) - 2) * line.stderr if len(x_N) > 2 else float("nan")
        return cls(float(np.exp(line.intercept)), float(line.slope), float(half))

    def __str__(self) -> str:
        interval = f" (its 95% interval: ± {self.ci95:.2g})" if self.ci95 == self.ci95 else ""
        return f"y = {self.factor:.3g} x^{self.exponent:.3g}, of exponent {self.exponent:.3g}{interval}"


class Comparison(NamedTuple):
    """`table` and `paper` are rows, headings first; `notes` are sentences; `pictures` are uint8 (H, W, 3)."""

    title: str
    table: list[Row]
    paper: list[Row]
    notes: list[str]
    pictures: dict[str, NDArray[np.uint8]]

    def markdown(self, shown: str = "") -> str:
        """With the pictures, where they lie as `shown`, which has braces for a picture's name."""
        parts = [f"# {self.title}", markdown_table(self.table), "\n".join(f"- {note}" for note in self.notes)]
        parts += [f"![{name}]({shown.format(name)})" for name in self.pictures if shown]
        return "\n\n".join([*parts, "## In the paper", markdown_table(self.paper)]) + "\n"

    def html(self) -> str:
        notes = "".join(f"<li>{html.escape(note)}" for note in self.notes)
        body = f"{html_table(self.table)}<ul>{notes}</ul><h2>In the paper</h2>{html_table(self.paper)}"
        return page(self.title, self.pictures, body)


def compare(
    study: Study, found: Findings, notes: Sequence[str] = (), asked: Mapping[str, int] | None = None
) -> Comparison:
    """`asked`: how many seeds of each variant, where more were asked for than are found.

    Raises ValueError when no variant has a finished cell, or none of the study's metrics.
    """
    asked = asked or {}
    headings = dict(study.columns)
    points = _points(study.curve, found) if study.curve else {}
    if study.curve:
        headings |= {name: study.curve.heading.format(x) for name, x in points.items()}
    columns = {
        name: heading
        for name, heading in headings.items()
        if any(name in cell for cells in found.values() for cell in cells)
    }
    if not columns:
        raise ValueError("no cell of this study has finished with anything to compare")
    spreads = {
        variant: {name: Spread.of(values) for name in columns if (values := [c[name] for c in cells if name in c])}
        for variant, cells in found.items()
    }
    table: list[Row] = [("", "seeds", *columns.values())]
    for variant, spread in spreads.items():
        made = len(found[variant])
        seeds = f"{made} of {asked[variant]}" if asked.get(variant, made) > made else str(made)
        table.append((variant, seeds, *(str(spread.get(name, "-")) for name in columns)))
    drawn = {
        "comparison": pictures.dot_plots(
            {
                heading: {variant: spread[name] for variant, spread in spreads.items() if name in spread}
                for name, heading in columns.items()
                if name not in points
            }
        )
    }
    if study.curve:
        drawn["curve"] = pictures.curves(
            {
                variant: [(x, *spread[name]) for name, x in points.items() if name in spread]
                for variant, spread in spreads.items()
            },
            {
                variant: {columns[name]: spread[name] for name in study.curve.beside if name in spread}
                for variant, spread in spreads.items()
            },
            study.curve.x,
            study.curve.y,
        )
    notes = list(notes)
    if study.plot and {*study.plot[:2]} <= set(columns):
        x, y, beside = study.plot
        pairs = {variant: [(c[x], c[y]) for c in cells if x in c and y in c] for variant, cells in found.items()}
        flat = [point for variant, some in pairs.items() if not variant.startswith(beside) for point in some]
        law = PowerLaw.fitted(*zip(*flat, strict=True)) if len({x for x, _ in flat}) > 1 else None
        if law:
            sizes = len({x for x, _ in flat})
            notes.append(f"{columns[y]} (y) over {columns[x]} (x), {len(flat)} runs of {sizes} sizes: {law}.")
        drawn["scaling"] = pictures.scatter(pairs, columns[x], columns[y], law and (law.factor, law.exponent))
    return Comparison(f"{study.title} ({study.source})", table, list(study.paper), notes, drawn)


def _t975(freedom: int) -> float:
    """Student's t that 95% of a sample's means are within."""
    from scipy import stats

    return float(stats.t.ppf(0.975, freedom))


def _points(curve: Curve, found: Findings) -> dict[str, int]:
    """Metric -> x, in order of x."""
    names = {name for cells in found.values() for cell in cells for name in cell if name.startswith(curve.prefix)}
    by_x = {name: int(name.removeprefix(curve.prefix)) for name in names}
    return dict(sorted(by_x.items(), key=lambda pair: pair[1]))


def _shown(value: float) -> str:
    return f"{value:,.0f}" if 1e3 <= abs(value) < 1e9 else f"{value:.3g}"
