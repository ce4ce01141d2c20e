from __future__ import annotations

from pathlib import Path

import pytest

from dlrm.baselines.training import train_baseline
from dlrm.config import (
    BaselineConfig,
    ModelConfig,
    OptimizerConfig,
    PrepareConfig,
    SynthesizeConfig,
    TrainConfig,
)
from dlrm.data.prepare import prepare
from dlrm.data.synthetic import synthesize
from dlrm.report.embeddings import visualize
from dlrm.training.begin import train

CONFIG = TrainConfig(
    model=ModelConfig(
        embedding_dim=4, dense_arch_layer_sizes=(16, 4), over_arch_layer_sizes=(16, 1)
    ),
    optimizer=OptimizerConfig(optimizer="adagrad", learning_rate=0.02),
    epochs=2,
    test_freq=40,
    print_freq=10,
)


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a DATASET of made-up rows, and a DLRM and a baseline trained on it."""
    folder = tmp_path_factory.mktemp("report")
    synthesize(folder / "raw", SynthesizeConfig(rows=15_000, test_rows=0, scale=0.0005))
    prepare(folder / "raw", folder / "dataset", PrepareConfig())
    train(folder / "dataset", folder / "dlrm", CONFIG)
    train_baseline(folder / "dataset", folder / "logistic", BaselineConfig(model="logistic"))
    return folder


@pytest.fixture(scope="session")
def embeddings(runs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page about embeddings: five figures."""
    path = tmp_path_factory.mktemp("page") / "embeddings.html"
    return visualize(runs / "dlrm", path, features=["cat_2", "cat_3"], values=150)
