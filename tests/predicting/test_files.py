"""Files and pipes of rows to files and pipes of probabilities."""

from __future__ import annotations

import csv
import gzip
import io
import logging
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import dlrm
from dlrm import prediction
from dlrm.bundle.export import export
from dlrm.config import ModelConfig, QuantizationConfig, TrainConfig
from dlrm.data import criteo
from dlrm.errors import EnvironmentFaultError, UserError
from dlrm.predicting import files, inputs, outputs, work
from dlrm.predicting.files import predict_file
from dlrm.prediction import Predictor, load
from dlrm.training.begin import train

CONFIG = TrainConfig(
    model=ModelConfig(embedding_dim=4, dense_arch_layer_sizes=(8, 4), over_arch_layer_sizes=(8, 1)),
    evaluation_batch_size=64,
)
NAMES = (*criteo.DENSE_NAMES, *criteo.SPARSE_NAMES)


@pytest.fixture(scope="module")
def run(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    train(dataset, folder, CONFIG)
    return folder


@pytest.fixture(scope="module")
def predictor(run: Path) -> Predictor:
    return load(run)


@pytest.fixture(scope="module")
def sources(raw_rows: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The rows of train.txt in every format."""
    folder = tmp_path_factory.mktemp("sources")
    content = (raw_rows / "train.txt").read_bytes()
    rows = [line.split("\t") for line in content.decode().splitlines()]
    order = np.random.default_rng(0).permutation(40)
    names = ("label", *NAMES)
    text = io.StringIO()
    writer = csv.writer(text, quoting=csv.QUOTE_MINIMAL, lineterminator="\n")
    writer.writerow(["note", *(names[place] for place in order)])
    writer.writerows([[f"row, {n}", *(row[p] for p in order)] for n, row in enumerate(rows)])
    columns: dict[str, Any] = {"note": ["x"] * len(rows)}
    for place in order:
        cells = [row[place] or None for row in rows]
        is_id = names[place].startswith("cat_")
        columns[names[place]] = cells if is_id else [cell and int(cell) for cell in cells]
    made = {name: folder / name for name in ("rows.gz", "rows.csv", "rows.csv.gz", "rows.parquet")}
    made["rows.gz"].write_bytes(gzip.compress(content))
    made["rows.csv"].write_text(text.getvalue())
    made["rows.csv.gz"].write_bytes(gzip.compress(text.getvalue().encode()))
    pq.write_table(pa.table(columns), made["rows.parquet"], row_group_size=1000)
    return made | {"train.txt": raw_rows / "train.txt", "test.txt": raw_rows / "test.txt"}


@pytest.fixture(scope="module")
def expected(predictor: Predictor, sources: dict[str, Path]) -> npt.NDArray[np.float32]:
    """Row by row, without files, pools and blocks."""
    block = next(criteo.read_blocks(sources["train.txt"]))
    return predictor.predict_rows(block.dense, block.sparse)[0]


def read(path: Path) -> tuple[list[int], npt.NDArray[np.float32]]:
    if path.suffix == ".parquet":
        table = pq.read_table(path)
    elif path.suffix == ".arrow":
        table = pa.ipc.open_file(path.read_bytes()).read_all()
    else:
        content = path.read_bytes()
        text = (gzip.decompress(content) if path.suffix == ".gz" else content).decode()
        header, *rows = csv.reader(text.splitlines())
        assert header == ["Id", "Predicted"]
        return [int(row[0]) for row in rows], np.float32([row[1] for row in rows])
    assert table.schema == pa.schema([("Id", pa.int64()), ("Predicted", pa.float32())])
    return table["Id"].to_pylist(), table["Predicted"].to_numpy()


@pytest.mark.parametrize(
    "name", ["train.txt", "rows.gz", "rows.csv", "rows.csv.gz", "rows.parquet"]
)
def test_rows_of_every_format_get_the_same_probabilities(
    predictor: Predictor,
    sources: dict[str, Path],
    expected: npt.NDArray[np.float32],
    tmp_path: Path,
    name: str,
) -> None:
    """Recognised by content: no name tells the format."""
    source = tmp_path / "rows.data"
    source.symlink_to(sources[name])
    summary = predict_file(predictor, source, tmp_path / "out.csv")
    ids, probabilities = read(tmp_path / "out.csv")
    assert ids == list(range(3000))
    assert probabilities.tolist() == expected.tolist()
    assert summary.metrics is not None
    assert (summary.rows, summary.metrics.samples, summary.unknown_ids) == (3000, 3000, {})
    first = predict_file(predictor, sources["train.txt"], tmp_path / "first.csv")
    assert summary.metrics == first.metrics
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "first.csv",
        "out.csv",
        "rows.data",
    ]


@pytest.mark.parametrize("name", ["out.csv", "out.csv.gz", "out.txt", "out.parquet", "out.arrow"])
def test_every_output_holds_the_same_rows(
    predictor: Predictor,
    sources: dict[str, Path],
    expected: npt.NDArray[np.float32],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
) -> None:
    contents = []
    for number, (block_bytes, read_rows) in enumerate([(1 << 22, 1 << 18), (100_000, 700)]):
        monkeypatch.setattr(work, "_READ_ROWS", read_rows)
        monkeypatch.setattr(outputs, "_BATCH_ROWS", 1024)
        monkeypatch.setattr(criteo.read_blocks, "__kwdefaults__", defaults(block_bytes))
        output = tmp_path / f"{number}{name}"
        predict_file(predictor, sources["train.txt"], output, first_id=5)
        ids, probabilities = read(output)
        assert ids == list(range(5, 3005))
        assert probabilities.tolist() == expected.tolist()
        contents.append(output.read_bytes())
    assert contents[0] == contents[1]  # however rows were cut


def defaults(block_bytes: int) -> dict[str, Any]:
    return (criteo.read_blocks.__kwdefaults__ or {}) | {"block_bytes": block_bytes}


def test_ids_begin_where_kaggle_wants_them_for_criteos_test_rows_alone(
    predictor: Predictor, sources: dict[str, Path], tmp_path: Path
) -> None:
    predict_file(predictor, sources["test.txt"], tmp_path / "out.parquet")
    assert read(tmp_path / "out.parquet")[0][0] == 60000000
    table = pq.read_table(sources["rows.parquet"]).drop_columns("label")
    pq.write_table(table, tmp_path / "unlabelled.parquet")
    summary = predict_file(predictor, tmp_path / "unlabelled.parquet", tmp_path / "out.csv")
    assert read(tmp_path / "out.csv")[0][0] == 0
    assert summary.metrics is None


def test_a_format_can_be_said(
    predictor: Predictor, sources: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"rows\.csv, line 1: expected 40 tab-separated fields"):
        predict_file(predictor, sources["rows.csv"], tmp_path / "x.csv", input_format="criteo")
    with pytest.raises(UserError, match=r"train\.txt, line 1: expected a header, names of"):
        predict_file(predictor, sources["train.txt"], tmp_path / "x.csv", input_format="csv")
    with pytest.raises(UserError, match=r"rows\.csv cannot be read as Parquet"):
        predict_file(predictor, sources["rows.csv"], tmp_path / "x.csv", input_format="parquet")
    with pytest.raises(UserError, match=r"x\.parquet\.gz ends in \.gz, and parquet is not"):
        predict_file(predictor, sources["rows.csv"], tmp_path / "x.parquet.gz")
    predict_file(predictor, sources["rows.csv"], tmp_path / "named.csv", output_format="arrow")
    assert (tmp_path / "named.csv").read_bytes().startswith(b"ARROW1")
    assert [path.name for path in tmp_path.iterdir()] == ["named.csv"]


@pytest.mark.parametrize(
    ("head", "name", "format"),
    [
        (b"\t".join([b"1"] * 40) + b"\n", "rows.csv", "criteo"),
        (b"\t".join([b"1"] * 39) + b"\n", "x", "criteo"),
        (",".join(NAMES).encode() + b"\n", "rows.txt", "csv"),
        ("\t".join(NAMES).encode() + b"\n", "rows.txt", "csv"),
        (gzip.compress(";".join(NAMES).encode() + b"\n"), "rows.gz", "csv"),
        (b"PAR1", "rows.csv", "parquet"),
        (b"a,b\n", "rows.csv", "csv"),
        (b"a,b\n", "rows.csv.gz", "csv"),
        (b"a,b\n", "rows.parquet", "parquet"),
        (b"a,b\n", "rows.txt", "criteo"),
        (",".join(NAMES[:-1]).encode() + b"\n", "rows.txt", "csv"),
        (",".join((*NAMES, "int_0")).encode() + b"\n", "rows.txt", "csv"),
        (b"", "x", "criteo"),
        (b"\x1f\x8bdamaged", "x", "criteo"),
    ],
)
def test_formats_are_recognised(predictor: Predictor, head: bytes, name: str, format: str) -> None:
    assert inputs.recognise(head, name, predictor.schema) == format


def test_a_model_of_other_features_takes_no_rows_without_names(
    predictor: Predictor, sources: dict[str, Path]
) -> None:
    from dataclasses import replace

    schema = replace(predictor.schema, sparse=predictor.schema.sparse[:3])
    with (
        pytest.raises(UserError, match=r"features are others: int_0.*cat_2\. Give CSV"),
        inputs.open_input(sources["train.txt"], schema),
    ):
        pass


class Pipes:
    """Standard input and output in the place of this process's."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, source: Path) -> None:
        self.written = io.BytesIO()
        text = io.TextIOWrapper(self.written, write_through=True)
        monkeypatch.setattr(sys, "stdout", text)
        kept = os.dup(0)
        reader, writer = os.pipe()
        os.dup2(reader, 0)
        os.close(reader)
        self._feeder = subprocess.Popen(
            ["cat", str(source)], stdin=subprocess.DEVNULL, stdout=writer
        )
        os.close(writer)
        self._kept = kept

    def close(self) -> None:
        os.dup2(self._kept, 0)
        os.close(self._kept)
        self._feeder.wait()


@pytest.fixture
def pipes(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Path], Pipes]]:
    opened: list[Pipes] = []

    def open_pipes(source: Path) -> Pipes:
        opened.append(Pipes(monkeypatch, source))
        return opened[-1]

    yield open_pipes
    for each in opened:
        each.close()


@pytest.mark.parametrize("name", ["train.txt", "rows.gz", "rows.csv", "rows.csv.gz"])
@pytest.mark.parametrize("format", ["csv", "parquet", "arrow"])
def test_from_pipe_to_pipe(
    predictor: Predictor,
    sources: dict[str, Path],
    pipes: Callable[[Path], Pipes],
    tmp_path: Path,
    name: str,
    format: Any,
) -> None:
    both = pipes(sources[name])
    summary = predict_file(predictor, Path("-"), Path("-"), output_format=format)
    output = tmp_path / f"out.{format}"
    whole = predict_file(predictor, sources[name], output)
    assert both.written.getvalue() == output.read_bytes()
    assert summary == whole


def test_a_pipe_of_parquet_is_refused(
    predictor: Predictor, sources: dict[str, Path], pipes: Callable[[Path], Pipes]
) -> None:
    pipes(sources["rows.parquet"])
    with pytest.raises(UserError, match="standard input is a pipe, and Parquet is read from its"):
        predict_file(predictor, Path("-"), Path("-"))


def test_from_a_pipe_nothing_is_kept(
    predictor: Predictor,
    sources: dict[str, Path],
    pipes: Callable[[Path], Pipes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pipes(sources["train.txt"])
    monkeypatch.setattr(work.Work, "save", fail)
    with pytest.raises(EnvironmentFaultError, match="full"):
        predict_file(predictor, Path("-"), tmp_path / "out.csv")
    assert list(tmp_path.iterdir()) == []


def fail(*_: Any, **__: Any) -> None:
    raise EnvironmentFaultError("full")


def cut_short(monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    """Let the scoring of train.txt, in blocks of some hundred rows, fail after so many blocks."""
    left = [after]

    class Cut(work.Work):
        def add(self, *arguments: Any) -> None:
            if not left[0]:
                raise KeyboardInterrupt
            left[0] -= 1
            super().add(*arguments)

    monkeypatch.setattr(files, "Work", Cut)


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(criteo.read_blocks, "__kwdefaults__", defaults(100_000))


@pytest.mark.parametrize("name", ["out.csv", "out.csv.gz", "out.parquet", "out.arrow"])
def test_a_prediction_goes_on_where_it_was_cut_short(
    predictor: Predictor,
    sources: dict[str, Path],
    small_blocks: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    name: str,
) -> None:
    caplog.set_level(logging.INFO)
    whole = predict_file(predictor, sources["train.txt"], tmp_path / f"whole-{name}")
    output, folder = tmp_path / name, tmp_path / f".{name}.work"
    with monkeypatch.context() as patch:
        cut_short(patch, 3)
        with pytest.raises(KeyboardInterrupt):
            predict_file(predictor, sources["train.txt"], output)
    assert not output.exists()
    scored = (folder / "probabilities").stat().st_size // 4
    assert 1000 < scored < 1500
    # What a process that was killed wrote after its journal does not count.
    for file in ("probabilities", "labels"):
        with open(folder / file, "ab") as appended:
            appended.write(b"killed" * 1000)
    caplog.clear()
    assert predict_file(predictor, sources["train.txt"], output) == whole
    assert f"going on after {scored} rows that are scored already" in caplog.text
    assert f"scored {3000 - scored} rows" in caplog.text
    assert output.read_bytes() == (tmp_path / f"whole-{name}").read_bytes()
    assert not folder.exists()


@pytest.mark.parametrize("change", ["model", "unknown model", "input", "pipe", "size", "versions"])
def test_what_differs_is_kept_or_begun_anew(
    run: Path,
    predictor: Predictor,
    sources: dict[str, Path],
    small_blocks: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    change: str,
) -> None:
    caplog.set_level(logging.INFO)
    source, output = tmp_path / "rows.txt", tmp_path / "out.csv"
    source.write_bytes(sources["train.txt"].read_bytes())
    with monkeypatch.context() as patch:
        cut_short(patch, 3)
        with pytest.raises(KeyboardInterrupt):
            predict_file(predictor, source, output)
    now = predictor
    if change == "model":
        now = load(run, amp="O1")
    elif change == "unknown model":
        now = unknown(run, monkeypatch)
    elif change == "input":
        os.utime(source, ns=(1, 1))
    elif change == "pipe":
        os.rename(source, tmp_path / "kept.txt")
        os.mkfifo(source)
    elif change == "size":
        (tmp_path / ".out.csv.work" / "labels").write_bytes(b"")
    else:
        monkeypatch.setattr(files, "__version__", "0.0.0")
    torch_is = f"torch {torch.__version__}"
    named = {
        "model": r"--amp \(O0, now O1\)",
        "input": "the input",
        "pipe": r"the input \(which now has no checksum\)\. To go on with it, give what",
        "unknown model": r"the model \(which now has no checksum\)\. To go on with it, give what",
        "versions": re.escape(f"versions (dlrm {dlrm.__version__}, {torch_is}, now dlrm 0.0.0, "),
    }.get(change)
    feeders = []

    def feed() -> None:
        if change == "pipe":
            shell = f"exec cat {tmp_path / 'kept.txt'} > {source}"
            feeders.append(subprocess.Popen(["bash", "-c", shell]))

    before = (tmp_path / ".out.csv.work" / "probabilities").read_bytes()
    if named:
        feed()
        with pytest.raises(UserError, match=rf"holds \d+ rows .* differs in {named}.*--overwrite"):
            predict_file(now, source, output)
        assert (tmp_path / ".out.csv.work" / "probabilities").read_bytes() == before
    feed()
    predict_file(now, source, output, overwrite=bool(named))
    if named:
        told = named.removesuffix(r"\. To go on with it, give what")
        assert re.search(rf"differs in {told}.*; it is begun anew", caplog.text)
    assert "scored 3000 rows" in caplog.text
    assert not (tmp_path / ".out.csv.work").exists()
    feed()
    predict_file(now, source, tmp_path / "whole.csv")
    assert output.read_bytes() == (tmp_path / "whole.csv").read_bytes()
    for feeder in feeders:
        feeder.wait()


def unknown(run: Path, monkeypatch: pytest.MonkeyPatch) -> Predictor:
    """Load a model whose checkpoint has no checksum, as those of format 1.1."""
    with monkeypatch.context() as patch:
        patch.setattr(prediction, "checksum_of", lambda _: "")
        return load(run)


def test_what_a_killed_process_left_of_an_unknown_model_is_begun_anew(
    run: Path,
    sources: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Nobody could go on with it, so that there is nothing to refuse."""
    caplog.set_level(logging.INFO)
    model, output = unknown(run, monkeypatch), tmp_path / "out.csv"
    with monkeypatch.context() as patch:
        patch.setattr(files, "atomic_write", fail)
        patch.setattr(work.Work, "remove", lambda _: None)
        with pytest.raises(EnvironmentFaultError):
            predict_file(model, sources["train.txt"], output)
    assert (tmp_path / ".out.csv.work" / "probabilities").stat().st_size == 4 * 3000
    caplog.clear()
    predict_file(model, sources["train.txt"], output)
    assert "scored 3000 rows" in caplog.text
    assert list(tmp_path.iterdir()) == [output]


def test_a_bundle_goes_on_with_what_its_run_began(
    run: Path,
    predictor: Predictor,
    sources: dict[str, Path],
    expected: npt.NDArray[np.float32],
    small_blocks: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """They compute the same bits; with tables of fewer bits they do not."""
    caplog.set_level(logging.INFO)
    for bits in ("none", "int8"):
        export(run, tmp_path / bits, format="onnx", quantize=bits)
    with monkeypatch.context() as patch:
        cut_short(patch, 3)
        with pytest.raises(KeyboardInterrupt):
            predict_file(predictor, sources["train.txt"], tmp_path / "out.csv")
    with pytest.raises(
        UserError, match=r"differs in --quantize-emb-with-bit \(32, now 8\)\. To go"
    ):
        predict_file(load(tmp_path / "int8"), sources["train.txt"], tmp_path / "out.csv")
    predict_file(load(tmp_path / "none"), sources["train.txt"], tmp_path / "out.csv")
    assert "going on after" in caplog.text
    assert read(tmp_path / "out.csv")[1].tolist() == expected.tolist()
    eight = QuantizationConfig(quantize_emb_with_bit=8)
    assert load(tmp_path / "int8").identity == load(run, quantization=eight).identity
    # Without the kernels, which do not take O1, bits depend on how rows are cut into batches.
    assert load(run, amp="O1").identity.items() - predictor.identity.items() == {
        ("--amp", "O1"),
        ("--evaluation-batch-size", "64"),
    }


@pytest.mark.parametrize("name", ["out.csv", "out.csv.gz", "out.parquet"])
def test_an_output_that_is_written_already_is_told_of(
    predictor: Predictor,
    sources: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    name: str,
) -> None:
    """As when a process is killed before it has removed what the output was made from."""
    caplog.set_level(logging.INFO)
    output, folder = tmp_path / name, tmp_path / f".{name}.work"
    with monkeypatch.context() as patch:
        patch.setattr(work.Work, "remove", lambda _: None)
        whole = predict_file(predictor, sources["train.txt"], output)
    content = output.read_bytes()
    output.write_bytes(b"another")
    with pytest.raises(UserError, match=f"{name} is there already, and is not overwritten"):
        predict_file(predictor, sources["train.txt"], output)
    with pytest.raises(UserError, match=f"{name} is there already, and is not overwritten"):
        predict_file(predictor, sources["test.txt"], output)
    assert output.read_bytes() == b"another"
    output.write_bytes(content)
    caplog.clear()
    assert predict_file(predictor, sources["train.txt"], output) == whole
    assert f"{name} is written already; {folder} is removed" in caplog.text
    assert "rows/s" not in caplog.text
    assert (output.read_bytes(), list(tmp_path.iterdir())) == (content, [output])
    # Killed while it was removed: nobody can tell any more which output it was for.
    folder.mkdir()
    (folder / "probabilities").write_bytes(b"some")
    with pytest.raises(UserError, match=f"{name} is there already, and is not overwritten"):
        predict_file(predictor, sources["train.txt"], output)
    assert list(tmp_path.iterdir()) == [output]


def test_other_formats_and_ids_take_what_is_scored(
    predictor: Predictor,
    sources: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """They are about the output alone."""
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(files, "atomic_write", fail)
    with pytest.raises(EnvironmentFaultError):
        predict_file(predictor, sources["train.txt"], tmp_path / "out.csv")
    monkeypatch.undo()
    caplog.clear()
    monkeypatch.setattr(Predictor, "predict_rows", fail)
    predict_file(predictor, sources["train.txt"], tmp_path / "out.csv", first_id=9)
    assert "going on after 3000 rows" in caplog.text
    assert read(tmp_path / "out.csv")[0] == list(range(9, 3009))


def test_a_row_that_is_malformed_leaves_nothing(
    predictor: Predictor, sources: dict[str, Path], small_blocks: None, tmp_path: Path
) -> None:
    content = sources["train.txt"].read_text() + "1\t2\n"
    (tmp_path / "rows.txt").write_text(content)
    with pytest.raises(UserError, match="line 3001"):
        predict_file(predictor, tmp_path / "rows.txt", tmp_path / "out.csv")
    assert [path.name for path in tmp_path.iterdir()] == ["rows.txt"]


def test_two_predictions_of_one_output_are_refused(
    predictor: Predictor,
    sources: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    blocks = inputs.Input.blocks

    def other(*arguments: Any, **options: Any) -> Any:
        monkeypatch.setattr(inputs.Input, "blocks", blocks)
        with pytest.raises(UserError, match=r"out\.csv is being written by another process"):
            predict_file(predictor, sources["train.txt"], tmp_path / "out.csv")
        return blocks(*arguments, **options)

    monkeypatch.setattr(inputs.Input, "blocks", other)
    predict_file(predictor, sources["train.txt"], tmp_path / "out.csv")
    assert len(read(tmp_path / "out.csv")[0]) == 3000


@pytest.mark.parametrize("threads", [1, 3])
def test_few_blocks_are_held_at_a_time(threads: int) -> None:
    """However many there are: what bounds the memory of a prediction."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    taken = 0

    def items() -> Iterator[int]:
        nonlocal taken
        for item in range(50):
            taken += 1
            yield item

    try:
        for number, result in enumerate(files.in_threads(items(), lambda item: item * item)):
            assert result == number * number
            assert taken <= number + 1 + threads + 2
    finally:
        torch.set_num_threads(before)
    assert taken == 50


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_change_nothing(
    predictor: Predictor,
    sources: dict[str, Path],
    expected: npt.NDArray[np.float32],
    small_blocks: None,
    tmp_path: Path,
    threads: int,
) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        predict_file(predictor, sources["train.txt"], tmp_path / "out.csv")
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert read(tmp_path / "out.csv")[1].tolist() == expected.tolist()


def test_a_model_without_kernels_is_scored_by_pytorch(
    run: Path, sources: dict[str, Path], expected: npt.NDArray[np.float32], tmp_path: Path
) -> None:
    predict_file(load(run, amp="O1"), sources["train.txt"], tmp_path / "out.csv")
    np.testing.assert_allclose(read(tmp_path / "out.csv")[1], expected, atol=0.01)


def test_criteos_real_rows(predictor: Predictor, shared_data: Path, tmp_path: Path) -> None:
    """Of which the made-up vocabularies know few values."""
    (source,) = (shared_data / "criteo/kaggle").glob("train*.txt")
    text = tmp_path / "rows.csv"
    lines = source.read_text().splitlines()
    text.write_text(
        "\n".join([",".join(("label", *NAMES)), *(line.replace("\t", ",") for line in lines), ""])
    )
    summaries = [
        predict_file(predictor, path, tmp_path / f"{number}.parquet")
        for number, path in enumerate((source, text))
    ]
    assert summaries[0] == summaries[1]
    assert summaries[0].rows == len(lines)
    first, second = (read(tmp_path / f"{number}.parquet") for number in (0, 1))
    assert first[0] == second[0]
    assert first[1].tolist() == second[1].tolist()
