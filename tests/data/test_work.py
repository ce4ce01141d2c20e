from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

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
