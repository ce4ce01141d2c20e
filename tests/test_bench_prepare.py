"""`dlrm bench prepare`: preparation beside polars and the disk."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dlrm import bench_prepare as module
from dlrm.bench_prepare import bench_prepare
from dlrm.cli import main, parse
from dlrm.config import BenchPrepareConfig, PrepareConfig
from dlrm.errors import EnvironmentFaultError, UserError
from dlrm.runs import family, measured_on

STAGES = {"read", "fit", "arrange", "write", "verify"}


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(module, "_CEILING_BYTES", 1 << 23)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))


def test_it_prints_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = "--rows 3000 --scale 0.0001 --rounds 1 --shuffle none --memory 1GiB --json"
    with pytest.raises(SystemExit) as ended:
        main(["bench", "prepare", *options.split()])
    assert ended.value.code == 0
    result = json.loads(capsys.readouterr().out)
    assert result["stages"].keys() == STAGES
    assert 0 < sum(result["stages"].values()) < 3000 / result["rows_per_second"]
    assert 100 < result["rows_per_second"] < 1e6
    assert 1e6 < result["disk_bytes_per_second"] < 1e12
    assert 3000 * 100 < result["source_bytes"] < 3000 * 400
    assert 3000 * 157 < result["dataset_bytes"] <= result["peak_disk_bytes"]
    assert 10 << 20 < result["peak_memory_bytes"] < 1 << 30
    assert result["config"]["prepare"]["shuffle"] == "none"
    assert list(tmp_path.iterdir()) == []


def test_memory_is_that_of_all_processes() -> None:
    """Of a shell, and of the process that it starts, which takes 64 MiB."""
    child = "import time; taken = b'1' * (64 << 20); print('taken', flush=True); time.sleep(60)"
    with subprocess.Popen(
        ["bash", "-c", '"$0" -S -c "$1" & echo $!; wait', sys.executable, child],
        stdout=subprocess.PIPE,
        start_new_session=True,
    ) as shell:
        assert shell.stdout
        started = int(shell.stdout.readline())
        assert shell.stdout.readline() == b"taken\n"
        assert family(shell.pid) == [shell.pid, started]
        assert 64 << 20 < module._memory_bytes(shell.pid) < 100 << 20
        assert 0 < module._memory_bytes(shell.pid) - module._memory_bytes(started) < 10 << 20
        os.killpg(shell.pid, signal.SIGKILL)
    assert (family(shell.pid), module._memory_bytes(shell.pid)) == ([shell.pid], 0)


def test_the_result_is_of_medians_and_maxima(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = [2.0, 8.0, 4.0]

    def prepared(source: Path, dataset: Path, config: BenchPrepareConfig) -> module._Prepared:
        assert source.stat().st_size > 0
        dataset.mkdir()
        took = seconds.pop(0)
        return module._Prepared(took, {"read": took / 2}, int(1000 * took), int(100 * took), 7)

    polars = [1.0, 2.0, 0.5]
    monkeypatch.setattr(module, "_in_own_process", prepared)
    monkeypatch.setattr(module, "_polars_seconds", lambda _: polars.pop(0))
    monkeypatch.setattr("importlib.util.find_spec", lambda _: True)
    result = bench_prepare(BenchPrepareConfig(rows=100, scale=0.0001))
    assert (result.rows_per_second, result.stages) == (25, {"read": 2})
    assert (result.peak_memory_bytes, result.peak_disk_bytes, result.dataset_bytes) == (
        8000,
        800,
        7,
    )
    assert result.polars_rows_per_second == 100
    assert result.share_of_polars == 0.25  # of 0.5, 0.25 and 0.125
    assert "0.250 of the rate of polars.read_csv\n" in result.table()
    assert f"{'from raw file to DATASET':32}{25:12,.0f}\n" in result.table()
    assert f"\n{measured_on(result.hardware, result.versions)}\n" in result.table()
    seconds = [2.0]
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    result = bench_prepare(BenchPrepareConfig(rows=100, scale=0.0001, rounds=1))
    assert (result.polars_rows_per_second, result.share_of_polars) == (None, None)
    assert "since polars is not installed" in result.table()


def test_what_is_wrong_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--rows must be at least 14"):
        BenchPrepareConfig(rows=3)
    with pytest.raises(UserError, match="--rounds must be at least 1; got 0"):
        BenchPrepareConfig(rounds=0)
    with pytest.raises(UserError, match="--memory"):
        bench_prepare(BenchPrepareConfig(memory="1MiB"))
    with pytest.raises(UserError, match=r"measures one stage, .*prepare.*got 'nothing'"):
        parse(["bench", "nothing"])
    sent: list[Any] = []
    sender: Any = type("Sender", (), {"send": lambda _, answer: sent.append(answer)})()
    module._prepare(sender, tmp_path / "none", tmp_path / "made", PrepareConfig(), "2GiB")
    with pytest.raises(UserError, match="none does not exist"):
        raise sent[0]
    # A process that ends without an answer, as one that the system kills.
    monkeypatch.setattr(module, "_prepare", os._exit)
    with pytest.raises(EnvironmentFaultError, match=r"was ended \(exit status 1\)"):
        module._in_own_process(tmp_path, tmp_path / "made", BenchPrepareConfig())
