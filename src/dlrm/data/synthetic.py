"""Criteo-shaped click logs with a planted truth: data whose best possible metrics are known.

A row's logit is a sum of effects of its dense values, of its ids and of pairs of its ids; its
label is drawn with the probability sigmoid(logit). ``docs/synthesize.md`` explains the choices.

Notation: B rows of a block, F = 26 sparse features. Inside a block, arrays are (features, B).
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, fields
from enum import IntEnum
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from tqdm import tqdm

from dlrm.config import SynthesizeConfig
from dlrm.data.splits import day_lengths, hold_back_last
from dlrm.device import available_cores
from dlrm.errors import EnvironmentFaultError, UserError
from dlrm.files import (
    FORMAT_VERSION,
    atomic_write,
    environment_faults,
    locked,
    read_json,
    write_json,
)
from dlrm.metrics import compute_metrics
from dlrm.progress import progress

# Rounded aggregates of Criteo's Kaggle data. Dense: rate of missing values, then mean and standard
# deviation of log(max(x, 0) + 1).
_DENSE = np.array(
    [
        (0.45, 0.8, 1.0),
        (0.0, 2.1, 2.1),
        (0.2, 2.2, 1.3),
        (0.2, 1.7, 1.0),
        (0.05, 7.2, 2.9),
        (0.25, 3.6, 1.8),
        (0.05, 1.5, 1.4),
        (0.001, 2.1, 1.2),
        (0.05, 3.6, 1.7),
        (0.45, 0.4, 0.4),
        (0.05, 0.9, 0.7),
        (0.77, 0.3, 0.6),
        (0.2, 1.9, 1.1),
    ]
)
_LARGEST_DENSE = 9_999_999
_NEGATIVE_FEATURE = 1
_NEGATIVE_RATES = (0.0006, 0.0974)  # of -2 and of -1

# Sparse: number of values (a missing value counts as one), rate of missing values, and the
# exponent of the power law that gives the most frequent value its share in Criteo's data.
_SPARSE = np.array(
    [
        (1460, 0.0, 2.0),
        (583, 0.0, 1.04),
        (10131227, 0.036, 1.02),
        (2202608, 0.036, 1.07),
        (305, 0.0, 2.58),
        (24, 0.133, 2.03),
        (12517, 0.0, 0.64),
        (633, 0.0, 2.28),
        (3, 0.0, 3.97),
        (93145, 0.0, 1.46),
        (5683, 0.0, 0.71),
        (8351593, 0.036, 1.02),
        (3194, 0.0, 0.7),
        (27, 0.0, 1.51),
        (14992, 0.0, 0.75),
        (5461306, 0.036, 1.01),
        (10, 0.0, 1.54),
        (5652, 0.0, 0.89),
        (2173, 0.45, 2.33),
        (4, 0.45, 0.18),
        (7046547, 0.036, 1.01),
        (18, 0.82, 1.99),
        (15, 0.0, 1.71),
        (286181, 0.036, 1.06),
        (105, 0.45, 1.51),
        (142572, 0.45, 1.07),
    ]
)
_FEWEST_VALUES = 10

_CLICK_RATE = 0.256
_BEST_AUC = 0.80
# The planted truth. Only frequent ids have effects, since rare ones cannot be learned.
_RANKS_WITH_EFFECT = 4096
_RANK_OF_HALF_EFFECT = 2
_LATENT_DIM = 4
_PAIRED_FEATURES = (13, 22, 16, 5, 0, 19, 24, 1)
_DENSE_SHARE, _ID_SHARE, _PAIR_SHARE = 0.40, 0.35, 0.25

_BLOCK_ROWS = 16384
_CALIBRATION_BLOCKS = 8
_FEWEST_ROWS_A_STEP = 4


class _Stream(IntEnum):
    """What random numbers are for; part of their generator's key."""

    EFFECTS = 0
    CALIBRATION = 1
    TRAIN = 2
    TEST = 3


def _generator(seed: int, stream: _Stream, block: int = 0) -> np.random.Generator:
    """Return the generator of one block: the same whoever makes the block, and when."""
    return np.random.Generator(np.random.Philox(key=[seed, stream], counter=[0, 0, 0, block]))


def cardinalities(scale: float) -> NDArray[np.int64]:
    """Return how many values each sparse feature can take, a missing value included.

    Args:
        scale: 1 for Kaggle's; a feature keeps at least 10 values, or all where it has fewer.

    Returns:
        (26,).
    """
    full = _SPARSE[:, 0]
    fewest = np.minimum(full, _FEWEST_VALUES)
    counts: NDArray[np.int64] = np.maximum(np.rint(full * scale), fewest).astype(np.int64)
    return counts


@dataclass(frozen=True)
class _Features:
    """The features of a block's rows."""

    dense: NDArray[np.int32]
    """(13, B)."""
    dense_missing: NDArray[np.bool_]
    """(13, B)."""
    ranks: NDArray[np.int32]
    """(F, B) which value of its feature, 0 the most frequent; -1 where missing."""

    @property
    def log_dense(self) -> NDArray[np.float32]:
        """(13, B) as a model sees them: a missing or negative value is 0, then log(x + 1)."""
        known = np.where(self.dense_missing, 0, np.maximum(self.dense, 0))
        return np.log1p(known, dtype=np.float32)


class _FeatureSampler:
    """Draws the features of rows, all independent of each other and of the row's number.

    Only which rare value occurs depends on the row: a share of the rows walks through a feature's
    values, so that each occurs at least once where the rows suffice; the other rows draw from the
    power law.
    """

    def __init__(self, config: SynthesizeConfig) -> None:
        missing = _SPARSE[:, 1]
        values = cardinalities(config.scale) - (missing > 0)
        self._rows = config.rows
        self._values = values[:, None]
        self._walk_steps = np.minimum(self._values, config.rows // _FEWEST_ROWS_A_STEP)
        self._strides = np.array([_stride(int(count)) for count in values])
        # The walk never takes a missing value, so the other rows take more of them.
        self._with_missing = np.flatnonzero(missing)
        rate = missing[:, None] / (1 - self._walk_steps / config.rows)
        self._missing_rate = rate[self._with_missing].astype(np.float32)
        # The power law x**-exponent on the real numbers of [1, n + 1), cut to integers, through
        # the inverse of its cumulative distribution.
        self._power = 1 - _SPARSE[:, 2:3]
        self._power_range = (self._values + 1.0) ** self._power - 1

    def sample(self, generator: np.random.Generator, first: int | None, rows: int) -> _Features:
        """Draw rows.

        Args:
            generator: The block's.
            first: Number of the first row in train.txt, whose walk takes the values in turn; None:
                a step of the walk takes any value.
            rows: How many.
        """
        rate, mean, deviation = (_DENSE[:, i : i + 1].astype(np.float32) for i in range(3))
        logarithm = generator.standard_normal((len(_DENSE), rows), dtype=np.float32)
        logarithm *= deviation
        logarithm += mean
        np.clip(logarithm, 0, math.log(_LARGEST_DENSE), out=logarithm)
        dense = np.exp(logarithm, out=logarithm).astype(np.int32) - 1
        negative = generator.random(rows, dtype=np.float32)
        dense[_NEGATIVE_FEATURE, negative < sum(_NEGATIVE_RATES)] = -1
        dense[_NEGATIVE_FEATURE, negative < _NEGATIVE_RATES[0]] = -2
        dense_missing = generator.random((len(_DENSE), rows), dtype=np.float32) < rate

        ranks = self._power_law(generator, rows)
        missing = generator.random((len(self._with_missing), rows), dtype=np.float32)
        feature, row = np.nonzero(missing < self._missing_rate)
        ranks[self._with_missing[feature], row] = -1
        self._walk(ranks, generator, first)
        return _Features(dense, dense_missing, ranks)

    def _power_law(self, generator: np.random.Generator, rows: int) -> NDArray[np.int32]:
        position = generator.random((len(_SPARSE), rows))
        position *= self._power_range
        np.log1p(position, out=position)
        position /= self._power
        np.exp(position, out=position)
        # Rounding can reach n + 1 itself.
        np.minimum(position, self._values, out=position)
        ranks = position.astype(np.int32)
        ranks -= 1
        return ranks

    def _walk(
        self, ranks: NDArray[np.int32], generator: np.random.Generator, first: int | None
    ) -> None:
        """Put the values of the walk into the ranks (F, B)."""
        start = first or 0
        # Row r takes the step numbered floor(r * steps / rows) where that number rises.
        row_numbers = np.arange(start, start + ranks.shape[1] + 1)
        steps = row_numbers * self._walk_steps // self._rows
        feature, row = np.nonzero(np.diff(steps))
        values = self._values[feature, 0]
        if first is None:
            step = generator.integers(0, values)
        else:
            step = steps[feature, row]
        ranks[feature, row] = step * self._strides[feature] % values


def _stride(count: int) -> int:
    """Return a step that visits all of ``count`` values, near the golden ratio: evenly spread."""
    stride = max(1, round(count * 0.618))
    while math.gcd(stride, count) != 1:
        stride += 1
    return stride


class _PlantedTruth:
    """The effects that make a row's logit, scaled to the click rate and the best possible AUC."""

    def __init__(self, seed: int, sampler: _FeatureSampler) -> None:
        generator = _generator(seed, _Stream.EFFECTS)
        # Columns: the frequent ranks; then all others, without effect; then, found as rank -1, a
        # missing value.
        columns = _RANKS_WITH_EFFECT + 2
        damping = 1 / (1 + np.arange(columns) / _RANK_OF_HALF_EFFECT)
        damping[-2:] = 0, 1
        self._dense_effects = generator.uniform(0.5, 1, len(_DENSE)) / _DENSE[:, 2]
        self._dense_effects *= generator.choice((-1, 1), len(_DENSE))
        self._dense_effects = self._dense_effects.astype(np.float32)
        shape = (len(_SPARSE), columns)
        self._id_effects = (generator.standard_normal(shape) * damping).astype(np.float32)
        latent = generator.standard_normal((len(_PAIRED_FEATURES), columns, _LATENT_DIM))
        self._latent = (latent * damping[:, None]).astype(np.float32)
        self._scales = np.ones((3, 1), dtype=np.float32)
        self._bias = 0.0
        self._calibrate(seed, sampler)

    def probabilities(self, features: _Features) -> NDArray[np.float32]:
        """Return (B,) the probability of a click."""
        logits = (self.components(features) * self._scales).sum(axis=0) + self._bias
        return _sigmoid(logits).astype(np.float32)

    def components(self, features: _Features) -> NDArray[np.float32]:
        """Return (3, B): the summed effects of dense features, of ids, and of pairs of ids."""
        ranks = np.minimum(features.ranks, _RANKS_WITH_EFFECT)
        dense = self._dense_effects @ features.log_dense
        ids = np.zeros(ranks.shape[1], dtype=np.float32)
        for effects, rank in zip(self._id_effects, ranks, strict=True):
            ids += effects[rank]
        vectors = [
            latent[ranks[feature]]
            for latent, feature in zip(self._latent, _PAIRED_FEATURES, strict=True)
        ]
        pairs = np.zeros_like(ids)
        # A ring: each feature is paired with the one before it.
        for i, vector in enumerate(vectors):
            pairs += np.einsum("bd,bd->b", vectors[i - 1], vector)
        return np.stack([dense, ids, pairs])

    def _calibrate(self, seed: int, sampler: _FeatureSampler) -> None:
        blocks = [
            sampler.sample(_generator(seed, _Stream.CALIBRATION, block), None, _BLOCK_ROWS)
            for block in range(_CALIBRATION_BLOCKS)
        ]
        # Centred latent vectors make the effects of pairs pure interactions: averaged over either
        # feature nothing is left that effects of single ids could explain.
        for latent, feature in zip(self._latent, _PAIRED_FEATURES, strict=True):
            ranks = np.concatenate([block.ranks[feature] for block in blocks])
            latent -= latent[np.minimum(ranks, _RANKS_WITH_EFFECT)].mean(axis=0)

        components = np.concatenate([self.components(block) for block in blocks], axis=1)
        shares = np.sqrt([[_DENSE_SHARE], [_ID_SHARE], [_PAIR_SHARE]])
        scales = shares / components.std(axis=1, keepdims=True)
        logits = np.sort((components * scales).sum(axis=0, dtype=np.float64))
        low, high = 0.0, 4.0
        for _ in range(30):
            gain = (low + high) / 2
            bias = _bias(gain * logits)
            if _expected_auc(_sigmoid(gain * logits + bias)) < _BEST_AUC:
                low = gain
            else:
                high = gain
        self._scales = (scales * gain).astype(np.float32)
        self._bias = bias


def _sigmoid(logits: NDArray[Any]) -> NDArray[Any]:
    # No overflow: the logits of this file stay far below 88.
    probabilities: NDArray[Any] = 1 / (1 + np.exp(-logits))
    return probabilities


def _bias(logits: NDArray[np.float64]) -> float:
    """Return what to add to the logits so that the mean probability is the click rate."""
    bias = 0.0
    for _ in range(10):
        p = _sigmoid(logits + bias)
        # Newton's method.
        bias -= float((p.mean() - _CLICK_RATE) / (p * (1 - p)).mean())
    return bias


def _expected_auc(probabilities: NDArray[np.float64]) -> float:
    """Return the AUC of true probabilities, sorted ascending, expected over labels."""
    non_clicks = np.cumsum(1 - probabilities)
    wins = (probabilities[1:] * non_clicks[:-1]).sum()
    return float(wins / (probabilities.sum() * non_clicks[-1]))


# Text: every field of a row has room for 8 bytes, NUL where it has fewer, and the NULs go at the
# end. Each table holds the text of 4 digits as one little-endian number, whose lowest byte is the
# first character.
_HEXADECIMAL = np.array([b"%04x" % i for i in range(2**16)], dtype="S4").view("<u4")
_PADDED_DECIMAL = np.array([b"%04d" % i for i in range(10**4)], dtype="S4").view("<u4")
# The last two are found as -2 and -1.
_DECIMAL = np.array([b"%d" % i for i in (*range(10**4), -2, -1)], dtype="S4").view("<u4")


def _record(labelled: bool) -> np.dtype[Any]:
    fields = ["label"] if labelled else []
    fields += [f"I{i + 1}" for i in range(len(_DENSE))] + [f"C{i + 1}" for i in range(len(_SPARSE))]
    types = [(name, "u1" if name == "label" else "<u8") for name in fields]
    return np.dtype([pair for t in types for pair in (t, (f"after {t[0]}", "u1"))])


def _text(features: _Features, labels: NDArray[np.bool_] | None) -> NDArray[np.uint8]:
    """Return rows in Criteo's format as bytes; without the label's column if labels is None."""
    record = _record(labels is not None)
    rows = np.zeros(features.ranks.shape[1], dtype=record)
    assert record.names is not None
    for separator in record.names[1::2]:
        rows[separator] = ord("\t")
    rows[record.names[-1]] = ord("\n")
    if labels is not None:
        rows["label"] = labels + np.uint8(ord("0"))
    for i, integers in enumerate(_decimal(features.dense, features.dense_missing)):
        rows[f"I{i + 1}"] = integers
    for i, ids in enumerate(_hexadecimal(features.ranks)):
        rows[f"C{i + 1}"] = ids
    characters = rows.view(np.uint8)
    text: NDArray[np.uint8] = characters[characters != 0]
    return text


def _decimal(values: NDArray[np.int32], missing: NDArray[np.bool_]) -> NDArray[np.uint64]:
    text = _DECIMAL[np.minimum(values, 9999)].astype(np.uint64)
    large = np.nonzero(values > 9999)
    high, low = np.divmod(values[large], 10**4)
    text[large] = _joined(_DECIMAL[high], _PADDED_DECIMAL[low])
    text[missing] = 0
    return text


def _hexadecimal(ranks: NDArray[np.int32]) -> NDArray[np.uint64]:
    """Return the ids of ranks (F, B): distinct for every feature and rank, never 00000000."""
    features = np.arange(1, len(ranks) + 1, dtype=np.uint32)[:, None]
    ids = (features << np.uint32(24)) + ranks.astype(np.uint32)
    # MurmurHash3's finalizer, a bijection of 32-bit numbers that maps only 0 to 0.
    ids ^= ids >> np.uint32(16)
    ids *= np.uint32(0x85EBCA6B)
    ids ^= ids >> np.uint32(13)
    ids *= np.uint32(0xC2B2AE35)
    ids ^= ids >> np.uint32(16)
    text = _joined(_HEXADECIMAL[ids >> np.uint32(16)], _HEXADECIMAL[ids & np.uint32(0xFFFF)])
    text[ranks < 0] = 0
    return text


def _joined(first: NDArray[np.uint32], second: NDArray[np.uint32]) -> NDArray[np.uint64]:
    return first | second.astype(np.uint64) << np.uint64(32)


@dataclass(frozen=True)
class BestPossible:
    """Metrics of the true probabilities on a split: no model can expect better ones.

    None where a split is too small for the metric.
    """

    auc: float | None
    log_loss: float | None
    normalized_entropy: float | None
    accuracy: float | None
    samples: int


@dataclass(frozen=True)
class Truth:
    """What is known of made-up data; ``truth.json``."""

    seed: int
    scale: float
    rows: int
    test_rows: int
    click_rate: float
    """Clicks a row of train.txt."""
    cardinalities: tuple[int, ...]
    """How many values of each sparse feature train.txt holds, a missing value counted as one."""
    train: BestPossible
    """The reference's splits of train.txt: days 0 to 5 of 7,"""
    validation: BestPossible
    """the second half of day 6,"""
    test: BestPossible
    """and its first half. (test.txt, which has no labels, is none of these.)"""
    format_version: str = FORMAT_VERSION


def synthesize(directory: Path | str, config: SynthesizeConfig) -> Truth:
    """Write made-up click logs in the format of Criteo's Kaggle challenge.

    ``directory`` gets train.txt, test.txt (without labels), truth.json, and for the rows of either
    text their true ``probability`` (float32) and ``label`` (uint8), in probabilities.arrow and
    test_probabilities.arrow; without ``test_rows`` nothing is written of a test. If it holds the
    same data already, nothing is done.

    The files depend on the configuration alone, not on the number of threads. Memory: about
    200 MB, a byte a value, and up to 50 bytes a row, most of them for the metrics; 2.2 GB for
    Kaggle's 45.8 million rows.

    Raises:
        UserError: The directory holds other data, or is a file.
        EnvironmentFaultError: The disk is full or read-only.
    """
    directory = Path(directory)
    try:
        with environment_faults(f"make the directory {directory}"):
            directory.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise UserError(
            f"{directory} cannot be a directory: a file is in the way. Choose another."
        ) from error
    except FileNotFoundError as error:  # what a file system that holds no files says, as /proc
        raise EnvironmentFaultError(
            f"cannot make the directory {directory}: {error.strerror}. Choose another place."
        ) from error
    with locked(directory, "directory"), environment_faults(f"write to {directory}"):
        return _finished(directory, config) or _write(directory, config)


def truth_of(train: Path, rows: int, clicks: int) -> Truth | None:
    """Return what is known of a train.txt that ``synthesize`` wrote; None of any other file.

    Args:
        train: The file; a ``truth.json`` beside it may be of it.
        rows: How many rows it has.
        clicks: Those with label 1.
    """
    try:
        truth = read_json(train.with_name("truth.json"), Truth, "set of made-up data")
    except (UserError, OSError):  # none, or somebody else's
        return None
    is_same = (truth.rows, round(truth.click_rate * truth.rows)) == (rows, clicks)
    return truth if is_same and train.name == "train.txt" else None


_TRAIN_FILES = ("train.txt", "probabilities.arrow")
_TEST_FILES = ("test.txt", "test_probabilities.arrow")


def _finished(directory: Path, config: SynthesizeConfig) -> Truth | None:
    """Return the truth of the data in the directory, None if there is none.

    Raises:
        UserError: It holds other data.
    """
    names = (*_TRAIN_FILES, *_TEST_FILES, "truth.json")
    present = [name for name in names if (directory / name).exists()]
    if not present:
        return None
    if {*_files(config), "truth.json"} <= set(present):
        truth = read_json(directory / "truth.json", Truth, "set of made-up data")
        made = SynthesizeConfig(
            rows=truth.rows, test_rows=truth.test_rows, scale=truth.scale, seed=truth.seed
        )
        if made == config:
            return truth
        found = f"data made with other options ({made}, not {config})"
    else:
        found = f"{', '.join(present)}, not made with these options or not completely"
    raise UserError(
        f"{directory} holds {found}, which is not overwritten. Choose another directory, or "
        "delete these files."
    )


def _files(config: SynthesizeConfig) -> tuple[str, ...]:
    return _TRAIN_FILES + _TEST_FILES if config.test_rows else _TRAIN_FILES


def _write(directory: Path, config: SynthesizeConfig) -> Truth:
    sampler = _FeatureSampler(config)
    planted = _PlantedTruth(config.seed, sampler)
    seen = _SeenValues(cardinalities(config.scale))

    def block(stream: _Stream, number: int, rows: int) -> _Block:
        generator = _generator(config.seed, stream, number)
        is_train = stream is _Stream.TRAIN
        features = sampler.sample(generator, number * _BLOCK_ROWS if is_train else None, rows)
        probabilities = planted.probabilities(features)
        labels = generator.random(rows, dtype=np.float32) < probabilities
        if is_train:
            seen.add(features.ranks)
        return _Block(_text(features, labels if is_train else None), labels, probabilities)

    with ExitStack() as stack:
        files = {
            name: stack.enter_context(atomic_write(directory / name)) for name in _files(config)
        }
        rows = config.rows + config.test_rows
        bar = stack.enter_context(progress("synthesize", rows, unit="rows", unit_scale=True))
        pool = stack.enter_context(ThreadPoolExecutor(available_cores()))
        labels, probabilities = _write_rows(
            _blocks(pool, block, _Stream.TRAIN, config.rows),
            config.rows,
            files["train.txt"],
            files["probabilities.arrow"],
            bar,
        )
        if config.test_rows:
            _write_rows(
                _blocks(pool, block, _Stream.TEST, config.test_rows),
                config.test_rows,
                files["test.txt"],
                files["test_probabilities.arrow"],
                bar,
            )
        split = hold_back_last(day_lengths(config.rows, "train.txt")).ranges
        train, validation, test = (
            _best_possible(labels[rows.start : rows.stop], probabilities[rows.start : rows.stop])
            for rows in (split["train"], split["validation"], split["test"])
        )
        truth = Truth(
            seed=config.seed,
            scale=config.scale,
            rows=config.rows,
            test_rows=config.test_rows,
            click_rate=float(labels.mean()),
            cardinalities=seen.counts(),
            train=train,
            validation=validation,
            test=test,
        )
    # Last, so that a directory with truth.json is complete.
    write_json(directory / "truth.json", truth)
    return truth


@dataclass(frozen=True)
class _Block:
    text: NDArray[np.uint8]
    labels: NDArray[np.bool_]
    probabilities: NDArray[np.float32]


def _blocks(
    pool: ThreadPoolExecutor,
    make: Callable[[_Stream, int, int], _Block],
    stream: _Stream,
    rows: int,
) -> Iterator[_Block]:
    """Make a stream's blocks in threads; yield them in order, few of them in memory."""
    pending: deque[Future[_Block]] = deque()
    for number, first in enumerate(range(0, rows, _BLOCK_ROWS)):
        pending.append(pool.submit(make, stream, number, min(_BLOCK_ROWS, rows - first)))
        if len(pending) > 2 * available_cores():
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


def _write_rows(
    blocks: Iterator[_Block], rows: int, text: IO[bytes], table: IO[bytes], bar: tqdm[Any]
) -> tuple[NDArray[np.bool_], NDArray[np.float32]]:
    """Write blocks to a text file and an Arrow table; return all labels and probabilities."""
    schema = pa.schema([("probability", pa.float32()), ("label", pa.uint8())])
    labels, probabilities = np.empty(rows, np.bool_), np.empty(rows, np.float32)
    first = 0
    with pa.ipc.new_file(table, schema) as writer:
        for block in blocks:
            text.write(block.text.data)
            columns = [block.probabilities, block.labels.view(np.uint8)]
            writer.write_batch(pa.record_batch([pa.array(c) for c in columns], schema=schema))
            end = first + len(block.labels)
            labels[first:end] = block.labels
            probabilities[first:end] = block.probabilities
            first = end
            bar.update(len(block.labels))
    return labels, probabilities


class _SeenValues:
    """Which values of each sparse feature have occurred; one byte a value."""

    def __init__(self, cardinalities: NDArray[np.int64]) -> None:
        # One more for a missing value, even where the feature has none.
        self._starts = np.concatenate(([0], np.cumsum(cardinalities + 1)))
        self._seen = np.zeros(self._starts[-1], dtype=np.bool_)

    def add(self, ranks: NDArray[np.int32]) -> None:
        """Note the values of a block; threads may do so at once, since all write the same."""
        self._seen[ranks + 1 + self._starts[:-1, None]] = True

    def counts(self) -> tuple[int, ...]:
        """Return how many values of each feature have occurred, a missing value included."""
        counts = np.add.reduceat(self._seen, self._starts[:-1], dtype=np.int64)
        return tuple(int(count) for count in counts)


def _best_possible(labels: NDArray[np.bool_], probabilities: NDArray[np.float32]) -> BestPossible:
    metrics = compute_metrics(labels, probabilities)
    found = {field.name: getattr(metrics, field.name) for field in fields(BestPossible)}
    defined: dict[str, Any] = {
        name: None if math.isnan(value) else value for name, value in found.items()
    }
    return BestPossible(**defined)
