"""A small RUN, a server of it, and a client's view of rows."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt
import pytest

from dlrm.config import ModelConfig, TrainConfig
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


class Server:
    """A process of ``dlrm serve``.

    Attributes:
        http: Host and port.
        grpc: Host and port.
    """

    def __init__(self, process: subprocess.Popen[str], log: Path) -> None:
        self.process = process
        self._log = log
        assert process.stdout
        line = process.stdout.readline()
        assert line, self.log()
        addresses = json.loads(line)
        self.url = addresses["http"]
        self.http = addresses["http"].removeprefix("http://")
        self.grpc = addresses.get("grpc", "")

    def log(self) -> str:
        """What it has written on standard error."""
        return self._log.read_text()

    def wait_for(self, text: str, times: int = 1) -> None:
        """Wait until it has written something."""
        end = time.monotonic() + 30
        while self.log().count(text) < times:
            assert time.monotonic() < end, self.log()
            time.sleep(0.02)


StartServer = Callable[..., AbstractContextManager[Server]]


@pytest.fixture(scope="session")
def start_server(
    quick_dlrm: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> StartServer:
    """A function that starts ``dlrm serve MODEL OPTIONS…`` on free ports, for a with statement."""

    @contextlib.contextmanager
    def start(model: Path, *options: str) -> Iterator[Server]:
        log = tmp_path_factory.mktemp("serve") / "log"
        command = ["dlrm", "serve", str(model), "--port", "0", "--grpc-port", "0", *options]
        if "--drain-seconds" not in options:
            command += ["--drain-seconds", "0"]
        with open(log, "w") as file:
            process = _start(command, quick_dlrm, file)
        try:
            yield Server(process, log)
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                raise
            finally:
                assert process.stdout
                process.stdout.close()

    return start


def _start(
    command: list[str], environment: dict[str, str], errors: IO[str]
) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True
    )


@pytest.fixture(scope="session")
def server(start_server: StartServer, run: Path) -> Iterator[Server]:
    """A server of ``run`` that all tests share."""
    options = ("--max-body", "256KiB", "--read-timeout", "0.5", "--idle-timeout", "1")
    with start_server(run, *options, "--max-request-rows", "400", "--access-log", "1") as started:
        yield started
