"""Metrics of predicted click probabilities: exact, in float64, from one sort in limited memory.

The definitions with their formulas are in ``docs/metrics.md``. The best possible metrics of data
whose true probabilities are known are ``compute_metrics(labels, true_probabilities)``.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from dlrm.config import MINIMUM_MEMORY
from dlrm.scores import Block, Moments, SortedScores

DEFAULT_MEMORY = 512 << 20
_RESERVED_BYTES = 24 << 20
"""Of the memory: what counting and summing a block take."""

QUANTILE = NormalDist().inv_cdf(0.975)
"""Of the normal distribution: half the width of a 95% interval in standard errors."""

_DECILES = 10


@dataclass(frozen=True)
class Decile:
    """A tenth of a split's samples, by their probability; equal probabilities share one."""

    decile: int
    """1: the lowest probabilities … 10: the highest."""
    samples: int
    """How many it has: not a tenth, where many probabilities are equal."""
    lowest: float
    """The lowest probability in it."""
    highest: float
    """The highest."""
    predicted: float
    """Mean probability."""
    observed: float
    """Click rate."""


@dataclass(frozen=True)
class Metrics:
    """How well probabilities predict the labels of a split.

    A metric that is undefined is NaN, which JSON files of ours hold as ``null``: everything but
    the counting metrics without samples, ``auc`` and ``normalized_entropy`` where all labels are
    equal, ``calibration`` without clicks, an interval with fewer than two samples (for the AUC: of
    either label). ``average_precision``, ``precision``, ``recall`` and ``f1`` are 0 where
    undefined, as in scikit-learn with ``zero_division=0``.
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
    """Share of clicks among the samples with probability > threshold."""
    recall: float
    """Share of the clicks that have probability > threshold."""
    f1: float
    """Harmonic mean of precision and recall."""
    samples: int
    """Number of samples."""
    threshold: float = 0.5
    """Above which probability a sample counts as predicted to click, in precision, recall, f1."""
    auc_interval: tuple[float, float] = (math.nan, math.nan)
    """95% confidence interval of the AUC (DeLong)."""
    log_loss_interval: tuple[float, float] = (math.nan, math.nan)
    """95% confidence interval of the log loss (normal)."""
    calibration_by_decile: tuple[Decile, ...] = ()
    """Predicted and observed clicks of tenths of the samples, those that are empty left out."""


class MetricsAccumulator:
    """Metrics of samples that come in batches, in limited memory.

    The result depends on the samples alone: not on their order, how they were cut into batches, or
    the memory. It is a context, which frees the memory and what is on disk.

    Args:
        memory: The most to use, in bytes, at least 32 MiB: 4 a sample. What is beyond goes to
            disk.
        folder: Where on disk; None: the system's folder for temporary files.
        threshold: Above which probability a sample counts as predicted to click.
    """

    def __init__(
        self,
        *,
        memory: int = DEFAULT_MEMORY,
        folder: Path | None = None,
        threshold: float = 0.5,
    ) -> None:
        if memory < MINIMUM_MEMORY:
            raise ValueError(f"memory must be at least {MINIMUM_MEMORY} bytes; got {memory}")
        self._scores = SortedScores((memory - _RESERVED_BYTES) // 4, folder)
        self._threshold = threshold

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._scores.close()

    def add(self, labels: NDArray[Any], probabilities: NDArray[Any]) -> None:
        """Add samples.

        Args:
            labels: (n,) of 0 and 1, any numeric or boolean type.
            probabilities: (n,) in [0, 1], rounded to float32 if wider.

        Raises:
            ValueError: The shapes differ, a label is neither 0 nor 1, or a probability is NaN or
                outside [0, 1].
            EnvironmentFaultError: The disk is full or fails.
        """
        self._scores.add(labels, probabilities)

    def metrics(self) -> Metrics:
        """Return the metrics of all samples; add none after that."""
        return metrics_of(self._scores, self._threshold)


def compute_metrics(
    labels: NDArray[Any], probabilities: NDArray[Any], *, threshold: float = 0.5
) -> Metrics:
    """Compute all metrics of a split that is in memory, with 4 bytes a sample beside it.

    Probabilities are taken as float32, the type in which predictions are stored, so that metrics
    can be computed again from the file.

    Args:
        labels: (n,) of 0 and 1, any numeric or boolean type.
        probabilities: (n,) in [0, 1], rounded to float32 if wider.
        threshold: Above which probability a sample counts as predicted to click.

    Raises:
        ValueError: The shapes differ, a label is neither 0 nor 1, or a probability is NaN or
            outside [0, 1].
    """
    with SortedScores(np.size(labels)) as scores:
        scores.add(labels, probabilities)
        return metrics_of(scores, threshold)


def metrics_of(scores: SortedScores, threshold: float = 0.5) -> Metrics:
    """Compute all metrics of sorted scores in one pass over them."""
    sums = MetricSums(scores.samples, scores.positives, threshold)
    for block in scores.blocks():
        sums.add(block)
    return sums.metrics()


class MetricSums:
    """What metrics are made of, summed over the distinct probabilities in ascending order.

    Counts and the AUC are integers. Other sums are of float64: within a block NumPy's pairwise
    sum, over blocks ``math.fsum``, which is exact. Blocks are cut by ``SortedScores`` in one way
    only.

    Args:
        samples: How many there are in all.
        positives: Those with label 1.
        threshold: Above which probability a sample counts as predicted to click.
    """

    def __init__(self, samples: int, positives: int, threshold: float = 0.5) -> None:
        self._samples = samples
        self._positives = positives
        self._negatives = samples - positives
        self._threshold = threshold
        self._twice_wins = 0
        self._above_half = _Above(0.5)
        self._above_threshold = _Above(threshold)
        self._losses: list[float] = []
        self._probabilities: list[float] = []
        self._precisions: list[float] = []
        self._deciles: dict[int, _DecileSums] = {}
        self._of_positives, self._of_negatives, self._of_losses = Moments(), Moments(), Moments()

    def add(self, block: Block) -> None:
        """Add the next block."""
        positives, negatives = block.positives, block.negatives
        counts = positives + negatives
        positives_below = block.positives_below + np.cumsum(positives) - positives
        negatives_below = block.negatives_below + np.cumsum(negatives) - negatives
        probabilities = block.probabilities.astype(np.float64)

        negatives_beaten, positives_ahead = block.placements(self._positives)
        self._twice_wins += int((positives * negatives_beaten).sum())
        if self._positives and self._negatives:
            self._of_positives.add(negatives_beaten / (2 * self._negatives), positives)
            self._of_negatives.add(positives_ahead / (2 * self._positives), negatives)

        if_positive, if_negative = log_losses(block.probabilities)
        self._losses.append(float((positives * if_positive + negatives * if_negative).sum()))
        self._of_losses.add(
            np.concatenate((if_positive, if_negative)), np.concatenate((positives, negatives))
        )
        self._probabilities.append(float((counts * probabilities).sum()))

        positives_from_here = self._positives - positives_below
        samples_from_here = self._samples - positives_below - negatives_below
        self._precisions.append(float((positives * positives_from_here / samples_from_here).sum()))
        for above in (self._above_half, self._above_threshold):
            above.add(probabilities, positives, counts)
        self._add_deciles(probabilities, positives, counts, positives_below + negatives_below)

    def _add_deciles(
        self,
        probabilities: NDArray[np.float64],
        positives: NDArray[np.int64],
        counts: NDArray[np.int64],
        below: NDArray[np.int64],
    ) -> None:
        # Equal probabilities go where the middle of them belongs.
        decile = _DECILES * (2 * below + counts) // (2 * self._samples)
        starts = np.searchsorted(decile, np.arange(_DECILES + 1))
        for number, (start, end) in enumerate(itertools.pairwise(starts), 1):
            if start < end:
                sums = self._deciles.setdefault(number, _DecileSums(probabilities[start]))
                sums.add(probabilities[start:end], positives[start:end], counts[start:end])

    def metrics(self) -> Metrics:
        """Return the metrics, once every block was added."""
        samples, clicks = self._samples, self._positives
        log_loss = _ratio(math.fsum(self._losses), samples, math.nan)
        auc = _ratio(self._twice_wins, 2 * clicks * self._negatives, math.nan)
        half, above = self._above_half, self._above_threshold
        variance = self._of_positives.variance_of_mean + self._of_negatives.variance_of_mean
        low, high = _interval(auc, variance)
        return Metrics(
            auc=auc,
            accuracy=_ratio(
                samples - clicks - half.samples + 2 * half.positives, samples, math.nan
            ),
            log_loss=log_loss,
            normalized_entropy=_ratio(log_loss, _entropy(clicks, samples), math.nan),
            calibration=_ratio(math.fsum(self._probabilities), clicks, math.nan),
            average_precision=_ratio(math.fsum(self._precisions), clicks, 0.0),
            precision=_ratio(above.positives, above.samples, 0.0),
            recall=_ratio(above.positives, clicks, 0.0),
            f1=_ratio(2 * above.positives, above.samples + clicks, 0.0),
            samples=samples,
            threshold=self._threshold,
            auc_interval=(max(low, 0.0), min(high, 1.0)) if low == low else (low, high),
            log_loss_interval=_interval(log_loss, self._of_losses.variance_of_mean),
            calibration_by_decile=tuple(
                self._deciles[number].decile(number) for number in sorted(self._deciles)
            ),
        )


def log_losses(
    probabilities: NDArray[np.float32],
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the log loss of each probability if the label is 1, and if it is 0.

    The clipping is that of ``sklearn.metrics.log_loss`` (1.9) for float32; the logarithms are
    float64, where scikit-learn stays in float32.
    """
    epsilon = np.finfo(np.float32).eps
    clipped = probabilities.clip(epsilon, 1 - epsilon).astype(np.float64)
    return -np.log(clipped), -np.log(1 - clipped)


class _Above:
    """Samples above a threshold, and those of label 1 among them."""

    def __init__(self, threshold: float) -> None:
        self._threshold = threshold
        self.samples = 0
        self.positives = 0

    def add(
        self,
        probabilities: NDArray[np.float64],
        positives: NDArray[np.int64],
        counts: NDArray[np.int64],
    ) -> None:
        start = np.searchsorted(probabilities, self._threshold, side="right")
        self.positives += int(positives[start:].sum())
        self.samples += int(counts[start:].sum())


class _DecileSums:
    def __init__(self, lowest: float) -> None:
        self._lowest = self._highest = float(lowest)
        self._probabilities: list[float] = []
        self._samples = 0
        self._positives = 0

    def add(
        self,
        probabilities: NDArray[np.float64],
        positives: NDArray[np.int64],
        counts: NDArray[np.int64],
    ) -> None:
        self._highest = float(probabilities[-1])
        self._probabilities.append(float((counts * probabilities).sum()))
        self._samples += int(counts.sum())
        self._positives += int(positives.sum())

    def decile(self, number: int) -> Decile:
        return Decile(
            number,
            self._samples,
            self._lowest,
            self._highest,
            math.fsum(self._probabilities) / self._samples,
            self._positives / self._samples,
        )


def _ratio(numerator: float, denominator: float, undefined: float) -> float:
    return numerator / denominator if denominator else undefined


def _interval(value: float, variance: float) -> tuple[float, float]:
    half = QUANTILE * math.sqrt(variance)
    return value - half, value + half


def _entropy(clicks: int, samples: int) -> float:
    """Return the entropy in nats of the click rate; 0 where all labels are equal."""
    return sum(
        -count / samples * math.log(count / samples)
        for count in (clicks, samples - clicks)
        if count
    )
