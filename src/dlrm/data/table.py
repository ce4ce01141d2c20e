"""Raw rows that come as a table in memory rather than as a file."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from dlrm.data.row_parser import id_remedy, parse_ids, shown
from dlrm.errors import UserError
from dlrm.schema import FeatureSchema

_MISSING = 0  # what a missing value of either kind becomes
_ID_DIGITS = 8
_MISSING_ID = "0" * _ID_DIGITS
_LARGEST_DENSE = 2**31 - 1
_TEXTS = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
_NAME_LENGTH = 40
_MOST_NAMES = 8
"""Of a column's name so many characters are told, and of many columns so many."""


def rows_from_table(
    table: pa.Table | Mapping[str, Any], schema: FeatureSchema, *, first_row: int = 0
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.uint32]]:
    """Take the schema's columns out of a table of raw rows.

    Args:
        table: A table, or columns by name. Dense columns hold integers, sparse ones strings of 8
            hexadecimal digits or integers below 2**32; nulls are missing values. Other columns are
            left alone.
        schema: Names the columns.
        first_row: The number of the first row, for messages.

    Returns:
        Dense values, (n, number of dense features), missing and negative ones 0, and sparse
        values, (n, F), missing ones 0.

    Raises:
        UserError: A column is missing, or a value is none of the above; it names the row.
    """
    if not isinstance(table, pa.Table):
        try:
            table = pa.table(dict(table))
        except (TypeError, ValueError, OverflowError, pa.ArrowException) as error:
            raise UserError(
                f"rows must come as a pyarrow Table or as columns of equal length by name: {error}."
            ) from error
    if lacks := lacking(schema.feature_names, table.column_names):
        raise UserError(f"the table {lacks}")
    dense = np.empty((table.num_rows, len(schema.dense)), np.int32)
    for column, dense_feature in enumerate(schema.dense):
        integers = _integers(table.column(dense_feature.name), dense_feature.name)
        too_large = integers > _LARGEST_DENSE
        _refuse(too_large, integers, dense_feature.name, f"at most {_LARGEST_DENSE}", first_row)
        dense[:, column] = np.maximum(integers, 0)
    values = np.empty((table.num_rows, len(schema.sparse)), np.uint32)
    for column, feature in enumerate(schema.sparse):
        chunks = table.column(feature.name)
        if pa.types.is_dictionary(chunks.type):
            chunks = chunks.cast(chunks.type.value_type)
        if any(is_text(chunks.type) for is_text in _TEXTS):
            values[:, column] = _hexadecimal(chunks, feature.name, first_row)
        else:
            integers = _integers(
                chunks, feature.name, "strings of 8 hexadecimal digits, or integers"
            )
            outside = (integers < 0) | (integers >= 2**32)
            _refuse(outside, integers, feature.name, "0 … 2**32-1", first_row)
            values[:, column] = integers
    return dense, values


def lacking(
    names: Sequence[str], present: Sequence[str], how: str = "with null where a value is missing"
) -> str:
    """Say which columns are lacking, and what to do; empty: none is.

    Args:
        names: Of the columns that are needed.
        present: Of those that there are.
        how: To add one.
    """
    there = set(present)
    missing = [name for name in names if name not in there]
    if not missing:
        return ""
    by_key = {_key(name): name for name in present if name not in names}
    renamed = [
        f"{_short(by_key.pop(_key(name)))} to {_short(name)}"
        for name in missing
        if _key(name) in by_key
    ]
    counted = _counted_from_one(names, present)
    others = len(missing) - len(renamed)
    it = "it" if len(missing) == 1 else "them"
    if counted:
        remedy = (
            "They are counted from 1 there, and from 0 by the model: rename "
            f"{_few(f'{old} to {new}' for old, new in counted)}."
        )
    elif not renamed:
        remedy = f"Add {it}, {how}."
    elif others:
        remedy = f"Rename {_few(renamed)}, and add the other{'s' * (others > 1)}, {how}."
    else:
        remedy = f"Rename {_few(renamed)}; or add {it}, {how}."
    has = f"it has {_few(map(_short, present))}" if present else "it has none"
    return (
        f"lacks the column{'s' * (len(missing) > 1)} {_few(map(_short, missing))} of the model's "
        f"{len(names)}; {has}. {remedy}"
    )


def _counted_from_one(names: Sequence[str], present: Sequence[str]) -> list[tuple[str, str]]:
    """Match names that are numbered from 0 with columns that are from 1, as Criteo's I1 … C26.

    Returns:
        Each column with its name; nothing if they cannot be matched without doubt.
    """
    wanted, there = _numbered(names), _numbered(present)
    sizes = [len(numbers) for numbers in wanted.values()]
    matched: list[tuple[str, str]] = []
    for prefix, numbers in wanted.items():
        size = len(numbers)
        alike = [
            other
            for other, found in there.items()
            if found == set(range(1, size + 1)) and (other == prefix or sizes.count(size) == 1)
        ]
        if numbers != set(range(size)) or len(alike) != 1:
            return []
        matched += [(f"{alike[0]}{number + 1}", f"{prefix}{number}") for number in range(size)]
    return matched if len(matched) == len(names) else []


def _numbered(names: Sequence[str]) -> dict[str, set[int]]:
    """Return the numbers that names end with, by what is before."""
    found: dict[str, set[int]] = {}
    for name in names:
        if parts := re.fullmatch(r"(.*?)(0|[1-9][0-9]{0,5})", name):
            found.setdefault(parts[1], set()).add(int(parts[2]))
    return found


def _key(name: str) -> str:
    """Return what names have in common that are easily taken for each other."""
    return re.sub(r"[\W_]", "", name).casefold()


def _short(name: str) -> str:
    return name if len(name) <= _NAME_LENGTH else f"{name[:_NAME_LENGTH]}…"


def _few(told: Iterable[str]) -> str:
    """List what is told, of much the first and the last."""
    told = list(told)
    if len(told) <= _MOST_NAMES:
        return ", ".join(told)
    return f"{', '.join(told[: _MOST_NAMES - 2])} … {told[-1]} ({len(told)} in all)"


def _integers(
    chunks: pa.ChunkedArray, name: str, expected: str = "integers"
) -> npt.NDArray[np.int64]:
    kind = chunks.type
    try:
        if pa.types.is_floating(kind):  # pandas writes integers with gaps so, and gaps maybe as NaN
            chunks = pc.if_else(pc.is_nan(chunks), pa.scalar(None, kind), chunks)
        elif not (pa.types.is_integer(kind) or pa.types.is_null(kind)):
            raise pa.ArrowInvalid("that is no type of integers")
        integers = chunks.cast(pa.int64())
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise UserError(
            f"column {name} must hold {expected}, got {kind}: {error}. Convert it."
        ) from error
    filled: npt.NDArray[np.int64] = pc.fill_null(integers, _MISSING).to_numpy()
    return filled


def _hexadecimal(chunks: pa.ChunkedArray, name: str, first_row: int) -> npt.NDArray[np.uint32]:
    strings = pc.fill_null(chunks.cast(pa.large_string()), _MISSING_ID).combine_chunks()
    values = np.zeros(len(strings), np.uint32)
    bad = pc.binary_length(strings).to_numpy() != _ID_DIGITS
    if not bad.any():
        offsets, content = strings.buffers()[1:]
        start = int(np.frombuffer(offsets, np.int64)[strings.offset]) if len(strings) else 0
        words = np.frombuffer(content or b"", "<u8", len(strings), start)
        values, good = parse_ids(words)
        bad = ~good
    _refuse(bad, strings, name, "8 hexadecimal digits, or null", first_row)
    return values


def _refuse(
    bad: npt.NDArray[np.bool_],
    values: npt.NDArray[np.int64] | pa.Array,
    name: str,
    expected: str,
    first_row: int,
) -> None:
    if bad.any():
        row = int(np.argmax(bad))
        got = values[row].as_py() if isinstance(values, pa.Array) else values[row].item()
        remedy = id_remedy(got.encode()) if isinstance(got, str) else ""
        raise UserError(
            f"row {first_row + row} of column {name}: expected {expected}, got {shown(got)}. "
            f"{remedy or 'Correct it.'}"
        )
