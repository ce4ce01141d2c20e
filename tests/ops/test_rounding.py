from __future__ import annotations

import numpy as np
import pytest
import torch

from dlrm.ops.rounding import random_bits, round_stochastically

ALL_BITS = torch.arange(1 << 16, dtype=torch.int32)
narrow = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)


def every_rounding(value: float, dtype: torch.dtype) -> torch.Tensor:
    return round_stochastically(torch.full(ALL_BITS.shape, value), ALL_BITS, dtype).double()


@narrow
@pytest.mark.parametrize(
    "value", [1.001, -1.001, 0.3, 1234.5678, 6.2e-5, -6e-5, 1e-5, 3.3e-7, -2e-8, 1e-9], ids=str
)
def test_over_all_random_bits_the_mean_is_the_value(value: float, dtype: torch.dtype) -> None:
    value = torch.tensor(value).item()  # as float32
    rounded = every_rounding(value, dtype)
    neighbours = rounded.unique()
    assert len(neighbours) <= 2
    assert neighbours.min() <= value <= neighbours.max()
    distance = (neighbours.max() - neighbours.min()).item()
    # 13 or 16 bits choose, so the mean is exact but for what they cannot tell.
    assert abs(rounded.mean().item() - value) <= distance * 2.0**-13
    # Neighbours: nothing lies between them.
    nearest = torch.tensor(value).to(dtype)
    assert nearest.double().item() in neighbours.tolist()
    between = neighbours.mean().to(dtype).double().item()
    assert between in neighbours.tolist()


@narrow
def test_what_the_type_holds_is_left_as_it_is(dtype: torch.dtype) -> None:
    held = torch.randn(1000, generator=torch.Generator().manual_seed(1)).to(dtype)
    special = torch.tensor([0.0, -0.0, float("inf"), -float("inf"), 2.0**-24, 2.0**-14, -1.0])
    held = torch.cat([held, special.to(dtype)])
    for bits in (0, 1, 0x1234, 0xFFFF):
        rounded = round_stochastically(
            held.float(), torch.full(held.shape, bits, dtype=torch.int32), dtype
        )
        assert torch.equal(rounded.view(torch.int16), held.view(torch.int16))
    nan = round_stochastically(torch.tensor([float("nan")]), torch.tensor([0xFFFF]).int(), dtype)
    assert nan.isnan().all()


def test_random_bits_are_uniform_and_independent_of_each_other() -> None:
    bits = random_bits(7, 3, torch.arange(20000), 17)
    assert bits.shape == (20000, 17)
    uniform = bits.double() / 65536
    n = uniform.numel()
    assert abs(uniform.mean().item() - 0.5) < 4 / np.sqrt(12 * n)
    counts = torch.bincount(bits.flatten() >> 8, minlength=256).double()
    chi_squared = ((counts - n / 256).square() / (n / 256)).sum().item()
    assert abs(chi_squared - 255) < 5 * np.sqrt(2 * 255)
    for other in (
        random_bits(8, 3, torch.arange(20000), 17),
        random_bits(7, 4, torch.arange(20000), 17),
        random_bits(7, 3, torch.arange(1, 20001), 17),
        bits.roll(1, 1),
        bits.roll(2, 1),
    ):
        correlation = torch.corrcoef(torch.stack([bits.flatten(), other.flatten()]).double())[0, 1]
        assert abs(correlation.item()) < 5 / np.sqrt(n)


def test_random_bits_follow_from_seed_step_row_and_position_alone() -> None:
    rows = torch.tensor([5, 2**40 + 5, 3, 12345678])
    bits = random_bits(123, 9, rows, 16)
    assert torch.equal(random_bits(123, 9, rows.flip(0), 16), bits.flip(0))
    assert torch.equal(random_bits(123, 9, rows, 5), bits[:, :5])
    assert not torch.equal(bits[0], bits[1])
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    many = torch.arange(100_000)
    alone = random_bits(1, 2, many, 8)
    torch.set_num_threads(3)
    assert torch.equal(random_bits(1, 2, many, 8), alone)
    torch.set_num_threads(before)
    # Fixed, since a continued run has to draw what the first would have drawn.
    assert bits[0, :4].tolist() == [41565, 34440, 23, 20194]
