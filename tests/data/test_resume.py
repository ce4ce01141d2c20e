"""Preparation that is killed, stopped or fails, and goes on (``interrupted.py`` beside this)."""

from __future__ import annotations

import gzip
import json
import random
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dlrm.config import SynthesizeConfig
from dlrm.data.dataset import Dataset
from dlrm.data.synthetic import synthesize
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
Request = dict[str, Any]
EVERYTHING: Config = {"vocabulary": "train", "min_frequency": 2, "data_sub_sample_rate": 0.3}
HASHED: Config = {"hash_buckets": 50, "shuffle": "none"}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("source") / "train.txt"
    path.write_bytes(lines_of_equal_length(ROWS)[:-1])
    return path


def write_prepared(folder: Path) -> None:
    """What the reference leaves: two days of rows, and the values behind their ids."""
    generator = np.random.default_rng(1)
    for day in range(2):
        np.savez(
            folder / f"day_{day}_reordered.npz",
            y=generator.integers(0, 2, 30),
            X_int=generator.integers(0, 99, (30, 13)),
            X_cat=generator.integers(0, 9, (30, 26)),
        )
    np.savez(folder / "day_day_count.npz", total_per_file=[30, 30])
    np.savez(folder / "day_fea_count.npz", counts=[9] * 26)
    for feature in range(26):
        values = generator.permutation(np.arange(9, dtype=np.int32) - 4)
        np.savez(folder / f"day_fea_dict_{feature}.npz", unique=values)


@pytest.fixture(scope="module")
def sources(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Request]:
    """Requests to prepare each kind of source."""
    days = tmp_path_factory.mktemp("days")
    for day, rows in enumerate((40, 20, 31)):
        content = lines_of_equal_length(rows, seed=day + 1)
        (days / f"day_{day}.gz").write_bytes(gzip.compress(content))
    prepared = tmp_path_factory.mktemp("prepared")
    write_prepared(prepared)
    return {
        "rows": {**SMALL, **NARROW, "source": source, "config": EVERYTHING},
        "packed days": {**SMALL, "source": days, "config": {"shuffle": "reference-day"}},
        "pipe": {**SMALL, "source": "-", "stdin": source, "config": HASHED},
        "prepared": {**SMALL, "source": prepared, "config": {"shuffle": "day"}},
    }


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


def events_of(warm: Warm, request: Request, folder: Path) -> list[str]:
    """What happens in an uninterrupted preparation, in order."""
    folder.mkdir()
    made(warm, **request, dataset=folder / "dataset", log=f"{folder}.log")
    return Path(f"{folder}.log").read_text().splitlines()


@pytest.mark.parametrize(
    ("kind", "places"), [("rows", 4), ("packed days", 2), ("pipe", 2), ("prepared", 3)]
)
def test_killed_and_killed_again_then_gone_on_with_otherwise(
    warm: Warm, sources: dict[str, Request], tmp_path: Path, kind: str, places: int
) -> None:
    request = sources[kind]
    content = without_times if kind == "pipe" else dict
    events = events_of(warm, request, tmp_path / "there")
    expected = content(tree(tmp_path / "there" / "dataset"))
    # Less memory and more workers, other segments and tables: none of it shows.
    otherwise = {"memory": "1GiB", "cores": 3, "segment_rows": 15, "table_bytes": 1 << 30}
    last = events.index("after replace dataset")
    for place in range(last // places - 10, last, last // places):
        dataset = tmp_path / f"killed at {place}" / "dataset"
        dataset.parent.mkdir()
        assert warm(**request, dataset=dataset, kill_at=place).status == KILLED
        assert not dataset.exists()
        again = warm(**{**request, **otherwise}, dataset=dataset, kill_at=40)
        assert again.status in (KILLED, 0)
        third = warm(**{**request, "cores": 2}, dataset=dataset)
        assert third.status == 0, third.said
        assert content(tree(dataset)) == expected
        assert left_beside(dataset) == []


@pytest.mark.long
@pytest.mark.parametrize("kind", ["rows", "prepared"])
def test_killed_at_any_point_then_gone_on_with(
    warm: Warm, sources: dict[str, Request], tmp_path: Path, kind: str
) -> None:
    request = sources[kind]
    events = events_of(warm, request, tmp_path / "there")
    expected = tree(tmp_path / "there" / "dataset")
    for place in range(1, len(events) + 1):
        dataset = tmp_path / "here" / "dataset"
        dataset.parent.mkdir()
        assert warm(**request, dataset=dataset, kill_at=place).status == KILLED
        answer = warm(**request, dataset=dataset)
        assert answer.status == 0, (events[place - 1], answer.said)
        assert tree(dataset) == expected, events[place - 1]
        assert left_beside(dataset) == [], events[place - 1]
        shutil.rmtree(dataset.parent)


def kill_at_random(
    warm: Warm, folder: Path, request: Request, kills: int, seed: int
) -> dict[str, int]:
    """Kill preparations at random moments and go on with each; return how often by stage."""
    began = time.monotonic()
    (folder / "there").mkdir()
    expected = made(warm, **request, dataset=folder / "there" / "dataset")
    duration = time.monotonic() - began
    generator = random.Random(seed)
    stages: Counter[str] = Counter()
    for number in range(10 * kills):
        dataset = folder / f"here {number}" / "dataset"
        dataset.parent.mkdir()
        delay = generator.uniform(0, duration)
        answer = warm(**request, dataset=dataset, kill_after=delay)
        if answer.status == KILLED:
            ended = re.findall(r"^(read|fit|arrange|write|verify) +[0-9.]+ s$", answer.said, re.M)
            stages[str(ended[-1:])] += 1
            assert not dataset.exists() or tree(dataset) == expected
            answer = warm(**request, dataset=dataset)
        assert answer.status == 0, answer.said
        assert tree(dataset) == expected
        assert left_beside(dataset) == []
        shutil.rmtree(dataset.parent)
        if stages.total() == kills:
            return stages
    raise AssertionError(f"{stages.total()} of {kills} were killed in time")


def test_killed_at_random_moments(
    warm: Warm, tmp_path: Path, made_up_lines: Callable[..., bytes]
) -> None:
    source = tmp_path / "train.txt"
    source.write_bytes(made_up_lines(1500))
    request = {"source": source, "segment_rows": 200, "read_bytes": 20_000, "part_bytes": 50_000}
    kill_at_random(warm, tmp_path, {**request, **NARROW, "config": EVERYTHING}, 5, seed=1)


@pytest.mark.long
def test_killed_at_fifty_random_moments(warm: Warm, tmp_path: Path) -> None:
    synthesize(tmp_path / "raw", SynthesizeConfig(rows=400_000, test_rows=0, scale=0.01))
    request = {"source": tmp_path / "raw" / "train.txt", "segment_rows": 20_000}
    sizes = {"table_bytes": 1 << 20, "part_bytes": 4 << 20}
    stages = kill_at_random(warm, tmp_path, {**request, **sizes}, 50, seed=2)
    assert len(stages) >= 4, stages


def test_a_dataset_that_is_replaced_is_there_until_the_new_one_is(
    warm: Warm, source: Path, tmp_path: Path
) -> None:
    request: Request = {**SMALL, "source": source, "overwrite": True}
    new = {**request, "config": HASHED}
    for name in ("old", "new", "here"):
        (tmp_path / name).mkdir()
    before = made(warm, **request, dataset=tmp_path / "old" / "dataset")
    after = made(warm, **new, dataset=tmp_path / "new" / "dataset")
    dataset = tmp_path / "here" / "dataset"
    made(warm, **request, dataset=dataset)
    seen = []
    for _ in range(200):
        answer = warm(
            **new,
            dataset=dataset,
            kill_once=tmp_path / "killed",
            but_not=r"part-|spool|days\.json|inputs\.json|/(train|validation|test)\b|^amid|\.lock",
        )
        if dataset.exists():
            seen.append("new" if tree(dataset) == after else "old")
            assert tree(dataset) in (before, after)
        else:
            # Between two renames, for which there is no one that does both.
            seen.append("neither")
            assert tree(dataset.with_name(".dataset.replaced")) == before
        if answer.status != KILLED:
            break
    assert answer.status == 0, answer.said
    assert tree(dataset) == after
    assert left_beside(dataset) == []
    assert [state for state, _ in groupby(seen)] == ["old", "neither", "new"]
