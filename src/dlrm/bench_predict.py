"""Measures prediction, from raw rows to an output, beside its two parts alone."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from dlrm.config import BenchPredictConfig
from dlrm.data.criteo import Position
from dlrm.data.raw_rows import RawRows
from dlrm.errors import UserError
from dlrm.predicting.files import Prediction, in_threads
from dlrm.predicting.inputs import Input, open_input
from dlrm.prediction import load
from dlrm.progress import progress
from dlrm.runs import hardware, measured_on, versions


@dataclass(frozen=True)
class BenchPredictResult:
    """What prediction reaches: medians over the rounds."""

    rows_per_second: float
    """From the raw file to the output."""
    prepared_per_second: float
    """Of parsing and encoding alone."""
    scored_per_second: float
    """Of rows that are encoded and in memory."""
    share_of_parts: float
    """Of the rate at which both parts would follow each other; the median of the rounds' shares."""
    rows: int
    input: str
    input_format: str
    config: BenchPredictConfig
    hardware: dict[str, str | int]
    versions: dict[str, str]

    def table(self) -> str:
        """Return the result as text."""
        lines = [
            f"{self.rows:,} rows of {self.input} ({self.input_format}), "
            f"{self.config.rounds} rounds",
            measured_on(self.hardware, self.versions),
            "",
            f"{'':32}{'rows/s':>12}",
            f"{'parsing and encoding alone':32}{self.prepared_per_second:12,.0f}",
            f"{'scoring alone':32}{self.scored_per_second:12,.0f}",
            f"{'from raw file to output':32}{self.rows_per_second:12,.0f}",
            "",
            f"{self.share_of_parts:.3f} of the rate of both parts, one after the other",
        ]
        return "\n".join(lines) + "\n"


@dataclass(frozen=True)
class _FirstRows(Input):
    """An input that ends early, after the block in which so many rows are reached."""

    limit: int = field(default=0, kw_only=True)

    def blocks(
        self, start: Position | None = None, *, labelled: bool | None = None
    ) -> Iterator[RawRows]:
        for block in super().blocks(start, labelled=labelled):
            yield block
            if block.end.row >= self.limit:
                return


def bench_predict(model: Path, source: Path, config: BenchPredictConfig) -> BenchPredictResult:
    """Measure prediction, preparation and scoring in turn.

    Args:
        model: A RUN or a BUNDLE.
        source: A file of raw rows.
        config: How many rows and rounds.

    Raises:
        UserError: The model or the input is wrong, or the input is a pipe.
        EnvironmentFaultError: The disk is full.
    """
    predictor = load(model)
    encoder = predictor.encoder
    if encoder is None:
        raise UserError(f"{model} takes no raw rows: it has no vocabularies.")

    def encode(block: RawRows) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
        return block.dense, encoder.encode(block.sparse)[0]

    whole: list[float] = []
    prepared: list[float] = []
    scored: list[float] = []
    with open_input(source, predictor.schema) as opened, tempfile.TemporaryDirectory() as folder:
        if opened.file is not None:
            raise UserError(f"{source} is a pipe, and is read several times. Name a file.")
        first = _FirstRows(
            opened.path, opened.schema, opened.format, None, opened.head, limit=config.rows
        )
        output = Path(folder) / "output.csv"
        encoded = list(in_threads(first.blocks(), encode))
        rows = sum(len(dense) for dense, _ in encoded)
        if not rows:
            raise UserError(f"{source} has no rows. Name a file of raw rows.")

        def predict() -> None:
            Prediction(predictor, first, "csv", None).into_file(output, overwrite=True)

        def prepare() -> None:
            deque(in_threads(first.blocks(), encode), maxlen=0)

        def score() -> None:
            alone = predictor.scores_alone
            work = in_threads(encoded, lambda each: predictor.score_encoded(*each), alone=alone)
            deque(work, maxlen=0)

        for number in progress("bench predict", config.rounds + 1, range(config.rounds + 1)):
            rates = [rows / _seconds(each) for each in (predict, prepare, score)]
            if number:  # the first round warms up
                for kept, each in zip((whole, prepared, scored), rates, strict=True):
                    kept.append(each)
    shares = [
        each * (1 / of_prepared + 1 / of_scored)
        for each, of_prepared, of_scored in zip(whole, prepared, scored, strict=True)
    ]
    return BenchPredictResult(
        rows_per_second=statistics.median(whole),
        prepared_per_second=statistics.median(prepared),
        scored_per_second=statistics.median(scored),
        share_of_parts=statistics.median(shares),
        rows=rows,
        input=str(source),
        input_format=first.format,
        config=config,
        hardware=hardware(predictor.model.device),
        versions=versions(),
    )


def _seconds(work: Callable[[], None]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started
