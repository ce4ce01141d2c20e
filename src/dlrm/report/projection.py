"""What a page about embeddings computes: maps, neighbours, similarity of features."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from scipy.cluster.hierarchy import leaves_list, linkage, optimal_leaf_ordering
from scipy.spatial.distance import squareform
from scipy.stats import spearmanr

from dlrm.data.batch import make_batch
from dlrm.data.dataset import Dataset, Rows
from dlrm.embeddings import CommonValues
from dlrm.errors import EnvironmentFaultError, UserError
from dlrm.model.dlrm import DLRM
from dlrm.runs import Run

FEWEST_VALUES = 10
"""Of a feature, for which a map makes sense."""
NEIGHBOURS = 10
FEWEST_COMPARED = 50
"""Of a feature, for which ``Neighbourhood.correlation`` makes sense: where neighbours are most of
all others, their mean falls as a value's own rate rises."""
PRIOR_ROWS = 20
"""Rows at the average click rate that are added to each value's own."""
DENSE = "(dense)"
"""What all dense features together are called."""
_PERPLEXITY = 30.0
_BLOCK = 1024

Floats = npt.NDArray[np.float32] | npt.NDArray[np.float64]


def load_tsne() -> tuple[Callable[..., Any], Callable[[], AbstractContextManager[Any]]]:
    """Return scikit-learn's TSNE, and what makes its libraries use one thread.

    Raises:
        EnvironmentFaultError: scikit-learn is missing.
    """
    try:
        from sklearn.manifold import TSNE
        from threadpoolctl import threadpool_limits
    except ImportError as error:
        raise EnvironmentFaultError(
            f"dlrm visualize needs scikit-learn, which cannot be imported ({error}). Install what "
            "baselines take: pip install 'dlrm[baselines]'"
        ) from error
    return TSNE, partial(threadpool_limits, 1)


def map_vectors(vectors: npt.NDArray[np.float32], seed: int) -> npt.NDArray[np.float32]:
    """Lay vectors out in a plane so that near ones stay near: t-SNE (van der Maaten 2008, 2014).

    It begins with the two principal components, so that the layout at large means something too
    (Kobak and Berens, 2019). It runs in one thread: with several, sums change their order, and
    what differs in the last bit grows.

    Args:
        vectors: (n, D), n at least FEWEST_VALUES.
        seed: Equal seeds give equal maps.

    Returns:
        (n, 2), centred.

    Raises:
        EnvironmentFaultError: scikit-learn is missing.
    """
    tsne, one_thread = load_tsne()
    if vectors.shape[1] == 1:  # on a line already, and points of one dimension cannot pass others
        line = vectors[:, 0] - vectors[:, 0].mean()
        return np.stack([line, np.zeros_like(line)], axis=1)
    if not vectors.std(axis=0).any():  # principal components would be 0 / 0
        return np.zeros((len(vectors), 2), np.float32)
    with one_thread():
        places: npt.NDArray[np.float32] = tsne(
            init="pca",
            perplexity=min(_PERPLEXITY, (len(vectors) - 1) / 3),
            random_state=seed % 2**32,
        ).fit_transform(vectors)
    centred: npt.NDArray[np.float32] = places - places.mean(axis=0)
    return centred


def nearest(vectors: Floats, count: int = NEIGHBOURS) -> npt.NDArray[np.int64]:
    """Return the nearest others of each vector by Euclidean distance, the nearest first.

    Args:
        vectors: (n, D).
        count: How many, or n - 1 where there are fewer.

    Returns:
        (n, count).
    """
    exact = vectors.astype(np.float64)
    squares = (exact**2).sum(axis=1)
    count = min(count, len(exact) - 1)
    found = np.empty((len(exact), count), np.int64)
    for start in range(0, len(exact), _BLOCK):
        rows = np.arange(start, min(start + _BLOCK, len(exact)))
        distances = squares[rows, None] + squares - 2 * exact[rows] @ exact.T
        distances[rows - start, rows] = np.inf
        candidates = np.argpartition(distances, count - 1, axis=1)[:, :count]
        order = np.argsort(np.take_along_axis(distances, candidates, 1), axis=1, kind="stable")
        found[rows] = np.take_along_axis(candidates, order, 1)
    return found


def smoothed_click_rates(
    counts: npt.NDArray[np.int64], clicks: npt.NDArray[np.int64], average: float
) -> npt.NDArray[np.float64]:
    """Return click rates that chance moves less: with PRIOR_ROWS more rows at the average."""
    return (clicks + PRIOR_ROWS * average) / (counts + PRIOR_ROWS)


@dataclass(frozen=True)
class Neighbourhood:
    """What the nearest vectors of each value tell of it; n values."""

    neighbours: npt.NDArray[np.int64]
    """(n, at most NEIGHBOURS), the nearest first."""
    click_rates: npt.NDArray[np.float64]
    """(n,) of each value's neighbours, all their rows together."""
    correlation: float
    """Rank correlation (Spearman) of the values' own smoothed rates and these; NaN where all are
    equal, or there are fewer values than FEWEST_COMPARED."""


def neighbourhood(common: CommonValues, rates: npt.NDArray[np.float64]) -> Neighbourhood:
    """Compare values with their neighbours.

    Args:
        common: Their vectors, rows and clicks.
        rates: (n,) their smoothed click rates.
    """
    if len(common.values) < 2:
        return Neighbourhood(
            np.empty((len(rates), 0), np.int64), np.full(len(rates), np.nan), np.nan
        )
    neighbours = nearest(common.vectors)
    around = common.clicks[neighbours].sum(axis=1) / common.counts[neighbours].sum(axis=1)
    correlation = np.nan
    if len(rates) >= FEWEST_COMPARED and np.ptp(rates) and np.ptp(around):
        correlation = float(spearmanr(rates, around).statistic)
    return Neighbourhood(neighbours, around, correlation)


@dataclass(frozen=True)
class Similarity:
    """How alike features are in what their vectors tell of rows; F features."""

    names: list[str]
    """In an order in which similar ones lie side by side."""
    matrix: npt.NDArray[np.float64]
    """(F, F), from 0 to 1; 1 on the diagonal."""
    rows: int
    """How many it was measured on."""
    constant: list[str]
    """Those that are left out, since all these rows have the same vector."""


@torch.no_grad()
def feature_similarity(
    run: Run, model: DLRM, data: Dataset, features: Sequence[int], rows: int
) -> Similarity:
    """Compare what features tell of rows that are evenly spread over the training split.

    Of each row a feature has the vector that it meets the other features with, the sum of its
    bag's; DENSE is the vector of all dense features. Features are compared by ``linear_cka``.

    Args:
        run: Whose schema.
        model: Whose vectors, on the CPU.
        data: The run's DATASET.
        features: Which sparse features, by their place in the schema.
        rows: How many, or all where there are fewer.
    """
    taken = Rows.concatenate(list(data.spread_rows("train", min(rows, data.rows("train")))))
    batch = make_batch(run.schema, taken.dense, taken.sparse, None, taken.bags)
    sparse = model.sparse_arch(batch.sparse_features, batch.offsets)[:, list(features)]
    dense = model.dense_arch(batch.dense_features)
    vectors = torch.cat([dense.unsqueeze(1), sparse], dim=1).double().numpy()
    vectors -= vectors.mean(axis=0)
    names = [DENSE, *(run.schema.sparse[index].name for index in features)]
    moves = np.abs(vectors).max(axis=(0, 2)) > 1e-12
    constant = [name for name, each in zip(names, moves, strict=True) if not each]
    names = [name for name, each in zip(names, moves, strict=True) if each]
    matrix = linear_cka(vectors[:, moves])
    order = _side_by_side(matrix)
    return Similarity(
        [names[place] for place in order], matrix[np.ix_(order, order)], len(taken), constant
    )


def linear_cka(vectors: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Return the linear centred kernel alignment of each two features, (F, F).

    For centred X and Y it is ‖XᵀY‖² / (‖XᵀX‖ ‖YᵀY‖) in Frobenius norms (Kornblith et al., 2019,
    *Similarity of Neural Network Representations Revisited*, section 3): 1 if one is the other
    turned and scaled, 0 if no component of one is correlated with any of the other. What has
    nothing in common comes to about D / n.

    Args:
        vectors: (n, F, D), whose means over n are 0; none is 0 throughout.
    """
    rows, features, dim = vectors.shape
    flat = vectors.reshape(rows, features * dim)
    products = (flat.T @ flat).reshape(features, dim, features, dim)
    squares = (products**2).sum(axis=(1, 3))
    norms = np.sqrt(np.diagonal(squares))
    aligned: npt.NDArray[np.float64] = squares / np.outer(norms, norms)
    return aligned


def _side_by_side(matrix: npt.NDArray[np.float64]) -> list[int]:
    """Return an order of features in which similar ones are neighbours (Bar-Joseph, 2001)."""
    if len(matrix) < 3:
        return list(range(len(matrix)))
    distances = squareform(np.clip(1 - matrix, 0, 1), checks=False)
    tree = linkage(distances, "average")
    return [int(place) for place in leaves_list(optimal_leaf_ordering(tree, distances))]


def refuse_not_finite(common: CommonValues) -> None:
    """Refuse the vectors of a training that diverged.

    Raises:
        UserError: One is not finite.
    """
    if not np.isfinite(common.vectors).all():
        raise UserError(
            f"vectors of {common.name} are not finite: the training diverged. Visualize another "
            "checkpoint (--checkpoint), or train with a lower --learning-rate."
        )
