from __future__ import annotations

import errno
import io
import math
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from dlrm.checkpoint import Position
from dlrm.config import ModelConfig, OptimizerConfig, TableConfig
from dlrm.errors import EnvironmentFaultError, UserError
from dlrm.evaluation import evaluate
from dlrm.model.dlrm import DLRM, initialize
from dlrm.reference.checkpoint import read_checkpoint, reference_names, write_checkpoint
from dlrm.schema import DenseFeature, FeatureSchema, SparseFeature
from dlrm.training.optimizer import Optimizer

OPTIMIZERS = ["sgd", "adagrad", "rwsadagrad"]
TESTED = ["--test-freq=100", "--mlperf-logging"]


def finished(lines: list[str]) -> list[str]:
    return [line for line in lines if line.startswith("Finished")]


def newest(run: Any) -> dict[str, torch.Tensor]:
    return load_file(run.run_path / "checkpoints" / "newest.safetensors")


def edited(path: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """A copy of a .pt with other content."""
    content = torch.load(path, weights_only=False)
    change(content)
    target = path.with_name("edited.pt")
    torch.save(content, target)
    return target


@pytest.fixture
def saved(run: Any) -> Path:
    """A .pt after 3 steps."""
    path = run.folder / "saved.pt"
    run("--step=3", f"--save-model={path}", *TESTED)
    return path


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("steps", [7, 18], ids=["within an epoch", "at its end"])
def test_saved_and_loaded_training_continues_identically(
    run: Any, optimizer: str, steps: int
) -> None:
    schedule = "--lr-num-warmup-steps=9 --lr-decay-start-step=12 --lr-num-decay-steps=15".split()
    flags = [f"--optimizer={optimizer}", *schedule, "--nepochs=2", *TESTED]
    whole = finished(run(*flags))
    expected = newest(run)
    assert len(whole) == 36

    path = run.folder / "saved.pt"
    first = finished(run(*flags, f"--step={steps}", f"--save-model={path}"))
    second = finished(run(*flags, f"--load-model={path}"))
    assert first + second == whole
    found = newest(run)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


VARIANTS = {
    "md": "--md-flag --md-threshold=5 --md-temperature=0.5 --weighted-pooling=learned",
    "concat": "--qr-flag --qr-operation=concat --qr-threshold=9 --arch-sparse-feature-size=2",
    "mult": "--qr-flag --qr-threshold=9 --qr-collisions=3",
    "fixed": "--weighted-pooling=fixed",
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_saved_and_loaded_continue_identically(
    run: Any, optimizer: str, variant: str
) -> None:
    flags = [f"--optimizer={optimizer}", *VARIANTS[variant].split(), *TESTED]
    whole = finished(run(*flags))
    expected = newest(run)
    path = run.folder / "saved.pt"
    first = finished(run(*flags, "--step=7", f"--save-model={path}"))
    second = finished(run(*flags, f"--load-model={path}"))
    assert first + second == whole
    found = newest(run)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_pt_without_optimizer_state_is_loaded(run: Any, saved: Path) -> None:
    def forget(content: dict[str, Any]) -> None:
        content["opt_state_dict"] = {}
        content.update(epoch=0, iter=0, nbatches=0)

    path = edited(saved, forget)
    lines = run("--optimizer=adagrad", f"--load-model={path}")
    assert f"Loading saved model {path}" in lines
    assert len(finished(lines)) == 18


def test_numpy_scalars_are_loaded(saved: Path) -> None:
    def as_the_reference(content: dict[str, Any]) -> None:
        content.update(train_loss=np.float32(0.5), test_acc=np.float64(0.75), iter=np.int64(3))

    checkpoint = read_checkpoint(edited(saved, as_the_reference))
    assert (checkpoint.train_loss, checkpoint.test_accuracy) == (0.5, 0.75)
    assert checkpoint.iteration == 3


def test_a_saved_file_holds_what_the_reference_writes(run: Any, saved: Path) -> None:
    content = torch.load(saved, weights_only=True)
    kinds = {name: type(value) for name, value in content.items()}
    assert {name for name, kind in kinds.items() if kind is int} == {
        "nepochs",
        "nbatches",
        "nbatches_test",
        "epoch",
        "iter",
        "total_loss",
    }
    assert {name for name, kind in kinds.items() if kind is float} == {
        "test_acc",
        "test_auc",
        "train_loss",
    }
    assert (content["nepochs"], content["nbatches"], content["nbatches_test"]) == (1, 18, 3)
    assert (content["epoch"], content["iter"]) == (0, 3)
    names = list(content["state_dict"])
    assert names[:2] == ["emb_l.0.weight", "emb_l.1.weight"]
    assert names[26:] == [
        f"{mlp}.{layer}.{kind}"
        for mlp in ("bot_l", "top_l")
        for layer in (0, 2)
        for kind in ("weight", "bias")
    ]
    # Each tensor is stored alone, not with the arena that tables are views of.
    assert all(
        weight.untyped_storage().nbytes() == 4 * weight.numel()
        for weight in content["state_dict"].values()
    )


def test_without_mlperf_logging_there_is_no_auc(run: Any) -> None:
    path = run.folder / "saved.pt"
    run("--step=3", f"--save-model={path}", "--test-freq=100")
    assert "test_auc" not in torch.load(path, weights_only=True)
    lines = run(f"--load-model={path}", "--mlperf-logging")
    assert any(line.endswith("auc = nan") for line in lines)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_references_modules_and_optimizers_load_it(run: Any, optimizer: str) -> None:
    path = run.folder / "saved.pt"
    run("--step=3", f"--optimizer={optimizer}", f"--save-model={path}", *TESTED)
    content = torch.load(path, weights_only=True)
    model = nn.Module()
    model.emb_l = nn.ModuleList(
        nn.EmbeddingBag(*content["state_dict"][f"emb_l.{number}.weight"].shape, mode="sum")
        for number in range(26)
    )
    model.bot_l = nn.Sequential(nn.Linear(13, 8), nn.ReLU(), nn.Linear(8, 4), nn.ReLU())
    model.top_l = nn.Sequential(nn.Linear(355, 8), nn.ReLU(), nn.Linear(8, 1), nn.Sigmoid())
    model.load_state_dict(content["state_dict"])
    kinds: dict[str, Callable[..., torch.optim.Optimizer]] = {
        "sgd": torch.optim.SGD,
        "adagrad": torch.optim.Adagrad,
        "rwsadagrad": RowWiseAdagrad,
    }
    loaded = kinds[optimizer](model.parameters(), lr=1.0)
    loaded.load_state_dict(content["opt_state_dict"])
    assert loaded.param_groups[0]["lr"] == 0.05
    for number, parameter in enumerate(model.parameters()):
        for kind, value in loaded.state[parameter].items():
            if kind == "step":
                assert int(value) == 3
            else:
                rowwise = kind == "momentum"
                assert rowwise == (optimizer == "rwsadagrad" and number < 26)
                assert value.shape == (parameter.shape[:1] if rowwise else parameter.shape)
                assert value.max() > 0


class Table(nn.Module):
    """A module with the parameters of one of the reference's."""

    def __init__(self, weights: dict[str, torch.Tensor]) -> None:
        super().__init__()
        for name, weight in weights.items():
            owner: nn.Module = self
            *modules, last = name.split(".")
            for module in modules:
                if not hasattr(owner, module):
                    owner.add_module(module, nn.Module())
                owner = getattr(owner, module)
            owner.register_parameter(last, nn.Parameter(torch.empty_like(weight)))


@pytest.mark.parametrize("variant", VARIANTS)
def test_modules_like_the_references_load_variants(run: Any, variant: str) -> None:
    path = run.folder / "saved.pt"
    flags = ["--step=3", "--optimizer=rwsadagrad", f"--save-model={path}", *TESTED]
    run(*flags, *VARIANTS[variant].split())
    content = torch.load(path, weights_only=True)
    state = content["state_dict"]
    # In the order of the reference's constructor: tables, pooling weights, bottom and top MLP.
    model = nn.Module()
    model.emb_l = nn.ModuleList()
    kinds = set()
    for number in range(26):
        prefix = f"emb_l.{number}."
        weights = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
        kinds.add(tuple(weights))
        model.emb_l.append(Table(weights))
    learned = [weight for name, weight in state.items() if name.startswith("v_W_l.")]
    if learned:
        model.v_W_l = nn.ParameterList([torch.empty_like(weight) for weight in learned])
    model.bot_l = nn.Sequential(nn.Linear(13, 8), nn.ReLU(), nn.Linear(8, 4), nn.ReLU())
    model.top_l = nn.Sequential(nn.Linear(355, 8), nn.ReLU(), nn.Linear(8, 1), nn.Sigmoid())
    model.load_state_dict(state)
    assert list(state) == list(model.state_dict())
    assert (
        kinds
        == {
            "md": {("weight",), ("embs.weight", "proj.weight")},
            "concat": {("weight",), ("weight_q", "weight_r")},
            "mult": {("weight",), ("weight_q", "weight_r")},
            "fixed": {("weight",)},
        }[variant]
    )
    assert len(learned) == (26 if variant == "md" else 0)
    for number, (name, parameter) in enumerate(model.named_parameters()):
        (kind, total), *_ = [
            (kind, value)
            for kind, value in content["opt_state_dict"]["state"][number].items()
            if kind != "step"
        ]
        is_table = name.startswith("emb_l.") and "proj" not in name
        assert kind == ("momentum" if is_table else "sum"), name
        assert total.shape == (parameter.shape[:1] if is_table else parameter.shape)


def test_fixed_weights_that_are_not_1_are_refused(tmp_path: Path) -> None:
    schema = FeatureSchema(
        label="label",
        dense=(DenseFeature("int_0"),),
        sparse=(SparseFeature("cat_0", 3),),
        source_format="test",
        split_rule="none",
    )
    model = DLRM(schema, ModelConfig(weighted_pooling="fixed"))
    initialize(model, np.random.RandomState(1))
    optimizer = Optimizer(model, OptimizerConfig())
    write_checkpoint(tmp_path / "a.pt", model, optimizer, Position(), {})
    model.sparse_arch.tables()["pooling_weights.t_cat_0"][1] = 2
    with pytest.raises(UserError, match="the fixed pooling weights of the reference are all 1"):
        write_checkpoint(tmp_path / "b.pt", model, optimizer, Position(), {})
    assert [path.name for path in tmp_path.iterdir()] == ["a.pt"]


class RowWiseAdagrad(torch.optim.Optimizer):
    """Only what loading a state takes."""

    def __init__(self, parameters: Any, lr: float) -> None:
        super().__init__(parameters, {"lr": lr, "eps": 1e-10})


def test_names_come_in_the_references_order() -> None:
    ours = [
        "dense_arch.layers.0.weight",
        "sparse_arch.embedding_bags.t_b.weight",
        "sparse_arch.embedding_bags.t_a.weight",
        "over_arch.layers.2.bias",
    ]
    tables = [TableConfig("a"), TableConfig("b")]
    assert list(reference_names(ours, tables).items()) == [
        ("sparse_arch.embedding_bags.t_a.weight", "emb_l.0.weight"),
        ("sparse_arch.embedding_bags.t_b.weight", "emb_l.1.weight"),
        ("dense_arch.layers.0.weight", "bot_l.0.weight"),
        ("over_arch.layers.2.bias", "top_l.2.bias"),
    ]
    ours = [f"sparse_arch.{name}" for name in (
        "pooling_weights.t_c", "pooling_weights.t_b", "projections.t_a.weight",
        "embedding_bags.t_c.weight", "embedding_bags.t_b.weight", "embedding_bags.t_a.weight",
        "embedding_bags.t_d_remainder.weight", "embedding_bags.t_d_quotient.weight",
    )]  # fmt: skip
    tables = [
        TableConfig("a", "md", md_dim=2),
        TableConfig("b", "md", md_dim=2, weighted_pooling="learned"),  # as long as all
        TableConfig("c", weighted_pooling="fixed"),
        TableConfig("d", "qr"),
    ]
    assert [*reference_names(ours, tables).values()] == [
        *("emb_l.0.embs.weight", "emb_l.0.proj.weight", "emb_l.1.embs.weight", "emb_l.2.weight"),
        *("emb_l.3.weight_q", "emb_l.3.weight_r", "v_W_l.1"),
    ]


def test_inference_only(run: Any, saved: Path) -> None:
    (expected,) = [line for line in run("--step=3", *TESTED) if line.startswith("recall")]
    lines = run("--inference-only", "--mlperf-logging", f"--load-model={saved}")
    assert lines[-3:] == [
        "time/loss/accuracy (if enabled):",
        "Testing for inference only",
        expected,
    ]
    assert not finished(lines)
    # The RUN it makes is one like any other.
    assert evaluate(run.run_path).metrics.auc == torch.load(saved, weights_only=True)["test_auc"]


def rename(content: dict[str, Any]) -> None:
    content["state_dict"]["emb_l.0.weight_q"] = content["state_dict"].pop("emb_l.0.weight")


def test_other_tensors_are_refused(run: Any, saved: Path) -> None:
    with pytest.raises(UserError, match=r"emb_l.0.weight is expected to have shape .*no such"):
        run(f"--load-model={edited(saved, rename)}")
    assert not run.run_path.exists()


def test_surplus_tensors_are_refused(run: Any, saved: Path) -> None:
    path = edited(saved, lambda content: content["state_dict"].update(v_W_l=torch.ones(2)))
    with pytest.raises(UserError, match=r"v_W_l is expected to have shape no such tensor, got \(2"):
        run(f"--load-model={path}")


@pytest.mark.parametrize("mode", [[], ["--inference-only"]])
def test_another_architecture_is_refused(run: Any, saved: Path, mode: list[str]) -> None:
    with pytest.raises(UserError) as error:
        run("--arch-mlp-top=9-1", f"--load-model={saved}", *mode)
    assert "top_l.0.weight is expected to have shape (9, 355), got (8, 355)" in str(error.value)
    assert not run.run_path.exists()


def test_another_optimizer_is_refused_and_leaves_no_run(run: Any, saved: Path) -> None:
    with pytest.raises(UserError, match="holds the state of sgd, and --optimizer adagrad"):
        run("--optimizer=adagrad", f"--load-model={saved}")
    assert not run.run_path.exists()


def test_a_finished_training_is_not_continued(run: Any) -> None:
    path = run.folder / "saved.pt"
    run(f"--save-model={path}", *TESTED)
    with pytest.raises(UserError, match=r"(?s)nothing is left to train.*--epochs is set by --nep"):
        run(f"--load-model={path}")
    assert not run.run_path.exists()


class Malicious:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("hacked",)


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda path: None, "does not exist. Check the path"),
        (lambda path: path.mkdir(), "is not a file"),
        (lambda path: os.mkfifo(path), "is not a file"),
        (lambda path: path.touch(), "cannot be read as a checkpoint of the reference"),
        (lambda path: path.write_text("no zip"), "cannot be read as a checkpoint of the reference"),
        (lambda path: torch.save(Malicious(), path), "which is never loaded"),
        (lambda path: torch.save([1, 2], path), "it holds list, not a dictionary"),
        (lambda path: torch.save(torch.ones(2), path), "it holds Tensor, not a dictionary"),
        (lambda path: torch.save({"state_dict": {}}, path), "KeyError: 'opt_state_dict'"),
    ],
)
def test_a_foreign_file_is_refused(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    write: Callable[[Path], object],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "model.pt"
    write(path)
    with pytest.raises(UserError, match=re.escape(message)) as error:
        read_checkpoint(path)
    assert str(path) in str(error.value)
    assert not (tmp_path / "hacked").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content.pop("iter"), "KeyError: 'iter'"),
        (lambda content: content.update(epoch="two"), "ValueError: invalid literal for int"),
        (lambda content: content.update(iter=math.inf), "OverflowError: cannot convert float infi"),
        (lambda content: content.update(epoch=-1), "is damaged: epoch is -1, expected a count"),
        (lambda content: content.update(nbatches=10**30), "is damaged: nbatches is 1000"),
        (
            lambda content: content["opt_state_dict"]["param_groups"][0].update(initial_lr=-1.0),
            "is damaged: its learning rate is -1.0",
        ),
        (lambda content: content["state_dict"].update(x=1), "holds something else than tensors"),
        *(
            (
                lambda content, name=name, change=change: content["state_dict"].update(
                    {name: change(content["state_dict"][name])}
                ),
                f"{name} is expected to have {2 if 'weight' in name else 1} dimensions of float32, "
                f"as the reference writes it, got {found}",
            )
            for name, change, found in (
                ("emb_l.0.weight", torch.Tensor.double, "2 dimensions of float64"),
                ("emb_l.0.weight", torch.Tensor.half, "2 dimensions of float16"),
                ("emb_l.0.weight", torch.Tensor.to_sparse, "2 dimensions of float32, sparse"),
                ("top_l.0.weight", torch.Tensor.ravel, "1 dimensions of float32"),
                ("bot_l.0.weight", torch.Tensor.sum, "0 dimensions of float32"),
                ("bot_l.0.bias", torch.Tensor.long, "1 dimensions of int64"),
                (
                    "bot_l.0.weight",
                    lambda tensor: tensor.to("meta"),
                    "2 dimensions of float32 without values",
                ),
            )
        ),
        (
            lambda content: content["opt_state_dict"]["state"].update({0: {"exp_avg": 1}}),
            "edited.pt holds optimizer state of an unknown kind: exp_avg",
        ),
    ],
)
def test_a_damaged_file_is_refused(
    saved: Path, change: Callable[[dict[str, Any]], None], message: str
) -> None:
    with pytest.raises(UserError, match=re.escape(message)) as refusal:
        read_checkpoint(edited(saved, change))
    assert str(refusal.value).count("edited.pt") == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop(3), "the sum of emb_l.3.weight is expected to have shape"),
        (
            lambda state: state.update({99: state[0]}),
            "optimizer state of parameter 99, and there a",
        ),
        (
            lambda state: state[1].update(sum=state[1]["sum"].double()),
            "the sum of emb_l.1.weight is expected to have 2 dimensions of float32",
        ),
        (
            lambda state: state[1].update(sum=torch.ones(3)),
            "the sum of emb_l.1.weight is expected to have shape",
        ),
    ],
)
def test_damaged_optimizer_state_is_refused(
    run: Any, change: Callable[[dict[int, Any]], object], message: str
) -> None:
    path = run.folder / "adagrad.pt"
    run("--step=3", "--optimizer=adagrad", f"--save-model={path}", *TESTED)
    damaged = edited(path, lambda content: change(content["opt_state_dict"]["state"]))
    with pytest.raises(UserError, match=re.escape(message)):
        run("--optimizer=adagrad", f"--load-model={damaged}")
    assert not run.run_path.exists()


def test_a_folder_to_save_to_must_exist(run: Any) -> None:
    with pytest.raises(UserError, match=r"--save-model: .*absent is not a folder"):
        run("--test-freq=5", f"--save-model={run.folder / 'absent' / 'model.pt'}")
    assert not run.run_path.exists()


class FullDisk(io.RawIOBase):
    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_is_a_fault_of_the_environment(
    run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = torch.save
    monkeypatch.setattr(torch, "save", lambda content, file: save(content, FullDisk()))
    path = run.folder / "model.pt"
    with pytest.raises(EnvironmentFaultError, match="No space left on device"):
        run("--step=1", f"--save-model={path}", *TESTED)
    assert not list(run.folder.glob("*model.pt*"))
