"""Exported graphs give in onnxruntime what the model gives in PyTorch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from dlrm.bundle.export import onnx_inputs
from dlrm.bundle.graph import onnx_model, write_onnx
from dlrm.config import LossConfig, ModelConfig, TableConfig
from dlrm.data.batch import Batch
from dlrm.model.dlrm import DLRM
from dlrm.model.loss import probabilities
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
    dense = random.random((rows, len(SCHEMA.dense)), np.float32)
    return Batch(*map(torch.from_numpy, (dense, ids)), None, torch.from_numpy(offsets))


def open_session(model: DLRM, path: Path, **options: Any) -> onnxruntime.InferenceSession:
    loss = options.pop("loss", LossConfig())
    inline_bytes = options.pop("inline_bytes", 1 << 20)
    write_onnx(path, onnx_model(model, loss, **options), inline_bytes=inline_bytes)
    onnx.checker.check_model(path, full_check=True)
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


def run(session: onnxruntime.InferenceSession, **inputs: np.ndarray) -> np.ndarray:
    (found,) = session.run(["probabilities"], inputs)
    return np.asarray(found)


def expected(model: DLRM, batch: Batch, loss: LossConfig | None = None) -> np.ndarray:
    with torch.no_grad():
        return probabilities(model(batch), loss or LossConfig()).numpy()


@pytest.mark.parametrize("changes", CHANGES.values(), ids=CHANGES.keys())
def test_bags_of_any_length_give_the_models_probabilities(
    changes: dict[str, Any], tmp_path: Path
) -> None:
    model = make_model(**changes)
    session = open_session(model, tmp_path / "model.onnx")
    for rows, longest in ((300, 1), (1, 5), (64, 5), (7, 0)):
        batch = make_batch(rows, longest)
        found = run(session, **onnx_inputs(batch, one_id=False))
        assert found.shape == (rows,)
        np.testing.assert_allclose(found, expected(model, batch), rtol=0, atol=1e-6)
        if longest:
            assert np.ptp(found) > 0.1 or rows == 1


@pytest.mark.parametrize("changes", CHANGES.values(), ids=CHANGES.keys())
def test_one_id_a_feature_or_none_gives_the_same(changes: dict[str, Any], tmp_path: Path) -> None:
    model = make_model(**changes)
    session = open_session(model, tmp_path / "model.onnx", one_id=True)
    for rows in (1, 200):
        batch = make_batch(rows, 1)
        inputs = onnx_inputs(batch, one_id=True)
        assert inputs["sparse_features"].shape == (rows, len(ROWS))
        np.testing.assert_allclose(run(session, **inputs), expected(model, batch), atol=1e-6)


def test_a_negative_id_counts_as_none(tmp_path: Path) -> None:
    model = make_model()
    session = open_session(model, tmp_path / "model.onnx")
    dense = np.ones((1, 3), np.float32)
    with_unknown = run(
        session,
        dense_features=dense,
        sparse_features=np.array([3, -1, 4, 2, -1, 0]),
        offsets=np.array([0, 2, 3, 3, 5, 6]),
    )
    without = run(
        session,
        dense_features=dense,
        sparse_features=np.array([3, 4, 2, 0]),
        offsets=np.array([0, 1, 2, 2, 3, 4]),
    )
    assert with_unknown == without


def test_an_id_beyond_its_table_is_refused_by_the_runtime(tmp_path: Path) -> None:
    session = open_session(make_model(), tmp_path / "model.onnx", one_id=True)
    ids = np.zeros((1, len(ROWS)), np.int64)
    ids[0, 1] = ROWS[1]
    with pytest.raises(Exception, match="out of data bounds"):
        run(session, dense_features=np.ones((1, 3), np.float32), sparse_features=ids)


def test_probabilities_are_clamped_as_in_training(tmp_path: Path) -> None:
    model, loss = make_model(), LossConfig(loss_threshold=0.4)
    batch = make_batch(200, 2)
    session = open_session(model, tmp_path / "model.onnx", loss=loss)
    found = run(session, **onnx_inputs(batch, one_id=False))
    assert (found.min(), found.max()) == (np.float32(0.4), np.float32(0.6))
    np.testing.assert_allclose(found, expected(model, batch, loss), atol=1e-6)


def test_large_weights_lie_in_a_second_file(tmp_path: Path) -> None:
    model, batch = make_model(tables=EVERY_KIND), make_batch(50, 2)
    inside, outside = tmp_path / "inside.onnx", tmp_path / "outside.onnx"
    inputs = onnx_inputs(batch, one_id=False)
    one = run(open_session(model, inside), **inputs)
    two = run(open_session(model, outside, inline_bytes=100), **inputs)
    np.testing.assert_array_equal(one, two)
    assert {path.name for path in tmp_path.iterdir()} == {
        "inside.onnx",
        "outside.onnx",
        "outside.onnx.data",
    }
    weights = {each.name: each for each in onnx.load(outside).graph.initializer}
    stored = model.state_dict()
    assert stored.keys() <= weights.keys()
    for name, values in stored.items():
        np.testing.assert_array_equal(onnx.numpy_helper.to_array(weights[name]), values)
