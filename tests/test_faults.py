"""The table in docs/faults.md is true: each of its lines happens, in processes."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

PAGE = Path(__file__).parents[1] / "docs" / "faults.md"
SIZES = "--embedding-dim 2 --dense-arch-layer-sizes 2 --over-arch-layer-sizes 1".split()
TRAINING = [*SIZES, *"--mini-batch-size 64 --test-freq 15 --save-every-steps 4".split()]
REFERENCE = (
    "--arch-sparse-feature-size=2 --arch-mlp-bot=13-2 --arch-mlp-top=1 --loss-function=bce "
    "--data-generation=dataset --mini-batch-size=64 --test-freq=15 --print-freq=10"
).split()
NAMES = {
    "DATASET": "set.dataset",
    "RUN": "run",
    "OUTPUT": "out.csv",
    "BUNDLE": "bundle",
    "PAGE": "page.html",
    "FILE": "ids_0.log",
    "NEXT": "ids_1.log",
}


@dataclass(frozen=True)
class Line:
    """A line of the table, of one cause."""

    command: str
    cause: str
    status: int
    left: tuple[str, ...]
    to_go_on: str

    def __str__(self) -> str:
        return f"{self.command.removeprefix('dlrm ')}-{self.cause.replace(' ', '-')}"


def read_lines() -> list[Line]:
    lines: list[Line] = []
    commands: list[str] = []
    for row in re.findall(r"^\| (?!command)(.*) \|$", PAGE.read_text(), re.MULTILINE):
        first, causes, statuses, left, to_go_on = (cell.strip(" `") for cell in row.split("|"))
        commands = re.findall("dlrm [a-z-]+", first) or commands
        names = re.findall(r"`([^`]+)`", f"`{left}`" if left != "nothing" else "")
        for cause, status in zip(causes.split(", "), statuses.split(", "), strict=True):
            lines += [
                Line(command, cause, int(status), tuple(names), to_go_on) for command in commands
            ]
    return lines


LINES = read_lines()


def test_the_table_has_every_command_and_every_cause() -> None:
    causes = ["SIGINT", "SIGTERM", "SIGKILL", "disk full", "out of memory"]
    commands = [
        *(
            "prepare",
            "train",
            "evaluate",
            "compare",
            "predict",
            "export",
            "run",
            "reference",
            "generate",
        ),
        *("stack-distances", "convert", "baseline", "report", "visualize"),
    ]
    assert sorted((line.command, line.cause.partition(" (")[0]) for line in LINES) == sorted(
        (f"dlrm {command}", cause) for command in commands for cause in causes
    )


@pytest.fixture(scope="module")
def warm(start_warm: Callable[..., Any], dataset: Path) -> Any:
    return start_warm(Path(__file__).parent / "training/interrupted_training.py", dataset)


@pytest.fixture(scope="module")
def trained(warm: Any, dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("trained") / "run"
    answer = warm(run=run, command=["train", str(dataset), "--run", str(run), *TRAINING])
    assert answer.status == 0, answer.said
    return run


@pytest.fixture(scope="module")
def exported(warm: Any, trained: Path) -> Path:
    path = trained.parent / "model.pt"
    assert warm(run=trained, command=["convert", str(trained), str(path)]).status == 0
    return path


@pytest.fixture(scope="module")
def commands(
    raw_rows: Path, dataset: Path, trained: Path, exported: Path, tmp_path_factory: Any
) -> dict[str, list[Any]]:
    """By name, with OUT for the folder that they write to."""
    copied = tmp_path_factory.mktemp("copied") / "run"
    shutil.copytree(trained, copied)
    return {
        "dlrm prepare": ["prepare", raw_rows, "OUT/set.dataset"],
        "dlrm train": ["train", dataset, "--run", "OUT/run", *TRAINING],
        "dlrm evaluate": ["evaluate", trained],
        "dlrm predict": ["predict", trained, raw_rows / "test.txt", "OUT/out.csv"],
        "dlrm export": ["export", trained, "OUT/bundle", "--format", "onnx"],
        "dlrm run": ["run", raw_rows, "OUT/run", *TRAINING],
        "dlrm reference": [
            "reference",
            *REFERENCE,
            f"--raw-data-file={raw_rows / 'train.txt'}",
            "--processed-data-file=OUT/set.npz",
            "--run=OUT/run",
        ],
        "dlrm generate": ["generate", "OUT/set.dataset", "--data-size", 2000],
        "dlrm stack-distances": [
            *("stack-distances", dataset, "OUT/ids_j.log", "--features", "cat_2", "cat_3"),
        ],
        "dlrm convert": ["convert", exported, "OUT/run", "--data", dataset],
        "dlrm baseline": [
            *("baseline", dataset, "--run", "OUT/run", "--model", "logistic", "--passes", 2),
        ],
        "dlrm compare": ["compare", trained, copied],
        "dlrm report": ["report", trained, "--output", "OUT/page.html", "--importance-rows", 0],
        "dlrm visualize": [
            *("visualize", trained, "--output", "OUT/page.html", "--features", "cat_2"),
            *("--values", 12),
        ],
    }


MIDST = {
    "dlrm prepare": "before replace .*/part-train",
    "dlrm evaluate": "before score",
    "dlrm predict": "before replace .*journal",
    "dlrm export": r"amid write .*model\.safetensors",
    "dlrm generate": "amid write .*arrow",
    "dlrm stack-distances": "amid write .*ids_1",
    "dlrm convert": "amid write .*safetensors",
    "dlrm baseline": "amid write .*arrow",
    "dlrm compare": "before compare",
    "dlrm report": "amid write .*html",
    "dlrm visualize": "amid write .*html",
}
"""Elsewhere after the sixth step."""


@pytest.fixture(scope="module")
def wholes(
    warm: Any, commands: dict[str, list[Any]], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, bytes]]:
    """What each command comes to that nothing interrupts."""
    found = {}
    for name, command in commands.items():
        out = tmp_path_factory.mktemp("whole")
        answer = ask(warm, command, out)
        assert answer.status == 0, answer.said
        found[name] = outcome(out, answer.said)
    return found


@pytest.fixture
def disk(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Path | None]:
    """A small file system; None where file systems cannot be mounted."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=10m", "tmpfs", str(folder)]
    if os.geteuid() or subprocess.run(mount, capture_output=True, check=False).returncode:
        yield None
        return
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def ask(warm: Any, command: list[Any], out: Path, **request: Any) -> Any:
    words = [str(word).replace("OUT", str(out)) for word in command]
    return warm(run=out / "run", command=words, **request)


def outcome(out: Path, said: str) -> dict[str, bytes]:
    """All that a command comes to but for times, hardware and places."""
    kinds = (".arrow", ".csv", ".safetensors", ".npz", ".log")
    files = {
        str(path.relative_to(out)): path.read_bytes()
        for path in out.rglob("*")
        # A signal has a checkpoint saved beside those that are due.
        if (path.suffix in kinds or path.name == "page.html") and not path.name.startswith("step-")
    }
    return files or {"said": said.encode()}


WAY_ON = {
    "dlrm train": "dlrm train --resume RUN\n",
    "dlrm run": "repeat the same command.\n",
    "dlrm reference": "dlrm reference ",
}
"""What is said, beside the table's."""
OVERLAPPING = [line for line in LINES if line.command == "dlrm train"]
"""Of which also what happens if a copy is written while training goes on."""


def is_slow(line: Line) -> bool:
    """Whether it takes seconds and is much like a line that is tested every day."""
    slow = ("dlrm baseline", "dlrm report", "dlrm visualize")
    return line.command in slow and line.cause != "SIGKILL"


@pytest.mark.parametrize(
    ("line", "overlap"),
    [
        *(
            pytest.param(line, False, id=str(line), marks=[pytest.mark.long] * is_slow(line))
            for line in LINES
        ),
        *(pytest.param(line, True, id=f"{line}-overlapping") for line in OVERLAPPING),
    ],
)
def test_a_line(
    warm: Any,
    commands: dict[str, list[Any]],
    wholes: dict[str, dict[str, bytes]],
    tmp_path: Path,
    disk: Path | None,
    line: Line,
    overlap: bool,
) -> None:
    command = commands[line.command]
    out = disk or tmp_path / "disk"
    where = MIDST.get(line.command, "after step 6$")
    fault: dict[str, Any] = {"fault_at": where, "fault": line.cause, "overlap": overlap}
    if line.cause == "disk full":
        fault["disk"] = disk
    elif "its output" in line.cause:
        fault = {"stdout": "/dev/full"}
    answer = ask(warm, command, out, **fault)
    status = 128 - answer.status if answer.status < 0 else answer.status
    assert status == line.status, answer.said
    assert "Traceback" not in answer.said
    killed = line.cause == "SIGKILL"
    assert answer.said.count("dlrm: error: ") == (0 if killed else 1), answer.said
    (out / "ballast").unlink(missing_ok=True)
    expected = []
    for name in line.left:
        for word, stands_for in NAMES.items():
            name = name.replace(word, stands_for)
        expected.append(name)
    assert sorted(path.name for path in out.iterdir()) == sorted(expected)

    if "--overwrite" in line.to_go_on:
        command = [*command, "--overwrite"]
    elif line.to_go_on != "the same command":
        command = [word.replace("RUN", "OUT/run") for word in line.to_go_on.split()[1:]]
    if line.command in WAY_ON and not killed:
        way_on = WAY_ON[line.command].replace("RUN", str(out / "run"))
        assert f"To go on: {way_on}" in answer.said
    answer = ask(warm, command, out)
    assert answer.status == 0, answer.said
    assert outcome(out, answer.said) == wholes[line.command]
    assert not [path for path in out.rglob(".*")]


@pytest.mark.parametrize("name", ["dlrm train", "dlrm run", "dlrm reference"])
def test_memory_that_the_system_refuses(
    warm: Any, commands: dict[str, list[Any]], tmp_path: Path, name: str
) -> None:
    """Which is noticed when the model is made, before anything of it is written."""
    large = ["--embedding-dim=131072", "--dense-arch-layer-sizes=131072"]
    if name == "dlrm reference":
        large = ["--arch-sparse-feature-size=131072", "--arch-mlp-bot=13-131072"]
    command = commands[name]
    # As much as preparation takes, whose threads have stacks and heaps of their own.
    answer = ask(warm, [*command, *large], tmp_path, address_space=1 << 30)
    assert answer.status == 3, answer.said
    assert "Traceback" not in answer.said
    assert re.search("error: cannot .*memory.*Free some memory, or use a smaller", answer.said)
    assert not (tmp_path / "run/config.toml").exists()
    assert ask(warm, command, tmp_path).status == 0
