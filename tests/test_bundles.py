"""The BUNDLE folder: what is in it, that it is loaded as the RUN is, and what is refused."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import dlrm
from dlrm.bundle.export import export
from dlrm.bundles import Bundle, BundleInfo, write_info
from dlrm.config import ModelConfig, QuantizationConfig, TableConfig, TrainConfig
from dlrm.data.dataset import Dataset
from dlrm.errors import UserError
from dlrm.files import safetensors_places, sha256
from dlrm.model import score
from dlrm.runs import Run
from dlrm.serve.model import ServedModel
from hostile_headers import HEADERS, HUGE

MODEL = ModelConfig(
    embedding_dim=4,
    dense_arch_layer_sizes=(8, 4),
    over_arch_layer_sizes=(8, 1),
    tables=(TableConfig("cat_2", "qr", "mult", 8), TableConfig("cat_15", weighted_pooling="fixed")),
)


@pytest.fixture(scope="module")
def run(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundles") / "run"
    dlrm.train(dataset, folder, TrainConfig(model=MODEL))
    return folder


@pytest.fixture(scope="module")
def original(run: Path) -> Path:
    """Do not change it; ``bundle`` is a copy."""
    folder = run.parent / "bundle"
    export(run, folder, format="onnx")
    return folder


@pytest.fixture
def bundle(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "bundle"))


def raw_table(rows: int) -> dict[str, list[Any]]:
    random = np.random.default_rng(0)
    table: dict[str, list[Any]] = {
        f"int_{i}": random.integers(-2, 50, rows).tolist() for i in range(13)
    }
    return table | {f"cat_{i}": random.integers(2**32, size=rows).tolist() for i in range(26)}


@pytest.mark.parametrize("kernels", ["native", "plain"])
def test_it_scores_as_its_run(
    run: Path, original: Path, kernels: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kernels == "plain":
        monkeypatch.setattr(score, "supports", lambda *_: (False, ""))
    ours, theirs = dlrm.load(original), dlrm.load(run)
    schema = theirs.schema
    assert ours.schema == schema
    (batch,) = Dataset.open(Run.open(run).dataset).batches("validation", 1000, schema=schema)
    np.testing.assert_array_equal(ours.score(batch), theirs.score(batch))
    table = raw_table(50)
    np.testing.assert_array_equal(ours.predict(table), theirs.predict(table))
    for name, weight in theirs.model.state_dict().items():
        assert torch.equal(ours.model.state_dict()[name], weight)


def test_examples_are_raw_rows_with_labels_and_their_probabilities(original: Path) -> None:
    told = Bundle.open(original).examples()
    assert (told.origin, told.raw, len(told.rows)) == ("test", True, 8)
    table = {name: [row.features[name] for row in told.rows] for name in told.rows[0].features}
    found = dlrm.load(original).predict(table)
    assert found.tolist() == pytest.approx([row.probability for row in told.rows], abs=1e-7)
    assert sorted(found) == found.tolist()
    assert {row.label for row in told.rows} <= {0.0, 1.0}
    assert all(len(str(row.features["cat_3"])) == 8 for row in told.rows)


def test_it_tells_what_it_was_trained_on_and_came_to(run: Path, original: Path) -> None:
    told = Bundle.open(original).info
    data = Dataset.open(Run.open(run).dataset)
    trained, result = told.trained, json.loads((run / "result.json").read_text())
    assert trained.result == result
    assert trained.sources == ("train.txt",)
    assert trained.rows == {split: data.rows(split) for split in ("train", "validation", "test")}
    assert sum(trained.clicks.values()) < sum(trained.rows.values())
    assert trained.dataset_fingerprint == data.manifest.fingerprint
    assert trained.step == result["train_steps"]
    assert (told.dlrm, told.format, told.model) == (dlrm.__version__, "onnx", MODEL)
    assert told.compared
    assert (told.compared.origin, told.compared.rows) == ("test", data.rows("test"))
    assert told.compared.raw_rows == data.rows("test")
    names = {str(path.relative_to(original)) for path in original.rglob("*") if path.is_file()}
    assert told.files.keys() == names - {"bundle.json"}
    for name, file in told.files.items():
        path = original / name
        assert (file.bytes, file.sha256) == (path.stat().st_size, sha256(path))


def test_processes_share_the_tables(original: Path) -> None:
    """They are pages of the file, which nobody has changed."""
    model = dlrm.load(original).model
    place = model.sparse_arch.tables()["embedding_bags.t_cat_0.weight"].data_ptr()
    (line,) = [
        line
        for line in Path("/proc/self/maps").read_text().splitlines()
        if (span := line.split()[0].split("-")) and int(span[0], 16) <= place < int(span[1], 16)
    ]
    assert line.endswith(str(original / "model.safetensors"))
    offset, _ = safetensors_places(original / "model.safetensors")[
        "sparse_arch.embedding_bags.t_cat_0.weight"
    ]
    assert offset % (1 << 16) == 0


def test_no_file_of_it_is_a_file_of_its_run(run: Path, original: Path) -> None:
    """So that what changes a RUN or a DATASET does not change what is served."""
    assert {path.stat().st_nlink for path in original.rglob("*") if path.is_file()} == {1}
    for name in ("vocabulary/cat_3.arrow", "schema.json"):
        assert (original / name).read_bytes() == (run / name).read_bytes()


def test_it_can_be_moved_and_needs_nothing_else(bundle: Path) -> None:
    code = (
        "import dlrm, json, sys; p = dlrm.load(sys.argv[1]); "
        "print(json.dumps(p.predict(json.loads(sys.argv[2])).tolist()))"
    )
    moved, table = bundle.rename(bundle.parent / "elsewhere"), raw_table(3)
    command = [sys.executable, "-c", code, str(moved), json.dumps(table)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd="/")
    assert json.loads(done.stdout) == dlrm.load(moved).predict(table).tolist()


def test_a_flipped_byte_of_any_file_is_refused_by_its_name(bundle: Path) -> None:
    random = np.random.default_rng(0)
    files = [path for path in bundle.rglob("*") if path.is_file()]
    assert len(files) == 5 + 26
    for path in files:
        content = path.read_bytes()
        for place in (0, len(content) - 1, *random.integers(len(content), size=3)):
            flipped = bytearray(content)
            flipped[place] ^= 1 << int(random.integers(8))
            path.write_bytes(flipped)
            with pytest.raises(UserError, match=rf"{path.name}\b.*(export|dlrm that wrote it)"):
                dlrm.load(bundle)
        path.write_bytes(content)
    dlrm.load(bundle)


def test_a_file_of_another_length_is_refused_by_its_name(bundle: Path) -> None:
    for path in [path for path in bundle.rglob("*") if path.is_file()]:
        content = path.read_bytes()
        for other in (content[:-1], content + b"\n", b""):
            path.write_bytes(other)
            with pytest.raises(UserError, match=rf"{path.name} is damaged"):
                dlrm.load(bundle)
        path.write_bytes(content)
    dlrm.load(bundle)


def test_a_link_is_refused_by_its_name(bundle: Path, tmp_path: Path) -> None:
    """Of the content that is expected, even."""
    for name in ("vocabulary/cat_3.arrow", "vocabulary", "examples.json", "bundle.json"):
        (bundle / name).rename(tmp_path / "elsewhere")
        (bundle / name).symlink_to(tmp_path / "elsewhere")
        for verified in (False, True):
            with pytest.raises(UserError, match=rf"/{name} is a symbolic link to .*/elsewhere"):
                dlrm.load(bundle, verified=verified)
        (bundle / name).unlink()
        (tmp_path / "elsewhere").rename(bundle / name)
    (tmp_path / "current").symlink_to(bundle)
    dlrm.load(tmp_path / "current")


def test_a_missing_or_surplus_file_is_refused_by_its_name(bundle: Path) -> None:
    for name in ("vocabulary/cat_3.arrow", "examples.json", "model.onnx", "schema.json"):
        content = (bundle / name).read_bytes()
        (bundle / name).unlink()
        for verified in (False, True):
            with pytest.raises(UserError, match=rf"{name} is missing"):
                dlrm.load(bundle, verified=verified)
        (bundle / name).write_bytes(content)
    for name in ("vocabulary/more.arrow", ".hidden", "folder", "vocabulary/folder"):
        if "folder" in name:
            (bundle / name).mkdir()
        else:
            (bundle / name).write_text("")
        for verified in (False, True):
            with pytest.raises(UserError, match=rf"/{name} does not belong to the bundle"):
                dlrm.load(bundle, verified=verified)
        (bundle / name).rmdir() if "folder" in name else (bundle / name).unlink()
    dlrm.load(bundle)


def test_a_vocabulary_that_only_its_checksum_fits(bundle: Path) -> None:
    """As after a stranger's change, or where checksums were compared before it was damaged."""
    path = bundle / "vocabulary" / "cat_3.arrow"
    content = path.read_bytes()
    for damaged in (b"", content[: len(content) // 2], content.replace(b"value", b"vague")):
        path.write_bytes(damaged)
        relisted(bundle, "vocabulary/cat_3.arrow")
        with pytest.raises(UserError, match=r"cat_3\.arrow .* copy or export the bundle again"):
            dlrm.load(bundle)


def test_what_was_verified_already_is_not_read_again(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path) -> str:
        raise AssertionError(path)

    monkeypatch.setattr("dlrm.bundles.sha256", refuse)
    monkeypatch.setattr("dlrm.data.vocabulary.sha256", refuse)
    dlrm.load(bundle, verified=True)
    with pytest.raises(AssertionError):
        dlrm.load(bundle)


def test_a_server_opens_it_once(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For model, version and card, which so are of the same bundle, even if it is replaced."""
    opened: list[Path] = []
    open_bundle = Bundle.open

    def note(path: Path, **options: Any) -> Bundle:
        opened.append(path)
        return open_bundle(path, **options)

    monkeypatch.setattr(Bundle, "open", note)
    model = ServedModel.load(bundle, "m", 10)
    assert opened == [bundle]
    assert json.loads((bundle / "bundle.json").read_text())["sha256"].startswith(model.version)
    assert len(model.version) == 12
    assert len(model.card.examples) == 8


def test_other_versions_are_refused(bundle: Path) -> None:
    path = bundle / "bundle.json"
    content = path.read_text()
    for version in ("2.0", "1.99", "new"):
        path.write_text(
            content.replace('"format_version": "1.4"', f'"format_version": "{version}"')
        )
        with pytest.raises(UserError, match=rf"bundle\.json has format version '{version}'"):
            dlrm.load(bundle)


def resealed(bundle: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change bundle.json as a stranger would, with a checksum that fits."""
    content = json.loads((bundle / "bundle.json").read_text())
    change(content)
    write_info(bundle, msgspec.convert(content, BundleInfo))


def relisted(bundle: Path, name: str) -> None:
    """List a file as it is now."""
    path = bundle / name
    file = {"bytes": path.stat().st_size, "sha256": sha256(path)}
    resealed(bundle, lambda content: content["files"].update({name: file}))


@pytest.mark.parametrize(
    "name",
    ["../outside", "/etc/passwd", "vocabulary/../../outside", "a/b", "", "vocabulary/", ".."],
)
def test_a_file_outside_the_folder(bundle: Path, name: str) -> None:
    (bundle.parent / "outside").write_text("")
    file = {"bytes": 0, "sha256": sha256(bundle.parent / "outside")}
    resealed(bundle, lambda content: content["files"].update({name: file}))
    with pytest.raises(UserError, match=r"bundle\.json is damaged: .* is not the name of a file"):
        dlrm.load(bundle)


def test_what_is_no_file_is_not_waited_for(bundle: Path) -> None:
    (bundle / "examples.json").unlink()
    os.mkfifo(bundle / "examples.json")
    with pytest.raises(UserError, match=r"examples\.json is missing"):
        dlrm.load(bundle)


def test_weights_of_another_model(bundle: Path) -> None:
    resealed(bundle, lambda content: content["model"].update(over_arch_layer_sizes=[9, 1]))
    with pytest.raises(UserError, match=r"over_arch\.layers\.0\.bias is expected .* \(9,\)"):
        dlrm.load(bundle)
    resealed(bundle, lambda content: content["model"].update(over_arch_layer_sizes=[8, 1]))
    dlrm.load(bundle)
    resealed(bundle, lambda content: content.update(quantize="int4"))
    with pytest.raises(UserError, match=r"is expected to have shape .* got"):
        dlrm.load(bundle)
    resealed(bundle, lambda content: content.update(quantize="none"))
    resealed(bundle, lambda content: content["model"].update(embedding_dtype="float16"))
    with pytest.raises(UserError, match="is expected to be stored as F16, got F32"):
        dlrm.load(bundle)


@pytest.mark.parametrize("header", HEADERS.values(), ids=HEADERS.keys())
def test_headers_that_claim_what_cannot_be(bundle: Path, header: dict[str, Any]) -> None:
    encoded = json.dumps(header).encode()
    path = bundle / "model.safetensors"
    path.write_bytes(len(encoded).to_bytes(8, "little") + encoded + bytes(24))
    relisted(bundle, path.name)
    with pytest.raises(UserError, match=r"model\.safetensors is damaged"):
        dlrm.load(bundle)


def test_tables_that_do_not_lie_one_after_another(bundle: Path) -> None:
    """As a stranger's program would write them, which no reader of ours could map as one."""
    path = bundle / "model.safetensors"
    weights = load_file(path)
    save_file({name: weights[name].clone() for name in sorted(weights, reverse=True)}, path)
    relisted(bundle, path.name)
    with pytest.raises(UserError, match=r"the tables from .* on do not lie one after another"):
        dlrm.load(bundle)


@pytest.mark.parametrize("sizes", [[HUGE, 1], [2**62, 2**62, 1]])
def test_layers_that_no_memory_has(bundle: Path, sizes: list[int]) -> None:
    resealed(bundle, lambda content: content["model"].update(over_arch_layer_sizes=sizes))
    with pytest.raises(UserError, match=r"over_arch|is damaged"):
        dlrm.load(bundle)


def test_options_that_do_not_go_with_a_bundle(original: Path, run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds the best checkpoint alone"):
        dlrm.load(original, checkpoint="newest")
    four, eight = (QuantizationConfig(quantize_emb_with_bit=bits) for bits in (4, 8))
    np.testing.assert_array_equal(
        dlrm.load(original, quantization=eight).predict(raw_table(20)),
        dlrm.load(run, quantization=eight).predict(raw_table(20)),
    )
    export(run, tmp_path / "eight", format="onnx", quantize="int8")
    np.testing.assert_array_equal(
        dlrm.load(tmp_path / "eight").predict(raw_table(20)),
        dlrm.load(run, quantization=eight).predict(raw_table(20)),
    )
    with pytest.raises(UserError, match="has tables of 8 bits already"):
        dlrm.load(tmp_path / "eight", quantization=four)


def test_a_bundle_of_format_1_4_is_read() -> None:
    """Of tables of 8 bits; a feature with another slot, one that is hashed."""
    folder = Path(__file__).parent / "fixtures" / "bundle-1.4"
    opened = Bundle.open(folder)
    assert (opened.info.format_version, opened.info.quantize) == ("1.4", "int8")
    assert opened.info.trained.rows == {"train": 256, "validation": 100, "test": 100}
    rows = opened.examples().rows
    assert [row.features["cat_0"] for row in rows[:2]] == ["4ecde8b8", "d9c2825b"]
    table = {name: [row.features[name] for row in rows] for name in rows[0].features}
    found = dlrm.load(folder).predict(table)
    assert found.tolist() == pytest.approx([row.probability for row in rows], abs=1e-6)
