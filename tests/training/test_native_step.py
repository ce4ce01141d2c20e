from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np
import pytest
import torch

from dlrm.config import LossConfig, ModelConfig, OptimizerConfig, TableConfig
from dlrm.data.batch import Batch
from dlrm.model.dlrm import DLRM, initialize
from dlrm.ops.library import Library, library
from dlrm.schema import DenseFeature, FeatureSchema, SparseFeature
from dlrm.training.native_step import NativeStep
from dlrm.training.optimizer import Optimizer
from dlrm.training.step import EagerStep, choose_step

Rule = Literal["sgd", "adagrad", "rowwise_adagrad"]
RULES: tuple[Rule, ...] = ("sgd", "adagrad", "rowwise_adagrad")
TABLES = (7, 2, 500, 1)


def make_model(embedding_dim: int = 16, **changes: Any) -> DLRM:
    schema = FeatureSchema(
        label="label",
        dense=tuple(DenseFeature(f"int_{i}") for i in range(3)),
        sparse=tuple(SparseFeature(f"cat_{i}", n) for i, n in enumerate(TABLES)),
        source_format="test",
        split_rule="none",
    )
    sizes = {"dense_arch_layer_sizes": (33, embedding_dim), "over_arch_layer_sizes": (50, 17, 1)}
    model = DLRM(schema, ModelConfig(**{"embedding_dim": embedding_dim, **sizes, **changes}))
    generator = torch.Generator().manual_seed(1)
    initialize(model, np.random.RandomState(1), generator)
    with torch.no_grad():
        for name, table in model.sparse_arch.tables().items():
            table.mul_(0.1)  # so that long bags do not drown everything
            if "quotient" in name or "remainder" in name:
                table.uniform_(-0.05, 0.05, generator=generator)  # some begin as 1
    return model


def make_batch(rows: int, seed: int, *, bags: bool = False) -> Batch:
    """Ids repeat within a batch. As bags: empty ones, ones of an id, and long ones."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.ones(rows * len(TABLES), dtype=torch.int64)
    if bags:
        choices = torch.tensor([0, 1, 1, 2, 40])
        lengths = choices[torch.randint(0, 5, lengths.shape, generator=generator)]
    table = (torch.arange(len(lengths)) % len(TABLES)).repeat_interleave(lengths)
    ids = (torch.rand(len(table), generator=generator) * torch.tensor(TABLES)[table]).long()
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    return Batch(
        torch.rand(rows, 3, generator=generator),
        ids if bags else ids.view(rows, -1),
        torch.randint(0, 2, (rows,), generator=generator).float(),
        offsets if bags else None,
    )


@contextmanager
def double_precision() -> Iterator[None]:
    """Let EagerStep compute in float64, as exact as can be asked for."""
    patch = pytest.MonkeyPatch()
    patch.setattr(torch.Tensor, "float", torch.Tensor.double)
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)
        patch.undo()


def weights_and_state(model: DLRM, moved_by: Optimizer) -> dict[str, torch.Tensor]:
    return {**model.state_dict(), **moved_by.state()}


def compare_with_exact_steps(
    model: DLRM, batches: list[Batch], rule: Rule, loss: LossConfig, tolerance: float = 2e-6
) -> None:
    exact = copy.deepcopy(model).double()
    config = OptimizerConfig(optimizer=rule, learning_rate=0.05)
    moved = Optimizer(model, config)
    native = NativeStep(model, moved, loss, "under test")
    with double_precision():
        expected = Optimizer(exact, config)
        specification = EagerStep(exact, expected, loss)
    for batch in batches:
        found = native(batch, 0.05)
        assert batch.labels is not None
        with double_precision():
            doubled = Batch(
                batch.dense_features.double(),
                batch.sparse_features,
                batch.labels.double(),
                batch.offsets,
            )
            loss_before = specification(doubled, 0.05)
        assert found.item() == pytest.approx(loss_before.item(), rel=1e-5)
    found_state = weights_and_state(model, moved)
    for name, value in weights_and_state(exact, expected).items():
        is_sum = name.endswith("sum")
        least = 1e-4 * float(value.max()) if is_sum else tolerance
        close = torch.isclose(found_state[name].double(), value, rtol=1e-4, atol=least)
        # Adagrad's first steps are ± the rate whatever the gradient's size, so that rounding
        # decides where it all but cancels out.
        few = 0 if rule == "sgd" or is_sum else close.numel() // 200
        wrong = int((~close).sum())
        largest = (found_state[name] - value).abs().max()
        assert wrong <= few, f"{wrong} of {close.numel()} of {name} differ, by up to {largest}"
        assert largest <= 2 * 0.05 * len(batches)


@pytest.mark.parametrize("bags", [False, True], ids=["one id", "bags"])
@pytest.mark.parametrize("rule", RULES)
def test_steps_equal_exact_ones(rule: Rule, bags: bool) -> None:
    batches = [make_batch(100, seed, bags=bags) for seed in range(3)]
    compare_with_exact_steps(make_model(), batches, rule, LossConfig())


VARIANTS = {
    "quotient-remainder": (
        TableConfig("cat_0", "qr", "add", 3),
        TableConfig("cat_2", "qr", "mult", 7),
    ),
    "weighed": (
        TableConfig("cat_1", weighted_pooling="learned"),
        TableConfig("cat_2", weighted_pooling="learned"),
        TableConfig("cat_3", weighted_pooling="fixed"),
    ),
    "both": (
        TableConfig("cat_0", weighted_pooling="learned"),
        TableConfig("cat_2", "qr", "mult", 30),
    ),
}


@pytest.mark.parametrize("bags", [False, True], ids=["one id", "bags"])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_steps_of_variants_equal_exact_ones(variant: str, rule: Rule, bags: bool) -> None:
    model = make_model(tables=VARIANTS[variant])
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    batches = [make_batch(100, seed, bags=bags) for seed in range(3)]
    compare_with_exact_steps(model, batches, rule, LossConfig(), tolerance=1e-5)
    for name, tensor in model.state_dict().items():
        fixed = name == "sparse_arch.pooling_weights.t_cat_3"
        assert torch.equal(tensor, before[name]) == fixed, name


def test_steps_of_variants_in_several_parts_equal_exact_ones() -> None:
    for rule in RULES:
        batches = [make_batch(2049, 1), make_batch(2100, 2, bags=True), make_batch(3, 3)]
        model = make_model(tables=VARIANTS["both"])
        compare_with_exact_steps(model, batches, rule, LossConfig())


@pytest.mark.parametrize(
    "loss",
    [
        LossConfig("wbce", (0.3, 1.7)),
        LossConfig("mse"),
        LossConfig("mse", loss_threshold=0.4),
        LossConfig("bce", loss_threshold=0.4),
        LossConfig("wbce", (0.3, 1.7), 0.45),
    ],
    ids=str,
)
def test_every_loss(loss: LossConfig) -> None:
    compare_with_exact_steps(make_model(), [make_batch(64, 1), make_batch(64, 2)], "sgd", loss)


@pytest.mark.parametrize("dim", [1, 3, 17, 64, 128])
@pytest.mark.parametrize(
    "interaction", [{}, {"interaction": "cat"}, {"interaction_itself": True}], ids=str
)
def test_every_interaction_and_odd_dimensions(interaction: dict[str, Any], dim: int) -> None:
    model = make_model(dim, **interaction)
    compare_with_exact_steps(model, [make_batch(33, 1), make_batch(33, 2)], "sgd", LossConfig())


@pytest.mark.parametrize("rows", [1, 2, 15, 16, 17, 1000, 2049, 5000])
def test_odd_batch_sizes_and_batches_of_several_parts(rows: int) -> None:
    for rule in RULES:
        batches = [make_batch(rows, 1), make_batch(rows, 2, bags=True), make_batch(3, 3)]
        compare_with_exact_steps(make_model(), batches, rule, LossConfig())


def trained_bytes(rule: Rule, threads: int, tables: tuple[TableConfig, ...] = ()) -> bytes:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        model = make_model(tables=tables)
        moved = Optimizer(model, OptimizerConfig(optimizer=rule))
        native = NativeStep(model, moved, LossConfig(), "under test")
        losses = [
            native(make_batch(rows, seed, bags=bags), 0.1)
            for seed, (rows, bags) in enumerate(
                [(128, False), (300, True), (77, False), (2500, False)]
            )
        ]
    finally:
        torch.set_num_threads(before)
    tensors = [*losses, *weights_and_state(model, moved).values()]
    return b"".join(tensor.numpy().tobytes() for tensor in tensors)


@pytest.mark.parametrize("rule", RULES)
def test_the_same_bits_for_any_number_of_threads_and_from_run_to_run(rule: Rule) -> None:
    one = trained_bytes(rule, 1)
    for threads in (1, 2, 3, 8):
        assert trained_bytes(rule, threads) == one


@pytest.mark.parametrize("rule", RULES)
def test_the_same_bits_of_variants(rule: Rule) -> None:
    one = trained_bytes(rule, 1, VARIANTS["both"])
    for threads in (2, 3):
        assert trained_bytes(rule, threads, VARIANTS["both"]) == one


@pytest.fixture(params=torch.ops.dlrm.instruction_sets() if library().loaded else [])
def instruction_set(request: pytest.FixtureRequest) -> Iterator[None]:
    torch.ops.dlrm.use_instruction_set(request.param)
    yield
    torch.ops.dlrm.use_instruction_set(torch.ops.dlrm.instruction_sets()[0])


@pytest.mark.usefixtures("instruction_set")
def test_every_instruction_set() -> None:
    for interaction in ({}, {"interaction": "cat"}):
        batches = [make_batch(100, 1), make_batch(300, 2, bags=True)]
        compare_with_exact_steps(make_model(17, **interaction), batches, "adagrad", LossConfig())
    # The buffers of the rows that are there no more are used again; and there are several parts.
    batches = [make_batch(rows, rows) for rows in (30, 17, 20, 19, 2100)]
    compare_with_exact_steps(make_model(), batches, "sgd", LossConfig())


def test_a_batch_whose_bags_are_all_empty() -> None:
    batch = make_batch(20, 1)
    nothing = torch.zeros(0, dtype=torch.int64)
    offsets = torch.zeros(20 * len(TABLES) + 1, dtype=torch.int64)
    empty = Batch(batch.dense_features, nothing, batch.labels, offsets)
    for rule in RULES:
        compare_with_exact_steps(make_model(), [empty, batch, empty], rule, LossConfig())


def test_an_unknown_instruction_set_is_refused() -> None:
    with pytest.raises(RuntimeError, match="no mmx"):
        torch.ops.dlrm.use_instruction_set("mmx")


@pytest.mark.parametrize("loss", ["bce", "wbce", "mse"])
@pytest.mark.parametrize("threshold", [0, 0.3])
def test_a_diverged_model_has_a_loss_that_is_not_a_number(
    loss: Literal["bce", "wbce", "mse"], threshold: float
) -> None:
    model = make_model()
    with torch.no_grad():
        model.sparse_arch.arena.fill_(float("nan"))
    config = LossConfig(loss, loss_threshold=threshold)
    moved = Optimizer(model, OptimizerConfig())
    for step in (EagerStep(model, moved, config), NativeStep(model, moved, config, "under test")):
        assert step(make_batch(5, 1), 0.1).isnan()


def chosen(model: DLRM) -> tuple[str, str]:
    found = choose_step(model, Optimizer(model, OptimizerConfig()), LossConfig())
    return found.kernels, found.reason


def test_the_native_step_is_chosen_where_it_can_be(monkeypatch: pytest.MonkeyPatch) -> None:
    assert chosen(make_model()) == ("native", "built and loaded")
    assert chosen(make_model(dropout=0.1)) == ("plain", "the native kernels have no dropout")
    kind, reason = chosen(make_model().double())
    assert kind == "plain"
    assert reason.startswith(
        "the native kernels take float32 on a cpu; dense_arch.layers.0.weight is "
    )
    missing = Library(False, "the native kernels are not built")
    monkeypatch.setattr("dlrm.model.native.library", lambda: missing)
    assert chosen(make_model()) == ("plain", "the native kernels are not built")
