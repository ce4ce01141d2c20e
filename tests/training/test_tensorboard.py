"""Event files, read back with TensorBoard's own reader and compared with ``log.jsonl``."""

from __future__ import annotations

import csv
import errno
import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import dlrm
from dlrm import trace
from dlrm.config import (
    ModelConfig,
    OptimizerConfig,
    TrackingConfig,
    TrainConfig,
)
from dlrm.data.batch import Batch
from dlrm.data.dataset import Dataset
from dlrm.data.vocabulary import Vocabulary
from dlrm.errors import UserError
from dlrm.training import tensorboard

CONFIG = TrainConfig(
    model=ModelConfig(embedding_dim=4, dense_arch_layer_sizes=(8, 4), over_arch_layer_sizes=(8, 1)),
    optimizer=OptimizerConfig("sgd", 0.05, warmup_steps=30),
    tracking=TrackingConfig(tensorboard=True),
    mini_batch_size=64,
    epochs=2,
    print_freq=7,
    test_freq=15,
    save_every_steps=4,
    save_every_minutes=0,
)

Scalars = dict[str, list[tuple[int, float]]]


def read(run: Path) -> Scalars:
    """The scalars of a RUN as TensorBoard reads them: step and value by tag."""
    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    tags = events.Tags()["scalars"]
    return {tag: [(each.step, each.value) for each in events.Scalars(tag)] for tag in tags}


def logged(run: Path) -> Scalars:
    """The same of ``log.jsonl`` and ``result.json``, as the float32 of an event file."""
    found: Scalars = {}

    def add(tag: str, step: int, value: Any) -> None:
        if tag.endswith("/calibration_by_decile"):
            return  # a figure of the report
        if isinstance(value, list):
            value = dict(enumerate(value))
        if isinstance(value, dict):
            for name, each in value.items():
                add(f"{tag}/{name}", step, each)
            return
        found.setdefault(tag, []).append((step, float(np.float32(value))))

    step = 0
    for line in map(json.loads, (run / "log.jsonl").read_text().splitlines()):
        step = line["position"]["total_steps"] if "position" in line else step
        if line["event"] == "report":
            for name in line.keys() - {"event", "seconds", "position", "steps_per_epoch"}:
                add(f"train/{name}", step, line[name])
        if line["event"] == "evaluation":
            for name, value in line["metrics"].items():
                add(f"{line['split']}/{name}", step, value)
    for split, metrics in json.loads((run / "result.json").read_text())["metrics"].items():
        for name, value in metrics.items():
            add(f"trained/{split}/{name}", step, value)
    return found


def test_what_is_written_is_what_is_logged(dataset: Path, tmp_path: Path) -> None:
    dlrm.train(dataset, tmp_path / "run", CONFIG)
    found = read(tmp_path / "run")
    assert found == logged(tmp_path / "run")
    assert {tag for tag in found if tag.startswith("train/")} == {
        "train/loss",
        "train/learning_rate",
        "train/samples_per_second",
        "train/milliseconds_per_step",
        "train/data_wait_milliseconds",
    }
    assert found["train/learning_rate"][0] == (7, pytest.approx(0.05 * 7 / 30))
    assert [step for step, _ in found["validation/auc"]] == [15, 30, 41, 56, 71, 82]
    for name in ("log_loss", "normalized_entropy", "calibration", "accuracy", "average_precision"):
        assert f"validation/{name}" in found
        assert f"trained/test/{name}" in found


def test_interrupted_it_shows_the_same(
    start_warm: Callable[..., Any],
    dataset: Path,
    tmp_path: Path,
) -> None:
    warm = start_warm(Path(__file__).parent / "interrupted_training.py", dataset)
    config = asdict(CONFIG)
    run = tmp_path / "run"
    # Killed before the first checkpoint, after reports that are made again, and stopped.
    assert warm(run=run, dataset=dataset, config=config, kill_at_step=3).status == -9
    assert warm(run=run, kill_at_step=31).status == -9
    assert read(run)["train/loss"][-1][0] == 30
    assert warm(run=run, kill_at_step=2).status == -9
    assert warm(run=run, term_at_step=20).status == 4
    answer = warm(run=run)
    assert answer.status == 0, answer.said
    assert len(list((run / "tensorboard").glob("events.*"))) == 4  # of five processes
    assert read(run) == logged(run)


def test_on_a_full_disk_training_goes_on_without(
    dataset: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Full(tensorboard.RecordWriter):  # type: ignore[misc]
        written = 0

        def write(self, data: bytes) -> None:
            Full.written += 1
            if Full.written > 3:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            super().write(data)

    monkeypatch.setattr(tensorboard, "RecordWriter", Full)
    config = replace(CONFIG, epochs=1)
    result = dlrm.train(dataset, tmp_path / "run", config)
    assert result.stopped == "all epochs done"
    assert Full.written == 4
    assert caplog.text.count("is not written any more: No space left on device") == 1
    assert [step for step, _ in read(tmp_path / "run")["train/loss"]] == [7, 14]


def test_waiting_for_data_is_measured(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ticks = iter([0.0, 1.0, 10.0, 10.5, 20.0, 29.0])
    monkeypatch.setattr(trace.time, "perf_counter", lambda: next(ticks))
    waits: list[float] = []
    assert list(trace.waiting("ab", "wait", waits.append)) == ["a", "b"]
    assert waits == [1.0, 0.5]  # that there is nothing more is no wait
    monkeypatch.undo()

    batches = Dataset.batches

    def slowly(*arguments: Any, **options: Any) -> Iterator[Batch]:
        for batch in batches(*arguments, **options):
            time.sleep(0.02)
            yield batch

    monkeypatch.setattr(Dataset, "batches", slowly)
    dlrm.train(dataset, tmp_path / "run", replace(CONFIG, max_steps=14, test_freq=-1))
    lines = map(json.loads, (tmp_path / "run" / "log.jsonl").read_text().splitlines())
    reports = [line for line in lines if line["event"] == "report"]
    assert len(reports) == 2
    for report in reports:
        wait = report["data_wait_milliseconds"]
        assert 20 <= wait <= report["milliseconds_per_step"]


def table_of(run: Path, name: str) -> Any:
    with safe_open(run / "checkpoints" / "best.safetensors", "np") as file:
        return file.get_tensor(f"model.sparse_arch.embedding_bags.t_{name}.weight")


def test_the_projector_shows_the_vectors_of_the_commonest_values(
    dataset: Path, raw_rows: Path, tmp_path: Path
) -> None:
    tracking = TrackingConfig(
        tensorboard=True, tensorboard_projector="cat_2", tensorboard_projector_rows=5
    )
    run = tmp_path / "run"
    dlrm.train(dataset, run, replace(CONFIG, tracking=tracking))
    folder = run / "tensorboard"
    assert (folder / "projector_config.pbtxt").read_text() == (
        'embeddings {\n  tensor_name: "cat_2"\n  tensor_path: "tensors.tsv"\n'
        '  metadata_path: "metadata.tsv"\n}\n'
    )
    vectors = np.loadtxt(folder / "tensors.tsv", dtype=np.float32)
    with (folder / "metadata.tsv").open() as file:
        rows = list(csv.DictReader(file, delimiter="\t"))

    # From the raw rows: the first six sevenths train.
    lines = (raw_rows / "train.txt").read_text().splitlines()
    counts: Counter[str] = Counter()
    clicks: Counter[str] = Counter()
    for line in lines[: Dataset.open(dataset).rows("train")]:
        fields = line.split("\t")
        value = fields[1 + 13 + 2] or "00000000"
        counts[value] += 1
        clicks[value] += int(fields[0])
    expected = [count for _, count in counts.most_common(5)]
    assert [int(row["count"]) for row in rows] == expected
    vocabulary = Vocabulary.read(run / "vocabulary" / "cat_2.arrow")
    for row, vector in zip(rows, vectors, strict=True):
        value = row["value"]
        assert int(row["count"]) == counts[value]
        assert float(row["click_rate"]) == pytest.approx(clicks[value] / counts[value], abs=1e-6)
        id_ = vocabulary.encode(np.array([int(value, 16)], np.uint32))[0]
        np.testing.assert_array_equal(vector, table_of(run, "cat_2")[id_])


def test_what_cannot_be_shown_is_refused(dataset: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--tensorboard-projector goes with --tensorboard"):
        TrackingConfig(tensorboard_projector="cat_2")
    with pytest.raises(UserError, match="--tensorboard-projector-rows must be at least 1; got 0"):
        TrackingConfig(tensorboard=True, tensorboard_projector_rows=0)
    tracking = TrackingConfig(tensorboard=True, tensorboard_projector="cat_99")
    with pytest.raises(UserError, match=r"no sparse feature 'cat_99'\. There are cat_0, cat_1"):
        dlrm.train(dataset, tmp_path / "run", replace(CONFIG, tracking=tracking))
    assert not (tmp_path / "run").exists()


def test_it_can_be_turned_on_when_a_run_goes_on(dataset: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    dlrm.train(dataset, run, replace(CONFIG, epochs=1, tracking=TrackingConfig()))
    (run / "result.json").unlink()
    for path in (run / "checkpoints").glob("step-000000041.*"):
        path.unlink()
    config = run / "config.toml"
    text = config.read_text()
    for option in ("tensorboard", "mlperf_logging"):
        assert f"\n{option} = false" in text
        text = text.replace(f"\n{option} = false", f"\n{option} = true")
    config.write_text(text)
    dlrm.resume(run)
    assert [step for step, _ in read(run)["train/loss"]] == [41]
    keys = [
        json.loads(line.removeprefix(":::MLLOG "))["key"]
        for line in (run / "mlperf.log").read_text().splitlines()
    ]
    assert keys[:2] == ["cache_clear", "init_start"]
    assert keys.count("init_stop") == keys.count("run_stop") == keys.count("epoch_start") == 1
