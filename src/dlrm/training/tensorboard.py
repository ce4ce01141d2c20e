"""Event files for TensorBoard, and the embedding vectors of a table for its projector."""

from __future__ import annotations

import dataclasses
import errno
import json
import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self

import numpy as np
from tensorboardX import RecordWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary

from dlrm.checkpoint import Position
from dlrm.data.dataset import Dataset
from dlrm.embeddings import common_values
from dlrm.errors import EnvironmentFaultError
from dlrm.files import atomic_write, environment_faults
from dlrm.metrics import Metrics
from dlrm.model.dlrm import DLRM
from dlrm.runs import Run
from dlrm.training.events import Evaluation, Events, Finish, Report

logger = logging.getLogger("dlrm")


class TensorBoard(Events):
    """Writes ``RUN/tensorboard``.

    Steps count from the beginning of training. Each process writes an event file of its own; that
    of a resumed run begins by telling TensorBoard to forget what came after its checkpoint. All
    of a report is one record, written and flushed at once. When the disk is full, training goes
    on without.

    Args:
        run: Whose folder, and which configuration.
        data: What it is trained on.
        resumed_step: The steps in all at which a resumed run goes on; None: it begins.

    Raises:
        EnvironmentFaultError: The folder or file cannot be made.
    """

    def __init__(self, run: Run, data: Dataset, resumed_step: int | None) -> None:
        self._run = run
        self._data = data
        self._folder = folder = run.path / "tensorboard"
        self._is_full = False
        with environment_faults(f"write to {folder}"):
            folder.mkdir(exist_ok=True)
            if resumed_step is None:  # it may have begun before, and not come to a checkpoint
                for path in folder.glob("events.*"):
                    path.unlink()
            # Names are sorted by TensorBoard to find the order of files. The host's usual place in
            # them stays empty.
            numbers = [path.name.split(".")[-1] for path in folder.glob("events.*")]
            number = 1 + max((int(each) for each in numbers if each.isdecimal()), default=0)
            name = f"events.out.tfevents.{int(time.time())}.{number:06}"
            self._writer = RecordWriter(str(folder / name))
        self._write(Event(file_version="brain.Event:2"))
        if resumed_step is not None:
            start = SessionLog(status=SessionLog.START)
            self._write(Event(step=resumed_step + 1, session_log=start))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        with self._going_on_when_full():
            self._writer.close()

    def on_report(self, report: Report) -> None:
        """Write loss, learning rate and speed."""
        values = {
            "loss": report.loss,
            "learning_rate": report.learning_rate,
            "samples_per_second": report.samples_per_second,
            "milliseconds_per_step": report.milliseconds_per_step,
            "data_wait_milliseconds": report.data_wait_milliseconds,
        }
        self._write_scalars(report.position, "train", values)

    def on_evaluation(self, evaluation: Evaluation) -> None:
        """Write the metrics."""
        self._write_metrics(evaluation.position, evaluation.split, evaluation.metrics)

    def on_finish(self, finish: Finish) -> None:
        """Write the metrics of the trained model, and what the projector shows."""
        for split, metrics in finish.result.metrics.items():
            self._write_metrics(finish.position, f"trained/{split}", metrics)
        tracking = self._run.config.tracking
        if tracking.tensorboard_projector:
            try:
                self._write_projector(finish.model)
            except EnvironmentFaultError as error:
                logger.warning("there is nothing for TensorBoard's projector: %s", error)

    def _write_projector(self, model: DLRM) -> None:
        """Write the vectors of a feature's commonest values in the training rows, with labels."""
        tracking = self._run.config.tracking
        names = [feature.name for feature in self._run.schema.sparse]
        (common,) = common_values(
            self._run,
            model,
            self._data,
            [names.index(tracking.tensorboard_projector)],
            tracking.tensorboard_projector_rows,
        )
        with atomic_write(self._folder / "tensors.tsv") as file:
            np.savetxt(file, common.vectors, fmt="%.9g", delimiter="\t")
        with atomic_write(self._folder / "metadata.tsv") as file:
            file.write(b"value\tcount\tclick_rate\n")
            for value, count, clicked in zip(
                common.values, common.counts, common.clicks, strict=True
            ):
                file.write(f"{value}\t{count}\t{clicked / count:.6f}\n".encode())
        with atomic_write(self._folder / "projector_config.pbtxt") as file:
            file.write(
                f"embeddings {{\n  tensor_name: {json.dumps(common.name)}\n"
                '  tensor_path: "tensors.tsv"\n  metadata_path: "metadata.tsv"\n}\n'.encode()
            )

    def _write_metrics(self, position: Position, group: str, metrics: Metrics) -> None:
        """Write all but the deciles, which would be 60 charts, and are a figure of the report."""
        values = dataclasses.asdict(metrics)
        del values["calibration_by_decile"]
        self._write_scalars(position, group, values)

    def _write_scalars(self, position: Position, group: str, values: Mapping[str, Any]) -> None:
        scalars = [
            Summary.Value(tag=tag, simple_value=value) for tag, value in _numbers(group, values)
        ]
        self._write(Event(step=position.total_steps, summary=Summary(value=scalars)))

    def _write(self, event: Event) -> None:
        if self._is_full:
            return
        event.wall_time = time.time()
        with self._going_on_when_full():
            self._writer.write(event.SerializeToString())
            self._writer.flush()

    @contextmanager
    def _going_on_when_full(self) -> Iterator[None]:
        with environment_faults(f"write to {self._folder}"):
            try:
                yield
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                    raise
                if not self._is_full:
                    self._is_full = True
                    logger.warning("%s is not written any more: %s", self._folder, error.strerror)


def _numbers(name: str, value: Any) -> Iterator[tuple[str, float]]:
    """Yield the numbers in a value, however deep, each with its path."""
    if isinstance(value, Mapping):
        for key, each in value.items():
            yield from _numbers(f"{name}/{key}", each)
    elif isinstance(value, list | tuple):
        for index, each in enumerate(value):
            yield from _numbers(f"{name}/{index}", each)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield name, float(value)
