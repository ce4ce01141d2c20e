"""Raw rows of Criteo's logs: the only place that knows 13 and 26.

A row is a line of tab-separated fields: a label (0 or 1; absent in Kaggle's test.txt), 13 integers
and 26 ids of 8 hexadecimal digits. An integer or id may be empty, which means missing. The Kaggle
challenge and the 1TB click logs have the same rows.

Ordinary lines are parsed by the million with NumPy: a field is the 8 bytes before its separator,
as one number, of which those of other fields are masked out, and all are checked. Whatever is not
ordinary is parsed line by line by ``_parse_line``, which says what a row is: it accepts the line
after all (an integer of 30 digits, zeros most of them), or names what is wrong.
"""

from __future__ import annotations

import logging
import re
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from dlrm.data.lines import LineBlock, read_lines
from dlrm.device import available_cores
from dlrm.errors import UserError
from dlrm.files import environment_faults
from dlrm.schema import DenseFeature, FeatureSchema, SparseFeature

SOURCE_FORMAT = "criteo-kaggle"
LABEL = "label"
DENSE_NAMES = tuple(f"int_{index}" for index in range(13))
SPARSE_NAMES = tuple(f"cat_{index}" for index in range(26))

BLOCK_BYTES = 4 << 20
"""Bytes read, and handed to a thread, at a time."""
PIECE_BYTES = 1 << 20
"""Bytes parsed at once: what is made of them on the way takes some 15 times as many."""
MAX_LINE_BYTES = 1 << 20
"""A longer line is no row, so that a file without line ends is not read into memory whole."""
EXAMPLES = 10
"""How many rejected lines of each reason a block describes; it counts all."""

Reason = Literal["blank", "fields", "label", "integer", "id", "too long"]
"""Why a line is no row: it is blank, has another number of fields, a field that is no label,
integer or id, or is longer than ``MAX_LINE_BYTES``."""

_TAB = b"\t"
_INTEGER = re.compile(rb"-?[0-9]+")
_ID = re.compile(rb"[0-9a-fA-F]{8}")
_NAME = re.compile(rb"[\"']?[A-Za-z_]\w*[\"']?")
_OTHER_SEPARATORS = {b",": "commas", b";": "semicolons", b" ": "spaces"}
_MARGIN = 16
"""Bytes before the lines of a block: a field's 16 bytes are there even where it is the first."""
_FEATURES = len(DENSE_NAMES) + len(SPARSE_NAMES)
# Words of 8 characters, or of 8 numbers of 8 bits.
_ALL_1 = np.uint64(0x0101010101010101)
_ALL_15, _ALL_118, _ALL_128 = 15 * _ALL_1, 118 * _ALL_1, 128 * _ALL_1
_ZEROS = ord("0") * _ALL_1
_EVEN_PAIRS = np.uint64(0x000000FF000000FF)
_LAST_BYTES = np.array([2**64 - 2 ** (64 - 8 * length) for length in range(9)], np.uint64)
"""What masks all but the last 0 … 8 characters of a word."""

logger = logging.getLogger("dlrm")

BoolArray = npt.NDArray[np.bool_]
Int32Array = npt.NDArray[np.int32]
IntpArray = npt.NDArray[np.intp]
UInt8Array = npt.NDArray[np.uint8]
UInt32Array = npt.NDArray[np.uint32]
UInt64Array = npt.NDArray[np.uint64]


@dataclass(frozen=True)
class Position:
    """A place between two lines of a file.

    Attributes:
        offset: Bytes of the text before it, unpacked if the file is packed.
        line: Lines before it.
        row: Accepted rows before it.
    """

    offset: int = 0
    line: int = 0
    row: int = 0


@dataclass(frozen=True)
class RejectedLine:
    """A line that was skipped.

    Attributes:
        line: Its number in the file, from 1.
        reason: What is wrong, in one word.
        message: What is wrong, in full.
    """

    line: int
    reason: Reason
    message: str


@dataclass(frozen=True, eq=False)
class RawBlock:
    """The rows of consecutive lines of a file, n of them; none if every line was rejected.

    Attributes:
        start: Where the lines begin.
        end: Where they end, and reading can go on.
        labels: (n,) uint8 zeros and ones, or None where rows have no label.
        dense: (n, 13) int32; missing and negative values are 0.
        sparse: (n, 26) uint32 values of the hexadecimal ids; missing ones are 0.
        rejected: How many lines are no rows, by reason, the commonest first.
        examples: The first of them, up to ``EXAMPLES`` of each reason.
        is_terminated: Whether the last line has a line end; only a file's last may lack it.
    """

    start: Position
    end: Position
    labels: UInt8Array | None
    dense: Int32Array
    sparse: UInt32Array
    rejected: Mapping[Reason, int]
    examples: tuple[RejectedLine, ...]
    is_terminated: bool

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.dense)


def schema(
    num_embeddings: tuple[int, ...], split_rule: str, *, value_modulus: int
) -> FeatureSchema:
    """Describe Criteo's features.

    Args:
        num_embeddings: Rows of each of the 26 tables.
        split_rule: How rows are split, in words.
        value_modulus: Ids were taken modulo this before they were numbered; 0: as they are.
    """
    return FeatureSchema(
        label=LABEL,
        dense=tuple(DenseFeature(name) for name in DENSE_NAMES),
        sparse=tuple(
            SparseFeature(name, count, value_modulus=value_modulus)
            for name, count in zip(SPARSE_NAMES, num_embeddings, strict=True)
        ),
        source_format=SOURCE_FORMAT,
        split_rule=split_rule,
    )


def read_blocks(
    path: Path,
    *,
    labelled: bool | None = None,
    start: Position | None = None,
    bad_rows: Literal["error", "skip"] = "error",
    block_bytes: int = BLOCK_BYTES,
    threads: int | None = None,
    observe: Callable[[bytes], None] | None = None,
) -> Iterator[RawBlock]:
    """Read a file of rows in order, plain or packed with gzip, in bounded memory.

    Lines may end in LF or CRLF. A file whose last line has no end is read, with a warning. What a
    block holds does not depend on threads; to read on from a block's end gives the blocks that an
    uninterrupted reading gives (where ``labelled`` is told).

    Args:
        path: train.txt, test.txt, day_0 or a file like them.
        labelled: Whether rows begin with a label; None: as the number of fields of the first line
            says, or of the first that can be a row if bad ones are skipped.
        start: Where to begin; None: at the beginning. A file packed with gzip is unpacked from its
            beginning all the same.
        bad_rows: What a malformed line is: an error, or skipped and counted.
        block_bytes: Bytes of the lines that are parsed at a time.
        threads: How many to parse on; None: as many as there are cores.
        observe: Called with every run of bytes as they are in the file, packed or not, in order.
            With it the file is read from its beginning, wherever ``start`` is.

    Raises:
        UserError: The file is missing, empty, cut short or packed otherwise, or a row is malformed;
            the first such row of the file is named by line and column.
        EnvironmentFaultError: The file cannot be read.
    """
    position = start or Position()
    threads = threads or available_cores()
    blocks = read_lines(
        path,
        margin=_MARGIN,
        block_bytes=block_bytes,
        max_line_bytes=MAX_LINE_BYTES,
        offset=position.offset,
        skip_long=bad_rows == "skip",
        observe=observe,
    )
    with environment_faults(f"read {path}"), ThreadPoolExecutor(threads) as pool:
        first = next(blocks, None)
        if first is None:
            if position.offset:
                return
            raise UserError(f"{path} is empty. Check that it was downloaded or unpacked whole.")
        inferred = labelled is None
        if labelled is None:
            labelled = _has_label(path, first, position.line, skip=bad_rows == "skip")
        unread = chain([first], blocks)
        parsing: deque[tuple[LineBlock, Future[_Parsed]]] = deque()
        failure: Exception | None = None
        while True:
            # One block more than there are threads, so that none waits for the reader.
            while failure is None and len(parsing) <= threads:
                try:
                    block = next(unread, None)
                except Exception as error:  # raised once the blocks before it are read
                    failure = error
                    break
                if block is None:
                    break
                future = pool.submit(_parse, block.buffer, labelled, first_only=bad_rows == "error")
                parsing.append((block, future))
            if not parsing:
                break
            block, future = parsing.popleft()
            parsed = future.result()
            examples = tuple(
                RejectedLine(
                    position.line + bad.index + 1,
                    bad.error.reason,
                    _message(path, position.line, bad, labelled=labelled, inferred=inferred),
                )
                for bad in parsed.examples
            )
            if examples and bad_rows == "error":
                raise UserError(examples[0].message)
            if not block.is_terminated:
                logger.warning(
                    "%s: the last line has no line end; it is read as it is, but the file may be "
                    "cut short",
                    path,
                )
            end = Position(
                block.end, position.line + parsed.lines, position.row + len(parsed.dense)
            )
            yield RawBlock(
                position,
                end,
                parsed.labels,
                parsed.dense,
                parsed.sparse,
                dict(parsed.rejected.most_common()),
                examples,
                block.is_terminated,
            )
            position = end
        if failure is not None:
            raise failure


def _has_label(path: Path, block: LineBlock, lines_before: int, *, skip: bool) -> bool:
    """Tell from the number of fields of a first line whether rows have labels.

    Args:
        path: For messages.
        block: The first lines.
        lines_before: How many lines of the file are before them.
        skip: Look on for a line of either number of fields.
    """
    lines = bytes(block.buffer[_MARGIN:-1]).split(b"\n")
    for line in lines if skip else lines[:1]:
        fields = line.count(_TAB) + 1
        if fields in (_FEATURES, _FEATURES + 1):
            return fields == _FEATURES + 1
    first = lines[0]
    raise UserError(
        f"{path}, line {lines_before + 1}: expected {_FEATURES + 1} tab-separated fields (a label, "
        f"{len(DENSE_NAMES)} integers, {len(SPARSE_NAMES)} ids) or {_FEATURES} (no label), got "
        f"{first.count(_TAB) + 1}: {_shown(first)}. {_remedy(first, lines_before, labelled=False)}"
    )


def _remedy(line: bytes, row: int, *, labelled: bool) -> str:
    """Return what to do about a malformed line.

    Args:
        line: All of it.
        row: Its number in the file, from 0.
        labelled: Whether rows must have a label.
    """
    features = len(DENSE_NAMES) + len(SPARSE_NAMES)
    for separator, name in _OTHER_SEPARATORS.items():
        if _TAB not in line and line.count(separator) + 1 in (features, features + 1):
            return f"Its fields are separated by {name}: put tabs in their place."
    if row == 0 and _NAME.fullmatch(line.split(_TAB)[0]):
        return "It looks like a header: remove it, every line must be a row."
    if row == 0 and labelled and line.count(_TAB) + 1 == features:
        return (
            "It has no label, as in Criteo's test.txt, which cannot be trained on: name train.txt."
        )
    return "Mend or remove that line, or get the file again."


def _message(path: Path, lines_before: int, bad: _Bad, *, labelled: bool, inferred: bool) -> str:
    """Say what is wrong with a line, and what to do.

    Args:
        path: Its file.
        lines_before: Lines of the file before its block.
        bad: The line.
        labelled: Whether rows begin with a label.
        inferred: Whether that is what the first line was taken for.
    """
    names = ((LABEL,) if labelled else ()) + DENSE_NAMES + SPARSE_NAMES
    column = bad.error.column
    name = names[column] if column < len(names) else "beyond the last"
    number = lines_before + bad.index
    # What the first row is taken for matters if it, or a row unlike it, may have lost a field.
    doubtful = number == 0 or bad.line.count(_TAB) + 1 != len(names)
    reason = (
        f" (the first row has {len(names)} fields, so rows are read as "
        f"{'labelled' if labelled else 'unlabelled'})"
    )
    return (
        f"{path}, line {number + 1}, column {column + 1} ({name}): expected {bad.error.expected}, "
        f"got {bad.error.got}{reason if inferred and doubtful else ''}. "
        f"{_remedy(bad.line, number, labelled=labelled)}"
    )


@dataclass(frozen=True, eq=False)
class _Parsed:
    """The lines of a block.

    ``labels``, ``dense``, ``sparse`` and ``rejected`` are those of its ``RawBlock``.
    """

    lines: int
    labels: UInt8Array | None
    dense: Int32Array
    sparse: UInt32Array
    rejected: Counter[Reason]
    examples: list[_Bad]


def _parse(buffer: bytearray, labelled: bool, *, first_only: bool) -> _Parsed:
    """Parse whole lines, some at a time.

    Args:
        buffer: ``_MARGIN`` bytes, the last a newline, and the lines.
        labelled: Whether rows begin with a label.
        first_only: Stop at the first malformed line: the rows are of no use then.
    """
    if b"\r" in buffer:
        buffer = buffer.replace(b"\r\n", b"\n")
    text = np.frombuffer(buffer, np.uint8)
    pieces: list[_Parsed] = []
    examples: list[_Bad] = []
    lines = 0
    end = _MARGIN
    while end < len(buffer) and not (first_only and examples):
        begin, goal = end, end + PIECE_BYTES
        end = (buffer.rfind(b"\n", begin, goal) + 1) or (buffer.index(b"\n", goal) + 1)
        piece = _parse_piece(text[begin - _MARGIN : end], labelled, first_only=first_only)
        examples += [_Bad(lines + bad.index, bad.line, bad.error) for bad in piece.examples]
        lines += piece.lines
        pieces.append(piece)
    labels = [piece.labels for piece in pieces if piece.labels is not None]
    return _Parsed(
        lines,
        np.concatenate(labels) if labelled else None,
        np.concatenate([piece.dense for piece in pieces]),
        np.concatenate([piece.sparse for piece in pieces]),
        sum((piece.rejected for piece in pieces), Counter()),
        _first_of_each_reason(examples),
    )


def _first_of_each_reason(bad_lines: Iterable[_Bad]) -> list[_Bad]:
    """Return the first lines, up to ``EXAMPLES`` of each reason."""
    seen: Counter[Reason] = Counter()
    first = []
    for bad in bad_lines:
        seen[bad.error.reason] += 1
        if seen[bad.error.reason] <= EXAMPLES:
            first.append(bad)
    return first


def _parse_piece(text: UInt8Array, labelled: bool, *, first_only: bool) -> _Parsed:
    """Parse whole lines at once, after ``_MARGIN`` bytes of which only the last counts."""
    lines, row_lines, begins, ends = _find_fields(text, _FEATURES + labelled)
    lengths = ends - begins - 1
    valid = np.ones(len(row_lines), np.bool_)
    labels = None
    if labelled:
        labels = text[ends[:, 0] - 1] - np.uint8(ord("0"))
        valid &= (lengths[:, 0] == 1) & (labels < 2)
    integers, ids = slice(int(labelled), -len(SPARSE_NAMES)), slice(-len(SPARSE_NAMES), None)
    dense = _parse_integers(text, ends[:, integers], lengths[:, integers], valid)
    sparse = _parse_ids(text, ends[:, ids], lengths[:, ids], valid)
    rejected: Counter[Reason] = Counter()
    examples: list[_Bad] = []
    if len(row_lines) < lines or not valid.all():
        newlines = np.flatnonzero(text == ord("\n"))[-lines - 1 :]
        rejected, misshapen = _find_misshapen(newlines, row_lines)
        rows = {int(row_lines[row]): row for row in np.flatnonzero(~valid)}
        for index in sorted([*misshapen, *rows]):
            line = text[newlines[index] + 1 : newlines[index + 1]].tobytes()
            try:
                label, integer_values, id_values = _parse_line(line, labelled)
            except _BadFieldError as error:
                rejected[error.reason] += index in rows  # the others are counted
                examples.append(_Bad(index, line, error))
                if first_only:
                    break
            else:
                row = rows[index]
                dense[row], sparse[row], valid[row] = integer_values, id_values, True
                if labels is not None:
                    labels[row] = label
    if not valid.all():
        dense, sparse = dense[valid], sparse[valid]
        labels = labels[valid] if labels is not None else None
    return _Parsed(lines, labels, dense, sparse, rejected, _first_of_each_reason(examples))


def _find_misshapen(newlines: IntpArray, row_lines: IntpArray) -> tuple[Counter[Reason], list[int]]:
    """Count the lines of another number of fields than rows have, of which there may be millions.

    Args:
        newlines: Offsets of the line ends, and of the one before the first line.
        row_lines: Which lines have as many fields as rows.

    Returns:
        How many there are by reason, and the first of each.
    """
    is_misshapen = np.ones(len(newlines) - 1, np.bool_)
    is_misshapen[row_lines] = False
    lines = np.flatnonzero(is_misshapen)
    lengths = newlines[lines + 1] - newlines[lines] - 1
    is_long, is_blank = lengths > MAX_LINE_BYTES, lengths == 0
    counts: Counter[Reason] = Counter()
    examples: list[int] = []
    reasons: tuple[tuple[Reason, BoolArray], ...] = (
        ("too long", is_long),
        ("blank", is_blank),
        ("fields", ~is_long & ~is_blank),
    )
    for reason, which in reasons:
        if which.any():
            counts[reason] = int(np.count_nonzero(which))
            examples += lines[which][:EXAMPLES].tolist()
    return counts, examples


def _find_fields(text: UInt8Array, width: int) -> tuple[int, IntpArray, IntpArray, IntpArray]:
    """Find the fields of the lines that have as many as a row.

    Args:
        text: A piece.
        width: Fields of a row.

    Returns:
        How many lines there are; which of them these are, (n,); and the offsets of the separators
        before and after each field, (n, width).
    """
    body = text[_MARGIN - 1 :]
    separators = np.flatnonzero((body == ord("\t")) | (body == ord("\n"))) + (_MARGIN - 1)
    begins, ends = separators[:-1], separators[1:]
    lines = int(np.count_nonzero(body == ord("\n"))) - 1
    row_lines = np.arange(lines)
    if len(ends) != lines * width or (text[ends[width - 1 :: width]] != ord("\n")).any():
        fields = np.diff(np.flatnonzero(text[ends] == ord("\n")), prepend=-1)
        row_lines = np.flatnonzero(fields == width)
        kept = np.repeat(fields == width, fields)
        begins, ends = begins[kept], ends[kept]
    return lines, row_lines, begins.reshape(-1, width), ends.reshape(-1, width)


def _words(text: UInt8Array, ends: IntpArray) -> UInt64Array:
    """Return the 8 bytes before each offset as one number, the first byte the least significant."""
    words = np.ndarray((len(text) - 7,), "<u8", text, strides=(1,))
    return words[ends - 8]


def _parse_integers(
    text: UInt8Array, ends: IntpArray, lengths: IntpArray, valid: BoolArray
) -> Int32Array:
    """Parse fields of integers.

    Args:
        text: A block.
        ends: (n, 13) offsets of the fields' ends.
        lengths: (n, 13) of the fields.
        valid: (n,) is made False for rows with a field that is malformed, or too long for this.

    Returns:
        (n, 13), missing and negative values 0.
    """
    values, are_digits = _decimals(_words(text, ends), np.minimum(lengths, 8))
    fits = are_digits & (lengths <= 8)
    if not fits.all():
        # What has a sign or more digits, and what is malformed.
        others = np.nonzero(~fits)
        ends, lengths = ends[others], lengths[others]
        negative = (text[ends - lengths] == ord("-")) & (lengths > 0)
        digits = lengths - negative
        low, low_fits = _decimals(_words(text, ends), np.clip(digits, 0, 8))
        high, high_fits = _decimals(_words(text, ends - 8), np.clip(digits - 8, 0, 8))
        value = low + high * np.uint64(10**8)
        values[others] = np.where(negative, 0, value)
        fits[others] = (
            (low_fits & high_fits) & ((digits >= 1) & (digits <= 16)) & (negative | (value < 2**31))
        )
        valid &= fits.all(axis=1)
    return values.astype(np.int32)


def _decimals(words: UInt64Array, lengths: IntpArray) -> tuple[UInt64Array, BoolArray]:
    """Convert the last 0 to 8 characters of words to numbers; tell where all are digits."""
    digits = (words ^ _ZEROS) & _LAST_BYTES[lengths]
    # A byte above 9 has its highest bit set, or gets it when 118 is added.
    valid = ((digits + _ALL_118 | digits) & _ALL_128) == 0
    # Neighbours are joined, the first the more significant: four pairs, and then all at once.
    pairs = digits * np.uint64(10) + (digits >> np.uint64(8))
    values = (pairs & _EVEN_PAIRS) * np.uint64(100 + (10**6 << 32))
    values += (pairs >> np.uint64(16) & _EVEN_PAIRS) * np.uint64(1 + (10**4 << 32))
    values >>= np.uint64(32)
    return values, valid


def _parse_ids(
    text: UInt8Array, ends: IntpArray, lengths: IntpArray, valid: BoolArray
) -> UInt32Array:
    """Parse fields of hexadecimal ids.

    Args:
        text: A block.
        ends: (n, 26) offsets of the fields' ends.
        lengths: (n, 26) of the fields.
        valid: (n,) is made False for rows with a malformed field.

    Returns:
        (n, 26), missing ones 0.
    """
    words = _words(text, ends)
    np.putmask(words, lengths == 0, _ZEROS)
    characters = words.view(np.uint8)
    is_hexadecimal = characters - np.uint8(ord("0")) < 10
    is_hexadecimal |= (characters | np.uint8(0x20)) - np.uint8(ord("a")) < 6
    fits = (lengths == 8) | (lengths == 0)
    if not (is_hexadecimal.all() and fits.all()):
        valid &= is_hexadecimal.all(axis=1) & fits.all(axis=1)
    # Bit 6 tells letters from digits; the low bits of a letter are its value less 9.
    letters = words >> np.uint64(6) & _ALL_1
    digits = (words & _ALL_15) + letters + (letters << np.uint64(3))
    # Neighbours are joined in the low byte of each pair. These bytes are the id, the first the
    # most significant.
    pairs = digits << np.uint64(4) | digits >> np.uint64(8)
    values: UInt32Array = pairs.view(np.uint16).astype(np.uint8).view(">u4").astype(np.uint32)
    return values


@dataclass(frozen=True, eq=False)
class _Bad:
    """A malformed line; ``index`` counts within its block."""

    index: int
    line: bytes
    error: _BadFieldError


class _BadFieldError(Exception):
    """A field that is not as it should be; ``column`` counts from 0."""

    def __init__(self, reason: Reason, column: int, expected: str, got: str) -> None:
        super().__init__(expected)
        self.reason = reason
        self.column = column
        self.expected = expected
        self.got = got


def _parse_line(line: bytes, labelled: bool) -> tuple[int, list[int], list[int]]:
    """Parse a line without its line end, as it is defined what a row is.

    Returns:
        The label (0 where there is none), 13 integers and 26 values.

    Raises:
        _BadFieldError: It is no row.
    """
    if len(line) > MAX_LINE_BYTES:
        raise _BadFieldError(
            "too long", 0, f"a line of at most {MAX_LINE_BYTES} bytes", _shown(line)
        )
    width = _FEATURES + labelled
    fields = line.split(_TAB)
    if len(fields) != width:
        expected = f"{width} tab-separated fields"
        if not line:
            raise _BadFieldError("blank", 0, expected, "a blank line")
        column = min(len(fields), width)  # the first that is missing or too many
        raise _BadFieldError("fields", column, expected, f"{len(fields)}: {_shown(line)}")
    label = 0
    if labelled:
        if fields[0] not in (b"0", b"1"):
            raise _BadFieldError("label", 0, "a label, 0 or 1", _shown(fields[0]))
        label = int(fields[0])
    numbers = width - len(SPARSE_NAMES)
    integers, ids = [0] * len(DENSE_NAMES), [0] * len(SPARSE_NAMES)
    for index, field in enumerate(fields[labelled:numbers]):
        if field:
            integers[index] = _parse_integer(field, labelled + index)
    for index, field in enumerate(fields[numbers:]):
        if not field:
            continue
        if not _ID.fullmatch(field):
            raise _BadFieldError(
                "id", numbers + index, "8 hexadecimal digits or nothing", _shown(field)
            )
        ids[index] = int(field, 16)
    return label, integers, ids


def _parse_integer(field: bytes, column: int) -> int:
    """Convert an integer; a negative one is 0."""
    if not _INTEGER.fullmatch(field):
        raise _BadFieldError("integer", column, "an integer or nothing", _shown(field))
    digits = field.lstrip(b"-").lstrip(b"0")
    # Python refuses to convert thousands of digits, and 64 bits never need more than 19.
    value = int(digits or b"0") if len(digits) < 20 else 2**64
    if field.startswith(b"-"):
        if value > 2**63:
            raise _BadFieldError("integer", column, "an integer of 64 bits", _shown(field))
        return 0
    if value >= 2**31:
        expected = "an integer of at most 2147483647 (32 bits)"
        raise _BadFieldError("integer", column, expected, _shown(field))
    return value


def _shown(field: bytes) -> str:
    """Return a field as it may stand in a message."""
    shown = repr(field)[1:]
    return shown if len(shown) <= 42 else shown[:40] + "…"
