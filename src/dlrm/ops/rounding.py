"""Stochastic rounding: a stored value moves by small updates in expectation, not never.

Rounding to the nearest loses an update of less than half the distance to the next number that the
type holds, every time. Rounding up with a probability equal to the part that is cut off keeps it
on average.
"""

from __future__ import annotations

import hashlib
import struct

import torch
from torch import Tensor

NARROW = (torch.bfloat16, torch.float16)
"""Types that values are rounded to."""


def random_bits(seed: int, step: int, rows: Tensor, count: int) -> Tensor:
    """Return 16 random bits for each value of some rows, as int32.

    They are a hash of the seed, the step, the row and the position in it, so they depend on
    neither threads, nor the order of rows, nor what was drawn before.

    Args:
        seed: Equal seeds give equal bits.
        step: Of the training.
        rows: (N,), int64.
        count: Values a row.

    Returns:
        (N, count), in 0 … 65535.
    """
    digest = hashlib.blake2b(struct.pack("<QQ", seed, step), digest_size=8).digest()
    first_key, second_key = struct.unpack("<ii", digest)
    of_rows = (rows ^ (rows >> 32)).to(torch.int32)
    of_rows = _mix(_mix(of_rows ^ first_key) + second_key)
    words = torch.arange((count + 1) // 2, dtype=torch.int32, device=rows.device) * -0x61C88647
    words = _mix(of_rows.unsqueeze(1) + words)
    return words.view(torch.int16)[:, :count].to(torch.int32) & 0xFFFF


def _mix(words: Tensor) -> Tensor:
    """Mix 32 bits ("lowbias32" of Chris Wellons' hash prospector); products wrap around."""
    words = (words ^ _shift(words, 16)) * 0x7FEB352D
    words = (words ^ _shift(words, 15)) * -0x7B935975
    return words ^ _shift(words, 16)


def _shift(words: Tensor, bits: int) -> Tensor:
    """Shift right, filling up with zeros and not with the sign."""
    return (words >> bits) & ((1 << (32 - bits)) - 1)


def round_stochastically(values: Tensor, bits: Tensor, dtype: torch.dtype) -> Tensor:
    """Round each value to one of its two neighbours, up with the probability of what is cut off.

    A value that the type holds is left as it is, and so is one that is not finite.

    Args:
        values: float32.
        bits: Of the same shape, int32, uniform in 0 … 65535.
        dtype: bfloat16 or float16.
    """
    assert values.dtype == torch.float32
    words = values.view(torch.int32)  # sign and magnitude: adding moves away from zero
    if dtype == torch.bfloat16:
        rounded = ((words + bits) & ~0xFFFF).view(torch.float32)
    else:
        assert dtype == torch.float16
        bits = bits & 0x1FFF
        normal = ((words + bits) & ~0x1FFF).view(torch.float32)
        # Below float16's smallest normal number its numbers are the multiples of 2**-24.
        multiples = ((values.abs() * 2.0**37).round().to(torch.int32) + bits) >> 13
        subnormal = (multiples * 2.0**-24).copysign(values)
        rounded = torch.where(values.abs() < 2.0**-14, subnormal, normal)
    return torch.where(values.isfinite(), rounded, values).to(dtype)
