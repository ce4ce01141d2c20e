"""A picture of latency over load."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

from dlrm.errors import UserError
from dlrm.files import environment_faults
from dlrm.loadtest.bench import BenchServeResult

_COLOURS = ("#0b5fad", "#b3400a", "#157038")
_DASHES = ("solid", (0, (5, 2)), (0, (2, 1.5)))
_STYLE: dict[Any, Any] = {
    "axes.grid": True,
    "font.size": 11,
    "grid.color": "#d9dfe5",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "svg.hashsalt": "dlrm",
}
FORMATS = (".svg", ".png", ".pdf")


def refuse_format(path: Path) -> None:
    """Refuse a file that no picture can go to, before anything is measured.

    Raises:
        UserError: Its name has another ending, or its folder does not exist.
    """
    if path.suffix not in FORMATS:
        raise UserError(
            f"--picture {path} must end in one of {', '.join(FORMATS)}, which is its format."
        )
    if not path.absolute().parent.is_dir():
        raise UserError(f"{path.parent} is not a folder, so {path} cannot be written. Make it.")


def draw_latency(result: BenchServeResult, path: Path) -> None:
    """Draw percentiles of latency over the offered load, with the limits, into a file.

    Args:
        result: What was measured.
        path: The picture; its ending is its format.

    Raises:
        EnvironmentFaultError: It cannot be written.
    """
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(7.5, 4.8), layout="constrained")
        axes = figure.add_subplot()
        for number, share in enumerate((50, 90, 99)):
            drawn = [
                (point.rate, value)
                for point in result.points
                if (value := getattr(point, f"p{share}_ms")) is not None
            ]
            axes.plot(
                [rate for rate, _ in drawn],
                [value for _, value in drawn],
                color=_COLOURS[number],
                linestyle=_DASHES[number],
                marker="o",
                markersize=3.5,
                label=f"p{share}",
            )
        for held in result.held:
            axes.axhline(held.limit_ms, color="#55606b", linewidth=0.8, linestyle=(0, (4, 3)))
            rate = "no rate" if held.point is None else f"{held.point.rate:,.0f} requests/s"
            axes.annotate(
                f"p99 ≤ {held.limit_ms:g} ms: {rate}",
                (0, held.limit_ms),
                (4, 3),
                xycoords=("axes fraction", "data"),
                textcoords="offset points",
                fontsize=9,
                color="#55606b",
            )
        axes.axvline(
            result.offline.rate, color="#55606b", linewidth=0.8, label="answered when saturated"
        )
        axes.set(
            xlabel="Offered requests a second",
            ylabel="Latency (ms), from when a request was due",
            yscale="log",
            xlim=(0, None),
        )
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
        figure.legend(loc="outside upper left", ncols=4, borderaxespad=0)
        metadata = {"Date": None} if path.suffix == ".svg" else None
        with environment_faults(f"write {path}"):
            figure.savefig(path, dpi=150, metadata=metadata)
