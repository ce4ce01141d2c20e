"""A training step through the native kernels: forward, backward and update, each by name."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from dlrm.config import Amp, LossConfig
from dlrm.data.batch import Batch
from dlrm.model.dlrm import DLRM
from dlrm.model.native import Activations, NativeForward, Stack
from dlrm.model.native import supports as forward_supports
from dlrm.model.variants import PoolingWeights, learned_weights
from dlrm.training.optimizer import EPSILON, Optimizer

RULES = {"sgd": 0, "adagrad": 1, "rowwise_adagrad": 2}
LOSSES = {"bce": 0, "wbce": 0, "mse": 1}


def supports(model: DLRM, amp: Amp = "O0") -> tuple[bool, str]:
    """Return whether ``NativeStep`` takes a model, and why or why not."""
    if model.config.dropout:
        return False, "the native kernels have no dropout"
    return forward_supports(model, amp)


class NativeStep:
    """A step that equals ``EagerStep``'s up to rounding, and is the same for any thread count.

    Args:
        model: One that ``supports`` takes; moved by every call.
        optimizer: Over the same model.
        loss: What is minimised.
        reason: Why this step was chosen.
    """

    kernels: Literal["native", "plain"] = "native"
    scaler: torch.amp.GradScaler | None = None
    skipped_steps = 0

    def __init__(self, model: DLRM, optimizer: Optimizer, loss: LossConfig, reason: str) -> None:
        self.model = model
        self.optimizer = optimizer
        self.loss = loss
        self.reason = reason
        self._forward = NativeForward(model)
        self._rule = RULES[optimizer.config.optimizer]
        self._loss = LOSSES[loss.loss]
        self._pooling = learned_weights(model.sparse_arch)
        self._bag_gradients = torch.empty(0)
        dense, over = self._forward.dense, self._forward.over
        self._carried: dict[Stack, tuple[list[Tensor], list[Tensor]]] = {}
        self._sums = {
            stack: optimizer.dense_sums(mlp)
            for stack, mlp in ((dense, model.dense_arch), (over, model.over_arch))
        }

    @torch.no_grad()
    def __call__(self, batch: Batch, rate: float) -> Tensor:
        """Take a step; see ``EagerStep``."""
        assert batch.labels is not None
        rows = len(batch)
        bag_gradients = self._bag_gradients_of(rows)
        parts = list(self._forward.parts(batch))
        total = None
        for number, (start, part) in enumerate(parts):
            kept = self._forward(part)
            loss = self._loss_gradient(part, kept, 1 / rows)
            total = loss if total is None else total + loss
            self._backward(part, start, kept, bag_gradients)
            self._update_mlps(kept, rate, number == 0, number == len(parts) - 1)
        self._update_tables(batch, bag_gradients, rate)
        assert total is not None
        return total

    def _loss_gradient(self, part: Batch, kept: Activations, scale: float) -> Tensor:
        weight_0, weight_1 = self.loss.loss_weights
        loss: Tensor = torch.ops.dlrm.loss_gradient(
            kept.over_outputs[-1],
            part.labels,
            self._loss,
            weight_0,
            weight_1,
            self.loss.loss_threshold,
            scale,
            kept.over_gradients[-1],
        )
        return loss

    def _backward(self, part: Batch, start: int, kept: Activations, bag_gradients: Tensor) -> None:
        """Take the gradient of the logits to every layer's outputs and to the bags."""
        ops, forward = torch.ops.dlrm, self._forward
        ops.mlp_backward(
            forward.over.weights,
            forward.over.biases,
            [kept.interactions, *kept.over_outputs[:-1]],
            kept.over_gradients,
            kept.interaction_gradients,
        )
        ops.embed_interact_backward(
            kept.vectors,
            kept.interaction_gradients,
            len(part),
            forward.table_count,
            forward.combined,
            forward.dot,
            forward.itself,
            start,
            kept.dense_gradients[-1],
            bag_gradients,
        )
        ops.mlp_backward(
            forward.dense.weights,
            forward.dense.biases,
            [kept.dense_input, *kept.dense_outputs[:-1]],
            kept.dense_gradients,
            None,
        )

    def _update_mlps(self, kept: Activations, rate: float, first: bool, last: bool) -> None:
        """Sum the weights' gradients over a part; move the weights after the last one."""
        forward = self._forward
        for stack, columns, gradients in (
            (forward.over, kept.over_columns, kept.over_gradients),
            (forward.dense, kept.dense_columns, kept.dense_gradients),
        ):
            weight_sums, bias_sums = self._sums[stack]
            carried_weights, carried_biases = ([], []) if first and last else self._carry(stack)
            torch.ops.dlrm.mlp_update(
                columns,
                gradients,
                stack.weights,
                stack.biases,
                weight_sums,
                bias_sums,
                carried_weights,
                carried_biases,
                self._rule,
                rate,
                EPSILON,
                first,
                last,
            )

    def _update_tables(self, batch: Batch, bag_gradients: Tensor, rate: float) -> None:
        forward = self._forward
        lookups = forward.lookups(batch)
        pooling = self._pooling_gradients(batch, bag_gradients)
        torch.ops.dlrm.tables_update(
            bag_gradients,
            forward.first_rows,
            lookups.ids,
            lookups.offsets,
            lookups.weights,
            self._rule,
            rate,
            EPSILON,
            forward.arena,
            self.optimizer.accumulators.get(forward.tables),
        )
        if pooling:
            self.optimizer.step_rows(*pooling, rate)

    def _pooling_gradients(
        self, batch: Batch, bag_gradients: Tensor
    ) -> tuple[PoolingWeights, Tensor, Tensor] | None:
        """Return learned pooling weights' rows, (N,), and gradients, (N, 1): vector · gradient."""
        pooling = self._pooling
        if pooling is None:
            return None
        ids, offsets, features = batch.sparse_features, batch.offsets, pooling.weighed.numel()
        bags = torch.arange(len(batch) * features)
        if offsets is not None:
            bags = bags.repeat_interleave(offsets.diff())
        bags_row, feature, ids = bags // features, bags % features, ids.reshape(-1)
        own = pooling.weighed[feature]
        bags_row, feature, ids = bags_row[own], feature[own], ids[own]
        # Weighed tables are whole, and these are the first in the arena, a table a feature.
        vectors = self._forward.arena[self._forward.first_rows[feature] + ids]
        gradients = (vectors * bag_gradients[feature, bags_row]).sum(1, keepdim=True)
        return pooling, pooling.rows_of(ids, feature), gradients

    def _bag_gradients_of(self, rows: int) -> Tensor:
        """Return room for the gradients, (T, B, D), of a batch's bags in T tables."""
        shape = (self._forward.table_count, rows, self._forward.arena.shape[1])
        if self._bag_gradients.numel() < math.prod(shape):
            self._bag_gradients = torch.zeros(math.prod(shape))
        return self._bag_gradients[: math.prod(shape)].view(shape)

    def _carry(self, stack: Stack) -> tuple[list[Tensor], list[Tensor]]:
        if stack not in self._carried:
            self._carried[stack] = (
                [torch.zeros_like(weight) for weight in stack.weights],
                [torch.zeros_like(bias) for bias in stack.biases],
            )
        return self._carried[stack]
