from __future__ import annotations

import errno
import io
import os
from pathlib import Path

import pytest

from dlrm.config import PrepareConfig
from dlrm.data.prepare import prepare
from dlrm.data.source_files import SourceFile
from dlrm.data.sources import find_source, piped_source, raw_source
from dlrm.errors import EnvironmentFaultError, UserError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with train.txt and days, another with days only, and some that are no source."""
    for name in ("both", "days", "one", "packed", "nothing"):
        (tmp_path / name).mkdir()
    for name in ("train.txt", "day_0", "day_1", "test.txt"):
        (tmp_path / "both" / name).write_text(name)
    for name in ("day_10", "day_2", "day_0", "day_3.gz", "day_x", "a_day_1", "day_4.x"):
        (tmp_path / "days" / name).write_text(name)
    (tmp_path / "one" / "day_5").touch()
    (tmp_path / "packed" / "day_0.gz").touch()
    return tmp_path


def found(source: Path, **options: object) -> tuple[list[str], str]:
    source_ = raw_source(source, PrepareConfig(**options))  # type: ignore[arg-type]
    return [str(file.path.relative_to(source)) for file in source_.files], source_.split


def test_a_file_is_described_without_being_read(folder: Path) -> None:
    path = folder / "both" / "train.txt"
    source = raw_source(path, PrepareConfig())
    status = path.stat()
    assert source.files == (SourceFile(path, "train.txt", 9, status.st_mtime_ns),)
    assert source.split == "rows"
    assert source.bytes == 9


def test_a_folder_means_its_train_txt_or_its_days(folder: Path) -> None:
    assert found(folder / "both") == (["train.txt"], "rows")
    # Days in the order of their numbers, plain or packed.
    assert found(folder / "days") == (["day_0", "day_2", "day_3.gz", "day_10"], "days")
    assert raw_source(folder / "days", PrepareConfig()).bytes == 5 + 5 + 8 + 6


def test_days_are_chosen_and_ordered(folder: Path) -> None:
    assert found(folder / "days", days=(10, 0)) == (["day_10", "day_0"], "days")
    assert found(folder / "both", days=(1, 0)) == (["day_1", "day_0"], "days")
    assert found(folder / "days", days=(3,), split="rows") == (["day_3.gz"], "rows")


@pytest.mark.parametrize("split", ["rows", "none", "days"])
def test_the_split_may_be_told(folder: Path, split: str) -> None:
    assert found(folder / "days", split=split)[1] == split
    if split != "days":
        assert found(folder / "one", split=split) == (["day_5"], split)
        assert found(folder / "both", split=split) == (["train.txt"], split)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("absent.txt", {}, "does not exist"),
        ("absent.npz", {}, "does not exist"),
        ("nothing", {}, r"is a folder without train\.txt, and without day_0"),
        ("nothing", {"days": (0,)}, r"is a folder without train\.txt, and without day_0"),
        ("one", {}, "is a single day, of which nothing is held back"),
        ("packed", {}, "is a single day, .*--split rows cuts it into 7 .*--split none trains on"),
        ("days/day_0", {}, "is a single day"),
        ("days", {"days": (2,)}, "is a single day"),
        ("one", {"split": "days"}, "--split days needs at least two days"),
        ("both", {"split": "days"}, "--split days needs at least two days"),
        ("days/day_0", {"days": (0,)}, "--days chooses among the days of a folder; .* is one file"),
        ("days", {"days": (0, 7)}, "has no day_7. There are the days 0, 2, 3, 10; choose among"),
    ],
)
def test_sources_that_are_none(
    folder: Path, name: str, options: dict[str, object], message: str
) -> None:
    before = sorted(folder.rglob("*"))
    with pytest.raises(UserError, match=message):
        prepare(folder / name, folder / "dataset", PrepareConfig(**options))  # type: ignore[arg-type]
    assert sorted(folder.rglob("*")) == before


@pytest.mark.parametrize("names", [("day_1", "day_01"), ("day_1", "day_1.gz")])
def test_two_files_of_one_day_are_refused_by_name(folder: Path, names: tuple[str, str]) -> None:
    for name in names:
        (folder / "days" / name).touch()
    with pytest.raises(UserError) as caught:
        found(folder / "days")
    first, second = sorted(names)
    assert str(caught.value) == (
        f"{folder / 'days'} has {first} and {second}, which are one day by their names. Leave one "
        "of them there, and move the rest elsewhere."
    )
    # Unless that day is not asked for.
    assert found(folder / "days", days=(0, 2)) == (["day_0", "day_2"], "days")


@pytest.mark.parametrize("method", ["iterdir", "is_dir", "exists"])
def test_a_folder_that_may_not_be_read_is_named(
    folder: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    def denied(path: Path) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    source = folder / "days"
    with monkeypatch.context() as patch:
        patch.setattr(Path, method, denied)
        with pytest.raises(EnvironmentFaultError) as caught:
            find_source(source, PrepareConfig())
    assert str(caught.value).startswith(f"cannot read {source}")
    assert "Permission denied" in str(caught.value)
    assert str(caught.value).endswith("Ask for access, or choose another place.")


def test_a_pipe_by_its_path_is_refused(tmp_path: Path) -> None:
    """What is looked at beforehand would be missing when it is read."""
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match=r"neither a file nor a folder.*dlrm prepare - DATASET"):
        find_source(tmp_path / "pipe", PrepareConfig())


def test_names_are_no_patterns(tmp_path: Path) -> None:
    (tmp_path / "ab_0_reordered.npz").touch()
    for name in ("a*", "a[b]", "a**b"):
        with pytest.raises(UserError, match="does not exist"):
            find_source(tmp_path / name, PrepareConfig())


def test_names_that_are_no_text_are_refused(tmp_path: Path) -> None:
    path = tmp_path / os.fsdecode(b"d\xe9.txt")
    path.touch()
    with pytest.raises(UserError, match=r"'d\\udce9\.txt' is not UTF-8"):
        find_source(path, PrepareConfig())


class Input:
    """Standard input that holds some bytes."""

    def __init__(self, content: bytes) -> None:
        self.buffer = io.BytesIO(content)

    def isatty(self) -> bool:
        return False


def test_standard_input_must_be_the_same_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spooled = tmp_path / "work" / "spool"
    config = PrepareConfig()

    def feed(content: bytes, *, anew: bool = False) -> bytes:
        monkeypatch.setattr("sys.stdin", Input(content))
        piped_source(spooled, config, anew=anew)
        return spooled.read_bytes()

    long = b"row\n" * 300_000  # more than is compared at a time
    assert feed(long) == long
    assert feed(long) == long
    assert feed(b"") == long
    for other in (b"x", long[:-1], long[: 1 << 20], long + b"x", b"x" + long[1:]):
        with pytest.raises(UserError, match="differs from what came through the pipe before"):
            feed(other)
    assert feed(b"x", anew=True) == b"x"
    with pytest.raises(UserError, match="standard input is empty"):
        feed(b"", anew=True)
