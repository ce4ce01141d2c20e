from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa
import pytest
import torch
from safetensors import safe_open

from dlrm.config import (
    LossConfig,
    ModelConfig,
    OptimizerConfig,
    PrepareConfig,
    TrainConfig,
    read_config,
)
from dlrm.data.dataset import Dataset
from dlrm.data.prepare import prepare
from dlrm.errors import UserError
from dlrm.evaluation import evaluate, evaluate_split
from dlrm.metrics import compute_metrics
from dlrm.model.dlrm import DLRM, initialize
from dlrm.model.loss import mean_loss
from dlrm.runs import Run
from dlrm.training.begin import train
from dlrm.training.events import Evaluation, Events, Report, Start, Stop

pytestmark = pytest.mark.usefixtures("kernels")

MODEL = ModelConfig(embedding_dim=4, dense_arch_layer_sizes=(8, 4), over_arch_layer_sizes=(8, 1))
CONFIG = TrainConfig(model=MODEL, mini_batch_size=128, print_freq=5)


@dataclass
class Recorder(Events):
    """Keeps all it is told."""

    start: Start | None = None
    stop: Stop | None = None
    reports: list[Report] = field(default_factory=list)
    evaluations: list[Evaluation] = field(default_factory=list)

    def on_start(self, start: Start) -> None:
        self.start = start

    def on_report(self, report: Report) -> None:
        self.reports.append(report)

    def on_evaluation(self, evaluation: Evaluation) -> None:
        self.evaluations.append(evaluation)

    def on_stop(self, stop: Stop) -> None:
        self.stop = stop

    def report_steps(self) -> list[tuple[int, int]]:
        return [(report.position.epoch, report.position.step) for report in self.reports]

    def evaluation_steps(self) -> list[tuple[int, int]]:
        return [(each.position.epoch, each.position.step) for each in self.evaluations]


def weights(run: Path, which: str = "newest") -> bytes:
    return (run / "checkpoints" / f"{which}.safetensors").read_bytes()


def steps_of(dataset: Path, config: TrainConfig = CONFIG) -> int:
    return math.ceil(Dataset.open(dataset).rows("train") / config.mini_batch_size)


def test_losses_and_weights_equal_a_plain_loop_with_torch_optim(
    dataset: Path, tmp_path: Path
) -> None:
    config = replace(CONFIG, print_freq=1)
    recorder = Recorder()
    train(dataset, tmp_path / "run", config, [recorder])

    data = Dataset.open(dataset)
    model = DLRM(data.schema, MODEL)
    initialize(model, np.random.RandomState(config.seed))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    expected = []
    for batch in data.batches("train", 128):
        assert batch.labels is not None
        optimizer.zero_grad()
        loss = mean_loss(model(batch), batch.labels, LossConfig())
        loss.backward()
        optimizer.step()
        expected.append(loss.item())
    assert len(expected) == steps_of(dataset)
    np.testing.assert_allclose([report.loss for report in recorder.reports], expected, rtol=1e-5)
    with safe_open(tmp_path / "run/checkpoints/newest.safetensors", framework="pt") as file:
        for name, value in model.state_dict().items():
            torch.testing.assert_close(
                file.get_tensor(f"model.{name}"), value, rtol=1e-4, atol=1e-6
            )


def test_a_report_is_the_mean_over_rows_since_the_last_one(dataset: Path, tmp_path: Path) -> None:
    each, grouped = Recorder(), Recorder()
    train(dataset, tmp_path / "each", replace(CONFIG, print_freq=1), [each])
    train(dataset, tmp_path / "grouped", replace(CONFIG, print_freq=10**6), [grouped])
    rows = Dataset.open(dataset).rows("train")
    sizes = [128] * (len(each.reports) - 1) + [rows - 128 * (len(each.reports) - 1)]
    assert sizes[-1] < 128  # the last batch is short, and counts with its rows
    losses = [report.loss for report in each.reports]
    assert grouped.reports[0].loss == pytest.approx(np.average(losses, weights=sizes))


def test_reports_and_evaluations_come_when_they_are_due(dataset: Path, tmp_path: Path) -> None:
    recorder = Recorder()
    train(dataset, tmp_path / "run", replace(CONFIG, epochs=2, test_freq=7), [recorder])
    last = steps_of(dataset)
    evaluations = sorted({*range(7, last, 7), last})
    reports = sorted({*evaluations, *range(5, last + 1, 5)})
    assert recorder.evaluation_steps() == [(e, s) for e in range(2) for s in evaluations]
    assert recorder.report_steps() == [(e, s) for e in range(2) for s in reports]
    assert recorder.stop is not None
    assert recorder.stop.reason == "all epochs done"
    assert (recorder.stop.position.epoch, recorder.stop.position.step) == (2, 0)


def test_no_evaluation_while_training_when_test_freq_is_minus_one(
    dataset: Path, tmp_path: Path
) -> None:
    recorder = Recorder()
    result = train(dataset, tmp_path / "run", replace(CONFIG, test_freq=-1), [recorder])
    assert recorder.evaluations == []
    assert set(result.metrics) == {"validation", "test"}
    assert weights(tmp_path / "run", "best") == weights(tmp_path / "run")


@pytest.mark.parametrize("optimizer", ["sgd", "adagrad", "rowwise_adagrad"])
def test_equal_runs_give_equal_bytes_and_another_seed_does_not(
    dataset: Path, tmp_path: Path, optimizer: Any
) -> None:
    config = replace(
        CONFIG,
        model=replace(MODEL, dropout=0.2),
        optimizer=OptimizerConfig(optimizer=optimizer, learning_rate=0.05),
        test_freq=6,
    )
    first = train(dataset, tmp_path / "first", config)
    second = train(dataset, tmp_path / "second", config)
    other = train(dataset, tmp_path / "other", replace(config, seed=124))
    for which in ("newest", "best"):
        assert weights(tmp_path / "first", which) == weights(tmp_path / "second", which)
        assert weights(tmp_path / "first", which) != weights(tmp_path / "other", which)
    for split in ("validation", "test"):
        predictions = [tmp_path / run / f"predictions/{split}.arrow" for run in ("first", "second")]
        assert predictions[0].read_bytes() == predictions[1].read_bytes()
    assert first.metrics == second.metrics
    assert first.metrics != other.metrics


@pytest.mark.parametrize("optimizer", ["sgd", "adagrad", "rowwise_adagrad"])
def test_continuing_within_an_epoch_equals_never_having_stopped(
    dataset: Path, tmp_path: Path, optimizer: Any
) -> None:
    config = replace(
        CONFIG, epochs=2, optimizer=OptimizerConfig(optimizer=optimizer, learning_rate=0.05)
    )
    train(dataset, tmp_path / "whole", config)
    recorder = Recorder()
    # Stopped within the second epoch, and continued from there.
    stop = steps_of(dataset) + 4
    train(dataset, tmp_path / "part", replace(config, max_steps=stop))
    checkpoint = str(tmp_path / "part/checkpoints/newest.safetensors")
    rest = replace(config, continue_from=checkpoint)
    train(dataset, tmp_path / "rest", rest, [recorder])
    assert recorder.report_steps()[0] == (1, 5)
    assert weights(tmp_path / "rest") == weights(tmp_path / "whole")


def test_training_stops_at_the_evaluation_that_reaches_the_target(
    dataset: Path, tmp_path: Path
) -> None:
    recorder = Recorder()
    train(dataset, tmp_path / "free", replace(CONFIG, epochs=2, test_freq=4), [recorder])
    aucs = [evaluation.metrics.auc for evaluation in recorder.evaluations]
    best = int(np.argmax(aucs))
    assert best > 0  # else stopping at once would pass
    stopped = Recorder()
    config = replace(CONFIG, epochs=2, test_freq=4, target_auc=aucs[best])  # met at equality
    result = train(dataset, tmp_path / "auc", config, [stopped])
    assert len(stopped.evaluations) == best + 1
    assert result.stopped.startswith("target reached: auc")
    above = Recorder()
    config = replace(config, target_auc=math.nextafter(aucs[best], 1))
    result = train(dataset, tmp_path / "above", config, [above])
    assert len(above.evaluations) == len(recorder.evaluations)
    assert result.stopped == "all epochs done"
    accuracies = [evaluation.metrics.accuracy for evaluation in recorder.evaluations]
    at = Recorder()
    config = replace(CONFIG, epochs=2, test_freq=4, target_accuracy=max(accuracies))
    train(dataset, tmp_path / "accuracy", config, [at])
    assert len(at.evaluations) == accuracies.index(max(accuracies)) + 1


def test_an_evaluation_that_reaches_a_target_is_not_made_again_for_its_predictions(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[str] = []
    written: list[bool] = []

    def count(model: Any, data: Any, split: Any, *arguments: Any, **options: Any) -> Any:
        made.append(split)
        return evaluate_split(model, data, split, *arguments, **options)

    class Looking(Recorder):
        def on_evaluation(self, evaluation: Evaluation) -> None:
            super().on_evaluation(evaluation)
            written.append((run / "predictions/validation.arrow").exists())

    monkeypatch.setattr("dlrm.training.trainer.evaluate_split", count)
    run = tmp_path / "reached"
    recorder = Looking()
    result = train(dataset, run, replace(CONFIG, test_freq=4, target_auc=0.01), [recorder])
    assert (result.stopped[:14], result.train_steps) == ("target reached", 4)
    assert (made, written) == (["validation", "test"], [True])
    assert result.metrics["validation"] == recorder.evaluations[0].metrics
    monkeypatch.undo()
    assert result.metrics["validation"] == evaluate(run, "validation").metrics
    labels, probabilities = Run.open(run).predictions("validation").arrays()
    assert compute_metrics(labels, probabilities).auc == result.metrics["validation"].auc

    written.clear()
    run = tmp_path / "not reached"
    train(dataset, run, replace(CONFIG, test_freq=4, max_steps=8, target_auc=0.9999), [Looking()])
    assert written == [False, True]  # of the first they are not kept


def test_the_best_checkpoint_is_the_best_on_validation_and_gives_the_result(
    dataset: Path, tmp_path: Path
) -> None:
    recorder = Recorder()
    run = tmp_path / "run"
    # A high rate, so that the best evaluation is not the last.
    config = replace(
        CONFIG, epochs=3, test_freq=3, optimizer=OptimizerConfig("rowwise_adagrad", 0.1)
    )
    result = train(dataset, run, config, [recorder])
    aucs = [evaluation.metrics.auc for evaluation in recorder.evaluations]
    assert result.checkpoint == "best"
    assert max(aucs) > aucs[-1]
    assert result.metrics["validation"].auc == max(aucs)
    flags = [evaluation.is_best for evaluation in recorder.evaluations]
    assert flags == [auc > max(aucs[:i], default=-1) for i, auc in enumerate(aucs)]
    assert evaluate(run, "test").metrics == result.metrics["test"]
    newest = evaluate(run, "validation", checkpoint="newest").metrics
    assert newest.auc == aucs[-1]


def test_selection_on_test_and_the_newest_checkpoint_can_be_asked_for(
    dataset: Path, tmp_path: Path
) -> None:
    recorder = Recorder()
    config = replace(CONFIG, test_freq=5, selection_split="test", report_checkpoint="newest")
    result = train(dataset, tmp_path / "run", config, [recorder])
    assert {evaluation.split for evaluation in recorder.evaluations} == {"test"}
    assert result.metrics["test"] == recorder.evaluations[-1].metrics


def test_num_batches_caps_every_split_and_max_steps_all_epochs(
    dataset: Path, tmp_path: Path
) -> None:
    config = replace(CONFIG, epochs=2, num_batches=3, evaluation_batch_size=20)
    result = train(dataset, tmp_path / "capped", config)
    assert (result.train_steps, result.train_samples, result.epochs) == (6, 2 * 3 * 128, 2)
    assert result.metrics["test"].samples == 60
    result = train(dataset, tmp_path / "stopped", replace(config, max_steps=4))
    assert (result.train_steps, result.train_samples) == (4, 4 * 128)
    assert result.stopped == "the limit of 4 steps"
    assert result.epochs == pytest.approx(1 + 1 / 3)


def test_a_run_holds_what_is_promised(dataset: Path, tmp_path: Path, kernels: str) -> None:
    run = tmp_path / "run"
    result = train(dataset, run, replace(CONFIG, test_freq=5))
    data = Dataset.open(dataset)
    content = msgspec.json.decode((run / "result.json").read_bytes())
    for split in ("validation", "test"):
        assert content["metrics"][split].keys() >= {
            "auc", "accuracy", "log_loss", "normalized_entropy", "calibration", "samples",
        }  # fmt: skip
        table = pa.ipc.open_file(run / f"predictions/{split}.arrow").read_all()
        assert table.schema.types == [pa.int64(), pa.uint8(), pa.float32()]
        assert table["row"].to_pylist() == list(range(data.rows(split)))
        labels = np.concatenate([b.labels for b in data.batches(split, 100)])
        predictions = Run.open(run).predictions(split)
        assert predictions.dataset == data.manifest.fingerprint
        stored, probabilities = predictions.arrays()
        np.testing.assert_array_equal(stored, labels)
        metrics = compute_metrics(labels, probabilities)
        assert metrics == result.metrics[split]
    assert content["epochs"] == 1
    assert content["train_samples"] == data.rows("train")
    assert content["kernels"] == kernels
    assert 0 < content["samples_per_second"] < 1e8
    assert content["samples_per_second"] >= content["train_samples"] / content["seconds"]
    config, where = read_config(run / "config.toml")
    assert config == replace(CONFIG, test_freq=5)
    assert Path(where) == dataset.resolve()
    events = [msgspec.json.decode(line) for line in (run / "log.jsonl").read_bytes().splitlines()]
    assert events[0]["event"] == "start"
    assert events[-1]["event"] == "stop"
    assert {e["position"]["step"] for e in events if e["event"] == "evaluation"} >= {5, 10}
    assert (run / "schema.json").read_bytes() == (dataset / "schema.json").read_bytes()


def test_ids_modulo_max_ind_range_are_trained_and_evaluated_alike(
    dataset: Path, tmp_path: Path
) -> None:
    result = train(dataset, tmp_path / "run", replace(CONFIG, max_ind_range=5))
    with safe_open(tmp_path / "run/checkpoints/best.safetensors", framework="pt") as file:
        shapes = [
            file.get_slice(name).get_shape() for name in file.keys() if "embedding_bags" in name
        ]
    assert max(rows for rows, _ in shapes) == 5
    assert evaluate(tmp_path / "run", "test").metrics == result.metrics["test"]


def test_a_diverged_loss_is_refused_with_its_step(dataset: Path, tmp_path: Path) -> None:
    config = replace(CONFIG, optimizer=OptimizerConfig(learning_rate=1e30))
    with pytest.raises(UserError, match=r"diverged. Lower --learning-rate \(it is 1e\+30\)"):
        train(dataset, tmp_path / "run", config)


def test_a_taken_run_is_refused_and_left_as_it_is(dataset: Path, tmp_path: Path) -> None:
    train(dataset, tmp_path / "run", CONFIG)
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    with pytest.raises(UserError, match="holds a run already"):
        train(dataset, tmp_path / "run", CONFIG)
    assert before == {
        path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"model": replace(MODEL, over_arch_layer_sizes=(9, 1))},
            r"another architecture: model\.over_arch\.layers\.0\.bias .*\(9,\), got \(8,\)",
        ),
        (
            {"optimizer": OptimizerConfig("adagrad")},
            r"holds the state of sgd, and --optimizer adagrad",
        ),
        ({"epochs": 1}, r"saved after 1 epochs.*nothing is left to train"),
        ({"continue_from": "nowhere.safetensors"}, r"nowhere\.safetensors does not exist"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused_and_leaves_no_run(
    dataset: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    train(dataset, tmp_path / "first", CONFIG)
    checkpoint = str(tmp_path / "first/checkpoints/newest.safetensors")
    config = replace(CONFIG, **{"epochs": 2, "continue_from": checkpoint, **change})
    with pytest.raises(UserError, match=message):
        train(dataset, tmp_path / "second", config)
    assert not (tmp_path / "second").exists()


def test_a_damaged_checkpoint_is_refused(dataset: Path, tmp_path: Path) -> None:
    train(dataset, tmp_path / "run", CONFIG)
    newest = tmp_path / "run/checkpoints/newest.safetensors"
    content = newest.read_bytes()
    config = replace(CONFIG, epochs=2, continue_from=str(newest))
    newest.write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match="cannot be read as a checkpoint"):
        train(dataset, tmp_path / "second", config)
    newest.write_bytes(content.replace(b'format_version\\":\\"1.4', b'format_version\\":\\"2.0'))
    with pytest.raises(UserError, match=r"format version '2\.0'; this dlrm reads 1\.0"):
        train(dataset, tmp_path / "second", config)


def test_labels_of_one_class_give_a_result_without_an_auc(raw_rows: Path, tmp_path: Path) -> None:
    lines = (raw_rows / "train.txt").read_text().splitlines(keepends=True)[:70]
    (tmp_path / "train.txt").write_text("".join("0" + line[1:] for line in lines))
    prepare(tmp_path, tmp_path / "dataset", PrepareConfig())
    result = train(tmp_path / "dataset", tmp_path / "run", CONFIG)
    assert math.isnan(result.metrics["test"].auc)
    content = msgspec.json.decode((tmp_path / "run/result.json").read_bytes())
    assert content["metrics"]["test"]["auc"] is None
    read_back = Run.open(tmp_path / "run").result()
    assert math.isnan(read_back.metrics["test"].auc)
    assert read_back.metrics["test"].log_loss == result.metrics["test"].log_loss


def test_a_position_belongs_to_its_order_and_batch_size(
    raw_rows: Path, dataset: Path, tmp_path: Path
) -> None:
    train(dataset, tmp_path / "part", replace(CONFIG, max_steps=4))
    config = replace(CONFIG, continue_from=str(tmp_path / "part/checkpoints/newest.safetensors"))
    with pytest.raises(UserError, match=r"saved with steps of 128 rows.*; got 64"):
        train(dataset, tmp_path / "rest", replace(config, mini_batch_size=64))
    for folder, hint in (
        ("part", r"part/checkpoints/newest\.safetensors, for instance"),
        ("part/checkpoints", "in a RUN's checkpoints folder"),
    ):
        with pytest.raises(UserError, match=f"{folder} is a folder. Name the file .*: .*{hint}"):
            train(
                dataset,
                tmp_path / "rest",
                replace(config, continue_from=str(tmp_path / folder)),
            )
    prepare(raw_rows, tmp_path / "unshuffled", PrepareConfig(shuffle="none"))
    with pytest.raises(UserError, match="another DATASET: the fingerprint of its rows and order"):
        train(tmp_path / "unshuffled", tmp_path / "rest", config)
    prepare(raw_rows, tmp_path / "other", PrepareConfig(max_ind_range=3))
    with pytest.raises(UserError, match="another DATASET: the fingerprint of its features"):
        train(tmp_path / "other", tmp_path / "rest", config)
    assert not (tmp_path / "rest").exists()


def test_max_steps_counts_the_steps_before(dataset: Path, tmp_path: Path) -> None:
    train(dataset, tmp_path / "part", replace(CONFIG, max_steps=4))
    config = replace(CONFIG, continue_from=str(tmp_path / "part/checkpoints/newest.safetensors"))
    result = train(dataset, tmp_path / "more", replace(config, max_steps=6))
    assert (result.train_steps, result.train_samples) == (2, 2 * 128)
    with pytest.raises(UserError, match="saved after 4 steps, so with --max-steps 3 nothing"):
        train(dataset, tmp_path / "less", replace(config, max_steps=3))


def test_num_batches_of_training_does_not_shorten_a_later_evaluation(
    dataset: Path, tmp_path: Path
) -> None:
    config = replace(CONFIG, num_batches=2, evaluation_batch_size=20)
    assert train(dataset, tmp_path / "run", config).metrics["test"].samples == 40
    whole = evaluate(tmp_path / "run", "test").metrics.samples
    assert whole == Dataset.open(dataset).rows("test") > 40


def test_training_leaves_the_callers_random_state_and_threads(
    dataset: Path, tmp_path: Path
) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    threads = torch.get_num_threads()
    train(dataset, tmp_path / "run", replace(CONFIG, max_steps=1))
    assert torch.equal(torch.rand(3), expected)
    assert torch.get_num_threads() == threads


def test_a_folder_with_other_things_does_not_become_a_run(dataset: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(UserError, match=r"is not empty: it holds thesis\.tex"):
        train(dataset, tmp_path, CONFIG)
    with pytest.raises(UserError, match=r"thesis\.tex is not a folder"):
        train(dataset, tmp_path / "thesis.tex", CONFIG)


def test_what_is_no_configuration_is_refused(dataset: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="config must be a TrainConfig; got dict"):
        train(dataset, tmp_path / "run", {"epochs": 1})  # type: ignore[arg-type]
    with pytest.raises(UserError, match="--mini-batch-size: expected int, got 'a'"):
        TrainConfig(mini_batch_size="a")  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"--shuffle: expected one of 'none', 'day',.*got 'foo'"):
        PrepareConfig(shuffle="foo")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="there is no split 'foo'"):
        evaluate(tmp_path / "run", "foo")  # type: ignore[arg-type]


@pytest.mark.parametrize("version", ["1.0", "1.1"])
def test_a_checkpoint_of_an_older_format_is_continued_from(tmp_path: Path, version: str) -> None:
    """After 4 steps of 8 rows; 1.0 and 1.1 have no checksum, and nothing beside them."""
    here = Path(__file__).parent
    old = here / f"fixtures/checkpoint-{version}.safetensors"
    data = here.parent / "data/fixtures/dataset-1.0"
    config = TrainConfig(
        model=ModelConfig(embedding_dim=2, dense_arch_layer_sizes=(2,), over_arch_layer_sizes=(1,)),
        optimizer=OptimizerConfig("adagrad", 0.01),
        mini_batch_size=8,
        epochs=2,
        max_steps=7,
    )
    result = train(data, tmp_path / "run", replace(config, continue_from=str(old)))
    assert result.train_steps == 3
    # As if all seven steps had been taken by this version: the bits are those of this machine.
    train(data, tmp_path / "whole", config)
    names = ("run", "whole")
    with contextlib.ExitStack() as stack:
        found, expected = (
            stack.enter_context(
                safe_open(tmp_path / name / "checkpoints/newest.safetensors", framework="pt")
            )
            for name in names
        )
        assert set(found.keys()) == set(expected.keys())
        for name in found.keys():
            torch.testing.assert_close(found.get_tensor(name), expected.get_tensor(name))
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(old.read_bytes()[:-1])
    with pytest.raises(UserError, match="cannot be read as a checkpoint"):
        train(data, tmp_path / "other", replace(config, continue_from=str(damaged)))
