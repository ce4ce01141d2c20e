"""What --debug-mode prints, and the graph of --plot-compute-graph."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dlrm.config import LossConfig, TrainConfig
from dlrm.data.batch import Batch
from dlrm.data.dataset import Dataset
from dlrm.files import atomic_write
from dlrm.model.dlrm import DLRM
from dlrm.model.embedding import Arena
from dlrm.model.loss import mean_loss
from dlrm.reference.checkpoint import reference_names
from dlrm.reference.log import say
from dlrm.reference.request import Request
from dlrm.training.events import Events, Start, Stop

PRINTED_BATCHES = 3
"""The reference prints every mini-batch of an epoch before it begins."""


class DebugPrints(Events):
    """Prints architecture, mini-batches and weights as --debug-mode does, in bounded length.

    Arrays of more than a thousand numbers are shortened by NumPy and torch, as in the reference.

    Args:
        request: What was asked for; ``print_precision`` is of the weights' digits.
        data: Where the mini-batches come from.
    """

    def __init__(self, request: Request, data: Dataset) -> None:
        self._request = request
        self._data = data
        self._model: DLRM | None = None

    def on_start(self, start: Start) -> None:
        """Print everything that is known before the first step."""
        self._model = start.model
        self.show(start.model)

    def show(self, model: DLRM) -> None:
        """Print a model that training begins with, or that is tested alone."""
        for line in self._architecture(model):
            say(line)
        say("data (inputs and targets):")
        for number, batch in enumerate(self._batches()):
            say(f"mini-batch: {number}")
            for text in _inputs(batch, len(model.tables)):
                say(text)
        say("initial parameters (weights and bias):")
        self._print_weights(model)

    def on_stop(self, stop: Stop) -> None:
        """Print the weights as they are now."""
        assert self._model is not None
        say("updated parameters (weights and bias):")
        self._print_weights(self._model)

    def _architecture(self, model: DLRM) -> Iterator[str]:
        layers = {
            name: [
                model.state_dict()[f"{name}.layers.0.weight"].shape[1],
                *sizes,
            ]
            for name, sizes in (
                ("dense_arch", model.config.dense_arch_layer_sizes),
                ("over_arch", model.config.over_arch_layer_sizes),
            )
        }
        limit = self._request.train.max_ind_range
        rows = self._data.schema.with_max_ind_range(limit).num_embeddings
        lengths: Any = model.config.embedding_dim
        if any(table.variant == "md" for table in model.tables):
            lengths = [table.md_dim or lengths for table in model.tables]
        yield "model arch:"
        yield (
            f"mlp top arch {len(layers['over_arch']) - 1} layers, with input to output dimensions:"
        )
        yield str(np.array(layers["over_arch"]))
        yield "# of interactions"
        yield str(layers["over_arch"][0])
        yield (
            f"mlp bot arch {len(layers['dense_arch']) - 1} layers, with input to output dimensions:"
        )
        yield str(np.array(layers["dense_arch"]))
        yield "# of features (sparse and dense)"
        yield str(len(rows) + 1)
        yield "dense feature size"
        yield str(layers["dense_arch"][0])
        yield "sparse feature size"
        yield str(lengths)
        yield (f"# of embeddings (= # of sparse features) {len(rows)}, with dimensions {lengths}x:")
        yield str(np.array(rows))

    def _batches(self) -> Iterator[Batch]:
        config = self._request.train
        schema = self._data.schema.with_max_ind_range(config.max_ind_range)
        count = min(PRINTED_BATCHES, config.num_batches or PRINTED_BATCHES)
        with closing(
            self._data.batches("train", config.mini_batch_size, schema=schema, num_batches=count)
        ) as batches:
            yield from batches

    def _print_weights(self, model: DLRM) -> None:
        weights = model.state_dict()
        with np.printoptions(precision=self._request.print_precision):
            for name in reference_names(weights, model.tables):
                say(str(weights[name].detach().cpu().float().numpy()))


def _inputs(batch: Batch, features: int) -> Iterator[str]:
    """Return dense features, lengths and ids of each feature's bags, and labels, as text."""
    assert batch.labels is not None
    rows = len(batch)
    yield str(batch.dense_features)
    if batch.offsets is None:
        yield str(torch.ones(features, rows, dtype=torch.int32))
        yield str(list(batch.sparse_features.T))
    else:
        lengths = batch.offsets.diff()
        yield str(lengths.view(rows, features).T.int())
        feature = (torch.arange(rows * features) % features).repeat_interleave(lengths)
        yield str([batch.sparse_features[feature == number] for number in range(features)])
    yield str(batch.labels.view(-1, 1))


class ComputeGraph(Events):
    """Draws the graph of a mini-batch when training has ended.

    Args:
        path: The .dot file.
        data: Where the mini-batch comes from.
    """

    def __init__(self, path: Path, data: Dataset) -> None:
        self._path = path
        self._data = data
        self._start: Start | None = None

    def on_start(self, start: Start) -> None:
        """Keep the model."""
        self._start = start

    def on_stop(self, stop: Stop) -> None:
        """Write the file."""
        assert self._start is not None
        write_graph(self._path, self._start.model, self._data, self._start.config)


def write_graph(path: Path, model: DLRM, data: Dataset, config: TrainConfig) -> None:
    """Write the graph of the first mini-batch's loss, for Graphviz.

    Args:
        path: The .dot file.
        model: Its gradients stay as they are.
        data: Where the mini-batch comes from.
        config: Its size, and the loss.
    """
    schema = data.schema.with_max_ind_range(config.max_ind_range)
    batches = data.batches("train", config.mini_batch_size, schema=schema, num_batches=1)
    with closing(batches):
        text = graph_of(model, next(iter(batches)).to(model.device), config.loss)
    with atomic_write(path) as file:
        file.write(text.encode())


def graph_of(model: DLRM, batch: Batch, loss: LossConfig) -> str:
    """Return the operations between a model's weights and a batch's mean loss, as Graphviz reads.

    Args:
        model: Its gradients stay as they are.
        batch: On the model's device, with labels.
        loss: What is at the end.
    """
    assert batch.labels is not None
    with torch.enable_grad():
        end = mean_loss(model(batch), batch.labels, loss)
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    numbers: dict[Any, int] = {}
    lines = ["digraph {", '  node [shape=box, fontname="monospace"];']
    waiting = [end.grad_fn]
    seen = set()

    def number_of(node: Any) -> int:
        return numbers.setdefault(node, len(numbers))

    while waiting:
        node = waiting.pop()
        if node in seen or node is None:
            continue
        seen.add(node)
        weight = getattr(node, "variable", None)
        label = type(node).__name__
        if weight is not None:
            label = f"{names.get(weight, 'looked-up vectors')}\\n{tuple(weight.shape)}"
        style = "" if weight is None else ", style=filled, fillcolor=lightblue"
        lines.append(f'  n{number_of(node)} [label="{label}"{style}];')
        for before, _ in node.next_functions:
            if before is not None:
                lines.append(f"  n{number_of(before)} -> n{number_of(node)};")
                waiting.append(before)
    for module in model.modules():
        if isinstance(module, Arena):
            module.forget_gradient()
    return "\n".join([*lines, "}", ""])
