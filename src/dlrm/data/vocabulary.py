"""Raw categorical values to ids, by what was fitted (``data/fitting.py``) and is kept on disk.

Ids are row numbers of an embedding table, in order of first appearance.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
import torch.utils.dlpack
from torch import Tensor

from dlrm.arrow import open_arrow, to_arrow, to_numpy
from dlrm.data.splits import mix
from dlrm.errors import UserError
from dlrm.files import atomic_write, sha256
from dlrm.ops.library import library
from dlrm.schema import FeatureSchema, SparseFeature

_COLUMNS = pa.schema([("value", pa.uint32()), ("id", pa.int32()), ("count", pa.int64())])
_BATCH_VALUES = 1 << 20
"""A multiple of 16: Arrow cuts what it writes only to multiples of 64 bytes."""
_RANGE_VALUES = 8
"""Values in a range of an index, on average: a byte of index for two values."""
REMEDY = "Prepare the dataset or train the run again."
"""What to do about a damaged vocabulary of a DATASET or RUN."""


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """The n values of one sparse feature, searched in place: 8 bytes a value, no dictionary.

    Attributes:
        values: (n,) uint32, ascending.
        ids: (n,) int32, the id of each value: 0 … n-1 in some order.
        counts: (n,) int64, how often each value occurred.
    """

    values: npt.NDArray[np.uint32]
    ids: npt.NDArray[np.int32]
    counts: npt.NDArray[np.int64]

    def __len__(self) -> int:
        """Return the number of values."""
        return len(self.values)

    def encode(self, values: npt.NDArray[np.uint32]) -> npt.NDArray[np.int32]:
        """Return the id of each value, (m,), and -1 for those never seen."""
        if not len(self.values):
            return np.full(len(values), -1, np.int32)
        position = np.searchsorted(self.values, values)
        position[position == len(self.values)] = 0
        return np.where(self.values[position] == values, self.ids[position], np.int32(-1))

    @staticmethod
    def read(path: Path) -> Vocabulary:
        """Read what ``write_vocabulary`` wrote.

        Raises:
            UserError: The file is missing or damaged.
        """
        return Vocabulary.joined(list(Vocabulary.read_parts(path)))

    @staticmethod
    def joined(parts: Sequence[Vocabulary]) -> Vocabulary:
        """Return the vocabulary that was cut into these parts."""
        return Vocabulary(
            np.concatenate([np.zeros(0, np.uint32), *(part.values for part in parts)]),
            np.concatenate([np.zeros(0, np.int32), *(part.ids for part in parts)]),
            np.concatenate([np.zeros(0, np.int64), *(part.counts for part in parts)]),
        )

    @staticmethod
    def read_parts(
        path: Path, *, mapped: bool = False, remedy: str = REMEDY
    ) -> Iterator[Vocabulary]:
        """Read a vocabulary in ranges of ascending values, of 16 MB at most.

        Args:
            path: The file.
            mapped: Map it into memory instead: what is not looked at is not read, and processes
                share what is. The file must stay as it is meanwhile: if it is cut short, looking
                beyond its end kills the process.
            remedy: What to do if it is damaged, for messages.

        Raises:
            UserError: The file is missing or damaged.
        """
        try:
            with open_arrow(path, mapped=mapped) as reader:
                if reader.schema != _COLUMNS:
                    raise UserError(
                        f"{path} has the columns {reader.schema.names}, expected value, id and "
                        f"count with the types of a vocabulary. {remedy}"
                    )
                for number in range(reader.num_record_batches):
                    batch = reader.get_batch(number)
                    batch.validate()
                    yield Vocabulary(*(map(to_numpy, batch.columns)))
        except (pa.ArrowException, OSError) as error:
            raise UserError(f"{path} cannot be read: {error}. {remedy}") from error


def write_vocabulary(path: Path, parts: Iterable[Vocabulary]) -> str:
    """Write a vocabulary as an Arrow file and return its SHA-256.

    Args:
        path: The file.
        parts: The vocabulary in ranges of ascending values; how it was cut makes no difference.
    """
    with atomic_write(path) as file, pa.ipc.new_file(file, _COLUMNS) as writer:
        pending = _COLUMNS.empty_table()
        for part in parts:
            table = pa.table([part.values, part.ids, part.counts], schema=_COLUMNS)
            pending = pa.concat_tables([pending, table])
            while len(pending) >= _BATCH_VALUES:
                _write_batch(writer, pending.slice(0, _BATCH_VALUES))
                pending = pending.slice(_BATCH_VALUES)
        _write_batch(writer, pending)
    return sha256(path)


def _write_batch(writer: pa.RecordBatchFileWriter, table: pa.Table) -> None:
    if len(table):
        writer.write_batch(table.combine_chunks().to_batches()[0])


def hashed(values: npt.NDArray[np.uint32], buckets: int) -> npt.NDArray[np.int32]:
    """Hash raw values into ids below ``buckets``: the high half of splitmix64, scaled."""
    high = mix(values.astype(np.uint64)) >> np.uint64(32)
    return (high * np.uint64(buckets) >> np.uint64(32)).astype(np.int32)


class _Table:
    """The values of one feature, where they lie, and what finds them.

    Args:
        parts: The vocabulary in ranges of ascending values.
    """

    def __init__(self, parts: Iterable[Vocabulary]) -> None:
        self.parts = tuple(part for part in parts if len(part))
        self.firsts = np.array([part.values[0] for part in self.parts], np.uint32)
        if library().loaded:
            self.values = [_tensor(part.values) for part in self.parts]
            self.ids = [_tensor(part.ids) for part in self.parts]
            self.starts = [_index(values) for values in self.values]

    def encode(self, values: npt.NDArray[np.uint32]) -> npt.NDArray[np.int32]:
        """Return the id of each value, (m,), and -1 for those never seen."""
        ids = np.full(len(values), -1, np.int32)
        part_of = np.searchsorted(self.firsts, values, side="right") - 1
        for number, part in enumerate(self.parts):
            chosen = part_of == number
            ids[chosen] = part.encode(values[chosen])
        return ids


def _tensor(array: npt.NDArray[Any]) -> Tensor:
    """Return an array as a tensor without a copy; PyTorch warns of one that cannot be written."""
    return torch.utils.dlpack.from_dlpack(to_arrow(array))


def _index(values: Tensor) -> Tensor:
    """Return how many values lie before each of equal ranges (native/vocabulary.cpp)."""
    starts = torch.empty(len(values) // _RANGE_VALUES + 2, dtype=torch.uint32)
    torch.ops.dlrm.index_values(values, starts)
    return starts


class Encoder:
    """Raw sparse values to ids, as the rows of a DATASET were encoded.

    Threads can share it; an encoding takes one, and no lock of Python's while it searches.

    Args:
        features: The sparse features.
        tables: One for each of them; None for a feature whose values are hashed.
    """

    def __init__(self, features: Sequence[SparseFeature], tables: Sequence[_Table | None]) -> None:
        self.features = tuple(features)
        self._tables = tuple(tables)
        if library().loaded:
            known = [table for table in tables if table is not None]
            rules, parts = [], 0
            for feature, table in zip(features, tables, strict=True):
                first, parts = parts, parts + (len(table.parts) if table else 0)
                modulus, buckets = feature.value_modulus, feature.hash_buckets
                rules.append([first, parts, feature.other_id, modulus, buckets])
            bounds = [
                [int(part.values[0]), int(part.values[-1])]
                for table in known
                for part in table.parts
            ]
            self._native = (
                torch.tensor(rules, dtype=torch.int64).reshape(-1, 5),
                [values for table in known for values in table.values],
                [ids for table in known for ids in table.ids],
                [starts for table in known for starts in table.starts],
                torch.tensor(bounds, dtype=torch.int64).reshape(-1, 2),
            )

    @staticmethod
    def open(
        folder: Path, schema: FeatureSchema, *, verified: bool = False, remedy: str = REMEDY
    ) -> Encoder:
        """Map the vocabularies that lie beside a schema, which must stay as they are from then on.

        Args:
            folder: A DATASET, RUN or BUNDLE.
            schema: Its schema.
            verified: Their checksums were compared already.
            remedy: What to do about a damaged one, for messages.

        Raises:
            UserError: A feature has no vocabulary, or the vocabularies are missing, damaged or not
                those that the schema was made with.
        """
        without = [
            feature.name
            for feature in schema.sparse
            if not feature.vocabulary and not feature.hash_buckets
        ]
        if without:
            raise UserError(
                f"{folder} cannot encode raw rows: it has no vocabulary for {', '.join(without)}, "
                "because its rows were made up or prepared by another program. Prepare and train "
                "from raw rows to predict raw rows."
            )
        tables: list[_Table | None] = []
        for feature in schema.sparse:
            if feature.hash_buckets:
                tables.append(None)
                continue
            path = folder / "vocabulary" / feature.vocabulary
            parts = tuple(Vocabulary.read_parts(path, mapped=True, remedy=remedy))
            _refuse_damaged(path, parts, feature, remedy)
            if not verified and (found := sha256(path)) != feature.vocabulary_sha256:
                raise UserError(
                    f"{path} does not belong to {folder / 'schema.json'}: its SHA-256 is {found}, "
                    f"expected {feature.vocabulary_sha256}. {remedy}"
                )
            tables.append(_Table(parts))
        return Encoder(schema.sparse, tables)

    def decode(
        self, ids: npt.NDArray[np.int32]
    ) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.bool_]]:
        """Return raw values that are encoded as these ids (``values_of_ids``).

        Args:
            ids: (n, F), as they are stored.

        Returns:
            Values, (n, F), and whether a row has one for each feature, (n,).
        """
        values = np.empty(ids.shape, np.uint32)
        known = np.ones(len(ids), np.bool_)
        for index, (feature, table) in enumerate(zip(self.features, self._tables, strict=True)):
            whole = None if table is None else Vocabulary.joined(table.parts)
            values[:, index], found = values_of_ids(feature, whole, ids[:, index])
            known &= found
        return values, known

    def encode(
        self, values: npt.NDArray[np.uint32]
    ) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]:
        """Encode raw values.

        Args:
            values: (n, F).

        Returns:
            Their ids, (n, F), and for each feature, (F,), how many values have none of their own:
            they get the 'other' slot, or -1 where the feature has no such slot.
        """
        rows, features = values.shape
        columns = np.empty((features, 2), np.int64)
        columns[:, 0] = np.arange(features)
        columns[:, 1] = features
        return self.encode_columns(values.reshape(-1), columns, rows)

    def encode_columns(
        self, values: npt.NDArray[np.uint32], columns: npt.NDArray[np.int64], rows: int
    ) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]:
        """Encode values that lie in any order, of which some are meant for every row.

        Args:
            values: Flat, missing values 0.
            columns: (F, 2), of each feature the place of its first row's value, and how many places
                further that of the next row is; 0: it is the same.
            rows: n.

        Returns:
            As ``encode`` does.
        """
        if not library().loaded:
            places = columns[:, 0] + np.arange(rows)[:, None] * columns[:, 1]
            return self._encode_plainly(values[places])
        ids = np.empty((rows, len(self.features)), np.int32)
        unknown = np.zeros(len(self.features), np.int64)
        torch.ops.dlrm.encode_values(
            torch.from_numpy(np.require(values, np.uint32, ["C", "W"])),
            torch.from_numpy(columns),
            *self._native,
            torch.from_numpy(ids),
            torch.from_numpy(unknown),
        )
        return ids, unknown

    def _encode_plainly(
        self, values: npt.NDArray[np.uint32]
    ) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]:
        ids = np.empty(values.shape, np.int32)
        unknown = np.zeros(len(self.features), np.int64)
        for index, (feature, table) in enumerate(zip(self.features, self._tables, strict=True)):
            column = taken_modulo(values[:, index], feature.value_modulus)
            if table is None:
                ids[:, index] = hashed(column, feature.hash_buckets)
                continue
            encoded = table.encode(column)
            is_unknown = encoded < 0
            unknown[index] = is_unknown.sum()
            encoded[is_unknown] = feature.other_id
            ids[:, index] = encoded
        return ids, unknown


def values_of_ids(
    feature: SparseFeature, vocabulary: Vocabulary | None, ids: npt.NDArray[np.int32]
) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.bool_]]:
    """Return a raw value for each id of a feature: what ``Encoder.encode`` turns into it.

    The id of values that the vocabulary lacks, -1 or the 'other' slot, gets the smallest of these.

    Args:
        feature: Of the ids.
        vocabulary: Its vocabulary; None: values are hashed. Of these the first millions are tried.
        ids: (n,), as they are stored.

    Returns:
        (n,) each: values, and whether there is one; else it is 0.
    """
    limit = feature.value_modulus or 1 << 32
    if vocabulary is None:
        tried = np.arange(min(limit, _HASHED_TRIED), dtype=np.uint32)
        found = hashed(tried, feature.hash_buckets)
    else:
        others = np.setdiff1d(
            np.arange(min(limit, len(vocabulary) + 1), dtype=np.uint32),
            vocabulary.values[: len(vocabulary) + 1],
            assume_unique=True,
        )[:1]
        tried = np.concatenate([vocabulary.values, others])
        found = np.concatenate([vocabulary.ids, np.full(len(others), feature.other_id, np.int32)])
    place = np.full(max(feature.num_embeddings, int(found.max(initial=0)) + 1) + 1, -1)
    place[found] = np.arange(len(found))  # -1 is the last
    known = ids < len(place) - 1
    places = np.where(known, place[np.where(known, ids, 0)], -1)
    return np.where(places >= 0, tried[places], 0).astype(np.uint32), places >= 0


_HASHED_TRIED = 1 << 22


def _refuse_damaged(
    path: Path, parts: Sequence[Vocabulary], feature: SparseFeature, remedy: str
) -> None:
    """Refuse ids that lead out of a table, and values that cannot be searched."""
    lowest = min((int(part.ids.min()) for part in parts if len(part)), default=0)
    highest = max((int(part.ids.max()) for part in parts if len(part)), default=-1)
    if lowest < 0 or not feature.takes_ids_below(highest + 1):
        raise UserError(
            f"{path} is damaged: its ids are {lowest} … {highest}, and the table of "
            f"{feature.name} has {feature.num_embeddings} rows. {remedy}"
        )
    last = -1
    for part in parts:
        rises = bool((part.values[1:] > part.values[:-1]).all())
        if len(part) and not (rises and part.values[0] > last):
            raise UserError(f"{path} is damaged: its values do not ascend. {remedy}")
        last = int(part.values[-1]) if len(part) else last


def taken_modulo(values: npt.NDArray[np.uint32], modulus: int) -> npt.NDArray[np.uint32]:
    """Return values modulo a number; 0: as they are."""
    return values % np.uint32(modulus) if modulus else values
