from __future__ import annotations

import dataclasses

from dlrm.data.synthetic import BestPossible, Truth
from dlrm.metrics import Metrics
from dlrm.runs import RunResult
from dlrm.seed_table import format_table

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


def test_the_row_stands_beside_the_published_ones() -> None:
    lines = format_table(RESULT, None).splitlines()
    assert lines[:5] == [
        "| NAME     | AUC    | accuracy | samples/s | Epoch | AMP_Type | Torch_Version |",
        "|----------|--------|----------|-----------|-------|----------|---------------|",
        "| 1p-竞品V | 0.8024 | -        | 8344.198  | 1     | O1       | 1.5           |",
        "| 1p-NPU   | 0.8024 | -        | 3655.054  | 1     | O1       | 1.8           |",
        "| 1p-NPU   | 0.7500 | 0.8125   | 12345.679 | 1     | O0       | 2.13.0        |",
    ]
    assert "is a ROC AUC" in "\n".join(lines[5:])
    assert "made up" not in "\n".join(lines)


def test_made_up_data_says_how_far_it_got() -> None:
    assert format_table(RESULT, TRUTH).endswith(
        "best possible AUC is known: 0.8000. The run\n"
        "reached 0.7500, 83.3% of the way from chance (0.5) to it.\n"
    )


def test_a_run_without_test_metrics_has_a_row_all_the_same() -> None:
    text = format_table(dataclasses.replace(RESULT, metrics={}), TRUTH)
    assert "| 1p-NPU   | -      | -        | 12345.679 |" in text
    assert "made up" not in text
