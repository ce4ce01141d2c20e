"""Metrics and probabilities of a split, while training and of a finished run."""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dlrm.config import Amp, DeviceKind, TrainConfig, size_bytes
from dlrm.data.dataset import Dataset
from dlrm.device import open_device
from dlrm.errors import UserError
from dlrm.metrics import Metrics, MetricsAccumulator
from dlrm.model.dlrm import DLRM
from dlrm.model.score import Scorer
from dlrm.predictions import PredictionsWriter
from dlrm.progress import progress
from dlrm.runs import Run, Which
from dlrm.schema import SPLITS, FeatureSchema, Split


@dataclass(frozen=True)
class SplitResult:
    """How a model does on a split."""

    metrics: Metrics
    unknown_ids: int
    """Bags that were empty: of a value that was never seen, or a multi-hot feature without ids."""


def evaluate_split(
    model: DLRM,
    data: Dataset,
    split: Split,
    schema: FeatureSchema,
    config: TrainConfig,
    *,
    num_batches: int = 0,
    folder: Path | None = None,
    predictions: PredictionsWriter | None = None,
) -> SplitResult:
    """Score a split of a DATASET and compute its metrics, in one pass and limited memory.

    Args:
        model: On any device.
        data: The DATASET.
        split: Which of its splits.
        schema: The run's, which can differ from the dataset's in its id modulus.
        config: Batch size, mixed precision, the loss whose threshold clamps probabilities, and the
            metrics' memory and threshold.
        num_batches: Score the first so many batches; 0: all.
        folder: Where scores go that are beyond that memory; None: the folder for temporary files.
        predictions: Given every row's label and probability.

    Raises:
        UserError: A part of the DATASET is damaged.
        EnvironmentFaultError: The disk is full or fails.
    """
    batches = data.batches(
        split, config.evaluation_batch_size, schema=schema, num_batches=num_batches
    )
    count = math.ceil(data.rows(split) / config.evaluation_batch_size)
    count = min(count, num_batches) if num_batches else count
    shown = progress(f"evaluate {split}", count, batches, unit="batches")
    scorer = Scorer(model, config.loss, config.amp)
    memory = size_bytes(config.evaluation_memory, "--evaluation-memory")
    unknown_ids = 0
    with (
        contextlib.closing(batches),
        MetricsAccumulator(
            memory=memory, folder=folder, threshold=config.decision_threshold
        ) as accumulator,
    ):
        for batch in shown:
            assert batch.labels is not None
            labels, probabilities = batch.labels.numpy(), scorer(batch)
            if schema.soft_labels:
                labels = labels > 0.5
            accumulator.add(labels, probabilities)
            if predictions:
                predictions.add(labels, probabilities)
            unknown_ids += batch.unknown_ids
        return SplitResult(accumulator.metrics(), unknown_ids)


def evaluate(
    run: Path | str,
    split: Split = "test",
    *,
    checkpoint: Which = "best",
    dataset: Path | str | None = None,
    device: DeviceKind = "cpu",
    local_rank: int = 0,
    amp: Amp | None = None,
    evaluation_memory: str | None = None,
    decision_threshold: float | None = None,
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
        evaluation_memory: The most that the metrics take, as "512MiB"; None: as in training.
        decision_threshold: Of precision, recall and F1; None: as in training.

    Raises:
        UserError: There is no such split, or the run, its checkpoint or the dataset is missing,
            damaged or does not fit.
        EnvironmentFaultError: The device is missing.
    """
    if split not in SPLITS:
        raise UserError(f"there is no split {split!r}. Splits: {', '.join(SPLITS)}.")
    opened = Run.open(Path(run))
    data = opened.open_dataset(Path(dataset) if dataset else None)
    model = opened.load_model(checkpoint, open_device(device, local_rank))
    given: dict[str, Any] = {
        "amp": amp,
        "evaluation_memory": evaluation_memory,
        "decision_threshold": decision_threshold,
    }
    changed = {name: value for name, value in given.items() if value is not None}
    config = replace(opened.config, **changed)
    return evaluate_split(model, data, split, opened.schema, config, folder=opened.path)
