"""Small models of every kind, and rows for them, that several test files share."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from dlrm.config import ModelConfig, TableConfig
from dlrm.data.batch import Batch
from dlrm.model.dlrm import DLRM
from dlrm.schema import DenseFeature, FeatureSchema, SparseFeature

ROWS = (50, 7, 30, 3, 11)
SCHEMA = FeatureSchema(
    label="label",
    dense=tuple(DenseFeature(f"int_{i}") for i in range(3)),
    sparse=tuple(SparseFeature(f"cat_{i}", rows) for i, rows in enumerate(ROWS)),
    source_format="generated",
    split_rule="",
)
EVERY_KIND = (
    TableConfig("cat_0", "qr", "mult", 4),
    TableConfig("cat_1", "md", md_dim=3, weighted_pooling="learned"),
    TableConfig("cat_2", "qr", "concat", 7),
    TableConfig("cat_3", weighted_pooling="fixed"),
    TableConfig("cat_4", "qr", "add", 5),
)
CHANGES: dict[str, dict[str, Any]] = {
    "dot": {},
    "itself": {"interaction_itself": True},
    "cat": {"interaction": "cat"},
    "float16": {"embedding_dtype": "float16"},
    "bfloat16": {"embedding_dtype": "bfloat16"},
    "qr mult": {"embedding_variant": "qr", "qr_threshold": 10, "qr_operation": "mult"},
    "qr add": {"embedding_variant": "qr", "qr_threshold": 10, "qr_operation": "add"},
    "qr concat": {"embedding_variant": "qr", "qr_threshold": 10, "qr_operation": "concat"},
    "md": {"embedding_variant": "md", "md_threshold": 10},
    "fixed": {"weighted_pooling": "fixed"},
    "learned": {"weighted_pooling": "learned", "embedding_dtype": "float16"},
    "every kind": {"tables": EVERY_KIND},
    "every kind, cat": {"tables": EVERY_KIND, "interaction": "cat"},
}
"""Options of ``ModelConfig``, by name."""


def make_model(**changes: Any) -> DLRM:
    """A model with random weights, none of which is what it is initialized with."""
    sizes = {"dense_arch_layer_sizes": (8, 6), "over_arch_layer_sizes": (8, 1)}
    model = DLRM(SCHEMA, ModelConfig(embedding_dim=6, **sizes, **changes))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for values in model.state_dict().values():
            values.copy_(torch.randn(values.shape, generator=generator) / 2)
    return model.eval()


def make_batch(rows: int, longest: int) -> Batch:
    """Random rows, whose bags have 0 … longest ids."""
    random = np.random.default_rng(rows)
    lengths = random.integers(longest + 1, size=(rows, len(ROWS)))
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    ids = random.integers(np.repeat(np.tile(ROWS, rows), lengths.ravel()))
    return Batch(make_dense(rows), torch.from_numpy(ids), None, torch.from_numpy(offsets))


def make_one_id_batch(rows: int) -> Batch:
    """Random rows with one id a feature, without offsets."""
    ids = np.random.default_rng(rows).integers(ROWS, size=(rows, len(ROWS)))
    return Batch(make_dense(rows), torch.from_numpy(ids), None)


def make_dense(rows: int) -> torch.Tensor:
    """Random dense features, as after a transform."""
    random = np.random.default_rng(rows + 1)
    return torch.from_numpy(random.random((rows, len(SCHEMA.dense)), np.float32))
