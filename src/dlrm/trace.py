"""Named ranges in a profiler's trace; they cost next to nothing while nobody profiles."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TypeVar

import torch

T = TypeVar("T")

_NOTHING = nullcontext()
_recorders = 0


def part(name: str) -> AbstractContextManager[object]:
    """Return a context that is a range of this name in a trace."""
    # torch's own range costs some microseconds even without a profiler.
    return torch.profiler.record_function(name) if _recorders else _NOTHING


def waiting(items: Iterable[T], name: str, waited: Callable[[float], None]) -> Iterator[T]:
    """Yield items; the time until each is there is a range of this name in a trace.

    Args:
        items: What to yield.
        name: The range's name.
        waited: Told the seconds that it took until an item was there.
    """
    iterator = iter(items)
    while True:
        began = time.perf_counter()
        with part(name):
            try:
                item = next(iterator)
            except StopIteration:
                return
        waited(time.perf_counter() - began)
        yield item


@contextmanager
def recording() -> Iterator[None]:
    """Make ``part`` and ``waiting`` record."""
    global _recorders
    _recorders += 1
    try:
        yield
    finally:
        _recorders -= 1
