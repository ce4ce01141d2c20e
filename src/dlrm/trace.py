"""Named ranges in a profiler's trace; they cost next to nothing while nobody profiles."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
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


def waiting(items: Iterable[T], name: str) -> Iterator[T]:
    """Yield items; the time until each is there is a range of this name in a trace."""
    iterator = iter(items)
    while True:
        with part(name):
            try:
                item = next(iterator)
            except StopIteration:
                return
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
