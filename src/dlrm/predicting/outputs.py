"""What probabilities are written to: CSV, Parquet or Arrow, row after row."""

from __future__ import annotations

import gzip
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from dlrm.config import OutputFormat
from dlrm.errors import UserError

_COLUMNS = pa.schema([("Id", pa.int64()), ("Predicted", pa.float32())])
_SUFFIXES: dict[str, OutputFormat] = {".parquet": "parquet", ".arrow": "arrow", ".feather": "arrow"}
_BATCH_ROWS = 1 << 20
"""Of a Parquet row group, and of an Arrow record batch."""
_GZIP_LEVEL = 6


class _Sink(Protocol):
    def write_batch(self, batch: pa.RecordBatch) -> None: ...


class Writer:
    """Writes rows ``Id,Predicted``; equal rows give equal bytes, however they are cut.

    Args:
        sink: Takes record batches.
        first_id: The Id of the first row.
        batch_rows: Rows of a record batch; 0: as many as come.
    """

    def __init__(self, sink: _Sink, first_id: int, batch_rows: int) -> None:
        self._sink = sink
        self._next_id = first_id
        self._batch_rows = batch_rows
        self._pending: list[npt.NDArray[np.float32]] = []
        self._pending_rows = 0

    def write(self, probabilities: npt.NDArray[np.float32]) -> None:
        """Write the next rows."""
        self._pending.append(probabilities)
        self._pending_rows += len(probabilities)
        while self._pending_rows >= max(1, self._batch_rows):
            self._write_batch(self._batch_rows or self._pending_rows)

    def finish(self) -> None:
        """Write what was not a whole record batch yet."""
        if self._pending_rows:
            self._write_batch(self._pending_rows)

    def _write_batch(self, rows: int) -> None:
        pending = np.concatenate(self._pending)
        ids = np.arange(self._next_id, self._next_id + rows)
        self._sink.write_batch(pa.record_batch([ids, pending[:rows]], schema=_COLUMNS))
        self._next_id += rows
        self._pending, self._pending_rows = [pending[rows:]], len(pending) - rows


def find_format(path: Path, format: OutputFormat = "auto") -> OutputFormat:
    """Tell what an output is to be, from its name if nothing else does.

    Raises:
        UserError: The name says that it is packed, and the format is none that is.
    """
    is_packed = path.suffix == ".gz"
    if format == "auto":
        suffix = Path(path.stem).suffix if is_packed else path.suffix
        format = _SUFFIXES.get(suffix, "csv")
    if is_packed and format != "csv":
        raise UserError(
            f"{path} ends in .gz, and {format} is not packed so: expected CSV. Leave .gz away."
        )
    return format


@contextmanager
def write_rows(
    file: IO[bytes], format: OutputFormat, first_id: int, *, packed: bool = False
) -> Iterator[Writer]:
    """Write rows to a file, which is complete when the context ends.

    Args:
        file: Open for writing.
        format: Which of them.
        first_id: The Id of the first row.
        packed: Of CSV, with gzip.
    """
    if format == "csv":
        with _gzip(file) if packed else nullcontext(file) as text:
            text.write(b"Id,Predicted\n")
            options = pa.csv.WriteOptions(quoting_style="none", include_header=False)
            with _closed(pa.csv.CSVWriter(text, _COLUMNS, write_options=options)) as sink:
                writer = Writer(sink, first_id, 0)
                yield writer
                writer.finish()
        return
    made = pq.ParquetWriter if format == "parquet" else pa.ipc.new_file
    with _closed(made(file, _COLUMNS)) as sink:
        writer = Writer(sink, first_id, _BATCH_ROWS)
        yield writer
        writer.finish()


@contextmanager
def _closed(sink: Any) -> Iterator[Any]:
    """Close a sink if nothing failed: else nobody wants what it still has to write."""
    yield sink
    sink.close()


def _gzip(file: IO[bytes]) -> AbstractContextManager[Any]:
    # Without name and time, so that equal predictions give equal bytes.
    return gzip.GzipFile(filename="", mode="wb", fileobj=file, mtime=0, compresslevel=_GZIP_LEVEL)
