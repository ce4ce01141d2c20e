"""One block of rows at a time: what a row is, and its parsing.

A row is a line of tab-separated fields: a label (0 or 1; absent where rows have none), integers,
and ids of 8 hexadecimal digits. An integer or id may be empty, which means missing. ``parse_line``
defines it. The native parser (native/criteo.cpp) takes blocks that consist of rows, and the plain
one, with NumPy, all others; what it does not take for a row goes to ``parse_line``, which names its
fault.

The plain parser takes a field as the 8 bytes before its separator, as one number, of which those of
other fields are masked out.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch

from dlrm.ops.library import library

MAX_LINE_BYTES = 1 << 20
"""A longer line is no row, so that a file without line ends is not read into memory whole."""
MARGIN = 16
"""Bytes before the lines of a block: a field's 16 bytes are there even where it is the first."""
EXAMPLES = 10
"""How many bad lines of each reason a block describes; it counts all."""

Reason = Literal["blank", "fields", "label", "integer", "id", "too long"]
"""Why a line is no row: it is blank, has another number of fields, a field that is no label,
integer or id, or is longer than ``MAX_LINE_BYTES``."""

BoolArray = npt.NDArray[np.bool_]
Int32Array = npt.NDArray[np.int32]
Int64Array = npt.NDArray[np.int64]
IntpArray = npt.NDArray[np.intp]
UInt8Array = npt.NDArray[np.uint8]
UInt32Array = npt.NDArray[np.uint32]
UInt64Array = npt.NDArray[np.uint64]

_TAB = b"\t"
_INTEGER = re.compile(rb"-?[0-9]+")
_ID = re.compile(rb"[0-9a-fA-F]{8}")
_LOST_ZEROS = re.compile(rb"[0-9a-fA-F]{4,7}")  # with fewer digits it is hardly an id
_SCIENTIFIC = re.compile(rb"[0-9]+([.,][0-9]+)?[eE][+-]?[0-9]+")
_PREFIXED = re.compile(rb"0[xX][0-9a-fA-F]{8}")
_DECIMAL = re.compile(rb"[0-9]{9,10}")
_MISSING_WORDS = (b"na", b"n/a", b"nan", b"nil", b"none", b"null", b"\\n", b"-", b"?")
_SHOWN = 42
"""Characters of a value that a message shows."""
REMOVE_BLANK = "Remove that line: every line is a row."
PIECE_BYTES = 1 << 20
"""Bytes that the plain parser takes at once: what it makes of them takes some 15 times as many."""
# Words of 8 characters, or of 8 numbers of 8 bits.
_ALL_1 = np.uint64(0x0101010101010101)
_ALL_15, _ALL_118, _ALL_128 = 15 * _ALL_1, 118 * _ALL_1, 128 * _ALL_1
_ZEROS = ord("0") * _ALL_1
_EVEN_PAIRS = np.uint64(0x000000FF000000FF)
_LAST_BYTES = np.array([2**64 - 2 ** (64 - 8 * length) for length in range(9)], np.uint64)
"""What masks all but the last 0 … 8 characters of a word."""


@dataclass(frozen=True)
class Layout:
    """How many fields of each kind a row has, in this order."""

    labelled: bool
    integers: int
    ids: int

    @property
    def width(self) -> int:
        """Fields of a row."""
        return self.labelled + self.integers + self.ids


@dataclass(frozen=True, eq=False)
class ParsedBlock:
    """The n rows among some lines.

    Attributes:
        lines: How many lines there are.
        labels: (n,) uint8 zeros and ones, or None where rows have no label.
        dense: (n, integers) int32; missing and negative values are 0.
        sparse: (n, ids) uint32; missing ones are 0.
        missing: (integers,) in how many rows each integer is missing.
        rejected: How many lines are no rows, by reason.
        examples: The first of them, up to ``EXAMPLES`` of each reason.
    """

    lines: int
    labels: UInt8Array | None
    dense: Int32Array
    sparse: UInt32Array
    missing: Int64Array
    rejected: Counter[Reason]
    examples: list[BadLine]


@dataclass(frozen=True, eq=False)
class BadLine:
    """A line that is no row; ``index`` counts within its block."""

    index: int
    line: bytes
    error: BadFieldError


class BadFieldError(Exception):
    """A field that is not as it should be.

    Args:
        reason: In one word.
        column: Counts from 0.
        expected: What should be there.
        got: What is there.
        remedy: What to do, if that is known of just this fault.
    """

    def __init__(
        self, reason: Reason, column: int, expected: str, got: str, remedy: str = ""
    ) -> None:
        super().__init__(expected)
        self.reason = reason
        self.column = column
        self.expected = expected
        self.got = got
        self.remedy = remedy


def parse_block(buffer: bytearray, layout: Layout, *, first_only: bool) -> ParsedBlock:
    """Parse whole lines.

    Args:
        buffer: ``MARGIN`` bytes, the last a newline, and the lines, each with a newline.
        layout: Of a row.
        first_only: Stop at the first malformed line: the rows are of no use then.
    """
    if b"\r" in buffer:
        buffer = buffer.replace(b"\r\n", b"\n")
    parsed = _parse_natively(buffer, layout) if library().loaded else None
    return parsed or _parse_plainly(buffer, layout, first_only)


def _parse_natively(buffer: bytearray, layout: Layout) -> ParsedBlock | None:
    """Parse lines that are all rows; None if any is not."""
    lines = buffer.count(b"\n") - 1
    if lines * layout.width > len(buffer):  # shorter than any row: blank lines by the million
        return None
    labels = torch.empty(lines, dtype=torch.uint8)
    dense = torch.empty((lines, layout.integers), dtype=torch.int32)
    sparse = torch.empty((lines, layout.ids), dtype=torch.uint32)
    missing = torch.zeros(layout.integers, dtype=torch.int64)
    rows = torch.ops.dlrm.parse_rows(
        torch.frombuffer(buffer, dtype=torch.uint8, offset=MARGIN),
        labels,
        dense,
        sparse,
        missing,
        layout.labelled,
        MAX_LINE_BYTES + 1,  # with its end
    )
    if rows < lines:
        return None
    return ParsedBlock(
        lines,
        labels.numpy() if layout.labelled else None,
        dense.numpy(),
        sparse.numpy(),
        missing.numpy(),
        Counter(),
        [],
    )


def _parse_plainly(buffer: bytearray, layout: Layout, first_only: bool) -> ParsedBlock:
    text = np.frombuffer(buffer, np.uint8)
    pieces: list[ParsedBlock] = []
    examples: list[BadLine] = []
    lines = 0
    end = MARGIN
    while end < len(buffer) and not (first_only and examples):
        begin, goal = end, end + PIECE_BYTES
        end = (buffer.rfind(b"\n", begin, goal) + 1) or (buffer.index(b"\n", goal) + 1)
        piece = _parse_piece(text[begin - MARGIN : end], layout, first_only=first_only)
        examples += [BadLine(lines + bad.index, bad.line, bad.error) for bad in piece.examples]
        lines += piece.lines
        pieces.append(piece)
    labels = [piece.labels for piece in pieces if piece.labels is not None]
    return ParsedBlock(
        lines,
        np.concatenate(labels) if layout.labelled else None,
        np.concatenate([piece.dense for piece in pieces]),
        np.concatenate([piece.sparse for piece in pieces]),
        np.sum([piece.missing for piece in pieces], axis=0),
        sum((piece.rejected for piece in pieces), Counter()),
        _first_of_each_reason(examples),
    )


def _first_of_each_reason(bad_lines: Iterable[BadLine]) -> list[BadLine]:
    """Return the first lines, up to ``EXAMPLES`` of each reason."""
    seen: Counter[Reason] = Counter()
    first = []
    for bad in bad_lines:
        seen[bad.error.reason] += 1
        if seen[bad.error.reason] <= EXAMPLES:
            first.append(bad)
    return first


def _parse_piece(text: UInt8Array, layout: Layout, *, first_only: bool) -> ParsedBlock:
    """Parse whole lines at once, after ``MARGIN`` bytes of which only the last counts."""
    lines, row_lines, begins, ends = _find_fields(text, layout.width)
    lengths = ends - begins - 1
    valid = np.ones(len(row_lines), np.bool_)
    labels = None
    if layout.labelled:
        labels = text[ends[:, 0] - 1] - np.uint8(ord("0"))
        valid &= (lengths[:, 0] == 1) & (labels < 2)
    integers = slice(int(layout.labelled), layout.labelled + layout.integers)
    ids = slice(integers.stop, None)
    dense = _parse_integers(text, ends[:, integers], lengths[:, integers], valid)
    sparse = _parse_ids(text, ends[:, ids], lengths[:, ids], valid)
    rejected: Counter[Reason] = Counter()
    examples: list[BadLine] = []
    if len(row_lines) < lines or not valid.all():
        newlines = np.flatnonzero(text == ord("\n"))[-lines - 1 :]
        rejected, misshapen = _find_misshapen(newlines, row_lines)
        rows = {int(row_lines[row]): row for row in np.flatnonzero(~valid)}
        for index in sorted([*misshapen, *rows]):
            line = text[newlines[index] + 1 : newlines[index + 1]].tobytes()
            try:
                label, integer_values, id_values = parse_line(line, layout)
            except BadFieldError as error:
                rejected[error.reason] += index in rows  # the others are counted
                examples.append(BadLine(index, line, error))
                if first_only:
                    break
            else:
                row = rows[index]
                dense[row], sparse[row], valid[row] = integer_values, id_values, True
                if labels is not None:
                    labels[row] = label
    if not valid.all():
        dense, sparse, lengths = dense[valid], sparse[valid], lengths[valid]
        labels = labels[valid] if labels is not None else None
    missing = (lengths[:, integers] == 0).sum(axis=0)
    first = _first_of_each_reason(examples)
    return ParsedBlock(lines, labels, dense, sparse, missing, rejected, first)


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
    body = text[MARGIN - 1 :]
    separators = np.flatnonzero((body == ord("\t")) | (body == ord("\n"))) + (MARGIN - 1)
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
        ends: (n, k) offsets of the fields' ends.
        lengths: (n, k) of the fields.
        valid: (n,) is made False for rows with a field that is malformed, or too long for this.

    Returns:
        (n, k), missing and negative values 0.
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
        ends: (n, k) offsets of the fields' ends.
        lengths: (n, k) of the fields.
        valid: (n,) is made False for rows with a malformed field.

    Returns:
        (n, k), missing ones 0.
    """
    words = _words(text, ends)
    np.putmask(words, lengths == 0, _ZEROS)
    values, are_digits = parse_ids(words)
    valid &= (are_digits & ((lengths == 8) | (lengths == 0))).all(axis=1)
    return values


def parse_ids(words: UInt64Array) -> tuple[UInt32Array, BoolArray]:
    """Convert ids of 8 characters each.

    Args:
        words: Their characters, the first the least significant.

    Returns:
        Their values, and where all characters are hexadecimal digits, both of the same shape.
    """
    characters = np.ascontiguousarray(words)[..., None].view(np.uint8)
    is_hexadecimal = characters - np.uint8(ord("0")) < 10
    is_hexadecimal |= (characters | np.uint8(0x20)) - np.uint8(ord("a")) < 6
    # Bit 6 tells letters from digits; the low bits of a letter are its value less 9.
    letters = words >> np.uint64(6) & _ALL_1
    digits = (words & _ALL_15) + letters + (letters << np.uint64(3))
    # Neighbours are joined in the low byte of each pair. These bytes are the id, the first the
    # most significant.
    pairs = np.ascontiguousarray(digits << np.uint64(4) | digits >> np.uint64(8))[..., None]
    values = pairs.view(np.uint16).astype(np.uint8).view(">u4")[..., 0].astype(np.uint32)
    are_digits: BoolArray = np.logical_and.reduce(is_hexadecimal, axis=-1)
    return values, are_digits


def parse_line(line: bytes, layout: Layout) -> tuple[int, list[int], list[int]]:
    """Parse a line without its line end, as it is defined what a row is.

    Returns:
        The label (0 where there is none), the integers, and the values of the ids.

    Raises:
        BadFieldError: It is no row.
    """
    if len(line) > MAX_LINE_BYTES:
        raise BadFieldError("too long", 0, f"a line of at most {MAX_LINE_BYTES} bytes", shown(line))
    width = layout.width
    fields = line.split(_TAB)
    if len(fields) != width:
        expected = f"{width} tab-separated fields"
        if not line:
            raise BadFieldError("blank", 0, expected, "a blank line", REMOVE_BLANK)
        column = min(len(fields), width)  # the first that is missing or too many
        raise BadFieldError("fields", column, expected, f"{len(fields)}: {shown(line)}")
    label = 0
    if layout.labelled:
        if fields[0] not in (b"0", b"1"):
            raise BadFieldError("label", 0, "a label, 0 or 1", shown(fields[0]))
        label = int(fields[0])
    numbers = width - layout.ids
    integers, ids = [0] * layout.integers, [0] * layout.ids
    for index, field in enumerate(fields[layout.labelled : numbers]):
        if field:
            integers[index] = parse_integer(field, layout.labelled + index)
    for index, field in enumerate(fields[numbers:]):
        if not field:
            continue
        if not _ID.fullmatch(field):
            raise bad_id(field, numbers + index)
        ids[index] = int(field, 16)
    return label, integers, ids


def parse_integer(field: bytes, column: int) -> int:
    """Convert an integer; a negative one is 0."""
    if not _INTEGER.fullmatch(field):
        raise bad_integer(field, column)
    digits = field.lstrip(b"-").lstrip(b"0")
    # Python refuses to convert thousands of digits, and 64 bits never need more than 19.
    value = int(digits or b"0") if len(digits) < 20 else 2**64
    if field.startswith(b"-"):
        if value > 2**63:
            raise BadFieldError("integer", column, "an integer of 64 bits", shown(field))
        return 0
    if value >= 2**31:
        expected = "an integer of at most 2147483647 (32 bits)"
        raise BadFieldError("integer", column, expected, shown(field))
    return value


def bad_id(field: bytes, column: int) -> BadFieldError:
    """Return what is wrong with a field that is no id."""
    expected = "8 hexadecimal digits or nothing"
    return BadFieldError("id", column, expected, shown(field), id_remedy(field))


def bad_integer(field: bytes, column: int) -> BadFieldError:
    """Return what is wrong with a field that is no integer."""
    expected = "an integer or nothing"
    return BadFieldError("integer", column, expected, shown(field), _field_remedy(field))


def id_remedy(field: bytes) -> str:
    """Return what to do about something that is no id; empty: that is not known.

    Spreadsheets, and libraries that guess types, take an id of digits alone for a number.
    """
    text = field.decode("ascii", errors="replace")
    if _LOST_ZEROS.fullmatch(field) and _SCIENTIFIC.fullmatch(field):
        return (
            f"Leading zeros are lost, and it is {text.zfill(8)}; or a spreadsheet took the id for "
            "a number, and digits are lost: get the file again, and keep its columns as text."
        )
    if _LOST_ZEROS.fullmatch(field):
        return (
            f"Leading zeros are lost, as in a spreadsheet that took ids for numbers: write "
            f"{text.zfill(8)}, or get the file again and keep its columns as text."
        )
    if _SCIENTIFIC.fullmatch(field):
        return (
            "A spreadsheet took the id for a number, and digits are lost: get the file again, and "
            "keep its columns as text."
        )
    if _PREFIXED.fullmatch(field):
        return "Leave 0x away."
    if _DECIMAL.fullmatch(field) and int(field) < 2**32:
        return f"If it is a number in decimal digits, write {int(field):08x}."
    return _field_remedy(field)


def _field_remedy(field: bytes) -> str:
    if field.strip().lower() in _MISSING_WORDS:
        return "Leave it empty where a value is missing."
    if field.strip() != field:
        return "Remove the spaces around it."
    return ""


def shown(value: bytes | str | int) -> str:
    """Return a value as it may stand in a message."""
    text = repr(value)[1:] if isinstance(value, bytes) else repr(value)
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 2]}…"
