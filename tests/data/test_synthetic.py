import dataclasses
import errno
import json
import math
import os

import numpy as np
import pyarrow as pa
import pytest
from scipy import sparse
from sklearn.linear_model import Ridge
from sklearn.metrics import log_loss, roc_auc_score

from dlrm.config import SynthesizeConfig
from dlrm.data import synthetic
from dlrm.data.synthetic import cardinalities, synthesize
from dlrm.errors import EnvironmentFaultError, UserError
from dlrm.metrics import compute_metrics

CONFIG = SynthesizeConfig(rows=100_000, test_rows=20_000)
FILES = {
    "train.txt",
    "test.txt",
    "probabilities.arrow",
    "test_probabilities.arrow",
    "truth.json",
}
KAGGLE_CARDINALITIES = [
    *(1460, 583, 10131227, 2202608, 305, 24, 12517, 633, 3, 93145, 5683, 8351593, 3194, 27),
    *(14992, 5461306, 10, 5652, 2173, 4, 7046547, 18, 15, 286181, 105, 142572),
]
DENSE_MISSING = [0.45, 0, 0.2, 0.2, 0.05, 0.25, 0.05, 0.001, 0.05, 0.45, 0.05, 0.77, 0.2]
SPARSE_MISSING = {
    **{2: 0.036, 3: 0.036, 11: 0.036, 15: 0.036, 20: 0.036, 23: 0.036},
    **{5: 0.133, 18: 0.45, 19: 0.45, 21: 0.82, 24: 0.45, 25: 0.45},
}


def read_rows(path, labelled):
    """Parse the format with nothing but Python; every deviation is an assertion error."""
    rows = []
    content = path.read_bytes().decode("ascii")
    assert content.endswith("\n")
    for line in content[:-1].split("\n"):
        fields = line.split("\t")
        label = fields.pop(0) if labelled else None
        assert label in ({"0", "1"} if labelled else {None})
        assert len(fields) == 39
        for field in fields[:13]:
            assert field == "" or str(int(field)) == field
        for field in fields[13:]:
            assert field == "" or (len(field) == 8 and not set(field) - set("0123456789abcdef"))
        rows.append((label, *fields))
    return np.array(rows, dtype=object)


def read_table(path):
    with pa.ipc.open_file(path) as reader:
        table = reader.read_all()
    assert table.schema.names == ["probability", "label"]
    assert table.schema.types == [pa.float32(), pa.uint8()]
    return table["probability"].to_numpy(), table["label"].to_numpy()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    directory = tmp_path_factory.mktemp("made") / "data"
    return directory, synthesize(directory, CONFIG)


@pytest.fixture(scope="module")
def rows(made):
    return read_rows(made[0] / "train.txt", labelled=True)


@pytest.fixture(scope="module")
def probabilities(made):
    return read_table(made[0] / "probabilities.arrow")[0]


def test_files_rows_and_labels(made, rows):
    directory, _ = made
    assert {path.name for path in directory.iterdir()} == FILES
    assert len(rows) == CONFIG.rows
    assert (
        rows[:, 0].astype(int).tolist() == read_table(directory / "probabilities.arrow")[1].tolist()
    )
    assert len(read_rows(directory / "test.txt", labelled=False)) == CONFIG.test_rows
    assert len(read_table(directory / "test_probabilities.arrow")[1]) == CONFIG.test_rows


def test_click_rate(made, rows):
    clicks = (rows[:, 0] == "1").mean()
    assert clicks == pytest.approx(0.256, abs=0.005)
    assert made[1].click_rate == pytest.approx(clicks, rel=1e-12)


def test_rates_of_missing_values(rows):
    rates = (rows[:, 1:] == "").mean(axis=0)
    expected = DENSE_MISSING + [SPARSE_MISSING.get(i, 0) for i in range(26)]
    assert rates == pytest.approx(np.array(expected, dtype=float), abs=0.005)
    assert (rates[np.array(expected) == 0] == 0).all()


def test_dense_values(rows):
    known = [[int(field) for field in rows[:, i] if field] for i in range(1, 14)]
    negative = {i: {value for value in column if value < 0} for i, column in enumerate(known)}
    assert negative == {i: {-1, -2} if i == 1 else set() for i in range(13)}
    assert (np.array(known[1]) < 0).mean() == pytest.approx(0.098, abs=0.005)
    # Heavy-tailed, and beyond the four digits that are written at once.
    assert np.median(known[4]) < 3000
    assert 10**6 < max(known[4]) < 10**7
    assert any(10_000 <= value and str(value)[-4] == "0" for value in known[4])


def test_cardinalities(made, rows):
    possible = cardinalities(CONFIG.scale)
    assert possible.tolist() == [max(round(n * 0.01), min(n, 10)) for n in KAGGLE_CARDINALITIES]
    found = [len(set(rows[:, 14 + i])) for i in range(26)]
    assert list(made[1].cardinalities) == found
    # A quarter of the rows suffices for a value each in all but the largest features.
    for i in range(26):
        if possible[i] <= CONFIG.rows / 4:
            assert found[i] == possible[i]
        else:
            assert CONFIG.rows / 4 < found[i] <= possible[i]


def test_every_value_of_kaggle_can_occur():
    assert cardinalities(1).tolist() == KAGGLE_CARDINALITIES
    # 45,840,617 rows are more than 4 for each value, so that the walk takes every value.
    rows = 4 * max(KAGGLE_CARDINALITIES)
    sampler = synthetic._FeatureSampler(SynthesizeConfig(rows=rows, scale=1))
    values = np.array(KAGGLE_CARDINALITIES) - [i in SPARSE_MISSING for i in range(26)]
    assert sampler._walk_steps[:, 0].tolist() == values.tolist()
    last = sampler.sample(np.random.default_rng(0), rows - 1, 1)
    strides = sampler._strides
    assert last.ranks[2, 0] == (values[2] - 1) * strides[2] % values[2]
    assert all(
        math.gcd(int(n), int(stride)) == 1 for n, stride in zip(values, strides, strict=True)
    )


def test_ids_are_scattered_distinct_and_long_tailed(rows):
    features = [{*rows[:, 14 + i]} - {""} for i in range(26)]
    assert sum(map(len, features)) == len(set().union(*features))
    assert "00000000" not in set().union(*features)
    # Evenly over 32 bits: the first hexadecimal digit of a large feature's ids.
    first = np.unique([value[0] for value in features[2]], return_counts=True)[1]
    assert len(first) == 16
    assert first.max() / first.min() < 1.2
    # The most frequent value has about Criteo's share; most values are rare.
    share = {0: (0.5, 0.6), 4: (0.66, 0.7), 8: (0.85, 0.9), 2: (0.04, 0.07)}
    for feature, (low, high) in share.items():
        values = rows[:, 14 + feature]
        counts = np.sort(np.unique(values[values != ""], return_counts=True)[1])
        assert low < counts[-1] / counts.sum() < high
    assert (counts == 1).mean() > 0.5


def test_murmur_finalizer():
    def finalize(h):
        h ^= h >> 16
        h = h * 0x85EBCA6B & 0xFFFFFFFF
        h ^= h >> 13
        h = h * 0xC2B2AE35 & 0xFFFFFFFF
        return h ^ h >> 16

    text = synthetic._hexadecimal(np.array([[0, 7, -1], [0, 10_131_226, 1]], dtype=np.int32))
    found = [[number.tobytes() for number in row] for row in text.astype("<u8")]
    expected = [
        [f"{finalize((f << 24) + r):08x}".encode() for r in (0, 7, 10_131_226, 1)] for f in (1, 2)
    ]
    assert found == [
        [expected[0][0], expected[0][1], bytes(8)],
        [expected[1][0], expected[1][2], expected[1][3]],
    ]


def test_truth_is_what_its_files_say(made, rows, probabilities):
    directory, _ = made
    labels = rows[:, 0].astype(int)
    # By hand for 100,000 rows: days 0 to 4 have 14,286 rows, days 5 and 6 have 14,285.
    splits = {
        "train": slice(0, 85_715),
        "test": slice(85_715, 92_858),
        "validation": slice(92_858, 100_000),
    }
    content = json.loads((directory / "truth.json").read_text())
    assert content["format_version"] == "1.4"
    for name in ("seed", "scale", "rows", "test_rows"):
        assert content[name] == getattr(CONFIG, name)
    for split, where in splits.items():
        expected = dataclasses.asdict(compute_metrics(labels[where], probabilities[where]))
        assert content[split].items() <= expected.items()
        assert content[split]["auc"] == pytest.approx(
            roc_auc_score(labels[where], probabilities[where]), abs=1e-12
        )
        assert content[split]["samples"] == where.stop - where.start


@pytest.mark.parametrize(("scale", "seed"), [(0.0001, 0), (0.01, 1), (1, 2), (1, 2**32 - 1)])
def test_best_possible_auc_is_criteos_at_any_scale_and_seed(tmp_path, scale, seed):
    config = SynthesizeConfig(rows=50_000, test_rows=0, scale=scale, seed=seed)
    truth = synthesize(tmp_path, config)
    assert truth.train.auc == pytest.approx(0.80, abs=0.01)
    assert truth.click_rate == pytest.approx(0.256, abs=0.005)


@pytest.mark.parametrize("name", ["probabilities.arrow", "test_probabilities.arrow"])
def test_labels_are_drawn_with_the_probabilities(made, name):
    probabilities, labels = read_table(made[0] / name)
    deciles = np.array_split(np.argsort(probabilities), 10)
    for rows in deciles:
        expected = probabilities[rows].mean(dtype=np.float64)
        deviation = math.sqrt(expected * (1 - expected) / len(rows))
        assert labels[rows].mean() == pytest.approx(expected, abs=4 * deviation)
    assert probabilities[deciles[-1]].mean() > 0.6 > 0.1 > probabilities[deciles[0]].mean()


def test_text_explains_the_probability_but_single_features_do_not(made, rows, probabilities):
    """The best sum of effects of single values loses to the truth; with pairs it does not.

    Fitted to the true logits of half the rows, so that noise of labels does not matter, and from
    the text alone, so that a text which does not belong to the probabilities fails.
    """
    logits = np.log(probabilities.astype(np.float64) / (1 - probabilities))
    half = len(rows) // 2
    dense = np.array([[max(int(field or 0), 0) for field in row] for row in rows[:, 1:14]])

    def one_hot(values):
        kinds, counts = np.unique(values, return_counts=True)
        kinds = kinds[counts >= 30]
        position = np.minimum(np.searchsorted(kinds, values), len(kinds) - 1)
        known = np.flatnonzero(kinds[position] == values)
        shape = (len(values), len(kinds))
        return sparse.csr_matrix((np.ones(len(known)), (known, position[known])), shape)

    ids = rows[:, 14:].astype(str)
    single = [sparse.csr_matrix(np.log1p(dense))] + [one_hot(ids[:, i]) for i in range(26)]
    ring = synthetic._PAIRED_FEATURES
    pairs = [one_hot(np.char.add(ids[:, ring[i - 1]], ids[:, ring[i]])) for i in range(len(ring))]

    def explained(columns):
        inputs = sparse.hstack(columns).tocsr()
        fitted = Ridge(alpha=1.0, solver="lsqr").fit(inputs[:half], logits[:half])
        predicted = fitted.predict(inputs[half:])
        return fitted.score(inputs[half:], logits[half:]), 1 / (1 + np.exp(-predicted))

    labels = rows[half:, 0].astype(int)
    best = roc_auc_score(labels, probabilities[half:])
    additive_share, additive = explained(single)
    pairs_share, with_pairs = explained(single + pairs)
    assert 0.70 < additive_share < 0.80  # a quarter of the variance is of pairs
    assert roc_auc_score(labels, additive) < best - 0.02
    assert log_loss(labels, additive) > log_loss(labels, probabilities[half:].astype(float)) + 0.01
    assert pairs_share > 0.97
    assert roc_auc_score(labels, with_pairs) > best - 0.005


def contents(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_equal_seeds_give_equal_files_whatever_the_threads(tmp_path, monkeypatch):
    config = SynthesizeConfig(rows=40_000, test_rows=20_000)
    synthesize(tmp_path / "two", config)
    monkeypatch.setattr(synthetic, "available_cores", lambda: 5)
    synthesize(tmp_path / "five", config)
    monkeypatch.setattr(synthetic, "available_cores", lambda: 1)
    synthesize(tmp_path / "one", config)
    assert contents(tmp_path / "one") == contents(tmp_path / "two") == contents(tmp_path / "five")

    synthesize(tmp_path / "other", dataclasses.replace(config, seed=124))
    one, other = contents(tmp_path / "one"), contents(tmp_path / "other")
    for name in FILES:
        assert one[name] != other[name]
    # Blocks, splits of rows and test.txt do not repeat each other.
    lines = one["train.txt"].splitlines()
    assert len({line[2:] for line in [*lines, *one["test.txt"].splitlines()]}) == 60_000
    assert not {line[2:] for line in lines} & {line[2:] for line in other["train.txt"].splitlines()}


def test_the_fewest_rows(tmp_path):
    truth = synthesize(tmp_path, SynthesizeConfig(rows=14, test_rows=1, scale=1e-9))
    assert (truth.train.samples, truth.validation.samples, truth.test.samples) == (12, 1, 1)
    assert truth.validation.auc is truth.validation.normalized_entropy is None
    # Read from the file this time.
    assert synthesize(tmp_path, SynthesizeConfig(rows=14, test_rows=1, scale=1e-9)) == truth


def test_no_test_rows_give_no_test_files(tmp_path):
    config = SynthesizeConfig(rows=14, test_rows=0, scale=1e-9)
    truth = synthesize(tmp_path, config)
    names = ["probabilities.arrow", "train.txt", "truth.json"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    assert synthesize(tmp_path, config) == truth
    with pytest.raises(UserError, match="not made with these options or not completely"):
        synthesize(tmp_path, SynthesizeConfig(rows=14, test_rows=1, scale=1e-9))
    # As it was written before, with an empty test.
    for name in ("test.txt", "test_probabilities.arrow"):
        (tmp_path / name).touch()
    assert synthesize(tmp_path, config) == truth


SMALL = SynthesizeConfig(rows=50, test_rows=5)


def test_finished_data_is_left_alone(tmp_path):
    truth = synthesize(tmp_path, SMALL)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert synthesize(tmp_path, SMALL) == truth
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before


def test_other_data_is_not_overwritten(tmp_path):
    synthesize(tmp_path, SMALL)
    before = contents(tmp_path)
    with pytest.raises(UserError, match=r"holds data made with other options .*seed=123.*seed=5"):
        synthesize(tmp_path, dataclasses.replace(SMALL, seed=5))
    (tmp_path / "truth.json").unlink()
    with pytest.raises(UserError, match=r"train\.txt, .* not completely.*Choose another directory"):
        synthesize(tmp_path, SMALL)
    del before["truth.json"]
    assert contents(tmp_path) == before


def test_a_file_in_the_way(tmp_path):
    (tmp_path / "file").write_text("")
    for directory in (tmp_path / "file", tmp_path / "file" / "data"):
        with pytest.raises(UserError, match="a file is in the way"):
            synthesize(directory, SMALL)


def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch):
    def full(_descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(EnvironmentFaultError, match="No space left on device"):
        synthesize(tmp_path / "data", SMALL)
    assert list((tmp_path / "data").iterdir()) == []


def test_a_place_that_holds_no_folders_is_a_fault_of_the_environment():
    with pytest.raises(EnvironmentFaultError, match=r"cannot make the directory /proc/made-up: No"):
        synthesize("/proc/made-up", SMALL)


def test_an_interrupted_run_leaves_nothing_and_can_be_repeated(tmp_path, monkeypatch):
    def interrupted(_rows, _source):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(synthetic, "day_lengths", interrupted)
        with pytest.raises(KeyboardInterrupt):
            synthesize(tmp_path, SMALL)
    assert list(tmp_path.iterdir()) == []
    synthesize(tmp_path, SMALL)
    assert {path.name for path in tmp_path.iterdir()} == FILES
