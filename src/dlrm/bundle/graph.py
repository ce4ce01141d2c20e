"""A model as an ONNX graph of plain operators.

It is built node by node, without tracing: embedding bags, with lengths that vary, are a few
operators this way, and no table is copied.

Notation: B rows, F sparse features, N ids, D embedding_dim.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from dlrm.config import LossConfig, TableConfig
from dlrm.files import atomic_write, safetensors_places
from dlrm.model.dlrm import DLRM
from dlrm.model.embedding import table_name
from dlrm.model.interaction import InteractionArch
from dlrm.model.mlp import MLP
from dlrm.model.quantized_tables import row_bytes
from dlrm.model.variants import projection_name, weights_name

# The oldest that has all that is used (ScatterElements that adds), so that old runtimes load it.
_OPSET, _IR = 17, 8
_TYPES = {
    torch.float32: TensorProto.FLOAT,
    torch.float16: TensorProto.FLOAT16,
    torch.bfloat16: TensorProto.BFLOAT16,
    torch.uint8: TensorProto.UINT8,
}


def onnx_model(
    model: DLRM, loss: LossConfig, weights: Path, *, one_id: bool = False
) -> onnx.ModelProto:
    """Return a model as an ONNX graph, whose weights lie in a file beside it.

    Its inputs are what a ``Batch`` holds: dense_features, (B, number of them) float32,
    transformed; and either sparse_features, (N,) int64, beside offsets, (B * F + 1,) int64; or with
    ``one_id`` sparse_features alone, (B, F). A negative id counts as none. Its output,
    probabilities, is (B,) float32. Weights have their names in a state dict.

    Args:
        model: Of any kind; of its weights types and shapes count.
        loss: Its threshold clamps probabilities.
        weights: A safetensors file with the model's weights under their names. The graph names it
            without its folder, since runtimes look beside the graph.
        one_id: A bag has one id or none.
    """
    graph = _Graph(weights)
    features = len(model.tables)
    dense_vector = _mlp(graph, model.dense_arch, "dense_arch", "dense_features")
    lookups = _one_id_lookups(graph, features) if one_id else _bag_lookups(graph, features)
    tables = model.state_dict()
    vectors = [
        _vector(graph, tables, table, lookup, model.config.embedding_dim)
        for table, lookup in zip(model.tables, lookups, strict=True)
    ]
    interactions = _interaction(graph, model.interaction_arch, dense_vector, vectors)
    logits = _mlp(graph, model.over_arch, "over_arch", interactions)
    threshold = loss.loss_threshold
    probabilities = graph("Squeeze", graph("Sigmoid", logits), graph.integers(1))
    limits = [graph.number(threshold), graph.number(1 - threshold)]
    graph("Clip", probabilities, *limits, output="probabilities")

    def tensor(name: str, kind: int, *shape: int | str) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, kind, shape)

    inputs = [tensor("dense_features", TensorProto.FLOAT, "rows", model.dense_arch.in_features)]
    if one_id:
        inputs += [tensor("sparse_features", TensorProto.INT64, "rows", features)]
    else:
        inputs += [
            tensor("sparse_features", TensorProto.INT64, "ids"),
            tensor("offsets", TensorProto.INT64, "bags + 1"),
        ]
    outputs = [tensor("probabilities", TensorProto.FLOAT, "rows")]
    return helper.make_model(
        helper.make_graph(graph.nodes, "dlrm", inputs, outputs, graph.initializers),
        opset_imports=[helper.make_opsetid("", _OPSET)],
        ir_version=_IR,
        producer_name="dlrm",
    )


def write_onnx(path: Path, graph: onnx.ModelProto) -> None:
    """Write a graph beside its weights.

    Raises:
        EnvironmentFaultError: The disk is full or read-only.
    """
    with atomic_write(path) as file:
        file.write(graph.SerializeToString())


class _Graph:
    """Nodes and weights as they are added; calling it adds a node.

    Args:
        file: Where the weights lie, a safetensors file.
    """

    def __init__(self, file: Path) -> None:
        self._file, self._places = file.name, safetensors_places(file)
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self.weights: dict[str, Tensor] = {}
        self._constants: dict[tuple[str, bytes], str] = {}

    def __call__(self, operator: str, *inputs: str, output: str = "", **attributes: Any) -> str:
        """Add a node; returns the name of its output."""
        name = output or f"{operator}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(operator, inputs, [name], name=name, **attributes))
        return name

    def weight(self, name: str, values: Tensor) -> str:
        """Add a tensor of the model."""
        if name not in self.weights:
            self.weights[name] = values
            offset, length = self._places[name]
            stored = TensorProto(name=name, data_type=_TYPES[values.dtype], dims=values.shape)
            stored.data_location = TensorProto.EXTERNAL
            for key, value in (("location", self._file), ("offset", offset), ("length", length)):
                stored.external_data.add(key=key, value=str(value))
            self.initializers.append(stored)
        return name

    def integers(self, *values: int) -> str:
        """Add int64 constants, (number of them,)."""
        return self.constant(np.array(values, np.int64))

    def integer(self, value: int) -> str:
        """Add an int64 constant, ()."""
        return self.constant(np.array(value, np.int64))

    def int32(self, value: int) -> str:
        """Add an int32 constant, ()."""
        return self.constant(np.array(value, np.int32))

    def number(self, value: float) -> str:
        """Add a float32 constant, ()."""
        return self.constant(np.array(value, np.float32))

    def constant(self, values: np.ndarray) -> str:
        """Add a constant of any shape."""
        key = (f"{values.dtype}{values.shape}", values.tobytes())
        if key not in self._constants:
            self._constants[key] = f"constant_{len(self._constants)}"
            self.initializers.append(numpy_helper.from_array(values, self._constants[key]))
        return self._constants[key]


@dataclass(frozen=True)
class _Lookup:
    """What a feature's tables are looked up with, as names of tensors."""

    ids: str
    """(N',), none negative."""
    weights: str
    """(N', 1): 0 in place of no id; empty: all are 1."""
    rows: str
    """(N',), the row of each id's bag; empty: each row has one id."""
    count: str
    """(1,), B."""


def _bag_lookups(graph: _Graph, features: int) -> Iterator[_Lookup]:
    """Yield the ids of each feature, from those of all and their offsets."""
    # The bag of an id is the number of bags that end before it or where it is.
    ends = graph("Slice", "offsets", graph.integers(1), graph.integers(1 << 62))
    ids = graph("Shape", "sparse_features")
    ones = graph("Expand", graph.integer(1), graph("Shape", ends))
    zeros = graph("Expand", graph.integer(0), graph("Add", ids, graph.integers(1)))
    ended = graph("ScatterElements", zeros, ends, ones, axis=0, reduction="add")
    bags = graph("CumSum", graph("Slice", ended, graph.integers(0), ids), graph.integer(0))
    rows = graph("Div", bags, graph.integer(features))
    is_id = graph("GreaterOrEqual", "sparse_features", graph.integer(0))
    owners = graph("Where", is_id, graph("Mod", bags, graph.integer(features)), graph.integer(-1))
    count = graph("Shape", "dense_features", start=0, end=1)
    for feature in range(features):
        own = graph("Equal", owners, graph.integer(feature))
        own_ids = graph("Compress", "sparse_features", own, axis=0)
        yield _Lookup(own_ids, "", graph("Compress", rows, own, axis=0), count)


def _one_id_lookups(graph: _Graph, features: int) -> Iterator[_Lookup]:
    """Yield the ids of each feature, from those of all, one or none a row."""
    is_id = graph("GreaterOrEqual", "sparse_features", graph.integer(0))
    weights = graph("Cast", is_id, to=TensorProto.FLOAT)
    ids = graph("Max", "sparse_features", graph.integer(0))
    for feature in range(features):
        own_ids = graph("Gather", ids, graph.integer(feature), axis=1)
        own_weights = graph("Gather", weights, graph.integers(feature), axis=1)
        yield _Lookup(own_ids, own_weights, "", "")


def _vector(
    graph: _Graph, tables: Mapping[str, Tensor], table: TableConfig, lookup: _Lookup, dim: int
) -> str:
    """Add the vectors of a feature's bags, (B, D)."""

    def weight(name: str) -> str:
        return graph.weight(f"sparse_arch.{name}", tables[f"sparse_arch.{name}"])

    def pooled(part: str, ids: str, length: int) -> str:
        return _pooled(graph, weight(table_name(part)), ids, lookup, weights, length)

    weights = lookup.weights
    if table.weighted_pooling != "none":
        own = graph("Gather", weight(weights_name(table.name)), lookup.ids)
        own = graph("Unsqueeze", own, graph.integers(1))
        weights = graph("Mul", weights, own) if weights else own
    if table.variant == "qr":
        length = dim // 2 if table.qr_operation == "concat" else dim
        collisions = graph.integer(table.qr_collisions)
        quotients = graph("Div", lookup.ids, collisions)
        remainders = graph("Mod", lookup.ids, collisions)
        parts = (
            pooled(f"{table.name}_quotient", quotients, length),
            pooled(f"{table.name}_remainder", remainders, length),
        )
        if table.qr_operation == "concat":
            return graph("Concat", *parts, axis=1)
        return graph("Mul" if table.qr_operation == "mult" else "Add", *parts)
    if table.variant == "md" and table.md_dim < dim:
        shorter = pooled(table.name, lookup.ids, table.md_dim)
        return graph("Gemm", shorter, weight(projection_name(table.name)), transB=1)
    return pooled(table.name, lookup.ids, dim)


def _pooled(graph: _Graph, table: str, ids: str, lookup: _Lookup, weights: str, length: int) -> str:
    """Add the weighed sums of a table's vectors in each bag, (B, length)."""
    vectors = graph("Gather", table, ids)
    if graph.weights[table].dtype == torch.uint8:
        vectors = _dequantized(graph, vectors, graph.weights[table].shape[1], length)
    elif graph.weights[table].dtype != torch.float32:
        vectors = graph("Cast", vectors, to=TensorProto.FLOAT)
    if weights:
        vectors = graph("Mul", vectors, weights)
    if not lookup.rows:
        return vectors
    # ScatterND would need no expanded indices, but onnxruntime lets its threads race in it.
    rows = graph("Unsqueeze", lookup.rows, graph.integers(1))
    rows = graph("Expand", rows, graph("Shape", vectors))
    shape = graph("Concat", lookup.count, graph.integers(length), axis=0)
    zeros = graph("Expand", graph.number(0), shape)
    return graph("ScatterElements", zeros, rows, vectors, axis=0, reduction="add")


def _dequantized(graph: _Graph, rows: str, width: int, dim: int) -> str:
    """Add the vectors, (N, dim), of rows of ``QuantizedTables``, (N, width) bytes."""
    four_bits = row_bytes(dim, 8) != width
    code_bytes = width - (4 if four_bits else 8)
    rows = graph("Cast", rows, to=TensorProto.INT32)
    one = graph.integers(1)
    codes = graph("Slice", rows, graph.integers(0), graph.integers(code_bytes), one)
    if four_bits:  # the first of two numbers in the low half of their byte
        low, high = (graph(kind, codes, graph.int32(16)) for kind in ("Mod", "Div"))
        halves = [graph("Unsqueeze", half, graph.integers(2)) for half in (low, high)]
        codes = graph("Concat", *halves, axis=2)
        codes = graph("Reshape", codes, graph.integers(0, 2 * code_bytes))
        codes = graph("Slice", codes, graph.integers(0), graph.integers(dim), one)
    ends = graph("Slice", rows, graph.integers(code_bytes), graph.integers(width), one)
    scale_and_bias = _floats(graph, ends, 2 if four_bits else 4)
    scale = graph("Gather", scale_and_bias, graph.integers(0), axis=1)
    bias = graph("Gather", scale_and_bias, graph.integers(1), axis=1)
    numbers = graph("Cast", codes, to=TensorProto.FLOAT)
    return graph("Add", graph("Mul", numbers, scale), bias)


def _floats(graph: _Graph, stored: str, width: int) -> str:
    """Add (N, 2) float32 of their little-endian bytes, (N, 2 * width) int32; width 4 or 2.

    ONNX has no operator (before opset 26) that takes bits for a number, so sign and exponent are
    looked up and the fraction is multiplied, which is exact.
    """
    fraction_bits, exponents = (23, 256) if width == 4 else (10, 32)
    # Of each exponent: what the last bit of the fraction stands for, and the leading one, which
    # numbers with the exponent 0 lack.
    exponent = np.maximum(np.arange(exponents), 1) - (exponents // 2 - 1) - fraction_bits
    power = np.ldexp(np.float32(1), exponent).astype(np.float32)
    leading = np.where(np.arange(exponents) > 0, 1 << fraction_bits, 0).astype(np.int32)
    stored = graph("Reshape", stored, graph.integers(0, 2, width))
    each = [graph("Gather", stored, graph.integer(place), axis=2) for place in range(width)]
    # One byte holds the end of the exponent and the begin of the fraction.
    shared, limit = fraction_bits // 8, 1 << fraction_bits % 8
    kinds = graph("Div", each[shared], graph.int32(limit))
    fraction = graph("Mod", each[shared], graph.int32(limit))
    for byte in each[shared + 1 :]:  # one or none
        kinds = graph("Add", kinds, graph("Mul", byte, graph.int32(256 // limit)))
    for byte in reversed(each[:shared]):
        fraction = graph("Add", graph("Mul", fraction, graph.int32(256)), byte)
    ones = graph("Gather", graph.constant(np.tile(leading, 2)), kinds)
    powers = graph("Gather", graph.constant(np.concatenate([power, -power])), kinds)
    return graph("Mul", graph("Cast", graph("Add", fraction, ones), to=TensorProto.FLOAT), powers)


def _mlp(graph: _Graph, mlp: MLP, name: str, features: str) -> str:
    for number, layer in enumerate(mlp.layers):
        if isinstance(layer, nn.Linear):
            prefix = f"{name}.layers.{number}"
            weight = graph.weight(f"{prefix}.weight", layer.weight)
            bias = graph.weight(f"{prefix}.bias", layer.bias)
            features = graph("Gemm", features, weight, bias, transB=1)
        else:
            features = graph("Relu", features)
    return features


def _interaction(
    graph: _Graph, interaction: InteractionArch, dense_vector: str, vectors: Sequence[str]
) -> str:
    together = graph("Concat", dense_vector, *vectors, axis=1)
    if interaction.interaction == "cat":
        return together
    together = graph("Reshape", together, graph.integers(0, len(vectors) + 1, -1))
    products = graph("MatMul", together, graph("Transpose", together, perm=[0, 2, 1]))
    pairs = graph.integers(*interaction.pairs.tolist())
    products = graph("Gather", graph("Flatten", products, axis=1), pairs, axis=1)
    return graph("Concat", dense_vector, products, axis=1)
