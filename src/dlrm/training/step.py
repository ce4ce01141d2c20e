"""One training step."""

from __future__ import annotations

from typing import Literal, Protocol

import torch
from torch import Tensor

from dlrm.config import Amp, LossConfig
from dlrm.data.batch import Batch
from dlrm.device import autocast, gradient_scaler
from dlrm.model import fused_tables
from dlrm.model.dlrm import DLRM
from dlrm.model.loss import mean_loss
from dlrm.trace import part
from dlrm.training.native_step import NativeStep, supports
from dlrm.training.optimizer import Optimizer


class Step(Protocol):
    """Takes training steps on a model; which one is a matter of speed alone."""

    kernels: Literal["native", "plain"]
    reason: str
    """Why this step was chosen."""
    scaler: torch.amp.GradScaler | None
    """What scales gradients in mixed precision, where that is needed."""
    skipped_steps: int
    """Calls that moved nothing, since a scaled gradient was not finite."""

    def __call__(self, batch: Batch, rate: float) -> Tensor:
        """Take a step and return the mean loss before it; see ``EagerStep``."""


def choose_step(
    model: DLRM,
    optimizer: Optimizer,
    loss: LossConfig,
    amp: Amp = "O0",
    *,
    part_rows: int = 0,
) -> Step:
    """Return the fastest step that supports a configuration.

    Args:
        model: Moved by every call.
        optimizer: Over the same model.
        loss: What is minimised.
        amp: Whether matrices are multiplied in lower precision.
        part_rows: Of a batch with more rows than this, so many are computed at a time, and their
            gradients added up (``NativeStep`` has parts of its own); 0: all at once.
    """
    chosen, reason = supports(model, amp)
    if chosen:
        return NativeStep(model, optimizer, loss, reason)
    step = EagerStep(model, optimizer, loss, amp, reason, part_rows=part_rows)
    fuses, tables = fused_tables.supports(
        model.sparse_arch,
        scales_gradients=step.scaler is not None,
        accumulates=part_rows > 0,
    )
    if fuses:
        optimizer.fuse_tables()
    if model.device.type != "cpu":
        step.reason = f"{reason}; {tables}"
    return step


class EagerStep:
    """A step through autograd and plain operators.

    It takes any configuration, and is the specification that faster steps are tested against.

    Args:
        model: Moved by every call.
        optimizer: Over the same model.
        loss: What is minimised.
        amp: Whether matrices are multiplied in lower precision.
        reason: Why this step was chosen.
        part_rows: Of a batch with more rows than this, so many are computed at a time, and their
            gradients added up; 0: all at once.
    """

    kernels: Literal["native", "plain"] = "plain"

    def __init__(
        self,
        model: DLRM,
        optimizer: Optimizer,
        loss: LossConfig,
        amp: Amp = "O0",
        reason: str = "it was asked for",
        *,
        part_rows: int = 0,
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        self.loss = loss
        self.amp: Amp = amp
        self.reason = reason
        self.part_rows = part_rows
        self.device = model.device
        self.scaler = gradient_scaler(self.device, amp)
        self.skipped_steps = 0

    def __call__(self, batch: Batch, rate: float) -> Tensor:
        """Take a step.

        Args:
            batch: On the model's device, with labels.
            rate: The learning rate of this step.

        Returns:
            The mean loss before the step, a detached scalar on the model's device.
        """
        self.optimizer.begin_step(rate)
        rows, most = len(batch), self.part_rows
        if most in (0, rows) or rows < most:
            total = self._add_gradients(batch, 1.0)
        else:
            total = torch.zeros((), device=self.device)
            for start in range(0, rows, most):
                some = batch.rows(start, start + most)
                total += self._add_gradients(some, len(some) / rows)
        with part("update"):
            self._update(rate)
        return total

    def _add_gradients(self, batch: Batch, share: float) -> Tensor:
        """Add the gradients of the mean loss of some rows, times their share; return that."""
        assert batch.labels is not None
        with autocast(self.device, self.amp):
            logits = self.model(batch)
        with part("loss"):  # in float32 whatever the logits are
            loss = mean_loss(logits, batch.labels, self.loss)
            if share != 1:
                loss = loss * share
        with part("backward"):
            scaled = loss if self.scaler is None else self.scaler.scale(loss)
            scaled.backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    def _update(self, rate: float) -> None:
        """Move the weights; not where a scaled gradient overflowed, which lowers the scale."""
        if self.scaler is None:
            self.optimizer.step(rate)
        else:
            moved = self.scaler.step(self.optimizer, rate)  # type: ignore[arg-type]
            self.scaler.update()
            self.skipped_steps += not moved
