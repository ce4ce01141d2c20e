"""What a CUDA card computes beside what the CPU does. Skipped where there is no card."""

from __future__ import annotations

import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from dlrm.checkpoint import Position
from dlrm.config import Amp, DeviceKind, ModelConfig, OptimizerConfig, TrainConfig
from dlrm.errors import StoppedBySignalError
from dlrm.evaluation import evaluate
from dlrm.training.begin import resume, train
from dlrm.training.events import Events

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA card")

CONFIG = TrainConfig(
    model=ModelConfig(
        embedding_dim=8, dense_arch_layer_sizes=(16, 8), over_arch_layer_sizes=(16, 1)
    ),
    mini_batch_size=64,
    device="cuda",
)


class StopAt(Events):
    """Sends this process SIGTERM after a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step(self, position: Position, samples: int) -> None:
        if position.total_steps == self.step:
            signal.raise_signal(signal.SIGTERM)


def tensors(run: Path) -> dict[str, Tensor]:
    return load_file(run / "checkpoints" / "newest.safetensors")


def scores(run: Path, device: DeviceKind) -> list[float]:
    metrics = evaluate(run, "test", checkpoint="newest", device=device).metrics
    assert metrics.auc is not None
    return [metrics.auc, metrics.log_loss]


@pytest.mark.parametrize(
    "optimizer",
    [
        OptimizerConfig("sgd"),
        OptimizerConfig("adagrad", 0.01),
        OptimizerConfig("rowwise_adagrad", 0.01),
    ],
)
def test_a_training_gives_what_the_cpu_gives(
    dataset: Path, tmp_path: Path, optimizer: OptimizerConfig
) -> None:
    config = replace(CONFIG, optimizer=optimizer)
    result = train(dataset, tmp_path / "cuda", config)
    assert result.device == "cuda:0"
    assert result.kernels == "plain"
    train(dataset, tmp_path / "cpu", replace(config, device="cpu"))
    torch.testing.assert_close(
        tensors(tmp_path / "cuda"), tensors(tmp_path / "cpu"), rtol=0, atol=1e-3
    )
    # One checkpoint, scored on either.
    on_cuda = scores(tmp_path / "cuda", "cuda")
    np.testing.assert_allclose(on_cuda, scores(tmp_path / "cuda", "cpu"), atol=1e-6)


@pytest.mark.parametrize("amp", ["O0", "O1"])
def test_a_stopped_training_goes_on(dataset: Path, tmp_path: Path, amp: Amp) -> None:
    config = replace(CONFIG, amp=amp)
    train(dataset, tmp_path / "whole", config)
    with pytest.raises(StoppedBySignalError):
        train(dataset, tmp_path / "parts", config, [StopAt(20)])
    assert resume(tmp_path / "parts").train_steps > 20
    # A card adds gradients of one row in any order, so not bit for bit.
    torch.testing.assert_close(
        tensors(tmp_path / "parts"), tensors(tmp_path / "whole"), rtol=0, atol=1e-3
    )


def test_mixed_precision_learns_what_float32_learns(dataset: Path, tmp_path: Path) -> None:
    amps: tuple[Amp, ...] = ("O0", "O1")
    for amp in amps:
        train(dataset, tmp_path / amp, replace(CONFIG, amp=amp))
    full, mixed = (scores(tmp_path / amp, "cuda") for amp in amps)
    np.testing.assert_allclose(full, mixed, atol=0.01)
    assert full != mixed
