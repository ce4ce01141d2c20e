"""Metrics and probabilities of a split."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dlrm.config import TrainConfig
from dlrm.data.dataset import Dataset
from dlrm.metrics import Metrics, compute_metrics
from dlrm.model.dlrm import DLRM
from dlrm.model.score import score
from dlrm.schema import FeatureSchema, Split


@dataclass(frozen=True)
class SplitResult:
    """How a model does on a split."""

    metrics: Metrics
    probabilities: npt.NDArray[np.float32]
    """(rows of the split,), in stored order."""
    unknown_ids: int
    """Bags that were empty because their value was never seen."""


def evaluate_split(
    model: DLRM, data: Dataset, split: Split, schema: FeatureSchema, config: TrainConfig
) -> SplitResult:
    """Score a split of a DATASET and compute its metrics.

    Args:
        model: On any device.
        data: The DATASET.
        split: Which of its splits.
        schema: The run's, which can differ from the dataset's in its id modulus.
        config: Batch size, limit of batches, and the loss whose threshold clamps probabilities.
    """
    batches = data.batches(
        split, config.evaluation_batch_size, schema=schema, num_batches=config.num_batches
    )
    scored = score(model, batches, config.loss)
    metrics = compute_metrics(scored.labels, scored.probabilities)
    return SplitResult(metrics, scored.probabilities, scored.unknown_ids)
