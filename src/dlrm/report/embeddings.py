"""``dlrm visualize``: the embeddings of a RUN, and how alike its features are, on one HTML page."""

from __future__ import annotations

import itertools
import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from dlrm.data.dataset import Dataset
from dlrm.embeddings import CommonValues, common_values
from dlrm.errors import UserError
from dlrm.files import atomic_write
from dlrm.progress import progress
from dlrm.report.figures import RATE_GROUPS, draw_lengths, draw_map, draw_similarity
from dlrm.report.html import Shown, Table, output_path, render, rounded
from dlrm.report.projection import (
    FEWEST_COMPARED,
    FEWEST_VALUES,
    NEIGHBOURS,
    PRIOR_ROWS,
    Neighbourhood,
    Similarity,
    feature_similarity,
    load_tsne,
    map_vectors,
    neighbourhood,
    refuse_not_finite,
    smoothed_click_rates,
)
from dlrm.runs import Run, Which
from dlrm.schema import FeatureSchema

MOST_VALUES = 2000
"""Values of a feature that are shown, unless another number is asked for."""
_FEATURES = 4
"""Features whose maps are shown where none are named."""
_COMPARED = 26
"""Features whose similarity is shown, at most."""
_COMPARED_ROWS = 10_000
_ODDS = (1 / 2, 4 / 5, 5 / 4, 2)
"""Edges of the groups of click rates, as multiples of the average's odds."""
_LISTED_VALUES = 20
_LISTED_PAIRS = 20

assert len(_ODDS) + 1 == RATE_GROUPS


@dataclass(frozen=True)
class _Feature:
    """A feature on the page."""

    name: str
    summary: str
    figures: tuple[Shown, ...]


@dataclass(frozen=True)
class _Measured:
    """Values of a feature, and what their neighbours tell of them."""

    common: CommonValues
    around: Neighbourhood

    @property
    def beyond_chance(self) -> float:
        """How many standard deviations above 0 the correlation is, if there were none."""
        correlation = self.around.correlation
        return (
            -math.inf
            if math.isnan(correlation)
            else (correlation * math.sqrt(len(self.common.values) - 1))
        )


@dataclass(frozen=True)
class _Rates:
    """The groups of click rates, which are the same for all features."""

    average: float
    """Of the training rows."""
    edges: npt.NDArray[np.float64]
    """(RATE_GROUPS - 1,)."""

    @staticmethod
    def around(average: float) -> _Rates:
        odds = np.array(_ODDS) * average / (1 - average)
        return _Rates(average, odds / (1 + odds))

    def smoothed(self, common: CommonValues) -> npt.NDArray[np.float64]:
        return smoothed_click_rates(common.counts, common.clicks, self.average)

    def groups(self, common: CommonValues) -> npt.NDArray[np.int64]:
        """Return the group of each value, (n,)."""
        return np.digitize(self.smoothed(common), self.edges)

    def names(self) -> list[str]:
        texts = [f"{100 * edge:.2g}" for edge in self.edges]
        between = [f"{low} to {high}%" for low, high in itertools.pairwise(texts)]
        return [f"below {texts[0]}%", *between, f"above {texts[-1]}%"]


def visualize(
    run: Path | str,
    output: Path | str | None = None,
    *,
    features: Sequence[str] = (),
    values: int = MOST_VALUES,
    checkpoint: Which = "best",
    dataset: Path | str | None = None,
) -> Path:
    """Write a page about the embeddings of a RUN; equal runs give equal pages.

    Args:
        run: The RUN folder of a DLRM.
        output: The file; None: ``RUN/embeddings.html``.
        features: The sparse features to show; none named: maps of those whose vectors have most
            in common with click rates, and figures of all.
        values: How many of each feature's values, the commonest in the training rows.
        checkpoint: Whose vectors.
        dataset: Where its DATASET is now; None: where it was.

    Returns:
        The file.

    Raises:
        UserError: The run, its checkpoint or the DATASET is missing, damaged or does not fit; there
            is no such feature, or it has too few values.
        EnvironmentFaultError: scikit-learn is missing, or the disk is full or read-only.
    """
    opened = Run.open(Path(run))
    path = output_path(output, opened.path / "embeddings.html")
    if values < FEWEST_VALUES:
        raise UserError(f"--values must be at least {FEWEST_VALUES}; got {values}.")
    chosen = _chosen(opened.schema, features)
    load_tsne()  # before what takes long
    data = opened.open_dataset(Path(dataset) if dataset else None)
    rates = _Rates.around(_click_rate(data))
    model = opened.load_model(checkpoint, torch.device("cpu"))
    measured = []
    for common in common_values(opened, model, data, chosen, values):
        refuse_not_finite(common)
        measured.append(_Measured(common, neighbourhood(common, rates.smoothed(common))))
    mapped = _mapped(measured, are_named=bool(features))
    parts = [
        _feature(each, rates, opened) for each in progress("map", len(mapped), mapped, unit="maps")
    ]
    similarity = feature_similarity(
        opened, model, data, _compared(opened.schema, chosen), _COMPARED_ROWS
    )
    names = ", ".join(each.common.name for each in mapped)
    page = render(
        "embeddings.html.jinja",
        name=opened.path.resolve().name,
        headline=f"What this DLRM has learned of the commonest values of {names}.",
        facts=[
            f"Colours and shapes tell the click rate of a value in the {data.rows('train'):,} "
            f"training rows, {_percent(rates.average)} on average. Since chance moves the rate of "
            f"a rare value most, {PRIOR_ROWS} rows at the average are added to each."
        ],
        overview=_overview(measured, opened.schema),
        overview_note=_overview_note(mapped, are_named=bool(features)),
        features=parts,
        similarity=_similarity_figure(similarity, len(opened.schema.sparse)),
        command=shlex.join(_command(opened, features, values, checkpoint)),
    )
    with atomic_write(path) as file:
        file.write(page)
    return path


def _command(run: Run, features: Sequence[str], values: int, checkpoint: Which) -> list[str]:
    command = ["dlrm", "visualize", str(run.path)]
    if features:
        command += ["--features", *features]
    if values != MOST_VALUES:
        command += ["--values", str(values)]
    return command + (["--checkpoint", checkpoint] if checkpoint != "best" else [])


def _chosen(schema: FeatureSchema, names: Sequence[str]) -> list[int]:
    """Return the places of the features that are named, or of all, the largest tables first."""
    places = {feature.name: place for place, feature in enumerate(schema.sparse)}
    for name in names:
        if name not in places:
            raise UserError(
                f"--features: there is no sparse feature {name!r}. There are {', '.join(places)}."
            )
    if names:
        return [places[name] for name in dict.fromkeys(names)]
    return _by_size(schema)


def _by_size(schema: FeatureSchema) -> list[int]:
    return sorted(range(len(schema.sparse)), key=lambda place: -schema.num_embeddings[place])


def _compared(schema: FeatureSchema, chosen: Sequence[int]) -> list[int]:
    return list(dict.fromkeys([*chosen, *_by_size(schema)]))[:_COMPARED]


def _click_rate(data: Dataset) -> float:
    train = data.manifest.splits["train"]
    if train.clicks in (0, train.rows):
        raise UserError(
            f"all training rows of {data.path} have the same label, so values have no click rates "
            "to compare. Prepare it from more rows."
        )
    return train.clicks / train.rows


def _mapped(measured: Sequence[_Measured], *, are_named: bool) -> list[_Measured]:
    """Return the features to draw: all that are named, or those furthest beyond chance."""
    enough = [each for each in measured if len(each.common.values) >= FEWEST_VALUES]
    few = [each.common for each in measured if len(each.common.values) < FEWEST_VALUES]
    if few and (are_named or not enough):
        raise UserError(
            f"{few[0].name} has {few[0].distinct} values in the training rows, and a map takes "
            f"{FEWEST_VALUES}. Name others with --features."
        )
    if are_named:
        return enough
    return sorted(enough, key=lambda each: -each.beyond_chance)[:_FEATURES]


def _overview(measured: Sequence[_Measured], schema: FeatureSchema) -> Table:
    sizes = {feature.name: feature.num_embeddings for feature in schema.sparse}
    rows = [
        (
            each.common.name,
            rounded(each.around.correlation, 2),
            f"{sizes[each.common.name]:,}",
            f"{each.common.distinct:,}",
            f"{len(each.common.values):,}",
            _percent(each.common.counts.sum() / max(1, each.common.total)),
        )
        for each in measured
    ]
    header = (
        "feature",
        "correlation",
        "vectors",
        "values in training rows",
        "of these, looked at",
        "their share of the rows",
    )
    return Table(header, tuple(rows))


def _overview_note(mapped: Sequence[_Measured], *, are_named: bool) -> str:
    note = (
        "The correlation is that of ranks, between a value's click rate and that of the "
        f"{NEIGHBOURS} values whose vectors are nearest to its own: near 1 where the vectors have "
        "taken up who clicks, near 0 where they have not; it takes "
        f"{FEWEST_COMPARED} values. Rates and vectors are of the same training rows, so it does "
        "not tell how good predictions are."
    )
    if not are_named:
        note += f" Below are the {len(mapped)} features in which it is furthest beyond chance."
    return note


def _feature(measured: _Measured, rates: _Rates, run: Run) -> _Feature:
    common = measured.common
    groups, names = rates.groups(common), rates.names()
    lengths = np.linalg.norm(common.vectors.astype(np.float64), axis=1)
    key = f"feature-{[each.name for each in run.schema.sparse].index(common.name)}"
    sizes = np.bincount(groups, minlength=RATE_GROUPS)
    of_groups = "; ".join(f"{size:,} {name}" for size, name in zip(sizes, names, strict=True))
    count = f"{len(common.values):,}"
    drawn = draw_map(
        f"{key}-map",
        f"Map of {common.name}",
        f"{count} points, one a value, in a plane where near points are near vectors; by click "
        f"rate: {of_groups}.",
        map_vectors(common.vectors, run.config.seed),
        groups,
        names,
    )
    rare = common.counts <= np.median(common.counts)
    drawn_lengths = draw_lengths(
        f"{key}-lengths",
        f"Length and frequency, {common.name}",
        f"{count} points: the length of a value's vector over its training rows. The rarer half "
        f"has a mean length of {lengths[rare].mean():.4f}, the other half of "
        f"{lengths[~rare].mean() if not rare.all() else lengths.mean():.4f}.",
        common.counts,
        lengths,
        groups,
        names,
    )
    summary = f"{common.distinct:,} values occur in the training rows. "
    if len(common.values) < common.distinct:
        share = _percent(common.counts.sum() / common.total)
        summary += f"Shown are the commonest {count}, which make up {share} of the rows."
    else:
        summary += "All are shown."
    return _Feature(
        common.name,
        summary,
        (
            Shown(
                drawn,
                _table_of_values(common, measured.around),
                "Near points are values that the model takes alike (t-SNE of their vectors). "
                "Distances between groups, and their sizes, mean little.",
            ),
            Shown(
                drawn_lengths,
                _table_of_lengths(common.counts, lengths),
                "A vector begins short and at random, and moves with each row that has its value: "
                "where lengths do not rise yet, values are too rare to have been learned.",
            ),
        ),
    )


def _table_of_values(common: CommonValues, around: Neighbourhood) -> Table:
    """Return the commonest values and their nearest."""
    rows = []
    for place in range(min(_LISTED_VALUES, len(common.values))):
        near = [common.values[other] for other in around.neighbours[place, :3]]
        rows.append(
            (
                common.values[place],
                f"{common.counts[place]:,}",
                _percent(common.clicks[place] / common.counts[place]),
                _percent(around.click_rates[place]),
                ", ".join(near),
            )
        )
    header = ("value", "rows", "click rate", f"of its {around.neighbours.shape[1]} nearest")
    return Table((*header, "nearest values"), tuple(rows))


def _table_of_lengths(counts: npt.NDArray[np.int64], lengths: npt.NDArray[np.float64]) -> Table:
    """Return the mean length of vectors whose values have 1 … 9, 10 … 99, … rows."""
    rows = []
    low = 1
    while low <= counts.max():
        own = lengths[(counts >= low) & (counts < 10 * low)]
        if len(own):
            rows.append((f"{low:,} to {10 * low - 1:,}", f"{len(own):,}", f"{own.mean():.4f}"))
        low *= 10
    return Table(("training rows", "values", "mean length"), tuple(rows))


def _similarity_figure(found: Similarity, features: int) -> Shown | None:
    if len(found.names) < 2:
        return None
    first, second = np.triu_indices(len(found.names), 1)
    order = np.argsort(-found.matrix[first, second], kind="stable")[:_LISTED_PAIRS]
    pairs = [
        (found.names[first[at]], found.names[second[at]], found.matrix[first[at], second[at]])
        for at in order
    ]
    one, other, most = pairs[0]
    drawing = draw_similarity(
        "similarity",
        "How alike two features are",
        f"A square for each two of {len(found.names)} features, the darker the more alike. The "
        f"most alike are {one} and {other} ({most:.2f}).",
        found.names,
        found.matrix,
    )
    note = (
        f"Linear centred kernel alignment of the vectors that {found.rows:,} training rows have in "
        "two features: 1 where both tell the same of a row, 0 where they have nothing in common. "
        "Features lie in an order that brings similar ones together."
    )
    if found.constant:
        note += (
            f" Left out, since their vector is the same in all of these rows: "
            f"{', '.join(found.constant)}."
        )
    if features > _COMPARED:
        note += f" Compared are {_COMPARED} of {features} sparse features, with the largest tables."
    rows = tuple((a, b, f"{value:.4f}") for a, b, value in pairs)
    return Shown(drawing, Table(("feature", "and", "similarity"), rows), note)


def _percent(share: float) -> str:
    return f"{share:.1%}"
