"""Files of a stranger: what they claim takes no memory, and leads nowhere outside their folder."""

from __future__ import annotations

import io
import json
import resource
import shutil
import struct
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa
import pytest
import torch

import dlrm
from dlrm.arrow import open_arrow
from dlrm.checkpoint import CheckpointInfo, Position, load_weights, read_info, verify
from dlrm.config import ModelConfig, TrainConfig
from dlrm.data.dataset import Dataset
from dlrm.data.npz import open_npz
from dlrm.data.spool import Spool
from dlrm.data.vocabulary import Encoder, Vocabulary
from dlrm.errors import UserError
from dlrm.model.dlrm import DLRM
from dlrm.reference.checkpoint import convert, read_checkpoint
from dlrm.runs import open_run
from dlrm.schema import DenseFeature, FeatureSchema, SparseFeature, read_schema, write_schema
from hostile_headers import HEADERS, HUGE

MODEL = ModelConfig(embedding_dim=2, dense_arch_layer_sizes=(2,), over_arch_layer_sizes=(1,))
SCHEMA = FeatureSchema("y", (DenseFeature("a"),), (SparseFeature("b", 3),), "made-up", "none")


@pytest.fixture(autouse=True)
def little_memory() -> Iterator[None]:
    """No test may take memory for what a file only claims to hold."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 150_000  # KiB


@pytest.fixture(scope="module")
def run(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("trained") / "run"
    dlrm.train(dataset, run, TrainConfig(model=MODEL, mini_batch_size=256, max_steps=1))
    return run


def copied(folder: Path, target: Path) -> Path:
    return Path(shutil.copytree(folder, target))


def edit(path: Path, change: Callable[[Any], object]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize("header", HEADERS.values(), ids=HEADERS.keys())
def test_a_checkpoint_and_a_spool(tmp_path: Path, header: dict[str, Any]) -> None:
    info = CheckpointInfo(Position(), MODEL, "", "")
    metadata = {"dlrm": msgspec.json.encode(info).decode(), "sha256": "0" * 64}
    encoded = json.dumps({"__metadata__": metadata, **header}).encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(encoded).to_bytes(8, "little") + encoded + bytes(24))
    model = DLRM(SCHEMA, MODEL)
    for read in (read_info, verify, lambda path: load_weights(path, model, verified=True)):
        with pytest.raises(UserError, match=r"x\.safetensors cannot be read as a checkpoint"):
            read(path)
    spool = Spool(tmp_path / "spool")
    shutil.copy(path, tmp_path / "spool/rows-00000.safetensors")
    with pytest.raises(UserError, match=r"rows-00000\.safetensors is damaged"):
        spool.labels(0)


def test_a_safetensors_header_longer_than_the_file(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    for length in (HUGE, 2**63, 200):
        path.write_bytes(length.to_bytes(8, "little") + b"{}")
        with pytest.raises(UserError, match="cannot be read as a checkpoint"):
            verify(path)
        with pytest.raises(UserError):
            dlrm.files.verify_safetensors(path)


@pytest.mark.parametrize("which", ["part", "vocabulary"])
def test_every_number_of_an_arrow_file(dataset: Path, tmp_path: Path, which: str) -> None:
    """Each aligned word of all that is no row, replaced by a huge and by a negative number."""
    folder = copied(dataset, tmp_path / "dataset")
    data = Dataset.open(folder)
    path = folder / "validation/part-00000.arrow" if which == "part" else folder / "vocabulary"
    if which == "vocabulary":
        path = path / data.schema.sparse[2].vocabulary

    def read() -> None:
        if which == "part":
            for batch in data.batches("validation", 100):
                assert batch.sparse_features.numel() <= 26 * 100
        else:
            Vocabulary.read(path)

    content = path.read_bytes()
    footer = int.from_bytes(content[-10:-6], "little")
    read()
    refused = 0
    begin = range(8, 700, 4)  # the schema and the first block's metadata
    end = range(len(content) - 10 - footer, len(content) - 8, 4)
    for place in (*begin, *end):
        for number in (HUGE, -8):
            damaged = bytearray(content)
            damaged[place : place + 8] = struct.pack("<q", number)
            path.write_bytes(damaged[: len(content)])
            try:
                read()
            except UserError:
                refused += 1
    assert refused > 100


@pytest.mark.parametrize("codec", ["lz4", "zstd"])
@pytest.mark.parametrize("which", ["part", "vocabulary", "predictions"])
def test_an_arrow_file_that_is_packed(
    run: Path, dataset: Path, tmp_path: Path, which: str, codec: str
) -> None:
    """What is packed is refused, since Arrow takes the memory that it claims to need at once."""
    data = Dataset.open(copied(dataset, tmp_path / "dataset"))
    here = copied(run, tmp_path / "run")
    path = {
        "part": data.path / "validation/part-00000.arrow",
        "vocabulary": here / "vocabulary" / data.schema.sparse[2].vocabulary,
        "predictions": here / "predictions/test.arrow",
    }[which]

    def read() -> None:
        if which == "part":
            list(data.batches("validation", 100))
        elif which == "vocabulary":
            Vocabulary.read(path)
        else:
            list(open_run(here).predictions("test").batches())

    read()
    with pa.OSFile(str(path)) as file:
        table = pa.ipc.open_file(file).read_all()
    options = pa.ipc.IpcWriteOptions(compression=codec)
    with (
        pa.OSFile(str(path), "wb") as file,
        pa.ipc.new_file(file, table.schema, options=options) as writer,
    ):
        writer.write_table(table)
    with pytest.raises(UserError, match=r"\.arrow.*: a record batch is compressed"):
        read()


def test_an_arrow_file_with_dictionaries(tmp_path: Path) -> None:
    path = tmp_path / "x.arrow"
    table = pa.table({"a": pa.array(["b", "c"]).dictionary_encode()})
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)
    with pytest.raises(pa.ArrowInvalid, match="it has dictionaries"), open_arrow(path):
        pass


@pytest.mark.parametrize(
    "name", ["../outside.arrow", "train/../../outside.arrow", "/etc/passwd", "train/", "outside"]
)
def test_a_part_outside_the_dataset(dataset: Path, tmp_path: Path, name: str) -> None:
    folder = copied(dataset, tmp_path / "dataset")
    shutil.copy(folder / "train/part-00000.arrow", tmp_path / "outside.arrow")
    edit(folder / "manifest.json", lambda it: it["splits"]["train"]["parts"][0].update(file=name))
    with pytest.raises(UserError, match="cannot be a part of train"):
        Dataset.open(folder)


@pytest.mark.parametrize("clicks", [HUGE, -1])
def test_clicks_of_more_rows_than_there_are(dataset: Path, tmp_path: Path, clicks: int) -> None:
    folder = copied(dataset, tmp_path / "dataset")
    edit(folder / "manifest.json", lambda it: it["splits"]["train"].update(clicks=clicks))
    with pytest.raises(UserError, match=rf"is damaged: {clicks} clicks in the 2\d\d\d rows of the"):
        Dataset.open(folder)


@pytest.mark.parametrize("rows", [HUGE, -1])
def test_rows_that_do_not_fit_into_a_part(dataset: Path, tmp_path: Path, rows: int) -> None:
    folder = copied(dataset, tmp_path / "dataset")
    manifest = folder / "manifest.json"
    edit(manifest, lambda it: it["splits"]["test"].update(rows=rows))
    with pytest.raises(UserError, match=r"expected .* rows in the test split, got 2"):
        Dataset.open(folder)
    edit(manifest, lambda it: it["splits"]["test"]["parts"][0].update(rows=rows))
    with pytest.raises(UserError, match="cannot be a part of test"):
        Dataset.open(folder)


@pytest.mark.parametrize("name", ["../../outside.arrow", "/etc/passwd", "..", "a/b", "a\0b"])
def test_a_vocabulary_outside_the_folder(run: Path, tmp_path: Path, name: str) -> None:
    """It would be read there; and written there, when a RUN takes over the DATASET's."""
    here = copied(run, tmp_path / "run")
    edit(here / "schema.json", lambda it: it["sparse"][0].update(vocabulary=name))
    for read in (lambda: dlrm.load(here), lambda: dlrm.evaluate(here), lambda: dlrm.resume(here)):
        if read is not None and (here / "result.json").exists():
            (here / "result.json").unlink()
        with pytest.raises(UserError, match=r"expected the name of a file in vocabulary/"):
            read()


@pytest.mark.parametrize(
    "change",
    [
        {"num_embeddings": 2**62},
        {"num_embeddings": -1},
        {"other_id": 10**6},
        {"other_id": -2},
        {"hash_buckets": 10**6},
        {"id_modulus": -5},
    ],
    ids=str,
)
def test_tables_that_cannot_be(run: Path, tmp_path: Path, change: dict[str, int]) -> None:
    here = copied(run, tmp_path / "run")
    edit(here / "schema.json", lambda it: it["sparse"][0].update(change))
    with pytest.raises(UserError, match="which do not fit together"):
        dlrm.load(here)


def test_ids_beyond_a_table_are_refused_before_they_are_looked_up(
    run: Path, dataset: Path, tmp_path: Path
) -> None:
    """A RUN's schema may be smaller than its DATASET's only by a modulus."""
    schema = read_schema(run, "run")
    small = replace(schema.sparse[2], num_embeddings=1)
    schema = replace(schema, sparse=(*schema.sparse[:2], small, *schema.sparse[3:]))
    with pytest.raises(UserError, match="the model a table of 1 rows: they do not belong"):
        next(Dataset.open(dataset).batches("train", 10, schema=schema))
    here = copied(run, tmp_path / "run")
    write_schema(here, schema)
    with pytest.raises(UserError, match=r"is damaged: its ids are 0 … \d+, and the table of"):
        Encoder.open(here, read_schema(here, "run"))
    limited = schema.with_max_ind_range(1)
    batch = next(Dataset.open(dataset).batches("train", 10, schema=limited))
    assert batch.sparse_features.max() == 0


def npz(path: Path, shape: tuple[int, ...], content: bytes, method: int, size: int | None) -> None:
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": "<i4", "fortran_order": False, "shape": shape}
    )
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.writestr("x.npy", header.getvalue() + content)
    if size is not None:  # in the directory at the file's end
        raw = bytearray(path.read_bytes())
        place = raw.rindex(b"PK\1\2") + 24
        raw[place : place + 4] = struct.pack("<I", size)
        path.write_bytes(raw)


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_an_npz(tmp_path: Path, method: int) -> None:
    path = tmp_path / "x.npz"
    rows = (2**32 - 256) // 4
    for shape, size in (((rows,), 128 + rows * 4), ((HUGE, 13), None), ((-1, -6), None)):
        npz(path, shape, bytes(24), method, size)
        with pytest.raises(UserError, match="is damaged, or not written by NumPy"):
            open_npz(path)
    path.write_bytes(b"")
    with zipfile.ZipFile(path, "w", method) as archive:  # a header that claims 2 GB, and has them
        archive.writestr("x.npy", b"\x93NUMPY\2\0" + struct.pack("<I", 2**31) + bytes(1 << 20))
    with pytest.raises(UserError, match="is damaged, or not written by NumPy"):
        open_npz(path)


def reference_checkpoint(**change: Any) -> dict[str, Any]:
    model = DLRM(SCHEMA, MODEL)
    arena = model.sparse_arch.arena.detach()
    state = {
        "emb_l.0.weight": arena.clone(),
        **{
            f"{theirs}.{name}": tensor
            for theirs, layers in (("bot_l", model.dense_arch), ("top_l", model.over_arch))
            for name, tensor in layers.layers.state_dict().items()
        },
    }
    numbers = dict.fromkeys(("epoch", "iter", "nepochs", "nbatches", "nbatches_test"), 1)
    content: dict[str, Any] = {"state_dict": state, "opt_state_dict": {}, **numbers}
    return content | {"train_loss": 0.5, "test_acc": 0.5} | change


def test_a_pt_that_is_packed_or_claims_too_much(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    torch.save(reference_checkpoint(), path)
    assert convert(read_checkpoint(path), SCHEMA, MODEL)
    with zipfile.ZipFile(path) as archive:
        members = {each.filename: archive.read(each) for each in archive.infolist()}
    packed = tmp_path / "packed.pt"
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    claiming = tmp_path / "claiming.pt"
    raw = bytearray(path.read_bytes())
    place = raw.rindex(b"PK\1\2") + 24
    raw[place : place + 4] = struct.pack("<I", 2**32 - 2)
    claiming.write_bytes(raw)
    for bad in (packed, claiming):
        with pytest.raises(UserError, match="is packed, or claims to be larger than the file"):
            read_checkpoint(bad)


@pytest.mark.parametrize("kind", ["sum", "momentum"])
def test_optimizer_state_of_a_pt_that_is_larger_than_its_table(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "x.pt"
    # Of a few bytes, and yet of any size: its stride is 0.
    state = {0: {"step": 1, kind: torch.zeros(1).expand(HUGE, 2)}}
    torch.save(reference_checkpoint(opt_state_dict={"state": state, "param_groups": []}), path)
    with pytest.raises(UserError, match=rf"the {kind} of emb_l\.0\.weight is expected to have"):
        convert(read_checkpoint(path), SCHEMA, MODEL)


def test_a_tensor_beyond_its_storage_in_a_pt(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    content = reference_checkpoint()
    content["state_dict"]["emb_l.0.weight"] = torch.zeros(1).expand(HUGE, 16)
    torch.save(content, path)
    with pytest.raises(UserError, match=r"emb_l\.0\.weight is expected to have shape \(3, 2\)"):
        convert(read_checkpoint(path), SCHEMA, MODEL)


def test_the_dataset_that_a_run_names_is_read_and_not_written(
    run: Path, dataset: Path, tmp_path: Path
) -> None:
    here = copied(run, tmp_path / "run")
    (here / "result.json").unlink()
    elsewhere = copied(dataset, tmp_path / "elsewhere")
    config = here / "config.toml"
    config.write_text(config.read_text().replace(str(dataset), "../elsewhere"))
    before = {path: path.read_bytes() for path in elsewhere.rglob("*") if path.is_file()}
    assert dlrm.evaluate(here).metrics.samples > 0
    dlrm.resume(here)
    assert before == {path: path.read_bytes() for path in elsewhere.rglob("*") if path.is_file()}
