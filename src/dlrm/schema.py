"""FeatureSchema: the contract that data, checkpoints and bundles share.

Any named dense and sparse features, label and split rule; only ``data/criteo.py`` knows that
Criteo has 13 and 26.
"""

from __future__ import annotations

import dataclasses
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import msgspec

from dlrm.errors import UserError
from dlrm.files import FORMAT_VERSION, is_plain_name, read_json, write_json

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")


@dataclass(frozen=True)
class DenseFeature:
    """A number of a row, stored before its transform."""

    name: str
    """The column's name."""
    transform: Literal["log1p", "none"] = "log1p"
    """Applied when a batch is made. log1p: log(float32(x) + 1) in float32, of integers that are not
    negative. none: nothing, and the number is stored as float32. All dense features of a schema
    have the same."""


@dataclass(frozen=True)
class SparseFeature:
    """A categorical value of a row, stored as a row number of its embedding table."""

    name: str
    """The column's name."""
    num_embeddings: int
    """Rows of its table; every id is below it."""
    vocabulary: str = ""
    """Its vocabulary's file name in ``vocabulary/``; empty when it is not known (data that another
    program prepared), and raw values cannot be encoded."""
    vocabulary_sha256: str = ""
    """SHA-256 of that file."""
    value_modulus: int = 0
    """Raw values were taken modulo this before they were numbered; 0: as they are."""
    id_modulus: int = 0
    """Ids are taken modulo this when a batch is made; 0: as they are."""
    other_id: int = -1
    """The id of values that have none of their own, the 'other' slot; -1: they are an empty bag."""
    hash_buckets: int = 0
    """Raw values are hashed into so many ids (``data.vocabulary.hashed``), without a vocabulary; 0:
    they are not hashed."""
    multi_hot: bool = False
    """A row has any number of ids, a bag whose vectors are summed; else it has one, or none that is
    known."""

    def takes_ids_below(self, limit: int) -> bool:
        """Tell whether all ids below a limit are rows of its table, once they are taken modulo."""
        return limit <= self.num_embeddings or 0 < self.id_modulus <= self.num_embeddings


@dataclass(frozen=True)
class FeatureSchema:
    """What a row consists of and how it was encoded."""

    label: str
    """The label's name; labels are 0 and 1, or with ``soft_labels`` anything between."""
    dense: tuple[DenseFeature, ...]
    sparse: tuple[SparseFeature, ...]
    source_format: str
    """The reader of raw rows: "criteo-kaggle"."""
    split_rule: str
    """How rows were split, in words a reader of the file understands."""
    fingerprint: str = ""
    """SHA-256 over the label, the features and their vocabularies; see ``sealed``. It stays that of
    the DATASET when a run limits ids further."""
    soft_labels: bool = False
    """Labels are probabilities: a loss takes them as they are, a metric whether they are above
    0.5."""
    format_version: str = FORMAT_VERSION

    @property
    def num_embeddings(self) -> tuple[int, ...]:
        """Rows of each embedding table."""
        return tuple(feature.num_embeddings for feature in self.sparse)

    @property
    def feature_names(self) -> tuple[str, ...]:
        """Names of the dense features, then of the sparse ones."""
        return tuple(feature.name for feature in self.dense) + tuple(
            feature.name for feature in self.sparse
        )

    @property
    def one_id_features(self) -> tuple[SparseFeature, ...]:
        """The sparse features that have one id a row."""
        return tuple(feature for feature in self.sparse if not feature.multi_hot)

    @property
    def multi_hot_features(self) -> tuple[SparseFeature, ...]:
        """The sparse features that have any number of ids a row."""
        return tuple(feature for feature in self.sparse if feature.multi_hot)

    @property
    def encodes_values(self) -> bool:
        """Whether raw values can be turned into ids: all have vocabularies or are hashed."""
        return all(feature.vocabulary or feature.hash_buckets for feature in self.sparse)

    @property
    def takes_raw_rows(self) -> bool:
        """Whether rows of one raw value a feature, dense ones whole numbers, can be encoded."""
        return self.encodes_values and not self.multi_hot_features and not self.stores_floats

    @property
    def stores_floats(self) -> bool:
        """Whether dense features are stored as float32, and not transformed."""
        return any(feature.transform == "none" for feature in self.dense)

    def sealed(self) -> FeatureSchema:
        """Return this schema with its fingerprint.

        Neither the wording of the split rule nor the format's version changes what a model takes.
        """
        # What an earlier format did not have yet counts only where it is used, so that the
        # fingerprints of its datasets stay what they are. Fields keep their order.
        sparse = []
        for feature in self.sparse:
            content = dataclasses.asdict(feature)
            for name, idle in (("other_id", -1), ("hash_buckets", 0), ("multi_hot", False)):
                if content[name] == idle:
                    del content[name]
            sparse.append(content)
        meaning: list[Any] = [self.label, self.dense, sparse, self.source_format]
        if self.soft_labels:
            meaning.append("soft labels")
        encoded = msgspec.json.encode(meaning)
        return dataclasses.replace(self, fingerprint=hashlib.sha256(encoded).hexdigest())

    def with_max_ind_range(self, max_ind_range: int) -> FeatureSchema:
        """Return the schema whose ids are taken modulo ``max_ind_range`` (0: unchanged)."""
        if max_ind_range == 0:
            return self
        sparse = tuple(
            dataclasses.replace(
                feature,
                num_embeddings=min(feature.num_embeddings, max_ind_range),
                id_modulus=max_ind_range,
            )
            for feature in self.sparse
        )
        return dataclasses.replace(self, sparse=sparse)


def write_schema(folder: Path, schema: FeatureSchema) -> None:
    """Write ``schema.json`` into a DATASET or RUN."""
    write_json(folder / "schema.json", schema)


def read_schema(folder: Path, what: str) -> FeatureSchema:
    """Read ``schema.json`` of a DATASET or RUN.

    Raises:
        UserError: It is missing, damaged, of another version, or describes no features.
    """
    schema = read_json(folder / "schema.json", FeatureSchema, what)
    if not schema.sparse and not schema.dense:
        raise UserError(f"{folder / 'schema.json'} names no features. Make the {what} again.")
    if len({feature.transform for feature in schema.dense}) > 1:
        raise UserError(
            f"{folder / 'schema.json'} is damaged: expected one transform of all dense features. "
            f"Make the {what} again."
        )
    for feature in schema.sparse:
        _refuse_impossible(feature, folder / "schema.json")
    return schema


def _refuse_impossible(feature: SparseFeature, path: Path) -> None:
    """Refuse what would lead out of the folder or of a table; the file may be a stranger's."""
    if feature.vocabulary and not is_plain_name(feature.vocabulary):
        raise UserError(
            f"{path} is damaged: {feature.name} has its vocabulary in {feature.vocabulary!r}, "
            "expected the name of a file in vocabulary/."
        )
    if not (
        0 <= feature.num_embeddings < _MOST_EMBEDDINGS
        and -1 <= feature.other_id
        and 0 <= min(feature.value_modulus, feature.id_modulus, feature.hash_buckets)
        and feature.takes_ids_below(max(feature.other_id + 1, feature.hash_buckets))
    ):
        raise UserError(
            f"{path} is damaged: {feature.name} has a table of {feature.num_embeddings} rows, "
            f"other_id {feature.other_id}, hash_buckets {feature.hash_buckets} and id_modulus "
            f"{feature.id_modulus}, which do not fit together."
        )


_MOST_EMBEDDINGS = 2**31
"""Ids are stored as int32."""
