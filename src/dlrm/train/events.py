"""What a training run tells those who watch it: console, JSON lines, the reference's log."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import msgspec
from tqdm import tqdm

from dlrm.checkpoint import Position
from dlrm.config import TrainConfig
from dlrm.metrics import Metrics
from dlrm.model.dlrm import DLRM
from dlrm.schema import Split
from dlrm.train.optimizer import Optimizer

logger = logging.getLogger("dlrm")


@dataclass(frozen=True)
class Start:
    """Training is about to take its first step."""

    config: TrainConfig
    steps_per_epoch: int
    train_rows: int
    """Rows of one pass."""


@dataclass(frozen=True)
class Report:
    """The mean loss since the last report; due every print_freq steps, before each evaluation
    and at the end of each pass.
    """  # noqa: D205

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
    best_auc: float
    best_accuracy: float
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
