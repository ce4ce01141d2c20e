from __future__ import annotations

import json
import math
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from dlrm import reference
from dlrm.data.dataset import Dataset
from dlrm.errors import UserError
from dlrm.metrics import compute_metrics
from dlrm.reference.log import ReferenceLog
from dlrm.reference.request import parse
from dlrm.runs import Run

# How the scripts of the Ascend adaptation read a log: the AUC is field 10 of the metrics line.
AUC_OF_LOG = "grep -a 'recall' | awk -F ' ' '{print $10}' | awk -F ',' '{print $1}' | tail -1"
LOSS_OF_LOG = "grep 'Finished' | awk -F ',' '{print $3}' | awk -F ' ' '{print $2}' | tail -1"
MILLISECONDS_OF_LOG = "grep -a 'Finished' | awk -F ',' '{print $2}' | awk '{print $1}' | tail -1"


def pipe(pipeline: str, lines: list[str]) -> str:
    text = "\n".join(lines) + "\n"
    done = subprocess.run(["bash", "-c", pipeline], input=text, text=True, capture_output=True)
    return done.stdout.strip()


def starting(lines: list[str], *words: str) -> list[str]:
    return [line for line in lines if line.startswith(words)]


def test_lines_are_the_references(run: Any) -> None:
    lines = run("--mlperf-logging", "--test-freq=10", "--print-freq=9")
    number = r"\d+\.\d"
    metrics = (
        rf"recall {number}{{4}}, precision {number}{{4}}, f1 {number}{{4}}, ap {number}{{4}}, "
        rf"auc {number}{{4}}, best auc {number}{{4}}, "
        rf"accuracy {number}{{3}} %, best accuracy {number}{{3}} %"
    )
    expected = [
        "time/loss/accuracy (if enabled):",
        rf"Finished training it 9/18 of epoch 0, -1\.00 ms/it, loss {number}{{6}}",
        rf"Finished training it 10/18 of epoch 0, -1\.00 ms/it, loss {number}{{6}}",
        "Testing at - 10/18 of epoch 0,",
        metrics,
        rf"Finished training it 18/18 of epoch 0, -1\.00 ms/it, loss {number}{{6}}",
        "Testing at - 18/18 of epoch 0,",
        metrics,
    ]
    found = lines[lines.index(expected[0].replace("\\", "")) :]
    assert len(found) == len(expected)
    for line, pattern in zip(found[1:], expected[1:], strict=True):
        assert re.fullmatch(pattern, line), line


def test_without_mlperf_logging_there_is_accuracy_alone(run: Any) -> None:
    lines = run("--test-freq=18")
    assert re.fullmatch(r" accuracy (\d+\.\d{3}) %, best \1 %", lines[-1])


def test_logs_are_read_by_the_pipelines_of_the_seed(run: Any) -> None:
    lines = run("--mlperf-logging", "--test-freq=10", "--print-freq=9", "--print-time")
    result = Run.open(run.run_path).result()
    assert pipe(AUC_OF_LOG, lines) == f"{result.metrics['test'].auc:.4f}"
    assert lines[-3].endswith(f" loss {pipe(LOSS_OF_LOG, lines)}")
    assert float(pipe(MILLISECONDS_OF_LOG, lines)) > 0


@pytest.mark.parametrize(
    ("flags", "tested"),
    [
        ([], []),
        (["--test-freq=0"], []),
        (["--test-freq=7", "--nepochs=2"], ["7/18", "14/18", "18/18"] * 2),
        (["--test-freq=100", "--num-batches=5"], ["5/5"]),
        (["--test-freq=100", "--step=4"], ["4/18"]),
    ],
)
def test_tests_come_when_the_references_do(run: Any, flags: list[str], tested: list[str]) -> None:
    lines = run(*flags)
    assert [line.split()[3] for line in starting(lines, "Testing at")] == tested


def test_num_batches_limits_tests_too(run: Any) -> None:
    run("--num-batches=1", "--test-freq=1")
    assert Run.open(run.run_path).result().metrics["test"].samples == 64


def test_wall_time(run: Any) -> None:
    lines = run("--print-wall-time", "--print-freq=18")
    assert re.search(r", loss \d\.\d{6} \(\d\d:\d\d\)$", lines[-1])


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--mlperf-auc-threshold=0.1", "MLPerf testing auc threshold 0.1 reached, stop training"),
        (
            "--mlperf-acc-threshold=0.1",
            "MLPerf testing accuracy threshold 0.1 reached, stop training",
        ),
    ],
)
def test_a_reached_threshold_stops_training(run: Any, flag: str, message: str) -> None:
    lines = run("--mlperf-logging", "--test-freq=5", "--nepochs=3", flag)
    assert lines[-1] == message
    assert len(starting(lines, "Finished")) == 5


def test_a_threshold_is_reached_when_it_is_met(run: Any) -> None:
    run("--mlperf-logging", "--test-freq=18")
    auc = Run.open(run.run_path).result().metrics["test"].auc
    flags = ("--mlperf-logging", "--test-freq=18", "--nepochs=2")
    assert len(starting(run(*flags, f"--mlperf-auc-threshold={auc}"), "Testing")) == 1
    above = math.nextafter(auc, 1)
    assert len(starting(run(*flags, f"--mlperf-auc-threshold={above}"), "Testing")) == 2


def test_best_values_include_this_test_and_saving_follows_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = "--data-generation=dataset --raw-data-file=x --arch-mlp-bot=1-2 --arch-mlp-top=1"
    by_auc = ReferenceLog(parse([*base.split(), "--mlperf-logging"]), 1, None)
    by_accuracy = ReferenceLog(parse(base.split()), 1, None)
    labels = [0, 0, 1, 1]
    good = compute_metrics(labels, [0.1, 0.2, 0.3, 0.4])  # AUC 1, accuracy 0.5
    bad = compute_metrics(labels, [0.1, 0.6, 0.1, 0.9])  # AUC 0.625, accuracy 0.5
    accurate = compute_metrics(labels, [0.6, 0.1, 0.55, 0.7])  # AUC 0.75, accuracy 0.75
    one_class = compute_metrics([0, 0], [0.1, 0.2])  # no AUC, accuracy 1
    assert [by_auc.report_test(each) for each in (bad, good, accurate, one_class, good)] == [
        True,
        True,
        False,
        True,
        False,
    ]
    lines = capsys.readouterr().out.splitlines()
    assert [re.findall(r"auc ([\d.nan]+), best auc (.*), acc", line)[0] for line in lines] == [
        ("0.6250", "0.6250"),
        ("1.0000", "1.0000"),
        ("0.7500", "1.0000"),
        ("nan", "1.0000"),
        ("1.0000", "1.0000"),
    ]
    assert [by_accuracy.report_test(each) for each in (good, bad, accurate, good)] == [
        True,
        False,
        True,
        False,
    ]
    assert capsys.readouterr().out.splitlines()[-1] == " accuracy 50.000 %, best 75.000 %"


def test_commands_and_notes_come_first(run: Any) -> None:
    lines = run("--num-workers=2", "--num-batches=1")
    assert lines[0] == "# The same in our own commands:"
    assert lines[1].startswith("dlrm prepare ")
    assert lines[2].startswith(f"dlrm train {run.folder / 'processed.dataset'} --run ")
    assert lines[3] == "# note: --num-workers changes nothing: one background thread reads here"
    assert lines[4] == "Using CPU..."


def test_a_prepared_dataset_is_used_again_and_another_is_prepared_anew(run: Any) -> None:
    flags = ("--num-batches=1",)
    assert not any("anew" in line for line in run(*flags))
    manifest = run.folder / "processed.dataset" / "manifest.json"
    made = manifest.stat().st_ino
    assert not any("anew" in line for line in run(*flags))
    assert manifest.stat().st_ino == made
    lines = run(*flags, "--data-randomize=total")
    (reason,) = starting(lines, f"# {manifest.parent} is another DATASET")
    assert "made with --shuffle none, and --shuffle reference is asked for" in reason
    assert f"# {manifest.parent} is made anew, as with --overwrite" in lines
    assert manifest.stat().st_ino != made


def test_another_number_of_dense_features_is_noted(run: Any) -> None:
    lines = run("--arch-mlp-bot=4-8-4", "--num-batches=1")
    note = "# note: the data have 13 dense features, so --arch-mlp-bot begins with 13, not 4"
    assert note in lines


def test_other_batches_than_the_loaded_models_are_noted(run: Any) -> None:
    path = run.folder / "saved.pt"
    run("--step=3", f"--save-model={path}", "--test-freq=100")
    lines = run(f"--load-model={path}", "--mini-batch-size=200")
    assert (
        "# note: the loaded model was saved with 18 batches an epoch, and an epoch has 9 now"
        in lines
    )


def test_terabyte_days_are_trained_on_and_the_last_is_tested(
    clicks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = clicks.read_bytes().splitlines(keepends=True)
    for day, start in enumerate((0, 700, 1300)):
        part = rows[start : (700, 1300, 2100)[day]]
        (tmp_path / f"day_{day}").write_bytes(b"".join(part))
    flags = (
        "--arch-sparse-feature-size=4 --arch-mlp-bot=13-8-4 --arch-mlp-top=8-1 "
        "--max-ind-range=500 --data-generation=dataset --data-set=terabyte --loss-function=bce "
        "--learning-rate=0.1 --mini-batch-size=100 --test-mini-batch-size=64 --print-freq=5 "
        "--test-freq=10 --memory-map --mlperf-logging --mlperf-bin-loader --mlperf-bin-shuffle"
    ).split()
    reference.main(
        [
            *flags,
            f"--raw-data-file={tmp_path}/day",
            f"--processed-data-file={tmp_path}/terabyte_processed.npz",
            f"--run={tmp_path / 'run'}",
        ]
    )
    lines = capsys.readouterr().out.splitlines()
    finished = [line.split(",")[0] for line in lines if line.startswith("Finished")]
    assert finished == [f"Finished training it {n}/13 of epoch 0" for n in (5, 10, 13)]
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["metrics"]["test"]["samples"] == 400
    data = Dataset.open(tmp_path / "terabyte_processed.dataset")
    assert (data.rows("train"), data.rows("validation")) == (1300, 400)
    assert max(data.schema.num_embeddings) <= 500


def test_a_taken_run_is_refused_before_anything_is_done(run: Any, tmp_path: Path) -> None:
    run("--num-batches=1")
    taken = run.run_path
    with pytest.raises(UserError, match="holds a run already"):
        run("--num-batches=2", f"--run={taken}")


def test_a_missing_raw_file_is_refused(run: Any) -> None:
    with pytest.raises(UserError, match=r"absent.txt does not exist"):
        run(f"--raw-data-file={run.folder / 'absent.txt'}")
    assert not run.run_path.exists()
