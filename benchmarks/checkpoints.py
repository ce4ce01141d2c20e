"""Measure what checkpoints cost a training with Kaggle's tables (33.8 million rows of 16).

    python benchmarks/checkpoints.py DIR [--seconds 60] [--pairs 1] [--optimizer sgd]

DIR gets made-up rows and a RUN, and needs 9 GB of disk (with adagrad twice that). In one process
the same training goes on for so many seconds with a checkpoint at their beginning, and as long
without one, in turn: samples/s, how long training stands still, how long writing takes, bytes,
memory. Then it is resumed three times: the time from the process's start to its first step.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from dlrm import resume, train
from dlrm.bench import bench_schema, made_up_rows, model_config
from dlrm.checkpoint import Position
from dlrm.config import BenchTrainConfig, OptimizerConfig, TrainConfig
from dlrm.data.dataset import write_dataset
from dlrm.device import use_available_cores
from dlrm.runs import peak_memory_bytes
from dlrm.training.events import Events
from dlrm.training.saving import Checkpoints, Saver
from dlrm.training.trainer import Trainer

WARM_UP = 45.0
ROWS = 4_000_000


class Alternating(Events):
    """Lets a checkpoint be saved at the beginning of every other segment; a listener.

    Args:
        seconds: Of a segment.
        pairs: Of segments.
    """

    def __init__(self, seconds: float, pairs: int) -> None:
        self.is_due = False
        self.stalls: list[float] = []
        self.writing: list[float] = []
        self.rates: list[float] = []
        self.memory: list[int] = [resident_bytes()]
        self._seconds = seconds
        self._segments = 2 * pairs
        self._since = time.perf_counter()
        self._samples = -1
        self._warm = False
        for kind, name, into in (
            (Saver, "save", self.stalls),
            (Checkpoints, "save", self.writing),
        ):
            setattr(kind, name, timed(getattr(kind, name), into))
        Trainer._save_is_due = lambda trainer: self._take()  # type: ignore[method-assign,assignment]

    def _take(self) -> bool:
        is_due, self.is_due = self.is_due, False
        return is_due

    def on_step(self, position: Position, samples: int) -> None:
        """Count rows, and begin the next segment when it is time."""
        self._samples += samples
        passed = time.perf_counter() - self._since
        if passed < (self._seconds if self._warm else WARM_UP):
            return
        self.memory.append(resident_bytes())
        if self._warm:
            self.rates.append(self._samples / passed)
        self._warm = True
        if len(self.rates) == self._segments:
            self._report()
        self.is_due = len(self.rates) % 2 == 0
        self._samples, self._since = 0, time.perf_counter()

    def _report(self) -> None:
        pairs = list(zip(self.rates[::2], self.rates[1::2], strict=True))
        answer = {
            "samples_per_second": [{"saving": round(a), "not": round(b)} for a, b in pairs],
            "median_ratio": statistics.median(a / b for a, b in pairs),
            "stall_seconds": self.stalls,
            "writing_seconds": self.writing,
            "resident_gb": [each / 1e9 for each in self.memory],
            "peak_gb": peak_memory_bytes() / 1e9,
        }
        print(json.dumps(answer), flush=True)
        os._exit(0)  # what is written is written: a save is shorter than a segment


class FirstStep(Events):
    """Ends the process at its first step, and tells how long that took; a listener."""

    def __init__(self, started: float) -> None:
        self._started = started

    def on_step(self, position: Position, samples: int) -> None:
        """Report and end."""
        seconds = time.time() - self._started
        print(json.dumps({"seconds_to_first_step": seconds, "step": position.total_steps}))
        sys.stdout.flush()
        os._exit(0)


def timed(function: Callable[..., Any], into: list[float]) -> Callable[..., Any]:
    """Return a function that notes how long its calls take."""

    def call(*arguments: Any, **options: Any) -> Any:
        started = time.perf_counter()
        try:
            return function(*arguments, **options)
        finally:
            into.append(time.perf_counter() - started)

    return call


def resident_bytes() -> int:
    """Return how much memory the process has now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def draw_quickly(trainer: Trainer) -> None:
    """Fill the tables with small values, since initial weights are not what is measured."""
    with torch.no_grad():
        for arena in trainer.model.sparse_arch.arenas:
            arena.arena.uniform_(-0.01, 0.01)


def measure(options: argparse.Namespace) -> None:
    """Train, in this process."""
    bench = BenchTrainConfig(optimizer=options.optimizer)
    dataset = options.folder / "dataset"
    if not dataset.exists():
        rows = made_up_rows(schema := bench_schema(bench), ROWS, bench.seed)
        write_dataset(dataset, schema, {"train": rows, "validation": [], "test": []})
    Trainer.draw_weights = draw_quickly  # type: ignore[method-assign,assignment]
    rate = 0.1 if options.optimizer == "sgd" else 0.01
    config = TrainConfig(
        model=model_config(bench),
        optimizer=OptimizerConfig(options.optimizer, rate),
        epochs=1000,
        test_freq=-1,
        print_freq=10**9,
    )
    shutil.rmtree(options.folder / "run", ignore_errors=True)
    train(dataset, options.folder / "run", config, [Alternating(options.seconds, options.pairs)])


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--pairs", type=int, default=1)
    parser.add_argument("--optimizer", default="sgd")
    parser.add_argument("--stage", choices=["train", "resume"])
    parser.add_argument("--started", type=float)
    options = parser.parse_args()
    use_available_cores()
    if options.stage == "train":
        measure(options)
    elif options.stage == "resume":
        resume(options.folder / "run", listeners=[FirstStep(options.started)])
    else:
        options.folder.mkdir(parents=True, exist_ok=True)
        again = [sys.executable, *sys.argv]
        subprocess.run([*again, "--stage=train"], check=True)
        (newest,) = {path.stat().st_size for path in options.folder.glob("run/checkpoints/newest*")}
        print(json.dumps({"checkpoint_gb": newest / 1e9}), flush=True)
        for _ in range(3):
            subprocess.run([*again, "--stage=resume", f"--started={time.time()}"], check=True)


if __name__ == "__main__":
    main()
