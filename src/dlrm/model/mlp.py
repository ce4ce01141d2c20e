"""A stack of fully connected layers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional


class MLP(nn.Module):
    """Fully connected layers, each followed by ReLU except, where asked, the last.

    In a state dict linear layer k is ``layers.{2k}``: ReLUs are counted, as the reference does.

    Args:
        in_features: Width of the input.
        layer_sizes: Output width of each layer.
        relu_last: Whether ReLU follows the last layer too.
        dropout: Probability of dropping a hidden activation while training.
        device: Where weights are allocated.
    """

    def __init__(
        self,
        in_features: int,
        layer_sizes: Sequence[int],
        *,
        relu_last: bool,
        dropout: float = 0.0,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        self.in_features = in_features
        layers: list[nn.Module] = []
        for size in layer_sizes:
            layers += [nn.Linear(in_features, size, device=device), nn.ReLU()]
            in_features = size
        self.layers = nn.ModuleList(layers if relu_last else layers[:-1])
        self.dropout = dropout

    def forward(self, features: Tensor) -> Tensor:
        """Map (B, in_features) to (B, layer_sizes[-1])."""
        last = len(self.layers) - 1
        for index, layer in enumerate(self.layers):
            features = layer(features)
            if self.dropout and index < last and isinstance(layer, nn.ReLU):
                features = functional.dropout(features, self.dropout, self.training)
        return features
