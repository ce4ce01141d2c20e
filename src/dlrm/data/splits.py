"""Which rows train, validate and test, and the order in which training rows are stored.

Rows are numbered from 0 in the order of the source. Training days come first; of the last day, the
first half is test and the second half validation.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from dlrm.config import Shuffle
from dlrm.errors import UserError

DAYS = 7
MINIMUM_ROWS = 2 * DAYS
"""With fewer rows the last of 7 days has no two, and a split would be empty."""

SplitRule = Literal["days", "rows", "none", "fixed"]
RULES: Mapping[SplitRule, str] = {
    "rows": (
        "7 days, runs of rows as equal as can be, the first ones longer; days 1-6 train, the first "
        "half of day 7 (the larger half) test, the second half validation"
    ),
    "days": (
        "a day a file; all but the last train, the first half of the last (the larger half) test, "
        "the second half validation"
    ),
    "none": "every row trains",
    "fixed": "as in the files of the reference, one a split",
}


@dataclass(frozen=True)
class SplitRows:
    """How many rows of a source, in its order, belong to each training day and split."""

    train_days: tuple[int, ...]
    test: int
    validation: int

    @property
    def days(self) -> tuple[int, ...]:
        """Rows of every day, the last, which is held back, included."""
        held_back = self.test + self.validation
        return (*self.train_days, held_back) if held_back else self.train_days

    @property
    def ranges(self) -> dict[Literal["train", "validation", "test"], range]:
        """The rows of each split."""
        train = sum(self.train_days)
        test = train + self.test
        return {
            "train": range(train),
            "validation": range(test, test + self.validation),
            "test": range(train, test),
        }


def hold_back_last(days: tuple[int, ...]) -> SplitRows:
    """Halve the last of several days into test and validation."""
    return SplitRows(days[:-1], (days[-1] + 1) // 2, days[-1] // 2)


def day_lengths(rows: int, source: str) -> tuple[int, ...]:
    """Cut a source of so many rows into 7 days, as the reference does.

    Args:
        rows: Rows of the source.
        source: Its name, for the message.

    Raises:
        UserError: There are too few for every split to have one.
    """
    if rows < MINIMUM_ROWS:
        raise UserError(
            f"{source} has {rows} rows; expected at least {MINIMUM_ROWS}: it is cut into {DAYS} "
            "days, and the last into test and validation. Use a larger file."
        )
    shortest, longer = divmod(rows, DAYS)
    return tuple(shortest + (day < longer) for day in range(DAYS))


_CHUNK_ROWS = 1 << 20


def permutation_bytes(rows: int) -> int:
    """Return the memory that a permutation of the reference takes while it is drawn."""
    return rows * (np.dtype(np.int64).itemsize + _position_type(rows).itemsize)


def _position_type(rows: int) -> np.dtype[np.signedinteger]:
    return np.dtype(np.int32 if rows < 1 << 31 else np.int64)


class StoredOrder:
    """The order in which training rows are stored, and the part of the DATASET that each goes to.

    ``day`` and ``total`` sort rows by a hash of seed and row number, so that the place of a row is
    known without the others. ``reference`` and ``reference-day`` are the first draws of NumPy's
    legacy generator, as the reference implementation makes them; they are held in memory whole.

    Args:
        days: Rows of each training day.
        shuffle: How rows are shuffled; "none" needs no StoredOrder.
        seed: Of the shuffle.
        part_rows: Rows of a part, about.
    """

    def __init__(self, days: tuple[int, ...], shuffle: Shuffle, seed: int, part_rows: int) -> None:
        assert shuffle != "none"
        self._seed = seed
        self._position: npt.NDArray[np.integer] | None = None
        self._part_rows = part_rows
        rows = sum(days)
        # Only hashes are ordered within days one by one; a permutation is already.
        groups = days if shuffle == "day" else (rows,)
        self._ends = np.cumsum(groups)
        parts = np.array([-(-group // part_rows) for group in groups])
        self._parts_of_group = parts
        self._first_part = np.cumsum(parts) - parts
        self.parts = int(parts.sum())
        if shuffle in ("reference", "reference-day"):
            random_state = np.random.RandomState(seed)
            self._position = np.empty(rows, _position_type(rows))
            first = 0
            for group in (rows,) if shuffle == "reference" else days:
                order = random_state.permutation(group)
                for start in range(0, group, _CHUNK_ROWS):
                    chunk = order[start : start + _CHUNK_ROWS] + first
                    self._position[chunk] = np.arange(first + start, first + start + len(chunk))
                first += group

    @property
    def nbytes(self) -> int:
        """Memory that it holds, for as long as rows are placed."""
        return 0 if self._position is None else self._position.nbytes

    def place(
        self, rows: npt.NDArray[np.int64]
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.uint64]]:
        """Return the part that each row goes to, and the key by which a part's rows are sorted.

        Args:
            rows: (n,) row numbers.
        """
        if self._position is not None:
            position = self._position[rows]
            return (position // self._part_rows).astype(np.int64), position.astype(np.uint64)
        keys = _hash(rows, self._seed)
        group = np.searchsorted(self._ends, rows, side="right")
        parts = self._parts_of_group[group].astype(np.uint64)
        within = (keys >> np.uint64(32)) * parts >> np.uint64(32)
        return self._first_part[group] + within.astype(np.int64), keys


def _hash(rows: npt.NDArray[np.int64], seed: int) -> npt.NDArray[np.uint64]:
    """Hash row numbers with splitmix64: one to one, so no two rows of a source are equal."""
    golden = np.uint64(0x9E3779B97F4A7C15)
    start = mix(np.array([seed], np.uint64) + golden)
    return mix(start + rows.astype(np.uint64) * golden)


def mix(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Scatter numbers of 64 bits, one to one (the finalizer of splitmix64)."""
    values = (values ^ values >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ values >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return values ^ values >> np.uint64(31)
