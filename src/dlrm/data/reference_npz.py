"""The reference implementation's prepared file, kaggleAdDisplayChallenge_processed.npz.

It holds ``X_int`` (n, 13), ``X_cat`` (n, 26) ids (integers, which some versions store as float64),
``y`` (n,) labels and ``counts`` (26,), the rows of each embedding table, in the raw file's order.
Negative integers are 0 in it already, and no logarithm has been taken. The raw values behind the
ids are not in it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dlrm.data.criteo import DENSE_NAMES, SPARSE_NAMES
from dlrm.data.dataset import Rows
from dlrm.errors import EnvironmentFaultError, UserError
from dlrm.files import environment_faults


def read(path: Path) -> tuple[Rows, tuple[int, ...]]:
    """Read such a file whole.

    Returns:
        Its rows, and the rows of each embedding table.

    Raises:
        UserError: It is missing, damaged, or holds something else.
        EnvironmentFaultError: It cannot be read.
    """
    arrays: dict[str, npt.NDArray[Any]] = {}
    try:
        with (
            environment_faults(f"read {path}"),
            open(path, "rb") as file,
            np.load(file, allow_pickle=False) as archive,
        ):
            for name in ("y", "X_int", "X_cat", "counts"):
                arrays[name] = archive[name]
    except (EnvironmentFaultError, MemoryError):
        raise
    except Exception as error:  # NumPy and zipfile raise many kinds for a damaged file
        raise UserError(
            f"{path} is not the reference's prepared file, with arrays X_int, X_cat, y and "
            f"counts, or it is damaged: {error}. Prepare from train.txt instead."
        ) from error
    rows = len(arrays["y"])
    shapes = {
        "y": (rows,),
        "X_int": (rows, len(DENSE_NAMES)),
        "X_cat": (rows, len(SPARSE_NAMES)),
        "counts": (len(SPARSE_NAMES),),
    }
    for name, shape in shapes.items():
        if arrays[name].shape != shape:
            raise UserError(
                f"{path}, array {name}: expected the shape {shape}, got {arrays[name].shape}. "
                "Prepare from train.txt instead."
            )
    counts = _integers(path, "counts", arrays["counts"], 1, 2**31)
    labels = _integers(path, "y", arrays["y"], 0, 2)
    dense = np.maximum(_integers(path, "X_int", arrays["X_int"], -(2**31), 2**31), 0)
    sparse = _integers(path, "X_cat", arrays["X_cat"], 0, counts)
    return Rows(labels.astype(np.uint8), dense, sparse), tuple(int(count) for count in counts)


def _integers(
    path: Path, name: str, values: npt.NDArray[Any], low: int, end: int | npt.NDArray[np.int32]
) -> npt.NDArray[np.int32]:
    """Convert to int32, where every value is an integer in low … end-1."""
    if values.dtype.kind not in "iuf":
        raise UserError(f"{path}, array {name}: expected numbers, got {values.dtype}.")
    bad = ~((values >= low) & (values < end) & (values == np.floor(values)))
    if bad.any():
        index = tuple(int(position) for position in np.argwhere(bad)[0])
        raise UserError(
            f"{path}, array {name}, at {index}: expected an integer of at least {low} and below "
            f"{end if isinstance(end, int) else end[index[-1]]}, got {values[index]}. Prepare from "
            "train.txt instead."
        )
    return values.astype(np.int32)
