"""The reference's log lines, and its checkpoints, from what a training run tells."""

from __future__ import annotations

import math
import sys
import time

import msgspec
from tqdm import tqdm

from dlrm.checkpoint import Position
from dlrm.metrics import Metrics
from dlrm.reference.checkpoint import ReferenceCheckpoint, write_checkpoint
from dlrm.reference.request import Request
from dlrm.training.events import Console, Evaluation, Events, Report, Start, logged


def say(line: str) -> None:
    """Print a line to standard output at once, without tearing a progress bar."""
    tqdm.write(line, file=sys.stdout)
    sys.stdout.flush()


class _Tested(msgspec.Struct):
    """The metrics by which a test is the best."""

    accuracy: float
    auc: float | None
    """None: it was undefined, which JSON has no number for."""


class ReferenceLog(Events):
    """Prints what the reference prints, and saves its ``.pt`` when it would.

    The best values include the current test's, unlike the reference's, which never change.

    Args:
        request: What to print and where to save.
        test_batches: Batches of the test split.
        loaded: What training continues from.
    """

    def __init__(
        self, request: Request, test_batches: int, loaded: ReferenceCheckpoint | None
    ) -> None:
        self._request = request
        self._test_batches = test_batches
        self._batches = 0  # of an epoch
        self._loaded_batches = loaded.batches if loaded else 0
        self._best_accuracy = loaded.test_accuracy if loaded else 0.0
        self._best_auc = (loaded.test_auc if loaded else None) or 0.0

    def on_start(self, start: Start) -> None:
        """Say where a run continues, and what was best before it was interrupted."""
        self._batches = math.ceil(start.train_rows / start.config.mini_batch_size)
        if self._loaded_batches not in (0, self._batches):
            say(
                f"# note: the loaded model was saved with {self._loaded_batches} batches an epoch, "
                f"and an epoch has {self._batches} now"
            )
        if start.resumed:
            say(f"# note: it goes on after step {start.position.total_steps}")
            for evaluation in logged(self._request.run / "log.jsonl", "evaluation"):
                self._count(msgspec.convert(evaluation["metrics"], _Tested))
        say("time/loss/accuracy (if enabled):")

    def on_report(self, report: Report) -> None:
        """Print the loss."""
        milliseconds = -1.0
        if self._request.print_time:
            milliseconds = report.milliseconds_per_step / self._request.train.accumulate_batches
        wall_time = f" ({time.strftime('%H:%M')})" if self._request.print_wall_time else ""
        say(
            f"Finished training it {self._at(report.position)} of epoch "
            f"{report.position.epoch}, {milliseconds:.2f} ms/it, loss {report.loss:.6f}{wall_time}"
        )

    def on_evaluation_start(self, position: Position, steps_per_epoch: int) -> None:
        """Print where training is."""
        say(f"Testing at - {self._at(position)} of epoch {position.epoch},")

    def _iteration(self, position: Position) -> int:
        """Return the mini-batches of the epoch so far; a step is of one or more."""
        return min(position.step * self._request.train.accumulate_batches, self._batches)

    def _at(self, position: Position) -> str:
        return f"{self._iteration(position)}/{self._batches}"

    def on_evaluation(self, evaluation: Evaluation) -> None:
        """Print the metrics, save the model if it is the best so far, tell a reached threshold."""
        metrics, config = evaluation.metrics, self._request.train
        is_best = self.report_test(metrics)
        if is_best and self._request.save_model:
            say(f"Saving model to {self._request.save_model}")
            self._save(evaluation)
        for name, value, target in (
            ("accuracy", metrics.accuracy, config.target_accuracy),
            ("auc", metrics.auc, config.target_auc),
        ):
            if target and value >= target:
                say(f"MLPerf testing {name} threshold {target} reached, stop training")
                return

    def report_test(self, metrics: Metrics) -> bool:
        """Print the metrics of a test and return whether it is the best so far."""
        mlperf = self._request.mlperf_logging
        # An undefined AUC (a single class) counts as new, as it does when we choose the best.
        is_best = not (
            metrics.auc <= self._best_auc if mlperf else metrics.accuracy <= self._best_accuracy
        )
        self._count(_Tested(metrics.accuracy, metrics.auc))
        accuracy, best = metrics.accuracy * 100, self._best_accuracy * 100
        if mlperf:
            say(
                f"recall {metrics.recall:.4f}, precision {metrics.precision:.4f}, "
                f"f1 {metrics.f1:.4f}, ap {metrics.average_precision:.4f}, "
                f"auc {metrics.auc:.4f}, best auc {self._best_auc:.4f}, "
                f"accuracy {accuracy:3.3f} %, best accuracy {best:3.3f} %"
            )
        else:
            say(f" accuracy {accuracy:3.3f} %, best {best:3.3f} %")
        return is_best

    def _count(self, tested: _Tested) -> None:
        self._best_accuracy = max(self._best_accuracy, tested.accuracy)
        if tested.auc is not None:
            self._best_auc = max(self._best_auc, tested.auc)  # in this order NaN does not stick

    def _save(self, evaluation: Evaluation) -> None:
        assert self._request.save_model is not None
        numbers: dict[str, int | float] = {
            "nepochs": self._request.train.epochs,
            "nbatches": self._batches,
            "nbatches_test": self._test_batches,
            "test_acc": evaluation.metrics.accuracy,
            "train_loss": evaluation.train_loss,
            "iter": self._iteration(evaluation.position),
            "total_loss": 0,  # summed since the last report, and there has just been one
        }
        if self._request.mlperf_logging:
            numbers["test_auc"] = evaluation.metrics.auc
        write_checkpoint(
            self._request.save_model,
            evaluation.model,
            evaluation.optimizer,
            evaluation.position,
            numbers,
        )


class ProgressBar(Console):
    """The bar of ``Console`` alone: the log has its own lines."""

    def on_report(self, report: Report) -> None:
        """Leave it to the log."""

    def on_evaluation(self, evaluation: Evaluation) -> None:
        """Leave it to the log."""


def announce_loaded(checkpoint: ReferenceCheckpoint, mlperf_logging: bool) -> None:
    """Print what a loaded ``.pt`` says of itself."""
    say(
        f"Saved at: epoch = {checkpoint.epoch}/{checkpoint.epochs}, batch = "
        f"{checkpoint.iteration}/{checkpoint.batches}, ntbatch = {checkpoint.test_batches}"
    )
    say(f"Training state: loss = {checkpoint.train_loss:.6f}")
    accuracy = checkpoint.test_accuracy * 100
    if mlperf_logging:
        auc = math.nan if checkpoint.test_auc is None else checkpoint.test_auc
        say(f"Testing state: accuracy = {accuracy:3.3f} %, auc = {auc:.3f}")
    else:
        say(f"Testing state: accuracy = {accuracy:3.3f} %")
