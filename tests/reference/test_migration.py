"""docs/migration.md: each old command line beside the commands that it means."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from dlrm.reference import parse

SECTIONS = ("dlrm_s_criteo_kaggle.sh", "dlrm_s_criteo_terabyte.sh", "run_and_time.sh")


def test_the_commands_beside_an_old_one_are_what_it_means(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # where none of the files is
    text = (repository / "docs" / "migration.md").read_text(encoding="utf-8")
    blocks = [
        [shlex.split(line) for line in block.replace("\\\n", " ").splitlines()]
        for block in re.findall(r"```bash full-data\n(.*?)```", text, re.DOTALL)
    ]
    assert len(blocks) == 2 * (len(SECTIONS) + 1)
    assert all(f"`bench/{name}`" in text for name in (*SECTIONS, "dlrm_s_benchmark.sh"))
    for old, new in zip(blocks[::2], blocks[1::2], strict=True):
        ((program, verb, *flags),) = old
        assert (program, verb) == ("dlrm", "reference")
        assert new == [shlex.split(command) for command in parse(flags).commands()]
