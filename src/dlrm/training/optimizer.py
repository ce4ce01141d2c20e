"""SGD, Adagrad and row-wise Adagrad: a step touches only the table rows of its batch.

Dense weights go through torch.optim's functions; its classes import a compiler when they are
made, which takes seconds. The tables' rules are here, since torch.optim has no row-wise Adagrad and
spends more on its sparse tensors than the update costs.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.optim.adagrad import adagrad
from torch.optim.sgd import sgd

from dlrm.config import OptimizerConfig
from dlrm.errors import UserError
from dlrm.model.dlrm import DLRM
from dlrm.model.embedding import Arena, SparseArch
from dlrm.model.fused_tables import FusedTables
from dlrm.model.mlp import MLP
from dlrm.model.variants import PoolingWeights, weights_name
from dlrm.ops.library import advise_huge_pages
from dlrm.ops.rounding import random_bits, round_stochastically

EPSILON = 1e-10  # torch.optim.Adagrad's; outside the root


def learning_rate(config: OptimizerConfig, step: int) -> float:
    """Return the rate of a step, as the reference's LRPolicyScheduler gives it.

    Linear warm-up, then (where a decay is configured) the last warm-up step's rate until a
    squared polynomial decay starts, then the decay's last rate.

    Args:
        config: Base rate and numbers of steps.
        step: From 1.
    """
    base = config.learning_rate
    if step < config.warmup_steps:
        return base * step / config.warmup_steps
    if config.decay_steps == 0:
        return base
    if step < config.decay_start_step:
        # Without a warm-up the reference has no "last" rate and fails; the base is what is meant.
        return (
            base * (config.warmup_steps - 1) / config.warmup_steps
            if config.warmup_steps > 1
            else base
        )
    decayed = min(step - config.decay_start_step, config.decay_steps - 1)
    return max(1e-7, base * ((config.decay_steps - decayed) / config.decay_steps) ** 2)


class Optimizer:
    """Moves a model's weights along their gradients.

    Args:
        model: The arenas of its tables have a sparse gradient, everything else a dense one.
        config: The rule and its rates.
        seed: Fixes, with ``steps``, how values of narrow tables are rounded.

    Attributes:
        steps: Steps that were begun, those before a continued checkpoint included.
        accumulators: Of each arena the sums of squares of its gradients: of its shape for Adagrad,
            one a row for row-wise Adagrad, empty for SGD.
    """

    def __init__(self, model: DLRM, config: OptimizerConfig, seed: int = 0) -> None:
        self.config = config
        self.seed = seed
        self.steps = 0
        self._fused: FusedTables | None = None
        self._sparse_arch = model.sparse_arch
        self._fixed = [each.name for each in model.tables if each.weighted_pooling == "fixed"]
        tables = {each.arena for each in model.sparse_arch.modules() if isinstance(each, Arena)}
        self._dense = {
            name: parameter
            for name, parameter in model.named_parameters()
            if parameter not in tables
        }
        self._sums: dict[Tensor, Tensor] = {}  # of a dense weight's squared gradients
        if config.optimizer != "sgd":
            for parameter in self._dense.values():
                self._sums[parameter] = torch.zeros_like(parameter, requires_grad=False)
        self.accumulators: dict[Arena, Tensor] = {}
        if config.optimizer != "sgd":
            for arena in self._sparse_arch.arenas:
                self.accumulators[arena] = self._new_accumulator(arena)
                advise_huge_pages(self.accumulators[arena])

    def _new_accumulator(self, arena: Arena) -> Tensor:
        table = arena.arena
        # The reference's row-wise Adagrad is Adagrad on what is no table; of one number a row both
        # are the same, but for the state's name.
        if self.config.optimizer == "rowwise_adagrad" and not isinstance(arena, PoolingWeights):
            return torch.zeros(table.shape[0], device=table.device)
        precise = torch.promote_types(table.dtype, torch.float32)
        return torch.zeros_like(table, dtype=precise, requires_grad=False)

    def dense_sums(self, mlp: MLP) -> tuple[list[Tensor], list[Tensor]]:
        """Return the sums of squares of an MLP's weights and biases, by layer; nothing for SGD."""
        if self.config.optimizer == "sgd":
            return [], []
        layers = [layer for layer in mlp.layers if isinstance(layer, nn.Linear)]
        return (
            [self._sums[layer.weight] for layer in layers],
            [self._sums[layer.bias] for layer in layers],
        )

    def fuse_tables(self) -> None:
        """Let fbgemm look tables up, and update them while gradients are computed."""
        sparse_arch, rule = self._sparse_arch, self.config.optimizer
        assert isinstance(sparse_arch, SparseArch)
        self._fused = FusedTables(sparse_arch, rule, self.accumulators.get(sparse_arch), EPSILON)
        sparse_arch.fused = self._fused

    def begin_step(self, rate: float) -> None:
        """Forget all gradients, and count a step.

        Args:
            rate: The learning rate of this step.
        """
        self.steps += 1
        if self._fused is not None:
            self._fused.set_rate(rate)
        for parameter in self._dense.values():
            parameter.grad = None
        for arena in self._sparse_arch.arenas:
            arena.forget_gradient()

    @property
    def param_groups(self) -> list[dict[str, list[Tensor]]]:
        """All that has a gradient, as ``torch.amp.GradScaler`` asks an optimizer for it."""
        holders = [each for arena in self._sparse_arch.arenas for each in arena.gradient_holders]
        return [{"params": [*self._dense.values(), *holders]}]

    @torch.no_grad()
    def step(self, rate: float) -> bool:
        """Move every weight that has a gradient.

        Args:
            rate: The learning rate of this step.

        Returns:
            True: that is how a caller knows that a gradient scaler has not skipped it.
        """
        self._step_dense(rate)
        for arena in self._sparse_arch.arenas:
            gradient = arena.gradient()
            if gradient is not None:
                self.step_rows(arena, *gradient, rate)
        return True

    def _step_dense(self, rate: float) -> None:
        moved: list[Tensor] = [each for each in self._dense.values() if each.grad is not None]
        gradients = [each.grad for each in moved if each.grad is not None]
        if self._sums:
            adagrad(
                moved,
                gradients,
                [self._sums[each] for each in moved],
                [torch.zeros(()) for _ in moved],  # steps, which a decay of its own would count
                lr=rate,
                weight_decay=0.0,
                lr_decay=0.0,
                eps=EPSILON,
                maximize=False,
            )
        else:
            sgd(
                moved,
                gradients,
                [None] * len(moved),
                lr=rate,
                weight_decay=0.0,
                momentum=0.0,
                dampening=0.0,
                nesterov=False,
                maximize=False,
            )

    @torch.no_grad()
    def step_rows(self, arena: Arena, rows: Tensor, gradients: Tensor, rate: float) -> None:
        """Move rows of an arena.

        Args:
            arena: One of the model's.
            rows: (N,), rows of the arena, with repeats.
            gradients: (N, D), the gradient that each lookup of a row received.
            rate: The learning rate.
        """
        table, accumulator = arena.arena, self.accumulators.get(arena)
        if accumulator is None and not arena.is_narrow:
            table.scatter_add_(0, rows.unsqueeze(1).expand_as(gradients), gradients * -rate)
            return
        # An adaptive rule squares gradients, and a narrow table is rounded once a step, so the
        # gradients of one row are summed first.
        rows, inverse = torch.unique(rows, return_inverse=True)
        summed = torch.zeros(rows.numel(), gradients.shape[1], device=table.device).scatter_add_(
            0, inverse.unsqueeze(1).expand_as(gradients), gradients
        )
        change = rate * (summed if accumulator is None else _normalize(accumulator, rows, summed))
        if arena.is_narrow:
            moved = table[rows].float() - change
            bits = random_bits(self.seed, self.steps, rows, table.shape[1])
            table[rows] = round_stochastically(moved, bits, table.dtype)
        else:
            table[rows] -= change

    def state(self) -> dict[str, Tensor]:
        """Return ``NAME.sum``, or ``NAME.row_sum`` with one number a row; nothing for SGD."""
        state = {
            f"{name}.sum": self._sums[parameter]
            for name, parameter in self._dense.items()
            if parameter in self._sums
        }
        for arena, accumulator in self.accumulators.items():
            kind = "row_sum" if accumulator.dim() == 1 else "sum"
            names = self._sparse_arch.arenas[arena]
            for name, part in zip(names, arena.split(accumulator), strict=True):
                state[f"sparse_arch.{name}.{kind}"] = part
        return state

    @torch.no_grad()
    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take over a state that ``state`` returned.

        Raises:
            UserError: It belongs to another optimizer or architecture.
        """
        # Weights that were learned and are fixed now have a state no more.
        fixed = {f"sparse_arch.{weights_name(name)}.sum" for name in self._fixed}
        state = {name: value for name, value in state.items() if name not in fixed}
        expected = self.state()
        for name in sorted(expected.keys() | state.keys()):
            shape = tuple(expected[name].shape) if name in expected else "no such tensor"
            found = tuple(state[name].shape) if name in state else "no such tensor"
            if found != shape:
                raise UserError(
                    f"the optimizer state to continue from does not fit {self.config.optimizer}: "
                    f"{name} is expected to have shape {shape}, got {found}. Use the optimizer "
                    "and model options that the checkpoint was trained with."
                )
            expected[name].copy_(state[name])


def _normalize(accumulator: Tensor, rows: Tensor, summed: Tensor) -> Tensor:
    """Accumulate the squares of rows' gradients, and divide these by the sums' roots."""
    squares = summed.square()
    if accumulator.dim() == 1:
        squares = squares.mean(1)
    accumulated = accumulator[rows] + squares
    accumulator[rows] = accumulated
    deviation = accumulated.sqrt() + EPSILON
    if accumulator.dim() == 1:
        deviation = deviation.unsqueeze(1)
    return summed / deviation
