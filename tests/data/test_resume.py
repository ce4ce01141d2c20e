"""Preparation that is killed, stopped or fails, and goes on (``interrupted.py`` beside this)."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dlrm.data.dataset import Dataset
from dlrm.data.verification import verify

DRIVER = Path(__file__).parent / "interrupted.py"
KILLED = -9


@dataclass(frozen=True)
class Answer:
    status: int
    said: str


class Warm:
    """Prepares in forks of one warm process."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(DRIVER)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def __call__(self, **request: Any) -> Answer:
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write(json.dumps(request, default=str) + "\n")
        self._process.stdin.flush()
        return Answer(**json.loads(self._process.stdout.readline()))

    def close(self) -> None:
        self._process.communicate(timeout=60)


@pytest.fixture(scope="module")
def warm() -> Iterator[Warm]:
    process = Warm()
    yield process
    process.close()


def lines_of_equal_length(rows: int, seed: int = 0) -> bytes:
    generator = np.random.default_rng(seed)
    lines = []
    for _ in range(rows):
        integers = [b"%d" % generator.integers(10, 100) for _ in range(13)]
        ids = [b"%08x" % (generator.integers(1, 20) << 25) for _ in range(26)]
        lines.append(b"\t".join([b"%d" % generator.integers(2), *integers, *ids]) + b"\n")
    assert len(set(map(len, lines))) == 1
    return b"".join(lines)


# Blocks of 7 rows and segments of 4 blocks. The last line lacks its end, and a segment ends with
# it, so that another one without rows follows.
ROWS = 56
SMALL: dict[str, Any] = {
    "read_bytes": 2000,
    "segment_rows": 28,
    "block_bytes": 1500,
    "part_bytes": 3000,
    "cores": 1,
}
# A generation for each segment, and a range for few values.
NARROW = {"table_bytes": 1, "fit_bytes": 64 * 4}
Config = dict[str, Any]
EVERYTHING: Config = {"vocabulary": "train", "min_frequency": 2, "data_sub_sample_rate": 0.3}
HASHED: Config = {"hash_buckets": 50, "shuffle": "none"}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("source") / "train.txt"
    path.write_bytes(lines_of_equal_length(ROWS)[:-1])
    return path


def tree(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def left_beside(dataset: Path) -> list[str]:
    """What else lies in the folder of a DATASET, but for a lock file without a holder."""
    names = {path.name for path in dataset.parent.iterdir()}
    return sorted(names - {dataset.name, f".{dataset.name}.lock"})


def made(warm: Warm, **request: Any) -> dict[str, bytes]:
    """A DATASET that is made without interruption."""
    answer = warm(**request)
    assert answer.status == 0, answer.said
    dataset = Path(request["dataset"])
    verify(Dataset.open(dataset))
    assert left_beside(dataset) == []
    return tree(dataset)


def assert_nothing_else_looks_finished(dataset: Path, finished: list[dict[str, bytes]]) -> None:
    if dataset.exists():
        assert tree(dataset) in finished


def without_times(files: dict[str, bytes]) -> dict[str, bytes]:
    """A DATASET but for when what came through a pipe was written."""
    manifest = re.sub(rb'"mtime_ns": [0-9]+', b"", files["manifest.json"])
    return files | {"manifest.json": manifest}


# Of the features, whose files are written and removed alike, but one; and none of the points after
# something was done that are the points before what comes next.
REPEATED = (
    r"(cat_|map-0|fitted-0|generation-0)(0?[1-9]|[12][0-9])\b|^after (mkdir|write|fsync|unlink)"
)
NONE = "$^"


@pytest.mark.parametrize(
    ("config", "sizes", "but_not"),
    [
        pytest.param(EVERYTHING, NARROW, REPEATED, id="everything"),
        pytest.param(EVERYTHING, NARROW, NONE, id="everything, everywhere", marks=pytest.mark.long),
        pytest.param(HASHED, {"piped": True}, REPEATED, id="from a pipe"),
        pytest.param(HASHED, {"piped": True}, NONE, id="pipe, everywhere", marks=pytest.mark.long),
    ],
)
def test_killed_at_every_write_flush_rename_and_removal(
    warm: Warm,
    source: Path,
    tmp_path: Path,
    config: Config,
    sizes: dict[str, int],
    but_not: str,
) -> None:
    """Each process is killed at the first point at which none before it was."""
    for name in ("there", "here"):
        (tmp_path / name).mkdir()
    request = {**SMALL, **sizes, "config": config, "source": source}
    if piped := "piped" in sizes:
        request |= {"source": "-", "stdin": source}
    content = without_times if piped else dict
    expected = content(made(warm, **request, dataset=tmp_path / "there" / "dataset"))
    killed_at = tmp_path / "killed"
    dataset = tmp_path / "here" / "dataset"
    for _ in range(2000):
        answer = warm(**request, dataset=dataset, kill_once=killed_at, but_not=but_not)
        if answer.status != KILLED:
            break
        if dataset.exists():  # what looks finished is
            assert content(tree(dataset)) == expected
    if piped and answer.status == 2:  # killed while the folder beside a DATASET was removed
        assert f"{dataset} is a DATASET already" in answer.said
    else:
        assert answer.status == 0, answer.said
    assert content(tree(dataset)) == expected
    assert left_beside(dataset) == []

    events = killed_at.read_text().splitlines()
    assert len(events) == len(set(events)) > 100
    operations = {"mkdir", "fsync", "replace", "unlink", "rmdir", "write"}
    kinds = {("before", operation) for operation in operations} | {("amid", "write")}
    assert {tuple(event.split()[:2]) for event in events} >= kinds
