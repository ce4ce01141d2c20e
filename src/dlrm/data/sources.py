"""Where rows come from: the files that a SOURCE means, in order, and how each kind is read."""

from __future__ import annotations

import dataclasses
import glob
import logging
import re
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from dlrm.config import PrepareConfig
from dlrm.data import criteo
from dlrm.data.dataset import Source
from dlrm.data.fitting import FittedFeature, fit_feature, fit_prepared
from dlrm.data.prepared import PreparedRows, recognise
from dlrm.data.reading import read_prepared, read_raw
from dlrm.data.source_files import PIPE, SourceFile, describe_file, require_unchanged
from dlrm.data.splits import SplitRows, SplitRule
from dlrm.data.spool import Spool
from dlrm.data.work import as_source
from dlrm.errors import UserError
from dlrm.files import atomic_write, environment_faults, sha256
from dlrm.progress import progress

_DAY = re.compile(r"day_([0-9]+)(\.gz)?")
_PREPARED = (".npz", ".bin")
_CHUNK_BYTES = 1 << 20

logger = logging.getLogger("dlrm")


class RowSource(Protocol):
    """Where rows come from, and how they get from there into a spool and a DATASET."""

    @property
    def files(self) -> tuple[SourceFile, ...]:
        """What is read, in order."""

    @property
    def split(self) -> SplitRule:
        """How rows are split."""

    @property
    def bytes(self) -> int:
        """Size of all files."""

    @property
    def has_values(self) -> bool:
        """Whether raw values are known, of which vocabularies consist."""

    @property
    def fixed_split(self) -> SplitRows | None:
        """Which rows train, where the files themselves say so."""

    def expected_rows(self) -> int:
        """Return about how many rows there are."""

    def read(self, spool: Spool, config: PrepareConfig, *, table_bytes: int, threads: int) -> None:
        """Read rows into a spool, from where it ends.

        Args:
            spool: Empty, or what an interrupted preparation of the same source left.
            config: What becomes of rows and values.
            table_bytes: Memory for the numbers of values.
            threads: How many to parse and to number on.

        Raises:
            UserError: The source is malformed or damaged, or changes meanwhile.
            EnvironmentFaultError: A disk is full or fails.
        """

    def rows_by_day(self, spool: Spool) -> tuple[int, ...]:
        """Return how many rows of a spool, in its order, each day has; of raw rows, each file."""

    def fit(
        self,
        spool: Spool,
        feature: int,
        vocabulary: Path,
        work: Path,
        config: PrepareConfig,
        *,
        train_rows: int,
        memory: int,
    ) -> FittedFeature:
        """Write the vocabulary of a sparse feature, and its maps; see ``fitting.fit_feature``."""

    def records(self, spool: Spool) -> tuple[Source, ...]:
        """Return what a DATASET tells of the files, once all are read."""


@dataclass(frozen=True)
class RawSource:
    """Files of raw rows, in order."""

    files: tuple[SourceFile, ...]
    split: SplitRule
    has_values = True
    fixed_split = None

    @property
    def bytes(self) -> int:
        """Size of all files."""
        return sum(file.bytes for file in self.files)

    def expected_rows(self) -> int:
        """Estimate the number of rows; see ``RowSource``."""
        return sum(criteo.estimate_rows(file.path) for file in self.files)

    def read(self, spool: Spool, config: PrepareConfig, *, table_bytes: int, threads: int) -> None:
        """Read rows; see ``RowSource``."""
        last = spool.segments[-1] if spool.segments else None
        if last and last.source_sha256 and last.file == len(self.files) - 1:
            return
        with progress("read", self.bytes, unit="B", unit_scale=True) as bar:
            read_raw(
                self.files,
                spool,
                config,
                table_bytes=table_bytes,
                threads=threads,
                progress=bar.update,
            )

    def rows_by_day(self, spool: Spool) -> tuple[int, ...]:
        """Count the rows of each file; see ``RowSource``."""
        rows = [0] * len(self.files)
        for segment in spool.segments:
            rows[segment.file] += segment.rows
        return tuple(rows)

    def fit(
        self,
        spool: Spool,
        feature: int,
        vocabulary: Path,
        work: Path,
        config: PrepareConfig,
        *,
        train_rows: int,
        memory: int,
    ) -> FittedFeature:
        """Fit a feature; see ``RowSource``."""
        return fit_feature(
            spool, feature, vocabulary, work, config, train_rows=train_rows, memory=memory
        )

    def records(self, spool: Spool) -> tuple[Source, ...]:
        """Describe the files as they were read; see ``RowSource``."""
        ends = {segment.file: segment for segment in spool.segments if segment.source_sha256}
        return tuple(
            dataclasses.replace(
                as_source(file),
                sha256=ends[number].source_sha256,
                lacks_last_newline=ends[number].lacks_last_newline,
            )
            for number, file in enumerate(self.files)
        )


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

    @property
    def has_values(self) -> bool:
        """Whether there are dictionaries; see ``RowSource``."""
        return self.rows.has_values

    @property
    def fixed_split(self) -> SplitRows | None:
        """Which rows train; see ``RowSource``."""
        fixed = self.rows.fixed_splits
        if fixed is None or self.split != "fixed":
            return None
        return SplitRows((fixed.train,), fixed.test, fixed.validation)

    def expected_rows(self) -> int:
        """Return the number of rows; see ``RowSource``."""
        return len(self.rows)

    def read(self, spool: Spool, config: PrepareConfig, *, table_bytes: int, threads: int) -> None:
        """Read rows, which are numbered already; see ``RowSource``."""
        with progress("read", len(self.rows), unit="rows", unit_scale=True) as bar:
            read_prepared(self.rows, spool, progress=bar.update)
        require_unchanged(self.files)

    def rows_by_day(self, spool: Spool) -> tuple[int, ...]:
        """Return the rows of each day; see ``RowSource``."""
        return self.rows.days

    def fit(
        self,
        spool: Spool,
        feature: int,
        vocabulary: Path,
        work: Path,
        config: PrepareConfig,
        *,
        train_rows: int,
        memory: int,
    ) -> FittedFeature:
        """Take over a dictionary; see ``RowSource``."""
        return fit_prepared(spool, feature, vocabulary, work, self.rows, memory=memory)

    def records(self, spool: Spool) -> tuple[Source, ...]:
        """Describe the files as they are; see ``RowSource``."""
        checksums = [sha256(file.path) for file in self.files]
        require_unchanged(self.files)
        return tuple(
            dataclasses.replace(as_source(file), sha256=checksum)
            for file, checksum in zip(self.files, checksums, strict=True)
        )


def find_source(source: Path, config: PrepareConfig) -> RowSource:
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
