"""What a schema tells of the rows that it describes."""

from __future__ import annotations

import pytest

from dlrm.schema import DenseFeature, FeatureSchema, SparseFeature

COUNT = DenseFeature("age")
KNOWN, HASHED = (
    SparseFeature("ad", 9, vocabulary="ad.arrow"),
    SparseFeature("ad", 9, hash_buckets=9),
)


@pytest.mark.parametrize(
    ("dense", "sparse", "expected"),
    [
        (COUNT, KNOWN, True),
        (COUNT, HASHED, True),
        (COUNT, SparseFeature("ad", 9), False),
        (COUNT, SparseFeature("ad", 9, vocabulary="ad.arrow", multi_hot=True), False),
        (DenseFeature("age", "none"), KNOWN, False),
    ],
)
def test_raw_rows_have_a_count_or_a_known_value_for_each_feature(
    dense: DenseFeature, sparse: SparseFeature, expected: bool
) -> None:
    schema = FeatureSchema("click", (dense,), (sparse,), "test", "none")
    assert schema.takes_raw_rows is expected
