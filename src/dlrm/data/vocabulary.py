"""Raw categorical values to ids, by what was fitted (``data/fitting.py``) and is kept on disk.

Ids are row numbers of an embedding table, in order of first appearance.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from dlrm.arrow import open_arrow
from dlrm.data.splits import mix
from dlrm.errors import UserError
from dlrm.files import atomic_write, sha256
from dlrm.schema import FeatureSchema, SparseFeature

_COLUMNS = pa.schema([("value", pa.uint32()), ("id", pa.int32()), ("count", pa.int64())])
_BATCH_VALUES = 1 << 20
"""A multiple of 16: Arrow cuts what it writes only to multiples of 64 bytes."""


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
        """Return ranges of ascending values as one."""
        return Vocabulary(
            np.concatenate([np.zeros(0, np.uint32), *(part.values for part in parts)]),
            np.concatenate([np.zeros(0, np.int32), *(part.ids for part in parts)]),
            np.concatenate([np.zeros(0, np.int64), *(part.counts for part in parts)]),
        )

    @staticmethod
    def read_parts(path: Path, *, mapped: bool = False) -> Iterator[Vocabulary]:
        """Read a vocabulary in ranges of ascending values, of 16 MB at most.

        Args:
            path: The file.
            mapped: They are a memory map of it (``open_arrow``).

        Raises:
            UserError: The file is missing or damaged.
        """
        try:
            with open_arrow(path, mapped=mapped) as reader:
                if reader.schema != _COLUMNS:
                    raise UserError(
                        f"{path} has the columns {reader.schema.names}, expected value, id and "
                        "count with the types of a vocabulary. Prepare the dataset or train the "
                        "run again."
                    )
                for number in range(reader.num_record_batches):
                    yield Vocabulary(*(map(pa.Array.to_numpy, reader.get_batch(number).columns)))
        except (pa.ArrowException, OSError) as error:
            raise UserError(
                f"{path} cannot be read: {error}. Prepare the dataset or train the run again."
            ) from error


class MappedVocabulary:
    """A vocabulary that stays in its file, of which processes share one copy in memory.

    Args:
        path: What ``write_vocabulary`` wrote.

    Attributes:
        parts: Ranges of ascending values.

    Raises:
        UserError: The file is missing or damaged.
    """

    def __init__(self, path: Path) -> None:
        self.parts = [part for part in Vocabulary.read_parts(path, mapped=True) if len(part)]
        self._first = np.array([part.values[0] for part in self.parts], np.uint32)

    def encode(self, values: npt.NDArray[np.uint32]) -> npt.NDArray[np.int32]:
        """Return the id of each value, (m,), and -1 for those never seen."""
        if len(self.parts) == 1:
            return self.parts[0].encode(values)
        ids = np.full(len(values), -1, np.int32)
        own = np.searchsorted(self._first, values, side="right") - 1
        for number, part in enumerate(self.parts):
            here = own == number
            ids[here] = part.encode(values[here])
        return ids

    @property
    def ids_range(self) -> tuple[int, int]:
        """The lowest and the highest id; (0, -1) where there is none."""
        if not self.parts:
            return 0, -1
        return (
            min(int(part.ids.min()) for part in self.parts),
            max(int(part.ids.max()) for part in self.parts),
        )


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


class Encoder:
    """Raw sparse values to ids, as the rows of a DATASET were encoded.

    Args:
        features: The sparse features.
        vocabularies: One for each of them; None for a feature whose values are hashed.
    """

    def __init__(
        self, features: Sequence[SparseFeature], vocabularies: Sequence[MappedVocabulary | None]
    ) -> None:
        self._features = tuple(features)
        self._vocabularies = tuple(vocabularies)

    @staticmethod
    def open(folder: Path, schema: FeatureSchema, *, verified: bool = False) -> Encoder:
        """Read the vocabularies that lie beside a schema.

        Args:
            folder: A DATASET, RUN or BUNDLE.
            schema: Its schema.
            verified: Their checksums were compared already.

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
        vocabularies: list[MappedVocabulary | None] = []
        for feature in schema.sparse:
            if feature.hash_buckets:
                vocabularies.append(None)
                continue
            path = folder / "vocabulary" / feature.vocabulary
            vocabulary = MappedVocabulary(path)
            vocabularies.append(vocabulary)
            lowest, highest = vocabulary.ids_range
            if lowest < 0 or not feature.takes_ids_below(highest + 1):
                raise UserError(
                    f"{path} is damaged: its ids are {lowest} … {highest}, and the table of "
                    f"{feature.name} has {feature.num_embeddings} rows. Prepare the dataset or "
                    "train the run again."
                )
            if not verified and (found := sha256(path)) != feature.vocabulary_sha256:
                raise UserError(
                    f"{path} does not belong to {folder / 'schema.json'}: its SHA-256 is {found}, "
                    f"expected {feature.vocabulary_sha256}. Prepare the dataset or train the run "
                    "again."
                )
        return Encoder(schema.sparse, vocabularies)

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
        for index, (feature, vocabulary) in enumerate(
            zip(self._features, self._vocabularies, strict=True)
        ):
            whole = None if vocabulary is None else Vocabulary.joined(vocabulary.parts)
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
        ids = np.empty(values.shape, np.int32)
        unknown = np.zeros(len(self._features), np.int64)
        for index, feature in enumerate(self._features):
            column = taken_modulo(values[:, index], feature.value_modulus)
            vocabulary = self._vocabularies[index]
            if vocabulary is None:
                ids[:, index] = hashed(column, feature.hash_buckets)
                continue
            encoded = vocabulary.encode(column)
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


def taken_modulo(values: npt.NDArray[np.uint32], modulus: int) -> npt.NDArray[np.uint32]:
    """Return values modulo a number; 0: as they are."""
    return values % np.uint32(modulus) if modulus else values
