"""The RUN folder: what a training leaves behind, and what evaluation and prediction read."""

from __future__ import annotations

import logging
import math
import os
import platform
import resource
import shlex
import sys
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import msgspec
import torch

from dlrm.checkpoint import load_weights
from dlrm.config import (
    Amp,
    BaselineConfig,
    TrainConfig,
    read_any_run_config,
    read_run_config,
)
from dlrm.data.dataset import Dataset
from dlrm.device import available_cores
from dlrm.errors import UserError
from dlrm.files import FORMAT_VERSION, read_json, write_json
from dlrm.metrics import Metrics
from dlrm.model.dlrm import DLRM
from dlrm.predictions import Predictions, PredictionsWriter, write_predictions
from dlrm.schema import FeatureSchema, Split, read_schema

logger = logging.getLogger("dlrm")

Which = Literal["best", "newest"]


@dataclass(frozen=True)
class RunResult:
    """``result.json``: what a run came to."""

    epochs: float
    """Passes over the training rows; a fraction when training stopped within one. When a
    checkpoint was continued from, its passes count."""
    train_samples: int
    """Rows that this run trained on, all its passes counted."""
    train_steps: int
    """Steps that this run took."""
    samples_per_second: float
    """Of training: loading included, start-up, evaluation and checkpoints excluded."""
    seconds: float
    """From start to result, everything included."""
    peak_memory_bytes: int
    """Largest resident memory of the process."""
    checkpoint: Which
    """The checkpoint that the metrics are of."""
    stopped: str
    """Why training ended."""
    metrics: dict[str, Metrics]
    """By split."""
    unknown_ids: dict[str, int]
    """By split: ids never seen when vocabularies were fitted, taken as empty bags."""
    kernels: Literal["native", "plain"]
    kernels_reason: str
    amp_type: Amp
    device: str
    versions: dict[str, str]
    hardware: dict[str, str | int]
    skipped_steps: int = 0
    """Steps that moved nothing: under mixed precision a gradient was not finite."""
    model: Literal["dlrm", "logistic", "lightgbm"] = "dlrm"
    """What was trained: a DLRM, or which baseline."""
    table_bytes: int = 0
    """Of a DLRM's embedding tables, with projections and pooling weights; 0: of a version that did
    not tell yet."""
    whole_table_bytes: int = 0
    """What tables with a vector for each id would take."""
    format_version: str = FORMAT_VERSION


@dataclass(frozen=True)
class AnyRun:
    """A RUN folder that exists, of a DLRM or of a baseline: what all runs have.

    Attributes:
        path: The folder.
        schema: Of the features it was trained on.
        config: The resolved configuration; a ``BaselineConfig`` tells a baseline.
        dataset: The DATASET it was trained on, where it was at that time.
    """

    path: Path
    schema: FeatureSchema
    config: TrainConfig | BaselineConfig
    dataset: Path

    def open_dataset(self, place: Path | None = None) -> Dataset:
        """Open the DATASET that it was trained on.

        Args:
            place: Where it is now; None: where it was.

        Raises:
            UserError: It is missing or damaged, or another.
        """
        if place is None and not self.dataset.exists():
            raise UserError(
                f"{self.dataset}, the DATASET that {self.path} was trained on, is gone. Name where "
                "it is now with --dataset, or prepare it again with the same options."
            )
        data = Dataset.open(place or self.dataset)
        if data.schema.fingerprint != self.schema.fingerprint:
            raise UserError(
                f"{data.path} is not the DATASET that {self.path} was trained on: its fingerprint "
                f"is {data.schema.fingerprint}, expected {self.schema.fingerprint}. Name the right "
                "one with --dataset, or prepare it again with the same options."
            )
        return data

    def result(self) -> RunResult:
        """Read ``result.json``.

        Raises:
            UserError: The run has not ended, or its result is damaged.
        """
        path = self.path / "result.json"
        way_on = (
            f"Check the path; if it was interrupted, `dlrm train --resume {self.path}` goes on."
        )
        content: dict[str, Any] = read_json(path, dict, "run", if_missing=way_on)
        try:
            # JSON has no NaN, which is what a metric of one-class labels can be.
            content["metrics"] = _null_to_nan(content["metrics"])
            return msgspec.convert(content, RunResult)
        except (msgspec.ValidationError, KeyError, AttributeError) as error:
            raise UserError(f"{path} is damaged: {error}. Evaluate or train again.") from error

    def log(self) -> list[dict[str, Any]]:
        """Read the events of ``log.jsonl`` in their order; none where there is no log.

        Raises:
            UserError: A line other than the last is damaged.
        """
        path = self.path / "log.jsonl"
        lines = path.read_bytes().splitlines() if path.exists() else []
        events: list[dict[str, Any]] = []
        for number, line in enumerate(lines, start=1):
            try:
                events.append(msgspec.json.decode(line, type=dict[str, Any]))
            except msgspec.MsgspecError as error:
                if number < len(lines):  # the last was cut off with its process
                    raise UserError(f"{path} is damaged in line {number}: {error}.") from error
        return events

    def predictions(self, split: Split) -> Predictions:
        """Open ``predictions/SPLIT.arrow``.

        Raises:
            UserError: It is missing, damaged, or of an older dlrm, which wrote no labels.
        """
        return Predictions.open(self._predictions_file(split), split)

    def write_predictions(
        self, split: Split, dataset: str
    ) -> AbstractContextManager[PredictionsWriter]:
        """Write ``predictions/SPLIT.arrow`` as its rows come (``predictions.write_predictions``).

        Args:
            split: Which split.
            dataset: The fingerprint of the DATASET's manifest.
        """
        return write_predictions(self._predictions_file(split), split, dataset)

    def _predictions_file(self, split: Split) -> Path:
        return self.path / "predictions" / f"{split}.arrow"

    def write_result(self, result: RunResult) -> None:
        """Write ``result.json``."""
        write_json(self.path / "result.json", result)


@dataclass(frozen=True)
class Run(AnyRun):
    """The RUN folder of a DLRM.

    Attributes:
        config: The resolved configuration.
    """

    config: TrainConfig

    @staticmethod
    def open(path: Path) -> Run:
        """Read a RUN's description.

        Raises:
            UserError: It is no RUN, or of a baseline, or of another version.
        """
        config, dataset = read_run_config(path)
        return Run(path, read_schema(path, "run"), config, _named(path, dataset))

    def checkpoint(self, which: Which) -> Path:
        """Return where a checkpoint lies."""
        return self.path / "checkpoints" / f"{which}.safetensors"

    def warn_if_unfinished(self) -> None:
        """Say so if training was interrupted, or still goes on: its checkpoints are not the last.

        A model that was only imported has no log.
        """
        if (self.path / "log.jsonl").exists() and not (self.path / "result.json").exists():
            logger.warning(
                "%s is not finished: its training was interrupted, or still goes on, so a later "
                "checkpoint may be better. `%s` goes on with it",
                self.path,
                to_resume(self.path),
            )

    def load_model(self, which: Which, device: torch.device, *, verified: bool = False) -> DLRM:
        """Build the model and load a checkpoint's weights into it; it is in evaluation mode.

        Args:
            which: Which checkpoint.
            device: Where to compute.
            verified: Its checksum was verified already.

        Raises:
            UserError: The checkpoint is missing, damaged, or of another architecture.
        """
        model = DLRM(self.schema, self.config.model, device=device)
        load_weights(self.checkpoint(which), model, verified=verified)
        model.eval()
        return model


def to_resume(path: Path) -> str:
    """Return the command that goes on with the training of a RUN."""
    return f"dlrm train --resume {shlex.quote(str(path))}"


def open_run(path: Path) -> AnyRun:
    """Read the description of a RUN, be it a DLRM's or a baseline's.

    Raises:
        UserError: It is no RUN, or of another version.
    """
    config, dataset = read_any_run_config(path)
    if isinstance(config, TrainConfig):
        return Run.open(path)
    return AnyRun(path, read_schema(path, "run"), config, _named(path, dataset))


def _named(path: Path, dataset: Path | None) -> Path:
    if dataset is None:
        raise UserError(f"{path / 'config.toml'} names no dataset. Name it there.")
    return dataset


def _null_to_nan(content: Any) -> Any:
    if isinstance(content, dict):
        return {name: _null_to_nan(value) for name, value in content.items()}
    if isinstance(content, list):
        return [_null_to_nan(value) for value in content]
    return math.nan if content is None else content


def peak_memory_bytes() -> int:
    """Return the largest resident memory that this process has had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB


def family(process: int) -> list[int]:
    """Return a process and all that descend from it."""
    found = [process]
    for each in found:
        try:
            for task in os.listdir(f"/proc/{each}/task"):
                with open(f"/proc/{each}/task/{task}/children") as file:
                    found += map(int, file.read().split())
        except OSError:  # it has ended
            continue
    return found


def versions() -> dict[str, str]:
    """Return the versions that a result depends on."""
    names = ("dlrm", "torch", "numpy", "pyarrow", "safetensors")
    return {"python": platform.python_version()} | {name: version(name) for name in names}


def hardware(device: torch.device) -> dict[str, str | int]:
    """Return what the run was computed on."""
    described: dict[str, str | int] = {
        "machine": platform.machine(),
        "cores": available_cores(),
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
    }
    if sys.platform == "linux":
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                described["processor"] = line.split(":", 1)[1].strip()
                break
    if device.type != "cpu":
        described["device"] = str(device)
    return described


def measured_on(hardware: Mapping[str, str | int], versions: Mapping[str, str]) -> str:
    """Return what a measurement's figures depend on, as a line of text."""
    described = ", ".join(f"{name} {value}" for name, value in hardware.items())
    return f"{described}, torch {versions['torch']}"
