"""Metrics and probabilities of a split, while training and of a finished run."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from dlrm.config import Amp, DeviceKind, TrainConfig
from dlrm.data.dataset import Dataset
from dlrm.device import open_device
from dlrm.errors import UserError
from dlrm.metrics import Metrics, compute_metrics
from dlrm.model.dlrm import DLRM
from dlrm.model.score import score
from dlrm.progress import progress
from dlrm.runs import Run, Which
from dlrm.schema import SPLITS, FeatureSchema, Split


@dataclass(frozen=True)
class SplitResult:
    """How a model does on a split."""

    metrics: Metrics
    labels: npt.NDArray[np.float32]
    """(rows of the split,), in stored order."""
    probabilities: npt.NDArray[np.float32]
    """(rows of the split,), in stored order."""
    unknown_ids: int
    """Bags that were empty because their value was never seen."""


def evaluate_split(
    model: DLRM,
    data: Dataset,
    split: Split,
    schema: FeatureSchema,
    config: TrainConfig,
    *,
    num_batches: int = 0,
) -> SplitResult:
    """Score a split of a DATASET and compute its metrics.

    Args:
        model: On any device.
        data: The DATASET.
        split: Which of its splits.
        schema: The run's, which can differ from the dataset's in its id modulus.
        config: Batch size, mixed precision, and the loss whose threshold clamps probabilities.
        num_batches: Score the first so many batches; 0: all.
    """
    batches = data.batches(
        split, config.evaluation_batch_size, schema=schema, num_batches=num_batches
    )
    count = math.ceil(data.rows(split) / config.evaluation_batch_size)
    count = min(count, num_batches) if num_batches else count
    shown = progress(f"evaluate {split}", count, batches, unit="batches")
    scored = score(model, shown, config.loss, config.amp)
    metrics = compute_metrics(scored.labels, scored.probabilities)
    return SplitResult(metrics, scored.labels, scored.probabilities, scored.unknown_ids)


def evaluate(
    run: Path | str,
    split: Split = "test",
    *,
    checkpoint: Which = "best",
    dataset: Path | str | None = None,
    device: DeviceKind = "cpu",
    local_rank: int = 0,
    amp: Amp | None = None,
) -> SplitResult:
    """Evaluate a checkpoint of a RUN on any split of its DATASET.

    Args:
        run: The RUN folder.
        split: Which split.
        checkpoint: "best" on the selection split, or "newest".
        dataset: Where its DATASET is now; None: where it was when the run was trained.
        device: Where to compute.
        local_rank: Which card of that kind.
        amp: Whether matrices are multiplied in lower precision; None: as in training.

    Raises:
        UserError: There is no such split, or the run, its checkpoint or the dataset is missing,
            damaged or does not fit.
        EnvironmentFaultError: The device is missing.
    """
    if split not in SPLITS:
        raise UserError(f"there is no split {split!r}. Splits: {', '.join(SPLITS)}.")
    opened = Run.open(Path(run))
    data = Dataset.open(Path(dataset) if dataset else opened.dataset)
    if data.schema.fingerprint != opened.schema.fingerprint:
        raise UserError(
            f"{data.path} is not the DATASET that {run} was trained on: its fingerprint is "
            f"{data.schema.fingerprint}, expected {opened.schema.fingerprint}. Name the right one "
            "with --dataset, or prepare it again with the same options."
        )
    model = opened.load_model(checkpoint, open_device(device, local_rank))
    config = opened.config if amp is None else replace(opened.config, amp=amp)
    return evaluate_split(model, data, split, opened.schema, config)
