from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from scipy import stats

import dlrm
from dlrm.config import GenerateConfig
from dlrm.data.dataset import Dataset, Rows
from dlrm.data.generation import generate
from dlrm.data.stack_distance import measure
from dlrm.errors import EnvironmentFaultError, UserError
from dlrm.schema import SPLITS

SMALL = GenerateConfig(
    data_size=23,
    mini_batch_size=5,
    dense_features=3,
    num_embeddings=(7, 1, 400, 2),
    num_indices_per_lookup=4,
)


def rows_of(data: Dataset, split: Any = "train") -> Rows:
    return Rows.concatenate(list(data.stored_rows(split, 0, data.rows(split))))


def draw_one_by_one(config: GenerateConfig) -> tuple[Any, list[list[list[int]]], Any]:
    """The reference's draws, a number at a time: dense features, lists of ids, labels."""
    draws = np.random.RandomState(config.seed)
    dense, lists, labels = [], [], []
    left = config.train_rows
    while left:
        rows = min(left, config.mini_batch_size)
        left -= rows
        dense += [
            [draws.random_sample() for _ in range(config.dense_features)] for _ in range(rows)
        ]
        columns = []
        for size in config.num_embeddings:
            column = []
            for _ in range(rows):
                length = config.num_indices_per_lookup
                if not config.num_indices_per_lookup_fixed:
                    length = round(max(1.0, draws.random_sample() * min(size, length)))
                if config.rand_data_dist == "uniform":
                    drawn = [round(draws.random_sample() * (size - 1)) for _ in range(length)]
                    column.append(sorted(set(drawn)))
                else:
                    mean = config.rand_data_mu
                    if mean == -1:
                        mean = (config.rand_data_min + config.rand_data_max) / 2
                    limited = {
                        min(
                            max(draws.normal(mean, config.rand_data_sigma), config.rand_data_min),
                            config.rand_data_max,
                        )
                        for _ in range(length)
                    }
                    column.append([int(each) for each in sorted(limited)])
            columns.append(column)
        lists += [list(row) for row in zip(*columns, strict=True)]
        labels += [draws.random_sample() for _ in range(rows)]
    return np.float32(dense), lists, np.float32(labels)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"seed": 7, "mini_batch_size": 1},
        {"mini_batch_size": 64},
        {"num_indices_per_lookup": 1},
        {"num_indices_per_lookup": 1, "num_indices_per_lookup_fixed": True},
        {"num_indices_per_lookup": 9, "num_indices_per_lookup_fixed": True},
        {"num_batches": 3, "data_size": GenerateConfig.data_size},
        {"soft_labels": True},
        {"rand_data_dist": "gaussian"},
        {
            "rand_data_dist": "gaussian",
            "num_embeddings": (50, 60),
            "rand_data_min": 2.5,
            "rand_data_max": 40.0,
            "rand_data_mu": 10.0,
            "rand_data_sigma": 12.0,
            "num_indices_per_lookup": 30,
        },
        {
            "rand_data_dist": "gaussian",
            "num_embeddings": (50, 60),
            "rand_data_max": 49.0,
            "rand_data_sigma": 30.0,
            "num_indices_per_lookup": 7,
            "num_indices_per_lookup_fixed": True,
        },
    ],
    ids=str,
)
def test_rows_are_the_references(tmp_path: Path, changes: dict[str, Any]) -> None:
    if changes.get("rand_data_dist") == "gaussian" and "num_embeddings" not in changes:
        changes = {**changes, "num_embeddings": (7, 400, 2)}  # ids are 0 and 1
    config = dataclasses.replace(SMALL, **changes)
    rows = rows_of(generate(tmp_path / "dataset", config))
    dense, lists, labels = draw_one_by_one(config)
    assert len(rows) == config.train_rows == len(lists)
    assert rows.dense.dtype == np.float32
    assert rows.dense.tolist() == dense.tolist()
    if config.soft_labels:
        assert rows.labels.tolist() == labels.tolist()
    else:
        assert rows.labels.tolist() == np.round(labels).tolist()
        assert rows.labels.dtype == np.uint8
    if config.num_indices_per_lookup == 1:
        assert [[[each] for each in row] for row in rows.sparse.tolist()] == lists
    else:
        columns = [np.split(bags.ids, bags.offsets[1:-1]) for bags in rows.bags]
        found = [[each.tolist() for each in row] for row in zip(*columns, strict=True)]
        assert found == lists


BIG = GenerateConfig(data_size=20_000, mini_batch_size=1000, dense_features=2, num_embeddings=(10,))
LEAST = 0.01
"""Of a p-value: one right seed in a hundred falls below it, and this one does not."""


def test_dense_features_and_labels_are_uniform(tmp_path: Path) -> None:
    rows = rows_of(generate(tmp_path / "dataset", dataclasses.replace(BIG, soft_labels=True)))
    assert stats.kstest(rows.dense.ravel(), "uniform").pvalue > LEAST
    assert stats.kstest(rows.labels, "uniform").pvalue > LEAST
    assert abs(stats.pearsonr(rows.dense[:, 0], rows.labels).statistic) < 0.03


def chi_squared(found: npt.NDArray[Any], shares: list[float]) -> float:
    counts = np.bincount(found, minlength=len(shares))
    return float(stats.chisquare(counts, np.array(shares) * counts.sum()).pvalue)


def test_uniform_ids_are_rounded_so_that_the_ends_are_half_as_frequent(tmp_path: Path) -> None:
    rows = rows_of(generate(tmp_path / "dataset", BIG))
    assert chi_squared(rows.sparse[:, 0], [0.5 / 9, *[1 / 9] * 8, 0.5 / 9]) > LEAST
    assert chi_squared(rows.sparse[:, 0], [0.1] * 10) < 1e-9


def test_gaussian_ids_are_normal_and_limited(tmp_path: Path) -> None:
    config = dataclasses.replace(
        BIG,
        num_embeddings=(10,),
        rand_data_dist="gaussian",
        rand_data_min=1.0,
        rand_data_max=8.0,
        rand_data_mu=4.0,
        rand_data_sigma=2.0,
    )
    rows = rows_of(generate(tmp_path / "dataset", config))
    # Limited, then cut to a whole number: 1 holds what is below 2, and 8 what is 8 and above.
    edges = stats.norm(4, 2).cdf([-np.inf, 2, 3, 4, 5, 6, 7, 8, np.inf])
    ids = rows.sparse[:, 0]
    assert (ids.min(), ids.max()) == (1, 8)
    assert chi_squared(ids - 1, np.diff(edges).tolist()) > LEAST


def test_lengths_of_bags_vary_from_one_to_the_most(tmp_path: Path) -> None:
    config = dataclasses.replace(BIG, num_embeddings=(2**30,), num_indices_per_lookup=5)
    (bags,) = rows_of(generate(tmp_path / "dataset", config)).bags
    # The nearest whole number of u * 5, and at least 1; equal ids are too rare to matter.
    assert chi_squared(bags.lengths - 1, [0.3, 0.2, 0.2, 0.2, 0.1]) > LEAST


def test_a_small_table_limits_a_bag(tmp_path: Path) -> None:
    config = dataclasses.replace(SMALL, num_embeddings=(2, 1))
    two, one = rows_of(generate(tmp_path / "dataset", config)).bags
    assert set(two.lengths.tolist()) == {1, 2}
    assert set(one.lengths.tolist()) == {1}


def test_splits_repeat_the_training_rows_or_follow_them(tmp_path: Path) -> None:
    same = generate(tmp_path / "same", SMALL)
    assert [same.rows(split) for split in SPLITS] == [23, 23, 23]
    for split in ("validation", "test"):
        rows = rows_of(same, split)
        assert rows.dense.tolist() == rows_of(same).dense.tolist()
        assert rows.bags[2].ids.tolist() == rows_of(same).bags[2].ids.tolist()

    apart = generate(tmp_path / "apart", dataclasses.replace(SMALL, data_size=20, test_rows=10))
    assert [apart.rows(split) for split in SPLITS] == [20, 10, 10]
    joined = np.concatenate([rows_of(apart, split).dense for split in SPLITS])
    longer = generate(tmp_path / "longer", dataclasses.replace(SMALL, data_size=40))
    assert joined.tolist() == rows_of(longer).dense.tolist()


def test_rows_do_not_depend_on_the_size_of_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = rows_of(generate(tmp_path / "one", SMALL))
    monkeypatch.setattr("dlrm.data.generation.BLOCK_BYTES", 700)
    data = generate(tmp_path / "several", SMALL)
    runs = list(data.stored_rows("train", 0, 23))
    assert len(runs) > 2
    for run, other in zip(Rows.concatenate(runs).bags, expected.bags, strict=True):
        assert (run.ids.tolist(), run.offsets.tolist()) == (
            other.ids.tolist(),
            other.offsets.tolist(),
        )


def test_a_disk_that_is_too_small_is_refused_before_anything_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By what rows of these options take: 1 + 4 · 2 + 4 · 1 bytes each."""
    config = dataclasses.replace(BIG, data_size=10_000, test_rows=5_000)
    path = tmp_path / "absent" / "dataset"
    free = 20_000 * 13 - 1
    monkeypatch.setattr("dlrm.files.free_bytes", lambda target: free)
    with pytest.raises(EnvironmentFaultError, match=r"dataset needs about 260\.0 kB of disk"):
        generate(path, config)
    assert not list(tmp_path.iterdir())
    free += 1
    assert generate(path, config).rows("test") == 5_000


@pytest.fixture
def traces(tmp_path: Path) -> Path:
    generator = np.random.default_rng(0)
    for table in range(2):
        items = (generator.pareto(1, 500) % 40).astype(np.int32)
        measure([items], 40).write(tmp_path / f"dist_emb_{table}.log")
    return tmp_path / "dist_emb_j.log"


def test_a_synthetic_table_has_its_own_file_and_several_ids(tmp_path: Path, traces: Path) -> None:
    config = GenerateConfig(
        data_generation="synthetic",
        data_size=300,
        num_embeddings=(40, 40),
        num_indices_per_lookup=3,
        data_trace_file=str(traces),
    )
    data = generate(tmp_path / "dataset", config)
    first, second = rows_of(data).bags
    for bags, table in ((first, 0), (second, 1)):
        ids = [
            int(each)
            for each in (tmp_path / f"dist_emb_{table}.log").read_text().split("\n")[0].split(", ")
        ]
        assert bags.ids[0] == ids[0]
        assert set(bags.ids.tolist()) <= set(ids)
        assert set(bags.lengths.tolist()) == {1, 2, 3}
        for ids_of_row in np.split(bags.ids, bags.offsets[1:-1]):
            assert (np.diff(ids_of_row) > 0).all()
    assert [source.name for source in data.manifest.sources] == ["dist_emb_0.log", "dist_emb_1.log"]
    assert first.ids.tolist() != second.ids.tolist()


def test_what_is_there_is_left_or_replaced(tmp_path: Path, traces: Path) -> None:
    config = GenerateConfig(
        data_generation="synthetic",
        data_size=50,
        num_embeddings=(40, 40),
        data_trace_file=str(traces),
    )
    path = tmp_path / "dataset"
    generate(path, config)
    before = (path / "manifest.json").stat().st_ino
    generate(path, config)
    assert (path / "manifest.json").stat().st_ino == before
    other = dataclasses.replace(config, seed=5)
    with pytest.raises(UserError, match="is a DATASET already"):
        generate(path, other)
    generate(path, other, overwrite=True)
    assert Dataset.open(path).manifest.generation == other
    # One that is damaged is not taken for finished, and can be replaced.
    part = path / "train" / "part-00000.arrow"
    part.write_bytes(part.read_bytes()[:-1])
    with pytest.raises(UserError, match="is a DATASET already"):
        generate(path, other)
    generate(path, other, overwrite=True)
    # Another trace under the same name makes other rows.
    measure([np.arange(40, dtype=np.int32)], 40).write(tmp_path / "dist_emb_1.log")
    with pytest.raises(UserError, match="is a DATASET already"):
        generate(path, other)


def test_a_missing_trace_is_refused_before_anything_is_made(tmp_path: Path, traces: Path) -> None:
    config = GenerateConfig(
        data_generation="synthetic", num_embeddings=(4, 4, 4), data_trace_file=str(traces)
    )
    with pytest.raises(UserError, match=r"dist_emb_2\.log is not a file"):
        generate(tmp_path / "dataset", config)
    assert not (tmp_path / "dataset").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data_size": 0}, "--data-size must be at least 1; got 0"),
        ({"num_batches": -1}, "--num-batches must not be negative; got -1"),
        ({"num_embeddings": ()}, "--num-embeddings: expected at least one table"),
        ({"num_embeddings": (3, 0)}, "--num-embeddings: expected at least one table"),
        ({"num_embeddings": (2**31,)}, "--num-embeddings: expected at least one table"),
        ({"seed": 2**32}, "--seed must be in"),
        ({"data_generation": "synthetic"}, "synthetic needs --data-trace-file"),
        ({"data_generation": "zipf"}, "--data-generation: expected one of"),
        (
            {"rand_data_dist": "gaussian", "rand_data_max": 7.0},
            r"must be ids of every table, 0 … 0; got 0\.0 … 7\.0",
        ),
        (
            {"rand_data_dist": "gaussian", "num_embeddings": (9,), "rand_data_sigma": -1.0},
            "--rand-data-sigma must not be negative",
        ),
        (
            {"rand_data_sigma": 2.0},
            "--rand-data-sigma goes with --rand-data-dist gaussian; got uniform",
        ),
        (
            {"data_trace_file": "j.log"},
            "--data-trace-file goes with --data-generation synthetic; got random",
        ),
        (
            {"data_trace_enable_padding": True},
            "--data-trace-enable-padding goes with --data-generation synthetic; got random",
        ),
        (
            {
                "data_generation": "synthetic",
                "data_trace_file": "j.log",
                "rand_data_dist": "gaussian",
            },
            "--rand-data-dist goes with --data-generation random; got synthetic",
        ),
        ({"num_batches": 2}, "--data-size and --num-batches .* both tell .* got 23 and 2"),
    ],
)
def test_what_cannot_be_drawn(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        dataclasses.replace(SMALL, **changes)


def test_it_is_public(tmp_path: Path) -> None:
    config = dlrm.GenerateConfig(data_size=10, num_embeddings=(4,))
    assert dlrm.generate(tmp_path / "dataset", config).rows("train") == 10
