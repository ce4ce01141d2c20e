"""A model with weights of fewer bits, for inference on a CPU."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from dlrm.config import QuantizationConfig, TrainConfig
from dlrm.errors import UserError
from dlrm.model.dlrm import DLRM
from dlrm.model.mlp import MLP
from dlrm.model.quantized_tables import QuantizedTables
from dlrm.model.variants import PoolingWeights

FULL = QuantizationConfig()
"""Weights as they were trained."""


def refuse_quantization(
    quantization: QuantizationConfig, device: torch.device, config: TrainConfig
) -> None:
    """Refuse fewer bits where they do not go with the rest, before anything is scored.

    Raises:
        UserError: Naming the option.
    """
    if quantization != FULL and device.type != "cpu":
        raise UserError(
            f"weights of fewer bits are for --device cpu; the model is on {device}. There, --amp "
            "O1 makes scoring faster."
        )
    if quantization.quantize_mlp_with_bit != 32 and config.amp != "O0":
        raise UserError(
            f"--quantize-mlp-with-bit {quantization.quantize_mlp_with_bit} does not go with --amp "
            f"{config.amp}, which also has layers compute in lower precision. Give --amp O0."
        )


def quantize(model: DLRM, config: QuantizationConfig) -> None:
    """Replace weights of a model by those of fewer bits; it can only score from then on.

    Pooling weights and projections stay what they are.

    Args:
        model: On a CPU.
        config: Of how many bits.
    """
    with torch.no_grad():
        for arena in model.sparse_arch.arenas:
            if config.quantize_emb_with_bit != 32 and not isinstance(arena, PoolingWeights):
                arena.quantized = QuantizedTables.of(arena.arena, config.quantize_emb_with_bit)
                arena.arena = nn.Parameter(arena.arena[:0].clone(), requires_grad=False)
        for mlp in (model.dense_arch, model.over_arch):
            for number, layer in enumerate(mlp.layers):
                if isinstance(layer, nn.Linear) and config.quantize_mlp_with_bit != 32:
                    kind = Int8Linear if config.quantize_mlp_with_bit == 8 else BFloat16Linear
                    mlp.layers[number] = kind(layer)


def layer_bytes(model: DLRM) -> int:
    """Return what the weights of a model's layers take, quantized or not."""
    return sum(
        weight.nbytes
        for mlp in (model.dense_arch, model.over_arch)
        for weight in mlp.state_dict().values()
    )


class Int8Linear(nn.Module):
    """A linear layer that multiplies integers of 8 bits.

    Weights have a scale an output; inputs one a row, found when they come, so that a row's
    probability does not depend on the other rows of its batch.

    Args:
        layer: What it stands for.
    """

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        weight = layer.weight.detach()
        scale = _scale(weight)
        self.register_buffer("weight", (weight / scale).round().to(torch.int8))
        self.register_buffer("scale", scale.squeeze(1))
        self.register_buffer("bias", layer.bias.detach().clone())
        self.weight: Tensor
        self.scale: Tensor
        self.bias: Tensor

    def forward(self, features: Tensor) -> Tensor:
        """Map (B, in_features) to (B, out_features), float32."""
        scale = _scale(features)
        integers = (features / scale).round().to(torch.int8)
        products = torch._int_mm(integers, self.weight.t())
        return torch.addcmul(self.bias, products * scale, self.scale)


class BFloat16Linear(nn.Module):
    """A linear layer whose weights and inputs are rounded to bfloat16.

    Args:
        layer: What it stands for.
    """

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.register_buffer("weight", layer.weight.detach().bfloat16())
        self.register_buffer("bias", layer.bias.detach().clone())
        self.weight: Tensor
        self.bias: Tensor

    def forward(self, features: Tensor) -> Tensor:
        """Map (B, in_features) to (B, out_features), float32."""
        return functional.linear(features.bfloat16(), self.weight).float() + self.bias


def is_quantized(mlp: MLP) -> bool:
    """Tell whether a layer has fewer bits."""
    return any(isinstance(layer, Int8Linear | BFloat16Linear) for layer in mlp.layers)


def _scale(values: Tensor) -> Tensor:
    """Return what the largest number of each row, (n, 1), is 127 of."""
    return (values.abs().amax(1, keepdim=True) / 127).clamp(min=torch.finfo(torch.float32).tiny)
