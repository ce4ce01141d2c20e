import csv
import gzip
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

import dlrm
from dlrm.config import ModelConfig, PrepareConfig, TrainConfig
from dlrm.data import criteo
from dlrm.data.prepare import prepare
from dlrm.errors import UserError
from dlrm.evaluation import evaluate
from dlrm.predicting.files import predict_file
from dlrm.prediction import load
from dlrm.training.begin import train

CONFIG = TrainConfig(
    model=ModelConfig(embedding_dim=4, dense_arch_layer_sizes=(8, 4), over_arch_layer_sizes=(8, 1)),
    evaluation_batch_size=64,
)


@pytest.fixture(scope="module")
def run(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    train(dataset, folder, CONFIG)
    return folder


def read(path: Path) -> tuple[list[int], list[float]]:
    with open(path, newline="") as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["Id", "Predicted"]
    return [int(row[0]) for row in rows[1:]], [float(row[1]) for row in rows[1:]]


def test_rows_without_labels_become_a_submission(run: Path, raw_rows: Path, tmp_path: Path) -> None:
    summary = predict_file(load(run), raw_rows / "test.txt", tmp_path / "out.csv")
    ids, probabilities = read(tmp_path / "out.csv")
    assert ids == list(range(60000000, 60000300))
    assert all(0 < probability < 1 for probability in probabilities)
    assert len(set(probabilities)) > 200
    assert (summary.rows, summary.metrics) == (300, None)


def test_raw_training_rows_get_the_very_probabilities_of_evaluation(
    run: Path, raw_rows: Path, tmp_path: Path
) -> None:
    """The file's last seventh is the test split and then the validation split."""
    summary = predict_file(load(run), raw_rows / "train.txt", tmp_path / "out.csv")
    ids, probabilities = read(tmp_path / "out.csv")
    assert ids == list(range(3000))
    stored = [
        pa.ipc.open_file(run / f"predictions/{split}.arrow").read_all()["probability"].to_numpy()
        for split in ("test", "validation")
    ]
    expected = np.concatenate(stored)
    assert len(expected) in (428, 429)
    np.testing.assert_allclose(np.float32(probabilities[-len(expected) :]), expected, rtol=1e-6)
    assert summary.unknown_ids == {}
    assert summary.metrics is not None
    assert summary.metrics.samples == 3000


def test_a_run_predicts_without_its_dataset(raw_rows: Path, run: Path, tmp_path: Path) -> None:
    predict_file(load(run), raw_rows / "test.txt", tmp_path / "with.csv")
    alone = tmp_path / "elsewhere"
    prepare(raw_rows, tmp_path / "dataset", PrepareConfig())
    train(tmp_path / "dataset", tmp_path / "run", CONFIG)
    shutil.move(tmp_path / "run", alone)
    shutil.rmtree(tmp_path / "dataset")
    predict_file(load(alone), raw_rows / "test.txt", tmp_path / "alone.csv")
    assert (tmp_path / "alone.csv").read_bytes() == (tmp_path / "with.csv").read_bytes()


def test_loading_takes_no_pandas(run: Path) -> None:
    """Arrow would import it, which takes half a second, in every process of a server too."""
    script = f"import sys, dlrm; dlrm.load({str(run)!r}); sys.exit('pandas' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


def test_a_table_in_memory_gives_the_probabilities_of_the_file(
    run: Path, raw_rows: Path, tmp_path: Path
) -> None:
    predictor = dlrm.load(run)
    predict_file(predictor, raw_rows / "test.txt", tmp_path / "out.csv")
    names = [f.name for f in (*predictor.schema.dense, *predictor.schema.sparse)]
    fields = [line.split("\t") for line in (raw_rows / "test.txt").read_text().splitlines()]
    columns: dict[str, list[int | str | None]] = {}
    for index, name in enumerate(names):
        texts = [row[index] or None for row in fields]
        columns[name] = [t and int(t) for t in texts] if name.startswith("int_") else texts
    expected = np.float32(read(tmp_path / "out.csv")[1])
    np.testing.assert_array_equal(predictor.predict(columns), expected)
    np.testing.assert_array_equal(predictor.predict(pa.table(columns)), expected)


def test_other_data_than_the_models_are_warned_of(
    run: Path, raw_rows: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    predict_file(load(run), raw_rows / "train.txt", tmp_path / "out.csv")
    assert "never seen" not in caplog.text
    fields = ["1"] * 13 + ["ffffff01"] * 26
    (tmp_path / "row.txt").write_text("\t".join(fields) + "\n")
    predict_file(load(run), tmp_path / "row.txt", tmp_path / "other.csv")
    assert "100% of the categorical values were never seen in training" in caplog.text


def test_an_unknown_id_is_an_empty_bag_and_is_counted(
    run: Path, raw_rows: Path, tmp_path: Path
) -> None:
    predictor = load(run)
    line = (raw_rows / "test.txt").read_text().splitlines()[0].split("\t")
    block = next(criteo.read_blocks(raw_rows / "test.txt"))
    # A value that no row has: cat_3 is field 17 of a row without a label.
    known = {row.split("\t")[17] for row in (raw_rows / "train.txt").read_text().splitlines()}
    line[13 + 3] = "ffffff01"
    assert line[13 + 3] not in known
    (tmp_path / "row.txt").write_text("\t".join(line) + "\n")
    summary = predict_file(predictor, tmp_path / "row.txt", tmp_path / "out.csv")
    assert summary.unknown_ids == {"cat_3": 1}
    # The same as a model whose row for the known value is zero.
    assert predictor.encoder
    ids, _ = predictor.encoder.encode(block.sparse[:1])
    table = predictor.model.sparse_arch.split(predictor.model.sparse_arch.arena.detach())[3]
    if ids[0, 3] >= 0:
        table[ids[0, 3]] = 0
    zeroed = predictor.predict_rows(block.dense[:1], block.sparse[:1])[0]
    np.testing.assert_allclose(np.float32(read(tmp_path / "out.csv")[1]), zeroed, rtol=1e-6)


def test_first_id_can_be_chosen(run: Path, raw_rows: Path, tmp_path: Path) -> None:
    predict_file(load(run), raw_rows / "test.txt", tmp_path / "out.csv", first_id=7)
    assert read(tmp_path / "out.csv")[0] == list(range(7, 307))


def test_a_malformed_row_leaves_no_output(run: Path, raw_rows: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.txt").write_text((raw_rows / "test.txt").read_text() + "1\t2\n")
    with pytest.raises(UserError, match="301"):
        predict_file(load(run), tmp_path / "bad.txt", tmp_path / "out.csv")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.txt"]


def test_output_onto_the_input_is_refused(run: Path, raw_rows: Path, tmp_path: Path) -> None:
    shutil.copy(raw_rows / "test.txt", tmp_path / "rows.txt")
    with pytest.raises(UserError, match="is the input too"):
        predict_file(load(run), tmp_path / "rows.txt", tmp_path / "rows.txt")


def test_an_output_that_is_there_is_only_replaced_when_asked_for(
    run: Path, raw_rows: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out.csv"
    output.write_text("precious")
    with pytest.raises(UserError, match=r"out\.csv is there already.*--overwrite"):
        predict_file(load(run), raw_rows / "test.txt", output)
    assert output.read_text() == "precious"
    predict_file(load(run), raw_rows / "test.txt", output, overwrite=True)
    assert len(read(output)[0]) == 300


def test_an_output_is_compressed_as_its_name_says(
    run: Path, raw_rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    predictor = load(run)
    packed = []
    for number, name in enumerate(("out.csv", "a.csv.gz", "b.csv.gz")):
        monkeypatch.setattr("time.time", lambda now=number: float(now))
        predict_file(predictor, raw_rows / "test.txt", tmp_path / name)
        packed.append((tmp_path / name).read_bytes())
    assert gzip.decompress(packed[1]) == packed[0]
    assert packed[1] == packed[2]


def test_an_output_folder_that_is_not_there_is_named(
    run: Path, raw_rows: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="nowhere is not a folder"):
        predict_file(load(run), raw_rows / "test.txt", tmp_path / "nowhere" / "out.csv")


def test_evaluate_refuses_another_dataset_by_fingerprint(
    run: Path, raw_rows: Path, tmp_path: Path
) -> None:
    prepare(raw_rows, tmp_path / "other", PrepareConfig(max_ind_range=50))
    with pytest.raises(UserError, match=r"is not the DATASET that .* was trained on"):
        evaluate(run, "test", dataset=tmp_path / "other")


def test_a_run_that_is_not_finished_is_told(
    run: Path, dataset: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    load(run)
    evaluate(run, "test")
    assert "not finished" not in caplog.text
    unfinished = tmp_path / "run"
    shutil.copytree(run, unfinished)
    (unfinished / "result.json").unlink()
    for use in (lambda: load(unfinished), lambda: evaluate(unfinished, "test", dataset=dataset)):
        caplog.clear()
        use()
        assert f"{unfinished} is not finished" in caplog.text
        assert f"`dlrm train --resume {unfinished}` goes on" in caplog.text
    caplog.clear()
    (unfinished / "log.jsonl").unlink()  # a model that was imported
    load(unfinished)
    assert caplog.text == ""


def test_evaluate_covers_the_training_split_too(run: Path) -> None:
    result = evaluate(run, "train")
    assert result.metrics.samples > 2500
