from __future__ import annotations

import os
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import pytest

from dlrm.config import PrepareConfig
from dlrm.data import fitting
from dlrm.data import vocabulary as vocabulary_module
from dlrm.data.fitting import FittedFeature, fit_feature, fit_prepared, map_file
from dlrm.data.prepared import PreparedRows
from dlrm.data.spool import Columns, Segment, Spool
from dlrm.data.vocabulary import Vocabulary
from dlrm.errors import UserError

UInt32Array = npt.NDArray[np.uint32]
OTHER_FEATURE = np.zeros(0, np.uint32)


@pytest.fixture(autouse=True)
def _without_flushing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda _: None)  # which takes most of the time


def spooled(folder: Path, segments: Sequence[UInt32Array], begins: Sequence[int]) -> Spool:
    """A spool whose second feature has these values, numbered anew where a generation begins."""
    folder.mkdir(parents=True)
    spool = Spool(folder)
    known: dict[int, int] = {}
    generation = row = 0
    for number, values in enumerate(segments):
        if number in begins:
            known = {}
            generation += 1
        before = len(known)
        numbers = [known.setdefault(value, len(known)) for value in values.tolist()]
        new_values = np.array(list(known)[before:], np.uint32)
        rows = len(values)
        segment = Segment(
            number=number,
            file=0,
            end=0,
            lines=0,
            first_row=row,
            rows=rows,
            first_candidate=row,
            candidates=rows,
            generations=(0, generation),
            new_values=(0, len(new_values)),
        )
        columns = Columns(
            np.zeros(rows, np.uint8),
            [],
            [np.zeros(rows, np.int32), np.array(numbers, np.int32)],
            OTHER_FEATURE,
        )
        spool.append(segment, columns, [OTHER_FEATURE, new_values])
        row += rows
    return spool


def fit(
    spool: Spool, work: Path, config: PrepareConfig, train_rows: int, memory: int = 1 << 30
) -> FittedFeature:
    work.mkdir(exist_ok=True)
    return fit_feature(
        spool, 1, work / "v.arrow", work, config, train_rows=train_rows, memory=memory
    )


def ids_of_rows(spool: Spool, work: Path, fitted: FittedFeature) -> list[int]:
    ids: list[int] = []
    for segment in spool.segments:
        numbers = spool.sparse(segment.number, 1)
        if fitted.mapped:
            numbers = np.load(map_file(work, 1, segment.generations[1]))[numbers]
        ids += numbers.tolist()
    return ids


def expected_ids(
    values: Sequence[int], config: PrepareConfig, train_rows: int
) -> tuple[dict[int, int], Counter[int], list[int], int]:
    """By a dictionary: the values with an id, what they count, every row's id, the other slot."""
    counted = values[:train_rows] if config.vocabulary == "train" else values
    counts = Counter(counted)
    ids: dict[int, int] = {}
    for value in counted:
        if counts[value] >= config.min_frequency:
            ids.setdefault(value, len(ids))
    has_other = config.vocabulary == "train" or config.min_frequency > 1
    other = len(ids) if has_other else -1
    return ids, counts, [ids.get(value, other) for value in values], other


def made_up_segments(seed: int) -> list[UInt32Array]:
    generator = np.random.default_rng(seed)
    pool = np.concatenate(
        [
            np.array([0, 1, 2**31 - 1, 2**31, 2**32 - 1, 2**16 - 1, 2**16, 2**32 - 2**16]),
            generator.integers(0, 2**32, 60),  # a bin of their own each
            generator.integers(0, 2**16, 40) + 5 * 2**16,  # and in one bin
        ]
    ).astype(np.uint32)
    weights = generator.random(len(pool)) ** 4  # some rare, some frequent
    lengths = (37, 1, 80, 0, 53, 129)
    drawn = generator.choice(pool, sum(lengths), p=weights / weights.sum())
    return np.split(drawn, np.cumsum(lengths)[:-1])


ALL, TRAIN = PrepareConfig(), PrepareConfig(vocabulary="train")
FREQUENT = PrepareConfig(min_frequency=3)
BOTH = PrepareConfig(vocabulary="train", min_frequency=2)


@pytest.mark.parametrize("config", [ALL, TRAIN, FREQUENT, BOTH], ids=["all", "train", "3", "both"])
# Of 300 rows: none, within the first segment and its first row, where segments end, and within
# the last.
@pytest.mark.parametrize("train_rows", [1, 30, 118, 119, 250, 300])
def test_ids_and_counts_are_those_of_a_dictionary(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config: PrepareConfig, train_rows: int
) -> None:
    monkeypatch.setattr(fitting, "_LEAST_BYTES", 0)
    segments = made_up_segments(train_rows)
    values = np.concatenate(segments).tolist()
    ids, counts, of_rows, other = expected_ids(values, config, train_rows)
    contents = set()
    for begins, entries in [
        ((), 10**6),
        ((), 1),
        ((2,), 20),
        ((1, 2, 3, 4, 5), 7),
        ((1, 4), 10**6),
        ((3, 5), 1),
    ]:
        folder = tmp_path / f"{begins} {entries}"
        spool = spooled(folder / "spool", segments, begins)
        memory = entries * fitting._ENTRY_BYTES
        fitted = fit(spool, folder, config, train_rows, memory)
        assert fitted.num_embeddings == len(ids) + (other >= 0)
        assert fitted.other_id == other
        assert fitted.mapped == (other >= 0 or bool(begins))
        assert ids_of_rows(spool, folder, fitted) == of_rows

        vocabulary = Vocabulary.read(folder / "v.arrow")
        assert vocabulary.values.tolist() == sorted(ids)
        assert dict(zip(vocabulary.values.tolist(), vocabulary.ids.tolist(), strict=True)) == ids
        assert vocabulary.counts.tolist() == [counts[value] for value in sorted(ids)]
        contents.add((folder / "v.arrow").read_bytes())

        # Nothing but the vocabulary, the maps, the spool and the record is left.
        names = {path.name for path in folder.iterdir()}
        maps = {map_file(folder, 1, number).name for number in range(len(begins) + 1)}
        assert names == {"v.arrow", "spool", "fitted-001.json"} | (maps if fitted.mapped else set())
    assert len(contents) == 1  # however it was cut


def test_ranges_hold_as_many_values_as_memory_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fitting, "_LEAST_BYTES", 0)
    values = (np.arange(100) << 20).astype(np.uint32)
    spool = spooled(tmp_path / "spool", [values, values[:50]], [1])
    taken: list[tuple[int, int]] = []
    distinct = fitting._distinct

    def counted(generations: Any, low: int, high: int) -> Any:
        found = distinct(generations, low, high)
        taken.append((len(found.values), len(found.values) + len(found.repeated[0])))
        return found

    monkeypatch.setattr(fitting, "_distinct", counted)
    fitted = fit(spool, tmp_path, ALL, 150, memory=40 * fitting._ENTRY_BYTES)
    assert fitted.num_embeddings == 100
    # Two passes over the same ranges: 150 entries, of which 100 are of the first 50 values.
    assert taken == [(20, 40), (20, 40), (30, 40), (30, 30)] * 2


def test_what_is_fitted_is_not_fitted_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spool = spooled(tmp_path / "spool", made_up_segments(1), [2])
    fitted = fit(spool, tmp_path, BOTH, 100)
    monkeypatch.setattr(fitting, "_generations", None)
    assert fit(spool, tmp_path, BOTH, 100) == fitted


def test_more_values_than_a_table_has_rows_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fitting, "_LARGEST_TABLE", 4)
    values = np.arange(4, dtype=np.uint32)
    spool = spooled(tmp_path / "spool", [values], [])
    assert fit(spool, tmp_path / "a", ALL, 4).num_embeddings == 4
    with pytest.raises(UserError, match=r"feature 1 has 4 values, more than the 4 rows.*--hash-b"):
        fit(spool, tmp_path / "b", TRAIN, 4)  # with the other slot


class ManyValues:
    """What the reference's dictionaries say of features of many values."""

    files = (Path("day_0_reordered.npz"),)
    has_values = True

    def __init__(self, size: int) -> None:
        self.num_embeddings = (size, size)

    def value_blocks(self, feature: int) -> Iterator[UInt32Array]:
        for start in range(0, self.num_embeddings[feature], 1 << 14):
            end = min(start + (1 << 14), self.num_embeddings[feature])
            # An odd factor is one to one: each value is there once, in no order.
            yield np.arange(start, end, dtype=np.uint32) * np.uint32(2654435761)


def peak_of(work: Callable[[], object]) -> int:
    """The most bytes that NumPy and Python held while something was done."""
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("numbered", ["by the reference", "here"])
def test_fitting_many_values_takes_the_memory_that_it_is_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, numbered: str
) -> None:
    monkeypatch.setattr(fitting, "_LEAST_BYTES", 0)
    monkeypatch.setattr(fitting, "_RUN_VALUES", 1 << 14)
    monkeypatch.setattr(vocabulary_module, "_BATCH_VALUES", 1 << 14)
    size, memory = 1 << 20, 2 << 20
    rows = ManyValues(size)
    values = np.concatenate(list(rows.value_blocks(1)))
    work = tmp_path / "work"
    work.mkdir()
    vocabulary = work / "v.arrow"
    if numbered == "here":
        spool = spooled(tmp_path / "spool", np.split(values, 64), [])
        fit_all = partial(fit, spool, work, ALL, size, memory)
    else:
        spool = spooled(tmp_path / "spool", [np.arange(8, dtype=np.uint32)], [])
        prepared = cast(PreparedRows, rows)
        fit_all = partial(fit_prepared, spool, 1, vocabulary, work, prepared, memory=memory)
    assert peak_of(fit_all) < 2 * memory  # what does not depend on the number of values included
    found = Vocabulary.read(vocabulary)
    assert len(found.values) == size
    assert (values[found.ids] == found.values).all()
    assert (np.diff(found.values.astype(np.int64)) > 0).all()
