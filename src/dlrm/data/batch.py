"""One small batch object, and the one place where stored rows become model inputs."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dlrm.errors import UserError
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

    def rows(self, start: int, stop: int) -> Batch:
        """Return rows start … stop-1, or fewer at the end, as a view."""
        sparse_features, offsets = self.sparse_features, self.offsets
        if offsets is None:
            sparse_features = sparse_features[start:stop]
        else:
            bags = (len(offsets) - 1) // len(self)
            offsets = offsets[start * bags : stop * bags + 1]
            sparse_features = sparse_features[int(offsets[0]) : int(offsets[-1])]
            offsets = offsets - offsets[0]
        labels = None if self.labels is None else self.labels[start:stop]
        return Batch(self.dense_features[start:stop], sparse_features, labels, offsets)

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


def check_batch(batch: Batch, schema: FeatureSchema) -> None:
    """Refuse a batch that no reader of ours made and that does not fit.

    Raises:
        UserError: A shape or type does not fit the schema, or an id is out of its feature's range.
    """
    rows, features = len(batch), len(schema.sparse)
    ids, offsets = batch.sparse_features, batch.offsets
    expected: dict[str, tuple[Tensor, torch.dtype, tuple[int, ...]]] = {
        "dense_features": (batch.dense_features, torch.float32, (rows, len(schema.dense))),
        "sparse_features": (ids, torch.int64, (rows, features)),
    }
    if offsets is not None:
        expected["sparse_features"] = (ids, torch.int64, (ids.numel(),))
        expected["offsets"] = (offsets, torch.int64, (rows * features + 1,))
    for name, (tensor, dtype, shape) in expected.items():
        if tensor.dtype != dtype or tuple(tensor.shape) != shape or not tensor.is_contiguous():
            raise UserError(
                f"{name} must be a contiguous {dtype} tensor of shape {shape}; got {tensor.dtype} "
                f"of shape {tuple(tensor.shape)}."
            )
    table = np.arange(features)
    values = ids.numpy()
    if offsets is not None:
        lengths = np.diff(offsets.numpy())
        if lengths.min(initial=0) < 0 or offsets[0] != 0 or offsets[-1] != len(values):
            raise UserError("offsets must rise from 0 to the number of ids.")
        table = np.repeat(np.tile(table, rows), lengths)
    limits = np.array(schema.num_embeddings)[table]
    wrong = (values < 0) | (values >= limits)
    if wrong.any():
        feature = schema.sparse[int(np.broadcast_to(table, values.shape)[wrong][0])]
        raise UserError(
            f"an id of {feature.name} is {values[wrong][0]}; expected 0 … "
            f"{feature.num_embeddings - 1}."
        )


def transform_dense(dense: npt.NDArray[np.int32]) -> npt.NDArray[np.float32]:
    """Return log(float32(x) + 1) of stored dense values: the schema's ``log1p``."""
    # The reference's transform (dlrm_data_pytorch.py, collate_wrapper_criteo_offset) in float32;
    # log1p would differ in the last bit. NumPy stays in the calling thread: torch.log starts a team
    # of threads for the loader, and with more threads than cores OpenMP no longer lets those of
    # the training step spin between operators, which halves its speed.
    dense_features = dense.astype(np.float32, order="C")
    dense_features += 1
    np.log(dense_features, out=dense_features)
    return dense_features


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
    dense_features = transform_dense(dense)
    sparse_features = ids.astype(np.int64, order="C")
    unknown = bool(ids.size) and bool(ids.min() < 0)
    if any(feature.id_modulus for feature in schema.sparse):
        moduli = [feature.id_modulus or feature.num_embeddings for feature in schema.sparse]
        limited = sparse_features % np.array(moduli)
        sparse_features = np.where(sparse_features < 0, -1, limited) if unknown else limited
    offsets = None
    if unknown:
        sparse_features = sparse_features.reshape(-1)
        known = sparse_features >= 0
        sparse_features = sparse_features[known]
        offsets = torch.from_numpy(np.concatenate([[0], np.cumsum(known)]))
    return Batch(
        torch.from_numpy(dense_features),
        torch.from_numpy(sparse_features),
        None if labels is None else torch.from_numpy(labels.astype(np.float32)),
        offsets,
    )
