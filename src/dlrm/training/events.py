"""What a training run tells those who watch it: console, JSON lines, the reference's log."""

from __future__ import annotations

import logging
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Literal, Self

import msgspec
from tqdm import tqdm

from dlrm.checkpoint import Position
from dlrm.config import TrainConfig
from dlrm.files import environment_faults
from dlrm.metrics import Metrics
from dlrm.model.dlrm import DLRM
from dlrm.schema import Split
from dlrm.training.optimizer import Optimizer

logger = logging.getLogger("dlrm")


@dataclass(frozen=True)
class Start:
    """Training is about to take its first step."""

    config: TrainConfig
    position: Position
    """Where it starts: not at 0 when it continues from a checkpoint."""
    steps_per_epoch: int
    train_rows: int
    """Rows of one pass."""
    kernels: Literal["native", "plain"]
    kernels_reason: str


@dataclass(frozen=True)
class Report:
    """The mean loss since the last report.

    Due every print_freq steps of a pass, before each evaluation and at the end of each pass.
    """

    position: Position
    """``step`` counts the step just taken."""
    steps_per_epoch: int
    loss: float
    milliseconds_per_step: float
    """Loading included, evaluation excluded."""
    samples_per_second: float
    learning_rate: float


@dataclass(frozen=True)
class Evaluation:
    """A split was evaluated while training."""

    position: Position
    steps_per_epoch: int
    split: Split
    metrics: Metrics
    is_best: bool
    """Whether its selection metric, the AUC, is above all before."""
    train_loss: float
    """Of the last report."""
    model: DLRM
    optimizer: Optimizer


@dataclass(frozen=True)
class Stop:
    """Training has ended."""

    position: Position
    reason: str
    """In words: all epochs done, or the target that was reached."""


class Events:
    """A listener; every method may be left as it is. Called in the training thread."""

    def on_start(self, start: Start) -> None:
        """Training is about to take its first step."""

    def on_step(self, position: Position, samples: int) -> None:
        """A step of so many rows was taken."""

    def on_report(self, report: Report) -> None:
        """A mean loss is due."""

    def on_evaluation_start(self, position: Position, steps_per_epoch: int) -> None:
        """An evaluation begins."""

    def on_evaluation(self, evaluation: Evaluation) -> None:
        """An evaluation ended."""

    def on_stop(self, stop: Stop) -> None:
        """Training has ended."""


class JsonLines(Events):
    """Writes ``log.jsonl``: an event a line, flushed line by line so that a crash loses none.

    Args:
        path: The file, made anew.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        with environment_faults(f"write {path}"):
            self._file: IO[bytes] = open(path, "wb")
        self._started = time.perf_counter()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error is not None:
            self._write("error", {"kind": type(error).__name__, "message": str(error)})
        self._file.close()

    def on_start(self, start: Start) -> None:
        """Write the number of steps and rows; the configuration is in ``config.toml``."""
        content = {
            "position": asdict(start.position),
            "steps_per_epoch": start.steps_per_epoch,
            "train_rows": start.train_rows,
            "kernels": start.kernels,
            "kernels_reason": start.kernels_reason,
        }
        self._write("start", content)

    def on_report(self, report: Report) -> None:
        """Write the loss and the rate."""
        self._write("report", asdict(report))

    def on_evaluation(self, evaluation: Evaluation) -> None:
        """Write the metrics."""
        content = {
            "position": asdict(evaluation.position),
            "split": evaluation.split,
            "metrics": asdict(evaluation.metrics),
            "is_best": evaluation.is_best,
        }
        self._write("evaluation", content)

    def on_stop(self, stop: Stop) -> None:
        """Write why training ended."""
        self._write("stop", asdict(stop))

    def _write(self, event: str, content: dict[str, Any]) -> None:
        seconds = round(time.perf_counter() - self._started, 3)
        line = msgspec.json.encode({"event": event, "seconds": seconds} | content) + b"\n"
        with environment_faults(f"write {self._path}"):
            self._file.write(line)
            self._file.flush()


class Console(Events):
    """A progress bar on a terminal, and a message for every report and evaluation."""

    def __init__(self) -> None:
        self._bar: tqdm[Any] | None = None

    def on_start(self, start: Start) -> None:
        """Open the bar."""
        steps = start.steps_per_epoch * start.config.epochs
        if start.config.max_steps:
            steps = min(steps, start.config.max_steps)
        logger.info(
            "training on %d rows: %d epochs of %d steps of %d rows",
            start.train_rows,
            start.config.epochs,
            start.steps_per_epoch,
            start.config.mini_batch_size,
        )
        logger.info("%s kernels: %s", start.kernels, start.kernels_reason)
        self._bar = tqdm(
            total=steps * start.config.mini_batch_size,
            initial=start.position.total_steps * start.config.mini_batch_size,
            desc="train",
            unit=" samples",
            unit_scale=True,
            disable=None,  # on where standard error is a terminal
            dynamic_ncols=True,
        )

    def on_step(self, position: Position, samples: int) -> None:
        """Advance the bar."""
        assert self._bar is not None
        self._bar.update(samples)

    def on_report(self, report: Report) -> None:
        """Tell the loss."""
        logger.info(
            "epoch %d step %d/%d: loss %.6f, %.0f samples/s",
            report.position.epoch,
            report.position.step,
            report.steps_per_epoch,
            report.loss,
            report.samples_per_second,
        )

    def on_evaluation(self, evaluation: Evaluation) -> None:
        """Tell the metrics."""
        logger.info(
            "epoch %d step %d/%d: %s auc %.6f, accuracy %.6f, log loss %.6f%s",
            evaluation.position.epoch,
            evaluation.position.step,
            evaluation.steps_per_epoch,
            evaluation.split,
            evaluation.metrics.auc,
            evaluation.metrics.accuracy,
            evaluation.metrics.log_loss,
            " (best so far)" if evaluation.is_best else "",
        )

    def on_stop(self, stop: Stop) -> None:
        """Close the bar."""
        assert self._bar is not None
        self._bar.close()
        logger.info("training ended: %s", stop.reason)
