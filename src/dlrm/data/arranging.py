"""From a spool to the parts of a DATASET: numbers become ids, and rows go where they belong.

Shuffling takes two passes over the rows. The first reads and writes in sequence: each run of
segments is sorted by the part that its rows go to, a record batch a part. In the second each part
gathers its batches from all runs and sorts them. Rows in the source's order need but one pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from dlrm.data.dataset import Rows, block_rows, record_batch, rows_of, stored_columns
from dlrm.data.fitting import FittedFeature, map_file
from dlrm.data.splits import StoredOrder
from dlrm.data.spool import Integers, Segment, Spool, damaged
from dlrm.data.vocabulary import hashed
from dlrm.files import atomic_write, environment_faults
from dlrm.schema import FeatureSchema

T = TypeVar("T")

_KEY = pa.field("key", pa.uint64(), nullable=False)
_COUNTS = b"rows of each part"


class Arranger:
    """Takes rows out of a spool, with their ids.

    Args:
        spool: All rows.
        schema: What they consist of.
        fitted: Of each sparse feature; empty where numbers are ids, or values are hashed.
        maps: The folder with the maps from numbers to ids.
    """

    def __init__(
        self, spool: Spool, schema: FeatureSchema, fitted: Sequence[FittedFeature], maps: Path
    ) -> None:
        self._spool = spool
        self._schema = schema
        self._fitted = fitted
        self._maps = maps

    def rows(self, segment: Segment, chosen: slice | npt.NDArray[np.int64]) -> Rows:
        """Return some rows of a segment, in the order in which they are chosen."""
        columns = self._spool.columns(segment.number)
        labels = columns.labels[chosen]
        dense = np.empty((len(labels), len(columns.dense)), np.int32)
        for index, column in enumerate(columns.dense):
            dense[:, index] = column[chosen]
        sparse = np.empty((len(labels), len(columns.sparse)), np.int32)
        for index, column in enumerate(columns.sparse):
            sparse[:, index] = self._ids(segment, index, column[chosen])
        return Rows(labels, dense, sparse)

    def _ids(self, segment: Segment, feature: int, numbers: Integers) -> Integers:
        buckets = self._schema.sparse[feature].hash_buckets
        if buckets:
            return hashed(numbers.astype(np.uint32), buckets)
        if not self._fitted or not self._fitted[feature].mapped:
            return numbers
        path = map_file(self._maps, feature, segment.generations[feature])
        try:
            with environment_faults(f"read {path}"):
                ids: npt.NDArray[np.int32] = np.load(path, mmap_mode="r")
        except (ValueError, EOFError, FileNotFoundError) as error:
            raise damaged(path, error) from error
        return ids[numbers]

    def in_order(self, rows: range) -> Iterator[Rows]:
        """Return rows in the source's order, as many at a time as a record batch has."""
        step = block_rows(self._schema)
        pending: list[Rows] = []
        count = 0
        for segment in self._spool.segments_of(rows):
            first = max(rows.start - segment.first_row, 0)
            last = min(rows.stop - segment.first_row, segment.rows)
            pending.append(self.rows(segment, slice(first, last)))
            count += last - first
            if count >= step:
                joined = Rows.concatenate(pending)
                for start in range(0, count - step + 1, step):
                    yield joined[start : start + step]
                pending = [joined[count - count % step :]]
                count %= step
        if count:
            yield Rows.concatenate(pending)

    def write_run(
        self, path: Path, segments: Sequence[Segment], order: StoredOrder, train_rows: int
    ) -> None:
        """Write the training rows of some segments, sorted by part: a record batch a part."""
        inside = [min(segment.rows, train_rows - segment.first_row) for segment in segments]
        rows = Rows.collect(
            sum(inside),
            (
                self.rows(each, slice(0, count))
                for each, count in zip(segments, inside, strict=True)
            ),
            self._schema,
        )
        first = segments[0].first_row
        parts, keys = order.place(np.arange(first, first + len(rows)))
        # Stable sorting of short integers is a radix sort.
        by_part = np.argsort(parts.astype(_short(order.parts)), kind="stable")
        counts = np.bincount(parts, minlength=order.parts)
        columns = stored_columns(self._schema)
        stored = columns.append(_KEY).with_metadata({_COUNTS: msgspec.json.encode(counts.tolist())})
        with atomic_write(path) as file, pa.ipc.new_file(file, stored) as writer:
            for chosen in np.split(by_part, np.cumsum(counts)[:-1]):
                batch = record_batch(rows[chosen], columns)
                writer.write_batch(batch.append_column(_KEY, pa.array(keys[chosen])))

    def part_of_runs(self, runs: Sequence[Path], part: int, count: int) -> Iterator[Rows]:
        """Return the rows of a part out of all runs, in the stored order.

        Args:
            runs: What ``write_run`` wrote.
            part: Which part.
            count: How many rows it has, of ``part_counts``.
        """
        keys = np.empty(count, np.uint64)

        def read() -> Iterator[Rows]:
            start = 0
            for path in runs:
                batch = _open_run(path, lambda run: run.get_batch(part))
                keys[start : start + len(batch)] = batch.column(_KEY.name).to_numpy()
                start += len(batch)
                yield rows_of(batch)

        rows = Rows.collect(count, read(), self._schema)
        order = np.argsort(keys)
        step = block_rows(self._schema)
        for start in range(0, len(order), step):
            yield rows[order[start : start + step]]


def part_counts(runs: Sequence[Path]) -> list[int]:
    """Return how many rows each part has in all runs together."""
    counts = [
        _open_run(path, lambda run: msgspec.json.decode(run.schema.metadata[_COUNTS]))
        for path in runs
    ]
    return [sum(each) for each in zip(*counts, strict=True)]


def _open_run(path: Path, read: Callable[[Any], T]) -> T:
    """Read something of a run."""
    try:
        with environment_faults(f"read {path}"), pa.OSFile(str(path)) as file:
            return read(pa.ipc.open_file(file))
    except (pa.ArrowException, OSError) as error:
        raise damaged(path, error) from error


def _short(count: int) -> type[np.unsignedinteger]:
    return np.uint8 if count <= 1 << 8 else np.uint16 if count <= 1 << 16 else np.uint32
