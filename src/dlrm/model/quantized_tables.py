"""Embedding tables of 8 or 4 bits a number, looked up by PyTorch's operators on a CPU."""

from __future__ import annotations

import torch
from torch import Tensor

_ROWS = 1 << 18
"""Rows of a table that are quantized at a time."""


class QuantizedTables:
    """The tables of an arena, of 8 or 4 bits a number.

    After the codes of a row stand its scale, how far apart two codes are, and its bias, the
    smallest number: two float32 after D bytes, or two float16 after D / 2 (FBGEMM's row-wise
    formats). The operators are PyTorch's own.

    Args:
        arena: (rows, D), of any floating type.
        bits: 8 or 4.

    Attributes:
        codes: (rows, bytes of a row): codes, scale, bias.
    """

    def __init__(self, arena: Tensor, bits: int) -> None:
        operators = torch.ops.quantized
        self._dim = arena.shape[1]
        if bits == 8:
            pack, self._look_up = (
                operators.embedding_bag_byte_prepack,
                operators.embedding_bag_byte_rowwise_offsets,
            )
        else:
            pack, self._look_up = (
                operators.embedding_bag_4bit_prepack,
                operators.embedding_bag_4bit_rowwise_offsets,
            )
        odd = 1 if bits == 4 and self._dim % 2 else 0  # two numbers share a byte

        def packed(rows: Tensor) -> Tensor:
            # The last number twice changes neither scale nor bias.
            codes: Tensor = pack(torch.cat([rows.float(), rows[:, self._dim - odd :].float()], 1))
            return codes

        width = packed(arena.new_zeros(1, self._dim)).shape[1]
        self.codes = torch.empty(len(arena), width, dtype=torch.uint8)
        for start in range(0, len(arena), _ROWS):
            part = slice(start, start + _ROWS)
            self.codes[part] = packed(arena[part])

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
