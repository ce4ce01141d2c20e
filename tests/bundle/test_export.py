"""`dlrm export` of whole RUNs."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from dlrm import bundle, cli
from dlrm.bundle import export as exporting
from dlrm.bundle.export import export, onnx_inputs
from dlrm.config import GenerateConfig, ModelConfig, PrepareConfig, TableConfig, TrainConfig
from dlrm.data.dataset import Dataset
from dlrm.data.generation import generate
from dlrm.data.prepare import prepare
from dlrm.errors import EnvironmentFaultError, UserError
from dlrm.prediction import load
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


@pytest.mark.parametrize("one_id", [False, True])
def test_the_models_probabilities_of_its_dataset(
    run: Path, tmp_path: Path, one_id: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--one-id"] if one_id else []
    with pytest.raises(SystemExit) as ended:
        cli.main(["export", str(run), str(tmp_path / "bundle"), *flags])
    assert ended.value.code == 0
    told = json.loads(capsys.readouterr().out)
    opened = Run.open(run)
    data = Dataset.open(opened.dataset)
    assert (told["compared_with"], told["compared_rows"]) == ("test", data.rows("test"))
    assert 0 <= told["largest_difference"] < 1e-6
    path = tmp_path / "bundle" / "model.onnx"
    assert told["files"] == {"model.onnx": path.stat().st_size}
    shapes = [["rows", 26]] if one_id else [["ids"], ["bags + 1"]]
    assert list(told["inputs"].values()) == [["rows", 13], *shapes]

    # Rows that the comparison did not look at.
    session = onnxruntime.InferenceSession(path)
    (batch,) = data.batches("validation", 1000, schema=opened.schema)
    (found,) = session.run(None, onnx_inputs(batch, one_id=one_id))
    np.testing.assert_allclose(found, load(run).score(batch), atol=1e-6)


def test_the_file_tells_which_feature_is_where(run: Path, tmp_path: Path) -> None:
    export(run, tmp_path / "bundle")
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
    done = export(multi_hot, tmp_path / "bundle")
    assert (done.compared_with, done.compared_rows) == ("made up", 1008)
    assert 0 < done.largest_difference < 1e-6
    with pytest.raises(UserError, match="--one-id: cat_0 has several ids a row"):
        export(multi_hot, tmp_path / "other", one_id=True)
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_large_weights_lie_beside_the_graph(run: Path, tmp_path: Path) -> None:
    done = export(run, tmp_path / "bundle", inline_bytes=0)
    assert done.files.keys() == {"model.onnx", "model.onnx.data"}
    assert done.files["model.onnx.data"] > 26 * 16
    moved = (tmp_path / "bundle").rename(tmp_path / "moved")
    onnxruntime.InferenceSession(moved / "model.onnx")


@pytest.mark.parametrize("there", ["file", "folder"])
def test_nothing_is_overwritten(run: Path, tmp_path: Path, there: str) -> None:
    place = tmp_path / "bundle"
    if there == "file":
        place.write_text("mine")
    else:
        place.mkdir()
        (place / "model.onnx").write_text("mine")
    with pytest.raises(UserError, match="bundle is there already, and is not overwritten"):
        export(run, place)
    assert (place if there == "file" else place / "model.onnx").read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_a_graph_that_computes_otherwise_is_refused_and_leaves_nothing(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = bundle.graph.write_onnx

    def write_other(path: Path, model: bundle.graph.OnnxModel, **options: int) -> list[Path]:
        name = "over_arch.layers.2.bias"
        changed = {**model.weights, name: model.weights[name] + 0.001}
        return original(path, replace(model, weights=changed), **options)

    monkeypatch.setattr(bundle.graph, "write_onnx", write_other)
    with pytest.raises(EnvironmentFaultError, match=r"by up to 0\.000\d+; expected at most 1e-05"):
        export(run, tmp_path / "bundle")
    assert list(tmp_path.iterdir()) == []


def test_another_dataset_is_refused(run: Path, raw_rows: Path, tmp_path: Path) -> None:
    prepare(raw_rows, tmp_path / "other", PrepareConfig(max_ind_range=50))
    with pytest.raises(UserError, match=r"is not the DATASET that .* was trained on"):
        export(run, tmp_path / "bundle", dataset=tmp_path / "other")
    assert not (tmp_path / "bundle").exists()


@pytest.mark.parametrize("package", ["onnx", "onnxruntime"])
def test_a_missing_package_is_named(
    run: Path, tmp_path: Path, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(EnvironmentFaultError, match=rf"{package}.*pip install 'dlrm\[onnx\]'"):
        exporting.export(run, tmp_path / "bundle")
    assert list(tmp_path.iterdir()) == []
