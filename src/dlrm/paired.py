"""Several models on the same rows: their metrics, and how these vary together over such rows.

The variance of a difference of AUCs is DeLong's (DeLong, DeLong and Clarke-Pearson, *Comparing the
Areas under Two or More Correlated Receiver Operating Characteristic Curves*, 1988): covariances of
each row's placement value, which is the share of the rows with the other label that the row is on
the right side of. Placement values come from sorted scores, as in Sun and Xu, *Fast Implementation
of DeLong's Algorithm*, 2014; here from counts of distinct probabilities, in limited memory.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import IO

import numpy as np
from numpy.typing import NDArray

from dlrm.errors import UserError
from dlrm.files import environment_faults
from dlrm.metrics import DEFAULT_MEMORY, Metrics, MetricSums, log_losses
from dlrm.predictions import Predictions
from dlrm.scores import SortedScores

_ROWS = 1 << 18
"""Rows that are looked at together."""
_TABLE_BYTES = 64
"""What a distinct probability takes in a table, while it is made."""


@dataclass(frozen=True, eq=False)
class Paired:
    """k models on the same rows.

    Attributes:
        metrics: Of each.
        auc_covariance: (k, k), of their AUCs over samples of such rows; NaN with fewer than two
            rows of either label.
        log_loss_covariance: (k, k), the same of their log losses.
        equal: (k, k), whether two predict the same for every row.
    """

    metrics: tuple[Metrics, ...]
    auc_covariance: NDArray[np.float64]
    log_loss_covariance: NDArray[np.float64]
    equal: NDArray[np.bool_]


def refuse_other_rows(predictions: Sequence[Predictions], *, same_rows: bool = False) -> None:
    """Refuse predictions that are not of the same rows as the first.

    Args:
        predictions: On disk.
        same_rows: Do not mind that their DATASETs have other fingerprints; labels must be equal.

    Raises:
        UserError: Naming two files and what differs.
    """
    first = predictions[0]
    for other in predictions[1:]:
        if other.rows != first.rows:
            raise UserError(
                f"{first.path} and {other.path} are of different rows: {first.rows} and "
                f"{other.rows} of them. Compare runs that were evaluated on the same rows (as to "
                "--num-batches, too)."
            )
        if other.dataset != first.dataset and not same_rows:
            raise UserError(
                f"{first.path} and {other.path} are of different DATASETs: {first.dataset} and "
                f"{other.dataset}. If both were prepared from the same rows in the same order, "
                "say so with --same-rows; labels are compared."
            )
        row = 0
        for (mine, _), (theirs, _) in zip(_pieces(first), _pieces(other), strict=True):
            if not np.array_equal(mine, theirs):
                row += int(np.flatnonzero(mine != theirs)[0])
                raise UserError(
                    f"{first.path} and {other.path} are of different rows: the labels of row "
                    f"{row} differ. Compare runs that were evaluated on the same rows."
                )
            row += len(mine)


def compare_rows(predictions: Sequence[Predictions], *, memory: int = DEFAULT_MEMORY) -> Paired:
    """Compute the metrics of several models, and their covariances over rows.

    Placement values lie in files without a name, 8 bytes a row and model.

    Args:
        predictions: Of the same rows (``refuse_other_rows``), k files.
        memory: The most to use, in bytes.

    Raises:
        UserError: A file is damaged.
        EnvironmentFaultError: The disk is full or fails.
    """
    count = len(predictions)
    positives, negatives, losses = (_CoMoments(count) for _ in range(3))
    equal = np.ones((count, count), np.bool_)
    with ExitStack() as stack:
        ranked = [_Placements(each, memory, stack) for each in predictions]
        for pieces in zip(*(_pieces(each) for each in predictions), strict=True):
            clicked = pieces[0][0].astype(np.bool_)
            placements = np.stack([each.read(len(clicked)) for each in ranked])
            positives.add(placements[:, clicked])
            negatives.add(placements[:, ~clicked])
            losses.add(np.stack([_losses(clicked, each) for _, each in pieces]))
            for one, other in itertools.combinations(range(count), 2):
                if equal[one, other] and not np.array_equal(pieces[one][1], pieces[other][1]):
                    equal[one, other] = equal[other, one] = False
        return Paired(
            tuple(each.metrics for each in ranked),
            positives.covariance_of_mean() + negatives.covariance_of_mean(),
            losses.covariance_of_mean(),
            equal,
        )


def _losses(clicked: NDArray[np.bool_], probabilities: NDArray[np.float32]) -> NDArray[np.float64]:
    if_positive, if_negative = log_losses(probabilities)
    return np.where(clicked, if_positive, if_negative)


class _Placements:
    """The placement value of every row of a model, on disk, and its metrics."""

    def __init__(self, predictions: Predictions, memory: int, stack: ExitStack) -> None:
        self._file: IO[bytes] = stack.enter_context(tempfile.TemporaryFile())
        with SortedScores(memory // 8) as scores:  # half of the memory
            for labels, probabilities in predictions.batches():
                scores.add(labels, probabilities)
            self._clicks, self._others = scores.positives, scores.samples - scores.positives
            sums = MetricSums(scores.samples, scores.positives)
            first = True
            for table in self._tables(scores, sums, memory // 4 // _TABLE_BYTES):
                self._place(predictions, table, first=first)
                first = False
        self.metrics = sums.metrics()
        self._file.seek(0)

    def _tables(
        self, scores: SortedScores, sums: MetricSums, length: int
    ) -> Iterator[tuple[NDArray[np.uint32], NDArray[np.float64], NDArray[np.float64]]]:
        """Cut distinct probabilities and their placements, by label, into tables."""
        keys: list[NDArray[np.uint32]] = []
        of_positives: list[NDArray[np.float64]] = []
        of_negatives: list[NDArray[np.float64]] = []
        count = 0
        for block in scores.blocks():
            sums.add(block)
            beaten, ahead = block.placements(self._clicks)
            keys.append(block.keys)
            of_positives.append(beaten / max(1, 2 * self._others))
            of_negatives.append(ahead / max(1, 2 * self._clicks))
            count += len(block.keys)
            if count >= length:
                yield _joined(keys, of_positives, of_negatives)
                count = 0
        if count:
            yield _joined(keys, of_positives, of_negatives)

    def _place(
        self,
        predictions: Predictions,
        table: tuple[NDArray[np.uint32], NDArray[np.float64], NDArray[np.float64]],
        *,
        first: bool,
    ) -> None:
        """Write the placements of the rows whose probability is in a table."""
        keys, of_positives, of_negatives = table
        position = 0
        for labels, probabilities in _pieces(predictions):
            sought = (probabilities + np.float32(0)).view(np.uint32)  # -0.0 becomes 0.0
            values = np.zeros(len(labels)) if first else self.read(len(labels), position)
            inside = np.flatnonzero((sought >= keys[0]) & (sought <= keys[-1]))
            if first or len(inside):
                at = np.searchsorted(keys, sought[inside])
                values[inside] = np.where(labels[inside] == 1, of_positives[at], of_negatives[at])
                with environment_faults("write placement values"):
                    self._file.seek(8 * position)
                    self._file.write(values.data)
            position += len(labels)

    def read(self, count: int, position: int | None = None) -> NDArray[np.float64]:
        """Read the placements of so many rows, from a row or where the last were."""
        if position is not None:
            self._file.seek(8 * position)
        with environment_faults("read placement values"):
            return np.frombuffer(bytearray(self._file.read(8 * count)))


def _joined(
    keys: list[NDArray[np.uint32]],
    of_positives: list[NDArray[np.float64]],
    of_negatives: list[NDArray[np.float64]],
) -> tuple[NDArray[np.uint32], NDArray[np.float64], NDArray[np.float64]]:
    """Join what was gathered, and empty it."""
    table = np.concatenate(keys), np.concatenate(of_positives), np.concatenate(of_negatives)
    for gathered in (keys, of_positives, of_negatives):
        gathered.clear()
    return table


def _pieces(
    predictions: Predictions,
) -> Iterator[tuple[NDArray[np.uint8], NDArray[np.float32]]]:
    """Read predictions ``_ROWS`` at a time, however their record batches are cut."""
    labels, probabilities = np.empty(0, np.uint8), np.empty(0, np.float32)
    for more_labels, more_probabilities in predictions.batches():
        labels = np.concatenate((labels, more_labels))
        probabilities = np.concatenate((probabilities, more_probabilities))
        while len(labels) >= _ROWS:
            yield labels[:_ROWS], probabilities[:_ROWS]
            labels, probabilities = labels[_ROWS:], probabilities[_ROWS:]
    if len(labels):
        yield labels, probabilities


class _CoMoments:
    """Covariances of k values that come in blocks, joined as ``scores.Moments`` are."""

    def __init__(self, count: int) -> None:
        self._samples = 0
        self._mean = np.zeros(count)
        self._products = np.zeros((count, count))

    def add(self, values: NDArray[np.float64]) -> None:
        """Add values, (k, m)."""
        samples = values.shape[1]
        if not samples:
            return
        mean = values.mean(axis=1)
        centred = values - mean[:, None]
        total = self._samples + samples
        difference = mean - self._mean
        self._products += centred @ centred.T
        self._products += np.outer(difference, difference) * (self._samples * samples / total)
        self._mean += difference * (samples / total)
        self._samples = total

    def covariance_of_mean(self) -> NDArray[np.float64]:
        """Return the sample covariance over the number of samples, (k, k); NaN below two."""
        if self._samples < 2:
            return np.full_like(self._products, np.nan)
        return self._products / (self._samples - 1) / self._samples
