"""``predictions/SPLIT.arrow``: the label and the predicted probability of every row of a split.

With the labels in it, whatever compares or describes runs needs nothing but their RUN folders.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from dlrm.arrow import open_arrow, to_arrow, to_numpy
from dlrm.errors import UserError
from dlrm.files import FORMAT_VERSION, atomic_write, check_version, environment_faults
from dlrm.schema import Split

BATCH_ROWS = 1 << 18
"""Rows of a record batch, but for the last."""

_COLUMNS = pa.schema(
    [
        pa.field("row", pa.int64(), nullable=False),
        pa.field("label", pa.uint8(), nullable=False),
        pa.field("probability", pa.float32(), nullable=False),
    ]
)


class PredictionsWriter:
    """Takes labels and probabilities in stored order; ``write_predictions`` makes one.

    Attributes:
        is_wanted: Whether the file is to appear; it may turn out that it is not.
    """

    def __init__(self, writer: Any) -> None:
        self._writer = writer
        self._labels = np.empty(BATCH_ROWS, np.uint8)
        self._probabilities = np.empty(BATCH_ROWS, np.float32)
        self._filled = 0
        self._written = 0
        self.is_wanted = True

    def add(self, labels: npt.NDArray[Any], probabilities: npt.NDArray[np.float32]) -> None:
        """Add the next rows, any number of them.

        Args:
            labels: (n,) of 0 and 1, any numeric or boolean type.
            probabilities: (n,) in [0, 1].
        """
        start = 0
        while start < len(labels):
            count = min(len(labels) - start, BATCH_ROWS - self._filled)
            there = slice(self._filled, self._filled + count)
            self._labels[there] = labels[start : start + count]
            self._probabilities[there] = probabilities[start : start + count]
            self._filled += count
            start += count
            if self._filled == BATCH_ROWS:
                self.flush()

    def flush(self) -> None:
        """Write what waits for its record batch to be full."""
        if self._filled:
            rows = np.arange(self._written, self._written + self._filled)
            columns = (rows, self._labels[: self._filled], self._probabilities[: self._filled])
            arrays = [to_arrow(column) for column in columns]
            self._writer.write_batch(pa.record_batch(arrays, schema=_COLUMNS))
            self._written += self._filled
            self._filled = 0


@contextmanager
def write_predictions(path: Path, split: Split, dataset: str) -> Iterator[PredictionsWriter]:
    """Write the predictions of a split as they come; the file appears when the context ends well.

    Record batches have ``BATCH_ROWS`` rows however the rows came, so equal rows give equal bytes.

    Args:
        path: The file; its folder is made.
        split: Which split the rows are of.
        dataset: The fingerprint of the manifest of the DATASET (``Manifest.fingerprint``).

    Raises:
        EnvironmentFaultError: The disk is full or fails.
    """
    metadata = {"split": split, "dataset": dataset, "format_version": FORMAT_VERSION}
    with environment_faults(f"write to {path.parent}"):
        path.parent.mkdir(exist_ok=True)
    schema = _COLUMNS.with_metadata(metadata)
    with (
        contextlib.suppress(_NotWantedError),
        atomic_write(path) as file,
        pa.ipc.new_file(file, schema) as arrow,
    ):
        writer = PredictionsWriter(arrow)
        yield writer
        if not writer.is_wanted:
            raise _NotWantedError
        writer.flush()


class _NotWantedError(Exception):
    """Ends the writing of a file that is not to appear."""


@dataclass(frozen=True)
class Predictions:
    """Predictions that are on disk.

    Attributes:
        path: The file.
        split: Which split the rows are of.
        dataset: The fingerprint of the manifest of the DATASET whose rows they are.
        rows: How many there are: the first of the split, or all.
    """

    path: Path
    split: Split
    dataset: str
    rows: int

    @staticmethod
    def open(path: Path, split: Split) -> Predictions:
        """Read what a file is of, and how many rows it has.

        Raises:
            UserError: It is missing, damaged, of another split, or of an older dlrm, which wrote no
                labels.
        """
        with _reading(path) as reader:
            if reader.schema.remove_metadata() != _COLUMNS:
                names = ", ".join(reader.schema.names)
                if "label" not in reader.schema.names:
                    raise UserError(
                        f"{path} has no labels: an older dlrm wrote it, with the columns {names}. "
                        "Train again to have them."
                    )
                raise _damaged(path, f"expected the columns {_COLUMNS}, got {reader.schema}")
            stored = reader.schema.metadata or {}
            metadata = {key.decode(): value.decode() for key, value in stored.items()}
            missing = {"split", "dataset", "format_version"} - metadata.keys()
            if missing:
                raise _damaged(path, f"its metadata lacks {', '.join(sorted(missing))}")
            check_version(metadata["format_version"], path)
            if metadata["split"] != split:
                raise _damaged(path, f"expected the split {split}, got {metadata['split']}")
            rows = sum(
                reader.get_batch(index).num_rows for index in range(reader.num_record_batches)
            )
        return Predictions(path, split, metadata["dataset"], rows)

    def batches(self) -> Iterator[tuple[npt.NDArray[np.uint8], npt.NDArray[np.float32]]]:
        """Read labels and probabilities, (n,) each, a record batch at a time, and check them.

        Raises:
            UserError: The file is damaged.
            EnvironmentFaultError: The disk fails.
        """
        position = 0
        with _reading(self.path) as reader:
            for index in range(reader.num_record_batches):
                batch = reader.get_batch(index)
                batch.validate(full=True)
                if any(column.null_count for column in batch.columns):
                    raise _damaged(self.path, "values are missing")
                row, label, probability = map(to_numpy, batch.columns)
                if not np.array_equal(row, np.arange(position, position + len(row))):
                    raise _damaged(self.path, "expected the rows 0, 1, 2 … in their order")
                # Of a NaN neither comparison holds.
                sound = (label <= 1).all() and ((probability >= 0) & (probability <= 1)).all()
                if not sound:
                    raise _damaged(self.path, "expected labels 0 or 1 and probabilities in [0, 1]")
                position += len(row)
                yield label, probability

    def arrays(self) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.float32]]:
        """Read all labels and probabilities, (rows,) each: 5 bytes a row.

        Raises:
            UserError: The file is damaged.
            EnvironmentFaultError: The disk fails.
        """
        labels = np.empty(self.rows, np.uint8)
        probabilities = np.empty(self.rows, np.float32)
        position = 0
        for label, probability in self.batches():
            there = slice(position, position + len(label))
            labels[there], probabilities[there] = label, probability
            position += len(label)
        return labels, probabilities


@contextmanager
def _reading(path: Path) -> Iterator[Any]:
    try:
        with open_arrow(path) as reader:
            yield reader
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(
            f"there are no predictions at {path}. A run that ends writes them for validation and "
            "test; one that was interrupted goes on with `dlrm train --resume RUN`."
        ) from error
    except (pa.ArrowException, UnicodeDecodeError, OSError) as error:
        raise _damaged(path, str(error)) from error


def _damaged(path: Path, reason: str) -> UserError:
    return UserError(f"{path} is damaged: {reason}. Train again.")
