import dataclasses
import math
import warnings

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from sklearn import metrics as reference

from dlrm.metrics import Metrics, compute_metrics


def test_hand_computed():
    labels = np.array([1, 0, 1, 0, 0])
    probabilities = np.array([0.75, 0.75, 0.5, 0.25, 0.0], dtype=np.float32)
    found = compute_metrics(labels, probabilities)
    # Pairs: the first click ties with one non-click and beats two, the second beats two of three.
    assert found.auc == (0.5 + 2 + 2) / 6
    assert found.accuracy == 3 / 5  # 0.5 is not above 0.5
    epsilon = 2.0**-23
    losses = [-math.log(p) for p in (0.75, 0.25, 0.5, 0.75, 1 - epsilon)]
    assert found.log_loss == pytest.approx(sum(losses) / 5, rel=1e-15)
    entropy = -(0.4 * math.log(0.4) + 0.6 * math.log(0.6))
    assert found.normalized_entropy == pytest.approx(sum(losses) / 5 / entropy, rel=1e-15)
    assert found.calibration == 2.25 / 2
    assert found.average_precision == pytest.approx(0.5 * (1 / 2) + 0.5 * (2 / 3), rel=1e-15)
    assert (found.precision, found.recall, found.f1) == (0.5, 0.5, 0.5)
    assert found.samples == 5


def sklearn_metrics(labels, probabilities):
    wide = probabilities.clip(2**-23, 1 - 2**-23).astype(np.float64)
    log_loss = reference.log_loss(labels, wide, labels=[0, 1])
    rate = labels.mean(dtype=np.float64)
    predicted = probabilities > 0.5
    return Metrics(
        auc=reference.roc_auc_score(labels, probabilities),
        accuracy=reference.accuracy_score(labels, predicted),
        log_loss=log_loss,
        normalized_entropy=log_loss / reference.log_loss(labels, np.full(len(labels), rate)),
        calibration=probabilities.astype(np.float64).sum() / labels.sum(),
        average_precision=reference.average_precision_score(labels, probabilities),
        precision=reference.precision_score(labels, predicted, zero_division=0),
        recall=reference.recall_score(labels, predicted, zero_division=0),
        f1=reference.f1_score(labels, predicted, zero_division=0),
        samples=len(labels),
    )


def assert_equals_sklearn(labels, probabilities):
    found = dataclasses.asdict(compute_metrics(labels, probabilities))
    expected = dataclasses.asdict(sklearn_metrics(labels, probabilities))
    assert found == pytest.approx(expected, rel=1e-12, abs=1e-12)


probabilities_of_any_kind = st.one_of(
    st.floats(0, 1, width=32),
    st.sampled_from([0.0, -0.0, 1e-45, 0.25, 0.5, float(np.nextafter(np.float32(0.5), 1)), 1.0]),
)


@given(st.data())
def test_equals_sklearn_with_ties_and_extremes(data):
    n = data.draw(st.integers(2, 40))
    labels = data.draw(hnp.arrays(np.int8, n, elements=st.integers(0, 1)))
    labels[:2] = 0, 1
    probabilities = data.draw(hnp.arrays(np.float32, n, elements=probabilities_of_any_kind))
    assert_equals_sklearn(labels, probabilities)


@pytest.mark.parametrize("decimals", [None, 2, 0])
def test_equals_sklearn_on_many_samples(decimals):
    generator = np.random.default_rng(3)
    probabilities = generator.random(200_000, dtype=np.float32)
    labels = (generator.random(200_000) < probabilities).astype(np.float32)
    if decimals is not None:
        probabilities = probabilities.round(decimals)
    assert_equals_sklearn(labels, probabilities)


def test_log_loss_clips_as_sklearn_does_for_float32():
    labels = np.array([0, 1, 1, 0])
    probabilities = np.array([1, 0, 1, 0.3], dtype=np.float32)
    expected = reference.log_loss(labels, probabilities)
    assert compute_metrics(labels, probabilities).log_loss == pytest.approx(expected, rel=1e-6)


def test_constant_probability_is_chance():
    found = compute_metrics(np.array([0, 1, 0, 0]), np.full(4, 0.25, dtype=np.float32))
    assert found.auc == 0.5
    assert found.normalized_entropy == pytest.approx(1, rel=1e-15)
    assert found.calibration == 1
    assert found.average_precision == 0.25


def test_float64_is_rounded_to_float32_so_that_stored_predictions_give_the_same():
    labels = np.array([0, 1])
    probabilities = np.array([0.1 + 1e-12, 0.1])
    assert compute_metrics(labels, probabilities).auc == 0.5


def test_order_of_rows_does_not_matter():
    generator = np.random.default_rng(5)
    labels = generator.integers(0, 2, 1000)
    probabilities = generator.random(1000, dtype=np.float32).round(2)
    order = generator.permutation(1000)
    first = dataclasses.asdict(compute_metrics(labels, probabilities))
    assert dataclasses.asdict(compute_metrics(labels[order], probabilities[order])) == (
        pytest.approx(first, rel=1e-13)
    )


@pytest.mark.parametrize("label", [0, 1])
def test_one_class(label):
    probabilities = np.array([0.25, 0.75], dtype=np.float32)
    found = compute_metrics(np.full(2, label), probabilities)
    assert math.isnan(found.auc)
    assert math.isnan(found.normalized_entropy)
    assert found.accuracy == 0.5
    assert found.log_loss == pytest.approx(-(math.log(0.25) + math.log(0.75)) / 2)
    if label:
        assert found.calibration == 0.5
        assert (found.average_precision, found.precision, found.recall) == (1, 1, 0.5)
        assert found.f1 == pytest.approx(2 / 3)
    else:
        assert math.isnan(found.calibration)
        assert (found.average_precision, found.precision, found.recall, found.f1) == (0, 0, 0, 0)


def test_empty_and_its_json():
    found = compute_metrics(np.array([]), np.array([], dtype=np.float32))
    undefined = {"auc", "accuracy", "log_loss", "normalized_entropy", "calibration"}
    content = msgspec.json.decode(msgspec.json.encode(found))
    assert content.pop("samples") == 0
    assert content == {name: None if name in undefined else 0.0 for name in content}


def test_nothing_predicted_to_click_is_zero_not_a_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = compute_metrics(np.array([0, 1]), np.array([0.5, 0.5], dtype=np.float32))
    assert (found.precision, found.recall, found.f1, found.accuracy) == (0, 0, 0, 0.5)


@pytest.mark.parametrize(
    ("labels", "probabilities", "message"),
    [
        ([0, 1, 0], [0.5, math.nan, math.nan], "2 of 3 probabilities are NaN, the first in row 1"),
        ([0, 1], [0.5, 1.5], r"\[0, 1\]; 1 do not, the first 1.5 in row 1 \(are these logits"),
        ([0, 1], [-0.25, math.inf], "2 do not, the first -0.25 in row 0"),
        ([0, 2], [0.5, 0.5], "labels must be 0 or 1; 1 are not, the first 2 in row 1"),
        ([0.0, math.nan], [0.5, 0.5], "the first nan in row 1"),
        ([0, 1], [0.5], r"equal length; got shapes \(2,\) and \(1,\)"),
        ([[0, 1]], [[0.5, 0.5]], "must be vectors"),
    ],
)
def test_bad_input_is_named(labels, probabilities, message):
    with pytest.raises(ValueError, match=message):
        compute_metrics(np.array(labels), np.array(probabilities, dtype=np.float32))
