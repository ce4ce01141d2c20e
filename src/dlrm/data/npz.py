"""Arrays of a .npz file, read by runs of rows in bounded memory.

NumPy's own reader makes a whole array at once. A .npz is a zip file of .npy files, stored or
deflated, each of them a header and the array's bytes: row after row, or ("Fortran order", which a
transposed array is saved in) column after column. Of the latter every column is unpacked by a
decompressor of its own, from a copy made where the column begins: all is unpacked twice, and
nothing is kept.
"""

from __future__ import annotations

import io
import math
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from dlrm.errors import EnvironmentFaultError, UserError
from dlrm.files import environment_faults

_CHUNK_BYTES = 64 << 10
_LOCAL_HEADER_BYTES = 30
_ENCRYPTED = 1
_LARGEST_HEADER = 12 + 10_000
_DEFLATED_TO = 1032
"""What deflate makes of a byte at most."""


@dataclass(frozen=True)
class NpzArray:
    """An array in a .npz file.

    Attributes:
        path: The file.
        name: Of the array.
        shape: Of the array.
        dtype: Of its elements.
        is_by_column: Whether it is stored column after column.
    """

    path: Path
    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    is_by_column: bool
    _member: _Member
    _header_bytes: int

    def read_rows(self, step: int, first_row: int = 0) -> Iterator[npt.NDArray[Any]]:
        """Read runs of ``step`` rows, (n, …), the last one shorter.

        Args:
            step: Rows of a run.
            first_row: The first to read; the ones before it are unpacked all the same.

        Raises:
            UserError: The file is damaged, which may be noticed only at the end.
            EnvironmentFaultError: It cannot be read.
        """
        with _damage(self.path, self.name), open(self.path, "rb") as file:
            data = _Data(file, self._member)
            data.skip(self._header_bytes)
            rows = self.shape[0]
            row_bytes = self.dtype.itemsize * math.prod(self.shape[1:])
            columns = [data]
            if self.is_by_column:
                row_bytes = self.dtype.itemsize
                columns = []
                for _ in range(self.shape[1]):
                    data.skip(first_row * row_bytes)
                    columns.append(data.copy())
                    data.skip((rows - first_row) * row_bytes)
                data.check_end()
            else:
                data.skip(first_row * row_bytes)
            for first in range(first_row, rows, step):
                count = min(step, rows - first)
                runs = [
                    np.frombuffer(column.read(count * row_bytes), self.dtype) for column in columns
                ]
                if self.is_by_column:
                    run = np.empty((count, len(runs)), self.dtype)
                    for index, values in enumerate(runs):
                        run[:, index] = values
                    yield run
                else:
                    yield runs[0].reshape(count, *self.shape[1:])
            if not self.is_by_column:
                data.check_end()

    def read(self) -> npt.NDArray[Any]:
        """Read all of it, as ``read_rows`` does."""
        return np.concatenate(
            [np.empty((0, *self.shape[1:]), self.dtype), *self.read_rows(1 << 18)]
        )


def open_npz(path: Path) -> dict[str, NpzArray]:
    """Read what arrays a .npz file holds.

    Raises:
        UserError: It is missing, damaged or no .npz file.
        EnvironmentFaultError: It cannot be read.
    """
    arrays = {}
    with _damage(path), open(path, "rb") as file:
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
        for entry in entries:
            name = entry.filename.removesuffix(".npy")
            with _damage(path, name):
                arrays[name] = _open_array(path, file, name, entry)
    return arrays


def _open_array(path: Path, file: IO[bytes], name: str, entry: zipfile.ZipInfo) -> NpzArray:
    if entry.flag_bits & _ENCRYPTED or entry.compress_type not in (
        zipfile.ZIP_STORED,
        zipfile.ZIP_DEFLATED,
    ):
        raise ValueError("it is encrypted, or packed in a way that NumPy does not use")
    # The directory at the file's end does not tell where the data begin: their own header does.
    file.seek(entry.header_offset)
    header = file.read(_LOCAL_HEADER_BYTES)
    if len(header) < _LOCAL_HEADER_BYTES or not header.startswith(b"PK\3\4"):
        raise ValueError("there is no header where it should begin")
    names = int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
    member = _Member(
        entry.header_offset + _LOCAL_HEADER_BYTES + names,
        entry.compress_size,
        entry.file_size,
        entry.CRC,
        entry.compress_type == zipfile.ZIP_DEFLATED,
    )
    # Before memory is taken for what it claims to hold.
    largest = member.packed_size * (_DEFLATED_TO if member.is_deflated else 1)
    if member.offset + member.packed_size > file.seek(0, 2) or member.size > largest:
        raise ValueError(f"{member.size} bytes cannot be packed in the file's")
    # As much of it as NumPy takes a header to be at most, whatever length it names.
    data = io.BytesIO(_Data(file, member).read(min(member.size, _LARGEST_HEADER)))
    version = np.lib.format.read_magic(data)
    if version == (1, 0):
        shape, is_by_column, dtype = np.lib.format.read_array_header_1_0(data)
    else:
        shape, is_by_column, dtype = np.lib.format.read_array_header_2_0(data)
    if data.tell() + math.prod(shape) * dtype.itemsize != member.size or min(shape, default=0) < 0:
        raise ValueError(f"its {member.size} bytes are not those of the shape {shape}")
    return NpzArray(path, name, shape, dtype, is_by_column and len(shape) > 1, member, data.tell())


@contextmanager
def _damage(path: Path, name: str = "") -> Iterator[None]:
    """Name the file and the array where reading meets something that is not as it should be."""
    what = f"{path}, array {name}" if name else str(path)
    try:
        with environment_faults(f"read {path}"):
            yield
    except (EnvironmentFaultError, UserError, MemoryError):
        raise
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{path} does not exist. Check the path.") from None
    except Exception as error:  # zipfile and NumPy raise many kinds for a damaged file
        raise UserError(
            f"{what} is damaged, or not written by NumPy: {error}. Get the file again, or prepare "
            "from the raw rows instead."
        ) from error


@dataclass(frozen=True)
class _Member:
    """A file in a zip file."""

    offset: int
    packed_size: int
    size: int
    crc: int
    is_deflated: bool


class _Data:
    """The unpacked bytes of a member, in order.

    Attributes:
        position: How many were read.
    """

    def __init__(self, file: IO[bytes], member: _Member) -> None:
        self.position = 0
        self._file = file
        self._member = member
        self._taken = 0
        self._packed = b""
        self._inflate = zlib.decompressobj(wbits=-zlib.MAX_WBITS) if member.is_deflated else None
        self._crc = 0

    def copy(self) -> _Data:
        """Return the same place of the same data, from where both go on independently."""
        twin = _Data(self._file, self._member)
        twin.__dict__.update(self.__dict__)
        twin._inflate = self._inflate and self._inflate.copy()
        return twin

    def skip(self, size: int) -> None:
        """Pass over so many bytes."""
        for first in range(0, size, _CHUNK_BYTES):
            self.read(min(_CHUNK_BYTES, size - first))

    def read(self, size: int = 0, /) -> bytes:
        """Return exactly so many bytes."""
        parts = []
        missing = size
        while missing:
            if not self._packed:
                left = self._member.packed_size - self._taken
                self._file.seek(self._member.offset + self._taken)
                self._packed = self._file.read(min(left, _CHUNK_BYTES))
                self._taken += len(self._packed)
            at_end = not self._packed
            if self._inflate:
                # Called even without input: it may have held something back.
                part = self._inflate.decompress(self._packed, missing)
                self._packed = self._inflate.unconsumed_tail
                at_end |= self._inflate.eof
            else:
                part, self._packed = self._packed[:missing], self._packed[missing:]
            if at_end and not part:
                raise ValueError(f"its data end {missing} bytes early")
            self._crc = zlib.crc32(part, self._crc)
            parts.append(part)
            missing -= len(part)
        self.position += size
        return b"".join(parts)

    def check_end(self) -> None:
        """Check that all was read, and unchanged."""
        if self.position != self._member.size or self._crc != self._member.crc:
            raise ValueError("its checksum is wrong")
