"""A model as a program of ``torch.export``, of plain operators.

Its weights stay in their file, which a program can be given (``load_state_dict(assign=True)``)
without a copy; the program itself holds none.

Notation: B rows, F sparse features, N ids, D embedding_dim.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.nn import functional

from dlrm.config import LossConfig, TableConfig
from dlrm.files import atomic_write
from dlrm.model.dlrm import DLRM
from dlrm.model.embedding import table_name
from dlrm.model.loss import probabilities
from dlrm.model.quantized_tables import row_bytes
from dlrm.model.variants import projection_name, weights_name


@dataclass(frozen=True)
class _Lookup:
    """What a feature's tables are looked up with."""

    ids: Tensor
    """(N',), none negative."""
    offsets: Tensor | None
    """(B + 1,), where each row's bag starts; None: each row has one id, N' = B."""
    weights: Tensor | None
    """(N',): what vectors are multiplied by; None: 1."""


class Plain(nn.Module):
    """A model as a function of tensors, with its weights under their names in a state dict.

    Args:
        model: In evaluation mode; weights are shared with it.
        loss: Its threshold clamps probabilities.
    """

    def __init__(self, model: DLRM, loss: LossConfig) -> None:
        super().__init__()
        self._config, self._loss, self._tables = model.config, loss, model.tables
        for name, weight in model.state_dict().items():
            owner: nn.Module = self
            *folders, own = name.split(".")
            for folder in folders:
                if folder not in owner._modules:
                    owner.add_module(folder, nn.Module())
                owner = owner.get_submodule(folder)
            owner.register_parameter(own, nn.Parameter(weight, requires_grad=False))

    def _weight(self, name: str) -> Tensor:
        return self.get_parameter(name)

    def _probabilities(self, dense_features: Tensor, lookups: Iterator[_Lookup]) -> Tensor:
        """Return the probabilities, (B,)."""
        dense_vector = self._mlp("dense_arch", dense_features, relu_last=True)
        vectors = [
            self._vector(table, lookup) for table, lookup in zip(self._tables, lookups, strict=True)
        ]
        if self._config.interaction == "cat":
            interactions = torch.cat([dense_vector, *vectors], 1)
        else:
            together = torch.stack([dense_vector, *vectors], 1)
            products = torch.bmm(together, together.transpose(1, 2))
            # The lower triangle, row by row.
            itself = int(self._config.interaction_itself)
            pairs = [products[:, row, : row + itself] for row in range(len(vectors) + 1)]
            interactions = torch.cat([dense_vector, *pairs], 1)
        logits = self._mlp("over_arch", interactions, relu_last=False).squeeze(1)
        return probabilities(logits, self._loss)

    def _mlp(self, name: str, features: Tensor, *, relu_last: bool) -> Tensor:
        layers = self.get_submodule(f"{name}.layers")._modules
        for number, layer in enumerate(layers.values(), start=1):
            assert layer is not None
            features = functional.linear(
                features, layer.get_parameter("weight"), layer.get_parameter("bias")
            )
            if number < len(layers) or relu_last:
                features = features.relu()
        return features

    def _vector(self, table: TableConfig, lookup: _Lookup) -> Tensor:
        """Return the vectors of a feature's bags, (B, D)."""
        dim, ids, weights = self._config.embedding_dim, lookup.ids, lookup.weights
        if table.weighted_pooling != "none":
            own = self._weight(f"sparse_arch.{weights_name(table.name)}")[ids]
            weights = own if weights is None else weights * own

        def pooled(part: str, ids: Tensor, length: int) -> Tensor:
            stored = self._weight(f"sparse_arch.{table_name(part)}")
            return _pooled(stored, _Lookup(ids, lookup.offsets, weights), length)

        if table.variant == "qr":
            concatenated = table.qr_operation == "concat"
            length = dim // 2 if concatenated else dim
            quotients = pooled(f"{table.name}_quotient", ids // table.qr_collisions, length)
            remainders = pooled(f"{table.name}_remainder", ids % table.qr_collisions, length)
            if concatenated:
                return torch.cat([quotients, remainders], 1)
            return (
                quotients * remainders if table.qr_operation == "mult" else quotients + remainders
            )
        if table.variant == "md" and table.md_dim < dim:
            shorter = pooled(table.name, ids, table.md_dim)
            projection = self._weight(f"sparse_arch.{projection_name(table.name)}")
            return functional.linear(shorter, projection)
        return pooled(table.name, ids, dim)


class PlainBags(Plain):
    """A model that takes bags of any length."""

    def forward(self, dense_features: Tensor, sparse_features: Tensor, offsets: Tensor) -> Tensor:
        """Return the probabilities, (B,), of what a ``Batch`` holds; negative: none."""
        rows, features = dense_features.shape[0], len(self._tables)
        known = sparse_features >= 0
        before = torch.cat([offsets.new_zeros(1), known.cumsum(0)])
        lengths = before[offsets].diff().view(rows, features)
        bags = torch.arange(rows * features, device=offsets.device).repeat_interleave(
            offsets.diff(), output_size=sparse_features.shape[0]
        )
        # Ids feature by feature, and at the end those that are none.
        order = torch.where(known, bags % features, features).argsort(stable=True)
        sizes: list[int] = lengths.sum(0).tolist()
        sizes.append(sparse_features.shape[0] - sum(sizes))
        parts = torch.split(sparse_features[order], sizes)
        starts = torch.cat([lengths.new_zeros(1, features), lengths.cumsum(0)])
        lookups = (
            _Lookup(parts[feature], starts[:, feature].contiguous(), None)
            for feature in range(features)
        )
        return self._probabilities(dense_features, lookups)


class PlainOneId(Plain):
    """A model that takes one id a feature, or none."""

    def forward(self, dense_features: Tensor, sparse_features: Tensor) -> Tensor:
        """Return the probabilities, (B,), of ids (B, F), of which negative ones count as none."""
        ids, weights = sparse_features.clamp(min=0), (sparse_features >= 0).float()
        lookups = (
            _Lookup(ids[:, feature], None, weights[:, feature])
            for feature in range(len(self._tables))
        )
        return self._probabilities(dense_features, lookups)


def _pooled(stored: Tensor, lookup: _Lookup, length: int) -> Tensor:
    """Return the weighed sums of a table's vectors in each bag, (B, length)."""
    if lookup.offsets is not None and stored.dtype == torch.float32:
        return _sums(lookup.ids, stored, lookup)
    vectors = stored[lookup.ids]
    vectors = _dequantized(vectors, length) if stored.dtype == torch.uint8 else vectors.float()
    if lookup.offsets is None:
        return vectors if lookup.weights is None else vectors * lookup.weights.unsqueeze(1)
    return _sums(torch.arange(vectors.shape[0], device=vectors.device), vectors, lookup)


def _sums(rows: Tensor, vectors: Tensor, lookup: _Lookup) -> Tensor:
    # Unlike index_add, which lets threads race once it is compiled.
    return functional.embedding_bag(
        rows,
        vectors,
        lookup.offsets,
        mode="sum",
        per_sample_weights=lookup.weights,
        include_last_offset=True,
    )


def _dequantized(rows: Tensor, dim: int) -> Tensor:
    """Return the vectors, (N, dim), of rows of ``QuantizedTables``, (N, bytes of a row)."""
    four_bits = rows.shape[1] != row_bytes(dim, 8)
    kind = torch.float16 if four_bits else torch.float32
    ends = 2 * kind.itemsize
    codes, scale_and_bias = torch.split(rows, [rows.shape[1] - ends, ends], 1)
    if four_bits:  # the first of two numbers in the low half of their byte
        codes = torch.stack([codes & 15, codes >> 4], 2).flatten(1)[:, :dim]
    # A copy even where it is contiguous: of one row the offset would not do.
    scale_and_bias = scale_and_bias.clone(memory_format=torch.contiguous_format).view(kind).float()
    vectors: Tensor = codes.float() * scale_and_bias[:, :1] + scale_and_bias[:, 1:]
    return vectors


def exported_program(model: DLRM, loss: LossConfig, *, one_id: bool = False) -> ExportedProgram:
    """Return a model as a program with the inputs and the output of ``graph.onnx_model``.

    Args:
        model: Of any kind, on a CPU, in evaluation mode; the program shares its weights.
        loss: Its threshold clamps probabilities.
        one_id: A bag has one id or none.
    """
    rows, features = 3, len(model.tables)
    ids = torch.zeros(rows, features, dtype=torch.int64)
    inputs = {"dense_features": torch.zeros(rows, model.dense_arch.in_features)}
    varying = Dim("rows")
    shapes = {"dense_features": {0: varying}}
    plain: Plain
    if one_id:
        plain = PlainOneId(model, loss)
        inputs["sparse_features"] = ids
        shapes["sparse_features"] = {0: varying}
    else:
        plain = PlainBags(model, loss)
        inputs |= {"sparse_features": ids.view(-1), "offsets": torch.arange(ids.numel() + 1)}
        shapes |= {"sparse_features": {0: Dim("ids")}, "offsets": {0: features * varying + 1}}
    return torch.export.export(plain.eval(), (), inputs, dynamic_shapes=shapes)


def write_program(path: Path, program: ExportedProgram) -> None:
    """Write a program without its weights, in whose place stand their types and shapes.

    Raises:
        EnvironmentFaultError: The disk is full or read-only.
    """
    state = program.state_dict
    for name, weight in state.items():
        state[name] = nn.Parameter(weight.to("meta"), requires_grad=False)
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    with atomic_write(path) as file:
        file.write(buffer.getbuffer())


def open_program(path: Path, weights: Path) -> nn.Module:
    """Open what ``write_program`` wrote, with weights that are mapped from a safetensors file."""
    module = torch.export.load(path).module()
    module.load_state_dict(load_file(weights), assign=True)
    return module


def missing_compiler() -> str:
    """Tell why nothing can be compiled; empty: there is a compiler."""
    from torch._inductor import cpp_builder, exc

    try:
        cpp_builder.get_cpp_compiler()
    except exc.InvalidCxxCompiler as error:
        return str(error).splitlines()[0]
    return ""


def compile_program(path: Path, program: ExportedProgram) -> None:
    """Compile a program, by AOTInductor, for processors like this one; without its weights."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch warns of its own calls
        torch._inductor.aoti_compile_and_package(
            program,
            package_path=str(path),
            inductor_configs={"aot_inductor.package_constants_in_so": False},
        )


def open_compiled(path: Path, weights: Path) -> Callable[..., Tensor]:
    """Open what ``compile_program`` wrote, with weights mapped from a safetensors file."""
    compiled = torch._inductor.aoti_load_package(str(path))
    stored = load_file(weights)
    # Those of one number are in the code.
    constants = {name: stored[name] for name in compiled.get_constant_fqns()}
    compiled.load_constants(constants, check_full_update=True, user_managed=True)
    return compiled
