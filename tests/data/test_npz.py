from __future__ import annotations

import io
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dlrm.data.npz import open_npz
from dlrm.errors import UserError

DTYPES = st.sampled_from(["<i4", ">i4", "<i8", "<f8", "<f4", "|u1", "<f2"])


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("npz") / "arrays.npz"


@settings(deadline=None, max_examples=100)
@given(
    st.lists(st.integers(0, 5), min_size=1, max_size=3),
    DTYPES,
    st.booleans(),
    st.booleans(),
    st.integers(1, 6),
    st.randoms(use_true_random=False),
)
def test_runs_of_rows_are_those_of_the_array(
    path: Path,
    shape: list[int],
    dtype: str,
    compressed: bool,
    transposed: bool,
    step: int,
    random: Any,
) -> None:
    values = np.random.default_rng(random.randrange(2**32)).integers(0, 100, shape)
    array = values.astype(dtype, order="F" if transposed and len(shape) < 3 else "C")
    save = np.savez_compressed if compressed else np.savez
    save(path, first=np.arange(3), second=array, third=np.ones((2, 2)))
    found = open_npz(path)
    assert list(found) == ["first", "second", "third"]
    second = found["second"]
    assert (second.shape, second.dtype) == (array.shape, array.dtype)
    for first_row in range(shape[0] + 1):
        runs = list(second.read_rows(step, first_row))
        assert [len(run) for run in runs] == [
            min(step, shape[0] - first) for first in range(first_row, shape[0], step)
        ]
        for run in runs:
            assert run.dtype == array.dtype
        assert np.array_equal(np.concatenate([array[:0], *runs]), array[first_row:])
    assert np.array_equal(second.read(), array)


@pytest.fixture(scope="module")
def large() -> npt.NDArray[np.float64]:
    """Of 16 MB, which compress well in some places and not at all in others."""
    generator = np.random.default_rng(0)
    array = generator.integers(0, 40, (100_000, 20)).astype(np.float64)
    array[:, 3] = generator.random(100_000)
    array[:, 4] = 7
    return array


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("compressed", [False, True])
def test_memory_does_not_grow_with_the_array(
    path: Path, large: npt.NDArray[np.float64], order: Any, compressed: bool
) -> None:
    (np.savez_compressed if compressed else np.savez)(path, large=np.asarray(large, order=order))
    array = open_npz(path)["large"]
    assert array.is_by_column == (order == "F")
    tracemalloc.start()
    try:
        first = 70_000
        for run in array.read_rows(1000, first):
            assert np.array_equal(run, large[first : first + 1000])
            first += len(run)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert first == len(large)
    assert peak < 5 << 20


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("compressed", [False, True])
def test_a_damaged_file_is_named(
    path: Path, large: npt.NDArray[np.float64], order: Any, compressed: bool
) -> None:
    array = np.asarray(large[:200], order=order)
    (np.savez_compressed if compressed else np.savez)(path, small=np.arange(5), array=array)
    whole = path.read_bytes()

    def is_intact() -> bool:
        """Whether the file is as it was; otherwise it is named."""
        message = ""
        arrays = []
        try:
            arrays = [found.read() for found in open_npz(path).values()]
        except UserError as error:
            message = str(error)
        if message:
            assert message.startswith(str(path))
            assert "is damaged, or not written by NumPy: " in message
            assert message.endswith("Get the file again, or prepare from the raw rows instead.")
        for read in arrays:
            assert np.array_equal(read, np.arange(5)) or np.array_equal(read, array)
        return not message

    assert is_intact()
    for length in [0, 3, 30, *range(0, len(whole), 501), len(whole) - 1]:
        path.write_bytes(whole[:length])
        assert not is_intact()
    intact = 0  # some bytes do not matter: a member's name and time, in two places
    positions = [
        *range(200),
        *range(200, len(whole) - 300, 97),
        *range(len(whole) - 300, len(whole)),
    ]
    for position in positions:
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 0x55]) + whole[position + 1 :])
        intact += is_intact()
    assert intact < 0.4 * len(positions)


def test_what_is_no_npz_is_named(path: Path) -> None:
    np.save(path.with_suffix(".npy"), np.arange(5))
    path.with_suffix(".npy").replace(path)
    with pytest.raises(
        UserError, match=r"arrays\.npz is damaged, or not written by NumPy: File is"
    ):
        open_npz(path)
    with pytest.raises(UserError, match="does not exist"):
        open_npz(path / "below")


def npy(array: npt.NDArray[Any], *, keep: int | None = None) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()[:keep]


@pytest.mark.parametrize(
    ("content", "method", "message"),
    [
        (
            npy(np.arange(5)) + b"more",
            zipfile.ZIP_STORED,
            "its 172 bytes are not those of the shape",
        ),
        (npy(np.arange(5), keep=-1), zipfile.ZIP_DEFLATED, r"not those of the shape \(5,\)"),
        (npy(np.arange(5), keep=20), zipfile.ZIP_DEFLATED, "EOF: reading array header"),
        (b"", zipfile.ZIP_STORED, "EOF: reading magic string"),
        (b"text", zipfile.ZIP_DEFLATED, "magic string"),
        (npy(np.arange(5)), zipfile.ZIP_BZIP2, "packed in a way that NumPy does not use"),
    ],
)
def test_a_member_that_is_no_array_is_named(
    path: Path, content: bytes, method: int, message: str
) -> None:
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.writestr("bad.npy", content)
    with pytest.raises(UserError, match=rf"array bad is damaged, .*{message}"):
        open_npz(path)["bad"].read()
