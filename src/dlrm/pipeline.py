"""From raw rows to predictions in one go, with a plan first."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

from dlrm.config import PrepareConfig, TrainConfig
from dlrm.data.prepare import prepare, raw_file
from dlrm.errors import EnvironmentFaultError
from dlrm.prediction import load, predict_file
from dlrm.runs import RunResult
from dlrm.training.events import Console
from dlrm.training.trainer import refuse_taken, train

logger = logging.getLogger("dlrm")

_STORED_ROW_BYTES = 160  # label, 13 int32 and 26 int32
_SAMPLE_BYTES = 1 << 20


def run_all(
    source: Path,
    run: Path,
    prepare_config: PrepareConfig,
    train_config: TrainConfig,
    dataset: Path | None = None,
) -> RunResult:
    """Prepare, train, evaluate, and predict the ``test.txt`` beside ``train.txt`` if there is one.

    Args:
        source: Criteo's train.txt, or a folder that holds it.
        run: The RUN folder to make.
        prepare_config: How rows become a DATASET.
        train_config: How to train.
        dataset: Where the DATASET goes, or lies already; None: ``RUN/dataset``.

    Raises:
        UserError: The input or an option is wrong, or RUN is taken.
        EnvironmentFaultError: The disk is too small or fails, or the device is missing.
    """
    refuse_taken(run)
    raw = raw_file(source)
    dataset = dataset or run / "dataset"
    test = raw.with_name("test.txt")
    stages = [f"prepare {dataset}", f"train and evaluate in {run}"]
    if test.exists():
        stages.append(f"predict {test} into {run / 'submission.csv'}")
    rows = estimate_rows(raw)
    needed = rows * _STORED_ROW_BYTES
    logger.info("plan: about %d rows, %.2f GB of prepared data", rows, needed / 1e9)
    for number, stage in enumerate(stages, start=1):
        logger.info("  %d. %s", number, stage)
    _check_disk(dataset, needed)
    prepare(raw, dataset, prepare_config)
    result = train(dataset, run, train_config, [Console()])
    if test.exists():
        summary = predict_file(load(run), test, run / "submission.csv")
        logger.info("predicted %d rows into %s", summary.rows, run / "submission.csv")
    return result


def estimate_rows(raw: Path) -> int:
    """Return about how many rows a file has, from the length of the first ones."""
    with open(raw, "rb") as file:
        head = file.read(_SAMPLE_BYTES)
    lines = head.count(b"\n")
    return round(raw.stat().st_size * lines / max(1, head.rfind(b"\n") + 1)) if lines else 1


def _check_disk(target: Path, needed: int) -> None:
    folder = target.absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise EnvironmentFaultError(
            f"preparing {target} needs about {needed / 1e9:.2f} GB of disk and {free / 1e9:.2f} GB "
            "are free. Free some space, or choose another place."
        )
