import gc
import weakref
from pathlib import Path

import numpy as np
import torch

from dlrm.data.batch import Batch
from dlrm.prediction import Predictor
from dlrm.serve.model import ServedModel, concatenate
from dlrm.serve.rows import SentRows


def sent(count: int, features: int, wide: int, common: int, seed: int) -> SentRows:
    """Rows whose last ``common`` features are the same in all, and are told once."""
    random = np.random.default_rng(seed)
    sizes = np.array([count] * (features - common) + [1] * common, np.int64)
    return SentRows(
        random.integers(0, 50, (count, wide), np.int32),
        random.integers(0, 2**32, sizes.sum(), np.uint32),
        np.stack([np.cumsum(sizes) - sizes, sizes > 1], axis=1),
    )


def test_requests_scored_together_are_scored_as_alone(run: Path, predictor: Predictor) -> None:
    model = ServedModel.load(run, "dlrm", 100)
    features, wide = len(model.schema.sparse), len(model.schema.dense)
    whole, common, single = (sent(*shape) for shape in (
        (5, features, wide, 0, 1), (7, features, wide, 9, 2), (1, features, wide, 0, 3)
    ))  # fmt: skip
    prepared = Batch(torch.ones(3, wide), torch.zeros(3, features, dtype=torch.int64), None)
    requests = [whole, prepared, common, single]
    together = model.score(requests)
    for rows, scores in zip(requests, together, strict=True):
        (alone,) = model.score([rows])
        np.testing.assert_array_equal(alone.probabilities, scores.probabilities)
        np.testing.assert_array_equal(alone.unknown_ids, scores.unknown_ids)
    places = common.columns[:, 0] + np.arange(7)[:, None] * common.columns[:, 1]
    values = common.values[places]
    expected = predictor.predict_rows(common.dense, values)[0]
    np.testing.assert_allclose(together[2].probabilities, expected, atol=1e-6)
    assert (together[0].unknown_ids > features - 3).all()  # random values
    assert together[1].unknown_ids.tolist() == [0, 0, 0]


def test_batches_become_one() -> None:
    ids = torch.tensor([[1, 2], [3, 4]])
    one_id = Batch(torch.zeros(2, 1), ids, None)
    bags = Batch(torch.ones(1, 1), torch.tensor([5]), None, torch.tensor([0, 0, 1]))
    joined = concatenate([one_id, bags, one_id])
    assert joined.dense_features.tolist() == [[0], [0], [1], [0], [0]]
    assert joined.sparse_features.tolist() == [1, 2, 3, 4, 5, 1, 2, 3, 4]
    assert joined.offsets is not None
    assert joined.offsets.tolist() == [0, 1, 2, 3, 4, 4, 5, 6, 7, 8, 9]
    plain = concatenate([one_id, one_id])
    assert (plain.offsets, plain.sparse_features.tolist()) == (None, ids.tolist() * 2)


def test_a_model_that_is_replaced_is_freed_at_once(run: Path) -> None:
    """Without the garbage collector, which leaves out what was there when a model was loaded."""
    model = ServedModel.load(run, "dlrm", 100)
    model.warm_up(4)
    weights = weakref.ref(next(model._scorer._model.parameters()))
    gc.collect()
    gc.disable()
    try:
        del model
        assert weights() is None
    finally:
        gc.enable()
