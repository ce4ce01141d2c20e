from __future__ import annotations

from collections import Counter

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dlrm.data import numbering
from dlrm.data.numbering import (
    FeatureNumberings,
    NativeNumbering,
    Numbering,
    PlainNumbering,
    count_numbers,
)
from dlrm.ops.library import Library, library

KINDS = [
    pytest.param(
        NativeNumbering,
        id="native",
        marks=pytest.mark.skipif(not library().loaded, reason=library().reason),
    ),
    pytest.param(PlainNumbering, id="plain"),
]
Kind = type[NativeNumbering] | type[PlainNumbering]


def uint32(*values: int) -> npt.NDArray[np.uint32]:
    return np.array(values, np.uint32)


def require_numbers(numbering: Numbering, values: list[int], known: dict[int, int]) -> None:
    """Number values, and check them against a dictionary, which is updated."""
    before = len(known)
    expected = [known.setdefault(value, len(known)) for value in values]
    numbers, new_values = numbering.number(uint32(*values))
    assert (numbers.dtype, new_values.dtype) == (np.int32, np.uint32)
    assert numbers.tolist() == expected
    assert new_values.tolist() == list(known)[before:]
    assert len(numbering) == len(known)


@pytest.mark.parametrize("kind", KINDS)
def test_values_are_numbered_in_order_of_first_appearance(kind: Kind) -> None:
    numbering = kind()
    numbers, new_values = numbering.number(uint32(7, 3, 7, 2**32 - 1))
    assert numbers.tolist() == [0, 1, 0, 2]
    assert new_values.tolist() == [7, 3, 2**32 - 1]
    numbers, new_values = numbering.number(uint32(0, 2**32 - 1, 5, 0))
    assert numbers.tolist() == [3, 2, 4, 3]
    assert new_values.tolist() == [0, 5]
    numbers, new_values = numbering.number(uint32())
    assert len(numbers) == len(new_values) == 0
    assert len(numbering) == 5


# Often few values, so that many are equal; and many that the table puts side by side.
VALUES = st.integers(0, 9) | st.integers(0, 2**32 - 1)


@pytest.mark.parametrize("kind", KINDS)
@given(calls=st.lists(st.lists(VALUES, max_size=30), max_size=6), restored=st.integers(0, 6))
def test_against_a_dictionary(kind: Kind, calls: list[list[int]], restored: int) -> None:
    numbering: Numbering = kind()
    known: dict[int, int] = {}
    for call, values in enumerate(calls):
        if call == restored:
            # As another process goes on: in two steps, as of two segments.
            numbering = kind()
            middle = len(known) // 2
            for some in (list(known)[:middle], list(known)[middle:]):
                numbering.restore(uint32(*some))
            assert len(numbering) == len(known)
        require_numbers(numbering, values, known)


@pytest.mark.parametrize("kind", KINDS)
def test_tables_grow(kind: Kind) -> None:
    generator = np.random.default_rng(0)
    numbering: Numbering = kind()
    known: dict[int, int] = {}
    sizes = set()
    for size in (1, 800, 30_000, 5, 5, 60_000):
        # Multiples of a power of two, of which the lower bits are no hash.
        values = generator.integers(0, 2**20, size) << 12
        require_numbers(numbering, values.tolist(), known)
        sizes.add(numbering.nbytes)
    assert len(sizes) > 2
    restored: Numbering = kind()
    restored.restore(uint32(*known))
    require_numbers(restored, generator.integers(0, 2**32, 10_000).tolist(), dict(known))
    require_numbers(numbering, list(known), known)


def test_growth_is_what_growing_takes() -> None:
    numbering = NativeNumbering()
    assert numbering.growth(100) == 0
    for more in (1000, 5000, 100_000):
        expected = numbering.growth(more)
        assert expected >= 8 * more / 0.8
        numbering.grow(more)
        assert numbering.nbytes == expected
        assert numbering.growth(more) == 0


@pytest.fixture(params=KINDS)
def make(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Kind:
    """Let numberings be of one kind."""
    if request.param is PlainNumbering:
        monkeypatch.setattr(numbering, "library", lambda: Library(False, "plain"))
    assert isinstance(numbering.make_numbering(), request.param)
    kind: Kind = request.param
    return kind


def test_numbers_are_counted(make: Kind) -> None:
    counts = np.array([0, 5, 0, 1])
    count_numbers(np.array([1, 3, 3, 0, 3], np.int32), counts)
    assert counts.tolist() == [1, 6, 0, 4]
    count_numbers(np.array([], np.int32), counts)
    assert counts.tolist() == [1, 6, 0, 4]
    numbers = np.random.default_rng(0).integers(0, 4, 1000).astype(np.int32)
    count_numbers(numbers, counts)
    expected = Counter(numbers.tolist())
    assert counts.tolist() == [
        before + expected[number] for number, before in enumerate([1, 6, 0, 4])
    ]


FEATURES, ROWS = 3, 4000


def segments(count: int, seed: int = 0) -> list[list[npt.NDArray[np.uint32]]]:
    """Segments of three features: of few, of some and of many values."""
    generator = np.random.default_rng(seed)
    return [
        [generator.integers(0, 2**bits, ROWS).astype(np.uint32) for bits in (3, 12, 32)]
        for _ in range(count)
    ]


@pytest.mark.parametrize("budget", [1, 200_000, 400_000, 1 << 30])
@pytest.mark.parametrize("resumed_at", [0, 1, 5, 8])
def test_where_memory_is_used_up_a_generation_begins(
    make: Kind, budget: int, resumed_at: int
) -> None:
    numberings = FeatureNumberings(FEATURES, budget)
    known: list[dict[int, int]] = [{} for _ in range(FEATURES)]
    generations = [0] * FEATURES
    history: list[list[tuple[int, npt.NDArray[np.uint32]]]] = [[] for _ in range(FEATURES)]
    for number, segment in enumerate(segments(9)):
        if number and number == resumed_at:
            # Another process, with what was written: tables may be smaller, numbers are not.
            numberings = FeatureNumberings(FEATURES, budget)
            for feature, written in enumerate(history):
                last = written[-1][0]
                values = [new for generation, new in written if generation == last]
                numberings.restore(feature, last, values)
            assert numberings.generations == generations
        numberings.begin_segment(ROWS)
        if budget > 200_000:
            assert sum(each.nbytes for each in numberings.features) <= budget
        for feature, values in enumerate(segment):
            if numberings.generations[feature] != generations[feature]:
                assert numberings.generations[feature] == generations[feature] + 1
                generations[feature] += 1
                known[feature] = {}
            before = len(known[feature])
            table = known[feature]
            expected = [table.setdefault(value, len(table)) for value in values.tolist()]
            numbers, new_values = numberings.number(feature, values)
            assert numbers.tolist() == expected
            assert new_values.tolist() == list(table)[before:]
            history[feature].append((generations[feature], new_values))
    if budget == 1 << 30:
        assert generations == [0, 0, 0]
    elif budget == 1:
        assert generations == [8, 8, 8]  # each segment's, but for the first
    else:
        # The largest makes room for the others.
        assert 8 > generations[2] >= max(generations[:2])


@settings(max_examples=25)
@given(
    budget=st.sampled_from([1, 20_000, 50_000]),
    values=st.lists(
        st.lists(st.lists(VALUES, min_size=1, max_size=20), min_size=2, max_size=2), max_size=8
    ),
)
def test_a_value_is_what_its_generation_and_number_say(
    budget: int, values: list[list[list[int]]]
) -> None:
    """Whatever the order of values: joined, generations give back every row."""
    numberings = FeatureNumberings(2, budget)
    seen: list[dict[int, list[int]]] = [{}, {}]
    for segment in values:
        numberings.begin_segment(20)
        for feature, column in enumerate(segment):
            numbers, new_values = numberings.number(feature, uint32(*column))
            table = seen[feature].setdefault(numberings.generations[feature], [])
            table += new_values.tolist()
            assert [table[number] for number in numbers] == column
            assert len(set(table)) == len(table)


def test_a_generation_begins_before_numbers_run_out(
    make: Kind, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(numbering, "_MOST_NUMBERS", 10)
    numberings = FeatureNumberings(2, 1 << 30)
    generations = []
    for first in range(0, 20, 4):
        numberings.begin_segment(4)
        generations.append(numberings.generations.copy())
        numberings.number(0, uint32(*range(first, first + 4)))
        numberings.number(1, uint32(0, 1, 1, 0))  # which has numbers left
        assert len(numberings.features[0]) <= 10
    # A third segment of new values might need 12 numbers.
    assert generations == [[0, 0], [0, 0], [1, 0], [1, 0], [2, 0]]


@pytest.mark.skipif(not library().loaded, reason=library().reason)
def test_numbers_that_would_wrap_are_refused() -> None:
    slots = torch.zeros(16, dtype=torch.int64)
    values = torch.zeros(1, dtype=torch.uint32)
    numbers = torch.zeros(1, dtype=torch.int32)
    with pytest.raises(RuntimeError, match="number_values: numbers must fit int32"):
        torch.ops.dlrm.number_values(values, slots, numbers, values.clone(), 2**31 - 1)
    with pytest.raises(RuntimeError, match="insert_values: numbers must fit int32"):
        torch.ops.dlrm.insert_values(values, slots, 2**31 - 1)
