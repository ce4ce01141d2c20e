"""Arrow files as ours are: record batches that are not compressed, and no dictionaries.

A compressed buffer begins with the size it claims to unpack to, for which Arrow takes memory
before it looks further: some bytes could ask for all there is. Arrow's readers do not tell whether
a batch is compressed, but its description does, a FlatBuffer whose layout the Arrow columnar format
fixes (Message.fbs, File.fbs).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from dlrm.files import environment_faults

_MAGIC = b"ARROW1"
_CONTINUED = 0xFFFFFFFF
"""Begins a message since format 0.15."""
_BLOCK = struct.Struct("<qi4xq")
"""Of the footer: where a message begins, the bytes of its description, those of its body."""

# Slots of tables.
_FOOTER_DICTIONARIES, _FOOTER_RECORD_BATCHES = 2, 3
_MESSAGE_HEADER = 2
_RECORD_BATCH_COMPRESSION = 3


@contextmanager
def open_arrow(path: Path, *, mapped: bool = False) -> Iterator[Any]:
    """Open an Arrow file; as a context it gives a ``pyarrow.ipc.RecordBatchFileReader``.

    Args:
        path: The file.
        mapped: Map it into memory, which processes share and which is not read before it is looked
            at; the file must not change. What is made of its batches keeps it mapped.

    Raises:
        pyarrow.ArrowInvalid: The file is damaged, or holds what none of ours does.
        EnvironmentFaultError: The disk fails.
        OSError: It cannot be read for another reason.
    """
    with environment_faults(f"read {path}"), _opened(path, mapped=mapped) as file:
        try:
            _refuse_compressed(file)
        except (struct.error, ValueError) as error:  # pa.ArrowInvalid is a ValueError too
            raise pa.ArrowInvalid(str(error)) from error
        yield pa.ipc.open_file(file)


def to_numpy(array: pa.Array) -> npt.NDArray[Any]:
    """Return the numbers of an array without nulls, as they lie: they cannot be written to.

    Arrow's own ``to_numpy`` imports pandas where it is installed, which takes half a second.
    """
    numbers: npt.NDArray[Any] = np.from_dlpack(array)
    return numbers


def to_arrow(array: npt.NDArray[Any]) -> pa.Array:
    """Return the numbers of a contiguous array, as they lie, likewise."""
    kind = pa.from_numpy_dtype(array.dtype)
    return pa.Array.from_buffers(kind, len(array), [None, pa.py_buffer(array)])


def _opened(path: Path, *, mapped: bool) -> Any:
    return pa.memory_map(str(path)) if mapped else pa.OSFile(str(path))


def _refuse_compressed(file: Any) -> None:
    size = file.size()
    tail = file.read_at(10, max(0, size - 10))
    length = int.from_bytes(tail[:4], "little")
    if tail[4:] != _MAGIC or length > size - 10:
        raise ValueError("it is not an Arrow file, or was cut off")
    footer = _Table.root(file.read_at(length, size - 10 - length))
    if footer.vector(_FOOTER_DICTIONARIES, _BLOCK):
        raise ValueError("it has dictionaries")
    for offset, description, _ in footer.vector(_FOOTER_RECORD_BATCHES, _BLOCK):
        if not 0 <= offset <= offset + description <= size:
            raise ValueError("a record batch lies outside the file")
        encoded = file.read_at(description, offset)
        if struct.unpack_from("<I", encoded)[0] != _CONTINUED:
            raise ValueError("it is of a version of Arrow before 0.15")
        batch = _Table.root(encoded[8:]).table(_MESSAGE_HEADER)
        if batch is None or batch.has(_RECORD_BATCH_COMPRESSION):
            raise ValueError("a record batch is compressed")


class _Table:
    """A table of a FlatBuffer; whatever leads outside the bytes raises ``struct.error``."""

    def __init__(self, content: bytes, place: int) -> None:
        self._content = content
        self._place = place
        self._slots = place - self._number("<i", place)

    @staticmethod
    def root(content: bytes) -> _Table:
        return _Table(content, struct.unpack_from("<I", content)[0])

    def has(self, slot: int) -> bool:
        return self._field(slot) is not None

    def table(self, slot: int) -> _Table | None:
        field = self._field(slot)
        return None if field is None else _Table(self._content, self._target(field))

    def vector(self, slot: int, of: struct.Struct) -> list[tuple[int, ...]]:
        field = self._field(slot)
        if field is None:
            return []
        start = self._target(field)
        end = start + 4 + of.size * self._number("<I", start)
        if end > len(self._content):  # before a list is made of so many
            raise ValueError("its footer is damaged")
        return list(of.iter_unpack(self._content[start + 4 : end]))

    def _field(self, slot: int) -> int | None:
        entry = 4 + 2 * slot
        if entry >= self._number("<H", self._slots):
            return None
        offset = self._number("<H", self._slots + entry)
        return self._place + offset if offset else None

    def _target(self, field: int) -> int:
        return field + self._number("<I", field)

    def _number(self, kind: str, place: int) -> int:
        if place < 0:  # which would count from the end
            raise struct.error("its description is damaged")
        number: int = struct.unpack_from(kind, self._content, place)[0]
        return number
