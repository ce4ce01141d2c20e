"""Metrics and probabilities of a split, while training and of a finished run."""

from __future__ import annotations

import contextlib
import math
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dlrm.comparison import auc_difference
from dlrm.config import Amp, DeviceKind, QuantizationConfig, TrainConfig, size_bytes
from dlrm.data.dataset import Dataset
from dlrm.device import open_device
from dlrm.errors import UserError
from dlrm.metrics import Metrics, MetricsAccumulator
from dlrm.model.dlrm import DLRM
from dlrm.model.quantized import FULL, layer_bytes, quantize, refuse_quantization
from dlrm.model.score import Scorer
from dlrm.paired import compare_rows
from dlrm.predictions import Predictions, PredictionsWriter, write_predictions
from dlrm.progress import progress
from dlrm.runs import Run, Which
from dlrm.schema import SPLITS, FeatureSchema, Split


@dataclass(frozen=True)
class SplitResult:
    """How a model does on a split."""

    metrics: Metrics
    unknown_ids: int
    """Bags that were empty: of a value that was never seen, or a multi-hot feature without ids."""
    samples_per_second: float
    """Of scoring alone, without reading and metrics."""
    quantization: QuantizationResult | None = None
    """What fewer bits come to, where weights have fewer."""


@dataclass(frozen=True)
class QuantizationResult:
    """A model with weights of fewer bits beside the same with those it was trained with."""

    table_bytes: int
    full_table_bytes: int
    layer_bytes: int
    full_layer_bytes: int
    samples_per_second: float
    """As ``SplitResult.samples_per_second``."""
    full_samples_per_second: float
    auc_difference: float
    """Of fewer bits minus full."""
    auc_difference_interval: tuple[float, float]
    """95%, of these models on other rows of the same kind (DeLong)."""


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
    unknown_ids, seconds = 0, 0.0
    with (
        contextlib.closing(batches),
        MetricsAccumulator(
            memory=memory, folder=folder, threshold=config.decision_threshold
        ) as accumulator,
    ):
        for batch in shown:
            assert batch.labels is not None
            started = time.perf_counter()
            labels, probabilities = batch.labels.numpy(), scorer(batch)
            seconds += time.perf_counter() - started
            if schema.soft_labels:
                labels = labels > 0.5
            accumulator.add(labels, probabilities)
            if predictions:
                predictions.add(labels, probabilities)
            unknown_ids += batch.unknown_ids
        metrics = accumulator.metrics()
        return SplitResult(metrics, unknown_ids, metrics.samples / max(seconds, 1e-9))


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
    quantization: QuantizationConfig = FULL,
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
        quantization: Of how many bits weights are. Where of fewer than they were trained with, the
            split is scored with these too, to tell the difference.

    Raises:
        UserError: There is no such split, or the run, its checkpoint or the dataset is missing,
            damaged or does not fit.
        EnvironmentFaultError: The device is missing.
    """
    if split not in SPLITS:
        raise UserError(f"there is no split {split!r}. Splits: {', '.join(SPLITS)}.")
    opened = Run.open(Path(run))
    data = opened.open_dataset(Path(dataset) if dataset else None)
    opened.warn_if_unfinished()
    model = opened.load_model(checkpoint, open_device(device, local_rank))
    given: dict[str, Any] = {
        "amp": amp,
        "evaluation_memory": evaluation_memory,
        "decision_threshold": decision_threshold,
    }
    changed = {name: value for name, value in given.items() if value is not None}
    config = replace(opened.config, **changed)
    refuse_quantization(quantization, model.device, config)
    if quantization == FULL:
        return evaluate_split(model, data, split, opened.schema, config, folder=opened.path)
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)

        def scored(name: str) -> tuple[SplitResult, Predictions]:
            path = place / f"{name}.arrow"
            with write_predictions(path, split, data.manifest.fingerprint) as writer:
                result = evaluate_split(
                    model, data, split, opened.schema, config, folder=place, predictions=writer
                )
            return result, Predictions.open(path, split)

        full, of_full = scored("full")
        sizes = model.sparse_arch.table_bytes, layer_bytes(model)
        quantize(model, quantization)
        fewer, of_fewer = scored("quantized")
        difference = auc_difference(compare_rows([of_fewer, of_full]))
    return replace(
        fewer,
        quantization=QuantizationResult(
            model.sparse_arch.table_bytes,
            sizes[0],
            layer_bytes(model),
            sizes[1],
            fewer.samples_per_second,
            full.samples_per_second,
            difference.difference,
            difference.on_rows.interval,
        ),
    )
