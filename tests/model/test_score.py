from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from dlrm.config import LossConfig, ModelConfig
from dlrm.data.batch import Batch
from dlrm.model import native, score
from dlrm.model.dlrm import DLRM, initialize
from dlrm.model.native import NativeForward
from dlrm.model.score import Scorer
from dlrm.ops.library import Library, library
from dlrm.schema import DenseFeature, FeatureSchema, SparseFeature

TABLES = (7, 2, 500)
SCHEMA = FeatureSchema(
    label="label",
    dense=tuple(DenseFeature(f"int_{i}") for i in range(3)),
    sparse=tuple(SparseFeature(f"cat_{i}", n) for i, n in enumerate(TABLES)),
    source_format="test",
    split_rule="none",
)


def make_model(**changes: Any) -> DLRM:
    sizes = {"dense_arch_layer_sizes": (100, 17), "over_arch_layer_sizes": (50, 1)}
    model = DLRM(SCHEMA, ModelConfig(**{"embedding_dim": 17, **sizes, **changes}))
    initialize(model, np.random.RandomState(1))
    return model


def make_batch(rows: int) -> Batch:
    generator = torch.Generator().manual_seed(1)
    ids = [torch.randint(0, n, (rows,), generator=generator) for n in TABLES]
    return Batch(torch.rand(rows, 3, generator=generator), torch.stack(ids, 1), None)


def make_bags(rows: int) -> Batch:
    batch = make_batch(rows)
    lengths = torch.arange(rows * len(TABLES)) % 3  # empty, one id, two
    table = (torch.arange(len(lengths)) % len(TABLES)).repeat_interleave(lengths)
    ids = torch.arange(len(table)) % torch.tensor(TABLES)[table]
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    return Batch(batch.dense_features, ids, None, offsets)


@pytest.mark.parametrize("rows", [1, 7, 9, 40, 600, 2048, 2049])
@pytest.mark.parametrize(
    "changes", [{}, {"interaction": "cat"}, {"interaction_itself": True}], ids=str
)
@torch.no_grad()
def test_native_logits_equal_the_models(changes: dict[str, Any], rows: int) -> None:
    model = make_model(**changes)
    for batch in (make_batch(rows), make_bags(rows)):
        torch.testing.assert_close(
            NativeForward(model).logits(batch), model(batch), rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize(
    "instructions", torch.ops.dlrm.instruction_sets() if library().loaded else []
)
@pytest.mark.parametrize("bags", [False, True])
def test_a_logit_depends_neither_on_the_other_rows_nor_on_threads(
    instructions: str, bags: bool
) -> None:
    before = torch.get_num_threads()
    torch.ops.dlrm.use_instruction_set(instructions)
    try:
        forward, batch = NativeForward(make_model()), make_bags(600) if bags else make_batch(600)
        every = forward.logits(batch)
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            assert torch.equal(forward.logits(batch), every)
            for rows in (1, 8, 9, 17, 33, 300):
                assert torch.equal(forward.logits(batch.rows(0, rows)), every[:rows])
                assert torch.equal(forward.logits(batch.rows(600 - rows, 600)), every[600 - rows :])
    finally:
        torch.set_num_threads(before)
        torch.ops.dlrm.use_instruction_set(torch.ops.dlrm.instruction_sets()[0])


def test_no_rows_have_no_logits() -> None:
    assert NativeForward(make_model()).logits(make_batch(0)).shape == (0,)


def test_scores_follow_the_weights() -> None:
    model, batch = make_model(), make_batch(5)
    scorer = Scorer(model, LossConfig())
    before = scorer(batch)
    model.load_state_dict({name: 2 * value for name, value in model.state_dict().items()})
    after = scorer(batch)
    assert not np.array_equal(before, after)
    assert np.array_equal(after, Scorer(model, LossConfig())(batch))


def test_scores_without_native_kernels_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = make_model(dropout=0.5), make_batch(300)
    model.train()  # dropout is off in scoring all the same
    loss = LossConfig(loss_threshold=0.3)
    expected = Scorer(model, loss)(batch)
    monkeypatch.setattr(native, "library", lambda: Library(False, "not built"))
    assert not score.supports(model)[0]
    np.testing.assert_allclose(Scorer(model, loss)(batch), expected, rtol=1e-5)
    assert model.training
    assert expected.min() >= np.float32(0.3)
