"""Rows of Parquet files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dlrm.data.parquet_rows import count_rows, read_parquet_blocks
from dlrm.errors import UserError
from dlrm.schema import DenseFeature, FeatureSchema, SparseFeature

SCHEMA = FeatureSchema(
    label="click",
    dense=(DenseFeature("age"),),
    sparse=(SparseFeature("ad", 10), SparseFeature("site", 10)),
    source_format="test",
    split_rule="none",
)
COLUMNS: dict[str, Any] = {
    "note": ["a", None, "c"],
    "site": [4294967295, None, 7],
    "age": [-3, None, 9],
    "ad": ["0000000A", None, "0000000b"],
    "click": [1, 0, 1],
}


def written(folder: Path, columns: dict[str, Any], **options: Any) -> Path:
    pq.write_table(pa.table(columns), folder / "rows.parquet", **options)
    return folder / "rows.parquet"


@pytest.mark.parametrize(
    "ads",
    [
        pa.array(COLUMNS["ad"]),
        pa.array(COLUMNS["ad"], pa.large_string()),
        pa.array(COLUMNS["ad"], pa.string_view()),
        pa.array(COLUMNS["ad"]).dictionary_encode(),
        pa.array([10, None, 11]),
        pa.array([10, 0, 11], pa.uint32()),
    ],
)
@pytest.mark.parametrize("label", [pa.int8(), pa.float32(), pa.bool_()])
def test_rows_are_read(tmp_path: Path, ads: pa.Array, label: pa.DataType) -> None:
    clicks = pa.array([1, 0, 1]).cast(label)
    path = written(tmp_path, COLUMNS | {"ad": ads, "click": clicks})
    (block,) = read_parquet_blocks(path, SCHEMA)
    assert block.labels is not None
    assert (block.labels.dtype, block.labels.tolist()) == (np.uint8, [1, 0, 1])
    assert block.dense.tolist() == [[0], [0], [9]]
    assert block.sparse.tolist() == [[10, 4294967295], [0, 0], [11, 7]]
    assert count_rows(path) == block.end.row == 3


def test_reading_goes_on_from_the_end_of_any_block(tmp_path: Path) -> None:
    columns = {name: np.arange(100) % 90 for name in ("age", "ad", "site")}
    path = written(tmp_path, columns, row_group_size=33)
    blocks = list(read_parquet_blocks(path, SCHEMA, block_rows=10))
    assert [block.end.row for block in blocks][:5] == [10, 20, 30, 33, 43]
    assert all(block.labels is None for block in blocks)
    assert np.concatenate([block.dense for block in blocks])[:, 0].tolist() == [
        *range(90),
        *range(10),
    ]
    for number, block in enumerate(blocks):
        rest = list(read_parquet_blocks(path, SCHEMA, start=block.end, block_rows=10))
        assert [(each.end, each.sparse.tolist()) for each in rest] == [
            (each.end, each.sparse.tolist()) for each in blocks[number + 1 :]
        ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ad": ["0000000a"] * 2 + ["12"]}, "row 12 of column ad: expected 8 hex.*got '12'"),
        ({"age": [1, 2, 2**31]}, "row 12 of column age: expected at most 2147483647, got"),
        ({"age": ["1", "2", "x"]}, "column age must hold integers, got string"),
        ({"click": [1, 0, 2]}, "row 12 of the label: expected 0 or 1, got 2"),
        ({"click": [1, None, 1]}, "row 11 of the label: expected 0 or 1, got None"),
        ({"click": ["1", "0", "x"]}, "the label must be a number, 0 or 1, got string"),
    ],
)
def test_a_malformed_value_is_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    table = pa.table({name: each for name, each in (COLUMNS | change).items() if name != "note"})
    kinds = table.schema
    before = pa.table({field.name: pa.array([None] * 10, field.type) for field in kinds})
    if kinds.field("click").type == pa.int64():
        before = before.set_column(
            kinds.get_field_index("click"), "click", pa.array([0] * 10, pa.int64())
        )
    pq.write_table(pa.concat_tables([before, table]), tmp_path / "rows.parquet")
    with pytest.raises(UserError, match=rf"rows\.parquet: {message}"):
        list(read_parquet_blocks(tmp_path / "rows.parquet", SCHEMA))


def test_missing_columns_and_damaged_files_are_named(tmp_path: Path) -> None:
    path = written(tmp_path, {"age": [1], "ad": [2]})
    with pytest.raises(UserError, match=r"rows\.parquet lacks the column site of the model's 3"):
        list(read_parquet_blocks(path, SCHEMA))
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(UserError, match=r"rows\.parquet cannot be read as Parquet"):
        list(read_parquet_blocks(path, SCHEMA))
    with pytest.raises(UserError, match="does not exist"):
        list(read_parquet_blocks(tmp_path / "none.parquet", SCHEMA))
