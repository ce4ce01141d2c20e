"""Gradients of several mini-batches, added up, are those of one large mini-batch."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from dlrm import train
from dlrm.config import (
    LossConfig,
    ModelConfig,
    OptimizerConfig,
    TableConfig,
    TrackingConfig,
    TrainConfig,
)
from dlrm.data.batch import Batch
from dlrm.errors import UserError
from dlrm.model.dlrm import DLRM, initialize
from dlrm.runs import Run
from dlrm.schema import DenseFeature, FeatureSchema, SparseFeature
from dlrm.training.events import logged
from dlrm.training.optimizer import Optimizer
from dlrm.training.step import EagerStep, choose_step

MODEL = ModelConfig(4, (8, 4), (8, 1))
CONFIG = TrainConfig(
    model=MODEL,
    optimizer=OptimizerConfig("sgd", 0.1, warmup_steps=7),
    mini_batch_size=96,
    print_freq=1,
    test_freq=-1,
)


def make(config: ModelConfig) -> DLRM:
    schema = FeatureSchema(
        label="label",
        dense=(DenseFeature("int_0"),),
        sparse=(SparseFeature("cat_0", 5), SparseFeature("cat_1", 30)),
        source_format="test",
        split_rule="none",
    )
    model = DLRM(schema, config)
    initialize(model, np.random.RandomState(1))
    return model


def rows(count: int, seed: int) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    return Batch(
        torch.rand(count, 1, generator=generator),
        torch.stack([torch.randint(0, n, (count,), generator=generator) for n in (5, 30)], 1),
        torch.randint(0, 2, (count,), generator=generator).float(),
    )


@pytest.mark.parametrize("rule", ["sgd", "adagrad", "rowwise_adagrad"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"embedding_dtype": "float16"},
        {"weighted_pooling": "learned"},
        {"tables": (TableConfig("cat_1", "qr"), TableConfig("cat_0", "md", md_dim=2))},
    ],
    ids=["whole", "narrow", "weighed", "qr and md"],
)
def test_parts_of_a_step_move_what_the_whole_does(
    rule: Literal["sgd", "adagrad", "rowwise_adagrad"], changes: dict[str, object]
) -> None:
    model = make(replace(MODEL, **changes))  # type: ignore[arg-type]
    other = copy.deepcopy(model)
    config, loss = OptimizerConfig(rule, 0.1), LossConfig("wbce", (0.5, 2.0))
    whole = EagerStep(model, first := Optimizer(model, config), loss)
    parts = EagerStep(other, second := Optimizer(other, config), loss, part_rows=10)
    for seed, count in enumerate((37, 10, 4)):  # the last part is shorter; one; less than one
        batch = rows(count, seed)
        assert parts(batch, 0.1).item() == pytest.approx(whole(batch, 0.1).item(), rel=1e-6)
    # A value between two of a narrow type can be rounded to the other one.
    most = 1e-3 if "embedding_dtype" in changes else 2e-6
    before, after = {**model.state_dict(), **first.state()}, other.state_dict() | second.state()
    for name, value in before.items():
        assert torch.allclose(value.float(), after[name].float(), rtol=1e-3, atol=most), name


def test_the_mean_is_over_rows_and_not_over_mini_batches() -> None:
    # By hand, with no more than torch: rows 0 … 2 and 3 together, and then a step of SGD.
    model, batch = make(MODEL), rows(4, 7)
    expected = copy.deepcopy(model)
    torch.nn.functional.binary_cross_entropy_with_logits(expected(batch), batch.labels).backward()
    weight = dict(expected.named_parameters())["over_arch.layers.0.weight"]
    assert weight.grad is not None
    moved = weight.detach() - 0.5 * weight.grad
    EagerStep(model, Optimizer(model, OptimizerConfig()), LossConfig(), part_rows=3)(batch, 0.5)
    found = dict(model.named_parameters())["over_arch.layers.0.weight"]
    assert torch.allclose(found, moved, rtol=1e-6, atol=1e-7)


def test_a_run_equals_that_of_large_mini_batches(
    dataset: Path, kernels: str, tmp_path: Path
) -> None:
    whole = train(dataset, tmp_path / "whole", replace(CONFIG, num_batches=9))
    config = replace(CONFIG, mini_batch_size=24, accumulate_batches=4, num_batches=36)
    tracked = replace(config, tracking=TrackingConfig(mlperf_logging=True))
    parts = train(dataset, tmp_path / "parts", tracked)
    assert parts.kernels == whole.kernels == kernels
    assert (parts.train_steps, parts.train_samples) == (9, 864)
    assert (whole.train_steps, whole.train_samples) == (9, 864)
    before, after = (
        load_file(tmp_path / run / "checkpoints" / "newest.safetensors")
        for run in ("whole", "parts")
    )
    for name, value in before.items():
        assert torch.allclose(value, after[name], rtol=1e-5, atol=1e-7), name
    losses = [
        [event["loss"] for event in Run.open(tmp_path / run).log() if event["event"] == "report"]
        for run in ("whole", "parts")
    ]
    assert len(losses[0]) == 9
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)
    log = (tmp_path / "parts" / "mlperf.log").read_text()
    assert '"key": "global_batch_size", "value": 96' in log
    assert '"key": "gradient_accumulation_steps", "value": 4' in log


def test_the_last_step_of_a_pass_takes_what_is_left(dataset: Path, tmp_path: Path) -> None:
    train(dataset, tmp_path, replace(CONFIG, mini_batch_size=500, accumulate_batches=3))
    (start,) = logged(tmp_path / "log.jsonl", "start")
    reports = logged(tmp_path / "log.jsonl", "report")
    assert (start["train_rows"], start["steps_per_epoch"]) == (2572, 2)  # of 1,500 and 1,072
    assert [report["position"]["step"] for report in reports] == [1, 2]


def test_a_position_is_counted_in_steps(dataset: Path, tmp_path: Path) -> None:
    train(dataset, tmp_path / "a", replace(CONFIG, max_steps=2, accumulate_batches=2))
    begun = str(tmp_path / "a" / "checkpoints" / "newest.safetensors")
    with pytest.raises(UserError, match=r"saved with steps of 192 rows.*; got 96. Use the same"):
        train(dataset, tmp_path / "b", replace(CONFIG, continue_from=begun))
    same = replace(CONFIG, mini_batch_size=192, continue_from=begun)
    assert train(dataset, tmp_path / "c", same).train_steps == 12


def test_a_part_of_a_step_is_no_limit() -> None:
    with pytest.raises(UserError, match=r"multiple of --accumulate-batches, .* got 10 and 4"):
        TrainConfig(accumulate_batches=4, num_batches=10)


def test_accumulated_gradients_keep_tables_from_updating_themselves(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from dlrm.model import fused_tables

    monkeypatch.setattr(fused_tables, "fused_tables_location", lambda device: "anywhere")
    arch = make(MODEL).sparse_arch
    found = fused_tables.supports(arch, scales_gradients=False, accumulates=True)
    assert found == (
        False,
        "tables go through plain operators, since gradients are accumulated",
    )
    model = make(replace(MODEL, dropout=0.5))
    step = choose_step(model, Optimizer(model, OptimizerConfig()), LossConfig(), part_rows=3)
    assert isinstance(step, EagerStep)
    assert step.part_rows == 3
