"""Raw categorical values to ids: fit on the rows, keep what was fitted, encode with it.

Ids are row numbers of an embedding table, in order of first appearance.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from dlrm.errors import UserError
from dlrm.files import atomic_write, environment_faults, sha256
from dlrm.schema import FeatureSchema

_COLUMNS = pa.schema([("value", pa.uint32()), ("id", pa.int32()), ("count", pa.int64())])


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

    def write(self, path: Path) -> str:
        """Write the vocabulary as an Arrow file and return its SHA-256."""
        table = pa.table([self.values, self.ids, self.counts], schema=_COLUMNS)
        with atomic_write(path) as file, pa.ipc.new_file(file, _COLUMNS) as writer:
            writer.write_table(table)
        return sha256(path)

    @staticmethod
    def read(path: Path) -> Vocabulary:
        """Read what ``write`` wrote.

        Raises:
            UserError: The file is missing or damaged.
        """
        try:
            with environment_faults(f"read {path}"), pa.OSFile(str(path)) as file:
                table = pa.ipc.open_file(file).read_all()
        except (pa.ArrowException, OSError) as error:
            raise UserError(
                f"{path} cannot be read: {error}. Prepare the dataset or train the run again."
            ) from error
        if table.schema != _COLUMNS:
            raise UserError(
                f"{path} has the columns {table.schema.names}, expected value, id and count with "
                "the types of a vocabulary. Prepare the dataset or train the run again."
            )
        return Vocabulary(*(column.combine_chunks().to_numpy() for column in table.columns))


def fit(
    values: Sequence[npt.NDArray[np.uint32]], *, value_modulus: int
) -> tuple[Vocabulary, npt.NDArray[np.int32]]:
    """Number one feature's values in order of first appearance.

    Args:
        values: All of them, in order, in blocks of any length.
        value_modulus: Take each value modulo this first; 0: as it is.

    Returns:
        The vocabulary, and the id of every value.
    """
    chunks = [pa.array(_modulo(block, value_modulus)) for block in values]
    encoded = pa.chunked_array(chunks, pa.uint32()).combine_chunks().dictionary_encode()
    ids: npt.NDArray[np.int32] = encoded.indices.to_numpy()
    distinct = encoded.dictionary.to_numpy()
    order = np.argsort(distinct)
    counts = np.bincount(ids, minlength=len(distinct))
    vocabulary = Vocabulary(
        distinct[order], order.astype(np.int32), counts[order].astype(np.int64, copy=False)
    )
    return vocabulary, ids


class Encoder:
    """Raw sparse values to ids, with the vocabularies of a DATASET or RUN.

    Args:
        vocabularies: One for each sparse feature.
        value_moduli: Values are taken modulo these first; 0: as they are.
    """

    def __init__(self, vocabularies: Sequence[Vocabulary], value_moduli: Sequence[int]) -> None:
        self._vocabularies = tuple(vocabularies)
        self._value_moduli = tuple(value_moduli)

    @staticmethod
    def open(folder: Path, schema: FeatureSchema) -> Encoder:
        """Read the vocabularies that lie beside a schema.

        Args:
            folder: A DATASET or RUN.
            schema: Its schema.

        Raises:
            UserError: A feature has no vocabulary, or the vocabularies are missing, damaged or not
                those that the schema was made with.
        """
        without = [feature.name for feature in schema.sparse if not feature.vocabulary]
        if without:
            raise UserError(
                f"{folder} cannot encode raw rows: it has no vocabulary for {', '.join(without)}, "
                "because its rows were prepared by another program. Prepare and train from raw "
                "rows to predict raw rows."
            )
        vocabularies = []
        for feature in schema.sparse:
            path = folder / "vocabulary" / feature.vocabulary
            vocabularies.append(Vocabulary.read(path))
            if (found := sha256(path)) != feature.vocabulary_sha256:
                raise UserError(
                    f"{path} does not belong to {folder / 'schema.json'}: its SHA-256 is {found}, "
                    f"expected {feature.vocabulary_sha256}. Prepare the dataset or train the run "
                    "again."
                )
        return Encoder(vocabularies, [feature.value_modulus for feature in schema.sparse])

    def encode(self, values: npt.NDArray[np.uint32]) -> npt.NDArray[np.int32]:
        """Return the ids, (n, F), of raw values, (n, F); -1 for a value never seen."""
        ids = np.empty(values.shape, np.int32)
        features = zip(self._vocabularies, self._value_moduli, strict=True)
        for index, (vocabulary, modulus) in enumerate(features):
            ids[:, index] = vocabulary.encode(_modulo(values[:, index], modulus))
        return ids


def _modulo(values: npt.NDArray[np.uint32], modulus: int) -> npt.NDArray[np.uint32]:
    return values % np.uint32(modulus) if modulus else values
