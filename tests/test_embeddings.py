from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

import dlrm
from dlrm.config import ModelConfig, PrepareConfig, TableConfig, TrainConfig
from dlrm.data.batch import Batch
from dlrm.data.prepare import prepare
from dlrm.data.vocabulary import Vocabulary
from dlrm.embeddings import count_ids, values_of, vectors_of
from dlrm.model.dlrm import DLRM, initialize
from dlrm.runs import Run
from dlrm.schema import DenseFeature, FeatureSchema, SparseFeature

MODEL = ModelConfig(embedding_dim=4, dense_arch_layer_sizes=(8, 4), over_arch_layer_sizes=(8, 1))


def test_values_that_share_a_row_are_named_by_the_commonest(raw_rows: Path, tmp_path: Path) -> None:
    prepare(raw_rows, tmp_path / "dataset", PrepareConfig(vocabulary="train", min_frequency=3))
    config = TrainConfig(model=MODEL, max_steps=1)
    dlrm.train(tmp_path / "dataset", tmp_path / "whole", config)
    dlrm.train(tmp_path / "dataset", tmp_path / "limited", replace(config, max_ind_range=4))
    run = Run.open(tmp_path / "whole")
    feature = run.schema.sparse[2]
    vocabulary = Vocabulary.read(run.path / "vocabulary" / feature.vocabulary)
    assert feature.other_id == len(vocabulary)
    ids = np.array([feature.other_id, vocabulary.ids[7]])
    assert values_of(run, 2, ids) == ["other", f"{vocabulary.values[7]:08x}"]

    limited = Run.open(tmp_path / "limited")
    for id_, value in enumerate(values_of(limited, 2, np.arange(4))):
        shared = np.flatnonzero(vocabulary.ids % 4 == id_)
        best = vocabulary.counts[shared].max()
        at = np.flatnonzero(vocabulary.values == int(value, 16))[0]
        assert (vocabulary.counts[at], vocabulary.ids[at] % 4) == (best, id_)

    prepare(raw_rows, tmp_path / "hashed", PrepareConfig(hash_buckets=50))
    dlrm.train(tmp_path / "hashed", tmp_path / "hash", config)
    assert values_of(Run.open(tmp_path / "hash"), 2, np.array([3, 1])) == ["id 3", "id 1"]


def test_ids_are_counted_in_bags_of_any_length() -> None:
    schema: Any = SimpleNamespace(
        sparse=[SimpleNamespace(num_embeddings=3), SimpleNamespace(num_embeddings=4)]
    )
    whole = Batch(torch.zeros(2, 1), torch.tensor([[0, 3], [2, 3]]), torch.tensor([1.0, 0.0]))
    # Bags: (), (1, 1) of a click; (0, 2), (3) of none; (1), () of a click.
    bags = Batch(
        torch.zeros(3, 1),
        torch.tensor([1, 1, 0, 2, 3, 1]),
        torch.tensor([1.0, 0.0, 1.0]),
        torch.tensor([0, 0, 2, 4, 5, 6, 6]),
    )
    data: Any = SimpleNamespace(batches=lambda *_, **__: iter([whole, bags]))
    (counts, clicks), (other_counts, other_clicks) = count_ids(data, schema, [0, 1])
    assert (counts.tolist(), clicks.tolist()) == ([2, 1, 2], [1, 1, 0])
    assert (other_counts.tolist(), other_clicks.tolist()) == ([0, 2, 0, 3], [0, 2, 0, 1])


def test_vectors_are_those_that_other_features_meet() -> None:
    sparse = (SparseFeature("whole", 9), SparseFeature("qr", 9), SparseFeature("md", 9))
    schema = FeatureSchema("label", (DenseFeature("d"),), sparse, "test", "none")
    tables = (TableConfig("qr", "qr", "mult", 2), TableConfig("md", "md", md_dim=2))
    model = DLRM(schema, replace(MODEL, tables=tables))
    initialize(model, np.random.RandomState(0), torch.Generator().manual_seed(0))
    ids = np.array([4, 0, 8, 4])
    with torch.no_grad():
        rows = torch.from_numpy(np.stack([ids, ids, ids], axis=1))
        expected = model.sparse_arch(rows).numpy()
        quotient, remainder = (
            table.numpy() for name, table in model.sparse_arch.tables().items() if ".t_qr" in name
        )
    for index in range(3):
        np.testing.assert_allclose(vectors_of(model, schema, index, ids), expected[:, index])
    by_hand = quotient[ids // 2] * remainder[ids % 2]
    np.testing.assert_allclose(vectors_of(model, schema, 1, ids), by_hand, rtol=1e-6)
    assert vectors_of(model, schema, 0, ids[:0]).shape == (0, 4)
