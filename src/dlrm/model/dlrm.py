"""The deep learning recommendation model of Naumov et al. 2019 (arXiv 1906.00091).

Notation: B rows, F sparse features, D embedding_dim.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from dlrm.config import ModelConfig
from dlrm.data.batch import Batch
from dlrm.errors import UserError
from dlrm.model.embedding import SparseArch
from dlrm.model.interaction import InteractionArch
from dlrm.model.mlp import MLP
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
        UserError: The schema has no dense or no sparse feature.
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
        self.sparse_arch = SparseArch(
            [feature.name for feature in schema.sparse],
            schema.num_embeddings,
            config.embedding_dim,
            dtype=getattr(torch, config.embedding_dtype),
            device=device,
        )
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

    def forward(self, batch: Batch) -> Tensor:
        """Return the logits, (B,), of a batch."""
        dense_vector = self.dense_arch(batch.dense_features)  # (B, D)
        embeddings = self.sparse_arch(batch.sparse_features, batch.offsets)  # (B, F, D)
        interactions = self.interaction_arch(dense_vector, embeddings)
        logits: Tensor = self.over_arch(interactions).squeeze(1)
        return logits


def initialize(model: DLRM, random_state: np.random.RandomState) -> None:
    """Draw the initial weights as the reference does (dlrm_s_pytorch.py, create_emb, create_mlp).

    Tables are uniform in ±√(1/n) for n rows; linear weights normal with variance 2/(in + out),
    biases normal with variance 1/out; all drawn in float64 in the order tables, dense arch, over
    arch, from NumPy's legacy generator, so that one seed gives the reference's very values.

    Args:
        model: The model to fill, on any device.
        random_state: Advanced by the draws.
    """
    with torch.no_grad():
        for table in model.sparse_arch.split(model.sparse_arch.arena):
            rows, dim = table.shape
            bound = np.sqrt(1 / rows)
            step = max(1, _DRAWN_VALUES // dim)
            for start in range(0, rows, step):
                part = table[start : start + step]
                part.copy_(_float32(random_state.uniform(-bound, bound, size=tuple(part.shape))))
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


def _float32(drawn: np.ndarray) -> Tensor:
    return torch.from_numpy(drawn.astype(np.float32))
