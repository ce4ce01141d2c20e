"""Progress bars, all alike."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from tqdm import tqdm


def progress(
    description: str, total: int | None, items: Iterable[Any] | None = None, **options: Any
) -> tqdm[Any]:
    """Return a bar on standard error that is seen after two seconds, and in a terminal only.

    Args:
        description: What goes on.
        total: How many units it takes; None: nobody knows.
        items: What to iterate over, a unit each; None: the caller updates the bar.
        options: More of tqdm's.
    """
    return tqdm(items, description, total, delay=2, disable=None, leave=False, **options)
