import re
from datetime import datetime

import numpy as np
import pyarrow as pa
import pytest

from dlrm.data.table import lacking, rows_from_table
from dlrm.errors import UserError
from dlrm.schema import DenseFeature, FeatureSchema, SparseFeature

SCHEMA = FeatureSchema(
    label="label",
    dense=(DenseFeature("age"),),
    sparse=(SparseFeature("ad", 10), SparseFeature("site", 10)),
    source_format="test",
    split_rule="none",
)
COLUMNS = {"ad": ["0000000a", None], "site": [4294967295, None], "age": [-3, 7], "more": [1, 2]}


def test_nulls_and_negatives_become_zero_and_ids_come_as_text_or_number() -> None:
    dense, values = rows_from_table(pa.table(COLUMNS), SCHEMA)
    assert dense.dtype == np.int32
    assert dense.tolist() == [[0], [7]]
    assert values.dtype == np.uint32
    assert values.tolist() == [[10, 4294967295], [0, 0]]


def test_an_empty_table_gives_no_rows() -> None:
    dense, values = rows_from_table(pa.table(COLUMNS).slice(0, 0), SCHEMA)
    assert (dense.shape, values.shape) == ((0, 1), (0, 2))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ad": ["0000000a", "12"]}, r"row 1 of column ad: expected 8 hexadecimal digits.*'12'"),
        ({"ad": ["0000000a", "5db9164"]}, r"row 1 of column ad: .*Leading zeros are lost"),
        ({"ad": ["0000000g", "00000012"]}, r"row 0 of column ad.*'0000000g'"),
        ({"ad": ["0000000a\n", "00000012"]}, r"row 0 of column ad.*\\n"),
        ({"site": [-1, 2]}, r"row 0 of column site: expected 0 … 2\*\*32-1, got -1\. "),
        ({"site": [1, 2**32]}, r"row 1 of column site.* got 4294967296\. "),
        ({"age": [1, 2**31]}, r"row 1 of column age: expected at most 2147483647"),
        ({"age": [0.5, 1.0]}, r"column age must hold integers, got double"),
        ({"age": ["x", "y"]}, r"column age must hold integers, got string"),
        ({"age": ["1", "2"]}, r"column age must hold integers, got string"),
        ({"age": [True, False]}, r"column age must hold integers, got bool"),
        ({"age": [datetime(2026, 1, 1)] * 2}, r"column age must hold integers, got timestamp"),
    ],
)
def test_bad_values_are_refused_by_row_and_column(change: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        rows_from_table(pa.table(COLUMNS | change), SCHEMA)


def test_a_number_beyond_any_type_is_refused() -> None:
    with pytest.raises(UserError, match=r"rows must come as a pyarrow Table or as columns"):
        rows_from_table(COLUMNS | {"age": [1 << 70, 1]}, SCHEMA)


def test_a_column_of_floats_may_have_nan_where_a_number_is_missing() -> None:
    columns = COLUMNS | {"age": pa.array([float("nan"), 7.0])}
    assert rows_from_table(columns, SCHEMA)[0].tolist() == [[0], [7]]


def test_missing_columns_are_named() -> None:
    with pytest.raises(UserError, match=r"the table lacks the columns age, site of the mo"):
        rows_from_table(pa.table({"ad": ["0000000a"]}), SCHEMA)


@pytest.mark.parametrize(
    ("present", "message"),
    [
        (["b"], r"lacks the columns a, c of the model's 3; it has b\. Add them, with null where"),
        ([], r"lacks the columns a, b, c of the model's 3; it has none\. Add them"),
        (
            ["a", "b", " C_"],
            r"lacks the column c of the model's 3; .*\. Rename  C_ to c; or add it",
        ),
        (["a", "b", "c", "c"], ""),
    ],
)
def test_what_is_lacking_is_told_and_how_to_mend_it(present: list[str], message: str) -> None:
    assert re.match(message, lacking(["a", "b", "c"], present))
    assert bool(lacking(["a", "b", "c"], present)) == bool(message)


@pytest.mark.parametrize(
    ("names", "present", "remedy"),
    [
        # One column is offered once.
        (["ab", "a_b"], ["AB"], "Rename AB to ab, and add the other, with null where a value is"),
        (["A b", "c", "d"], ["ab"], "Rename ab to A b, and add the others, with null where"),
        (["ab", "c"], ["A B", "C"], "Rename A B to ab, C to c; or add them, with null where a"),
        (["n" * 41], ["N" * 41], f"Rename {'N' * 40}… to {'n' * 40}…; or add it, with null"),
        (["n" * 40], ["N" * 40], f"Rename {'N' * 40} to {'n' * 40}; or add it, with null"),
    ],
)
def test_renaming_is_advised_where_it_is_enough(
    names: list[str], present: list[str], remedy: str
) -> None:
    assert f". {remedy}" in lacking(names, present)


NUMBERED = [f"int_{number}" for number in range(3)] + [f"cat_{number}" for number in range(2)]
FROM_ONE = "They are counted from 1 there, and from 0 by the model: rename "


@pytest.mark.parametrize(
    ("present", "remedy"),
    [
        (["Label", "I1", "I2", "I3", "C1", "C2"],
         "I1 to int_0, I2 to int_1, I3 to int_2, C1 to cat_0, C2 to cat_1."),
        (["int_1", "int_2", "int_3", "cat_1", "cat_2"],
         "int_1 to int_0, int_2 to int_1, int_3 to int_2, cat_1 to cat_0, cat_2 to cat_1."),
    ],
)  # fmt: skip
def test_columns_that_are_counted_from_one_are_told_apart(present: list[str], remedy: str) -> None:
    assert lacking(NUMBERED, present).endswith(f". {FROM_ONE}{remedy}")


@pytest.mark.parametrize(
    "present",
    [
        ["I0", "I1", "I2", "C1", "C2"],
        ["I1", "I2", "C1", "C2"],
        ["I1", "I2", "I3", "J1", "J2", "J3", "C1", "C2"],
        ["int_1", "int_2", "cat_0", "cat_1"],
    ],
)
def test_doubtful_numbers_are_not_matched(present: list[str]) -> None:
    assert FROM_ONE not in lacking(NUMBERED, present)


def test_of_many_columns_a_few_are_told() -> None:
    names = [f"cat_{number}" for number in range(1000)]
    assert lacking(names, names[:100]) == (
        "lacks the columns cat_100, cat_101, cat_102, cat_103, cat_104, cat_105 … cat_999 (900 in "
        "all) of the model's 1000; it has cat_0, cat_1, cat_2, cat_3, cat_4, cat_5 … cat_99 (100 "
        "in all). Add them, with null where a value is missing."
    )


def test_categories_are_read_as_what_they_stand_for() -> None:
    columns = COLUMNS | {"ad": pa.array(["0000000a", None]).dictionary_encode()}
    assert rows_from_table(columns, SCHEMA)[1][:, 0].tolist() == [10, 0]


@pytest.mark.parametrize(
    "table", [[COLUMNS], COLUMNS | {"age": 1}, COLUMNS | {"age": [1]}, 3, "text"]
)
def test_what_is_no_table_is_refused(table: object) -> None:
    with pytest.raises(UserError, match="must come as a pyarrow Table or as columns"):
        rows_from_table(table, SCHEMA)  # type: ignore[arg-type]
