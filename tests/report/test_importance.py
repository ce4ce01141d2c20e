from pathlib import Path

import pytest
import torch

from dlrm.data.dataset import Dataset
from dlrm.evaluation import evaluate
from dlrm.report.importance import permutation_importance
from dlrm.runs import Run


def test_without_permutation_the_metrics_are_those_of_evaluation(runs: Path) -> None:
    run, data = Run.open(runs / "dlrm"), Dataset.open(runs / "dataset")
    found = permutation_importance(run, data, "test", 10**6, checkpoint="best")
    assert found.rows == data.rows("test")
    assert found.before.auc == pytest.approx(evaluate(runs / "dlrm").metrics.auc, abs=1e-12)
    assert len(found.features) == 39
    drops = [each.auc_drop for each in found.features]
    assert drops == sorted(drops, reverse=True)
    assert drops[0] > 0.01
    assert all(each.lowest <= each.auc_drop <= each.highest for each in found.features)


def test_a_feature_that_the_model_ignores_has_none(
    runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, data = Run.open(runs / "dlrm"), Dataset.open(runs / "dataset")
    model = run.load_model("best", torch.device("cpu"))
    first = run.schema.dense[0].name
    with torch.no_grad():
        next(module for module in model.dense_arch.modules() if hasattr(module, "weight")).weight[
            :, 0
        ] = 0
        model.sparse_arch.arena[: run.schema.num_embeddings[0]] = 0
    monkeypatch.setattr(Run, "load_model", lambda *_: model)
    one, two = (permutation_importance(run, data, "test", 500, checkpoint="best") for _ in range(2))
    assert one == two
    assert one.rows == 500
    by_name = {each.name: each for each in one.features}
    for name in (first, run.schema.sparse[0].name):
        assert (by_name[name].auc_drop, by_name[name].log_loss_rise) == (0, 0)
    assert any(each.auc_drop for each in one.features)
