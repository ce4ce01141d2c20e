"""From numbered values to ids: each feature's vocabulary, and the id of every number.

Ids are given in order of first appearance over the rows that count. A number is its value's id
already, unless the feature has several generations (``data/numbering.py``), rare or late values
share the 'other' slot, or both; then a map from numbers to ids is written for each generation.

Several generations are joined a range of values at a time, as many ranges as memory demands. What
grows with their number lies in files that are mapped into memory.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dlrm.config import PrepareConfig
from dlrm.data.numbering import count_numbers
from dlrm.data.prepared import PreparedRows
from dlrm.data.spool import Segment, Spool
from dlrm.data.vocabulary import Vocabulary, write_vocabulary
from dlrm.errors import UserError
from dlrm.files import FORMAT_VERSION, atomic_write, environment_faults, read_json, write_json

Int32Array = npt.NDArray[np.int32]
Int64Array = npt.NDArray[np.int64]
UInt32Array = npt.NDArray[np.uint32]

_ENTRY_BYTES = 96
"""Memory that joining takes for each value of a range, about."""
_VALUE_BYTES = 28
"""Memory that a value takes where its generation lies in memory."""
_LEAST_BYTES = 48 << 20
"""Memory for a range, however little is left."""
_BINS = 1 << 16
_RUN_VALUES = 1 << 20
_END_OF_VALUES = 1 << 32
_LARGEST_TABLE = 2**31 - 1


@dataclass(frozen=True)
class FittedFeature:
    """What a sparse feature came to."""

    num_embeddings: int
    vocabulary_sha256: str
    other_id: int
    """-1: there is no 'other' slot."""
    mapped: bool
    """Whether numbers are turned into ids by a map; else they are ids."""
    format_version: str = FORMAT_VERSION


def fit_feature(
    spool: Spool,
    feature: int,
    vocabulary: Path,
    work: Path,
    config: PrepareConfig,
    *,
    train_rows: int,
    memory: int,
) -> FittedFeature:
    """Write the vocabulary of one sparse feature and, where they are needed, its maps.

    Args:
        spool: All rows.
        feature: Which feature.
        vocabulary: The file to write.
        work: A folder for maps (``map_file``) and for the record that fitting is done.
        config: Which values get an id of their own.
        train_rows: Rows before the test and validation rows.
        memory: Bytes that may be used.

    Raises:
        UserError: There are more values than an id can tell apart.
        EnvironmentFaultError: The disk is full or fails.
    """
    record = _record(work, feature)
    if record.exists():
        return read_json(record, FittedFeature, "preparation")
    rows = train_rows if config.vocabulary == "train" else spool.rows
    generations = _generations(spool, feature, work, rows, memory)
    has_other = config.vocabulary == "train" or config.min_frequency > 1
    held = sum(generation.nbytes for generation in generations)
    ranges = _ranges(generations, max(memory - held, _LEAST_BYTES) // _ENTRY_BYTES)

    mapped = has_other or len(generations) > 1
    if mapped:
        # First the values that get an id are marked where they first appear, then counted off.
        for low, high in ranges:
            _mark(generations, _distinct(generations, low, high), config.min_frequency)
        known = 0
        for generation in generations:
            for run in _runs(generation.ids):
                marked = np.flatnonzero(run == _MARKED)
                run[marked] = np.arange(known, known + len(marked), dtype=np.int64)
                known += len(marked)
    else:
        known = 0
        for run in _runs(generations[0].ids):
            run[:] = np.arange(known, known + len(run))
            known += len(run)
    num_embeddings = known + has_other
    if num_embeddings > _LARGEST_TABLE:
        raise UserError(
            f"sparse feature {feature} has {known} values, more than the {_LARGEST_TABLE} rows "
            "that a table can have. Use --min-frequency or --hash-buckets."
        )

    def parts() -> Iterator[Vocabulary]:
        for low, high in ranges:
            distinct = _distinct(generations, low, high)
            ids = _ids_of(generations, distinct)
            _set_repeated(generations, distinct, ids)
            kept = ids >= 0
            yield Vocabulary(distinct.values[kept], ids[kept], distinct.counts[kept])

    checksum = write_vocabulary(vocabulary, parts())
    other_id = known if has_other else -1
    if mapped:
        for number, generation in enumerate(generations):
            for run in _runs(generation.ids):
                run[run < 0] = other_id
            with atomic_write(map_file(work, feature, number)) as file:
                np.save(file, generation.ids)
    for generation in generations:
        generation.discard()
    fitted = FittedFeature(num_embeddings, checksum, other_id, mapped)
    write_json(record, fitted)
    return fitted


def fit_prepared(
    spool: Spool, feature: int, vocabulary: Path, work: Path, rows: PreparedRows, *, memory: int
) -> FittedFeature:
    """Write the vocabulary of a sparse feature that another program has numbered, if it is known.

    Args:
        spool: All rows.
        feature: Which feature.
        vocabulary: The file to write.
        work: A folder for scratch and for the record that fitting is done.
        rows: Where they came from.
        memory: Bytes that may be used.

    Raises:
        UserError: What the program left is damaged.
        EnvironmentFaultError: The disk is full or fails.
    """
    size = rows.num_embeddings[feature]
    if not rows.has_values:
        return FittedFeature(size, "", -1, mapped=False)
    record = _record(work, feature)
    if record.exists():
        return read_json(record, FittedFeature, "preparation")
    scratch = work / f"generation-{feature:03}" if size * _ENTRY_BYTES > memory else None
    generation = _Generation(size, rows.value_blocks(feature), scratch)
    generation.count(spool, feature, spool.segments, spool.rows)
    left = max(memory - generation.nbytes, _LEAST_BYTES)
    ranges = _ranges([generation], left // _ENTRY_BYTES)

    def parts() -> Iterator[Vocabulary]:
        for low, high in ranges:
            distinct = _distinct([generation], low, high)
            if len(repeated := distinct.repeated[1]):
                raise UserError(
                    f"{rows.files[0]}: the dictionary of sparse feature {feature} has the value "
                    f"{int(generation.values[repeated[0]])} more than once. Prepare from raw rows "
                    "instead."
                )
            yield Vocabulary(distinct.values, distinct.numbers, distinct.counts)

    checksum = write_vocabulary(vocabulary, parts())
    generation.discard()
    fitted = FittedFeature(size, checksum, -1, mapped=False)
    write_json(record, fitted)
    return fitted


def _record(work: Path, feature: int) -> Path:
    return work / f"fitted-{feature:03}.json"


def map_file(work: Path, feature: int, generation: int) -> Path:
    """Return where the id of each number of a generation lies: (numbers,) int32, as .npy."""
    return work / f"map-{feature:03}-{generation:05}.npy"


_UNMARKED, _MARKED = -1, -2


class _Generation:
    """The values of one feature that were numbered together, n of them.

    Args:
        size: n.
        values: All of them, in the order of their numbers, some at a time.
        scratch: Where to keep arrays; None: in memory.
    """

    def __init__(
        self, size: int, values: Iterable[npt.NDArray[np.uint32]], scratch: Path | None
    ) -> None:
        self._files: list[Path] = []
        self.values: UInt32Array = self._array(size, np.dtype(np.uint32), scratch)
        """(n,) in the order of their numbers."""
        self.counts: Int64Array = self._array(size, np.dtype(np.int64), scratch)
        """(n,) occurrences in the rows that count."""
        self.ids: Int32Array = self._array(size, np.dtype(np.int32), scratch)
        """(n,), to be filled; -1: none."""
        self.ids[:] = _UNMARKED
        known = 0
        for some in values:
            self.values[known : known + len(some)] = some
            known += len(some)
        assert known == size

    def count(self, spool: Spool, feature: int, segments: Iterable[Segment], rows: int) -> None:
        """Count how often values occur in the first so many rows of a spool.

        Args:
            spool: All rows.
            feature: Which feature.
            segments: Those that the generation numbered.
            rows: Rows of the spool that count.
        """
        for segment in segments:
            inside = min(rows - segment.first_row, segment.rows)
            if inside > 0:
                numbers = spool.sparse(segment.number, feature)[:inside].astype(np.int32)
                count_numbers(numbers, self.counts)

    def _array(self, size: int, kind: np.dtype[Any], scratch: Path | None) -> npt.NDArray[Any]:
        if scratch is None or size == 0:
            return np.zeros(size, kind)
        path = scratch.with_name(f"{scratch.name}-{len(self._files)}.tmp")
        self._files.append(path)
        with environment_faults(f"write {path}"), open(path, "wb") as file:
            # Or else a disk that is full would end the process, once memory is written to.
            os.posix_fallocate(file.fileno(), 0, size * kind.itemsize)
        return np.memmap(path, kind, "r+", shape=(size,))

    @property
    def nbytes(self) -> int:
        """Memory that it holds; what lies in files does not count."""
        arrays = (self.values, self.counts, self.ids, self.ids)  # and the map that is written
        return 0 if self._files else sum(array.nbytes for array in arrays)

    def discard(self) -> None:
        """Delete the files."""
        for path in self._files:
            path.unlink()


def _generations(
    spool: Spool, feature: int, work: Path, rows: int, memory: int
) -> list[_Generation]:
    grouped: list[list[Segment]] = []
    for segment in spool.segments:
        if not grouped or segment.generations[feature] != grouped[-1][-1].generations[feature]:
            grouped.append([])
        grouped[-1].append(segment)
    generations = []
    for number, segments in enumerate(grouped):
        size = sum(segment.new_values[feature] for segment in segments)
        fits = len(grouped) == 1 and size * _VALUE_BYTES <= memory
        scratch = None if fits else work / f"generation-{feature:03}-{number:05}"
        values = (spool.new_values(segment.number, feature) for segment in segments)
        generation = _Generation(size, values, scratch)
        generation.count(spool, feature, segments, rows)
        generations.append(generation)
    return generations


def _runs(array: npt.NDArray[Any]) -> Iterator[npt.NDArray[Any]]:
    """Return views of an array, short enough that what is made of one takes little memory."""
    return (array[start : start + _RUN_VALUES] for start in range(0, len(array), _RUN_VALUES))


def _ranges(generations: Sequence[_Generation], entries: int) -> list[tuple[int, int]]:
    """Cut the values into ranges of at most so many entries, or as few as a bin has."""
    total = sum(len(generation.values) for generation in generations)
    if total <= entries:
        return [(0, _END_OF_VALUES)]
    width = _END_OF_VALUES // _BINS
    per_bin = np.zeros(_BINS, np.int64)
    for generation in generations:
        for run in _runs(generation.values):
            per_bin += np.bincount(run // width, minlength=_BINS)
    ranges, low, taken = [], 0, 0
    for bin_, count in enumerate(per_bin.tolist()):
        if taken and taken + count > entries:
            ranges.append((low, bin_ * width))
            low, taken = bin_ * width, 0
        taken += count
    return [*ranges, (low, _END_OF_VALUES)]


@dataclass(frozen=True, eq=False)
class _Distinct:
    """The different values of a range, d of them, and where each was numbered."""

    values: UInt32Array
    """(d,) ascending."""
    counts: Int64Array
    """(d,), over all generations."""
    generations: npt.NDArray[np.int16]
    """(d,), in which a value first appears."""
    numbers: Int32Array
    """(d,), its number there."""
    repeated: tuple[npt.NDArray[np.int16], Int32Array, Int64Array]
    """Of every later generation that numbered a value again: the generation, the number, and the
    value's place among the distinct ones."""


def _numbers_within(values: UInt32Array, low: int, high: int) -> Int32Array:
    """Return the numbers of the values of a range, ascending."""
    found = [np.zeros(0, np.int32)]
    first = 0
    for run in _runs(values):
        within = np.flatnonzero((run >= low) & (run <= high - 1)) + first
        found.append(within.astype(np.int32))
        first += len(run)
    return np.concatenate(found)


def _distinct(generations: Sequence[_Generation], low: int, high: int) -> _Distinct:
    chosen = [_numbers_within(generation.values, low, high) for generation in generations]
    values = np.concatenate(
        [each.values[numbers] for each, numbers in zip(generations, chosen, strict=True)]
    )
    counts = np.concatenate(
        [each.counts[numbers] for each, numbers in zip(generations, chosen, strict=True)]
    )
    numbers = np.concatenate(chosen)
    of = np.repeat(np.arange(len(chosen), dtype=np.int16), [len(each) for each in chosen])
    # Stable, so that of equal values the earliest generation's comes first; one has none equal.
    order = np.argsort(values, kind="stable" if len(generations) > 1 else None)
    values, counts, numbers, of = values[order], counts[order], numbers[order], of[order]
    is_first = np.ones(len(values), bool)
    is_first[1:] = values[1:] != values[:-1]
    first = np.flatnonzero(is_first)
    again = ~is_first
    return _Distinct(
        values[first],
        np.add.reduceat(counts, first) if len(first) else counts,
        of[first],
        numbers[first],
        (of[again], numbers[again], np.cumsum(is_first)[again] - 1),
    )


def _mark(generations: Sequence[_Generation], distinct: _Distinct, min_frequency: int) -> None:
    """Mark the values that get an id, where they first appear."""
    frequent = distinct.counts >= min_frequency
    for number, generation in enumerate(generations):
        numbers = distinct.numbers[frequent & (distinct.generations == number)]
        generation.ids[numbers] = _MARKED


def _ids_of(generations: Sequence[_Generation], distinct: _Distinct) -> Int32Array:
    """Return the id of each value, (d,); -1 for none."""
    ids = np.empty(len(distinct.values), np.int32)
    for number, generation in enumerate(generations):
        of = distinct.generations == number
        ids[of] = generation.ids[distinct.numbers[of]]
    return ids


def _set_repeated(generations: Sequence[_Generation], distinct: _Distinct, ids: Int32Array) -> None:
    """Give a value the id of its first appearance in later generations too."""
    of, numbers, places = distinct.repeated
    for number, generation in enumerate(generations):
        here = of == number
        generation.ids[numbers[here]] = ids[places[here]]
