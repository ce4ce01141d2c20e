"""Samples per second of training from disk, beside the machine's GEMM floor in the same run.

The DATASET has Kaggle's 26 tables (33.8 million rows, dimension 16: 2.2 GB) and made-up rows whose
ids are numbered as ``dlrm prepare`` numbers them: frequent values first. Training is the trainer's
own loop, reading from disk, without evaluation and checkpoints.

The floor is the time of the layers' matrix multiplications alone, with ``torch.mm(out=)``: forward
and both gradients, none for the raw dense input; the interaction is 368 wide (367 padded).

    python benchmarks/train_throughput.py [--pairs 5] [--json]
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from dlrm.config import TrainConfig
from dlrm.data import criteo
from dlrm.data.dataset import Dataset, Rows, block_rows, write_dataset
from dlrm.data.synthetic import cardinalities
from dlrm.device import open_device
from dlrm.runs import Run, hardware, versions
from dlrm.training.trainer import Trainer

CARDINALITIES = cardinalities(1.0)
"""Kaggle's."""
SCHEMA = criteo.schema(tuple(CARDINALITIES.tolist()), "none: made-up rows")
LAYERS = [
    *[(13, 512), (512, 256), (256, 64), (64, 16)],
    *[(368, 512), (512, 256), (256, 1)],
]
STEPS = {128: 800, 2048: 60}
"""Steps of a measurement, by mini_batch_size: a few seconds each."""


def made_up_rows(rows: int, seed: int) -> Iterator[Rows]:
    """Rows with long-tailed ids: the smaller an id, the more frequent, as by first appearance."""
    generator = np.random.default_rng(seed)
    step = block_rows(SCHEMA)
    for start in range(0, rows, step):
        count = min(step, rows - start)
        uniform = generator.random((count, len(CARDINALITIES)))
        # Density falls as 1/id: log-uniform over a table's rows.
        ids = np.floor(CARDINALITIES**uniform) - 1
        dense = np.floor(generator.exponential(20, (count, 13)))
        labels = generator.random(count) < 0.256
        yield Rows(labels.astype(np.uint8), dense.astype(np.int32), ids.astype(np.int32))


def floor_seconds(batch: int, steps: int) -> float:
    """Return the seconds that the matrix multiplications of so many steps take."""
    work = []
    for fan_in, fan_out in LAYERS:
        inputs, weight = torch.randn(batch, fan_in), torch.randn(fan_out, fan_in)
        gradient = torch.randn(batch, fan_out)
        work.append((inputs, weight.t(), torch.empty(batch, fan_out)))
        work.append((gradient.t(), inputs, torch.empty(fan_out, fan_in)))
        if fan_in != 13:
            work.append((gradient, weight, torch.empty(batch, fan_in)))
    started = time.perf_counter()
    for _ in range(steps):
        for left, right, out in work:
            torch.mm(left, right, out=out)
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--pairs", type=int, default=5, help="floor and training, in turn")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    arguments = parser.parse_args()
    results = {}
    with tempfile.TemporaryDirectory() as scratch:
        rows = max(batch * steps for batch, steps in STEPS.items()) * (arguments.pairs + 1)
        data = write_dataset(
            Path(scratch) / "dataset",
            SCHEMA,
            {"train": made_up_rows(rows, 1), "validation": [], "test": []},
        )
        for batch, steps in STEPS.items():
            results[batch] = measure(data, batch, steps, arguments.pairs)
    device = torch.device("cpu")
    if arguments.json:
        report = {"results": results, "hardware": hardware(device), "versions": versions()}
        sys.stdout.write(json.dumps(report, indent=2) + "\n")
        return
    print(f"{hardware(device)}\n{versions()}\nmedian of {arguments.pairs} pairs, samples/s:")
    for batch, result in results.items():
        print(
            f"batch {batch:5}: floor {result['floor_samples_per_second']:8.0f}, training from disk "
            f"{result['end_to_end_samples_per_second']:8.0f}, share {result['share_of_floor']:.2f}"
        )


def measure(data: Dataset, batch: int, steps: int, pairs: int) -> dict[str, float]:
    """Alternate floor and training; batches are never repeated."""
    config = TrainConfig(mini_batch_size=batch, test_freq=-1, print_freq=10**9)
    device = open_device("cpu")
    trainer = Trainer(data, Run(data.path, data.schema, config, data.path), device)
    floors, trainings = [], []
    for pair in range(pairs + 1):
        floor = batch * steps / floor_seconds(batch, steps)
        samples, seconds = trainer.train_samples, trainer.train_seconds
        # Go on from where the last measurement stopped.
        trainer.config = replace(config, max_steps=steps * (pair + 1))
        trainer.stopped = ""
        trainer.fit()
        training = (trainer.train_samples - samples) / (trainer.train_seconds - seconds)
        if pair:  # the first pair warms up
            floors.append(floor)
            trainings.append(training)
    shares = [training / floor for training, floor in zip(trainings, floors, strict=True)]
    return {
        "floor_samples_per_second": statistics.median(floors),
        "end_to_end_samples_per_second": statistics.median(trainings),
        "share_of_floor": statistics.median(shares),
    }


if __name__ == "__main__":
    main()
