import logging
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dlrm import cli
from dlrm.baselines import training
from dlrm.baselines.training import train_baseline
from dlrm.baselines.trees import Trees
from dlrm.config import (
    BaselineConfig,
    PrepareConfig,
    SynthesizeConfig,
    TrainConfig,
    read_any_run_config,
)
from dlrm.data.dataset import Dataset
from dlrm.data.prepare import prepare
from dlrm.data.synthetic import synthesize
from dlrm.errors import EnvironmentFaultError, UserError
from dlrm.evaluation import evaluate
from dlrm.metrics import compute_metrics
from dlrm.prediction import load
from dlrm.runs import Run, RunResult, open_run
from dlrm.schema import Split
from dlrm.training.begin import resume

SMALL = {
    "logistic": BaselineConfig(model="logistic", passes=3),
    "lightgbm": BaselineConfig(trees=40, patience=5, num_leaves=7),
}


@pytest.fixture(scope="module")
def clicks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A DATASET from which something can be learned."""
    folder = tmp_path_factory.mktemp("clicks")
    synthesize(folder / "raw", SynthesizeConfig(rows=20_000, test_rows=0, scale=0.0005))
    prepare(folder / "raw", folder / "dataset", PrepareConfig())
    return folder / "dataset"


@pytest.fixture(scope="module", params=SMALL)
def made(
    request: pytest.FixtureRequest, clicks: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, RunResult]:
    run = tmp_path_factory.mktemp("runs") / str(request.param)
    return run, train_baseline(clicks, run, SMALL[request.param])


def test_it_learns_and_its_run_says_what_it_is(made: tuple[Path, RunResult], clicks: Path) -> None:
    run, result = made
    opened = open_run(run)
    assert opened.result() == result
    assert result.model == run.name
    assert read_any_run_config(run) == (SMALL[run.name], clicks)
    assert result.metrics["test"].auc > 0.65
    assert result.metrics["test"].normalized_entropy < 0.96
    assert 0.85 < result.metrics["test"].calibration < 1.15
    assert sorted(path.name for path in run.iterdir()) == [
        "config.toml",
        "log.jsonl",
        "predictions",
        "result.json",
        "schema.json",
    ]


def test_predictions_are_those_the_metrics_are_of(
    made: tuple[Path, RunResult], clicks: Path
) -> None:
    run, result = made
    data = Dataset.open(clicks)
    splits: tuple[Split, ...] = ("validation", "test")
    for split in splits:
        predictions = open_run(run).predictions(split)
        assert predictions.dataset == data.manifest.fingerprint
        labels, probabilities = predictions.arrays()
        assert compute_metrics(labels, probabilities) == result.metrics[split]
        stored = [rows.labels for rows in data.stored_rows(split, 0, data.rows(split))]
        assert np.array_equal(labels, np.concatenate(stored))


def test_the_round_with_the_lowest_validation_loss_is_kept(made: tuple[Path, RunResult]) -> None:
    run, result = made
    start, *events = open_run(run).log()
    assert start["train_rows"] == result.train_samples / result.train_steps
    losses = [event["validation_log_loss"] for event in events[:-1]]
    assert len(losses) == result.train_steps
    best = int(np.argmin(losses)) + 1
    assert result.stopped == f"validation log loss was lowest after {events[0]['event']} {best}"
    assert result.metrics["validation"].log_loss == pytest.approx(min(losses), abs=1e-6)
    assert events[-1]["reason"] == result.stopped


def test_equal_seeds_give_equal_results_and_others_do_not(
    made: tuple[Path, RunResult], clicks: Path, tmp_path: Path
) -> None:
    run, _ = made
    config = SMALL[run.name]
    train_baseline(clicks, tmp_path / "again", config)
    train_baseline(clicks, tmp_path / "other", replace(config, seed=4))
    file = Path("predictions/test.arrow")
    assert (tmp_path / "again" / file).read_bytes() == (run / file).read_bytes()
    assert (tmp_path / "other" / file).read_bytes() != (run / file).read_bytes()


@pytest.mark.parametrize("model", SMALL)
def test_rows_are_limited_on_request(
    model: str, clicks: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "dlrm"):
        result = train_baseline(clicks, tmp_path / "r", replace(SMALL[model], max_rows=1000))
    assert result.train_samples == 1000 * result.train_steps
    rows = Dataset.open(clicks).rows("train")
    assert f"training on 1000 of {rows} rows, evenly spread (--max-rows)" in caplog.messages


def test_what_needs_a_model_refuses_a_baseline_by_name(made: tuple[Path, RunResult]) -> None:
    run, _ = made
    refusal = rf"config\.toml is of a baseline \({run.name}\), which has no checkpoint"
    for take in (evaluate, load, Run.open, resume):
        with pytest.raises(UserError, match=refusal):
            take(run)
    with pytest.raises(UserError, match=refusal):
        cli.parse(["train", "--config", str(run / "config.toml"), "--run", "r"])


def test_a_run_that_is_there_is_not_overwritten(
    made: tuple[Path, RunResult], clicks: Path, tmp_path: Path
) -> None:
    run, _ = made
    with pytest.raises(UserError, match="is there already, and is not overwritten"):
        train_baseline(clicks, run, SMALL[run.name])
    (tmp_path / "empty").mkdir()
    config = replace(SMALL["logistic"], passes=1)
    assert train_baseline(clicks, tmp_path / "empty", config).train_steps == 1


def test_what_fails_leaves_nothing(
    clicks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(training, "_evaluate", fail)
    with pytest.raises(KeyboardInterrupt):
        train_baseline(clicks, tmp_path / "r", replace(SMALL["logistic"], passes=1))
    assert list(tmp_path.iterdir()) == []


def test_short_memory_is_told_before_it_begins(
    clicks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = Dataset.open(clicks)
    trees = Trees(data.schema, SMALL["lightgbm"])
    needed = trees.memory_bytes(data.rows("train"), data.rows("validation"))
    free = needed - 1000 * trees.memory_bytes_a_row()
    monkeypatch.setattr(training, "available_memory", lambda: free)
    with pytest.raises(EnvironmentFaultError, match="about --max-rows 16000 fits"):
        train_baseline(clicks, tmp_path / "r", SMALL["lightgbm"])
    monkeypatch.setattr(training, "available_memory", lambda: 1000)
    with pytest.raises(EnvironmentFaultError, match="--max-ind-range or --hash-buckets"):
        train_baseline(clicks, tmp_path / "r", SMALL["logistic"])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("model", "package"), [("logistic", "sklearn"), ("lightgbm", "lightgbm")])
def test_a_missing_package_is_named(
    model: str, package: str, clicks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in list(sys.modules):
        if name.startswith(("dlrm.baselines.logistic", "dlrm.baselines.trees", package)):
            monkeypatch.delitem(sys.modules, name)
    for name in ("sklearn.linear_model", "lightgbm"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(
        EnvironmentFaultError, match=rf"import of {package}.* pip install 'dlrm\[baselines\]'"
    ):
        train_baseline(clicks, tmp_path / "r", SMALL[model])


def test_data_without_validation_rows_are_refused(raw_rows: Path, tmp_path: Path) -> None:
    prepare(raw_rows, tmp_path / "dataset", PrepareConfig(split="none"))
    with pytest.raises(UserError, match="has no validation rows"):
        train_baseline(tmp_path / "dataset", tmp_path / "r", SMALL["logistic"])


def test_options_of_the_other_model_are_refused() -> None:
    for model, option, value in (
        ("logistic", "num_leaves", 5),
        ("logistic", "max_categories", 5),
        ("lightgbm", "passes", 5),
        ("lightgbm", "l2", 0.5),
    ):
        name = option.replace("_", "-")
        with pytest.raises(UserError, match=f"--{name} goes with --model"):
            replace(SMALL[model], **{option: value})
    with pytest.raises(UserError, match="--learning-rate must be in 0 … 1e6; got -1"):
        BaselineConfig(learning_rate=-1)
    with pytest.raises(UserError, match="--num-leaves must be at least 2"):
        BaselineConfig(num_leaves=1)


def test_on_real_rows_both_come_near_a_dlrm(shared_data: Path, tmp_path: Path) -> None:
    prepare(shared_data / "criteo/kaggle/train.txt", tmp_path / "dataset", PrepareConfig())
    for model in ("logistic", "lightgbm"):
        config = BaselineConfig(model=model)  # type: ignore[arg-type]
        test = train_baseline(tmp_path / "dataset", tmp_path / model, config).metrics["test"]
        assert 0.70 < test.auc < 0.80
        assert test.samples == 714
        assert not math.isnan(test.log_loss)


def test_a_config_of_an_unknown_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text("kind = 'forest'\n")
    with pytest.raises(UserError, match="kind must be 'dlrm' or 'baseline'; got 'forest'"):
        open_run(tmp_path)
    assert TrainConfig() != BaselineConfig()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_rows": 1}, "--max-rows must be 0 .all. or at least 2; got 1"),
        ({"num_leaves": 2**17 + 1}, "--num-leaves must be at most 131072; got 131073"),
        ({"learning_rate": 1e300}, "--learning-rate must be in 0 … 1e6; got 1e.300"),
    ],
)
def test_what_the_libraries_do_not_take_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        BaselineConfig(model="lightgbm", **options)
