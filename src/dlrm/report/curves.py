"""The curves of a report: exact points, of which as many are kept as can be seen."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

POINTS = 300
"""About how many points of a curve are drawn."""
BINS = 25
"""Of the histogram of probabilities."""


@dataclass(frozen=True)
class Curve:
    """Points in order, (n,) each."""

    x: npt.NDArray[np.float64]
    y: npt.NDArray[np.float64]


@dataclass(frozen=True)
class Curves:
    """What is drawn of the predictions for a split in which both labels occur."""

    roc: Curve
    """False positive rate, true positive rate."""
    precision_recall: Curve
    """Recall, precision."""
    bins: npt.NDArray[np.float64]
    """(BINS + 1,) edges of the histogram."""
    clicked: npt.NDArray[np.int64]
    """(BINS,) rows with a click."""
    not_clicked: npt.NDArray[np.int64]
    """(BINS,) rows without."""


def curves_of(labels: npt.NDArray[np.uint8], probabilities: npt.NDArray[np.float32]) -> Curves:
    """Compute the curves of a split; about 30 bytes a row of memory.

    A point of a curve counts the rows at or above one of the distinct probabilities. Of each curve
    the first and last are kept, and between them those that lie evenly along it.

    Args:
        labels: (n,) zeros and ones, both of which occur.
        probabilities: (n,) in [0, 1].
    """
    order = np.argsort(-probabilities, kind="stable")
    sorted_probabilities = probabilities[order]
    true_positives = np.cumsum(labels[order], dtype=np.int64)
    last_of_ties = np.append(np.flatnonzero(np.diff(sorted_probabilities)), len(order) - 1)
    true_positives = true_positives[last_of_ties]
    predicted = last_of_ties + 1
    clicks = int(true_positives[-1])
    recall = true_positives / clicks
    false_positive_rate = (predicted - true_positives) / (len(order) - clicks)
    roc = Curve(np.append(0.0, false_positive_rate), np.append(0.0, recall))
    precision = true_positives / predicted

    bins = np.linspace(0, 1, BINS + 1)
    clicked = np.histogram(probabilities[labels == 1], bins)[0]
    not_clicked = np.histogram(probabilities[labels == 0], bins)[0]
    return Curves(_thinned(roc), _thinned(Curve(recall, precision)), bins, clicked, not_clicked)


def _thinned(curve: Curve) -> Curve:
    """Keep points that are about evenly spaced along a curve."""
    steps = np.abs(np.diff(curve.x)) + np.abs(np.diff(curve.y))
    along = np.append(0.0, np.cumsum(steps))
    wanted = np.linspace(0, along[-1], POINTS)
    kept = np.unique(np.append(np.searchsorted(along, wanted), [0, len(along) - 1]))
    kept = kept[kept < len(along)]
    return Curve(curve.x[kept], curve.y[kept])
