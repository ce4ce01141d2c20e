"""Made-up rows for benchmarks without data: random, or with the locality of other data.

The reference implementation's generators (``RandomDataset`` in dlrm_data_pytorch.py). Random rows
are equal to its own, from the same seed, bit for bit: its draws from NumPy's legacy ``RandomState``
are made in its order. Rows whose ids repeat as stack distances say are not: there each bag begins
the sequence anew, so that it always begins with the same id; here a table's sequence goes on from
bag to bag, so that the ids of the rows together have the distances.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from dlrm.config import GenerateConfig
from dlrm.data.batch import Bags
from dlrm.data.dataset import (
    BLOCK_BYTES,
    Dataset,
    Rows,
    Source,
    in_blocks,
    refuse_taken_dataset,
    row_bytes,
    write_dataset,
)
from dlrm.data.stack_distance import Accesses, StackDistances, refuse_missing, trace_path
from dlrm.errors import UserError
from dlrm.files import refuse_small_disk, sha256
from dlrm.progress import progress
from dlrm.schema import DenseFeature, FeatureSchema, SparseFeature, Split

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]


def generate(
    dataset: Path | str, config: GenerateConfig | None = None, *, overwrite: bool = False
) -> Dataset:
    """Make a DATASET of made-up rows, in limited memory.

    One that is there already, of equal options, is left as it is.

    Args:
        dataset: The folder to make.
        config: Which rows; None: the defaults.
        overwrite: Replace a DATASET that is there, of other options.

    Raises:
        UserError: There is something else at ``dataset``, or a file of stack distances is missing
            or damaged.
        EnvironmentFaultError: The disk is too small, full or fails.
    """
    path, config = Path(dataset), config or GenerateConfig()
    sources = tuple(_source(file) for file in _files(config))
    if there := _made_already(path, config, sources):
        return there
    refuse_taken_dataset(path, overwrite=overwrite)
    made = _Rows(config)  # damaged files are refused before anything is written
    training = made.runs(config.train_rows)
    first = next(training)
    total = config.train_rows + 2 * config.test_rows
    refuse_small_disk(path, total * first.nbytes // len(first))
    with progress("generate", total, unit="rows") as bar:

        def shown(runs: Iterable[Rows]) -> Iterator[Rows]:
            for run in runs:
                bar.update(len(run))
                yield run

        def held_back() -> Iterator[Rows] | Split:
            return shown(made.runs(config.test_rows)) if config.test_rows else "train"

        return write_dataset(
            path,
            generated_schema(config),
            {
                "train": shown(itertools.chain([first], training)),
                "validation": held_back(),
                "test": held_back(),
            },
            generation=config,
            sources=sources,
            overwrite=overwrite,
        )


def generated_schema(config: GenerateConfig) -> FeatureSchema:
    """Return what a made-up row consists of."""
    multi_hot = config.num_indices_per_lookup > 1
    return FeatureSchema(
        label="label",
        dense=tuple(DenseFeature(f"int_{i}", "none") for i in range(config.dense_features)),
        sparse=tuple(
            SparseFeature(f"cat_{i}", rows, multi_hot=multi_hot)
            for i, rows in enumerate(config.num_embeddings)
        ),
        source_format="generated",
        split_rule=(
            "validation and test are drawn after train"
            if config.test_rows
            else "validation and test are the rows of train"
        ),
        soft_labels=config.soft_labels,
    ).sealed()


def _files(config: GenerateConfig) -> list[Path]:
    """Return the files of stack distances, each once."""
    if config.data_generation != "synthetic":
        return []
    pattern = Path(config.data_trace_file)
    tables = range(len(config.num_embeddings))
    return list(dict.fromkeys(trace_path(pattern, table) for table in tables))


def _made_already(path: Path, config: GenerateConfig, sources: Sequence[Source]) -> Dataset | None:
    """Return a DATASET that is there, if it is whole and was made with these options."""
    try:
        there = Dataset.open(path)
    except UserError:
        return None
    made_from = [(source.name, source.sha256) for source in there.manifest.sources]
    expected = [(source.name, source.sha256) for source in sources]
    return there if (there.manifest.generation, made_from) == (config, expected) else None


def _source(path: Path) -> Source:
    refuse_missing(path)
    status = path.stat()
    return Source(path.name, status.st_size, status.st_mtime_ns, sha256(path))


class _Rows:
    """Rows one after the other, over any number of calls."""

    def __init__(self, config: GenerateConfig) -> None:
        self._config = config
        self._schema = generated_schema(config)
        self._draws = _Draws(np.random.RandomState(config.seed))
        self._accesses: list[Accesses] = []
        if config.data_generation == "synthetic":
            for table, feature in enumerate(self._schema.sparse):
                file = trace_path(Path(config.data_trace_file), table)
                self._accesses.append(
                    Accesses(
                        StackDistances.read(file),
                        feature.num_embeddings,
                        feature.name,
                        padding=config.data_trace_enable_padding,
                    )
                )

    def runs(self, rows: int) -> Iterator[Rows]:
        """Draw the next rows, in runs of some megabytes."""
        size = row_bytes(self._schema)
        if self._schema.multi_hot_features:
            size += 4 * self._config.num_indices_per_lookup * len(self._schema.sparse)
        batch = self._config.mini_batch_size
        batches = (self._batch(min(batch, rows - first)) for first in range(0, rows, batch))
        return in_blocks(batches, max(1, BLOCK_BYTES // size))

    def _batch(self, rows: int) -> Rows:
        """Draw so many rows in the reference's order: dense features, tables in turn, labels."""
        config = self._config
        dense = self._draws.take(rows * config.dense_features).astype(np.float32)
        bags = [self._bags(table, rows) for table in range(len(config.num_embeddings))]
        labels = self._draws.take(rows).astype(np.float32)
        single = config.num_indices_per_lookup == 1
        return Rows(
            labels if config.soft_labels else (labels > 0.5).astype(np.uint8),
            dense.reshape(rows, config.dense_features),
            np.stack([each.ids for each in bags], axis=1) if single else np.empty((rows, 0), "i4"),
            () if single else tuple(bags),
        )

    def _bags(self, table: int, rows: int) -> Bags:
        """Draw the ids of a table: in each bag ascending, as the reference has them."""
        config = self._config
        size, most = config.num_embeddings[table], config.num_indices_per_lookup
        fixed = np.full(rows, most) if config.num_indices_per_lookup_fixed else None
        largest = min(size, most)
        if config.data_generation == "synthetic":
            lengths = _lengths(self._draws.take(rows), largest) if fixed is None else fixed
            drawn = self._accesses[table].draw(self._draws.take(int(lengths.sum())))
            return _ascending(drawn.astype(np.int64), lengths)
        if config.rand_data_dist == "gaussian":
            return self._gaussian_bags(rows, largest, fixed)
        if fixed is None:
            uniforms, lengths = self._draws.take_bags(rows, largest)
        else:
            uniforms, lengths = self._draws.take(rows * most), fixed
        return _ascending(np.rint(uniforms * (size - 1)).astype(np.int64), lengths)

    def _gaussian_bags(self, rows: int, largest: int, fixed: IntArray | None) -> Bags:
        config = self._config
        least, most = config.rand_data_min, config.rand_data_max
        mean = (most + least) / 2 if config.rand_data_mu == -1 else config.rand_data_mu
        if fixed is not None:
            lengths = fixed
            normals = self._draws.normal(mean, config.rand_data_sigma, int(lengths.sum()))
        else:  # the draw of a bag's length stands before those of its ids
            bags = []
            for _ in range(rows):
                (length,) = _lengths(self._draws.take(1), largest)
                bags.append(self._draws.normal(mean, config.rand_data_sigma, length))
            lengths = np.array([len(bag) for bag in bags])
            normals = np.concatenate(bags)
        return _ascending(np.clip(normals, least, most), lengths)


def _lengths(uniforms: FloatArray, largest: int) -> IntArray:
    """Return the lengths of bags that the reference draws: 1 … largest, the ends half as often."""
    return np.rint(np.maximum(1.0, uniforms * largest)).astype(np.int64)


def _ascending(values: IntArray | FloatArray, lengths: IntArray) -> Bags:
    """Sort the values in each bag, and drop equal ones; only then do floats become ids."""
    if lengths.max(initial=0) > 1:
        bags = np.repeat(np.arange(len(lengths)), lengths)
        if values.dtype == np.int64:  # one sort is faster than two
            values = np.sort((bags << 32) | values.astype(np.int64)) & 0xFFFFFFFF
        else:
            values = values[np.lexsort((values, bags))]
        distinct = np.ones(len(values), bool)
        distinct[1:] = (values[1:] != values[:-1]) | (bags[1:] != bags[:-1])
        values, lengths = values[distinct], np.bincount(bags[distinct], minlength=len(lengths))
    return Bags.of_lengths(values.astype(np.int32), lengths)


class _Draws:
    """Random numbers in the order in which the reference draws them."""

    def __init__(self, random_state: np.random.RandomState) -> None:
        self._random_state = random_state
        self._ahead = np.empty(0)  # drawn, but not taken yet

    def take(self, count: int) -> FloatArray:
        """Return the next uniform numbers, (count,)."""
        taken = self._look_ahead(count)[:count]
        self._ahead = self._ahead[count:]
        return taken

    def normal(self, mean: float, deviation: float, count: int) -> FloatArray:
        """Return the next normal numbers, (count,)."""
        assert not len(self._ahead)  # else they would come too late
        return self._random_state.normal(mean, deviation, count)

    def take_bags(self, bags: int, largest: int) -> tuple[FloatArray, IntArray]:
        """Draw bags of uniform numbers: for each its length, then its numbers.

        Returns:
            The numbers, (N,), and the lengths, (bags,).
        """
        numbers = self._look_ahead(bags * (1 + largest))
        length_at = _lengths(numbers, largest)  # were this number the first of a bag
        step = (length_at + 1).tolist()
        first, position = [], 0
        for _ in range(bags):
            first.append(position)
            position += step[position]
        lengths = length_at[first]
        inside = np.ones(position, bool)
        inside[first] = False
        taken = numbers[:position][inside]
        self._ahead = self._ahead[position:]
        return taken, lengths

    def _look_ahead(self, count: int) -> FloatArray:
        """Return the next numbers, at least so many, without taking them."""
        missing = count - len(self._ahead)
        if missing > 0:
            more = self._random_state.random_sample(missing)
            self._ahead = np.concatenate([self._ahead, more]) if len(self._ahead) else more
        return self._ahead
