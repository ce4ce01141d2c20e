from collections.abc import Callable
from typing import Literal

import numpy as np
import pytest
import torch

from dlrm.config import LossConfig, ModelConfig, OptimizerConfig
from dlrm.data.batch import Batch
from dlrm.errors import UserError
from dlrm.model.dlrm import DLRM, initialize
from dlrm.model.loss import mean_loss
from dlrm.schema import DenseFeature, FeatureSchema, SparseFeature
from dlrm.training.native_step import NativeStep
from dlrm.training.optimizer import Optimizer, learning_rate
from dlrm.training.step import EagerStep, Step

ROWS = (7, 2, 5)


def native_step(model: DLRM, optimizer: Optimizer, loss: LossConfig) -> NativeStep:
    return NativeStep(model, optimizer, loss, "under test")


both_steps = pytest.mark.parametrize("make_step", [EagerStep, native_step])
MakeStep = Callable[[DLRM, Optimizer, LossConfig], Step]


def make_model() -> DLRM:
    schema = FeatureSchema(
        label="label",
        dense=(DenseFeature("int_0"), DenseFeature("int_1")),
        sparse=tuple(SparseFeature(f"cat_{i}", n) for i, n in enumerate(ROWS)),
        source_format="test",
        split_rule="none",
    )
    config = ModelConfig(
        embedding_dim=4, dense_arch_layer_sizes=(6, 4), over_arch_layer_sizes=(5, 1)
    )
    model = DLRM(schema, config)
    initialize(model, np.random.RandomState(3))
    return model


def batches(count: int) -> list[Batch]:
    """Batches of 8 rows: far more rows than the smallest table has, so ids repeat."""
    generator = torch.Generator().manual_seed(5)
    made = []
    for _ in range(count):
        ids = [torch.randint(0, n, (8,), generator=generator) for n in ROWS]
        labels = torch.randint(0, 2, (8,), generator=generator).float()
        dense = torch.rand(8, 2, generator=generator)
        made.append(Batch(dense, torch.stack(ids, dim=1), labels))
    return made


def dense_gradient(model: DLRM) -> torch.Tensor:
    gradient = model.sparse_arch.arena.grad
    assert gradient is not None
    return gradient.to_dense()


@both_steps
@pytest.mark.parametrize("rule", ["sgd", "adagrad"])
def test_three_steps_equal_torch_optim_with_dense_gradients(
    rule: Literal["sgd", "adagrad"], make_step: MakeStep
) -> None:
    ours, theirs = make_model(), make_model()
    step = make_step(ours, Optimizer(ours, OptimizerConfig(optimizer=rule)), LossConfig())
    kind = {"sgd": torch.optim.SGD, "adagrad": torch.optim.Adagrad}[rule]
    # Dense copies of the tables: the specification without any sparse update.
    optimizer = kind(theirs.parameters(), lr=0.1)
    for batch in batches(3):
        assert batch.labels is not None
        loss = step(batch, 0.1)
        optimizer.zero_grad()
        expected = mean_loss(theirs(batch), batch.labels, LossConfig())
        expected.backward()
        theirs.sparse_arch.arena.grad = dense_gradient(theirs)
        optimizer.step()
        torch.testing.assert_close(loss, expected.detach(), check_dtype=False)
    for name, value in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value, rtol=1e-5, atol=1e-6)


def test_rowwise_adagrad_equals_its_formula() -> None:
    model = make_model()
    optimizer = Optimizer(model, OptimizerConfig(optimizer="rowwise_adagrad"))
    step = EagerStep(model, optimizer, LossConfig())
    arena = model.sparse_arch.arena.detach().clone()
    accumulator = torch.zeros(sum(ROWS))
    for batch in batches(3):
        step(batch, 0.05)
        gradient = dense_gradient(model)  # duplicates summed by to_dense
        accumulator += gradient.square().mean(dim=1)
        arena -= 0.05 * gradient / (accumulator.sqrt() + 1e-10).unsqueeze(1)
        torch.testing.assert_close(model.sparse_arch.arena.detach(), arena)
    stored = torch.cat(
        [
            optimizer.state()[f"sparse_arch.{name}.row_sum"]
            for name in list(model.sparse_arch.tables())
        ]
    )
    torch.testing.assert_close(stored, accumulator)


@both_steps
@pytest.mark.parametrize("rule", ["sgd", "adagrad", "rowwise_adagrad"])
def test_a_step_touches_only_the_rows_of_its_batch(
    rule: Literal["sgd", "adagrad", "rowwise_adagrad"], make_step: MakeStep
) -> None:
    model = make_model()
    before = model.sparse_arch.arena.detach().clone()
    step = make_step(model, Optimizer(model, OptimizerConfig(optimizer=rule)), LossConfig())
    batch = Batch(torch.ones(2, 2), torch.tensor([[0, 1, 4], [0, 1, 2]]), torch.tensor([0.0, 1.0]))
    step(batch, 0.1)
    changed = (model.sparse_arch.arena.detach() != before).any(dim=1).nonzero().squeeze(1)
    assert set(changed.tolist()) <= {0, 8, 11, 13}
    assert {0, 8} <= set(changed.tolist())


@both_steps
@pytest.mark.parametrize("rule", ["sgd", "adagrad", "rowwise_adagrad"])
def test_a_batch_of_empty_bags_changes_no_row(
    rule: Literal["sgd", "adagrad", "rowwise_adagrad"], make_step: MakeStep
) -> None:
    model = make_model()
    before = model.sparse_arch.arena.detach().clone()
    step = make_step(model, Optimizer(model, OptimizerConfig(optimizer=rule)), LossConfig())
    empty = torch.zeros(0, dtype=torch.int64)
    offsets = torch.zeros(7, dtype=torch.int64)
    step(Batch(torch.ones(2, 2), empty, torch.tensor([0.0, 1.0]), offsets), 0.1)
    assert torch.equal(model.sparse_arch.arena.detach(), before)


@pytest.mark.parametrize("rule", ["sgd", "adagrad", "rowwise_adagrad"])
def test_state_round_trips_into_an_equal_continuation(
    rule: Literal["sgd", "adagrad", "rowwise_adagrad"],
) -> None:
    config = OptimizerConfig(optimizer=rule)
    whole = make_model()
    first, second, third = batches(3)
    step = EagerStep(whole, Optimizer(whole, config), LossConfig())
    step(first, 0.1)
    step(second, 0.1)
    resumed = make_model()
    resumed.load_state_dict(whole.state_dict())
    optimizer = Optimizer(resumed, config)
    optimizer.load_state({name: value.clone() for name, value in step.optimizer.state().items()})
    step(third, 0.1)
    EagerStep(resumed, optimizer, LossConfig())(third, 0.1)
    for name, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value)


def test_the_state_of_another_optimizer_is_refused() -> None:
    model = make_model()
    state = Optimizer(model, OptimizerConfig(optimizer="adagrad")).state()
    with pytest.raises(UserError, match=r"does not fit rowwise_adagrad.*no such tensor"):
        Optimizer(model, OptimizerConfig(optimizer="rowwise_adagrad")).load_state(state)


def test_learning_rate_is_constant_without_a_policy() -> None:
    assert [learning_rate(OptimizerConfig(), step) for step in (1, 10, 10**9)] == [0.1] * 3


def test_learning_rate_warms_up_holds_decays_and_freezes() -> None:
    config = OptimizerConfig(learning_rate=1.0, warmup_steps=4, decay_start_step=6, decay_steps=4)
    rates = [learning_rate(config, step) for step in range(1, 14)]
    # s/4 while s < 4; held at the last warm-up rate; ((4-k)/4)² for k = 0…3; frozen.
    held = 0.75
    decayed = [1.0, 0.5625, 0.25, 0.0625]
    assert rates == [0.25, 0.5, 0.75, held, held, *decayed, *[0.0625] * 4]


def test_learning_rate_warms_up_to_the_base_without_a_decay() -> None:
    config = OptimizerConfig(learning_rate=1.0, warmup_steps=2)
    assert [learning_rate(config, step) for step in (1, 2, 3)] == [0.5, 1.0, 1.0]


def test_learning_rate_is_the_base_until_a_decay_without_warm_up() -> None:
    config = OptimizerConfig(learning_rate=0.5, decay_start_step=3, decay_steps=2)
    assert [learning_rate(config, step) for step in (1, 2, 3, 4, 5)] == [
        0.5, 0.5, 0.5, 0.125, 0.125,
    ]  # fmt: skip


def test_learning_rate_does_not_fall_below_its_minimum() -> None:
    config = OptimizerConfig(learning_rate=1e-6, decay_start_step=1, decay_steps=100)
    assert learning_rate(config, 100) == 1e-7


def test_a_decay_that_starts_within_the_warm_up_is_refused() -> None:
    with pytest.raises(UserError, match="must not start before the warm-up ends; got"):
        OptimizerConfig(warmup_steps=5, decay_start_step=4, decay_steps=1)
