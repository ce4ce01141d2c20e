"""Embedding tables in one arena."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from dlrm.ops.library import advise_huge_pages
from dlrm.ops.rounding import NARROW


class SparseArch(nn.Module):
    """The embedding tables of all sparse features, stored one after another in one tensor.

    One lookup for all features costs a fraction of one lookup a feature. In a state dict the
    tables have TorchRec's names, ``embedding_bags.t_NAME.weight``; as a parameter the arena is
    one, ``arena``, and its gradient is sparse: it holds the rows of the batch alone.

    Narrow tables (bfloat16, float16) give float32 vectors. Autograd would round a gradient to its
    parameter's type, so theirs is kept beside the vectors that were looked up, in float32.

    Args:
        names: The features' names.
        num_embeddings: Rows of each feature's table.
        embedding_dim: Length of a vector (D).
        dtype: What vectors are stored in.
        device: Where the arena is allocated; "meta" allocates nothing.
    """

    def __init__(
        self,
        names: Sequence[str],
        num_embeddings: Sequence[int],
        embedding_dim: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        self.names = tuple(names)
        self.num_embeddings = tuple(num_embeddings)
        rows = torch.tensor([0, *num_embeddings]).cumsum(0)
        arena = torch.empty(int(rows[-1]), embedding_dim, dtype=dtype, device=device)
        advise_huge_pages(arena)
        self.is_narrow = dtype in NARROW
        self.arena = nn.Parameter(arena, requires_grad=not self.is_narrow)
        # Looks up vectors in training instead, and updates the arena when gradients arrive.
        self.fused: Callable[[Tensor, Tensor | None], Tensor] | None = None
        # Of narrow tables: the rows of the newest lookup, (N,), and their vectors, (N, D).
        self._looked_up: tuple[Tensor, Tensor] | None = None
        # Not part of the state: it follows from num_embeddings. Made on the CPU even under a
        # "meta" device, since it holds values.
        self.register_buffer("first_rows", rows[:-1].clone(), persistent=False)
        self.first_rows: Tensor

    def forward(self, sparse_features: Tensor, offsets: Tensor | None = None) -> Tensor:
        """Sum the vectors of each bag.

        Args:
            sparse_features: Ids, (B, F) with one id a bag, or (N,) beside ``offsets``.
            offsets: (B * F + 1,), where bag b * F + f starts; None: one id a bag.

        Returns:
            (B, F, D); an empty bag gives zeros.
        """
        if self.fused is not None and torch.is_grad_enabled():
            return self.fused(sparse_features, offsets)
        shape = (-1, len(self.names), self.arena.shape[1])
        if offsets is None:
            rows = sparse_features + self.first_rows
            if self.is_narrow:
                return self._look_up(rows.view(-1)).view(shape)
            return functional.embedding(rows, self.arena, sparse=True)
        bags = torch.arange(offsets.numel() - 1, device=offsets.device)
        lengths = offsets.diff()
        rows = sparse_features + self.first_rows[bags % len(self.names)].repeat_interleave(lengths)
        if self.is_narrow:
            vectors = self._look_up(rows)
            pooled = torch.zeros(bags.numel(), vectors.shape[1], device=vectors.device)
            return pooled.index_add(0, bags.repeat_interleave(lengths), vectors).view(shape)
        pooled = functional.embedding_bag(
            rows, self.arena, offsets, mode="sum", sparse=True, include_last_offset=True
        )
        return pooled.view(shape)

    def _look_up(self, rows: Tensor) -> Tensor:
        """Return the vectors of rows, (N, D), in float32, and keep them for their gradient."""
        vectors = self.arena.detach()[rows].float()
        if torch.is_grad_enabled():
            self._looked_up = (rows, vectors.requires_grad_())
        return vectors

    @property
    def gradient_holder(self) -> Tensor:
        """The tensor whose ``grad`` a backward pass fills."""
        return self._looked_up[1] if self._looked_up else self.arena

    def gradient(self) -> tuple[Tensor, Tensor] | None:
        """Return the rows that were looked up, (N,), with repeats, and their gradients, (N, D)."""
        gradient = self.gradient_holder.grad
        if gradient is None:
            return None
        if self._looked_up:
            return self._looked_up[0], gradient
        return gradient._indices()[0], gradient._values()

    def forget_gradient(self) -> None:
        """Be ready for the next backward pass."""
        self._looked_up = None
        self.arena.grad = None

    def table_names(self) -> list[str]:
        """Return the tables' names in a state dict, without a prefix."""
        return [f"embedding_bags.t_{name}.weight" for name in self.names]

    def split(self, per_row: Tensor) -> list[Tensor]:
        """Return a view of each table's part of a tensor whose first axis is the arena's rows."""
        return list(torch.split(per_row, list(self.num_embeddings)))

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        arena = self.arena if keep_vars else self.arena.detach()
        for name, table in zip(self.table_names(), self.split(arena), strict=True):
            destination[prefix + name] = table

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        expected = {prefix + name: table for name, table in self._tables().items()}
        for key, table in expected.items():
            if key not in state_dict:
                missing_keys.append(key)
            elif state_dict[key].shape != table.shape:
                error_msgs.append(
                    f"{key} has shape {tuple(state_dict[key].shape)}; expected {tuple(table.shape)}"
                )
            else:
                with torch.no_grad():
                    table.copy_(state_dict[key])
        if strict:
            unexpected_keys += [
                key for key in state_dict if key.startswith(prefix) and key not in expected
            ]

    def _tables(self) -> dict[str, Tensor]:
        return dict(zip(self.table_names(), self.split(self.arena.detach()), strict=True))
