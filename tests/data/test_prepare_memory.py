from __future__ import annotations

import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dlrm.config import SynthesizeConfig
from dlrm.data.dataset import Dataset
from dlrm.data.synthetic import synthesize


def held(process: int) -> int:
    """Bytes of anonymous and shared memory that a process and its children hold."""
    folder = Path("/proc") / str(process)
    try:
        status = (folder / "status").read_text()
        children = (folder / "task" / str(process) / "children").read_text().split()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    kilobytes = sum(map(int, re.findall(r"^Rss(?:Anon|Shmem):\s+([0-9]+) kB$", status, re.M)))
    return kilobytes * 1024 + sum(held(int(child)) for child in children)


@pytest.mark.long
@pytest.mark.parametrize(
    "options", [[], ["--vocabulary", "train"], ["--shuffle", "reference"], ["--shuffle", "none"]]
)
def test_memory_stays_below_its_ceiling(
    many_rows: Path, tmp_path: Path, options: list[str]
) -> None:
    dataset = tmp_path / "dataset"
    command = [sys.executable, "-m", "dlrm", "prepare", str(many_rows), str(dataset)]
    process = subprocess.Popen([*command, "--memory", "1GiB", *options], stdout=subprocess.DEVNULL)
    peak = samples = 0
    while process.poll() is None:
        peak = max(peak, held(process.pid))
        samples += 1
        time.sleep(0.05)
    assert process.returncode == 0
    assert sum(Dataset.open(dataset).manifest.days) == 3_000_000
    assert samples > 50
    assert 300 << 20 < peak < 1 << 30


@pytest.fixture(scope="module")
def many_rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("many")
    synthesize(folder, SynthesizeConfig(rows=3_000_000, test_rows=0, scale=0.5))
    return folder
