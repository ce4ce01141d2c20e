"""fbgemm's CPU build stands in for its CUDA build."""

from __future__ import annotations

import copy
import sys
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
import pytest
import torch

from dlrm.config import LossConfig, ModelConfig, OptimizerConfig
from dlrm.data.batch import Batch
from dlrm.device import fused_tables_location
from dlrm.model import fused_tables
from dlrm.model.dlrm import DLRM, initialize
from dlrm.schema import DenseFeature, FeatureSchema, SparseFeature
from dlrm.training import step as steps
from dlrm.training.optimizer import Optimizer
from dlrm.training.step import EagerStep, choose_step

Rule = Literal["sgd", "adagrad", "rowwise_adagrad"]
ROWS = (50, 3, 7)


def make_model(dim: int = 8, **changes: Any) -> DLRM:
    schema = FeatureSchema(
        label="label",
        dense=(DenseFeature("int_0"), DenseFeature("int_1")),
        sparse=tuple(SparseFeature(f"cat_{i}", n) for i, n in enumerate(ROWS)),
        source_format="test",
        split_rule="none",
    )
    sizes = {"dense_arch_layer_sizes": (9, dim), "over_arch_layer_sizes": (8, 1)}
    model = DLRM(schema, ModelConfig(**{"embedding_dim": dim, **sizes, **changes}))
    initialize(model, np.random.RandomState(3))
    return model


def make_batch(seed: int, *, bags: bool, rows: int = 64) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.ones(rows * len(ROWS), dtype=torch.int64)
    if bags:
        lengths = torch.randint(0, 4, lengths.shape, generator=generator)
    table = (torch.arange(len(lengths)) % len(ROWS)).repeat_interleave(lengths)
    ids = (torch.rand(len(table), generator=generator) * torch.tensor(ROWS)[table]).long()
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    return Batch(
        torch.rand(rows, 2, generator=generator),
        ids if bags else ids.view(rows, -1),
        torch.randint(0, 2, (rows,), generator=generator).float(),
        offsets if bags else None,
    )


@pytest.fixture
def on_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take the CPU for a device whose tables go through fbgemm, and has no native kernels."""
    try:
        fused_tables._import()
    except (ImportError, OSError) as error:
        pytest.skip(f"fbgemm_gpu does not fit this torch: {error}")
    monkeypatch.setattr(fused_tables, "fused_tables_location", lambda device: "HOST")
    monkeypatch.setattr(steps, "supports", lambda model, amp: (False, "a stand-in for CUDA"))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.usefixtures("on_host")
@pytest.mark.parametrize("bags", [False, True], ids=["one id", "bags"])
@pytest.mark.parametrize("rule", ["sgd", "adagrad", "rowwise_adagrad"])
def test_fused_tables_equal_plain_operators(rule: Rule, bags: bool) -> None:
    plain = make_model()
    fused = copy.deepcopy(plain)
    config = OptimizerConfig(optimizer=rule)
    expected = Optimizer(plain, config)
    moved = Optimizer(fused, config)
    plain_step = EagerStep(plain, expected, LossConfig())
    fused_step = choose_step(fused, moved, LossConfig())
    assert fused.sparse_arch.fused is not None
    batch = make_batch(0, bags=bags)
    torch.testing.assert_close(
        fused.sparse_arch(batch.sparse_features, batch.offsets),
        plain.sparse_arch(batch.sparse_features, batch.offsets),
    )
    for seed, rate in ((1, 0.1), (2, 0.03), (3, 0.1)):  # the rate changes
        batch = make_batch(seed, bags=bags)
        torch.testing.assert_close(fused_step(batch, rate), plain_step(batch, rate))
    for name, value in {**plain.state_dict(), **expected.state()}.items():
        found = {**fused.state_dict(), **moved.state()}[name]
        torch.testing.assert_close(found, value, rtol=1e-5, atol=1e-6)
    assert not torch.equal(plain.sparse_arch.arena, make_model().sparse_arch.arena)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.usefixtures("on_host")
def test_what_fbgemm_is_not_used_for_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    tables = make_model().sparse_arch
    assert fused_tables.supports(tables, scales_gradients=False) == (
        True,
        "tables go through fbgemm",
    )
    supported, why = fused_tables.supports(tables, scales_gradients=True)
    assert (supported, "since gradients are scaled" in why) == (False, True)
    for model in (make_model(6), make_model(embedding_dtype="bfloat16")):
        supported, why = fused_tables.supports(model.sparse_arch, scales_gradients=False)
        assert not supported
        arena = model.sparse_arch.arena
        assert f"and these are {arena.dtype} of {arena.shape[1]}" in why
    monkeypatch.setitem(sys.modules, "fbgemm_gpu.split_embedding_configs", None)
    supported, why = fused_tables.supports(tables, scales_gradients=False)
    assert (supported, "fbgemm_gpu cannot be imported" in why) == (False, True)


def test_only_cuda_keeps_tables_in_fbgemm() -> None:
    locations = [
        fused_tables_location(SimpleNamespace(type=kind))  # type: ignore[arg-type]
        for kind in ("cpu", "cuda", "npu")
    ]
    assert locations == [None, "DEVICE", None]
    assert fused_tables.supports(make_model().sparse_arch, scales_gradients=False) == (
        False,
        "tables on cpu go through plain operators",
    )
