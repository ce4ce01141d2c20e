"""Embedding tables: arenas that store them, and those of a model that stores each whole."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from dlrm.model.quantized_tables import QuantizedTables
from dlrm.ops.library import advise_huge_pages
from dlrm.ops.rounding import NARROW


class Arena(nn.Module):
    """Tables with vectors of one length, stored one after another in one tensor.

    One lookup for all tables costs a fraction of one lookup a table. As a parameter the arena is
    one, ``arena``, and its gradient is sparse: it holds the rows of the batch alone. It adds
    nothing to a state dict; who owns it names its tables there.

    Narrow tables (bfloat16, float16) give float32 vectors. Autograd would round a gradient to its
    parameter's type, so theirs is kept beside the vectors that were looked up, in float32.

    Args:
        num_embeddings: Rows of each table.
        embedding_dim: Length of a vector (D).
        dtype: What vectors are stored in.
        device: Where the arena is allocated; "meta" allocates nothing.
    """

    def __init__(
        self,
        num_embeddings: Sequence[int],
        embedding_dim: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        self.num_embeddings = tuple(num_embeddings)
        rows = torch.tensor([0, *num_embeddings]).cumsum(0)
        arena = torch.empty(int(rows[-1]), embedding_dim, dtype=dtype, device=device)
        advise_huge_pages(arena)
        self.is_narrow = dtype in NARROW
        self.arena = nn.Parameter(arena, requires_grad=not self.is_narrow)
        # Looks up vectors in training instead, and updates the arena when gradients arrive.
        self.fused: Callable[[Tensor, Tensor | None], Tensor] | None = None
        # Looks up vectors of fewer bits instead, (rows, offsets, weights); the arena is then empty.
        self.quantized: QuantizedTables | None = None
        # Of narrow tables: of each lookup its rows, (N,), and their vectors, (N, D).
        self._looked_up: list[tuple[Tensor, Tensor]] = []
        # Not part of the state: it follows from num_embeddings. Made on the CPU even under a
        # "meta" device, since it holds values.
        self.register_buffer("first_rows", rows[:-1].clone(), persistent=False)
        self.first_rows: Tensor

    def forward(
        self, ids: Tensor, offsets: Tensor | None = None, weights: Tensor | None = None
    ) -> Tensor:
        """Sum the vectors of each bag.

        Args:
            ids: With F tables: (B, F) with one id a bag, or (N,) beside ``offsets``.
            offsets: (B * F + 1,), where bag b * F + f starts; None: one id a bag.
            weights: Of the shape of ids: what its vector is multiplied by; None: 1.

        Returns:
            (B, F, D); an empty bag gives zeros.
        """
        if self.fused is not None and torch.is_grad_enabled():
            return self.fused(ids, offsets)
        shape = (-1, len(self.num_embeddings), self.arena.shape[1])
        if offsets is None:
            rows = ids + self.first_rows
            if self.quantized is not None:
                each = torch.arange(rows.numel() + 1)
                weights = None if weights is None else weights.reshape(-1)
                return self.quantized(rows.view(-1), each, weights).reshape(shape)
            if self.is_narrow:
                vectors = self._look_up(rows.view(-1)).view(shape)
            else:
                vectors = functional.embedding(rows, self.arena, sparse=True)
            return vectors if weights is None else vectors * weights.unsqueeze(-1)
        bags = torch.arange(offsets.numel() - 1, device=offsets.device)
        lengths = offsets.diff()
        rows = ids + self.first_rows[bags % len(self.num_embeddings)].repeat_interleave(lengths)
        if self.quantized is not None:
            return self.quantized(rows, offsets, weights).reshape(shape)
        if self.is_narrow:
            vectors = self._look_up(rows)
            if weights is not None:
                vectors = vectors * weights.unsqueeze(-1)
            pooled = torch.zeros(bags.numel(), vectors.shape[1], device=vectors.device)
            return pooled.index_add(0, bags.repeat_interleave(lengths), vectors).view(shape)
        pooled = functional.embedding_bag(
            rows,
            self.arena,
            offsets,
            mode="sum",
            sparse=True,
            per_sample_weights=weights,
            include_last_offset=True,
        )
        return pooled.view(shape)

    def _look_up(self, rows: Tensor) -> Tensor:
        """Return the vectors of rows, (N, D), in float32, and keep them for their gradient."""
        vectors = self.arena.detach()[rows].float()
        if torch.is_grad_enabled():
            self._looked_up.append((rows, vectors.requires_grad_()))
        return vectors

    @property
    def gradient_holders(self) -> list[Tensor]:
        """The tensors whose ``grad`` backward passes fill: of a narrow arena one a lookup."""
        return [vectors for _, vectors in self._looked_up] or [self.arena]

    def gradient(self) -> tuple[Tensor, Tensor] | None:
        """Return the rows that were looked up, (N,), with repeats, and their gradients, (N, D)."""
        received = [
            (rows, vectors.grad) for rows, vectors in self._looked_up if vectors.grad is not None
        ]
        if received:
            rows, gradients = zip(*received, strict=True)
            return torch.cat(rows), torch.cat(gradients)
        gradient = self.arena.grad
        if gradient is None:
            return None
        return gradient._indices()[0], gradient._values()

    def forget_gradient(self) -> None:
        """Be ready for the next backward pass."""
        self._looked_up = []
        self.arena.grad = None

    @property
    def stored(self) -> Tensor:
        """What holds its tables, a row each vector: numbers, or codes where it is quantized."""
        return self.arena if self.quantized is None else self.quantized.codes

    @property
    def nbytes(self) -> int:
        """What its tables take, quantized or not."""
        return self.stored.nbytes

    def split(self, per_row: Tensor) -> list[Tensor]:
        """Return a view of each table's part of a tensor whose first axis is the arena's rows."""
        return list(torch.split(per_row, list(self.num_embeddings)))

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        """Save nothing: its owner does."""

    def _load_from_state_dict(self, *args: Any) -> None:
        """Load nothing: its owner does."""


class NamedTables(nn.Module):
    """A module that names tables in its state dict itself."""

    @property
    def arenas(self) -> Mapping[Arena, Sequence[str]]:
        """The arenas that training moves, each with the names of its tables."""
        raise NotImplementedError

    @property
    def stored_arenas(self) -> Mapping[Arena, Sequence[str]]:
        """All arenas, those that training does not move too, with the names of their tables."""
        return self.arenas

    def tables(self) -> dict[str, Tensor]:
        """Return all tables by their names in a state dict, as views of their storage."""
        return {
            name: table
            for arena, names in self.stored_arenas.items()
            for name, table in zip(names, arena.split(arena.stored), strict=True)
        }

    @property
    def table_bytes(self) -> int:
        """What the tables take."""
        return sum(arena.nbytes for arena in self.arenas)

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        for name, table in self.tables().items():
            destination[prefix + name] = table if keep_vars else table.detach()

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
        expected = {prefix + name: table.detach() for name, table in self.tables().items()}
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
            of_others = tuple(f"{prefix}{name}." for name in self._modules)
            unexpected_keys += [
                key
                for key in state_dict
                if key.startswith(prefix) and key not in expected and not key.startswith(of_others)
            ]


class SparseArch(NamedTables, Arena):
    """The embedding tables of all sparse features, each whole, in one arena.

    In a state dict the tables have TorchRec's names, ``embedding_bags.t_NAME.weight``.

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
        super().__init__(num_embeddings, embedding_dim, dtype, device)
        self.names = tuple(names)
        self._table_names = [table_name(name) for name in names]

    @property
    def arenas(self) -> Mapping[Arena, Sequence[str]]:
        """This one, with the names of its tables."""
        return {self: self._table_names}


def table_name(name: str) -> str:
    """Return what a table is called in a state dict, which is TorchRec's way."""
    return f"embedding_bags.t_{name}.weight"
