import os
import stat
from pathlib import Path

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
