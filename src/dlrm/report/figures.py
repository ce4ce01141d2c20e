"""Figures as SVG whose colours are CSS variables, so that a page sets them for light and dark.

Matplotlib draws them, and its output is rewritten: colours that stand for a role become
``var(--role)``, fonts those of the page, and every id is the figure's own, since a page holds
several figures. A figure is 360 units wide, about a phone's width, so that its text is as large as
the page's wherever it is shown.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from xml.etree import ElementTree

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullLocator

from dlrm.metrics import QUANTILE
from dlrm.report.curves import Curve

WIDTH = 360
"""Units of a figure's width."""
_HEIGHT = 270
_LEGEND_ROW = 16
_SMALL = 8.6
"""Size of labels that stand close together."""
_POINTS_AN_INCH = 72  # Matplotlib's SVG has a unit a point

# Colours no figure needs, each standing for what the page calls it.
_ROLES = {
    "#010101": "ink",
    "#020202": "grid",
    "#030301": "series-1",
    "#030302": "series-2",
    "#030303": "series-3",
    "#030304": "series-4",
    "#030305": "series-5",
    "#040401": "rate-1",
    "#040402": "rate-2",
    "#040403": "rate-3",
    "#040404": "rate-4",
    "#040405": "rate-5",
}
_INK, _GRID = list(_ROLES)[:2]
_SERIES = [colour for colour, role in _ROLES.items() if role.startswith("series")]
_RATES = [colour for colour, role in _ROLES.items() if role.startswith("rate")]
_RATE_MARKERS = "vvo^^"
"""Of the groups of click rates, so that they differ without colour too."""
RATE_GROUPS = len(_RATES)
_DASHES = ("solid", (0, (5, 2)), (0, (2, 1.5)), (0, (6, 2, 1.5, 2)), (0, (1, 1.5)))
"""Of the series, so that they differ without colour too."""
MOST_SERIES = len(_SERIES)
_STYLE: dict[Any, Any] = {
    "axes.edgecolor": _INK,
    "axes.labelcolor": _INK,
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.labelsize": 11,
    "axes.linewidth": 0.8,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.xmargin": 0.02,
    "figure.facecolor": "none",
    "font.size": 10.5,
    "grid.color": _GRID,
    "grid.linewidth": 0.6,
    "legend.fontsize": 10.5,
    "legend.frameon": False,
    "legend.labelcolor": _INK,
    "lines.linewidth": 1.6,
    "svg.fonttype": "none",
    "svg.hashsalt": "dlrm",
    "text.color": _INK,
    "text.parse_math": False,  # names are names
    "xtick.color": _INK,
    "ytick.color": _INK,
}
_SVG = "http://www.w3.org/2000/svg"
_XLINK = "{http://www.w3.org/1999/xlink}href"


@dataclass(frozen=True)
class Line:
    """A curve and what it is called."""

    name: str
    curve: Curve


@dataclass(frozen=True)
class Drawing:
    """A figure on the page."""

    svg: Markup
    title: str
    description: str
    """What one sees, for those who do not."""


class _Sheet:
    """An empty figure; as a context, drawn in the page's style."""

    def __init__(self, height: float = _HEIGHT) -> None:
        self._style = mpl.rc_context(_STYLE)
        self._height = height

    def __enter__(self) -> tuple[Figure, Axes]:
        self._style.__enter__()
        size = (WIDTH / _POINTS_AN_INCH, self._height / _POINTS_AN_INCH)
        figure = Figure(figsize=size, layout="constrained")
        return figure, figure.add_subplot()

    def __exit__(self, *error: object) -> None:
        self._style.__exit__(None, None, None)


def draw_progress(
    key: str,
    title: str,
    description: str,
    *,
    lines: Sequence[Line],
    points: Sequence[Line],
    x_label: str,
    y_label: str,
) -> Drawing:
    """Draw values over the course of a training.

    Args:
        key: The figure's id in the page.
        title: What it is.
        description: What one sees.
        lines: Drawn as lines.
        points: Drawn as points that a line joins.
        x_label: Name and unit of the x axis.
        y_label: Of the y axis.
    """
    with _Sheet() as (figure, axes):
        number = 0
        for line in lines:
            axes.plot(line.curve.x, line.curve.y, label=line.name, **_series(number))
            number += 1
        for line in points:
            axes.plot(
                line.curve.x,
                line.curve.y,
                marker="o",
                markersize=4,
                label=line.name,
                **_series(number),
            )
            number += 1
        axes.set(xlabel=x_label, ylabel=y_label)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        if number > 1:
            _legend_above(figure, number)
        return _finish(figure, key, title, description)


def draw_roc(key: str, title: str, description: str, lines: Sequence[Line]) -> Drawing:
    """Draw ROC curves."""
    labels = ("False positive rate (share of non-clicks)", "True positive rate (share of clicks)")
    return _draw_rates(key, title, description, lines, labels, Line("chance", _DIAGONAL))


def draw_precision_recall(
    key: str, title: str, description: str, lines: Sequence[Line], click_rate: float
) -> Drawing:
    """Draw precision-recall curves."""
    labels = ("Recall (share of clicks)", "Precision (share that was clicked)")
    level = Curve(np.array([0.0, 1.0]), np.full(2, click_rate))
    return _draw_rates(key, title, description, lines, labels, Line("click rate", level))


_DIAGONAL = Curve(np.array([0.0, 1.0]), np.array([0.0, 1.0]))


def _draw_rates(
    key: str,
    title: str,
    description: str,
    lines: Sequence[Line],
    labels: tuple[str, str],
    guess: Line,
) -> Drawing:
    """Draw curves in the unit square, beside what a guess reaches; ``labels`` are of x and y."""
    with _Sheet() as (figure, axes):
        axes.plot(
            guess.curve.x,
            guess.curve.y,
            color=_INK,
            linewidth=0.8,
            linestyle=(0, (4, 3)),
            label=guess.name,
        )
        _draw_curves(axes, lines)
        axes.set(xlabel=labels[0], ylabel=labels[1], xlim=(0, 1), ylim=(0, 1.01))
        _legend_above(figure, len(lines) + 1)
        return _finish(figure, key, title, description)


def draw_calibration(
    key: str,
    title: str,
    description: str,
    predicted: npt.NDArray[np.float64],
    observed: npt.NDArray[np.float64],
    samples: npt.NDArray[np.int64],
) -> Drawing:
    """Draw the click rate of groups of rows over the mean of their probabilities.

    Args:
        key: The figure's id in the page.
        title: What it is.
        description: What one sees.
        predicted: (groups,) mean probability.
        observed: (groups,) click rate.
        samples: (groups,) rows, from which the bars follow: 95% intervals (Wilson).
    """
    low, high = wilson_interval(observed, samples)
    with _Sheet() as (figure, axes):
        most = 1.05 * max(predicted.max(), high.max())
        axes.plot(
            [0, most],
            [0, most],
            color=_INK,
            linewidth=0.8,
            linestyle=(0, (4, 3)),
            label="calibrated",
        )
        axes.errorbar(
            predicted,
            observed,
            yerr=(observed - low, high - observed),
            color=_SERIES[0],
            marker="o",
            markersize=4,
            linewidth=1.2,
            elinewidth=1,
            capsize=2,
            label="a tenth of the rows, with 95% interval",
        )
        axes.set(
            xlabel="Predicted (mean probability)",
            ylabel="Observed (click rate)",
            xlim=(0, most),
            ylim=(0, most),
        )
        _legend_above(figure, 2)
        return _finish(figure, key, title, description)


def draw_histogram(
    key: str,
    title: str,
    description: str,
    bins: npt.NDArray[np.float64],
    groups: Sequence[tuple[str, npt.NDArray[np.int64]]],
) -> Drawing:
    """Draw how many rows have which probability."""
    with _Sheet() as (figure, axes):
        for number, (name, counts) in enumerate(groups):
            axes.stairs(counts, bins, label=name, linewidth=1.6, **_series(number))
        axes.set(xlabel="Predicted probability", ylabel="Rows", xlim=(0, 1), ylim=(0, None))
        axes.yaxis.set_major_formatter(EngFormatter(sep=""))
        _legend_above(figure, len(groups))
        return _finish(figure, key, title, description)


def draw_bars(
    key: str,
    title: str,
    description: str,
    bars: Sequence[tuple[str, float, float, float]],
    x_label: str,
) -> Drawing:
    """Draw horizontal bars: a name, its value, the lowest and the highest."""
    names = [_shortened(name) for name, *_ in bars]
    values, low, high = (np.array([bar[i] for bar in bars]) for i in (1, 2, 3))
    with _Sheet(height=70 + 17 * len(bars)) as (figure, axes):
        places = np.arange(len(bars))
        axes.barh(places, values, color=_SERIES[0], height=0.62)
        axes.errorbar(
            values,
            places,
            xerr=(values - low, high - values),
            color=_INK,
            linestyle="none",
            elinewidth=1,
            capsize=2,
        )
        axes.axvline(0, color=_INK, linewidth=0.8)
        axes.set_yticks(places, names)
        axes.invert_yaxis()
        axes.grid(visible=False, axis="y")
        axes.set(xlabel=x_label)
        axes.xaxis.set_major_locator(MaxNLocator(4))
        return _finish(figure, key, title, description)


def draw_map(
    key: str,
    title: str,
    description: str,
    points: npt.NDArray[np.float32],
    groups: npt.NDArray[np.int64],
    names: Sequence[str],
) -> Drawing:
    """Draw points of a plane whose axes mean nothing, by groups of click rates.

    Args:
        key: The figure's id in the page.
        title: What it is.
        description: What one sees.
        points: (n, 2).
        groups: (n,) of each its group, from 0: the lowest rates.
        names: (RATE_GROUPS,) of the groups.
    """
    with _Sheet(height=WIDTH) as (figure, axes):
        _draw_groups(axes, points[:, 0], points[:, 1], groups, names)
        axes.set_aspect("equal", adjustable="datalim")
        axes.set(xticks=[], yticks=[])
        axes.margins(0.03)
        axes.spines[:].set(visible=True, color=_GRID)
        _legend_above(figure, len(names))
        return _finish(figure, key, title, description)


def draw_lengths(
    key: str,
    title: str,
    description: str,
    counts: npt.NDArray[np.int64],
    lengths: npt.NDArray[np.float64],
    groups: npt.NDArray[np.int64],
    names: Sequence[str],
) -> Drawing:
    """Draw the lengths of vectors over how many rows they were trained on.

    Args:
        key: The figure's id in the page.
        title: What it is.
        description: What one sees.
        counts: (n,) rows, on a logarithmic axis.
        lengths: (n,).
        groups: (n,) of each the group of its click rate, from 0: the lowest rates.
        names: (RATE_GROUPS,) of the groups.
    """
    with _Sheet() as (figure, axes):
        _draw_groups(axes, counts, lengths, groups, names)
        axes.set_xscale("log")
        axes.set(
            xlabel="Training rows with the value", ylabel="Length of its vector", ylim=(0, None)
        )
        axes.xaxis.set_major_locator(LogLocator(numticks=6))
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.xaxis.set_minor_locator(NullLocator())
        _legend_above(figure, len(names))
        return _finish(figure, key, title, description)


def draw_similarity(
    key: str,
    title: str,
    description: str,
    names: Sequence[str],
    matrix: npt.NDArray[np.float64],
) -> Drawing:
    """Draw how alike any two of several things are, the darker the more; the diagonal is left out.

    Args:
        key: The figure's id in the page.
        title: What it is.
        description: What one sees.
        names: (F,).
        matrix: (F, F), symmetric, from 0.
    """
    others = ~np.eye(len(names), dtype=np.bool_)
    most = max(0.1, math.ceil(10 * matrix[others].max() - 1e-9) / 10)
    places = np.arange(len(names))
    with _Sheet(height=WIDTH) as (figure, axes):
        for row, column in zip(*np.nonzero(others), strict=True):
            axes.add_patch(_cell((column, row), matrix[row, column] / most))
        axes.set(xlim=(-0.6, len(names) - 0.4), ylim=(len(names) - 0.4, -0.6), aspect="equal")
        labels = [_shortened(name, 16) for name in names]
        axes.set_xticks(places, labels, rotation=90, size=_SMALL)
        axes.set_yticks(places, labels, size=_SMALL)
        axes.tick_params(length=0)
        axes.grid(visible=False)
        axes.spines[:].set_visible(False)
        steps = [most * step / 4 for step in range(5)]
        figure.legend(
            [_cell((0, 0), step / most) for step in steps],
            [f"{step:.3g}" for step in steps],
            loc="outside upper left",
            ncols=5,
            borderaxespad=0,
            columnspacing=1.2,
            handlelength=1.2,
        )
        return _finish(figure, key, title, description)


def _cell(middle: tuple[float, float], share: float) -> Rectangle:
    x, y = middle
    return Rectangle(
        (x - 0.45, y - 0.45),
        0.9,
        0.9,
        facecolor=(_SERIES[0], float(share)),
        edgecolor=_GRID,
        linewidth=0.4,
    )


def _draw_groups(
    axes: Axes,
    x: npt.NDArray[Any],
    y: npt.NDArray[Any],
    groups: npt.NDArray[np.int64],
    names: Sequence[str],
) -> None:
    """Draw points by groups of click rates; the average ones lie below the others."""
    middle = RATE_GROUPS // 2
    for group, name in enumerate(names):
        own = groups == group
        axes.plot(
            x[own],
            y[own],
            linestyle="none",
            marker=_RATE_MARKERS[group],
            markersize=4,
            markeredgewidth=0,
            color=_RATES[group],
            label=name,
            zorder=2 + abs(group - middle) / 10,
        )


def wilson_interval(
    rates: npt.NDArray[np.float64], samples: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Return the 95% interval of a rate of so many samples (Wilson, 1927)."""
    z = QUANTILE
    middle = (rates + z * z / (2 * samples)) / (1 + z * z / samples)
    half = np.sqrt(rates * (1 - rates) / samples + (z / (2 * samples)) ** 2)
    half *= z / (1 + z * z / samples)
    return np.minimum(middle - half, rates), np.maximum(middle + half, rates)


def _draw_curves(axes: Axes, lines: Sequence[Line]) -> None:
    for number, line in enumerate(lines):
        axes.plot(line.curve.x, line.curve.y, label=line.name, **_series(number))


def _series(number: int) -> dict[str, Any]:
    return {"color": _SERIES[number], "linestyle": _DASHES[number]}


def _legend_above(figure: Figure, entries: int) -> None:
    """Put the legend above the axes, where no curve is."""
    (axes,) = figure.axes
    handles, labels = axes.get_legend_handles_labels()
    longest = max(map(len, labels))
    columns = max(1, min(entries, 52 // (longest + 6)))
    # The axes stay as high as they are.
    width, height = figure.get_size_inches()
    further_rows = math.ceil(entries / columns) - 1
    figure.set_size_inches(width, height + further_rows * _LEGEND_ROW / _POINTS_AN_INCH)
    figure.legend(
        handles,
        [_shortened(label, 44) for label in labels],
        loc="outside upper left",
        ncols=columns,
        borderaxespad=0,
        columnspacing=1.2,
        handlelength=2,
    )


def _shortened(text: str, length: int = 20) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"


def _finish(figure: Figure, key: str, title: str, description: str) -> Drawing:
    """Return a figure as SVG that belongs into a page."""
    file = io.BytesIO()
    figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    ElementTree.register_namespace("", _SVG)
    ElementTree.register_namespace("xlink", "http://www.w3.org/1999/xlink")
    root = ElementTree.fromstring(file.getvalue())
    for element in root.iter():
        for child in list(element):
            if child.tag.endswith(("}metadata", "}style")) or (
                child.get("id", "").startswith("patch_") and _is_invisible(child)
            ):
                element.remove(child)
    for element in root.iter():
        for name, value in list(element.items()):
            if name == "id":
                element.set(name, f"{key}-{value}")
            elif name == _XLINK:
                element.set("href", value.replace("#", f"#{key}-"))
                del element.attrib[name]
            elif name in ("style", "clip-path"):
                element.set(name, _style(value.replace("url(#", f"url(#{key}-")))
    del root.attrib["width"], root.attrib["height"]
    root.set("role", "img")
    root.set("aria-labelledby", f"{key}-title {key}-desc")
    for tag, text in (("desc", description), ("title", title)):
        element = ElementTree.Element(f"{{{_SVG}}}{tag}", id=f"{key}-{tag}")
        element.text = text
        root.insert(0, element)
    return Drawing(Markup(ElementTree.tostring(root, encoding="unicode")), title, description)


def _is_invisible(group: ElementTree.Element) -> bool:
    return all("fill: none; opacity: 0" in child.get("style", "") for child in group)


def _style(text: str) -> str:
    for colour, role in _ROLES.items():
        text = text.replace(colour, f"var(--{role})")
    # The page's font, in the size that was laid out for.
    text = re.sub(r"font: ([\d.]+px)[^;]*", r"font-size: \1", text)
    return re.sub(r"font-family: [^;]*;?", "", text)
