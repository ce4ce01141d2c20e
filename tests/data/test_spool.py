from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from dlrm.data.spool import Columns, RejectedRow, Segment, Spool, narrow
from dlrm.errors import UserError

NONE = np.zeros(0, np.uint32)


def segment(number: int, first_row: int, rows: int) -> Segment:
    return Segment(
        number=number,
        file=number // 2,
        end=100 + number,
        lines=9,
        first_row=first_row,
        rows=rows,
        first_candidate=first_row,
        candidates=rows,
        generations=(0, 3),
        new_values=(2, 1),
        missing=(5,),
        rejected={"blank": 2},
        examples=(RejectedRow("train.txt", 7, "blank", "a blank line"),),
    )


COLUMNS = Columns(
    np.array([0, 1, 1], np.uint8),
    [np.array([0, 255, 3], np.int32), np.array([2**31 - 1, 0, 5], np.int32)],
    [np.array([65535, 0, 1], np.int32), np.array([65536, 2, 3], np.uint32)],
    np.array([0, 2, 5], np.uint32),
)
VALUES = [np.array([7, 2**32 - 1], np.uint32), np.array([3], np.uint32)]


@pytest.fixture
def spool(tmp_path: Path) -> Spool:
    spool = Spool(tmp_path / "spool")
    spool.append(segment(0, 0, 3), COLUMNS, VALUES)
    return spool


def test_what_is_appended_is_read_back_by_another_process(spool: Spool) -> None:
    other = Spool(spool.folder)
    assert other.segments == spool.segments == [segment(0, 0, 3)]
    assert other.rows == 3
    columns = other.columns(0)
    assert len(columns) == 3
    assert columns.labels.tolist() == [0, 1, 1] == other.labels(0).tolist()
    assert [column.tolist() for column in columns.dense] == [[0, 255, 3], [2**31 - 1, 0, 5]]
    assert [column.tolist() for column in columns.sparse] == [[65535, 0, 1], [65536, 2, 3]]
    assert columns.candidates.tolist() == [0, 2, 5] == other.candidates(0).tolist()
    assert other.sparse(0, 1).tolist() == [65536, 2, 3]
    for feature, values in enumerate(VALUES):
        assert other.new_values(0, feature).tolist() == values.tolist()
        assert other.new_values(0, feature).dtype == np.uint32


def test_columns_are_stored_in_the_narrowest_type(spool: Spool) -> None:
    columns = spool.columns(0)
    assert [column.dtype for column in columns.dense] == [np.uint8, np.int32]
    assert [column.dtype for column in columns.sparse] == [np.uint16, np.uint32]
    for largest, kind in [
        (0, np.uint8), (255, np.uint8), (256, np.uint16), (65535, np.uint16), (65536, np.int32),
    ]:  # fmt: skip
        assert narrow(np.array([0, largest], np.int32)).dtype == kind
    assert narrow(np.array([], np.int32)).dtype == np.uint8


def test_a_segment_without_its_record_is_not_there(spool: Spool) -> None:
    spool.append(segment(1, 3, 3), COLUMNS, VALUES)
    (spool.folder / "segment-00001.json").unlink()
    assert Spool(spool.folder).segments == [segment(0, 0, 3)]
    # And is written anew.
    other = Spool(spool.folder)
    changed = dataclasses.replace(COLUMNS, labels=np.zeros(3, np.uint8))
    other.append(segment(1, 3, 3), changed, VALUES)
    assert Spool(spool.folder).labels(1).tolist() == [0, 0, 0]


def test_the_segments_of_some_rows(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "spool")
    first = 0
    empty = Columns(
        np.zeros(0, np.uint8), [np.zeros(0, np.int32)], [np.zeros(0, np.int32)] * 2, NONE
    )
    for number, rows in enumerate((3, 3, 0, 3)):
        spool.append(segment(number, first, rows), COLUMNS if rows else empty, VALUES)
        first += rows
    assert spool.rows == 9
    for rows, numbers in [
        (range(9), [0, 1, 2, 3]),
        (range(3), [0]),
        (range(2, 4), [0, 1]),
        (range(3, 6), [1]),
        (range(8, 9), [3]),
    ]:
        assert [each.number for each in spool.segments_of(rows)] == numbers


def test_rows_are_removed_and_the_record_stays(spool: Spool) -> None:
    spool.remove_rows(0)
    spool.remove_rows(0)
    assert Spool(spool.folder).segments == [segment(0, 0, 3)]
    assert spool.new_values(0, 1).tolist() == [3]
    with pytest.raises(UserError, match=r"rows-00000\.safetensors is damaged: .*No such file"):
        spool.columns(0)


def test_damage_is_named(spool: Spool) -> None:
    path = spool.folder / "rows-00000.safetensors"
    content = path.read_bytes()
    for length in (0, 7, 20, len(content) - 1):
        path.write_bytes(content[:length])
        with pytest.raises(UserError, match=r"rows-00000\.safetensors is damaged: .*start over"):
            spool.columns(0)
    (spool.folder / "segment-00000.json").write_text("{}")
    with pytest.raises(UserError, match=r"segment-00000\.json is damaged"):
        Spool(spool.folder)
