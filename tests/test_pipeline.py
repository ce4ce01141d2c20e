from __future__ import annotations

import logging
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from dlrm import pipeline
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
    monkeypatch.setattr(pipeline, "estimate_rows", lambda _: 3000)
    run = tmp_path / "run"
    with caplog.at_level(logging.INFO, "dlrm"):
        result = run_all(raw_rows, run, PrepareConfig(), TINY)
    assert [record.getMessage() for record in caplog.records[:4]] == [
        "plan: about 3000 rows, 471.0 kB of prepared data",
        f"  1. prepare {run}/dataset",
        f"  2. train and evaluate in {run}",
        f"  3. predict {raw_rows}/test.txt into {run}/submission.csv",
    ]
    assert caplog.records[-1].getMessage() == f"predicted 300 rows into {run}/submission.csv"
    assert result.metrics["test"].samples == 214
    assert len((run / "submission.csv").read_text().splitlines()) == 301


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
        EnvironmentFaultError, match=r"/run/dataset needs about 4\d\d\.\d kB of disk"
    ):
        run_all(raw_rows, tmp_path / "run", PrepareConfig(), TINY)
    assert list(tmp_path.iterdir()) == []
