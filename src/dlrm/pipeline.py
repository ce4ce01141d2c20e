"""From raw rows to predictions in one go, with a plan first."""

from __future__ import annotations

import logging
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dlrm.bundle.export import export_once, refuse_taken_bundle
from dlrm.config import PrepareConfig, TrainConfig
from dlrm.data.prepare import prepare
from dlrm.data.sources import find_source
from dlrm.predicting.files import predict_file
from dlrm.prediction import load
from dlrm.report.page import write_report
from dlrm.runs import RunResult
from dlrm.training.begin import refuse_another_training, train_or_resume, way_on
from dlrm.training.events import Console

logger = logging.getLogger("dlrm")

_METRICS = ("auc", "accuracy", "log_loss", "normalized_entropy", "calibration", "samples")
"""Of a split, those that are told in short."""


@dataclass(frozen=True)
class PipelineResult:
    """What was made, where, and what it came to."""

    run: Path
    dataset: Path
    report: Path
    submission: Path | None
    """None: there was nothing to predict."""
    bundle: Path | None
    """None: none was asked for."""
    result: RunResult

    def summary(self) -> dict[str, Any]:
        """Return it in some 30 lines of JSON; all metrics are in ``RUN/result.json``."""
        places = ("run", "dataset", "report", "submission", "bundle")
        return {
            **{name: str(place) for name in places if (place := getattr(self, name))},
            "result": str(self.run / "result.json"),
            "epochs": self.result.epochs,
            "train_samples": self.result.train_samples,
            "samples_per_second": self.result.samples_per_second,
            "metrics": {
                split: {name: getattr(metrics, name) for name in _METRICS}
                for split, metrics in self.result.metrics.items()
            },
        }

    def next_steps(self) -> str:
        """Return what a person looks for first, and what comes next."""
        aucs = [f"{split} AUC {each.auc:.4f}" for split, each in self.result.metrics.items()]
        serve = f"dlrm serve {_quoted(self.bundle or 'BUNDLE')}"
        export = f"dlrm export {_quoted(self.run)} BUNDLE"
        return (
            f"{', '.join(aucs)}; {self.result.samples_per_second:,.0f} samples/s in training. "
            f"Look at {self.report}. Next: {serve if self.bundle else f'{export}, then {serve}'}"
        )


def _quoted(path: Path | str) -> str:
    return shlex.quote(str(path))


def run_all(
    source: Path,
    run: Path,
    prepare_config: PrepareConfig,
    train_config: TrainConfig,
    dataset: Path | None = None,
    bundle: Path | None = None,
) -> PipelineResult:
    """Prepare, train, evaluate, predict the ``test.txt`` beside ``train.txt``, report, export.

    Where there is no ``test.txt``, or an empty one, nothing is predicted.

    What was interrupted goes on where it stopped when it is called again in the same way.

    Args:
        source: Criteo's train.txt, or a folder that holds it.
        run: The RUN folder to make.
        prepare_config: How rows become a DATASET.
        train_config: How to train.
        dataset: Where the DATASET goes, or lies already; None: ``RUN/dataset``.
        bundle: The BUNDLE to make; None: none.

    Raises:
        UserError: The input or an option is wrong, or RUN is taken, by another training too, or
            BUNDLE by anything but this one.
        EnvironmentFaultError: The disk is too small or fails, or the device is missing.
        StoppedBySignalError: SIGINT or SIGTERM came while training.
    """
    refuse_another_training(
        run, train_config
    )  # what is taken is refused before the long work starts
    if bundle:
        refuse_taken_bundle(run, bundle)
    found = find_source(source, prepare_config)
    dataset = dataset or run / "dataset"
    test = found.files[0].path.with_name("test.txt")
    stages = [f"prepare {dataset}", f"train and evaluate in {run}"]
    predicts = test.exists() and test.stat().st_size > 0
    if predicts:
        stages.append(f"predict {test} into {run / 'submission.csv'}")
    stages.append(f"describe it in {run / 'report.html'}")
    if bundle:
        stages.append(f"export into {bundle}")
    for number, stage in enumerate(stages, start=1):
        logger.info("  %d. %s", number, stage)
    prepare(source, dataset, prepare_config)
    with way_on(run, "repeat the same command."):
        result = train_or_resume(dataset, run, train_config, [Console()])
        if predicts:
            summary = predict_file(load(run), test, run / "submission.csv", overwrite=True)
            logger.info("predicted %d rows into %s", summary.rows, run / "submission.csv")
        report = write_report(run, importance_rows=0)
        logger.info(
            "described the run in %s; with the importance of features: dlrm report %s",
            report,
            _quoted(run),
        )
        if bundle:
            export_once(run, bundle)
    return PipelineResult(
        run, dataset, report, run / "submission.csv" if predicts else None, bundle, result
    )
