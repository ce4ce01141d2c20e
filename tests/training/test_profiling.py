from __future__ import annotations

import gzip
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from dlrm.config import ModelConfig, OptimizerConfig, TrainConfig
from dlrm.data.dataset import Dataset
from dlrm.errors import UserError
from dlrm.training.begin import train
from dlrm.training.profiling import PARTS, RECORDED_STEPS

MODEL = ModelConfig(embedding_dim=4, dense_arch_layer_sizes=(8, 4), over_arch_layer_sizes=(8, 1))
CONFIG = TrainConfig(model=MODEL, mini_batch_size=64, test_freq=-1)
PLAIN = {"sparse_arch", "interaction_arch", "dense_arch", "over_arch", "loss", "backward", "update"}


def ranges(content: bytes) -> list[str]:
    events = json.loads(content)["traceEvents"]
    return [event["name"] for event in events if event.get("ph") == "X"]


def test_a_trace_has_the_parts_of_the_recorded_steps_as_ranges(
    dataset: Path, tmp_path: Path, kernels: str
) -> None:
    config = replace(CONFIG, epochs=2)
    expected = train(dataset, tmp_path / "without", config)
    result = train(dataset, tmp_path / "run", config, profile=tmp_path / "trace.json")
    assert result.metrics == expected.metrics
    names = ranges((tmp_path / "trace.json").read_bytes())
    steps = math.ceil(Dataset.open(dataset).rows("train") / 64) * 2
    assert steps > 20 + RECORDED_STEPS  # not all of them
    assert names.count("step") == RECORDED_STEPS
    assert abs(names.count("wait for data") - RECORDED_STEPS) <= 2  # beside an epoch's end
    native = {name for name in PARTS if name.startswith("dlrm::")}
    for name in native if kernels == "native" else PLAIN:
        assert names.count(name) >= RECORDED_STEPS, name
    assert (tmp_path / "trace.json").stat().st_size < 20e6


def test_a_short_training_is_recorded_whole_into_a_folder(dataset: Path, tmp_path: Path) -> None:
    train(dataset, tmp_path / "run", replace(CONFIG, max_steps=3), profile=tmp_path)
    assert ranges((tmp_path / "trace.json").read_bytes()).count("step") == 3
    packed = tmp_path / "trace.json.gz"
    train(dataset, tmp_path / "other", replace(CONFIG, max_steps=3), profile=packed)
    assert ranges(gzip.decompress(packed.read_bytes())).count("step") == 3


def test_what_cannot_be_a_trace_is_refused_before_training(dataset: Path, tmp_path: Path) -> None:
    for path, message in (
        (tmp_path / "trace.txt", r"neither a folder nor the name of a \.json"),
        (tmp_path / "missing/trace.json", "missing is not a folder"),
    ):
        with pytest.raises(UserError, match=message):
            train(dataset, tmp_path / "run", CONFIG, profile=path)
    assert not (tmp_path / "run").exists()


def test_training_that_fails_leaves_no_profiler_running(dataset: Path, tmp_path: Path) -> None:
    diverging = replace(CONFIG, optimizer=OptimizerConfig(learning_rate=1e30), print_freq=1)
    with pytest.raises(UserError, match="diverged"):
        train(dataset, tmp_path / "failed", diverging, profile=tmp_path / "failed.json")
    assert not (tmp_path / "failed.json").exists()
    train(dataset, tmp_path / "run", replace(CONFIG, max_steps=3), profile=tmp_path)
    assert ranges((tmp_path / "trace.json").read_bytes()).count("step") == 3
