"""The reference's checkpoints: its ``.pt`` files, in and out.

Names: ``emb_l.J.weight`` is the table of sparse feature J (``weight_q`` and ``weight_r`` those of
its quotients and remainders; ``embs.weight`` and ``proj.weight`` a mixed dimension's), ``v_W_l.J``
its learned pooling weights, ``bot_l.K`` and ``top_l.K`` are layer K of the dense and the over arch.
The optimizer numbers parameters in that order.
"""

from __future__ import annotations

import math
import re
import zipfile
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from dlrm.checkpoint import CheckpointInfo, Position
from dlrm.config import ModelConfig, TableConfig
from dlrm.errors import UserError
from dlrm.files import atomic_write
from dlrm.model.dlrm import DLRM
from dlrm.model.embedding import table_name
from dlrm.model.variants import projection_name, weights_name
from dlrm.schema import FeatureSchema
from dlrm.training.optimizer import EPSILON, Optimizer, learning_rate

OptimizerName = Literal["", "sgd", "adagrad", "rowwise_adagrad"]


@dataclass(frozen=True)
class ReferenceCheckpoint:
    """The content of a ``.pt`` of the reference."""

    path: Path
    weights: Mapping[str, Tensor]
    """By the reference's names."""
    optimizer: OptimizerName
    """Which optimizer's state it holds; empty: none."""
    optimizer_state: Mapping[int, Mapping[str, Any]]
    """By parameter number; empty for SGD."""
    learning_rate: float | None
    """The base rate that the optimizer had; None: it holds no optimizer."""
    epoch: int
    """The epoch it was saved in, from 0."""
    iteration: int
    """Steps taken in that epoch."""
    epochs: int
    """Epochs that were asked for."""
    batches: int
    """Steps of an epoch; 0 where it was saved before training."""
    test_batches: int
    train_loss: float
    test_accuracy: float
    test_auc: float | None
    """Known where it was saved with --mlperf-logging."""


def read_checkpoint(path: Path) -> ReferenceCheckpoint:
    """Read a ``.pt`` file, without running any code that it may contain.

    Raises:
        UserError: It is missing, damaged, holds objects other than tensors and numbers, or lacks
            what the reference writes.
    """
    if path.exists() and not path.is_file():
        raise UserError(f"{path} is not a file. Name one that the reference's --save-model wrote.")
    content = _load(path)
    try:
        if not isinstance(content, dict):
            raise TypeError(f"it holds {type(content).__name__}, not a dictionary")
        weights = {str(name): tensor for name, tensor in content["state_dict"].items()}
        optimizer_content = content["opt_state_dict"]
        state = {int(number): entry for number, entry in optimizer_content.get("state", {}).items()}
        checkpoint = ReferenceCheckpoint(
            path=path,
            weights=weights,
            optimizer=_optimizer_name(path, state, optimizer_content.get("param_groups", [])),
            optimizer_state=state,
            learning_rate=_base_rate(optimizer_content.get("param_groups", [])),
            epoch=int(content["epoch"]),
            iteration=int(content["iter"]),
            epochs=int(content["nepochs"]),
            batches=int(content["nbatches"]),
            test_batches=int(content["nbatches_test"]),
            train_loss=float(content["train_loss"]),
            test_accuracy=float(content["test_acc"]),
            test_auc=float(content["test_auc"]) if "test_auc" in content else None,
        )
    except UserError:
        raise
    except (KeyError, TypeError, AttributeError, ValueError, OverflowError) as error:
        raise UserError(
            f"{path} is not a checkpoint of the reference ({type(error).__name__}: {error}): "
            "expected what its --save-model writes, with state_dict, opt_state_dict, epoch, iter, "
            "nepochs, nbatches, nbatches_test, train_loss and test_acc. Name such a file."
        ) from error
    for name, tensor in weights.items():
        if not isinstance(tensor, Tensor):
            raise UserError(f"{path} is damaged: its state_dict holds something else than tensors.")
        _refuse_odd(path, name, tensor, 2 if "weight" in name else 1)
    for name, number in (
        ("epoch", checkpoint.epoch),
        ("iter", checkpoint.iteration),
        ("nepochs", checkpoint.epochs),
        ("nbatches", checkpoint.batches),
        ("nbatches_test", checkpoint.test_batches),
    ):
        if not 0 <= number < 2**53:
            raise UserError(f"{path} is damaged: {name} is {number}, expected a count.")
    rate = checkpoint.learning_rate
    if rate is not None and not 0 <= rate < math.inf:
        raise UserError(f"{path} is damaged: its learning rate is {rate}, expected a number ≥ 0.")
    return checkpoint


def _refuse_odd(path: Path, name: str, tensor: Tensor, dimensions: int) -> None:
    """Refuse a tensor of a kind that the reference does not write."""
    of = str(tensor.dtype).removeprefix("torch.")
    found = f"{tensor.dim()} dimensions of {of}"
    found += "" if tensor.layout == torch.strided else ", sparse"
    found += " without values" * tensor.is_meta
    if found != f"{dimensions} dimensions of float32":
        raise UserError(
            f"{path}: {name} is expected to have {dimensions} dimensions of float32, as the "
            f"reference writes it, got {found}. Name a file that its --save-model wrote."
        )


def convert(
    checkpoint: ReferenceCheckpoint,
    schema: FeatureSchema,
    model: ModelConfig,
    accumulate_batches: int = 1,
) -> tuple[dict[str, Tensor], CheckpointInfo]:
    """Return what ``save_checkpoint`` writes, of a ``.pt``.

    Args:
        checkpoint: The ``.pt``.
        schema: Of the run that is to continue from it.
        model: The architecture it must have.
        accumulate_batches: Mini-batches, which a ``.pt`` counts, of a step, which we count.

    Returns:
        Weights and optimizer state by our names, and the position.

    Raises:
        UserError: It is of another architecture; the message names the first tensor that differs.
            Or it was saved within a step.
    """
    blank = DLRM(schema, model, device=torch.device("meta"))
    shapes = {name: tuple(tensor.shape) for name, tensor in blank.state_dict().items()}
    theirs = reference_names(shapes, blank.tables)
    _refuse_other_shapes(checkpoint, {theirs[name]: shapes[name] for name in theirs})
    tensors = {f"model.{name}": checkpoint.weights[theirs[name]] for name in theirs}
    for name in shapes.keys() - theirs.keys():  # fixed pooling weights
        tensors[f"model.{name}"] = torch.ones(shapes[name])
    if checkpoint.optimizer in ("adagrad", "rowwise_adagrad"):
        tensors |= _accumulators(checkpoint, shapes, theirs)
    if checkpoint.iteration % accumulate_batches and checkpoint.iteration != checkpoint.batches:
        raise UserError(
            f"{checkpoint.path} was saved after mini-batch {checkpoint.iteration}, within a step "
            f"of {accumulate_batches}. Use the number of mini-batches that it was trained with."
        )
    steps, step = (
        -(-batches // accumulate_batches) for batches in (checkpoint.batches, checkpoint.iteration)
    )
    position = Position(checkpoint.epoch, step, checkpoint.epoch * steps + step)
    # It says nothing of the data it was trained on, so any DATASET of these shapes will do.
    return tensors, CheckpointInfo(position, model, "", checkpoint.optimizer)


def _accumulators(
    checkpoint: ReferenceCheckpoint,
    shapes: Mapping[str, tuple[int, ...]],
    theirs: Mapping[str, str],
) -> dict[str, Tensor]:
    """Return the optimizer's state, by the names that a checkpoint of ours has."""
    found = {}
    for number, name in enumerate(theirs):
        state = checkpoint.optimizer_state.get(number, {})
        # The reference's row-wise Adagrad calls a table's accumulator its momentum.
        is_of_rows = checkpoint.optimizer == "rowwise_adagrad" and "momentum" in state
        kind, ours = ("momentum", "row_sum") if is_of_rows else ("sum", "sum")
        shape, value = shapes[name][:1] if is_of_rows else shapes[name], state.get(kind)
        if not isinstance(value, Tensor) or tuple(value.shape) != shape:
            raise UserError(
                f"{checkpoint.path} is damaged: the {kind} of {theirs[name]} is expected to have "
                f"shape {shape}, got {getattr(value, 'shape', value)!r}."
            )
        _refuse_odd(checkpoint.path, f"the {kind} of {theirs[name]}", value, len(shape))
        found[f"optimizer.{name}.{ours}"] = value
    if surplus := checkpoint.optimizer_state.keys() - set(range(len(theirs))):
        raise UserError(
            f"{checkpoint.path} is damaged: it holds the optimizer state of parameter "
            f"{min(surplus)}, and there are {len(theirs)}."
        )
    return found


def write_checkpoint(
    path: Path,
    model: DLRM,
    optimizer: Optimizer | None,
    position: Position,
    numbers: Mapping[str, int | float],
) -> None:
    """Write a ``.pt`` that the reference can load.

    Args:
        path: The file; it appears complete or not at all.
        model: Its weights, on any device.
        optimizer: Its state; None: there is none, as in a model that was never trained.
        position: How far training has come.
        numbers: What else the reference writes, by its names; "iter" where it is not the
            position's step.

    Raises:
        UserError: The reference has no such model.
        EnvironmentFaultError: The disk is full or read-only.
    """
    ours = model.state_dict()
    theirs = reference_names(ours, model.tables)
    for name in ours.keys() - theirs.keys():
        if not bool((ours[name] == 1).all()):
            raise UserError(
                f"{path} cannot hold {name}: the fixed pooling weights of the reference are all 1, "
                "and these are not. Use --weighted-pooling learned."
            )
    content = {
        "iter": position.step,
        **numbers,
        # Copies: a table is a view of all of them, and a view is saved with all that it views. The
        # reference knows float32 alone.
        "state_dict": OrderedDict(
            (theirs[name], ours[name].detach().cpu().to(torch.float32, copy=True))
            for name in theirs
        ),
        "epoch": position.epoch,
        "opt_state_dict": (
            _optimizer_content(optimizer, list(theirs), position.total_steps) if optimizer else {}
        ),
    }
    with atomic_write(path) as file:
        try:
            torch.save(content, file)
        except RuntimeError as error:
            # torch hides a full disk behind an error of its own.
            if isinstance(error.__context__, OSError):
                raise error.__context__ from error
            raise


def reference_names(names: Iterable[str], tables: Sequence[TableConfig]) -> dict[str, str]:
    """Return the reference's name for each of our tensors, in the reference's order.

    Fixed pooling weights are left out: the reference does not save them, since they are 1.

    Args:
        names: The keys of a model's state dict.
        tables: How the sparse features' tables are stored, in order.
    """
    ours = list(names)
    expected: dict[str, str] = {}
    for number, table in enumerate(tables):
        for name, theirs in (
            (table_name(table.name), "embs.weight" if table.variant == "md" else "weight"),
            (projection_name(table.name), "proj.weight"),
            (table_name(f"{table.name}_quotient"), "weight_q"),
            (table_name(f"{table.name}_remainder"), "weight_r"),
        ):
            expected[f"sparse_arch.{name}"] = f"emb_l.{number}.{theirs}"
    for number, table in enumerate(tables):
        expected[f"sparse_arch.{weights_name(table.name)}"] = f"v_W_l.{number}"
    found = {name: theirs for name, theirs in expected.items() if name in ours}
    for prefix, theirs in {"dense_arch.layers.": "bot_l.", "over_arch.layers.": "top_l."}.items():
        for name in ours:
            if name.startswith(prefix):
                found[name] = theirs + name.removeprefix(prefix)
    assert found.keys() == set(ours)
    for table in tables:
        if table.weighted_pooling == "fixed":
            del found[f"sparse_arch.{weights_name(table.name)}"]
    return found


def _load(path: Path) -> Any:
    # A NumPy scalar is pickled as a call of its constructor on a dtype; nothing else is allowed.
    # torch knows a pickled global by its name, which NumPy 2 changed.
    scalar = np.float64(0).__reduce__()[0]
    allowed: list[Any] = [
        (scalar, "numpy.core.multiarray.scalar"),
        (scalar, "numpy._core.multiarray.scalar"),
        np.dtype,
        *(type(np.dtype(name)) for name in ("float32", "float64", "int32", "int64")),
    ]
    _refuse_packed(path)
    try:
        with torch.serialization.safe_globals(allowed):
            return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist. Check the path.") from error
    except MemoryError:
        raise
    except Exception as error:  # a foreign file can fail in any way
        reason = re.split(r"\n|(?<=\w)\. ", str(error).strip())[0]
        raise UserError(
            f"{path} cannot be read as a checkpoint of the reference: it is damaged, or holds more "
            f"than tensors and numbers, which is never loaded ({type(error).__name__}: {reason}). "
            "Name a file that the reference's --save-model wrote."
        ) from error


def _refuse_packed(path: Path) -> None:
    """Refuse a ``.pt`` that unpacks into more than its size; torch stores its tensors unpacked."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (OSError, ValueError, zipfile.BadZipFile):
        return  # missing, damaged, or of the older format, which torch tells
    if (
        any(entry.compress_type != zipfile.ZIP_STORED for entry in entries)
        or sum(entry.file_size for entry in entries) > path.stat().st_size
    ):
        raise UserError(
            f"{path} cannot be read as a checkpoint of the reference: what is in it is packed, or "
            "claims to be larger than the file, which torch.save never writes. Name a file that "
            "the reference's --save-model wrote."
        )


def _optimizer_name(
    path: Path, state: Mapping[int, Mapping[str, Any]], groups: Iterable[Mapping[str, Any]]
) -> OptimizerName:
    kinds = {kind for entry in state.values() for kind in entry if kind != "step"}
    if not kinds:
        return "sgd" if any("momentum" in group for group in groups) else ""
    if not kinds <= {"sum", "momentum"}:
        raise UserError(
            f"{path} holds optimizer state of an unknown kind: {', '.join(sorted(kinds))}. "
            "Expected the reference's sgd, adagrad or rwsadagrad."
        )
    return "rowwise_adagrad" if "momentum" in kinds else "adagrad"


def _base_rate(groups: Iterable[Mapping[str, Any]]) -> float | None:
    for group in groups:
        return float(group.get("initial_lr", group["lr"]))
    return None


def _refuse_other_shapes(
    checkpoint: ReferenceCheckpoint, expected: Mapping[str, tuple[int, ...]]
) -> None:
    found = {name: tuple(tensor.shape) for name, tensor in checkpoint.weights.items()}
    for name in [*expected, *(name for name in found if name not in expected)]:
        if expected.get(name) != found.get(name):
            raise UserError(
                f"{checkpoint.path} is a checkpoint of another model: {name} is expected to have "
                f"shape {expected.get(name, 'no such tensor')}, got "
                f"{found.get(name, 'no such tensor')}. Use the flags and the data that it was "
                "trained with."
            )


def _optimizer_content(optimizer: Optimizer, names: list[str], steps: int) -> dict[str, Any]:
    """Return what ``state_dict()`` of the reference's optimizer would."""
    config = optimizer.config
    rule = torch.optim.SGD if config.optimizer == "sgd" else torch.optim.Adagrad
    blanks = [torch.empty(0) for _ in names]
    # The scheduler has set the rate of the next step already when the reference saves.
    rate = learning_rate(config, steps + 1)
    group = rule(blanks, lr=rate).state_dict()["param_groups"][0]
    if config.optimizer == "rowwise_adagrad":
        # The reference's own class, which has the first of Adagrad's options.
        group = {
            "lr": rate,
            "lr_decay": 0.0,
            "eps": EPSILON,
            "weight_decay": 0.0,
            "initial_accumulator_value": 0.0,
            "params": group["params"],
        }
    group["initial_lr"] = config.learning_rate
    own = optimizer.state()
    state: dict[int, dict[str, Any]] = {}
    for number, name in enumerate(names):
        for theirs, ours in (("sum", "sum"), ("momentum", "row_sum")):
            if f"{name}.{ours}" in own:
                accumulator = own[f"{name}.{ours}"].detach().cpu().clone()
                # torch counts steps in a tensor, the reference's class in a number.
                rowwise = config.optimizer == "rowwise_adagrad"
                state[number] = {
                    "step": steps if rowwise else torch.tensor(float(steps)),
                    theirs: accumulator,
                }
    return {"state": state, "param_groups": [group]}
