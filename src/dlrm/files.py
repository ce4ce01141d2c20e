"""Files that are complete or absent: written under a temporary name, flushed, then renamed."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import re
import shutil
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, TypeVar

import filelock
import msgspec

from dlrm.errors import EnvironmentFaultError, UserError

Buffer = bytes | memoryview
T = TypeVar("T")

# Faults of the machine rather than of the user's input, and what helps.
_REMEDIES = {
    errno.ENOSPC: "Free some space, or choose another place.",
    errno.EDQUOT: "Free some of your quota, or choose another place.",
    errno.EFBIG: "Raise the limit of file sizes, or choose another place.",
    errno.EROFS: "Choose a place that can be written to.",
    errno.EACCES: "Ask for access, or choose another place.",
    errno.EPERM: "Ask for permission, or choose another place.",
    errno.ENAMETOOLONG: "Choose a shorter name.",
    errno.EIO: "The disk may be failing: choose another place.",
}


@contextmanager
def environment_faults(action: str) -> Iterator[None]:
    """Turn a full, read-only or failing disk into an EnvironmentFaultError naming the action."""
    try:
        yield
    except OSError as error:
        if error.errno not in _REMEDIES:
            raise
        where = f" ({error.filename})" if error.filename else ""
        raise EnvironmentFaultError(
            f"cannot {action}: {error.strerror}{where}. {_REMEDIES[error.errno]}"
        ) from error


def free_bytes(target: Path) -> int:
    """Return the free space of the disk on which something will lie, whose folder may not exist.

    Raises:
        EnvironmentFaultError: The disk fails.
    """
    folder = target.absolute().parent
    while not folder.is_dir() and folder != folder.parent:
        folder = folder.parent
    with environment_faults(f"write to {folder}"):
        return shutil.disk_usage(folder).free


def refuse_small_disk(target: Path, needed: int) -> None:
    """Refuse to begin what a disk has no room for.

    Args:
        target: What is to be made.
        needed: About how many bytes it takes meanwhile.

    Raises:
        EnvironmentFaultError: Fewer are free; or the disk fails.
    """
    free = free_bytes(target)
    if free < needed:
        raise EnvironmentFaultError(
            f"{target} needs about {size_text(needed)} of disk while it is made, and "
            f"{size_text(free)} are free there. Free some space, or choose another place."
        )


def size_text(size: int) -> str:
    """Return a number of bytes for a reader: 15.7 kB, 3.1 MB, 7.2 GB."""
    for unit, length in (("GB", 1e9), ("MB", 1e6)):
        if size >= length:
            return f"{size / length:.1f} {unit}"
    return f"{size / 1e3:.1f} kB"


def flush_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def atomic_write(path: Path) -> Iterator[IO[bytes]]:
    """Open a file for writing that appears under its name only when it is complete.

    The order is: flush the file, rename it, flush its folder. On an exception nothing is left. Of
    a symbolic link the file it leads to is replaced.

    Raises:
        UserError: There is a folder, a device or a pipe at ``path``, or another process, or thread,
            is writing it.
        EnvironmentFaultError: The disk is full or read-only.
    """
    path = path.resolve()
    if path.exists() and not path.is_file():
        raise UserError(f"{path} exists and is not a file, so it is not replaced. Choose another.")
    temporary = path.with_name(f".{path.name}.partial")
    with environment_faults(f"write {path}"):
        with _open_alone(temporary, path) as file:
            try:
                yield file
                file.flush()
                os.fsync(file.fileno())
                os.replace(temporary, path)  # before it is closed, which ends the lock
            except BaseException:
                temporary.unlink(missing_ok=True)
                raise
        flush_folder(path.parent)


def _open_alone(temporary: Path, path: Path) -> IO[bytes]:
    """Open the empty file that becomes ``path``, and lock it until it is closed."""
    while True:
        # It is emptied when it is locked: somebody may be writing it.
        file = open(temporary, "wb", opener=_open_as_it_is)
        try:
            _lock(file, path)
            # Whoever had the lock may have renamed or removed the file since it was opened.
            if os.path.samestat(os.fstat(file.fileno()), temporary.stat()):
                file.truncate()
                return file
        except FileNotFoundError:
            pass
        except BaseException:
            file.close()
            raise
        file.close()


def _lock(file: IO[bytes], path: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise UserError(
            f"{path} is being written by another process. Wait for it to end, or choose another "
            "name."
        ) from error
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise


_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
"""Of file systems without locks, where it is up to the user to write a file once at a time."""


def _open_as_it_is(path: str, flags: int) -> int:
    return os.open(path, flags & ~os.O_TRUNC, 0o666)


def open_to_append(path: Path, size: int) -> IO[bytes]:
    """Open a file to append to, cut to a size first; it is made if it is not there."""
    file = open(path, "ab")
    file.truncate(size)
    return file


@contextmanager
def atomic_folder(path: Path, what: str) -> Iterator[Path]:
    """Make a folder that appears under its name only when it is complete.

    Yields:
        The folder to fill, hidden beside its place. On an exception it goes.

    Args:
        path: Its place, which is locked meanwhile.
        what: What the folder is, for messages ("run", "bundle").

    Raises:
        UserError: Something is there already, other than an empty folder; or another process makes
            it.
        EnvironmentFaultError: The disk is full or read-only.
    """
    partial = path.with_name(f".{path.name}.partial")
    with locked(path, what):
        refuse_taken_folder(path, what)
        with environment_faults(f"write to {path.parent}"):
            shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed
            partial.mkdir()
        try:
            yield partial
            with environment_faults(f"write to {path.parent}"):
                flush_folder(partial)
                os.replace(partial, path)
                flush_folder(path.parent)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def refuse_taken_folder(path: Path, what: str) -> None:
    """Refuse the place of a folder where something is already, other than an empty folder.

    Args:
        path: The place.
        what: What the folder would be, for messages.

    Raises:
        UserError: Naming the place.
    """
    if path.is_symlink() or (path.exists() and not (path.is_dir() and not any(path.iterdir()))):
        raise UserError(f"{path} is there already, and is not overwritten. Choose another {what}.")


def is_plain_name(name: str) -> bool:
    """Tell whether a name that was read leads to something in the very folder it is put after."""
    return name not in ("", ".", "..") and not set(name) & {"/", "\\", "\0"}


def link_or_copy(source: Path, target: Path) -> None:
    """Give a file a second name, replacing what had it; a copy where there are no hard links."""
    temporary = target.with_name(f".{target.name}.partial")
    with environment_faults(f"write {target}"):
        if target.exists() and target.samefile(source):
            return  # renaming one name of a file to another of its names would leave both
        temporary.unlink(missing_ok=True)
        try:
            os.link(source, temporary)
        except OSError:
            copy_file(source, target)
        else:
            os.replace(temporary, target)
            flush_folder(target.parent)


def copy_file(source: Path, target: Path) -> None:
    """Copy a file's content, replacing what has that name; the copy appears complete."""
    with atomic_write(target) as copy, open(source, "rb") as file:
        shutil.copyfileobj(file, copy)


def write_safetensors(
    path: Path,
    tensors: Mapping[str, tuple[str, Sequence[int], int]],
    contents: Iterable[Buffer],
    metadata: Mapping[str, str],
    *,
    checksum: bool = False,
    aligned: str = "",
) -> str:
    """Write a safetensors file; it appears complete or not at all.

    The safetensors package renames a file of its own into place, without flushing it and under a
    temporary name that a crash leaves behind; the format is a JSON header and the bytes.

    Args:
        path: The file.
        tensors: By name: the format's name of its type, its shape, its bytes.
        contents: The bytes of each tensor, in the same order; one at a time is asked for.
        metadata: Texts by name.
        checksum: Add to it ``sha256``, which ``verify_safetensors`` checks: of the whole file, with
            zeros where it stands itself.
        aligned: The tensor that begins where a memory map of any system can begin.

    Returns:
        The checksum, if there is one.

    Raises:
        EnvironmentFaultError: The disk is full or read-only.
    """
    if checksum:
        metadata = {**metadata, "sha256": _ZEROS}
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    end = 0
    for name, (kind, shape, size) in tensors.items():
        start, end = end, end + size
        header[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [start, end]}
    encoded = msgspec.json.encode(header)
    first = header[aligned]["data_offsets"][0] if aligned else 0
    encoded += b" " * (-(8 + len(encoded) + first) % (_MAP_ALIGNMENT if aligned else 8))
    encoded = struct.pack("<Q", len(encoded)) + encoded
    digest = hashlib.sha256(encoded)
    with atomic_write(path) as file:
        file.write(encoded)
        for content in contents:
            if not checksum:
                file.write(content)
                continue
            view = memoryview(content)
            for start in range(0, view.nbytes, _PIECE_BYTES):
                piece = view[start : start + _PIECE_BYTES]
                digest.update(piece)
                file.write(piece)
        if not checksum:
            return ""
        found = _CHECKSUM.search(encoded)
        assert found
        file.seek(found.start(1))
        file.write(digest.hexdigest().encode())
    return digest.hexdigest()


# The file's first text of this form: what stands within another text of the metadata has its
# quotes escaped.
_CHECKSUM = re.compile(rb'"sha256":"([0-9a-f]{64})"')
_ZEROS = "0" * 64
_MAP_ALIGNMENT = 1 << 16
_PIECE_BYTES = 1 << 20


def safetensors_places(path: Path) -> dict[str, tuple[int, int]]:
    """Return where tensors lie in a safetensors file: by name, offset and bytes.

    Args:
        path: A file that the safetensors package could open, which checks that its header fits.
    """
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = msgspec.json.decode(file.read(length), type=dict[str, dict[str, Any]])
    places = {}
    for name, entry in header.items():
        if name != "__metadata__":
            start, end = entry["data_offsets"]
            places[name] = 8 + length + start, end - start
    return places


def verify_safetensors(path: Path) -> str:
    """Read a file that ``write_safetensors`` wrote, and compare it with its checksum.

    Returns:
        The checksum; empty: it has none.

    Raises:
        UserError: The file is damaged.
        OSError: It cannot be read.
    """
    with open(path, "rb") as file:
        left = os.fstat(file.fileno()).st_size
        begin = file.read(8)
        length = int.from_bytes(begin, "little")
        if length > left - 8:  # before memory is taken for it
            raise UserError(f"{path} is damaged: its header does not fit into it.")
        begin += file.read(length)
        found = _CHECKSUM.search(begin)
        if found is None:
            return ""
        digest = hashlib.sha256(begin[: found.start(1)] + _ZEROS.encode() + begin[found.end(1) :])
        while piece := file.read(_PIECE_BYTES):
            digest.update(piece)
    if digest.hexdigest() != found[1].decode():
        raise UserError(
            f"{path} is damaged: its checksum is expected to be {found[1].decode()}, got "
            f"{digest.hexdigest()}."
        )
    return digest.hexdigest()


def write_json(path: Path, value: Any) -> None:
    """Write a value that msgspec can encode, indented, atomically."""
    with atomic_write(path) as file:
        file.write(json_bytes(value))


def json_bytes(value: Any) -> bytes:
    """Return a value that msgspec can encode as ``write_json`` writes it."""
    return msgspec.json.format(msgspec.json.encode(value), indent=2) + b"\n"


def read_json(
    path: Path, kind: type[T], what: str, *, if_missing: str = "", if_damaged: str = ""
) -> T:
    """Read a JSON file written by us and check its type and format version.

    Args:
        path: The file.
        kind: A dataclass with a ``format_version`` field whose default is the version we write.
        what: What the file is, for messages ("dataset", "run").
        if_missing: What to do where it is missing, if that is more than to make it again.
        if_damaged: Likewise where it is damaged.

    Raises:
        UserError: The file is missing, damaged, or of a version we cannot read.
    """
    try:
        content = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(
            f"{path.parent} is not a complete {what}: {path.name} is missing. "
            + (if_missing or f"Check the path, or make the {what} again.")
        ) from error
    try:
        check_version(msgspec.json.decode(content, type=_Versioned).format_version, path)
        return msgspec.json.decode(content, type=kind)
    except msgspec.MsgspecError as error:
        raise UserError(
            f"{path} is damaged or was not written by dlrm: {error}. "
            + (if_damaged or f"Make the {what} again.")
        ) from error


class _Versioned(msgspec.Struct):
    format_version: str


FORMAT_VERSION = "1.4"
"""1.1: the 'other' slot, hashed values, and what was skipped, in a DATASET. 1.2: checksums and
``step-NNNNNNNNN.json`` in a RUN's checkpoints. 1.3: labels in a RUN's predictions, intervals and
deciles in its metrics, its kind and tracking in its configuration. 1.4: features with several ids,
dense features without a transform, labels that are probabilities, and how rows were made up, in a
DATASET."""


def check_version(found: str, path: Path) -> None:
    """Refuse a file whose format is not of our major version, or is newer than we know.

    Raises:
        UserError: Naming the file, the version expected and the one found.
    """
    ours = tuple(int(part) for part in FORMAT_VERSION.split("."))
    try:
        theirs = tuple(int(part) for part in found.split("."))
    except ValueError:
        theirs = ()
    if len(theirs) != 2 or theirs[0] != ours[0] or theirs[1] > ours[1]:
        raise UserError(
            f"{path} has format version {found!r}; this dlrm reads {ours[0]}.0 to "
            f"{FORMAT_VERSION}. Use the dlrm that wrote it, or make it again."
        )


def sha256(path: Path) -> str:
    """Return the hexadecimal SHA-256 of a file's content."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def locked(folder: Path, what: str) -> Iterator[None]:
    """Hold the lock of a folder that is being written; it dies with the process.

    The lock file lies beside the folder (``.NAME.lock``) so that the folder itself can be renamed.

    Raises:
        UserError: Another process is writing to it, or the folder it is in is a file.
    """
    folder = Path(os.path.realpath(folder))  # two names of a folder have one lock
    with environment_faults(f"write to {folder.parent}"):
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError) as error:
            raise UserError(f"{folder.parent} is not a folder. Choose another {what}.") from error
        lock = filelock.FileLock(folder.with_name(f".{folder.name}.lock"))
        try:
            lock.acquire(timeout=0)
        except filelock.Timeout as error:
            raise UserError(
                f"{folder} is being written by another process. Wait for it to end, or choose "
                f"another {what}."
            ) from error
    try:
        yield
    finally:
        # Before the release: whoever opened it meanwhile finds it gone, and makes a new one.
        Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()
