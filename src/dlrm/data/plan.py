"""What preparing takes, told before it begins: rows, disk, memory, time."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from dlrm.data import criteo
from dlrm.data.dataset import row_bytes
from dlrm.device import available_cores
from dlrm.files import free_bytes, refuse_small_disk, size_text

logger = logging.getLogger("dlrm")

_ROWS_PER_SECOND = 180_000
"""A core's, about, for the first guess of a plan."""


@dataclass(frozen=True)
class Plan:
    """What is known before rows are read."""

    names: tuple[str, ...]
    """Of the files that are read."""
    source_bytes: int
    rows: int
    """About; 0: not known."""
    shuffled: bool
    made_bytes: int
    """What an interrupted preparation has made already."""
    ceiling: int
    """The most memory, in bytes."""

    def tell(self, dataset: Path) -> None:
        """Tell the plan, and refuse a disk that is too small.

        Args:
            dataset: Where the DATASET goes.

        Raises:
            EnvironmentFaultError: The disk is too small.
        """
        free = free_bytes(dataset)
        stored = self.rows * _stored_row_bytes()
        # The spool, narrower than what is stored, is gone by the time that parts are written.
        needed = 2 * stored + (8 * self.rows if self.shuffled else 0) - self.made_bytes
        names = self.names
        shown = names[0] if len(names) == 1 else f"{names[0]} … {names[-1]} ({len(names)} files)"
        seconds = self.rows / _ROWS_PER_SECOND / available_cores()
        logger.info(
            "plan: %s, %s%s; a DATASET of about %s, with %s of disk while it is made (%s are "
            "free); at most %s of memory%s",
            shown,
            size_text(self.source_bytes),
            f", about {self.rows:,} rows" if self.rows else "",
            size_text(stored),
            size_text(max(needed, 0)),
            size_text(free),
            f"{self.ceiling / 2**30:.1f} GiB",
            f"; about {_duration(seconds)}" if self.rows else "",
        )
        refuse_small_disk(dataset, needed)


def _stored_row_bytes() -> int:
    return row_bytes(criteo.schema((1,) * len(criteo.SPARSE_NAMES), ""))


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{max(1, round(seconds))} s"
    return f"{round(seconds / 60)} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
