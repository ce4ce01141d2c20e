"""The deep learning recommendation model of Naumov et al. 2019 (arXiv 1906.00091).

Notation: B rows, F sparse features, D embedding_dim.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from dlrm.config import ModelConfig, TableConfig
from dlrm.data.batch import Batch
from dlrm.errors import UserError
from dlrm.model.embedding import SparseArch, table_name
from dlrm.model.interaction import InteractionArch
from dlrm.model.mlp import MLP
from dlrm.model.variants import VariantSparseArch, resolve_tables, weights_name
from dlrm.schema import FeatureSchema

# Rows of a table whose initial values are drawn at once: bounds the float64 draws to 32 MiB.
_DRAWN_VALUES = 1 << 22


class DLRM(nn.Module):
    """Click logits from dense and sparse features.

    Args:
        schema: Names and sizes of the features.
        config: The architecture.
        device: Where weights are allocated; "meta" allocates nothing.

    Raises:
        UserError: The schema has no dense or no sparse feature, or ``config.tables`` names one that
            there is not.
    """

    def __init__(
        self, schema: FeatureSchema, config: ModelConfig, device: torch.device | None = None
    ) -> None:
        super().__init__()
        if not schema.dense or not schema.sparse:
            raise UserError(
                "DLRM needs at least one dense and one sparse feature; the schema has "
                f"{len(schema.dense)} dense and {len(schema.sparse)} sparse."
            )
        self.config = config
        self.dense_arch = MLP(
            len(schema.dense), config.dense_arch_layer_sizes, relu_last=True, device=device
        )
        self.tables = resolve_tables(schema, config)
        self.sparse_arch = _sparse_arch(schema, config, self.tables, device)
        self.interaction_arch = InteractionArch(
            len(schema.sparse), config.embedding_dim, config.interaction, config.interaction_itself
        )
        self.over_arch = MLP(
            self.interaction_arch.out_features,
            config.over_arch_layer_sizes,
            relu_last=False,
            dropout=config.dropout,
            device=device,
        )
        if device is not None and device.type != "meta":
            self.to(device)  # the buffers: they hold values, and are made on the CPU

    def forward(self, batch: Batch) -> Tensor:
        """Return the logits, (B,), of a batch."""
        dense_vector = self.dense_arch(batch.dense_features)  # (B, D)
        embeddings = self.sparse_arch(batch.sparse_features, batch.offsets)  # (B, F, D)
        interactions = self.interaction_arch(dense_vector, embeddings)
        logits: Tensor = self.over_arch(interactions).squeeze(1)
        return logits

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device


def _sparse_arch(
    schema: FeatureSchema,
    config: ModelConfig,
    tables: tuple[TableConfig, ...],
    device: torch.device | None,
) -> SparseArch | VariantSparseArch:
    """Return the embedding tables: ``SparseArch`` where all are whole and none is weighed."""
    dtype = getattr(torch, config.embedding_dtype)
    if any(table.variant != "full" or table.weighted_pooling != "none" for table in tables):
        return VariantSparseArch(tables, schema.num_embeddings, config.embedding_dim, dtype, device)
    return SparseArch(
        [feature.name for feature in schema.sparse],
        schema.num_embeddings,
        config.embedding_dim,
        dtype=dtype,
        device=device,
    )


def whole_table_bytes(schema: FeatureSchema, config: ModelConfig) -> int:
    """Return what embedding tables take that hold a vector for each id."""
    width = getattr(torch, config.embedding_dtype).itemsize
    return int(sum(schema.num_embeddings) * config.embedding_dim * width)


def initialize(
    model: DLRM, random_state: np.random.RandomState, generator: torch.Generator | None = None
) -> None:
    """Draw the initial weights as the reference does (dlrm_s_pytorch.py, create_emb, create_mlp).

    Tables are uniform in ±√(1/n) for n rows; linear weights normal with variance 2/(in + out),
    biases normal with variance 1/out; all drawn in float64 in the order tables, dense arch, over
    arch, from NumPy's legacy generator, so that one seed gives the reference's very values.

    Args:
        model: The model to fill, on any device.
        random_state: Advanced by the draws.
        generator: Of the draws that the reference takes from PyTorch's own generator, which only
            tables that are not whole need; None: PyTorch's own.
    """
    with torch.no_grad():
        if isinstance(model.sparse_arch, VariantSparseArch):
            _draw_variants(model.sparse_arch, random_state, generator)
        else:
            for table in model.sparse_arch.split(model.sparse_arch.arena):
                _draw_table(table, random_state)
        for mlp in (model.dense_arch, model.over_arch):
            for layer in mlp.layers:
                if isinstance(layer, nn.Linear):
                    out_features, in_features = layer.weight.shape
                    deviation = np.sqrt(2 / (in_features + out_features))
                    layer.weight.copy_(
                        _float32(random_state.normal(0.0, deviation, (out_features, in_features)))
                    )
                    deviation = np.sqrt(1 / out_features)
                    layer.bias.copy_(_float32(random_state.normal(0.0, deviation, out_features)))


def _draw_table(
    table: Tensor, random_state: np.random.RandomState, bound: float | None = None
) -> None:
    """Draw uniformly in ±bound; None: √(1/n) of its n rows."""
    rows, dim = table.shape
    bound = np.sqrt(1 / rows) if bound is None else bound
    step = max(1, _DRAWN_VALUES // dim)
    for start in range(0, rows, step):
        part = table[start : start + step]
        part.copy_(_float32(random_state.uniform(-bound, bound, size=tuple(part.shape))))


def _draw_variants(
    sparse_arch: VariantSparseArch,
    random_state: np.random.RandomState,
    generator: torch.Generator | None,
) -> None:
    """Draw tables of all kinds, feature by feature (create_emb; tricks/).

    The reference draws quotient-remainder tables and projections (Glorot and Bengio 2010) from
    PyTorch's generator, of which its modules draw values as they are made as well, that it
    overwrites: these are drawn and left.
    """
    tables, draws = sparse_arch.tables(), (random_state, generator)
    for config, rows in zip(sparse_arch.table_configs, sparse_arch.num_embeddings, strict=True):
        if config.variant == "qr":
            quotients = tables[table_name(f"{config.name}_quotient")]
            remainders = tables[table_name(f"{config.name}_remainder")]
            _draw_quotient_remainder(config, rows, quotients, remainders, *draws)
            continue
        table = tables[table_name(config.name)]
        _leave_out(table.numel(), "normal", generator)
        if config.variant == "md":
            _leave_out(table.numel(), "uniform", generator)
            if config.md_dim < sparse_arch.embedding_dim:
                _draw_projection(sparse_arch.projection(config.name).weight, generator)
        _draw_table(table, random_state)
        if config.weighted_pooling != "none":
            tables[weights_name(config.name)].fill_(1)


def _draw_quotient_remainder(
    config: TableConfig,
    rows: int,
    quotients: Tensor,
    remainders: Tensor,
    random_state: np.random.RandomState,
    generator: torch.Generator | None,
) -> None:
    bound = float(np.sqrt(1 / rows))
    if config.qr_initial_values == "reference":
        for table in (quotients, remainders):
            table.copy_(torch.empty(table.shape).uniform_(bound, 1, generator=generator))
        return
    # So that what the two make has the mean and variance of a whole table's vectors.
    if config.qr_operation == "add":
        bound /= float(np.sqrt(2))
    _draw_table(quotients, random_state, bound)
    if config.qr_operation == "mult":
        remainders.fill_(1)
    else:
        _draw_table(remainders, random_state, bound)


def _draw_projection(weight: Tensor, generator: torch.Generator | None) -> None:
    _leave_out(weight.numel(), "uniform", generator)
    bound = float(np.sqrt(6 / sum(weight.shape)))
    weight.copy_(torch.empty(weight.shape).uniform_(-bound, bound, generator=generator))


def _leave_out(
    count: int, distribution: Literal["normal", "uniform"], generator: torch.Generator | None
) -> None:
    """Advance a generator as drawing so many float32 values at once does."""
    # Normal values are drawn in blocks of 16, and the last 16 again where they fill no block.
    while count > 2 * _DRAWN_VALUES:
        _leave_out(_DRAWN_VALUES // 16 * 16, distribution, generator)
        count -= _DRAWN_VALUES // 16 * 16
    drawn = torch.empty(count)
    if distribution == "normal":
        drawn.normal_(generator=generator)
    else:
        drawn.uniform_(generator=generator)


def _float32(drawn: np.ndarray) -> Tensor:
    return torch.from_numpy(drawn.astype(np.float32))
