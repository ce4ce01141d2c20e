"""Whole preparations against the same in plain Python, in memory."""

from __future__ import annotations

import gzip
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dlrm.config import PrepareConfig
from dlrm.data.dataset import Dataset, read_part
from dlrm.data.verification import verify
from dlrm.data.vocabulary import Encoder, Vocabulary
from dlrm.schema import SPLITS

Warm = Callable[..., Any]
Row = tuple[int, list[int], list[int]]
MASK = 2**64 - 1


@pytest.fixture
def tmp_path(quick_path: Path) -> Path:
    return quick_path


def mixed(value: int) -> int:
    """The finalizer of splitmix64."""
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & MASK
    return value ^ (value >> 31)


def key(row: int, seed: int) -> int:
    """What rows are sorted by: splitmix64 of seed and row."""
    golden = 0x9E3779B97F4A7C15
    start = mixed((seed + golden) & MASK)
    return mixed((start + row * golden) & MASK)


@dataclass
class Expected:
    splits: dict[str, list[Row]]
    values: list[list[int]]
    """Of each feature, the values with an id, in order of their ids."""
    counts: list[Counter[int]]
    other_ids: list[int]
    days: list[int]
    day_clicks: list[int]
    missing: list[int]
    dropped: int


def prepared_plainly(files: list[bytes], config: PrepareConfig, split: str) -> Expected:
    """Prepare as the documentation says, one step after the other."""
    lines = [[line.split(b"\t") for line in content.splitlines()] for content in files]
    if split == "rows":
        # Of all rows of the one file, 7 days, as equal as can be, the first ones longer.
        (only,) = lines
        lines = [list(day) for day in split_evenly(only, 7)]
    missing = [sum(not row[1 + j] for day in lines for row in day) for j in range(13)]

    random_state = np.random.RandomState(config.seed)
    days: list[list[Row]] = []
    dropped = 0
    for day in lines:
        drawn = random_state.uniform(low=0.0, high=1.0, size=len(day))
        rows = []
        for fields, draw in zip(day, drawn, strict=True):
            label = int(fields[0])
            if config.data_sub_sample_rate and label == 0 and draw < config.data_sub_sample_rate:
                dropped += 1
                continue
            values = [int(field or b"0", 16) for field in fields[14:]]
            if config.max_ind_range:
                values = [value % config.max_ind_range for value in values]
            rows.append((label, [max(0, int(field or b"0")) for field in fields[1:14]], values))
        days.append(rows)

    everything = [row for day in days for row in day]
    held_back = days[-1] if split != "none" else []
    train_days = days[:-1] if split != "none" else days
    train = [row for day in train_days for row in day]
    half = (len(held_back) + 1) // 2

    values, counts, other_ids, ids_of = [], [], [], []
    fitted_on = train if config.vocabulary == "train" else everything
    has_other = config.vocabulary == "train" or config.min_frequency > 1
    for feature in range(26):
        count = Counter(row[2][feature] for row in fitted_on)
        known: dict[int, int] = {}
        for row in fitted_on:
            if count[row[2][feature]] >= config.min_frequency:
                known.setdefault(row[2][feature], len(known))
        values.append(list(known))
        counts.append(count)
        other_ids.append(len(known) if has_other else -1)
        ids_of.append(known)

    def encoded(row: Row) -> Row:
        label, dense, raw = row
        if config.hash_buckets:
            buckets = config.hash_buckets
            return label, dense, [(mixed(value) >> 32) * buckets >> 32 for value in raw]
        return (
            label,
            dense,
            [ids_of[j].get(value, other_ids[j]) for j, value in enumerate(raw)],
        )

    order = list(range(len(train)))
    starts = np.cumsum([0, *map(len, train_days)]).tolist()
    random_state = np.random.RandomState(config.seed)
    if config.shuffle == "total":
        order.sort(key=lambda row: key(row, config.seed))
    elif config.shuffle == "day":
        order = [
            row
            for start, day in zip(starts, train_days, strict=False)
            for row in sorted(range(start, start + len(day)), key=lambda row: key(row, config.seed))
        ]
    elif config.shuffle == "reference":
        order = random_state.permutation(len(train)).tolist()
    elif config.shuffle == "reference-day":
        order = [
            start + row
            for start, day in zip(starts, train_days, strict=False)
            for row in random_state.permutation(len(day)).tolist()
        ]
    return Expected(
        {
            "train": [encoded(train[row]) for row in order],
            "test": [encoded(row) for row in held_back[:half]],
            "validation": [encoded(row) for row in held_back[half:]],
        },
        values,
        counts,
        other_ids,
        [len(day) for day in days],
        [sum(row[0] for row in day) for day in days],
        missing,
        dropped,
    )


def split_evenly(rows: list[Any], count: int) -> list[list[Any]]:
    shortest, longer = divmod(len(rows), count)
    cut, start = [], 0
    for number in range(count):
        end = start + shortest + (number < longer)
        cut.append(rows[start:end])
        start = end
    return cut


def require_equal(dataset: Dataset, expected: Expected, config: PrepareConfig) -> None:
    for split in SPLITS:
        rows: list[Row] = []
        for part in dataset.manifest.splits[split].parts:
            for run in read_part(dataset.path, part, dataset.schema):
                rows += zip(
                    run.labels.tolist(), run.dense.tolist(), run.sparse.tolist(), strict=True
                )
        assert rows == expected.splits[split], split
        assert dataset.manifest.splits[split].clicks == sum(row[0] for row in rows)
    manifest = dataset.manifest
    assert list(manifest.days) == expected.days
    assert list(manifest.day_clicks) == expected.day_clicks
    assert list(manifest.missing) == expected.missing
    assert manifest.rows_dropped == expected.dropped
    assert manifest.options == config
    for feature, values, counts, other_id in zip(
        dataset.schema.sparse, expected.values, expected.counts, expected.other_ids, strict=True
    ):
        assert feature.value_modulus == config.max_ind_range
        assert feature.hash_buckets == config.hash_buckets
        if config.hash_buckets:
            assert (feature.num_embeddings, feature.vocabulary) == (config.hash_buckets, "")
            continue
        assert feature.num_embeddings == len(values) + (other_id >= 0)
        assert feature.other_id == other_id
        vocabulary = Vocabulary.read(dataset.path / "vocabulary" / feature.vocabulary)
        order = np.argsort(vocabulary.ids)
        assert vocabulary.values[order].tolist() == values
        assert vocabulary.counts[order].tolist() == [counts[value] for value in values]


def require_encoder_agrees(dataset: Dataset, files: list[bytes], expected: Expected) -> None:
    """Raw rows, encoded as for a prediction, have the ids that are stored."""
    raw = np.array(
        [
            [int(field or b"0", 16) for field in line.split(b"\t")[14:]]
            for content in files
            for line in content.splitlines()
        ],
        np.uint32,
    )
    ids, unknown = Encoder.open(dataset.path, dataset.schema).encode(raw)
    encoded = Counter(map(tuple, ids.tolist()))
    for rows in expected.splits.values():
        for row in rows:
            assert tuple(row[2]) in encoded
    if expected.dropped == 0:
        stored = Counter(tuple(row[2]) for rows in expected.splits.values() for row in rows)
        assert encoded == stored
    for feature, other_id in enumerate(expected.other_ids):
        if dataset.schema.sparse[feature].hash_buckets:
            assert unknown[feature] == 0
        else:
            assert unknown[feature] == (ids[:, feature] == other_id).sum()
    if "" not in {feature.vocabulary for feature in dataset.schema.sparse}:
        # Values that no row has get the other slot, or none.
        strange = np.full((1, 26), 0xFFFFFFF1, np.uint32)
        if not dataset.schema.sparse[0].value_modulus:
            ids, unknown = Encoder.open(dataset.path, dataset.schema).encode(strange)
            assert ids.tolist() == [expected.other_ids]
            assert unknown.tolist() == [1] * 26


SMALL = {"block_bytes": 1000, "part_bytes": 5000}
# What makes no difference: how much is held at a time, and by how many.
VARIANTS: list[dict[str, Any]] = [
    {"segment_rows": 30, "read_bytes": 3000, "table_bytes": 1, "fit_bytes": 300, "cores": 1},
    {"segment_rows": 7, "read_bytes": 300, "table_bytes": 400_000, "cores": 2},
    {"segment_rows": 80, "read_bytes": 1000, "table_bytes": 1, "cores": 3, "plain": True},
    {"memory": "1GiB"},
]
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "defaults": ("rows", {}),
    "in order": ("rows", {"shuffle": "none"}),
    "by day": ("rows", {"shuffle": "day", "seed": 7}),
    "reference": ("rows", {"shuffle": "reference"}),
    "reference by day": ("rows", {"shuffle": "reference-day", "seed": 9}),
    "train": ("rows", {"vocabulary": "train", "shuffle": "none"}),
    "frequent": ("rows", {"min_frequency": 4}),
    "frequent in train": ("days", {"min_frequency": 3, "vocabulary": "train"}),
    "modulo": ("rows", {"max_ind_range": 5}),
    "modulo and train": ("rows", {"max_ind_range": 1000, "vocabulary": "train"}),
    "hashed": ("rows", {"hash_buckets": 20}),
    "hashed modulo": ("days", {"hash_buckets": 2**31 - 1, "max_ind_range": 70}),
    "sampled": ("rows", {"data_sub_sample_rate": 0.6, "seed": 5}),
    "sampled days": ("days", {"data_sub_sample_rate": 0.4, "shuffle": "reference-day"}),
    "days": ("days", {}),
    "days in order": ("days", {"shuffle": "none"}),
    "days shuffled by day": ("days", {"shuffle": "day"}),
    "some days": ("days", {"days": (3, 0)}),
    "one day": ("rows", {"days": (1,), "split": "rows"}),
    "all rows train": ("none", {"split": "none"}),
    "all days train": ("none", {"split": "none", "days": (1, 2), "vocabulary": "train"}),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_every_option_gives_what_it_says(
    warm: Warm, tmp_path: Path, made_up_lines: Callable[..., bytes], name: str
) -> None:
    split, options = CONFIGS[name]
    config = PrepareConfig(**options)
    source = tmp_path / "source"
    source.mkdir()
    if split == "days" or config.days:
        by_day = {day: made_up_lines(rows, seed=day) for day, rows in enumerate((60, 31, 1, 50))}
        for day, content in by_day.items():
            packed = day == 1
            path = source / f"day_{day}{'.gz' if packed else ''}"
            path.write_bytes(gzip.compress(content) if packed else content)
        files = [by_day[day] for day in config.days or by_day]
    else:
        files = [made_up_lines(150)]
        (source / "train.txt").write_bytes(files[0])
    expected = prepared_plainly(files, config, split)
    contents = []
    # One of the variants for each, and in the end every variant a few times.
    for variant in ({}, VARIANTS[list(CONFIGS).index(name) % len(VARIANTS)]):
        dataset = tmp_path / f"dataset {len(contents)}"
        answer = warm(source=source, dataset=dataset, config=options, **SMALL, **variant)
        assert answer.status == 0, answer.said
        contents.append(
            {
                path.relative_to(dataset): path.read_bytes()
                for path in dataset.rglob("*")
                if path.is_file()
            }
        )
        assert contents[-1] == contents[0], variant
    prepared = Dataset.open(dataset)
    verify(prepared)
    require_equal(prepared, expected, config)
    require_encoder_agrees(prepared, files, expected)
    assert len(prepared.manifest.splits["train"].parts) > 1 or sum(expected.days) < 40


FIXTURES = Path(__file__).parent / "fixtures"


@pytest.mark.parametrize(
    ("name", "config"),
    [
        (
            "dataset-1.1",
            PrepareConfig(
                vocabulary="train",
                min_frequency=2,
                data_sub_sample_rate=0.3,
                bad_rows="skip",
                seed=5,
            ),
        ),
        (
            "dataset-1.1-hashed",
            PrepareConfig(hash_buckets=10, max_ind_range=1000, shuffle="day"),
        ),
    ],
)
def test_a_dataset_of_version_1_1_is_read(name: str, config: PrepareConfig) -> None:
    """Made by that version, from the made-up train.txt beside it; it must stay readable."""
    content = (FIXTURES / "train.txt").read_bytes()
    dataset = Dataset.open(FIXTURES / name)
    assert dataset.manifest.format_version == dataset.schema.format_version == "1.1"
    verify(dataset)
    expected = prepared_plainly([content], config, "rows")
    require_equal(dataset, expected, config)
    require_encoder_agrees(dataset, [content], expected)
    if config.bad_rows == "skip":
        # The fourth line was made "not a row", and what was in it came after it.
        assert dataset.manifest.rows_rejected == 1
        assert dataset.manifest.rejected == {"fields": 1}
        (example,) = dataset.manifest.rejected_examples
        assert (example.file, example.line, example.reason) == ("train.txt", 4, "fields")
