"""What was trained since the last report, and how long it took."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

import torch

from dlrm.device import synchronize


@dataclass
class Metered:
    """What was trained since the last report."""

    loss: float = 0.0
    """Summed over rows."""
    samples: int = 0
    steps: int = 0
    seconds: float = 0.0
    data_wait_seconds: float = 0.0
    """Of these, spent waiting for data."""


class Meter:
    """Losses, rows, steps and seconds since it was made or last read.

    Args:
        device: Where the losses are.
        metered: What it goes on from.
    """

    def __init__(self, device: torch.device, metered: Metered) -> None:
        self._device = device
        # Summed on the device, since a look at a loss would wait for it.
        self._loss = torch.tensor(metered.loss, dtype=torch.float64, device=device)
        self._metered = replace(metered)
        self._since = 0.0

    def go_on(self) -> None:
        """Let time count from now on."""
        synchronize(self._device)
        self._since = time.perf_counter()

    def pause(self) -> None:
        """Let no more time count."""
        synchronize(self._device)
        self._metered.seconds += time.perf_counter() - self._since

    def state(self) -> Metered:
        """Return what was added, and the time up to the last pause."""
        return replace(self._metered, loss=self._loss.item())

    def waited(self, seconds: float) -> None:
        """Count time that was spent waiting for data."""
        self._metered.data_wait_seconds += seconds

    def add(self, loss: torch.Tensor, samples: int) -> None:
        """Count a step: its mean loss, a scalar, and its rows."""
        self._loss.add_(loss, alpha=samples)
        self._metered.samples += samples
        self._metered.steps += 1

    def read(self) -> Metered:
        """Return what was added up to now, and start anew."""
        self.pause()
        read = self.state()
        self._loss.zero_()
        self._metered = Metered()
        self.go_on()
        return read
