"""One small batch object, and the one place where stored rows become model inputs."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dlrm.schema import FeatureSchema


@dataclass(frozen=True)
class Batch:
    """B rows, ready for the model.

    Shapes, with B rows, F sparse features and N ids in all:
        dense_features: (B, number of dense features), float32, transformed.
        sparse_features: ids, int64: (B, F) with one id in every bag, or (N,) beside ``offsets``.
        offsets: None, or (B * F + 1,) int64: bag b * F + f is
            ``sparse_features[offsets[b * F + f] : offsets[b * F + f + 1]]``.
        labels: (B,), float32, or None.
    """

    dense_features: Tensor
    sparse_features: Tensor
    labels: Tensor | None
    offsets: Tensor | None = None

    def __len__(self) -> int:
        """Return the number of rows."""
        return self.dense_features.shape[0]

    @property
    def unknown_ids(self) -> int:
        """Number of empty bags: values that were never seen when vocabularies were fitted."""
        return 0 if self.offsets is None else int((self.offsets.diff() == 0).sum())

    def to(self, device: torch.device) -> Batch:
        """Return the batch on a device."""
        if device.type == "cpu":
            return self
        return Batch(
            self.dense_features.to(device),
            self.sparse_features.to(device),
            None if self.labels is None else self.labels.to(device),
            None if self.offsets is None else self.offsets.to(device),
        )


def make_batch(
    schema: FeatureSchema,
    dense: npt.NDArray[np.int32],
    ids: npt.NDArray[np.int32],
    labels: npt.NDArray[np.uint8] | None,
) -> Batch:
    """Turn stored rows into a batch: transform dense values, apply the schema's id modulus.

    An unknown id (-1) becomes an empty bag, whose embedding is a zero vector.

    Args:
        schema: Describes the columns.
        dense: (B, number of dense features), before the transform.
        ids: (B, F), each below its table's rows, or -1.
        labels: (B,) zeros and ones, or None.
    """
    # The reference's transform (dlrm_data_pytorch.py, collate_wrapper_criteo_offset) in float32;
    # log1p would differ in the last bit.
    dense_features = torch.log(torch.from_numpy(dense).to(torch.float32) + 1)
    sparse_features = torch.from_numpy(ids).to(torch.int64)
    unknown = sparse_features < 0
    if any(feature.id_modulus for feature in schema.sparse):
        modulus = [feature.id_modulus or feature.num_embeddings for feature in schema.sparse]
        sparse_features = torch.where(unknown, -1, sparse_features % torch.tensor(modulus))
    offsets = None
    if bool(unknown.any()):
        known = ~unknown.reshape(-1)
        offsets = torch.zeros(known.numel() + 1, dtype=torch.int64)
        torch.cumsum(known, 0, out=offsets[1:])
        sparse_features = sparse_features.reshape(-1)[known]
    return Batch(
        dense_features,
        sparse_features,
        None if labels is None else torch.from_numpy(labels).to(torch.float32),
        offsets,
    )
