"""What the reference implementation has prepared: rows of ids, and the values behind them.

It leaves, of raw rows named STEM (train for Kaggle's train.txt, day for the 1TB click logs):

- a file of everything, kaggleAdDisplayChallenge_processed.npz: ``X_int`` (n, 13), ``X_cat``
  (n, 26) ids, ``y`` (n,) labels and ``counts`` (26,), the rows of each embedding table;
- or a file a day, day_0_reordered.npz and so on (of Kaggle's rows train_day_0_reordered.npz): the
  same without ``counts``, in another order;
- or three files of bare numbers, ending in train.bin, test.bin and val.bin: for each row the label,
  13 integers and 26 ids, 32 bits each;
- beside them STEM_day_count.npz (``total_per_file``, the rows of each day), STEM_fea_count.npz
  (``counts``), and for each of the 26 features STEM_fea_dict_J.npz (``unique``, the raw values in
  the order of their ids, as signed integers).

Numbers may be stored as floats. Negative integers are 0 already, and no logarithm has been taken.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dlrm.data.criteo import DENSE_NAMES, SPARSE_NAMES
from dlrm.data.npz import NpzArray, open_npz
from dlrm.errors import UserError
from dlrm.files import environment_faults

BLOCK_ROWS = 1 << 16
"""Rows read at a time."""

_KAGGLE_DAYS = 7
_WHOLE = re.compile(r"(?!.*_[0-9]+_processed).+_processed\.npz")  # and not of a single day
_DAY = re.compile(r"(?P<prefix>.+)_(?P<day>[0-9]+)_reordered\.npz")
_BINARY = re.compile(r"(?P<prefix>.*)(?P<split>train|test|val)(?P<suffix>(_data)?\.bin)")
_SPLITS = ("train", "test", "val")
_COMPANION = re.compile(r"(?P<stem>.+)_(day_count|fea_count|fea_dict_[0-9]+)\.npz")
_ACCEPTED = (
    "kaggleAdDisplayChallenge_processed.npz; or day_0_reordered.npz and so on, beside "
    "day_fea_count.npz; or files whose names end in train.bin, test.bin and val.bin (or "
    "train_data.bin and so on), beside day_fea_count.npz"
)
_REMEDY = "Get the file again, or prepare from the raw rows instead."
_BINARY_TYPE = np.dtype("<i4")
_BINARY_WIDTH = 1 + len(DENSE_NAMES) + len(SPARSE_NAMES)

logger = logging.getLogger("dlrm")

Int32Array = npt.NDArray[np.int32]
Block = tuple[npt.NDArray[np.uint8], Int32Array, Int32Array]
Stored = tuple[npt.NDArray[Any], npt.NDArray[Any], npt.NDArray[Any]]


@dataclass(frozen=True)
class FixedSplits:
    """How many rows each split has, in the order in which they are stored."""

    train: int
    test: int
    validation: int


@dataclass(frozen=True, eq=False)
class PreparedRows:
    """Rows that the reference has prepared.

    Attributes:
        files: All that was found: those that hold rows first, in order.
        num_embeddings: Rows of each of the 26 tables.
        days: Rows of each day, in the order in which they are stored, the last for evaluation.
            Where splits are fixed all that trains counts as one day.
        fixed_splits: Which rows train, where the files say so; otherwise None.
        has_values: Whether the raw values behind the ids are known.
    """

    files: tuple[Path, ...]
    num_embeddings: tuple[int, ...]
    days: tuple[int, ...]
    fixed_splits: FixedSplits | None
    has_values: bool
    _parts: Sequence[_ArrayRows | _BinaryRows]
    _dictionaries: Sequence[NpzArray]

    def __len__(self) -> int:
        """Return the number of rows."""
        return sum(self.days)

    def blocks(self, first_row: int = 0) -> Iterator[Block]:
        """Read rows in the order in which they are stored, up to ``BLOCK_ROWS`` at a time.

        Args:
            first_row: The first one to read.

        Yields:
            Labels, (n,), zeros and ones; dense features, (n, 13), not negative; ids, (n, 26), each
            below its feature's ``num_embeddings``.

        Raises:
            UserError: A file is damaged, or holds a number that cannot be.
            EnvironmentFaultError: One cannot be read.
        """
        counts = np.array(self.num_embeddings)
        for part in self._parts:
            if first_row < part.rows:
                for row, (labels, dense, ids) in part.read(first_row):
                    names = [f"{part.path}, {name}" for name in part.names]
                    yield (
                        _integers(names[0], labels, 0, 2, row).astype(np.uint8),
                        np.maximum(_integers(names[1], dense, -(2**31), 2**31, row), 0),
                        _integers(names[2], ids, 0, counts, row),
                    )
            first_row = max(first_row - part.rows, 0)

    def value_blocks(self, feature: int) -> Iterator[npt.NDArray[np.uint32]]:
        """Read the raw values of a sparse feature in the order of their ids, some at a time.

        Raises:
            UserError: The file is damaged.
            EnvironmentFaultError: It cannot be read.
        """
        dictionary = self._dictionaries[feature]
        first = 0
        for values in dictionary.read_rows(BLOCK_ROWS):
            _require_integers(
                f"{dictionary.path}, array {dictionary.name}", values, -(2**31), 2**32, first
            )
            # A negative number has the same 32 bits as its value.
            yield values.astype(np.int64).astype(np.uint32)
            first += len(values)


def recognise(path: Path) -> PreparedRows:
    """Find what the reference has prepared, and what belongs to it.

    Args:
        path: A file that it wrote, or the folder it is in; of a file a day also what their names
            begin with (``data/day``). The name of one day's file means that day alone.

    Raises:
        UserError: There is no such thing, or more than one; or a file is missing or damaged, or
            does not fit the others.
        EnvironmentFaultError: A file cannot be read.
    """
    with environment_faults(f"read {path}"):
        folder = path if path.is_dir() else path.parent
        names = sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else []
    if path == folder:
        found = _find_sets(folder, names)
    elif path.name not in names:
        days = [name for name in names if _prefix(name) == path.name]
        found = {path.name: partial(_open_days, folder, names, path.name, days)} if days else {}
    elif _BINARY.fullmatch(path.name) or _DAY.fullmatch(path.name):
        found = _find_sets(folder, names, [path.name])
    elif path.suffix == ".npz":
        found = {path.name: partial(_open_whole, folder, names, path.name)}
    else:
        found = {}
    if not found:
        raise UserError(
            f"{path} is nothing that the reference has prepared, nor a folder that holds one such "
            f"thing. Name {_ACCEPTED}."
        )
    if len(found) > 1:
        raise UserError(
            f"{path} holds several things that the reference has prepared: {', '.join(found)}. "
            "Name the one that is meant."
        )
    (open_set,) = found.values()
    return open_set()


def _find_sets(
    folder: Path, names: list[str], chosen: list[str] | None = None
) -> dict[str, Callable[[], PreparedRows]]:
    """Return how to open what there is, by what to name to get it.

    Args:
        folder: Where it lies.
        names: Of all files there.
        chosen: The names to look at; None: all.
    """
    found: dict[str, Callable[[], PreparedRows]] = {}
    days: dict[str, list[str]] = {}
    for name in names if chosen is None else chosen:
        if match := _BINARY.fullmatch(name):
            what = f"{match['prefix']}train{match['suffix']}"
            found[what] = partial(_open_binary, folder, names, match["prefix"], match["suffix"])
        elif match := _DAY.fullmatch(name):
            days.setdefault(match["prefix"], []).append(name)
        elif _WHOLE.fullmatch(name):
            found[name] = partial(_open_whole, folder, names, name)
    for prefix, names_of_days in days.items():
        found[prefix] = partial(_open_days, folder, names, prefix, names_of_days)
    return found


def _open_whole(folder: Path, names: list[str], name: str) -> PreparedRows:
    """Open a file of all rows."""
    path = folder / name
    arrays = open_npz(path)
    part = _open_part(path, arrays)
    num_embeddings = _read_counts(_checked(path, arrays, "counts", (len(SPARSE_NAMES),)))
    companions = _Companions(folder, names, _find_stem(path, names))
    day_count = companions.open_array("day_count", "total_per_file")
    if day_count is None:
        shortest, longer = divmod(part.rows, _KAGGLE_DAYS)
        days = (shortest + 1,) * longer + (shortest,) * (_KAGGLE_DAYS - longer)
    else:
        days = _read_counts(day_count)
        if sum(days) != part.rows:
            raise UserError(
                f"{day_count.path}, array total_per_file: expected {part.rows} in all, the rows of "
                f"{path}, got {sum(days)}. It belongs to other rows: move one of them elsewhere."
            )
    return _assemble([part], days, num_embeddings, companions)


def _open_days(folder: Path, names: list[str], prefix: str, chosen: list[str]) -> PreparedRows:
    """Open files of a day each."""
    # Of Kaggle's rows, train.txt, their names begin with train_day.
    stems = (prefix, prefix.removesuffix("_day"))
    stem = next((stem for stem in stems if f"{stem}_fea_count.npz" in names), prefix)
    companions = _Companions(folder, names, stem)
    num_embeddings = companions.read_num_embeddings()
    day_count = companions.open_array("day_count", "total_per_file")
    expected = () if day_count is None else _read_counts(day_count)
    parts = []
    for day, path in sorted((_day_number(name), folder / name) for name in chosen):
        part = _open_part(path, open_npz(path))
        if day < len(expected) and part.rows != expected[day]:
            raise UserError(
                f"{path}, array y: expected {expected[day]} rows, the number of day {day} in "
                f"{companions.path('day_count')}, got {part.rows}. The two were not made together. "
                f"{_REMEDY}"
            )
        parts.append(part)
    days = tuple(part.rows for part in parts)
    return _assemble(parts, days, num_embeddings, companions)


def _open_binary(folder: Path, names: list[str], prefix: str, suffix: str) -> PreparedRows:
    """Open the three files of bare numbers."""
    parts = []
    for split in _SPLITS:
        path = folder / f"{prefix}{split}{suffix}"
        if path.name not in names:
            raise UserError(
                f"{path} does not exist. Of train, test and val all three are needed. {_REMEDY}"
            )
        with environment_faults(f"read {path}"):
            size = path.stat().st_size
        row_bytes = _BINARY_TYPE.itemsize * _BINARY_WIDTH
        if size == 0 or size % row_bytes:
            raise UserError(
                f"{path}: expected {row_bytes} bytes for each row, {_BINARY_WIDTH} integers of 32 "
                f"bits, got {size} bytes in all. It is cut short, or something else. {_REMEDY}"
            )
        parts.append(_BinaryRows(path, size // row_bytes))
    companions = _Companions(folder, names, _find_stem(parts[0].path, names))
    splits = FixedSplits(*(part.rows for part in parts))
    days = (splits.train, splits.test + splits.validation)
    return _assemble(parts, days, companions.read_num_embeddings(), companions, splits)


def _assemble(
    parts: Sequence[_ArrayRows | _BinaryRows],
    days: tuple[int, ...],
    num_embeddings: tuple[int, ...],
    companions: _Companions,
    fixed_splits: FixedSplits | None = None,
) -> PreparedRows:
    dictionaries = companions.open_dictionaries(num_embeddings)
    files = (*(part.path for part in parts), *companions.opened)
    return PreparedRows(
        files, num_embeddings, days, fixed_splits, bool(dictionaries), parts, dictionaries
    )


def _prefix(name: str) -> str | None:
    """Return what the names of a file a day begin with, if this is one."""
    match = _DAY.fullmatch(name)
    return match["prefix"] if match else None


def _day_number(name: str) -> int:
    match = _DAY.fullmatch(name)
    assert match  # names were chosen by it
    return int(match["day"])


def _find_stem(path: Path, names: list[str]) -> str:
    """Return the stem of the files beside rows in whose name it is not."""
    stems = sorted({match["stem"] for name in names if (match := _COMPANION.fullmatch(name))})
    if len(stems) > 1:
        raise UserError(
            f"beside {path} are files of several preparations, whose names begin with "
            f"{', '.join(stems)}. Leave in that folder only those that belong to it."
        )
    return stems[0] if stems else "day"


@dataclass(frozen=True)
class _Companions:
    """The small files that lie beside the rows, and which of them were opened."""

    folder: Path
    names: list[str]
    stem: str
    opened: list[Path] = field(default_factory=list)

    def path(self, kind: str) -> Path:
        """Return where a file would lie."""
        return self.folder / f"{self.stem}_{kind}.npz"

    def open_array(self, kind: str, name: str, length: int | None = None) -> NpzArray | None:
        """Open the vector in a file; None where there is no such file."""
        path = self.path(kind)
        if path.name not in self.names:
            return None
        self.opened.append(path)
        return _checked(path, open_npz(path), name, (length,))

    def read_num_embeddings(self) -> tuple[int, ...]:
        """Read the rows of each table."""
        counts = self.open_array("fea_count", "counts", len(SPARSE_NAMES))
        if counts is None:
            raise UserError(
                f"{self.path('fea_count')} does not exist, which tells how many ids each feature "
                "has. Put it beside the rows, or prepare from the raw rows instead."
            )
        return _read_counts(counts)

    def open_dictionaries(self, num_embeddings: tuple[int, ...]) -> tuple[NpzArray, ...]:
        """Open the raw values of all features; none unless all are there."""
        kinds = [f"fea_dict_{feature}" for feature in range(len(num_embeddings))]
        missing = [kind for kind in kinds if self.path(kind).name not in self.names]
        if missing:
            if len(missing) < len(kinds):
                logger.warning(
                    "%s does not exist, so raw values are taken to be unknown for all features",
                    self.path(missing[0]),
                )
            return ()
        dictionaries = []
        for kind, count in zip(kinds, num_embeddings, strict=True):
            dictionary = self.open_array(kind, "unique", count)
            assert dictionary  # it was found above
            dictionaries.append(dictionary)
        return tuple(dictionaries)


@dataclass(frozen=True)
class _ArrayRows:
    """Rows in a .npz file."""

    path: Path
    rows: int
    arrays: tuple[NpzArray, NpzArray, NpzArray]
    names = ("array y", "array X_int", "array X_cat")

    def read(self, first_row: int) -> Iterator[tuple[int, Stored]]:
        """Read runs of rows, each with the number of its first."""
        runs = [array.read_rows(BLOCK_ROWS, first_row) for array in self.arrays]
        for labels, dense, ids in zip(*runs, strict=True):
            yield first_row, (labels, dense, ids)
            first_row += len(labels)


@dataclass(frozen=True)
class _BinaryRows:
    """Rows in a file of bare numbers."""

    path: Path
    rows: int
    names = ("labels", "integers", "ids")

    def read(self, first_row: int) -> Iterator[tuple[int, Stored]]:
        """Read runs of rows, each with the number of its first."""
        row_bytes = _BINARY_TYPE.itemsize * _BINARY_WIDTH
        with environment_faults(f"read {self.path}"), open(self.path, "rb") as file:
            file.seek(first_row * row_bytes)
            while first_row < self.rows:
                rows = min(BLOCK_ROWS, self.rows - first_row)
                content = file.read(rows * row_bytes)
                if len(content) < rows * row_bytes:
                    raise UserError(f"{self.path} became shorter while it was read. {_REMEDY}")
                numbers = np.frombuffer(content, _BINARY_TYPE).reshape(rows, _BINARY_WIDTH)
                labels, dense, ids = np.split(numbers, [1, 1 + len(DENSE_NAMES)], axis=1)
                yield first_row, (labels[:, 0], dense, ids)
                first_row += rows


def _open_part(path: Path, arrays: dict[str, NpzArray]) -> _ArrayRows:
    labels = _checked(path, arrays, "y", (None,))
    rows = labels.shape[0]
    if rows == 0:
        raise UserError(f"{path} holds no rows. {_REMEDY}")
    dense = _checked(path, arrays, "X_int", (rows, len(DENSE_NAMES)))
    ids = _checked(path, arrays, "X_cat", (rows, len(SPARSE_NAMES)))
    return _ArrayRows(path, rows, (labels, dense, ids))


def _checked(
    path: Path, arrays: dict[str, NpzArray], name: str, shape: tuple[int | None, ...]
) -> NpzArray:
    """Return an array, which must be there and of numbers.

    Args:
        path: Its file.
        arrays: All arrays of the file.
        name: The one to return.
        shape: What it must have; None: any length.
    """
    if name not in arrays:
        raise UserError(
            f"{path} is not the reference's: expected an array {name}, got only "
            f"{', '.join(arrays) or 'none at all'}. {_REMEDY}"
        )
    array = arrays[name]
    expected = ["n" if length is None else str(length) for length in shape]
    if len(array.shape) != len(shape) or any(
        length not in (None, got) for length, got in zip(shape, array.shape, strict=True)
    ):
        raise UserError(
            f"{path}, array {name}: expected the shape ({', '.join(expected)}), got {array.shape}. "
            f"{_REMEDY}"
        )
    if array.dtype.kind not in "iuf":
        raise UserError(f"{path}, array {name}: expected numbers, got {array.dtype}. {_REMEDY}")
    return array


def _read_counts(array: NpzArray) -> tuple[int, ...]:
    name = f"{array.path}, array {array.name}"
    return tuple(_integers(name, array.read(), 1, 2**31, 0).tolist())


def _integers(
    name: str, values: npt.NDArray[Any], low: int, end: int | npt.NDArray[np.int_], first_row: int
) -> Int32Array:
    """Convert to int32 what ``_require_integers`` accepts."""
    _require_integers(name, values, low, end, first_row)
    return values.astype(np.int32)


def _require_integers(
    name: str, values: npt.NDArray[Any], low: int, end: int | npt.NDArray[np.int_], first_row: int
) -> None:
    """Check that every value is an integer in low … end-1.

    Args:
        name: Of the array, for messages.
        values: Some of its rows.
        low: The lowest value that can be.
        end: What values must be below; in an array, of each column.
        first_row: The first row's number.
    """
    good = (values >= low) & (values < end)
    if values.dtype.kind == "f":
        good &= values == np.floor(values)
    if not good.all():
        index = tuple(int(position) for position in np.argwhere(~good)[0])
        place = (first_row + index[0], *index[1:])
        raise UserError(
            f"{name}, at {place}: expected an integer of at least {low} and below "
            f"{end if isinstance(end, int) else end[index[-1]]}, got {values[index]}. {_REMEDY}"
        )
