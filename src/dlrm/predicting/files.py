"""A file or pipe of raw rows to a file or pipe of probabilities.

Rows are read in the calling thread, ahead of the others, each of which takes a block through
encoding and the model alone: blocks need nothing of each other, so no core waits for another. What
is scored goes into a ``Work`` folder; when it is all there, into the output, in one pass that also
computes the metrics. A pipe gets its rows at once, and nothing is kept.
"""

from __future__ import annotations

import filecmp
import logging
import platform
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from dlrm.config import InputFormat, OutputFormat, size_bytes
from dlrm.data.raw_rows import RawRows
from dlrm.device import lone_threads
from dlrm.errors import UserError
from dlrm.files import atomic_write, environment_faults, locked
from dlrm.metrics import Metrics, MetricsAccumulator
from dlrm.ops.library import library
from dlrm.predicting.inputs import PIPE, Input, open_input
from dlrm.predicting.outputs import find_format, write_rows
from dlrm.predicting.work import BegunWith, Work, is_complete, remove_remains
from dlrm.prediction import Predictor
from dlrm.progress import progress
from dlrm.version import __version__

logger = logging.getLogger("dlrm")
T = TypeVar("T")
R = TypeVar("R")

FIRST_SUBMISSION_ID = 60000000
"""The Id of the first row of Criteo's test.txt in a Kaggle submission."""


@dataclass(frozen=True)
class PredictionSummary:
    """What a prediction came to."""

    rows: int
    unknown_ids: dict[str, int]
    """By sparse feature with any: values that the vocabulary lacks, taken as the feature's 'other'
    slot or, where it has none, as empty bags."""
    metrics: Metrics | None
    """Where the rows have labels."""


@dataclass(frozen=True, eq=False)
class ScoredRows:
    """Rows that are scored.

    Attributes:
        rows: They themselves, n of them.
        probabilities: (n,).
        unknown: (F,) how many values of each sparse feature were unknown.
    """

    rows: RawRows
    probabilities: npt.NDArray[np.float32]
    unknown: npt.NDArray[np.int64]


def predict_file(
    predictor: Predictor,
    source: Path,
    output: Path,
    *,
    input_format: InputFormat = "auto",
    output_format: OutputFormat = "auto",
    first_id: int | None = None,
    overwrite: bool = False,
) -> PredictionSummary:
    """Score raw rows, in memory that does not grow with their number.

    What a process was doing that was killed, or that a signal or a full disk ended, is gone on
    with, if probabilities depend on nothing else now: the output is the same, byte for byte. Where
    it was written already, and only what it was made from had to be removed, that is done. A pipe
    cannot be gone on with, nor what a model without an identity scores (``Predictor``).

    Args:
        predictor: The model.
        source: Rows with or without a label; "-" for standard input.
        output: Appears when it is complete; a CSV file is packed with gzip where its name ends in
            ``.gz``. "-" for standard output.
        input_format: Of the rows; "auto": what they look like.
        output_format: Of the output; "auto": what its name says, else CSV.
        first_id: The first row's Id; None: 60000000 for rows of Criteo's format without a label, as
            in Kaggle's submissions, else 0.
        overwrite: Replace an output that is there already, and begin anew what was interrupted if
            it was another prediction.

    Raises:
        UserError: A row is malformed, the output is there already, or its folder is not; or another
            prediction of the same output was interrupted.
        EnvironmentFaultError: The disk is full or read-only.
    """
    if first_id is not None and not 0 <= first_id < 1 << 62:
        raise UserError(f"--first-id must be in 0 … 2**62-1; got {first_id}.")
    output_format = find_format(output, output_format)
    with open_input(source, predictor.schema, input_format) as opened:
        if output == PIPE:
            return Prediction(predictor, opened, output_format, first_id).into_pipe()
        _refuse_output(source, output)
        with locked(output, "output"):
            prediction = Prediction(predictor, opened, output_format, first_id)
            return prediction.into_file(output, overwrite=overwrite)


def score(predictor: Predictor, blocks: Iterator[RawRows]) -> Iterator[ScoredRows]:
    """Score rows on all threads of PyTorch, in order.

    Args:
        predictor: The model.
        blocks: The rows; each is taken through the model by one thread, where it can be.
    """

    def work(rows: RawRows) -> ScoredRows:
        return ScoredRows(rows, *predictor.predict_rows(rows.dense, rows.sparse))

    return in_threads(blocks, work, alone=predictor.scores_alone)


def in_threads(items: Iterable[T], work: Callable[[T], R], *, alone: bool = True) -> Iterator[R]:
    """Do something with each of many items, on all threads of PyTorch, in order.

    Args:
        items: They are taken as threads become free; few are held at a time.
        work: What to do.
        alone: Whether a thread does it alone; else one does it after the other, each with all.
    """
    threads = torch.get_num_threads() if alone else 1
    with lone_threads(threads, alone=alone) as pool:
        waiting: deque[Future[R]] = deque()
        for item in items:
            waiting.append(pool.submit(work, item))
            while len(waiting) > threads + 1 or (waiting and waiting[0].done()):
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


class Prediction:
    """One prediction: of which model, of what, into which format."""

    def __init__(
        self, predictor: Predictor, source: Input, output_format: OutputFormat, first_id: int | None
    ) -> None:
        self._predictor = predictor
        self._source = source
        self._output_format = output_format
        self._first_id = first_id

    def into_pipe(self) -> PredictionSummary:
        """Write rows to standard output as they are scored."""
        unknown = np.zeros(len(self._predictor.schema.sparse), np.int64)
        rows, labelled, started = 0, False, time.monotonic()
        pipe = sys.stdout.buffer
        scored = score(self._predictor, self._source.blocks())
        with self._metrics(None) as accumulator, self._progress(0) as bar:
            block = next(scored, None)
            labelled = block is not None and block.rows.labels is not None
            with write_rows(pipe, self._output_format, self._first(labelled)) as writer:
                while block is not None:
                    writer.write(block.probabilities)
                    if block.rows.labels is not None:
                        accumulator.add(block.rows.labels, block.probabilities)
                    unknown += block.unknown
                    rows += len(block.rows)
                    bar.update(len(block.rows))
                    block = next(scored, None)
            pipe.flush()
            _tell_speed(rows, started)
            return self._summary(rows, unknown, accumulator.metrics() if labelled else None)

    def into_file(self, output: Path, *, overwrite: bool) -> PredictionSummary:
        """Score all rows that are not scored yet, then write the output."""
        begun_with = self._begun_with()
        if output.exists() and not overwrite:
            return self._written_already(output, begun_with)
        with Work(output, begun_with, anew=overwrite) as work:
            try:
                self._score_into(work)
                with atomic_write(output) as file:
                    summary = self._write(work, file, output)
            except UserError:
                work.remove()
                raise
            except BaseException:
                if not work.can_go_on:
                    with suppress(OSError):
                        work.remove()
                    raise
                if not work.journal.complete:
                    with suppress(Exception):  # what failed is told, not what it brought about
                        work.save()
                logger.warning("%s is unfinished. To go on: repeat the same command.", output)
                raise
            work.remove()
        return summary

    def _written_already(self, output: Path, begun_with: BegunWith) -> PredictionSummary:
        """Remove what a process left that was killed when it had written the output.

        Raises:
            UserError: It has not: the output is another.
        """
        remove_remains(output)
        if not is_complete(output, begun_with):
            raise _taken(output)
        with Work(output, begun_with) as work:
            again = work.folder / "again"
            with environment_faults(f"write {again}"), open(again, "wb") as file:
                summary = self._write(work, file, output)
            with environment_faults(f"read {output}"):
                is_same = filecmp.cmp(again, output, shallow=False)
            if not is_same:
                again.unlink()
                raise _taken(output)
            work.remove()
        logger.info("%s is written already; %s is removed", output, work.folder)
        return summary

    def _score_into(self, work: Work) -> None:
        before = work.journal.position.row
        if before:
            logger.info("going on after %d rows that are scored already", before)
        if work.journal.complete:
            return
        started = time.monotonic()
        blocks = self._source.blocks(
            work.journal.position if before else None, labelled=work.journal.labelled
        )
        with self._progress(before) as bar:
            for block in score(self._predictor, blocks):
                rows = block.rows
                work.add(block.probabilities, rows.labels, block.unknown, rows.end)
                bar.update(len(rows))
        work.save(complete=True)
        _tell_speed(work.journal.position.row - before, started)

    def _write(self, work: Work, file: IO[bytes], output: Path) -> PredictionSummary:
        """Write all rows into a file, which is or becomes the output."""
        journal = work.journal
        labelled = bool(journal.labelled)
        packed = output.suffix == ".gz"
        with (
            self._metrics(output.parent) as accumulator,
            write_rows(file, self._output_format, self._first(labelled), packed=packed) as writer,
        ):
            for probabilities, labels in work.read():
                writer.write(probabilities)
                if labels is not None:
                    accumulator.add(labels, probabilities)
            metrics = accumulator.metrics() if labelled else None
        unknown = np.array(journal.unknown or [0] * len(self._predictor.schema.sparse), np.int64)
        return self._summary(journal.position.row, unknown, metrics)

    def _begun_with(self) -> BegunWith:
        """Return what the bits of probabilities depend on.

        Nobody can tell that of a pipe, which is another each time, nor of a model without an
        identity, as is one of a checkpoint without a checksum.
        """
        identity = self._source.identity
        return {
            **(self._predictor.identity or {"the model": None}),
            "the input": f"{identity} {self._source.format}" if identity else None,
            "versions": f"dlrm {__version__}, torch {torch.__version__}",
            "kernels": f"{library().loaded} {torch.backends.cpu.get_cpu_capability()} "
            f"{platform.machine()}",
        }

    def _first(self, labelled: bool) -> int:
        if self._first_id is not None:
            return self._first_id
        return FIRST_SUBMISSION_ID if self._source.format == "criteo" and not labelled else 0

    def _metrics(self, folder: Path | None) -> MetricsAccumulator:
        config = self._predictor.config
        memory = size_bytes(config.evaluation_memory, "--evaluation-memory")
        return MetricsAccumulator(memory=memory, folder=folder, threshold=config.decision_threshold)

    def _progress(self, rows: int) -> Any:
        return progress("predict", self._source.rows(), unit=" rows", unit_scale=True, initial=rows)

    def _summary(
        self, rows: int, unknown: npt.NDArray[np.int64], metrics: Metrics | None
    ) -> PredictionSummary:
        names = [feature.name for feature in self._predictor.schema.sparse]
        if unknown.sum() > rows * len(names) / 2:
            logger.warning(
                "%s: %.0f%% of the categorical values were never seen in training; is it other "
                "data than the model was trained on?",
                self._source.path,
                100 * unknown.sum() / (rows * len(names)),
            )
        counted = {name: int(count) for name, count in zip(names, unknown, strict=True) if count}
        return PredictionSummary(rows, counted, metrics)


def _tell_speed(rows: int, started: float) -> None:
    seconds = max(time.monotonic() - started, 1e-9)
    logger.info("scored %d rows in %.1f s: %.0f rows/s", rows, seconds, rows / seconds)


def _refuse_output(source: Path, output: Path) -> None:
    if not output.parent.is_dir():
        raise UserError(f"{output.parent} is not a folder, so {output} cannot be written. Make it.")
    if not output.exists():
        return
    if source != PIPE and output.samefile(source):
        raise UserError(f"{output} is the input too. Choose another output.")
    if not output.is_file():
        raise UserError(
            f"{output} exists and is not a file, so it is not replaced. Choose another."
        )


def _taken(output: Path) -> UserError:
    return UserError(
        f"{output} is there already, and is not overwritten. Choose another output, or replace it "
        "with --overwrite."
    )
