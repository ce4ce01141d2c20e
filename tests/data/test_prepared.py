from __future__ import annotations

import tracemalloc
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dlrm.data import prepared
from dlrm.data.prepared import FixedSplits, PreparedRows, recognise
from dlrm.errors import UserError

Array = npt.NDArray[Any]
WHOLE = "kaggleAdDisplayChallenge_processed.npz"


@dataclass
class Made:
    """Rows as the reference holds them, and the values behind their ids."""

    labels: Array
    dense: Array
    ids: Array
    counts: Array
    values: list[Array]

    def __getitem__(self, rows: slice) -> dict[str, Array]:
        return {"y": self.labels[rows], "X_int": self.dense[rows], "X_cat": self.ids[rows]}


def make(rows: int, seed: int = 0) -> Made:
    generator = np.random.default_rng(seed)
    counts = generator.integers(1, 40, 26)
    return Made(
        generator.integers(0, 2, rows).astype(np.int32),
        generator.integers(0, 2**31, (rows, 13)).astype(np.int32),
        np.stack([generator.integers(0, count, rows) for count in counts], axis=1).astype(np.int32),
        counts.astype(np.int32),
        [
            generator.permutation(np.arange(0, 2**32, 2**32 // 41, dtype=np.uint32))[:count]
            for count in counts
        ],
    )


def write_companions(folder: Path, stem: str, made: Made, days: list[int] | None) -> None:
    """Write what the reference writes beside the rows: values are those of int32."""
    if days is not None:
        np.savez_compressed(folder / f"{stem}_day_count.npz", total_per_file=days)
    np.savez_compressed(folder / f"{stem}_fea_count.npz", counts=made.counts)
    for feature, values in enumerate(made.values):
        np.savez_compressed(folder / f"{stem}_fea_dict_{feature}.npz", unique=values.view(np.int32))


def write_whole(path: Path, made: Made, **changes: Array) -> None:
    """Write a file of everything: X_cat is a transposed array of floats."""
    floats = np.transpose(np.ascontiguousarray(made.ids.T).astype(np.float64))
    arrays = {**made[:], "X_cat": floats, "counts": made.counts}
    np.savez_compressed(path, **{**arrays, **changes})


def write_days(folder: Path, prefix: str, made: Made, days: dict[int, int]) -> None:
    """Write a file a day: everything is of floats."""
    first = 0
    for day, rows in days.items():
        arrays = made[first : first + rows]
        floats = {name: array.astype(np.float64) for name, array in arrays.items()}
        np.savez_compressed(folder / f"{prefix}_{day}_reordered.npz", **floats)
        first += rows


def write_binary(path: Path, made: Made, rows: slice) -> None:
    columns = [made.labels[rows, None], made.dense[rows], made.ids[rows]]
    path.write_bytes(np.concatenate(columns, axis=1).astype(np.int32).tobytes())


def require_rows(found: PreparedRows, made: Made, first_row: int = 0) -> None:
    """Check that all rows from one on are read, in order."""
    blocks = list(found.blocks(first_row))
    for labels, dense, ids in blocks:
        assert (labels.dtype, dense.dtype, ids.dtype) == (np.uint8, np.int32, np.int32)
        assert len(labels) == len(dense) == len(ids) <= prepared.BLOCK_ROWS
    if blocks:
        labels, dense, ids = map(np.concatenate, zip(*blocks, strict=True))
        assert np.array_equal(labels, made.labels[first_row:])
        assert np.array_equal(dense, made.dense[first_row:])
        assert np.array_equal(ids, made.ids[first_row:])
    else:
        assert first_row == len(made.labels)
    assert len(found) == len(made.labels)
    assert found.num_embeddings == tuple(made.counts.tolist())


def require_values(found: PreparedRows, made: Made) -> None:
    assert found.has_values
    for feature, values in enumerate(made.values):
        blocks = list(found.value_blocks(feature))
        assert all(block.dtype == np.uint32 for block in blocks)
        assert np.array_equal(np.concatenate(blocks), values)


@pytest.fixture(params=[7, 1 << 16])
def block_rows(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(prepared, "BLOCK_ROWS", request.param)
    return int(request.param)


@pytest.mark.usefixtures("block_rows")
def test_a_file_of_everything(tmp_path: Path) -> None:
    made = make(100)
    path = tmp_path / WHOLE
    write_whole(path, made)
    found = recognise(path)
    for first_row in (0, 7, 50, 99, 100):
        require_rows(found, made, first_row)
    assert found.days == (15, 15, 14, 14, 14, 14, 14)
    assert found.files == (path,)
    assert found.fixed_splits is None
    assert not found.has_values

    days = [20, 30, 1, 9, 20, 10, 10]
    write_companions(tmp_path, "train", made, days)
    found = recognise(tmp_path)
    require_rows(found, made)
    require_values(found, made)
    assert found.days == tuple(days)
    assert found.files == (
        path,
        tmp_path / "train_day_count.npz",
        *(tmp_path / f"train_fea_dict_{feature}.npz" for feature in range(26)),
    )


@pytest.mark.usefixtures("block_rows")
@pytest.mark.parametrize(("prefix", "stem"), [("day", "day"), ("train_day", "train")])
def test_a_file_a_day(tmp_path: Path, prefix: str, stem: str) -> None:
    made = make(100)
    write_days(tmp_path, prefix, made, {0: 30, 2: 25, 10: 45})
    counted = [30, 5, 25, *[5] * 7, 45, 8]  # of all days, of which some were copied
    write_companions(tmp_path, stem, made, counted)
    for path in (tmp_path, tmp_path / prefix):
        found = recognise(path)
        for first_row in (0, 7, 30, 31, 60, 99, 100):
            require_rows(found, made, first_row)
        require_values(found, made)
        assert found.days == (30, 25, 45)
        assert found.fixed_splits is None
        assert [file.name for file in found.files[:5]] == [
            f"{prefix}_0_reordered.npz",
            f"{prefix}_2_reordered.npz",
            f"{prefix}_10_reordered.npz",
            f"{stem}_fea_count.npz",
            f"{stem}_day_count.npz",
        ]
    one = recognise(tmp_path / f"{prefix}_10_reordered.npz")
    assert one.days == (45,)
    assert np.array_equal(np.concatenate([ids for _, _, ids in one.blocks()]), made.ids[55:])


@pytest.mark.usefixtures("block_rows")
@pytest.mark.parametrize("name", ["terabyte_processed_{}.bin", "{}_data.bin"])
def test_bare_numbers(tmp_path: Path, name: str) -> None:
    made = make(100)
    splits = {"train": slice(0, 60), "test": slice(60, 81), "val": slice(81, 100)}
    for split, rows in splits.items():
        write_binary(tmp_path / name.format(split), made, rows)
    write_companions(tmp_path, "day", made, None)
    for path in (tmp_path, *(tmp_path / name.format(split) for split in splits)):
        found = recognise(path)
        for first_row in (0, 7, 60, 61, 85, 99, 100):
            require_rows(found, made, first_row)
        require_values(found, made)
        assert found.days == (60, 40)
        assert found.fixed_splits == FixedSplits(train=60, test=21, validation=19)
        assert [file.name for file in found.files[:4]] == [
            *(name.format(split) for split in splits),
            "day_fea_count.npz",
        ]


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from(["i4", "i8", "f8", ">i4"]),
    st.sampled_from("CF"),
    st.booleans(),
    st.integers(1, 40),
    st.integers(0, 2**32 - 1),
    st.integers(1, 50),
)
def test_any_layout_of_the_numbers(
    tmp_path_factory: pytest.TempPathFactory,
    dtype: str,
    order: Any,
    compressed: bool,
    rows: int,
    seed: int,
    block_rows: int,
) -> None:
    made = make(rows, seed)
    arrays = {name: array.astype(dtype, order=order) for name, array in made[:].items()}
    path = tmp_path_factory.mktemp("layout") / "any name.npz"
    save = np.savez_compressed if compressed else np.savez
    save(path, allow_pickle=False, counts=made.counts.astype(dtype), **arrays)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepared, "BLOCK_ROWS", block_rows)
        require_rows(recognise(path), made)


def test_negative_integers_are_0(tmp_path: Path) -> None:
    made = make(3)
    made.dense[1, 4] = -1
    made.dense[2, 12] = -(2**31)
    write_whole(tmp_path / WHOLE, made)
    made.dense = np.maximum(made.dense, 0)
    require_rows(recognise(tmp_path), made)


REMEDY = "Get the file again, or prepare from the raw rows instead."


def changed(array: Array, index: Any, value: Any) -> Array:
    array = array.astype(np.float64)
    array[index] = value
    return array


def read_all(path: Path) -> None:
    found = recognise(path)
    list(found.blocks())
    for feature in range(26 if found.has_values else 0):
        list(found.value_blocks(feature))


@pytest.mark.parametrize(
    ("name", "index", "value", "expected"),
    [
        ("y", 70, 2, "at (70,): expected an integer of at least 0 and below 2, got 2.0."),
        ("y", 70, np.nan, "at (70,): expected an integer of at least 0 and below 2, got nan."),
        ("y", 70, 0.5, "at (70,): expected an integer of at least 0 and below 2, got 0.5."),
        (
            "X_int",
            (70, 12),
            2.0**31,
            "at (70, 12): expected an integer of at least -2147483648 and below 2147483648, got "
            "2147483648.0.",
        ),
        ("X_int", (70, 12), np.inf, "at (70, 12): {} below 2147483648, got inf."),
        (
            "X_cat",
            (70, 3),
            -1,
            "at (70, 3): expected an integer of at least 0 and below COUNT, got -1.0.",
        ),
        (
            "X_cat",
            (70, 3),
            40,
            "at (70, 3): expected an integer of at least 0 and below COUNT, got 40.0.",
        ),
        ("X_cat", (70, 3), 1e300, "at (70, 3): {} below COUNT, got 1e+300."),
        (
            "counts",
            3,
            0,
            "at (3,): expected an integer of at least 1 and below 2147483648, got 0.0.",
        ),
        ("counts", 3, 2.0**31, "at (3,): {} and below 2147483648, got 2147483648.0."),
    ],
)
def test_a_number_that_cannot_be_is_named(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    index: Any,
    value: float,
    expected: str,
) -> None:
    monkeypatch.setattr(prepared, "BLOCK_ROWS", 7)
    made = make(100)
    array = {**made[:], "counts": made.counts}[name]
    write_whole(tmp_path / WHOLE, made, **{name: changed(array, index, value)})
    with pytest.raises(UserError) as caught:
        read_all(tmp_path)
    head, _, tail = expected.replace("COUNT", str(made.counts[3])).partition("{}")
    assert str(caught.value).startswith(f"{tmp_path / WHOLE}, array {name}, {head}")
    assert str(caught.value).endswith(f"{tail} {REMEDY}")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"y": np.zeros(99)}, "array X_int: expected the shape (99, 13), got (100, 13)."),
        ({"y": np.zeros((100, 1))}, "array y: expected the shape (n), got (100, 1)."),
        (
            {"X_cat": np.zeros((100, 25))},
            "array X_cat: expected the shape (100, 26), got (100, 25).",
        ),
        ({"counts": np.ones(25)}, "array counts: expected the shape (26), got (25,)."),
        ({"y": np.array(["a"] * 100)}, "array y: expected numbers, got <U1."),
        ({"y": np.array([object()] * 100)}, "array y"),
        (
            {"y": np.zeros(0), "X_int": np.zeros((0, 13)), "X_cat": np.zeros((0, 26))},
            "holds no rows.",
        ),
    ],
)
def test_an_array_of_another_kind_is_named(
    tmp_path: Path, changes: dict[str, Array], message: str
) -> None:
    write_whole(tmp_path / WHOLE, make(100), **changes)
    with pytest.raises(UserError) as caught:
        recognise(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path / WHOLE}")
    assert message in str(caught.value)
    assert str(caught.value).endswith(REMEDY)


def test_a_missing_array_is_named(tmp_path: Path) -> None:
    np.savez(tmp_path / WHOLE, y=np.zeros(5), other=np.zeros(5))
    with pytest.raises(UserError) as caught:
        recognise(tmp_path)
    assert str(caught.value) == (
        f"{tmp_path / WHOLE} is not the reference's: expected an array X_int, got only y, other. "
        f"{REMEDY}"
    )


def test_truncated_files_are_named(tmp_path: Path) -> None:
    made = make(50)
    write_whole(tmp_path / WHOLE, made)
    write_companions(tmp_path, "train", made, [10, 10, 10, 5, 5, 5, 5])
    read_all(tmp_path)
    for path in recognise(tmp_path).files:
        whole = path.read_bytes()
        for length in (0, 4, 100, len(whole) // 2, len(whole) - 1):
            path.write_bytes(whole[:length])
            with pytest.raises(UserError, match=f"{path} is damaged, or not written by NumPy: "):
                read_all(tmp_path)
        path.write_bytes(whole)
    read_all(tmp_path)


def test_files_that_do_not_fit_each_other_are_named(tmp_path: Path) -> None:
    made = make(100)

    def refused(message: str) -> None:
        with pytest.raises(UserError) as caught:
            read_all(tmp_path)
        assert str(caught.value) == message.replace("DIR", str(tmp_path))

    write_whole(tmp_path / WHOLE, made)
    write_companions(tmp_path, "train", made, [10] * 9)
    refused(
        f"DIR/train_day_count.npz, array total_per_file: expected 100 in all, the rows of "
        f"DIR/{WHOLE}, got 90. It belongs to other rows: move one of them elsewhere."
    )
    write_companions(tmp_path, "train", made, [10] * 10)
    one_more = np.arange(made.counts[5] + 1, dtype=np.int32)
    np.savez(tmp_path / "train_fea_dict_5.npz", unique=one_more)
    refused(
        f"DIR/train_fea_dict_5.npz, array unique: expected the shape ({made.counts[5]}), got "
        f"({made.counts[5] + 1},). {REMEDY}"
    )
    np.savez(tmp_path / "train_fea_dict_5.npz", unique=changed(one_more[1:], 0, 2.0**32))
    refused(
        "DIR/train_fea_dict_5.npz, array unique, at (0,): expected an integer of at least "
        f"-2147483648 and below 4294967296, got 4294967296.0. {REMEDY}"
    )
    write_companions(tmp_path, "day", made, [1, 2])
    refused(
        f"beside DIR/{WHOLE} are files of several preparations, whose names begin with day, train. "
        "Leave in that folder only those that belong to it."
    )
    for path in tmp_path.iterdir():
        path.unlink()

    write_days(tmp_path, "day", made, {0: 60, 1: 40})
    refused(
        "DIR/day_fea_count.npz does not exist, which tells how many ids each feature has. Put it "
        "beside the rows, or prepare from the raw rows instead."
    )
    write_companions(tmp_path, "day", made, [60, 41])
    refused(
        "DIR/day_1_reordered.npz, array y: expected 41 rows, the number of day 1 in "
        f"DIR/day_day_count.npz, got 40. The two were not made together. {REMEDY}"
    )
    for path in tmp_path.iterdir():
        path.unlink()

    write_companions(tmp_path, "day", made, None)
    write_binary(tmp_path / "train_data.bin", made, slice(0, 60))
    write_binary(tmp_path / "test_data.bin", made, slice(60, 80))
    refused(
        f"DIR/val_data.bin does not exist. Of train, test and val all three are needed. {REMEDY}"
    )
    write_binary(tmp_path / "val_data.bin", made, slice(80, 100))
    content = (tmp_path / "test_data.bin").read_bytes()
    for length in (0, 159, len(content) - 4):
        (tmp_path / "test_data.bin").write_bytes(content[:length])
        refused(
            "DIR/test_data.bin: expected 160 bytes for each row, 40 integers of 32 bits, got "
            f"{length} bytes in all. It is cut short, or something else. {REMEDY}"
        )
    made.ids[63, 25] = -5
    write_binary(tmp_path / "test_data.bin", made, slice(60, 80))
    refused(
        "DIR/test_data.bin, ids, at (3, 25): expected an integer of at least 0 and below "
        f"{made.counts[25]}, got -5. {REMEDY}"
    )
    made.ids[63, 25] = 0
    made.labels[62] = 2
    write_binary(tmp_path / "test_data.bin", made, slice(60, 80))
    refused(
        "DIR/test_data.bin, labels, at (2,): expected an integer of at least 0 and below 2, got 2. "
        f"{REMEDY}"
    )


def test_a_file_that_shrinks_while_it_is_read_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepared, "BLOCK_ROWS", 7)
    made = make(100)
    write_companions(tmp_path, "day", made, None)
    for split in ("train", "test", "val"):
        write_binary(tmp_path / f"{split}_data.bin", made, slice(0, 100))
    found = recognise(tmp_path)
    blocks = found.blocks()
    next(blocks)
    write_binary(tmp_path / "train_data.bin", made, slice(0, 50))
    with pytest.raises(UserError, match=r"train_data\.bin became shorter while it was read"):
        list(blocks)


def test_some_dictionaries_are_as_good_as_none(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    made = make(10)
    write_whole(tmp_path / WHOLE, made)
    write_companions(tmp_path, "train", made, None)
    (tmp_path / "train_fea_dict_7.npz").unlink()
    assert not recognise(tmp_path).has_values
    assert caplog.messages == [
        f"{tmp_path}/train_fea_dict_7.npz does not exist, so raw values are taken to be unknown "
        "for all features"
    ]


def test_what_is_nothing_prepared_is_named(tmp_path: Path) -> None:
    made = make(20)
    (tmp_path / "empty").mkdir()
    (tmp_path / "train.txt").write_text("raw")
    for path in (
        tmp_path / "empty",
        tmp_path / "absent",
        tmp_path / "absent" / "below",
        tmp_path / "train.txt",
        tmp_path / "train.txt" / "below",
    ):
        with pytest.raises(UserError) as caught:
            recognise(path)
        assert str(caught.value) == (
            f"{path} is nothing that the reference has prepared, nor a folder that holds one such "
            "thing. Name kaggleAdDisplayChallenge_processed.npz; or day_0_reordered.npz and so on, "
            "beside day_fea_count.npz; or files whose names end in train.bin, test.bin and val.bin "
            "(or train_data.bin and so on), beside day_fea_count.npz."
        )
    # What the reference leaves beside its last step's files is passed over.
    for name in (
        "day_0.npz",
        "day_0_processed.npz",
        "day_23_processed.npz",
        "day_0_reordered0.npy",
    ):
        (tmp_path / name).touch()
    write_days(tmp_path, "day", made, {0: 20})
    write_companions(tmp_path, "day", made, None)
    assert recognise(tmp_path).days == (20,)
    for split in ("train", "test", "val"):
        write_binary(tmp_path / f"{split}_data.bin", made, slice(0, 20))
    write_whole(tmp_path / WHOLE, made)
    with pytest.raises(UserError) as caught:
        recognise(tmp_path)
    assert str(caught.value) == (
        f"{tmp_path} holds several things that the reference has prepared: {WHOLE}, "
        "train_data.bin, day. Name the one that is meant."
    )
    assert recognise(tmp_path / "day").days == (20,)
    assert recognise(tmp_path / "train_data.bin").days == (20, 40)
    assert recognise(tmp_path / WHOLE).days == (3, 3, 3, 3, 3, 3, 2)


@pytest.mark.parametrize("layout", ["whole", "day", "binary"])
def test_memory_does_not_grow_with_the_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: str
) -> None:
    monkeypatch.setattr(prepared, "BLOCK_ROWS", 2000)
    made = make(60_000)
    if layout == "whole":
        write_whole(tmp_path / WHOLE, made)
    elif layout == "day":
        write_days(tmp_path, "day", made, {0: 60_000})
    else:
        write_binary(tmp_path / "train.bin", made, slice(0, 40_000))
        write_binary(tmp_path / "test.bin", made, slice(40_000, 50_000))
        write_binary(tmp_path / "val.bin", made, slice(50_000, 60_000))
    write_companions(tmp_path, "day", made, None)
    tracemalloc.start()
    try:
        rows = sum(len(labels) for labels, _, _ in recognise(tmp_path).blocks())
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert rows == 60_000
    assert peak < 6 << 20  # all rows take 9 MB, or 18 MB in floats


def test_the_references_own_file(shared_data: Path) -> None:
    golden = shared_data / "golden"
    with np.load(golden / WHOLE) as archive:
        arrays = dict(archive)
    ids = arrays["X_cat"].astype(np.int32)
    made = Made(arrays["y"], arrays["X_int"], ids, arrays["counts"], [])
    found = recognise(golden)
    require_rows(found, made)
    assert found.days == (2001,) * 7
