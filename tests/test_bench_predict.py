"""`dlrm bench predict`: prediction beside its parts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dlrm import bench_predict as module
from dlrm.bench_predict import bench_predict
from dlrm.cli import main, parse
from dlrm.config import BenchPredictConfig, ModelConfig, TrainConfig
from dlrm.data import criteo
from dlrm.errors import UserError
from dlrm.training.begin import train


@pytest.fixture(scope="module")
def run(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    model = ModelConfig(embedding_dim=2, dense_arch_layer_sizes=(2,), over_arch_layer_sizes=(1,))
    train(dataset, folder, TrainConfig(model=model))
    return folder


def test_it_prints_json(run: Path, raw_rows: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["bench", "predict", str(run), str(raw_rows / "train.txt"), "--rounds", "2"]
    with pytest.raises(SystemExit) as ended:
        main([*arguments, "--json"])
    assert ended.value.code == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["rows"], result["input_format"]) == (3000, "criteo")
    for name in ("rows_per_second", "prepared_per_second", "scored_per_second"):
        assert 100 < result[name] < 1e9
    # Prediction does all that its parts do.
    assert 0 < result["share_of_parts"] < 2


def test_the_share_is_of_both_parts_one_after_the_other(
    run: Path, raw_rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds = iter([9.0, 9.0, 9.0] + [4.0, 1.0, 2.0] * 3)

    def measured(work: object) -> float:
        assert callable(work)
        work()
        return next(seconds)

    monkeypatch.setattr(module, "_seconds", measured)
    monkeypatch.setattr(
        criteo.read_blocks,
        "__kwdefaults__",
        criteo.read_blocks.__kwdefaults__ | {"block_bytes": 100_000},
    )
    config = BenchPredictConfig(rows=1000, rounds=3)
    result = bench_predict(run, raw_rows / "train.txt", config)
    assert 1000 <= result.rows < 1500
    assert result.rows_per_second == pytest.approx(result.rows / 4)
    assert result.prepared_per_second == pytest.approx(result.rows)
    assert result.scored_per_second == pytest.approx(result.rows / 2)
    assert result.share_of_parts == pytest.approx(3 / 4)
    text = result.table()
    assert f"{'scoring alone':32}{result.rows / 2:12,.0f}" in text
    assert "0.750 of the rate of both parts" in text


def test_a_pipe_and_an_empty_input_are_refused(run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is a pipe, and is read several times"):
        bench_predict(run, Path("/dev/null"), BenchPredictConfig())
    (tmp_path / "rows.txt").touch()
    with pytest.raises(UserError, match="is empty"):
        bench_predict(run, tmp_path / "rows.txt", BenchPredictConfig())
    with pytest.raises(UserError, match=r"measures one stage, .*predict.*got 'nothing'"):
        parse(["bench", "nothing"])
