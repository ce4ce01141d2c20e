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


def choose_step(model: DLRM, optimizer: Optimizer, loss: LossConfig, amp: Amp = "O0") -> Step:
    """Return the fastest step that supports a configuration."""
    chosen, reason = supports(model, amp)
    if chosen:
        return NativeStep(model, optimizer, loss, reason)
    step = EagerStep(model, optimizer, loss, amp, reason)
    fuses, tables = fused_tables.supports(
        model.sparse_arch, scales_gradients=step.scaler is not None
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
    """

    kernels: Literal["native", "plain"] = "plain"

    def __init__(
        self,
        model: DLRM,
        optimizer: Optimizer,
        loss: LossConfig,
        amp: Amp = "O0",
        reason: str = "it was asked for",
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        self.loss = loss
        self.amp: Amp = amp
        self.reason = reason
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
        assert batch.labels is not None
        self.optimizer.begin_step(rate)
        with autocast(self.device, self.amp):
            logits = self.model(batch)
        with part("loss"):  # in float32 whatever the logits are
            loss = mean_loss(logits, batch.labels, self.loss)
        with part("backward"):
            scaled = loss if self.scaler is None else self.scaler.scale(loss)
            scaled.backward()  # type: ignore[no-untyped-call]
        with part("update"):
            self._update(rate)
        return loss.detach()

    def _update(self, rate: float) -> None:
        """Move the weights; not where a scaled gradient overflowed, which lowers the scale."""
        if self.scaler is None:
            self.optimizer.step(rate)
        else:
            moved = self.scaler.step(self.optimizer, rate)  # type: ignore[arg-type]
            self.scaler.update()
            self.skipped_steps += not moved
