"""Trainings with embedding tables that are not all whole, and all that is done with their RUNs."""

from __future__ import annotations

import csv
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import dlrm
from dlrm.config import (
    GenerateConfig,
    LossConfig,
    ModelConfig,
    OptimizerConfig,
    PrepareConfig,
    SynthesizeConfig,
    TableConfig,
    TrackingConfig,
    TrainConfig,
)
from dlrm.data.batch import Batch
from dlrm.data.dataset import Dataset
from dlrm.data.generation import generate
from dlrm.data.prepare import prepare
from dlrm.data.synthetic import synthesize
from dlrm.model.dlrm import DLRM, initialize
from dlrm.model.loss import mean_loss
from dlrm.predicting.files import predict_file
from dlrm.prediction import load
from dlrm.report.importance import permutation_importance
from dlrm.report.page import write_report
from dlrm.runs import Run
from dlrm.schema import DenseFeature, FeatureSchema, SparseFeature
from dlrm.training import trainer
from dlrm.training.optimizer import Optimizer
from dlrm.training.step import EagerStep

MODEL = ModelConfig(embedding_dim=4, dense_arch_layer_sizes=(16, 4), over_arch_layer_sizes=(16, 1))
CONFIG = TrainConfig(
    model=MODEL, optimizer=OptimizerConfig("adagrad", 0.02), epochs=2, print_freq=1000
)
EVERY_KIND = (
    TableConfig("cat_2", "qr", "mult", 8),
    TableConfig("cat_3", "qr", "add", 8),
    TableConfig("cat_11", "qr", "concat", 8),
    TableConfig("cat_15", "md", md_dim=2, weighted_pooling="learned"),
    TableConfig("cat_20", "md", md_dim=1),
    TableConfig("cat_23", weighted_pooling="learned"),
    TableConfig("cat_0", weighted_pooling="fixed"),
)


@pytest.fixture(scope="module")
def clicks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with raw rows, raw/, and the DATASET of them, dataset/."""
    folder = tmp_path_factory.mktemp("variants")
    synthesize(folder / "raw", SynthesizeConfig(rows=6000, test_rows=100, scale=0.0005))
    prepare(folder / "raw", folder / "dataset", PrepareConfig())
    return folder


@pytest.fixture(scope="module")
def run(clicks: Path) -> Path:
    """A RUN whose tables are of every kind."""
    tracking = TrackingConfig(tensorboard=True, tensorboard_projector="cat_15")
    config = replace(CONFIG, model=replace(MODEL, tables=EVERY_KIND), tracking=tracking)
    dlrm.train(clicks / "dataset", clicks / "run", config)
    return clicks / "run"


@pytest.mark.parametrize(
    ("changes", "kernels", "share"),
    [
        ({"embedding_variant": "md"}, "plain", 0.3),
        ({"embedding_variant": "qr", "qr_operation": "concat"}, "plain", 0.2),
        ({"embedding_variant": "qr", "qr_operation": "add"}, "native", 0.3),
        ({"embedding_variant": "qr", "qr_collisions": 16}, "native", 0.2),
        ({"weighted_pooling": "learned"}, "native", 1.25),
    ],
)
def test_it_learns(
    clicks: Path,
    tmp_path: Path,
    changes: dict[str, Any],
    kernels: str,
    share: float,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "dlrm")
    config = replace(CONFIG, model=replace(MODEL, **changes))
    result = dlrm.train(clicks / "dataset", tmp_path / "run", config)
    assert result.metrics["test"].auc > 0.66  # 0.5 is a guess; the best possible is 0.778
    assert result.kernels == kernels
    rows = sum(Dataset.open(clicks / "dataset").schema.num_embeddings)
    assert result.whole_table_bytes == rows * 4 * 4
    assert result.table_bytes / result.whole_table_bytes == pytest.approx(share, abs=0.1)
    assert "the embedding tables take 0." in caplog.text


def test_an_evaluation_and_a_prediction_are_those_of_the_training(run: Path, clicks: Path) -> None:
    result = Run.open(run).result()
    assert result.metrics["test"].auc > 0.66
    assert dlrm.evaluate(run).metrics == result.metrics["test"]
    predictor = load(run)
    predict_file(predictor, clicks / "raw" / "train.txt", clicks / "predicted.csv")
    with (clicks / "predicted.csv").open() as file:
        predicted = [float(row["Predicted"]) for row in csv.DictReader(file)]
    data = Dataset.open(clicks / "dataset")
    days = data.manifest.days
    start = sum(days[:-1])  # the last day's first half is test
    _, scored = Run.open(run).predictions("test").arrays()
    np.testing.assert_allclose(predicted[start : start + len(scored)], scored, atol=1e-6)


def test_the_projector_shows_the_vectors_that_meet_others(run: Path) -> None:
    vectors = np.loadtxt(run / "tensorboard" / "tensors.tsv", dtype=np.float32)
    opened = Run.open(run)
    model = opened.load_model("best", torch.device("cpu"))
    state = model.sparse_arch.state_dict()
    table = state["embedding_bags.t_cat_15.weight"] * state["pooling_weights.t_cat_15"][:, None]
    expected = (table @ state["projections.t_cat_15.weight"].T).numpy()
    # Which id a line shows is tested elsewhere; here, that each is one of these vectors.
    found = {tuple(np.round(vector, 5)) for vector in vectors}
    assert len(found) > 10
    assert found <= {tuple(np.round(vector, 5)) for vector in expected}


def test_importance_and_report_tell_of_them(run: Path, clicks: Path) -> None:
    opened, data = Run.open(run), Dataset.open(clicks / "dataset")
    found = permutation_importance(opened, data, "test", 100, checkpoint="best")
    assert found.rows == 100
    assert any(each.auc_drop for each in found.features if each.kind == "sparse")
    page = write_report(run, importance_rows=0).read_text()
    size = opened.result()
    assert f"{size.table_bytes / 1e6:.1f} MB; a vector for each id would take" in page
    assert "cat_11" in page


@pytest.mark.parametrize("rule", ["sgd", "adagrad"])
def test_fixed_weights_are_those_that_were_learned_before(
    clicks: Path, tmp_path: Path, rule: Any
) -> None:
    optimizer = OptimizerConfig(rule, 0.1)
    config = replace(CONFIG, optimizer=optimizer, max_steps=20, test_freq=-1)
    weighed = replace(MODEL, weighted_pooling="learned")
    dlrm.train(clicks / "dataset", tmp_path / "learned", replace(config, model=weighed))
    newest = tmp_path / "learned" / "checkpoints" / "newest.safetensors"
    fixed = replace(
        config,
        model=replace(MODEL, weighted_pooling="fixed"),
        max_steps=30,
        continue_from=str(newest),
    )
    dlrm.train(clicks / "dataset", tmp_path / "fixed", fixed)
    before, after = load_file(newest), load_file(tmp_path / "fixed" / "checkpoints" / newest.name)
    weights = [name for name in before if "pooling_weights" in name and "model." in name]
    assert len(weights) == 26
    assert all(torch.equal(before[name], after[name]) for name in weights)
    assert any((before[name] != 1).any() for name in weights)
    table = "model.sparse_arch.embedding_bags.t_cat_0.weight"
    assert not torch.equal(before[table], after[table])


ROWS = {"whole": 7, "mult": 30, "add": 6, "concat": 5, "md": 8, "learned": 3, "fixed": 4}


def make_model(**changes: Any) -> DLRM:
    schema = FeatureSchema(
        label="label",
        dense=(DenseFeature("int_0"), DenseFeature("int_1")),
        sparse=tuple(SparseFeature(name, n) for name, n in ROWS.items()),
        source_format="test",
        split_rule="none",
    )
    tables = (
        TableConfig("mult", "qr", "mult", 4),
        TableConfig("add", "qr", "add", 4),
        TableConfig("concat", "qr", "concat", 3),
        TableConfig("md", "md", md_dim=2),
        TableConfig("learned", weighted_pooling="learned"),
        TableConfig("fixed", weighted_pooling="fixed"),
    )
    model = DLRM(schema, replace(MODEL, tables=tables, **changes))
    initialize(model, np.random.RandomState(3), torch.Generator().manual_seed(3))
    return model


def make_bags(seed: int) -> Batch:
    """16 rows with bags of 0 to 3 ids, of which many repeat."""
    generator = torch.Generator().manual_seed(seed)
    limits = torch.tensor([*ROWS.values()])
    lengths = torch.randint(0, 4, (16 * len(limits),), generator=generator)
    feature = (torch.arange(len(lengths)) % len(limits)).repeat_interleave(lengths)
    ids = (torch.rand(len(feature), generator=generator) * limits[feature]).long()
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    dense = torch.rand(16, 2, generator=generator)
    return Batch(dense, ids, (torch.rand(16, generator=generator) > 0.5).float(), offsets)


@pytest.mark.parametrize("rule", ["sgd", "adagrad", "rowwise_adagrad"])
def test_updates_are_those_of_torchs_optimizers(rule: Any) -> None:
    """Over dense gradients; row-wise Adagrad of tables is worked out here."""
    model, theirs = make_model(), make_model()
    moved = Optimizer(model, OptimizerConfig(rule, 0.05))
    step = EagerStep(model, moved, LossConfig())
    arenas = [arena.arena for arena in theirs.sparse_arch.arenas]
    by_row = arenas[:-1] if rule == "rowwise_adagrad" else []  # the last are pooling weights
    rest = [p for p in theirs.parameters() if p.requires_grad and all(p is not a for a in by_row)]
    kind = torch.optim.SGD if rule == "sgd" else torch.optim.Adagrad
    optimizer = kind(rest, lr=0.05)
    sums = [torch.zeros(len(table)) for table in by_row]
    for seed in range(4):
        batch = make_bags(seed)
        step(batch, 0.05)
        for parameter in theirs.parameters():
            parameter.grad = None
        assert batch.labels is not None
        mean_loss(theirs(batch), batch.labels, LossConfig()).backward()  # type: ignore[no-untyped-call]
        for table in arenas:
            assert table.grad is not None
            table.grad = table.grad.to_dense()
        optimizer.step()
        with torch.no_grad():
            for table, total in zip(by_row, sums, strict=True):
                total += table.grad.square().mean(1)
                table -= 0.05 * table.grad / (total.sqrt() + 1e-10).unsqueeze(1)
    found, expected = model.state_dict(), theirs.state_dict()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6)
    kinds = {name.rpartition(".")[2] for name in moved.state() if "embedding_bags" in name}
    assert kinds == {"sgd": set(), "adagrad": {"sum"}, "rowwise_adagrad": {"row_sum"}}[rule]
    weights = [name for name in moved.state() if "pooling_weights" in name]
    assert weights == [] if rule == "sgd" else ["sparse_arch.pooling_weights.t_learned.sum"]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_tables_follow_wide_ones(dtype: Any) -> None:
    narrow, wide = make_model(embedding_dtype=dtype), make_model()
    before = {name: value.float().clone() for name, value in narrow.state_dict().items()}
    wide.load_state_dict(before)
    for model in (narrow, wide):
        step = EagerStep(model, Optimizer(model, OptimizerConfig("sgd", 0.5)), LossConfig())
        for seed in range(10):
            step(make_bags(seed), 0.5)
    state, expected = narrow.state_dict(), wide.state_dict()
    assert state["sparse_arch.embedding_bags.t_md.weight"].dtype == getattr(torch, dtype)
    assert state["sparse_arch.projections.t_md.weight"].dtype == torch.float32
    for name, value in expected.items():
        moved = (value - before[name]).abs().max()
        if name == "sparse_arch.pooling_weights.t_fixed":
            assert moved == 0
        else:  # rounding is less than what was learned
            assert (state[name].float() - value).abs().max() < 0.6 * moved, name


def test_mixed_precision_steps_follow_exact_ones() -> None:
    found = []
    for amp in ("O0", "O1"):
        model = make_model()
        step = EagerStep(
            model,
            Optimizer(model, OptimizerConfig("sgd", 0.5)),
            LossConfig(),
            amp,  # type: ignore[arg-type]
        )
        for seed in range(3):
            step(make_bags(seed), 0.5)
        found.append(model.state_dict())
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=0.03, atol=0.02)
        assert "pooling" in name or not torch.equal(found[1][name], value), name


@pytest.fixture(scope="module")
def bags(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A DATASET with 1 to 4 ids of each feature in a row."""
    folder = tmp_path_factory.mktemp("bags") / "dataset"
    made = GenerateConfig(
        data_size=800,
        test_rows=100,
        dense_features=2,
        num_embeddings=tuple(ROWS.values()),
        num_indices_per_lookup=4,
    )
    generate(folder, made)
    return folder


@pytest.mark.parametrize("names", [("mult", "add", "learned", "fixed"), ("concat", "md")])
def test_multi_hot_rows_are_trained_on_resumed_and_scored(
    bags: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, names: tuple[str, ...]
) -> None:
    order = [*ROWS]
    tables = tuple(
        replace(table, name=f"cat_{order.index(table.name)}")
        for table in make_model().tables
        if table.name in names
    )
    config = replace(CONFIG, model=replace(MODEL, tables=tables), epochs=1, test_freq=-1)
    whole = dlrm.train(bags, tmp_path / "whole", config)
    assert whole.kernels == ("native" if "mult" in names else "plain")
    expected = load_file(tmp_path / "whole" / "checkpoints" / "newest.safetensors")
    # In two goes, and through plain operators.
    dlrm.train(bags, tmp_path / "half", replace(config, max_steps=3))
    half = tmp_path / "half" / "checkpoints" / "newest.safetensors"
    dlrm.train(bags, tmp_path / "rest", replace(config, continue_from=str(half)))
    rest = load_file(tmp_path / "rest" / "checkpoints" / "newest.safetensors")
    assert all(torch.equal(rest[name], value) for name, value in expected.items())
    monkeypatch.setattr(trainer, "choose_step", EagerStep)
    dlrm.train(bags, tmp_path / "plain", config)
    plain = load_file(tmp_path / "plain" / "checkpoints" / "newest.safetensors")
    for name, value in expected.items():
        torch.testing.assert_close(plain[name], value, rtol=1e-3, atol=1e-4)
    assert dlrm.evaluate(tmp_path / "whole").metrics == whole.metrics["test"]
