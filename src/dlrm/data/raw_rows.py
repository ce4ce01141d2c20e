"""Raw rows as they are read: parsed, but not yet encoded."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dlrm.data.criteo import Position


@dataclass(frozen=True, eq=False)
class RawRows:
    """Consecutive rows of an input, n of them.

    Attributes:
        labels: (n,) zeros and ones, or None where rows have no label.
        dense: (n, number of dense features) int32; missing and negative values are 0.
        sparse: (n, F) uint32; missing ones are 0.
        end: Where they end, and reading can go on.
    """

    labels: npt.NDArray[np.uint8] | None
    dense: npt.NDArray[np.int32]
    sparse: npt.NDArray[np.uint32]
    end: Position

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.dense)
