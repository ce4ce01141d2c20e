"""Measure an evaluation from disk beside the forward pass of the same rows in memory.

    python benchmarks/evaluation.py [ROWS]

Kaggle's tables (33.8 million rows of 16, untrained), by default as many rows as Kaggle's test split
has, in batches of 16,384. The forward pass alone, ``evaluate_split``, and ``evaluate_split`` that
writes predictions alternate in one process; the medians of the rates and shares are printed, and
what the metrics alone take. The processor's time, of all threads, tells what a busy machine hides.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from dlrm.bench import bench_schema, made_up_rows, model_config
from dlrm.config import BenchTrainConfig, TrainConfig
from dlrm.data.dataset import write_dataset
from dlrm.device import available_cores
from dlrm.evaluation import evaluate_split
from dlrm.metrics import MetricsAccumulator
from dlrm.model.dlrm import DLRM
from dlrm.model.score import Scorer
from dlrm.predictions import write_predictions

ROWS = 3_274_291
ROUNDS = 3


def main() -> None:
    """Measure and print."""
    rows = int(sys.argv[1]) if len(sys.argv) > 1 else ROWS
    torch.set_num_threads(available_cores())
    bench = BenchTrainConfig()
    schema = bench_schema(bench)
    model = DLRM(schema, model_config(bench))
    with torch.no_grad():
        for arena in model.sparse_arch.arenas:
            arena.arena.uniform_(-0.01, 0.01)
    config = TrainConfig(model=model.config)
    scorer = Scorer(model, config.loss)
    with tempfile.TemporaryDirectory(prefix="dlrm-bench-") as scratch:
        folder = Path(scratch)
        data = write_dataset(
            folder / "dataset", schema, {"test": made_up_rows(schema, rows, bench.seed)}
        )
        batches = list(data.batches("test", config.evaluation_batch_size))

        def forward() -> None:
            for batch in batches:
                scorer(batch)

        def evaluate() -> None:
            evaluate_split(model, data, "test", schema, config, folder=folder)

        def evaluate_and_write() -> None:
            path = folder / "predictions" / "test.arrow"
            with write_predictions(path, "test", data.manifest.fingerprint) as predictions:
                evaluate_split(
                    model, data, "test", schema, config, folder=folder, predictions=predictions
                )

        probabilities = np.concatenate([scorer(batch) for batch in batches])
        labels = np.concatenate([batch.labels for batch in batches])

        def metrics() -> None:
            with MetricsAccumulator() as accumulator:
                step = config.evaluation_batch_size
                for start in range(0, rows, step):
                    accumulator.add(
                        labels[start : start + step], probabilities[start : start + step]
                    )
                accumulator.metrics()

        calls = {
            "forward alone": forward,
            "evaluation": evaluate,
            "evaluation, predictions written": evaluate_and_write,
            "metrics alone": metrics,
        }
        taken: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
        for _ in range(ROUNDS):
            for name, call in calls.items():
                taken[name].append(seconds(call))
    print(f"{'':34}{'samples/s':>12}{'of the forward pass':>21}{'processor, µs/row':>19}")
    for name, pairs in taken.items():
        times, busy = zip(*pairs, strict=True)
        alone = [wall for wall, _ in taken["forward alone"]]
        share = statistics.median(least / each for least, each in zip(alone, times, strict=True))
        print(
            f"{name:34}{rows / statistics.median(times):12,.0f}{share:21.3f}"
            f"{1e6 * statistics.median(busy) / rows:19.2f}"
        )


def seconds(call: Callable[[], object]) -> tuple[float, float]:
    """Return how long a call takes, and how much time of the processor."""
    started, busy = time.perf_counter(), time.process_time()
    call()
    return time.perf_counter() - started, time.process_time() - busy


if __name__ == "__main__":
    main()
