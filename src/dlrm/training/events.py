"""What a training run tells those who watch it; the console and ``log.jsonl``.

The MLPerf log and TensorBoard are in ``mlperf.py`` and ``tensorboard.py``.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Literal, Self

import msgspec
from tqdm import tqdm

from dlrm.checkpoint import Position
from dlrm.config import TrainConfig
from dlrm.errors import UserError
from dlrm.files import environment_faults
from dlrm.metrics import Metrics
from dlrm.model.dlrm import DLRM
from dlrm.runs import RunResult
from dlrm.schema import Split
from dlrm.training.optimizer import Optimizer

logger = logging.getLogger("dlrm")

TARGET_REACHED = "target reached"
"""How the reason begins for which training ended where a target was reached."""


@dataclass(frozen=True)
class Start:
    """Training is about to take its first step."""

    config: TrainConfig
    position: Position
    """Where it starts: not at 0 when it continues from a checkpoint."""
    steps_per_epoch: int
    train_rows: int
    """Rows of one pass."""
    evaluation_rows: int
    """Rows of an evaluation while training."""
    kernels: Literal["native", "plain"]
    kernels_reason: str
    model: DLRM
    """Moved by the steps that follow."""
    resumed: bool = False
    """Whether the run began before, and goes on."""


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
    data_wait_milliseconds: float
    """Of these, those in which the next batch was not there yet."""
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

    @property
    def target_reached(self) -> bool:
        """Whether it ended because an evaluation reached a target."""
        return self.reason.startswith(TARGET_REACHED)


@dataclass(frozen=True)
class Finish:
    """The trained model was evaluated, and the result is about to be written."""

    position: Position
    """Where training ended."""
    result: RunResult
    model: DLRM
    """With the weights that the result is of."""


class Events:
    """A listener; every method may be left as it is. Called in the training thread."""

    def on_start(self, start: Start) -> None:
        """Training is about to take its first step."""

    def on_pass_start(self, position: Position) -> None:
        """A pass over the training rows begins, or goes on where another run had stopped."""

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

    def on_finish(self, finish: Finish) -> None:
        """The result is known, and about to be written."""


class AppendedLog(Events):
    """A file to which each event adds its lines at once, so that the process's end loses none.

    While the disk is full, lines wait in memory. A context: left, the file is closed.

    Args:
        path: The file.
        size: What of the file to keep, in bytes; 0: it is made anew.

    Raises:
        EnvironmentFaultError: The file cannot be made, or the disk fails.
    """

    def __init__(self, path: Path, size: int = 0) -> None:
        self._path = path
        there = path.stat().st_size if path.exists() else 0
        if there < size:
            logger.warning("%s has lost what was written last, and goes on without it", path)
            size = there
        with environment_faults(f"write {path}"):
            self._file: IO[bytes] = open(path, "r+b" if size else "wb", buffering=0)
            self._file.truncate(size)
            self._file.seek(size)
        self._waiting = bytearray()
        self._lock = threading.Lock()
        self._warned = False
        self._size = size

    @property
    def size(self) -> int:
        """Bytes that belong to a checkpoint of this moment."""
        return self._size

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        with contextlib.closing(self._file):
            if error is not None:
                self.on_error(error)
            elif self._waiting:
                with environment_faults(f"write {self._path}"):
                    self._write_waiting()

    def on_error(self, error: BaseException) -> None:
        """The run ends by an error or a signal."""

    def flush(self) -> None:
        """Make all lines durable.

        Raises:
            EnvironmentFaultError: The disk is full or fails.
        """
        with environment_faults(f"write {self._path}"):
            self._write_waiting()
            os.fsync(self._file.fileno())

    def _append(self, line: bytes) -> None:
        """Add a line, without its end."""
        with self._lock:
            self._waiting += line + b"\n"
            self._size += len(line) + 1
        try:
            self._write_waiting()
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                with environment_faults(f"write {self._path}"):
                    raise
            if not self._warned:
                self._warned = True
                logger.warning("%s waits until the disk has room: %s", self._path, error.strerror)

    def _write_waiting(self) -> None:
        with self._lock:
            while self._waiting:
                written = self._file.write(self._waiting)
                del self._waiting[:written]


class JsonLines(AppendedLog):
    """Writes ``log.jsonl``: an event a line.

    Args:
        path: The file.
        size: What of the file to keep, in bytes; 0: it is made anew.
        seconds: What the run had taken before.

    Raises:
        EnvironmentFaultError: The file cannot be made, or the disk fails.
    """

    def __init__(self, path: Path, size: int = 0, seconds: float = 0.0) -> None:
        super().__init__(path, size)
        self._started = time.perf_counter() - seconds

    def on_start(self, start: Start) -> None:
        """Write the number of steps and rows; the configuration is in ``config.toml``."""
        if start.resumed:
            return  # it is there already
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

    def on_error(self, error: BaseException) -> None:
        """Write what ended the run."""
        self._write("error", {"kind": type(error).__name__, "message": str(error)})

    def _write(self, event: str, content: dict[str, Any]) -> None:
        seconds = round(time.perf_counter() - self._started, 3)
        self._append(msgspec.json.encode({"event": event, "seconds": seconds} | content))


def logged(path: Path, event: str) -> list[dict[str, Any]]:
    """Read the events of a kind that a ``log.jsonl`` holds, in order.

    Raises:
        UserError: It is missing or damaged.
    """
    try:
        lines = [msgspec.json.decode(line, type=dict) for line in path.read_bytes().splitlines()]
    except (OSError, msgspec.MsgspecError) as error:
        raise UserError(f"{path} cannot be read: {error}. Train again.") from error
    return [line for line in lines if line.get("event") == event]


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


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
            "training on %s: %s of %s of %s",
            _counted(start.train_rows, "row"),
            _counted(start.config.epochs, "epoch"),
            _counted(start.steps_per_epoch, "step"),
            _counted(start.config.step_rows, "row"),
        )
        logger.info("%s kernels: %s", start.kernels, start.kernels_reason)
        self._bar = tqdm(
            total=steps * start.config.step_rows,
            initial=start.position.total_steps * start.config.step_rows,
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
