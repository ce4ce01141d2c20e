"""A DATASET folder: prepared rows on disk, written in order and read back as batches."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import os
import queue
import shutil
import threading
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import msgspec
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from dlrm.arrow import open_arrow, to_arrow, to_numpy
from dlrm.config import GenerateConfig, PrepareConfig
from dlrm.data.batch import Bags, Batch, Dense, Labels, make_batch
from dlrm.data.spool import RejectedRow
from dlrm.errors import UserError
from dlrm.files import (
    FORMAT_VERSION,
    atomic_write,
    copy_file,
    environment_faults,
    flush_folder,
    is_plain_name,
    link_or_copy,
    locked,
    read_json,
    write_json,
)
from dlrm.schema import SPLITS, FeatureSchema, Split, read_schema, write_schema

BLOCK_BYTES = 8 << 20
"""Bytes of a record batch: what is read, checked and transformed at a time."""
PART_BYTES = 128 << 20
"""Bytes of a part, about: what preparation shuffles in memory at a time."""
BLOCKS_AHEAD = 2
"""Blocks that the background thread keeps ready."""


@dataclass(frozen=True, eq=False)
class Rows:
    """Stored rows, n of them, before any transform.

    Attributes:
        labels: (n,) uint8 zeros and ones; with the schema's soft_labels float32 in [0, 1].
        dense: (n, number of dense features) int32, or float32 where the schema stores floats.
        sparse: (n, number of features with one id a row) int32 ids below each feature's
            num_embeddings; -1: unknown.
        bags: The ids of each multi-hot feature, of n rows.
    """

    labels: Labels
    dense: Dense
    sparse: npt.NDArray[np.int32]
    bags: tuple[Bags, ...] = ()

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.labels)

    @property
    def clicked(self) -> npt.NDArray[np.bool_]:
        """Which rows count as clicked, (n,): the labels, or those above 0.5."""
        return self.labels > 0.5

    @property
    def nbytes(self) -> int:
        """Bytes as they are stored."""
        columns = (self.labels, self.dense, self.sparse, *self.bags)
        return sum(column.nbytes for column in columns)

    def __getitem__(self, index: slice | npt.NDArray[np.int64]) -> Rows:
        """Return some of the rows."""
        bags = tuple(bags[index] for bags in self.bags)
        return Rows(self.labels[index], self.dense[index], self.sparse[index], bags)

    @staticmethod
    def concatenate(runs: Sequence[Rows]) -> Rows:
        """Return the rows of several runs, one after the other."""
        if len(runs) == 1:
            return runs[0]
        return Rows(
            np.concatenate([run.labels for run in runs]),
            np.concatenate([run.dense for run in runs]),
            np.concatenate([run.sparse for run in runs]),
            tuple(map(Bags.concatenate, zip(*(run.bags for run in runs), strict=True))),
        )


@dataclass(frozen=True)
class Part:
    """One file of rows."""

    file: str
    """Its path within the DATASET."""
    rows: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class StoredSplit:
    """The rows of a split."""

    rows: int
    clicks: int
    """Rows whose label is 1; with soft labels, above 0.5."""
    parts: tuple[Part, ...]
    """In stored order."""


@dataclass(frozen=True)
class Source:
    """A file that a DATASET was made from."""

    name: str
    bytes: int
    mtime_ns: int
    """Time of its last change, in nanoseconds since 1970."""
    sha256: str
    lacks_last_newline: bool = False


@dataclass(frozen=True)
class Manifest:
    """``manifest.json``: what a DATASET consists of and what it was made from."""

    splits: dict[Split, StoredSplit]
    schema_fingerprint: str
    sources: tuple[Source, ...] = ()
    """In the order in which they were read; none for made-up rows."""
    options: PrepareConfig | None = None
    generation: GenerateConfig | None = None
    """How rows were made up, if ``dlrm generate`` made them."""
    days: tuple[int, ...] = ()
    """Rows of each day of the sources."""
    day_clicks: tuple[int, ...] = ()
    """Clicked rows of each day."""
    missing: tuple[int, ...] = ()
    """Of each dense feature, the rows in which it is missing."""
    rows_dropped: int = 0
    """Rows without a click that --data-sub-sample-rate dropped."""
    rows_rejected: int = 0
    """Malformed rows that were skipped."""
    rejected: dict[str, int] = field(default_factory=dict)
    """Those rows, by what was wrong."""
    rejected_examples: tuple[RejectedRow, ...] = ()
    """The first of them."""
    format_version: str = FORMAT_VERSION

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the schema's fingerprint and every row in its order."""
        parts = [[part.sha256 for part in self.splits[split].parts] for split in SPLITS]
        content = msgspec.json.encode((self.schema_fingerprint, parts))
        return hashlib.sha256(content).hexdigest()

    @property
    def train_days(self) -> tuple[int, ...]:
        """Rows of each training day."""
        held_back = self.splits["validation"].rows + self.splits["test"].rows
        return self.days[:-1] if held_back else self.days


@dataclass(frozen=True)
class Dataset:
    """A DATASET that is complete.

    Attributes:
        path: The folder.
        schema: What a row consists of.
        manifest: Where the rows are.
    """

    path: Path
    schema: FeatureSchema
    manifest: Manifest

    @staticmethod
    def open(path: Path) -> Dataset:
        """Read a DATASET's description and check that its parts are there.

        Raises:
            UserError: It is missing, incomplete, damaged, or of another version.
        """
        if not path.is_dir():
            raise UserError(
                f"{path} is not a folder. Name the DATASET that `dlrm prepare` made; of a run "
                "whose DATASET has moved, with --dataset."
            )
        manifest = read_json(
            path / "manifest.json",
            Manifest,
            "dataset",
            if_missing="Check the path; of a folder with raw rows, `dlrm prepare` makes a DATASET.",
        )
        schema = read_schema(path, "dataset")
        if schema.sealed().fingerprint != schema.fingerprint:
            raise UserError(
                f"{path / 'schema.json'} was changed after it was written: its content does not "
                "have the fingerprint that it names. Prepare the dataset again."
            )
        if schema.fingerprint != manifest.schema_fingerprint:
            raise UserError(
                f"{path / 'schema.json'} does not belong to {path / 'manifest.json'}: its "
                f"fingerprint is {schema.fingerprint or 'absent'}, expected "
                f"{manifest.schema_fingerprint}. Prepare the dataset again."
            )
        for split in SPLITS:
            if split not in manifest.splits:
                raise UserError(
                    f"{path / 'manifest.json'} has no split {split}. Prepare the dataset again."
                )
            stored = manifest.splits[split]
            rows = sum(part.rows for part in stored.parts)
            if stored.rows != rows:
                raise UserError(
                    f"{path / 'manifest.json'}: expected {stored.rows} rows in the {split} split, "
                    f"got {rows}. Prepare the dataset again."
                )
            for part in stored.parts:
                folder, _, name = part.file.partition("/")
                # Rows are stored uncompressed, so that there are no more than fit into the file.
                if (
                    folder != split
                    or not is_plain_name(name)
                    or not 0 <= part.rows * row_bytes(schema) <= part.bytes
                ):
                    raise UserError(
                        f"{path / 'manifest.json'} is damaged: {part.file!r} with {part.rows} rows "
                        f"in {part.bytes} bytes cannot be a part of {split}. Prepare the dataset "
                        "again."
                    )
                file = path / part.file
                size = file.stat().st_size if file.is_file() else None
                if size != part.bytes:
                    raise UserError(
                        f"{file} is damaged: expected {part.bytes} bytes, got "
                        f"{'no file' if size is None else size}. Prepare the dataset again."
                    )
            if not 0 <= stored.clicks <= rows:
                raise UserError(
                    f"{path / 'manifest.json'} is damaged: {stored.clicks} clicks in the {rows} "
                    f"rows of the {split} split cannot be. Prepare the dataset again."
                )
        return Dataset(path, schema, manifest)

    def rows(self, split: Split) -> int:
        """Return the number of rows of a split."""
        return self.manifest.splits[split].rows

    def batches(
        self,
        split: Split,
        mini_batch_size: int,
        *,
        schema: FeatureSchema | None = None,
        first_batch: int = 0,
        num_batches: int = 0,
    ) -> Generator[Batch, None, None]:
        """Read a split in stored order; the last batch may be short.

        One background thread reads and transforms blocks ahead; a batch is a view of a block. The
        thread ends with the generator: exhaust it or close it.

        Args:
            split: Which split.
            mini_batch_size: Rows a batch.
            schema: Transform with this schema instead of the DATASET's (it may limit ids).
            first_batch: Skip so many batches.
            num_batches: Stop after so many batches; 0: at the end of the split.

        Raises:
            UserError: A part is missing or damaged, or the schema is that of other tables.
            EnvironmentFaultError: The disk fails.
        """
        for ours, theirs in zip(self.schema.sparse, (schema or self.schema).sparse, strict=True):
            if not theirs.takes_ids_below(ours.num_embeddings):
                raise UserError(
                    f"{self.path} has {ours.num_embeddings} ids of {ours.name}, and the model a "
                    f"table of {theirs.num_embeddings} rows: they do not belong together."
                )
        first = first_batch * mini_batch_size
        last = self.rows(split)
        if num_batches:
            last = min(last, first + num_batches * mini_batch_size)
        blocks = self._blocks(split, mini_batch_size, schema or self.schema, first, last)
        with _in_background(blocks, BLOCKS_AHEAD) as ready:
            for block in ready:
                for start in range(0, len(block), mini_batch_size):
                    yield block.rows(start, start + mini_batch_size)

    def _blocks(
        self, split: Split, mini_batch_size: int, schema: FeatureSchema, first: int, last: int
    ) -> Generator[Batch, None, None]:
        """Transform rows first … last-1, a whole number of mini-batches at a time."""
        pending: list[Rows] = []
        count = 0
        for run in self.stored_rows(split, first, last):
            pending.append(run)
            count += len(run)
            whole = count - count % mini_batch_size
            if whole:
                rows = Rows.concatenate(pending)
                yield _make_batch(schema, rows[:whole])
                pending = [rows[whole:]]
                count -= whole
        if count:
            yield _make_batch(schema, Rows.concatenate(pending))

    def stored_rows(self, split: Split, first: int, last: int) -> Iterator[Rows]:
        """Read rows first … last-1 of a split as they are stored, a record batch at a time.

        Raises:
            UserError: A part is missing or damaged.
            EnvironmentFaultError: The disk fails.
        """
        position = 0
        for part in self.manifest.splits[split].parts:
            end = position + part.rows
            if end > first and position < last:
                for run in read_part(self.path, part, self.schema):
                    wanted = run[max(first - position, 0) : max(last - position, 0)]
                    if len(wanted):
                        yield wanted
                    position += len(run)
                    if position >= last:
                        return
            position = end

    def spread_rows(self, split: Split, count: int) -> Iterator[Rows]:
        """Read so many rows, evenly spread over a split, as they are stored and in their order.

        Raises:
            UserError: A part is missing or damaged.
            EnvironmentFaultError: The disk fails.
        """
        total = self.rows(split)
        position = 0
        for run in self.stored_rows(split, 0, total):
            # Row i is taken where i * count / total passes a whole number.
            numbers = np.arange(position, position + len(run) + 1) * count // total
            position += len(run)
            chosen = np.flatnonzero(np.diff(numbers))
            if len(chosen):
                yield run if len(chosen) == len(run) else run[chosen]


def in_blocks(runs: Iterable[Rows], rows: int) -> Iterator[Rows]:
    """Return the same rows in runs of a given length; the last may be shorter."""
    pending: list[Rows] = []
    count = 0
    for run in runs:
        pending.append(run)
        count += len(run)
        while count >= rows:
            joined = Rows.concatenate(pending)
            yield joined[:rows]
            pending = [joined[rows:]]
            count -= rows
    if count:
        yield Rows.concatenate(pending)


def _make_batch(schema: FeatureSchema, rows: Rows) -> Batch:
    return make_batch(schema, rows.dense, rows.sparse, rows.labels, rows.bags)


@contextmanager
def _in_background(items: Generator[Batch, None, None], ahead: int) -> Iterator[Iterator[Batch]]:
    """Advance an iterator in a thread, at most so many items ahead.

    What it raises is raised to the consumer. On leaving the context the thread is joined, whether
    or not everything was consumed.
    """
    ready: queue.Queue[Batch | BaseException | None] = queue.Queue(ahead)
    stopped = threading.Event()

    def work() -> None:
        try:
            for item in items:
                ready.put(item)
                if stopped.is_set():
                    return
            ready.put(None)
        except BaseException as error:
            ready.put(error)
        finally:
            items.close()

    def consume() -> Iterator[Batch]:
        while (item := ready.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item

    thread = threading.Thread(target=work, name="dlrm-dataset", daemon=True)
    thread.start()
    try:
        yield consume()
    finally:
        stopped.set()
        while thread.is_alive():
            # The thread may be waiting for room, once more after each item that is taken out.
            while not ready.empty():
                ready.get()
            thread.join(0.01)


def read_part(folder: Path, part: Part, schema: FeatureSchema) -> Iterator[Rows]:
    """Read a part of a DATASET, a record batch at a time, and check what is in it.

    Args:
        folder: The DATASET.
        part: As the manifest has it.
        schema: The DATASET's.

    Raises:
        UserError: The part is missing or damaged.
        EnvironmentFaultError: The disk fails.
    """
    path = folder / part.file
    limits = np.array([each.num_embeddings for each in schema.one_id_features], np.int64)
    expected = stored_columns(schema)
    rows = 0
    try:
        with open_arrow(path) as reader:
            if reader.schema != expected:
                raise _damaged(path, f"expected the columns {expected}, got {reader.schema}")
            for index in range(reader.num_record_batches):
                run = _rows_of(reader.get_batch(index))
                if len(run) and (
                    run.labels.max() > 1
                    or (run.sparse.max(axis=0, initial=-1) >= limits).any()
                    or run.sparse.min(initial=0) < -1
                    or (not schema.stores_floats and run.dense.min(initial=0) < 0)
                ):
                    raise _damaged(path, "expected labels 0 or 1 and ids of the vocabularies")
                if schema.soft_labels and not (run.labels >= 0).all():
                    raise _damaged(path, "expected labels in 0 … 1")
                if schema.stores_floats and not np.isfinite(run.dense).all():
                    raise _damaged(path, "expected finite dense features")
                for feature, bags in zip(schema.multi_hot_features, run.bags, strict=True):
                    if len(bags.ids) and not (
                        0 <= bags.ids.min() and bags.ids.max() < feature.num_embeddings
                    ):
                        raise _damaged(
                            path,
                            f"expected ids of {feature.name} in 0 … {feature.num_embeddings - 1}",
                        )
                rows += len(run)
                yield run
    except (pa.ArrowException, OSError) as error:
        raise _damaged(path, str(error)) from error
    if rows != part.rows:
        raise _damaged(path, f"expected {part.rows} rows, got {rows}")


def _damaged(path: Path, reason: str) -> UserError:
    return UserError(f"{path} is damaged: {reason}. Prepare the dataset again.")


def stored_columns(schema: FeatureSchema) -> pa.Schema:
    """Return the columns of a part; there is none for no features (Arrow divides by the length)."""
    columns = {"label": pa.float32() if schema.soft_labels else pa.uint8()}
    if schema.dense:
        kind = pa.float32() if schema.stores_floats else pa.int32()
        columns["dense"] = _list_of(kind, len(schema.dense))
    if schema.one_id_features:
        columns["sparse"] = _list_of(pa.int32(), len(schema.one_id_features))
    for feature in schema.multi_hot_features:
        columns[_MULTI_HOT + feature.name] = _list_of(pa.int32())
    return pa.schema([pa.field(name, kind, nullable=False) for name, kind in columns.items()])


_MULTI_HOT = "sparse."
"""The beginning of the name of a multi-hot feature's column."""


def _list_of(kind: pa.DataType, length: int = -1) -> pa.DataType:
    """Return the type of lists; -1: of any length each."""
    return pa.list_(pa.field("item", kind, nullable=False), length)


def _rows_of(batch: pa.RecordBatch) -> Rows:
    """Return the rows of a record batch of the columns of ``stored_columns``.

    Raises:
        pyarrow.ArrowInvalid: It is damaged.
    """
    batch.validate(full=True)
    if any(column.null_count for column in batch.columns):
        raise pa.ArrowInvalid("values are missing")
    nothing = np.empty((len(batch), 0), np.int32)
    lists = {"dense": nothing, "sparse": nothing}
    bags = []
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        if name in lists:
            values = to_numpy(column.flatten())
            lists[name] = values.reshape(len(batch), column.type.list_size)
        elif name.startswith(_MULTI_HOT):
            offsets = to_numpy(column.offsets)
            bags.append(Bags(to_numpy(column.flatten()), offsets - offsets[0]))
    return Rows(to_numpy(batch.columns[0]), lists["dense"], lists["sparse"], tuple(bags))


def block_rows(schema: FeatureSchema) -> int:
    """Return how many rows a record batch has."""
    return max(1, BLOCK_BYTES // row_bytes(schema))


def part_rows(schema: FeatureSchema) -> int:
    """Return how many rows a part has, about."""
    return max(1, PART_BYTES // row_bytes(schema))


def row_bytes(schema: FeatureSchema) -> int:
    """Return how many bytes a stored row takes; the ids of multi-hot features come on top."""
    return (4 if schema.soft_labels else 1) + 4 * (len(schema.dense) + len(schema.sparse))


@dataclass(frozen=True)
class WrittenPart:
    """A part as it was written."""

    part: Part
    clicks: int
    format_version: str = FORMAT_VERSION


def part_name(split: Split, number: int) -> str:
    """Return the path of a part within its DATASET."""
    return f"{split}/part-{number:05}.arrow"


def write_part(folder: Path, name: str, schema: FeatureSchema, runs: Iterable[Rows]) -> WrittenPart:
    """Write a part of a DATASET.

    Args:
        folder: The DATASET, in which the split's folder is there.
        name: From ``part_name``.
        schema: What a row consists of.
        runs: Each becomes a record batch; ``block_rows`` says how long one should be.
    """
    columns = stored_columns(schema)
    rows = clicks = 0
    with atomic_write(folder / name) as file:
        hashing = _HashingFile(file)
        with pa.ipc.new_file(pa.PythonFile(hashing, "w"), columns) as writer:
            for run in runs:
                writer.write_batch(record_batch(run, columns))
                rows += len(run)
                clicks += int(np.count_nonzero(run.clicked))
    return WrittenPart(Part(name, rows, hashing.bytes, hashing.sha256()), clicks)


class _HashingFile:
    """A file whose content is hashed while it is written."""

    closed = False

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._digest = hashlib.sha256()
        self.bytes = 0

    def write(self, content: Any) -> int:
        self._digest.update(content)
        written = self._file.write(content)
        self.bytes += written
        return written

    def tell(self) -> int:
        return self.bytes

    def flush(self) -> None:
        """What is written is flushed by whoever opened the file."""

    def sha256(self) -> str:
        return self._digest.hexdigest()


def record_batch(rows: Rows, columns: pa.Schema) -> pa.RecordBatch:
    """Return rows as they are stored, in the columns of ``stored_columns``."""
    arrays = [to_arrow(rows.labels)]
    lists = {"dense": rows.dense, "sparse": rows.sparse}
    bags = iter(rows.bags)
    for name, kind in list(zip(columns.names, columns.types, strict=True))[1:]:
        if name in lists:
            flat = to_arrow(np.ascontiguousarray(lists[name]).reshape(-1))
            arrays.append(pa.FixedSizeListArray.from_arrays(flat, type=kind))
        else:
            own = next(bags)
            offsets = to_arrow(own.offsets.astype(np.int32, copy=False))
            arrays.append(pa.ListArray.from_arrays(offsets, to_arrow(own.ids), type=kind))
    return pa.record_batch(arrays, schema=columns)


def stored_split(parts: Iterable[WrittenPart]) -> StoredSplit:
    """Describe a split by its parts, in order."""
    written = tuple(parts)
    return StoredSplit(
        sum(each.part.rows for each in written),
        sum(each.clicks for each in written),
        tuple(each.part for each in written),
    )


def publish(
    partial: Path, path: Path, schema: FeatureSchema, manifest: Manifest, *, overwrite: bool = False
) -> None:
    """Let a DATASET whose parts and vocabularies are written appear under its name.

    Hold the lock of ``path`` meanwhile (``files.locked``).

    Args:
        partial: The folder in which it was written, on the same file system.
        path: Where it appears.
        schema: Sealed.
        manifest: Names everything.
        overwrite: Replace a DATASET that is there.

    Raises:
        UserError: There is something at ``path`` already.
        EnvironmentFaultError: The disk is full or fails.
    """
    refuse_taken_dataset(path, overwrite=overwrite)
    replaced = _replaced(path)
    with environment_faults(f"write to {path.parent}"):
        write_schema(partial, schema)
        write_json(partial / "manifest.json", manifest)
        for folder in (*(partial / split for split in SPLITS), partial):
            flush_folder(folder)
        if path.exists():
            shutil.rmtree(replaced, ignore_errors=True)  # of a process that was killed
            os.replace(path, replaced)
        os.replace(partial, path)
        flush_folder(path.parent)
        shutil.rmtree(replaced, ignore_errors=True)


def _replaced(path: Path) -> Path:
    return path.with_name(f".{path.name}.replaced")


def remove_replaced(path: Path) -> None:
    """Remove what a DATASET has replaced, if the process that did it was killed right after."""
    if path.exists():
        with environment_faults(f"write to {path.parent}"):
            shutil.rmtree(_replaced(path), ignore_errors=True)


def refuse_taken_dataset(path: Path, *, overwrite: bool) -> None:
    """Refuse to write where something is already, but for an empty folder.

    Raises:
        UserError: There is something that is no DATASET, or a DATASET and overwrite is false.
    """
    if not path.exists() and not path.is_symlink():
        return
    if not path.is_dir() or path.is_symlink():
        raise UserError(f"{path} exists and is not a folder. Choose another DATASET.")
    if not any(path.iterdir()):
        return
    if not (path / "manifest.json").is_file():
        raise UserError(
            f"{path} is not empty and no DATASET, and it is not overwritten. Choose another "
            "DATASET, or empty the folder."
        )
    if not overwrite:
        raise UserError(
            f"{path} is a DATASET already. Choose another one, or start over with --overwrite."
        )


def write_dataset(
    path: Path,
    schema: FeatureSchema,
    rows: Mapping[Split, Iterable[Rows] | Split],
    *,
    generation: GenerateConfig | None = None,
    sources: tuple[Source, ...] = (),
    overwrite: bool = False,
) -> Dataset:
    """Make a DATASET of rows that are prepared already, such as made-up ones.

    Args:
        path: The folder to make.
        schema: What a row consists of.
        rows: Of each split, in runs of any length, each of which becomes a record batch; or the
            name of a split before it (train, validation, test) that has the same rows, whose files
            get a second name.
        generation: How the rows are made up; the manifest tells.
        sources: What they are made from, if anything; likewise.
        overwrite: Replace a DATASET that is there.

    Raises:
        UserError: There is something at ``path`` already.
        EnvironmentFaultError: The disk is full or read-only.
    """
    schema = schema.sealed()
    partial = path.with_name(f".{path.name}.partial")
    with locked(path, "dataset"), environment_faults(f"write to {path.parent}"):
        refuse_taken_dataset(path, overwrite=overwrite)
        shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed
        try:
            splits: dict[Split, StoredSplit] = {}
            for split in SPLITS:
                (partial / split).mkdir(parents=True)
                runs = rows.get(split, ())
                if isinstance(runs, str):
                    splits[split] = _same_rows(partial, splits[runs], split)
                else:
                    written = _write_parts(partial, split, schema, iter(runs))
                    splits[split] = stored_split(written)
            manifest = Manifest(splits, schema.fingerprint, sources, generation=generation)
            publish(partial, path, schema, manifest, overwrite=overwrite)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return Dataset.open(path)


def _write_parts(
    folder: Path, split: Split, schema: FeatureSchema, runs: Iterator[Rows]
) -> Iterator[WrittenPart]:
    for number in itertools.count():
        first = next(runs, None)
        if first is None:
            return
        limited = _up_to(part_rows(schema) * row_bytes(schema), first, runs)
        yield write_part(folder, part_name(split, number), schema, limited)


def _up_to(size: int, first: Rows, runs: Iterator[Rows]) -> Iterator[Rows]:
    """Return runs until they have so many bytes."""
    yield first
    taken = first.nbytes
    while taken < size and (run := next(runs, None)) is not None:
        yield run
        taken += run.nbytes


def _same_rows(folder: Path, stored: StoredSplit, split: Split) -> StoredSplit:
    """Give the files of a split that is written a second name, in another one."""
    parts = []
    for number, part in enumerate(stored.parts):
        parts.append(dataclasses.replace(part, file=part_name(split, number)))
        link_or_copy(folder / part.file, folder / parts[-1].file)
    return dataclasses.replace(stored, parts=tuple(parts))


def copy_description(
    source: Path, target: Path, schema: FeatureSchema, *, linked: bool = True
) -> None:
    """Put what predicting raw rows needs, schema and vocabularies, into a RUN or BUNDLE.

    Args:
        source: A DATASET, or a RUN.
        target: A RUN or BUNDLE, which exists.
        schema: The RUN's schema, which may limit ids further than the DATASET's.
        linked: Whether vocabularies are hard links where the file system can make them; else they
            are copies, which no change of the source's reaches.
    """
    put = link_or_copy if linked else copy_file
    with environment_faults(f"write to {target}"):
        names = [feature.vocabulary for feature in schema.sparse if feature.vocabulary]
        if names:
            (target / "vocabulary").mkdir(exist_ok=True)
        for name in names:
            put(source / "vocabulary" / name, target / "vocabulary" / name)
        write_schema(target, schema)
