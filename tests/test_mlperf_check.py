"""What is said of MLPerf logs that are right, wrong, cut off or hostile."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from dlrm import cli
from dlrm.errors import UserError
from dlrm.mlperf_check import (
    MLPERF_EVAL_SAMPLES,
    MLPERF_TRAIN_SAMPLES,
    check,
    describe,
    rulesets_of,
)

TENSORS = ["embeddings", *(f"bottom_mlp_dense{i}" for i in (1, 2, 3))]
TENSORS += [f"top_mlp_dense{i}" for i in (1, 2, 3, 4, 5)]
EPOCH = {"epoch_num": 1}
# As a submission's would be.
RIGHT: list[tuple[str, Any, dict[str, Any]]] = [
    ("cache_clear", True, {}),
    ("init_start", None, {}),
    ("submission_benchmark", "dlrm", {}),
    ("submission_org", "us", {}),
    ("submission_division", "closed", {}),
    ("submission_status", "onprem", {}),
    ("submission_platform", "a laptop", {}),
    ("global_batch_size", 65536, {}),
    ("gradient_accumulation_steps", 1, {}),
    ("opt_base_learning_rate", 24.0, {}),
    ("opt_learning_rate_warmup_steps", 2750, {}),
    ("lr_decay_start_steps", 49315, {}),
    ("sgd_opt_base_learning_rate", 24.0, {}),
    ("sgd_opt_learning_rate_decay_poly_power", 2, {}),
    ("sgd_opt_learning_rate_decay_steps", 27772, {}),
    *(("weights_initialization", None, {"tensor": name}) for name in TENSORS),
    ("init_stop", None, {}),
    ("run_start", None, {}),
    ("train_samples", MLPERF_TRAIN_SAMPLES, {}),
    ("eval_samples", MLPERF_EVAL_SAMPLES, {}),
    ("block_start", None, {"first_epoch_num": 1, "epoch_count": 1}),
    ("epoch_start", None, EPOCH),
    ("eval_start", None, EPOCH),
    ("eval_accuracy", 0.8026, EPOCH),
    ("eval_stop", None, EPOCH),
    ("epoch_stop", None, EPOCH),
    ("block_stop", None, {"first_epoch_num": 1}),
    ("run_stop", None, {"status": "success"}),
]


def write(path: Path, events: list[tuple[str, Any, dict[str, Any]]]) -> Path:
    lines = []
    for number, (key, value, metadata) in enumerate(events):
        event = {"namespace": "", "time_ms": 1000 + number, "event_type": "POINT_IN_TIME"}
        event |= {"key": key, "value": value, "metadata": metadata}
        lines.append(f":::MLLOG {json.dumps(event)}\n")
    path.write_text("something else\n" + "".join(lines))
    return path


def changed(**values: Any) -> list[tuple[str, Any, dict[str, Any]]]:
    return [(key, values.get(key, value), metadata) for key, value, metadata in RIGHT]


def test_what_is_right_is_compliant_and_has_no_remark(tmp_path: Path) -> None:
    log = write(tmp_path / "log", RIGHT)
    handlers = list(logging.getLogger().handlers)
    for ruleset in rulesets_of("dlrm"):
        compliance = check(log, ruleset)
        assert compliance.compliant
        assert (compliance.findings, compliance.remarks) == ((), ())
    assert check(log).ruleset == "2.1.0"
    assert "compliant: the checker finds nothing wrong" in describe(check(log))
    assert logging.getLogger().handlers == handlers


@pytest.mark.parametrize("key", sorted({key for key, _, _ in RIGHT}))
def test_a_missing_event_is_named_and_explained(key: str, tmp_path: Path) -> None:
    log = write(tmp_path / "log", [event for event in RIGHT if event[0] != key])
    compliance = check(log)
    # A pass is a block and an epoch; one of them does.
    pairs = ("block_start", "block_stop", "epoch_start", "epoch_stop", "eval_start", "eval_stop")
    if key in pairs:
        assert compliance.compliant
        return
    finding = {finding.key: finding for finding in compliance.findings}[key]
    assert f"'{key}'" in finding.message or key == "weights_initialization"
    assert "dlrm does not write this key" not in finding.explanation
    assert len(finding.message) < 200
    assert key in describe(compliance)


@pytest.mark.parametrize(
    ("values", "remark"),
    [
        ({"cache_clear": False}, "cache_clear is false"),
        ({"train_samples": 100}, "train_samples is 100; the benchmark's is 4195197692"),
        ({"eval_samples": 100}, "eval_samples is 100; the benchmark's is 89137319"),
    ],
)
def test_what_the_checker_does_not_look_at_is_remarked(
    values: dict[str, Any], remark: str, tmp_path: Path
) -> None:
    compliance = check(write(tmp_path / "log", changed(**values)))
    assert compliance.compliant
    assert [each[: len(remark)] for each in compliance.remarks] == [remark]


def test_an_aborted_run_and_one_that_went_on_are_remarked(tmp_path: Path) -> None:
    events = [
        *RIGHT[:-1],
        ("init_checkpoint_step", 7, {}),
        ("run_stop", None, {"status": "aborted"}),
    ]
    remarks = check(write(tmp_path / "log", events)).remarks
    assert remarks[0].startswith("The run's status is aborted, not success")
    assert "(init_checkpoint_step 7)" in remarks[1]


@pytest.mark.parametrize(
    ("events", "message"),
    [
        (changed(submission_division="../../../etc"), "names the division '../../../etc'"),
        (changed(submission_benchmark="../x"), "is of the benchmark '../x', of which"),
        (changed(submission_benchmark="chess"), "is of the benchmark 'chess', of which"),
        (changed(submission_division=7), "submission_division must be one string"),
        ([*RIGHT, ("submission_division", "open", {})], "submission_division must be one string"),
        (changed(eval_accuracy="high"), "the checker's rules cannot judge it: TypeError"),
        ([], "holds no MLPerf events"),
    ],
)
def test_what_cannot_be_judged_is_refused(events: list[Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        check(write(tmp_path / "log", events))
    assert message in str(error.value)
    assert check(write(tmp_path / "right", RIGHT)).compliant  # nothing is left of it


@pytest.mark.parametrize(
    "line",
    ["{", "[]", "{}", '{"time_ms": "x", "key": "a", "value": 1, "metadata": {}}',
     '{"time_ms": 1, "key": "a", "value": 1, "metadata": null}',
     '{"time_ms": 1, "key": 1, "value": 1, "metadata": {}}', "[" * 100_000],
)  # fmt: skip
def test_a_damaged_line_is_named(line: str, tmp_path: Path) -> None:
    log = write(tmp_path / "log", RIGHT)
    with log.open("a") as file:
        file.write(f":::MLLOG {line}\n")
    number = len(RIGHT) + 2
    with pytest.raises(UserError, match=rf"line {number}: expected :::MLLOG and a JSON object"):
        check(log)


def test_unknown_rulesets_and_files_are_refused(tmp_path: Path) -> None:
    log = write(tmp_path / "log", RIGHT)
    with pytest.raises(UserError, match=r"no ruleset 6\.0\.0 for dlrm.*2\.0\.0, 2\.1\.0"):
        check(log, "6.0.0")
    with pytest.raises(UserError, match=r"nothing cannot be read: No such file"):
        check(tmp_path / "nothing")


def test_an_undefined_auc_is_judged(tmp_path: Path) -> None:
    compliance = check(write(tmp_path / "log", changed(eval_accuracy=float("nan"))))
    assert [finding.key for finding in compliance.findings] == ["eval_accuracy"]


@pytest.mark.parametrize(("auc", "status"), [(0.8026, 0), (0.7, 2)])
def test_the_exit_status(
    auc: float, status: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run").mkdir()
    log = write(tmp_path / "run" / "mlperf.log", changed(eval_accuracy=auc))
    for arguments in ([str(log)], [str(tmp_path / "run")], [str(log), "--json"]):
        with pytest.raises(SystemExit) as end:
            cli.main(["mlperf-check", *arguments, "--ruleset", "1.0.0"])
        assert end.value.code == status
        output = capsys.readouterr()
        assert ("against ruleset 1.0.0" in output.out) == (arguments[-1] != "--json")
        assert ("does not follow ruleset 1.0.0" in output.err) == (status == 2)
    assert json.loads(output.out)["compliant"] == (status == 0)
