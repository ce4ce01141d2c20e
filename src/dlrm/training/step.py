"""One training step."""

from __future__ import annotations

from typing import Literal, Protocol

from torch import Tensor

from dlrm.config import LossConfig
from dlrm.data.batch import Batch
from dlrm.model.dlrm import DLRM
from dlrm.model.loss import mean_loss
from dlrm.training.native_step import NativeStep, supports
from dlrm.training.optimizer import Optimizer


class Step(Protocol):
    """Takes training steps on a model; which one is a matter of speed alone."""

    kernels: Literal["native", "plain"]
    reason: str
    """Why this step was chosen."""

    def __call__(self, batch: Batch, rate: float) -> Tensor:
        """Take a step and return the mean loss before it; see ``EagerStep``."""


def choose_step(model: DLRM, optimizer: Optimizer, loss: LossConfig) -> Step:
    """Return the fastest step that supports a configuration."""
    chosen, reason = supports(model)
    if chosen:
        return NativeStep(model, optimizer, loss, reason)
    return EagerStep(model, optimizer, loss, reason)


class EagerStep:
    """A step through autograd and plain operators.

    It takes any configuration, and is the specification that faster steps are tested against.

    Args:
        model: Moved by every call.
        optimizer: Over the same model.
        loss: What is minimised.
        reason: Why this step was chosen.
    """

    kernels: Literal["native", "plain"] = "plain"

    def __init__(
        self,
        model: DLRM,
        optimizer: Optimizer,
        loss: LossConfig,
        reason: str = "it was asked for",
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        self.loss = loss
        self.reason = reason

    def __call__(self, batch: Batch, rate: float) -> Tensor:
        """Take a step.

        Args:
            batch: On the model's device, with labels.
            rate: The learning rate of this step.

        Returns:
            The mean loss before the step, a detached scalar on the model's device.
        """
        assert batch.labels is not None
        self.optimizer.zero_grad()
        loss = mean_loss(self.model(batch), batch.labels, self.loss)
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step(rate)
        return loss.detach()
