"""Embedding tables that are not stored whole, or whose bags are weighed.

- Quotient-remainder (qr), Shi et al. 2019, arXiv 1909.02107: with c collisions, id i has row i // c
  of one table and row i % c of another; both bags are summed, and then multiplied (mult), added
  (add) or put one after the other, each of half the length (concat).
- Mixed dimensions (md), Ginart et al. 2019, arXiv 1909.11810: vectors of a large table are shorter,
  and a matrix without bias takes a bag's sum to the common length.
- Weighted pooling: each id has a weight, which its vector is multiplied by.

Notation: B rows, F sparse features, N ids, D embedding_dim.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dlrm.config import ModelConfig, TableConfig
from dlrm.errors import UserError
from dlrm.model.embedding import Arena, NamedTables, table_name
from dlrm.schema import FeatureSchema


def resolve_tables(schema: FeatureSchema, config: ModelConfig) -> tuple[TableConfig, ...]:
    """Return how each sparse feature's table is stored, in the schema's order.

    Raises:
        UserError: ``config.tables`` names a feature that there is not.
    """
    names = [feature.name for feature in schema.sparse]
    chosen = {table.name: table for table in config.tables}
    for name in chosen:
        if name not in names:
            close = difflib.get_close_matches(name, names, 1)
            hint = f"Did you mean {close[0]}?" if close else f"There are {', '.join(names)}."
            raise UserError(f"--tables: there is no sparse feature {name!r}. {hint}")
    lengths = mixed_dimensions(
        schema.num_embeddings, config.embedding_dim, config.md_temperature, config.md_round_dims
    )
    found = []
    for feature, length in zip(schema.sparse, lengths, strict=True):
        rows, variant = feature.num_embeddings, config.embedding_variant
        table = TableConfig(feature.name, weighted_pooling=config.weighted_pooling)
        if feature.name in chosen:
            table = chosen[feature.name]
        elif variant == "qr" and rows > config.qr_threshold:
            table = dataclasses.replace(
                table,
                variant="qr",
                qr_operation=config.qr_operation,
                qr_collisions=config.qr_collisions,
                qr_initial_values=config.qr_initial_values,
            )
        elif variant == "md" and rows > config.md_threshold:
            table = dataclasses.replace(table, variant="md", md_dim=length)
        found.append(table)
    return tuple(found)


def mixed_dimensions(
    num_embeddings: Sequence[int], embedding_dim: int, temperature: float, round_dims: bool
) -> list[int]:
    """Return the length of each table's vectors by the power rule (Ginart et al. 2019, section 4).

    A table of n rows has embedding_dim * (m / n) ** temperature, m being the fewest rows of all,
    rounded, and at least 1. Computed in float32 as the reference does, whose rounding it shares.

    Args:
        num_embeddings: Rows of each table.
        embedding_dim: Length in the smallest table.
        temperature: 0: all equal; the larger, the shorter.
        round_dims: Round to the nearest power of 2 as well, but not above embedding_dim.
    """
    rows = torch.tensor(num_embeddings, dtype=torch.float32).clamp(min=1)
    lengths = embedding_dim * rows.min() ** temperature * rows**-temperature
    if lengths.isnan().any():  # a power is beyond float32, which the reference does not survive
        lengths = embedding_dim * (rows.min() / rows).double() ** temperature
    lengths = lengths.clamp(1, embedding_dim).round()
    if round_dims:
        lengths = (2 ** lengths.log2().round()).clamp(max=embedding_dim)
    return [int(length) for length in lengths]


def larger_than_whole(
    tables: Sequence[TableConfig], num_embeddings: Sequence[int], embedding_dim: int
) -> list[str]:
    """Return the features whose tables take more than a vector for each id would.

    Args:
        tables: How each feature's table is stored (``resolve_tables``).
        num_embeddings: Ids of each feature.
        embedding_dim: Length of a feature's vector.
    """
    found = []
    for table, rows in zip(tables, num_embeddings, strict=True):
        numbers = whole = rows * embedding_dim
        if table.variant == "qr":
            parts = _quotient_remainder(table, rows, 0)
            numbers = sum(part.rows for part in parts) * embedding_dim
            numbers //= 2 if table.qr_operation == "concat" else 1
        elif table.variant == "md" and table.md_dim < embedding_dim:
            numbers = (rows + embedding_dim) * table.md_dim
        if numbers > whole:
            found.append(table.name)
    return found


@dataclass(frozen=True)
class _Part:
    """A table that holds a part of a feature's vectors, or all."""

    name: str
    rows: int
    feature: int
    divisor: int = 1
    """Its row of an id is (id // divisor) % rows."""


class PartArena(Arena):
    """Tables that are looked up by what is left of an id.

    Args:
        parts: Its tables.
        features: F, of the ids that it is given.
        embedding_dim: Length of a vector.
        dtype: What vectors are stored in.
        device: Where it is allocated.
    """

    def __init__(
        self,
        parts: Sequence[_Part],
        features: int,
        embedding_dim: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | None = None,
    ) -> None:
        super().__init__([part.rows for part in parts], embedding_dim, dtype, device)
        self.names = [part.name for part in parts]
        self.features = features
        self.is_plain = [part.feature for part in parts] == list(range(features)) and all(
            part.divisor == 1 for part in parts
        )
        for name, numbers in (
            ("_columns", [part.feature for part in parts]),
            ("_divisors", [part.divisor for part in parts]),
            ("_rows", [part.rows for part in parts]),
        ):
            self.register_buffer(name, torch.tensor(numbers), persistent=False)
        self._columns: Tensor
        self._divisors: Tensor
        self._rows: Tensor

    def parts_of(
        self, ids: Tensor, offsets: Tensor | None, weights: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Turn ids of features into rows of this arena's T tables.

        Args:
            ids: (B, F), or (N,) beside ``offsets``.
            offsets: (B * F + 1,), or None.
            weights: Of the shape of ids, or None.

        Returns:
            What ``Arena.forward`` takes: (B, T) each, or flat beside (B * T + 1,) offsets.
        """
        if self.is_plain:
            return ids, offsets, weights
        if offsets is None:
            ids = ids.index_select(1, self._columns) // self._divisors % self._rows
            return ids, None, None if weights is None else weights.index_select(1, self._columns)
        starts = offsets[:-1].view(-1, self.features).index_select(1, self._columns).view(-1)
        lengths = offsets.diff().view(-1, self.features).index_select(1, self._columns)
        tables = torch.arange(lengths.shape[1], device=ids.device).expand_as(lengths)
        tables = tables.reshape(-1).repeat_interleave(lengths.view(-1))
        lengths = lengths.view(-1)
        offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
        places = (starts - offsets[:-1]).repeat_interleave(lengths)
        places = places + torch.arange(places.numel(), device=ids.device)
        ids = ids[places] // self._divisors[tables] % self._rows[tables]
        return ids, offsets, None if weights is None else weights[places]

    def forward(
        self, ids: Tensor, offsets: Tensor | None = None, weights: Tensor | None = None
    ) -> Tensor:
        """Sum the vectors of each bag: (B, T, length of a vector)."""
        return super().forward(*self.parts_of(ids, offsets, weights))


class PoolingWeights(Arena):
    """A weight for each id of the features whose bags are weighed, 1 for those of others.

    Args:
        tables: How each feature's table is stored.
        num_embeddings: Ids of each feature.
        kind: "fixed" or "learned": whose weights these are.
        device: Where they are allocated.
    """

    def __init__(
        self,
        tables: Sequence[TableConfig],
        num_embeddings: Sequence[int],
        kind: str,
        device: torch.device | None = None,
    ) -> None:
        weighed = [table.weighted_pooling == kind for table in tables]
        rows = [n for n, own in zip(num_embeddings, weighed, strict=True) if own]
        super().__init__(rows, 1, device=device)
        self.names = [table.name for table, own in zip(tables, weighed, strict=True) if own]
        self.arena.requires_grad_(kind == "learned")
        self.register_buffer("weighed", torch.tensor(weighed), persistent=False)
        self.weighed: Tensor
        firsts = torch.zeros(len(weighed), dtype=torch.int64)
        firsts[self.weighed] = self.first_rows
        self.register_buffer("_firsts", firsts, persistent=False)
        self._firsts: Tensor

    def rows_of(self, ids: Tensor, features: Tensor) -> Tensor:
        """Return the row of each id's weight; 0 for those of features that are not weighed."""
        return torch.where(self.weighed[features], ids + self._firsts[features], 0)

    def forward(
        self, ids: Tensor, offsets: Tensor | None = None, weights: Tensor | None = None
    ) -> Tensor:
        """Return the weight of each id, or what ``weights`` says, of the shape of ids."""
        features = features_of(ids, offsets, self.weighed.numel())
        rows = self.rows_of(ids, features)
        found = nn.functional.embedding(rows, self.arena, sparse=True).squeeze(-1)
        others = found.new_ones(()) if weights is None else weights
        return torch.where(self.weighed[features], found, others)

    def split(self, per_row: Tensor) -> list[Tensor]:
        """Return a view of each feature's part, (its ids,), of a tensor with a number a row."""
        return [part.view(-1) for part in super().split(per_row)]


def features_of(ids: Tensor, offsets: Tensor | None, features: int) -> Tensor:
    """Return the number of each id's feature, of the shape of ids or, where (B, F), of a row."""
    if offsets is None:
        return torch.arange(features, device=ids.device)
    bags = torch.arange(offsets.numel() - 1, device=ids.device)
    return (bags % features).repeat_interleave(offsets.diff())


class VariantSparseArch(NamedTables):
    """The embedding tables of all sparse features, where not all are whole and unweighed.

    In a state dict: ``embedding_bags.t_NAME.weight``, of fewer columns for md, beside
    ``projections.t_NAME.weight``, (D, columns); for qr ``embedding_bags.t_NAME_quotient.weight``
    and ``…_remainder.weight``; and ``pooling_weights.t_NAME``, (n,).

    Args:
        tables: How each feature's table is stored (``resolve_tables``).
        num_embeddings: Ids of each feature.
        embedding_dim: Length of a feature's vector (D).
        dtype: What tables are stored in; weights and projections are float32.
        device: Where they are allocated; "meta" allocates nothing.

    Attributes:
        whole: Vectors of length D: of every feature that is neither md nor concatenated, its whole
            table or its quotients', in order; then the remainders' tables. None: there are none.
        combined: (R, 2), of each remainder's table in ``whole``: the place of its quotients' table
            there, and 1 where the two are multiplied, 0 where they are added.
        halves: Vectors of length D / 2: quotients and remainders, in turn, that are concatenated.
        narrower: The arenas of md, by the length of their vectors.
        pooling: Weights, learned and fixed.
    """

    def __init__(
        self,
        tables: Sequence[TableConfig],
        num_embeddings: Sequence[int],
        embedding_dim: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        self.table_configs = tuple(tables)
        self.num_embeddings = tuple(num_embeddings)
        self.embedding_dim = embedding_dim
        self.names = tuple(table.name for table in tables)
        count = len(self.names)

        layout = _lay_out(tables, num_embeddings, embedding_dim)

        def arena(parts: Sequence[_Part], dim: int) -> PartArena | None:
            return PartArena(parts, count, dim, dtype, device) if parts else None

        self.whole = arena([*layout.whole, *layout.remainders], embedding_dim)
        self.halves = arena(layout.halves, embedding_dim // 2)
        self.narrower = nn.ModuleDict(
            {
                str(dim): PartArena(parts, count, dim, dtype, device)
                for dim, parts in layout.narrower.items()
            }
        )
        self.projections = nn.ModuleDict(
            {
                f"t_{_undotted(table.name)}": nn.Linear(
                    table.md_dim, embedding_dim, bias=False, device=device
                )
                for table in tables
                if table.variant == "md" and table.md_dim < embedding_dim
            }
        )
        self.pooling = nn.ModuleDict(
            {
                kind: PoolingWeights(tables, num_embeddings, kind, device)
                for kind in ("learned", "fixed")
                if any(table.weighted_pooling == kind for table in tables)
            }
        )
        combined = torch.tensor(layout.combined, dtype=torch.int64).view(-1, 2)
        self.register_buffer("combined", combined, persistent=False)
        self.combined: Tensor
        order = torch.tensor([layout.features.index(feature) for feature in range(count)])
        self.register_buffer("_order", order, persistent=False)
        self._order: Tensor
        if twice := [name for name, n in Counter(self._names()).items() if n > 1]:
            raise UserError(
                f"two embedding tables would be called {twice[0]}. Rename a feature, or store its "
                "table whole."
            )

    def forward(self, sparse_features: Tensor, offsets: Tensor | None = None) -> Tensor:
        """Give each bag's vector.

        Args:
            sparse_features: Ids, (B, F) with one id a bag, or (N,) beside ``offsets``.
            offsets: (B * F + 1,), where bag b * F + f starts; None: one id a bag.

        Returns:
            (B, F, D); an empty bag gives zeros.
        """
        ids, weights = sparse_features, self.weights_of(sparse_features, offsets)
        vectors = []
        if self.whole is not None:
            pooled = self.whole(ids, offsets, weights)
            count = pooled.shape[1] - len(self.combined)
            vectors.append(pooled[:, :count])
            if len(self.combined):
                quotients = pooled.index_select(1, self.combined[:, 0])
                remainders = pooled[:, count:]
                is_product = self.combined[:, 1:].bool()
                vectors.append(
                    torch.where(is_product, quotients * remainders, quotients + remainders)
                )
        if self.halves is not None:
            pooled = self.halves(ids, offsets, weights)
            vectors.append(pooled.view(len(pooled), pooled.shape[1] // 2, self.embedding_dim))
        for arena in self._narrower_arenas():
            pooled = arena(ids, offsets, weights)
            vectors += [
                self.projection(name)(pooled[:, number]).unsqueeze(1)
                for number, name in enumerate(arena.names)
            ]
        return torch.cat(vectors, 1).index_select(1, self._order)

    def weights_of(self, ids: Tensor, offsets: Tensor | None) -> Tensor | None:
        """Return the weight of each id, of the shape of ids; None: all are 1."""
        weights: Tensor | None = None
        for pooling in self.pooling.values():
            weights = pooling(ids, offsets, weights)
        return weights

    def projection(self, name: str) -> nn.Linear:
        """Return what takes the shorter vectors of a table to length D."""
        projection = self.projections[f"t_{_undotted(name)}"]
        assert isinstance(projection, nn.Linear)
        return projection

    @property
    def arenas(self) -> Mapping[Arena, Sequence[str]]:
        """The arenas that training moves, each with the names of its tables."""
        found: dict[Arena, Sequence[str]] = {
            arena: [table_name(name) for name in arena.names] for arena in self._part_arenas()
        }
        return found | self._pooling_names("learned")

    @property
    def stored_arenas(self) -> Mapping[Arena, Sequence[str]]:
        """All arenas, those of fixed weights too, with the names of their tables."""
        return {**self.arenas, **self._pooling_names("fixed")}

    @property
    def table_bytes(self) -> int:
        """What tables, weights and projections take."""
        fixed = sum(arena.nbytes for arena in self._pooling_names("fixed"))
        projections = sum(weight.nbytes for weight in self.projections.parameters())
        return super().table_bytes + fixed + projections

    def _part_arenas(self) -> Iterator[PartArena]:
        for arena in (self.whole, self.halves):
            if arena is not None:
                yield arena
        yield from self._narrower_arenas()

    def _narrower_arenas(self) -> Iterator[PartArena]:
        for arena in self.narrower.values():
            assert isinstance(arena, PartArena)
            yield arena

    def _pooling_names(self, kind: str) -> dict[Arena, Sequence[str]]:
        if kind not in self.pooling:
            return {}
        pooling = self.pooling[kind]
        assert isinstance(pooling, PoolingWeights)
        return {pooling: [weights_name(name) for name in pooling.names]}

    def _names(self) -> Iterator[str]:
        for arena in self._part_arenas():
            yield from arena.names


def learned_weights(sparse_arch: nn.Module) -> PoolingWeights | None:
    """Return the pooling weights that training moves, if there are any."""
    if not isinstance(sparse_arch, VariantSparseArch) or "learned" not in sparse_arch.pooling:
        return None
    pooling = sparse_arch.pooling["learned"]
    assert isinstance(pooling, PoolingWeights)
    return pooling


def projection_name(name: str) -> str:
    """Return what the projection of a mixed dimension is called in a state dict."""
    return f"projections.t_{name}.weight"


def weights_name(name: str) -> str:
    """Return what a feature's pooling weights are called in a state dict."""
    return f"pooling_weights.t_{name}"


@dataclass(frozen=True)
class _Layout:
    """Which tables lie in which arena; see the attributes of ``VariantSparseArch``."""

    whole: Sequence[_Part]
    remainders: Sequence[_Part]
    combined: Sequence[tuple[int, int]]
    halves: Sequence[_Part]
    narrower: Mapping[int, Sequence[_Part]]
    features: Sequence[int]
    """Whose vector each is, of those that forward makes one after another: whole (-1: quotients,
    which are no feature's alone), combined, concatenated, and those of narrower tables."""


def _lay_out(
    tables: Sequence[TableConfig], num_embeddings: Sequence[int], embedding_dim: int
) -> _Layout:
    whole: list[_Part] = []
    remainders: list[_Part] = []
    combined: list[tuple[int, int]] = []
    halves: list[_Part] = []
    narrower: dict[int, list[_Part]] = {}
    owners: dict[str, list[int]] = {"whole": [], "combined": [], "concatenated": []}
    for feature, (table, rows) in enumerate(zip(tables, num_embeddings, strict=True)):
        if table.variant == "md" and table.md_dim < embedding_dim:
            narrower.setdefault(table.md_dim, []).append(_Part(table.name, rows, feature))
        elif table.variant != "qr":
            owners["whole"].append(feature)
            whole.append(_Part(table.name, rows, feature))
        elif table.qr_operation == "concat":
            owners["concatenated"].append(feature)
            halves += _quotient_remainder(table, rows, feature)
        else:
            quotient, remainder = _quotient_remainder(table, rows, feature)
            combined.append((len(whole), int(table.qr_operation == "mult")))
            owners["combined"].append(feature)
            owners["whole"].append(-1)
            whole.append(quotient)
            remainders.append(remainder)
    narrower = dict(sorted(narrower.items()))
    features = [*owners["whole"], *owners["combined"], *owners["concatenated"]]
    features += [part.feature for parts in narrower.values() for part in parts]
    return _Layout(whole, remainders, combined, halves, narrower, features)


def _quotient_remainder(table: TableConfig, rows: int, feature: int) -> tuple[_Part, _Part]:
    collisions = table.qr_collisions
    quotients = max(1, math.ceil(rows / collisions))
    return (
        _Part(f"{table.name}_quotient", quotients, feature, collisions),
        _Part(f"{table.name}_remainder", collisions, feature),
    )


def _undotted(name: str) -> str:
    if "." in name:
        raise UserError(
            f"the table of {name} cannot have mixed dimensions, since its name has a dot. Rename "
            "the feature, or store its table whole."
        )
    return name
