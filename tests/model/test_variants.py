"""Quotient-remainder tables, mixed dimensions and weighted pooling."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dlrm.config import (
    ModelConfig,
    TableConfig,
    TrainConfig,
    read_config,
    read_table,
    table_text,
    write_config,
)
from dlrm.data.batch import Batch
from dlrm.errors import UserError
from dlrm.model.dlrm import DLRM, initialize
from dlrm.model.embedding import SparseArch
from dlrm.model.native import NativeForward, supports
from dlrm.model.variants import (
    VariantSparseArch,
    larger_than_whole,
    mixed_dimensions,
    resolve_tables,
)
from dlrm.schema import DenseFeature, FeatureSchema, SparseFeature

# Every kind of table, of so many ids.
ROWS = {"whole": 7, "mult": 5, "add": 6, "concat": 5, "md": 8, "learned": 3, "fixed": 4}
TABLES = (
    TableConfig("mult", "qr", "mult", 2, "reference"),
    TableConfig("add", "qr", "add", 4),
    TableConfig("concat", "qr", "concat", 3),
    TableConfig("md", "md", md_dim=2, weighted_pooling="learned"),
    TableConfig("learned", weighted_pooling="learned"),
    TableConfig("fixed", weighted_pooling="fixed"),
)
BY_NAME = {table.name: table for table in TABLES}


def make_model(names: list[str], **changes: Any) -> DLRM:
    """A model with vectors of 4; its weights are drawn, those of pooling random too."""
    schema = schema_of({name: ROWS[name] for name in names})
    sizes = {"dense_arch_layer_sizes": (6, 4), "over_arch_layer_sizes": (5, 1)}
    tables = tuple(BY_NAME[name] for name in names if name in BY_NAME)
    config = ModelConfig(**{"embedding_dim": 4, "tables": tables, **sizes, **changes})
    model = DLRM(schema, config)
    generator = torch.Generator().manual_seed(1)
    initialize(model, np.random.RandomState(1), generator)
    with torch.no_grad():
        for name, table in model.sparse_arch.tables().items():
            if name.startswith("pooling_weights"):
                table.uniform_(0.5, 1.5, generator=generator)
    return model


def schema_of(rows: dict[str, int]) -> FeatureSchema:
    return FeatureSchema(
        label="label",
        dense=tuple(DenseFeature(f"int_{i}") for i in range(3)),
        sparse=tuple(SparseFeature(name, n) for name, n in rows.items()),
        source_format="test",
        split_rule="none",
    )


def make_bags(model: DLRM, rows: int, seed: int = 1) -> Batch:
    """Bags of 0 to 3 ids."""
    generator = torch.Generator().manual_seed(seed)
    limits = torch.tensor([ROWS[table.name] for table in model.tables])
    lengths = torch.randint(0, 4, (rows * len(limits),), generator=generator)
    feature = (torch.arange(len(lengths)) % len(limits)).repeat_interleave(lengths)
    ids = (torch.rand(len(feature), generator=generator) * limits[feature]).long()
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    dense = torch.rand(rows, 3, generator=generator)
    return Batch(dense, ids, torch.arange(rows) % 2 / 1.0, offsets)


def by_hand(model: DLRM, feature: TableConfig, ids: list[int]) -> Tensor:
    """The vector of one bag, from the tensors of the state dict, id by id."""
    state = {name.removeprefix("sparse_arch."): t for name, t in model.state_dict().items()}

    def table(suffix: str) -> Tensor:
        return state[f"embedding_bags.t_{feature.name}{suffix}.weight"]

    if feature.variant == "qr":
        c = feature.qr_collisions
        quotient = sum((table("_quotient")[i // c] for i in ids), torch.zeros(()))
        remainder = sum((table("_remainder")[i % c] for i in ids), torch.zeros(()))
        if not ids:
            return torch.zeros(4)
        if feature.qr_operation == "concat":
            return torch.cat([quotient, remainder])
        return quotient * remainder if feature.qr_operation == "mult" else quotient + remainder
    weights = state.get(f"pooling_weights.t_{feature.name}", torch.ones(100))
    dim = feature.md_dim if feature.variant == "md" else 4
    summed = sum((weights[i] * table("")[i] for i in ids), torch.zeros(dim))
    if feature.variant == "md":
        return state[f"projections.t_{feature.name}.weight"] @ summed
    return summed


@pytest.mark.parametrize(
    "names",
    [["whole", "mult"], ["add", "whole"], ["concat"], ["md"], ["learned", "fixed"], [*ROWS]],
)
def test_a_bags_vector_by_hand(names: list[str]) -> None:
    model = make_model(names)
    batch = make_bags(model, 20)
    assert batch.offsets is not None
    bounds = batch.offsets.tolist()
    bags = [batch.sparse_features[a:b].tolist() for a, b in itertools.pairwise(bounds)]
    expected = [
        by_hand(model, model.tables[number % len(names)], bag) for number, bag in enumerate(bags)
    ]
    found = model.sparse_arch(batch.sparse_features, batch.offsets)
    torch.testing.assert_close(found, torch.stack(expected).view(20, len(names), 4))
    assert found[0].isfinite().all()


def test_one_id_a_bag_gives_the_same_with_and_without_offsets() -> None:
    model = make_model([*ROWS])
    ids = torch.stack([torch.arange(20) % n for n in ROWS.values()], 1)
    torch.testing.assert_close(
        model.sparse_arch(ids.view(-1), torch.arange(ids.numel() + 1)), model.sparse_arch(ids)
    )


def test_numbers_worked_out_on_paper() -> None:
    config = ModelConfig(
        embedding_dim=2,
        dense_arch_layer_sizes=(2,),
        over_arch_layer_sizes=(1,),
        tables=(
            TableConfig("mult", "qr", "mult", 2),
            TableConfig("add", "qr", "add", 2),
            TableConfig("concat", "qr", "concat", 2),
            TableConfig("md", "md", md_dim=1),
            TableConfig("weighed", weighted_pooling="learned"),
        ),
    )
    rows = dict.fromkeys(("mult", "add", "concat", "md", "weighed"), 3)
    sparse_arch = DLRM(schema_of(rows), config).sparse_arch
    state = {
        **{
            f"embedding_bags.t_{name}_{part}.weight": torch.tensor(values)
            for name in ("mult", "add")
            for part, values in (
                ("quotient", [[1.0, 2.0], [3.0, 5.0]]),
                ("remainder", [[7.0, 11.0], [13.0, 17.0]]),
            )
        },
        "embedding_bags.t_concat_quotient.weight": torch.tensor([[1.0], [2.0]]),
        "embedding_bags.t_concat_remainder.weight": torch.tensor([[3.0], [4.0]]),
        "embedding_bags.t_md.weight": torch.tensor([[1.0], [2.0], [3.0]]),
        "projections.t_md.weight": torch.tensor([[10.0], [-1.0]]),
        "embedding_bags.t_weighed.weight": torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]),
        "pooling_weights.t_weighed": torch.tensor([2.0, 3.0, 0.5]),
    }
    sparse_arch.load_state_dict(state)
    assert sparse_arch(torch.tensor([[2, 1, 2, 2, 2]])).tolist() == [
        # 2 is row 1 of the quotients and 0 of the remainders; 1 is row 0 and 1.
        [[21, 55], [14, 19], [2, 3], [30, -3], [0.5, 0.5]]
    ]
    ids, offsets = torch.tensor([1, 2, 1, 2, 1, 2, 1, 2, 1, 2]), torch.arange(0, 11, 2)
    assert sparse_arch(ids, offsets).tolist() == [
        # Quotients (4, 7), remainders (20, 28); the product is of the sums.
        [[80, 196], [24, 35], [3, 7], [50, -5], [0.5, 3.5]]
    ]


def test_gradients_are_those_of_one_function() -> None:
    """Autograd's, through everything at once, beside finite differences."""
    model = make_model([*ROWS]).double()
    batch = make_bags(model, 8)
    arena = [each.arena for each in model.sparse_arch.arenas]
    weights = [*arena, *model.sparse_arch.projections.parameters()]
    for weight in weights:
        weight.grad = None
    down = torch.rand(8, len(ROWS), 4, dtype=torch.float64)

    def value() -> Tensor:
        return (down * model.sparse_arch(batch.sparse_features, batch.offsets)).sum()

    value().backward()
    for weight in weights:
        assert weight.grad is not None
        gradient = weight.grad.to_dense()
        for place in np.ndindex(*weight.shape):
            with torch.no_grad():
                weight[place] += 1e-6
                above = value()
                weight[place] -= 2e-6
                below = value()
                weight[place] += 1e-6
            assert float(gradient[place]) == pytest.approx(float(above - below) / 2e-6, abs=1e-6)


def test_names_in_the_state_dict() -> None:
    model = make_model([*ROWS])
    state = {
        name.removeprefix("sparse_arch."): tuple(tensor.shape)
        for name, tensor in model.state_dict().items()
        if name.startswith("sparse_arch.")
    }
    assert state == {
        "embedding_bags.t_whole.weight": (7, 4),
        "embedding_bags.t_mult_quotient.weight": (3, 4),
        "embedding_bags.t_mult_remainder.weight": (2, 4),
        "embedding_bags.t_add_quotient.weight": (2, 4),
        "embedding_bags.t_add_remainder.weight": (4, 4),
        "embedding_bags.t_concat_quotient.weight": (2, 2),
        "embedding_bags.t_concat_remainder.weight": (3, 2),
        "embedding_bags.t_md.weight": (8, 2),
        "embedding_bags.t_learned.weight": (3, 4),
        "embedding_bags.t_fixed.weight": (4, 4),
        "projections.t_md.weight": (4, 2),
        "pooling_weights.t_md": (8,),
        "pooling_weights.t_learned": (3,),
        "pooling_weights.t_fixed": (4,),
    }
    numbers = sum(int(np.prod(shape)) for shape in state.values())
    assert model.sparse_arch.table_bytes == 4 * numbers


def test_a_state_dict_round_trips_and_a_foreign_one_is_refused() -> None:
    model, other = make_model([*ROWS]), make_model([*ROWS])
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    state = model.state_dict()
    other.load_state_dict(state)
    batch = make_bags(model, 9)
    assert torch.equal(model(batch), other(batch))
    name = "sparse_arch.embedding_bags.t_mult_quotient.weight"
    with pytest.raises(RuntimeError, match=r"Missing key.*t_mult_quotient"):
        other.load_state_dict({key: value for key, value in state.items() if key != name})
    with pytest.raises(RuntimeError, match=r"Unexpected key.*t_mult.weight"):
        other.load_state_dict({**state, "sparse_arch.embedding_bags.t_mult.weight": torch.ones(1)})
    with pytest.raises(RuntimeError, match=r"t_mult_quotient.*\(1, 4\); expected \(3, 4\)"):
        other.load_state_dict({**state, name: torch.ones(1, 4)})


def test_tables_of_one_name_are_refused() -> None:
    config = ModelConfig(
        embedding_dim=16, tables=(TableConfig("a", "qr"), TableConfig("a_quotient"))
    )
    with pytest.raises(UserError, match="two embedding tables would be called a_quotient"):
        DLRM(schema_of({"a": 9, "a_quotient": 3}), config)
    config = ModelConfig(tables=(TableConfig("a.b", "md", md_dim=2),))
    with pytest.raises(UserError, match=r"a\.b cannot have mixed dimensions.*has a dot"):
        DLRM(schema_of({"a.b": 9}), config)


@pytest.mark.parametrize("at_once", [1 << 22, 32])
def test_initial_values_are_drawn_as_modules_of_the_reference_draw_them(
    monkeypatch: pytest.MonkeyPatch, at_once: int
) -> None:
    """PyTorch's generator is advanced by modules that are made and then overwritten."""
    monkeypatch.setattr("dlrm.model.dlrm._DRAWN_VALUES", at_once)
    rows = {"few": 50, "many": 401, "other": 300, "least": 11}
    config = ModelConfig(
        embedding_dim=8,
        dense_arch_layer_sizes=(8,),
        over_arch_layer_sizes=(1,),
        tables=(
            TableConfig("many", "qr", "mult", 3, "reference"),
            TableConfig("other", "md", md_dim=3),
            TableConfig("least", "md", md_dim=8),
        ),
    )
    model = DLRM(schema_of(rows), config)
    initialize(model, np.random.RandomState(5), torch.Generator().manual_seed(5))
    state = {name.removeprefix("sparse_arch."): t for name, t in model.state_dict().items()}

    draws = np.random.RandomState(5)
    expected: dict[str, Tensor] = {}

    def uniform(name: str, n: int, dim: int) -> None:
        values = draws.uniform(-np.sqrt(1 / n), np.sqrt(1 / n), (n, dim)).astype(np.float32)
        expected[f"embedding_bags.t_{name}.weight"] = torch.from_numpy(values)

    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(5)
        nn.EmbeddingBag(50, 8)
        uniform("few", 50, 8)
        for part, n in (("quotient", 134), ("remainder", 3)):
            drawn = torch.empty(n, 8).uniform_(np.sqrt(1 / 401), 1)
            expected[f"embedding_bags.t_many_{part}.weight"] = drawn
        nn.init.xavier_uniform_(nn.EmbeddingBag(300, 3).weight)
        projection = nn.Linear(3, 8, bias=False).weight
        expected["projections.t_other.weight"] = nn.init.xavier_uniform_(projection)
        uniform("other", 300, 3)
        nn.init.xavier_uniform_(nn.EmbeddingBag(11, 8).weight)
        uniform("least", 11, 8)
    assert all(torch.equal(state[name], value) for name, value in expected.items())
    assert len(expected) == 6


@pytest.mark.parametrize("operation", ["mult", "add", "concat"])
def test_small_initial_values_make_the_vectors_of_a_whole_table(operation: Any) -> None:
    config = ModelConfig(
        embedding_variant="qr", qr_threshold=0, qr_operation=operation, qr_collisions=40
    )
    model = DLRM(schema_of({"a": 4000}), config)
    initialize(model, np.random.RandomState(1))
    with torch.no_grad():
        vectors = model.sparse_arch(torch.arange(4000).view(-1, 1))
    bound = (1 / 4000) ** 0.5
    assert vectors.mean().item() == pytest.approx(0, abs=0.05 * bound)
    assert vectors.std().item() == pytest.approx(bound / 3**0.5, rel=0.05)
    assert vectors.abs().max().item() <= bound * (2**0.5 if operation == "add" else 1)


def test_pooling_weights_are_1_at_first() -> None:
    model = make_model(["learned", "fixed"])
    initialize(model, np.random.RandomState(1))
    batch = make_bags(model, 9)
    plain = SparseArch(["learned", "fixed"], (3, 4), 4)
    plain.load_state_dict(
        {
            name.removeprefix("sparse_arch."): tensor
            for name, tensor in model.state_dict().items()
            if "embedding_bags" in name
        }
    )
    torch.testing.assert_close(
        model.sparse_arch(batch.sparse_features, batch.offsets),
        plain(batch.sparse_features, batch.offsets),
        rtol=0,
        atol=0,
    )


@pytest.mark.parametrize("variant", ["full", "qr", "md"])
def test_tables_above_the_threshold_are_stored_so(variant: Any) -> None:
    options = {
        "qr": {
            "qr_threshold": 9,
            "qr_operation": "add",
            "qr_collisions": 3,
            "qr_initial_values": "reference",
        },
        "md": {"md_threshold": 9, "md_temperature": 0.5},
        "full": {},
    }[variant]
    config = ModelConfig(
        embedding_variant=variant, tables=(TableConfig("d", "md", md_dim=5),), **options
    )
    schema = schema_of({"a": 9, "b": 10, "c": 36, "d": 1000, "e": 4})
    found = {table.name: table for table in resolve_tables(schema, config)}
    large = {
        "full": [TableConfig("b"), TableConfig("c")],
        "qr": [TableConfig(name, "qr", "add", 3, "reference") for name in "bc"],
        # 16 * (4 / 10) ** 0.5 and 16 * (4 / 36) ** 0.5
        "md": [TableConfig("b", "md", md_dim=10), TableConfig("c", "md", md_dim=5)],
    }[variant]
    assert list(found) == list("abcde")
    assert [found["b"], found["c"]] == large
    assert found["d"] == config.tables[0]
    assert [found["a"], found["e"]] == [TableConfig("a"), TableConfig("e")]


def test_lengths_of_mixed_dimensions() -> None:
    # What the reference's md_solver gives.
    rows = [59, 79, 2444, 1911, 300, 8, 399]
    assert mixed_dimensions(rows, 8, 0.3, False) == [4, 4, 1, 2, 3, 8, 2]
    assert mixed_dimensions([10_131_227, 4, 633, 3], 16, 0.3, True) == [1, 16, 4, 16]
    assert mixed_dimensions([4, 16], 12, 0.0, True) == [12, 12]  # not 16


def test_a_feature_that_there_is_not_is_refused() -> None:
    config = ModelConfig(tables=(TableConfig("cat_11"),))
    with pytest.raises(UserError, match=r"no sparse feature 'cat_11'. Did you mean cat_1\?"):
        resolve_tables(schema_of({"cat_0": 3, "cat_1": 3}), config)
    with pytest.raises(UserError, match=r"no sparse feature 'cat_11'\. There are a, b"):
        resolve_tables(schema_of({"a": 3, "b": 3}), config)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"qr_operation": "add"}, "--qr-operation goes with --embedding-variant qr; got .* full"),
        ({"md_round_dims": True}, "--md-round-dims goes with --embedding-variant md"),
        ({"embedding_variant": "qr", "md_threshold": 3}, "--md-threshold goes with .* got .* qr"),
        ({"embedding_variant": "qr", "qr_collisions": 0}, "--qr-collisions must be in 1 … 2"),
        ({"embedding_variant": "qr", "qr_collisions": 2**31}, "--qr-collisions must be in 1 … 2"),
        ({"embedding_variant": "qr", "qr_threshold": -1}, "--qr-threshold must be in 0"),
        ({"embedding_variant": "md", "md_temperature": -1.0}, "--md-temperature must not be"),
        (
            {"embedding_variant": "qr", "weighted_pooling": "learned"},
            "--weighted-pooling learned does not go with --embedding-variant qr",
        ),
        (
            {
                "embedding_dim": 5,
                "dense_arch_layer_sizes": (5,),
                "tables": (TableConfig("a", "qr", "concat"),),
            },
            "--embedding-dim must be even .* got 5",
        ),
        ({"tables": (TableConfig("a"), TableConfig("a"))}, "--tables has a twice"),
        ({"tables": (TableConfig("a", "md", md_dim=17),)}, "must be at most .* got 17 and 16"),
    ],
)
def test_options_that_do_not_fit_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        ModelConfig(**changes)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "needs the name of a sparse feature first"),
        ("a,variant", "expected a sparse feature's name and then key=value"),
        ("a,variant=qr,variant=md", "each once"),
        ("a,collisions=3", "--tables has an unknown key collisions; did you mean qr_collisions?"),
        (
            "a,variant=hash",
            "value 'hash' - at `$.variant`; expected one of full, qr, md. Correct it",
        ),
        ("a,variant=md,md_dim=x", "--tables a,variant=md,md_dim=x: Expected `int`"),
        ("a,variant=md", "--tables a: variant=md needs md_dim, the length of its vectors; got 0"),
        ("a,md_dim=3", "--tables a: md_dim goes with variant=md; got variant=full"),
        ("a,qr_collisions=3", "--tables a: qr_collisions goes with variant=qr"),
        ("a,variant=qr,qr_collisions=0", "--tables a: qr_collisions must be in 1 … 2"),
        ("a,variant=qr,weighted_pooling=learned", "--tables a: weighted_pooling does not go with"),
    ],
)
def test_an_entry_that_means_nothing_is_refused(text: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        read_table(text)
    assert message in str(error.value)
    assert str(error.value).count("--tables") == 1


def test_entries_are_written_and_read_back(tmp_path: Path) -> None:
    assert [read_table(table_text(table)) for table in TABLES] == [*TABLES]
    assert table_text(TABLES[1]) == "add,variant=qr,qr_operation=add"
    config = TrainConfig(model=ModelConfig(tables=TABLES, embedding_variant="qr"))
    write_config(tmp_path / "config.toml", config, tmp_path)
    assert read_config(tmp_path / "config.toml")[0] == config
    by_hand = '[[model.tables]]\nname = "cat_2"\nvariant = "md"\nmd_dim = 4\n'
    (tmp_path / "mine.toml").write_text(by_hand)
    expected = TrainConfig(model=ModelConfig(tables=(TableConfig("cat_2", "md", md_dim=4),)))
    found, _ = read_config(tmp_path / "mine.toml")
    assert found == expected
    write_config(tmp_path / "again.toml", found, tmp_path)
    assert read_config(tmp_path / "again.toml")[0] == expected
    (tmp_path / "mine.toml").write_text(by_hand.replace("md_dim", "dim"))
    with pytest.raises(UserError, match=r"unknown key tables.dim; did you mean tables.md_dim"):
        read_config(tmp_path / "mine.toml")


def test_a_model_without_variants_is_the_plain_one() -> None:
    assert isinstance(make_model(["whole"]).sparse_arch, SparseArch)
    assert isinstance(make_model(["whole", "mult"]).sparse_arch, VariantSparseArch)
    # Thresholds that no table reaches change nothing.
    assert isinstance(make_model(["whole"], embedding_variant="qr").sparse_arch, SparseArch)


NATIVE = ["mult", "whole", "add", "learned", "fixed"]


@pytest.mark.parametrize("rows", [1, 17, 2049])
@torch.no_grad()
def test_native_logits_equal_the_models(rows: int) -> None:
    for names in (NATIVE, ["learned", "fixed", "whole"]):
        model = make_model(names)
        batch = make_bags(model, rows)
        ids = torch.stack([torch.arange(rows) % ROWS[name] for name in names], 1)
        for each in (batch, Batch(batch.dense_features, ids, None)):
            expected = model(each)
            torch.testing.assert_close(NativeForward(model).logits(each), expected)


@pytest.mark.parametrize(
    ("names", "changes", "reason"),
    [
        (["whole", "md"], {}, "those of mixed dimensions"),
        (["whole", "concat"], {}, "concatenated quotient-remainder vectors, are shorter"),
        (["whole", "mult"], {"interaction": "cat"}, "for --interaction dot alone"),
        (["learned", "whole"], {"interaction": "cat"}, ""),
        (["mult", "add"], {}, ""),
    ],
)
def test_what_the_kernels_do_not_take_is_told(
    names: list[str], changes: dict[str, Any], reason: str
) -> None:
    taken, told = supports(make_model(names, **changes))
    assert taken == (reason == "")
    assert reason in told


def test_the_model_can_be_exported() -> None:
    """What becomes ONNX later goes through torch.export."""

    class Exported(nn.Module):
        def __init__(self, model: DLRM) -> None:
            super().__init__()
            self.model = model

        def forward(self, dense: Tensor, ids: Tensor, offsets: Tensor) -> Tensor:
            return self.model(Batch(dense, ids, None, offsets))

    model = make_model([*ROWS])
    batch = make_bags(model, 6)
    arguments = (batch.dense_features, batch.sparse_features, batch.offsets)
    exported = torch.export.export(Exported(model).eval(), arguments).module()
    torch.testing.assert_close(exported(*arguments), model(batch))


def test_tables_that_take_more_than_whole_ones_are_named() -> None:
    tables = (
        TableConfig("few_rows", "qr", "mult", 100),  # 1 + 100 rows instead of 90
        TableConfig("halves", "qr", "concat", 100),  # (1 + 100) / 2 instead of 60
        TableConfig("good", "qr", "add", 4),  # 10 + 4 instead of 40
        TableConfig("hardly_shorter", "md", md_dim=7),  # 20 · 7 + 7 · 8 instead of 20 · 8
        TableConfig("as_long", "md", md_dim=8),  # without a projection
        TableConfig("whole"),
    )
    assert larger_than_whole(tables, [90, 60, 40, 20, 20, 5], 8) == ["few_rows", "hardly_shorter"]


def test_any_temperature_gives_lengths() -> None:
    """The reference's float32 ends at infinity times 0."""
    assert mixed_dimensions([1000, 2000, 10**7], 16, 1000.0, round_dims=False) == [16, 1, 1]
    assert mixed_dimensions([0, 1, 7], 16, 0.5, round_dims=False) == [16, 16, 6]
