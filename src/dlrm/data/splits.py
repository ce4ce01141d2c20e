"""Which rows train, validate and test, and the order in which training rows are stored.

The reference's rule: the file is cut into 7 runs of rows, its "days". Six train; of the last, the
first half is test and the second half validation.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dlrm.config import Shuffle
from dlrm.errors import UserError

DAYS = 7
MINIMUM_ROWS = 2 * DAYS
"""With fewer rows the last day has no two, and a split would be empty."""

RULE = (
    "7 days, runs of rows as equal as can be, the first ones longer; days 1-6 train, the first "
    "half of day 7 (the larger half) test, the second half validation"
)


@dataclass(frozen=True)
class SplitRows:
    """How many rows of a file, in its order, belong to each day and split."""

    days: tuple[int, ...]

    @property
    def train(self) -> range:
        """Rows of the training split."""
        return range(sum(self.days[:-1]))

    @property
    def test(self) -> range:
        """Rows of the test split."""
        return range(self.train.stop, self.train.stop + (self.days[-1] + 1) // 2)

    @property
    def validation(self) -> range:
        """Rows of the validation split."""
        return range(self.test.stop, sum(self.days))


def split_rows(rows: int, source: str) -> SplitRows:
    """Cut a file of so many rows into days.

    Args:
        rows: Rows of the file.
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
    return SplitRows(tuple(shortest + (day < longer) for day in range(DAYS)))


def training_order(days: tuple[int, ...], shuffle: Shuffle, seed: int) -> npt.NDArray[np.int64]:
    """Return the row numbers of the training days in the order in which they are stored.

    ``day`` and ``total`` sort rows by a hash of seed and row number, so that the order of any
    group of rows is known without the others. ``reference`` and ``reference-day`` are the first
    draws of NumPy's legacy generator, as the reference implementation makes them.

    Args:
        days: Rows of each training day.
        shuffle: How rows are shuffled.
        seed: Of the shuffle.
    """
    rows = np.arange(sum(days))
    if shuffle == "none":
        return rows
    if shuffle == "total":
        return np.argsort(_hash(rows, seed))
    random_state = np.random.RandomState(seed)
    if shuffle == "reference":
        return random_state.permutation(rows)
    by_day = np.split(rows, np.cumsum(days)[:-1])
    if shuffle == "reference-day":
        return np.concatenate([random_state.permutation(day) for day in by_day])
    return np.concatenate([day[np.argsort(_hash(day, seed))] for day in by_day])


def _hash(rows: npt.NDArray[np.int64], seed: int) -> npt.NDArray[np.uint64]:
    """Hash row numbers with splitmix64: one to one, so no two rows of a file are equal."""
    golden = np.uint64(0x9E3779B97F4A7C15)
    start = _mix(np.array([seed], np.uint64) + golden)
    return _mix(start + rows.astype(np.uint64) * golden)


def _mix(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    values = (values ^ values >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ values >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return values ^ values >> np.uint64(31)
