import dataclasses
import json
import math
import subprocess
import sys
import warnings
from statistics import NormalDist

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from sklearn import metrics as reference

from dlrm import scores
from dlrm.metrics import MetricsAccumulator, compute_metrics, metrics_of
from dlrm.scores import SortedScores


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


def sklearn_metrics(labels, probabilities, threshold):
    wide = probabilities.clip(2**-23, 1 - 2**-23).astype(np.float64)
    log_loss = reference.log_loss(labels, wide, labels=[0, 1])
    rate = labels.mean(dtype=np.float64)
    predicted = probabilities > threshold
    return {
        "auc": reference.roc_auc_score(labels, probabilities),
        "accuracy": reference.accuracy_score(labels, probabilities > 0.5),
        "log_loss": log_loss,
        "normalized_entropy": log_loss / reference.log_loss(labels, np.full(len(labels), rate)),
        "calibration": probabilities.astype(np.float64).sum() / labels.sum(),
        "average_precision": reference.average_precision_score(labels, probabilities),
        "precision": reference.precision_score(labels, predicted, zero_division=0),
        "recall": reference.recall_score(labels, predicted, zero_division=0),
        "f1": reference.f1_score(labels, predicted, zero_division=0),
        "samples": len(labels),
    }


def assert_equals_sklearn(labels, probabilities, threshold=0.5):
    found = dataclasses.asdict(compute_metrics(labels, probabilities, threshold=threshold))
    expected = sklearn_metrics(labels, probabilities, threshold)
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-12, abs=1e-12)


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
    assert_equals_sklearn(labels, probabilities, data.draw(st.sampled_from([0.5, 0.25, 0.0, 0.9])))


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
    first = compute_metrics(labels, probabilities)
    assert compute_metrics(labels[order], probabilities[order]) == first


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
    assert (content.pop("samples"), content.pop("threshold")) == (0, 0.5)
    assert content.pop("calibration_by_decile") == []
    assert content.pop("auc_interval") == content.pop("log_loss_interval") == [None, None]
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


def delong_by_hand(labels, probabilities):
    """DeLong's variance by its definition, all pairs at once."""
    positives, negatives = probabilities[labels == 1], probabilities[labels == 0]
    wins = (positives[:, None] > negatives) + 0.5 * (positives[:, None] == negatives)
    return wins.mean(1).var(ddof=1) / len(positives) + wins.mean(0).var(ddof=1) / len(negatives)


@pytest.mark.parametrize("decimals", [6, 1])
def test_intervals_are_those_of_the_definitions(decimals):
    generator = np.random.default_rng(7)
    labels = generator.integers(0, 2, 300)
    probabilities = generator.beta(1 + labels, 2).astype(np.float32).round(decimals)
    found = compute_metrics(labels, probabilities)
    half = 1.959963984540054 * math.sqrt(delong_by_hand(labels, probabilities))
    assert found.auc_interval == pytest.approx((found.auc - half, found.auc + half), rel=1e-12)
    clipped = probabilities.clip(2**-23, 1 - 2**-23).astype(np.float64)
    losses = -np.log(np.where(labels == 1, clipped, 1 - clipped))
    half = 1.959963984540054 * math.sqrt(losses.var(ddof=1) / 300)
    assert found.log_loss_interval == pytest.approx(
        (losses.mean() - half, losses.mean() + half), rel=1e-12
    )


def test_intervals_at_the_edges():
    half = np.full(6, 0.5, np.float32)
    assert compute_metrics(np.array([0, 1, 0, 1, 0, 1]), half).auc_interval == (0.5, 0.5)
    separated = np.array([0.1, 0.2, 0.3, 0.7, 0.8, 0.9], np.float32)
    found = compute_metrics(np.array([0, 0, 0, 1, 1, 1]), separated)
    assert (found.auc, found.auc_interval) == (1, (1, 1))
    two = compute_metrics(np.array([0, 1]), half[:2])
    assert np.isnan(two.auc_interval).all()  # of one sample no variance is known
    assert two.log_loss_interval == pytest.approx((math.log(2), math.log(2)))
    one = compute_metrics(np.array([1]), half[:1])
    assert np.isnan(one.log_loss_interval).all()
    assert one.log_loss == pytest.approx(math.log(2))


def coverage(repetitions, samples, seed):
    """Return how often 95% intervals hold the true AUC, and the true log loss."""
    generator = np.random.default_rng(seed)
    normal = NormalDist()
    true_auc = normal.cdf(1 / math.sqrt(2))  # of two normal distributions, 1 apart
    # Labels drawn from the probabilities themselves: the expected loss is their mean entropy.
    grid = np.linspace(0.05, 0.95, 19, dtype=np.float32)
    wide = grid.astype(np.float64)
    true_loss = -(wide * np.log(wide) + (1 - wide) * np.log(1 - wide)).mean()
    auc_hits = loss_hits = 0
    for _ in range(repetitions):
        labels = generator.random(samples) < 0.25
        scores_ = generator.normal(labels, 1)
        low, high = compute_metrics(labels, 1 / (1 + np.exp(-scores_))).auc_interval
        auc_hits += low <= true_auc <= high
        probabilities = generator.choice(grid, samples)
        labels = generator.random(samples) < probabilities
        low, high = compute_metrics(labels, probabilities).log_loss_interval
        loss_hits += low <= true_loss <= high
    return auc_hits / repetitions, loss_hits / repetitions


def test_coverage_of_the_intervals():
    for hits in coverage(1000, 1000, 11):
        assert 0.93 <= hits <= 0.97  # ± 2.9 standard errors of 95%


@pytest.mark.long
def test_coverage_of_the_intervals_closely():
    for hits in coverage(20_000, 1000, 12):
        assert 0.944 <= hits <= 0.956


def test_calibration_by_decile():
    probabilities = np.repeat(np.arange(1, 21) / 32, 5).astype(np.float32)
    labels = np.tile([1, 0, 0, 0, 0], 20)
    labels[-10:] = 1
    deciles = compute_metrics(labels, probabilities).calibration_by_decile
    assert [each.decile for each in deciles] == list(range(1, 11))
    assert {each.samples for each in deciles} == {10}
    assert [each.observed for each in deciles] == [0.2] * 9 + [1.0]
    assert deciles[0].predicted == 1.5 / 32
    assert (deciles[9].lowest, deciles[9].highest) == (19 / 32, 20 / 32)


def test_deciles_of_ties_stay_together():
    probabilities = np.array([0.25] * 9 + [0.75], np.float32)
    deciles = compute_metrics(np.arange(10) % 2, probabilities).calibration_by_decile
    assert [(each.decile, each.samples) for each in deciles] == [(5, 9), (10, 1)]


@given(st.data())
def test_neither_batches_nor_memory_change_a_bit(tmp_path_factory, data):
    n = data.draw(st.integers(1, 60))
    values = st.one_of(probabilities_of_any_kind, st.sampled_from([0.125, 0.5, 0.75]))
    labels = data.draw(hnp.arrays(np.int8, n, elements=st.integers(0, 1)))
    probabilities = data.draw(hnp.arrays(np.float32, n, elements=values))
    cuts = sorted(data.draw(st.lists(st.integers(0, n), max_size=4)))
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scores, "BLOCK", 7)
        expected = compute_metrics(labels, probabilities)
        patch.setattr(scores, "_SORTED_PIECE", data.draw(st.integers(1, 9)))
        patch.setattr(scores, "_PIECE", data.draw(st.integers(1, 9)))
        with SortedScores(data.draw(st.integers(1, 30)), folder) as found:
            for start, end in zip([0, *cuts], [*cuts, n], strict=True):
                found.add(labels[start:end], probabilities[start:end])
            # As texts, in which a NaN equals a NaN, and nothing else that differs by a bit.
            assert repr(metrics_of(found)) == repr(expected)
    assert list(folder.iterdir()) == []
    if 0 < labels.sum() < n:
        assert expected.auc == pytest.approx(
            reference.roc_auc_score(labels, probabilities), abs=1e-12
        )


def test_what_is_on_disk_has_no_name_and_goes_with_the_process(tmp_path):
    """Killed while its runs lie on disk, a process leaves none."""
    script = f"""
import os, signal
import numpy as np
from pathlib import Path
from dlrm.scores import SortedScores
scores = SortedScores(1000, Path({str(tmp_path)!r}))
scores.add(np.zeros(5000), np.linspace(0, 1, 5000))
assert scores._runs == 4 and scores._file.seek(0, 2) == 16000
assert not os.listdir({str(tmp_path)!r})
os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", script]).returncode == -9
    assert list(tmp_path.iterdir()) == []


def test_the_row_of_bad_input_counts_from_the_first_batch():
    with MetricsAccumulator() as accumulator:
        accumulator.add(np.array([0, 1]), np.array([0.5, 0.5], np.float32))
        with pytest.raises(ValueError, match="1 of 2 probabilities are NaN, the first in row 3"):
            accumulator.add(np.array([0, 1]), np.array([0.5, math.nan], np.float32))


MANY = """
import json, resource, sys
import numpy as np
from dlrm.metrics import MetricsAccumulator

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

memory, samples = int(sys.argv[1]), int(sys.argv[2])
batch = 1 << 16
generator = np.random.default_rng(1)
def draw(count):
    probabilities = generator.random(count, dtype=np.float32) ** 2
    return generator.random(count, dtype=np.float32) < probabilities, probabilities
draw(batch)
before = peak()
with MetricsAccumulator(memory=memory) as accumulator:
    for start in range(0, samples, batch):
        accumulator.add(*draw(min(batch, samples - start)))
    metrics = accumulator.metrics()
print(json.dumps([repr(metrics), peak() - before]))
"""


def metrics_of_many(memory, samples):
    command = [sys.executable, "-c", MANY, str(memory), str(samples)]
    text, used = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    assert used <= memory
    return text


def test_memory_is_limited_and_changes_nothing():
    """12 million scores take 48 MB, so that with 32 MiB most lie on disk."""
    assert metrics_of_many(32 << 20, 12_000_000) == metrics_of_many(128 << 20, 12_000_000)


@pytest.mark.long
def test_a_hundred_million_scores_in_the_stated_memory():
    in_memory = metrics_of_many(512 << 20, 100_000_000)
    assert "samples=100000000" in in_memory
    assert metrics_of_many(64 << 20, 100_000_000) == in_memory
