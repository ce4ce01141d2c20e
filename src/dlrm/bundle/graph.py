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

from dlrm.checkpoint import tensor_bytes
from dlrm.config import LossConfig, TableConfig
from dlrm.files import atomic_write
from dlrm.model.dlrm import DLRM
from dlrm.model.embedding import table_name
from dlrm.model.interaction import InteractionArch
from dlrm.model.mlp import MLP
from dlrm.model.variants import projection_name, weights_name

# The oldest that has all that is used (ScatterElements that adds), so that old runtimes load it.
_OPSET, _IR = 17, 8
_TYPES = {
    torch.float32: TensorProto.FLOAT,
    torch.float16: TensorProto.FLOAT16,
    torch.bfloat16: TensorProto.BFLOAT16,
}
_ALIGNMENT = 1 << 16  # what a memory map of any system can begin at


@dataclass(frozen=True)
class OnnxModel:
    """A graph, and its weights apart from it.

    Attributes:
        proto: Its initializers have types and shapes, but no values yet.
        weights: The values, by name; views of the model's.
    """

    proto: onnx.ModelProto
    weights: Mapping[str, Tensor]

    @property
    def weight_bytes(self) -> int:
        """What the weights take."""
        return sum(weight.nbytes for weight in self.weights.values())


def onnx_model(model: DLRM, loss: LossConfig, *, one_id: bool = False) -> OnnxModel:
    """Return a model as an ONNX graph.

    Its inputs are what a ``Batch`` holds: dense_features, (B, number of them) float32,
    transformed; and either sparse_features, (N,) int64, beside offsets, (B * F + 1,) int64; or with
    ``one_id`` sparse_features alone, (B, F). A negative id counts as none. Its output,
    probabilities, is (B,) float32. Weights have their names in a state dict.

    Args:
        model: Of any kind; its weights may be anywhere.
        loss: Its threshold clamps probabilities.
        one_id: A bag has one id or none.
    """
    graph = _Graph()
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
    proto = helper.make_model(
        helper.make_graph(graph.nodes, "dlrm", inputs, outputs, graph.initializers),
        opset_imports=[helper.make_opsetid("", _OPSET)],
        ir_version=_IR,
        producer_name="dlrm",
    )
    return OnnxModel(proto, graph.weights)


def write_onnx(path: Path, model: OnnxModel, *, inline_bytes: int) -> list[Path]:
    """Write a graph with its weights.

    Args:
        path: The file.
        model: What goes into it.
        inline_bytes: Where the weights take more, they go into a second file, path.data, straight
            from where they are. (One file holds 2 GiB, and takes its size in memory several times.)

    Returns:
        The files.

    Raises:
        EnvironmentFaultError: The disk is full or read-only.
    """
    initializers = {each.name: each for each in model.proto.graph.initializer}
    files = [path]
    if model.weight_bytes <= inline_bytes:
        for name, weight in model.weights.items():
            initializers[name].raw_data = bytes(tensor_bytes(weight))
    else:
        files.append(path.with_name(f"{path.name}.data"))
        with atomic_write(files[1]) as file:
            for name, weight in model.weights.items():
                file.seek(-(-file.tell() // _ALIGNMENT) * _ALIGNMENT)
                stored = {"location": files[1].name, "offset": file.tell(), "length": weight.nbytes}
                initializers[name].data_location = TensorProto.EXTERNAL
                for key, value in stored.items():
                    initializers[name].external_data.add(key=key, value=str(value))
                file.write(tensor_bytes(weight))
    with atomic_write(path) as file:
        file.write(model.proto.SerializeToString())
    return files


class _Graph:
    """Nodes and weights as they are added; calling it adds a node."""

    def __init__(self) -> None:
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
            self.initializers.append(
                TensorProto(name=name, data_type=_TYPES[values.dtype], dims=values.shape)
            )
        return name

    def integers(self, *values: int) -> str:
        """Add int64 constants, (number of them,)."""
        return self._constant(np.array(values, np.int64))

    def integer(self, value: int) -> str:
        """Add an int64 constant, ()."""
        return self._constant(np.array(value, np.int64))

    def number(self, value: float) -> str:
        """Add a float32 constant, ()."""
        return self._constant(np.array(value, np.float32))

    def _constant(self, values: np.ndarray) -> str:
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
    if graph.weights[table].dtype != torch.float32:
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
