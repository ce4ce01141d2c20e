from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from dlrm.config import PrepareConfig
from dlrm.data import dataset as dataset_module
from dlrm.data.dataset import Dataset, Manifest, Rows, write_dataset
from dlrm.data.prepare import prepare
from dlrm.data.verification import verify
from dlrm.data.vocabulary import Vocabulary, write_vocabulary
from dlrm.errors import UserError
from dlrm.schema import SPLITS, DenseFeature, FeatureSchema, SparseFeature, write_schema


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory, made_up_lines: Callable[..., bytes]) -> Path:
    """A DATASET of some parts; do not change it."""
    folder = tmp_path_factory.mktemp("prepared")
    (folder / "train.txt").write_bytes(made_up_lines(100))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dataset_module, "BLOCK_BYTES", 2000)
        patch.setattr(dataset_module, "PART_BYTES", 5000)
        prepare(folder, folder / "dataset", PrepareConfig(min_frequency=2))
    return folder / "dataset"


@pytest.fixture
def path(prepared: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(prepared, tmp_path / "dataset"))


def test_a_whole_dataset_is_summarised(path: Path) -> None:
    dataset = Dataset.open(path)
    verification = verify(dataset)
    splits = dataset.manifest.splits
    assert verification.rows == {"train": 86, "validation": 7, "test": 7}
    assert verification.click_rate == {
        split: splits[split].clicks / splits[split].rows for split in SPLITS
    }
    assert verification.parts == sum(len(splits[split].parts) for split in SPLITS) > 4
    assert verification.vocabularies == 26


def test_a_flipped_byte_of_rows_or_vocabularies_is_named(path: Path) -> None:
    files = sorted(path.rglob("*.arrow"))
    assert len(files) > 30
    generator = np.random.default_rng(0)
    for file in files:
        content = file.read_bytes()
        for place in generator.integers(0, len(content), 3).tolist():
            flipped = content[place] ^ 1 << int(generator.integers(8))
            file.write_bytes(content[:place] + bytes([flipped]) + content[place + 1 :])
            with pytest.raises(UserError) as caught:
                verify(Dataset.open(path))
            assert str(caught.value).startswith(f"{file} is damaged: its SHA-256 is ")
        file.write_bytes(content)
    verify(Dataset.open(path))


# What there is nothing to compare with.
UNCHECKED = {
    "manifest.json": {
        "sources", "options", "missing", "rows_dropped", "rows_rejected", "rejected",
        "rejected_examples",
    },
    "schema.json": {"split_rule"},
}  # fmt: skip


@pytest.mark.parametrize("name", UNCHECKED)
def test_a_flipped_byte_of_a_description_is_named(path: Path, name: str) -> None:
    file = path / name
    content = file.read_bytes()

    def description() -> Manifest | FeatureSchema:
        dataset = Dataset.open(path)
        return dataset.manifest if name == "manifest.json" else dataset.schema

    whole = description()
    messages = []
    for place in range(0, len(content), 17):
        file.write_bytes(content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :])
        try:
            verify(Dataset.open(path))
        except UserError as error:
            messages.append(str(error))
            continue
        changed = description()
        for field in dataclasses.fields(changed):
            value = getattr(changed, field.name)
            if value != getattr(whole, field.name) and field.name not in UNCHECKED[name]:
                # Its name is misspelt, and so it is not there, as in an older version.
                assert value == field.default
    assert len(messages) > len(content) // 17 // 2
    assert all(str(path) in message for message in messages)


@pytest.mark.parametrize("name", ["train/part-00001.arrow", "vocabulary/cat_3.arrow"])
def test_a_missing_file_is_named(path: Path, name: str) -> None:
    (path / name).unlink()
    with pytest.raises(UserError, match=rf"{name} is damaged: .*(no file|it is missing)"):
        verify(Dataset.open(path))


def edited(path: Path, change: Callable[[dict[str, Any]], None]) -> Dataset:
    manifest = json.loads((path / "manifest.json").read_text())
    change(manifest)
    (path / "manifest.json").write_text(json.dumps(manifest))
    return Dataset.open(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda manifest: manifest["splits"]["train"].update(rows=87),
            r"manifest\.json: expected 87 rows in the train split, got 86\.",
        ),
        (
            lambda manifest: manifest["splits"]["test"].update(clicks=7),
            r"manifest\.json: expected 7 clicks in the test split, got [0-6]\.",
        ),
        (
            lambda manifest: manifest["splits"]["test"]["parts"][0].update(rows=6),
            r"manifest\.json: expected 7 rows in the test split, got 6\.",
        ),
        (
            lambda manifest: manifest["splits"]["train"]["parts"].pop(),
            r"manifest\.json: expected 86 rows in the train split, got ",
        ),
        (
            lambda manifest: manifest["days"].append(1),
            r"manifest\.json: expected 100 rows on all days, as in all splits, got 101\.",
        ),
        (
            lambda manifest: manifest.update(day_clicks=[1, 2]),
            r"manifest\.json: expected [0-9]+ clicks on all days, as in all splits, got 3\.",
        ),
    ],
)
def test_wrong_counts_are_named(
    path: Path, change: Callable[[dict[str, Any]], None], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        verify(edited(path, change))


def test_ids_beyond_num_embeddings_are_named(tmp_path: Path) -> None:
    schema = FeatureSchema(
        "label", (DenseFeature("d"),), (SparseFeature("s", 5),), "made-up", "none"
    )
    ids = np.array([[4], [0], [-1]], np.int32)
    rows = Rows(np.zeros(3, np.uint8), np.zeros((3, 1), np.int32), ids)
    verify(write_dataset(tmp_path / "whole", schema, {"train": [rows]}))
    ids[1] = 5
    dataset = write_dataset(tmp_path / "beyond", schema, {"train": [rows]})
    with pytest.raises(UserError, match=r"part-00000\.arrow is damaged: expected labels 0 or 1"):
        verify(dataset)


def with_vocabulary(path: Path, vocabulary: Vocabulary) -> Dataset:
    """A DATASET without rows whose only feature has three values, and another slot."""
    feature = SparseFeature("s", 4, "s.arrow", other_id=3)
    schema = FeatureSchema("label", (), (feature,), "made-up", "none")
    write_dataset(path, schema, {})
    (path / "vocabulary").mkdir()
    checksum = write_vocabulary(path / "vocabulary" / "s.arrow", [vocabulary])
    feature = dataclasses.replace(feature, vocabulary_sha256=checksum)
    schema = dataclasses.replace(schema, sparse=(feature,)).sealed()
    write_schema(path, schema)
    return edited(path, lambda manifest: manifest.update(schema_fingerprint=schema.fingerprint))


def numbered(values: list[int], ids: list[int]) -> Vocabulary:
    ones: npt.NDArray[np.int64] = np.ones(len(values), np.int64)
    return Vocabulary(np.array(values, np.uint32), np.array(ids, np.int32), ones)


@pytest.mark.parametrize(
    ("values", "ids", "reason"),
    [
        ([5, 7, 2**32 - 1], [2, 0, 1], ""),
        ([5, 5, 9], [2, 0, 1], "its values are not ascending"),
        ([5, 2**31 + 1, 9], [2, 0, 1], "its values are not ascending"),
        ([5, 7, 9], [2, 0, 2], "its ids are not 0 … 2, each once"),
        ([5, 7], [1, 0], "its ids are not 0 … 2, each once"),
        ([5, 7, 9, 10], [2, 0, 1, 1], "its ids are not 0 … 2, each once"),
        ([5, 7, 9], [2, 0, 3], "its ids are not all in 0 … 2"),
        ([5, 7, 9], [2, 0, -1], "its ids are not all in 0 … 2"),
        ([], [], "its ids are not 0 … 2, each once"),
    ],
)
def test_a_vocabulary_that_does_not_number_its_values_is_named(
    tmp_path: Path, values: list[int], ids: list[int], reason: str
) -> None:
    dataset = with_vocabulary(tmp_path / "dataset", numbered(values, ids))
    if not reason:
        verify(dataset)
        return
    with pytest.raises(UserError, match=rf"s\.arrow is damaged: {reason}"):
        verify(dataset)
