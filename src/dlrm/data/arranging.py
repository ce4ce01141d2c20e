"""From a spool to the parts of a DATASET: numbers become ids, and rows go where they belong.

Shuffling takes two passes over the rows. The first reads and writes in sequence: each run of
segments is sorted by the part that its rows go to. In the second each part gathers its rows from
all runs and sorts them. Rows in the source's order need but one pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dlrm.data.dataset import Rows, block_rows
from dlrm.data.fitting import FittedFeature, map_file
from dlrm.data.splits import StoredOrder
from dlrm.data.spool import Integers, Segment, Spool, damaged
from dlrm.data.vocabulary import hashed
from dlrm.files import atomic_write, environment_faults
from dlrm.schema import FeatureSchema

_END = np.dtype("<u4")
"""Of a part in a run, in rows of the run."""


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
        """Write the training rows of some segments, sorted by part, as ``Runs`` reads them."""
        inside = [min(segment.rows, train_rows - segment.first_row) for segment in segments]
        records = np.empty(sum(inside), _record(self._schema))
        start = 0
        for segment, count in zip(segments, inside, strict=True):
            rows = self.rows(segment, slice(0, count))
            here = records[start : start + count]
            here["label"], here["dense"], here["sparse"] = rows.labels, rows.dense, rows.sparse
            start += count
        first = segments[0].first_row
        parts, records["key"] = order.place(np.arange(first, first + len(records)))
        # Stable sorting of short integers is a radix sort.
        by_part = np.argsort(parts.astype(_short(order.parts)), kind="stable")
        ends = np.cumsum(np.bincount(parts, minlength=order.parts))
        step = block_rows(self._schema)
        with atomic_write(path) as file:
            file.write(ends.astype(_END).data)
            for start in range(0, len(records), step):
                file.write(_bytes_of(records.take(by_part[start : start + step])))


class Runs:
    """Training rows on their way from the source's order to the stored one.

    A run is a file: where each part ends in it, as integers of 32 bits, counted in rows; then the
    rows, part by part, as records of fixed size.

    Args:
        paths: What ``Arranger.write_run`` wrote, n runs.
        parts: How many parts there are.
        schema: What a row consists of.

    Attributes:
        parts: How many there are.

    Raises:
        UserError: A run is missing or damaged.
        EnvironmentFaultError: One cannot be read.
    """

    def __init__(self, paths: Sequence[Path], parts: int, schema: FeatureSchema) -> None:
        self.parts = parts
        self._paths = paths
        self._record = _record(schema)
        self._block_rows = block_rows(schema)
        self._ends = np.zeros((len(paths), parts + 1), _END)  # (n, parts + 1), first the beginning
        for path, ends in zip(paths, self._ends, strict=True):
            with _reading(path), open(path, "rb", buffering=0) as file:
                _read(file, ends[1:])
                expected = ends[1:].nbytes + int(ends[-1]) * self._record.itemsize
                size = path.stat().st_size
            if size != expected:
                raise damaged(path, f"expected {expected} bytes, got {size}")
            if (ends[1:] < ends[:-1]).any():
                raise damaged(path, "a part ends before it begins")

    @property
    def nbytes(self) -> int:
        """Memory that it holds."""
        return self._ends.nbytes

    def part(self, number: int) -> Iterator[Rows]:
        """Return the rows of a part out of all runs, in the stored order."""
        counts = self._ends[:, number + 1] - self._ends[:, number]
        records = np.empty(int(counts.sum(dtype=np.int64)), self._record)
        header = self.parts * _END.itemsize
        start = 0
        for path, first, count in zip(
            self._paths, self._ends[:, number].tolist(), counts.tolist(), strict=True
        ):
            if count:
                with _reading(path), open(path, "rb", buffering=0) as file:
                    file.seek(header + first * self._record.itemsize)
                    _read(file, records[start : start + count])
                start += count
        order = np.argsort(records["key"])
        for start in range(0, len(order), self._block_rows):
            chosen = records.take(order[start : start + self._block_rows])
            yield Rows(chosen["label"].copy(), chosen["dense"].copy(), chosen["sparse"].copy())


def _record(schema: FeatureSchema) -> np.dtype[np.void]:
    """Return a row of a run: the key by which a part is sorted, and what is stored."""
    return np.dtype(
        [
            ("key", "<u8"),
            ("dense", "<i4", (len(schema.dense),)),
            ("sparse", "<i4", (len(schema.sparse),)),
            ("label", "u1"),
        ]
    )


def _bytes_of(array: npt.NDArray[Any]) -> memoryview:
    return array.view(np.uint8).data


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        with environment_faults(f"read {path}"):
            yield
    except (EOFError, OSError) as error:
        raise damaged(path, error) from error


def _read(file: FileIO, array: npt.NDArray[Any]) -> None:
    """Fill an array with what comes next in a file.

    Raises:
        EOFError: The file ends before.
    """
    left = _bytes_of(array)
    while left:
        read = file.readinto(left)
        if not read:
            raise EOFError(f"it ends {len(left)} bytes early")
        left = left[read:]


def _short(count: int) -> type[np.unsignedinteger]:
    return np.uint8 if count <= 1 << 8 else np.uint16 if count <= 1 << 16 else np.uint32
