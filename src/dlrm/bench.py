"""Measures training and scoring beside the machine's matrix multiplications, in one process.

The floor is the time of the layers' matrix multiplications alone, with ``torch.mm(out=)``: forward
and both gradients, none for the raw dense input; the width of the interaction is rounded up to a
multiple of 16. Floor and measurement alternate, since a shared machine's speed drifts, and batches
are never repeated, since repeated ids would lie in the cache.
"""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

from dlrm.config import ModelConfig, TrainConfig
from dlrm.data.batch import Batch, make_batch
from dlrm.data.dataset import Dataset, Rows, block_rows
from dlrm.device import open_device
from dlrm.model.dlrm import DLRM
from dlrm.runs import Run
from dlrm.schema import FeatureSchema
from dlrm.training.step import Step
from dlrm.training.trainer import Trainer

_CLICK_RATE = 0.256
_MEAN_DENSE = 20
_SCATTER = 2654435761  # odd and large: consecutive ids land far apart
PARTS = {
    "gather and interaction": ("embed_interact",),
    "MLPs, forward": ("to_panels", "mlp_forward"),
    "loss": ("loss_gradient",),
    "MLPs, gradients of activations": ("mlp_backward",),
    "interaction, backward": ("embed_interact_backward",),
    "MLPs, gradients of weights and update": ("mlp_update",),
    "tables, update": ("tables_update",),
}
"""What the native step consists of, by operator."""


@dataclass(frozen=True)
class Share:
    """A rate beside its floor: medians over pairs."""

    floor_samples_per_second: float
    samples_per_second: float
    share_of_floor: float
    """Median of the pairs' shares, which is not the share of the medians."""
    pairs: int


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
    while True:
        for rows in made_up_rows(schema, block_rows(schema), seed, scattered=scattered):
            block = make_batch(schema, rows.dense, rows.sparse, rows.labels)
            for start in range(0, len(block) - mini_batch_size + 1, mini_batch_size):
                yield block.rows(start, start + mini_batch_size)
        seed += 1


def layer_sizes(schema: FeatureSchema, config: ModelConfig) -> list[tuple[int, int]]:
    """Return (in, out) of every fully connected layer."""
    model = DLRM(schema, config, device=torch.device("meta"))
    interaction = math.ceil(model.interaction_arch.out_features / 16) * 16
    dense = [len(schema.dense), *config.dense_arch_layer_sizes]
    over = [interaction, *config.over_arch_layer_sizes]
    return [pair for sizes in (dense, over) for pair in itertools.pairwise(sizes)]


def floor(
    layers: Sequence[tuple[int, int]], rows: int, *, training: bool = True
) -> Callable[[], None]:
    """Return a function that does a step's matrix multiplications, or those of scoring."""
    work = []
    for index, (fan_in, fan_out) in enumerate(layers):
        inputs, weight = torch.randn(rows, fan_in), torch.randn(fan_out, fan_in)
        gradient = torch.randn(rows, fan_out)
        work.append((inputs, weight.t(), torch.empty(rows, fan_out)))
        if training:
            work.append((gradient.t(), inputs, torch.empty(fan_out, fan_in)))
        if training and index:
            work.append((gradient, weight, torch.empty(rows, fan_in)))

    def multiply() -> None:
        for left, right, out in work:
            torch.mm(left, right, out=out)

    return multiply


def pairs_of(
    multiply: Callable[[], None], act: Callable[[], float], rows: int, times: int, pairs: int
) -> Share:
    """Alternate the floor and what is measured.

    Args:
        multiply: The floor, ``times`` of which take as long as one ``act`` should.
        act: Does what is measured and returns its seconds.
        rows: Of one ``multiply``.
        times: How often it is called.
        pairs: How many pairs count; one more warms up.
    """
    floors, rates = [], []
    for _ in range(pairs + 1):
        started = time.perf_counter()
        for _ in range(times):
            multiply()
        floors.append(rows * times / (time.perf_counter() - started))
        rates.append(rows * times / act())
    shares = [rate / floor for rate, floor in zip(rates[1:], floors[1:], strict=True)]
    return Share(
        statistics.median(floors[1:]),
        statistics.median(rates[1:]),
        statistics.median(shares),
        pairs,
    )


def step_share(
    step: Step,
    layers: Sequence[tuple[int, int]],
    batches: Iterator[Batch],
    *,
    pairs: int,
    steps: int,
) -> Share:
    """Measure a step on batches in memory, at a learning rate of 0.1.

    Args:
        step: Over a model of these layers.
        layers: Of ``layer_sizes``.
        batches: At least ``(pairs + 1) * steps``, of equal size.
        pairs: How many pairs count.
        steps: In each.
    """
    first = next(batches)
    step(first, 0.1)

    def act() -> float:
        ready = [next(batches) for _ in range(steps)]
        started = time.perf_counter()
        for batch in ready:
            step(batch, 0.1)
        return time.perf_counter() - started

    return pairs_of(floor(layers, len(first)), act, len(first), steps, pairs)


def end_to_end_share(data: Dataset, config: TrainConfig, *, pairs: int, steps: int) -> Share:
    """Measure the trainer's own loop, reading from disk, without evaluation and checkpoints.

    Args:
        data: With training rows for ``(pairs + 1) * steps`` steps.
        config: ``test_freq`` must be -1 and ``print_freq`` large.
        pairs: How many pairs count.
        steps: In each.
    """
    trainer = Trainer(data, Run(data.path, data.schema, config, data.path), open_device("cpu"))

    def act() -> float:
        before = trainer.train_seconds
        # Go on from where the last measurement stopped.
        trainer.config = replace(config, max_steps=trainer.position.total_steps + steps)
        trainer.stopped = ""
        trainer.fit()
        return trainer.train_seconds - before

    layers, rows = layer_sizes(data.schema, config.model), config.mini_batch_size
    return pairs_of(floor(layers, rows), act, rows, steps, pairs)


def breakdown(step: Step, batches: Iterator[Batch], *, steps: int) -> dict[str, float]:
    """Return seconds a step by part of the native step, and of the rest: Python between them."""
    step(next(batches), 0.1)
    ready = [next(batches) for _ in range(steps)]
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        started = time.perf_counter()
        for batch in ready:
            step(batch, 0.1)
        total = time.perf_counter() - started
    spent = {event.key: event.cpu_time_total / 1e6 for event in profiled.key_averages()}
    parts = {
        part: sum(spent.get(f"dlrm::{name}", 0.0) for name in names) / steps
        for part, names in PARTS.items()
    }
    return {**parts, "the rest": total / steps - sum(parts.values())}
