from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np

from dlrm import bench
from dlrm.config import LossConfig, ModelConfig, OptimizerConfig, TrainConfig
from dlrm.data.dataset import Dataset
from dlrm.model.dlrm import DLRM
from dlrm.training.optimizer import Optimizer
from dlrm.training.step import choose_step

MODEL = ModelConfig(embedding_dim=4, dense_arch_layer_sizes=(8, 4), over_arch_layer_sizes=(9, 1))


def test_layers_round_the_interaction_up(dataset: Path) -> None:
    # 4 + 27 * 26 / 2 = 355 values.
    expected = [(13, 8), (8, 4), (368, 9), (9, 1)]
    assert bench.layer_sizes(Dataset.open(dataset).schema, MODEL) == expected


def test_made_up_rows_fit_their_tables_and_are_long_tailed(dataset: Path) -> None:
    schema = Dataset.open(dataset).schema
    limits = np.array(schema.num_embeddings)
    for scattered in (False, True):
        (rows,) = bench.made_up_rows(schema, 5000, 1, scattered=scattered)
        assert (rows.sparse >= 0).all()
        assert (rows.sparse < limits).all()
        largest = rows.sparse[:, limits.argmax()]
        frequent = (largest < limits.max() / 10).mean()
        assert frequent > 0.5 or scattered
        assert set(np.unique(rows.labels)) == {0, 1}


def test_batches_never_repeat(dataset: Path) -> None:
    schema = Dataset.open(dataset).schema
    first, second = itertools.islice(bench.made_up_batches(schema, 50), 2)
    assert not np.array_equal(first.dense_features, second.dense_features)


def test_a_step_is_measured_and_broken_down(dataset: Path) -> None:
    schema = Dataset.open(dataset).schema
    model = DLRM(schema, MODEL)
    step = choose_step(model, Optimizer(model, OptimizerConfig()), LossConfig())
    batches = bench.made_up_batches(schema, 50)
    share = bench.step_share(step, bench.layer_sizes(schema, MODEL), batches, pairs=3, steps=2)
    assert share.pairs == 3
    assert 0 < share.share_of_floor < 100
    assert share.samples_per_second > 0
    parts = bench.breakdown(step, batches, steps=3)
    assert parts.keys() == {*bench.PARTS, "the rest"}
    assert all(seconds > 0 for seconds in parts.values())


def test_training_from_disk_is_measured(dataset: Path) -> None:
    config = TrainConfig(model=MODEL, mini_batch_size=100, test_freq=-1, print_freq=10**9)
    share = bench.end_to_end_share(Dataset.open(dataset), config, pairs=3, steps=4)
    assert 0 < share.share_of_floor < 100
