"""Tables through fbgemm, which looks up and updates all of them in one kernel each.

The arena and the optimizer's accumulator stay what they are: fbgemm is given views of them, so
that checkpoints, evaluation and everything else does not know.
"""

from __future__ import annotations

import importlib
import warnings
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from dlrm.device import fused_tables_location
from dlrm.model.embedding import SparseArch
from dlrm.model.variants import VariantSparseArch

Rule = Literal["sgd", "adagrad", "rowwise_adagrad"]


@dataclass(frozen=True)
class _Fbgemm:
    """The parts of fbgemm that are used."""

    tables: Any
    devices: Any
    locations: Any
    rules: dict[Rule, Any]


def supports(
    sparse_arch: SparseArch | VariantSparseArch,
    *,
    scales_gradients: bool,
    accumulates: bool = False,
) -> tuple[bool, str]:
    """Return whether ``FusedTables`` takes tables, and why or why not.

    Args:
        sparse_arch: The tables.
        scales_gradients: Whether gradients are scaled: fbgemm updates rows while it goes backward,
            before anybody can tell whether a scaled gradient has overflowed.
        accumulates: Whether gradients of several mini-batches are added up before an update.
    """
    if isinstance(sparse_arch, VariantSparseArch):
        return False, "tables go through plain operators: fbgemm is used where all are whole"
    arena = sparse_arch.arena
    if fused_tables_location(arena.device) is None:
        return False, f"tables on {arena.device.type} go through plain operators"
    if accumulates:
        return False, "tables go through plain operators, since gradients are accumulated"
    if scales_gradients:
        return False, "tables go through plain operators, since gradients are scaled"
    if arena.dtype != torch.float32 or arena.shape[1] % 4:
        return False, (
            "tables go through plain operators: fbgemm is used for float32 vectors of a multiple "
            f"of 4, and these are {arena.dtype} of {arena.shape[1]}"
        )
    try:
        _import()
    except (ImportError, OSError) as error:
        return False, f"tables go through plain operators: fbgemm_gpu cannot be imported ({error})"
    return True, "tables go through fbgemm"


class FusedTables:
    """Looks up tables; a backward pass updates them and their accumulator.

    Args:
        sparse_arch: Tables that ``supports`` takes.
        rule: How rows are updated.
        accumulator: Sums of squares, of the rule's shape; None for SGD.
        epsilon: Outside the root.
    """

    def __init__(
        self, sparse_arch: SparseArch, rule: Rule, accumulator: Tensor | None, epsilon: float
    ) -> None:
        fbgemm = _import()
        arena = sparse_arch.arena.detach()
        device = arena.device
        location = fused_tables_location(device)
        assert location is not None
        self._features = len(sparse_arch.names)
        specification = [
            (
                rows,
                arena.shape[1],
                getattr(fbgemm.locations, location),
                getattr(fbgemm.devices, device.type.upper()),
            )
            for rows in sparse_arch.num_embeddings
        ]
        self._tables = fbgemm.tables(
            specification, optimizer=fbgemm.rules[rule], eps=epsilon, device=device
        )
        suffix = {"HOST": "host", "DEVICE": "dev"}[location]
        self._share(f"weights_{suffix}", arena)
        if accumulator is not None:
            self._share(f"momentum1_{suffix}", accumulator)

    def _share(self, name: str, storage: Tensor) -> None:
        """Let one of fbgemm's tensors be a view of one of ours."""
        theirs = getattr(self._tables, name)
        assert theirs.numel() == storage.numel(), "fbgemm stores tables one after another"
        theirs.data = storage.view(-1)

    def set_rate(self, rate: float) -> None:
        """Set the learning rate of the next updates."""
        self._tables.set_learning_rate(rate)

    def __call__(self, sparse_features: Tensor, offsets: Tensor | None) -> Tensor:
        """Sum the vectors of each bag; see ``SparseArch.forward``."""
        if offsets is None:
            ids = sparse_features.t().reshape(-1)
            starts = torch.arange(ids.numel() + 1, device=ids.device)
        else:
            ids, starts = _by_feature(sparse_features, offsets, self._features)
        pooled: Tensor = self._tables(ids, starts)
        return pooled.view(pooled.shape[0], self._features, -1)


def _by_feature(ids: Tensor, offsets: Tensor, features: int) -> tuple[Tensor, Tensor]:
    """Order bags by feature and then by row; ours are by row and then by feature."""
    lengths = offsets.diff().view(-1, features)
    bags = torch.arange(lengths.numel(), device=ids.device).view(-1, features)
    order = torch.empty_like(bags.view(-1))
    order[bags.t().reshape(-1)] = bags.view(-1)  # where each bag goes
    bag_of_id = order.repeat_interleave(lengths.view(-1))
    starts = torch.zeros(lengths.numel() + 1, dtype=offsets.dtype, device=ids.device)
    starts[1:] = lengths.t().reshape(-1).cumsum(0)
    return ids[bag_of_id.argsort(stable=True)], starts


def _import() -> _Fbgemm:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # fbgemm warns of parts of its own that it lacks
        name = "fbgemm_gpu.split_table_batched_embeddings_ops_"
        training = importlib.import_module(f"{name}training")
        common = importlib.import_module(f"{name}common")
        rules = importlib.import_module("fbgemm_gpu.split_embedding_configs").EmbOptimType
    return _Fbgemm(
        training.SplitTableBatchedEmbeddingBagsCodegen,
        training.ComputeDevice,
        common.EmbeddingLocation,
        {
            "sgd": rules.EXACT_SGD,
            "adagrad": rules.EXACT_ADAGRAD,
            "rowwise_adagrad": rules.EXACT_ROWWISE_ADAGRAD,
        },
    )
