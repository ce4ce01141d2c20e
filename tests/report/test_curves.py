import numpy as np
import pytest
from sklearn.metrics import auc, precision_recall_curve, roc_curve

from dlrm.metrics import compute_metrics
from dlrm.report.curves import BINS, POINTS, curves_of
from dlrm.report.figures import wilson_interval


def made_up(rows: int, levels: int) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(3)
    probabilities = (generator.integers(0, levels, rows) / levels).astype(np.float32)
    return (generator.random(rows) < probabilities).astype(np.uint8), probabilities


def test_curves_of_few_rows_by_hand() -> None:
    labels = np.array([0, 1, 1, 0], np.uint8)
    curves = curves_of(labels, np.array([0.1, 0.9, 0.5, 0.5], np.float32))
    assert curves.roc.x.tolist() == [0, 0, 0.5, 1]
    assert curves.roc.y.tolist() == [0, 0.5, 1, 1]
    assert curves.precision_recall.x.tolist() == [0.5, 1, 1]
    assert curves.precision_recall.y.tolist() == [1, 2 / 3, 0.5]
    assert curves.clicked.nonzero()[0].tolist() == [12, 22]
    assert curves.not_clicked.nonzero()[0].tolist() == [2, 12]


@pytest.mark.parametrize("levels", [7, 10**6])
def test_every_point_is_one_of_scikit_learns(levels: int) -> None:
    labels, probabilities = made_up(5000, levels)
    curves = curves_of(labels, probabilities)
    x, y, _ = roc_curve(labels, probabilities, drop_intermediate=False)
    exact = set(zip(x.round(12), y.round(12), strict=True))
    assert set(zip(curves.roc.x.round(12), curves.roc.y.round(12), strict=True)) <= exact
    precision, recall, _ = precision_recall_curve(labels, probabilities)
    exact = set(zip(recall.round(12), precision.round(12), strict=True))
    found = curves.precision_recall
    assert set(zip(found.x.round(12), found.y.round(12), strict=True)) <= exact


def test_a_thinned_curve_has_the_ends_and_the_area() -> None:
    labels, probabilities = made_up(20_000, 10**6)
    curves = curves_of(labels, probabilities)
    roc = curves.roc
    assert len(roc.x) <= POINTS + 2
    assert (roc.x[0], roc.y[0], roc.x[-1], roc.y[-1]) == (0, 0, 1, 1)
    assert auc(roc.x, roc.y) == pytest.approx(compute_metrics(labels, probabilities).auc, abs=1e-3)
    assert curves.clicked.sum() == labels.sum()
    assert curves.clicked.sum() + curves.not_clicked.sum() == 20_000
    assert len(curves.clicked) == BINS


def test_wilsons_interval_by_hand() -> None:
    # scipy.stats.binomtest(3, 10).proportion_ci(method="wilson")
    low, high = wilson_interval(np.array([0.3, 0.0]), np.array([10, 10]))
    assert low[0] == pytest.approx(0.1077912674, abs=1e-9)
    assert high[0] == pytest.approx(0.6032218525, abs=1e-9)
    assert low[1] == 0
