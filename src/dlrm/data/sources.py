"""Where rows come from: the files that a SOURCE means, in order, and how their rows are split."""

from __future__ import annotations

import dataclasses
import glob
import logging
import re
import shutil
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from dlrm.config import PrepareConfig
from dlrm.data.prepared import PreparedRows, recognise
from dlrm.data.splits import SplitRule
from dlrm.errors import UserError
from dlrm.files import atomic_write, environment_faults

PIPE = "-"
"""The SOURCE that means standard input."""
_DAY = re.compile(r"day_([0-9]+)(\.gz)?")
_PREPARED = (".npz", ".bin")
_CHUNK_BYTES = 1 << 20

logger = logging.getLogger("dlrm")


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


@dataclass(frozen=True)
class RawSource:
    """Files of raw rows, in order."""

    files: tuple[SourceFile, ...]
    split: SplitRule

    @property
    def bytes(self) -> int:
        """Size of all files."""
        return sum(file.bytes for file in self.files)


@dataclass(frozen=True)
class PreparedSource:
    """Rows that the reference has prepared."""

    files: tuple[SourceFile, ...]
    split: SplitRule
    rows: PreparedRows

    @property
    def bytes(self) -> int:
        """Size of all files."""
        return sum(file.bytes for file in self.files)


def find_source(source: Path, config: PrepareConfig) -> RawSource | PreparedSource:
    """Return the files that a source means.

    Args:
        source: A file of raw rows; a folder with train.txt; a folder with day_0, day_1 …, plain or
            compressed with gzip; one of these days; or what the reference has prepared.
        config: Which days, and how rows are split.

    Raises:
        UserError: There are none, or they cannot be split or treated as asked.
        EnvironmentFaultError: They cannot be read.
    """
    with environment_faults(f"read {source}"):
        if _is_prepared(source):
            return _prepared_source(source, config)
        return raw_source(source, config)


def _is_prepared(source: Path) -> bool:
    if source.is_dir():
        names = [path.name for path in source.iterdir()]
        is_raw = "train.txt" in names or any(map(_DAY.fullmatch, names))
        return not is_raw and any(name.endswith(_PREPARED) for name in names)
    if source.exists():
        return source.name.endswith(_PREPARED)
    # Of a file a day, what the names of all begin with.
    return any(source.parent.glob(f"{glob.escape(source.name)}_*_reordered.npz"))


def _prepared_source(source: Path, config: PrepareConfig) -> PreparedSource:
    rows = recognise(source)
    allowed = PrepareConfig(shuffle=config.shuffle, seed=config.seed, split=config.split)
    for field in dataclasses.fields(PrepareConfig):
        if getattr(config, field.name) != getattr(allowed, field.name):
            raise UserError(
                f"--{field.name.replace('_', '-')} {getattr(config, field.name)} is about raw "
                f"rows, and {rows.files[0]} holds rows that are prepared already. Prepare from raw "
                "rows, or leave it out."
            )
    split: SplitRule
    if rows.fixed_splits:
        if config.split not in ("auto", "none"):
            raise UserError(
                f"--split {config.split}: the files of {source} are the splits already. Leave it "
                "out, or train on all rows with --split none."
            )
        split = "fixed" if config.split == "auto" else "none"
    else:
        split = _resolved(str(source), config, "days", len(rows.days))
    return PreparedSource(tuple(map(describe_file, rows.files)), split, rows)


def raw_source(source: Path, config: PrepareConfig) -> RawSource:
    """Return the files of raw rows that a source means; see ``find_source``."""
    if not source.exists():
        raise UserError(f"{source} does not exist. Name Criteo's train.txt or its folder.")
    files = _files(source, config)
    usual: SplitRule = "days" if _DAY.fullmatch(files[0].name) else "rows"
    return RawSource(tuple(files), _resolved(str(source), config, usual, len(files)))


def _resolved(source: str, config: PrepareConfig, usual: SplitRule, days: int) -> SplitRule:
    """Return how rows are split, where "auto" means what is usual."""
    split: SplitRule = usual if config.split == "auto" else config.split
    if split == "days" and days < 2:
        if config.split == "auto":
            raise UserError(
                f"{source} is a single day, of which nothing is held back from training as it is. "
                "Say how: --split rows cuts it into 7 runs of rows, of which the last is held "
                "back; --split none trains on all of it."
            )
        raise UserError(
            f"--split days needs at least two days, one of them to be held back; {source} has one. "
            "Use --split rows or --split none."
        )
    return split


def _refuse_days(source: str, config: PrepareConfig) -> None:
    if config.days:
        raise UserError(f"--days chooses among the days of a folder; {source} is one file.")


def _files(source: Path, config: PrepareConfig) -> list[SourceFile]:
    if not source.is_dir():
        if not source.is_file():  # a pipe or a device, which cannot be read twice
            raise UserError(
                f"{source} is neither a file nor a folder. Of a pipe use standard input: cat "
                f"{source} | dlrm prepare - DATASET."
            )
        _refuse_days(str(source), config)
        return [describe_file(source)]
    found: dict[int, list[Path]] = {}
    for path in sorted(source.iterdir()):
        if match := _DAY.fullmatch(path.name):
            found.setdefault(int(match[1]), []).append(path)
    train = source / "train.txt"
    if train.is_file() and not config.days:
        return [describe_file(train)]
    if not found:
        raise UserError(
            f"{source} is a folder without train.txt, and without day_0, day_1 … Name the file of "
            "raw rows, or its folder."
        )
    days = config.days or tuple(sorted(found))
    missing = [day for day in days if day not in found]
    if missing:
        raise UserError(
            f"{source} has no day_{missing[0]}. There are the days "
            f"{', '.join(map(str, sorted(found)))}; choose among them with --days."
        )
    for day in days:
        if len(found[day]) > 1:
            names = " and ".join(path.name for path in found[day])
            raise UserError(
                f"{source} has {names}, which are one day by their names. Leave one of them there, "
                "and move the rest elsewhere."
            )
    return [describe_file(found[day][0]) for day in days]


def _require_same(spooled: Path) -> None:
    """Compare standard input, if anything comes, with what came before.

    Raises:
        UserError: It differs.
    """
    if sys.stdin is None or sys.stdin.isatty():
        return
    came = False
    with environment_faults(f"read {spooled}"), open(spooled, "rb") as before:
        while chunk := sys.stdin.buffer.read(_CHUNK_BYTES):
            came = True
            if chunk != before.read(len(chunk)):
                break
        else:
            if not came or not before.read(1):
                return
    raise UserError(
        "standard input differs from what came through the pipe before an earlier preparation was "
        "interrupted. Feed the same again or nothing (< /dev/null) to go on with that, or start "
        "over with --overwrite."
    )


def piped_source(spooled: Path, config: PrepareConfig, *, anew: bool) -> RawSource:
    """Copy standard input to a file, which appears when it is complete, and return it as a source.

    Args:
        spooled: The file. If it is there, standard input must be empty or the same again.
        config: How rows are split.
        anew: Replace the file if it is there.

    Raises:
        UserError: Nothing came, or something else than before, or it cannot be split as asked.
        EnvironmentFaultError: The disk is full or fails.
    """
    name = "standard input"
    _refuse_days(name, config)
    split = _resolved(name, config, "rows", 1)
    if spooled.exists() and not anew:
        _require_same(spooled)
        logger.info("going on with what came through the pipe before: %s", spooled)
    else:
        with environment_faults(f"write to {spooled.parent}"):
            spooled.parent.mkdir(exist_ok=True)
        with atomic_write(spooled) as file:
            if sys.stdin is not None:
                try:
                    shutil.copyfileobj(sys.stdin.buffer, file, _CHUNK_BYTES)
                except IsADirectoryError:
                    raise UserError(
                        "standard input is a folder. Feed rows through a pipe."
                    ) from None
            if not file.tell():
                raise UserError(
                    "standard input is empty: nothing came through the pipe. Check what feeds it."
                )
    return RawSource((describe_file(spooled, PIPE),), split)
