"""The files of a source, as they were before they were read."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from dlrm.errors import UserError
from dlrm.files import environment_faults

PIPE = "-"
"""The SOURCE that means standard input."""


@dataclass(frozen=True)
class SourceFile:
    """A file of a source, as it was before it was read."""

    path: Path
    name: str
    bytes: int
    mtime_ns: int
    """Time of its last change, in nanoseconds since 1970."""


def describe_file(path: Path, name: str = "") -> SourceFile:
    """Describe a file without reading it.

    Raises:
        UserError: Its name cannot be written down.
    """
    require_utf8(name or path.name)
    with environment_faults(f"read {path}"):
        status = path.stat()
    return SourceFile(path, name or path.name, status.st_size, status.st_mtime_ns)


def require_unchanged(files: Iterable[SourceFile]) -> None:
    """Refuse files that are not what they were before they were read.

    Raises:
        UserError: Naming the first that has changed.
    """
    for file in files:
        if describe_file(file.path, file.name) != file:
            raise UserError(
                f"{file.path} changed while it was read. Prepare it once it is complete."
            )


def require_utf8(name: str) -> None:
    """Refuse a name that is no text, and so could not be recorded.

    Raises:
        UserError: Naming it.
    """
    try:
        name.encode()
    except UnicodeEncodeError:
        raise UserError(f"the name {name!a} is not UTF-8. Rename it.") from None
