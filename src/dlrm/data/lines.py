"""A file of text, plain or packed with gzip, as blocks of whole lines in bounded memory.

Where a block ends follows from where it begins, the text and the block size alone: it is as many
whole lines as fit. To read on from the end of a block gives the blocks of an uninterrupted reading.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from dlrm.errors import UserError

_CHUNK_BYTES = 1 << 20
GZIP = b"\x1f\x8b"
"""What a file that is packed with gzip begins with."""
_OTHERS = {
    b"PK\x03\x04": "zip",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
}
_MAGIC_BYTES = max(map(len, _OTHERS))

Observer = Callable[[bytes], None]


@dataclass(frozen=True, eq=False)
class LineBlock:
    """Consecutive lines.

    Attributes:
        buffer: ``margin`` bytes, the last of them a newline, then the lines, each with its newline.
        end: The offset in the text, unpacked, just after them.
        is_terminated: Whether the last line has a line end in the file; here it always has one.
    """

    buffer: bytearray
    end: int
    is_terminated: bool


def read_lines(
    path: Path,
    *,
    margin: int,
    block_bytes: int,
    max_line_bytes: int,
    offset: int = 0,
    skip_long: bool = False,
    observe: Observer | None = None,
    file: IO[bytes] | None = None,
) -> Iterator[LineBlock]:
    """Read a file as blocks of whole lines, in order.

    Args:
        path: Of text, or of text packed with gzip (in one or several members), whatever its name.
        margin: Bytes to leave before the lines of a block; at least one.
        block_bytes: Bytes of a block; a single line may be longer.
        max_line_bytes: What a line may hold besides its line end. A longer one that does not fit
            into a block is given cut off, but longer than this.
        offset: Where to begin in the text.
        skip_long: Read on after such a line; otherwise it is the last.
        observe: Called with every run of bytes as they are in the file, packed or not, in order
            from the file's beginning, even if ``offset`` is not 0.
        file: The file, opened, in the place of ``path``, which then is its name in messages.

    Raises:
        UserError: The file is missing, packed otherwise, ends before ``offset``, or is a gzip that
            is damaged or cut short.
        OSError: It cannot be read.
    """
    with _open(path) if file is None else nullcontext(file) as opened:
        read = _open_text(path, opened, offset, observe)
        longest = max_line_bytes + len(b"\r\n")
        rest = b""  # the beginning of a line
        while True:
            buffer = bytearray(margin - 1) + b"\n" + rest
            missing = block_bytes - len(rest)
            while True:
                more = read(missing)
                buffer += more
                cut = buffer.rfind(b"\n", margin) + 1
                if cut or len(more) < missing or len(buffer) - margin >= longest:
                    break
                missing = block_bytes
            if cut:
                rest = bytes(memoryview(buffer)[cut:])
                del buffer[cut:]
                offset += cut - margin
                yield LineBlock(buffer, offset, is_terminated=True)
                continue
            if len(buffer) == margin:
                return
            # A line without an end: it is the file's last, or it is too long.
            offset += len(buffer) - margin
            is_terminated = False
            if len(more) == missing and skip_long:
                skipped, rest, is_terminated = _skip_line(read, block_bytes)
                offset += skipped
            del buffer[margin + longest :]
            yield LineBlock(buffer + b"\n", offset, is_terminated)
            if not is_terminated:
                return


def _skip_line(read: Callable[[int], bytes], step: int) -> tuple[int, bytes, bool]:
    """Read on to the next newline, in constant memory.

    Returns:
        How many bytes there were, the newline included; what was read beyond it; and whether there
        was a newline.
    """
    skipped = 0
    while more := read(step):
        if cut := more.find(b"\n") + 1:
            return skipped + cut, more[cut:], True
        skipped += len(more)
    return skipped, b"", False


def _open(path: Path) -> IO[bytes]:
    try:
        return open(path, "rb", buffering=0)
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{path} does not exist. Check the path.") from None
    except IsADirectoryError:
        raise UserError(f"{path} is a folder. Name the file of raw rows.") from None


def _open_text(
    path: Path, file: IO[bytes], offset: int, observe: Observer | None
) -> Callable[[int], bytes]:
    """Return a function that reads so many bytes of the text, fewer only at its end."""
    source = _Source(file, observe)
    for known, packer in _OTHERS.items():
        if source.magic.startswith(known):
            raise UserError(
                f"{path}, line 1, column 1: expected tab-separated text, plain or packed with "
                f"gzip, got a file packed with {packer}. Unpack it first."
            )
    is_packed = source.magic.startswith(GZIP)
    read = _Gzip(path, source).read if is_packed else source.read
    position = 0
    if not is_packed and observe is None and file.seekable():
        position = source.seek(offset)
    while position < offset:
        skipped = len(read(min(offset - position, _CHUNK_BYTES)))
        if not skipped:
            raise UserError(
                f"{path} has {position} bytes of text, and was to be read on from byte {offset}. "
                "It was cut short or replaced: get the same file again, or start over."
            )
        position += skipped
    return read


class _Source:
    """A file's bytes as they are.

    Attributes:
        magic: The first bytes. They are read like all others nevertheless.
        position: Of what is read next.
    """

    def __init__(self, file: IO[bytes], observe: Observer | None) -> None:
        self._file = file
        self._observe = observe
        self._ahead = b""
        self.position = 0
        self.magic = self._ahead = self.read(_MAGIC_BYTES)
        self.position = 0

    def seek(self, offset: int) -> int:
        """Go to an offset, or to the end if that comes before; return where that is."""
        self._ahead = b""
        self.position = self._file.seek(min(offset, self._file.seek(0, os.SEEK_END)))
        return self.position

    def read(self, size: int) -> bytes:
        """Return so many bytes, fewer only at the end: a pipe is asked until there are enough."""
        parts = [self._ahead[:size]]
        self._ahead = self._ahead[size:]
        missing = size - len(parts[0])
        while missing and (part := self._file.read(missing)):
            if self._observe is not None:
                self._observe(part)
            parts.append(part)
            missing -= len(part)
        self.position += size - missing
        return b"".join(parts)


class _Gzip:
    """What a source unpacks to."""

    def __init__(self, path: Path, source: _Source) -> None:
        self._path = path
        self._source = source
        self._packed = b""
        self._member: zlib._Decompress | None = None

    def read(self, size: int) -> bytes:
        """Return so many bytes, fewer only at the end.

        Raises:
            UserError: The file is damaged or cut short.
        """
        parts = []
        missing = size
        while missing:
            if self._member is None:
                self._packed = self._packed.lstrip(b"\0")  # what fills a block of a tape or disk
            if not self._packed:
                self._packed = self._source.read(_CHUNK_BYTES)
                if self._packed:
                    continue
                if self._member is None:
                    break
                raise UserError(
                    f"{self._path} is cut short at byte {self._source.position}, before the end "
                    "of its gzip data. Get the file again."
                )
            if self._member is None:
                self._member = zlib.decompressobj(wbits=zlib.MAX_WBITS | 16)  # 16: gzip's header
            try:
                part = self._member.decompress(self._packed, missing)
            except zlib.error as error:
                raise UserError(
                    f"{self._path} is damaged near byte {self._source.position}: its gzip data "
                    f"cannot be unpacked ({error}). Get the file again."
                ) from error
            parts.append(part)
            missing -= len(part)
            if self._member.eof:  # another member may follow
                self._packed = self._member.unused_data
                self._member = None
            else:
                self._packed = self._member.unconsumed_tail
        return b"".join(parts)
