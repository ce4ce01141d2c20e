"""Embedding tables of 8 or 4 bits a number, looked up by PyTorch's operators on a CPU."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_ROWS = 1 << 18
"""Rows of a table that are quantized at a time."""


def row_bytes(dim: int, bits: int) -> int:
    """Return what a vector of so many numbers takes: its codes, scale and bias."""
    return dim + 8 if bits == 8 else math.ceil(dim / 2) + 4


class QuantizedTables:
    """The tables of an arena, of 8 or 4 bits a number.

    After the codes of a row stand its scale, how far apart two codes are, and its bias, the
    smallest number: two float32 after D bytes, or two float16 after D / 2 (FBGEMM's row-wise
    formats). The operators are PyTorch's own.

    Args:
        codes: (rows, ``row_bytes``), uint8; see ``of``.
        dim: Length of a vector (D).
        bits: 8 or 4.

    Attributes:
        codes: (rows, bytes of a row): codes, scale, bias.
    """

    def __init__(self, codes: Tensor, dim: int, bits: int) -> None:
        assert codes.shape[1] == row_bytes(dim, bits)
        operators = torch.ops.quantized
        self.codes, self.bits, self._dim = codes, bits, dim
        self._look_up = (
            operators.embedding_bag_byte_rowwise_offsets
            if bits == 8
            else operators.embedding_bag_4bit_rowwise_offsets
        )

    @staticmethod
    def of(arena: Tensor, bits: int) -> QuantizedTables:
        """Quantize the tables of an arena, (rows, D), of any floating type."""
        operators, dim = torch.ops.quantized, arena.shape[1]
        pack = (
            operators.embedding_bag_byte_prepack
            if bits == 8
            else operators.embedding_bag_4bit_prepack
        )
        odd = 1 if bits == 4 and dim % 2 else 0  # two numbers share a byte
        codes = torch.empty(len(arena), row_bytes(dim, bits), dtype=torch.uint8)
        for start in range(0, len(arena), _ROWS):
            rows = arena[start : start + _ROWS].float()
            # The last number twice changes neither scale nor bias.
            codes[start : start + _ROWS] = pack(torch.cat([rows, rows[:, dim - odd :]], 1))
        return QuantizedTables(codes, dim, bits)

    def __call__(self, rows: Tensor, offsets: Tensor, weights: Tensor | None) -> Tensor:
        """Sum the vectors of each bag.

        Args:
            rows: (N,), of the arena.
            offsets: (bags + 1,).
            weights: (N,), what vectors are multiplied by; None: 1.

        Returns:
            (bags, D), float32.
        """
        vectors: Tensor = self._look_up(
            self.codes, rows, offsets, per_sample_weights=weights, include_last_offset=True
        )
        return vectors[:, : self._dim].contiguous()
