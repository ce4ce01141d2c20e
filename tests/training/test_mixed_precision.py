from __future__ import annotations

import copy
import logging
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch

from dlrm import device
from dlrm.checkpoint import read_info
from dlrm.config import LossConfig, ModelConfig, OptimizerConfig, TrainConfig
from dlrm.data.batch import Batch
from dlrm.device import MixedPrecision
from dlrm.evaluation import evaluate
from dlrm.model.dlrm import DLRM, initialize
from dlrm.model.loss import mean_loss, probabilities
from dlrm.model.score import Scorer
from dlrm.prediction import load
from dlrm.runs import Run
from dlrm.schema import DenseFeature, FeatureSchema, SparseFeature
from dlrm.seed_table import describe
from dlrm.training.begin import train
from dlrm.training.events import Console
from dlrm.training.optimizer import Optimizer
from dlrm.training.step import EagerStep, choose_step

ROWS = (50, 3, 9)
MODEL = ModelConfig(embedding_dim=16, dense_arch_layer_sizes=(8, 16), over_arch_layer_sizes=(8, 1))
CONFIG = TrainConfig(model=MODEL, mini_batch_size=128, amp="O1")


def make_model() -> DLRM:
    schema = FeatureSchema(
        label="label",
        dense=(DenseFeature("int_0"), DenseFeature("int_1")),
        sparse=tuple(SparseFeature(f"cat_{i}", n) for i, n in enumerate(ROWS)),
        source_format="test",
        split_rule="none",
    )
    model = DLRM(schema, MODEL)
    initialize(model, np.random.RandomState(3))
    return model


def make_batch(seed: int, rows: int = 64) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    ids = [torch.randint(0, n, (rows,), generator=generator) for n in ROWS]
    labels = torch.randint(0, 2, (rows,), generator=generator).float()
    dense = torch.rand(rows, 2, generator=generator)
    return Batch(dense, torch.stack(ids, dim=1), labels)


@pytest.fixture
def scaling_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the CPU stand in for a device that needs gradient scaling."""
    scaled = {"cpu": MixedPrecision(torch.float16, scales_gradients=True)}
    monkeypatch.setattr(device, "_MIXED_PRECISION", scaled)


def test_matrices_are_multiplied_in_bfloat16_and_everything_else_stays_float32() -> None:
    model = make_model()
    seen = []
    for linear in (model.dense_arch.layers[0], model.over_arch.layers[-1]):
        linear.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    batch = make_batch(1)
    assert batch.labels is not None
    with device.autocast(torch.device("cpu"), "O1"):
        logits = model(batch)
    assert seen == [torch.bfloat16, torch.bfloat16]
    assert logits.dtype == torch.bfloat16
    loss = mean_loss(logits, batch.labels, LossConfig())
    assert loss.dtype == probabilities(logits, LossConfig()).dtype == torch.float32
    # The loss is what float32 makes of these logits: not rounded to bfloat16's 8 bits.
    expected = torch.nn.functional.binary_cross_entropy_with_logits(logits.float(), batch.labels)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert loss.item() != loss.bfloat16().item()
    EagerStep(model, Optimizer(model, OptimizerConfig()), LossConfig(), "O1")(batch, 0.1)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("rule", ["sgd", "adagrad", "rowwise_adagrad"])
def test_steps_in_bfloat16_stay_close_to_those_in_float32(
    rule: Literal["sgd", "adagrad", "rowwise_adagrad"],
) -> None:
    exact = make_model()
    mixed = copy.deepcopy(exact)
    config = OptimizerConfig(optimizer=rule)
    exact_step = EagerStep(exact, Optimizer(exact, config), LossConfig())
    mixed_step = EagerStep(mixed, Optimizer(mixed, config), LossConfig(), "O1")
    for seed in range(10):
        expected = exact_step(make_batch(seed), 0.02)
        found = mixed_step(make_batch(seed), 0.02)
        assert found.dtype == torch.float32
        assert found.item() == pytest.approx(expected.item(), rel=0.01)
        assert found.item() != expected.item()
    scorers = [Scorer(exact, LossConfig()), Scorer(mixed, LossConfig(), "O1")]
    probabilities = [scorer(make_batch(99)) for scorer in scorers]
    np.testing.assert_allclose(probabilities[1], probabilities[0], atol=0.02)


def test_scaling_leaves_gradients_as_they_are(scaling_cpu: None) -> None:
    exact, scaled = make_model(), make_model()
    exact_step = EagerStep(exact, Optimizer(exact, OptimizerConfig()), LossConfig())
    scaled_step = EagerStep(scaled, Optimizer(scaled, OptimizerConfig()), LossConfig(), "O1")
    assert scaled_step.scaler is not None
    for seed in range(3):
        exact_step(make_batch(seed), 0.1)
        scaled_step(make_batch(seed), 0.1)
    assert scaled_step.skipped_steps == 0
    for name, value in exact.state_dict().items():
        torch.testing.assert_close(scaled.state_dict()[name], value, rtol=0.01, atol=1e-3)


@pytest.mark.parametrize("rule", ["sgd", "adagrad", "rowwise_adagrad"])
def test_a_step_whose_gradient_overflows_moves_nothing_and_lowers_the_scale(
    scaling_cpu: None, rule: Literal["sgd", "adagrad", "rowwise_adagrad"]
) -> None:
    model = make_model()
    optimizer = Optimizer(model, OptimizerConfig(optimizer=rule))
    step = EagerStep(model, optimizer, LossConfig(), "O1")
    assert step.scaler is not None
    step.scaler.load_state_dict(step.scaler.state_dict() | {"scale": 2.0**40})  # above float16
    before = copy.deepcopy({**model.state_dict(), **optimizer.state()})
    loss = step(make_batch(1), 0.1)
    assert torch.isfinite(loss)
    after = {**model.state_dict(), **optimizer.state()}
    assert all(torch.equal(before[name], value) for name, value in after.items())
    assert (step.skipped_steps, step.scaler.get_scale()) == (1, 2.0**39)
    step.scaler.load_state_dict(step.scaler.state_dict() | {"scale": 1024.0})
    step(make_batch(1), 0.1)
    assert (step.skipped_steps, step.scaler.get_scale()) == (1, 1024)
    assert not torch.equal(
        before["sparse_arch." + next(iter(model.sparse_arch.tables()))],
        model.sparse_arch.split(model.sparse_arch.arena)[0],
    )


def test_o1_takes_the_plain_step_and_says_why() -> None:
    model = make_model()
    step = choose_step(model, Optimizer(model, OptimizerConfig()), LossConfig(), "O1")
    assert step.kernels == "plain"
    assert step.reason == "the native kernels compute in float32, and --amp O1 was asked for"


def test_a_run_tells_its_precision_and_is_evaluated_and_predicts_as_it_was_trained(
    dataset: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "dlrm"):
        result = train(dataset, tmp_path / "run", CONFIG, [Console()])
    assert "plain kernels: the native kernels compute in float32, and --amp O1" in caplog.text
    exact = train(dataset, tmp_path / "exact", replace(CONFIG, amp="O0"))
    assert (result.amp_type, result.kernels, result.skipped_steps) == ("O1", "plain", 0)
    assert Run.open(tmp_path / "run").result() == result
    assert "| O1       |" in describe(tmp_path / "run").splitlines()[-5]
    assert result.metrics["test"].log_loss == pytest.approx(
        exact.metrics["test"].log_loss, rel=0.01
    )
    assert evaluate(tmp_path / "run", "test").metrics == result.metrics["test"]
    in_float32 = evaluate(tmp_path / "run", "test", amp="O0").metrics
    assert in_float32 != result.metrics["test"]
    assert in_float32.log_loss == pytest.approx(result.metrics["test"].log_loss, rel=0.01)
    assert load(tmp_path / "run").config.amp == "O1"
    assert load(tmp_path / "run", amp="O0").config.amp == "O0"


def test_the_scale_is_saved_and_continued_from(
    scaling_cpu: None, dataset: Path, tmp_path: Path
) -> None:
    train(dataset, tmp_path / "whole", replace(CONFIG, epochs=2))
    result = train(dataset, tmp_path / "part", replace(CONFIG, epochs=2, max_steps=4))
    checkpoint = tmp_path / "part/checkpoints/newest.safetensors"
    scaler = read_info(checkpoint).gradient_scaler
    assert scaler is not None
    assert scaler["scale"] == 2.0 ** (16 - result.skipped_steps)
    assert scaler["_growth_tracker"] == 4 - result.skipped_steps
    rest = replace(CONFIG, epochs=2, continue_from=str(checkpoint))
    train(dataset, tmp_path / "rest", rest)
    newest = [tmp_path / run / "checkpoints/newest.safetensors" for run in ("whole", "rest")]
    assert newest[0].read_bytes() == newest[1].read_bytes()
