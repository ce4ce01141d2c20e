from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from dlrm.ops import plain
from dlrm.ops.library import library

INSTRUCTION_SETS = torch.ops.dlrm.instruction_sets() if library().loaded else []
TABLES = (7, 2, 500, 1)


@pytest.fixture(autouse=True, params=INSTRUCTION_SETS)
def width(request: pytest.FixtureRequest) -> Iterator[int]:
    """Rows in a panel, under each of this processor's instruction sets."""
    torch.ops.dlrm.use_instruction_set(request.param)
    torch.manual_seed(1)
    yield torch.ops.dlrm.panel_rows()
    torch.ops.dlrm.use_instruction_set(INSTRUCTION_SETS[0])


_opchecked: set[tuple[Any, ...]] = set()


def tensors_of(*arguments: Any) -> list[Tensor]:
    """Those of the arguments, and of lists among them."""
    lists = [each if isinstance(each, list) else [each] for each in arguments]
    return [each for some in lists for each in some if isinstance(each, Tensor)]


def compare(name: str, *arguments: Any) -> None:
    """The kernel writes and returns what its twin does, and says truly what it writes."""
    operator = getattr(torch.ops.dlrm, name)
    expected = copy.deepcopy(arguments)
    found = copy.deepcopy(arguments)
    returned = operator(*found)
    specified = getattr(plain, name)(*expected)
    for ours, theirs in zip(
        tensors_of(returned, *found), tensors_of(specified, *expected), strict=True
    ):
        largest = float(theirs.abs().max()) if theirs.numel() else 0
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5 * largest + 1e-12)
    # Slow, and about what is written and traced, whatever the shapes: once for each kind of call.
    call = (
        name,
        *(
            argument is None or argument == []
            for argument in arguments
            if not isinstance(argument, Tensor)
        ),
    )
    if call not in _opchecked:
        _opchecked.add(call)
        torch.library.opcheck(operator.default, arguments)


def panels(rows: int, features: int, width: int) -> Tensor:
    return plain.panels_of(torch.randn(rows, features), width)


def empty_panels(rows: int, features: int, width: int) -> Tensor:
    """Room for panels; what is not written stays not-a-number."""
    return torch.full_like(panels(rows, features, width), float("nan"))


def full_rows(rows: int, width: int) -> int:
    return -(-rows // width) * width


def columns(rows: int, features: int, width: int) -> Tensor:
    return plain.columns_of(torch.randn(full_rows(rows, width), features), width)


@pytest.mark.parametrize("rows", [1, 15, 16, 17, 100])
@pytest.mark.parametrize("features", [1, 13, 64])
def test_to_panels(rows: int, features: int, width: int) -> None:
    compare("to_panels", torch.randn(rows, features), empty_panels(rows, features, width))


def mlp(*sizes: int) -> tuple[list[Tensor], list[Tensor]]:
    pairs = list(zip(sizes[1:], sizes[:-1], strict=True))
    return [torch.randn(pair) / pair[1] ** 0.5 for pair in pairs], [
        torch.randn(out) for out, _ in pairs
    ]


SIZES = [(1, 1), (3, 5, 1), (13, 64, 17, 16), (367, 50, 49, 1)]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("rows", [1, 5, 40, 300])
def test_mlp_forward(sizes: tuple[int, ...], rows: int, width: int) -> None:
    weights, biases = mlp(*sizes)
    x = plain.panels_of(torch.randn(full_rows(rows, width), sizes[0]), width)
    outputs = [empty_panels(rows, size, width) for size in sizes[1:]]
    transposed = [torch.full_like(columns(rows, size, width), float("nan")) for size in sizes[:-1]]
    for relu_last in (False, True):
        compare(
            "mlp_forward",
            *(x, full_rows(rows, width), weights, biases, relu_last, outputs, transposed),
        )


def test_a_layer_without_inputs_gives_its_bias(width: int) -> None:
    bias, output = torch.tensor([3.0, -2.0]), empty_panels(5, 2, width)
    nothing = torch.empty(len(output), 0, width)
    torch.ops.dlrm.mlp_forward(nothing, 5, [torch.zeros(2, 0)], [bias], False, [output], [])
    assert torch.equal(plain.rows_of(output)[:5], bias.expand(5, 2))


def test_a_row_has_the_same_outputs_alone_and_among_others(width: int) -> None:
    sizes = (13, 64, 100, 1)
    weights, biases = mlp(*sizes)
    every = torch.randn(100, 13)

    def last(some: Tensor) -> Tensor:
        outputs = [empty_panels(len(some), size, width) for size in sizes[1:]]
        x = plain.panels_of(some, width)
        torch.ops.dlrm.mlp_forward(x, len(some), weights, biases, False, outputs, [])
        return plain.rows_of(outputs[-1])[: len(some)]

    among_others = last(every)
    for rows in range(1, 101):
        assert torch.equal(last(every[:rows]), among_others[:rows]), rows


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("rows", [1, 40, 300])
def test_mlp_backward(sizes: tuple[int, ...], rows: int, width: int) -> None:
    weights, biases = mlp(*sizes)
    inputs = [panels(rows, size, width).relu() for size in sizes[:-1]]
    gradients = [empty_panels(rows, size, width) for size in sizes[1:-1]]
    gradients.append(panels(rows, sizes[-1], width))
    for to in (empty_panels(rows, sizes[0], width), None):
        compare("mlp_backward", weights, biases, inputs, gradients, to)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("rule", [plain.SGD, plain.ADAGRAD, plain.ROWWISE_ADAGRAD])
@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("last", [False, True])
def test_mlp_update(sizes: tuple[int, ...], rule: int, first: bool, last: bool, width: int) -> None:
    weights, biases = mlp(*sizes)
    compare(
        "mlp_update",
        [columns(40, size, width) for size in sizes[:-1]],
        [panels(40, size, width) for size in sizes[1:]],
        weights,
        biases,
        [] if rule == plain.SGD else [torch.rand_like(weight) for weight in weights],
        [] if rule == plain.SGD else [torch.rand_like(bias) for bias in biases],
        [] if first and last else [torch.randn_like(weight) for weight in weights],
        [] if first and last else [torch.randn_like(bias) for bias in biases],
        *(rule, 0.1, 1e-10, first, last),
    )


def make_bags(rows: int, kind: str) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Ids (with repeats), offsets, weights."""
    lengths = torch.ones(rows * len(TABLES), dtype=torch.int64)
    if not kind.startswith("one id"):
        lengths = torch.tensor([0, 1, 2, 30])[torch.randint(0, 4, lengths.shape)]
    table = (torch.arange(len(lengths)) % len(TABLES)).repeat_interleave(lengths)
    ids = (torch.rand(len(table)) * torch.tensor(TABLES)[table]).long()
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    weights = torch.randn(len(ids)) if kind.endswith("weights") else None
    if kind.startswith("one id"):
        return ids.view(rows, -1), None, None if weights is None else weights.view(rows, -1)
    return ids, offsets, weights


bags = pytest.mark.parametrize(
    "kind", ["one id", "one id with weights", "bags", "bags with weights"]
)
FIRST_ROWS = torch.tensor([0, *TABLES[:-1]]).cumsum(0)
# The last two tables change the vectors of the first two: a sum and a product.
COMBINED = torch.tensor([[1, 0], [0, 1]])


@pytest.mark.parametrize("rows", [1, 40, 199, 200, 450])
@pytest.mark.parametrize(
    ("dot", "itself", "combined"),
    [
        (True, False, None),
        (True, True, None),
        (False, False, None),
        (True, False, COMBINED),
        (True, True, COMBINED),
    ],
)
@pytest.mark.parametrize("kind", ["one id", "bags", "bags with weights"])
def test_forward(
    rows: int, dot: bool, itself: bool, combined: Tensor | None, kind: str, width: int
) -> None:
    dim, count = 9, len(TABLES) + 1 - (0 if combined is None else len(combined))
    pairs = count * (count + 1) // 2 if itself else count * (count - 1) // 2
    dense, over = mlp(3, 20, dim), mlp(dim + pairs if dot else count * dim, 10, 1)
    arena = torch.randn(sum(TABLES), dim) / 10
    compare(
        "forward",
        *(torch.randn(rows, 3), *make_bags(rows, kind), arena, FIRST_ROWS, combined),
        *(*dense, *over, dot, itself, 200),
    )


@bags
@pytest.mark.parametrize("dim", [1, 3, 16, 17, 64, 128])
@pytest.mark.parametrize("itself", [False, True])
def test_embed_interact(kind: str, dim: int, itself: bool, width: int) -> None:
    vectors = len(TABLES) + 1
    pairs = vectors * (vectors + 1) // 2 if itself else vectors * (vectors - 1) // 2
    arena = torch.randn(sum(TABLES), dim)
    for rows in (1, 37):
        dense = panels(rows, dim, width)
        for out in (empty_panels(rows, dim + pairs, width), None):
            compare(
                "embed_interact",
                *(dense, arena, FIRST_ROWS, *make_bags(rows, kind), None, rows, itself),
                *(empty_panels(rows, vectors * dim, width), out),
            )
        pairs_left = 6 if itself else 3  # of the dense vector and two features'
        compare(
            "embed_interact",
            *(dense, arena, FIRST_ROWS, *make_bags(rows, kind), COMBINED, rows, itself),
            empty_panels(rows, (vectors + len(COMBINED)) * dim, width),
            empty_panels(rows, dim + pairs_left, width),
        )


@pytest.mark.parametrize("dim", [1, 3, 16, 17, 64, 128])
@pytest.mark.parametrize("dot", [False, True])
@pytest.mark.parametrize("itself", [False, True])
def test_embed_interact_backward(dim: int, dot: bool, itself: bool, width: int) -> None:
    vectors, rows = len(TABLES) + 1, 37
    pairs = vectors * (vectors + 1) // 2 if itself else vectors * (vectors - 1) // 2
    compare(
        "embed_interact_backward",
        panels(rows, vectors * dim, width),
        panels(rows, dim + pairs if dot else vectors * dim, width),
        *(rows, len(TABLES), None, dot, itself, 5),
        empty_panels(rows, dim, width),
        torch.zeros(len(TABLES), rows + 9, dim),
    )
    if dot:
        compare(
            "embed_interact_backward",
            panels(rows, (vectors + len(COMBINED)) * dim, width),
            panels(rows, dim + (6 if itself else 3), width),
            *(rows, len(TABLES), COMBINED, dot, itself, 5),
            empty_panels(rows, dim, width),
            torch.zeros(len(TABLES), rows + 9, dim),
        )


@bags
@pytest.mark.parametrize("dim", [1, 3, 16, 17, 64, 128])
@pytest.mark.parametrize("rule", [plain.SGD, plain.ADAGRAD, plain.ROWWISE_ADAGRAD])
def test_tables_update(kind: str, dim: int, rule: int) -> None:
    rows, arena = 37, torch.randn(sum(TABLES), dim)
    sums = {
        plain.SGD: None,
        plain.ADAGRAD: torch.rand(arena.shape),
        plain.ROWWISE_ADAGRAD: torch.rand(len(arena)),
    }[rule]
    compare(
        "tables_update",
        torch.randn(len(TABLES), rows, dim),
        *(FIRST_ROWS, *make_bags(rows, kind), rule, 0.1, 1e-10, arena, sums),
    )


@pytest.mark.parametrize("kind", [plain.CROSS_ENTROPY, plain.SQUARED_ERROR])
@pytest.mark.parametrize("threshold", [0.0, 0.3])
@pytest.mark.parametrize("rows", [1, 37, 200])
def test_loss_gradient(kind: int, threshold: float, rows: int, width: int) -> None:
    labels = torch.randint(0, 2, (rows,)).float()
    for logits in (panels(rows, 1, width), 30 * panels(rows, 1, width)):
        compare(
            "loss_gradient",
            *(logits, labels, kind, 0.3, 1.7, threshold, 1 / rows),
            torch.full_like(logits, float("nan")),
        )


def test_arguments_that_do_not_fit_are_refused(width: int) -> None:
    with pytest.raises(RuntimeError, match=r"panels must be contiguous, Float, of shape"):
        torch.ops.dlrm.to_panels(torch.zeros(3, 2), torch.zeros(1, 3, width))
    with pytest.raises(RuntimeError, match=r"ids must be contiguous, Long, of shape \[3, 4\]"):
        torch.ops.dlrm.tables_update(
            torch.zeros(4, 3, 2),
            *(FIRST_ROWS, torch.zeros(3, 3, dtype=torch.int64), None, None),
            *(plain.SGD, 0.1, 1e-10, torch.zeros(sum(TABLES), 2), None),
        )
    for combined, message in (
        (torch.tensor([[4, 1]]), "a combined feature is out of range"),
        (torch.zeros(5, 2, dtype=torch.int64), "more vectors are combined than there are tables"),
        (torch.zeros(1, 3, dtype=torch.int64), r"combined must be .*, of shape \[1, 2\]"),
        (COMBINED, "combined vectors need interactions"),
    ):
        with pytest.raises(RuntimeError, match=message):
            torch.ops.dlrm.embed_interact(
                *(panels(1, 2, width), torch.zeros(sum(TABLES), 2), FIRST_ROWS),
                *(*make_bags(1, "one id"), combined, 1, False),
                *(panels(1, 14, width), None),
            )
    weights, biases = mlp(3, 4, 1)
    x, outputs = panels(3, 3, width), [empty_panels(3, 4, width), empty_panels(3, 1, width)]
    with pytest.raises(RuntimeError, match=f"x has 1 panels for {width + 1} rows"):
        torch.ops.dlrm.mlp_forward(x, width + 1, weights, biases, True, outputs, [])
    inputs = [columns(3, 3, width), columns(3, 4, width)]
    for gradients, rule, last, message in (
        (outputs[:1], plain.SGD, True, "as many columns and gradients as layers"),
        (outputs, plain.ADAGRAD, True, "sums are missing"),
        (outputs, plain.SGD, False, "gradients to carry"),
        (outputs, 3, True, "there is no rule 3"),
    ):
        with pytest.raises(RuntimeError, match=message):
            torch.ops.dlrm.mlp_update(
                *(inputs, gradients, weights, biases, [], [], [], [], rule, 0.1, 1e-10, True, last)
            )
    with pytest.raises(RuntimeError, match="there is no loss 2"):
        torch.ops.dlrm.loss_gradient(
            outputs[1], torch.zeros(3), 2, 1.0, 1.0, 0.0, 1.0, empty_panels(3, 1, width)
        )
