from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
import pytest
import torch

from dlrm.data.batch import Batch, check_batch, make_batch
from dlrm.errors import UserError
from dlrm.schema import DenseFeature, FeatureSchema, SparseFeature

SCHEMA = FeatureSchema(
    label="label",
    dense=(DenseFeature("a"), DenseFeature("b")),
    sparse=(SparseFeature("s", 10), SparseFeature("t", 3)),
    source_format="",
    split_rule="",
)
DENSE = np.array([[0, 1], [2, 2147483647], [99, 5]], np.int32)
LABELS = np.array([0, 1, 1], np.uint8)


def test_a_batch_by_hand() -> None:
    ids = np.array([[9, 2], [0, 0], [4, 1]], np.int32)
    batch = make_batch(SCHEMA, DENSE, ids, LABELS)
    expected = [[math.log(value + 1) for value in row] for row in DENSE.tolist()]
    torch.testing.assert_close(batch.dense_features, torch.tensor(expected))
    assert batch.sparse_features.dtype == torch.int64
    assert batch.sparse_features.tolist() == ids.tolist()
    assert batch.offsets is None
    assert batch.labels is not None
    assert batch.labels.dtype == torch.float32
    assert batch.labels.tolist() == [0, 1, 1]
    assert (len(batch), batch.unknown_ids) == (3, 0)
    assert ids.tolist() == [[9, 2], [0, 0], [4, 1]]  # the arrays given are not changed
    assert DENSE[0].tolist() == [0, 1]


def test_unknown_ids_are_empty_bags_before_and_after_a_limit() -> None:
    ids = np.array([[9, -1], [-1, -1], [4, 1]], np.int32)
    limited = SCHEMA.with_max_ind_range(4)
    assert limited.num_embeddings == (4, 3)
    for schema, expected in ((SCHEMA, [9, 4, 1]), (limited, [1, 0, 1])):
        batch = make_batch(schema, DENSE, ids, None)
        assert batch.sparse_features.tolist() == expected
        assert batch.offsets is not None
        assert batch.offsets.tolist() == [0, 1, 1, 1, 1, 2, 3]
        assert batch.labels is None
        assert batch.unknown_ids == 3


@pytest.mark.parametrize("unknown", [False, True])
def test_rows_of_a_batch_are_the_batch_of_those_rows(unknown: bool) -> None:
    ids = np.array([[9, 2], [-1 if unknown else 3, 0], [4, 1]], np.int32)
    whole = make_batch(SCHEMA, DENSE, ids, LABELS)
    for start, stop in ((0, 2), (1, 2), (1, 3), (0, 3), (2, 9)):
        some = whole.rows(start, stop)
        kept = slice(start, stop)
        expected = make_batch(SCHEMA, DENSE[kept], ids[kept], LABELS[kept])
        assert len(some) == len(expected)
        assert torch.equal(some.dense_features, expected.dense_features)
        assert some.sparse_features.reshape(-1).equal(expected.sparse_features.reshape(-1))
        assert some.unknown_ids == expected.unknown_ids
        assert (some.offsets is None) is not unknown
        if expected.offsets is not None:
            assert some.offsets is not None
            assert some.offsets.tolist() == expected.offsets.tolist()


def test_no_rows() -> None:
    batch = make_batch(SCHEMA, DENSE[:0], np.zeros((0, 2), np.int32), LABELS[:0])
    assert len(batch) == 0
    assert batch.sparse_features.shape == (0, 2)


def test_a_loader_that_makes_batches_starts_no_threads() -> None:
    """With more threads than cores OpenMP's stop spinning, and a training step takes twice as long.

    In a process of its own, where no other test has started threads.
    """
    script = """
import os, threading
import numpy as np, torch
from dlrm.data.batch import Batch, check_batch, make_batch
from dlrm.errors import UserError
from dlrm.schema import DenseFeature, FeatureSchema, SparseFeature

torch.set_num_threads(2)
torch.randn(256, 256) @ torch.randn(256, 256)
names = [f"f{index}" for index in range(20)]
dense = tuple(map(DenseFeature, names))
sparse = tuple(SparseFeature(name, 9, id_modulus=5) for name in names)
schema = FeatureSchema("label", dense, sparse, "", "")
counts = []

def load():
    rows = 50_000
    counts.append(len(os.listdir("/proc/self/task")))
    values = np.arange(rows * 20, dtype=np.int32).reshape(rows, 20) % 9
    for ids in (values, values - 1):
        make_batch(schema, values, ids, np.ones(rows, np.uint8))
    counts.append(len(os.listdir("/proc/self/task")))

loader = threading.Thread(target=load)
loader.start()
loader.join()
print(*counts)
"""
    command = [sys.executable, "-c", script]
    counts = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert counts[0] == counts[1]


def refused(batch: Batch, message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_batch(batch, CHECKED)


CHECKED = FeatureSchema(
    label="label",
    dense=(DenseFeature("int_0"),),
    sparse=(SparseFeature("cat_0", 3), SparseFeature("cat_1", 5)),
    source_format="test",
    split_rule="none",
)


def test_a_batch_from_elsewhere_is_checked() -> None:
    dense, ids = torch.zeros(2, 1), torch.tensor([[2, 4], [0, 0]])
    check_batch(Batch(dense, ids, None), CHECKED)
    refused(Batch(dense.double(), ids, None), "dense_features must be a contiguous torch.float32")
    refused(Batch(dense, ids[:, :1], None), r"sparse_features .* of shape \(2, 2\); got .*\(2, 1\)")
    refused(Batch(dense, ids + torch.tensor([1, 0]), None), r"an id of cat_0 is 3; expected 0 … 2")
    refused(Batch(dense, ids - torch.tensor([0, 1]), None), r"an id of cat_1 is -1; expected 0 … 4")


def test_bags_from_elsewhere_are_checked() -> None:
    dense, ids = torch.zeros(2, 1), torch.tensor([2, 4, 4, 0])
    offsets = torch.tensor([0, 1, 3, 3, 4])  # [2], [4, 4]; [], [0]
    check_batch(Batch(dense, ids, None, offsets), CHECKED)
    refused(Batch(dense, ids + 1, None, offsets), "an id of cat_0 is 3")
    refused(Batch(dense, ids, None, offsets[1:]), r"offsets must be .* \(5,\)")
    refused(Batch(dense, ids, None, torch.tensor([0, 3, 1, 3, 4])), "offsets must rise from 0")
    refused(Batch(dense, ids, None, torch.tensor([0, 1, 3, 3, 5])), "offsets must rise from 0")
