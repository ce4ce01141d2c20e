"""From logits to probabilities and losses."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from dlrm.config import LossConfig


def probabilities(logits: Tensor, config: LossConfig) -> Tensor:
    """Return click probabilities, float32, clamped to [t, 1-t] for a loss_threshold t.

    Args:
        logits: (B,).
        config: Holds the threshold.
    """
    unclamped = torch.sigmoid(logits.float())
    if config.loss_threshold == 0:
        return unclamped
    return unclamped.clamp(config.loss_threshold, 1 - config.loss_threshold)


def mean_loss(logits: Tensor, labels: Tensor, config: LossConfig) -> Tensor:
    """Return the mean loss of a batch, a scalar.

    Args:
        logits: (B,).
        labels: (B,), zeros and ones.
        config: Which loss. "wbce" weighs each row by its label's weight and takes the plain mean
            over rows (not over weights), as the reference does.
    """
    logits = logits.float()
    if config.loss == "mse":
        return functional.mse_loss(probabilities(logits, config), labels)
    if config.loss_threshold == 0:
        # Equal to the cross-entropy of the sigmoid, without its rounding near 0 and 1.
        losses = functional.binary_cross_entropy_with_logits(logits, labels, reduction="none")
    else:
        clamped = probabilities(logits, config)
        # functional.binary_cross_entropy, but that refuses not-a-number, which a diverged model's
        # loss must be.
        losses = -(labels * clamped.log() + (1 - labels) * (-clamped).log1p())
    if config.loss == "wbce":
        weight_0, weight_1 = config.loss_weights
        losses = losses * (weight_0 + (weight_1 - weight_0) * labels)
    return losses.mean()
