"""Probabilities of many rows: what evaluation, prediction and training's own tests share."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from dlrm.config import Amp, LossConfig
from dlrm.data.batch import Batch
from dlrm.device import autocast
from dlrm.model.dlrm import DLRM
from dlrm.model.loss import probabilities
from dlrm.model.native import NativeForward, supports

_VECTOR = 64
"""A multiple of the numbers that any instruction set takes at a time."""


class Scorer:
    """Click probabilities from a model, through the native kernels where they take it.

    Through the kernels a row's probability does not depend on the other rows of its batch.

    Args:
        model: Its weights are read at every call. Dropout is off, whatever its mode.
        loss: Its threshold clamps probabilities.
        amp: Whether matrices are multiplied in lower precision.
    """

    def __init__(self, model: DLRM, loss: LossConfig, amp: Amp = "O0") -> None:
        self._model = model
        self._loss = loss
        self._amp: Amp = amp
        self._native = NativeForward(model) if supports(model, amp)[0] else None

    @property
    def is_native(self) -> bool:
        """Whether the native kernels score, which threads can do at a time."""
        return self._native is not None

    @torch.inference_mode()
    def __call__(self, batch: Batch) -> npt.NDArray[np.float32]:
        """Return the click probabilities, (B,), of a batch on any device."""
        logits = self._native.logits(batch) if self._native else self._plain_logits(batch)
        # PyTorch's sigmoid rounds otherwise where a vector is not full: the last rows would depend
        # on how many there are.
        rows = len(logits)
        filled = functional.pad(logits, (0, -rows % _VECTOR))
        scored: npt.NDArray[np.float32] = probabilities(filled, self._loss).cpu().numpy()
        return scored[:rows]

    def _plain_logits(self, batch: Batch) -> Tensor:
        device = self._model.device
        training = self._model.training
        self._model.eval()
        try:
            with autocast(device, self._amp):
                logits: Tensor = self._model(batch.to(device))
        finally:
            self._model.train(training)
        return logits
