"""Raw rows of a CSV file whose header names the features.

A line is a row: cells that are separated by commas, semicolons or tabs, each plain or in double
quotes, within which a quote is written twice. An integer may have zeros after a decimal point, as
where it was a float; an id has 8 hexadecimal digits; either may be empty, which means missing. A
label is 0 or 1. Columns that are no features are left alone. ``parse_row`` defines it; the native
parser (native/csv.cpp) takes blocks that consist of rows.
"""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
import numpy.typing as npt
import torch

from dlrm.data.criteo import BLOCK_BYTES, Position
from dlrm.data.lines import read_lines
from dlrm.data.raw_rows import RawRows
from dlrm.data.row_parser import (
    MARGIN,
    MAX_LINE_BYTES,
    REMOVE_BLANK,
    BadFieldError,
    bad_id,
    bad_integer,
    parse_integer,
    shown,
)
from dlrm.data.table import lacking
from dlrm.errors import UserError
from dlrm.files import environment_faults
from dlrm.ops.library import library
from dlrm.schema import FeatureSchema

logger = logging.getLogger("dlrm")

SEPARATORS = {b",": "commas", b";": "semicolons", b"\t": "tabs"}
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_UTF_16 = (b"\xff\xfe", b"\xfe\xff")
_INTEGER = re.compile(rb"(-?[0-9]+)(\.0*)?")
_LABEL = re.compile(rb"([01])(\.0*)?")
_ID = re.compile(rb"[0-9a-fA-F]{8}")


@dataclass(frozen=True)
class Header:
    """What the cells of a row are.

    Attributes:
        separator: One of ``SEPARATORS``.
        names: Of the columns.
        meanings: For each of them: the number of a dense feature; beyond these, of a sparse one;
            then the label's; -1: it is left alone.
        dense: How many dense features there are.
        sparse: Likewise.
        labelled: Whether there is a label.
    """

    separator: bytes
    names: tuple[str, ...]
    meanings: tuple[int, ...]
    dense: int
    sparse: int
    labelled: bool


def read_header(path: Path, line: bytes, schema: FeatureSchema) -> Header:
    """Read a first line.

    Args:
        path: Its file, for messages.
        line: Without its line end.
        schema: Names the columns.

    Raises:
        UserError: It is no header that names all features, and each of them and the label once.
    """
    separator, names = _split_header(line, schema)
    lacks = lacking(schema.feature_names, names, "with an empty cell where a value is missing")
    if lacks:
        raise UserError(_no_header(path, line, lacks, named=_names_any(names, schema)))
    numbers = {name: number for number, name in enumerate([*schema.feature_names, schema.label])}
    for name in numbers:
        if names.count(name) > 1:
            raise UserError(
                f"{path}, line 1: the header names the column {name} {names.count(name)} times, "
                "expected once. Rename or remove the others."
            )
    return Header(
        separator,
        names,
        tuple(numbers.get(name, -1) for name in names),
        len(schema.dense),
        len(schema.sparse),
        schema.label in names,
    )


def names_features(line: bytes, schema: FeatureSchema) -> bool:
    """Tell whether a first line names any feature, and so can be nothing but a header."""
    return _names_any(_split_header(line, schema)[1], schema)


def _names_any(names: Sequence[str], schema: FeatureSchema) -> bool:
    return not set(schema.feature_names).isdisjoint(names)


def _no_header(path: Path, line: bytes, lacks: str, *, named: bool) -> str:
    """Say why a first line is no header.

    Args:
        path: Its file.
        line: All of it.
        lacks: Which columns it lacks.
        named: Whether it names a feature.
    """
    if line.startswith(_UTF_16):
        return f"{path} is text in UTF-16: expected UTF-8. Save it as UTF-8."
    if b"\r" in line.rstrip(b"\r"):
        return (
            f"{path}, line 1: expected lines that end in LF or CRLF, got CR alone. Save it with "
            "other line ends."
        )
    if named:
        return f"{path}, line 1: the header {lacks}"
    return (
        f"{path}, line 1: expected a header, names of columns that are separated by commas, "
        f"semicolons or tabs; got {shown(line)}. It {lacks}"
    )


def _split_header(line: bytes, schema: FeatureSchema) -> tuple[bytes, tuple[str, ...]]:
    """Return the separator of a first line, the one by which it names most features, and names."""
    line = line.removeprefix(_BYTE_ORDER_MARK).rstrip(b"\r\n")
    known = set(schema.feature_names)
    found: list[tuple[bytes, tuple[str, ...]]] = []
    for separator in SEPARATORS:
        with suppress(BadFieldError):
            cells = split_cells(line, separator)
            found.append(
                (separator, tuple(cell.decode(errors="replace").strip() for cell in cells))
            )
    if not found:
        return b",", ()
    return max(found, key=lambda each: (len(known & set(each[1])), len(each[1])))


def read_csv_blocks(
    path: Path,
    schema: FeatureSchema,
    *,
    file: IO[bytes] | None = None,
    start: Position | None = None,
    block_bytes: int = BLOCK_BYTES,
) -> Iterator[RawRows]:
    """Read a CSV file of rows in order, plain or packed with gzip, in bounded memory.

    Args:
        path: The file.
        schema: Names the columns.
        file: It, opened; None: it is opened.
        start: Where to begin, the end of some rows; None: at the beginning.
        block_bytes: Bytes of the lines that are parsed at a time.

    Raises:
        UserError: The header lacks a feature, or a row is malformed; it is named by line and
            column.
        EnvironmentFaultError: The file cannot be read.
    """
    read = functools.partial(
        read_lines, path, margin=MARGIN, block_bytes=block_bytes, max_line_bytes=MAX_LINE_BYTES
    )
    header: Header | None = None
    position = start or Position()
    with environment_faults(f"read {path}"):
        if start is not None:
            header = _take_header(path, next(read()).buffer, schema)
        for block in read(offset=position.offset, file=file):
            if header is None:
                header = _take_header(path, block.buffer, schema)
                position = Position(0, 1, 0)
            if not block.is_terminated:
                logger.warning(
                    "%s: the last line has no line end; it is read as it is, but the file may be "
                    "cut short",
                    path,
                )
            labels, dense, sparse = _parse_block(path, block.buffer, header, position.line)
            lines = len(dense)
            position = Position(block.end, position.line + lines, position.row + lines)
            yield RawRows(labels if header.labelled else None, dense, sparse, position)
        if header is None:
            raise UserError(f"{path} is empty: expected a header and rows. Get the file again.")


def _take_header(path: Path, buffer: bytearray, schema: FeatureSchema) -> Header:
    """Read the first line of a buffer, and remove it there."""
    end = buffer.index(b"\n", MARGIN)
    line = bytes(buffer[MARGIN:end])
    del buffer[MARGIN : end + 1]
    return read_header(path, line, schema)


def _parse_block(
    path: Path, buffer: bytearray, header: Header, lines_before: int
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int32], npt.NDArray[np.uint32]]:
    """Parse whole lines, all rows.

    Args:
        path: For messages.
        buffer: ``MARGIN`` bytes and the lines, each with a newline.
        header: What a row is.
        lines_before: How many lines of the file are before them.
    """
    if b"\r" in buffer:
        buffer = buffer.replace(b"\r\n", b"\n")
    lines = buffer.count(b"\n") - 1
    if lines * len(header.names) > len(buffer):  # shorter than any row: blank lines by the million
        lines = 0
    if lines and library().loaded:
        labels = torch.empty(lines, dtype=torch.uint8)
        dense = torch.empty((lines, header.dense), dtype=torch.int32)
        sparse = torch.empty((lines, header.sparse), dtype=torch.uint32)
        parsed = torch.ops.dlrm.parse_cells(
            torch.frombuffer(buffer, dtype=torch.uint8, offset=MARGIN),
            torch.tensor(header.meanings, dtype=torch.int32),
            ord(header.separator),
            MAX_LINE_BYTES + 1,  # with its end
            labels,
            dense,
            sparse,
        )
        if parsed == lines:
            return labels.numpy(), dense.numpy(), sparse.numpy()
    rows = []
    content = bytes(buffer[MARGIN:])
    for index, line in enumerate(content.split(b"\n")[:-1]):
        try:
            rows.append(parse_row(line, header))
        except BadFieldError as error:
            name = header.names[error.column] if error.column < len(header.names) else "no column"
            raise UserError(
                f"{path}, line {lines_before + index + 1}, column {error.column + 1} ({name}): "
                f"expected {error.expected}, got {error.got}. "
                f"{error.remedy or 'Mend or remove that line.'}"
            ) from error
    return (
        np.array([label for label, _, _ in rows], np.uint8),
        np.array([integers for _, integers, _ in rows], np.int32).reshape(len(rows), header.dense),
        np.array([ids for _, _, ids in rows], np.uint32).reshape(len(rows), header.sparse),
    )


def parse_row(line: bytes, header: Header) -> tuple[int, list[int], list[int]]:
    """Parse a line without its line end, as it is defined what a row is.

    Returns:
        The label (0 where there is none), the integers, and the values of the ids, in the order of
        the schema.

    Raises:
        BadFieldError: It is no row.
    """
    if len(line) > MAX_LINE_BYTES:
        raise BadFieldError("too long", 0, f"a line of at most {MAX_LINE_BYTES} bytes", shown(line))
    cells = split_cells(line, header.separator)
    expected = f"{len(header.names)} cells separated by {SEPARATORS[header.separator]}"
    if not line and len(header.names) > 1:
        raise BadFieldError("blank", 0, expected, "a blank line", REMOVE_BLANK)
    if len(cells) != len(header.names):
        column = min(len(cells), len(header.names))  # the first that is missing or too many
        raise BadFieldError("fields", column, expected, f"{len(cells)}: {shown(line)}")
    label = 0
    integers, ids = [0] * header.dense, [0] * header.sparse
    for column, (cell, meaning) in enumerate(zip(cells, header.meanings, strict=True)):
        if 0 <= meaning < header.dense:
            integers[meaning] = _integer(cell, column)
        elif 0 <= meaning < header.dense + header.sparse:
            if cell and not _ID.fullmatch(cell):
                raise bad_id(cell, column)
            ids[meaning - header.dense] = int(cell or b"0", 16)
        elif meaning >= 0:
            if not (found := _LABEL.fullmatch(cell)):
                raise BadFieldError(
                    "label",
                    column,
                    "a label, 0 or 1",
                    shown(cell),
                    "Mend that line, or rename the column if it is no label.",
                )
            label = int(found[1])
    return label, integers, ids


def _integer(cell: bytes, column: int) -> int:
    if not cell:
        return 0
    if not (found := _INTEGER.fullmatch(cell)):
        raise bad_integer(cell, column)
    return parse_integer(found[1], column)


def split_cells(line: bytes, separator: bytes) -> Sequence[bytes]:
    """Return the cells of a line, without their quotes.

    Raises:
        BadFieldError: A quote is not closed in the line, or something stands behind one.
    """
    if b'"' not in line:
        return line.split(separator)
    cells: list[bytes] = []
    at = 0
    while True:
        if line[at : at + 1] == b'"':
            end = at + 1
            while line[end : end + 2] == b'""' or line[end : end + 1] not in (b'"', b""):
                end += 2 if line[end : end + 2] == b'""' else 1
            if end == len(line):
                raise BadFieldError(
                    "fields", len(cells), "a closing quote in the same line", shown(line[at:])
                )
            cells.append(line[at + 1 : end].replace(b'""', b'"'))
            at = end + 1
            if line[at : at + 1] not in (separator, b""):
                raise BadFieldError(
                    "fields",
                    len(cells) - 1,
                    "the end of the cell after its quote",
                    shown(line[at:]),
                )
        else:
            end = line.find(separator, at)
            end = len(line) if end < 0 else end
            cells.append(line[at:end])
            at = end
        if at >= len(line):
            return cells
        at += 1
