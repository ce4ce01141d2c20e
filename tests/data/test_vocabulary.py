from __future__ import annotations

import dataclasses
import gc
import hashlib
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dlrm.data import vocabulary
from dlrm.data.vocabulary import (
    Encoder,
    Vocabulary,
    hashed,
    values_of_ids,
    write_vocabulary,
)
from dlrm.errors import UserError
from dlrm.ops.library import Library, library
from dlrm.schema import FeatureSchema, SparseFeature


def uint32(*values: int) -> npt.NDArray[np.uint32]:
    return np.array(values, np.uint32)


def fitted(*values: int, modulus: int = 0) -> Vocabulary:
    """The vocabulary of values, by a dictionary: ids in order of first appearance."""
    ids: dict[int, int] = {}
    counts: Counter[int] = Counter()
    for value in values:
        value = value % modulus if modulus else value
        ids.setdefault(value, len(ids))
        counts[value] += 1
    ascending = sorted(ids)
    return Vocabulary(
        uint32(*ascending),
        np.array([ids[value] for value in ascending], np.int32),
        np.array([counts[value] for value in ascending], np.int64),
    )


def test_a_value_is_looked_up() -> None:
    known = Vocabulary(
        uint32(0, 3, 7, 2**32 - 1), np.array([3, 1, 0, 2], np.int32), np.array([1, 2, 2, 1])
    )
    assert len(known) == 4
    asked = uint32(0, 1, 2**32 - 1, 2**32 - 2, 7)
    assert known.encode(asked).tolist() == [3, -1, 2, -1, 0]


def test_an_empty_vocabulary_knows_nothing() -> None:
    empty = fitted()
    assert len(empty) == 0
    assert empty.encode(uint32(0, 5)).tolist() == [-1, -1]


@given(st.lists(st.integers(0, 2**32 - 1) | st.integers(0, 9), max_size=50))
def test_encode_against_a_dictionary(values: list[int]) -> None:
    expected: dict[int, int] = {}
    for value in values:
        expected.setdefault(value, len(expected))
    asked = uint32(*expected, *range(10), 2**32 - 1)
    assert fitted(*values).encode(asked).tolist() == [
        expected.get(value, -1) for value in asked.tolist()
    ]


@pytest.mark.parametrize("batch_values", [16, 64, 1024])
@pytest.mark.parametrize("cuts", [[], [0], [30, 30, 40], range(1, 100), [63, 64, 97]])
def test_what_is_written_is_read_back_however_it_was_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cuts: Sequence[int], batch_values: int
) -> None:
    whole = fitted(*(value * 97 % 101 for value in range(303)))
    monkeypatch.setattr(vocabulary, "_BATCH_VALUES", batch_values)
    ranges = [
        Vocabulary(whole.values[low:high], whole.ids[low:high], whole.counts[low:high])
        for low, high in pairwise([0, *cuts, 101])
    ]
    path = tmp_path / "cut.arrow"
    checksum = write_vocabulary(path, ranges)
    assert checksum == hashlib.sha256(path.read_bytes()).hexdigest()
    read = Vocabulary.read(path)
    for name in ("values", "ids", "counts"):
        assert getattr(read, name).dtype == getattr(whole, name).dtype
        assert getattr(read, name).tolist() == getattr(whole, name).tolist()
    assert write_vocabulary(tmp_path / "whole.arrow", [whole]) == checksum
    with pa.OSFile(str(path)) as file:
        batches = pa.ipc.open_file(file)
        lengths = [batches.get_batch(n).num_rows for n in range(batches.num_record_batches)]
    full, rest = divmod(101, batch_values)
    assert lengths == [batch_values] * full + [rest]


def test_an_empty_vocabulary_is_a_file_too(tmp_path: Path) -> None:
    write_vocabulary(tmp_path / "none.arrow", [])
    write_vocabulary(tmp_path / "empty.arrow", [fitted()])
    assert (tmp_path / "none.arrow").read_bytes() == (tmp_path / "empty.arrow").read_bytes()
    assert len(Vocabulary.read(tmp_path / "none.arrow")) == 0


@pytest.fixture
def described(tmp_path: Path) -> FeatureSchema:
    """The schema of two vocabularies that are in tmp_path."""
    (tmp_path / "vocabulary").mkdir()
    features = []
    for name, values in (("s_0", (7, 3, 9)), ("s_1", (100, 104, 100))):
        known = fitted(*values, modulus=10)
        checksum = write_vocabulary(tmp_path / "vocabulary" / f"{name}.arrow", [known])
        features.append(SparseFeature(name, len(known), f"{name}.arrow", checksum, 10))
    return FeatureSchema("label", (), tuple(features), "criteo-kaggle", "").sealed()


def test_encoder(tmp_path: Path, described: FeatureSchema) -> None:
    values = np.array([[9, 110], [17, 4], [8, 5], [28, 10]], np.uint32)
    expected = [[2, 0], [0, 1], [-1, -1], [-1, 0]]
    ids, unknown = Encoder.open(tmp_path, described).encode(values)
    assert ids.tolist() == expected
    assert ids.dtype == np.int32
    assert unknown.tolist() == [2, 1]
    # A limit of ids is applied to batches, not here.
    limited = described.with_max_ind_range(1)
    assert Encoder.open(tmp_path, limited).encode(values)[0].tolist() == expected
    none, unknown = Encoder.open(tmp_path, described).encode(values[:0])
    assert none.shape == (0, 2)
    assert unknown.tolist() == [0, 0]


@pytest.fixture(params=["native", "plain"])
def lookups(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Look values up in this way, whatever there is."""
    if request.param == "plain":
        monkeypatch.setattr(vocabulary, "library", lambda: Library(False, "plain"))
    elif not library().loaded:
        pytest.skip(library().reason)
    return str(request.param)


SPREADS = {
    "hashed": lambda random, size: random.integers(0, 2**32, size),
    "consecutive": lambda random, size: np.arange(size) + 5,
    "skewed": lambda random, size: np.floor(2.0 ** (32 * random.random(size) ** 8)) - 1,
    "two heaps": lambda random, size: np.append(np.arange(size), 2**32 - 1 - np.arange(size)),
    "outliers": lambda random, size: np.append(7_000 + np.arange(size), [0, 2**32 - 1]),
    "one": lambda random, size: np.array([9]),
    "none": lambda random, size: np.array([], np.int64),
}


@pytest.mark.parametrize("spread", SPREADS)
def test_encoder_against_a_dictionary(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lookups: str, spread: str
) -> None:
    """However values are spread, cut into parts, and asked for."""
    random = np.random.default_rng(0)
    monkeypatch.setattr(vocabulary, "_BATCH_VALUES", 1024)
    (tmp_path / "vocabulary").mkdir()
    features, dictionaries = [], []
    for number, size in enumerate((3000, 40, 2500)):
        values = np.unique(SPREADS[spread](random, size).astype(np.uint32))
        ids = random.permutation(len(values)).astype(np.int32)
        dictionaries.append(dict(zip(values.tolist(), ids.tolist(), strict=True)))
        known = Vocabulary(values, ids, np.ones(len(values), np.int64))
        name = f"s_{number}"
        checksum = write_vocabulary(tmp_path / "vocabulary" / name, [known])
        other = len(values) if number == 1 else -1
        features.append(SparseFeature(name, len(values) + 1, name, checksum, other_id=other))
    hashes = SparseFeature("s_3", 100, hash_buckets=100)
    schema = FeatureSchema("label", (), (*features, hashes), "criteo-kaggle", "").sealed()
    encoder = Encoder.open(tmp_path, schema)
    asked = random.integers(0, 2**32, (3001, 4)).astype(np.uint32)
    for number, known_ids in enumerate(dictionaries):
        keys = np.array(list(known_ids), np.uint32)
        near = np.concatenate([keys, keys + np.uint32(1), keys - np.uint32(1)])
        asked[: len(near), number] = random.permutation(near)[: len(asked)]
    asked[:2] = [[0] * 4, [2**32 - 1] * 4]
    ids, unknown = encoder.encode(asked)
    for number, (feature, known_ids) in enumerate(zip(features, dictionaries, strict=True)):
        expected = [known_ids.get(value, feature.other_id) for value in asked[:, number].tolist()]
        assert ids[:, number].tolist() == expected
        assert unknown[number] == sum(v not in known_ids for v in asked[:, number].tolist())
    assert ids[:, 3].tolist() == hashed(asked[:, 3], 100).tolist()
    # Few rows, which fill no group, and some features, in another order.
    for rows in (1, 2, 7):
        assert encoder.encode(asked[:rows])[0].tolist() == ids[:rows].tolist()
    # Values by feature, some of which are meant for all rows.
    for rows in (0, 1, 2, 3001):
        flat = np.concatenate([asked[:rows, 3], asked[7:8, 0], asked[:rows, 2], asked[9:10, 1]])
        columns = np.array([[rows, 0], [2 * rows + 1, 0], [rows + 1, 1], [0, 1]])
        expected = ids[:rows].copy()
        expected[:, 0], expected[:, 1] = ids[7, 0], ids[9, 1]
        encoded, missed = encoder.encode_columns(flat, columns, rows)
        assert encoded.tolist() == expected.tolist()
        others = [feature.other_id for feature in features]
        assert missed[:3].tolist() == (expected[:, :3] == others).sum(axis=0).tolist()
    if lookups == "native":
        for columns in ([[0, 5]], [[-1, 1]], [[0, -1]], [[1, 1]], [[0, 2**62]], [[2**62, 2**62]]):
            with pytest.raises(RuntimeError, match="a column lies within the values"):
                encoder.encode_columns(asked[:, 0], np.array(columns * 4), len(asked))


def test_threads_share_an_encoder(tmp_path: Path, described: FeatureSchema) -> None:
    encoder = Encoder.open(tmp_path, described)
    values = np.random.default_rng(0).integers(0, 12, (4, 5000, 2)).astype(np.uint32)
    alone = [encoder.encode(each)[0].tolist() for each in values]
    with ThreadPoolExecutor(4) as pool:
        assert [found.tolist() for found, _ in pool.map(encoder.encode, values)] == alone


def test_vocabularies_are_mapped_and_not_read(tmp_path: Path, described: FeatureSchema) -> None:
    """Processes share what they look at of them."""
    encoder = Encoder.open(tmp_path, described)
    mapped = Path("/proc/self/smaps").read_text()
    assert str(tmp_path / "vocabulary" / "s_0.arrow") in mapped
    del encoder
    gc.collect()
    assert str(tmp_path / "vocabulary" / "s_0.arrow") not in Path("/proc/self/maps").read_text()


def test_values_that_do_not_ascend_are_refused(tmp_path: Path, lookups: str) -> None:
    (tmp_path / "vocabulary").mkdir()
    for values in ([3, 3, 9], [3, 9, 4]):
        damaged = Vocabulary(uint32(*values), np.arange(3, dtype=np.int32), np.ones(3, np.int64))
        checksum = write_vocabulary(tmp_path / "vocabulary" / "s_0.arrow", [damaged])
        feature = SparseFeature("s_0", 3, "s_0.arrow", checksum)
        schema = FeatureSchema("label", (), (feature,), "criteo-kaggle", "").sealed()
        with pytest.raises(UserError, match=r"s_0\.arrow is damaged: its values do not ascend"):
            Encoder.open(tmp_path, schema, verified=True)


def test_unknown_values_get_the_other_slot(tmp_path: Path, described: FeatureSchema) -> None:
    sparse = (
        dataclasses.replace(described.sparse[0], num_embeddings=4, other_id=3),
        described.sparse[1],
    )
    encoder = Encoder.open(tmp_path, dataclasses.replace(described, sparse=sparse))
    ids, unknown = encoder.encode(np.array([[9, 5], [8, 4], [1, 7]], np.uint32))
    assert ids.tolist() == [[2, -1], [3, 1], [3, -1]]
    assert unknown.tolist() == [2, 2]


def test_hashed_values_need_no_vocabulary(tmp_path: Path) -> None:
    def splitmix64_of(value: int) -> int:
        mask = 2**64 - 1
        value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & mask
        value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & mask
        return value ^ (value >> 31)

    buckets, modulus = 1000, 70_000
    features = (
        SparseFeature("s_0", buckets, hash_buckets=buckets),
        SparseFeature("s_1", buckets, hash_buckets=buckets, value_modulus=modulus),
    )
    schema = FeatureSchema("label", (), features, "criteo-kaggle", "").sealed()
    values = np.random.default_rng(0).integers(0, 2**32, (5000, 2)).astype(np.uint32)
    values[0], values[1] = 0, 2**32 - 1
    ids, unknown = Encoder.open(tmp_path, schema).encode(values)
    assert ids.tolist() == [
        [
            (splitmix64_of(first) >> 32) * buckets >> 32,
            (splitmix64_of(second % modulus) >> 32) * buckets >> 32,
        ]
        for first, second in values.tolist()
    ]
    assert ids.dtype == np.int32
    assert unknown.tolist() == [0, 0]
    once = np.array([[2, 0], [3, 0]])  # the same values in both rows
    common, _ = Encoder.open(tmp_path, schema).encode_columns(values.reshape(-1), once, 2)
    assert common.tolist() == [ids[1].tolist()] * 2
    # Evenly: chi-squared with 999 degrees of freedom.
    statistic = ((np.bincount(ids[:, 0], minlength=buckets) - 5) ** 2 / 5).sum()
    assert abs(statistic - 999) < 4 * np.sqrt(2 * 999)
    for largest in (1, 2, 2**31 - 1):
        edges = hashed(np.array([0, 1, 2**32 - 1, *values[:100, 0]], np.uint32), largest)
        assert edges.min() >= 0
        assert edges.max() < largest


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


def test_a_verified_vocabulary_is_not_verified_again(
    tmp_path: Path, described: FeatureSchema, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(vocabulary, "sha256")
    encoder = Encoder.open(tmp_path, described, verified=True)
    assert encoder.encode(uint32(7, 100)[None])[0].tolist() == [[0, 0]]


def test_another_vocabulary_is_refused(tmp_path: Path, described: FeatureSchema) -> None:
    path = tmp_path / "vocabulary" / "s_1.arrow"
    found = Vocabulary.read(path)
    write_vocabulary(path, [Vocabulary(found.values, found.ids[::-1].copy(), found.counts)])
    expected = described.sparse[1].vocabulary_sha256
    with pytest.raises(UserError, match=rf"s_1\.arrow does not belong to .* expected {expected}"):
        Encoder.open(tmp_path, described)


def test_a_file_of_other_columns_is_refused(tmp_path: Path, described: FeatureSchema) -> None:
    path = tmp_path / "vocabulary" / "s_1.arrow"
    table = pa.table({"word": ["a"]})
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)
    with pytest.raises(UserError, match=r"has the columns \['word'\], expected value, id and"):
        Encoder.open(tmp_path, described)


def test_raw_values_of_ids_by_hand() -> None:
    own = Vocabulary(
        np.array([0, 1, 5], np.uint32), np.array([2, 0, 1], np.int32), np.ones(3, np.int64)
    )
    asked = np.array([0, 1, 2, -1, 3], np.int32)
    values, found = values_of_ids(SparseFeature("a", 4), own, asked)
    assert values.tolist() == [1, 5, 0, 2, 0]  # 2: the smallest that is not in it
    assert found.tolist() == [True, True, True, True, False]
    values, found = values_of_ids(SparseFeature("a", 4, other_id=3), own, asked)
    assert values.tolist() == [1, 5, 0, 0, 2]
    assert found.tolist() == [True, True, True, False, True]
    # Both residues are known, so that no value is unknown.
    values, found = values_of_ids(
        SparseFeature("a", 4, value_modulus=2),
        Vocabulary(own.values[:2], own.ids[:2], own.counts[:2]),
        asked,
    )
    assert found.tolist() == [True, False, True, False, False]


@pytest.mark.parametrize(
    "change",
    [{"vocabulary": "v.arrow"}, {"vocabulary": "v.arrow", "other_id": 40}, {"hash_buckets": 41}],
    ids=str,
)
def test_decoded_ids_are_encoded_again(tmp_path: Path, change: dict[str, Any]) -> None:
    random = np.random.default_rng(0)
    values = np.sort(random.choice(2**32, 40, replace=False)).astype(np.uint32)
    own = Vocabulary(values, random.permutation(40).astype(np.int32), np.ones(40, np.int64))
    (tmp_path / "vocabulary").mkdir()
    digest = write_vocabulary(tmp_path / "vocabulary/v.arrow", [own])
    feature = SparseFeature("a", 41, vocabulary_sha256=digest, **change)
    schema = FeatureSchema("y", (), (feature,), "made-up", "none")
    encoder = Encoder.open(tmp_path, schema)
    lowest = 0 if "hash_buckets" in change or "other_id" in change else -1
    ids = random.integers(lowest, 40, (500, 1), dtype=np.int32)
    decoded, found = encoder.decode(ids)
    assert found.all()
    np.testing.assert_array_equal(encoder.encode(decoded)[0], ids)
