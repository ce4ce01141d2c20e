"""Options and fixtures of all tests."""

from __future__ import annotations

import json
import logging
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from dlrm.loadtest.server import OwnServer

    StartServer = Callable[..., AbstractContextManager[OwnServer]]

# Before anything imports torch: the reference's golden figures were computed with MKL's AVX2 code.
# That for AVX-512 rounds otherwise, and Adagrad makes whole steps of gradients that are nothing but
# rounding errors: its losses then differ by a per cent after some tens of steps.
os.environ.setdefault("MKL_ENABLE_INSTRUCTIONS", "AVX2")

# Where a logger of its has a handler, as all have in a test, torch.export writes a log of each step
# that takes longer than the rest.
logging.getLogger("torch.__trace").propagate = False


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--long", action="store_true", help="also run the tests that are marked as long"
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--long"):
        skip = pytest.mark.skip(reason="long; selected by --long")
        for item in items:
            if "long" in item.keywords:
                item.add_marker(skip)


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the working tree."""
    return Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """A folder with golden/ (the reference's own results) and criteo/ (real rows)."""
    folder = os.environ.get("DLRM_TEST_DATA", "")
    if not folder:
        pytest.skip("DLRM_TEST_DATA does not name a folder with golden/ and criteo/")
    return Path(folder)


@pytest.fixture(scope="session")
def raw_rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with made-up train.txt and test.txt in the Criteo Kaggle format."""
    from dlrm.config import SynthesizeConfig
    from dlrm.data.synthetic import synthesize

    folder = tmp_path_factory.mktemp("raw")
    synthesize(folder, SynthesizeConfig(rows=3000, test_rows=300, scale=0.0001))
    return folder


@pytest.fixture(scope="session")
def dataset(raw_rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The DATASET of ``raw_rows``; do not change it."""
    from dlrm.config import PrepareConfig
    from dlrm.data.prepare import prepare

    folder = tmp_path_factory.mktemp("prepared") / "dataset"
    prepare(raw_rows, folder, PrepareConfig())
    return folder


@pytest.fixture(scope="session")
def small_bundle(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BUNDLE of a small model of ``dataset``, which takes raw rows; do not change it."""
    from dlrm.bundle.export import export
    from dlrm.config import ModelConfig, OptimizerConfig, TrainConfig
    from dlrm.training.begin import train

    folder = tmp_path_factory.mktemp("small")
    sizes = {"dense_arch_layer_sizes": (16, 4), "over_arch_layer_sizes": (16, 1)}
    config = TrainConfig(
        model=ModelConfig(embedding_dim=4, **sizes),
        optimizer=OptimizerConfig("adagrad", 0.02),
        test_freq=-1,
    )
    train(dataset, folder / "run", config)
    export(folder / "run", folder / "bundle", format="onnx")  # which is quicker than torch
    return folder / "bundle"


@pytest.fixture(scope="session")
def start_server(quick_dlrm: dict[str, str]) -> StartServer:
    """A function that starts ``dlrm serve MODEL OPTIONS…`` on free ports, for a with statement."""
    from dlrm.loadtest.server import own_server

    def start(model: Path, *options: str) -> AbstractContextManager[OwnServer]:
        # Those that are given come later, and so count.
        words = shlex.join(["--drain-seconds", "0", *options])
        return own_server(model, options=words, program=("dlrm",), environment=quick_dlrm)

    return start


@pytest.fixture(scope="session")
def served(start_server: StartServer, small_bundle: Path) -> Iterator[OwnServer]:
    """A server of ``small_bundle``, which takes fewer rows than the page asks for at a time."""
    with start_server(small_bundle, "--max-request-rows", "30") as server:
        yield server


# Not of the session: while Playwright drives one, its event loop counts as the thread's.
@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    """A browser, driven by Playwright.

    Tests with it are skipped where there is none; with DLRM_TEST_BROWSER=required, as in continuous
    integration, they fail.
    """
    playwright = pytest.importorskip("playwright.sync_api")
    program = shutil.which("chromium") or shutil.which("google-chrome")
    if program is None:
        message = "there is no Chromium: apt-get install chromium"
        if os.environ.get("DLRM_TEST_BROWSER") == "required":
            pytest.fail(message)
        pytest.skip(message)
    with playwright.sync_playwright() as driver:
        # In a container Chromium's own sandbox often cannot be made; the pages are ours.
        browser = driver.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield browser
        browser.close()


@dataclass(frozen=True)
class Answer:
    """How what a warm process was asked for ended."""

    status: int
    """As of the command; -9: killed."""
    said: str
    """On standard output and error."""


class Warm:
    """Answers requests in forks of one warm process.

    Args:
        driver: The script of that process (``data/interrupted.py`` or what is made of it).
        arguments: Of the script.
    """

    def __init__(self, driver: Path, *arguments: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, driver, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __call__(self, **request: Any) -> Answer:
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write(json.dumps(request, default=str) + "\n")
        self._process.stdin.flush()
        return Answer(**json.loads(self._process.stdout.readline()))

    def close(self) -> None:
        self._process.communicate(timeout=60)


@pytest.fixture(scope="session")
def start_warm() -> Iterator[Callable[..., Warm]]:
    """A function that starts a warm process, one of a kind, which ends with the tests."""
    started: dict[tuple[Path, ...], Warm] = {}

    def start(driver: Path, *arguments: Path) -> Warm:
        kind = (driver, *arguments)
        if kind not in started:
            started[kind] = Warm(*kind)
        return started[kind]

    yield start
    for each in started.values():
        each.close()


@pytest.fixture(scope="session")
def quick_dlrm(
    repository: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, str]]:
    """Variables under which ``dlrm`` is quick to start and its threads do not wait busily."""
    folder = tmp_path_factory.mktemp("bin")
    path, program = folder / "socket", repository / "tests" / "warm_dlrm.py"
    variables = os.environ | {
        "PATH": f"{folder}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",  # two of them may run at a time
        "OMP_WAIT_POLICY": "passive",
    }
    command = shlex.join([sys.executable, "-S", "-E", str(program), "call", str(path)])
    (folder / "dlrm").write_text(f'#!/bin/sh\nexec {command} "$@"\n')
    (folder / "dlrm").chmod(0o755)
    server = subprocess.Popen([sys.executable, program, "serve", path], env=variables)
    try:
        while not path.exists():
            assert server.poll() is None
            time.sleep(0.05)
        yield variables
    finally:
        server.terminate()
        server.wait()


@pytest.fixture(params=["native", "plain"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Train with this kind of step, whatever would be chosen."""
    from dlrm.training import trainer
    from dlrm.training.step import EagerStep

    if request.param == "plain":
        monkeypatch.setattr(trainer, "choose_step", EagerStep)
    return str(request.param)
