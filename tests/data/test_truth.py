"""A DATASET of made-up rows keeps what is known of them."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from dlrm.config import PrepareConfig
from dlrm.data.prepare import prepare
from dlrm.data.synthetic import Truth
from dlrm.files import read_json


def truth_in(folder: Path) -> Truth:
    return read_json(folder / "truth.json", Truth, "set of made-up data")


def test_the_truth_is_kept_where_it_is_of_the_same_splits(raw_rows: Path, dataset: Path) -> None:
    truth = truth_in(dataset)
    assert truth == truth_in(raw_rows)
    assert truth.test.samples == 214


@pytest.mark.parametrize(
    "options",
    [PrepareConfig(split="none"), PrepareConfig(data_sub_sample_rate=0.5)],
    ids=["no test split", "fewer rows"],
)
def test_it_is_not_kept_for_other_rows(
    options: PrepareConfig, raw_rows: Path, tmp_path: Path
) -> None:
    prepare(raw_rows, tmp_path / "dataset", options)
    assert not (tmp_path / "dataset/truth.json").exists()


@pytest.mark.parametrize("case", ["another file's", "damaged", "none"])
def test_a_truth_that_is_not_the_files_is_left(
    case: str, raw_rows: Path, dataset: Path, tmp_path: Path
) -> None:
    source = tmp_path / "raw"
    source.mkdir()
    lines = (raw_rows / "train.txt").read_bytes().splitlines(keepends=True)
    (source / "train.txt").write_bytes(b"".join(lines[:-1] if case == "another file's" else lines))
    if case != "none":
        shutil.copy(raw_rows / "truth.json", source)
    if case == "damaged":
        (source / "truth.json").write_text("{}")
    prepare(source, tmp_path / "dataset", PrepareConfig())
    assert not (tmp_path / "dataset/truth.json").exists()
