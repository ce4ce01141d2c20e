"""The commands and programs in README and docs do what the pages say: they are run.

What a page's fence says beside the language decides:

- ``bash``, ``python``: run, one page's blocks in order in one scratch directory;
- ``bash hardware``, ``bash full-data``: need what a test has not, and are parsed;
- ``bash setup``: make the environment that the test runs in; the files they name must exist.
"""

from __future__ import annotations

import contextlib
import re
import shlex
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from dlrm.cli import parse

REPOSITORY = Path(__file__).resolve().parents[1]
PAGES = sorted([*REPOSITORY.glob("*.md"), *REPOSITORY.glob("docs/**/*.md")])


@dataclass
class Block:
    page: Path
    line: int
    kind: str
    """The fence's words."""
    text: str

    def __str__(self) -> str:
        return f"{self.page.relative_to(REPOSITORY)}:{self.line}"


def read_blocks(page: Path) -> list[Block]:
    blocks: list[Block] = []
    fence = None
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), start=1):
        found = re.match(r"\s*```(.*)", line)
        if found and fence is None:
            fence = Block(page, number, found[1].strip(), "")
        elif found and fence is not None:
            blocks.append(fence)
            fence = None
        elif fence is not None:
            fence.text += line + "\n"
    assert fence is None, f"{fence} is not closed"
    return blocks


def commands(block: Block) -> list[list[str]]:
    """The simple commands of a block, as words."""
    joined = block.text.replace("\\\n", " ")
    return [words for line in joined.splitlines() if (words := shlex.split(line, comments=True))]


BLOCKS = [block for page in PAGES for block in read_blocks(page)]
# The translation's commands are the original's, which another test makes sure of.
EXECUTED = [page for page in PAGES if page.name != "README.zh-CN.md"]


def scratch(page: Path, clone: Path) -> Path:
    """Make the folder that a page's commands are meant for, in what stands for a clone.

    A README's are in that clone's output/tour; those of docs/ take nothing of the clone.
    """
    if page.parent != REPOSITORY:
        return clone
    (clone / "configs").symlink_to(REPOSITORY / "configs")
    folder = clone / "output" / "tour"
    folder.mkdir(parents=True)
    return folder


def free_ports() -> dict[str, str]:
    """Ports that nobody listens on, for those that pages name."""
    found = {}
    with contextlib.ExitStack() as stack:
        for named in ("8000", "8001"):
            made = stack.enter_context(socket.socket())
            made.bind(("127.0.0.1", 0))
            found[named] = str(made.getsockname()[1])
    return found


def run_blocks(page: Path, folder: Path, environment: dict[str, str]) -> None:
    ports = free_ports()
    for block in read_blocks(page):
        if block.kind not in ("bash", "python"):
            continue
        program = ["bash", "-euo", "pipefail"] if block.kind == "bash" else [sys.executable, "-"]
        result = subprocess.run(
            program,
            input=re.sub(r"\b800[01]\b", lambda found: ports[found[0]], block.text),
            cwd=folder,
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=120,
        )
        assert result.returncode == 0, f"{block} failed:\n{block.text}\n{result.stdout}"


@pytest.mark.parametrize("page", EXECUTED, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_blocks_run(page: Path, quick_dlrm: dict[str, str], tmp_path: Path) -> None:
    run_blocks(page, scratch(page, tmp_path), quick_dlrm)


@pytest.mark.parametrize(
    "block",
    [block for block in BLOCKS if block.kind in ("bash hardware", "bash full-data")],
    ids=str,
)
def test_blocks_that_cannot_run_parse(
    block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(scratch(block.page, tmp_path))
    subprocess.run(["bash", "-n"], input=block.text, text=True, check=True)
    for words in commands(block):
        if words[0] == "dlrm":
            parse(words[1:])
        else:
            assert words[:1] == ["bash"], f"{block} runs {words[0]}; mark it otherwise"
            assert (REPOSITORY / words[1]).is_file()


@pytest.mark.parametrize(
    "block", [block for block in BLOCKS if block.kind == "bash setup"], ids=str
)
def test_setup_blocks_name_files_that_exist(block: Block) -> None:
    subprocess.run(["bash", "-n"], input=block.text, text=True, check=True)
    for words in commands(block):
        for word in words:
            is_ours = word.startswith(("test/", ".ci/")) or word.endswith(".txt")
            assert not is_ours or (REPOSITORY / word).is_file(), f"{block}: there is no {word}"


def test_every_fence_is_of_a_known_kind() -> None:
    known = {"bash", "bash hardware", "bash full-data", "bash setup", "python", "text", "toml"}
    unknown = {f"{block}: {block.kind!r}" for block in BLOCKS if block.kind not in known}
    assert not unknown


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    targets = re.findall(r"\]\(([^)#\s]+)[^)]*\)", text)
    missing = [
        target for target in targets if "://" not in target and not (page.parent / target).exists()
    ]
    assert not missing


def test_the_index_lists_every_page() -> None:
    index = (REPOSITORY / "docs" / "index.md").read_text(encoding="utf-8")
    pages = {page.name for page in (REPOSITORY / "docs").glob("*.md")} - {"index.md"}
    assert pages == {page for page in pages if f"({page})" in index}


def test_the_translation_has_the_same_commands() -> None:
    def programs(name: str) -> list[tuple[str, list[list[str]]]]:
        blocks = read_blocks(REPOSITORY / name)
        return [(block.kind, commands(block)) for block in blocks if block.kind.startswith("bash")]

    assert programs("README.zh-CN.md") == programs("README.md")


@pytest.mark.parametrize("name", ["README.md", "README.zh-CN.md"])
def test_the_tree_is_there(name: str) -> None:
    (tree,) = [block for block in read_blocks(REPOSITORY / name) if block.text.startswith("src/")]
    folder = REPOSITORY
    for line in tree.text.splitlines():
        path = line.split()[0]
        if not line.startswith(" "):
            folder = REPOSITORY / path
            path = "."
        assert (folder / path).exists(), f"{tree} names {line}"


@pytest.mark.parametrize("config", sorted(REPOSITORY.glob("configs/*.toml")), ids=lambda p: p.name)
def test_every_recipe_is_accepted(config: Path) -> None:
    parse(["train", "DATASET", "--run", "RUN", "--config", str(config)])
