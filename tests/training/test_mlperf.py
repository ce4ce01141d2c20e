"""The MLPerf log of a training, event by event, whatever interrupts it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

import dlrm
from dlrm.config import ModelConfig, OptimizerConfig, TrackingConfig, TrainConfig
from dlrm.data.dataset import Dataset
from dlrm.errors import UserError
from dlrm.mlperf_check import check, rulesets_of

TRACKING = TrackingConfig(
    mlperf_logging=True, mlperf_submission_org="us", mlperf_submission_platform="a laptop"
)
# The numbers of layers that the benchmark's model has.
CONFIG = TrainConfig(
    model=ModelConfig(
        embedding_dim=4, dense_arch_layer_sizes=(6, 5, 4), over_arch_layer_sizes=(6, 5, 4, 3, 1)
    ),
    optimizer=OptimizerConfig("sgd", 0.3, warmup_steps=3, decay_start_step=50, decay_steps=20),
    tracking=TRACKING,
    mini_batch_size=64,
    epochs=2,
    print_freq=7,
    test_freq=15,
    save_every_steps=4,
    save_every_minutes=0,
)
STEPS = 41  # of a pass


def events(run: Path) -> list[tuple[str, Any, dict[str, Any]]]:
    """Key, value and metadata of each event; how an interval's kind fits its key is checked."""
    found = []
    for line in (run / "mlperf.log").read_text().splitlines():
        event = json.loads(line.removeprefix(":::MLLOG "))
        metadata = event["metadata"]
        assert metadata.pop("file") == "dlrm/training/mlperf.py"
        assert metadata.pop("lineno") > 0
        kinds = {"_start": "INTERVAL_START", "_stop": "INTERVAL_END"}
        kind = next((kinds[end] for end in kinds if event["key"].endswith(end)), "POINT_IN_TIME")
        assert event["event_type"] == kind
        found.append((event["key"], event["value"], metadata))
    return found


def values(run: Path, key: str) -> list[Any]:
    return [value for found, value, _ in events(run) if found == key]


def at(step: int) -> dict[str, float]:
    epoch, before = divmod(step - 1, STEPS)
    return {"epoch_num": 1 + epoch + (before + 1) / STEPS, "step_num": step}


def evaluation(step: int, auc: float) -> list[tuple[str, Any, dict[str, Any]]]:
    return [
        ("eval_start", None, at(step)),
        ("eval_accuracy", auc, at(step)),
        ("eval_stop", None, at(step)),
    ]


def test_the_events_of_a_run(dataset: Path, tmp_path: Path) -> None:
    result = dlrm.train(dataset, tmp_path / "run", CONFIG)
    found = events(tmp_path / "run")
    rows = Dataset.open(dataset).rows
    assert math.ceil(rows("train") / 64) == STEPS
    tensors = ["embeddings", *(f"bottom_mlp_dense{i}" for i in (1, 2, 3))]
    tensors += [f"top_mlp_dense{i}" for i in (1, 2, 3, 4, 5)]
    log = (tmp_path / "run" / "log.jsonl").read_text().splitlines()
    aucs = [
        line["metrics"]["auc"] for line in map(json.loads, log) if line["event"] == "evaluation"
    ]
    assert found == [
        ("cache_clear", False, {}),
        ("init_start", None, {}),
        ("submission_benchmark", "dlrm", {}),
        ("submission_org", "us", {}),
        ("submission_division", "closed", {}),
        ("submission_status", "onprem", {}),
        ("submission_platform", "a laptop", {}),
        ("seed", 123, {}),
        ("global_batch_size", 64, {}),
        ("gradient_accumulation_steps", 1, {}),
        ("opt_name", "sgd", {}),
        ("opt_base_learning_rate", 0.3, {}),
        ("opt_learning_rate_warmup_steps", 3, {}),
        ("lr_decay_start_steps", 50, {}),
        ("sgd_opt_base_learning_rate", 0.3, {}),
        ("sgd_opt_learning_rate_decay_poly_power", 2, {}),
        ("sgd_opt_learning_rate_decay_steps", 20, {}),
        *(("weights_initialization", None, {"tensor": name}) for name in tensors),
        ("init_stop", None, {}),
        ("run_start", None, {}),
        ("train_samples", rows("train"), {}),
        ("eval_samples", rows("validation"), {}),
        ("block_start", None, {"first_epoch_num": 1, "epoch_count": 1}),
        ("epoch_start", None, {"epoch_num": 1}),
        *evaluation(15, aucs[0]),
        *evaluation(30, aucs[1]),
        *evaluation(41, aucs[2]),
        ("epoch_stop", None, {"epoch_num": 1}),
        ("block_stop", None, {"first_epoch_num": 1}),
        ("block_start", None, {"first_epoch_num": 2, "epoch_count": 1}),
        ("epoch_start", None, {"epoch_num": 2}),
        *evaluation(56, aucs[3]),
        *evaluation(71, aucs[4]),
        *evaluation(82, aucs[5]),
        ("epoch_stop", None, {"epoch_num": 2}),
        ("block_stop", None, {"first_epoch_num": 2}),
        ("run_stop", None, {"status": "aborted"} | at(82)),
    ]
    assert max(aucs) == result.metrics["validation"].auc


def test_a_lowered_target_ends_the_run_at_the_first_evaluation_that_reaches_it(
    dataset: Path, tmp_path: Path
) -> None:
    dlrm.train(dataset, tmp_path / "all", CONFIG)
    aucs = values(tmp_path / "all", "eval_accuracy")
    which = max(range(1, len(aucs)), key=lambda n: aucs[n])  # not the first
    assert all(auc < aucs[which] for auc in aucs[:which])
    run = tmp_path / "target"
    dlrm.train(dataset, run, replace(CONFIG, target_auc=aucs[which]))
    assert values(run, "eval_accuracy") == aucs[: which + 1]
    step = [15, 30, 41, 56, 71, 82][which]
    assert events(run)[-1] == ("run_stop", None, {"status": "success"} | at(step))

    # The closed division wants the benchmark's own target, and finds nothing else wrong.
    rulesets = ("0.7.0", "1.0.0", "1.1.0", "2.0.0", "2.1.0")
    assert rulesets_of("dlrm") == rulesets
    for ruleset in rulesets:
        compliance = check(run / "mlperf.log", ruleset)
        assert [finding.key for finding in compliance.findings] == ["eval_accuracy"]
        assert f"The best in this log is {aucs[which]:.6g}." in compliance.findings[0].explanation

    # The open division takes any, from ruleset 1.0 on.
    tracking = replace(TRACKING, mlperf_submission_division="open")
    config = replace(CONFIG, target_auc=aucs[which], tracking=tracking)
    dlrm.train(dataset, tmp_path / "open", config)
    for ruleset in rulesets:
        assert check(tmp_path / "open" / "mlperf.log", ruleset).compliant == (ruleset != "0.7.0")


@pytest.fixture(scope="module")
def warm(start_warm: Callable[..., Any], dataset: Path) -> Callable[..., Any]:
    """Trains in a process of its own (``interrupted_training.py``)."""
    return start_warm(Path(__file__).parent / "interrupted_training.py", dataset)


def uninterrupted(run: Path) -> list[tuple[str, Any, dict[str, Any]]]:
    return [event for event in events(run) if event[0] != "init_checkpoint_step"]


def test_interrupted_it_tells_the_same(
    warm: Callable[..., Any], dataset: Path, tmp_path: Path
) -> None:
    config = asdict(CONFIG)
    assert warm(run=tmp_path / "whole", dataset=dataset, config=config).status == 0
    expected = events(tmp_path / "whole")
    run = tmp_path / "run"
    # Killed before the first checkpoint, after another, stopped, and killed in the second pass.
    answer = warm(run=run, dataset=dataset, config=config, kill_at_step=3)
    assert answer.status == -9, answer.said
    assert "begins anew" in warm(run=run, kill_at_step=18).said
    assert warm(run=run, term_at_step=5).status == 4
    assert events(run)[-1] == ("run_stop", None, {"status": "aborted"} | at(21))
    assert warm(run=run, kill_at_step=30).status == -9
    answer = warm(run=run)
    assert answer.status == 0, answer.said
    assert uninterrupted(run) == expected
    assert values(run, "init_checkpoint_step") == [16, 21, 48]
    assert "init_checkpoint_step 16, 21, 48" in " ".join(check(run / "mlperf.log").remarks)


def test_stopped_in_an_evaluation_it_tells_the_same(
    warm: Callable[..., Any], dataset: Path, tmp_path: Path
) -> None:
    config = asdict(replace(CONFIG, save_every_steps=0))
    assert warm(run=tmp_path / "whole", dataset=dataset, config=config).status == 0
    for number, step in ((1, 15), (3, 41)):  # the latter at the end of a pass
        run = tmp_path / f"run-{number}"
        answer = warm(run=run, dataset=dataset, config=config, signal_in_evaluation=number)
        assert answer.status == 4, answer.said
        assert events(run)[-1][2]["status"] == "aborted"
        answer = warm(run=run)
        assert answer.status == 0, answer.said
        assert uninterrupted(run) == events(tmp_path / "whole")
        assert values(run, "init_checkpoint_step") == [step]


def test_a_run_that_diverges_was_aborted(dataset: Path, tmp_path: Path) -> None:
    config = replace(CONFIG, optimizer=OptimizerConfig("sgd", 1e30))
    with pytest.raises(UserError, match="training has diverged"):
        dlrm.train(dataset, tmp_path / "run", config)
    key, _, metadata = events(tmp_path / "run")[-1]
    assert (key, metadata["status"]) == ("run_stop", "aborted")


def test_another_optimizer_and_another_runs_weights_are_told_of(
    dataset: Path, tmp_path: Path
) -> None:
    dlrm.train(dataset, tmp_path / "first", replace(CONFIG, max_steps=3))
    config = replace(
        CONFIG, max_steps=5, continue_from=str(tmp_path / "first/checkpoints/newest.safetensors")
    )
    dlrm.train(dataset, tmp_path / "second", config)
    assert values(tmp_path / "second", "init_checkpoint_step") == [3]
    found = events(tmp_path / "second")
    assert ("epoch_start", None, {"epoch_num": 1}) in found
    keys = [key for key, _, _ in found]
    assert keys.index("init_checkpoint_step") < keys.index("init_stop")
    assert "weights_initialization" not in keys
    compliance = check(tmp_path / "second" / "mlperf.log")
    assert {finding.key for finding in compliance.findings} == {
        "eval_accuracy",
        "weights_initialization",
    }

    config = replace(CONFIG, optimizer=OptimizerConfig("adagrad", 0.01), max_steps=5)
    dlrm.train(dataset, tmp_path / "adagrad", config)
    assert values(tmp_path / "adagrad", "opt_name") == ["adagrad"]
    assert values(tmp_path / "adagrad", "opt_adagrad_epsilon") == [1e-10]
    wrong = {finding.key for finding in check(tmp_path / "adagrad" / "mlperf.log").findings}
    assert wrong == {
        "eval_accuracy",
        "sgd_opt_base_learning_rate",
        "sgd_opt_learning_rate_decay_poly_power",
        "sgd_opt_learning_rate_decay_steps",
    }


def test_without_the_option_there_is_no_log(dataset: Path, tmp_path: Path) -> None:
    config = replace(CONFIG, max_steps=3, tracking=TrackingConfig())
    dlrm.train(dataset, tmp_path / "run", config)
    assert not (tmp_path / "run" / "mlperf.log").exists()
    assert not (tmp_path / "run" / "tensorboard").exists()
