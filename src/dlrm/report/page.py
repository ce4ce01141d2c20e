"""``dlrm report``: a RUN, and those it is compared with, on one self-contained HTML page."""

from __future__ import annotations

import logging
import math
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from dlrm.comparison import Comparison
from dlrm.comparison import compare as compare_runs
from dlrm.config import TrainConfig
from dlrm.data.dataset import Dataset
from dlrm.data.synthetic import Truth
from dlrm.errors import UserError
from dlrm.files import atomic_write, read_json
from dlrm.metrics import Metrics
from dlrm.report.curves import Curve, Curves, curves_of
from dlrm.report.figures import (
    MOST_SERIES,
    Line,
    draw_bars,
    draw_calibration,
    draw_histogram,
    draw_precision_recall,
    draw_progress,
    draw_roc,
)
from dlrm.report.html import Shown, Table, output_path, render, rounded
from dlrm.report.importance import REPEATS, Importances, permutation_importance
from dlrm.runs import AnyRun, Run, RunResult, open_run
from dlrm.schema import Split
from dlrm.seed_table import HEADER, NOTE, PUBLISHED, distance_to_best, table_row

logger = logging.getLogger("dlrm")

IMPORTANCE_ROWS = 10_000
"""Rows of the test split that the importance of features is measured on, at most."""
_MOST_BARS = 25
_LINE_POINTS = 300
_LISTED_POINTS = 12
"""Rows of the table under a curve."""
_SPLIT: Split = "test"


@dataclass(frozen=True)
class _Subject:
    """A run and what its files hold."""

    name: str
    run: AnyRun
    result: RunResult
    labels: npt.NDArray[np.uint8]
    probabilities: npt.NDArray[np.float32]

    @property
    def test(self) -> Metrics:
        return self.result.metrics[_SPLIT]

    @property
    def kind(self) -> str:
        return "DLRM" if self.result.model == "dlrm" else _BASELINES[self.result.model]


_BASELINES = {"logistic": "logistic regression", "lightgbm": "LightGBM"}


def write_report(
    run: Path | str,
    output: Path | str | None = None,
    *,
    compare: Sequence[Path | str] = (),
    dataset: Path | str | None = None,
    truth: Path | str | None = None,
    importance_rows: int = IMPORTANCE_ROWS,
) -> Path:
    """Write a page about a finished RUN, of a DLRM or of a baseline.

    Args:
        run: The RUN folder.
        output: The file; None: ``RUN/report.html``.
        compare: Other runs on the same test rows, to show beside it.
        dataset: Where its DATASET is now; None: where it was.
        truth: The ``truth.json`` of made-up data; None: the DATASET's, if it has one.
        importance_rows: Measure the importance of features on so many rows of the test split; 0:
            do not.

    Returns:
        The file.

    Raises:
        UserError: A run has not ended or is damaged, or one to compare with is of other rows.
        EnvironmentFaultError: The disk is full or read-only.
    """
    run = Path(run)
    path = output_path(output, run / "report.html")
    if importance_rows < 0:
        raise UserError(f"--importance-rows must not be negative; got {importance_rows}.")
    if len(compare) >= MOST_SERIES:
        raise UserError(
            f"--compare takes at most {MOST_SERIES - 1} runs, as many as can be told apart in a "
            f"figure; got {len(compare)}."
        )
    names = _names([run, *map(Path, compare)])
    subject, *others = (
        _read(name, Path(each)) for name, each in zip(names, (run, *compare), strict=True)
    )
    comparison = compare_runs([run, *map(Path, compare)]) if others else None
    data, missing = _open_dataset(subject.run, Path(dataset) if dataset else None)
    known = _known_truth(subject, data, Path(truth) if truth else None)
    page = _page(subject, others, comparison, data, missing, known, importance_rows)
    with atomic_write(path) as file:
        file.write(page)
    return path


def _names(paths: Sequence[Path]) -> list[str]:
    """Return a short name of each folder; the whole path where short ones are equal."""
    short = [path.resolve().name for path in paths]
    return [
        name if short.count(name) == 1 else str(path)
        for name, path in zip(short, paths, strict=True)
    ]


def _read(name: str, path: Path) -> _Subject:
    run = open_run(path)
    result = run.result()
    if _SPLIT not in result.metrics:
        raise UserError(f"{path / 'result.json'} has no metrics of {_SPLIT}. Train again.")
    labels, probabilities = run.predictions(_SPLIT).arrays()
    return _Subject(name, run, result, labels, probabilities)


def _open_dataset(run: AnyRun, place: Path | None) -> tuple[Dataset | None, str]:
    """Open the DATASET of a run; None and why, where it is gone and nobody said where to."""
    try:
        return run.open_dataset(place), ""
    except UserError as error:
        if place:
            raise
        return None, f"the DATASET cannot be used ({error})"


def _known_truth(subject: _Subject, data: Dataset | None, path: Path | None) -> Truth | None:
    """Read the truth of the very rows that were tested, if there is one."""
    if path is None and data and (data.path / "truth.json").exists():
        path = data.path / "truth.json"
    if path is None:
        return None
    truth = read_json(path, Truth, "set of made-up data")
    return truth if truth.test.samples == subject.test.samples else None


def _page(
    subject: _Subject,
    others: Sequence[_Subject],
    comparison: Comparison | None,
    data: Dataset | None,
    missing: str,
    truth: Truth | None,
    importance_rows: int,
) -> bytes:
    run, result, test = subject.run, subject.result, subject.test
    figures = _learning(run)
    skipped: list[str] = []
    if 0 < int(subject.labels.sum()) < len(subject.labels):
        figures += _curves(subject, others)
    else:
        skipped.append(
            f"The {test.samples} test rows do not have both labels, so there are no curves of "
            "them, and no AUC."
        )
    importances, reason = _importances(subject, data, missing, importance_rows)
    own_row = table_row(run, result)
    return render(
        "report.html.jinja",
        name=subject.name,
        kind=subject.kind,
        headline=_headline(subject, truth),
        facts=_facts(subject, truth),
        seed_table=Table(HEADER, (*PUBLISHED, own_row), highlighted=len(PUBLISHED)),
        seed_note=NOTE,
        metrics=_metrics_table(result),
        comparison=_comparison(subject, others, comparison) if comparison else None,
        figures=figures,
        skipped=skipped,
        importance=_importance_figure(importances) if importances else None,
        importance_skipped=reason,
        importance_table=_importance_table(importances) if importances else None,
        time_and_memory=_time_and_memory(result),
        configuration=Table(("option", "value"), tuple(_flat(msgspec.to_builtins(run.config)))),
        dataset=str(run.dataset),
        versions=Table(("package", "version"), tuple(result.versions.items())),
        hardware=Table(
            ("", ""), tuple((key, str(value)) for key, value in result.hardware.items())
        ),
        command=shlex.join(["dlrm", "report", str(run.path), *_compare_options(others)]),
    )


def _compare_options(others: Sequence[_Subject]) -> list[str]:
    return ["--compare", *(str(other.run.path) for other in others)] if others else []


def _headline(subject: _Subject, truth: Truth | None) -> str:
    test = subject.test
    if math.isnan(test.auc):
        return f"This {subject.kind} was tested on {test.samples:,} rows; its AUC is undefined."
    text = f"This {subject.kind} has a test AUC of {_with_interval(test.auc, test.auc_interval)}"
    if truth and truth.test.auc is not None:
        text += f", where {truth.test.auc:.4f} is the best possible"
    return text + "."


def _facts(subject: _Subject, truth: Truth | None) -> list[str]:
    """Return what the metrics say, in sentences."""
    test, config = subject.test, subject.run.config
    facts = []
    if not math.isnan(test.auc):
        facts.append(
            f"Of a clicked and an unclicked row of the {test.samples:,} test rows, it gives the "
            f"clicked one the higher probability {test.auc:.1%} of the time."
        )
    if not math.isnan(test.normalized_entropy):
        change = 1 - test.normalized_entropy
        facts.append(
            f"Its log loss is {_with_interval(test.log_loss, test.log_loss_interval)}, "
            f"{abs(change):.1%} {'below' if change >= 0 else 'above'} that of predicting the same "
            "click rate for every row."
        )
    if not math.isnan(test.calibration):
        clicks = int(subject.labels.sum())
        facts.append(
            f"It predicts {test.calibration * clicks:,.1f} clicks where {clicks:,} occurred "
            f"(calibration {test.calibration:.4f})."
        )
    if isinstance(config, TrainConfig) and config.selection_split == _SPLIT:
        facts.append(
            "Its checkpoint was chosen on these very test rows (--selection-split test), so its "
            "test metrics are optimistic."
        )
    if truth and not math.isnan(test.auc):
        facts.append(" ".join(distance_to_best(test, truth)))
    return facts


def _with_interval(value: float, interval: tuple[float, float]) -> str:
    low, high = interval
    if math.isnan(low):
        return rounded(value)
    return f"{value:.4f} (95% interval {low:.4f} to {high:.4f})"


_METRIC_NAMES = {
    "auc": "ROC AUC",
    "log_loss": "log loss (nats)",
    "normalized_entropy": "normalized entropy",
    "calibration": "calibration (predicted / observed clicks)",
    "average_precision": "average precision",
    "accuracy": "accuracy",
    "precision": "precision",
    "recall": "recall",
    "f1": "F1",
}


def _metrics_table(result: RunResult) -> Table:
    splits = list(result.metrics)
    rows = [
        (text, *(rounded(getattr(result.metrics[split], name), 6) for split in splits))
        for name, text in _METRIC_NAMES.items()
    ]
    for name, text in (("auc", "ROC AUC"), ("log_loss", "log loss")):
        intervals = (getattr(result.metrics[split], f"{name}_interval") for split in splits)
        cells = (f"{rounded(low)} to {rounded(high)}" for low, high in intervals)
        rows.append((f"{text}, 95% interval", *cells))
    rows.append(("rows", *(f"{result.metrics[split].samples:,}" for split in splits)))
    rows.append(
        (
            "values without an id (not in the vocabulary)",
            *(f"{result.unknown_ids[s]:,}" for s in splits),
        )
    )
    return Table(("metric", *splits), tuple(rows))


def _comparison(subject: _Subject, others: Sequence[_Subject], comparison: Comparison) -> Table:
    """Return the runs' metrics, and of the others how they differ from this run's."""
    rows = []
    for number, each in enumerate((subject, *others)):
        name = comparison.runs[number].name
        differences = {
            each.metric: f"{each.difference:+.4f} ({each.on_rows.interval[0]:+.4f} to "
            f"{each.on_rows.interval[1]:+.4f})"
            for each in comparison.differences
            if each.second == (name,)
        }
        test = each.test
        rows.append(
            (
                each.name,
                each.kind,
                rounded(test.auc),
                differences.get("auc", "-"),
                rounded(test.log_loss),
                differences.get("log_loss", "-"),
                rounded(test.normalized_entropy),
                rounded(test.calibration),
            )
        )
    header = (
        "run",
        "model",
        "AUC",
        "difference of the AUC",
        "log loss",
        "difference of the log loss",
        "normalized entropy",
        "calibration",
    )
    return Table(header, tuple(rows), highlighted=0)


def _learning(run: AnyRun) -> list[Shown]:
    """Return figures of how training went, from its log."""
    events = run.log()
    if not isinstance(run.config, TrainConfig):
        return _learning_of_baseline(events)
    reports = [event for event in events if event["event"] == "report"]
    evaluations = [event for event in events if event["event"] == "evaluation"]
    if not reports:
        return []
    loss = run.config.loss.loss
    train = _curve((event["position"]["total_steps"], event["loss"]) for event in reports)
    split = run.config.selection_split
    name = "log loss" if loss == "bce" else f"loss ({loss})"
    lines = [Line(f"training {name}", _averaged(train))]
    points = []
    if loss == "bce":
        held_back = _curve(
            (event["position"]["total_steps"], event["metrics"]["log_loss"])
            for event in evaluations
        )
        points.append(Line(f"{split} log loss", held_back))
    unit = "nats" if loss != "mse" else "squared probability"
    x_label = f"Step (of {run.config.step_rows:,} rows)"
    fell = f"from {train.y[0]:.4f} to {train.y[-1]:.4f}"
    drawing = draw_progress(
        "loss",
        "Loss while training",
        f"A line of the training {name} over {len(reports)} reports, {fell}."
        + (f" {len(evaluations)} evaluations on {split} are marked." if points else ""),
        lines=lines,
        points=points,
        x_label=x_label,
        y_label=f"{name.capitalize()} ({unit})",
    )
    shown = [
        Shown(
            drawing,
            _table_of_lines("step", [*lines, *points]),
            "Each point of the training line is the mean since the report before.",
        )
    ]
    if len(evaluations) > 1:
        aucs = _curve(
            (event["position"]["total_steps"], event["metrics"]["auc"]) for event in evaluations
        )
        best = float(np.nanmax(aucs.y)) if not np.isnan(aucs.y).all() else math.nan
        line = Line(f"{split} AUC", aucs)
        drawing = draw_progress(
            "auc",
            f"AUC of {split} while training",
            f"{len(evaluations)} evaluations, the best {rounded(best)}.",
            lines=[],
            points=[line],
            x_label=x_label,
            y_label="ROC AUC",
        )
        shown.append(Shown(drawing, _table_of_lines("step", [line])))
    return shown


def _learning_of_baseline(events: Sequence[Mapping[str, Any]]) -> list[Shown]:
    rounds = [event for event in events if event["event"] in ("pass", "tree")]
    if not rounds:
        return []
    name = str(rounds[0]["event"])
    curve = _curve((event["number"], event["validation_log_loss"]) for event in rounds)
    line = Line("validation log loss", curve)
    best = int(np.argmin(curve.y))
    drawing = draw_progress(
        "loss",
        "Loss while training",
        f"The log loss of validation after each {name}, lowest after {name} {best + 1}: "
        f"{curve.y[best]:.4f}.",
        lines=[line],
        points=[],
        x_label="Pass over the training rows" if name == "pass" else "Trees",
        y_label="Validation log loss (nats)",
    )
    return [Shown(drawing, _table_of_lines(name, [line]))]


def _curves(subject: _Subject, others: Sequence[_Subject]) -> list[Shown]:
    """Return the figures of the test split."""
    test = subject.test
    of_all = [(each, curves_of(each.labels, each.probabilities)) for each in (subject, *others)]
    curves = of_all[0][1]
    rate = float(subject.labels.mean(dtype=np.float64))
    auc = "; ".join(f"{each.name}: {each.test.auc:.4f}" for each, _ in of_all)
    precision = "; ".join(f"{each.name}: {each.test.average_precision:.4f}" for each, _ in of_all)
    roc_lines = [Line(_with(each.name, each.test.auc), own.roc) for each, own in of_all]
    pr_lines = [
        Line(_with(each.name, each.test.average_precision), own.precision_recall)
        for each, own in of_all
    ]
    return [
        Shown(
            draw_roc(
                "roc",
                "ROC curve, test",
                f"True positive rate over false positive rate. Area under the curve: {auc}.",
                roc_lines,
            ),
            _table_of_curve(("false positive rate", "true positive rate"), curves.roc),
            "The numbers are areas under the curves (AUC).",
        ),
        Shown(
            draw_precision_recall(
                "precision-recall",
                "Precision and recall, test",
                f"Precision over recall. Average precision: {precision}; the click rate is "
                f"{rate:.4f}.",
                pr_lines,
                rate,
            ),
            _table_of_curve(("recall", "precision"), curves.precision_recall),
            "The numbers are average precisions.",
        ),
        *([_calibration(subject)] if test.calibration_by_decile else []),
        _histogram(curves, test),
    ]


def _with(name: str, value: float) -> str:
    return f"{name if len(name) <= 28 else name[:27] + '…'} {value:.4f}"


def _calibration(subject: _Subject) -> Shown:
    """Return the figure of predicted and observed clicks by tenths of the rows."""
    deciles = subject.test.calibration_by_decile
    samples = np.array([decile.samples for decile in deciles])
    drawing = draw_calibration(
        "calibration",
        "Calibration, test",
        "Click rate over mean predicted probability, by tenths of the rows from the lowest to the "
        f"highest probability. Over all rows the ratio of predicted to observed clicks is "
        f"{subject.test.calibration:.4f}.",
        np.array([decile.predicted for decile in deciles]),
        np.array([decile.observed for decile in deciles]),
        samples,
    )
    rows = tuple(
        (
            str(decile.decile),
            f"{decile.samples:,}",
            f"{decile.predicted:.4f}",
            f"{decile.observed:.4f}",
        )
        for decile in deciles
    )
    least, most = f"{samples.min():,}", f"{samples.max():,}"
    return Shown(
        drawing,
        Table(("tenth", "rows", "predicted", "observed"), rows),
        f"Each point is {least if least == most else f'{least} to {most}'} rows.",
    )


def _histogram(curves: Curves, test: Metrics) -> Shown:
    drawing = draw_histogram(
        "histogram",
        "Predicted probabilities, test",
        f"How many of the {test.samples:,} rows have which probability, clicked and not clicked.",
        curves.bins,
        [("not clicked", curves.not_clicked), ("clicked", curves.clicked)],
    )
    rows = tuple(
        (f"{low:.2f} to {high:.2f}", f"{no:,}", f"{yes:,}")
        for low, high, no, yes in zip(
            curves.bins[:-1], curves.bins[1:], curves.not_clicked, curves.clicked, strict=True
        )
    )
    return Shown(drawing, Table(("probability", "not clicked", "clicked"), rows))


def _importances(
    subject: _Subject, data: Dataset | None, missing: str, rows: int
) -> tuple[Importances | None, str]:
    """Measure the importance of features, or say why not."""
    run = subject.run
    if not isinstance(run, Run):
        return None, "the model of a baseline is not kept"
    if not rows:
        command = shlex.join(["dlrm", "report", str(run.path)])
        return None, f"that takes longer than all the rest; `{command}` does it"
    if data is None:
        return None, missing
    which = subject.result.checkpoint
    if not run.checkpoint(which).exists():
        return None, f"the run has no checkpoint {which!r} any more"
    if not data.rows(_SPLIT):
        return None, "the test split has no rows"
    found = permutation_importance(run, data, _SPLIT, rows, checkpoint=which)
    if math.isnan(found.before.auc):
        return None, "the rows it would be measured on do not have both labels"
    return found, ""


def _importance_figure(found: Importances) -> Shown:
    bars = [
        (each.name, each.auc_drop, each.lowest, each.highest)
        for each in found.features[:_MOST_BARS]
    ]
    first = found.features[0]
    drawing = draw_bars(
        "importance",
        "What the AUC loses without a feature",
        f"The {len(bars)} features with the largest drop of the AUC; the first is {first.name} "
        f"({first.auc_drop:.4f}).",
        bars,
        "Drop of the AUC",
    )
    note = (
        f"Measured on {found.rows:,} rows evenly spread over the test split, where the AUC is "
        f"{found.before.auc:.4f}: the values of one feature are shuffled among the rows, which "
        f"takes away what it tells. Bars are means of {REPEATS} shuffles, whiskers their range. "
        "Features that tell the same share their importance."
    )
    if len(bars) < len(found.features):
        note += (
            f" Drawn are the {len(bars)} of {len(found.features)} features with the largest drop; "
            "the numbers below have all."
        )
    return Shown(drawing, _importance_table(found), note)


def _importance_table(found: Importances) -> Table:
    rows = tuple(
        (
            each.name,
            each.kind,
            f"{each.auc_drop:.5f}",
            f"{each.lowest:.5f} to {each.highest:.5f}",
            f"{each.log_loss_rise:.5f}",
        )
        for each in found.features
    )
    return Table(("feature", "kind", "AUC drop", "range", "log loss rise"), rows)


def _time_and_memory(result: RunResult) -> Table:
    rows = [
        ("training rows seen, all passes", f"{result.train_samples:,}"),
        ("steps", f"{result.train_steps:,}"),
        ("training rate", f"{result.samples_per_second:,.0f} samples/s"),
        ("time from start to result", _duration(result.seconds)),
        ("peak memory of the process", f"{result.peak_memory_bytes / 2**30:.2f} GiB"),
        *_table_size(result),
        ("device", result.device),
        ("kernels", f"{result.kernels}: {result.kernels_reason}"),
        ("training ended", result.stopped),
    ]
    if result.skipped_steps:
        rows.append(("steps skipped, a gradient was not finite", f"{result.skipped_steps:,}"))
    return Table(("", ""), tuple(rows))


def _table_size(result: RunResult) -> list[tuple[str, str]]:
    if not result.table_bytes:
        return []
    size = f"{result.table_bytes / 1e6:,.1f} MB"
    if result.table_bytes != result.whole_table_bytes:
        size += f"; a vector for each id would take {result.whole_table_bytes / 1e6:,.1f} MB"
    return [("embedding tables", size)]


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def _flat(content: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, str]]:
    for key, value in content.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            text = " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
            yield f"{prefix}{key}", text


def _curve(points: Iterable[tuple[float, float | None]]) -> Curve:
    pairs = [(x, math.nan if y is None else y) for x, y in points]
    array = np.array(pairs, np.float64).reshape(-1, 2)
    return Curve(array[:, 0], array[:, 1])


def _averaged(curve: Curve) -> Curve:
    """Return at most so many points as can be seen: means of runs of them."""
    if len(curve.x) <= _LINE_POINTS:
        return curve
    runs = np.array_split(np.arange(len(curve.x)), _LINE_POINTS)
    return Curve(
        np.array([curve.x[run].mean() for run in runs]),
        np.array([curve.y[run].mean() for run in runs]),
    )


def _listed(count: int) -> list[int]:
    """Return which of so many points a table lists: evenly spread, with the first and the last."""
    return sorted({round(i) for i in np.linspace(0, count - 1, min(count, _LISTED_POINTS))})


def _table_of_curve(header: tuple[str, str], curve: Curve) -> Table:
    rows = ((f"{curve.x[i]:.4f}", f"{curve.y[i]:.4f}") for i in _listed(len(curve.x)))
    return Table(header, tuple(rows))


def _table_of_lines(x_name: str, lines: Sequence[Line]) -> Table:
    rows = [
        (line.name, f"{line.curve.x[i]:,.0f}", rounded(float(line.curve.y[i]), 6))
        for line in lines
        if len(line.curve.x)
        for i in _listed(len(line.curve.x))
    ]
    return Table(("line", x_name, "value"), tuple(rows))
