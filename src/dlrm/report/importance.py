"""Permutation importance: what a model loses when one feature's values change rows.

Breiman, *Random Forests*, 2001, section 10, with the AUC in place of the error rate.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch

from dlrm.data.batch import make_batch
from dlrm.data.dataset import Dataset, Rows
from dlrm.metrics import Metrics, compute_metrics
from dlrm.model.score import Scorer
from dlrm.progress import progress
from dlrm.runs import Run, Which
from dlrm.schema import Split

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

    def measure(dense: npt.NDArray[np.int32], sparse: npt.NDArray[np.int32]) -> Metrics:
        scores = [
            scorer(
                make_batch(
                    run.schema, dense[start : start + step], sparse[start : start + step], None
                )
            )
            for start in range(0, len(dense), step)
        ]
        return compute_metrics(taken.labels, np.concatenate(scores))

    before = measure(taken.dense, taken.sparse)
    generator = np.random.default_rng(run.config.seed)
    features = (*run.schema.dense, *run.schema.sparse)
    found = []
    for number, feature in enumerate(
        progress("feature importance", len(features), features, unit="features")
    ):
        is_dense = number < len(run.schema.dense)
        after = []
        for order in _permutations(generator, len(taken)):
            dense, sparse = taken.dense, taken.sparse
            if is_dense:
                dense = dense.copy()
                dense[:, number] = dense[order, number]
            else:
                column = number - len(run.schema.dense)
                sparse = sparse.copy()
                sparse[:, column] = sparse[order, column]
            after.append(measure(dense, sparse))
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


def _permutations(generator: np.random.Generator, rows: int) -> Iterator[npt.NDArray[np.int64]]:
    for _ in range(REPEATS):
        yield generator.permutation(rows)
