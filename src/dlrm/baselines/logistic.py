"""Logistic regression: a coefficient for every id, and one for every bucket of a dense value.

Trained by scikit-learn's SGD, a block of rows at a time, so that memory does not depend on their
number.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
from scipy.sparse import csr_array
from sklearn.linear_model import SGDClassifier
from sklearn.metrics import log_loss

from dlrm.baselines.model import BaselineModel, Fit, OnRound
from dlrm.config import BaselineConfig
from dlrm.data.batch import transform_dense
from dlrm.data.dataset import Dataset, Rows, in_blocks
from dlrm.errors import UserError
from dlrm.schema import FeatureSchema

BLOCK_ROWS = 1 << 18
"""Rows that are given to scikit-learn at a time; each time it looks at every coefficient."""
_LEARNING_RATE = 0.002
"""A row moves the coefficients of all its features (39 of Criteo's) by so much each."""
_BUCKETS_A_UNIT = 2
_BUCKETS = math.ceil(_BUCKETS_A_UNIT * math.log(2**31)) + 1
"""Buckets of a dense feature: half a unit of log(x + 1) each, up to the largest int32."""


class Logistic(BaselineModel):
    """A logistic regression on one-hot features.

    Of each feature exactly one column of a row is 1. The last column of a sparse feature is that of
    unknown ids; no training row has one where vocabularies are fitted on all, and its coefficient
    then stays 0.
    """

    library = "scikit-learn"
    round_name = "pass"

    def __init__(self, schema: FeatureSchema, config: BaselineConfig) -> None:
        super().__init__(schema, config)
        widths = [_BUCKETS] * len(schema.dense) + [n + 1 for n in schema.num_embeddings]
        self._starts = np.concatenate([[0], np.cumsum(widths)])
        if self.columns >= 2**31:  # scikit-learn's indices are 32-bit integers
            raise UserError(
                f"--model logistic has a column for each of {self.columns} ids and buckets, and "
                f"can have {2**31 - 1}. Prepare the DATASET with --max-ind-range or "
                "--hash-buckets."
            )
        self._model = SGDClassifier(
            loss="log_loss",
            alpha=config.l2,
            # Each row has one column of every feature, so their coefficients are intercept enough.
            fit_intercept=False,
            learning_rate="constant",
            eta0=config.learning_rate or _LEARNING_RATE,
            random_state=np.random.RandomState(config.seed),
        )

    @property
    def columns(self) -> int:
        """Number of columns, each of which has a coefficient."""
        return int(self._starts[-1])

    def memory_bytes(self, rows: int, validation_rows: int) -> int:
        """Return about the memory: coefficients, the best ones, a copy; a block; predictions."""
        features = len(self._starts) - 1
        block = min(BLOCK_ROWS, max(rows, validation_rows)) * features * 24
        return 3 * 4 * self.columns + block + 16 * validation_rows

    def memory_bytes_a_row(self) -> int:
        """Return 0: a block at a time is in memory."""
        return 0

    def fit(self, data: Dataset, rows: int, on_round: OnRound) -> Fit:
        """Pass over the rows until the log loss of validation rises."""
        best, best_round, number = math.inf, 0, 0
        coefficients = None
        while number < self.config.passes:
            number += 1
            for block in in_blocks(data.spread_rows("train", rows), BLOCK_ROWS):
                self._model.partial_fit(self._encode(block), block.labels, classes=[0, 1])
            loss = self._validation_loss(data)
            on_round(number, loss)
            if not loss < best:
                break
            best, best_round = loss, number
            coefficients = self._model.coef_.copy()
        self._model.coef_ = coefficients
        return Fit(number, best_round)

    def probabilities(self, rows: Rows) -> npt.NDArray[np.float32]:
        """Return the click probabilities, (n,)."""
        scored: npt.NDArray[np.float32] = self._model.predict_proba(self._encode(rows))[:, 1]
        return scored.astype(np.float32)

    def _validation_loss(self, data: Dataset) -> float:
        labels, scores = [], []
        for block in in_blocks(_all_rows(data), BLOCK_ROWS):
            labels.append(block.labels)
            scores.append(self.probabilities(block))
        return float(log_loss(np.concatenate(labels), np.concatenate(scores), labels=[0, 1]))

    def _encode(self, rows: Rows) -> csr_array:
        """Return one-hot rows, (n, columns)."""
        features = len(self._starts) - 1
        dense = rows.dense.shape[1]
        indices = np.empty((len(rows), features), np.int32)
        np.multiply(
            transform_dense(rows.dense), _BUCKETS_A_UNIT, out=indices[:, :dense], casting="unsafe"
        )
        indices[:, dense:] = rows.sparse
        unknown = np.array(self.schema.num_embeddings, np.int32)
        np.copyto(indices[:, dense:], unknown, where=rows.sparse < 0)
        indices += self._starts[:-1].astype(np.int32)
        starts = np.arange(len(rows) + 1, dtype=np.int32) * np.int32(features)
        ones = np.ones(indices.size, np.float32)
        return csr_array(
            (ones, indices.reshape(-1), starts), shape=(len(rows), self.columns), copy=False
        )


def _all_rows(data: Dataset) -> Iterator[Rows]:
    return data.stored_rows("validation", 0, data.rows("validation"))
