"""A DATASET for a person to look at: splits, days, features, their commonest values."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dlrm.data.dataset import Dataset
from dlrm.data.vocabulary import Vocabulary
from dlrm.schema import SPLITS, SparseFeature

_TOP = 3


@dataclass(frozen=True)
class Group:
    """Some rows: a split or a day."""

    name: str
    rows: int
    clicks: int


@dataclass(frozen=True)
class DenseSummary:
    """A dense feature."""

    name: str
    missing_rate: float | None
    """None: not known."""


@dataclass(frozen=True)
class SparseSummary:
    """A sparse feature; what is not known, without a vocabulary, is None or empty."""

    name: str
    num_embeddings: int
    missing_rate: float | None
    other_rate: float | None
    """Rows whose value shares the 'other' slot."""
    top: tuple[tuple[str, float], ...]
    """The commonest values, as 8 hexadecimal digits, and their share of the rows."""
    multi_hot: bool = False
    """A row has any number of ids."""


@dataclass(frozen=True)
class Inspection:
    """What there is to know of a DATASET without reading its rows."""

    path: str
    sources: tuple[tuple[str, int], ...]
    """Name and bytes of each."""
    split_rule: str
    soft_labels: bool
    """Labels are probabilities; clicks are those above 0.5."""
    shuffle: str
    splits: tuple[Group, ...]
    days: tuple[Group, ...]
    dense: tuple[DenseSummary, ...]
    sparse: tuple[SparseSummary, ...]
    rows_dropped: int
    rejected: dict[str, int]
    rejected_examples: tuple[str, ...]


def inspect(path: Path) -> Inspection:
    """Look at a DATASET.

    Args:
        path: What ``prepare`` made.

    Raises:
        UserError: It is missing, damaged, or of another version.
    """
    dataset = Dataset.open(path)
    manifest = dataset.manifest
    candidates = sum(manifest.days) + manifest.rows_dropped
    missing: Sequence[int | None] = manifest.missing or [None] * len(dataset.schema.dense)
    counted = _counted_rows(dataset)
    return Inspection(
        path=str(path),
        sources=tuple((source.name, source.bytes) for source in manifest.sources),
        split_rule=dataset.schema.split_rule,
        soft_labels=dataset.schema.soft_labels,
        shuffle=manifest.options.shuffle if manifest.options else "none",
        splits=tuple(
            Group(split, manifest.splits[split].rows, manifest.splits[split].clicks)
            for split in SPLITS
        ),
        days=tuple(
            Group(f"day {number}", rows, clicks)
            for number, (rows, clicks) in enumerate(
                zip(manifest.days, manifest.day_clicks, strict=False), start=1
            )
        ),
        dense=tuple(
            DenseSummary(feature.name, None if count is None else count / candidates)
            for feature, count in zip(dataset.schema.dense, missing, strict=True)
        ),
        sparse=tuple(_summarise(path, feature, counted) for feature in dataset.schema.sparse),
        rows_dropped=manifest.rows_dropped,
        rejected=manifest.rejected,
        rejected_examples=tuple(row.message for row in manifest.rejected_examples),
    )


def _counted_rows(dataset: Dataset) -> int:
    """Return how many rows the counts of vocabularies are of."""
    options = dataset.manifest.options
    if options and options.vocabulary == "train":
        return dataset.rows("train")
    return sum(dataset.rows(split) for split in SPLITS)


def _summarise(path: Path, feature: SparseFeature, rows: int) -> SparseSummary:
    if not feature.vocabulary:
        return SparseSummary(
            feature.name, feature.num_embeddings, None, None, (), feature.multi_hot
        )
    vocabulary = Vocabulary.read(path / "vocabulary" / feature.vocabulary)
    counts = vocabulary.counts
    top = np.argsort(counts)[::-1][:_TOP] if len(counts) < 1000 else _largest(counts)
    missing = counts[vocabulary.values == 0].sum()
    return SparseSummary(
        feature.name,
        feature.num_embeddings,
        float(missing / rows),
        float(1 - counts.sum() / rows) if feature.other_id >= 0 else None,
        tuple((f"{vocabulary.values[at]:08x}", float(counts[at] / rows)) for at in top),
    )


def _largest(counts: np.ndarray) -> np.ndarray:
    candidates = np.argpartition(counts, -_TOP)[-_TOP:]
    return candidates[np.argsort(counts[candidates])[::-1]]


def describe(inspection: Inspection) -> str:
    """Return an inspection as text, at most 80 columns wide."""
    return "\n".join(_lines(inspection)) + "\n"


def _lines(inspection: Inspection) -> Iterator[str]:
    names = [f"{name} ({size:,} bytes)" for name, size in inspection.sources]
    shown = names if len(names) < 3 else [names[0], "…", names[-1]]
    yield inspection.path
    yield f"  made from {', '.join(shown) or 'made-up rows'}"
    yield f"  shuffle {inspection.shuffle}; {_rule(inspection.split_rule)}"
    if inspection.soft_labels:
        yield "  labels are probabilities; those above 0.5 count as clicks"
    if inspection.rows_dropped:
        yield f"  {inspection.rows_dropped:,} rows without a click were dropped (sub-sampling)"
    if inspection.rejected:
        kinds = ", ".join(f"{reason} {count:,}" for reason, count in inspection.rejected.items())
        yield f"  {sum(inspection.rejected.values()):,} malformed rows were skipped: {kinds}"
        yield from (f"    {_cut(message, 76)}" for message in inspection.rejected_examples[:5])
    for what, groups in (("split", inspection.splits), ("day", inspection.days)):
        if groups:
            yield ""
            yield f"{what:<12}{'rows':>14}{'clicks':>14}{'click rate':>12}"
            for group in groups:
                rate = f"{group.clicks / group.rows:.2%}" if group.rows else "-"
                yield f"{group.name:<12}{group.rows:>14,}{group.clicks:>14,}{rate:>12}"
    yield ""
    yield f"{'dense':<12}{'missing':>8}    " * 3
    height = -(-len(inspection.dense) // 3)
    for row in (inspection.dense[start::height] for start in range(height)):
        yield "".join(f"{_cut(each.name, 12):<12}{_rate(each.missing_rate)}    " for each in row)
    yield ""
    yield f"{'sparse':<9}{'embeddings':>11}{'missing':>8}  commonest values and their shares"
    for feature in inspection.sparse:
        top = [f"{value} {share:>5.1%}" for value, share in feature.top]
        if feature.multi_hot:
            top.append("several ids a row")
        if feature.other_rate is not None:
            top = [*top[:2], f"other {feature.other_rate:.1%}"]
        yield (
            f"{_cut(feature.name, 9):<9}{feature.num_embeddings:>11,}"
            f"{_rate(feature.missing_rate)}  {'  '.join(top)}"
        ).rstrip()
    yield f"{'total':<9}{sum(each.num_embeddings for each in inspection.sparse):>11,}"


def _rule(rule: str) -> str:
    return rule.split(",")[0].split(";")[0]


def _rate(rate: float | None) -> str:
    return f"{'-':>8}" if rate is None else f"{rate:>8.2%}"


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"
