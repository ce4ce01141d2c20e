"""Train a baseline on a DATASET into a RUN that ``dlrm compare`` and ``dlrm report`` take."""

from __future__ import annotations

import logging
import time
from importlib.metadata import version
from pathlib import Path

import msgspec
import numpy as np
import torch

from dlrm.baselines.model import BaselineModel
from dlrm.config import BaselineConfig, write_config
from dlrm.data.dataset import Dataset, in_blocks
from dlrm.device import available_memory
from dlrm.errors import EnvironmentFaultError, UserError
from dlrm.files import atomic_folder, atomic_write
from dlrm.metrics import Metrics, MetricsAccumulator
from dlrm.progress import progress
from dlrm.runs import AnyRun, RunResult, hardware, peak_memory_bytes, versions
from dlrm.schema import Split, write_schema

logger = logging.getLogger("dlrm")

_SCORED_ROWS = 1 << 16
"""Rows that are scored at a time."""


def train_baseline(dataset: Path | str, run: Path | str, config: BaselineConfig) -> RunResult:
    """Train a baseline on a DATASET, and evaluate it as ``train`` evaluates a DLRM.

    The number of rounds is chosen on validation; test is looked at once, at the end. RUN appears
    when it is complete.

    Args:
        dataset: A DATASET that ``prepare`` wrote.
        run: The folder to make.
        config: Which model, and its options.

    Returns:
        What ``RUN/result.json`` holds.

    Raises:
        UserError: The dataset does not fit, or RUN is taken.
        EnvironmentFaultError: A package is missing, memory is short, or the disk fails.
    """
    started = time.perf_counter()
    dataset, run = Path(dataset), Path(run)
    data = Dataset.open(dataset)
    _refuse_unlearnable(data)
    model = _make_model(data, config)
    rows = data.rows("train")
    if 0 < config.max_rows < rows:
        rows = config.max_rows
        logger.info(
            "training on %d of %d rows, evenly spread (--max-rows)", rows, data.rows("train")
        )
    _refuse_too_much(model, data, rows)
    with atomic_folder(run, "run") as partial:
        made = AnyRun(partial, data.schema, config, dataset)
        result = _train(model, data, made, rows, started)
    return result


def _make_model(data: Dataset, config: BaselineConfig) -> BaselineModel:
    try:
        # Here, since the packages they need are not everybody's.
        if config.model == "logistic":
            from dlrm.baselines.logistic import Logistic

            return Logistic(data.schema, config)
        from dlrm.baselines.trees import Trees

        return Trees(data.schema, config)
    except ImportError as error:
        raise EnvironmentFaultError(
            f"--model {config.model} needs a package that cannot be imported ({error}). Install "
            "what baselines take: pip install 'dlrm[baselines]'"
        ) from error


def _refuse_unlearnable(data: Dataset) -> None:
    schema = data.schema
    for unfit, what in (
        (bool(schema.multi_hot_features), "sparse features with several ids a row"),
        (schema.stores_floats, "dense features that are no counts"),
        (schema.soft_labels, "labels that are probabilities"),
    ):
        if unfit:
            raise UserError(
                f"{data.path} has {what}, which baselines do not take. Train a DLRM on it with "
                "`dlrm train`, or a baseline on a DATASET that `dlrm prepare` made."
            )
    for split in ("train", "validation", "test"):
        if not data.rows(split):
            raise UserError(
                f"{data.path} has no {split} rows. A baseline is trained, chosen and measured on "
                "train, validation and test: prepare it with another --split."
            )
    clicks = data.manifest.splits["train"].clicks
    if clicks in (0, data.rows("train")):
        raise UserError(
            f"all training rows of {data.path} have the same label, so there is nothing to learn. "
            "Prepare it from more rows."
        )


def _refuse_too_much(model: BaselineModel, data: Dataset, rows: int) -> None:
    """Tell the memory that training takes, and refuse before it begins if there is less."""
    needed = model.memory_bytes(rows, data.rows("validation"))
    free = available_memory()
    logger.info(
        "%s on %d rows takes about %.2f GB of memory", model.config.model, rows, needed / 1e9
    )
    if needed <= free or not free:
        return
    advice = "Prepare the DATASET with --max-ind-range or --hash-buckets, or free some memory."
    if (a_row := model.memory_bytes_a_row()) and needed - a_row * rows < free:
        fit = (free - needed + a_row * rows) // a_row
        advice = f"Train on fewer rows: about --max-rows {fit // 1000 * 1000} fits."
    raise EnvironmentFaultError(
        f"--model {model.config.model} needs about {needed / 1e9:.2f} GB of memory for {rows} "
        f"rows, and {free / 1e9:.2f} GB are free. {advice}"
    )


def _train(
    model: BaselineModel, data: Dataset, run: AnyRun, rows: int, started: float
) -> RunResult:
    config = model.config
    write_config(run.path / "config.toml", config, run.dataset)
    write_schema(run.path, run.schema)
    log = bytearray()

    def note(event: str, content: dict[str, float | str]) -> None:
        line = {"event": event, "seconds": round(time.perf_counter() - started, 3)} | content
        log.extend(msgspec.json.encode(line) + b"\n")

    note("start", {"train_rows": rows})

    with progress(f"train {config.model}", _most_rounds(config), unit=model.round_name) as bar:

        def on_round(number: int, loss: float) -> None:
            bar.update()
            note(model.round_name, {"number": number, "validation_log_loss": loss})
            if config.model == "logistic" or number % 100 == 0:
                logger.info("%s %d: validation log loss %.6f", model.round_name, number, loss)

        fit_started = time.perf_counter()
        fit = model.fit(data, rows, on_round)
        fit_seconds = time.perf_counter() - fit_started
    stopped = f"validation log loss was lowest after {model.round_name} {fit.best_round}"
    logger.info("training ended after %s %d: %s", model.round_name, fit.rounds, stopped)
    note("stop", {"reason": stopped})

    metrics: dict[str, Metrics] = {}
    unknown: dict[str, int] = {}
    splits: tuple[Split, ...] = ("validation", "test")
    for split in splits:
        metrics[split], unknown[split] = _evaluate(model, data, run, split)
    with atomic_write(run.path / "log.jsonl") as file:
        file.write(log)
    result = RunResult(
        epochs=float(fit.rounds),
        train_samples=fit.rounds * rows,
        train_steps=fit.rounds,
        samples_per_second=fit.rounds * rows / max(fit_seconds, 1e-9),
        seconds=time.perf_counter() - started,
        peak_memory_bytes=peak_memory_bytes(),
        checkpoint="best",
        stopped=stopped,
        metrics=metrics,
        unknown_ids=unknown,
        kernels="plain",
        kernels_reason=f"{model.library} {version(model.library)} computes",
        amp_type="O0",
        device="cpu",
        versions=versions() | {model.library: version(model.library)},
        hardware=hardware(torch.device("cpu")),
        model=config.model,
    )
    run.write_result(result)
    return result


def _most_rounds(config: BaselineConfig) -> int:
    return config.passes if config.model == "logistic" else config.trees


def _evaluate(
    model: BaselineModel, data: Dataset, run: AnyRun, split: Split
) -> tuple[Metrics, int]:
    """Score a split into RUN/predictions; return its metrics and how many ids are unknown."""
    unknown = 0
    rows = data.stored_rows(split, 0, data.rows(split))
    with (
        MetricsAccumulator(folder=run.path) as accumulator,
        run.write_predictions(split, data.manifest.fingerprint) as predictions,
    ):
        for block in in_blocks(rows, _SCORED_ROWS):
            probabilities = model.probabilities(block)
            predictions.add(block.labels, probabilities)
            accumulator.add(block.labels, probabilities)
            unknown += int(np.count_nonzero(block.sparse < 0))
        return accumulator.metrics(), unknown
