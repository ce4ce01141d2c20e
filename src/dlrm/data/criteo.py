"""Raw rows of the Criteo Kaggle challenge: the only place that knows 13 and 26.

A row is a line of tab-separated fields: a label (0 or 1; absent in test.txt), 13 integers and 26
ids of 8 hexadecimal digits. An integer or id may be empty, which means missing.

pyarrow's CSV reader parses the numbers. It is lenient where a log must not be (a space or a
``0x`` in a number, a quote), so a block of rows is accepted only when its bytes were checked as
well: no byte but those a row can have, separators where they belong, fields of the right length.
A block that fails is read again line by line, to name its first bad field.
"""

from __future__ import annotations

import logging
import re
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.csv

from dlrm.device import available_cores
from dlrm.errors import UserError
from dlrm.files import environment_faults
from dlrm.schema import DenseFeature, FeatureSchema, SparseFeature

SOURCE_FORMAT = "criteo-kaggle"
LABEL = "label"
DENSE_NAMES = tuple(f"int_{index}" for index in range(13))
SPARSE_NAMES = tuple(f"cat_{index}" for index in range(26))

BLOCK_BYTES = 4 << 20
"""Bytes read and parsed at a time: large enough that Python's share is small, small enough that
the arrays of a block stay in the processor's cache."""
MAX_LINE_BYTES = 64 << 10
"""A longer line is refused, so that a file without line ends is not read into memory whole."""

_ALPHABET = b"0123456789abcdefABCDEF-\t\n"
_INTEGER = re.compile(rb"-?[0-9]+")
_ID = re.compile(rb"[0-9a-fA-F]{8}")
_NAME = re.compile(rb"[\"']?[A-Za-z_]\w*[\"']?")
_OTHER_SEPARATORS = {b",": "commas", b";": "semicolons", b" ": "spaces"}
_COMPRESSED = {b"\x1f\x8b": "gzip", b"PK\x03\x04": "zip"}
_NEWLINE = ord("\n")
_BYTE_ONES = np.uint64(0x0101010101010101)

logger = logging.getLogger("dlrm")

Int32Array = npt.NDArray[np.int32]
UInt32Array = npt.NDArray[np.uint32]


@dataclass(frozen=True)
class Start:
    offset: int = 0
    line: int = 0
    row: int = 0


@dataclass(frozen=True, eq=False)
class RawBlock:
    """Consecutive rows as they are in the file, n of them.

    Attributes:
        first_row: The number of the first row in the file, from 0.
        labels: (n,) uint8 zeros and ones, or None where rows have no label.
        dense: (n, 13) int32; missing and negative values are 0.
        sparse: (n, 26) uint32 values of the hexadecimal ids; missing ones are 0.
    """

    first_row: int
    labels: npt.NDArray[np.uint8] | None
    dense: Int32Array
    sparse: UInt32Array
    lines: int = 0
    end: int = 0
    rejected: tuple[Any, ...] = ()
    missing: Any = 0

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.dense)


def schema(num_embeddings: tuple[int, ...], split_rule: str) -> FeatureSchema:
    """Describe Criteo's features.

    Args:
        num_embeddings: Rows of each of the 26 tables.
        split_rule: How rows are split, in words.
    """
    return FeatureSchema(
        label=LABEL,
        dense=tuple(DenseFeature(name) for name in DENSE_NAMES),
        sparse=tuple(
            SparseFeature(name, count)
            for name, count in zip(SPARSE_NAMES, num_embeddings, strict=True)
        ),
        source_format=SOURCE_FORMAT,
        split_rule=split_rule,
    )


def read_blocks(
    path: Path,
    *,
    labelled: bool | None = None,
    block_bytes: int = BLOCK_BYTES,
    observe: Callable[[bytes], None] | None = None,
    start: Start = Start(),
    bad_rows: str = "error",
) -> Iterator[RawBlock]:
    """Read a file of rows in order, parsing blocks on as many threads as there are cores.

    Lines may end in LF or CRLF. A file whose last line has no end is read, with a warning.

    Args:
        path: train.txt, test.txt or a file like them.
        labelled: Whether rows begin with a label; None: as the first row's number of fields says.
        block_bytes: Bytes read at a time.
        observe: Called with every run of bytes read, in order.

    Raises:
        UserError: The file is missing or empty, or a row is malformed; the first such row of the
            file is named by line and column.
        EnvironmentFaultError: The file cannot be read.
    """
    with environment_faults(f"read {path}"), _open(path) as file:
        file.seek(start.offset)
        end = start.offset
        sizes: deque[int] = deque()
        lines = _whole_lines(path, file, block_bytes, observe)
        first = next(lines, b"")
        if not first:
            raise UserError(f"{path} is empty. Check that it was downloaded or unpacked whole.")
        for magic, packer in _COMPRESSED.items():
            if first.startswith(magic):
                raise UserError(
                    f"{path}, line 1, column 1: expected tab-separated text, got a file compressed "
                    f"with {packer}. Unpack it first: this version reads plain text."
                )
        inferred = labelled is None
        if labelled is None:
            labelled = _has_label(path, first)
        width = len(DENSE_NAMES) + len(SPARSE_NAMES) + int(labelled)
        cores = available_cores()
        first_row = start.row
        sizes.append(len(first))
        with ThreadPoolExecutor(cores) as pool:
            parsing: deque[Future[_Columns]] = deque([pool.submit(_parse, first, width)])
            while parsing:
                # One block more than there are cores, so that none waits for the reader.
                while len(parsing) <= cores and (block := next(lines, b"")):
                    parsing.append(pool.submit(_parse, block, width))
                    sizes.append(len(block))
                try:
                    labels, dense, sparse = parsing.popleft().result()
                except _BadFieldError as bad:
                    raise UserError(bad.message(path, first_row, labelled, inferred)) from None
                end += sizes.popleft()
                yield RawBlock(first_row, labels, dense, sparse, lines=len(dense), end=end)
                first_row += len(dense)


def _open(path: Path) -> IO[bytes]:
    try:
        return open(path, "rb", buffering=0)
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{path} does not exist. Check the path.") from None
    except IsADirectoryError:
        raise UserError(f"{path} is a folder. Name the file of raw rows.") from None


def _whole_lines(
    path: Path, file: IO[bytes], block_bytes: int, observe: Callable[[bytes], None] | None
) -> Iterator[bytes]:
    """Cut a file into runs of whole lines, each ending in a newline."""
    rest = b""
    while chunk := file.read(block_bytes):
        if observe is not None:
            observe(chunk)
        end = chunk.rfind(b"\n") + 1
        if end:
            yield rest + chunk[:end]
            rest = chunk[end:]
        else:
            rest += chunk
            if len(rest) > MAX_LINE_BYTES:
                yield rest + b"\n"  # what is there suffices for the parser to refuse it
                return
    if rest:
        logger.warning(
            "%s: the last line has no line end; it is read as it is, but the file may be cut short",
            path,
        )
        yield rest + b"\n"


def _has_label(path: Path, block: bytes) -> bool:
    features = len(DENSE_NAMES) + len(SPARSE_NAMES)
    line = block[: block.index(b"\n")]
    fields = line.count(b"\t") + 1
    if fields not in (features, features + 1):
        raise UserError(
            f"{path}, line 1: expected {features + 1} tab-separated fields (a label, "
            f"{len(DENSE_NAMES)} integers, {len(SPARSE_NAMES)} ids) or {features} (no label), got "
            f"{fields}: {_shown(line)}. {_remedy(line, 0, labelled=False)}"
        )
    return fields == features + 1


def _remedy(line: bytes, row: int, *, labelled: bool) -> str:
    """Return what to do about a malformed line.

    Args:
        line: All of it.
        row: Its number in the file, from 0.
        labelled: Whether rows must have a label.
    """
    features = len(DENSE_NAMES) + len(SPARSE_NAMES)
    for separator, name in _OTHER_SEPARATORS.items():
        if b"\t" not in line and line.count(separator) + 1 in (features, features + 1):
            return f"Its fields are separated by {name}: put tabs in their place."
    if row == 0 and _NAME.fullmatch(line.split(b"\t")[0]):
        return "It looks like a header: remove it, every line must be a row."
    if row == 0 and labelled and line.count(b"\t") + 1 == features:
        return (
            "It has no label, as in Criteo's test.txt, which cannot be trained on: name train.txt."
        )
    return "Mend or remove that line, or get the file again."


_Columns = tuple[npt.NDArray[np.uint8] | None, Int32Array, UInt32Array]


def _parse(block: bytes, width: int) -> _Columns:
    """Parse whole lines of ``width`` fields each.

    Raises:
        _BadFieldError: Of the first malformed line.
    """
    if b"\r" in block:
        block = block.replace(b"\r\n", b"\n")
    parsed = _parse_block(block, width)
    return _parse_lines(block, width) if parsed is None else parsed


def _parse_block(block: bytes, width: int) -> _Columns | None:
    """Parse lines at once; None when any of them may be malformed."""
    if block.translate(None, _ALPHABET):
        return None
    text = np.frombuffer(block, np.uint8)
    separators = np.flatnonzero(text - np.uint8(ord("\t")) < 2)  # a tab, or a newline after it
    rows = block.count(b"\n")
    if len(separators) != rows * width:
        return None
    ends = separators.reshape(rows, width)
    if (text[ends[:, -1]] != _NEWLINE).any():
        return None
    if np.diff(ends[:, -1], prepend=-1).max() > MAX_LINE_BYTES:
        return None
    lengths = np.diff(separators, prepend=-1).reshape(rows, width) - 1

    labels, dense = None, np.empty((rows, len(DENSE_NAMES)), np.int32)
    names = [str(index) for index in range(width)]
    numbers = names[: -len(SPARSE_NAMES)]
    try:
        table = pa.csv.read_csv(
            pa.BufferReader(block),
            pa.csv.ReadOptions(use_threads=False, block_size=len(block), column_names=names),
            pa.csv.ParseOptions(delimiter="\t", quote_char=False),
            pa.csv.ConvertOptions(
                column_types=dict.fromkeys(numbers, pa.int64()),
                include_columns=numbers,
                null_values=[""],
            ),
        )
    except pa.ArrowInvalid:
        return None
    columns = [column.fill_null(0).to_numpy() for column in table.columns]
    if len(numbers) > len(DENSE_NAMES):
        if (lengths[:, 0] != 1).any():
            return None
        label = columns.pop(0)
        if (label >> 1).any():
            return None
        labels = label.astype(np.uint8)
    for index, column in enumerate(columns):
        if column.max() >= 2**31:
            return None
        np.maximum(column, 0, out=dense[:, index], casting="unsafe")

    id_lengths = lengths[:, len(numbers) :]
    present = id_lengths == 8
    if not (present | (id_lengths == 0)).all():
        return None
    # The 8 bytes before the end of each id, as one number. Where an id is missing they are other
    # fields; there are always 8, the separators of the integers.
    words = np.ndarray((len(block) - 7,), "<u8", block, strides=(1,))
    sparse = _hexadecimal(words[ends[:, len(numbers) :] - 8], present)
    return None if sparse is None else (labels, dense, sparse)


def _hexadecimal(
    words: npt.NDArray[np.uint64], present: npt.NDArray[np.bool_]
) -> UInt32Array | None:
    """Convert ids, each 8 characters in a little-endian word; None when one has a minus sign.

    Only characters of ``_ALPHABET`` are in them. Bit 6 tells letters from digits.
    """
    words = np.where(present, words, np.uint64(0x3030303030303030))  # missing is "00000000"
    letters = words >> np.uint64(6) & _BYTE_ONES
    if ((words >> np.uint64(4) & _BYTE_ONES | letters) != _BYTE_ONES).any():
        return None
    digits = (words & _BYTE_ONES * np.uint64(15)) + letters * np.uint64(9)
    # Neighbours are joined, the first the more significant: 8 digits of 4 bits, 4 of 8, 2 of 16.
    for bits, mask in ((4, 0x00FF00FF00FF00FF), (8, 0x0000FFFF0000FFFF), (16, 0xFFFFFFFF)):
        digits = (digits << np.uint64(bits) | digits >> np.uint64(2 * bits)) & np.uint64(mask)
    return digits.astype(np.uint32)


def _parse_lines(block: bytes, width: int) -> _Columns:
    """Parse lines one by one, to find the first malformed one."""
    labels, dense, sparse = [], [], []
    for row, line in enumerate(block[:-1].split(b"\n")):
        try:
            label, integers, ids = _parse_line(line, width)
        except _BadFieldError as bad:
            bad.row, bad.line = row, line
            raise
        labels.append(label)
        dense.append(integers)
        sparse.append(ids)
    labelled = width > len(DENSE_NAMES) + len(SPARSE_NAMES)
    return (
        np.array(labels, np.uint8) if labelled else None,
        np.array(dense, np.int32),
        np.array(sparse, np.uint32),
    )


class _BadFieldError(Exception):
    """A field that is not as it should be; ``row`` counts within the block, ``column`` from 0.

    ``line`` is the row's text.
    """

    def __init__(self, column: int, expected: str, got: str) -> None:
        super().__init__(expected)
        self.row = 0
        self.line = b""
        self.column = column
        self.expected = expected
        self.got = got

    def message(self, path: Path, first_row: int, labelled: bool, inferred: bool) -> str:
        names = ((LABEL,) if labelled else ()) + DENSE_NAMES + SPARSE_NAMES
        name = names[self.column] if self.column < len(names) else "beyond the last"
        row = first_row + self.row
        # What the first row is taken for matters if it, or a row unlike it, may have lost a field.
        doubtful = row == 0 or self.line.count(b"\t") + 1 != len(names)
        reason = (
            f" (the first row has {len(names)} fields, so rows are read as "
            f"{'labelled' if labelled else 'unlabelled'})"
        )
        return (
            f"{path}, line {row + 1}, column {self.column + 1} ({name}): expected "
            f"{self.expected}, got {self.got}{reason if inferred and doubtful else ''}. "
            f"{_remedy(self.line, row, labelled=labelled)}"
        )


def _parse_line(line: bytes, width: int) -> tuple[int, list[int], list[int]]:
    if len(line) >= MAX_LINE_BYTES:
        raise _BadFieldError(0, f"a line shorter than {MAX_LINE_BYTES} bytes", _shown(line))
    fields = line.split(b"\t")
    if len(fields) != width:
        expected = f"{width} tab-separated fields"
        if not line:
            raise _BadFieldError(0, expected, "a blank line")
        column = min(len(fields), width)  # the first that is missing or too many
        raise _BadFieldError(column, expected, f"{len(fields)}: {_shown(line)}")
    numbers = width - len(SPARSE_NAMES)
    has_label = numbers - len(DENSE_NAMES)
    label = 0
    if has_label:
        if fields[0] not in (b"0", b"1"):
            raise _BadFieldError(0, "a label, 0 or 1", _shown(fields[0]))
        label = int(fields[0])
    integers, ids = [0] * len(DENSE_NAMES), [0] * len(SPARSE_NAMES)
    for index, field in enumerate(fields[has_label:numbers]):
        if not field:
            continue
        if not _INTEGER.fullmatch(field):
            raise _BadFieldError(has_label + index, "an integer or nothing", _shown(field))
        digits = field.lstrip(b"-").lstrip(b"0")
        # Python refuses to convert thousands of digits, and 64 bits never need more than 19.
        value = int(digits or b"0") if len(digits) < 20 else 2**64
        if field.startswith(b"-"):
            if value > 2**63:
                raise _BadFieldError(has_label + index, "an integer of 64 bits", _shown(field))
        elif value >= 2**31:
            raise _BadFieldError(
                has_label + index, "an integer of at most 2147483647 (32 bits)", _shown(field)
            )
        else:
            integers[index] = value
    for index, field in enumerate(fields[numbers:]):
        if not field:
            continue
        if not _ID.fullmatch(field):
            raise _BadFieldError(numbers + index, "8 hexadecimal digits or nothing", _shown(field))
        ids[index] = int(field, 16)
    return label, integers, ids


def _shown(field: bytes) -> str:
    """Return a field as it may stand in a message."""
    shown = repr(field)[1:]
    return shown if len(shown) <= 42 else shown[:40] + "…"


def is_gzip(path: Path) -> bool:
    return open(path, "rb").read(2) == b"\x1f\x8b"
