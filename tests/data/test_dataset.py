from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from dlrm.data import dataset as dataset_module
from dlrm.data.batch import Batch, make_batch
from dlrm.data.dataset import (
    Dataset,
    Manifest,
    Rows,
    copy_description,
    part_name,
    publish,
    stored_split,
    write_dataset,
    write_part,
)
from dlrm.data.vocabulary import Encoder, Vocabulary, write_vocabulary
from dlrm.errors import EnvironmentFaultError, UserError
from dlrm.files import locked
from dlrm.schema import (
    SPLITS,
    DenseFeature,
    FeatureSchema,
    SparseFeature,
    read_schema,
    write_schema,
)

SCHEMA = FeatureSchema(
    label="clicked",
    dense=tuple(DenseFeature(name) for name in ("age", "price", "hour")),
    sparse=(SparseFeature("user", 1000), SparseFeature("shop", 5)),
    source_format="made-up",
    split_rule="none",
)


def made_up_rows(rows: int, seed: int = 0, *, unknown: float = 0.0) -> Rows:
    generator = np.random.default_rng(seed)
    limits = [feature.num_embeddings for feature in SCHEMA.sparse]
    sparse = generator.integers(0, limits, (rows, 2)).astype(np.int32)
    sparse[generator.random(sparse.shape) < unknown] = -1
    return Rows(
        generator.integers(0, 2, rows).astype(np.uint8),
        generator.integers(0, 10**6, (rows, 3)).astype(np.int32),
        sparse,
    )


def in_runs(rows: Rows, length: int) -> Iterator[Rows]:
    for start in range(0, len(rows), length):
        yield rows[start : start + length]


TRAIN, VALIDATION = made_up_rows(1000), made_up_rows(70, 1, unknown=0.1)


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make a part end after some 140 rows."""
    monkeypatch.setattr(dataset_module, "PART_BYTES", 3000)


@pytest.fixture
def dataset(tmp_path: Path, small_parts: None) -> Dataset:
    rows = {"train": in_runs(TRAIN, 33), "validation": in_runs(VALIDATION, 40)}
    return write_dataset(tmp_path / "dataset", SCHEMA, rows)  # type: ignore[arg-type]


def assert_equal(batch: Batch, expected: Batch) -> None:
    for field in dataclasses.fields(Batch):
        got, want = getattr(batch, field.name), getattr(expected, field.name)
        assert (got is None) == (want is None)
        if got is not None:
            assert got.dtype == want.dtype
            torch.testing.assert_close(got, want, rtol=0, atol=0)


def test_a_dataset_is_several_parts_of_several_blocks(dataset: Dataset) -> None:
    assert [dataset.rows(split) for split in ("train", "validation", "test")] == [1000, 70, 0]
    parts = dataset.manifest.splits["train"].parts
    assert [part.rows for part in parts] == [165, 165, 165, 165, 165, 165, 10]
    assert parts[1].file == "train/part-00001.arrow"
    assert dataset.manifest.splits["train"].clicks == TRAIN.labels.sum()
    with pa.OSFile(str(dataset.path / parts[0].file)) as file:
        reader = pa.ipc.open_file(file)
        assert reader.num_record_batches == 5
        assert reader.schema.names == ["label", "dense", "sparse"]
        assert reader.schema.field("sparse").type.list_size == 2
        assert reader.read_all()["sparse"].to_pylist() == TRAIN.sparse[:165].tolist()


@pytest.mark.parametrize("mini_batch_size", [1, 7, 33, 128, 165, 400, 999, 1000, 5000])
def test_batches_span_blocks_and_parts(dataset: Dataset, mini_batch_size: int) -> None:
    batches = list(dataset.batches("train", mini_batch_size))
    assert len(batches) == -(-1000 // mini_batch_size)
    for batch, rows in zip(batches, in_runs(TRAIN, mini_batch_size), strict=True):
        assert_equal(batch, make_batch(SCHEMA, rows.dense, rows.sparse, rows.labels))


@pytest.mark.parametrize("mini_batch_size", [1, 9, 50, 100])
def test_unknown_ids_are_empty_bags(dataset: Dataset, mini_batch_size: int) -> None:
    unknown = 0
    for batch, rows in zip(
        dataset.batches("validation", mini_batch_size),
        in_runs(VALIDATION, mini_batch_size),
        strict=True,
    ):
        known = rows.sparse >= 0
        if batch.offsets is None:
            assert known.all()
        else:
            assert (batch.offsets.diff().reshape(-1, 2).numpy() == known).all()
        assert batch.sparse_features.reshape(-1).tolist() == rows.sparse[known].tolist()
        unknown += batch.unknown_ids
    assert unknown == (VALIDATION.sparse < 0).sum() > 0


def test_a_schema_may_limit_ids(dataset: Dataset) -> None:
    (batch,) = dataset.batches("train", 1000, schema=dataset.schema.with_max_ind_range(3))
    assert batch.sparse_features.tolist() == (TRAIN.sparse % 3).tolist()


@pytest.mark.parametrize(("first_batch", "num_batches"), [(0, 3), (2, 0), (5, 4), (30, 2), (31, 5)])
def test_some_of_the_batches(dataset: Dataset, first_batch: int, num_batches: int) -> None:
    everything = list(dataset.batches("train", 32))
    some = list(dataset.batches("train", 32, first_batch=first_batch, num_batches=num_batches))
    end = first_batch + num_batches if num_batches else None
    expected = everything[first_batch:end]
    assert len(some) == len(expected) > 0
    for batch, other in zip(some, expected, strict=True):
        assert_equal(batch, other)


def test_beyond_the_end_and_empty_splits(dataset: Dataset) -> None:
    assert list(dataset.batches("train", 32, first_batch=32)) == []
    assert list(dataset.batches("test", 32)) == []


def test_the_transform_does_not_depend_on_the_place_in_a_block() -> None:
    """A vectorised logarithm may treat the ends of an array otherwise; resume would differ."""
    dense = np.arange(60_000, dtype=np.int32).reshape(-1, 3)
    ids = np.zeros((len(dense), 2), np.int32)
    whole = make_batch(SCHEMA, dense, ids, None).dense_features
    for offset in (1, 2, 3, 5461, 5462, 9999):
        part = make_batch(SCHEMA, dense[offset:], ids[offset:], None).dense_features
        assert torch.equal(part, whole[offset:])
    torch.testing.assert_close(whole, torch.log1p(torch.from_numpy(dense).float()))


def loader_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "dlrm-dataset"]


def test_the_thread_ends_with_the_generator(dataset: Dataset) -> None:
    batches = dataset.batches("train", 10)
    assert not loader_threads()
    next(batches)
    assert len(loader_threads()) == 1
    batches.close()
    assert not loader_threads()

    for _ in dataset.batches("train", 10):
        break
    assert not loader_threads()

    assert len(list(dataset.batches("train", 10))) == 100
    assert not loader_threads()

    def consume() -> None:
        for _ in dataset.batches("train", 10):
            raise KeyError("consumer")

    with pytest.raises(KeyError, match="consumer"):
        consume()
    assert not loader_threads()


def test_the_thread_reads_only_so_far_ahead(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []

    def counted(*arguments: object) -> Batch:
        made.append(threading.current_thread().name)
        return make_batch(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(dataset_module, "make_batch", counted)
    batches = dataset.batches("train", 11)
    next(batches)
    threading.Event().wait(0.2)
    # One in the consumer's hand, two in the queue, one that waits for room.
    assert 1 <= len(made) <= dataset_module.BLOCKS_AHEAD + 2
    assert set(made) == {"dlrm-dataset"}
    batches.close()


def test_an_exception_in_the_thread_reaches_the_consumer(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = iter(range(100))

    def failing(*arguments: object) -> Batch:
        if next(calls) == 3:
            raise MemoryError("no room")
        return make_batch(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(dataset_module, "make_batch", failing)
    batches = dataset.batches("train", 33)
    for _ in range(3):
        next(batches)
    with pytest.raises(MemoryError, match="no room"):
        next(batches)
    assert not loader_threads()


def part_path(dataset: Dataset, index: int = 2) -> Path:
    return dataset.path / dataset.manifest.splits["train"].parts[index].file


@pytest.mark.parametrize("damage", ["shorter", "longer", "missing", "a folder"])
def test_a_part_of_another_size_is_refused(dataset: Dataset, damage: str) -> None:
    path = part_path(dataset)
    content = path.read_bytes()
    path.unlink()
    if damage == "shorter":
        path.write_bytes(content[:-1])
    elif damage == "longer":
        path.write_bytes(content + b"x")
    elif damage == "a folder":
        path.mkdir()
    got = {"shorter": len(content) - 1, "longer": len(content) + 1}.get(damage, "no file")
    with pytest.raises(UserError) as caught:
        Dataset.open(dataset.path)
    assert str(caught.value) == (
        f"{path} is damaged: expected {len(content)} bytes, got {got}. Prepare the dataset again."
    )


def test_a_part_damaged_after_opening_is_named_when_it_is_read(dataset: Dataset) -> None:
    path = part_path(dataset)
    content = path.read_bytes()
    for length in range(0, len(content), 97):
        path.write_bytes(content[:length])
        batches = dataset.batches("train", 165)
        next(batches)
        next(batches)  # parts before it are read
        with pytest.raises(UserError, match=r"part-00002\.arrow is damaged: .*Prepare the dataset"):
            list(batches)
    path.unlink()
    with pytest.raises(UserError, match=r"part-00002\.arrow is damaged: .*No such file"):
        list(dataset.batches("train", 165))


def test_a_flipped_byte_is_read_or_named_but_never_out_of_range(dataset: Dataset) -> None:
    path = part_path(dataset, 6)
    content = path.read_bytes()
    messages = []
    for position in range(0, len(content), 3):
        flipped = bytes([content[position] ^ 0x55])
        path.write_bytes(content[:position] + flipped + content[position + 1 :])
        try:
            for batch in dataset.batches("train", 1000):
                assert bool((batch.sparse_features < torch.tensor([1000, 5])).all())
        except UserError as error:
            messages.append(str(error))
    assert len(messages) > 20
    assert all("part-00006.arrow is damaged" in message for message in messages)


@pytest.mark.parametrize(
    ("field", "row", "value"),
    [("labels", (3,), 2), ("sparse", (3, 1), 5), ("sparse", (3, 0), -2), ("dense", (3, 2), -1)],
)
def test_values_that_cannot_be_are_refused(
    tmp_path: Path, field: str, row: tuple[int, ...], value: int
) -> None:
    rows = made_up_rows(50)
    getattr(rows, field)[row] = value
    dataset = write_dataset(tmp_path / "dataset", SCHEMA, {"train": [rows]})
    with pytest.raises(UserError, match="expected labels 0 or 1 and ids of the vocabularies"):
        list(dataset.batches("train", 10))


def test_a_part_with_other_columns_or_rows_is_refused(dataset: Dataset) -> None:
    other = dataclasses.replace(SCHEMA, sparse=SCHEMA.sparse[:1])
    with pytest.raises(UserError, match="expected the columns"):
        list(dataclasses.replace(dataset, schema=other).batches("train", 10))
    split = dataset.manifest.splits["train"]
    parts = tuple(dataclasses.replace(part, rows=part.rows + 1) for part in split.parts)
    splits = {"train": dataclasses.replace(split, rows=1007, parts=parts)}
    manifest = dataclasses.replace(dataset.manifest, splits=splits)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="expected 166 rows, got 165"):
        list(dataclasses.replace(dataset, manifest=manifest).batches("train", 10))


def test_a_failing_disk_is_the_environments_fault(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(path: str) -> None:
        raise OSError(errno.EIO, "Input/output error", path)

    monkeypatch.setattr(dataset_module.pa, "OSFile", failing)
    with pytest.raises(EnvironmentFaultError, match=r"cannot read .*Input/output error"):
        list(dataset.batches("train", 10))


def edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("name", ["manifest.json", "schema.json"])
def test_versions(dataset: Dataset, name: str) -> None:
    path = dataset.path / name
    for version in ("2.0", "1.5", "0.9", "1", "", "1.0.0", "x"):
        edit_json(path, format_version=version)
        with pytest.raises(UserError, match=f"{name} has format version '{version}'; this dlrm"):
            Dataset.open(dataset.path)
    for version in ("1.0", "1.1", "1.2", "1.3", "1.4"):
        edit_json(path, format_version=version)
        Dataset.open(dataset.path)


def test_a_folder_that_is_no_complete_dataset(dataset: Dataset, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a folder"):
        Dataset.open(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"not a complete dataset: manifest\.json is missing"):
        Dataset.open(tmp_path / "empty")
    for name, content in [("manifest.json", "{"), ("schema.json", "[]")]:
        path = dataset.path / name
        before = path.read_text()
        path.write_text(content)
        with pytest.raises(UserError, match=f"{name} is damaged"):
            Dataset.open(dataset.path)
        path.write_text(before)
    edit_json(dataset.path / "schema.json", label="other")
    with pytest.raises(UserError, match=r"schema\.json was changed after it was written"):
        Dataset.open(dataset.path)
    write_schema(dataset.path, dataclasses.replace(SCHEMA, label="other").sealed())
    with pytest.raises(UserError, match=r"schema\.json does not belong to .*manifest\.json"):
        Dataset.open(dataset.path)


def test_equal_rows_give_equal_bytes(dataset: Dataset, tmp_path: Path) -> None:
    rows = {"train": in_runs(TRAIN, 33), "validation": in_runs(VALIDATION, 40)}
    other = write_dataset(tmp_path / "elsewhere", SCHEMA, rows)  # type: ignore[arg-type]
    files = sorted(path.relative_to(dataset.path) for path in dataset.path.rglob("*.*"))
    assert len(files) == 2 + 7 + 1
    for file in files:
        assert (dataset.path / file).read_bytes() == (other.path / file).read_bytes()
    for part in dataset.manifest.splits["train"].parts:
        assert hashlib.sha256((dataset.path / part.file).read_bytes()).hexdigest() == part.sha256


def test_what_is_there_is_not_overwritten(dataset: Dataset, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is a DATASET already"):
        write_dataset(dataset.path, SCHEMA, {})
    (tmp_path / "folder").mkdir()
    write_dataset(tmp_path / "folder", SCHEMA, {"train": [TRAIN]})  # an empty one is used
    (tmp_path / "papers").mkdir()
    (tmp_path / "papers" / "thesis.tex").touch()
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "absent")
    for name, reason in [
        ("papers", "is not empty and no DATASET"),
        ("file", "exists and is not a folder"),
        ("link", "exists and is not a folder"),
    ]:
        before = sorted(tmp_path.rglob("*"))
        for overwrite in (False, True):
            with pytest.raises(UserError, match=reason):
                publish(
                    write_partial(tmp_path), tmp_path / name, SEALED, MANIFEST, overwrite=overwrite
                )
            shutil.rmtree(tmp_path / "partial")
        with pytest.raises(UserError, match=reason):
            write_dataset(tmp_path / name, SCHEMA, {"train": [TRAIN]})
        assert sorted(tmp_path.rglob("*")) == before
    with pytest.raises(UserError, match="file is not a folder"):
        write_dataset(tmp_path / "file" / "dataset", SCHEMA, {})


SEALED = SCHEMA.sealed()
MANIFEST = Manifest({split: stored_split([]) for split in SPLITS}, SEALED.fingerprint)


def write_partial(folder: Path) -> Path:
    """A folder in which a DATASET without rows is written, but for its description."""
    for split in SPLITS:
        (folder / "partial" / split).mkdir(parents=True)
    return folder / "partial"


def test_a_dataset_is_replaced_only_if_that_is_asked_for(dataset: Dataset, tmp_path: Path) -> None:
    partial = write_partial(tmp_path)
    with pytest.raises(UserError, match="is a DATASET already"):
        publish(partial, dataset.path, SEALED, MANIFEST)
    assert Dataset.open(dataset.path).rows("train") == 1000
    publish(partial, dataset.path, SEALED, MANIFEST, overwrite=True)
    assert Dataset.open(dataset.path).rows("train") == 0
    assert [path.name for path in tmp_path.iterdir()] == ["dataset"]


def test_a_part_is_described_by_what_was_written(tmp_path: Path) -> None:
    (tmp_path / "test").mkdir()
    written = write_part(tmp_path, part_name("test", 7), SCHEMA, in_runs(TRAIN[:50], 20))
    path = tmp_path / "test" / "part-00007.arrow"
    assert written.clicks == TRAIN.labels[:50].sum()
    assert written.part.file == "test/part-00007.arrow"
    assert written.part.rows == 50
    assert written.part.bytes == path.stat().st_size
    assert written.part.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    with pa.OSFile(str(path)) as file:
        reader = pa.ipc.open_file(file)
        lengths = [reader.get_batch(n).num_rows for n in range(reader.num_record_batches)]
    assert lengths == [20, 20, 10]
    split = stored_split([written, write_part(tmp_path, "test/other.arrow", SCHEMA, [])])
    assert (split.rows, split.clicks) == (50, written.clicks)
    assert [part.rows for part in split.parts] == [50, 0]


def test_a_failure_leaves_nothing_new(dataset: Dataset, tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))

    def failing() -> Iterator[Rows]:
        yield TRAIN
        yield TRAIN
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_dataset(tmp_path / "new", SCHEMA, {"train": failing()})
    assert sorted(tmp_path.rglob("*")) == before
    assert len(list(dataset.batches("train", 1000))) == 1


def test_leftovers_of_a_killed_process_are_removed(tmp_path: Path) -> None:
    for name in (".dataset.partial", ".dataset.replaced"):
        (tmp_path / name / "train").mkdir(parents=True)
    write_dataset(tmp_path / "dataset", SCHEMA, {"train": [TRAIN]})
    assert [path.name for path in tmp_path.iterdir()] == ["dataset"]


def test_two_writers(tmp_path: Path) -> None:
    path = tmp_path / "dataset"
    with (
        locked(path, "dataset"),
        pytest.raises(UserError, match="is being written by another process"),
    ):
        write_dataset(path, SCHEMA, {"train": [TRAIN]})
    write_dataset(path, SCHEMA, {"train": [TRAIN]})


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(EnvironmentFaultError, match=r"No space left on device.*Free some space"):
        write_dataset(tmp_path / "dataset", SCHEMA, {"train": [TRAIN]})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("can_link", [True, False])
def test_a_run_gets_schema_and_vocabularies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, can_link: bool
) -> None:
    known = Vocabulary(np.array([5, 9], np.uint32), np.array([0, 1], np.int32), np.array([2, 1]))
    (tmp_path / "dataset" / "vocabulary").mkdir(parents=True)
    sparse = []
    for feature in SCHEMA.sparse:
        name = f"{feature.name}.arrow"
        checksum = write_vocabulary(tmp_path / "dataset" / "vocabulary" / name, [known])
        sparse.append(SparseFeature(feature.name, 2, name, checksum))
    schema = dataclasses.replace(SCHEMA, sparse=tuple(sparse)).sealed()

    def refused(source: Path, target: Path) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    if not can_link:
        monkeypatch.setattr(os, "link", refused)
    run = tmp_path / "run"
    run.mkdir()
    for _ in range(2):  # again, as after a failure
        copy_description(tmp_path / "dataset", run, schema.with_max_ind_range(1))
    linked = (run / "vocabulary" / "user.arrow").stat().st_nlink == 2
    assert linked is can_link
    # The RUN's description is complete without the DATASET.
    shutil.rmtree(tmp_path / "dataset")
    limited = read_schema(run, "run")
    assert limited.num_embeddings == (1, 1)
    ids, unknown = Encoder.open(run, limited).encode(np.array([[9, 6]], np.uint32))
    assert ids.tolist() == [[1, -1]]
    assert unknown.tolist() == [0, 1]


def test_without_vocabularies_a_run_gets_the_schema(dataset: Dataset, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    copy_description(dataset.path, tmp_path / "run", dataset.schema)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["schema.json"]
