"""`dlrm export` of whole RUNs."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from safetensors.torch import load_file
from torch._inductor import cpp_builder
from torch._inductor.exc import InvalidCxxCompiler

from dlrm import bundle, cli
from dlrm.bundle import export as exporting
from dlrm.bundle.export import export, model_inputs
from dlrm.bundles import Bundle
from dlrm.config import (
    GenerateConfig,
    LossConfig,
    ModelConfig,
    PrepareConfig,
    TableConfig,
    TrainConfig,
)
from dlrm.data.dataset import Dataset
from dlrm.data.generation import generate
from dlrm.data.prepare import prepare
from dlrm.errors import EnvironmentFaultError, UserError
from dlrm.prediction import Predictor, load
from dlrm.runs import Run
from dlrm.training.begin import train

MODEL = ModelConfig(
    embedding_dim=4,
    dense_arch_layer_sizes=(8, 4),
    over_arch_layer_sizes=(8, 1),
    tables=(
        TableConfig("cat_2", "qr", "mult", 8),
        TableConfig("cat_15", "md", md_dim=2, weighted_pooling="learned"),
    ),
)
CONFIG = TrainConfig(model=MODEL, max_ind_range=40)


@pytest.fixture(scope="module")
def run(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A RUN whose DATASET is where it was, of which it takes ids modulo 40."""
    folder = tmp_path_factory.mktemp("export") / "run"
    train(dataset, folder, CONFIG)
    return folder


@pytest.fixture(scope="module")
def multi_hot(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A RUN of made-up rows with several ids a feature, whose DATASET is gone."""
    folder = tmp_path_factory.mktemp("multi-hot")
    generate(folder / "dataset", GenerateConfig(data_size=300, num_indices_per_lookup=5))
    train(folder / "dataset", folder / "run", TrainConfig(model=replace(MODEL, tables=())))
    shutil.rmtree(folder / "dataset")
    return folder / "run"


@pytest.mark.parametrize(
    ("format", "one_id"),
    [
        ("torch", False),
        ("onnx", True),
        *(
            pytest.param(*case, marks=pytest.mark.long)
            for case in [("torch", True), ("onnx", False)]
        ),
    ],
)
def test_the_models_probabilities_of_its_dataset(
    run: Path, tmp_path: Path, format: str, one_id: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--format", format, *(["--one-id"] if one_id else [])]
    with pytest.raises(SystemExit) as ended:
        cli.main(["export", str(run), str(tmp_path / "bundle"), *flags])
    assert ended.value.code == 0
    told = json.loads(capsys.readouterr().out)
    opened = Run.open(run)
    data = Dataset.open(opened.dataset)
    compared = told["compared"]
    assert (compared["origin"], compared["rows"]) == ("test", data.rows("test"))
    assert compared["raw_rows"] == data.rows("test")
    assert compared["largest_difference"] == 0
    assert 0 <= compared["largest_foreign_difference"] < 1e-6
    model_file = {"torch": "model.pt2", "onnx": "model.onnx"}[format]
    folder = tmp_path / "bundle"
    assert told["files"].keys() == {
        *("bundle.json", "schema.json", "examples.json", "model.safetensors", "vocabulary/"),
        model_file,
    }
    assert told["files"][model_file] == (folder / model_file).stat().st_size
    shapes = [["rows", 26]] if one_id else [["ids"], ["26 rows + 1"]]
    assert list(told["inputs"].values()) == [["rows", 13], *shapes]

    # Rows that the comparison did not look at.
    (batch,) = data.batches("validation", 1000, schema=opened.schema)
    inputs = model_inputs(batch, one_id=one_id)
    if format == "onnx":
        session = onnxruntime.InferenceSession(folder / model_file)
        (found,) = session.run(None, {name: each.numpy() for name, each in inputs.items()})
    else:
        program = torch.export.load(folder / model_file).module()
        program.load_state_dict(load_file(folder / "model.safetensors"), assign=True)
        found = program(**inputs).numpy()
    np.testing.assert_allclose(found, load(run).score(batch), atol=1e-6)


def test_the_file_tells_which_feature_is_where(run: Path, tmp_path: Path) -> None:
    export(run, tmp_path / "bundle", format="onnx")
    (entry,) = onnx.load(tmp_path / "bundle" / "model.onnx").metadata_props
    told, schema = json.loads(entry.value), Run.open(run).schema
    assert entry.key == "dlrm"
    assert told["dense_features"] == [f"int_{i}" for i in range(13)]
    assert told["dense_transform"] == "log1p"
    assert [each["name"] for each in told["sparse_features"]] == [f"cat_{i}" for i in range(26)]
    rows = [each["num_embeddings"] for each in told["sparse_features"]]
    assert rows == list(schema.num_embeddings)
    assert max(rows) == 40
    assert told["schema_fingerprint"] == schema.fingerprint


def test_bags_of_several_ids_and_made_up_rows_where_the_dataset_is_gone(
    multi_hot: Path, tmp_path: Path
) -> None:
    compared = export(multi_hot, tmp_path / "bundle", format="onnx").compared
    assert (compared.origin, compared.rows, compared.raw_rows) == ("made up", 1008, 0)
    assert compared.largest_difference == 0 <= compared.largest_foreign_difference < 1e-6
    with pytest.raises(UserError, match="--one-id: cat_0 has several ids a row"):
        export(multi_hot, tmp_path / "other", one_id=True)
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]
    told = Bundle.open(tmp_path / "bundle").examples()
    assert (told.origin, told.raw, told.rows[0].label) == ("made up", False, None)
    bags = [row.features["cat_0"] for row in told.rows]
    assert all(isinstance(bag, list) and len(bag) <= 3 for bag in bags)


def test_raw_rows_are_made_up_where_the_dataset_is_gone(run: Path, tmp_path: Path) -> None:
    moved = Path(shutil.copytree(run, tmp_path / "run"))
    config = (moved / "config.toml").read_text()
    (moved / "config.toml").write_text(config.replace(str(Run.open(run).dataset), "/gone"))
    compared = export(moved, tmp_path / "bundle", format="onnx").compared
    assert (compared.origin, compared.raw_rows) == ("made up", 1008)
    told = Bundle.open(tmp_path / "bundle")
    assert told.info.trained.rows == {}
    table = {
        name: [row.features[name] for row in told.examples().rows]
        for name in told.examples().rows[0].features
    }
    found = load(tmp_path / "bundle").predict(table)
    assert found.tolist() == pytest.approx([row.probability for row in told.examples().rows])
    assert {row.label for row in told.examples().rows} == {None}


@pytest.mark.parametrize("format", ["onnx", pytest.param("torch", marks=pytest.mark.long)])
def test_tables_of_fewer_bits(run: Path, tmp_path: Path, format: Any) -> None:
    done = {
        bits: export(run, tmp_path / bits, format=format, quantize=bits)
        for bits in ("int8", "int4")
    }
    sizes = {bits: each.files["model.safetensors"] for bits, each in done.items()}
    assert sizes["int4"] < sizes["int8"]
    for each in done.values():
        assert each.compared.largest_difference == 0
        assert each.compared.largest_foreign_difference < 1e-6
    by_int8, by_int4 = (each.compared.quantization_difference for each in done.values())
    assert 0 < by_int8 < by_int4 < 0.1
    rows = Bundle.open(tmp_path / "int8").examples().rows
    table = {name: [row.features[name] for row in rows] for name in rows[0].features}
    few = load(tmp_path / "int8").predict(table)
    difference = np.abs(few - load(run).predict(table))
    assert 0 < difference.max() <= by_int8


def test_float_features_have_no_raw_rows(tmp_path: Path) -> None:
    generate(tmp_path / "dataset", GenerateConfig(data_size=100, num_indices_per_lookup=1))
    train(tmp_path / "dataset", tmp_path / "run", TrainConfig(model=replace(MODEL, tables=())))
    compared = export(tmp_path / "run", tmp_path / "bundle", format="onnx").compared
    assert compared.raw_rows == 0
    told = Bundle.open(tmp_path / "bundle").examples()
    assert (told.origin, told.raw) == (compared.origin, False)
    assert all(isinstance(row.features["int_0"], float) for row in told.rows)
    assert {row.label for row in told.rows} <= {0, 1}


@pytest.mark.parametrize("there", ["file", "folder"])
def test_nothing_is_overwritten(run: Path, tmp_path: Path, there: str) -> None:
    place = tmp_path / "bundle"
    if there == "file":
        place.write_text("mine")
    else:
        place.mkdir()
        (place / "model.onnx").write_text("mine")
    with pytest.raises(UserError, match="bundle is there already, and is not overwritten"):
        export(run, place, format="onnx")
    assert (place if there == "file" else place / "model.onnx").read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


@pytest.mark.parametrize("which", ["dlrm.load", "onnxruntime"])
def test_what_computes_otherwise_is_refused_and_leaves_nothing(
    run: Path, tmp_path: Path, which: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if which == "dlrm.load":
        original = exporting.load_bundle

        def load_other(opened: Bundle) -> Predictor:
            predictor = original(opened)
            with torch.no_grad():
                predictor.model.over_arch.layers[2].bias += 0.001
            return predictor

        monkeypatch.setattr(exporting, "load_bundle", load_other)
    else:
        graph = bundle.graph.onnx_model
        monkeypatch.setattr(
            bundle.graph,
            "onnx_model",
            lambda model, loss, weights, **options: graph(
                model, LossConfig(loss_threshold=0.4), weights, **options
            ),
        )
    with pytest.raises(
        EnvironmentFaultError,
        match=rf"that {which}.* gives .* by up to 0\.\d+; expected at most 1e-05",
    ):
        export(run, tmp_path / "bundle", format="onnx")
    assert list(tmp_path.iterdir()) == []


def test_another_dataset_is_refused(run: Path, raw_rows: Path, tmp_path: Path) -> None:
    prepare(raw_rows, tmp_path / "other", PrepareConfig(max_ind_range=50))
    with pytest.raises(UserError, match=r"is not the DATASET that .* was trained on"):
        export(run, tmp_path / "bundle", format="onnx", dataset=tmp_path / "other")
    assert not (tmp_path / "bundle").exists()


def test_without_a_compiler_nothing_is_compiled(
    run: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    export(run, tmp_path / "bundle", format="onnx")

    def none() -> str:
        raise InvalidCxxCompiler

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", none)
    assert exporting._compile(Bundle.open(tmp_path / "bundle"), one_id=False) is None
    assert caplog.messages[-1].startswith("the model is not compiled: No working C++ compiler")
    with pytest.raises(UserError, match="--compile goes with --format torch; got --format onnx"):
        export(run, tmp_path / "other", format="onnx", compile=True)


@pytest.mark.parametrize("package", ["onnx", "onnxruntime"])
def test_a_missing_package_is_named(
    run: Path, tmp_path: Path, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(EnvironmentFaultError, match=rf"{package}.*pip install 'dlrm\[onnx\]'"):
        exporting.export(run, tmp_path / "bundle", format="onnx")
    assert list(tmp_path.iterdir()) == []
