"""One small batch object, and the one place where stored rows become model inputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dlrm.errors import UserError
from dlrm.schema import FeatureSchema

Labels = npt.NDArray[np.uint8] | npt.NDArray[np.float32]
"""As they are stored: zeros and ones, or with the schema's soft_labels anything between."""
Dense = npt.NDArray[np.int32] | npt.NDArray[np.float32]
"""As they are stored: float32 where the schema stores floats."""


@dataclass(frozen=True, eq=False)
class Bags:
    """Ids of a feature that has any number of them in each of n rows; N in all.

    Attributes:
        ids: (N,) int32.
        offsets: (n + 1,) int32 or int64: row i has ``ids[offsets[i] : offsets[i + 1]]``.
    """

    ids: npt.NDArray[np.int32]
    offsets: npt.NDArray[np.int32] | npt.NDArray[np.int64]

    @staticmethod
    def of_lengths(ids: npt.NDArray[np.int32], lengths: npt.NDArray[np.int64]) -> Bags:
        """Return bags of these lengths, (n,), whose ids lie one after the other."""
        return Bags(ids, np.concatenate([[0], np.cumsum(lengths)]))

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.offsets) - 1

    @property
    def lengths(self) -> npt.NDArray[np.int32] | npt.NDArray[np.int64]:
        """How many ids each row has, (n,)."""
        return np.diff(self.offsets)

    @property
    def nbytes(self) -> int:
        """Bytes as they are stored."""
        return self.ids.nbytes + 4 * len(self)

    def __getitem__(self, index: slice | npt.NDArray[np.int64]) -> Bags:
        """Return the bags of some of the rows; of a slice without a step their ids are a view."""
        if isinstance(index, slice) and index.step in (None, 1):
            start, stop, _ = index.indices(len(self))
            offsets = self.offsets[start : max(start, stop) + 1]
            return Bags(self.ids[offsets[0] : offsets[-1]], offsets - offsets[0])
        lengths, first = self.lengths[index].astype(np.int64), self.offsets[:-1][index]
        starts = np.cumsum(lengths) - lengths
        places = np.repeat(first - starts, lengths) + np.arange(int(lengths.sum()))
        return Bags.of_lengths(self.ids[places], lengths)

    @staticmethod
    def concatenate(runs: Sequence[Bags]) -> Bags:
        """Return the bags of several runs of rows, one after the other."""
        lengths = np.concatenate([run.lengths for run in runs]).astype(np.int64)
        return Bags.of_lengths(np.concatenate([run.ids for run in runs]), lengths)


@dataclass(frozen=True)
class Batch:
    """B rows, ready for the model.

    Shapes, with B rows, F sparse features and N ids in all:
        dense_features: (B, number of dense features), float32, transformed.
        sparse_features: ids, int64: (B, F) with one id in every bag, or (N,) beside ``offsets``.
        offsets: None, or (B * F + 1,) int64: bag b * F + f is
            ``sparse_features[offsets[b * F + f] : offsets[b * F + f + 1]]``.
        labels: (B,), float32, or None.

    A bag holds no id where a value was never seen when vocabularies were fitted, and where a row
    has none of a multi-hot feature.
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
        """Number of empty bags."""
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


def transform_dense(dense: Dense) -> npt.NDArray[np.float32]:
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
    dense: Dense,
    ids: npt.NDArray[np.int32],
    labels: Labels | None,
    bags: Sequence[Bags] = (),
) -> Batch:
    """Turn stored rows into a batch: transform dense values, apply the schema's id modulus.

    An unknown id (-1) becomes an empty bag, whose embedding is a zero vector.

    Args:
        schema: Describes the columns.
        dense: (B, number of dense features), before the transform.
        ids: (B, number of features with one id a row), each below its table's rows, or -1.
        labels: (B,), or None.
        bags: The ids of each multi-hot feature, of B rows.
    """
    if schema.stores_floats:
        dense_features = dense.astype(np.float32, order="C")
    else:
        dense_features = transform_dense(dense)
    sparse_features, offsets = _by_row(schema, ids, bags) if bags else _one_id_a_row(schema, ids)
    return Batch(
        torch.from_numpy(dense_features),
        torch.from_numpy(sparse_features),
        None if labels is None else torch.from_numpy(labels.astype(np.float32)),
        None if offsets is None else torch.from_numpy(offsets),
    )


def _one_id_a_row(
    schema: FeatureSchema, ids: npt.NDArray[np.int32]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64] | None]:
    """Return ids and offsets as a Batch has them, of features with one id a row."""
    sparse_features = ids.astype(np.int64, order="C")
    unknown = bool(ids.size) and bool(ids.min() < 0)
    if any(feature.id_modulus for feature in schema.sparse):
        moduli = [feature.id_modulus or feature.num_embeddings for feature in schema.sparse]
        limited = sparse_features % np.array(moduli)
        sparse_features = np.where(sparse_features < 0, -1, limited) if unknown else limited
    if not unknown:
        return sparse_features, None
    sparse_features = sparse_features.reshape(-1)
    known = sparse_features >= 0
    return sparse_features[known], np.concatenate([[0], np.cumsum(known)])


def _by_row(
    schema: FeatureSchema, ids: npt.NDArray[np.int32], bags: Sequence[Bags]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return ids and offsets as a Batch has them: features are stored apart, bags lie by row."""
    single, several = iter(ids.T), iter(bags)
    columns = []
    for feature in schema.sparse:
        if feature.multi_hot:
            columns.append(next(several))
        else:
            column = next(single)
            known = column >= 0
            columns.append(Bags.of_lengths(column[known], known.astype(np.int64)))
    lengths = np.stack([column.lengths for column in columns], axis=1, dtype=np.int64)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    starts = offsets[:-1].reshape(lengths.shape)
    sparse_features = np.empty(offsets[-1], np.int64)
    for number, (feature, column) in enumerate(zip(schema.sparse, columns, strict=True)):
        shift = np.repeat(starts[:, number] - column.offsets[:-1], lengths[:, number])
        shift += np.arange(len(shift))
        sparse_features[shift] = (
            column.ids % feature.id_modulus if feature.id_modulus else column.ids
        )
    return sparse_features, offsets
