"""Probabilities of many rows: what evaluation, prediction and training's own tests share."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from dlrm.config import Amp, LossConfig
from dlrm.data.batch import Batch
from dlrm.device import autocast
from dlrm.model.dlrm import DLRM
from dlrm.model.loss import probabilities


@torch.inference_mode()
def score_batch(
    model: DLRM, batch: Batch, loss: LossConfig, amp: Amp = "O0"
) -> npt.NDArray[np.float32]:
    """Return the click probabilities, (B,), of a batch.

    Args:
        model: Its mode (training or not) is left as it is; call ``model.eval()`` first.
        batch: B rows, on any device.
        loss: Its threshold clamps probabilities.
        amp: Whether matrices are multiplied in lower precision.
    """
    device = model.sparse_arch.arena.device
    with autocast(device, amp):
        logits = model(batch.to(device))
    scored: npt.NDArray[np.float32] = probabilities(logits, loss).cpu().numpy()
    return scored


@dataclass(frozen=True)
class Scored:
    """What a model says of labelled rows."""

    labels: npt.NDArray[np.float32]
    """(n,), zeros and ones."""
    probabilities: npt.NDArray[np.float32]
    """(n,)."""
    unknown_ids: int
    """Bags that were empty because their value was never seen."""


def score(model: DLRM, batches: Iterable[Batch], loss: LossConfig, amp: Amp = "O0") -> Scored:
    """Score labelled batches, without dropout."""
    was_training = model.training
    model.eval()
    labels = [np.zeros(0, np.float32)]
    scores = [np.zeros(0, np.float32)]
    unknown_ids = 0
    for batch in batches:
        assert batch.labels is not None
        labels.append(batch.labels.numpy())
        scores.append(score_batch(model, batch, loss, amp))
        unknown_ids += batch.unknown_ids
    model.train(was_training)
    return Scored(np.concatenate(labels), np.concatenate(scores), unknown_ids)
