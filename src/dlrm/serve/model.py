"""A loaded model that scores the rows of several requests at a time."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from dlrm.bundles import Bundle
from dlrm.data.batch import Batch, make_batch
from dlrm.model.score import Scorer
from dlrm.prediction import Predictor, load
from dlrm.runs import Run
from dlrm.serve.card import Card, read_card
from dlrm.serve.protocol import RefusedError
from dlrm.serve.rows import Reader, Rows

PLATFORM = "dlrm"
OUTPUTS = ("probabilities", "unknown_ids")


@dataclass(frozen=True, eq=False)
class Scores:
    """Of n rows.

    Attributes:
        probabilities: Of a click, (n,) float32.
        unknown_ids: How many sparse values of each row have no id of their own, (n,) int32.
    """

    probabilities: npt.NDArray[np.float32]
    unknown_ids: npt.NDArray[np.int32]


class ServedModel:
    """A model, and what clients are told of it.

    Args:
        predictor: The model.
        name: What clients call it.
        version: Another for another content.
        most_rows: Of a request.
        card: What people are told of it.

    Attributes:
        schema: Its features.
    """

    def __init__(
        self, predictor: Predictor, name: str, version: str, most_rows: int, card: Card
    ) -> None:
        self.name = name
        self.version = version
        self.card = card
        self.reader = Reader(predictor.schema, most_rows)
        self._encoder = predictor.encoder
        self._scorer = Scorer(predictor.model, predictor.config.loss, predictor.config.amp)
        self.schema = schema = predictor.schema
        self._other_ids = np.array([feature.other_id for feature in schema.sparse], np.int32)
        self._one_id = np.array([not feature.multi_hot for feature in schema.sparse])

    @staticmethod
    def load(path: Path, name: str, most_rows: int, *, verified: bool = False) -> ServedModel:
        """Load a BUNDLE or a RUN.

        Args:
            path: The folder.
            name: What clients call it.
            most_rows: Of a request.
            verified: Its checksums were compared already.

        Raises:
            UserError: It is missing or damaged.
            EnvironmentFaultError: Memory ran out.
        """
        predictor = load(path, verified=verified)
        version = _version(predictor.opened)
        card = read_card(predictor, name, version, most_rows)
        return ServedModel(predictor, name, version, most_rows, card)

    def refuse_other(self, name: str, version: str) -> None:
        """Refuse another name or version; an empty version is any.

        Raises:
            RefusedError: With status 404.
        """
        if name != self.name:
            raise RefusedError(404, f"there is no model {name[:100]!r}; there is {self.name!r}.")
        if version not in ("", self.version):
            raise RefusedError(
                404, f"there is no version {version[:100]!r} of {name}; there is {self.version!r}."
            )

    def metadata(self) -> dict[str, Any]:
        """Return what the protocol tells of a model."""
        return {
            "name": self.name,
            "versions": [self.version],
            "platform": PLATFORM,
            "inputs": self.reader.metadata(),
            "outputs": [
                {"name": "probabilities", "datatype": "FP32", "shape": [-1]},
                {"name": "unknown_ids", "datatype": "INT32", "shape": [-1]},
            ],
        }

    def score(self, requests: Sequence[Rows]) -> list[Scores]:
        """Score the rows of requests together; a row's score does not depend on the others."""
        batches: list[Batch] = []
        unknown: list[npt.NDArray[np.int32]] = []
        for rows in requests:
            if isinstance(rows, Batch):
                batches.append(rows)
                unknown.append(self._empty_bags(rows))
            else:
                assert self._encoder is not None
                ids, _ = self._encoder.encode_columns(rows.values, rows.columns, len(rows))
                batches.append(make_batch(self.schema, rows.dense, ids, None))
                unknown.append((ids == self._other_ids).sum(axis=1, dtype=np.int32))
        probabilities = self._scorer(concatenate(batches))
        if len(batches) == 1:
            return [Scores(probabilities, unknown[0])]
        ends = np.cumsum([len(batch) for batch in batches])[:-1]
        parts = np.split(probabilities, ends)
        return [Scores(*each) for each in zip(parts, unknown, strict=True)]

    def _empty_bags(self, batch: Batch) -> npt.NDArray[np.int32]:
        """Return how many bags of features with one id a row hold none, by row."""
        if batch.offsets is None:
            return np.zeros(len(batch), np.int32)
        lengths = np.diff(batch.offsets.numpy()).reshape(len(batch), -1)
        empty: npt.NDArray[np.int32] = ((lengths == 0) & self._one_id).sum(axis=1, dtype=np.int32)
        return empty

    def warm_up(self, most_rows: int) -> None:
        """Score made-up rows, so that the first request finds memory and threads as later ones do.

        Args:
            most_rows: Of a batch.
        """
        features, wide = len(self.schema.sparse), len(self.schema.dense)
        for rows in (1, most_rows, 1):
            dense = torch.zeros(rows, wide)
            offsets = torch.zeros(rows * features + 1, dtype=torch.int64)
            self.score([Batch(dense, torch.zeros(0, dtype=torch.int64), None, offsets)])
        if self._encoder is not None:
            self._encoder.encode(np.zeros((1, features), np.uint32))


def concatenate(batches: Sequence[Batch]) -> Batch:
    """Return one batch of the rows of several, without labels."""
    if len(batches) == 1:
        return batches[0]
    dense_features = torch.cat([batch.dense_features for batch in batches])
    sparse_features = [batch.sparse_features for batch in batches]
    if all(batch.offsets is None for batch in batches):
        return Batch(dense_features, torch.cat(sparse_features), None)
    offsets = [torch.zeros(1, dtype=torch.int64)]
    start = 0
    for batch in batches:
        ids = batch.sparse_features
        of_batch = torch.arange(ids.numel() + 1) if batch.offsets is None else batch.offsets
        offsets.append(of_batch[1:] + start)
        start += ids.numel()
    flat = torch.cat([ids.reshape(-1) for ids in sparse_features])
    return Batch(dense_features, flat, None, torch.cat(offsets))


def _version(opened: Run | Bundle) -> str:
    """Return what tells a model from others.

    A digest of all of a BUNDLE; of a RUN of its schema and its checkpoint's header.
    """
    if isinstance(opened, Bundle):
        return opened.info.sha256[:12]
    digest = hashlib.sha256((opened.path / "schema.json").read_bytes())
    with open(opened.checkpoint("best"), "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        digest.update(file.read(min(length, 1 << 24)))
    return digest.hexdigest()[:12]
