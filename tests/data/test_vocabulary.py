from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dlrm.data import vocabulary
from dlrm.data.vocabulary import Encoder, Vocabulary
from dlrm.errors import UserError
from dlrm.schema import FeatureSchema, SparseFeature


def uint32(*values: int) -> npt.NDArray[np.uint32]:
    return np.array(values, np.uint32)


def test_values_are_numbered_in_order_of_first_appearance() -> None:
    fitted, ids = vocabulary.fit([uint32(7, 3, 7), uint32(2**32 - 1, 3, 0)], value_modulus=0)
    assert ids.tolist() == [0, 1, 0, 2, 1, 3]
    assert fitted.values.tolist() == [0, 3, 7, 2**32 - 1]
    assert fitted.ids.tolist() == [3, 1, 0, 2]
    assert fitted.counts.tolist() == [1, 2, 2, 1]
    assert len(fitted) == 4
    assert fitted.encode(uint32(0, 1, 2**32 - 1, 2**32 - 2, 7)).tolist() == [3, -1, 2, -1, 0]


def test_the_modulus_acts_before_numbering() -> None:
    fitted, ids = vocabulary.fit([uint32(12, 5, 2, 15)], value_modulus=10)
    assert ids.tolist() == [0, 1, 0, 1]
    assert fitted.values.tolist() == [2, 5]
    assert fitted.counts.tolist() == [2, 2]


def test_an_empty_vocabulary_knows_nothing() -> None:
    fitted, ids = vocabulary.fit([], value_modulus=0)
    assert len(ids) == len(fitted) == 0
    assert fitted.encode(uint32(0, 5)).tolist() == [-1, -1]


@given(
    st.lists(st.lists(st.integers(0, 2**32 - 1) | st.integers(0, 9), max_size=20), max_size=5),
    st.sampled_from([0, 1, 7, 2**31 - 1]),
)
def test_fit_and_encode_against_a_dictionary(blocks: list[list[int]], modulus: int) -> None:
    expected: dict[int, int] = {}
    numbered = []
    for value in (value for block in blocks for value in block):
        numbered.append(expected.setdefault(value % modulus if modulus else value, len(expected)))
    fitted, ids = vocabulary.fit([uint32(*block) for block in blocks], value_modulus=modulus)
    assert ids.tolist() == numbered
    assert dict(zip(fitted.values.tolist(), fitted.ids.tolist(), strict=True)) == expected
    asked = uint32(*expected, *range(10), 2**32 - 1)
    assert fitted.encode(asked).tolist() == [expected.get(value, -1) for value in asked.tolist()]


@pytest.fixture
def described(tmp_path: Path) -> FeatureSchema:
    """The schema of two vocabularies that are in tmp_path."""
    (tmp_path / "vocabulary").mkdir()
    features = []
    for name, block in (("s_0", uint32(7, 3, 9)), ("s_1", uint32(100, 104, 100))):
        fitted, _ = vocabulary.fit([block], value_modulus=10)
        checksum = fitted.write(tmp_path / "vocabulary" / f"{name}.arrow")
        features.append(SparseFeature(name, len(fitted), f"{name}.arrow", checksum, 10))
    return FeatureSchema("label", (), tuple(features), "criteo-kaggle", "").sealed()


def test_encoder(tmp_path: Path, described: FeatureSchema) -> None:
    values = np.array([[9, 110], [17, 4], [8, 5]], np.uint32)
    expected = [[2, 0], [0, 1], [-1, -1]]
    assert Encoder.open(tmp_path, described).encode(values).tolist() == expected
    # A limit of ids is applied to batches, not here.
    limited = described.with_max_ind_range(1)
    assert Encoder.open(tmp_path, limited).encode(values).tolist() == expected
    assert Encoder.open(tmp_path, described).encode(values[:0]).shape == (0, 2)


def test_without_vocabularies_raw_rows_are_refused(
    tmp_path: Path, described: FeatureSchema
) -> None:
    sparse = (described.sparse[0], dataclasses.replace(described.sparse[1], vocabulary=""))
    schema = dataclasses.replace(described, sparse=sparse)
    with pytest.raises(UserError, match="cannot encode raw rows: it has no vocabulary for s_1,"):
        Encoder.open(tmp_path, schema)


def test_a_missing_or_damaged_vocabulary_is_refused(
    tmp_path: Path, described: FeatureSchema
) -> None:
    path = tmp_path / "vocabulary" / "s_1.arrow"
    content = path.read_bytes()
    for length in (0, 10, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:length])
        with pytest.raises(UserError, match=r"s_1\.arrow cannot be read: .*Prepare the dataset"):
            Encoder.open(tmp_path, described)
    path.unlink()
    with pytest.raises(UserError, match=r"s_1\.arrow cannot be read: .*No such file"):
        Encoder.open(tmp_path, described)


def test_another_vocabulary_is_refused(tmp_path: Path, described: FeatureSchema) -> None:
    path = tmp_path / "vocabulary" / "s_1.arrow"
    found = Vocabulary.read(path)
    Vocabulary(found.values, found.ids[::-1].copy(), found.counts).write(path)
    expected = described.sparse[1].vocabulary_sha256
    with pytest.raises(UserError, match=rf"s_1\.arrow does not belong to .* expected {expected}"):
        Encoder.open(tmp_path, described)


def test_a_file_of_other_columns_is_refused(tmp_path: Path, described: FeatureSchema) -> None:
    import pyarrow as pa

    path = tmp_path / "vocabulary" / "s_1.arrow"
    table = pa.table({"word": ["a"]})
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)
    with pytest.raises(UserError, match=r"has the columns \['word'\], expected value, id and"):
        Encoder.open(tmp_path, described)


def test_equal_values_give_equal_bytes(tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(0, 1000, 5000).astype(np.uint32)
    whole = vocabulary.fit([values], value_modulus=0)[0]
    blocks = vocabulary.fit(np.split(values, [10, 11, 4000]), value_modulus=0)[0]
    assert whole.write(tmp_path / "a.arrow") == blocks.write(tmp_path / "b.arrow")
    assert (tmp_path / "a.arrow").read_bytes() == (tmp_path / "b.arrow").read_bytes()
