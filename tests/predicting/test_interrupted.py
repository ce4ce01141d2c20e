"""Predictions in processes that are killed, stopped, or whose reader goes."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

SIZES = "--embedding-dim 2 --dense-arch-layer-sizes 2 --over-arch-layer-sizes 1".split()
READ_BYTES = 120_000
"""Of some 700 KB: 6 blocks."""


@pytest.fixture(scope="module")
def warm(start_warm: Callable[..., Any], dataset: Path) -> Any:
    driver = Path(__file__).parents[1] / "training/interrupted_training.py"
    return start_warm(driver, dataset)


@pytest.fixture(scope="module")
def run(warm: Any, dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained") / "run"
    answer = warm(run=folder, command=["train", str(dataset), "--run", str(folder), *SIZES])
    assert answer.status == 0, answer.said
    return folder


@pytest.mark.parametrize(
    ("name", "but_not"),
    [
        ("out.csv", "^(?!before replace|after replace .*journal|amid write .*probabilities)"),
        pytest.param("out.csv", "^$", marks=pytest.mark.long),
        pytest.param("out.parquet", "^$", marks=pytest.mark.long),
    ],
)
def test_a_prediction_that_is_killed_at_every_step(
    warm: Any, run: Path, raw_rows: Path, tmp_path: Path, name: str, but_not: str
) -> None:
    def predict(output: Path, **request: Any) -> Any:
        words = ["predict", str(run), str(raw_rows / "train.txt"), str(output), "--overwrite"]
        return warm(run=output.parent / "run", command=words, read_bytes=READ_BYTES, **request)

    (tmp_path / "whole").mkdir()
    whole = predict(tmp_path / "whole" / name)
    assert whole.status == 0, whole.said
    killed_at = tmp_path / "killed_at"
    output = tmp_path / "cut" / name
    output.parent.mkdir()
    went_on = set()
    for _ in range(1000):
        answer = predict(output, kill_once=killed_at, but_not=but_not)
        went_on |= set(re.findall(r"going on after (\d+) rows", answer.said))
        if answer.status != -9:
            break
    assert answer.status == 0, answer.said
    assert output.read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert [path.name for path in output.parent.iterdir()] == [name]
    assert min(map(int, went_on)) < 3000
    summary = re.search(r"^\{.*^\}", whole.said, re.DOTALL | re.MULTILINE)
    assert summary
    assert summary[0] in answer.said
    assert any("journal.json" in event for event in killed_at.read_text().splitlines())


@pytest.mark.parametrize("event", ["replace out.csv", "unlink .out.csv.work/journal.json"])
def test_a_prediction_that_is_killed_when_its_output_is_there(
    warm: Any, run: Path, raw_rows: Path, tmp_path: Path, event: str
) -> None:
    """Without --overwrite, given again it says that, and nothing is left."""
    words = ["predict", str(run), str(raw_rows / "train.txt"), str(tmp_path / "out.csv")]
    request = {"run": tmp_path / "run", "command": words, "read_bytes": READ_BYTES}
    killed = warm(
        **request, kill_once=tmp_path / "killed_at", but_not=f"^(?!after {re.escape(event)}$)"
    )
    assert killed.status == -9, killed.said
    (tmp_path / "killed_at").unlink()
    assert {path.name for path in tmp_path.iterdir()} >= {"out.csv", ".out.csv.work"}
    before = (tmp_path / "out.csv").read_bytes()
    answer = warm(**request)
    said = "is written already" if event.startswith("replace") else "is there already, and is"
    assert said in answer.said
    assert answer.status == (0 if event.startswith("replace") else 2)
    assert ('"rows": 3000' in answer.said) == (answer.status == 0)
    assert [path.name for path in tmp_path.iterdir()] == ["out.csv"]
    assert (tmp_path / "out.csv").read_bytes() == before


@pytest.mark.parametrize("signal", ["SIGINT", "SIGTERM"])
def test_a_signal_keeps_what_is_scored(
    warm: Any, run: Path, raw_rows: Path, tmp_path: Path, signal: str
) -> None:
    words = ["predict", str(run), str(raw_rows / "train.txt"), str(tmp_path / "out.csv")]
    request = {"run": tmp_path / "run", "command": words, "read_bytes": READ_BYTES}
    answer = warm(**request, fault_at="before write .*labels", fault=signal)
    assert answer.status == {"SIGINT": 130, "SIGTERM": 143}[signal], answer.said
    assert f"stopped by {signal}" in answer.said
    assert "out.csv is unfinished. To go on: repeat the same command." in answer.said
    assert [path.name for path in tmp_path.iterdir()] == [".out.csv.work"]
    answer = warm(**request)
    assert answer.status == 0, answer.said
    assert re.search(r"going on after \d+ rows", answer.said)
    assert len((tmp_path / "out.csv").read_text().splitlines()) == 3001


def test_a_reader_that_goes_ends_it_quietly(
    quick_dlrm: dict[str, str], run: Path, raw_rows: Path
) -> None:
    command = f"dlrm predict {run} {raw_rows / 'train.txt'} -"
    for reader, status in (("| true", 0), ("> /dev/full", 3)):
        script = f"{command} {reader}; echo ${{PIPESTATUS[0]}}"
        ended = subprocess.run(
            ["bash", "-c", script], env=quick_dlrm, capture_output=True, text=True, check=True
        )
        assert ended.stdout == f"{status}\n", ended.stderr
        assert "Traceback" not in ended.stderr
        assert ("cannot write to standard output: No space left" in ended.stderr) == bool(status)
    script = f"head -n 9 {raw_rows / 'train.txt'} | dlrm predict {run} - - | tail -n 1"
    ended = subprocess.run(
        ["bash", "-c", script], env=quick_dlrm, capture_output=True, text=True, check=True
    )
    assert re.fullmatch(r"8,0\.\d+\n", ended.stdout)
    assert '"rows": 9' in ended.stderr
