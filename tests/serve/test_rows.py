import dataclasses
import re
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dlrm.data.batch import Batch
from dlrm.schema import DenseFeature, FeatureSchema, SparseFeature
from dlrm.serve.protocol import DTYPES, RefusedError, Tensor
from dlrm.serve.rows import Reader, SentRows

SCHEMA = FeatureSchema(
    "label",
    (DenseFeature("d0"), DenseFeature("d1")),
    tuple(SparseFeature(f"s{place}", 10, hash_buckets=10) for place in range(3)),
    "criteo-kaggle",
    "",
)
READER = Reader(SCHEMA, 8)


def numbers(name: str, datatype: str, elements: Any, *shape: int) -> Tensor:
    array = np.array(elements, DTYPES[datatype])
    return Tensor(name, datatype, shape or array.shape, array.reshape(-1))


def texts(name: str, elements: list[Any], *shape: int) -> Tensor:
    return Tensor(name, "BYTES", shape or (len(elements),), texts=elements)


def packed(name: str, elements: list[bytes], *shape: int) -> Tensor:
    data = b"".join(len(each).to_bytes(4, "little") + each for each in elements)
    return Tensor(name, "BYTES", shape or (len(elements),), packed=memoryview(data))


def read(*tensors: Tensor, reader: Reader = READER) -> SentRows:
    rows = reader.read({tensor.name: tensor for tensor in tensors})
    assert isinstance(rows, SentRows)
    return rows


def refused(*tensors: Tensor, reader: Reader = READER) -> str:
    with pytest.raises(RefusedError) as caught:
        reader.read({tensor.name: tensor for tensor in tensors})
    return str(caught.value)


def values(rows: SentRows) -> np.ndarray:
    """The sparse values of every row, (n, F)."""
    places = rows.columns[:, 0] + np.arange(len(rows))[:, None] * rows.columns[:, 1]
    return rows.values[places]


DENSE = (numbers("d0", "INT32", [1, -5]), numbers("d1", "FP32", [np.nan, 7], 2, 1))
TEXTS = ["000000ff", "deadbeef", "00000003", "", "00000010", "00000004"]
EXPECTED = [[255, 0xDEADBEEF, 3], [0, 16, 4]]


@pytest.mark.parametrize(
    "sparse",
    [
        (
            texts("s0", ["000000ff", None]),
            texts("s1", ["DEADbeef", "00000010"], 2, 1),
            numbers("s2", "INT64", [3, 4]),
        ),
        (
            packed("s0", [b"000000ff", b""]),
            packed("s1", [b"deadbeef", b"00000010"]),
            packed("s2", [b"00000003", b"00000004"]),
        ),
        (texts("sparse", TEXTS, 2, 3),),
        (packed("sparse", [each.encode() for each in TEXTS], 2, 3),),
        (numbers("sparse", "UINT32", EXPECTED),),
    ],
    ids=["named", "packed", "matrix", "packed matrix", "numbers"],
)  # fmt: skip
def test_features_come_by_name_or_as_matrices(sparse: tuple[Tensor, ...]) -> None:
    for dense in (DENSE, (numbers("dense", "FP32", [[1, np.nan], [-5, 7]]),)):
        rows = read(*dense, *sparse)
        assert rows.dense.tolist() == [[1, 0], [0, 7]]
        assert values(rows).tolist() == EXPECTED
        assert (len(rows), len(rows.values)) == (2, 6)


def test_what_comes_once_is_meant_for_each_row() -> None:
    rows = read(
        numbers("d0", "INT32", [5]),
        numbers("d1", "INT64", [1, 2, 3]),
        texts("s0", ["000000ff"]),
        texts("s1", ["00000001", "00000002", ""]),
        packed("s2", [b"00000009"], 1, 1),
    )
    assert rows.dense.tolist() == [[5, 1], [5, 2], [5, 3]]
    assert values(rows).tolist() == [[255, 1, 9], [255, 2, 9], [255, 0, 9]]
    assert rows.columns[:, 1].tolist() == [0, 1, 0]  # the others are looked up once
    once = read(
        numbers("dense", "INT32", [[5, 6], [7, 8]]), texts("sparse", ["0000000a"] * 3, 1, 3)
    )
    assert values(once).tolist() == [[10, 10, 10]] * 2
    assert once.columns[:, 1].tolist() == [0, 0, 0]
    once = read(numbers("dense", "INT32", [[5, 6]]), numbers("sparse", "UINT32", [[1] * 3] * 2))
    assert once.dense.tolist() == [[5, 6]] * 2


def test_no_rows_are_no_error() -> None:
    nothing = numbers("dense", "INT32", [], 0, 2), texts("sparse", [], 0, 3)
    assert read(*nothing).dense.shape == (0, 2)
    named = [numbers(name, "INT32", []) for name in ("d0", "d1", "s0", "s1")]
    assert read(*named, packed("s2", [])).dense.shape == (0, 2)


SPARSE = numbers("sparse", "UINT32", [[1, 2, 3]])


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ((), "inputs are missing: 'd0', 'd1', 's0', 's1', 's2'"),
        ((*DENSE, numbers("s0", "INT32", [1])), "inputs are missing: 's1', 's2'"),
        ((*DENSE, SPARSE, numbers("other", "INT32", [1])), "does not take: 'other'"),
        ((*DENSE, SPARSE, numbers("s0", "INT32", [1])), "does not take: 's0'"),
        ((DENSE[0], numbers("d1", "INT32", [1, 2, 3]), SPARSE), "'d1' has 3 rows, and 'd0' has 2"),
        ((DENSE[0], numbers("d1", "INT32", [[1, 2]]), SPARSE), "'d1' must have the shape"),
        ((*DENSE, numbers("sparse", "UINT32", [1, 2, 3])), "shape [rows, 3]; got [3]"),
        ((*DENSE, numbers("sparse", "UINT32", [[1, 2]])), "must have the shape [rows, 3]"),
        ((numbers("d0", "FP32", [0.5]), DENSE[1], SPARSE), "'d0' holds 0.5; a dense feature"),
        ((numbers("d0", "FP32", [np.inf]), DENSE[1], SPARSE), "'d0' holds inf"),
        ((numbers("d0", "FP16", [np.inf]), DENSE[1], SPARSE), "'d0' holds inf"),
        ((numbers("d0", "INT64", [2**31]), DENSE[1], SPARSE), "'d0' holds 2147483648"),
        ((texts("d0", ["1"]), DENSE[1], SPARSE), "'d0' is BYTES, and a dense feature is a number"),
        ((*DENSE, numbers("sparse", "FP32", [[1, 2, 3]])), "'sparse' is FP32, and a sparse"),
        ((*DENSE, numbers("sparse", "INT64", [[1, -2, 3]])), "holds -2; a sparse value"),
        ((*DENSE, numbers("sparse", "INT64", [[1, 2**32, 3]])), "holds 4294967296"),
        ((*DENSE, texts("sparse", ["00000001", "", "1"], 1, 3)), "element 2 is '1'; a sparse"),
        ((*DENSE, texts("sparse", ["0000000g", "", ""], 1, 3)), "element 0 is '0000000g'"),
        ((*DENSE, texts("sparse", ["0000000\u00e9", "", ""], 1, 3)), "element 0 is"),
        ((*DENSE, texts("sparse", ["000 0000", "", ""], 1, 3)), "element 0 is '000 0000'"),
        ((*DENSE, packed("sparse", [b"00000001", b"", b"1"], 1, 3)), "element 2 is '1'"),
        ((*DENSE, packed("sparse", [b"\xff" * 8, b"", b""], 1, 3)), "element 0 is"),
        ((*DENSE, packed("sparse", [b"00000001"], 1, 3)), "3 texts are expected; got 1"),
        ((*DENSE, packed("sparse", [b""] * 4, 1, 3)), "3 texts are expected; got more"),
        (
            (*DENSE, Tensor("sparse", "BYTES", (1, 3), packed=memoryview(b"\x09\0\0\0" * 3))),
            "text 0 is to end at byte 13, and there are 12",
        ),
        (
            (*DENSE, Tensor("s0", "BYTES", (1,), packed=memoryview(b"\x08\1\0\x0000000001")),
             *(packed(name, [b"00000001"]) for name in ("s1", "s2"))),
            "text 0 is to end at byte 268, and there are 12",
        ),
        ((numbers("dense", "INT32", [[1, 2]] * 9), SPARSE), "has 9 rows, at most 8"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_told(tensors: tuple[Tensor, ...], message: str) -> None:
    assert message in refused(*tensors)


@pytest.mark.parametrize("shape", [(3, 2), (1, 6), (6, 1)])
def test_a_matrix_of_ids_has_a_row_a_row(shape: tuple[int, int]) -> None:
    dense = numbers("dense_features", "FP32", [0] * 4, 2, 2)
    ids = numbers("sparse_features", "INT64", [-1, 1, 2, 3, 4, 5], *shape)
    assert "'sparse_features' must have the shape [2, 3]" in refused(dense, ids)


def test_a_text_too_many_is_not_taken_for_that_which_the_next_tensor_lacks() -> None:
    digits = [b"0000000a", b"0000000b", b"0000000c"]
    sparse = (packed("s0", digits[:1], 1), packed("s1", digits[:2], 1), packed("s2", [], 1))
    assert "'s1' has the shape [1], so 1 texts are expected; got more" in refused(
        *(numbers(name, "INT32", [1]) for name in ("d0", "d1")), *sparse
    )


def test_a_feature_may_have_the_name_of_a_matrix() -> None:
    schema = dataclasses.replace(
        SCHEMA, dense=(DenseFeature("dense"), DenseFeature("offsets")), sparse=SCHEMA.sparse[:1]
    )
    reader = Reader(schema, 8)
    tensors = [numbers(name, "INT32", [4, 5]) for name in ("dense", "offsets", "s0")]
    assert read(*tensors, reader=reader).dense.tolist() == [[4, 4], [5, 5]]


PREPARED = numbers("dense_features", "FP32", [[0.5, 1.5], [2.5, 3.5]])


def test_prepared_rows_are_a_batch() -> None:
    ids = numbers("sparse_features", "INT64", [[1, 2, 3], [4, -1, 9]])
    matrix = READER.read({"dense_features": PREPARED, "sparse_features": ids})
    flat = numbers("sparse_features", "INT64", [1, 2, 3, 4, 9])
    offsets = numbers("offsets", "INT64", [0, 1, 2, 3, 4, 4, 5])
    bags = READER.read({tensor.name: tensor for tensor in (PREPARED, flat, offsets)})
    flat = numbers("sparse_features", "INT64", [1, -7, 2, 3, 4, -1, 9, -1])
    offsets = numbers("offsets", "INT64", [0, 2, 3, 4, 5, 6, 8])
    negative = READER.read({tensor.name: tensor for tensor in (PREPARED, flat, offsets)})
    for batch in (matrix, bags, negative):
        assert isinstance(batch, Batch)
        assert batch.dense_features.tolist() == [[0.5, 1.5], [2.5, 3.5]]
        assert batch.sparse_features.tolist() == [1, 2, 3, 4, 9]
        assert batch.offsets is not None
        assert batch.offsets.tolist() == [0, 1, 2, 3, 4, 4, 5]
    known = numbers("sparse_features", "INT64", [[1, 2, 3], [4, 0, 9]])
    whole = READER.read({"dense_features": PREPARED, "sparse_features": known})
    assert isinstance(whole, Batch)
    assert whole.offsets is None
    assert torch.equal(whole.sparse_features, torch.tensor([[1, 2, 3], [4, 0, 9]]))


FLAT = numbers("sparse_features", "INT64", [1, 2])
IDS = numbers("sparse_features", "INT64", [[1, 2, 3], [4, 0, 9]])


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ((PREPARED,), "'sparse_features' is missing"),
        ((PREPARED, IDS, DENSE[0]), "other inputs: 'd0'"),
        ((PREPARED, numbers("sparse_features", "INT32", [[1, 2, 3]] * 2)), "must be INT64"),
        ((numbers("dense_features", "FP32", [1, 2]), IDS), "must be a matrix"),
        ((numbers("dense_features", "FP32", [[np.nan, 1]] * 2), IDS), "NaN"),
        ((numbers("dense_features", "FP32", [[1]] * 2), IDS), "dense_features must be"),
        ((PREPARED, numbers("sparse_features", "INT64", [[1, 2, 10]] * 2)), "an id of s2 is 10"),
        ((PREPARED, FLAT), "must have the shape [2, 3]"),
        ((PREPARED, FLAT, numbers("offsets", "INT64", [0] * 7)), "offsets must rise"),
        ((PREPARED, FLAT, numbers("offsets", "INT64", [0, 9, *[2] * 5])), "offsets must rise"),
        ((PREPARED, FLAT, numbers("offsets", "INT64", [0, 2])), "offsets must be"),
        ((numbers("dense_features", "FP32", [[1, 2]] * 9), IDS), "has 9 rows, at most 8"),
    ],
)  # fmt: skip
def test_wrong_prepared_rows_are_told(tensors: tuple[Tensor, ...], message: str) -> None:
    assert message in refused(*tensors)


def test_a_model_without_vocabularies_takes_prepared_rows_alone() -> None:
    plain = tuple(dataclasses.replace(feature, hash_buckets=0) for feature in SCHEMA.sparse)
    reader = Reader(dataclasses.replace(SCHEMA, sparse=plain), 8)
    assert "takes prepared rows alone" in refused(*DENSE, SPARSE, reader=reader)
    assert [each["name"] for each in reader.metadata()] == [
        "dense_features",
        "sparse_features",
        "offsets",
    ]


def test_the_metadata_tell_all_inputs() -> None:
    described = {each["name"]: (each["datatype"], each["shape"]) for each in READER.metadata()}
    assert described == {
        "d0": ("INT32", [-1, 1]),
        "d1": ("INT32", [-1, 1]),
        "s0": ("BYTES", [-1, 1]),
        "s1": ("BYTES", [-1, 1]),
        "s2": ("BYTES", [-1, 1]),
        "dense": ("INT32", [-1, 2]),
        "sparse": ("BYTES", [-1, 3]),
        "dense_features": ("FP32", [-1, 2]),
        "sparse_features": ("INT64", [-1]),
        "offsets": ("INT64", [-1]),
    }


@given(
    data=st.lists(
        st.one_of(
            st.just(b""),
            st.integers(0, 2**32 - 1).map(lambda value: b"%08x" % value),
            st.binary(max_size=12),
        ),
        max_size=8,
    )
)
@settings(max_examples=200, deadline=None)
def test_packed_texts_are_read_as_texts_are(data: list[bytes]) -> None:
    single = dataclasses.replace(SCHEMA, sparse=SCHEMA.sparse[:1])
    dense = Tensor("dense", "INT32", (len(data), 2), np.zeros(2 * len(data), np.int32))
    reader = Reader(single, 8)
    inputs = packed("s0", data), texts("s0", list(data))
    if all(re.fullmatch(rb"([0-9a-fA-F]{8})?", each) for each in data):
        expected = [[int(each or b"0", 16)] for each in data]
        for sent in inputs:
            assert values(read(dense, sent, reader=reader)).tolist() == expected
    else:
        assert len({refused(dense, sent, reader=reader) for sent in inputs}) == 1
