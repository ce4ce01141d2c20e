"""What a baseline has to offer, whatever library computes it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from dlrm.config import BaselineConfig
from dlrm.data.dataset import Dataset, Rows
from dlrm.schema import FeatureSchema

OnRound = Callable[[int, float], None]
"""Told of each round: its number, from 1, and the log loss of the validation split after it."""


@dataclass(frozen=True)
class Fit:
    """How training went."""

    rounds: int
    """Rounds that were made: passes over the training rows, or trees."""
    best_round: int
    """The one whose model is kept, chosen on validation."""


class BaselineModel(ABC):
    """A model of the click probability.

    Args:
        schema: Of the features.
        config: Its options.
    """

    library: ClassVar[str]
    """The package that computes it."""
    round_name: ClassVar[str]
    """What a round is."""

    def __init__(self, schema: FeatureSchema, config: BaselineConfig) -> None:
        self.schema = schema
        self.config = config

    @abstractmethod
    def memory_bytes(self, rows: int, validation_rows: int) -> int:
        """Return about how much memory it takes to fit to so many training rows."""

    @abstractmethod
    def memory_bytes_a_row(self) -> int:
        """Return how much of that each training row takes."""

    @abstractmethod
    def fit(self, data: Dataset, rows: int, on_round: OnRound) -> Fit:
        """Train on so many of the training rows, and choose the best round on validation."""

    @abstractmethod
    def probabilities(self, rows: Rows) -> npt.NDArray[np.float32]:
        """Return the click probabilities, (n,), by the best round's model."""
