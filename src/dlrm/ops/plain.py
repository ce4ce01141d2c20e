"""What each native kernel computes, in plain PyTorch: its specification, and its twin in tests.

A function has the name and the arguments of an operator ``torch.ops.dlrm.NAME``, and writes to the
same ones. Shapes, with B rows, F sparse features, D embedding_dim, and P rows in a panel:
    panels: (B / P, features, P), rounded up; the last panel is filled up, the inputs' with zeros.
    columns: (features / P, B, P), rounded up: the same values, row by row in blocks of features.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

SGD, ADAGRAD, ROWWISE_ADAGRAD = range(3)
CROSS_ENTROPY, SQUARED_ERROR = range(2)


def rows_of(panels: Tensor) -> Tensor:
    """Return panels as rows: (B, features), B a multiple of P."""
    return panels.transpose(1, 2).flatten(0, 1)


def panels_of(rows: Tensor, width: int) -> Tensor:
    """Return rows, (B, features), as panels of ``width`` rows."""
    padded = functional.pad(rows, (0, 0, 0, -len(rows) % width))
    return padded.view(-1, width, rows.shape[1]).transpose(1, 2).contiguous()


def columns_of(rows: Tensor, width: int) -> Tensor:
    """Return rows, (B, features), as columns in blocks of ``width`` features."""
    padded = functional.pad(rows, (0, -rows.shape[1] % width))
    return padded.view(len(rows), -1, width).transpose(0, 1).contiguous()


def to_panels(rows: Tensor, panels: Tensor) -> None:
    """Write rows, (B, features), as panels."""
    panels.copy_(panels_of(rows, panels.shape[2]))


def mlp_forward(
    x: Tensor,
    rows: int,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    relu_last: bool,
    outputs: Sequence[Tensor],
    columns: Sequence[Tensor],
) -> None:
    """Write every layer's outputs, as panels, and inputs, as columns (no list: do not)."""
    width, values = x.shape[2], rows_of(x)
    for index, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        if columns:
            columns[index].copy_(columns_of(values, width))
        values = functional.linear(values, weight, bias)
        if relu_last or index < len(weights) - 1:
            values = values.relu()
        outputs[index].copy_(panels_of(values, width))


def mlp_backward(
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    inputs: Sequence[Tensor],
    gradients: Sequence[Tensor],
    input_gradient: Tensor | None,
) -> None:
    """Take the gradient of the last layer's outputs to all others' and, where asked, the inputs.

    Where ReLU cut an input to 0 its gradient is 0; the inputs of the first layer come from
    elsewhere.
    """
    gradient = rows_of(gradients[-1])
    for index in reversed(range(len(weights))):
        if index == 0 and input_gradient is None:
            return
        gradient = gradient @ weights[index]
        if index:
            gradient = torch.where(rows_of(inputs[index]) <= 0, 0, gradient)
        to = gradients[index - 1] if index else input_gradient
        assert to is not None
        to.copy_(panels_of(gradient, to.shape[2]))


def mlp_update(
    columns: Sequence[Tensor],
    gradients: Sequence[Tensor],
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    weight_sums: Sequence[Tensor],
    bias_sums: Sequence[Tensor],
    weight_gradients: Sequence[Tensor],
    bias_gradients: Sequence[Tensor],
    rule: int,
    rate: float,
    epsilon: float,
    first: bool,
    last: bool,
) -> None:
    """Move weights and biases along their gradients.

    A batch of several parts carries the sum of its gradients from the first part on in
    ``weight_gradients`` and ``bias_gradients``; the last part's call moves the weights.
    """
    for index, weight in enumerate(weights):
        gradient = rows_of(gradients[index])  # (B, out)
        inputs = columns[index].transpose(0, 1).flatten(1)[:, : weight.shape[1]]  # (B, in)
        pairs = (
            (weight, gradient.t() @ inputs, weight_gradients, weight_sums),
            (biases[index], gradient.sum(0), bias_gradients, bias_sums),
        )
        for moved, summed, carried, sums in pairs:
            if not first:
                summed += carried[index]
            if not last:
                carried[index].copy_(summed)
                continue
            if rule == SGD:
                moved.sub_(rate * summed)
            else:
                sums[index].add_(summed.square())
                moved.sub_(rate * summed / (sums[index].sqrt() + epsilon))


def embed_interact(
    dense_vector: Tensor,
    arena: Tensor,
    first_rows: Tensor,
    ids: Tensor,
    offsets: Tensor | None,
    weights: Tensor | None,
    combined: Tensor | None,
    rows: int,
    itself: bool,
    vectors: Tensor,
    interactions: Tensor | None,
) -> None:
    """Write each row's vectors, as panels, and how they interact.

    Args:
        dense_vector: (·, D, P), panels.
        arena: (n, D), the T tables one after another.
        first_rows: (T,), where each begins.
        ids: (B, T), or (N,) beside offsets.
        offsets: (B * T + 1,), or None: one id a bag.
        weights: Of the shape of ids: what its vector is multiplied by; None: 1.
        combined: (R, 2): of each of the last R tables the feature among the F = T - R before whose
            vector it changes, and 1 where the two are multiplied, 0 where they are added; None:
            no tables are joined.
        rows: B.
        itself: Whether each vector's product with itself is included.
        vectors: (·, (1 + T + R) * D, P): the dense vector, the features' vectors, the last R
            tables' sums, and those of the R features before they were joined.
        interactions: (·, D + pairs, P): the dense vector, then the products; None: no products.
    """
    width, tables, dim = dense_vector.shape[2], len(first_rows), arena.shape[1]
    places, bags = _occurrences(first_rows, ids, offsets, rows)
    found = arena[places]
    if weights is not None:
        found = found * weights.reshape(-1, 1)
    pooled = torch.zeros(rows * tables, dim).index_add_(0, bags, found).view(rows, tables, dim)
    features = tables - (0 if combined is None else len(combined))
    joined = pooled
    if combined is not None:
        own, others, is_product = pooled[:, combined[:, 0]], pooled[:, features:], combined[:, 1:]
        joined = torch.cat([pooled, own], 1)
        joined[:, combined[:, 0]] = torch.where(is_product == 1, own * others, own + others)
    padded = functional.pad(joined.flatten(1), (0, 0, 0, -rows % width))
    every = torch.cat([rows_of(dense_vector), padded], 1)
    vectors.copy_(panels_of(every, width))
    if interactions is not None:
        stacked = every.view(len(every), -1, dim)[:, : features + 1]
        i, j = torch.tril_indices(features + 1, features + 1, 0 if itself else -1)
        products = (stacked @ stacked.transpose(1, 2))[:, i, j]
        interactions.copy_(panels_of(torch.cat([stacked[:, 0], products], 1), width))


def embed_interact_backward(
    vectors: Tensor,
    gradient: Tensor,
    rows: int,
    tables: int,
    combined: Tensor | None,
    dot: bool,
    itself: bool,
    first_row: int,
    dense_gradient: Tensor,
    bag_gradients: Tensor,
) -> None:
    """Take the gradient of the interactions to the dense arch's last outputs and to the bags.

    Args:
        vectors: (·, (F + 1) * D, P), panels of this part's rows.
        gradient: Of the interactions; where not ``dot``, of the vectors themselves.
        rows: B of this part.
        tables: T.
        combined: See ``embed_interact``.
        dot: Whether there are products.
        itself: Whether each vector's product with itself is among them.
        first_row: This part's first row in the batch.
        dense_gradient: (·, D, P): 0 where ReLU cut the dense vector.
        bag_gradients: (T, B of the batch, D).
    """
    width, out = vectors.shape[2], rows_of(gradient)
    features, joined = tables, 0
    if combined is not None:
        features, joined = tables - len(combined), len(combined)
    slots = rows_of(vectors).view(len(out), 1 + tables + joined, -1)
    every = slots[:, : features + 1]
    if dot:
        dim = every.shape[2]
        i, j = torch.tril_indices(features + 1, features + 1, 0 if itself else -1)
        products = torch.zeros(len(out), features + 1, features + 1)
        products[:, i, j] = out[:, dim:]
        each = (products + products.transpose(1, 2)) @ every
        each[:, 0] += out[:, :dim]
    else:
        each = out.view(every.shape)
    if combined is not None:
        places, is_product = 1 + combined[:, 0], combined[:, 1:] == 1
        gradient = each[:, places]
        other = torch.where(is_product, gradient * slots[:, 1 + tables :], gradient)
        own = gradient * slots[:, 1 + features : 1 + tables]
        each[:, places] = torch.where(is_product, own, gradient)
        each = torch.cat([each, other], 1)
    dense = torch.where(every[:, 0] <= 0, 0, each[:, 0])
    dense_gradient.copy_(panels_of(dense, width))
    bag_gradients[:, first_row : first_row + rows] = each[:rows, 1:].transpose(0, 1)


def tables_update(
    bag_gradients: Tensor,
    first_rows: Tensor,
    ids: Tensor,
    offsets: Tensor | None,
    weights: Tensor | None,
    rule: int,
    rate: float,
    epsilon: float,
    arena: Tensor,
    sums: Tensor | None,
) -> None:
    """Move the tables' rows along the gradients, (T, B, D), of the bags that hold them.

    Gradients of one row are summed before an adaptive rule squares them. ``sums`` has the arena's
    shape for Adagrad, (n,) for row-wise Adagrad.
    """
    _, rows, dim = bag_gradients.shape
    places, bags = _occurrences(first_rows, ids, offsets, rows)
    gradients = bag_gradients.transpose(0, 1).reshape(-1, dim)[bags]
    if weights is not None:
        gradients = gradients * weights.reshape(-1, 1)
    if rule == SGD:
        arena.index_add_(0, places, gradients, alpha=-rate)
        return
    assert sums is not None
    touched, inverse = torch.unique(places, return_inverse=True)
    summed = torch.zeros(len(touched), dim).index_add_(0, inverse, gradients)
    squares = summed.square()
    sums[touched] += squares if rule == ADAGRAD else squares.mean(1)
    deviation = sums[touched].sqrt() + epsilon
    arena[touched] -= rate * summed / (deviation if rule == ADAGRAD else deviation.unsqueeze(1))


def loss_gradient(
    logits: Tensor,
    labels: Tensor,
    kind: int,
    weight_0: float,
    weight_1: float,
    threshold: float,
    scale: float,
    gradient: Tensor,
) -> Tensor:
    """Return ``scale`` times the sum of losses, float64, and write its gradient by the logits.

    Args:
        logits: (·, 1, P), panels.
        labels: (B,).
        kind: CROSS_ENTROPY or SQUARED_ERROR of the probability.
        weight_0: What a row of label 0 counts.
        weight_1: What a row of label 1 counts.
        threshold: Probabilities are clamped to [t, 1 - t]; 0: they are not.
        scale: Multiplies the sum.
        gradient: (·, 1, P), 0 for rows that are not there.
    """
    with torch.enable_grad():
        exact = rows_of(logits)[: len(labels), 0].double().requires_grad_()
        target = labels.double()
        probability = torch.sigmoid(exact)
        if threshold:
            probability = probability.clamp(threshold, 1 - threshold)
        if kind == SQUARED_ERROR:
            losses = (probability - target).square()
        elif threshold:
            losses = functional.binary_cross_entropy(probability, target, reduction="none")
        else:
            losses = functional.binary_cross_entropy_with_logits(exact, target, reduction="none")
        total = scale * (losses * (weight_0 + (weight_1 - weight_0) * target)).sum()
    (found,) = torch.autograd.grad(total, exact)
    gradient.copy_(panels_of(found.float().unsqueeze(1), gradient.shape[2]))
    return total.detach()


def forward(
    dense_features: Tensor,
    ids: Tensor,
    offsets: Tensor | None,
    weights: Tensor | None,
    arena: Tensor,
    first_rows: Tensor,
    combined: Tensor | None,
    dense_weights: Sequence[Tensor],
    dense_biases: Sequence[Tensor],
    over_weights: Sequence[Tensor],
    over_biases: Sequence[Tensor],
    dot: bool,
    itself: bool,
    part_rows: int,
) -> Tensor:
    """Return the logits, (B,), of a model.

    Args:
        dense_features: (B, number of dense features).
        ids: See ``embed_interact``, as of the next five.
        offsets: Likewise.
        weights: Likewise.
        arena: Likewise.
        first_rows: Likewise.
        combined: Likewise.
        dense_weights: Of the layers that the dense features go through, each with ReLU.
        dense_biases: Likewise.
        over_weights: Of those that the interactions go through, all but the last with ReLU.
        over_biases: Likewise.
        dot: Whether vectors meet in products; else they go on side by side.
        itself: Whether each vector's product with itself is included.
        part_rows: How many rows the kernel takes at a time, which makes no difference.
    """
    rows = len(dense_features)
    slots = 1 + len(first_rows) + (0 if combined is None else len(combined))
    outputs = [torch.empty(1, len(weight), rows) for weight in dense_weights]
    x = panels_of(dense_features, rows)
    mlp_forward(x, rows, dense_weights, dense_biases, True, outputs, [])
    joined = torch.empty(1, slots * arena.shape[1], rows)
    interactions = torch.empty(1, over_weights[0].shape[1], rows) if dot else None
    embed_interact(
        outputs[-1],
        arena,
        first_rows,
        ids,
        offsets,
        weights,
        combined,
        rows,
        itself,
        joined,
        interactions,
    )
    outputs = [torch.empty(1, len(weight), rows) for weight in over_weights]
    x = joined if interactions is None else interactions
    mlp_forward(x, rows, over_weights, over_biases, False, outputs, [])
    return outputs[-1].view(-1)


def _occurrences(
    first_rows: Tensor, ids: Tensor, offsets: Tensor | None, rows: int
) -> tuple[Tensor, Tensor]:
    """Return of every id its row of the arena, and its bag b * F + f."""
    bags = torch.arange(rows * len(first_rows))
    if offsets is not None:
        bags = bags.repeat_interleave(offsets.diff())
    return first_rows[bags % len(first_rows)] + ids.reshape(-1), bags
