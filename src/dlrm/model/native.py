"""The model's forward pass through the native kernels, for scoring and for ``NativeStep``.

Activations lie in panels: (panels, features, P), where P rows of a batch (``panel_rows``) stand
side by side, feature by feature; native/kernels.h says why.
A batch goes through in parts of ``part_rows()``, so that the memory of activations does not grow
with the batch. Scoring, which keeps none, is one operator.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dlrm.config import Amp
from dlrm.data.batch import Batch
from dlrm.model.dlrm import DLRM
from dlrm.model.embedding import Arena, SparseArch
from dlrm.model.mlp import MLP
from dlrm.model.quantized import is_quantized
from dlrm.model.variants import PartArena, VariantSparseArch
from dlrm.ops.library import library


def part_rows() -> int:
    """Return how many rows go through at a time, a multiple of the panel.

    Fewer keep activations in the second cache, more fetch the weights less often. With AVX-512,
    whose panels have 32 rows, the former is worth more, else the latter (docs/bench.md).
    """
    return 512 if torch.ops.dlrm.panel_rows() == 32 else 2048


def supports(model: DLRM, amp: Amp = "O0") -> tuple[bool, str]:
    """Return whether the native forward pass takes a model, and why or why not."""
    if amp != "O0":
        return False, f"the native kernels compute in float32, and --amp {amp} was asked for"
    if not library().loaded:
        return False, library().reason
    if is_quantized(model.dense_arch) or is_quantized(model.over_arch):
        return False, "the native kernels compute in float32, and the layers have fewer bits"
    for name, parameter in model.named_parameters():
        if parameter.device.type != "cpu" or parameter.dtype != torch.float32:
            return False, (
                f"the native kernels take float32 on a cpu; {name} is {parameter.dtype} on "
                f"{parameter.device}"
            )
        if not parameter.is_contiguous():
            return False, f"the native kernels take contiguous tensors; {name} is not"
    sparse_arch = model.sparse_arch
    if isinstance(sparse_arch, VariantSparseArch):
        if sparse_arch.halves is not None or len(sparse_arch.narrower):
            return False, (
                "the native kernels take vectors of embedding_dim from the tables; those of mixed "
                "dimensions, and concatenated quotient-remainder vectors, are shorter"
            )
        if len(sparse_arch.combined) and model.config.interaction != "dot":
            return False, (
                "the native kernels join quotient-remainder vectors for --interaction dot alone"
            )
    return True, library().reason


@dataclass(frozen=True)
class Lookups:
    """What a part's rows are looked up with in the T tables of the arena that kernels take.

    Of tables that are all whole it is what the batch holds.
    """

    ids: Tensor
    """(B, T), or flat beside ``offsets``."""
    offsets: Tensor | None
    """(B * T + 1,), or None: one id a bag."""
    weights: Tensor | None
    """Of the shape of ids; None: 1."""


class Stack:
    """The parameters of an MLP, as lists."""

    def __init__(self, mlp: MLP) -> None:
        layers = [layer for layer in mlp.layers if isinstance(layer, nn.Linear)]
        self.weights = [layer.weight.detach() for layer in layers]
        self.biases = [layer.bias.detach() for layer in layers]
        self.in_sizes = [layer.in_features for layer in layers]
        self.out_sizes = [layer.out_features for layer in layers]


class Activations:
    """What a part's forward and backward pass compute; buffers that the next part uses again."""

    def __init__(self, forward: NativeForward, panels: int) -> None:
        self._panels = panels
        self._width = torch.ops.dlrm.panel_rows()
        dense, over = forward.dense, forward.over
        self.dense_input = self.panel(dense.in_sizes[0])
        self.dense_outputs = [self.panel(size) for size in dense.out_sizes]
        self.vectors = self.panel(forward.slots * forward.arena.shape[1])
        self.interactions = self.panel(over.in_sizes[0]) if forward.dot else self.vectors
        self.over_outputs = [self.panel(size) for size in over.out_sizes]
        self.dense_columns = [self._columns(size) for size in dense.in_sizes]
        self.over_columns = [self._columns(size) for size in over.in_sizes]
        self.dense_gradients = [self.panel(size) for size in dense.out_sizes]
        self.interaction_gradients = self.panel(over.in_sizes[0])
        self.over_gradients = [self.panel(size) for size in over.out_sizes]

    def panel(self, features: int) -> Tensor:
        """Return room for so many features of a part's rows."""
        return torch.zeros(self._panels, features, self._width)

    def _columns(self, features: int) -> Tensor:
        blocks = math.ceil(features / self._width)
        return torch.zeros(blocks, self._panels * self._width, self._width)


class NativeForward:
    """The forward pass of a model that ``supports`` takes.

    Args:
        model: Its weights are read at every call; they may be updated in place.
    """

    def __init__(self, model: DLRM) -> None:
        assert supports(model)[0]
        self._sparse_arch = sparse_arch = model.sparse_arch
        tables = sparse_arch if isinstance(sparse_arch, SparseArch) else sparse_arch.whole
        assert tables is not None
        self.tables = tables
        self.table_count = len(tables.num_embeddings)
        self.combined = None
        if isinstance(sparse_arch, VariantSparseArch) and len(sparse_arch.combined):
            self.combined = sparse_arch.combined
        # Vectors of a row: the dense one, each table's, and each quotient's as it was.
        self.slots = 1 + self.table_count + (0 if self.combined is None else len(self.combined))
        self.dot = model.config.interaction == "dot"
        self.itself = model.config.interaction_itself
        self.arena = tables.arena.detach()
        self.first_rows = tables.first_rows
        self.dense = Stack(model.dense_arch)
        self.over = Stack(model.over_arch)
        self._width = torch.ops.dlrm.panel_rows()
        self._part_rows = part_rows()
        self._activations: dict[int, Activations] = {}

    def lookups(self, batch: Batch) -> Lookups:
        """Return what a batch's rows are looked up with."""
        ids, offsets = batch.sparse_features, batch.offsets
        if isinstance(self._sparse_arch, SparseArch):
            return Lookups(ids, offsets, None)
        assert isinstance(self.tables, PartArena)
        weights = self._sparse_arch.weights_of(ids, offsets)
        return Lookups(*self.tables.parts_of(ids, offsets, weights))

    def parts(self, batch: Batch) -> Iterator[tuple[int, Batch]]:
        """Cut a batch into parts; yields the first row of each, and the part."""
        rows = len(batch)
        if rows <= self._part_rows:
            yield 0, batch
            return
        for start in range(0, rows, self._part_rows):
            yield start, batch.rows(start, start + self._part_rows)

    def __call__(self, part: Batch) -> Activations:
        """Run a part through the model.

        Args:
            part: At most ``part_rows()`` rows.

        Returns:
            Its activations, until the next call; the logits are the first ``len(part)`` elements
            of ``over_outputs[-1]``.
        """
        rows, lookups = len(part), self.lookups(part)
        kept = self.activations(rows)
        ops = torch.ops.dlrm
        ops.to_panels(part.dense_features, kept.dense_input)
        ops.mlp_forward(
            kept.dense_input,
            rows,
            self.dense.weights,
            self.dense.biases,
            True,
            kept.dense_outputs,
            kept.dense_columns,
        )
        ops.embed_interact(
            kept.dense_outputs[-1],
            self.arena,
            self.first_rows,
            lookups.ids,
            lookups.offsets,
            lookups.weights,
            self.combined,
            rows,
            self.itself,
            kept.vectors,
            kept.interactions if self.dot else None,
        )
        ops.mlp_forward(
            kept.interactions,
            rows,
            self.over.weights,
            self.over.biases,
            False,
            kept.over_outputs,
            kept.over_columns,
        )
        return kept

    def activations(self, rows: int) -> Activations:
        """Return the buffers for a part of so many rows."""
        panels = math.ceil(rows / self._width)
        if panels not in self._activations:
            if len(self._activations) == 2:  # of whole parts and of a batch's last
                self._activations.clear()
            self._activations[panels] = Activations(self, panels)
        return self._activations[panels]

    def logits(self, batch: Batch) -> Tensor:
        """Return the logits, (B,), of a batch of any size."""
        if self.tables.quantized is None:
            return self._logits(batch, self.lookups(batch), self.arena, self.first_rows)
        # The vectors of a part, in float32, are as a table that is looked up row by row.
        logits = []
        for _, part in self.parts(batch):
            lookups = self.lookups(part)
            vectors = Arena.forward(self.tables, lookups.ids, lookups.offsets, lookups.weights)
            rows = torch.arange(len(part) * self.table_count).view(len(part), self.table_count)
            looked_up = Lookups(rows, None, None)
            arena = vectors.reshape(rows.numel(), vectors.shape[-1])
            logits.append(self._logits(part, looked_up, arena, torch.zeros_like(self.first_rows)))
        return torch.cat(logits)

    def _logits(self, batch: Batch, lookups: Lookups, arena: Tensor, first_rows: Tensor) -> Tensor:
        logits: Tensor = torch.ops.dlrm.forward(
            batch.dense_features,
            lookups.ids,
            lookups.offsets,
            lookups.weights,
            arena,
            first_rows,
            self.combined,
            self.dense.weights,
            self.dense.biases,
            self.over.weights,
            self.over.biases,
            self.dot,
            self.itself,
            self._part_rows,
        )
        return logits
