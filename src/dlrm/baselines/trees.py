"""Gradient-boosted trees, by LightGBM: the baseline that is hard to beat on a table.

A tree splits by order, or by subsets of few categories. A sparse feature of many ids is therefore
given as two numbers: how often the value occurs in the training rows, and the rate at which it was
clicked there. Of a training row both are of the other folds' rows, so that its own label is not in
its features; else trees would read the label off the rare values' rates, and learn nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import lightgbm
import numpy as np
import numpy.typing as npt
from lightgbm.callback import CallbackEnv

from dlrm.baselines.model import BaselineModel, Fit, OnRound
from dlrm.config import BaselineConfig
from dlrm.data.dataset import Dataset, Rows, in_blocks
from dlrm.device import available_cores
from dlrm.schema import FeatureSchema, Split

BLOCK_ROWS = 1 << 16
"""Rows that are encoded and binned at a time."""
_LEARNING_RATE = 0.05
FOLDS = 5
_PRIOR_ROWS = 20
"""A rate is drawn towards that of all rows as if so many more had been seen."""


class Trees(BaselineModel):
    """Gradient-boosted trees on dense values, ids, and counts and click rates of ids."""

    library = "lightgbm"
    round_name = "tree"

    def __init__(self, schema: FeatureSchema, config: BaselineConfig) -> None:
        super().__init__(schema, config)
        self._encoder = _Encoder(schema, config.max_categories)
        self._booster: lightgbm.Booster | None = None

    def memory_bytes(self, rows: int, validation_rows: int) -> int:
        """Return about the memory: counts, binned rows, the sample that bins are made of."""
        columns = self._encoder.columns
        block = min(BLOCK_ROWS, max(rows, validation_rows)) * columns * 24
        sample = 3 * 8 * columns * min(rows, _BIN_SAMPLE)
        binned = self.memory_bytes_a_row() * (rows + validation_rows)
        return self._encoder.counts_bytes + binned + block + sample

    def memory_bytes_a_row(self) -> int:
        """Return the bins of a row, its label, score, gradients and place in a leaf."""
        return self._encoder.columns + 40

    def fit(self, data: Dataset, rows: int, on_round: OnRound) -> Fit:
        """Add trees until the log loss of validation has not fallen for a while."""
        labels = self._encoder.fit(data, rows)
        train = self._binned(data, "train", labels)
        held_back = np.concatenate([run.labels for run in _all_rows(data, "validation")])
        validation = self._binned(data, "validation", held_back, train)

        made = 0

        def after_round(environment: CallbackEnv) -> None:
            nonlocal made
            made = environment.iteration + 1
            assert environment.evaluation_result_list
            on_round(made, float(environment.evaluation_result_list[0][2]))

        self._booster = booster = lightgbm.train(
            self._parameters(),
            train,
            num_boost_round=self.config.trees,
            valid_sets=[validation],
            callbacks=[
                after_round,
                lightgbm.early_stopping(self.config.patience, verbose=False),
            ],
        )
        return Fit(made, booster.best_iteration)

    def probabilities(self, rows: Rows) -> npt.NDArray[np.float32]:
        """Return the click probabilities, (n,)."""
        assert self._booster
        scored = self._booster.predict(
            self._encoder.encode(rows), num_iteration=self._booster.best_iteration
        )
        return np.asarray(scored, np.float32)

    def _parameters(self) -> dict[str, Any]:
        return {
            "objective": "binary",
            "metric": "binary_logloss",
            "learning_rate": self.config.learning_rate or _LEARNING_RATE,
            "num_leaves": self.config.num_leaves,
            "seed": self.config.seed,
            "bagging_fraction": 0.8,
            "bagging_freq": 1,
            "feature_fraction": 0.8,
            "bin_construct_sample_cnt": _BIN_SAMPLE,
            "num_threads": available_cores(),
            # Equal results whatever the number of threads; by columns, of which there is one copy.
            "deterministic": True,
            "force_col_wise": True,
            "verbosity": -1,
        }

    def _binned(
        self,
        data: Dataset,
        split: Split,
        labels: npt.NDArray[np.uint8],
        reference: lightgbm.Dataset | None = None,
    ) -> lightgbm.Dataset:
        binned = lightgbm.Dataset(
            _EncodedRows(data, split, len(labels), self._encoder, is_fitted_on=reference is None),
            labels,
            reference=reference,
            categorical_feature=self._encoder.categorical,
            params=self._parameters(),
        )
        return binned.construct()


_BIN_SAMPLE = 200_000
"""Rows that bins are made of; LightGBM's default."""


class _Encoder:
    """Rows as numbers that trees split well."""

    def __init__(self, schema: FeatureSchema, max_categories: int) -> None:
        sizes = schema.num_embeddings
        self._dense = len(schema.dense)
        self._few = [f for f, size in enumerate(sizes) if size <= max_categories]
        self._many = [f for f, size in enumerate(sizes) if size > max_categories]
        self._sizes = [sizes[f] for f in self._many]
        # By fold and id: rows, and those with a click.
        self._rows: list[npt.NDArray[np.uint32]] = []
        self._clicks: list[npt.NDArray[np.uint32]] = []
        self._click_rate = 0.0

    @property
    def columns(self) -> int:
        """Dense values, then ids of few categories, then a count and a rate of each of the rest."""
        return self._dense + len(self._few) + 2 * len(self._many)

    @property
    def categorical(self) -> list[int]:
        """The columns that hold ids."""
        return list(range(self._dense, self._dense + len(self._few)))

    @property
    def counts_bytes(self) -> int:
        """Memory of the counts."""
        return 2 * 4 * FOLDS * sum(self._sizes)

    def fit(self, data: Dataset, rows: int) -> npt.NDArray[np.uint8]:
        """Count values and clicks in so many training rows; return their labels."""
        self._rows = [np.zeros(FOLDS * size, np.uint32) for size in self._sizes]
        self._clicks = [np.zeros(FOLDS * size, np.uint32) for size in self._sizes]
        labels = np.empty(rows, np.uint8)
        position = 0
        for run in data.spread_rows("train", rows):
            labels[position : position + len(run)] = run.labels
            folds = np.arange(position, position + len(run)) % FOLDS
            position += len(run)
            for feature, size, seen, clicked in self._each_of_many():
                ids = run.sparse[:, feature]
                known = ids >= 0
                places = folds[known] * size + ids[known]
                np.add.at(seen, places, np.uint32(1))
                np.add.at(clicked, places[run.labels[known] == 1], np.uint32(1))
        self._click_rate = float(labels.mean(dtype=np.float64))
        return labels

    def encode(self, rows: Rows, first: int | None = None) -> npt.NDArray[np.float32]:
        """Return the columns, (n, columns).

        Args:
            rows: Rows.
            first: The number of the first, if these are the rows that counts are of.
        """
        encoded = np.empty((len(rows), self.columns), np.float32)
        encoded[:, : self._dense] = rows.dense
        few = encoded[:, self._dense : self._dense + len(self._few)]
        few[:] = rows.sparse[:, self._few]
        few[few < 0] = math.nan
        column = self._dense + len(self._few)
        for feature, size, seen, clicked in self._each_of_many():
            ids = rows.sparse[:, feature]
            places = np.arange(FOLDS)[:, None] * size + np.maximum(ids, 0)
            count = seen[places].sum(axis=0, dtype=np.float64)
            clicks = clicked[places].sum(axis=0, dtype=np.float64)
            if first is not None:
                own = (np.arange(first, first + len(rows)) % FOLDS) * size + np.maximum(ids, 0)
                count -= seen[own]
                clicks -= clicked[own]
            count[ids < 0] = clicks[ids < 0] = 0
            rate = (clicks + _PRIOR_ROWS * self._click_rate) / (count + _PRIOR_ROWS)
            # Counts of all folds are of more rows than those of all but one.
            encoded[:, column] = count if first is not None else count * (FOLDS - 1) / FOLDS
            encoded[:, column + 1] = rate
            column += 2
        return encoded

    def _each_of_many(
        self,
    ) -> Iterator[tuple[int, int, npt.NDArray[np.uint32], npt.NDArray[np.uint32]]]:
        return zip(self._many, self._sizes, self._rows, self._clicks, strict=True)


class _EncodedRows(lightgbm.Sequence):
    """Rows of a split that LightGBM asks for from front to back: twice, first a sample of them."""

    batch_size = BLOCK_ROWS

    def __init__(
        self, data: Dataset, split: Split, rows: int, encoder: _Encoder, *, is_fitted_on: bool
    ) -> None:
        self._data = data
        self._split: Split = split
        self._rows = rows
        self._encoder = encoder
        self._is_fitted_on = is_fitted_on
        self._start = rows  # of the block that is held; none yet
        self._block = np.zeros((0, encoder.columns), np.float32)
        self._blocks: Iterator[Rows] = iter(())

    def __len__(self) -> int:
        return self._rows

    def __getitem__(self, index: int | slice | list[int]) -> npt.NDArray[Any]:
        assert not isinstance(index, list)  # what Dataset.subset would ask for
        if isinstance(index, slice):
            assert index.start % BLOCK_ROWS == 0
            self._hold(index.start)
            return self._block[: index.stop - index.start]
        start = int(index) // BLOCK_ROWS * BLOCK_ROWS
        self._hold(start)
        row: npt.NDArray[np.float64] = self._block[index - start].astype(np.float64)
        return row  # in the type that samples have to be of

    def _hold(self, start: int) -> None:
        if start < self._start:
            self._blocks = in_blocks(self._data.spread_rows(self._split, self._rows), BLOCK_ROWS)
            self._start = -BLOCK_ROWS
        while self._start < start:
            self._start += BLOCK_ROWS
            rows = next(self._blocks)
            if self._start == start:
                first = start if self._is_fitted_on else None
                self._block = self._encoder.encode(rows, first)


def _all_rows(data: Dataset, split: Split) -> Iterator[Rows]:
    return data.stored_rows(split, 0, data.rows(split))
