from __future__ import annotations

import functools
import logging
import re
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

import dlrm
from dlrm.bundle import export as exporting
from dlrm.config import ModelConfig, PrepareConfig, TrainConfig
from dlrm.errors import EnvironmentFaultError, UserError
from dlrm.pipeline import run_all

TINY = TrainConfig(
    model=ModelConfig(embedding_dim=2, dense_arch_layer_sizes=(2,), over_arch_layer_sizes=(1,)),
    mini_batch_size=256,
    max_steps=2,
)


def test_the_plan_comes_first(
    raw_rows: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=10**9))
    run = tmp_path / "run"
    with caplog.at_level(logging.INFO, "dlrm"):
        made = run_all(raw_rows, run, PrepareConfig(), TINY)
    result = made.result
    assert caplog.messages[:4] == [
        f"  1. prepare {run}/dataset",
        f"  2. train and evaluate in {run}",
        f"  3. predict {raw_rows}/test.txt into {run}/submission.csv",
        f"  4. describe it in {run}/report.html",
    ]
    size = (raw_rows / "train.txt").stat().st_size
    plan = caplog.messages[4]
    assert plan.startswith(f"plan: train.txt, {size / 1000:.1f} kB, about ")
    (rows,) = re.findall("about ([0-9,]+) rows", plan)
    assert int(rows.replace(",", "")) == pytest.approx(3000, rel=0.02)
    assert caplog.messages[-2:] == [
        f"predicted 300 rows into {run}/submission.csv",
        f"described the run in {run}/report.html; with the importance of features: dlrm report "
        f"{run}",
    ]
    assert "training on 2572 rows: 1 epoch of 11 steps of 256 rows" in caplog.text
    if result.kernels == "native":
        assert "native kernels: built and loaded" in caplog.messages
    assert "<title>run: DLRM</title>" in (run / "report.html").read_text()
    assert result.metrics["test"].samples == 214
    assert len((run / "submission.csv").read_text().splitlines()) == 301
    told = made.summary()
    assert told.pop("metrics")["test"] == {
        name: getattr(result.metrics["test"], name)
        for name in ("auc", "accuracy", "log_loss", "normalized_entropy", "calibration", "samples")
    }
    assert told == {
        "run": str(run),
        "dataset": str(run / "dataset"),
        "report": str(run / "report.html"),
        "submission": str(run / "submission.csv"),
        "result": str(run / "result.json"),
        "epochs": result.epochs,
        "train_samples": 512,
        "samples_per_second": result.samples_per_second,
    }
    words = made.next_steps()
    assert f"test AUC {result.metrics['test'].auc:.4f}; " in words
    assert words.endswith(f"Next: dlrm export {run} BUNDLE, then dlrm serve BUNDLE")


def test_an_empty_test_is_not_predicted(
    raw_rows: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copy(raw_rows / "train.txt", tmp_path)
    (tmp_path / "test.txt").touch()
    run = tmp_path / "run"
    with caplog.at_level(logging.INFO, "dlrm"):
        made = run_all(tmp_path, run, PrepareConfig(), TINY)
    assert made.result.train_steps == 2
    assert made.submission is None
    assert "submission" not in made.summary()
    assert caplog.messages[2] == f"  3. describe it in {run}/report.html"
    assert not (run / "submission.csv").exists()


def test_bad_input_leaves_nothing(tmp_path: Path) -> None:
    source = tmp_path / "train.txt"
    source.write_text("not rows\n")
    with pytest.raises(UserError, match="line 1"):
        run_all(source, tmp_path / "runs" / "first", PrepareConfig(), TINY)
    assert [entry.name for entry in tmp_path.iterdir()] == ["train.txt"]


def test_a_small_disk_ends_it_before_it_begins(
    raw_rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(
        EnvironmentFaultError, match=r"/run/dataset needs about 9\d\d\.\d kB of disk"
    ):
        run_all(raw_rows, tmp_path / "run", PrepareConfig(), TINY)
    assert list(tmp_path.iterdir()) == []


def test_a_bundle_is_made_once(
    raw_rows: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run, bundle = tmp_path / "run", tmp_path / "bundle"
    bundle.mkdir()
    (bundle / "mine").touch()
    with pytest.raises(UserError, match="bundle is there already, and is not overwritten"):
        run_all(raw_rows, run, PrepareConfig(), TINY, bundle=bundle)
    assert not run.exists()
    (bundle / "mine").unlink()
    # Tracing a program takes seconds.
    monkeypatch.setattr(exporting, "export", functools.partial(exporting.export, format="onnx"))
    with caplog.at_level(logging.INFO, "dlrm"):
        made = run_all(raw_rows, run, PrepareConfig(), TINY, bundle=bundle)
    assert made.summary()["bundle"] == str(bundle)
    assert made.next_steps().endswith(f"Next: dlrm serve {bundle}")
    assert caplog.messages[4] == f"  5. export into {bundle}"
    assert caplog.messages[-1].startswith(f"exported into {bundle}; probabilities of 214 rows")
    table = {f"int_{i}": [1] for i in range(13)} | {f"cat_{i}": ["00000000"] for i in range(26)}
    assert dlrm.load(bundle).predict(table).tolist() == dlrm.load(run).predict(table).tolist()
    before = (bundle / "bundle.json").stat()
    with caplog.at_level(logging.INFO, "dlrm"):
        run_all(raw_rows, run, PrepareConfig(), TINY, bundle=bundle)
    assert caplog.messages[-1] == f"exported into {bundle} already"
    assert (bundle / "bundle.json").stat() == before
    other = replace(TINY, max_steps=3)
    with pytest.raises(UserError, match="bundle is there already, and is not overwritten"):
        run_all(raw_rows, tmp_path / "other", PrepareConfig(), other, bundle=bundle)
    run_all(raw_rows, tmp_path / "other", PrepareConfig(), other)
    with pytest.raises(UserError, match="bundle is a bundle of another checkpoint than the best"):
        run_all(raw_rows, tmp_path / "other", PrepareConfig(), other, bundle=bundle)
