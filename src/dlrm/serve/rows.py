"""Tensors of a request to rows of features, raw or prepared, and how a client learns to send them.

A dense feature is a number before its transform, a sparse one its raw value: 8 hexadecimal digits,
or that number. A tensor of one row beside others of n rows is meant for each of them: what is told
of a user needs to be sent, and encoded, only once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from dlrm.data.batch import Batch, check_batch
from dlrm.errors import UserError
from dlrm.ops.library import library
from dlrm.schema import FeatureSchema
from dlrm.serve.protocol import RefusedError, Tensor, wrong

DENSE, SPARSE = "dense", "sparse"
"""Inputs that hold all raw features of their kind, in the schema's order."""
PREPARED = ("dense_features", "sparse_features", "offsets")
"""Inputs of rows that are prepared already."""


@dataclass(frozen=True, eq=False)
class SentRows:
    """n raw rows as a request has them.

    Attributes:
        dense: (n, number of dense features) int32, missing and negative values 0.
        values: Flat uint32, the sparse values, missing ones 0.
        columns: (F, 2), where among them those of each feature are: ``Encoder.encode_columns``.
    """

    dense: npt.NDArray[np.int32]
    values: npt.NDArray[np.uint32]
    columns: npt.NDArray[np.int64]

    def __len__(self) -> int:
        """Return n."""
        return len(self.dense)


Rows = SentRows | Batch
"""Raw rows, or prepared ones."""


class Reader:
    """Makes rows of a request's inputs.

    Args:
        schema: Names the features.
        most_rows: Of a request.
    """

    def __init__(self, schema: FeatureSchema, most_rows: int) -> None:
        self._schema = schema
        self._most_rows = most_rows
        self._dense = {feature.name: index for index, feature in enumerate(schema.dense)}
        self._sparse = {feature.name: index for index, feature in enumerate(schema.sparse)}
        self._takes_raw = schema.takes_raw_rows
        names = self._dense.keys() | self._sparse.keys()
        self._reserved = {DENSE, SPARSE, *PREPARED} - names

    def metadata(self) -> list[dict[str, Any]]:
        """Return the inputs as the protocol describes them; -1 stands for any number."""
        features, wide = len(self._sparse), len(self._dense)
        described = []
        if self._takes_raw:
            described += [(name, "INT32", [-1, 1]) for name in self._dense]
            described += [(name, "BYTES", [-1, 1]) for name in self._sparse]
            described += [(DENSE, "INT32", [-1, wide]), (SPARSE, "BYTES", [-1, features])]
        described += [("dense_features", "FP32", [-1, wide]), ("sparse_features", "INT64", [-1])]
        described += [("offsets", "INT64", [-1])]
        return [dict(zip(("name", "datatype", "shape"), each, strict=True)) for each in described]

    def read(self, inputs: Mapping[str, Tensor]) -> Rows:
        """Make rows of inputs.

        Raises:
            RefusedError: Inputs are missing, unknown or do not fit together, or hold values that
                no feature has.
        """
        if inputs.keys() & self._reserved & set(PREPARED):
            return self._prepared(inputs)
        return self._raw(inputs)

    def _raw(self, inputs: Mapping[str, Tensor]) -> SentRows:
        if not self._takes_raw:
            raise wrong(
                "the model takes prepared rows alone (inputs dense_features, sparse_features, "
                "offsets), because the values behind its ids are not known or are lists; got "
                f"{_names(inputs)}."
            )
        self._refuse_names(inputs)
        rows = self._row_count(inputs)
        if DENSE in inputs and DENSE in self._reserved:
            counts = _counts([inputs[DENSE]]).reshape(-1, len(self._dense))
            dense = np.ascontiguousarray(np.broadcast_to(counts, (rows, len(self._dense))))
        else:
            tensors = [inputs[name] for name in self._dense]
            dense = _matrix(_counts(tensors), [each.elements for each in tensors], rows)
        columns = np.empty((len(self._sparse), 2), np.int64)
        if SPARSE in inputs and SPARSE in self._reserved:
            values = _values([inputs[SPARSE]])
            columns[:, 0] = np.arange(len(columns))
            columns[:, 1] = len(columns) if inputs[SPARSE].shape[0] > 1 else 0
        else:
            tensors = [inputs[name] for name in self._sparse]
            values = _values(tensors)
            sizes = np.array([each.elements for each in tensors], np.int64)
            columns[:, 0] = np.cumsum(sizes) - sizes
            columns[:, 1] = sizes > 1
        return SentRows(dense, values, columns)

    def _refuse_names(self, inputs: Mapping[str, Tensor]) -> None:
        """Refuse features that are missing, that come twice, and inputs that are none."""
        wanted: set[str] = set()
        for matrix, names in ((DENSE, self._dense), (SPARSE, self._sparse)):
            if matrix in inputs and matrix in self._reserved:
                wanted.add(matrix)
            else:
                wanted |= names.keys()
        if missing := [name for name in wanted if name not in inputs]:
            raise wrong(
                f"inputs are missing: {_some(missing)}. Expected each feature of the model by "
                f"name, or {DENSE} and {SPARSE}; got {_names(inputs)}."
            )
        if surplus := [name for name in inputs if name not in wanted]:
            raise wrong(f"there are inputs that the model does not take: {_some(surplus)}.")

    def _row_count(self, inputs: Mapping[str, Tensor]) -> int:
        """Return the rows of a request; each input has so many, or one."""
        rows, of = 1, ""
        for name, tensor in inputs.items():
            wide = {DENSE: len(self._dense), SPARSE: len(self._sparse)}.get(name, 1)
            if name in (DENSE, SPARSE) and name not in self._reserved:
                wide = 1
            shape = tensor.shape
            is_matrix = name in (DENSE, SPARSE) and name in self._reserved
            if not shape or (shape[1:] != (wide,) and (is_matrix or len(shape) != 1)):
                expected = f"[rows, {wide}]" if is_matrix else "[rows] or [rows, 1]"
                raise wrong(f"input {name!r} must have the shape {expected}; got {list(shape)}.")
            size = shape[0]
            if size == 1:
                continue
            if of and size != rows:
                raise wrong(
                    f"input {name!r} has {size} rows, and {of!r} has {rows}. All must have as "
                    "many, or one that is meant for each of them."
                )
            rows, of = size, name
        self._refuse_too_many(rows)
        return rows

    def _refuse_too_many(self, rows: int) -> None:
        if rows > self._most_rows:
            raise RefusedError(
                413,
                f"the request has {rows} rows, at most {self._most_rows} are taken. Send several "
                "requests.",
            )

    def _prepared(self, inputs: Mapping[str, Tensor]) -> Batch:
        dense_name, sparse_name, offsets_name = PREPARED
        if surplus := [name for name in inputs if name not in PREPARED]:
            raise wrong(
                f"beside prepared rows ({', '.join(PREPARED)}) there are other inputs: "
                f"{_some(surplus)}."
            )
        for name, datatype in zip(PREPARED, ("FP32", "INT64", "INT64"), strict=True):
            if name not in inputs:
                if name == offsets_name:
                    continue
                raise wrong(f"input {name!r} is missing, and {_names(inputs)} are there.")
            if inputs[name].datatype != datatype or inputs[name].missing:
                raise wrong(f"input {name!r} must be {datatype}, without nulls.")
        dense, sparse = inputs[dense_name], inputs[sparse_name]
        if len(dense.shape) != 2:
            raise wrong(f"input {dense_name!r} must be a matrix; got {list(dense.shape)}.")
        self._refuse_too_many(dense.shape[0])
        features = _tensor(dense)
        if not bool(torch.isfinite(features).all()):
            raise wrong(f"input {dense_name!r} holds NaN or infinity.")
        ids = _tensor(sparse)
        offsets = _tensor(inputs[offsets_name]) if offsets_name in inputs else None
        if offsets is None:
            expected = (len(features), len(self._schema.sparse))
            if ids.shape != expected:
                raise wrong(
                    f"input {sparse_name!r} must have the shape {list(expected)} without "
                    f"{offsets_name!r}; got {list(sparse.shape)}."
                )
        try:
            check_batch(Batch(features, ids.clamp(min=0), None, offsets), self._schema)
        except UserError as error:
            raise wrong(str(error)) from error
        return _without_negative(Batch(features, ids, None, offsets))


def _tensor(tensor: Tensor) -> torch.Tensor:
    """Return a copy, which is aligned and can be written to."""
    assert tensor.numbers is not None
    return torch.from_numpy(tensor.numbers.reshape(tensor.shape).copy())


def _without_negative(batch: Batch) -> Batch:
    """Return a batch without its negative ids, which count as none, as in an exported model."""
    ids = batch.sparse_features.reshape(-1)
    known = ids >= 0
    if bool(known.all()):
        return batch
    offsets = torch.zeros(len(ids) + 1, dtype=torch.int64)  # of a matrix: an id a bag
    torch.cumsum(known, 0, out=offsets[1:])
    if batch.offsets is not None:
        offsets = offsets[batch.offsets]
    return Batch(batch.dense_features, ids[known], None, offsets)


T = TypeVar("T", bound=np.generic)


def _matrix(flat: npt.NDArray[T], sizes: Sequence[int], rows: int) -> npt.NDArray[T]:
    """Return columns that lie one after the other, each of so many rows or of one, side by side."""
    if len(flat) == rows * len(sizes):
        return np.ascontiguousarray(flat.reshape(len(sizes), rows).T)
    matrix = np.empty((rows, len(sizes)), flat.dtype)
    start = 0
    for column, size in enumerate(sizes):
        matrix[:, column] = flat[start : start + size]
        start += size
    return matrix


def _counts(tensors: Sequence[Tensor]) -> npt.NDArray[np.int32]:
    """Return dense features, one after the other; missing and negative ones are 0."""
    numbers = [each.numbers for each in tensors if each.numbers is not None]
    if len(numbers) == len(tensors) > 1 and len({each.dtype for each in numbers}) == 1:
        # All at once: a call of NumPy's costs as much as a hundred numbers.
        together = Tensor("", tensors[0].datatype, (), np.concatenate(numbers))
        with suppress(RefusedError):  # which has to name the one that is wrong
            return _count_column(together)
    return np.concatenate([np.zeros(0, np.int32), *map(_count_column, tensors)])


def _count_column(tensor: Tensor) -> npt.NDArray[np.int32]:
    """Return a dense feature as preparation takes it."""
    numbers = tensor.numbers
    if numbers is None or numbers.dtype.kind == "b":
        raise wrong(
            f"input {tensor.name!r} is {tensor.datatype}, and a dense feature is a number: INT32, "
            "INT64 or FP32, null or NaN where it is missing."
        )
    if numbers.dtype.kind == "f":
        # NaN is missing: fmax takes the other number of the two.
        numbers = np.fmax(numbers, numbers.dtype.type(0))
        # A number of Python's would be made one of the array's type, and FP16 has none so large.
        bad = (numbers != np.floor(numbers)) | (numbers >= np.float32(2**31))
    else:
        bad = numbers > 2**31 - 1
    if bad.any():
        raise wrong(
            f"input {tensor.name!r} holds {numbers[bad][0]}; a dense feature is a whole number "
            "below 2**31."
        )
    counts: npt.NDArray[np.int32] = np.maximum(numbers, 0).astype(np.int32)
    return counts


def _values(tensors: Sequence[Tensor]) -> npt.NDArray[np.uint32]:
    """Return the sparse values of tensors, one after the other; missing ones are 0."""
    packed = [tensor.packed for tensor in tensors if tensor.packed is not None]
    if packed and len(packed) == len(tensors) and library().loaded:
        data = np.frombuffer(bytearray().join(packed), np.uint8)  # torch takes none read-only
        counts = [tensor.elements for tensor in tensors]
        values = np.empty(sum(counts), np.uint32)
        if torch.ops.dlrm.unpack_values(
            torch.from_numpy(data), list(map(len, packed)), counts, torch.from_numpy(values)
        ):
            return values
    return np.concatenate([np.zeros(0, np.uint32), *map(_value_column, tensors)])


def _value_column(tensor: Tensor) -> npt.NDArray[np.uint32]:
    if tensor.packed is not None:
        return _from_texts(tensor.name, _texts(tensor))
    if tensor.texts is not None:
        return _from_texts(tensor.name, tensor.texts)
    numbers = tensor.numbers
    assert numbers is not None
    if numbers.dtype.kind not in "iu":
        raise wrong(
            f"input {tensor.name!r} is {tensor.datatype}, and a sparse feature is BYTES of 8 "
            "hexadecimal digits, or INT64 or UINT32."
        )
    bad = (numbers < 0) | (numbers > 2**32 - 1)
    if bad.any():
        raise wrong(
            f"input {tensor.name!r} holds {numbers[bad][0]}; a sparse value is in 0 … 2**32-1."
        )
    return numbers.astype(np.uint32)


_DIGITS = 8


def _texts(tensor: Tensor) -> list[bytes]:
    """Return the texts of a tensor that came as bytes."""
    data = tensor.packed
    assert data is not None
    texts: list[bytes] = []
    start = 0
    while start < len(data) and len(texts) <= tensor.elements:
        size = int.from_bytes(data[start : start + 4], "little")
        end = start + 4 + size
        if start + 4 > len(data) or end > len(data):
            raise wrong(
                f"input {tensor.name!r}: text {len(texts)} is to end at byte {end}, and there are "
                f"{len(data)}."
            )
        texts.append(bytes(data[start + 4 : end]))
        start = end
    if len(texts) != tensor.elements:
        raise wrong(
            f"input {tensor.name!r} has the shape {list(tensor.shape)}, so {tensor.elements} "
            f"texts are expected; got {'more' if len(texts) > tensor.elements else len(texts)}."
        )
    return texts


def _from_texts(name: str, texts: Sequence[str | bytes | None]) -> npt.NDArray[np.uint32]:
    zeros = "0" * _DIGITS
    filled = [text.decode("latin-1") if isinstance(text, bytes) else text for text in texts]
    whole = [text or zeros for text in filled]
    if all(len(text) == _DIGITS for text in whole):
        with suppress(ValueError):  # there are others, which are told of below
            found = bytes.fromhex("".join(whole))
            if len(found) == len(whole) * _DIGITS // 2:  # spaces count for nothing
                return np.frombuffer(found, ">u4").astype(np.uint32)
    for row, text in enumerate(whole):
        if len(text) != _DIGITS or set(text) - set("0123456789abcdefABCDEF"):
            raise wrong(
                f"input {name!r}: element {row} is {text[:40]!r}; a sparse value is 8 hexadecimal "
                "digits, or empty where it is missing."
            )
    raise AssertionError("each text by itself is right")


def _names(inputs: Mapping[str, Tensor]) -> str:
    return _some(list(inputs)) or "none"


def _some(names: Sequence[str]) -> str:
    """Return a few of names that a client chose."""
    shown = ", ".join(repr(name[:40]) for name in sorted(names)[:5])
    return f"{shown} and {len(names) - 5} more" if len(names) > 5 else shown
