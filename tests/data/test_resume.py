"""Preparation that is killed, stopped or fails, and goes on (``interrupted.py`` beside this)."""

from __future__ import annotations

import errno
import gzip
import hashlib
import json
import os
import random
import re
import shutil
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dlrm.config import PrepareConfig, SynthesizeConfig
from dlrm.data.dataset import Dataset
from dlrm.data.prepare import prepare
from dlrm.data.synthetic import synthesize
from dlrm.data.verification import verify
from dlrm.errors import UserError

Warm = Callable[..., Any]
Answer = Any
KILLED = -9


@pytest.fixture
def tmp_path(quick_path: Path) -> Path:
    return quick_path


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
SKIPPING: Config = {"shuffle": "reference-day", "bad_rows": "skip", "max_bad_rows": 9}


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
        lines = lines_of_equal_length(rows, seed=day + 1).splitlines(keepends=True)
        content = b"".join([b"\n", *lines[:15], b"1\t\n", *lines[15:], b"no row\n"])
        (days / f"day_{day}.gz").write_bytes(gzip.compress(content))
    prepared = tmp_path_factory.mktemp("prepared")
    write_prepared(prepared)
    return {
        "rows": {**SMALL, **NARROW, "source": source, "config": EVERYTHING},
        "packed days": {**SMALL, "source": days, "config": SKIPPING},
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
# Of segments, parts and runs, the first and the last.
REPEATED = (
    r"(cat_|map-0|fitted-0|generation-0)(0?[1-9]|[12][0-9])\b|^after (mkdir|write|fsync|unlink)"
    r"|(segment|rows|values|part|part-train|map-000)-00001\b"
)
WITHIN = r"work/(spool|.*part-|days|dataset/(train|test|validation))|^amid (?!.*source)"
NONE = "$^"


@pytest.mark.parametrize(
    ("config", "sizes", "but_not"),
    [
        pytest.param(EVERYTHING, NARROW, REPEATED, id="everything"),
        pytest.param(EVERYTHING, NARROW, NONE, id="everything, everywhere", marks=pytest.mark.long),
        pytest.param(HASHED, {"piped": True}, f"{REPEATED}|{WITHIN}", id="from a pipe"),
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
    assert len(events) == len(set(events)) > (30 if piped else 120)
    operations = {"mkdir", "fsync", "replace", "unlink", "rmdir", "write"}
    kinds = {("before", operation) for operation in operations} | {("amid", "write")}
    assert {tuple(event.split()[:2]) for event in events} >= kinds


def events_of(warm: Warm, request: Request, folder: Path) -> list[str]:
    """What happens in an uninterrupted preparation, in order."""
    folder.mkdir()
    made(warm, **request, dataset=folder / "dataset", log=f"{folder}.log")
    return Path(f"{folder}.log").read_text().splitlines()


# A point of each stage.
STAGES = (
    "after replace .dataset.work/spool/segment-00001.json",
    "after replace .dataset.work/fitted-017.json",
    "after unlink .dataset.work/spool/rows-00000.safetensors",
    "after replace .dataset.work/part-test-00000.json",
)


@pytest.mark.parametrize("kind", ["rows", "packed days", "pipe", "prepared"])
def test_killed_and_killed_again_then_gone_on_with_otherwise(
    warm: Warm, sources: dict[str, Request], tmp_path: Path, kind: str
) -> None:
    request = sources[kind]
    content = without_times if kind == "pipe" else dict
    events = events_of(warm, request, tmp_path / "there")
    expected = content(tree(tmp_path / "there" / "dataset"))
    # Less memory and more workers, other segments and tables: none of it shows.
    otherwise = {"memory": "1GiB", "cores": 3, "segment_rows": 15, "table_bytes": 1 << 30}
    made_here = events[: events.index("after replace dataset")]
    places = [made_here.index(stage) + 1 for stage in STAGES if stage in made_here]
    assert len(places) >= 2
    for place in places:
        once = tmp_path / f"killed at {place}" / "dataset"
        once.parent.mkdir()
        assert warm(**request, dataset=once, kill_at=place).status == KILLED
        assert not once.exists()
        twice = tmp_path / f"killed at {place} and again" / "dataset"
        shutil.copytree(once.parent, twice.parent)
        assert warm(**request, dataset=twice, kill_at=25).status == KILLED
        for dataset in (once, twice):
            answer = warm(**{**request, **otherwise}, dataset=dataset)
            assert answer.status == 0, answer.said
            assert "going on with" in answer.said
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
    for place in range(1, len(events) + 1, 5):  # the other test is killed at each
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
    source.write_bytes(made_up_lines(1000))
    request = {"source": source, "segment_rows": 200, "read_bytes": 20_000, "part_bytes": 50_000}
    kill_at_random(warm, tmp_path, {**request, "config": EVERYTHING}, 5, seed=1)


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
            but_not=f"{REPEATED}|{WITHIN}|inputs|lock",
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


@pytest.fixture
def half_made(warm: Warm, source: Path, tmp_path: Path) -> tuple[Path, dict[str, Any]]:
    """A DATASET whose making was interrupted, and the request to make it."""
    request: Request = {**SMALL, "source": tmp_path / "train.txt", "config": {}}
    request["source"].write_bytes(source.read_bytes())
    dataset = tmp_path / "dataset"
    assert warm(**request, dataset=dataset, kill_at=150).status == KILLED
    return dataset, request


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        ({"seed": 7}, "it was made with --seed 123, and --seed 7 is asked for"),
        ({"shuffle": "day"}, "--shuffle total, and --shuffle day is asked for"),
        ({"split": "none"}, "--split auto, and --split none is asked for"),
        ({"vocabulary": "train"}, "--vocabulary all, and --vocabulary train is asked for"),
        ({"min_frequency": 2}, "--min-frequency 1, and --min-frequency 2 is asked for"),
        ({"max_ind_range": 2}, "--max-ind-range 0, and --max-ind-range 2 is asked for"),
        ({"hash_buckets": 2}, "--hash-buckets 0, and --hash-buckets 2 is asked for"),
        ({"data_sub_sample_rate": 0.5}, "-rate 0.0, and --data-sub-sample-rate 0.5 is asked for"),
        ({"bad_rows": "skip"}, "--bad-rows error, and --bad-rows skip is asked for"),
        ({"max_bad_rows": 3}, "--max-bad-rows 1000, and --max-bad-rows 3 is asked for"),
    ],
)
def test_an_interrupted_preparation_with_other_options_is_kept(
    half_made: tuple[Path, Request], change: Config, difference: str
) -> None:
    dataset, request = half_made
    before = tree(dataset.parent)
    with pytest.raises(UserError) as caught:
        prepare(request["source"], dataset, PrepareConfig(**change))
    assert str(caught.value).startswith(
        f"{dataset} is half made already, by a preparation that was interrupted: it was made with "
    )
    assert difference in str(caught.value)
    assert str(caught.value).endswith(
        "Repeat that command to go on with it, choose another DATASET, or start over with "
        "--overwrite."
    )
    before.pop(".dataset.lock", None)
    assert tree(dataset.parent) == before


def test_an_interrupted_preparation_of_another_source_is_kept(
    warm: Warm, half_made: tuple[Path, Request], tmp_path: Path
) -> None:
    dataset, request = half_made
    source = request["source"]
    other = tmp_path / "other.txt"
    other.write_bytes(source.read_bytes() * 2)
    changed_at = source.stat().st_mtime_ns
    before = tree(dataset.with_name(".dataset.work"))
    size = source.stat().st_size

    with pytest.raises(UserError, match="half made already") as caught:
        prepare(other, dataset)
    expected = f"it was made from train.txt ({size} bytes), and {other} ({2 * size} bytes) is"
    assert expected in str(caught.value)
    os.utime(source, ns=(1, 1))
    with pytest.raises(UserError, match=rf"and .*train\.txt \({size} bytes\) is another file, or"):
        prepare(source, dataset)
    # Nor is standard input read in its place.
    answer = warm(source="-", stdin=other, dataset=dataset)
    assert answer.status == 2
    assert "and standard input is asked for" in answer.said
    assert tree(dataset.with_name(".dataset.work")) == before

    os.utime(source, ns=(changed_at, changed_at))
    answer = warm(**request, dataset=dataset)
    assert answer.status == 0
    assert "going on with the interrupted preparation" in answer.said


@pytest.mark.parametrize(
    ("piped", "config"), [(False, {"max_ind_range": 3}), (False, {}), (True, {"max_ind_range": 3})]
)
def test_overwriting_starts_over(
    warm: Warm,
    half_made: tuple[Path, Request],
    tmp_path: Path,
    piped: bool,
    config: Config,
) -> None:
    dataset, _ = half_made
    other = tmp_path / "other.txt"
    other.write_bytes(lines_of_equal_length(ROWS, seed=9))
    new: Request = {**SMALL, "source": "-" if piped else other, "stdin": other, "config": config}
    answer = warm(**new, dataset=dataset, overwrite=True)
    assert answer.status == 0, answer.said
    assert "going on" not in answer.said
    got = Dataset.open(dataset)
    verify(got)
    assert got.manifest.sources[0].sha256 == hashlib.sha256(other.read_bytes()).hexdigest()
    fresh = warm(**new, dataset=tmp_path / "fresh")
    assert fresh.status == 0
    assert without_times(tree(tmp_path / "fresh")) == without_times(tree(dataset))
    assert not dataset.with_name(".dataset.work").exists()


def test_killed_while_starting_over_the_first_command_gives_what_it_did(
    warm: Warm, half_made: tuple[Path, Request], tmp_path: Path
) -> None:
    dataset, request = half_made
    expected = made(warm, **request, dataset=tmp_path / "there" / "dataset")
    for place in (3, 9, 30):
        copy = tmp_path / f"killed at {place}" / "dataset"
        shutil.copytree(dataset.with_name(".dataset.work"), copy.with_name(".dataset.work"))
        other = {**request, "config": {"max_ind_range": 2}, "overwrite": True}
        assert warm(**other, dataset=copy, kill_at=place).status == KILLED
        answer = warm(**request, dataset=copy)
        if answer.status:
            assert "with --max-ind-range 2, and" in one_error(answer, 2)
            answer = warm(**request, dataset=copy, overwrite=True)
        assert answer.status == 0, answer.said
        assert tree(copy) == expected


@pytest.mark.parametrize("version", ["1.0", "1.9", "2.0", "damaged"])
def test_an_interrupted_preparation_of_another_version_is_kept(
    warm: Warm, half_made: tuple[Path, Request], version: str
) -> None:
    dataset, request = half_made
    record = dataset.with_name(".dataset.work") / "inputs.json"
    content = json.loads(record.read_text()) | {"format_version": version}
    record.write_text("{" if version == "damaged" else json.dumps(content))
    before = tree(record.parent)
    with pytest.raises(UserError) as caught:
        prepare(request["source"], dataset)
    message = str(caught.value)
    assert message.startswith(f"{dataset} is half made already, by a preparation that was")
    assert message.endswith("or start over with --overwrite.")
    assert version in message
    assert tree(record.parent) == before
    answer = warm(**request, dataset=dataset, overwrite=True)
    assert answer.status == 0
    assert "going on" not in answer.said


def test_what_lies_in_the_folder_without_a_record_is_not_taken_for_work(
    warm: Warm, half_made: tuple[Path, Request], tmp_path: Path
) -> None:
    dataset, request = half_made
    (dataset.with_name(".dataset.work") / "inputs.json").unlink()
    request |= {"config": {"max_ind_range": 5, "seed": 5}}
    expected = made(warm, **request, dataset=tmp_path / "fresh" / "dataset")
    assert warm(**request, dataset=dataset).status == 0
    assert tree(dataset) == expected


def test_what_came_through_a_pipe_is_read_only_once(
    warm: Warm, sources: dict[str, Request], tmp_path: Path
) -> None:
    request = sources["pipe"]
    events = events_of(warm, request, tmp_path / "there")
    dataset = tmp_path / "here" / "dataset"
    dataset.parent.mkdir()
    place = events.index("after replace .dataset.work/source.spool") + 1
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with subprocess.Popen(["sh", "-c", 'cat "$0" > "$1"', request["stdin"], pipe]):
        answer = warm(**{**request, "stdin": pipe}, dataset=dataset, kill_at=place)
    assert answer.status == KILLED
    # Another command: it is told of the options, and standard input is left alone.
    nothing = {**request, "stdin": "/dev/null"}
    answer = warm(**{**nothing, "config": {"days": [1]}}, dataset=dataset)
    assert answer.status == 2
    assert "--days chooses among the days of a folder; standard input is one file" in answer.said
    answer = warm(**nothing, dataset=dataset)
    assert answer.status == 0, answer.said
    assert "going on with what came through the pipe before" in answer.said
    assert without_times(tree(dataset)) == without_times(tree(tmp_path / "there" / "dataset"))
    assert left_beside(dataset) == []
    source = Dataset.open(dataset).manifest.sources[0]
    assert source.name == "-"
    assert source.sha256 == hashlib.sha256(Path(request["stdin"]).read_bytes()).hexdigest()
    # It is finished, and whether the same comes again is not known.
    answer = warm(**request, dataset=dataset)
    assert answer.status == 2
    assert f"{dataset} is a DATASET already" in answer.said


def test_an_empty_pipe_is_named_and_leaves_nothing(
    warm: Warm, sources: dict[str, Request], tmp_path: Path
) -> None:
    request = {**sources["pipe"], "stdin": "/dev/null"}
    answer = warm(**request, dataset=tmp_path / "here" / "dataset")
    assert answer.status == 2
    assert answer.said == (
        "error: standard input is empty: nothing came through the pipe. Check what feeds it.\n"
    )
    assert list(tmp_path.iterdir()) == []


def one_error(answer: Answer, status: int) -> str:
    """The one error that ended a command, without a traceback."""
    assert answer.status == status, answer.said
    assert "Traceback" not in answer.said
    (message,) = re.findall("^(?:dlrm: )?error: (.*)", answer.said, re.M)
    return str(message)


@pytest.mark.parametrize(("name", "status"), [("SIGTERM", 143), ("SIGINT", 130)])
def test_a_signal_stops_it_and_the_same_command_goes_on(
    warm: Warm, sources: dict[str, Request], tmp_path: Path, name: str, status: int
) -> None:
    request = sources["rows"]
    expected = made(warm, **request, dataset=tmp_path / "there" / "dataset")
    dataset = tmp_path / "here" / "dataset"
    options = [
        text
        for option, value in EVERYTHING.items()
        for text in (f"--{option.replace('_', '-')}", str(value))
    ]
    command = ["prepare", str(request["source"]), str(dataset), *options]
    # Before the first segment is complete, nothing is worth keeping.
    answer = warm(**request, dataset=dataset, command=command, signal=name, signal_at=20)
    assert one_error(answer, status) == f"stopped by {name}"
    assert not dataset.parent.exists()
    for place in (80, 130, 170, 100):
        answer = warm(**request, dataset=dataset, command=command, signal=name, signal_at=place)
        assert one_error(answer, status) == f"stopped by {name}"
        assert f"{dataset} is unfinished; the same command goes on with it" in answer.said
        assert not dataset.exists()
    answer = warm(**request, dataset=dataset, command=command)
    assert answer.status == 0, answer.said
    assert tree(dataset) == expected
    assert left_beside(dataset) == []


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_a_disk_that_fails_at_any_point_is_named_and_the_same_command_goes_on(
    warm: Warm, sources: dict[str, Request], tmp_path: Path, code: int
) -> None:
    request = sources["rows"]
    expected = made(warm, **request, dataset=tmp_path / "there" / "dataset")
    dataset = tmp_path / "here" / "dataset"
    done = failures = 0
    for place in (1, 3, 4, 8, 13, 21, 34, 55, 89, 144):
        # It fails from there on; what was finished before is gone on with the next time.
        answer = warm(**request, dataset=dataset, fail_at=place, errno=code)
        if answer.status == 0:
            done += 1
            break
        failures += 1
        assert os.strerror(code) in one_error(answer, 3)
        assert not dataset.exists()
    assert failures >= 7
    if not done:
        assert warm(**request, dataset=dataset).status == 0
    assert tree(dataset) == expected
    assert left_beside(dataset) == []


def test_a_file_that_may_not_grow_is_named(
    warm: Warm, sources: dict[str, Request], tmp_path: Path
) -> None:
    request = sources["rows"]
    dataset = tmp_path / "dataset"
    message = one_error(warm(**request, dataset=dataset, largest_file=3000), 3)
    assert re.search(r"cannot write .*: File too large.*Raise the limit of file sizes", message)
    assert list(tmp_path.iterdir()) == []
    assert warm(**request, dataset=dataset).status == 0


def test_a_disk_that_is_full_is_named_and_once_there_is_room_it_goes_on(
    warm: Warm, sources: dict[str, Request], tmp_path: Path
) -> None:
    request = sources["rows"]
    expected = made(warm, **request, dataset=tmp_path / "there" / "dataset")
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(disk)]
    if os.geteuid() or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("file systems cannot be mounted here")
    try:
        dataset = disk / "dataset"
        sizes = []
        for kilobytes in (60, 90, 120, 150):
            remount = ["mount", "-o", f"remount,size={kilobytes}k", str(disk)]
            subprocess.run(remount, check=True)
            message = one_error(warm(**request, dataset=dataset), 3)
            assert "No space left on device" in message
            assert "Free some space, or choose another place." in message
            assert not dataset.exists()
            sizes.append(len(tree(disk)))
        assert sizes == sorted(sizes)  # each goes on with what was finished
        assert sizes[-1] > 30
        subprocess.run(["mount", "-o", "remount,size=10m", str(disk)], check=True)
        answer = warm(**request, dataset=dataset)
        assert answer.status == 0, answer.said
        assert "going on with the interrupted preparation" in answer.said
        assert tree(dataset) == expected
        assert left_beside(dataset) == []
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize(
    ("kind", "end", "name"), [("rows", 8000, "train.txt"), ("packed days", 1000, "day_0.gz")]
)
def test_a_source_that_cannot_be_read_is_named(
    warm: Warm, sources: dict[str, Request], tmp_path: Path, kind: str, end: int, name: str
) -> None:
    request = sources[kind]
    dataset = tmp_path / "dataset"
    message = one_error(warm(**request, dataset=dataset, read_error_at=end), 3)
    assert re.fullmatch(
        rf"cannot read .*/{name}: Input/output error\. The disk may be failing: choose another "
        "place.",
        message,
    )
    assert not dataset.exists()
    assert warm(**request, dataset=dataset).status == 0
    assert left_beside(dataset) == []


@pytest.mark.parametrize(
    ("kill_at", "damaged"),
    [
        ("after replace .dataset.work/days.json", "spool/rows-00000.safetensors"),
        ("after replace .dataset.work/fitted-017.json", "map-000-00000.npy"),
        ("after replace .dataset.work/part-test-00000.json", "run-00000"),
    ],
)
def test_work_that_is_damaged_is_named_and_the_same_command_starts_over(
    warm: Warm, sources: dict[str, Request], tmp_path: Path, kill_at: str, damaged: str
) -> None:
    request = {**sources["rows"], "config": {"vocabulary": "train"}}
    events = events_of(warm, request, tmp_path / "there")
    expected = tree(tmp_path / "there" / "dataset")
    dataset = tmp_path / "here" / "dataset"
    dataset.parent.mkdir()
    place = events.index(kill_at) + 1
    assert warm(**request, dataset=dataset, kill_at=place).status == KILLED
    (path,) = dataset.with_name(".dataset.work").glob(f"{damaged}*")
    path.write_bytes(path.read_bytes()[:-1])
    message = one_error(warm(**request, dataset=dataset), 2)
    assert message.startswith(f"{path} is damaged: ")
    assert message.endswith(". Repeat the command to start over.")
    assert left_beside(dataset) == []
    answer = warm(**request, dataset=dataset)
    assert answer.status == 0, answer.said
    assert "going on" not in answer.said
    assert tree(dataset) == expected


def test_every_file_is_flushed_renamed_and_its_folder_flushed(
    warm: Warm, sources: dict[str, Request], tmp_path: Path
) -> None:
    events = events_of(warm, sources["rows"], tmp_path / "there")
    renamed = 0
    written: Counter[str] = Counter()
    flushed: set[str] = set()
    for place, event in enumerate(events):
        moment, operation, path = event.split(" ", 2)
        if (moment, operation) == ("after", "write"):
            written[path] += 1
            flushed.discard(path)
        elif (moment, operation) == ("after", "fsync"):
            flushed.add(path)
        elif (moment, operation) == ("before", "replace"):
            renamed += 1
            folder, _, name = path.rpartition("/")
            folder = folder or "."
            partial = f"{folder}/.{name}.partial"
            if path == "dataset":
                for written_to in ("", "/train", "/validation", "/test"):
                    assert f".dataset.work/dataset{written_to}" in flushed
            elif path != ".dataset.gone":
                assert written[partial] > 0
                assert partial in flushed, event
                assert written.pop(partial)
            # Nothing else happens between the rename and the flush of the folder.
            assert events[place + 1 : place + 4] == [
                f"after replace {path}",
                f"before fsync {folder}",
                f"after fsync {folder}",
            ]
    assert not written  # all of it was renamed
    kept = tree(tmp_path / "there" / "dataset")
    assert renamed > len(kept) + 26 + 26  # and the records and maps of features, spool and runs
    for name in kept:
        assert any(
            event.endswith(f"after replace .dataset.work/dataset/{name}") for event in events
        )
