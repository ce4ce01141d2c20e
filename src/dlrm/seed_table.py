"""A run's row beside the published ones: in reports, and the last lines of ``test/``'s scripts."""

from __future__ import annotations

import unicodedata
from pathlib import Path

from dlrm.config import TrainConfig
from dlrm.data.synthetic import Truth
from dlrm.files import read_json
from dlrm.metrics import Metrics
from dlrm.runs import AnyRun, Run, RunResult

HEADER = (
    "NAME",
    "AUC",
    "accuracy",
    "samples/s",
    "Epoch",
    "rows an epoch",
    "batch",
    "AMP_Type",
    "Torch_Version",
)
PUBLISHED = (
    ("1p-竞品V", "0.8024", "-", "8344.198", "1", "39291958", "128", "O1", "1.5"),
    ("1p-NPU", "0.8024", "-", "3655.054", "1", "39291958", "128", "O1", "1.8"),
)
_NOTE = (
    "The upper rows are those published for the Ascend adaptation: one card, the 39.3 million\n"
    "training rows of the Criteo Kaggle data, batches of 128. Their 0.8024, which is headed ACC\n"
    "where it was published, is a ROC AUC; an accuracy was not given."
)
NOTE = _NOTE.replace("\n", " ")
"""What to know of the published rows."""


def describe(run: Path, truth: Path | None = None) -> str:
    """Return a finished run's table row, and how close it came to the best possible AUC.

    Args:
        run: A RUN folder.
        truth: The ``truth.json`` of the made-up data it was trained on.

    Raises:
        UserError: The run has not ended, or a file is damaged.
    """
    known = None if truth is None else read_json(truth, Truth, "set of made-up data")
    opened = Run.open(run)
    result = opened.result()
    return format_table(table_row(opened, result), result.metrics.get("test"), known)


def table_row(run: AnyRun, result: RunResult) -> tuple[str, ...]:
    """Return a run's cells under ``HEADER``; "-" where there is nothing to tell."""
    test = result.metrics.get("test")
    starts = [event for event in run.log() if event["event"] == "start"]
    is_dlrm = isinstance(run.config, TrainConfig)
    device = result.device.partition(":")[0].upper()
    return (
        f"1p-{device}" if is_dlrm else f"{result.model}-{device}",
        f"{test.auc:.4f}" if test else "-",
        f"{test.accuracy:.4f}" if test else "-",
        f"{result.samples_per_second:.3f}",
        f"{result.epochs:.3g}",
        str(starts[0]["train_rows"]) if starts else "-",
        str(run.config.step_rows) if isinstance(run.config, TrainConfig) else "-",
        result.amp_type,
        result.versions["torch"] if is_dlrm else "-",
    )


def format_table(row: tuple[str, ...], test: Metrics | None, truth: Truth | None) -> str:
    """Return the text that ``describe`` does, of what the files hold."""
    rows = (HEADER, *PUBLISHED, row)
    widths = [max(_width(row[column]) for row in rows) for column in range(len(HEADER))]
    lines = [_line(row, widths) for row in rows]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    lines += ["", _NOTE]
    if test and truth and (sentences := distance_to_best(test, truth)):
        lines += ["", *sentences]
    return "\n".join(lines) + "\n"


def distance_to_best(test: Metrics, truth: Truth) -> tuple[str, ...]:
    """Return in words, a line each, how close a run came to the best possible AUC, if it is known.

    Args:
        test: Metrics of the test split.
        truth: Of the made-up data.
    """
    best = truth.test.auc
    if best is None:
        return ()
    share = (test.auc - 0.5) / (best - 0.5)
    return (
        f"This run's data is made up, and its best possible AUC is known: {best:.4f}. The run",
        f"reached {test.auc:.4f}, {share:.1%} of the way from chance (0.5) to it.",
    )


def _line(row: tuple[str, ...], widths: list[int]) -> str:
    cells = (cell + " " * (width - _width(cell)) for cell, width in zip(row, widths, strict=True))
    return "| " + " | ".join(cells) + " |"


def _width(text: str) -> int:
    """Return how many columns of a terminal a text takes; a Chinese character takes two."""
    return sum(2 if unicodedata.east_asian_width(character) in "WF" else 1 for character in text)
