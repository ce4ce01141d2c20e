"""Samples per second of training beside the machine's GEMM floor in the same run.

The model has Kaggle's architecture and 26 tables (33.8 million rows, dimension 16: 2.2 GB); rows
are made up. A step is measured on batches in memory, with ids numbered as ``dlrm prepare`` numbers
them (frequent values first) and scattered over their tables; then the trainer's own loop, reading
from disk. ``dlrm.bench`` says what the floor is and how both are compared.

    python benchmarks/train_throughput.py [--mini-batch-size 128 2048] [--pairs 20]
        [--optimizer sgd adagrad rowwise_adagrad] [--breakdown] [--json]
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from dlrm import bench
from dlrm.config import LossConfig, OptimizerConfig, TrainConfig
from dlrm.data import criteo
from dlrm.data.dataset import write_dataset
from dlrm.data.synthetic import cardinalities
from dlrm.device import use_available_cores
from dlrm.model.dlrm import DLRM
from dlrm.runs import hardware, versions
from dlrm.training.optimizer import Optimizer
from dlrm.training.step import choose_step

SCHEMA = criteo.schema(tuple(cardinalities(1.0).tolist()), "none: made-up rows", value_modulus=0)
ROWS_A_MEASUREMENT = 20_480


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--mini-batch-size", type=int, nargs="+", default=[128, 2048])
    parser.add_argument("--optimizer", nargs="+", default=["sgd"])
    parser.add_argument("--pairs", type=int, default=20, help="floor and training, in turn")
    parser.add_argument("--breakdown", action="store_true", help="where a step's time goes")
    parser.add_argument("--no-disk", action="store_true", help="only steps, from memory")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    arguments = parser.parse_args()
    use_available_cores()
    results: list[dict[str, Any]] = []
    for optimizer in arguments.optimizer:
        for rows in arguments.mini_batch_size:
            config = TrainConfig(
                mini_batch_size=rows,
                optimizer=OptimizerConfig(optimizer=optimizer),
                test_freq=-1,
                print_freq=10**9,
            )
            results += measure_steps(config, arguments.pairs, arguments.breakdown)
            if not arguments.no_disk:
                results.append(measure_from_disk(config, arguments.pairs))
    machine = {"hardware": hardware(torch.device("cpu")), "versions": versions()}
    if arguments.json:
        sys.stdout.write(json.dumps({"results": results, **machine}, indent=2) + "\n")
        return
    print(f"{machine}\nmedian of {arguments.pairs} pairs, samples/s:")
    for result in results:
        share = result["share"]
        print(
            f"{result['what']:44} floor {share['floor_samples_per_second']:8.0f}, "
            f"ours {share['samples_per_second']:8.0f}, share {share['share_of_floor']:.3f}"
        )
        for part, seconds in result.get("breakdown", {}).items():
            print(f"    {part:40} {1e6 * seconds:8.0f} µs a step")


def measure_steps(config: TrainConfig, pairs: int, breakdown: bool) -> list[dict[str, Any]]:
    model = DLRM(SCHEMA, config.model)
    with torch.no_grad():
        model.sparse_arch.arena.uniform_(-0.01, 0.01)
    step = choose_step(model, Optimizer(model, config.optimizer), LossConfig())
    layers = bench.layer_sizes(SCHEMA, config.model)
    rows = config.mini_batch_size
    steps = max(1, ROWS_A_MEASUREMENT // rows)
    results: list[dict[str, Any]] = []
    for scattered in (False, True):
        batches = bench.made_up_batches(SCHEMA, rows, scattered=scattered)
        share = bench.step_share(step, layers, batches, pairs=pairs, steps=steps)
        ids = "scattered" if scattered else "as prepared"
        result = {
            "what": f"{config.optimizer.optimizer}, batch {rows}, step, ids {ids}",
            "kernels": step.kernels,
            "share": dataclasses.asdict(share),
        }
        if breakdown:
            result["breakdown"] = bench.breakdown(step, batches, steps=steps)
        results.append(result)
    return results


def measure_from_disk(config: TrainConfig, pairs: int) -> dict[str, Any]:
    steps = max(1, 2 * ROWS_A_MEASUREMENT // config.mini_batch_size)
    with tempfile.TemporaryDirectory() as scratch:
        rows = config.mini_batch_size * steps * (pairs + 2)
        train = bench.made_up_rows(SCHEMA, rows, 1)
        data = write_dataset(
            Path(scratch) / "dataset", SCHEMA, {"train": train, "validation": [], "test": []}
        )
        share = bench.end_to_end_share(data, config, pairs=pairs, steps=steps)
    return {
        "what": f"{config.optimizer.optimizer}, batch {config.mini_batch_size}, from disk",
        "share": dataclasses.asdict(share),
    }


if __name__ == "__main__":
    main()
