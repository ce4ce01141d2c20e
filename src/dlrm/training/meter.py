"""What was trained since the last report, and how long it took."""

from __future__ import annotations

import time

import torch

from dlrm.device import synchronize
from dlrm.training.saving import Metered


class Meter:
    """Mean loss, rows and seconds since it was made or last read.

    Args:
        device: Where the losses are.
        metered: What it goes on from.
    """

    def __init__(self, device: torch.device, metered: Metered) -> None:
        self._device = device
        self._loss = torch.tensor(metered.loss, dtype=torch.float64, device=device)
        self._samples = metered.samples
        self._steps = metered.steps
        self._seconds = metered.seconds
        self._data_wait_seconds = metered.data_wait_seconds
        self._since = 0.0

    def go_on(self) -> None:
        """Let time count from now on."""
        synchronize(self._device)
        self._since = time.perf_counter()

    def pause(self) -> None:
        """Let no more time count."""
        synchronize(self._device)
        self._seconds += time.perf_counter() - self._since

    def state(self) -> Metered:
        """Return what was added, and the time up to the last pause."""
        return Metered(
            self._loss.item(), self._samples, self._steps, self._seconds, self._data_wait_seconds
        )

    def waited(self, seconds: float) -> None:
        """Count time that was spent waiting for data."""
        self._data_wait_seconds += seconds

    def add(self, loss: torch.Tensor, samples: int) -> None:
        """Count a step: its mean loss, a scalar, and its rows."""
        self._loss.add_(loss, alpha=samples)
        self._samples += samples
        self._steps += 1

    def read(self) -> tuple[float, int, int, float, float]:
        """Return mean loss, samples, steps, seconds and those without data, and start anew."""
        self.pause()
        loss = self._loss.item() / self._samples
        read = (loss, self._samples, self._steps, self._seconds, self._data_wait_seconds)
        self._loss.zero_()
        self._samples = self._steps = 0
        self._seconds = self._data_wait_seconds = 0.0
        self.go_on()
        return read
