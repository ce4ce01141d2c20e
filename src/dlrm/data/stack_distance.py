"""Stack distances of a column's ids: measured, written, and drawn from, to make up another column.

The stack distance of an access is how many distinct ids were accessed since the last access to the
same one, itself included; 0 where there was none before (Mattson et al., *Evaluation techniques for
storage hierarchies*, 1970). Their distribution tells how often a cache of any size would hit.
"""

from __future__ import annotations

import bisect
import logging
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from dlrm.data.dataset import Dataset, Rows
from dlrm.data.numbering import count_numbers
from dlrm.errors import UserError
from dlrm.files import atomic_write, environment_faults
from dlrm.ops.library import library
from dlrm.progress import progress
from dlrm.schema import Split

logger = logging.getLogger("dlrm")

T = TypeVar("T", int, float)

Int32Array = npt.NDArray[np.int32]
FloatArray = npt.NDArray[np.float64]

_PLACEHOLDER = re.compile(r"(?<![^\W_])j(?![^\W_])")
"""In the name of a file of stack distances, the number of the table: no j of a word."""
_FEWEST_SLOTS = 1 << 10
_PIECE = 1 << 20
"""Characters and numbers that are read or written at a time."""


@dataclass(frozen=True, eq=False)
class StackDistances:
    """How a column's ids repeat.

    Attributes:
        ids: (n,) int64, distinct, in the order in which they first occur.
        distances: (k,) int32, ascending from 0: those that occur.
        cumulative: (k,) the share of accesses whose distance is at most that.
    """

    ids: npt.NDArray[np.int64]
    distances: Int32Array
    cumulative: FloatArray

    def write(self, path: Path) -> None:
        """Write them as the reference does: three lines of numbers, separated by commas."""
        with atomic_write(path) as file:
            for numbers in (self.ids, self.distances, self.cumulative):
                for start in range(0, len(numbers), _PIECE):
                    piece = numbers[start : start + _PIECE].tolist()
                    file.write((", " * (start > 0) + ", ".join(map(repr, piece))).encode())
                file.write(b"\n")

    @staticmethod
    def read(path: Path) -> StackDistances:
        """Read what ``write``, or the reference, wrote.

        Raises:
            UserError: There is no such file, or it holds something else.
            EnvironmentFaultError: The disk fails.
        """
        refuse_missing(path)
        with (
            environment_faults(f"read {path}"),
            open(path, encoding="ascii", errors="replace") as file,
        ):
            try:
                read = StackDistances(
                    _read_numbers(file, int, np.int64),
                    _read_numbers(file, int, np.int32),
                    _read_numbers(file, float, np.float64),
                )
            except (ValueError, OverflowError) as error:
                raise UserError(
                    f"{path} does not hold stack distances: {error}. Expected three lines of "
                    "numbers, separated by commas: ids, distances, cumulative shares."
                ) from error
        read._refuse_impossible(path)
        return read

    def _refuse_impossible(self, path: Path) -> None:
        distances, cumulative = self.distances, self.cumulative
        for is_so, expected in (
            (len(self.ids) > 0 and self.ids.min() >= 0, "at least one id, none negative"),
            (len(distances) == len(cumulative), "as many shares as distances"),
            (
                len(distances) > 0 and distances[0] == 0 and bool((np.diff(distances) > 0).all()),
                "distances that rise from 0",
            ),
            (
                max(distances, default=0) <= len(self.ids) <= _MOST_ITEMS,
                f"no distance above the number of ids, and at most {_MOST_ITEMS} ids",
            ),
            (
                len(cumulative) > 0
                and cumulative[0] > 0
                and bool((np.diff(cumulative) >= 0).all())
                and abs(cumulative[-1] - 1) < 1e-6,
                "shares that rise to 1",
            ),
        ):
            if not is_so:
                raise UserError(
                    f"{path} does not hold stack distances that can be: expected {expected}. "
                    "`dlrm stack-distances` writes such, from a DATASET."
                )


def refuse_missing(path: Path) -> None:
    """Refuse what is no file of stack distances because it is no file.

    Raises:
        UserError: It is not.
    """
    if not path.is_file():
        raise UserError(
            f"{path} is not a file. `dlrm stack-distances` writes such, from a DATASET; in the "
            "name a j that stands alone, as in dist_emb_j.log, is the number of the table."
        )


def _read_numbers(file: IO[str], kind: Callable[[str], T], dtype: type[Any]) -> npt.NDArray[Any]:
    """Read a line of numbers, a piece at a time: a line can be some hundred megabytes."""
    pieces = [np.empty(0, dtype)]
    rest = ""
    while piece := file.readline(_PIECE):
        rest += piece
        is_end = rest.endswith("\n")
        if not is_end:
            whole, comma, rest = rest.rpartition(",")
            if not comma:
                rest = whole + rest
                continue
        else:
            whole, rest = rest, ""
        pieces.append(np.fromiter(map(kind, whole.split(",")), dtype))
        if is_end:
            break
    if rest:  # a last line that does not end
        pieces.append(np.fromiter(map(kind, rest.split(",")), dtype))
    return np.concatenate(pieces)


_MOST_ITEMS = 2**30
"""A stack of so many has slots that int32 numbers."""


class AccessStack(Protocol):
    """Items in the order of their last access, on top the newest."""

    def distances(self, items: Int32Array) -> Int32Array:
        """Access items, (n,), one after the other; return the stack distance of each."""

    def draw(self, uniforms: FloatArray, drawn: StackDistances, *, padding: bool) -> Int32Array:
        """Access items at drawn stack distances.

        The reference's ``trace_generate_lru``: a new item, at distance 0, is the one that lies
        deepest, so that all take their turns, and while not all distances are possible yet the
        distribution is cut off.

        Args:
            uniforms: (n,) in 0 … 1.
            drawn: The distribution.
            padding: Once the largest distance is possible, draw no new items.

        Returns:
            The items, (n,).
        """


def make_stack(items: int, *, full: bool = False) -> AccessStack:
    """Return the fastest AccessStack there is, of items 0 … items-1.

    Args:
        items: How many there can be.
        full: All are on it, the last on top; else none.
    """
    return NativeStack(items, full=full) if library().loaded else PlainStack(items, full=full)


class NativeStack:
    """native/stack_distance.cpp: a Fenwick tree over the times of the last accesses."""

    def __init__(self, items: int, *, full: bool = False) -> None:
        capacity = max(2 * items, _FEWEST_SLOTS)
        self._places = torch.full((items,), -1, dtype=torch.int32)
        self._slots = torch.full((capacity,), -1, dtype=torch.int32)
        self._tree = torch.zeros(capacity + 1, dtype=torch.int32)
        self._state = torch.zeros(2, dtype=torch.int64)  # the next slot, how many items
        self._fresh = 0
        if full:
            torch.arange(items, dtype=torch.int32, out=self._places)
            self._slots[:items] = self._places
            numbers = torch.arange(capacity + 1)
            covered = numbers - (numbers & -numbers)  # up to this slot, another node counts
            self._tree += (numbers.clamp(max=items) - covered).clamp(min=0).int()
            self._state.fill_(items)

    def distances(self, items: Int32Array) -> Int32Array:
        """Return stack distances; see ``AccessStack``."""
        found = torch.empty(len(items), dtype=torch.int32)
        torch.ops.dlrm.stack_distances(
            torch.from_numpy(items), self._places, self._slots, self._tree, self._state, found
        )
        return found.numpy()

    def draw(self, uniforms: FloatArray, drawn: StackDistances, *, padding: bool) -> Int32Array:
        """Draw; see ``AccessStack``."""
        items = torch.empty(len(uniforms), dtype=torch.int32)
        self._fresh = torch.ops.dlrm.draw_accesses(
            torch.from_numpy(uniforms),
            torch.from_numpy(drawn.distances),
            torch.from_numpy(drawn.cumulative),
            padding,
            self._fresh,
            self._slots,
            self._tree,
            self._state,
            items,
        )
        return items.numpy()


class PlainStack:
    """The same in Python, its twin."""

    def __init__(self, items: int, *, full: bool = False) -> None:
        self._capacity = max(2 * items, _FEWEST_SLOTS)
        self._fresh = 0
        self._number_anew(range(items) if full else ())

    def distances(self, items: Int32Array) -> Int32Array:
        """Return stack distances; see ``AccessStack``."""
        found = np.zeros(len(items), np.int32)
        for number, item in enumerate(items.tolist()):
            if (slot := self._place.get(item)) is not None:
                found[number] = len(self._place) - self._taken_before(slot)
            self._access(item)
        return found

    def draw(self, uniforms: FloatArray, drawn: StackDistances, *, padding: bool) -> Int32Array:
        """Draw; see ``AccessStack``."""
        distances, cumulative = drawn.distances.tolist(), drawn.cumulative.tolist()
        items = np.empty(len(uniforms), np.int32)
        for number, uniform in enumerate(uniforms.tolist()):
            if self._fresh < distances[-1]:
                uniform *= cumulative[bisect.bisect_right(distances, self._fresh) - 1]
            elif padding:
                uniform = (1 - cumulative[0]) * uniform + cumulative[0]
            kind = min(bisect.bisect_left(cumulative, uniform), len(distances) - 1)
            self._fresh += distances[kind] == 0
            item = self._item_at(distances[kind] or len(self._place))
            items[number] = item
            self._access(item)
        return items

    def _access(self, item: int) -> None:
        if self._next == self._capacity:
            self._number_anew(sorted(self._place, key=self._place.__getitem__))
        slot = self._place.pop(item, None)
        if slot is not None:
            self._count(slot, -1)
        self._place[item] = self._next
        self._item[self._next] = item
        self._count(self._next, 1)
        self._next += 1

    def _number_anew(self, items: Iterable[int]) -> None:
        self._tree = [0] * (self._capacity + 1)
        self._item = [-1] * self._capacity
        self._place: dict[int, int] = {}
        self._next = 0
        for item in items:
            self._access(item)

    def _count(self, slot: int, count: int) -> None:
        node = slot + 1
        while node <= self._capacity:
            self._tree[node] += count
            node += node & -node

    def _taken_before(self, slot: int) -> int:
        taken, node = 0, slot
        while node:
            taken += self._tree[node]
            node &= node - 1
        return taken

    def _item_at(self, depth: int) -> int:
        before = len(self._place) - depth
        slot = 0
        for power in reversed(range(self._capacity.bit_length())):
            node = slot + (1 << power)
            if node <= self._capacity and self._tree[node] <= before:
                slot = node
                before -= self._tree[node]
        return self._item[slot]


def measure(runs: Iterable[Int32Array], limit: int, *, padding: bool = False) -> StackDistances:
    """Measure the stack distances of n accesses, in n log n time and memory for the table alone.

    Args:
        runs: The accessed ids, each below ``limit``, in runs of any length.
        limit: The table's rows.
        padding: Count more new accesses than there are, as many as an access at the largest
            distance has accesses on average: the reference's, for traces in which few are new.

    Raises:
        UserError: There is no access, or the table is too large.
    """
    if limit > _MOST_ITEMS:
        raise UserError(
            f"a table of {limit} rows is too large to measure stack distances of; at most "
            f"{_MOST_ITEMS} can be. Prepare the DATASET with --max-ind-range or --hash-buckets."
        )
    stack = make_stack(limit)
    counts = np.zeros(limit + 1, np.int64)
    first = [np.empty(0, np.int64)]
    for ids in runs:
        found = stack.distances(np.require(ids, np.int32, ["C", "W"]))  # torch wants it writable
        count_numbers(found, counts)
        first.append(ids[found == 0].astype(np.int64))
    occurring = np.flatnonzero(counts)
    if not len(occurring):
        raise UserError("there is no id whose stack distances could be measured.")
    if padding and occurring[-1] > 0:
        counts[0] += -(-int(counts.sum()) // int(occurring[-1]))
    shares = np.cumsum(counts[occurring] / counts.sum())
    return StackDistances(np.concatenate(first), occurring.astype(np.int32), shares)


class Accesses:
    """Ids of a table drawn so that they repeat at given stack distances, over any number of calls.

    Args:
        drawn: The distribution. Ids beyond the table are taken modulo its rows, with a warning.
        num_embeddings: The table's rows.
        name: Of the feature, for the warning.
        padding: See ``AccessStack.draw``.
    """

    def __init__(
        self, drawn: StackDistances, num_embeddings: int, name: str, *, padding: bool = False
    ) -> None:
        if drawn.ids.max() >= num_embeddings:
            logger.warning(
                "the stack distances for %s are of ids up to %d, and its table has %d rows: ids "
                "are taken modulo that",
                name,
                drawn.ids.max(),
                num_embeddings,
            )
        self._drawn = drawn
        self._ids = (drawn.ids % num_embeddings).astype(np.int32)
        self._padding = padding
        self._stack = make_stack(len(drawn.ids), full=True)

    def draw(self, uniforms: FloatArray) -> Int32Array:
        """Return the next ids, (n,), from uniform numbers, (n,)."""
        return self._ids[self._stack.draw(uniforms, self._drawn, padding=self._padding)]


def trace_path(pattern: Path, table: int) -> Path:
    """Return the file of a table's stack distances: a j alone in the name stands for its number."""
    return pattern.with_name(_PLACEHOLDER.sub(str(table), pattern.name))


def write_stack_distances(
    dataset: Path | str,
    pattern: Path | str,
    *,
    split: Split = "train",
    features: Sequence[str] = (),
    padding: bool = False,
    overwrite: bool = False,
) -> dict[str, Path]:
    """Write the stack distances of a DATASET's sparse features, a file for each.

    Args:
        dataset: A DATASET.
        pattern: The files; a j alone in the name stands for the place among ``features``, from 0,
            so that the first is for the first table that is generated.
        split: The rows to measure, in stored order.
        features: Their names, in the order of tables; none: all.
        padding: See ``measure``.
        overwrite: Replace files that are there.

    Returns:
        The files by the feature's name.

    Raises:
        UserError: There is no such feature, the name has no j for several, a file is there already,
            or the split is empty.
        EnvironmentFaultError: The disk is full or fails.
    """
    data, pattern = Dataset.open(Path(dataset)), Path(pattern)
    names = [feature.name for feature in data.schema.sparse]
    for name in features:
        if name not in names:
            raise UserError(f"there is no sparse feature {name!r}. There are {', '.join(names)}.")
    files = {name: trace_path(pattern, place) for place, name in enumerate(features or names)}
    if len(set(files.values())) < max(len(features), len(files)):
        raise UserError(
            f"{pattern} is to be the name of {len(files)} files, each of another feature: put a j "
            "that stands alone into it, for the number, as in dist_emb_j.log."
        )
    if not pattern.parent.is_dir():
        raise UserError(f"{pattern.parent} is not a folder. Make it, or choose another place.")
    for file in files.values():
        if file.exists() and not overwrite:
            raise UserError(f"{file} exists. Choose another name, or replace it with --overwrite.")
    for name, file in progress("stack distances", len(files), files.items(), unit="features"):
        number = names.index(name)
        runs = (_ids_of(run, data, number) for run in data.stored_rows(split, 0, data.rows(split)))
        measure(runs, data.schema.num_embeddings[number], padding=padding).write(file)
    return files


def _ids_of(rows: Rows, data: Dataset, number: int) -> Int32Array:
    """Return the known ids of a sparse feature, in stored order."""
    feature = data.schema.sparse[number]
    if feature.multi_hot:
        return rows.bags[data.schema.multi_hot_features.index(feature)].ids
    ids = rows.sparse[:, data.schema.one_id_features.index(feature)]
    return ids[ids >= 0]
