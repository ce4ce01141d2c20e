"""Metrics of predicted click probabilities: exact, in float64, from one sort.

The definitions with their formulas are in ``docs/metrics.md``. The best possible metrics of data
whose true probabilities are known are ``compute_metrics(labels, true_probabilities)``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Metrics:
    """How well probabilities predict the labels of a split.

    A metric that is undefined is NaN, which JSON files of ours hold as ``null``: everything but
    the counting metrics without samples, ``auc`` and ``normalized_entropy`` where all labels are
    equal, ``calibration`` without clicks. ``average_precision``, ``precision``, ``recall`` and
    ``f1`` are 0 where undefined, as in scikit-learn with ``zero_division=0``.
    """

    auc: float
    """Area under the ROC curve; ties count one half."""
    accuracy: float
    """Share of samples whose label is (probability > 0.5)."""
    log_loss: float
    """Mean binary cross-entropy in nats, of probabilities clipped to [2**-23, 1 - 2**-23]."""
    normalized_entropy: float
    """Log loss over the entropy of the split's own click rate; 1 is as good as knowing the rate."""
    calibration: float
    """Sum of probabilities over the number of clicks; 1 is calibrated, above 1 too high."""
    average_precision: float
    """Area under the precision-recall curve as a step function."""
    precision: float
    """Share of clicks among the samples with probability > 0.5."""
    recall: float
    """Share of the clicks that have probability > 0.5."""
    f1: float
    """Harmonic mean of precision and recall."""
    samples: int
    """Number of samples."""


def compute_metrics(labels: NDArray[Any], probabilities: NDArray[Any]) -> Metrics:
    """Compute all metrics of a split.

    ``auc`` is the Mann-Whitney statistic in integers, divided once. Probabilities are taken as
    float32, the type in which predictions are stored, so that metrics can be computed again from
    the file. The clipping of ``log_loss`` is that of ``sklearn.metrics.log_loss`` (1.9) for
    float32; the logarithms and their sum are float64, where scikit-learn stays in float32.

    Args:
        labels: (n,) of 0 and 1, any numeric or boolean type.
        probabilities: (n,) in [0, 1], rounded to float32 if wider.

    Raises:
        ValueError: The shapes differ, a label is neither 0 nor 1, or a probability is NaN or
            outside [0, 1].
    """
    labels = np.asarray(labels)
    probabilities = np.asarray(probabilities, dtype=np.float32)
    _check(labels, probabilities)
    clicked = labels.astype(np.bool_)
    samples = len(clicked)
    clicks = int(np.count_nonzero(clicked))
    predicted = probabilities > 0.5
    true_positives = int(np.count_nonzero(predicted & clicked))
    predicted_clicks = int(np.count_nonzero(predicted))
    correct = samples - clicks - predicted_clicks + 2 * true_positives

    log_loss = _log_loss(clicked, probabilities)
    auc, average_precision = _ranking_metrics(clicked, probabilities)
    return Metrics(
        auc=auc,
        accuracy=_ratio(correct, samples, math.nan),
        log_loss=log_loss,
        normalized_entropy=_ratio(log_loss, _entropy(clicks, samples), math.nan),
        calibration=_ratio(float(probabilities.sum(dtype=np.float64)), clicks, math.nan),
        average_precision=average_precision,
        precision=_ratio(true_positives, predicted_clicks, 0.0),
        recall=_ratio(true_positives, clicks, 0.0),
        f1=_ratio(2 * true_positives, predicted_clicks + clicks, 0.0),
        samples=samples,
    )


def _ratio(numerator: float, denominator: float, undefined: float) -> float:
    return numerator / denominator if denominator else undefined


def _check(labels: NDArray[Any], probabilities: NDArray[np.float32]) -> None:
    if labels.ndim != 1 or labels.shape != probabilities.shape:
        raise ValueError(
            "labels and probabilities must be vectors of equal length; got shapes "
            f"{labels.shape} and {probabilities.shape}"
        )
    bad = np.flatnonzero((labels != 0) & (labels != 1))
    if bad.size:
        raise ValueError(
            f"labels must be 0 or 1; {bad.size} are not, the first {labels[bad[0]]} in row {bad[0]}"
        )
    bad = np.flatnonzero(np.isnan(probabilities))
    if bad.size:
        raise ValueError(
            f"{bad.size} of {probabilities.size} probabilities are NaN, the first in row {bad[0]}: "
            "the model has diverged (lower the learning rate) or its input holds NaN"
        )
    bad = np.flatnonzero((probabilities < 0) | (probabilities > 1))
    if bad.size:
        raise ValueError(
            f"probabilities must lie in [0, 1]; {bad.size} do not, the first "
            f"{probabilities[bad[0]]} in row {bad[0]} (are these logits?)"
        )


def _log_loss(clicked: NDArray[np.bool_], probabilities: NDArray[np.float32]) -> float:
    if not len(clicked):
        return math.nan
    epsilon = np.finfo(np.float32).eps
    clipped = probabilities.clip(epsilon, 1 - epsilon).astype(np.float64)
    of_the_label = np.subtract(1, clipped, out=clipped, where=~clicked)
    return -float(np.log(of_the_label, out=of_the_label).mean())


def _entropy(clicks: int, samples: int) -> float:
    """Return the entropy in nats of the click rate; 0 where all labels are equal."""
    return sum(
        -count / samples * math.log(count / samples)
        for count in (clicks, samples - clicks)
        if count
    )


def _ranking_metrics(
    clicked: NDArray[np.bool_], probabilities: NDArray[np.float32]
) -> tuple[float, float]:
    """Return ROC AUC and average precision."""
    if not len(clicked):
        return math.nan, 0.0
    # The bits of a float32 in [0, 1], read as an integer, are in the float's order and at most
    # 0x3F800000. That leaves room for the label in the lowest bit, so that sorting plain integers
    # sorts both. Adding 0.0 turns -0.0 into 0.0.
    keys = (probabilities + np.float32(0)).view(np.uint32)
    keys <<= np.uint32(1)
    keys |= clicked
    keys.sort()
    starts = np.flatnonzero(np.diff(keys >> np.uint32(1), prepend=np.uint32(2**31)))

    # From here on an entry is a distinct probability, in ascending order.
    samples = np.diff(starts, append=len(keys))
    positives = np.add.reduceat(keys & np.uint32(1), starts, dtype=np.int64)
    negatives = samples - positives
    negatives_below = np.cumsum(negatives) - negatives
    positives_from_here = np.cumsum(positives[::-1])[::-1]
    clicks = int(positives_from_here[0])

    twice_wins = int((positives * (2 * negatives_below + negatives)).sum())
    auc = _ratio(twice_wins, 2 * clicks * (len(keys) - clicks), math.nan)
    precision = positives_from_here / (len(keys) - starts)
    return auc, _ratio(float((positives * precision).sum()), clicks, 0.0)
