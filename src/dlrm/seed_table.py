"""The last lines of the scripts under ``test/``: a run's row beside the published ones."""

from __future__ import annotations

import unicodedata
from pathlib import Path

from dlrm.data.synthetic import Truth
from dlrm.files import read_json
from dlrm.runs import Run, RunResult

_HEADER = ("NAME", "AUC", "accuracy", "samples/s", "Epoch", "AMP_Type", "Torch_Version")
_PUBLISHED = (
    ("1p-竞品V", "0.8024", "-", "8344.198", "1", "O1", "1.5"),
    ("1p-NPU", "0.8024", "-", "3655.054", "1", "O1", "1.8"),
)
_NOTE = (
    "The upper rows are those published for the Ascend adaptation: one card, all 45.8 million\n"
    "rows of the Criteo Kaggle data, batches of 128. Their 0.8024, which is headed ACC where it\n"
    "was published, is a ROC AUC; an accuracy was not given."
)


def describe(run: Path, truth: Path | None = None) -> str:
    """Return a finished run's table row, and how close it came to the best possible AUC.

    Args:
        run: A RUN folder.
        truth: The ``truth.json`` of the made-up data it was trained on.

    Raises:
        UserError: The run has not ended, or a file is damaged.
    """
    known = None if truth is None else read_json(truth, Truth, "set of made-up data")
    return format_table(Run.open(run).result(), known)


def format_table(result: RunResult, truth: Truth | None) -> str:
    """Return the text that ``describe`` does, of what the files hold."""
    test = result.metrics.get("test")
    ours = (
        f"1p-{result.device.partition(':')[0].upper()}",
        f"{test.auc:.4f}" if test else "-",
        f"{test.accuracy:.4f}" if test else "-",
        f"{result.samples_per_second:.3f}",
        f"{result.epochs:.3g}",
        result.amp_type,
        result.versions["torch"],
    )
    rows = (_HEADER, *_PUBLISHED, ours)
    widths = [max(_width(row[column]) for row in rows) for column in range(len(_HEADER))]
    lines = [_line(row, widths) for row in rows]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    lines += ["", _NOTE]
    best = truth.test.auc if truth else None
    if test and best is not None:
        share = (test.auc - 0.5) / (best - 0.5)
        lines += [
            "",
            f"This run's data is made up, and its best possible AUC is known: {best:.4f}. The run\n"
            f"reached {test.auc:.4f}, {share:.1%} of the way from chance (0.5) to it.",
        ]
    return "\n".join(lines) + "\n"


def _line(row: tuple[str, ...], widths: list[int]) -> str:
    cells = (cell + " " * (width - _width(cell)) for cell, width in zip(row, widths, strict=True))
    return "| " + " | ".join(cells) + " |"


def _width(text: str) -> int:
    """Return how many columns of a terminal a text takes; a Chinese character takes two."""
    return sum(2 if unicodedata.east_asian_width(character) in "WF" else 1 for character in text)
