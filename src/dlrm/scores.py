"""Labelled probabilities, taken in any order and read back sorted, within a limited memory.

What can be sorted in memory is; beyond that, sorted runs lie in a file without a name, which the
system removes when the process ends, however it ends.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Self

import numpy as np
from numpy.typing import NDArray

from dlrm.files import environment_faults

BLOCK = 1 << 16
"""Distinct probabilities of a block. What is summed over blocks depends on it in the last bits, and
on nothing else: not on the order of the scores, nor on the memory."""

_PIECE = 1 << 16
"""Scores that are checked and converted at a time."""
_SORTED_PIECE = 1 << 18
"""Sorted scores that are counted at a time."""


@dataclass(frozen=True, eq=False)
class Block:
    """Consecutive distinct probabilities of a set of scores, m of them, ascending.

    Attributes:
        keys: (m,) uint32, the bits of the probabilities as float32.
        negatives: (m,) int64, how many scores with label 0 have each.
        positives: (m,) int64, the same of label 1.
        negatives_below: Of all scores with label 0, how many are below the first.
        positives_below: The same of label 1.
    """

    keys: NDArray[np.uint32]
    negatives: NDArray[np.int64]
    positives: NDArray[np.int64]
    negatives_below: int
    positives_below: int

    @property
    def probabilities(self) -> NDArray[np.float32]:
        """(m,) float32."""
        return self.keys.view(np.float32)

    def placements(self, all_positives: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return twice the placement counts of DeLong; ties count one half.

        Args:
            all_positives: Of all scores, how many have label 1.

        Returns:
            Of a positive with each probability, twice the negatives below it; of a negative, twice
            the positives above it: (m,) each.
        """
        negatives_below = self.negatives_below + np.cumsum(self.negatives) - self.negatives
        positives_below = self.positives_below + np.cumsum(self.positives) - self.positives
        return (
            2 * negatives_below + self.negatives,
            2 * (all_positives - positives_below) - self.positives,
        )


class SortedScores:
    """Collects scores, and counts each distinct probability in ascending order.

    Args:
        capacity: Scores (4 bytes each) that are held in memory; more go to disk.
        folder: Where to put what goes to disk; None: the system's folder for temporary files.

    Attributes:
        samples: Scores so far.
        positives: Those with label 1.
    """

    def __init__(self, capacity: int, folder: Path | None = None) -> None:
        self._keys = np.empty(max(1, capacity), np.uint32)  # untouched, so not resident yet
        self._filled = 0
        self._folder = folder
        self._file: IO[bytes] | None = None
        self._runs = 0
        self.samples = 0
        self.positives = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Free what is on disk and in memory."""
        if self._file:
            self._file.close()
        self._keys = np.empty(0, np.uint32)

    def add(self, labels: NDArray[Any], probabilities: NDArray[Any]) -> None:
        """Add scores.

        Args:
            labels: (n,) of 0 and 1, any numeric or boolean type.
            probabilities: (n,) in [0, 1], rounded to float32 if wider.

        Raises:
            ValueError: The shapes differ, a label is neither 0 nor 1, or a probability is NaN or
                outside [0, 1].
            EnvironmentFaultError: The disk is full or fails.
        """
        labels, probabilities = np.asarray(labels), np.asarray(probabilities)
        if labels.ndim != 1 or labels.shape != probabilities.shape:
            raise ValueError(
                "labels and probabilities must be vectors of equal length; got shapes "
                f"{labels.shape} and {probabilities.shape}"
            )
        for start in range(0, len(labels), _PIECE):
            piece = slice(start, start + _PIECE)
            self._add(labels[piece], probabilities[piece].astype(np.float32, copy=False))

    def _add(self, labels: NDArray[Any], probabilities: NDArray[np.float32]) -> None:
        clicked = labels.astype(np.bool_)
        inside = (probabilities >= 0) & (probabilities <= 1)  # of a NaN neither holds
        if not inside.all() or not np.array_equal(labels, clicked):
            raise _refused(labels, probabilities, self.samples)
        # The bits of a float32 in [0, 1], read as an integer, are in the float's order and at most
        # 0x3F800000. That leaves room for the label in the lowest bit, so that sorting plain
        # integers sorts both. Adding 0.0 turns -0.0 into 0.0.
        keys = (probabilities + np.float32(0)).view(np.uint32)
        keys <<= np.uint32(1)
        keys |= clicked
        self.samples += len(keys)
        self.positives += int(np.count_nonzero(clicked))
        start = 0
        while start < len(keys):
            if self._filled == len(self._keys):
                self._write_run()
            count = min(len(keys) - start, len(self._keys) - self._filled)
            self._keys[self._filled : self._filled + count] = keys[start : start + count]
            self._filled += count
            start += count

    def _write_run(self) -> None:
        """Move a full buffer to disk, sorted; every run but the last is that long."""
        self._keys[: self._filled].sort()
        where = self._folder or tempfile.gettempdir()
        with environment_faults(f"sort scores in {where}"):
            if self._file is None:
                self._file = tempfile.TemporaryFile(dir=self._folder)
            self._file.write(self._keys[: self._filled].data)
        self._runs += 1
        self._filled = 0

    def blocks(self) -> Iterator[Block]:
        """Read all scores in ascending order; add none after that.

        Raises:
            EnvironmentFaultError: The disk is full or fails.
        """
        if self._runs:
            if self._filled:
                self._write_run()
            return _blocks(self._merged())
        self._keys[: self._filled].sort()
        pieces = range(0, self._filled, _SORTED_PIECE)
        return _blocks(
            self._keys[start : min(start + _SORTED_PIECE, self._filled)] for start in pieces
        )

    def _merged(self) -> Iterator[NDArray[np.uint32]]:
        """Merge the runs: read a stretch of each, and sort what is below the end of all of them.

        The stretches and what is sorted of them take the buffer's memory at most.
        """
        assert self._file
        capacity = len(self._keys)
        self._keys = np.empty(0, np.uint32)
        stretch = max(1, capacity // (3 * self._runs))
        position = [run * capacity for run in range(self._runs)]
        end = [min(start + capacity, self.samples) for start in position]
        waiting = [np.empty(0, np.uint32) for _ in position]
        left = set(range(self._runs))
        while left:
            for run in left:
                if not len(waiting[run]) and position[run] < end[run]:
                    count = min(stretch, end[run] - position[run])
                    waiting[run] = self._read(position[run], count)
                    position[run] += count
            left = {run for run in left if len(waiting[run])}
            # What a run still has on disk is not below what was read of it.
            unread = [int(waiting[run][-1]) for run in left if position[run] < end[run]]
            taken = []
            for run in left:
                count = len(waiting[run])
                if unread:
                    count = int(np.searchsorted(waiting[run], min(unread), side="right"))
                taken.append(waiting[run][:count])
                waiting[run] = waiting[run][count:]
            if taken:
                merged = np.concatenate(taken)
                merged.sort()
                for start in range(0, len(merged), _SORTED_PIECE):
                    yield merged[start : start + _SORTED_PIECE]

    def _read(self, position: int, count: int) -> NDArray[np.uint32]:
        assert self._file
        keys = np.empty(count, np.uint32)
        with environment_faults("read sorted scores"):
            self._file.seek(4 * position)
            read = self._file.readinto(keys.data)  # type: ignore[attr-defined]
        assert read == keys.nbytes, f"expected {keys.nbytes} bytes of sorted scores, got {read}"
        return keys


def _blocks(pieces: Iterable[NDArray[np.uint32]]) -> Iterator[Block]:
    """Cut what was counted into blocks of equal length, wherever the pieces of keys were cut."""
    empty = np.empty(0, np.int64)
    keys, negatives, positives = np.empty(0, np.uint32), empty, empty
    negatives_below = positives_below = 0

    def block(length: int) -> Block:
        return Block(
            keys[:length],
            negatives[:length],
            positives[:length],
            negatives_below,
            positives_below,
        )

    for more_keys, more_negatives, more_positives in _counted(pieces):
        keys = np.concatenate((keys, more_keys))
        negatives = np.concatenate((negatives, more_negatives))
        positives = np.concatenate((positives, more_positives))
        while len(keys) >= BLOCK:
            yield block(BLOCK)
            negatives_below += int(negatives[:BLOCK].sum())
            positives_below += int(positives[:BLOCK].sum())
            keys, negatives, positives = keys[BLOCK:], negatives[BLOCK:], positives[BLOCK:]
    if len(keys):
        yield block(len(keys))


_Counts = tuple[NDArray[np.uint32], NDArray[np.int64], NDArray[np.int64]]


def _counted(pieces: Iterable[NDArray[np.uint32]]) -> Iterator[_Counts]:
    """Count the labels of each distinct probability; the last waits, it may go on in the next."""
    waiting: _Counts | None = None
    for piece in pieces:
        values = piece >> np.uint32(1)
        starts = np.flatnonzero(np.diff(values, prepend=values[0] ^ np.uint32(1)))
        positives = np.add.reduceat(piece & np.uint32(1), starts, dtype=np.int64)
        negatives = np.diff(starts, append=len(piece)) - positives
        keys = values[starts]
        if waiting is not None:
            if waiting[0][0] == keys[0]:
                negatives[0] += waiting[1][0]
                positives[0] += waiting[2][0]
            else:
                yield waiting
        yield keys[:-1], negatives[:-1], positives[:-1]
        waiting = keys[-1:], negatives[-1:], positives[-1:]
    if waiting is not None:
        yield waiting


def _refused(
    labels: NDArray[Any], probabilities: NDArray[np.float32], first_row: int
) -> ValueError:
    """Return what to say of labels or probabilities that are wrong."""
    bad = np.flatnonzero((labels != 0) & (labels != 1))
    if bad.size:
        return ValueError(
            f"labels must be 0 or 1; {bad.size} are not, the first {labels[bad[0]]} in row "
            f"{first_row + bad[0]}"
        )
    bad = np.flatnonzero(np.isnan(probabilities))
    if bad.size:
        return ValueError(
            f"{bad.size} of {probabilities.size} probabilities are NaN, the first in row "
            f"{first_row + bad[0]}: the model has diverged (lower the learning rate) or its input "
            "holds NaN"
        )
    bad = np.flatnonzero((probabilities < 0) | (probabilities > 1))
    return ValueError(
        f"probabilities must lie in [0, 1]; {bad.size} do not, the first "
        f"{probabilities[bad[0]]} in row {first_row + bad[0]} (are these logits?)"
    )


class Moments:
    """Weighted mean and variance of values that come in blocks, without cancellation.

    Within a block from the differences to its mean; blocks are joined as in Chan, Golub and
    LeVeque, *Updating Formulae and a Pairwise Algorithm for Computing Sample Variances*, 1979.
    """

    def __init__(self) -> None:
        self._count = 0
        self._mean = 0.0
        self._squares = 0.0

    def add(self, values: NDArray[np.float64], counts: NDArray[np.int64]) -> None:
        """Add values, (m,), each so many times."""
        count = int(counts.sum())
        if not count:
            return
        mean = float((counts * values).sum()) / count
        squares = float((counts * (values - mean) ** 2).sum())
        total = self._count + count
        difference = mean - self._mean
        self._squares += squares + difference**2 * self._count * count / total
        self._mean += difference * count / total
        self._count = total

    @property
    def variance_of_mean(self) -> float:
        """The sample variance over the number of values; NaN of fewer than two values."""
        if self._count < 2:
            return math.nan
        return self._squares / (self._count - 1) / self._count
