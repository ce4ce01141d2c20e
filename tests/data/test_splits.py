from __future__ import annotations

import numpy as np
import pytest

from dlrm.config import SynthesizeConfig
from dlrm.data.splits import MINIMUM_ROWS, _mix, split_rows, training_order
from dlrm.errors import UserError


def test_days_are_as_equal_as_can_be_and_the_last_is_halved() -> None:
    split = split_rows(24, "train.txt")
    assert split.days == (4, 4, 4, 3, 3, 3, 3)
    assert (split.train, split.test, split.validation) == (range(21), range(21, 23), range(23, 24))


@pytest.mark.parametrize("rows", [14, 15, 20, 21, 27, 28, 700, 10001, 14007])
def test_splits_are_those_of_the_reference(rows: int) -> None:
    days = np.array_split(np.arange(rows), 7)
    test, validation = np.array_split(days[-1], 2)
    split = split_rows(rows, "train.txt")
    assert split.days == tuple(map(len, days))
    assert list(split.train) == np.concatenate(days[:-1]).tolist()
    assert list(split.test) == test.tolist()
    assert list(split.validation) == validation.tolist()


@pytest.mark.parametrize("rows", [0, 1, 6, 7, 13])
def test_too_few_rows_are_refused(rows: int) -> None:
    with pytest.raises(UserError, match=f"x.txt has {rows} rows; expected at least 14"):
        split_rows(rows, "x.txt")


def test_as_few_rows_can_be_made_up_as_can_be_split() -> None:
    assert SynthesizeConfig(rows=MINIMUM_ROWS).rows == MINIMUM_ROWS
    with pytest.raises(UserError, match=f"--rows must be at least {MINIMUM_ROWS}, "):
        SynthesizeConfig(rows=MINIMUM_ROWS - 1)


DAYS = (300, 300, 300, 299, 299, 299)
ROWS = sum(DAYS)


def test_no_shuffle() -> None:
    assert training_order(DAYS, "none", 1).tolist() == list(range(ROWS))


def test_the_permutations_of_the_reference() -> None:
    total = np.random.RandomState(123).permutation(ROWS)
    assert training_order(DAYS, "reference", 123).tolist() == total.tolist()

    random_state = np.random.RandomState(123)
    starts = np.cumsum([0, *DAYS])
    by_day = [start + random_state.permutation(n) for start, n in zip(starts, DAYS, strict=False)]
    order = training_order(DAYS, "reference-day", 123)
    assert order.tolist() == np.concatenate(by_day).tolist()


@pytest.mark.parametrize("shuffle", ["day", "total"])
def test_a_shuffle_is_a_permutation_fixed_by_the_seed(shuffle: str) -> None:
    order = training_order(DAYS, shuffle, 5)  # type: ignore[arg-type]
    assert sorted(order.tolist()) == list(range(ROWS))
    assert order.tolist() == training_order(DAYS, shuffle, 5).tolist()  # type: ignore[arg-type]
    other = training_order(DAYS, shuffle, 6)  # type: ignore[arg-type]
    assert (order == other).mean() < 0.05


def test_a_day_keeps_its_rows() -> None:
    order = training_order(DAYS, "day", 5)
    start = 0
    for rows in DAYS:
        assert sorted(order[start : start + rows].tolist()) == list(range(start, start + rows))
        start += rows


def test_total_sorts_by_splitmix64_of_seed_and_row() -> None:
    # The first output of splitmix64 with state 0, from its authors' reference code.
    golden = np.array([0x9E3779B97F4A7C15], np.uint64)
    assert _mix(golden).tolist() == [0xE220A8397B1DCDAF]

    def splitmix64(state: int) -> int:
        mask = 2**64 - 1
        value = (state + 0x9E3779B97F4A7C15) & mask
        value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & mask
        value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & mask
        return value ^ (value >> 31)

    def key(row: int) -> int:
        return splitmix64((splitmix64(123) + (row - 1) * 0x9E3779B97F4A7C15) % 2**64)

    assert training_order(DAYS, "total", 123).tolist() == sorted(range(ROWS), key=key)


def test_total_places_rows_uniformly() -> None:
    """Each of 10 runs of rows falls evenly into 10 runs of places: chi-squared over many seeds."""
    rows, runs, seeds = 6000, 10, 50
    statistics = []
    for seed in range(seeds):
        order = training_order((rows // 6,) * 6, "total", seed)
        places = np.empty(rows, np.int64)
        places[order] = np.arange(rows)
        counts = np.histogram2d(np.arange(rows), places, bins=runs)[0]
        expected = rows / runs**2
        statistics.append(((counts - expected) ** 2 / expected).sum())
    # 81 degrees of freedom: mean 81, standard deviation of the mean √(2·81/50) = 1.8.
    assert abs(np.mean(statistics) - 81) < 4 * 1.8
    # Neighbours do not stay neighbours.
    order = training_order((rows // 6,) * 6, "total", 0)
    assert (np.abs(np.diff(order)) == 1).sum() < 10
