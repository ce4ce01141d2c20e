"""Do runs differ beyond noise? ``docs/compare.md`` tells what is computed and how to read it.

Two questions are kept apart. *Do these models differ on these rows?* is answered from their
predictions, however few runs there are. *Does one recipe differ from another beyond what another
seed would give?* is the verdict, and needs several seeds of each, or a stated noise of seeds.
"""

from __future__ import annotations

import math
import statistics
import textwrap
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Any, Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from dlrm.errors import UserError
from dlrm.metrics import DEFAULT_MEMORY, QUANTILE, Metrics
from dlrm.paired import Paired, compare_rows, refuse_other_rows
from dlrm.predictions import Predictions
from dlrm.schema import Split

SEEDS = 3
"""Runs of a recipe from which the noise of seeds is estimated, at least."""
SIGNIFICANCE = 0.05

MetricName = Literal["auc", "log_loss"]
Conclusion = Literal["higher", "lower", "no difference beyond noise", "not known"]


@dataclass(frozen=True)
class ComparedRun:
    """A run and how it does on the split."""

    name: str
    """What the tables call it: A, B …, or of two recipes A1, A2 … and B1, B2 …"""
    run: str
    """Its folder."""
    seed: int | None
    """From its configuration."""
    metrics: Metrics


@dataclass(frozen=True)
class Estimate:
    """A difference, how far it may be off, and how surprising it would be if there were none."""

    standard_error: float
    interval: tuple[float, float]
    """95%."""
    p: float


@dataclass(frozen=True)
class Difference:
    """Of a metric between two sides, each one run or several seeds of a recipe."""

    metric: MetricName
    first: tuple[str, ...]
    """Names of the runs of the side that is subtracted from."""
    second: tuple[str, ...]
    """Of the side that is subtracted."""
    difference: float
    """Mean of the first side minus mean of the second."""
    on_rows: Estimate
    """These very models, on other rows of the same kind: DeLong for the AUC, else normal."""
    over_seeds: Estimate | None
    """These very rows, with other seeds: Welch's t-test over runs, or the stated noise."""
    conclusion: Conclusion
    """Of the first side's recipe against the second's, from over_seeds."""


@dataclass(frozen=True)
class LossCurves:
    """Mean training losses, at the steps at which all runs have reported one."""

    steps: tuple[int, ...]
    loss: dict[str, tuple[float, ...]]
    """By the run's name; a run that logged no loss has none."""


@dataclass(frozen=True)
class Comparison:
    """What ``dlrm compare`` prints."""

    split: Split
    rows: int
    runs: tuple[ComparedRun, ...]
    differences: tuple[Difference, ...]
    seed_noise: dict[MetricName, float]
    """Standard deviation over seeds, of the metrics for which it was stated."""
    verdict: tuple[str, ...]
    """In sentences."""
    configuration: dict[str, dict[str, Any]]
    """Keys of config.toml that differ: the value of each run, by its name; null: it has none."""
    notes: tuple[str, ...]
    """What to bear in mind."""
    loss_curves: LossCurves


def compare(
    runs: Sequence[Path],
    against: Sequence[Path] = (),
    *,
    split: Split = "test",
    seed_noise: float | None = None,
    seed_noise_log_loss: float | None = None,
    same_rows: bool = False,
    memory: int = DEFAULT_MEMORY,
) -> Comparison:
    """Compare runs by their predictions of the same rows.

    Args:
        runs: RUN folders. With ``against``, seeds of one recipe; else the first is compared with
            each of the others.
        against: Seeds of another recipe.
        split: Whose predictions.
        seed_noise: Standard deviation of the AUC over seeds of a recipe, where it is known.
        seed_noise_log_loss: The same of the log loss.
        same_rows: The runs' DATASETs hold the same rows in the same order, whatever their
            fingerprints say.
        memory: The most to use for sorting, in bytes.

    Raises:
        UserError: There are fewer than two runs, one is named twice, two of a side predict the
            same, they are of different rows, or a file is missing or damaged.
        EnvironmentFaultError: The disk is full or fails.
    """
    paths = [*runs, *against]
    _check(paths, runs, against, seed_noise, seed_noise_log_loss)
    predictions = [
        Predictions.open(path / "predictions" / f"{split}.arrow", split) for path in paths
    ]
    refuse_other_rows(predictions, same_rows=same_rows)
    configurations = [_configuration(path) for path in paths]
    names = _names(len(runs), len(against))
    if against:
        sides = [(list(range(len(runs))), list(range(len(runs), len(paths))))]
    else:
        sides = [([0], [other]) for other in range(1, len(paths))]
    paired = compare_rows(predictions, memory=memory)
    _refuse_copies(sides[0], paths, paired)

    noise: dict[MetricName, float] = {}
    if seed_noise is not None:
        noise["auc"] = seed_noise
    if seed_noise_log_loss is not None:
        noise["log_loss"] = seed_noise_log_loss
    metrics: tuple[MetricName, ...] = ("auc", "log_loss")
    differences = tuple(
        _difference(metric, first, second, names, paired, noise.get(metric))
        for first, second in sides
        for metric in metrics
    )
    return Comparison(
        split=split,
        rows=predictions[0].rows,
        runs=tuple(
            ComparedRun(name, str(path), _seed(configuration), of)
            for name, path, configuration, of in zip(
                names, paths, configurations, paired.metrics, strict=True
            )
        ),
        differences=differences,
        seed_noise=noise,
        verdict=_verdict(differences),
        configuration=_differing(dict(zip(names, configurations, strict=True))),
        notes=tuple(_notes(sides, names, configurations, predictions, paired)),
        loss_curves=_loss_curves(dict(zip(names, paths, strict=True))),
    )


def _check(
    paths: Sequence[Path],
    runs: Sequence[Path],
    against: Sequence[Path],
    seed_noise: float | None,
    seed_noise_log_loss: float | None,
) -> None:
    if not runs or len(paths) < 2:
        raise UserError(
            "name two runs or more to compare: dlrm compare RUN RUN; or the seeds of two recipes: "
            "dlrm compare A1 A2 A3 --against B1 B2 B3"
        )
    named: dict[Path, Path] = {}
    for path in paths:
        if not path.is_dir():
            raise UserError(f"{path} is not a folder. Name a RUN that dlrm train made.")
        before = named.setdefault(path.resolve(), path)
        if before is not path:
            raise UserError(f"{before} and {path} are the same run. Name each run once.")
    for option, value in (
        ("--seed-noise", seed_noise),
        ("--seed-noise-log-loss", seed_noise_log_loss),
    ):
        if value is not None and not 0 < value < math.inf:
            raise UserError(f"{option} must be a standard deviation above 0; got {value}")


def _names(runs: int, against: int) -> list[str]:
    if not against:
        letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
        return [letters[at] if at < len(letters) else f"R{at + 1}" for at in range(runs)]
    return [
        letter if count == 1 else f"{letter}{number}"
        for letter, count in (("A", runs), ("B", against))
        for number in range(1, count + 1)
    ]


def _refuse_copies(
    sides: tuple[list[int], list[int]], paths: Sequence[Path], paired: Paired
) -> None:
    """Refuse a run that tells nothing of the noise of seeds, since it is another one again."""
    for side in sides:
        for at, one in enumerate(side):
            for other in side[at + 1 :]:
                if paired.equal[one, other]:
                    raise UserError(
                        f"{paths[one]} and {paths[other]} predict the same for every row: with "
                        "equal seeds, nothing is learned of what another seed would give. Leave "
                        "one away, or train it with another --seed."
                    )


def auc_difference(paired: Paired) -> Difference:
    """Return how the AUCs of two models on the same rows differ: the first's minus the second's."""
    return _difference("auc", [0], [1], ("first", "second"), paired, None)


def _difference(
    metric: MetricName,
    first: list[int],
    second: list[int],
    names: Sequence[str],
    paired: Paired,
    noise: float | None,
) -> Difference:
    values = [float(getattr(each, metric)) for each in paired.metrics]
    mine, theirs = [values[at] for at in first], [values[at] for at in second]
    difference = statistics.fmean(mine) - statistics.fmean(theirs)
    covariance = paired.auc_covariance if metric == "auc" else paired.log_loss_covariance
    weights = np.zeros(len(values))
    weights[first], weights[second] = 1 / len(first), -1 / len(second)
    same = len(first) == len(second) == 1 and bool(paired.equal[first[0], second[0]])
    over_seeds = None
    if noise is not None:
        error = noise * math.sqrt(1 / len(first) + 1 / len(second))
        over_seeds = _normal(difference, error)
    elif min(len(first), len(second)) >= SEEDS:
        over_seeds = _welch(mine, theirs)
    conclusion: Conclusion = "not known"
    if over_seeds and not math.isnan(over_seeds.p):
        conclusion = "no difference beyond noise"
        if over_seeds.p < SIGNIFICANCE:
            conclusion = "higher" if difference > 0 else "lower"
    return Difference(
        metric,
        tuple(names[at] for at in first),
        tuple(names[at] for at in second),
        difference,
        _normal(difference, 0.0 if same else _standard_error(weights, covariance)),
        over_seeds,
        conclusion,
    )


def _standard_error(weights: NDArray[np.float64], covariance: NDArray[np.float64]) -> float:
    variance = float(weights @ covariance @ weights)
    # Rounding can leave a little less than nothing; a NaN stays one.
    return 0.0 if variance < 0 else math.sqrt(variance)


def _normal(difference: float, error: float) -> Estimate:
    interval = (difference - QUANTILE * error, difference + QUANTILE * error)
    if math.isnan(difference) or math.isnan(error):
        return Estimate(error, interval, math.nan)
    if error == 0:
        return Estimate(error, interval, 1.0 if difference == 0 else 0.0)
    return Estimate(error, interval, 2 * NormalDist().cdf(-abs(difference / error)))


def _welch(first: Sequence[float], second: Sequence[float]) -> Estimate:
    """Welch's t-test: of the difference of two means whose variances are not the same."""
    from scipy import stats

    parts = [statistics.variance(side) / len(side) for side in (first, second)]
    difference = statistics.fmean(first) - statistics.fmean(second)
    error = math.sqrt(sum(parts))
    if not error > 0:  # undefined; or all equal, from which no noise can be estimated
        return Estimate(math.nan, (math.nan, math.nan), math.nan)
    freedom = sum(parts) ** 2 / sum(
        part**2 / (len(side) - 1) for part, side in zip(parts, (first, second), strict=True)
    )
    distribution = stats.t(freedom)
    half = float(distribution.ppf(0.975)) * error
    p = 2 * float(distribution.sf(abs(difference / error)))
    return Estimate(error, (difference - half, difference + half), p)


def _verdict(differences: Sequence[Difference]) -> tuple[str, ...]:
    """Return what can be said of recipes, and why, or how to be able to say it."""
    sentences = []
    for each in differences:
        about = f"{_LABELS[each.metric]}, {_side(each.first)} against {_side(each.second)}"
        if math.isnan(each.difference):
            sentences.append(f"{about}: none, since it is undefined where all labels are equal.")
            continue
        if each.over_seeds is None:
            continue
        if each.conclusion == "not known":
            sentences.append(
                f"{about}: none, since the runs of each side have exactly the same, from which the "
                "noise of seeds cannot be estimated. Compare on more rows."
            )
            continue
        low, high = each.over_seeds.interval
        what = (
            f"{about}: {each.difference:+.5f} (95% interval {low:+.5f} to {high:+.5f}, "
            f"p {_p(each.over_seeds.p)})"
        )
        if each.conclusion == "no difference beyond noise":
            sentences.append(f"{what}, no difference beyond what another seed would give.")
        else:
            sentences.append(f"{what}, {each.conclusion}, beyond what another seed would give.")
    unknown = [
        each for each in differences if each.over_seeds is None and not math.isnan(each.difference)
    ]
    if unknown:
        metrics = {_LABELS[each.metric] for each in unknown}
        about = f" from the {' or '.join(sorted(metrics))}" if sentences else ""
        few = min(min(len(each.first), len(each.second)) for each in unknown)
        option = "--seed-noise"
        if all(each.metric == "log_loss" for each in unknown):
            option = "--seed-noise-log-loss"
        sentences.append(
            f"No verdict about the recipes can be given{about}: another seed changes a result too, "
            f"and by how much is not known from {few} run{'s' * (few != 1)} a side. Train each "
            f"recipe with {SEEDS} seeds or more (--seed 1, --seed 2, --seed 3) and compare A1 A2 "
            f"A3 --against B1 B2 B3; or state the standard deviation over seeds with {option}."
        )
    return tuple(sentences)


def _configuration(run: Path) -> dict[str, Any]:
    """Return a run's configuration, nested tables as dotted keys; empty: there is none."""
    path = run / "config.toml"
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as error:
        raise UserError(f"{path} is damaged: {error}. Correct it.") from error
    return dict(_flat(content, ""))


_NOT_THE_RECIPE = {
    *("dataset", "format_version"),  # that the rows are equal is checked
    *("tracking", "save_every_steps", "save_every_minutes", "keep", "evaluation_memory"),
}
"""Keys and tables of config.toml that change no result."""


def _flat(content: dict[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in content.items():
        if prefix + key in _NOT_THE_RECIPE:
            continue
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _seed(configuration: dict[str, Any]) -> int | None:
    seed = configuration.get("seed")
    return seed if isinstance(seed, int) else None


def _differing(configurations: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    keys = dict.fromkeys(key for each in configurations.values() for key in each)
    found = {}
    for key in keys:
        values = {name: each.get(key) for name, each in configurations.items()}
        if any(value != next(iter(values.values())) for value in values.values()):
            found[key] = values
    return found


def _notes(
    sides: Sequence[tuple[list[int], list[int]]],
    names: Sequence[str],
    configurations: Sequence[dict[str, Any]],
    predictions: Sequence[Predictions],
    paired: Paired,
) -> Iterator[str]:
    for first, second in sides:
        for one in first:
            for other in second:
                if paired.equal[one, other]:
                    yield f"{names[one]} and {names[other]} predict the same for every row."
    for side in sides[0]:
        differing = _differing({names[at]: configurations[at] for at in side})
        differing.pop("seed", None)
        if differing:
            yield (
                f"{_side([names[at] for at in side])} differ in more than the seed "
                f"({', '.join(differing)}), so they are not one recipe."
            )
    if len({each.dataset for each in predictions}) > 1:
        yield "The DATASETs have different fingerprints; their labels are equal."
    if len(sides) > 1:
        yield (
            f"The p values are of {len(sides)} comparisons, each for itself: among many, some are "
            "small by chance."
        )


def _loss_curves(runs: dict[str, Path]) -> LossCurves:
    losses = {name: _reported(path / "log.jsonl") for name, path in runs.items()}
    losses = {name: reported for name, reported in losses.items() if reported}
    common: set[int] = set.intersection(*map(set, losses.values())) if losses else set()
    steps = tuple(sorted(common))
    return LossCurves(
        steps, {name: tuple(each[step] for step in steps) for name, each in losses.items()}
    )


class _Position(msgspec.Struct):
    total_steps: int


class _Report(msgspec.Struct):
    event: str
    position: _Position | None = None
    loss: float | None = None


def _reported(path: Path) -> dict[int, float]:
    """Return the loss at each reported step."""
    try:
        lines = path.read_bytes().splitlines()
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise UserError(f"{path} is damaged: {error}. Correct it.") from error
    found = {}
    for number, line in enumerate(lines, 1):
        try:
            report = msgspec.json.decode(line, type=_Report)
        except msgspec.MsgspecError as error:
            if number == len(lines):
                break  # a run that was killed may have left half a line
            raise UserError(f"{path} is damaged in line {number}: {error}.") from error
        if report.event == "report" and report.position and report.loss is not None:
            found[report.position.total_steps] = report.loss
    return found


_LABELS: dict[MetricName, str] = {"auc": "AUC", "log_loss": "log loss"}
_WIDTH = 80
_SHOWN_STEPS = 10
_SHOWN_COLUMNS = 6
_VALUE = 20


def describe(comparison: Comparison) -> str:
    """Return a comparison as text."""
    lines = [*_runs(comparison), "", *_differences(comparison)]
    for title, texts in (("verdict", comparison.verdict), ("note", comparison.notes)):
        for text in texts:
            lines += ["", *textwrap.wrap(f"{title}: {text}", _WIDTH, break_on_hyphens=False)]
    if comparison.configuration:
        lines += ["", *_configurations(comparison)]
    if comparison.loss_curves.steps:
        lines += ["", *_losses(comparison)]
    return "\n".join(line.rstrip() for line in lines) + "\n"


def _runs(comparison: Comparison) -> Iterator[str]:
    yield f"{comparison.split}: {comparison.rows:,} rows"
    yield ""
    titles = f"{'AUC':<9}{'95% interval':<20}{'log loss':<10}{'95% interval':<20}"
    yield f"{'':<5}{titles}calibration"
    for each in comparison.runs:
        metrics = each.metrics
        yield (
            f"{each.name:<5}{metrics.auc:<9.5f}{_range(metrics.auc_interval):<20}"
            f"{metrics.log_loss:<10.5f}{_range(metrics.log_loss_interval):<20}"
            f"{metrics.calibration:.4f}"
        )
    yield ""
    for each in comparison.runs:
        seed = "" if each.seed is None else f" (seed {each.seed})"
        yield f"{each.name:<5}{each.run}{seed}"


def _differences(comparison: Comparison) -> Iterator[str]:
    yield f"{'difference':<33}{'':<10}{'95% interval':<24}p"
    for each in comparison.differences:
        title = f"{_LABELS[each.metric]}, {_side(each.first)} minus {_side(each.second)}"
        kinds = [("on these rows", each.on_rows)]
        if each.over_seeds:
            kinds.append(("over seeds", each.over_seeds))
        for number, (kind, estimate) in enumerate(kinds):
            low, high = estimate.interval
            words = ""
            if kind == "on these rows":
                words = "  they differ" if estimate.p < SIGNIFICANCE else ""
            value = f"{each.difference:+.5f}" if not number else ""
            if not number:
                yield title
            yield (
                f"  {kind:<31}{value:<10}{f'{low:+.5f} to {high:+.5f}':<24}{_p(estimate.p)}{words}"
            )


def _configurations(comparison: Comparison) -> Iterator[str]:
    """Yield a table a few runs wide, as many times as it takes."""
    names = [each.name for each in comparison.runs]
    keys = comparison.configuration
    if "kind" in keys:  # a DLRM and a baseline have few options in common; --json has them all
        keys = {
            key: row
            for key, row in keys.items()
            if key in ("kind", "model") or None not in row.values()
        }
    wide = max(len(key) for key in ("configuration", *keys)) + 2
    value = max(
        8, *(min(_VALUE, len(_text(each)) + 2) for row in keys.values() for each in row.values())
    )
    columns = max(1, (_WIDTH - wide) // value)
    for start in range(0, len(names), columns):
        shown = names[start : start + columns]
        yield f"{'configuration':<{wide}}" + "".join(f"{name:<{value}}" for name in shown)
        for key, row in keys.items():
            cells = (_cut(_text(row[name]), value - 2) for name in shown)
            yield f"{key:<{wide}}" + "".join(f"{cell:<{value}}" for cell in cells)


def _losses(comparison: Comparison) -> Iterator[str]:
    curves = comparison.loss_curves
    last = len(curves.steps) - 1
    count = min(_SHOWN_STEPS, last + 1)
    shown = sorted({round(at * last / max(1, count - 1)) for at in range(count)})
    names = list(curves.loss)
    for start in range(0, len(names), _SHOWN_COLUMNS):
        columns = names[start : start + _SHOWN_COLUMNS]
        yield f"{'loss at step':>14}" + "".join(f"{name:>11}" for name in columns)
        for at in shown:
            values = "".join(f"{curves.loss[name][at]:>11.6f}" for name in columns)
            yield f"{curves.steps[at]:>14,}{values}"


def _side(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]}…{names[-1]}"


def _range(interval: tuple[float, float]) -> str:
    return f"{interval[0]:.5f} {interval[1]:.5f}"


def _p(value: float) -> str:
    if math.isnan(value):
        return "-"
    return "<0.0001" if value < 0.0001 else f"{value:.4f}"


def _text(value: Any) -> str:
    return "-" if value is None else str(value)


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"
