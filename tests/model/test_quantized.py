"""Weights of fewer bits: values, layout, and what becomes of a model's probabilities."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import dlrm
from dlrm.config import (
    LossConfig,
    ModelConfig,
    QuantizationConfig,
    TrainConfig,
)
from dlrm.errors import UserError
from dlrm.model import score
from dlrm.model.dlrm import DLRM
from dlrm.model.embedding import Arena
from dlrm.model.quantized import (
    BFloat16Linear,
    Int8Linear,
    layer_bytes,
    quantize,
    refuse_quantization,
)
from dlrm.model.quantized_tables import QuantizedTables
from dlrm.model.score import Scorer
from dlrm.model.variants import PoolingWeights
from small_models import EVERY_KIND, make_batch, make_model, make_one_id_batch

CHANGES: dict[str, dict[str, Any]] = {
    "whole": {},
    "float16": {"embedding_dtype": "float16"},
    "qr": {"embedding_variant": "qr", "qr_threshold": 10},
    "fixed": {"weighted_pooling": "fixed"},
    "every kind": {"tables": EVERY_KIND},
}


def rounded(values: Tensor, bits: int) -> Tensor:
    """A table as its codes give it: the plain twin."""
    low, high = values.amin(1, keepdim=True), values.amax(1, keepdim=True)
    if bits == 4:  # scale and bias are float16
        low = low.half().float()
    scale = (high - low) / (2**bits - 1)
    if bits == 4:
        scale = scale.half().float()
    codes = ((values - low) / scale).round().clamp(0, 2**bits - 1)
    return codes * scale + low


@pytest.mark.parametrize(("bits", "dim", "width"), [(8, 5, 13), (8, 6, 14), (4, 6, 7), (4, 5, 7)])
def test_rows_are_codes_beside_scale_and_bias(bits: int, dim: int, width: int) -> None:
    values = torch.randn(1000, dim, generator=torch.Generator().manual_seed(0))
    tables = QuantizedTables.of(values, bits)
    assert tables.codes.shape == (1000, width)
    found = tables(torch.arange(1000), torch.arange(1001), None)
    torch.testing.assert_close(found, rounded(values, bits), rtol=0, atol=1e-6)
    step = (values.amax(1) - values.amin(1)).max() / (2**bits - 1)
    assert (found - values).abs().max() < 0.51 * step + (0 if bits == 8 else 0.002)


def test_by_hand() -> None:
    tables = QuantizedTables.of(torch.tensor([[0.0, 255.0, 1.4, 1.6], [-1.0, 14.0, 3.0, 3.4]]), 8)
    found = tables(torch.tensor([0, 0, 1]), torch.tensor([0, 2, 2, 3]), torch.tensor([1.0, 2, 1]))
    expected = torch.tensor([[0.0, 765, 3, 6], [0] * 4, [-1, 14, 3, 3.4]])
    torch.testing.assert_close(found, expected, rtol=0, atol=0.03)
    assert found[0].tolist() == [0, 765, 3, 6]
    four = QuantizedTables.of(torch.tensor([[-1.0, 14.0, 3.0, 3.4]]), 4)
    assert four.codes[0, :2].tolist() == [0xF0, 0x44]
    one = four(torch.tensor([0]), torch.tensor([0, 1]), None)
    assert one.tolist() == [[-1, 14, 3, 3]]


def test_a_table_is_quantized_in_pieces_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    values = torch.randn(100, 6)
    whole = QuantizedTables.of(values, 8).codes
    monkeypatch.setattr("dlrm.model.quantized_tables._ROWS", 7)
    assert torch.equal(QuantizedTables.of(values, 8).codes, whole)


def with_rounded_tables(changes: dict[str, Any], bits: int) -> DLRM:
    """The same model, whose tables hold in floating point what codes would give."""
    model = make_model(**changes)
    with torch.no_grad():
        for arena in model.sparse_arch.arenas:
            if not isinstance(arena, PoolingWeights):
                values = arena.arena.float()
                if bits == 4 and values.shape[1] % 2:
                    values = torch.cat([values, values[:, -1:]], 1)
                arena.arena.data = rounded(values, bits)[:, : arena.arena.shape[1]]
                arena.is_narrow = False
    return model


@pytest.mark.parametrize("kernels", ["native", "plain"])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("changes", CHANGES.values(), ids=CHANGES.keys())
def test_a_model_scores_as_one_with_these_very_values(
    changes: dict[str, Any], bits: int, kernels: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kernels == "plain":
        monkeypatch.setattr(score, "supports", lambda *_: (False, ""))
    twin, model = with_rounded_tables(changes, bits), make_model(**changes)
    full_bytes = model.sparse_arch.table_bytes
    quantize(model, QuantizationConfig(quantize_emb_with_bit=bits))
    for rows, longest in ((300, 0), (1, 0), (0, 0), (70, 4), (5, 1)):
        batch = make_batch(rows, longest) if longest else make_one_id_batch(rows)
        found = Scorer(model, LossConfig())(batch)
        np.testing.assert_allclose(found, Scorer(twin, LossConfig())(batch), rtol=0, atol=2e-6)
    assert model.sparse_arch.table_bytes < full_bytes or "float16" in changes.values()


def test_parts_of_a_large_batch_are_looked_up_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = make_model(), make_batch(300, 3)
    quantize(model, QuantizationConfig(quantize_emb_with_bit=8))
    whole = Scorer(model, LossConfig())(batch)
    monkeypatch.setattr("dlrm.model.native.part_rows", lambda: 64)
    np.testing.assert_array_equal(Scorer(model, LossConfig())(batch), whole)


def test_layers_of_integers_by_hand() -> None:
    layer = nn.Linear(2, 2)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[127.0, -1.4], [0.0, 2.54]]))
        layer.bias.copy_(torch.tensor([0.5, -1.0]))
    few = Int8Linear(layer)
    assert few.weight.tolist() == [[127, -1], [0, 127]]
    torch.testing.assert_close(few.scale, torch.tensor([1.0, 0.02]))
    # Inputs: codes 127 and 64 of scale 1/127, then zeros.
    found = few(torch.tensor([[1.0, 0.5], [0.0, 0.0]]))
    first = [(127 * 127 - 64) / 127 + 0.5, 64 / 127 * 127 * 0.02 - 1]
    torch.testing.assert_close(found, torch.tensor([first, [0.5, -1.0]]))


@pytest.mark.parametrize(("kind", "error"), [(Int8Linear, 0.01), (BFloat16Linear, 0.01)])
def test_layers_are_close_and_rows_do_not_matter_to_each_other(
    kind: type[Int8Linear | BFloat16Linear], error: float
) -> None:
    torch.manual_seed(0)
    layer, features = nn.Linear(367, 65), torch.randn(50, 367).relu()
    few = kind(layer)
    with torch.no_grad():
        expected, found = layer(features), few(features)
        features[1:] *= 100
        assert torch.equal(few(features)[0], found[0]) or kind is BFloat16Linear
    assert 0 < (found - expected).abs().max() < error * expected.abs().max()


@pytest.mark.parametrize("bits", [8, 16])
def test_a_model_with_layers_of_fewer_bits(bits: int) -> None:
    model, twin, batch = make_model(), make_model(), make_batch(300, 3)
    full = layer_bytes(model)
    quantize(model, QuantizationConfig(quantize_mlp_with_bit=bits))
    found = Scorer(model, LossConfig())(batch)
    difference = np.abs(found - Scorer(twin, LossConfig())(batch))
    assert 1e-5 < difference.max() < 0.03
    weights, numbers = 3 * 8 + 8 * 6 + 21 * 8 + 8, 8 + 6 + 8 + 1
    assert full == 4 * (weights + numbers)
    expected = weights + 8 * numbers if bits == 8 else 2 * weights + 4 * numbers
    assert layer_bytes(model) == expected


@pytest.fixture(scope="module")
def run(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quantized") / "run"
    sizes = {"dense_arch_layer_sizes": (8, 4), "over_arch_layer_sizes": (8, 1)}
    dlrm.train(dataset, folder, TrainConfig(model=ModelConfig(embedding_dim=4, **sizes)))
    return folder


def test_evaluation_tells_sizes_speed_and_the_difference(run: Path) -> None:
    full = dlrm.evaluate(run, "test")
    fewer = dlrm.evaluate(run, "test", quantization=QuantizationConfig(16, 4))
    told = fewer.quantization
    assert told
    assert full.quantization is None
    assert told.auc_difference == pytest.approx(fewer.metrics.auc - full.metrics.auc, abs=1e-12)
    low, high = told.auc_difference_interval
    assert low < told.auc_difference < high
    assert (told.full_table_bytes, told.table_bytes) == (
        sum(dlrm.load(run).schema.num_embeddings) * 16,
        sum(dlrm.load(run).schema.num_embeddings) * 6,
    )
    assert told.layer_bytes < 0.6 * told.full_layer_bytes
    assert told.samples_per_second == fewer.samples_per_second > 0
    assert told.full_samples_per_second > 0


def test_prediction_uses_the_same_weights(run: Path) -> None:
    fewer = dlrm.load(run, quantization=QuantizationConfig(quantize_emb_with_bit=4))
    arena = fewer.model.sparse_arch
    assert isinstance(arena, Arena)
    assert arena.quantized
    assert arena.arena.numel() == 0
    table = {f"int_{i}": [1, None] for i in range(13)}
    table |= {f"cat_{i}": ["0a1b2c3d", None] for i in range(26)}
    full = dlrm.load(run).predict(table)
    assert 0 < np.abs(fewer.predict(table) - full).max() < 0.05


@pytest.mark.parametrize(
    ("bits", "device", "amp", "message"),
    [
        ((32, 8), "cuda", "O0", "weights of fewer bits are for --device cpu; the model is on cuda"),
        ((8, 32), "cpu", "O1", "--quantize-mlp-with-bit 8 does not go with --amp O1"),
    ],
)
def test_what_does_not_go_together_is_refused(
    bits: tuple[Any, Any], device: str, amp: Any, message: str
) -> None:
    with pytest.raises(UserError) as error:
        refuse_quantization(QuantizationConfig(*bits), torch.device(device), TrainConfig(amp=amp))
    assert message in str(error.value)


def test_other_numbers_of_bits_are_refused() -> None:
    with pytest.raises(UserError, match="--quantize-emb-with-bit: expected one of 4, 8, 32, got 2"):
        QuantizationConfig(quantize_emb_with_bit=2)  # type: ignore[arg-type]
