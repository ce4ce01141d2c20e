"""Values numbered in order of first appearance, while they stream by: the heart of preparation.

The tables of all features share a budget of memory. When it is used up, the largest starts anew: a
new *generation* of that feature, which numbers from 0 again. So does one that runs out of numbers.
``data/fitting.py`` joins the generations of a feature, so that its ids do not depend on where one
ended.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from dlrm.ops.library import library

Int32Array = npt.NDArray[np.int32]
UInt32Array = npt.NDArray[np.uint32]

_SMALLEST_TABLE = 1 << 10
_GROWTH = 1.5
_MAX_LOAD = 0.8
_SLOT_BYTES = 8
_MOST_NUMBERS = 2**31 - 1
"""Of a generation: a number is an int32."""


class Numbering(Protocol):
    """Numbers one feature's values in order of first appearance."""

    @property
    def nbytes(self) -> int:
        """Memory that it holds."""

    def __len__(self) -> int:
        """Return how many values have a number."""

    def number(self, values: UInt32Array) -> tuple[Int32Array, UInt32Array]:
        """Number the next values.

        Args:
            values: (n,).

        Returns:
            Their numbers, (n,), and those values that are new, in the order of their numbers.
        """

    def restore(self, values: UInt32Array) -> None:
        """Take over the next values to be numbered, each of them new, in order."""

    def growth(self, more: int) -> int:
        """Return how many bytes room for so many more values takes while it is being made."""

    def grow(self, more: int) -> None:
        """Make room for so many more values."""


def count_numbers(numbers: Int32Array, counts: npt.NDArray[np.int64]) -> None:
    """Count how often each number occurs.

    Args:
        numbers: (n,), each below k.
        counts: (k,), added to.
    """
    if library().loaded:
        torch.ops.dlrm.count_numbers(torch.from_numpy(numbers), torch.from_numpy(counts))
    else:
        np.add.at(counts, numbers, 1)


def make_numbering() -> Numbering:
    """Return the fastest Numbering there is."""
    return NativeNumbering() if library().loaded else PlainNumbering()


class NativeNumbering:
    """An open-addressed hash table (native/numbering.cpp) of 8 bytes a slot, at most 0.8 full."""

    def __init__(self) -> None:
        self._slots = torch.zeros(_SMALLEST_TABLE, dtype=torch.int64)
        self._known = 0

    def __len__(self) -> int:
        return self._known

    @property
    def nbytes(self) -> int:
        """Memory that it holds."""
        return self._slots.nbytes

    @property
    def _limit(self) -> int:
        return int(len(self._slots) * _MAX_LOAD)

    def number(self, values: UInt32Array) -> tuple[Int32Array, UInt32Array]:
        """Number the next values; see ``Numbering``."""
        source = torch.from_numpy(values)
        numbers = torch.empty(len(values), dtype=torch.int32)
        new_values = torch.empty(len(values), dtype=torch.uint32)
        first = self._known
        self.grow(len(values))
        self._known = torch.ops.dlrm.number_values(source, self._slots, numbers, new_values, first)
        return numbers.numpy(), new_values[: self._known - first].numpy().copy()

    def restore(self, values: UInt32Array) -> None:
        """Take over values; see ``Numbering``."""
        self.grow(len(values))
        torch.ops.dlrm.insert_values(torch.from_numpy(values), self._slots, self._known)
        self._known += len(values)

    def growth(self, more: int) -> int:
        """Return what growing takes; see ``Numbering``."""
        return _SLOT_BYTES * self._slots_for(more) if self._known + more > self._limit else 0

    def grow(self, more: int) -> None:
        """Make room; see ``Numbering``."""
        if self._known + more > self._limit:
            slots = torch.zeros(self._slots_for(more), dtype=torch.int64)
            torch.ops.dlrm.move_slots(self._slots, slots)
            self._slots = slots

    def _slots_for(self, more: int) -> int:
        needed = int((self._known + more) / _MAX_LOAD) + 2
        return max(needed, int(len(self._slots) * _GROWTH))


class PlainNumbering:
    """The same with NumPy: sorted values and their numbers, merged with new ones call by call."""

    def __init__(self) -> None:
        self._values = np.empty(0, np.uint32)
        self._numbers = np.empty(0, np.int32)

    def __len__(self) -> int:
        return len(self._values)

    @property
    def nbytes(self) -> int:
        """Memory that it holds."""
        return self._values.nbytes + self._numbers.nbytes

    def number(self, values: UInt32Array) -> tuple[Int32Array, UInt32Array]:
        """Number the next values; see ``Numbering``."""
        distinct, first, inverse = np.unique(values, return_index=True, return_inverse=True)
        place = np.searchsorted(self._values, distinct)
        known = np.zeros(len(distinct), bool)
        inside = place < len(self._values)
        known[inside] = self._values[place[inside]] == distinct[inside]
        numbers = np.empty(len(distinct), np.int32)
        numbers[known] = self._numbers[place[known]]
        new = np.flatnonzero(~known)
        new = new[np.argsort(first[new])]  # in order of first appearance
        numbers[new] = np.arange(len(self), len(self) + len(new))
        new_values = distinct[new]
        self.restore(new_values)
        return numbers[inverse], new_values

    def restore(self, values: UInt32Array) -> None:
        """Take over values; see ``Numbering``."""
        order = np.argsort(values)
        place = np.searchsorted(self._values, values[order])
        numbers = np.arange(len(self), len(self) + len(values), dtype=np.int32)
        self._numbers = np.insert(self._numbers, place, numbers[order])
        self._values = np.insert(self._values, place, values[order])

    def growth(self, more: int) -> int:
        """Return what growing takes; see ``Numbering``."""
        return _SLOT_BYTES * (len(self) + more)

    def grow(self, more: int) -> None:
        """Make room; see ``Numbering``. There is nothing to do before the values come."""


class FeatureNumberings:
    """The Numberings of all features, within a budget of memory.

    Args:
        features: How many there are.
        budget: Bytes that all tables may take together.
    """

    def __init__(self, features: int, budget: int) -> None:
        self._budget = budget
        self.features: list[Numbering] = [make_numbering() for _ in range(features)]
        self.generations = [0] * features
        """How often each feature has started anew."""

    def begin_segment(self, rows: int) -> None:
        """Make room for as many new values as a segment of so many rows can have.

        Features start new generations, the largest first, where the budget does not suffice, and
        each that might run out of numbers. Only here: within a segment all rows are numbered by one
        generation.
        """
        for feature in range(len(self.features)):
            if len(self.features[feature]) + rows > _MOST_NUMBERS:
                self._start_anew(feature)
            while self._taken() + self.features[feature].growth(rows) > self._budget:
                largest = max(
                    range(len(self.features)), key=lambda each: self.features[each].nbytes
                )
                if not len(self.features[largest]):
                    break  # a budget too small for a segment: grow all the same
                self._start_anew(largest)
            self.features[feature].grow(rows)

    def number(self, feature: int, values: UInt32Array) -> tuple[Int32Array, UInt32Array]:
        """Number the next values of a feature; see ``Numbering.number``."""
        return self.features[feature].number(values)

    def restore(self, feature: int, generation: int, values: Sequence[UInt32Array]) -> None:
        """Go on from where an earlier process stopped.

        Args:
            feature: Which feature.
            generation: Its last.
            values: Of that generation, the new values of each segment, in order.
        """
        self.generations[feature] = generation
        self.features[feature].restore(np.concatenate(values))

    def _start_anew(self, feature: int) -> None:
        self.features[feature] = make_numbering()
        self.generations[feature] += 1

    def _taken(self) -> int:
        return sum(numbering.nbytes for numbering in self.features)
