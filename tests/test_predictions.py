from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dlrm import predictions
from dlrm.errors import UserError
from dlrm.predictions import Predictions, write_predictions

FINGERPRINT = "ab" * 32


def made_up(rows: int) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(rows)
    return (
        generator.integers(0, 2, rows, dtype=np.uint8),
        generator.random(rows, dtype=np.float32),
    )


def write(path: Path, labels: np.ndarray, probabilities: np.ndarray, cuts: list[int]) -> None:
    with write_predictions(path, "test", FINGERPRINT) as writer:
        for start, end in zip([0, *cuts], [*cuts, len(labels)], strict=True):
            writer.add(labels[start:end].astype(np.float32), probabilities[start:end])


@given(st.integers(0, 40), st.data())
def test_what_is_written_is_read_and_does_not_depend_on_how_it_came(
    tmp_path_factory: pytest.TempPathFactory, rows: int, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("predictions")
    labels, probabilities = made_up(rows)
    cuts = sorted(data.draw(st.lists(st.integers(0, rows), max_size=5)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(predictions, "BATCH_ROWS", 7)
        write(folder / "cut.arrow", labels, probabilities, cuts)
        write(folder / "whole.arrow", labels, probabilities, [])
    assert (folder / "cut.arrow").read_bytes() == (folder / "whole.arrow").read_bytes()
    found = Predictions.open(folder / "cut.arrow", "test")
    assert (found.split, found.dataset, found.rows) == ("test", FINGERPRINT, rows)
    for mine, theirs in zip(found.arrays(), (labels, probabilities), strict=True):
        np.testing.assert_array_equal(mine, theirs)
    table = pa.ipc.open_file(folder / "cut.arrow").read_all()
    assert table["row"].to_pylist() == list(range(rows))
    assert table["label"].type == pa.uint8()


def test_a_failure_leaves_nothing(tmp_path: Path) -> None:
    def fail() -> None:
        with write_predictions(tmp_path / "new" / "test.arrow", "test", FINGERPRINT) as writer:
            writer.add(*made_up(3))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert list((tmp_path / "new").iterdir()) == []


def test_missing_and_older_files_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"there are no predictions at .*test\.arrow"):
        Predictions.open(tmp_path / "test.arrow", "test")
    table = pa.table({"row": [0, 1], "probability": pa.array([0.5, 0.25], pa.float32())})
    with pa.ipc.new_file(tmp_path / "test.arrow", table.schema) as writer:
        writer.write_table(table)
    with pytest.raises(UserError, match=r"has no labels: an older dlrm .* row, probability"):
        Predictions.open(tmp_path / "test.arrow", "test")


def store(path: Path, **changed: object) -> None:
    """Write a file of two rows with something else in it than there should be."""
    schema = predictions._COLUMNS.with_metadata(
        {
            "split": str(changed.get("split", "test")),
            "dataset": FINGERPRINT,
            "format_version": str(changed.get("format_version", "1.4")),
        }
    )
    columns = {
        "row": [0, 1],
        "label": [0, 1],
        "probability": [0.5, 0.25],
        **{name: value for name, value in changed.items() if name in schema.names},
    }
    arrays = [pa.array(columns[field.name], field.type) for field in schema]
    with pa.ipc.new_file(path, schema) as writer:
        writer.write_batch(pa.record_batch(arrays, schema=schema))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"split": "validation"}, "expected the split test, got validation"),
        ({"format_version": "2.0"}, "has format version '2.0'"),
        ({"row": [1, 0]}, "expected the rows 0, 1, 2"),
        ({"label": [0, 2]}, "expected labels 0 or 1"),
        ({"probability": [0.5, float("nan")]}, r"probabilities in \[0, 1\]"),
        ({"probability": [0.5, 1.5]}, r"probabilities in \[0, 1\]"),
        ({"probability": [0.5, None]}, "values are missing"),
    ],
)
def test_what_cannot_be_is_refused(
    tmp_path: Path, changed: dict[str, object], message: str
) -> None:
    store(tmp_path / "test.arrow", **changed)
    with pytest.raises(UserError, match=message):
        Predictions.open(tmp_path / "test.arrow", "test").arrays()


def test_a_file_cut_short_is_damaged(tmp_path: Path) -> None:
    path = tmp_path / "test.arrow"
    write(path, *made_up(100), cuts=[])
    content = path.read_bytes()
    for length in range(0, len(content), 100):
        path.write_bytes(content[:length])
        with pytest.raises(UserError, match=re.escape(f"{path} is damaged")):
            Predictions.open(path, "test").arrays()


def test_any_byte_changed_gives_an_answer_or_a_refusal(tmp_path: Path) -> None:
    """Among them names and metadata that are no UTF-8."""
    path = tmp_path / "test.arrow"
    write(path, *made_up(10), cuts=[])
    content = path.read_bytes()
    refused = 0
    for at in range(0, len(content), 3):
        path.write_bytes(content[:at] + bytes([content[at] ^ 0x80]) + content[at + 1 :])
        try:
            Predictions.open(path, "test").arrays()
        except UserError:
            refused += 1
    assert refused > 10
