"""Permutation importance: what a model loses when one feature's values change rows.

Breiman, *Random Forests*, 2001, section 10, with the AUC in place of the error rate.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from dlrm.data.batch import make_batch
from dlrm.data.dataset import Dataset, Rows
from dlrm.metrics import Metrics, compute_metrics
from dlrm.model.score import Scorer
from dlrm.progress import progress
from dlrm.runs import Run, Which
from dlrm.schema import DenseFeature, FeatureSchema, SparseFeature, Split

REPEATS = 3
"""Permutations of each feature."""


@dataclass(frozen=True)
class FeatureImportance:
    """What was lost without a feature: the mean of REPEATS permutations, and their range."""

    name: str
    kind: Literal["dense", "sparse"]
    auc_drop: float
    """AUC before, less that after; near 0, also below: the model does not use it."""
    lowest: float
    highest: float
    log_loss_rise: float


@dataclass(frozen=True)
class Importances:
    """Of all features, the largest drop first."""

    rows: int
    """How many rows they were measured on."""
    before: Metrics
    """On those rows, with every feature as it is."""
    features: tuple[FeatureImportance, ...]


def permutation_importance(
    run: Run, data: Dataset, split: Split, rows: int, *, checkpoint: Which
) -> Importances:
    """Measure on rows that are evenly spread over a split; equal seeds give equal results.

    Args:
        run: Its model is measured, on the CPU; its seed draws the permutations.
        data: Its DATASET.
        split: Which rows.
        rows: How many, or all where there are fewer.
        checkpoint: Which model.
    """
    taken = Rows.concatenate(list(data.spread_rows(split, min(rows, data.rows(split)))))
    scorer = Scorer(run.load_model(checkpoint, torch.device("cpu")), run.config.loss)
    step = run.config.evaluation_batch_size

    def measure(rows: Rows) -> Metrics:
        scores = []
        for start in range(0, len(rows), step):
            some = rows[start : start + step]
            scores.append(scorer(make_batch(run.schema, some.dense, some.sparse, None, some.bags)))
        return compute_metrics(taken.clicked, np.concatenate(scores))

    before = measure(taken)
    generator = np.random.default_rng(run.config.seed)
    features = (*run.schema.dense, *run.schema.sparse)
    found = []
    for number, feature in enumerate(
        progress("feature importance", len(features), features, unit="features")
    ):
        is_dense = number < len(run.schema.dense)
        after = [
            measure(_with_permuted(taken, feature, run.schema, order))
            for order in _permutations(generator, len(taken))
        ]
        drops = [before.auc - each.auc for each in after]
        found.append(
            FeatureImportance(
                feature.name,
                "dense" if is_dense else "sparse",
                float(np.mean(drops)),
                min(drops),
                max(drops),
                float(np.mean([each.log_loss for each in after])) - before.log_loss,
            )
        )
    found.sort(key=lambda each: -each.auc_drop)
    return Importances(len(taken), before, tuple(found))


def _with_permuted(
    rows: Rows,
    feature: DenseFeature | SparseFeature,
    schema: FeatureSchema,
    order: npt.NDArray[np.int64],
) -> Rows:
    """Return rows in which the values of one feature have changed places."""

    def permuted(values: npt.NDArray[Any], column: int) -> npt.NDArray[Any]:
        values = values.copy()
        values[:, column] = values[order, column]
        return values

    if isinstance(feature, DenseFeature):
        return replace(rows, dense=permuted(rows.dense, schema.dense.index(feature)))
    if not feature.multi_hot:
        column = schema.one_id_features.index(feature)
        return replace(rows, sparse=permuted(rows.sparse, column))
    bags = list(rows.bags)
    column = schema.multi_hot_features.index(feature)
    bags[column] = bags[column][order]
    return replace(rows, bags=tuple(bags))


def _permutations(generator: np.random.Generator, rows: int) -> Iterator[npt.NDArray[np.int64]]:
    for _ in range(REPEATS):
        yield generator.permutation(rows)
