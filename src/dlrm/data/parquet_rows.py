"""Raw rows of a Parquet file that has a column for each feature."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from dlrm.data.criteo import Position
from dlrm.data.raw_rows import RawRows
from dlrm.data.table import lacking, rows_from_table
from dlrm.errors import UserError
from dlrm.files import environment_faults
from dlrm.schema import FeatureSchema

MAGIC = b"PAR1"
"""What a Parquet file begins with."""
BLOCK_ROWS = 1 << 14
_BUFFER_BYTES = 1 << 18
"""Read ahead of a column, so that of a row group no more is in memory."""


def count_rows(path: Path) -> int:
    """Return how many rows a file has.

    Raises:
        UserError: It is not a Parquet file, or damaged.
    """
    with _opened(path) as file:
        rows: int = file.metadata.num_rows
        return rows


def read_parquet_blocks(
    path: Path,
    schema: FeatureSchema,
    *,
    start: Position | None = None,
    block_rows: int = BLOCK_ROWS,
) -> Iterator[RawRows]:
    """Read a Parquet file of rows in order, in memory that does not grow with it.

    Args:
        path: The file. Its columns are as ``rows_from_table`` takes them; one with the name of the
            schema's label, if it is there, holds zeros and ones.
        schema: Names the columns; others are left alone.
        start: Where to begin, the end of some rows; None: at the beginning.
        block_rows: Rows at a time. A row group begins a new block.

    Raises:
        UserError: A column is missing, or a value is malformed; it is named by row and column.
        EnvironmentFaultError: The file cannot be read.
    """
    known = schema.feature_names
    with _opened(path) as file:
        present = file.schema_arrow.names
        if lacks := lacking(known, present):
            raise UserError(f"{path} {lacks}")
        twice = [name for name in [*known, schema.label] if present.count(name) > 1]
        if twice:
            raise UserError(f"{path} has the column {twice[0]} twice. Leave one of them away.")
        labelled = schema.label in present
        columns = [*known, schema.label] if labelled else known
        first, row = start.row if start else 0, 0
        for group in range(file.num_row_groups):
            group_rows = file.metadata.row_group(group).num_rows
            if row + group_rows <= first:
                row += group_rows
                continue
            for batch in file.iter_batches(
                block_rows, row_groups=[group], columns=columns, use_threads=False
            ):
                row += len(batch)
                if row <= first:
                    continue
                table = pa.Table.from_batches([batch])
                before = row - len(batch)
                try:
                    dense, sparse = rows_from_table(table, schema, first_row=before)
                    labels = _labels(table.column(schema.label), before) if labelled else None
                except UserError as error:
                    raise UserError(f"{path}: {error}") from error
                yield RawRows(labels, dense, sparse, Position(row=row))


def _labels(column: pa.ChunkedArray, first_row: int) -> npt.NDArray[np.uint8]:
    kind = column.type
    try:
        if pa.types.is_boolean(kind):
            column = column.cast(pa.uint8())
        labels = column.cast(pa.float64()).to_numpy()
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise UserError(f"the label must be a number, 0 or 1, got {kind}. Convert it.") from error
    wrong = ~((labels == 0) | (labels == 1))  # a null is NaN
    if wrong.any():
        row = int(np.argmax(wrong))
        raise UserError(
            f"row {first_row + row} of the label: expected 0 or 1, got "
            f"{column[row].as_py()!r}. Correct it, or leave the column away."
        )
    taken: npt.NDArray[np.uint8] = labels.astype(np.uint8)
    return taken


@contextmanager
def _opened(path: Path) -> Iterator[pq.ParquetFile]:
    with environment_faults(f"read {path}"):
        try:
            with pq.ParquetFile(path, pre_buffer=False, buffer_size=_BUFFER_BYTES) as file:
                yield file
        except (
            pa.ArrowInvalid,
            pa.ArrowNotImplementedError,
            pa.ArrowKeyError,
            UnicodeDecodeError,
        ) as error:
            raise UserError(
                f"{path} cannot be read as Parquet: {str(error).rstrip('.')}. Get the file again."
            ) from error
        except FileNotFoundError:
            raise UserError(f"{path} does not exist. Check the path.") from None
