"""Embedding tables in bfloat16 and float16."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from safetensors import safe_open

from dlrm.config import LossConfig, ModelConfig, OptimizerConfig, TrainConfig
from dlrm.data.batch import Batch
from dlrm.errors import UserError
from dlrm.evaluation import evaluate
from dlrm.model.dlrm import DLRM, initialize
from dlrm.schema import DenseFeature, FeatureSchema, SparseFeature
from dlrm.training.begin import train
from dlrm.training.optimizer import Optimizer
from dlrm.training.step import EagerStep, choose_step

Rule = Literal["sgd", "adagrad", "rowwise_adagrad"]
ROWS = (50, 3, 7)
MODEL = ModelConfig(embedding_dim=16, dense_arch_layer_sizes=(8, 16), over_arch_layer_sizes=(8, 1))
CONFIG = TrainConfig(model=replace(MODEL, embedding_dtype="bfloat16"), mini_batch_size=128)

narrow = pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
every_rule = pytest.mark.parametrize("rule", ["sgd", "adagrad", "rowwise_adagrad"])


def make_model(dtype: Any) -> DLRM:
    schema = FeatureSchema(
        label="label",
        dense=(DenseFeature("int_0"), DenseFeature("int_1")),
        sparse=tuple(SparseFeature(f"cat_{i}", n) for i, n in enumerate(ROWS)),
        source_format="test",
        split_rule="none",
    )
    model = DLRM(schema, replace(MODEL, embedding_dtype=dtype))
    initialize(model, np.random.RandomState(3))
    return model


def make_batch(seed: int, rows: int = 64, *, bags: bool = False) -> Batch:
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


@narrow
def test_tables_take_half_the_memory(dtype: str) -> None:
    assert (
        make_model(dtype).sparse_arch.arena.nbytes * 2
        == make_model("float32").sparse_arch.arena.nbytes
    )


@narrow
@pytest.mark.parametrize("bags", [False, True], ids=["one id", "bags"])
def test_forward_and_gradients_equal_those_of_float32_tables_with_the_same_values(
    dtype: str, bags: bool
) -> None:
    model, wide = make_model(dtype), make_model("float32")
    with torch.no_grad():
        wide.sparse_arch.arena.copy_(model.sparse_arch.arena)
    batch = make_batch(1, bags=bags)
    logits, expected = model(batch), wide(batch)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, expected)
    logits.square().sum().backward()
    expected.square().sum().backward()
    gradients = []
    for each in (model, wide):
        found = each.sparse_arch.gradient()
        assert found is not None
        rows, values = found
        assert values.dtype == torch.float32
        gradients.append(torch.zeros(sum(ROWS), 16).index_add(0, rows, values))
    torch.testing.assert_close(gradients[0], gradients[1])
    with torch.no_grad():
        torch.testing.assert_close(model(batch), wide(batch))
    nothing = Batch(torch.rand(2, 2), torch.zeros(0).long(), None, torch.zeros(7).long())
    torch.testing.assert_close(model(nothing), wide(nothing))


@narrow
@every_rule
@pytest.mark.parametrize("bags", [False, True], ids=["one id", "bags"])
def test_an_updated_value_is_a_neighbour_of_the_exact_one(
    dtype: str, rule: Rule, bags: bool
) -> None:
    model, wide = make_model(dtype), make_model("float32")
    with torch.no_grad():
        wide.sparse_arch.arena.copy_(model.sparse_arch.arena)
    config = OptimizerConfig(optimizer=rule)
    optimizers = [Optimizer(each, config) for each in (model, wide)]
    for each, optimizer in zip((model, wide), optimizers, strict=True):
        EagerStep(each, optimizer, LossConfig())(make_batch(2, bags=bags), 0.05)
    exact = wide.sparse_arch.arena.detach()
    found = model.sparse_arch.arena.float()
    spacing = {"bfloat16": 2.0**-7, "float16": 2.0**-10}[dtype]
    assert ((found - exact).abs() <= exact.abs() * spacing + 2.0**-24).all()
    assert (found != exact.to(model.sparse_arch.arena.dtype)).any()  # not simply the nearest
    for name, state in optimizers[1].state().items():
        assert optimizers[0].state()[name].dtype == torch.float32
        torch.testing.assert_close(optimizers[0].state()[name], state)


@narrow
def test_small_updates_survive_on_average_where_rounding_to_nearest_loses_them(dtype: str) -> None:
    model = make_model(dtype)
    arena = model.sparse_arch.arena
    with torch.no_grad():
        arena.fill_(1)
    change = {"bfloat16": 1e-4, "float16": 1e-5}[dtype]
    nearest = torch.ones((), dtype=arena.dtype)
    assert (nearest.float() - change).to(arena.dtype) == nearest  # so it would never move
    optimizer = Optimizer(model, OptimizerConfig(), seed=5)
    every_id = torch.arange(50).unsqueeze(1) % torch.tensor(ROWS)
    counts = torch.bincount((every_id + model.sparse_arch.first_rows).flatten())
    steps = 1000
    for _ in range(steps):
        optimizer.begin_step(change)
        vectors = model.sparse_arch(every_id)
        vectors.sum().backward()
        optimizer.step(change)
    expected = 1 - steps * change * counts.float()
    table = slice(0, ROWS[0])  # each row once a step
    assert (counts[table] == 1).all()
    moved = arena[table].float()
    mean, deviation = moved.mean().item(), moved.std().item() / moved.numel() ** 0.5
    assert deviation > 0
    assert abs(mean - expected[0].item()) < 4 * deviation
    assert mean < 1 - 0.8 * steps * change


def test_rounding_follows_the_seed_and_the_step_and_not_the_threads() -> None:
    def trained(seed: int, steps: int, threads: int) -> torch.Tensor:
        model = make_model("bfloat16")
        optimizer = Optimizer(model, OptimizerConfig(), seed)
        optimizer.steps = steps
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            optimizer.begin_step(0.01)
            batch = make_batch(4, rows=3000)
            vectors = model.sparse_arch(batch.sparse_features)
            (
                vectors * torch.linspace(0, 0.01, vectors.numel()).view(vectors.shape)
            ).sum().backward()
            optimizer.step(0.01)
        finally:
            torch.set_num_threads(before)
        return model.sparse_arch.arena.detach().view(torch.int16)

    first = trained(1, 0, 1)
    assert torch.equal(trained(1, 0, 2), first)
    assert not torch.equal(trained(2, 0, 1), first)
    assert not torch.equal(trained(1, 1, 1), first)


@narrow
def test_the_native_step_refuses_narrow_tables_by_name(dtype: str) -> None:
    model = make_model(dtype)
    step = choose_step(model, Optimizer(model, OptimizerConfig()), LossConfig())
    assert step.kernels == "plain"
    assert f"sparse_arch.arena is torch.{dtype}" in step.reason


@every_rule
def test_runs_repeat_continue_and_are_stored_as_they_are(
    dataset: Path, tmp_path: Path, rule: Rule
) -> None:
    options = {"mini_batch_size": 256, "epochs": 2, "amp": "O1"}
    config = replace(CONFIG, optimizer=OptimizerConfig(rule, 0.05), **options)
    result = train(dataset, tmp_path / "whole", config)
    train(dataset, tmp_path / "again", config)
    train(dataset, tmp_path / "part", replace(config, max_steps=7))
    newest = "checkpoints/newest.safetensors"
    rest = replace(config, continue_from=str(tmp_path / "part" / newest))
    train(dataset, tmp_path / "rest", rest)
    whole = (tmp_path / "whole" / newest).read_bytes()
    assert (tmp_path / "again" / newest).read_bytes() == whole
    assert (tmp_path / "rest" / newest).read_bytes() == whole
    with safe_open(tmp_path / "whole" / newest, framework="pt") as file:
        dtypes = {name: file.get_slice(name).get_dtype() for name in file.keys() if "model" in name}
    assert {d for name, d in dtypes.items() if "embedding" in name} == {"BF16"}
    assert {d for name, d in dtypes.items() if "embedding" not in name} == {"F32"}
    assert evaluate(tmp_path / "whole", "test").metrics == result.metrics["test"]


@narrow
def test_a_trained_model_is_about_as_good(dataset: Path, tmp_path: Path, dtype: Any) -> None:
    model = replace(MODEL, embedding_dtype=dtype)
    result = train(dataset, tmp_path / "narrow", replace(CONFIG, model=model))
    exact = train(dataset, tmp_path / "exact", replace(CONFIG, model=MODEL))
    assert result.metrics["test"].log_loss == pytest.approx(
        exact.metrics["test"].log_loss, rel=0.005
    )


def test_a_checkpoint_of_another_type_is_refused_by_name(dataset: Path, tmp_path: Path) -> None:
    train(dataset, tmp_path / "run", CONFIG)
    config = replace(
        CONFIG,
        model=MODEL,
        epochs=2,
        continue_from=str(tmp_path / "run/checkpoints/newest.safetensors"),
    )
    with pytest.raises(
        UserError,
        match=r"embedding_bags\.t_\w+\.weight is expected to be stored as F32, got BF16.*"
        "--embedding-dtype",
    ):
        train(dataset, tmp_path / "other", config)
