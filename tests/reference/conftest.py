"""Small data that the reference's flags are run on."""

from __future__ import annotations

from pathlib import Path

import pytest

from dlrm import reference
from dlrm.config import SynthesizeConfig
from dlrm.data.synthetic import synthesize

SMALL = (
    "--arch-sparse-feature-size=4 --arch-mlp-bot=13-8-4 --arch-mlp-top=8-1 "
    "--data-generation=dataset --data-randomize=none --loss-function=bce "
    "--mini-batch-size=100 --test-mini-batch-size=64 --learning-rate=0.05"
).split()


@pytest.fixture(scope="session")
def clicks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A train.txt of 2,100 rows: 18 steps of 100 and 150 rows of test."""
    folder = tmp_path_factory.mktemp("clicks") / "data"
    synthesize(folder, SynthesizeConfig(rows=2100, test_rows=0, scale=0.0001))
    return folder / "train.txt"


class Runner:
    """Runs the reference's flags on the small data, and keeps what was printed."""

    def __init__(self, clicks: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder = folder
        self._data = [
            f"--raw-data-file={clicks}",
            f"--processed-data-file={folder / 'processed.npz'}",
        ]
        self._capsys = capsys
        self._runs = 0

    def __call__(self, *flags: str) -> list[str]:
        """Run, and return the lines on standard output."""
        self._runs += 1
        run = f"--run={self.run_path}"
        self._capsys.readouterr()
        reference.main([*SMALL, *self._data, run, *flags])
        return self._capsys.readouterr().out.splitlines()

    @property
    def run_path(self) -> Path:
        """The RUN of the newest run."""
        return self.folder / f"run-{self._runs}"


@pytest.fixture
def run(clicks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Runner:
    return Runner(clicks, tmp_path, capsys)
