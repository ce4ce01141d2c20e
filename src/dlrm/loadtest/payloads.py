"""Requests as clients send them, made before anything is measured.

A request asks for one user and N candidates: the features of the user come as one row, those of
the candidates as N. Which features are the user's no schema tells; the first ones of either kind
are taken.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from dlrm.data.batch import Batch
from dlrm.data.dataset import Dataset, Rows
from dlrm.data.vocabulary import Vocabulary, values_of_ids
from dlrm.errors import UserError
from dlrm.loadtest.client import Payloads
from dlrm.schema import DenseFeature, FeatureSchema, SparseFeature
from dlrm.serve.messages import MESSAGES

SAMPLE_SIZES = (100, 200, 300, 400, 500, 600, 700)
SAMPLE_SHARES = (0.10, 0.60, 0.10, 0.05, 0.05, 0.05, 0.05)
"""User-item pairs of a sample of MLPerf inference's dlrm and dlrm-v2, and how often it has so many:
the 20 quantiles of tools/dist_quantile.txt in mlcommons/inference. The mean is 270."""
_MEAN_DENSE = 20
_TEXT = 8
"""Hexadecimal digits of a raw value."""

_CONTENTS = {"INT32": "int_contents", "INT64": "int64_contents", "FP32": "fp32_contents"}
"""Where gRPC has elements that are not raw."""

Encoding = Literal["binary", "json"]


@dataclass(frozen=True, eq=False)
class PayloadRows:
    """n rows as they are in logs, of which neither labels nor the place in a file are known.

    Attributes:
        dense: (n, number of dense features) int32.
        values: (n, F) uint32; 0: missing.
    """

    dense: npt.NDArray[np.int32]
    values: npt.NDArray[np.uint32]

    def __len__(self) -> int:
        """Return n."""
        return len(self.dense)

    def __getitem__(self, rows: slice) -> PayloadRows:
        """Return some of the rows."""
        return PayloadRows(self.dense[rows], self.values[rows])


def sample_sizes(count: int, generator: np.random.Generator) -> npt.NDArray[np.int64]:
    """Draw how many pairs so many samples have."""
    return generator.choice(np.array(SAMPLE_SIZES), count, p=SAMPLE_SHARES)


def stored_rows(
    data: Dataset, folder: Path, count: int, generator: np.random.Generator
) -> PayloadRows:
    """Return rows of a DATASET's test split in any order, as before preparation, or encoded alike.

    Args:
        data: The DATASET.
        folder: With the vocabularies that its ids are of.
        count: How many; of fewer rows some come several times.
        generator: Draws them.

    Raises:
        UserError: The DATASET or a vocabulary is damaged.
    """
    if not data.rows("test"):
        raise UserError(
            f"{data.path} has no test rows to ask for. Leave --dataset away, and rows are made up "
            "of the values in the model's vocabularies."
        )
    rows = Rows.concatenate(list(data.spread_rows("test", min(count, data.rows("test")))))
    rows = rows[generator.permutation(np.arange(count) % len(rows))]
    values = np.empty((count, len(data.schema.sparse)), np.uint32)
    for column, feature in enumerate(data.schema.sparse):
        ids = rows.sparse[:, column]
        vocabulary = None
        if not feature.hash_buckets:
            vocabulary = Vocabulary.read(folder / "vocabulary" / feature.vocabulary)
        values[:, column], _ = values_of_ids(feature, vocabulary, ids)
    return PayloadRows(rows.dense.astype(np.int32), values)


def made_up_rows(
    schema: FeatureSchema, folder: Path, count: int, generator: np.random.Generator
) -> PayloadRows:
    """Make up rows whose values are as frequent as the vocabularies tell, each independently.

    Args:
        schema: Of the features.
        folder: With the vocabularies.
        count: How many rows.
        generator: Draws them.

    Raises:
        UserError: A vocabulary is missing or damaged.
    """
    values = np.empty((count, len(schema.sparse)), np.uint32)
    for column, feature in enumerate(schema.sparse):
        values[:, column] = _drawn_values(feature, folder, count, generator)
    dense = np.floor(generator.exponential(_MEAN_DENSE, (count, len(schema.dense))))
    return PayloadRows(dense.astype(np.int32), values)


def _drawn_values(
    feature: SparseFeature, folder: Path, count: int, generator: np.random.Generator
) -> npt.NDArray[np.uint32]:
    if feature.hash_buckets:
        # Frequent ones first, as far as hashing lets anybody tell.
        drawn = np.floor(float(feature.hash_buckets) ** generator.random(count))
        return drawn.astype(np.uint32)
    vocabulary = Vocabulary.read(folder / "vocabulary" / feature.vocabulary)
    if not len(vocabulary):
        return np.zeros(count, np.uint32)
    ends = np.cumsum(vocabulary.counts)
    return vocabulary.values[np.searchsorted(ends, generator.integers(0, ends[-1], count), "right")]


@dataclass(frozen=True, eq=False)
class Tensor:
    """An input of a request.

    Attributes:
        name: Of the feature, or of all of a kind.
        datatype: The protocol's.
        elements: (rows, columns); of BYTES uint32, which are sent as hexadecimal digits.
    """

    name: str
    datatype: str
    elements: npt.NDArray[Any]

    def binary(self) -> bytes:
        """Return the elements as the protocol's bytes."""
        if self.datatype != "BYTES":
            return self.elements.tobytes()
        values = self.elements.reshape(-1)
        texts = np.empty((len(values), 4 + _TEXT), np.uint8)
        texts[:, :4] = np.frombuffer(_TEXT.to_bytes(4, "little"), np.uint8)
        texts[:, 4:] = np.frombuffer(_hexadecimal(values), np.uint8).reshape(-1, _TEXT)
        missing = values == 0
        if not missing.any():
            return texts.tobytes()
        texts[missing, 0] = 0  # the length, and of the text nothing
        kept = np.ones(texts.shape, np.bool_)
        kept[missing, 4:] = False
        return texts[kept].tobytes()

    def texts(self) -> list[Any]:
        """Return the elements as JSON has them, flat; null is missing."""
        if self.datatype != "BYTES":
            return list(self.elements.reshape(-1).tolist())
        values = self.elements.reshape(-1)
        digits = _hexadecimal(values).decode()
        texts = [digits[start : start + _TEXT] for start in range(0, len(digits), _TEXT)]
        return [text if value else None for text, value in zip(texts, values, strict=True)]


def _hexadecimal(values: npt.NDArray[np.uint32]) -> bytes:
    return values.astype(">u4").tobytes().hex().encode()


def tensors(schema: FeatureSchema, rows: PayloadRows, user_share: float) -> list[Tensor]:
    """Return the inputs of a request.

    Args:
        schema: Names the features.
        rows: The candidates; the user's features are those of the first.
        user_share: Which share of dense and of sparse features is the user's. 0, or of one row:
            none, and all features of a kind come as one matrix.
    """
    if user_share == 0 or len(rows) == 1:
        return [Tensor("dense", "INT32", rows.dense), Tensor("sparse", "BYTES", rows.values)]
    kinds: list[tuple[Sequence[DenseFeature | SparseFeature], str, npt.NDArray[Any]]] = [
        (schema.dense, "INT32", rows.dense),
        (schema.sparse, "BYTES", rows.values),
    ]
    found = []
    for features, datatype, columns in kinds:
        of_user = round(user_share * len(features))
        for index, feature in enumerate(features):
            elements = np.ascontiguousarray(columns[: 1 if index < of_user else None, index, None])
            found.append(Tensor(feature.name, datatype, elements))
    return found


def with_one_user(rows: PayloadRows, user_share: float) -> PayloadRows:
    """Return the rows that a request of ``tensors`` asks for, each with the user's features."""
    dense, values = rows.dense.copy(), rows.values.copy()
    for columns in (dense, values):
        of_user = round(user_share * columns.shape[1])
        columns[:, :of_user] = columns[0, :of_user]
    return PayloadRows(dense, values)


def prepared_tensors(batch: Batch) -> list[Tensor]:
    """Return the inputs of a request for rows that are prepared already."""
    found = [
        Tensor("dense_features", "FP32", batch.dense_features.numpy()),
        Tensor("sparse_features", "INT64", batch.sparse_features.numpy().astype(np.int64)),
    ]
    if batch.offsets is not None:
        found.append(Tensor("offsets", "INT64", batch.offsets.numpy().astype(np.int64)))
    return found


def http_request(inputs: Sequence[Tensor], model: str, host: str, encoding: Encoding) -> bytes:
    """Return an infer request over HTTP with its headers; the answer is to be encoded alike."""
    described = []
    tail = []
    for tensor in inputs:
        about: dict[str, Any] = {
            "name": tensor.name,
            "datatype": tensor.datatype,
            "shape": list(tensor.elements.shape),
        }
        if encoding == "binary":
            tail.append(tensor.binary())
            about["parameters"] = {"binary_data_size": len(tail[-1])}
        else:
            about["data"] = tensor.texts()
        described.append(about)
    binary = encoding == "binary"
    output = {"name": "probabilities", "parameters": {"binary_data": binary}}
    header = json.dumps({"inputs": described, "outputs": [output]}, separators=(",", ":")).encode()
    body = b"".join([header, *tail])
    lines = [
        f"POST /v2/models/{model}/infer HTTP/1.1",
        f"Host: {host}",
        f"Content-Type: application/{'octet-stream' if binary else 'json'}",
        f"Content-Length: {len(body)}",
        *([f"Inference-Header-Content-Length: {len(header)}"] if binary else []),
    ]
    return "\r\n".join([*lines, "", ""]).encode() + body


def grpc_request(inputs: Sequence[Tensor], model: str, encoding: Encoding) -> bytes:
    """Return a ModelInferRequest; "json" stands for its typed contents."""
    request = MESSAGES["ModelInferRequest"](model_name=model)
    request.outputs.add(name="probabilities")
    for tensor in inputs:
        added = request.inputs.add(
            name=tensor.name, datatype=tensor.datatype, shape=tensor.elements.shape
        )
        if encoding == "binary":
            request.raw_input_contents.append(tensor.binary())
        elif tensor.datatype == "BYTES":
            texts = [(text or "").encode() for text in tensor.texts()]
            added.contents.bytes_contents.extend(texts)
        else:
            contents = getattr(added.contents, _CONTENTS[tensor.datatype])
            contents.extend(tensor.texts())
    return bytes(request.SerializeToString())


def write_payloads(path: Path, requests: Iterator[bytes], rows: npt.NDArray[np.int64]) -> Payloads:
    """Write requests into a file, which client processes map."""
    ends = []
    with open(path, "wb") as file:
        for request in requests:
            file.write(request)
            ends.append(file.tell())
    return Payloads(path, np.array(ends), rows)
