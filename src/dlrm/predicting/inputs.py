"""What rows are read from: files and pipes, whatever their format."""

from __future__ import annotations

import hashlib
import io
import os
import stat
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, cast

from dlrm.config import InputFormat
from dlrm.data import criteo
from dlrm.data.criteo import Position
from dlrm.data.csv_rows import names_features, read_csv_blocks
from dlrm.data.lines import GZIP
from dlrm.data.parquet_rows import MAGIC, count_rows, read_parquet_blocks
from dlrm.data.raw_rows import RawRows
from dlrm.errors import UserError
from dlrm.files import environment_faults
from dlrm.schema import FeatureSchema

PIPE = Path("-")
"""Standard input, or output."""
_HEAD_BYTES = 1 << 20
_STDIN = Path("standard input")


@dataclass(frozen=True)
class Input:
    """What rows are read from.

    Attributes:
        path: Its name, for messages too.
        schema: Of the rows.
        format: What it was found to be.
        file: Of a pipe, what is left to be read; None: a file, which can be read again.
        head: Its first bytes.
    """

    path: Path
    schema: FeatureSchema
    format: InputFormat
    file: IO[bytes] | None
    head: bytes

    @property
    def identity(self) -> str:
        """What tells a file from another, or from itself after a change; empty: it is a pipe."""
        if self.file is not None:
            return ""
        status = self.path.stat()
        digest = hashlib.sha256(self.head).hexdigest()
        return f"{status.st_size} bytes, changed at {status.st_mtime_ns}, {digest}"

    def rows(self) -> int | None:
        """Return how many rows there are, about; None: it is a pipe."""
        if self.file is not None:
            return None
        if self.format == "parquet":
            return count_rows(self.path)
        return criteo.estimate_rows(self.path)

    def blocks(
        self, start: Position | None = None, *, labelled: bool | None = None
    ) -> Iterator[RawRows]:
        """Read the rows in order.

        Args:
            start: Where to begin, the end of a block; None: at the beginning.
            labelled: Whether rows have a label, where that is known already.

        Raises:
            UserError: A row is malformed, or something is not as the format has it.
            EnvironmentFaultError: It cannot be read.
        """
        if self.format == "parquet":
            yield from read_parquet_blocks(self.path, self.schema, start=start)
        elif self.format == "csv":
            yield from read_csv_blocks(self.path, self.schema, file=self.file, start=start)
        else:
            for block in criteo.read_blocks(
                self.path, labelled=labelled, start=start, threads=1, file=self.file
            ):
                yield RawRows(block.labels, block.dense, block.sparse, block.end)


@contextmanager
def open_input(path: Path, schema: FeatureSchema, format: InputFormat = "auto") -> Iterator[Input]:
    """Find out what an input is.

    Args:
        path: A file, or a pipe; "-" for standard input.
        schema: Of the rows that are expected.
        format: What it is; "auto": what its content, or else its name, tells.

    Raises:
        UserError: It is not there, or is not of that format.
        EnvironmentFaultError: It cannot be read.
    """
    name = _STDIN if path == PIPE else path
    with _opened(path) as file:
        with environment_faults(f"read {name}"):
            is_pipe = path == PIPE or not stat.S_ISREG(os.fstat(file.fileno()).st_mode)
            head = _read_head(file)
        if format == "auto":
            format = recognise(head, path.name, schema)
        _refuse_impossible(name, schema, format, is_pipe=is_pipe)
        yield Input(
            name, schema, format, cast(IO[bytes], _Rejoined(head, file)) if is_pipe else None, head
        )


def recognise(head: bytes, name: str, schema: FeatureSchema) -> InputFormat:
    """Tell a format from a file's first bytes; where these do not tell, from its name."""
    if head.startswith(MAGIC):
        return "parquet"
    if head.startswith(GZIP):
        with suppress(zlib.error):  # reading it will say what is wrong
            head = zlib.decompressobj(zlib.MAX_WBITS | 16).decompress(head, _HEAD_BYTES)
    line = head.partition(b"\n")[0]
    if names_features(line, schema):
        return "csv"
    if line.count(b"\t") + 1 in criteo.FIELDS:
        return "criteo"
    suffix = Path(name.removesuffix(".gz")).suffix
    return "csv" if suffix == ".csv" else "parquet" if suffix == ".parquet" else "criteo"


def _refuse_impossible(
    path: Path, schema: FeatureSchema, format: InputFormat, *, is_pipe: bool
) -> None:
    if format == "parquet" and is_pipe:
        raise UserError(
            f"{path} is a pipe, and Parquet is read from its end. Name a file, or pipe CSV."
        )
    names = schema.feature_names
    if format == "criteo" and names != (*criteo.DENSE_NAMES, *criteo.SPARSE_NAMES):
        raise UserError(
            f"{path} does not name its columns, as Criteo's rows do not, and the model's features "
            f"are others: {', '.join(names)}. Give CSV with a header, or Parquet."
        )


@contextmanager
def _opened(path: Path) -> Iterator[IO[bytes]]:
    if path == PIPE:
        yield io.FileIO(0, closefd=False)
        return
    try:
        with environment_faults(f"read {path}"):
            file = open(path, "rb", buffering=0)
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{path} does not exist. Name a file of raw rows.") from None
    except IsADirectoryError:
        raise UserError(f"{path} is not a file. Name a file of raw rows.") from None
    with file:
        yield file


def _read_head(file: IO[bytes]) -> bytes:
    """Read the first line, or what may be one, whatever comes with it."""
    parts: list[bytes] = []
    size = 0
    while size < _HEAD_BYTES and (part := file.read(_HEAD_BYTES - size)):
        parts.append(part)
        size += len(part)
        if b"\n" in part and not parts[0].startswith(GZIP):
            break
    return b"".join(parts)


class _Rejoined(io.RawIOBase):
    """A pipe of which the beginning was read."""

    def __init__(self, head: bytes, file: IO[bytes]) -> None:
        self._head = head
        self._file = file

    def read(self, size: int = -1) -> bytes:
        """Return at most so many bytes; none at the end."""
        if not self._head:
            return self._file.read(size)
        part, self._head = self._head[:size], self._head[size:]
        return part

    def readable(self) -> bool:
        return True
