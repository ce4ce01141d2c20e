from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dlrm.data import arranging
from dlrm.data import dataset as dataset_module
from dlrm.data.arranging import Arranger, Runs
from dlrm.data.dataset import Rows
from dlrm.data.splits import StoredOrder
from dlrm.data.spool import Columns, Segment, Spool
from dlrm.errors import EnvironmentFaultError, UserError
from dlrm.schema import DenseFeature, FeatureSchema, SparseFeature

SCHEMA = FeatureSchema(
    label="label",
    dense=(DenseFeature("d0"), DenseFeature("d1")),
    sparse=(SparseFeature("s0", 10**6), SparseFeature("s1", 1), SparseFeature("s2", 10**6)),
    source_format="",
    split_rule="",
)
SEGMENT_ROWS, SEGMENTS = 50, 5
ROWS, TRAIN_ROWS = SEGMENT_ROWS * SEGMENTS, 230
NONE = np.zeros(0, np.uint32)


def rows_of(numbers: np.ndarray[Any, np.dtype[np.int64]]) -> Rows:
    """Rows that tell their numbers."""
    numbers = numbers.astype(np.int32)
    zeros = np.zeros_like(numbers)
    dense = np.stack([numbers, 2 * numbers], axis=1)
    sparse = np.stack([3 * numbers, zeros, 1000 + numbers], axis=1)
    return Rows((numbers % 3 == 0).astype(np.uint8), dense, sparse)


@pytest.fixture
def arranger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Arranger:
    monkeypatch.setattr(os, "fsync", lambda _: None)
    monkeypatch.setattr(dataset_module, "BLOCK_BYTES", 7 * dataset_module.row_bytes(SCHEMA))
    spool = Spool(tmp_path / "spool")
    for number in range(SEGMENTS):
        first = number * SEGMENT_ROWS
        rows = rows_of(np.arange(first, first + SEGMENT_ROWS))
        columns = Columns(rows.labels, list(rows.dense.T), list(rows.sparse.T), NONE)
        segment = Segment(number, 0, 0, 0, first, SEGMENT_ROWS, first, SEGMENT_ROWS)
        spool.append(segment, columns, [])
    return Arranger(spool, SCHEMA, [], tmp_path)


def written(arranger: Arranger, folder: Path, order: StoredOrder, size: int) -> list[Path]:
    """Runs of so many segments."""
    segments = arranger._spool.segments
    paths = []
    for first in range(0, SEGMENTS, size):
        paths.append(folder / f"run-{first}.rows")
        arranger.write_run(paths[-1], segments[first : first + size], order, TRAIN_ROWS)
    return paths


@pytest.mark.parametrize("shuffle", ["total", "reference"])
@pytest.mark.parametrize("size", [1, 2, 5])
@pytest.mark.parametrize("part_rows", [1, 20, 1000])
def test_parts_hold_the_rows_of_all_runs_in_the_stored_order(
    arranger: Arranger, tmp_path: Path, shuffle: Any, size: int, part_rows: int
) -> None:
    order = StoredOrder((TRAIN_ROWS,), shuffle, 7, part_rows)
    runs = Runs(written(arranger, tmp_path, order, size), order.parts, SCHEMA)
    parts, keys = order.place(np.arange(TRAIN_ROWS))
    assert runs.parts == order.parts
    for part in range(order.parts):
        numbers = np.flatnonzero(parts == part)
        expected = rows_of(numbers[np.argsort(keys[numbers])])
        blocks = list(runs.part(part))
        assert [len(block) for block in blocks[:-1]] == [7] * (len(blocks) - 1)
        assert sum(map(len, blocks)) == len(expected)
        if blocks:
            got = Rows.concatenate(blocks)
            for name in ("labels", "dense", "sparse"):
                assert getattr(got, name).dtype == getattr(expected, name).dtype
                assert (getattr(got, name) == getattr(expected, name)).all()


def test_a_part_reads_its_own_rows_and_nothing_else(
    arranger: Arranger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order = StoredOrder((TRAIN_ROWS,), "total", 7, 20)
    paths = written(arranger, tmp_path, order, 2)
    record_bytes = 8 + dataset_module.row_bytes(SCHEMA)  # a row and its key
    of_ends = 4 * order.parts
    sizes = [path.stat().st_size for path in paths]
    assert sizes == [of_ends + rows * record_bytes for rows in (100, 100, 30)]
    taken = 0

    class Counted(io.FileIO):
        def readinto(self, buffer: Any) -> int:
            nonlocal taken
            taken += memoryview(buffer).nbytes
            return super().readinto(buffer) or 0

    monkeypatch.setattr(arranging, "open", lambda path, *_, **__: Counted(path), raising=False)
    runs = Runs(paths, order.parts, SCHEMA)
    assert taken == len(paths) * of_ends  # once, whatever the number of parts
    for part in range(order.parts):
        list(runs.part(part))
    assert taken == sum(sizes)


def test_a_run_that_is_damaged_is_named(arranger: Arranger, tmp_path: Path) -> None:
    order = StoredOrder((TRAIN_ROWS,), "total", 7, 20)
    paths = written(arranger, tmp_path, order, 2)
    content = paths[1].read_bytes()
    runs = Runs(paths, order.parts, SCHEMA)

    def refused(reason: str) -> None:
        with pytest.raises(UserError) as caught:
            Runs(paths, order.parts, SCHEMA)
        assert str(caught.value) == (
            f"{paths[1]} is damaged: {reason}. Repeat the command to start over."
        )

    for length in (3, 4 * order.parts, len(content) - 1):
        paths[1].write_bytes(content[:length])
        if length == 3:
            refused(f"it ends {4 * order.parts - 3} bytes early")
        else:
            refused(f"expected {len(content)} bytes, got {length}")
    # As it may be later too.
    with pytest.raises(UserError, match=r"run-2\.rows is damaged: it ends 1 bytes early"):
        list(runs.part(order.parts - 1))
    paths[1].write_bytes(content + b"x")
    refused(f"expected {len(content)} bytes, got {len(content) + 1}")
    paths[1].write_bytes(b"\xff\xff\xff\x7f" + content[4:])
    refused("a part ends before it begins")
    paths[1].unlink()
    with pytest.raises(UserError, match=r"run-2\.rows is damaged: .*No such file"):
        Runs(paths, order.parts, SCHEMA)


def test_a_disk_that_fails_is_no_damage(
    arranger: Arranger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order = StoredOrder((TRAIN_ROWS,), "total", 7, 20)
    paths = written(arranger, tmp_path, order, 2)

    class Failing(io.FileIO):
        def readinto(self, buffer: Any) -> int:
            raise OSError(5, os.strerror(5))

    monkeypatch.setattr(arranging, "open", lambda path, *_, **__: Failing(path), raising=False)
    with pytest.raises(EnvironmentFaultError, match=r"cannot read .*run-0\.rows: Input/output"):
        Runs(paths, order.parts, SCHEMA)
