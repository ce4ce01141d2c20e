"""The commonest values of sparse features, with their vectors, how often they occur, and clicks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from dlrm.data.dataset import Dataset
from dlrm.data.vocabulary import Vocabulary
from dlrm.model.dlrm import DLRM
from dlrm.runs import Run
from dlrm.schema import FeatureSchema

_COUNTED_ROWS = 1 << 16
"""Rows that are counted at once."""


@dataclass(frozen=True)
class CommonValues:
    """Values of a sparse feature in the training rows, n of them, the commonest first."""

    name: str
    """The feature's."""
    values: list[str]
    """What each is called (``values_of``)."""
    counts: npt.NDArray[np.int64]
    """(n,) training rows that have it; a row that has it several times counts as often."""
    clicks: npt.NDArray[np.int64]
    """(n,) of these, those that were clicked."""
    vectors: npt.NDArray[np.float32]
    """(n, embedding_dim)."""
    distinct: int
    """How many values occur in the training rows, those that are not here included."""
    total: int
    """How often all of them occur together."""


def common_values(
    run: Run, model: DLRM, data: Dataset, features: Sequence[int], most: int
) -> list[CommonValues]:
    """Find the commonest values of sparse features; the training rows are read once.

    Args:
        run: Whose vocabularies tell what ids stand for.
        model: Whose vectors; on any device.
        data: The run's DATASET.
        features: Which sparse features, by their place in the schema.
        most: How many values of each, or as many as occur.
    """
    found = []
    for index, (counts, clicks) in zip(
        features, count_ids(data, run.schema, features), strict=True
    ):
        ids = np.argsort(-counts, kind="stable")[:most]
        ids = ids[counts[ids] > 0]
        found.append(
            CommonValues(
                run.schema.sparse[index].name,
                values_of(run, index, ids),
                counts[ids],
                clicks[ids],
                vectors_of(model, run.schema, index, ids),
                int(np.count_nonzero(counts)),
                int(counts.sum()),
            )
        )
    return found


def count_ids(
    data: Dataset, schema: FeatureSchema, features: Sequence[int]
) -> list[tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]]:
    """Count, of each id of sparse features, the training rows that have it, and their clicks.

    Args:
        data: The DATASET, read once.
        schema: With which batches are made.
        features: Which of its sparse features, by their place.

    Returns:
        Of each feature both, (num_embeddings,) each.
    """
    found = []
    for index in features:
        size = schema.sparse[index].num_embeddings
        found.append((np.zeros(size, np.int64), np.zeros(size, np.int64)))
    for batch in data.batches("train", _COUNTED_ROWS, schema=schema):
        assert batch.labels is not None
        clicked = batch.labels.numpy() > 0.5
        if batch.offsets is not None:
            bags = np.repeat(np.arange(len(batch.offsets) - 1), batch.offsets.diff().numpy())
            rows, places = np.divmod(bags, len(schema.sparse))
        for index, (counts, clicks) in zip(features, found, strict=True):
            if batch.offsets is None:
                ids, of_click = batch.sparse_features[:, index].numpy(), clicked
            else:
                own = places == index
                ids, of_click = batch.sparse_features.numpy()[own], clicked[rows[own]]
            # Not bincount, which would pass over the whole of a large table for each batch.
            np.add.at(counts, ids, 1)
            np.add.at(clicks, ids[of_click], 1)
    return found


@torch.no_grad()
def vectors_of(
    model: DLRM, schema: FeatureSchema, index: int, ids: npt.NDArray[np.int64]
) -> npt.NDArray[np.float32]:
    """Return the vectors, (n, D), with which n ids of a sparse feature meet the other features."""
    lengths = np.zeros((len(ids), len(schema.sparse)), np.int64)
    lengths[:, index] = 1
    offsets = torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)]))
    vectors: torch.Tensor = model.sparse_arch(
        torch.from_numpy(ids).to(model.device), offsets.to(model.device)
    )
    return vectors[:, index].float().cpu().numpy()


def values_of(run: Run, index: int, ids: npt.NDArray[np.int64]) -> list[str]:
    """Return what ids of a sparse feature stand for.

    That is the raw value, in 8 hexadecimal digits; where ids are taken modulo a number, the
    commonest value of those that share one. Without a vocabulary it is the id.
    """
    feature = run.schema.sparse[index]
    names = {int(id_): f"id {id_}" for id_ in ids}
    if feature.other_id >= 0:
        names[feature.other_id % feature.num_embeddings] = "other"
    if not feature.vocabulary:
        return [names[int(id_)] for id_ in ids]
    best = dict.fromkeys(names, -1)
    wanted = np.zeros(feature.num_embeddings, np.bool_)
    wanted[ids] = True
    for part in Vocabulary.read_parts(run.path / "vocabulary" / feature.vocabulary):
        own = part.ids % feature.id_modulus if feature.id_modulus else part.ids
        for at in np.flatnonzero(wanted[own]):
            id_, count = int(own[at]), int(part.counts[at])
            if count > best[id_]:
                best[id_] = count
                names[id_] = f"{part.values[at]:08x}"
    return [names[int(id_)] for id_ in ids]
