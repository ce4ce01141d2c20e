"""Measures training beside the machine's matrix multiplications, in one process.

The floor is the time of the layers' matrix multiplications alone, with ``torch.mm(out=)``: forward
and both gradients, none for the raw dense input; the width of the interaction is rounded up to a
multiple of 16. Floor and measurement alternate, since a shared machine's speed drifts, and batches
are never repeated, since repeated ids would lie in the cache.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from dlrm.checkpoint import Position
from dlrm.config import BenchTrainConfig, ModelConfig, OptimizerConfig, TrainConfig
from dlrm.data import criteo
from dlrm.data.batch import Batch, make_batch
from dlrm.data.dataset import Rows, block_rows, write_dataset
from dlrm.data.synthetic import cardinalities
from dlrm.device import open_device, synchronize
from dlrm.model.dlrm import DLRM
from dlrm.progress import progress
from dlrm.runs import Run, hardware, measured_on, versions
from dlrm.schema import FeatureSchema
from dlrm.training.events import Events
from dlrm.training.profiling import StepProfiler
from dlrm.training.trainer import Trainer

_CPU = torch.device("cpu")
_CLICK_RATE = 0.256
_MEAN_DENSE = 20
_SCATTER = 2654435761  # odd and large: consecutive ids land far apart
# Rows of Criteo Terabyte's tables under MLPerf's limit of 40 million.
# fmt: off
_MLPERF_ROWS = (
    39884406, 39043, 17289, 7420, 20263, 3, 7120, 1543, 63, 38532951, 2953546, 403346, 10, 2208,
    11938, 155, 4, 976, 14, 39979771, 25641295, 39664984, 585935, 12972, 108, 36,
)
# fmt: on
_ARCHITECTURES = {
    "kaggle": ModelConfig(),
    "kaggle-64": ModelConfig(embedding_dim=64, dense_arch_layer_sizes=(512, 256, 64)),
    "kaggle-128": ModelConfig(embedding_dim=128, dense_arch_layer_sizes=(512, 256, 128)),
    "mlperf": ModelConfig(
        embedding_dim=128,
        dense_arch_layer_sizes=(512, 256, 128),
        over_arch_layer_sizes=(1024, 1024, 512, 256, 1),
    ),
}
_DEFAULT_LIMIT = 1_000_000
_STEP_ROWS = 16384
"""Rows of a measurement of floor and steps: a few tenths of a second."""


def made_up_rows(
    schema: FeatureSchema, rows: int, seed: int, *, scattered: bool = False
) -> Iterator[Rows]:
    """Make up rows with long-tailed ids, a block at a time.

    Args:
        schema: Tables and dense features.
        rows: How many.
        seed: Of the random numbers.
        scattered: Spread frequent ids over their table, as hashing would; else the smaller an id,
            the more frequent, as by first appearance.
    """
    generator = np.random.default_rng(seed)
    tables = np.array(schema.num_embeddings)
    step = block_rows(schema)
    for start in range(0, rows, step):
        count = min(step, rows - start)
        # Density falls as 1/id: log-uniform over a table's rows.
        ids = np.floor(tables ** generator.random((count, len(tables)))).astype(np.int64) - 1
        if scattered:
            ids = ids * _SCATTER % tables
        dense = np.floor(generator.exponential(_MEAN_DENSE, (count, len(schema.dense))))
        labels = generator.random(count) < _CLICK_RATE
        yield Rows(labels.astype(np.uint8), dense.astype(np.int32), ids.astype(np.int32))


def made_up_batches(
    schema: FeatureSchema, mini_batch_size: int, *, scattered: bool = False, seed: int = 1
) -> Iterator[Batch]:
    """Make up batches without end; see ``made_up_rows``."""
    for number in itertools.count(seed):
        count = max(mini_batch_size, block_rows(schema))
        rows = Rows.concatenate(list(made_up_rows(schema, count, number, scattered=scattered)))
        block = make_batch(schema, rows.dense, rows.sparse, rows.labels)
        for start in range(0, count - mini_batch_size + 1, mini_batch_size):
            yield block.rows(start, start + mini_batch_size)


def layer_sizes(schema: FeatureSchema, config: ModelConfig) -> list[tuple[int, int]]:
    """Return (in, out) of every fully connected layer."""
    model = DLRM(schema, config, device=torch.device("meta"))
    interaction = math.ceil(model.interaction_arch.out_features / 16) * 16
    dense = [len(schema.dense), *config.dense_arch_layer_sizes]
    over = [interaction, *config.over_arch_layer_sizes]
    return [pair for sizes in (dense, over) for pair in itertools.pairwise(sizes)]


def floor(
    layers: Sequence[tuple[int, int]],
    rows: int,
    *,
    training: bool = True,
    device: torch.device = _CPU,
) -> Callable[[], None]:
    """Return a function that does a step's matrix multiplications, or those of scoring."""

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=device)

    work = []
    for index, (fan_in, fan_out) in enumerate(layers):
        inputs, weight, gradient = (
            random(rows, fan_in),
            random(fan_out, fan_in),
            random(rows, fan_out),
        )
        work.append((inputs, weight.t(), random(rows, fan_out)))
        if training:
            work.append((gradient.t(), inputs, random(fan_out, fan_in)))
        if training and index:
            work.append((gradient, weight, random(rows, fan_in)))

    def multiply() -> None:
        for left, right, out in work:
            torch.mm(left, right, out=out)

    return multiply


@dataclass(frozen=True)
class BenchTrainResult:
    """What training reaches: medians over the pairs."""

    floor_samples_per_second: float
    step_samples_per_second: float
    """Of steps on rows in memory."""
    end_to_end_samples_per_second: float
    """Of the trainer's loop, from disk (which the system caches), evaluation excluded."""
    share_of_floor: float
    """Of steps: the median of the pairs' shares."""
    end_to_end_share_of_floor: float
    milliseconds_per_step: dict[str, float]
    """By part, of some profiled steps of the loop."""
    profiled_milliseconds_per_step: float
    """Of the same steps as a whole: being recorded slows them."""
    kernels: str
    kernels_reason: str
    config: BenchTrainConfig
    table_bytes: int
    hardware: dict[str, str | int]
    versions: dict[str, str]

    def table(self) -> str:
        """Return the figures as text."""
        config = self.config
        lines = [
            f"{config.architecture}, batch {config.mini_batch_size}, {config.optimizer}, "
            f"{config.amp}, tables {self.table_bytes / 1e9:.2f} GB in {config.embedding_dtype}, "
            f"ids {'scattered' if config.scattered else 'numbered as prepared'}",
            f"{self.kernels} kernels: {self.kernels_reason}",
            measured_on(self.hardware, self.versions),
            "",
            f"{'':24}{'samples/s':>12}{'of the floor':>14}",
            f"{'floor':24}{self.floor_samples_per_second:12,.0f}{1:14.3f}",
            f"{'step':24}{self.step_samples_per_second:12,.0f}{self.share_of_floor:14.3f}",
            f"{'end to end, from disk':24}{self.end_to_end_samples_per_second:12,.0f}"
            f"{self.end_to_end_share_of_floor:14.3f}",
            "",
            f"{'part of a profiled step':24}{'ms':>12}{'share':>14}",
        ]
        whole = self.profiled_milliseconds_per_step
        parts = dict(self.milliseconds_per_step)
        parts["everything else"] = max(0.0, whole - sum(parts.values()))
        parts["the whole step"] = whole
        lines += [f"{name:24}{value:12.3f}{value / whole:14.1%}" for name, value in parts.items()]
        return "\n".join(lines) + "\n"


def bench_train(config: BenchTrainConfig) -> BenchTrainResult:
    """Measure floor, step and training from disk.

    Raises:
        EnvironmentFaultError: Memory, the disk or the device does not suffice.
    """
    device = open_device(config.device, config.local_rank)
    schema = bench_schema(config)
    batch = config.mini_batch_size
    # A run from disk is a whole number of blocks, so that each has its share of the loader's work.
    segment_steps = max(1, round(block_rows(schema) / batch))
    steps = segment_steps * (config.pairs + 2) + 1
    with tempfile.TemporaryDirectory(prefix="dlrm-bench-") as scratch:
        rows = made_up_rows(schema, steps * batch, config.seed, scattered=config.scattered)
        data = write_dataset(
            Path(scratch) / "dataset", schema, {"train": rows, "validation": [], "test": []}
        )
        train_config = TrainConfig(
            model=model_config(config),
            optimizer=OptimizerConfig(config.optimizer, 0.1 if config.optimizer == "sgd" else 0.01),
            mini_batch_size=batch,
            test_freq=-1,
            print_freq=10**9,
            seed=config.seed,
            device=config.device,
            local_rank=config.local_rank,
            amp=config.amp,
        )
        trainer = _Trainer(data, Run(data.path, data.schema, train_config, data.path), device)
        with progress("bench train", config.pairs + 1, unit="pairs") as bar:
            pairs = _Pairs(trainer, config, segment_steps, bar)
            profiler = StepProfiler(
                trainer.model, device, segment_steps * (config.pairs + 1), segment_steps
            )
            trainer.listeners = (pairs, profiler)
            with contextlib.closing(profiler):
                trainer.fit()
    shares = [step / floor for floor, step in zip(pairs.floors, pairs.steps, strict=True)]
    trained = [loop / floor for floor, loop in zip(pairs.floors, pairs.loops, strict=True)]
    return BenchTrainResult(
        floor_samples_per_second=statistics.median(pairs.floors),
        step_samples_per_second=statistics.median(pairs.steps),
        end_to_end_samples_per_second=statistics.median(pairs.loops),
        share_of_floor=statistics.median(shares),
        end_to_end_share_of_floor=statistics.median(trained),
        milliseconds_per_step=profiler.milliseconds_per_step(),
        profiled_milliseconds_per_step=1000 * profiler.recorded_seconds / profiler.recorded_steps,
        kernels=trainer.step.kernels,
        kernels_reason=trainer.step.reason,
        config=config,
        table_bytes=trainer.model.sparse_arch.table_bytes,
        hardware=hardware(device),
        versions=versions(),
    )


def model_config(config: BenchTrainConfig) -> ModelConfig:
    """Return the architecture that is asked for."""
    return replace(_ARCHITECTURES[config.architecture], embedding_dtype=config.embedding_dtype)


def bench_schema(config: BenchTrainConfig) -> FeatureSchema:
    """Return Criteo's features with tables of the sizes that are asked for."""
    is_mlperf = config.architecture == "mlperf"
    sizes = _MLPERF_ROWS if is_mlperf else tuple(cardinalities(1.0).tolist())
    limit = config.max_table_rows
    if limit < 0:
        limit = 0 if config.architecture == "kaggle" else _DEFAULT_LIMIT
    if limit:
        sizes = tuple(min(size, limit) for size in sizes)
    return criteo.schema(sizes, "none: made-up rows").sealed()


class _Trainer(Trainer):
    """A trainer whose initial weights are drawn quickly."""

    def draw_weights(self) -> None:
        """Leave the layers as PyTorch draws them, and fill the tables with small values."""
        with torch.no_grad():
            for arena in self.model.sparse_arch.arenas:
                arena.arena.uniform_(-0.01, 0.01)


class _Pairs(Events):
    """Measures floor and steps whenever the loop has trained on a run of steps; a listener.

    While the loop stands still, its background thread can read ahead only as far as it ever is
    ahead, since reading is faster than training.
    """

    def __init__(
        self, trainer: Trainer, config: BenchTrainConfig, segment_steps: int, bar: tqdm[Any]
    ) -> None:
        self.floors: list[float] = []
        self.steps: list[float] = []
        self.loops: list[float] = []
        self._trainer = trainer
        self._pairs = config.pairs
        self._batch = config.mini_batch_size
        self._segment_steps = segment_steps
        self._bar = bar
        self._count = max(1, _STEP_ROWS // self._batch)
        schema = trainer.run.schema
        layers = layer_sizes(schema, trainer.config.model)
        self._multiply = floor(layers, self._batch, device=trainer.device)
        self._batches = made_up_batches(  # other rows than those on disk
            schema, self._batch, scattered=config.scattered, seed=config.seed + 1
        )
        self._since = time.perf_counter()

    def on_step(self, position: Position, samples: int) -> None:
        """At the end of a run of steps, note its rate, and measure floor and steps."""
        pair, rest = divmod(position.total_steps, self._segment_steps)
        if rest or pair > self._pairs + 1:
            return
        synchronize(self._trainer.device)
        loop = self._batch * self._segment_steps / (time.perf_counter() - self._since)
        floor, step = self._measure()
        if pair > 1:  # the first one warms up
            self.loops.append(loop)
            self.floors.append(floor)
            self.steps.append(step)
        self._bar.update()
        self._since = time.perf_counter()

    def _measure(self) -> tuple[float, float]:
        """Return samples per second of the floor, and of steps on rows in memory."""
        trainer, samples = self._trainer, self._count * self._batch
        batches = [next(self._batches).to(trainer.device) for _ in range(self._count)]
        time.sleep(0.1)  # lets the background thread finish its block
        started = time.perf_counter()
        for _ in range(self._count):
            self._multiply()
        synchronize(trainer.device)
        multiplied = time.perf_counter()
        for batch in batches:
            trainer.step(batch, trainer.config.optimizer.learning_rate)
        synchronize(trainer.device)
        return samples / (multiplied - started), samples / (time.perf_counter() - multiplied)
