"""Features with several ids a row, floats and soft labels: on disk, read back, trained on."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import dlrm
from dlrm.baselines.training import train_baseline
from dlrm.checkpoint import Position
from dlrm.config import (
    BaselineConfig,
    GenerateConfig,
    LossConfig,
    ModelConfig,
    OptimizerConfig,
    TrainConfig,
)
from dlrm.data import dataset as dataset_module
from dlrm.data.batch import Bags, make_batch
from dlrm.data.dataset import Dataset, Rows, write_dataset
from dlrm.data.inspection import describe, inspect
from dlrm.data.verification import verify
from dlrm.errors import UserError
from dlrm.metrics import compute_metrics
from dlrm.report.importance import permutation_importance
from dlrm.runs import Run
from dlrm.schema import DenseFeature, FeatureSchema, SparseFeature, read_schema
from dlrm.training import begin, trainer
from dlrm.training.events import Events
from dlrm.training.step import EagerStep

SCHEMA = FeatureSchema(
    label="clicked",
    dense=(DenseFeature("age", "none"), DenseFeature("price", "none")),
    sparse=(
        SparseFeature("tags", 50, multi_hot=True),
        SparseFeature("user", 1000),
        SparseFeature("shops", 5, multi_hot=True),
        SparseFeature("town", 3),
    ),
    source_format="made-up",
    split_rule="none",
    soft_labels=True,
)
ONLY_BAGS = dataclasses.replace(SCHEMA, sparse=(SCHEMA.sparse[0], SCHEMA.sparse[2]))
LISTS = list[list[list[int]]]
"""For each row, for each feature, its ids."""


def made_up_lists(rows: int, seed: int, schema: FeatureSchema = SCHEMA) -> LISTS:
    generator = np.random.default_rng(seed)
    lists = []
    for _ in range(rows):
        row = []
        for feature in schema.sparse:
            length = int(
                generator.integers(0, 6) if feature.multi_hot else generator.random() > 0.1
            )
            row.append(generator.integers(0, feature.num_embeddings, length).tolist())
        lists.append(row)
    return lists


def rows_of(lists: LISTS, schema: FeatureSchema = SCHEMA, seed: int = 0) -> Rows:
    """Rows, built value by value."""
    generator = np.random.default_rng(seed)
    sparse, bags = [], []
    for number, feature in enumerate(schema.sparse):
        column = [row[number] for row in lists]
        if feature.multi_hot:
            ids = np.array([each for row in column for each in row], np.int32)
            bags.append(Bags.of_lengths(ids, np.array([len(row) for row in column], np.int64)))
        else:
            sparse.append([(row or [-1])[0] for row in column])
    return Rows(
        generator.random(len(lists)).astype(np.float32),
        generator.normal(size=(len(lists), 2)).astype(np.float32),
        np.array(sparse, np.int32).reshape(-1, len(lists)).T,
        tuple(bags),
    )


def in_runs(rows: Rows, length: int) -> Iterator[Rows]:
    for start in range(0, len(rows), length):
        yield rows[start : start + length]


def lists_of(rows: Rows, schema: FeatureSchema = SCHEMA) -> LISTS:
    single, several = iter(rows.sparse.T.tolist()), iter(rows.bags)
    columns: list[list[list[int]]] = []
    for feature in schema.sparse:
        if feature.multi_hot:
            bags = next(several)
            ends = bags.offsets.tolist()
            columns.append([bags.ids[a:b].tolist() for a, b in itertools.pairwise(ends)])
        else:
            columns.append([[each] if each >= 0 else [] for each in next(single)])
    return [list(row) for row in zip(*columns, strict=True)]


LONG = made_up_lists(1000, 1)


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dataset_module, "PART_BYTES", 6000)


@pytest.fixture
def dataset(tmp_path: Path, small_parts: None) -> Dataset:
    train, test = rows_of(LONG), rows_of(made_up_lists(70, 2), seed=1)
    return write_dataset(
        tmp_path / "dataset",
        SCHEMA,
        {"train": in_runs(train, 33), "validation": in_runs(test, 40), "test": "validation"},
    )


def test_lists_are_arrow_columns(dataset: Dataset) -> None:
    parts = dataset.manifest.splits["train"].parts
    assert len(parts) == 8
    with pa.OSFile(str(dataset.path / parts[0].file)) as file:
        stored = pa.ipc.open_file(file).read_all()
    assert stored.schema.names == ["label", "dense", "sparse", "sparse.tags", "sparse.shops"]
    assert stored["sparse.tags"].to_pylist() == [row[0] for row in LONG[: parts[0].rows]]
    assert stored["sparse.shops"].to_pylist() == [row[2] for row in LONG[: parts[0].rows]]
    assert stored["sparse"].type.list_size == 2
    rows = rows_of(LONG)
    assert stored["label"].to_pylist() == rows.labels[: parts[0].rows].tolist()
    assert stored["dense"].to_pylist() == rows.dense[: parts[0].rows].tolist()
    assert dataset.manifest.splits["train"].clicks == (rows.labels > 0.5).sum()


@pytest.mark.parametrize("mini_batch_size", [1, 7, 33, 128, 333, 999, 1000, 5000])
def test_batches_span_blocks_and_parts(dataset: Dataset, mini_batch_size: int) -> None:
    rows = rows_of(LONG)
    start = 0
    for batch in dataset.batches("train", mini_batch_size):
        stop = start + len(batch)
        assert batch.offsets is not None
        ends = batch.offsets.tolist()
        bags = [batch.sparse_features[a:b].tolist() for a, b in itertools.pairwise(ends)]
        assert bags == [bag for row in LONG[start:stop] for bag in row]
        assert batch.labels is not None
        assert batch.labels.tolist() == rows.labels[start:stop].tolist()
        assert batch.dense_features.tolist() == rows.dense[start:stop].tolist()
        assert batch.unknown_ids == bags.count([])
        start = stop
    assert start == 1000


def test_some_of_the_batches(dataset: Dataset) -> None:
    everything = list(dataset.batches("train", 32))
    some = list(dataset.batches("train", 32, first_batch=5, num_batches=4))
    for batch, other in zip(some, everything[5:9], strict=True):
        for field in dataclasses.fields(batch):
            assert torch.equal(getattr(batch, field.name), getattr(other, field.name))


def test_rows_spread_over_a_split(dataset: Dataset) -> None:
    spread = Rows.concatenate(list(dataset.spread_rows("train", 100)))
    assert lists_of(spread) == LONG[9::10]


@settings(deadline=None, max_examples=50)
@given(
    lengths=st.lists(st.integers(0, 3), min_size=1, max_size=20),
    start=st.integers(0, 20),
    stop=st.integers(0, 20),
    chosen=st.lists(st.integers(0, 100), max_size=10),
)
def test_some_of_the_bags(lengths: list[int], start: int, stop: int, chosen: list[int]) -> None:
    ids = np.arange(sum(lengths), dtype=np.int32)
    ends = np.cumsum(lengths)
    lists = [ids[end - length : end].tolist() for end, length in zip(ends, lengths, strict=True)]
    bags = Bags.of_lengths(ids, np.array(lengths))

    def content(of: Bags) -> list[list[int]]:
        assert of.offsets[0] == 0
        assert of.offsets[-1] == len(of.ids)
        return [of.ids[a:b].tolist() for a, b in itertools.pairwise(of.offsets)]

    assert content(bags) == lists
    assert content(bags[start:stop]) == lists[start:stop]
    index = np.array(chosen, np.int64) % len(lengths)
    assert content(bags[index]) == [lists[each] for each in index]
    assert content(Bags.concatenate([bags[start:], bags])) == lists[start:] + lists
    assert bags.nbytes == 4 * (sum(lengths) + len(lengths))


def test_several_bags_alone(tmp_path: Path) -> None:
    lists = made_up_lists(50, 3, ONLY_BAGS)
    rows = rows_of(lists, ONLY_BAGS)
    data = write_dataset(tmp_path / "dataset", ONLY_BAGS, {"train": in_runs(rows, 20)})
    assert lists_of(Rows.concatenate(list(data.stored_rows("train", 0, 50))), ONLY_BAGS) == lists
    assert verify(data).rows["train"] == 50


def test_ids_are_taken_modulo(dataset: Dataset) -> None:
    (batch,) = dataset.batches("train", 1000, schema=dataset.schema.with_max_ind_range(4))
    flat = [each % 4 for row in LONG for bag in row for each in bag]
    assert batch.sparse_features.tolist() == flat  # modulo 4 of 3 and 5 rows too


def test_a_split_with_the_rows_of_another_takes_no_room(dataset: Dataset) -> None:
    parts = dataset.manifest.splits["test"].parts
    assert [part.file for part in parts] == ["test/part-00000.arrow"]
    one = dataset.path / "test" / "part-00000.arrow"
    assert one.samefile(dataset.path / "validation" / "part-00000.arrow")
    test = Rows.concatenate(list(dataset.stored_rows("test", 0, 70)))
    assert lists_of(test) == made_up_lists(70, 2)
    assert dataset.manifest.splits["test"].clicks == dataset.manifest.splits["validation"].clicks


def test_the_whole_is_verified_and_shown(dataset: Dataset) -> None:
    verified = verify(dataset)
    assert verified.rows == {"train": 1000, "validation": 70, "test": 70}
    assert verified.click_rate["train"] == (rows_of(LONG).labels > 0.5).mean()
    shown = inspect(dataset.path)
    assert [each.multi_hot for each in shown.sparse] == [True, False, True, False]
    text = describe(shown)
    assert "tags              50       -  several ids a row\n" in text
    assert "labels are probabilities" in text
    assert "\nage                -    price              -    \n\nsparse" in text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: rows.bags[0].ids.__setitem__(7, 50), "expected ids of tags in 0 … 49"),
        (lambda rows: rows.bags[1].ids.__setitem__(0, -1), "expected ids of shops in 0 … 4"),
        (lambda rows: rows.labels.__setitem__(3, np.nan), "expected labels in 0 … 1"),
        (lambda rows: rows.labels.__setitem__(3, -0.1), "expected labels in 0 … 1"),
        (lambda rows: rows.labels.__setitem__(3, 1.1), "expected labels 0 or 1"),
        (lambda rows: rows.dense.__setitem__((1, 1), np.inf), "expected finite dense features"),
        (lambda rows: rows.sparse.__setitem__((1, 1), 3), "expected labels 0 or 1 and ids of the"),
    ],
)
def test_values_that_cannot_be_are_refused(tmp_path: Path, change: Any, message: str) -> None:
    rows = rows_of(LONG[:50])
    change(rows)
    data = write_dataset(tmp_path / "dataset", SCHEMA, {"train": [rows]})
    with pytest.raises(UserError, match=rf"part-00000\.arrow is damaged: {message}"):
        list(data.batches("train", 10))


def test_a_flipped_byte_is_read_or_named_but_never_out_of_range(dataset: Dataset) -> None:
    path = dataset.path / dataset.manifest.splits["validation"].parts[0].file
    content = path.read_bytes()
    limits = torch.tensor([50, 1000, 5, 3])
    messages = []
    for position in range(0, len(content), 7):
        flipped = bytes([content[position] ^ 0x55])
        path.write_bytes(content[:position] + flipped + content[position + 1 :])
        try:
            for batch in dataset.batches("validation", 70):
                assert batch.offsets is not None
                lengths = batch.offsets.diff()
                assert bool((lengths >= 0).all())
                table = (torch.arange(len(lengths)) % 4).repeat_interleave(lengths)
                assert bool((batch.sparse_features < limits[table]).all())
        except UserError as error:
            messages.append(str(error))
    assert len(messages) > 20
    assert all("part-00000.arrow is damaged" in message for message in messages)


def test_a_fingerprint_tells_several_ids_from_one(dataset: Dataset) -> None:
    one = tuple(dataclasses.replace(each, multi_hot=False) for each in SCHEMA.sparse)
    others = [
        dataclasses.replace(SCHEMA, sparse=one),
        dataclasses.replace(SCHEMA, soft_labels=False),
        dataclasses.replace(SCHEMA, dense=(DenseFeature("age"), DenseFeature("price"))),
    ]
    prints = {schema.sealed().fingerprint for schema in (SCHEMA, *others)}
    assert len(prints) == 4
    assert read_schema(dataset.path, "dataset") == SCHEMA.sealed()


def test_what_is_not_used_leaves_a_fingerprint_as_it_was() -> None:
    """So that checkpoints of earlier versions belong to their datasets still."""
    schema = FeatureSchema(
        "label", (DenseFeature("int_0"),), (SparseFeature("cat_0", 7),), "criteo-kaggle", "rows"
    )
    meaning = (
        '["label",[{"name":"int_0","transform":"log1p"}],[{"name":"cat_0","num_embeddings":7,'
        '"vocabulary":"","vocabulary_sha256":"","value_modulus":0,"id_modulus":0}],'
        '"criteo-kaggle"]'
    )
    assert schema.sealed().fingerprint == hashlib.sha256(meaning.encode()).hexdigest()


KEPT: LISTS = [
    [[7, 3, 7], [999], [], [2]],
    [[], [], [4], [0]],
    [[49], [0], [0, 1, 2, 3, 4], []],
]


def test_a_dataset_of_the_first_format_that_had_them_is_read() -> None:
    """Made by ``write_dataset`` of that version; what it holds is written out here."""
    data = Dataset.open(Path(__file__).parent / "fixtures" / "dataset-1.4")
    assert verify(data).rows == {"train": 3, "validation": 3, "test": 0}
    rows = Rows.concatenate(list(data.stored_rows("train", 0, 3)))
    assert lists_of(rows) == KEPT
    assert rows.labels.tolist() == [0.0, 0.25, 1.0]
    assert rows.dense.tolist() == [[0.5, -1.5], [3.0, 0.0], [-0.25, 8.0]]
    assert data.schema == dataclasses.replace(SCHEMA.sealed(), format_version="1.4")
    assert data.manifest.generation == GenerateConfig(num_embeddings=(50, 1000, 5, 3))


def test_two_transforms_in_one_schema_are_refused(dataset: Dataset) -> None:
    path = dataset.path / "schema.json"
    content = json.loads(path.read_text())
    content["dense"][1]["transform"] = "log1p"
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match="expected one transform of all dense features"):
        Dataset.open(dataset.path)


CONFIG = TrainConfig(
    model=ModelConfig(
        embedding_dim=8, dense_arch_layer_sizes=(16, 8), over_arch_layer_sizes=(16, 1)
    ),
    loss=LossConfig(loss="bce"),
    mini_batch_size=64,
    test_freq=5,
    print_freq=5,
)


def weights(run: Path) -> dict[str, torch.Tensor]:
    return dlrm.load(run, checkpoint="newest").model.state_dict()


@pytest.fixture
def trained(dataset: Dataset, tmp_path: Path, kernels: str) -> Path:
    result = begin.train(dataset.path, tmp_path / kernels, CONFIG)
    assert result.kernels == kernels
    return tmp_path / kernels


def test_training_gives_the_weights_of_plain_steps(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And its loss is that of the soft labels."""
    result = begin.train(dataset.path, tmp_path / "native", CONFIG)
    if result.kernels != "native":
        pytest.skip("the native kernels are not built")
    monkeypatch.setattr(trainer, "choose_step", EagerStep)
    begin.train(dataset.path, tmp_path / "plain", CONFIG)
    plain = weights(tmp_path / "plain")
    moved = 0.0
    for name, value in weights(tmp_path / "native").items():
        torch.testing.assert_close(value, plain[name], rtol=1e-4, atol=2e-6)
        moved += float(value.abs().sum())
    assert moved > 0

    def losses(run: str) -> list[float]:
        lines = map(json.loads, (tmp_path / run / "log.jsonl").read_text().splitlines())
        return [line["loss"] for line in lines if line["event"] == "report"]

    assert losses("native") == pytest.approx(losses("plain"), rel=1e-5)
    assert min(losses("native")) > 0.6  # no row of a probability in 0 … 1 costs less than it holds


def test_a_trained_model_evaluates_and_predicts(dataset: Dataset, trained: Path) -> None:
    result = dlrm.evaluate(trained, "test", checkpoint="newest")
    predictor = dlrm.load(trained, checkpoint="newest")
    rows = rows_of(made_up_lists(70, 2), seed=1)
    scored = predictor.score(make_batch(SCHEMA, rows.dense, rows.sparse, None, rows.bags))
    assert result.metrics == compute_metrics(rows.labels > 0.5, scored)
    few = np.concatenate([predictor.score(batch) for batch in dataset.batches("test", 9)])
    np.testing.assert_allclose(few, scored, rtol=1e-5)
    empty = sum(bag == [] for row in made_up_lists(70, 2) for bag in row)
    assert result.unknown_ids == empty > 0
    with pytest.raises(UserError, match="cannot encode raw rows: it has no vocabulary for tags"):
        predictor.predict_rows(np.zeros((1, 2), np.int32), np.zeros((1, 4), np.uint32))


def test_an_interrupted_training_goes_on_exactly(
    dataset: Dataset, trained: Path, tmp_path: Path
) -> None:
    class Stop(Events):
        def on_step(self, position: Position, samples: int) -> None:
            if position.total_steps == 9:
                raise KeyboardInterrupt

    run = tmp_path / "interrupted"
    with pytest.raises(KeyboardInterrupt):
        begin.train(dataset.path, run, dataclasses.replace(CONFIG, save_every_steps=4), [Stop()])
    begin.resume(run)
    for name, value in weights(trained).items():
        assert torch.equal(value, weights(run)[name])


def test_the_importance_of_a_feature_with_several_ids_is_measured(tmp_path: Path) -> None:
    """Of rows that are clicked if they have one of the even tags and no other."""
    lists = made_up_lists(4000, 5)
    for row in lists:
        row[0] = row[0][:1]
    rows = rows_of(lists)
    clicked = np.float32([any(tag % 2 == 0 for tag in row[0]) for row in lists])
    rows = dataclasses.replace(rows, labels=clicked)
    data = write_dataset(
        tmp_path / "dataset", SCHEMA, {"train": [rows], "validation": "train", "test": "train"}
    )
    config = dataclasses.replace(
        CONFIG, optimizer=OptimizerConfig(optimizer="adagrad", learning_rate=0.05), epochs=2
    )
    begin.train(data.path, tmp_path / "run", config)
    run = Run.open(tmp_path / "run")
    found = permutation_importance(run, data, "test", 1000, checkpoint="newest")
    assert found.before.auc > 0.95
    assert found.features[0].name == "tags"
    assert found.features[0].auc_drop > 0.3
    assert max(abs(each.auc_drop) for each in found.features[1:]) < 0.05


def test_baselines_refuse_by_name(dataset: Dataset, tmp_path: Path) -> None:
    plain = dataclasses.replace(
        SCHEMA,
        sparse=(SCHEMA.sparse[1],),
        dense=(DenseFeature("age"),),
        soft_labels=False,
    )
    for changes, what in (
        ({"sparse": SCHEMA.sparse}, "sparse features with several ids a row"),
        ({"dense": SCHEMA.dense}, "dense features that are no counts"),
        ({"soft_labels": True}, "labels that are probabilities"),
    ):
        schema = dataclasses.replace(plain, **changes)  # type: ignore[arg-type]
        unfit = dataclasses.replace(dataset, schema=schema)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Dataset, "open", lambda path, unfit=unfit: unfit)
            with pytest.raises(UserError, match=f"has {what}, which baselines do not take"):
                train_baseline(dataset.path, tmp_path / "run", BaselineConfig())
