"""Measure how long it takes to score prepared rows, beside the matrix multiplications alone.

    python benchmarks/scoring.py

One row, 100 and 16,384 through ``Predictor.score``, as a service would call it, with Kaggle's
tables (33.8 million rows of 16, untrained). The floor is ``torch.mm(out=)`` of every layer. Both
alternate, on rows that are never repeated; the medians are printed.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from dlrm.bench import bench_schema, floor, layer_sizes, made_up_batches, model_config
from dlrm.config import BenchTrainConfig, TrainConfig
from dlrm.device import available_cores
from dlrm.model.dlrm import DLRM
from dlrm.prediction import Predictor
from dlrm.runs import Run

SIZES = {1: 3000, 100: 300, 16384: 11}
"""Rows at a time: how often."""


def seconds(call: Callable[[], object]) -> float:
    """Return how long a call takes."""
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def main() -> None:
    """Measure and print."""
    torch.set_num_threads(available_cores())
    config = BenchTrainConfig()
    schema = bench_schema(config)
    model = DLRM(schema, model_config(config))
    with torch.no_grad():
        for arena in model.sparse_arch.arenas:
            arena.arena.uniform_(-0.01, 0.01)
    # Rows are prepared already, so nothing is encoded.
    run = Run(Path("none"), schema, TrainConfig(model=model.config), Path("none"))
    predictor = Predictor(schema, run.config, model, None, run)
    layers = layer_sizes(schema, model.config)
    print(f"{'rows':>8}{'score, µs':>12}{'floor, µs':>12}{'score / floor':>15}")
    for rows, times in SIZES.items():
        multiply = floor(layers, rows, training=False)
        batches = itertools.islice(made_up_batches(schema, rows), times)
        pairs = [(seconds(multiply), seconds(partial(predictor.score, batch))) for batch in batches]
        floors, scores = zip(*pairs[len(pairs) // 10 :], strict=True)
        ratio = statistics.median(score / least for least, score in pairs[len(pairs) // 10 :])
        print(
            f"{rows:8}{1e6 * statistics.median(scores):12.1f}"
            f"{1e6 * statistics.median(floors):12.1f}{ratio:15.2f}"
        )


if __name__ == "__main__":
    main()
