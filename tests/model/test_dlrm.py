import numpy as np
import pytest
import torch
from torch import nn

from dlrm.config import ModelConfig
from dlrm.data.batch import Batch
from dlrm.errors import UserError
from dlrm.model.dlrm import DLRM, initialize
from dlrm.model.interaction import InteractionArch
from dlrm.schema import DenseFeature, FeatureSchema, SparseFeature


def schema_of(num_dense: int, num_embeddings: tuple[int, ...]) -> FeatureSchema:
    return FeatureSchema(
        label="label",
        dense=tuple(DenseFeature(f"int_{i}") for i in range(num_dense)),
        sparse=tuple(SparseFeature(f"cat_{i}", n) for i, n in enumerate(num_embeddings)),
        source_format="test",
        split_rule="none",
    )


def small_model(**changes: object) -> DLRM:
    config = ModelConfig(
        **{  # type: ignore[arg-type]
            "embedding_dim": 4,
            "dense_arch_layer_sizes": (6, 4),
            "over_arch_layer_sizes": (5, 1),
            **changes,
        }
    )
    model = DLRM(schema_of(3, (7, 2, 5)), config)
    initialize(model, np.random.RandomState(0))
    return model


def small_batch(rows: int = 6) -> Batch:
    generator = torch.Generator().manual_seed(1)
    ids = torch.stack([torch.randint(0, n, (rows,), generator=generator) for n in (7, 2, 5)], dim=1)
    return Batch(torch.rand(rows, 3, generator=generator), ids, None)


def test_what_a_model_computes_with_follows_it_to_its_device(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    moved: list[tuple[set[str], torch.device]] = []

    def to(module: nn.Module, device: torch.device) -> nn.Module:
        moved.append(({name for name, _ in module.named_buffers()}, device))
        return module

    monkeypatch.setattr(nn.Module, "to", to)
    schema = schema_of(3, (7, 2, 5))
    config = ModelConfig(embedding_dim=4, dense_arch_layer_sizes=(4,), over_arch_layer_sizes=(1,))
    device = torch.device("cpu")
    DLRM(schema, config, device)
    assert moved == [({"sparse_arch.first_rows", "interaction_arch.pairs"}, device)]
    DLRM(schema, config, torch.device("meta"))  # where values would be lost
    assert len(moved) == 1


def test_dot_takes_the_strictly_lower_triangle_row_by_row() -> None:
    interaction = InteractionArch(num_sparse_features=2, embedding_dim=2, interaction="dot")
    dense = torch.tensor([[1.0, 2.0]])
    embeddings = torch.tensor([[[3.0, 4.0], [5.0, 6.0]]])
    # Vectors x=(1,2), a=(3,4), b=(5,6): x, then a·x, b·x, b·a.
    assert interaction(dense, embeddings).tolist() == [[1, 2, 11, 17, 39]]
    assert interaction.out_features == 5


def test_dot_with_itself_includes_the_diagonal() -> None:
    interaction = InteractionArch(2, 2, "dot", itself=True)
    dense = torch.tensor([[1.0, 2.0]])
    embeddings = torch.tensor([[[3.0, 4.0], [5.0, 6.0]]])
    # x, then x·x, a·x, a·a, b·x, b·a, b·b.
    assert interaction(dense, embeddings).tolist() == [[1, 2, 5, 11, 25, 17, 39, 61]]
    assert interaction.out_features == 8


def test_cat_concatenates() -> None:
    interaction = InteractionArch(2, 2, "cat")
    dense = torch.tensor([[1.0, 2.0]])
    embeddings = torch.tensor([[[3.0, 4.0], [5.0, 6.0]]])
    assert interaction(dense, embeddings).tolist() == [[1, 2, 3, 4, 5, 6]]
    assert interaction.out_features == 6


@pytest.mark.parametrize("changes", [{}, {"interaction": "cat"}, {"interaction_itself": True}])
def test_forward_equals_a_loop_over_rows_and_tables(changes: dict[str, object]) -> None:
    model, batch = small_model(**changes), small_batch()
    state = model.state_dict()
    expected = []
    for dense, ids in zip(batch.dense_features, batch.sparse_features, strict=True):
        vector = dense
        for layer in (0, 2):
            weight = state[f"dense_arch.layers.{layer}.weight"]
            vector = (weight @ vector + state[f"dense_arch.layers.{layer}.bias"]).clamp(min=0)
        vectors = [vector] + [
            state[f"sparse_arch.embedding_bags.t_cat_{table}.weight"][row]
            for table, row in enumerate(ids.tolist())
        ]
        if changes.get("interaction") == "cat":
            features = torch.cat(vectors)
        else:
            upto = 1 if changes.get("interaction_itself") else 0
            products = [
                vectors[i] @ vectors[j] for i in range(len(vectors)) for j in range(i + upto)
            ]
            features = torch.cat([vector, torch.stack(products)])
        hidden = state["over_arch.layers.0.weight"] @ features + state["over_arch.layers.0.bias"]
        logit = state["over_arch.layers.2.weight"] @ hidden.clamp(min=0)
        expected.append((logit + state["over_arch.layers.2.bias"]).item())
    torch.testing.assert_close(model(batch).tolist(), expected)


def test_bags_are_summed_and_an_empty_bag_is_a_zero_vector() -> None:
    model = small_model()
    tables = model.sparse_arch.split(model.sparse_arch.arena.detach())
    # Row 0: [1, 3], [], [4]; row 1: [], [1, 1, 0], [].
    ids = torch.tensor([1, 3, 4, 1, 1, 0])
    offsets = torch.tensor([0, 2, 2, 3, 3, 6, 6])
    pooled = model.sparse_arch(ids, offsets)
    zero = torch.zeros(4)
    torch.testing.assert_close(
        pooled,
        torch.stack(
            [
                torch.stack([tables[0][1] + tables[0][3], zero, tables[2][4]]),
                torch.stack([zero, 2 * tables[1][1] + tables[1][0], zero]),
            ]
        ),
    )


def test_one_id_a_bag_gives_the_same_with_and_without_offsets() -> None:
    model, batch = small_model(), small_batch()
    offsets = torch.arange(batch.sparse_features.numel() + 1)
    torch.testing.assert_close(
        model.sparse_arch(batch.sparse_features.reshape(-1), offsets),
        model.sparse_arch(batch.sparse_features),
        rtol=0,
        atol=0,
    )


def test_the_gradient_of_the_tables_holds_the_rows_of_the_batch_alone() -> None:
    model, batch = small_model(), small_batch(2)
    model(batch).sum().backward()
    gradient = model.sparse_arch.arena.grad
    assert gradient is not None
    assert gradient.is_sparse
    rows = batch.sparse_features + torch.tensor([0, 7, 9])
    assert gradient._indices()[0].tolist() == rows.reshape(-1).tolist()


def test_state_dict_names_tables_as_torchrec_does_and_round_trips() -> None:
    model, other = small_model(), small_model()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    state = model.state_dict()
    assert [name for name in state if "embedding" in name] == [
        f"sparse_arch.embedding_bags.t_cat_{i}.weight" for i in range(3)
    ]
    assert [tuple(state[name].shape) for name in state if "embedding" in name] == [
        (7, 4),
        (2, 4),
        (5, 4),
    ]
    other.load_state_dict(state)
    batch = small_batch()
    assert torch.equal(model(batch), other(batch))


def test_load_state_dict_refuses_missing_unexpected_and_misshapen_tables() -> None:
    model = small_model()
    name = "sparse_arch.embedding_bags.t_cat_1.weight"
    missing = dict(model.state_dict())
    del missing[name]
    with pytest.raises(RuntimeError, match=r"Missing key.*t_cat_1"):
        model.load_state_dict(missing)
    extra = {"sparse_arch.embedding_bags.t_cat_9.weight": torch.zeros(1)}
    with pytest.raises(RuntimeError, match=r"Unexpected key.*t_cat_9"):
        model.load_state_dict({**model.state_dict(), **extra})
    with pytest.raises(RuntimeError, match=r"t_cat_1.*\(3, 4\); expected \(2, 4\)"):
        model.load_state_dict({**model.state_dict(), name: torch.zeros(3, 4)})


def test_initial_weights_are_drawn_in_the_references_order() -> None:
    model = small_model()
    draws = np.random.RandomState(0)
    state = model.state_dict()
    for table, rows in enumerate((7, 2, 5)):
        bound = np.sqrt(1 / rows)
        expected = draws.uniform(-bound, bound, (rows, 4)).astype(np.float32)
        name = f"sparse_arch.embedding_bags.t_cat_{table}.weight"
        assert np.array_equal(state[name].numpy(), expected)
    # 4 vectors of width 4: the dense one and 6 products go into the over arch.
    for name, (out_features, in_features) in {
        "dense_arch.layers.0": (6, 3),
        "dense_arch.layers.2": (4, 6),
        "over_arch.layers.0": (5, 10),
        "over_arch.layers.2": (1, 5),
    }.items():
        weight = draws.normal(
            0, np.sqrt(2 / (in_features + out_features)), (out_features, in_features)
        )
        bias = draws.normal(0, np.sqrt(1 / out_features), out_features)
        assert np.array_equal(state[f"{name}.weight"].numpy(), weight.astype(np.float32))
        assert np.array_equal(state[f"{name}.bias"].numpy(), bias.astype(np.float32))


def test_large_tables_drawn_in_parts_equal_one_draw(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dlrm.model.dlrm._DRAWN_VALUES", 9)  # two rows of four at a time
    parts = small_model().state_dict()
    monkeypatch.undo()
    whole = small_model().state_dict()
    assert all(torch.equal(parts[name], whole[name]) for name in whole)


def test_dropout_acts_on_hidden_activations_in_training_only() -> None:
    model, batch = small_model(dropout=0.5), small_batch()
    plain = small_model()
    model.eval()
    assert torch.equal(model(batch), plain(batch))
    model.train()
    torch.manual_seed(0)
    dropped = model(batch)
    torch.manual_seed(0)
    features = plain.interaction_arch(
        plain.dense_arch(batch.dense_features), plain.sparse_arch(batch.sparse_features)
    )
    first, relu, last = plain.over_arch.layers
    expected = last(nn.functional.dropout(relu(first(features)), 0.5)).squeeze(1)
    assert torch.equal(dropped, expected)
    assert not torch.equal(dropped, plain(batch))


def test_a_schema_without_dense_or_sparse_features_is_refused() -> None:
    with pytest.raises(UserError, match="0 dense and 1 sparse"):
        DLRM(schema_of(0, (3,)), ModelConfig())
    with pytest.raises(UserError, match="1 dense and 0 sparse"):
        DLRM(schema_of(1, ()), ModelConfig())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dense_arch_layer_sizes": (6, 3)}, "must equal --embedding-dim.*got 3 and 4"),
        ({"over_arch_layer_sizes": (5, 2)}, "must be 1, the logit; got 2"),
        ({"dense_arch_layer_sizes": ()}, "at least one layer"),
        ({"over_arch_layer_sizes": (0, 1)}, "must be positive"),
        ({"dropout": 1.0}, r"in \[0, 1\); got 1.0"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        small_model(**changes)
