"""Rows on their way from a source to a DATASET: numbered, in the source's order, on disk.

A segment is a run of rows in one file, a column a feature, in the narrowest integers that hold it.
A record beside it, written last, says that the segment is complete and where in the source it ends;
from the records an interrupted preparation goes on.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import safetensors

from dlrm.errors import UserError
from dlrm.files import (
    FORMAT_VERSION,
    environment_faults,
    read_json,
    write_json,
    write_safetensors,
)

_TYPES = {"uint8": "U8", "uint16": "U16", "uint32": "U32", "int32": "I32"}

Integers = npt.NDArray[np.integer]


@dataclass(frozen=True)
class RejectedRow:
    """A malformed row that was skipped."""

    file: str
    line: int
    """From 1."""
    reason: str
    """Which kind of fault, in a word or two."""
    message: str
    """What was expected and what was found."""


@dataclass(frozen=True)
class Segment:
    """What a record says of its segment."""

    number: int
    file: int
    """Which file of the source its rows are from."""
    end: int
    """Bytes of that file (decompressed) up to the end of its last row."""
    lines: int
    """Lines of that file up to there."""
    first_row: int
    """Rows before it."""
    rows: int
    first_candidate: int
    """Well-formed rows before it, those that sub-sampling dropped included."""
    candidates: int
    """Well-formed rows in it."""
    generations: tuple[int, ...] = ()
    """Of each sparse feature, the generation that numbered its values."""
    new_values: tuple[int, ...] = ()
    """Of each sparse feature, how many values first appear in it."""
    missing: tuple[int, ...] = ()
    """Of each dense feature, how many values are missing."""
    rejected: dict[str, int] = field(default_factory=dict)
    """Malformed rows that were skipped, by reason."""
    examples: tuple[RejectedRow, ...] = ()
    source_sha256: str = ""
    """Of that file, where the segment is its last."""
    lacks_last_newline: bool = False
    format_version: str = FORMAT_VERSION

    @property
    def end_row(self) -> int:
        """Rows before the next segment."""
        return self.first_row + self.rows


@dataclass(frozen=True, eq=False)
class Columns:
    """The rows of a segment, n of them.

    Attributes:
        labels: (n,) uint8.
        dense: Of each dense feature, (n,) integers that fit int32.
        sparse: Of each sparse feature, (n,): numbers, or raw values where they are hashed.
        candidates: (n,) uint32, each row's place among the well-formed rows of the segment; empty
            where none was dropped.
    """

    labels: npt.NDArray[np.uint8]
    dense: Sequence[Integers]
    sparse: Sequence[Integers]
    candidates: npt.NDArray[np.uint32]

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.labels)


class Spool:
    """The segments in a folder.

    Args:
        folder: Is made if it is not there.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        with environment_faults(f"write to {folder}"):
            folder.mkdir(exist_ok=True)
        self.segments: list[Segment] = []
        """In order."""
        while (record := self._record(len(self.segments))).exists():
            self.segments.append(read_json(record, Segment, "preparation"))

    @property
    def rows(self) -> int:
        """Rows of all segments."""
        return self.segments[-1].end_row if self.segments else 0

    def append(
        self, segment: Segment, columns: Columns, new_values: Sequence[npt.NDArray[np.uint32]]
    ) -> None:
        """Write the next segment.

        Args:
            segment: Its record.
            columns: Its rows.
            new_values: Of each sparse feature, the values that first appear in it, in the order of
                their numbers; empty where values are not numbered.
        """
        assert segment.number == len(self.segments)
        self._write(self._values(segment.number), dict(enumerate(new_values)))
        named: dict[str, Integers] = {"labels": columns.labels}
        named |= {f"dense.{index}": narrow(column) for index, column in enumerate(columns.dense)}
        named |= {f"sparse.{index}": narrow(column) for index, column in enumerate(columns.sparse)}
        named["candidates"] = columns.candidates
        self._write(self._rows(segment.number), named)
        write_json(self._record(segment.number), segment)
        self.segments.append(segment)

    def columns(self, number: int) -> Columns:
        """Read the rows of a segment."""
        with _reading(self._rows(number)) as file:
            names = set(file.keys())
            dense = sum(name.startswith("dense.") for name in names)
            sparse = sum(name.startswith("sparse.") for name in names)
            return Columns(
                file.get_tensor("labels"),
                [file.get_tensor(f"dense.{index}") for index in range(dense)],
                [file.get_tensor(f"sparse.{index}") for index in range(sparse)],
                file.get_tensor("candidates"),
            )

    def labels(self, number: int) -> npt.NDArray[np.uint8]:
        """Read the labels of a segment, (n,)."""
        return self._tensor(self._rows(number), "labels")

    def candidates(self, number: int) -> npt.NDArray[np.uint32]:
        """Read each row's place among the well-formed ones; see ``Columns``."""
        return self._tensor(self._rows(number), "candidates")

    def sparse(self, number: int, feature: int) -> Integers:
        """Read one sparse column of a segment, (n,)."""
        return self._tensor(self._rows(number), f"sparse.{feature}")

    def new_values(self, number: int, feature: int) -> npt.NDArray[np.uint32]:
        """Read the values of a feature that first appear in a segment."""
        return self._tensor(self._values(number), str(feature))

    def remove_rows(self, number: int) -> None:
        """Delete the rows of a segment, which are elsewhere by now; its record stays."""
        self._rows(number).unlink(missing_ok=True)

    def segments_of(self, rows: range) -> Iterator[Segment]:
        """Return the segments that hold any of some rows."""
        for segment in self.segments:
            if segment.first_row < rows.stop and rows.start < segment.end_row:
                yield segment

    def _write(self, path: Path, tensors: Mapping[Any, Integers]) -> None:
        arrays = {str(name): np.ascontiguousarray(array) for name, array in tensors.items()}
        write_safetensors(
            path,
            {
                name: (_TYPES[str(array.dtype)], array.shape, array.nbytes)
                for name, array in arrays.items()
            },
            (array.reshape(-1).view(np.uint8).data for array in arrays.values()),
            {},
        )

    def _tensor(self, path: Path, name: str) -> npt.NDArray[Any]:
        with _reading(path) as file:
            tensor: npt.NDArray[Any] = file.get_tensor(name)
            return tensor

    def _rows(self, number: int) -> Path:
        return self.folder / f"rows-{number:05}.safetensors"

    def _values(self, number: int) -> Path:
        return self.folder / f"values-{number:05}.safetensors"

    def _record(self, number: int) -> Path:
        return self.folder / f"segment-{number:05}.json"


def narrow(column: Integers) -> Integers:
    """Return a column of non-negative integers in the narrowest type that holds it."""
    largest = int(column.max(initial=0))
    for kind in (np.uint8, np.uint16):
        if largest <= np.iinfo(kind).max:
            return column.astype(kind)
    return column


def _reading(path: Path) -> safetensors.safe_open:
    try:
        return safetensors.safe_open(path, framework="numpy")
    except (safetensors.SafetensorError, OSError) as error:
        raise damaged(path, error) from error


def damaged(path: Path, error: Exception | str) -> UserError:
    """Say that a file of an interrupted preparation is damaged; all of it is removed then."""
    return UserError(f"{path} is damaged: {error}. Repeat the command to start over.")
