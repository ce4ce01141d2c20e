"""How the dense vector and the embeddings meet (Naumov et al. 2019, section 2.1.4)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn


class InteractionArch(nn.Module):
    """Pairwise dot products of the vectors of a row, after its dense vector; or all vectors.

    Args:
        num_sparse_features: F.
        embedding_dim: D.
        interaction: "dot" or "cat".
        itself: Whether each vector's product with itself is included ("dot" only).
    """

    def __init__(
        self,
        num_sparse_features: int,
        embedding_dim: int,
        interaction: Literal["dot", "cat"],
        itself: bool = False,
    ) -> None:
        super().__init__()
        self.interaction = interaction
        vectors = num_sparse_features + 1
        # The strictly lower triangle, row by row: the reference's order. As positions in the
        # flattened (F+1) x (F+1) products, so that one index_select picks them.
        rows, columns = torch.tril_indices(vectors, vectors, offset=0 if itself else -1)
        self.register_buffer("pairs", rows * vectors + columns, persistent=False)
        self.pairs: Tensor
        self.out_features = (
            embedding_dim + self.pairs.numel() if interaction == "dot" else vectors * embedding_dim
        )

    def forward(self, dense_vector: Tensor, embeddings: Tensor) -> Tensor:
        """Combine (B, D) and (B, F, D) into (B, out_features)."""
        vectors = torch.cat([dense_vector.unsqueeze(1), embeddings], dim=1)
        if self.interaction == "cat":
            return vectors.flatten(1)
        products = torch.bmm(vectors, vectors.transpose(1, 2)).flatten(1)
        return torch.cat([dense_vector, products.index_select(1, self.pairs)], dim=1)
