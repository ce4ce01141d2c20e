from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from dlrm import bench
from dlrm.bench import (
    bench_schema,
    floor,
    layer_sizes,
    made_up_batches,
    made_up_rows,
    model_config,
)
from dlrm.cli import main, parse
from dlrm.config import BenchTrainConfig
from dlrm.errors import UserError

SMALL = BenchTrainConfig(max_table_rows=100, mini_batch_size=2048, pairs=1)


def test_bench_train_prints_json(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "block_rows", lambda schema: 8192)
    arguments = "bench train --pairs 1 --mini-batch-size 2048 --max-table-rows 100 --json"
    with pytest.raises(SystemExit) as ended:
        main(arguments.split())
    assert ended.value.code == 0
    result = json.loads(capsys.readouterr().out)
    floor_rate, step_rate = result["floor_samples_per_second"], result["step_samples_per_second"]
    assert result["share_of_floor"] == pytest.approx(step_rate / floor_rate)
    loop_rate = result["end_to_end_samples_per_second"]
    assert result["end_to_end_share_of_floor"] == pytest.approx(loop_rate / floor_rate)
    assert 0 < min(floor_rate, step_rate, loop_rate) <= max(floor_rate, step_rate, loop_rate) < 1e8
    parts = result["milliseconds_per_step"]
    assert {"data wait", "MLPs", "loss"} <= parts.keys()
    assert 0 < sum(parts.values()) < 1.05 * result["profiled_milliseconds_per_step"]
    assert result["table_bytes"] == sum(bench_schema(SMALL).num_embeddings) * 16 * 4


def test_the_table_tells_all_parts_of_the_plain_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "block_rows", lambda schema: 2048)
    config = BenchTrainConfig(
        max_table_rows=100, mini_batch_size=1024, pairs=1, amp="O1", scattered=True
    )
    result = bench.bench_train(config)
    parts = {"data wait", "gather", "interaction", "MLPs", "loss", "backward", "update"}
    assert result.milliseconds_per_step.keys() == parts
    text = result.table()
    for name in ("floor", "step", "end to end, from disk", "everything else", *parts):
        assert f"\n{name:24}" in text
    assert "ids scattered" in text
    assert "plain kernels: the native kernels compute in float32" in text


def test_the_floor_multiplies_every_layer_once_forward_and_twice_backward(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    layers = layer_sizes(bench_schema(SMALL), model_config(SMALL))
    assert layers == [
        *[(13, 512), (512, 256), (256, 64), (64, 16)],
        *[(368, 512), (512, 256), (256, 1)],
    ]
    shapes: list[tuple[int, int, int]] = []
    monkeypatch.setattr(
        torch, "mm", lambda a, b, out: shapes.append((a.shape[0], a.shape[1], b.shape[1]))
    )
    floor(layers[:2], 32)()
    assert shapes == [(32, 13, 512), (512, 32, 13), (32, 512, 256), (256, 32, 512), (32, 256, 512)]
    shapes.clear()
    floor(layers[:2], 32, training=False)()
    assert shapes == [(32, 13, 512), (32, 512, 256)]


def test_architectures_fit_and_tables_are_limited() -> None:
    kaggle = BenchTrainConfig()
    assert sum(bench_schema(kaggle).num_embeddings) == 33_762_577
    for architecture, width in (("kaggle-64", 416), ("kaggle-128", 480), ("mlperf", 480)):
        config = BenchTrainConfig(architecture=architecture)  # type: ignore[arg-type]
        assert max(bench_schema(config).num_embeddings) == 1_000_000
        assert (width, model_config(config).over_arch_layer_sizes[0]) in layer_sizes(
            bench_schema(config), model_config(config)
        )
    unlimited = BenchTrainConfig(architecture="mlperf", max_table_rows=0)
    assert max(bench_schema(unlimited).num_embeddings) == 39_979_771


def test_scattered_ids_are_the_numbered_ones_permuted() -> None:
    schema = bench_schema(BenchTrainConfig(max_table_rows=5000))
    numbered = np.concatenate([run.sparse for run in made_up_rows(schema, 20_000, 1)])
    scattered = np.concatenate(
        [run.sparse for run in made_up_rows(schema, 20_000, 1, scattered=True)]
    )
    for column, size in enumerate(schema.num_embeddings):
        counts = [np.bincount(ids[:, column], minlength=size) for ids in (numbered, scattered)]
        assert counts[0].argmax() == 0  # frequent ones first
        assert len(counts[0]) == size
        assert sorted(counts[0]) == sorted(counts[1])


def test_batches_are_never_repeated() -> None:
    schema = bench_schema(SMALL)
    batches = made_up_batches(schema, 20_000)
    sums = {tuple(next(batches).sparse_features.sum(0).tolist()) for _ in range(6)}
    assert len(sums) == 6
    large = made_up_batches(schema, 60_000)  # more than a block of a DATASET
    assert len(next(large)) == 60_000


def test_other_stages_are_refused_by_name() -> None:
    stages = "train or prepare or predict or serve"
    with pytest.raises(UserError, match=f"measures one stage, {stages}; got 'evaluate'"):
        parse(["bench", "evaluate"])
    with pytest.raises(UserError, match=f"measures one stage, {stages}; got ''"):
        parse(["bench"])
    with pytest.raises(UserError, match="--pairs must be at least 1; got 0"):
        BenchTrainConfig(pairs=0)
