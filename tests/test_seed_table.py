from __future__ import annotations

import dataclasses
from pathlib import Path

from dlrm.config import BaselineConfig, TrainConfig
from dlrm.data.synthetic import BestPossible, Truth
from dlrm.metrics import Metrics
from dlrm.runs import AnyRun, RunResult
from dlrm.schema import FeatureSchema
from dlrm.seed_table import format_table, table_row

RESULT = RunResult(
    epochs=1.0,
    train_samples=1000,
    train_steps=8,
    samples_per_second=12345.6789,
    seconds=1.0,
    peak_memory_bytes=1,
    checkpoint="newest",
    stopped="all epochs done",
    metrics={"test": Metrics(0.75, 0.8125, 0.5, 0.9, 1.0, 0.5, 0.5, 0.5, 0.5, 100)},
    unknown_ids={"test": 0},
    kernels="plain",
    kernels_reason="",
    amp_type="O0",
    device="npu:0",
    versions={"torch": "2.13.0"},
    hardware={},
)
BEST = BestPossible(auc=0.8, log_loss=0.4, normalized_entropy=0.8, accuracy=0.8, samples=100)
TRUTH = Truth(1, 0.01, 1000, 0, 0.25, (3,), train=BEST, validation=BEST, test=BEST)


SCHEMA = FeatureSchema("label", (), (), "criteo-kaggle", "none")


def row_of(
    folder: Path, result: RunResult, config: TrainConfig | BaselineConfig
) -> tuple[str, ...]:
    (folder / "log.jsonl").write_text('{"event": "start", "train_rows": 1234}\n')
    return table_row(AnyRun(folder, SCHEMA, config, folder / "d"), result)


def test_the_row_stands_beside_the_published_ones(tmp_path: Path) -> None:
    row = row_of(tmp_path, RESULT, TrainConfig(mini_batch_size=256))
    lines = format_table(row, RESULT.metrics["test"], None).splitlines()
    assert lines[:5] == [
        "| NAME     | AUC    | accuracy | samples/s | Epoch | rows an epoch | batch | AMP_Type "
        "| Torch_Version |",
        "|----------|--------|----------|-----------|-------|---------------|-------|----------"
        "|---------------|",
        "| 1p-竞品V | 0.8024 | -        | 8344.198  | 1     | 39291958      | 128   | O1       "
        "| 1.5           |",
        "| 1p-NPU   | 0.8024 | -        | 3655.054  | 1     | 39291958      | 128   | O1       "
        "| 1.8           |",
        "| 1p-NPU   | 0.7500 | 0.8125   | 12345.679 | 1     | 1234          | 256   | O0       "
        "| 2.13.0        |",
    ]
    assert "is a ROC AUC" in "\n".join(lines[5:])
    assert "made up" not in "\n".join(lines)


def test_a_baselines_row_has_neither_batch_nor_torch(tmp_path: Path) -> None:
    result = dataclasses.replace(RESULT, model="lightgbm", device="cpu")
    row = row_of(tmp_path, result, BaselineConfig())
    assert row == (
        "lightgbm-CPU",
        "0.7500",
        "0.8125",
        "12345.679",
        "1",
        "1234",
        "-",
        "O0",
        "-",
    )


def test_made_up_data_says_how_far_it_got(tmp_path: Path) -> None:
    row = row_of(tmp_path, RESULT, TrainConfig())
    assert format_table(row, RESULT.metrics["test"], TRUTH).endswith(
        "best possible AUC is known: 0.8000. The run\n"
        "reached 0.7500, 83.3% of the way from chance (0.5) to it.\n"
    )


def test_a_run_without_test_metrics_has_a_row_all_the_same(tmp_path: Path) -> None:
    row = row_of(tmp_path, dataclasses.replace(RESULT, metrics={}), TrainConfig())
    text = format_table(row, None, TRUTH)
    assert "| 1p-NPU   | -      | -        | 12345.679 |" in text
    assert "made up" not in text
