"""What is scored already, beside an output until that is written: nothing is done twice.

Hidden beside OUTPUT lies a folder ``.OUTPUT.work``: probabilities (and labels, where rows have
them), one after the other, and a journal that says how many of them count, for which model, input
and options, and where reading goes on. What lies in the files beyond that number was written by a
process that was killed, and is cut off.
"""

from __future__ import annotations

import logging
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import IO, Self

import numpy as np
import numpy.typing as npt

from dlrm.data.criteo import Position
from dlrm.errors import UserError
from dlrm.files import FORMAT_VERSION, environment_faults, open_to_append, read_json, write_json

logger = logging.getLogger("dlrm")

JOURNAL = "journal.json"
_READ_ROWS = 1 << 18
_SHOWN = 40
"""Characters of a difference that are told; of a longer one its name is."""

BegunWith = Mapping[str, str | None]
"""What probabilities depend on, by what it is called in messages; None: nobody can tell whether it
is the same another time."""


@dataclass(frozen=True)
class Journal:
    """How far a prediction has come."""

    begun_with: dict[str, str]
    """What the probabilities depend on, by what it is called in messages."""
    labelled: bool | None = None
    """Whether rows have labels; None: there were none yet."""
    position: Position = field(default_factory=Position)
    """Where the next row is read."""
    unknown: tuple[int, ...] = ()
    """How many values of each sparse feature were unknown."""
    complete: bool = False
    """Whether all rows are scored."""
    format_version: str = FORMAT_VERSION


def work_folder(output: Path) -> Path:
    """Return where the work for an output lies, if there is any."""
    return output.with_name(f".{output.name}.work")


class Work:
    """The folder, open to append to.

    Args:
        output: What the prediction is for.
        begun_with: What the probabilities depend on. Where nobody can tell some of it, no journal
            is written, so that nothing can be gone on with.
        anew: Whether rows that are scored otherwise are scored again; else they are refused.
        seconds: After so many a journal is written.

    Attributes:
        journal: Of all rows that were added.
        can_go_on: Whether another process can go on with it.

    Raises:
        UserError: There are rows that are scored otherwise.
        EnvironmentFaultError: The disk is full or read-only.
    """

    def __init__(
        self,
        output: Path,
        begun_with: BegunWith,
        *,
        anew: bool = False,
        seconds: float = 5.0,
    ) -> None:
        self.folder = work_folder(output)
        found = _usable(self.folder)
        if found and (differences := find_differences(found.begun_with, begun_with)):
            holds = (
                f"{self.folder} holds {found.position.row} rows of an interrupted prediction of "
                f"{output} that differs in {', '.join(differences)}"
            )
            if not anew:
                raise UserError(
                    f"{holds}. To go on with it, give what it was begun with; to begin anew, "
                    "--overwrite."
                )
            logger.warning("%s; it is begun anew", holds)
            found = None
        told = {name: value for name, value in begun_with.items() if value is not None}
        self.can_go_on = len(told) == len(begun_with)
        self.journal = found or Journal(told)
        self._seconds = seconds
        self._saved = time.monotonic()
        self._files = ExitStack()
        rows = self.journal.position.row
        with environment_faults(f"write to {self.folder}"):
            if not rows:
                shutil.rmtree(self.folder, ignore_errors=True)
                self.folder.mkdir()
        self._probabilities = self._append("probabilities", 4 * rows)
        self._labels = self._append("labels", rows if self.journal.labelled else 0)

    def __enter__(self) -> Self:
        """Return it."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close the files; where something failed already, what else does is not told."""
        with suppress(OSError) if error else environment_faults(f"write to {self.folder}"):
            self._files.close()

    def add(
        self,
        probabilities: npt.NDArray[np.float32],
        labels: npt.NDArray[np.uint8] | None,
        unknown: npt.NDArray[np.int64],
        end: Position,
    ) -> None:
        """Add scored rows, and write a journal if the last one is old.

        Args:
            probabilities: (n,).
            labels: (n,), or None.
            unknown: (F,), of these rows.
            end: Where the next row is read.

        Raises:
            EnvironmentFaultError: The disk is full or fails.
        """
        with environment_faults(f"write to {self.folder}"):
            self._probabilities.write(probabilities.astype("<f4").tobytes())
            if labels is not None:
                self._labels.write(labels.tobytes())
        before = self.journal.unknown or (0,) * len(unknown)
        total = tuple(int(a + b) for a, b in zip(before, unknown, strict=True))
        self.journal = replace(
            self.journal, labelled=labels is not None, position=end, unknown=total
        )
        if time.monotonic() - self._saved >= self._seconds:
            self.save()

    def save(self, *, complete: bool = False) -> None:
        """Make durable what was added, then the journal that says so, if it can be gone on with.

        Raises:
            EnvironmentFaultError: The disk is full or fails.
        """
        with environment_faults(f"write to {self.folder}"):
            for file in (self._probabilities, self._labels):
                file.flush()
                if self.can_go_on:
                    os.fsync(file.fileno())
        journal = replace(self.journal, complete=complete)
        if self.can_go_on:
            write_json(self.folder / JOURNAL, journal)
        self.journal = journal
        self._saved = time.monotonic()

    def read(
        self,
    ) -> Iterator[tuple[npt.NDArray[np.float32], npt.NDArray[np.uint8] | None]]:
        """Read all rows again, in order: probabilities, and labels where there are some.

        Raises:
            EnvironmentFaultError: The disk fails.
        """
        labelled = bool(self.journal.labelled)
        with (
            environment_faults(f"read {self.folder}"),
            open(self.folder / "probabilities", "rb") as probabilities,
            open(self.folder / "labels", "rb") as labels,
        ):
            while content := probabilities.read(4 * _READ_ROWS):
                rows = np.frombuffer(content, "<f4").astype(np.float32, copy=False)
                yield rows, np.frombuffer(labels.read(len(rows)), np.uint8) if labelled else None

    def remove(self) -> None:
        """Remove the folder and all that is in it."""
        with suppress(OSError):
            self._files.close()
        with environment_faults(f"write to {self.folder}"):
            # Without a journal the rest means nothing, should this be interrupted.
            (self.folder / JOURNAL).unlink(missing_ok=True)
            shutil.rmtree(self.folder)

    def _append(self, name: str, size: int) -> IO[bytes]:
        with environment_faults(f"write to {self.folder}"):
            return self._files.enter_context(open_to_append(self.folder / name, size))


def is_complete(output: Path, begun_with: BegunWith) -> bool:
    """Tell whether all rows for an output are scored, in just this way."""
    journal = _usable(work_folder(output))
    return bool(
        journal and journal.complete and not find_differences(journal.begun_with, begun_with)
    )


def remove_remains(output: Path) -> None:
    """Remove what a process left that was killed while it removed its work: nothing is usable."""
    folder = work_folder(output)
    if not (folder / JOURNAL).exists():
        with environment_faults(f"write to {folder}"):
            shutil.rmtree(folder, ignore_errors=True)


def find_differences(begun: Mapping[str, str], asked: BegunWith) -> list[str]:
    """Tell what a prediction was begun with otherwise.

    Args:
        begun: What it was begun with.
        asked: What is asked for. What nobody can tell of that differs from everything, and makes
            the rest no matter.
    """
    if unknown := [name for name, value in asked.items() if value is None]:
        return [f"{name} (which now has no checksum)" for name in unknown]
    differences = []
    for name in sorted(begun.keys() | asked.keys()):
        before, now = begun.get(name, ""), asked.get(name) or ""
        if before != now:
            is_short = 0 < len(before) <= _SHOWN and 0 < len(now) <= _SHOWN
            differences.append(f"{name} ({before}, now {now})" if is_short else name)
    return differences


def _usable(folder: Path) -> Journal | None:
    """Return the journal of a folder; None: there are no rows in it that it tells of."""
    try:
        journal = read_json(folder / JOURNAL, Journal, "prediction")
    except UserError:
        return None
    rows = journal.position.row
    sizes = {"probabilities": 4 * rows, "labels": rows if journal.labelled else 0}
    is_whole = all(
        (folder / name).exists() and (folder / name).stat().st_size >= size
        for name, size in sizes.items()
    )
    return journal if rows and is_whole else None
