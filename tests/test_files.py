import errno
import fcntl
import os
import stat
from pathlib import Path
from typing import IO

import pytest

from dlrm.errors import EnvironmentFaultError, UserError
from dlrm.files import atomic_write, link_or_copy, locked, write_json


def test_the_order_is_flush_file_rename_flush_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    fsync, replace = os.fsync, os.replace

    def note_fsync(descriptor: int) -> None:
        kind = "folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file"
        written = os.fstat(descriptor).st_size if kind == "file" else ""
        calls.append(f"flush {kind} {written}".strip())
        fsync(descriptor)

    def note_replace(source: Path, target: Path) -> None:
        calls.append(f"rename to {Path(target).name}")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(os, "replace", note_replace)
    with atomic_write(tmp_path / "a") as file:
        file.write(b"12345")
    assert calls == ["flush file 5", "rename to a", "flush folder"]
    calls.clear()
    link_or_copy(tmp_path / "a", tmp_path / "b")
    assert calls == ["rename to b", "flush folder"]
    link_or_copy(tmp_path / "a", tmp_path / "b")  # a second time
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


def test_an_exception_leaves_what_was_there(tmp_path: Path) -> None:
    write_json(tmp_path / "a", [1])
    before = (tmp_path / "a").read_bytes()

    def write_half() -> None:
        with atomic_write(tmp_path / "a") as file:
            file.write(b"half")
            raise KeyError

    with pytest.raises(KeyError):
        write_half()
    assert (tmp_path / "a").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_file_that_somebody_writes_is_refused_to_a_second(tmp_path: Path) -> None:
    target = tmp_path / "a"
    with atomic_write(target) as file:
        file.write(b"first")
        with (
            pytest.raises(UserError, match=r"/a is being written by another process\. Wait"),
            atomic_write(target),
        ):
            pass
        file.write(b" of two")
    assert target.read_bytes() == b"first of two"
    # What a killed process left is no hindrance, however long it is.
    (tmp_path / ".a.partial").write_bytes(b"much longer than what is written")
    with atomic_write(target) as file:
        file.write(b"second")
    assert target.read_bytes() == b"second"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("ended", ["well", "badly"])
def test_who_opens_a_file_just_before_its_writer_ends_begins_a_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ended: str
) -> None:
    target = tmp_path / "a"
    flock = fcntl.flock
    first = atomic_write(target)
    first.__enter__().write(b"first")

    def end_first(file: IO[bytes], operation: int) -> None:
        monkeypatch.undo()
        if ended == "well":
            first.__exit__(None, None, None)
        else:
            assert not first.__exit__(KeyError, KeyError(), None)
        flock(file, operation)

    monkeypatch.setattr(fcntl, "flock", end_first)
    with atomic_write(target) as file:
        # The first's is complete, and not emptied by the second.
        assert target.exists() == (ended == "well")
        assert ended == "badly" or target.read_bytes() == b"first"
        file.write(b"second")
    assert target.read_bytes() == b"second"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_where_there_are_no_locks_files_are_written_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(file: IO[bytes], operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    write_json(tmp_path / "a", [1])
    assert (tmp_path / "a").read_bytes() == b"[\n  1\n]\n"


def test_a_link_is_written_through_and_a_folder_or_pipe_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "real").write_text("old")
    (tmp_path / "link").symlink_to("real")
    with atomic_write(tmp_path / "link") as file:
        file.write(b"new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_text() == "new"
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for name in ("pipe", "folder"):
        with (
            pytest.raises(UserError, match="exists and is not a file"),
            atomic_write(tmp_path / name),
        ):
            pass
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)


def test_where_there_are_no_hard_links_a_file_is_copied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a").write_text("content")

    def refuse(source: Path, target: Path) -> None:
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    link_or_copy(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b").read_text() == "content"
    assert not (tmp_path / "b").samefile(tmp_path / "a")


@pytest.mark.parametrize(
    ("number", "remedy"), [(28, "Free some space"), (30, "can be written to"), (13, "access")]
)
def test_each_fault_names_what_helps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, remedy: str
) -> None:
    def fail(source: Path, target: Path) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(EnvironmentFaultError, match=remedy), atomic_write(tmp_path / "a"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_locked_folder_is_refused_and_free_again_afterwards(tmp_path: Path) -> None:
    other_name = tmp_path / "link"
    other_name.symlink_to("run")
    for name in (tmp_path / "run", other_name):
        with (
            locked(tmp_path / "run", "run"),
            pytest.raises(UserError, match="is being written by another process"),
            locked(name, "run"),
        ):
            pass
    other_name.unlink()
    with locked(tmp_path / "run", "run"):
        pass
    assert list(tmp_path.iterdir()) == []
