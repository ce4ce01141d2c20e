"""``dlrm convert``: the reference's .pt to a RUN and back."""

from __future__ import annotations

import json
import math
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch

from dlrm import cli, train
from dlrm.config import (
    ConvertConfig,
    LossConfig,
    ModelConfig,
    OptimizerConfig,
    PrepareConfig,
    TrainConfig,
)
from dlrm.data.prepare import prepare
from dlrm.errors import UserError
from dlrm.evaluation import evaluate
from dlrm.predicting.files import predict_file
from dlrm.prediction import load
from dlrm.reference.conversion import export_checkpoint, import_checkpoint
from dlrm.runs import Run

VARIANTS = {
    "whole": "",
    "itself": "--arch-interaction-itself",
    "cat": "--arch-interaction-op=cat",
    "md": "--md-flag --md-threshold=5 --md-temperature=0.5 --weighted-pooling=learned",
    "concat": "--qr-flag --qr-operation=concat --qr-threshold=9 --arch-sparse-feature-size=2",
    "mult": "--qr-flag --qr-threshold=9 --qr-collisions=3",
    "add": "--qr-flag --qr-operation=add --qr-threshold=9",
    "maximum": "--max-ind-range=7",
}
OPTIMIZERS = {
    "whole": "rwsadagrad",
    "itself": "adagrad",
    "cat": "sgd",
    "md": "rwsadagrad",
    "concat": "adagrad",
    "mult": "sgd",
    "add": "rwsadagrad",
    "maximum": "adagrad",
}
NEEDED = {
    "mult": ConvertConfig(qr_operation="mult"),
    "add": ConvertConfig(qr_operation="add"),
    "maximum": ConvertConfig(max_ind_range=7),
}


def same(one: Any, other: Any) -> bool:
    """Whether two contents of a .pt are equal: keys, numbers, types and tensors."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    # The reference writes NumPy's numbers, and we Python's.
    return bool(one == other)


def content(path: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = torch.load(path, weights_only=False)
    return loaded


@pytest.fixture(scope="module")
def prepared(clicks: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prepared") / "dataset"
    prepare(clicks, folder, PrepareConfig(shuffle="none"))
    return folder


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_pt_survives_the_way_to_a_run_and_back(run: Any, tmp_path: Path, variant: str) -> None:
    saved, back = tmp_path / "saved.pt", tmp_path / "back.pt"
    flags = [*VARIANTS[variant].split(), f"--optimizer={OPTIMIZERS[variant]}"]
    (expected,) = [
        line
        for line in run(*flags, "--step=7", "--test-freq=7", f"--save-model={saved}")
        if line.startswith(" accuracy")
    ]
    data = Path(Run.open(run.run_path).dataset)
    made = import_checkpoint(saved, tmp_path / "made", data, NEEDED.get(variant))
    assert (made.epoch, made.step) == (0, 7)
    accuracy = evaluate(tmp_path / "made", "test").metrics.accuracy
    assert f" accuracy {accuracy * 100:3.3f} %," in expected
    export_checkpoint(tmp_path / "made", back)
    assert same(content(saved), content(back))
    assert list(content(saved)["state_dict"]) == list(content(back)["state_dict"])


def test_a_run_of_ours_becomes_what_the_reference_would_have_written(
    run: Any, prepared: Path, tmp_path: Path
) -> None:
    saved, written = tmp_path / "saved.pt", tmp_path / "written.pt"
    flags = ["--optimizer=adagrad", "--lr-num-warmup-steps=9", "--mlperf-logging"]
    run(*flags, "--test-freq=100", f"--save-model={saved}")
    export_checkpoint(run.run_path, written, "newest")
    assert same(content(saved), content(written))

    # Without its DATASET and with no evaluation at that step, what is not known is 0.
    config = TrainConfig(
        model=ModelConfig(4, (8, 4), (8, 1)), mini_batch_size=100, test_freq=-1, max_steps=5
    )
    train(prepared, tmp_path / "ours", config)
    text = (tmp_path / "ours" / "config.toml").read_text()
    (tmp_path / "ours" / "config.toml").write_text(text.replace(str(prepared), "absent"))
    export_checkpoint(tmp_path / "ours", written, overwrite=True)
    found = content(written)
    assert (found["iter"], found["nbatches"], found["nbatches_test"]) == (5, 18, 0)
    assert (found["test_acc"], found["test_auc"]) == (0, 0)
    assert found["train_loss"] > 0
    assert found["opt_state_dict"]["param_groups"][0]["lr"] == 0.1


def test_a_loss_that_is_no_number_survives_too(run: Any, tmp_path: Path) -> None:
    saved, back = tmp_path / "saved.pt", tmp_path / "back.pt"
    run("--step=3", "--test-freq=100", f"--save-model={saved}")
    diverged = content(saved) | {"train_loss": math.nan}
    torch.save(diverged, saved)
    import_checkpoint(saved, tmp_path / "made", Run.open(run.run_path).dataset)
    export_checkpoint(tmp_path / "made", back)
    assert math.isnan(content(back)["train_loss"])
    assert same(content(back) | {"train_loss": 0}, diverged | {"train_loss": 0})


def test_narrow_tables_are_written_as_float32(prepared: Path, tmp_path: Path) -> None:
    model = ModelConfig(4, (8, 4), (8, 1), embedding_dtype="bfloat16")
    train(prepared, tmp_path / "run", TrainConfig(model=model, max_steps=3, test_freq=-1))
    export_checkpoint(tmp_path / "run", tmp_path / "model.pt")
    ours = Run.open(tmp_path / "run").load_model("best", torch.device("cpu"))
    written = content(tmp_path / "model.pt")["state_dict"]["emb_l.2.weight"]
    table = ours.state_dict()["sparse_arch.embedding_bags.t_cat_2.weight"]
    assert (written.dtype, table.dtype) == (torch.float32, torch.bfloat16)
    assert torch.equal(written, table.float())


def test_training_goes_on_from_an_imported_run(run: Any, tmp_path: Path) -> None:
    whole_lines = run("--optimizer=rwsadagrad", "--learning-rate=0.3")
    whole = Run.open(run.run_path)
    saved = tmp_path / "saved.pt"
    run("--optimizer=rwsadagrad", "--learning-rate=0.3", "--step=7", "--test-freq=7",
        f"--save-model={saved}")  # fmt: skip
    import_checkpoint(saved, tmp_path / "made", whole.dataset)
    made = Run.open(tmp_path / "made")
    assert made.config.optimizer == OptimizerConfig("rowwise_adagrad", 0.3)
    train(
        whole.dataset,
        tmp_path / "on",
        TrainConfig(
            model=made.config.model,
            optimizer=made.config.optimizer,
            mini_batch_size=100,
            continue_from=str(made.checkpoint("newest")),
            test_freq=-1,
        ),
    )
    (report,) = [event for event in Run.open(tmp_path / "on").log() if event["event"] == "report"]
    losses = [float(line.split()[-1]) for line in whole_lines if line.startswith("Finished")]
    assert report["loss"] == pytest.approx(sum(losses[7:]) / 11, abs=1e-6)


def test_quotient_remainder_tables_need_their_operation(run: Any, tmp_path: Path) -> None:
    saved = tmp_path / "saved.pt"
    run("--qr-flag", "--qr-threshold=9", "--step=3", "--test-freq=3", f"--save-model={saved}")
    data = Run.open(run.run_path).dataset
    with pytest.raises(UserError, match="Say --qr-operation mult or --qr-operation add, as in"):
        import_checkpoint(saved, tmp_path / "made", data)
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("emb_l.25.weight"), "has 25 embedding tables, and the data have"),
        (lambda state: state.pop("bot_l.0.weight"), "it has no tensor bot_l.0.weight"),
        (
            lambda state: state.update({"top_l.0.weight": torch.zeros(8, 9)}),
            "top_l.0.weight is expected to have 355 or 382 or 108 columns, for 26 tables of",
        ),
        (
            lambda state: state.update({"emb_l.3.weight": torch.zeros(2, 4)}),
            "emb_l.3.weight is expected to have shape",
        ),
    ],
)
def test_another_model_is_refused_and_leaves_no_run(
    run: Any, prepared: Path, tmp_path: Path, change: Any, message: str
) -> None:
    saved = tmp_path / "saved.pt"
    run("--step=1", "--test-freq=1", f"--save-model={saved}")
    other = content(saved)
    change(other["state_dict"])
    torch.save(other, saved)
    with pytest.raises(UserError, match=message):
        import_checkpoint(saved, tmp_path / "made", prepared)
    assert not (tmp_path / "made").exists()


def test_the_printed_commands_do_the_same(
    run: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved = tmp_path / "saved.pt"
    flags = ["--qr-flag", "--qr-threshold=9", "--max-ind-range=50", "--loss-threshold=0.4"]
    run(*flags, "--step=3", "--test-freq=3", f"--save-model={saved}")
    lines = run(*flags, "--inference-only", f"--load-model={saved}", "--mlperf-logging")
    (tested,) = [line for line in lines if line.startswith("recall")]
    made = tmp_path / "by-hand"
    convert, evaluation = [
        shlex.split(line.replace(str(run.run_path), str(made)))[1:]
        for line in lines
        if line.startswith(("dlrm convert", "dlrm evaluate"))
    ]
    cli.parse(convert).execute()
    capsys.readouterr()
    cli.parse(evaluation).execute()
    metrics = json.loads(capsys.readouterr().out)
    assert f" ap {metrics['average_precision']:.4f}, auc {metrics['auc']:.4f}," in tested
    # The threshold clamps every probability; with another the metrics would differ.
    assert f"accuracy {metrics['accuracy'] * 100:3.3f} %" in tested
    assert Run.open(made).config.loss == LossConfig(loss_threshold=0.4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["RUN", "x.pt", "--data", "d"], "a RUN tells of itself what --data"),
        (["RUN", "x.pt", "--qr-operation", "add"], "a RUN tells of itself what --data"),
        (["x.pt", "made"], "name the DATASET that x.pt was trained on with --data"),
        (["x.pt", "made", "--data", "d", "--checkpoint", "newest"], "are of the other way"),
        (["x.pt", "made", "--data", "d", "--overwrite"], "are of the other way"),
        (["RUN", "there.pt"], "there.pt is there already, and is not overwritten"),
    ],
)
def test_the_directions_take_different_options(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "RUN").mkdir()
    (tmp_path / "there.pt").touch()
    with pytest.raises(UserError, match=message):
        cli.parse(["convert", *arguments]).execute()


# Of each the reference's own file, and what its command line told beyond it.
GOLDEN = {
    "mse": ConvertConfig(loss=LossConfig(loss="mse")),
    "maxind": ConvertConfig(max_ind_range=1000),
    "qr_mult": ConvertConfig(qr_operation="mult"),
    "qr_add": ConvertConfig(qr_operation="add"),
}
CASES = [
    *("adagrad", "cat", "itself", "lrpolicy", "maxind", "mse", "qr_add", "qr_mult", "rwsadagrad"),
    *("sgd_bce", "total", "wbce", "wpfixed", "wplearned"),
]
FILES = [
    *(f"{case}.init" for case in CASES),
    *(f"{case}.final" for case in ("adagrad", "rwsadagrad", "sgd_bce", "wplearned")),
]


@pytest.mark.parametrize("name", FILES)
def test_each_golden_pt_survives_the_way_to_a_run_and_back(
    shared_data: Path, tmp_path: Path, name: str
) -> None:
    folder = shared_data / "golden"
    source, back = folder / f"{name}.pt", tmp_path / "back.pt"
    data = folder / "kaggleAdDisplayChallenge_processed.npz"
    import_checkpoint(source, tmp_path / "run", data, GOLDEN.get(name.split(".")[0]))
    export_checkpoint(tmp_path / "run", back)
    expected, found = content(source), content(back)
    assert list(expected["state_dict"]) == list(found["state_dict"])
    assert same(expected["state_dict"], found["state_dict"])
    assert expected.keys() == found.keys()
    for key in expected.keys() - {"state_dict", "opt_state_dict"}:
        assert expected[key] == found[key], key
    ours, theirs = found["opt_state_dict"], expected["opt_state_dict"]
    assert ours.keys() == theirs.keys()
    if theirs:
        assert same(theirs["state"], ours["state"])
        for group, other in zip(theirs["param_groups"], ours["param_groups"], strict=True):
            assert all(group[key] == other[key] for key in group), (group, other)


def test_a_golden_model_is_evaluated_and_predicts(shared_data: Path, tmp_path: Path) -> None:
    folder = shared_data / "golden"
    prepare(folder / "train.txt", tmp_path / "data", PrepareConfig(shuffle="none"))
    import_checkpoint(folder / "sgd_bce.final.pt", tmp_path / "run", tmp_path / "data")
    expected = json.loads((folder / "golden.json").read_text())["cases"]["sgd_bce"]["test"]
    found = evaluate(tmp_path / "run", "test").metrics
    assert found.auc == pytest.approx(expected["auc"], abs=5e-5)
    assert found.accuracy * 100 == pytest.approx(expected["accuracy_percent"], abs=1e-3)
    summary = predict_file(load(tmp_path / "run"), folder / "train.txt", tmp_path / "out.csv")
    assert summary.rows == 14007
