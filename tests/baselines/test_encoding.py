"""What the two models are given, by hand."""

from collections.abc import Iterator
from pathlib import Path

import lightgbm
import numpy as np
import pytest

from dlrm.baselines import trees
from dlrm.baselines.logistic import _BUCKETS, Logistic
from dlrm.baselines.trees import _EncodedRows, _Encoder
from dlrm.config import BaselineConfig
from dlrm.data.dataset import Dataset, Rows, in_blocks, write_dataset
from dlrm.errors import UserError
from dlrm.schema import DenseFeature, FeatureSchema, SparseFeature


def schema_of(*sizes: int) -> FeatureSchema:
    sparse = tuple(SparseFeature(f"s{i}", size) for i, size in enumerate(sizes))
    return FeatureSchema("label", (DenseFeature("d"),), sparse, "criteo-kaggle", "none")


SCHEMA = schema_of(3, 5)


def rows_of(*rows: tuple[int, int, int, int]) -> Rows:
    """Label, dense value, and two ids of each row."""
    array = np.array(rows, np.int32)
    return Rows(array[:, 0].astype(np.uint8), array[:, 1:2], array[:, 2:])


def test_logistic_has_a_column_for_every_bucket_and_id() -> None:
    model = Logistic(SCHEMA, BaselineConfig(model="logistic"))
    encoded = model._encode(rows_of((0, 0, 0, 4), (1, 2, -1, -1), (1, 2**31 - 1, 2, 0)))
    assert model.columns == _BUCKETS + 4 + 6
    # 2 * log(1) = 0; 2 * log(3) = 2.2; 2 * log(2**31) = 42.98, the last bucket but one
    assert encoded.toarray().nonzero()[1].reshape(3, 3).tolist() == [
        [0, _BUCKETS, _BUCKETS + 4 + 4],
        [2, _BUCKETS + 3, _BUCKETS + 4 + 5],
        [42, _BUCKETS + 2, _BUCKETS + 4],
    ]
    assert (encoded.data == 1).all()


def test_logistic_refuses_more_columns_than_there_can_be() -> None:
    with pytest.raises(UserError, match="Prepare the DATASET with --max-ind-range"):
        Logistic(schema_of(2**30, 2**30), BaselineConfig(model="logistic"))


@pytest.fixture
def ten_rows(tmp_path: Path) -> Dataset:
    rows = rows_of(*((i % 2, i, i % 3, i // 2) for i in range(10)))
    return write_dataset(tmp_path / "d", SCHEMA, {"train": [rows[:4], rows[4:]]})


def test_rates_leave_out_a_rows_own_fold(ten_rows: Dataset) -> None:
    encoder = _Encoder(SCHEMA, max_categories=3)
    labels = encoder.fit(ten_rows, 10)
    assert labels.tolist() == [0, 1] * 5
    assert encoder.categorical == [1]
    # Row 0 shares its second id with row 1 alone, which is of another fold and was clicked.
    (first, second) = encoder.encode(rows_of((0, 7, 2, 0), (1, 8, 0, 0)), first=0)
    assert first.tolist() == [7, 2, 1, np.float32((1 + 20 * 0.5) / 21)]
    assert second.tolist() == [8, 0, 1, np.float32((0 + 20 * 0.5) / 21)]
    # Of other rows all count, as if there were a fold less.
    (other, unknown) = encoder.encode(rows_of((0, 7, 2, 0), (0, 7, -1, -1)))
    assert other.tolist() == [7, 2, np.float32(2 * 4 / 5), 0.5]
    assert np.isnan(unknown[1])
    assert unknown[[0, 2, 3]].tolist() == [7, 0, 0.5]


def test_lightgbm_is_given_every_row_once_and_in_order(
    ten_rows: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trees, "BLOCK_ROWS", 4)
    monkeypatch.setattr(_EncodedRows, "batch_size", 4)
    encoder = _Encoder(SCHEMA, max_categories=10)
    labels = encoder.fit(ten_rows, 10)
    rows = _EncodedRows(ten_rows, "train", 10, encoder, is_fitted_on=True)
    single = np.array([rows[index] for index in range(10)])
    blocks = np.concatenate([rows[0:4], rows[4:8], rows[8:10]])
    assert single[:, 0].tolist() == blocks[:, 0].tolist() == list(range(10))
    assert blocks[:, 2].tolist() == [i // 2 for i in range(10)]
    binned = lightgbm.Dataset(rows, labels, params={"verbosity": -1}).construct()
    assert binned.num_data() == 10


def test_spread_rows_are_as_many_as_asked_for(ten_rows: Dataset) -> None:
    for count, expected in ((10, range(10)), (5, (1, 3, 5, 7, 9)), (3, (3, 6, 9)), (1, (9,))):
        runs = list(ten_rows.spread_rows("train", count))
        assert [int(x) for run in runs for x in run.dense[:, 0]] == list(expected)


def test_blocks_have_the_length_that_is_asked_for() -> None:
    def runs() -> Iterator[Rows]:
        for start, end in ((0, 3), (3, 4), (4, 11)):
            yield rows_of(*((0, i, 0, 0) for i in range(start, end)))

    for length in (1, 2, 4, 11, 20):
        blocks = list(in_blocks(runs(), length))
        assert all(len(block) == length for block in blocks[:-1])
        assert [int(x) for block in blocks for x in block.dense[:, 0]] == list(range(11))
