from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from sklearn.metrics import log_loss, roc_auc_score

from dlrm import paired
from dlrm.comparison import compare, describe
from dlrm.config import ModelConfig, PrepareConfig, SynthesizeConfig, TrainConfig
from dlrm.data.prepare import prepare
from dlrm.data.synthetic import synthesize
from dlrm.errors import UserError
from dlrm.metrics import compute_metrics
from dlrm.paired import compare_rows
from dlrm.predictions import Predictions, write_predictions
from dlrm.training.begin import train

FINGERPRINT = "ab" * 32


def store(
    run: Path, labels: np.ndarray, probabilities: np.ndarray, dataset: str = FINGERPRINT
) -> Path:
    run.mkdir(exist_ok=True)
    with write_predictions(run / "predictions" / "test.arrow", "test", dataset) as writer:
        writer.add(labels, probabilities.astype(np.float32))
    return run


def store_few(run: Path, labels: list[int], probabilities: list[float]) -> Path:
    return store(run, np.array(labels, np.bool_), np.array(probabilities))


def opened(runs: list[Path]) -> list[Predictions]:
    return [Predictions.open(run / "predictions" / "test.arrow", "test") for run in runs]


def made_up(count: int, rows: int, seed: int = 0, noise: float = 0.5) -> tuple[np.ndarray, list]:
    """Labels, and the probabilities of models that differ by noise."""
    generator = np.random.default_rng(seed)
    signal = generator.normal(size=rows)
    labels = generator.random(rows) < 1 / (1 + np.exp(1 - signal))
    models = [signal - 1 + noise * generator.normal(size=rows) for _ in range(count)]
    return labels, [1 / (1 + np.exp(-model)) for model in models]


def by_hand(labels: np.ndarray, models: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """DeLong's covariances of AUCs by their definition, and those of log losses."""
    of_positives, of_negatives, losses = [], [], []
    for model in models:
        wide = model.astype(np.float32).astype(np.float64)
        positives, negatives = wide[labels], wide[~labels]
        wins = (positives[:, None] > negatives) + 0.5 * (positives[:, None] == negatives)
        of_positives.append(wins.mean(axis=1))
        of_negatives.append(wins.mean(axis=0))
        losses.append(-np.log(np.where(labels, wide, 1 - wide)))
    auc = np.cov(of_positives) / labels.sum() + np.cov(of_negatives) / (~labels).sum()
    return auc, np.cov(losses) / len(labels)


@pytest.mark.parametrize("decimals", [7, 1])
@pytest.mark.parametrize("table_bytes", [64, 1 << 18])
def test_covariances_are_those_of_the_definitions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, decimals: int, table_bytes: int
) -> None:
    """Also where tables of distinct probabilities are short, and rows are cut into pieces."""
    monkeypatch.setattr(paired, "_ROWS", 70)
    monkeypatch.setattr(paired, "_TABLE_BYTES", table_bytes)
    monkeypatch.setattr("dlrm.scores.BLOCK", 13)
    labels, models = made_up(3, 300)
    models = [model.round(decimals).clip(0.01, 0.99) for model in models]
    runs = [store(tmp_path / str(at), labels, model) for at, model in enumerate(models)]
    found = compare_rows(opened(runs), memory=1 << 20)
    auc, losses = by_hand(labels, models)
    np.testing.assert_allclose(found.auc_covariance, auc, rtol=1e-10)
    np.testing.assert_allclose(found.log_loss_covariance, losses, rtol=1e-10)
    for metrics, model in zip(found.metrics, models, strict=True):
        assert metrics == compute_metrics(labels, model)
        assert metrics.auc == pytest.approx(roc_auc_score(labels, np.float32(model)), abs=1e-12)
        assert metrics.log_loss == pytest.approx(log_loss(labels, model), abs=1e-6)


def test_minus_zero_is_zero(tmp_path: Path) -> None:
    labels, (one, other) = made_up(2, 300)
    one, other = one.round(1), other.round(1)
    minus = np.where(one == 0, -0.0, one)
    assert np.signbit(minus).any()
    runs = [
        store(tmp_path / str(at), labels, model) for at, model in enumerate((one, other, minus))
    ]
    first = compare_rows(opened(runs[:2]))
    second = compare_rows(opened([runs[2], runs[1]]))
    np.testing.assert_array_equal(first.auc_covariance, second.auc_covariance)


def test_a_row_whose_label_differs_is_told_by_its_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(paired, "_ROWS", 70)
    labels, (model,) = made_up(1, 300)
    changed = labels.copy()
    changed[250] = ~changed[250]
    runs = [store(tmp_path / "a", labels, model), store(tmp_path / "b", changed, model)]
    with pytest.raises(UserError, match="the labels of row 250 differ"):
        compare(runs)


def test_what_lies_where_a_run_describes_itself_is_refused_if_it_is_a_folder(
    tmp_path: Path,
) -> None:
    labels, (model,) = made_up(1, 30)
    runs = [store(tmp_path / name, labels, model) for name in "ab"]
    for name in ("log.jsonl", "config.toml"):
        (runs[0] / name).mkdir()
        with pytest.raises(UserError, match=f"{name} is damaged"):
            compare(runs)


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 3), st.integers(0, 3)), min_size=1))
def test_any_rows_have_an_answer(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[bool, int, int]]
) -> None:
    """One class, ties, equal models: a definite text and JSON, and no warning."""
    folder = tmp_path_factory.mktemp("runs")
    table = np.array(rows, dtype=float)
    runs = [store(folder / str(at), table[:, 0], table[:, at] / 3) for at in (1, 2)]
    comparison = compare(runs[:1], runs[1:])
    text = describe(comparison)
    auc, losses = comparison.differences
    both_classes = 0 < table[:, 0].sum() < len(table)
    assert math.isnan(auc.difference) == (not both_classes)
    assert "No verdict about the recipes can be given" in " ".join(text.split())
    if (table[:, 1] == table[:, 2]).all():
        assert losses.difference == 0
        assert losses.on_rows.p == 1
    assert msgspec.json.decode(msgspec.json.encode(comparison))["rows"] == len(table)


def test_the_paired_test_is_right_as_often_as_it_says(tmp_path: Path) -> None:
    """Of two models that are equally good, a twentieth seem to differ at p < 0.05."""
    surprises = 0
    for seed in range(200):
        labels, models = made_up(2, 400, seed)
        runs = [store(tmp_path / str(at), labels, model) for at, model in enumerate(models)]
        found = compare_rows(opened(runs), memory=1 << 20)
        weights = np.array([1, -1])
        error = math.sqrt(weights @ found.auc_covariance @ weights)
        surprises += abs(found.metrics[0].auc - found.metrics[1].auc) > 1.96 * error
    assert 2 <= surprises <= 20  # expected 10 ± 3.1


def recipe(folder: Path, name: str, noises: list[float], rows: int = 2000) -> list[Path]:
    """Make runs of a recipe: models whose noise is given, each with its own seed."""
    labels, _ = made_up(0, rows)
    runs = []
    for seed, noise in enumerate(noises):
        generator = np.random.default_rng(0)
        signal = generator.normal(size=rows)
        mixed = signal + noise * np.random.default_rng([seed, *name.encode()]).normal(size=rows)
        run = store(folder / f"{name}{seed}", labels, 1 / (1 + np.exp(1 - mixed)))
        (run / "config.toml").write_text(f'format_version = "1.3"\nseed = {seed}\n')
        runs.append(run)
    return runs


def test_over_seeds_it_is_welchs_test(tmp_path: Path) -> None:
    first = recipe(tmp_path, "good", [0.4, 0.5, 0.6])
    second = recipe(tmp_path, "bad", [1.0, 1.1, 1.3, 1.5])
    comparison = compare(first, second)
    assert [each.name for each in comparison.runs] == ["A1", "A2", "A3", "B1", "B2", "B3", "B4"]
    auc = comparison.differences[0]
    values = [each.metrics.auc for each in comparison.runs]
    expected = stats.ttest_ind(values[:3], values[3:], equal_var=False)
    assert auc.over_seeds
    assert auc.difference == pytest.approx(np.mean(values[:3]) - np.mean(values[3:]), rel=1e-12)
    assert auc.over_seeds.p == pytest.approx(expected.pvalue, rel=1e-9)
    interval = expected.confidence_interval(0.95)
    assert auc.over_seeds.interval == pytest.approx((interval.low, interval.high), rel=1e-9)
    assert auc.conclusion == "higher"
    assert comparison.differences[1].conclusion == "lower"
    assert comparison.verdict[0].startswith("AUC, A1…A3 against B1…B4: +0.")
    assert comparison.verdict[0].endswith("higher, beyond what another seed would give.")


def test_two_seeds_give_no_verdict_but_a_stated_noise_does(tmp_path: Path) -> None:
    runs = recipe(tmp_path, "run", [0.4, 0.5, 1.0, 1.2])
    comparison = compare(runs[:2], runs[2:])
    assert {each.conclusion for each in comparison.differences} == {"not known"}
    assert len(comparison.verdict) == 1
    assert "No verdict about the recipes can be given: another seed" in comparison.verdict[0]
    assert "not known from 2 runs a side" in comparison.verdict[0]
    assert "--against B1 B2 B3; or state" in comparison.verdict[0]

    stated = compare(runs[:2], runs[2:], seed_noise=0.001)
    auc, losses = stated.differences
    assert auc.over_seeds
    assert auc.over_seeds.standard_error == pytest.approx(0.001)  # √(1/2 + 1/2) of it
    assert auc.over_seeds.interval[1] == pytest.approx(auc.difference + 1.959963984540054e-3)
    assert (auc.conclusion, losses.conclusion) == ("higher", "not known")
    assert stated.verdict[1].startswith("No verdict about the recipes can be given from the log")
    assert "--seed-noise-log-loss" in stated.verdict[1]
    wide = compare(runs[:2], runs[2:], seed_noise=1.0, seed_noise_log_loss=1.0)
    assert {each.conclusion for each in wide.differences} == {"no difference beyond noise"}
    assert len(wide.verdict) == 2


def test_seeds_with_equal_metrics_tell_nothing_of_the_noise(tmp_path: Path) -> None:
    """Of 4 rows: all of a side have the same AUC, 1 or 3/4, with other probabilities."""
    labels = [0, 0, 1, 1]
    sides = [
        [
            store_few(tmp_path / f"{side}{run}", labels, [0.1, second, third + run / 100, 0.8])
            for run in range(3)
        ]
        for side, second, third in (("right", 0.3, 0.5), ("wrong", 0.6, 0.5))
    ]
    comparison = compare(*sides)
    auc, losses = comparison.differences
    assert auc.difference == 0.25
    assert auc.over_seeds
    assert math.isnan(auc.over_seeds.p)
    assert auc.conclusion == "not known"
    assert comparison.verdict[0].startswith("AUC, A1…A3 against B1…B3: none, since the runs of")
    assert losses.conclusion == "lower"
    # Of one side alone, Welch's test takes the other's noise.
    labels = [0, 0, 1, 1, 1]
    one = [
        store_few(tmp_path / f"one{run}", labels, [0.1, 0.2, 0.5, 0.6, 0.7 + run / 100])
        for run in range(3)
    ]
    other = [
        store_few(tmp_path / f"other{run}", labels, [0.55, each, 0.5, 0.6, 0.7])
        for run, each in enumerate((0.2, 0.56, 0.65))
    ]
    auc = compare(one, other).differences[0]
    assert auc.over_seeds
    # One side has no variance, so that it is the other's test of a mean (df 2) against 1.
    expected = stats.ttest_1samp([5 / 6, 4 / 6, 3 / 6], 1)
    assert auc.over_seeds.p == pytest.approx(expected.pvalue)


def test_what_is_undefined_or_equal_is_said(tmp_path: Path) -> None:
    runs = [store_few(tmp_path / str(run), [0, 0, 0], [0.1, 0.2, 0.3]) for run in range(2)]
    comparison = compare(runs)
    assert comparison.verdict[0] == (
        "AUC, A against B: none, since it is undefined where all labels are equal."
    )
    assert comparison.verdict[1].startswith("No verdict about the recipes can be given from the lo")
    assert comparison.notes == ("A and B predict the same for every row.",)


def test_the_first_is_compared_with_each_of_the_others(tmp_path: Path) -> None:
    runs = recipe(tmp_path, "run", [0.4, 0.5, 1.0])
    comparison = compare(runs)
    pairs = [(each.first, each.second) for each in comparison.differences[::2]]
    assert pairs == [(("A",), ("B",)), (("A",), ("C",))]
    assert "The p values are of 2 comparisons" in comparison.notes[0]
    assert comparison.configuration == {"seed": {"A": 0, "B": 1, "C": 2}}


def test_loss_curves_meet_at_common_steps(tmp_path: Path) -> None:
    first, second, third = recipe(tmp_path, "run", [0.4, 0.5, 0.6])
    for run, every in ((first, 2), (second, 3)):
        lines = [{"event": "start", "seconds": 0.1, "position": {"total_steps": 0}}]
        lines += [
            {"event": "report", "position": {"total_steps": step}, "loss": step / every}
            for step in range(every, 13, every)
        ]
        text = "\n".join(json.dumps(line) for line in lines) + '\n{"event": "rep'
        (run / "log.jsonl").write_text(text)
    comparison = compare([first, second, third])
    assert comparison.loss_curves.steps == (6, 12)
    assert comparison.loss_curves.loss == {"A": (3.0, 6.0), "B": (2.0, 4.0)}
    assert "            12   6.000000   4.000000\n" in describe(comparison)
    (first / "log.jsonl").write_text('{"event": "report"\n{}\n')
    with pytest.raises(UserError, match=r"log\.jsonl is damaged in line 1"):
        compare([first, second])


def test_what_cannot_be_compared_is_named(tmp_path: Path) -> None:
    labels, models = made_up(2, 50)
    first = store(tmp_path / "first", labels, models[0])
    other = store(tmp_path / "other", labels, models[1], dataset="cd" * 32)
    with pytest.raises(UserError, match=r"first.* and .*other.* of different DATASETs: abab"):
        compare([first, other])
    assert "different fingerprints" in compare([first, other], same_rows=True).notes[0]
    short = store(tmp_path / "short", labels[:-1], models[1][:-1])
    with pytest.raises(UserError, match=r"first.* and .*short.* rows: 50 and 49 of them"):
        compare([first, short])
    changed = labels.copy()
    changed[7] ^= True
    swapped = store(tmp_path / "swapped", changed, models[1])
    with pytest.raises(UserError, match=r"first.*swapped.*the labels of row 7 differ"):
        compare([first, swapped])
    with pytest.raises(UserError, match="are the same run"):
        compare([first, tmp_path / "short" / ".." / "first"])
    copy = store(tmp_path / "copy", labels, models[0])
    third = store(tmp_path / "third", labels, models[1])
    with pytest.raises(UserError, match=r"first and .*copy predict the same for every row"):
        compare([first, copy], [third])
    assert compare([first, copy]).differences[0].on_rows.p == 1
    with pytest.raises(UserError, match="name two runs or more"):
        compare([first])
    with pytest.raises(UserError, match="absent is not a folder"):
        compare([first, tmp_path / "absent"])
    with pytest.raises(UserError, match="--seed-noise must be a standard deviation above 0"):
        compare([first, third], seed_noise=0.0)
    with pytest.raises(UserError, match="there are no predictions at"):
        compare([first, third], split="validation")


def test_a_side_of_different_recipes_is_told(tmp_path: Path) -> None:
    runs = recipe(tmp_path, "run", [0.4, 0.5, 0.6])
    with open(runs[0] / "config.toml", "a") as file:
        file.write("keep = 9\n[optimizer]\nlearning_rate = 0.5\n[tracking]\ntensorboard = true\n")
    comparison = compare(runs[:2], runs[2:])
    assert comparison.configuration["optimizer.learning_rate"] == {"A1": 0.5, "A2": None, "B": None}
    assert comparison.notes == (
        "A1…A2 differ in more than the seed (optimizer.learning_rate), so they are not one recipe.",
    )


def test_of_different_kinds_the_options_of_both_are_shown(tmp_path: Path) -> None:
    runs = recipe(tmp_path, "run", [0.4, 0.5])
    with open(runs[0] / "config.toml", "a") as file:
        file.write("epochs = 3\n")
    with open(runs[1] / "config.toml", "a") as file:
        file.write('kind = "baseline"\nmodel = "logistic"\ntrees = 9\n')
    comparison = compare(runs)
    assert {"epochs", "trees"} < set(comparison.configuration)
    shown = describe(comparison).partition("configuration ")[2].splitlines()[1:4]
    assert [line.split() for line in shown] == [
        ["seed", "0", "1"],
        ["kind", "-", "baseline"],
        ["model", "-", "logistic"],
    ]


@pytest.fixture(scope="module")
def recipes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three seeds of a recipe, three more, and three that stopped after a tenth of the rows."""
    folder = tmp_path_factory.mktemp("recipes")
    synthesize(folder / "raw", SynthesizeConfig(rows=20_000, test_rows=0, scale=0.0005))
    prepare(folder / "raw", folder / "data", PrepareConfig())
    model = ModelConfig(
        embedding_dim=4, dense_arch_layer_sizes=(16, 4), over_arch_layer_sizes=(16, 1)
    )
    for seed in range(1, 10):
        config = TrainConfig(
            model=model, seed=seed, mini_batch_size=64, max_steps=27 if seed > 6 else 0
        )
        train(folder / "data", folder / str(seed), config)
    return folder


def test_other_seeds_are_no_difference_and_a_tenth_of_the_data_is(recipes: Path) -> None:
    first, second, tenth = (
        [recipes / str(seed) for seed in range(start, start + 3)] for start in (1, 4, 7)
    )
    same = compare(first, second)
    assert {each.conclusion for each in same.differences} == {"no difference beyond noise"}
    assert list(same.configuration) == ["seed"]
    less = compare(first, tenth)
    assert [each.conclusion for each in less.differences] == ["higher", "lower"]
    assert less.differences[0].difference > 0.02
    assert list(less.configuration) == ["max_steps", "seed"]
    assert less.runs[0].seed == 1


MANY_ROWS = """
import resource, sys
from pathlib import Path
from dlrm.comparison import compare
import scipy.stats

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

runs = [Path(run) for run in sys.argv[2:]]
before = peak()
comparison = compare(runs, memory=int(sys.argv[1]))
print(comparison.differences[0].on_rows.standard_error, peak() - before)
"""


@pytest.mark.long
def test_many_rows_take_the_stated_memory(tmp_path: Path) -> None:
    labels, models = made_up(2, 10_000_000)
    runs = [store(tmp_path / str(at), labels, model) for at, model in enumerate(models)]
    errors = []
    for memory in (64 << 20, 512 << 20):
        command = [sys.executable, "-c", MANY_ROWS, str(memory), *map(str, runs)]
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout.split()
        errors.append(float(output[0]))
        # Beside it the rows that are looked at together.
        assert int(output[1]) < memory + (64 << 20)
    assert errors[0] == pytest.approx(errors[1], rel=1e-12)
