from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from dlrm.config import Shuffle, SynthesizeConfig
from dlrm.data.splits import (
    MINIMUM_ROWS,
    SplitRows,
    StoredOrder,
    day_lengths,
    hold_back_last,
    mix,
    permutation_bytes,
)
from dlrm.errors import UserError


def test_days_are_as_equal_as_can_be_and_the_last_is_halved() -> None:
    split = hold_back_last(day_lengths(24, "train.txt"))
    assert split.days == (4, 4, 4, 3, 3, 3, 3)
    assert split.train_days == (4, 4, 4, 3, 3, 3)
    assert split.ranges == {
        "train": range(21),
        "test": range(21, 23),
        "validation": range(23, 24),
    }


@pytest.mark.parametrize("rows", [14, 15, 20, 21, 27, 28, 700, 10001, 14007])
def test_splits_are_those_of_the_reference(rows: int) -> None:
    days = np.array_split(np.arange(rows), 7)
    test, validation = np.array_split(days[-1], 2)
    split = hold_back_last(day_lengths(rows, "train.txt"))
    assert split.days == tuple(map(len, days))
    assert list(split.ranges["train"]) == np.concatenate(days[:-1]).tolist()
    assert list(split.ranges["test"]) == test.tolist()
    assert list(split.ranges["validation"]) == validation.tolist()


@pytest.mark.parametrize(
    ("days", "test", "validation"), [((5, 9), 5, 4), ((5, 0, 8), 4, 4), ((3, 1), 1, 0)]
)
def test_of_whole_days_the_last_is_halved(
    days: tuple[int, ...], test: int, validation: int
) -> None:
    split = hold_back_last(days)
    assert split == SplitRows(days[:-1], test, validation)
    assert split.days == days
    train = sum(days[:-1])
    assert split.ranges["train"] == range(train)
    assert split.ranges["test"] == range(train, train + test)
    assert split.ranges["validation"] == range(train + test, sum(days))


def test_where_nothing_is_held_back_every_day_trains() -> None:
    split = SplitRows((5, 9), 0, 0)
    assert split.days == (5, 9)
    assert {name: list(rows) for name, rows in split.ranges.items()} == {
        "train": list(range(14)),
        "test": [],
        "validation": [],
    }


@pytest.mark.parametrize("rows", [0, 1, 6, 7, 13])
def test_too_few_rows_are_refused(rows: int) -> None:
    with pytest.raises(UserError, match=f"x.txt has {rows} rows; expected at least 14"):
        day_lengths(rows, "x.txt")


def test_as_few_rows_can_be_made_up_as_can_be_split() -> None:
    assert SynthesizeConfig(rows=MINIMUM_ROWS).rows == MINIMUM_ROWS
    with pytest.raises(UserError, match=f"--rows must be at least {MINIMUM_ROWS}, "):
        SynthesizeConfig(rows=MINIMUM_ROWS - 1)


DAYS = (300, 300, 300, 299, 299, 299)
ROWS = sum(DAYS)
PART_ROWS = 70


def stored(
    days: tuple[int, ...], shuffle: Shuffle, seed: int, part_rows: int = PART_ROWS
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """The rows in stored order, and the part of each."""
    order = StoredOrder(days, shuffle, seed, part_rows)
    # A row's place is known without the others, so any pieces do.
    pieces = np.array_split(np.arange(sum(days)), 7)
    parts, keys = (np.concatenate(each) for each in zip(*map(order.place, pieces), strict=True))
    assert parts.min() >= 0
    assert parts.max() < order.parts
    rows = np.lexsort((keys, parts))
    return rows, parts[rows]


def test_the_permutations_of_the_reference() -> None:
    total = np.random.RandomState(123).permutation(ROWS)
    assert stored(DAYS, "reference", 123)[0].tolist() == total.tolist()

    random_state = np.random.RandomState(123)
    starts = np.cumsum([0, *DAYS])
    by_day = [start + random_state.permutation(n) for start, n in zip(starts, DAYS, strict=False)]
    order = stored(DAYS, "reference-day", 123)[0]
    assert order.tolist() == np.concatenate(by_day).tolist()


@pytest.mark.parametrize("shuffle", ["reference", "reference-day"])
def test_the_parts_of_a_permutation_are_of_equal_length(shuffle: Shuffle) -> None:
    _, parts = stored(DAYS, shuffle, 5)
    assert parts.tolist() == [place // PART_ROWS for place in range(ROWS)]


@pytest.mark.parametrize("shuffle", ["day", "total", "reference", "reference-day"])
def test_a_shuffle_is_a_permutation_fixed_by_the_seed(shuffle: Shuffle) -> None:
    order, _ = stored(DAYS, shuffle, 5)
    assert sorted(order.tolist()) == list(range(ROWS))
    assert order.tolist() == stored(DAYS, shuffle, 5)[0].tolist()
    # Nor does it depend on the length of parts.
    assert order.tolist() == stored(DAYS, shuffle, 5, 1000)[0].tolist()
    other, _ = stored(DAYS, shuffle, 6)
    assert (order == other).mean() < 0.05


@pytest.mark.parametrize("shuffle", ["day", "reference-day"])
def test_a_day_keeps_its_rows(shuffle: Shuffle) -> None:
    order, _ = stored(DAYS, shuffle, 5)
    start = 0
    for rows in DAYS:
        assert sorted(order[start : start + rows].tolist()) == list(range(start, start + rows))
        start += rows


def splitmix64(state: int) -> int:
    """Of its authors' reference code, the output that follows a state."""
    mask = 2**64 - 1
    value = (state + 0x9E3779B97F4A7C15) & mask
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & mask
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & mask
    return value ^ (value >> 31)


def key(row: int, seed: int) -> int:
    return splitmix64((splitmix64(seed) + (row - 1) * 0x9E3779B97F4A7C15) % 2**64)


def test_total_and_day_sort_by_splitmix64_of_seed_and_row() -> None:
    # The first output of splitmix64 with state 0, from its authors' reference code.
    golden = np.array([0x9E3779B97F4A7C15], np.uint64)
    assert mix(golden).tolist() == [0xE220A8397B1DCDAF]

    total = sorted(range(ROWS), key=lambda row: key(row, 123))
    rows, parts = stored(DAYS, "total", 123)
    assert rows.tolist() == total
    # Equal shares of the keys, as many as there are parts.
    count = -(-ROWS // PART_ROWS)
    assert parts.tolist() == [(key(row, 123) >> 32) * count >> 32 for row in total]

    by_day, expected_parts, start, first = [], [], 0, 0
    for length in (*DAYS[:2], 0, *DAYS[2:]):  # a day that sub-sampling has emptied has no part
        day = sorted(range(start, start + length), key=lambda row: key(row, 123))
        count = -(-length // PART_ROWS)
        expected_parts += [first + ((key(row, 123) >> 32) * count >> 32) for row in day]
        by_day += day
        start, first = start + length, first + count
    rows, parts = stored((*DAYS[:2], 0, *DAYS[2:]), "day", 123)
    assert rows.tolist() == by_day
    assert parts.tolist() == expected_parts


def test_total_places_rows_uniformly() -> None:
    """Each of 10 runs of rows falls evenly into 10 runs of places: chi-squared over many seeds."""
    rows, runs, seeds = 6000, 10, 50
    statistics = []
    for seed in range(seeds):
        order, _ = stored((rows // 6,) * 6, "total", seed)
        places = np.empty(rows, np.int64)
        places[order] = np.arange(rows)
        counts = np.histogram2d(np.arange(rows), places, bins=runs)[0]
        expected = rows / runs**2
        statistics.append(((counts - expected) ** 2 / expected).sum())
    # 81 degrees of freedom: mean 81, standard deviation of the mean √(2·81/50) = 1.8.
    assert abs(np.mean(statistics) - 81) < 4 * 1.8
    # Neighbours do not stay neighbours.
    order, _ = stored((rows // 6,) * 6, "total", 0)
    assert (np.abs(np.diff(order)) == 1).sum() < 10


def test_total_fills_parts_evenly_from_everywhere() -> None:
    """Runs of rows against parts: chi-squared over many seeds, as a multinomial draw has it."""
    rows, part_rows, runs, seeds = 6000, 600, 10, 50
    statistics = []
    for seed in range(seeds):
        order = StoredOrder((rows // 6,) * 6, "total", seed, part_rows)
        assert order.parts == 10
        parts, _ = order.place(np.arange(rows))
        counts = np.histogram2d(np.arange(rows), parts, bins=[runs, order.parts])[0]
        expected = rows / runs / order.parts
        statistics.append(((counts - expected) ** 2 / expected).sum())
    # Only the runs are of fixed size: 90 degrees of freedom.
    assert abs(np.mean(statistics) - 90) < 4 * np.sqrt(2 * 90 / seeds)


@pytest.mark.parametrize(("rows", "of_row"), [(ROWS, 12), (2**31 - 1, 12), (2**31, 16)])
def test_a_permutation_takes_the_drawn_numbers_and_each_rows_place(rows: int, of_row: int) -> None:
    assert permutation_bytes(rows) == of_row * rows


@pytest.mark.parametrize(
    ("shuffle", "held"), [("total", 0), ("day", 0), ("reference", 4), ("reference-day", 4)]
)
def test_a_permutation_is_held_while_rows_are_placed(shuffle: Shuffle, held: int) -> None:
    assert StoredOrder(DAYS, shuffle, 5, PART_ROWS).nbytes == held * ROWS
