"""A small RUN, a server of it, and a client's view of rows."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from dlrm.config import ModelConfig, TrainConfig
from dlrm.loadtest.server import OwnServer
from dlrm.prediction import Predictor, load
from dlrm.training.begin import train


@pytest.fixture(scope="session")
def train_run(dataset: Path) -> Callable[..., Path]:
    """A function that trains a small RUN, different for each seed."""

    def make(folder: Path, seed: int = 1) -> Path:
        model = ModelConfig(
            embedding_dim=4, dense_arch_layer_sizes=(8, 4), over_arch_layer_sizes=(8, 1)
        )
        train(dataset, folder, TrainConfig(model=model, seed=seed))
        return folder

    return make


@pytest.fixture(scope="session")
def run(train_run: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small RUN; do not change it."""
    return train_run(tmp_path_factory.mktemp("served") / "run")


@pytest.fixture(scope="session")
def predictor(run: Path) -> Predictor:
    """The model of ``run``."""
    return load(run)


class Client:
    """Raw rows of test.txt, as columns.

    Attributes:
        names: Of the features, dense ones first.
        columns: By name, of all rows; None where missing.
        expected: What the model predicts.
    """

    def __init__(self, predictor: Predictor, file: Path) -> None:
        schema = predictor.schema
        self.dense = [feature.name for feature in schema.dense]
        self.sparse = [feature.name for feature in schema.sparse]
        self.names = self.dense + self.sparse
        fields = [line.split("\t") for line in file.read_text().splitlines()]
        self.columns: dict[str, list[Any]] = {}
        for place, name in enumerate(self.names):
            texts = [row[place] or None for row in fields]
            self.columns[name] = [t and int(t) for t in texts] if name in self.dense else texts
        self.expected = predictor.predict(self.columns)

    def json(self, rows: slice) -> bytes:
        """A request for some rows, in JSON."""
        inputs = []
        for name in self.names:
            data = self.columns[name][rows]
            kind = "INT32" if name in self.dense else "BYTES"
            inputs.append({"name": name, "shape": [len(data)], "datatype": kind, "data": data})
        return json.dumps({"inputs": inputs}).encode()

    def tensors(self, module: Any, rows: slice) -> list[Any]:
        """The inputs of a request, as tritonclient's modules for HTTP and gRPC make them."""
        made = []
        for name in self.names:
            data = self.columns[name][rows]
            array: npt.NDArray[Any]
            if name in self.dense:
                array = np.array([np.nan if each is None else each for each in data], np.float32)
            else:
                array = np.array([(each or "").encode() for each in data], object)
            kind = "FP32" if name in self.dense else "BYTES"
            tensor = module.InferInput(name, [len(data), 1], kind)
            tensor.set_data_from_numpy(array[:, None])
            made.append(tensor)
        return made


@pytest.fixture(scope="session")
def client(predictor: Predictor, raw_rows: Path) -> Client:
    """The rows of test.txt."""
    return Client(predictor, raw_rows / "test.txt")


@pytest.fixture(scope="session")
def server(start_server: Callable[..., Any], run: Path) -> Iterator[OwnServer]:
    """A server of ``run`` that all tests share."""
    options = ("--max-body", "256KiB", "--read-timeout", "0.5", "--idle-timeout", "1")
    with start_server(run, *options, "--max-request-rows", "400", "--access-log", "1") as started:
        yield started
