from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dlrm.config import PrepareConfig
from dlrm.data.dataset import Source
from dlrm.data.work import Inputs, Work

INPUTS = Inputs((Source("train.txt", 5, 7, ""),), PrepareConfig(seed=5, days=(1, 2)))


@pytest.fixture
def work(tmp_path: Path) -> Work:
    """A preparation that is under way, from a pipe."""
    work = Work(tmp_path / "dataset")
    work.folder.mkdir()
    work.piped.write_text("piped")
    work.begin(INPUTS)
    (work.folder / "spool").mkdir()
    (work.folder / "spool" / "rows").write_text("rows")
    (work.dataset / "train" / "part").write_text("part")
    return work


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    work = Work(tmp_path / "dataset")
    assert work.folder == tmp_path / ".dataset.work"
    assert not work.is_begun
    assert not work.is_published
    assert not work.is_left_over
    assert work.bytes == 0
    work.clear()
    work.remove()
    assert list(tmp_path.iterdir()) == []


def test_what_was_begun_is_known(work: Work) -> None:
    assert work.is_begun
    assert not work.is_published
    assert not work.is_left_over
    assert work.begun_with() == INPUTS
    # What came through the pipe is not made.
    record = work.folder / "inputs.json"
    assert work.bytes == len("rows") + len("part") + record.stat().st_size


def test_once_the_dataset_is_in_its_place_only_tidying_up_is_missing(work: Work) -> None:
    work.dataset.rename(work.folder.with_name("dataset"))
    assert work.is_published
    assert not work.is_begun
    assert not work.is_left_over


def test_clearing_leaves_what_came_through_a_pipe(work: Work) -> None:
    work.clear()
    assert [path.name for path in work.folder.iterdir()] == ["source.spool"]
    assert not work.is_begun
    assert not work.is_left_over


def test_removing_leaves_nothing(work: Work) -> None:
    work.remove()
    assert not work.folder.exists()


@pytest.mark.parametrize("method", [Work.clear, Work.remove])
def test_removed_in_part_it_is_nothing_to_go_on_with(
    work: Work, monkeypatch: pytest.MonkeyPatch, method: Callable[[Work], None]
) -> None:
    def killed(_: Path) -> None:
        raise KeyboardInterrupt

    listed = Path.iterdir
    with monkeypatch.context() as patch:
        # Folders come first, as they may on any disk.
        patch.setattr(Path, "iterdir", lambda path: sorted(listed(path), key=Path.is_file))
        patch.setattr(shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            method(work)
    assert not work.is_begun
    assert not work.is_published
    assert work.is_left_over == (method is Work.remove)


@pytest.mark.parametrize("place", range(1, 9))
def test_killed_anywhere_while_it_is_removed_all_of_it_is_gone_or_nothing(
    work: Work, monkeypatch: pytest.MonkeyPatch, place: int
) -> None:
    left = [place]

    def killing(function: Callable[..., None]) -> Callable[..., None]:
        def call(*arguments: Any, **options: Any) -> None:
            left[0] -= 1
            if not left[0]:
                raise KeyboardInterrupt
            function(*arguments, **options)

        return call

    with monkeypatch.context() as patch:
        for name in ("unlink", "rmdir", "replace"):
            patch.setattr(os, name, killing(getattr(os, name)))
        with pytest.raises(KeyboardInterrupt):
            work.remove()
    assert not work.is_published
    assert work.is_begun == work.piped.exists() == work.folder.exists()
    if not work.is_begun:
        assert work.is_left_over
        work.begin(INPUTS)  # as the next one may, before anything is tidied up
    work.tidy()
    assert not work.is_left_over
    assert work.is_begun
    assert [path.name for path in work.folder.parent.iterdir()] == [".dataset.work"]


@pytest.mark.parametrize("name", ["replace", "fsync"])
def test_on_a_disk_that_takes_no_new_names_it_is_removed_in_place(
    work: Work, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, name, full)
    work.remove()
    assert list(work.folder.parent.iterdir()) == []
