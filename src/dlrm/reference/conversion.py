"""``dlrm convert``: the reference's ``.pt`` to a RUN, and a RUN to a ``.pt``.

What a ``.pt`` does not tell comes from its tensors' shapes (the architecture), from a DATASET or an
``.npz`` of the reference (the features), and from options (what neither tells). ``pt.json`` in the
RUN keeps what a checkpoint of ours has no place for, so that the way back loses nothing.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from dlrm.checkpoint import (
    CheckpointInfo,
    load_optimizer_state,
    load_weights,
    read_info,
    save_checkpoint,
)
from dlrm.config import (
    ConvertConfig,
    ModelConfig,
    OptimizerConfig,
    QrOperation,
    TableConfig,
    TrainConfig,
    write_config,
)
from dlrm.data import criteo
from dlrm.data.dataset import Dataset, copy_description
from dlrm.data.prepared import recognise
from dlrm.errors import UserError
from dlrm.files import (
    FORMAT_VERSION,
    atomic_folder,
    environment_faults,
    link_or_copy,
    read_json,
    write_json,
)
from dlrm.model.dlrm import DLRM
from dlrm.reference.checkpoint import (
    ReferenceCheckpoint,
    convert,
    read_checkpoint,
    write_checkpoint,
)
from dlrm.runs import Run, Which
from dlrm.schema import FeatureSchema, write_schema
from dlrm.training.begin import refuse_taken_run
from dlrm.training.optimizer import Optimizer

_NUMBERS = "pt.json"


@dataclass(frozen=True)
class Converted:
    """What ``dlrm convert`` did."""

    source: str
    target: str
    tensors: int
    """Weights and optimizer state."""
    optimizer: str
    """Whose state; empty: none."""
    epoch: int
    step: int


@dataclass(frozen=True)
class _Numbers:
    """``pt.json``: what a ``.pt`` told beside its tensors and position."""

    nepochs: int
    nbatches: int
    nbatches_test: int
    train_loss: float | None
    """None, here and below: not a number, which JSON has no word for."""
    test_acc: float | None
    test_auc: float | None = None
    """None: it was saved without --mlperf-logging."""
    format_version: str = FORMAT_VERSION


def import_checkpoint(
    source: Path, run: Path, data: Path, config: ConvertConfig | None = None
) -> Converted:
    """Make a RUN of a ``.pt``, which is evaluated and predicts as one that was trained here.

    Args:
        source: The ``.pt``.
        run: The folder to make.
        data: A DATASET of the rows it was trained on; or the ``.npz`` that the reference prepared
            of them, of which only the number of ids of each feature is read.
        config: What neither of both tells.

    Raises:
        UserError: The ``.pt`` is none, or of other features than the data; RUN is taken; or an
            option is missing.
        EnvironmentFaultError: The disk is full or read-only.
    """
    refuse_taken_run(run)
    config = config or ConvertConfig()
    loaded = read_checkpoint(source)
    schema, dataset = _features(data)
    schema = schema.with_max_ind_range(config.max_ind_range)
    model = infer_model(loaded, schema, config.qr_operation)
    optimizer = OptimizerConfig(optimizer=loaded.optimizer or "sgd")
    if loaded.learning_rate is not None:
        optimizer = dataclasses.replace(optimizer, learning_rate=loaded.learning_rate)
    training = TrainConfig(
        model=model,
        loss=config.loss,
        optimizer=optimizer,
        epochs=max(1, loaded.epochs),
        max_ind_range=config.max_ind_range,
        report_checkpoint="newest",
    )
    return write_run(loaded, Run(run, schema, training, dataset))


def write_run(loaded: ReferenceCheckpoint, run: Run) -> Converted:
    """Write a RUN that holds what a ``.pt`` does; it appears complete or not at all.

    Args:
        loaded: The ``.pt``.
        run: Where, and with which schema, configuration and DATASET (which need not exist).

    Raises:
        UserError: The ``.pt`` is of another architecture.
        EnvironmentFaultError: The disk is full or read-only.
    """
    tensors, info = convert(loaded, run.schema, run.config.model)
    with atomic_folder(run.path, "run") as partial, environment_faults(f"write to {run.path}"):
        made = dataclasses.replace(run, path=partial)
        made.checkpoint("newest").parent.mkdir()
        save_checkpoint(made.checkpoint("newest"), tensors, info)
        link_or_copy(made.checkpoint("newest"), made.checkpoint("best"))
        if (run.dataset / "schema.json").exists():
            copy_description(run.dataset, partial, run.schema)
        else:
            write_schema(partial, run.schema)
        write_json(
            partial / _NUMBERS,
            _Numbers(
                nepochs=loaded.epochs,
                nbatches=loaded.batches,
                nbatches_test=loaded.test_batches,
                train_loss=loaded.train_loss,
                test_acc=loaded.test_accuracy,
                test_auc=loaded.test_auc,
            ),
        )
        write_config(partial / "config.toml", run.config, run.dataset)
    return _converted(loaded.path, run.path, tensors, info)


def export_checkpoint(
    run: Path, target: Path, which: Which = "best", *, overwrite: bool = False
) -> Converted:
    """Write a RUN's checkpoint as a ``.pt`` that the reference loads.

    Args:
        run: What ``dlrm train`` or ``dlrm convert`` made.
        target: The file to write.
        which: Which of its checkpoints.
        overwrite: Replace a file that is there.

    Raises:
        UserError: It is no RUN, or holds what the reference has no place for; or the file is there.
        EnvironmentFaultError: The disk is full or read-only.
    """
    if target.exists() and not overwrite:
        raise UserError(
            f"{target} is there already, and is not overwritten. Choose another file, or replace "
            "it with --overwrite."
        )
    opened = Run.open(run)
    place = opened.checkpoint(which)
    info = read_info(place)
    model = DLRM(opened.schema, opened.config.model)
    load_weights(place, model)
    optimizer = Optimizer(model, opened.config.optimizer)
    if state := load_optimizer_state(place):
        optimizer.load_state(state)
    numbers = _numbers_of(opened, info)
    content = {
        name: math.nan if value is None else value
        for name, value in dataclasses.asdict(numbers).items()
        # Without an AUC the reference has no such key.
        if name != "format_version" and (name, value) != ("test_auc", None)
    }
    if not (run / _NUMBERS).exists():
        step = info.position.step * opened.config.accumulate_batches
        content["iter"] = min(step, numbers.nbatches) if numbers.nbatches else step
    write_checkpoint(
        target,
        model,
        optimizer if info.optimizer else None,
        info.position,
        {**content, "total_loss": 0},
    )
    return _converted(run, target, {**model.state_dict(), **state}, info)


def infer_model(
    loaded: ReferenceCheckpoint,
    schema: FeatureSchema,
    qr_operation: QrOperation | Literal["unknown"] = "unknown",
) -> ModelConfig:
    """Return the architecture that a ``.pt`` is of, from the shapes of its tensors.

    Args:
        loaded: The ``.pt``.
        schema: Of its features.
        qr_operation: How quotient and remainder are joined, if it is known.

    Raises:
        UserError: It has another number of features, or its shapes fit several architectures or
            none.
    """
    path, weights = loaded.path, loaded.weights
    dense = _layer_sizes(path, weights, "bot_l")
    over = _layer_sizes(path, weights, "top_l")
    dim = dense[-1]
    tables = len({name.split(".")[1] for name in weights if name.startswith("emb_l.")})
    if tables != len(schema.sparse):
        raise UserError(
            f"{path} has {tables} embedding tables, and the data have {len(schema.sparse)} sparse "
            "features. Name the data that it was trained on."
        )
    vectors = tables + 1
    widths = {
        ("dot", False): vectors * (vectors - 1) // 2 + dim,
        ("dot", True): vectors * (vectors + 1) // 2 + dim,
        ("cat", False): vectors * dim,
    }
    width = weights["top_l.0.weight"].shape[1]
    fitting = [kind for kind, expected in widths.items() if expected == width]
    if not fitting:
        raise UserError(
            f"{path}: top_l.0.weight is expected to have {' or '.join(map(str, widths.values()))} "
            f"columns, for {tables} tables of vectors of {dim}; got {width}. It is not a model of "
            "the reference."
        )
    # Where shapes coincide (vectors of half as many numbers as there are vectors) dot is meant:
    # it is the reference's default.
    interaction, itself = fitting[0]
    stored = tuple(
        _table(loaded, number, feature.name, dim, qr_operation)
        for number, feature in enumerate(schema.sparse)
    )
    plain = all(table == TableConfig(table.name) for table in stored)
    return ModelConfig(
        embedding_dim=dim,
        dense_arch_layer_sizes=dense,
        over_arch_layer_sizes=over,
        interaction="cat" if interaction == "cat" else "dot",
        interaction_itself=itself,
        tables=() if plain else stored,
    )


def _layer_sizes(path: Path, weights: Mapping[str, Tensor], mlp: str) -> tuple[int, ...]:
    """Return the output sizes of an MLP's layers."""
    sizes: list[int] = []
    while (name := f"{mlp}.{2 * len(sizes)}.weight") in weights:  # activations lie between
        sizes.append(weights[name].shape[0])
    if not sizes:
        raise UserError(
            f"{path} is not a checkpoint of the reference: it has no tensor {mlp}.0.weight. Name a "
            "file that its --save-model wrote."
        )
    return tuple(sizes)


def _table(
    loaded: ReferenceCheckpoint,
    number: int,
    name: str,
    dim: int,
    qr_operation: QrOperation | Literal["unknown"],
) -> TableConfig:
    """Return how a table is stored."""
    weights = loaded.weights
    pooling: dict[str, Any] = {}
    if f"v_W_l.{number}" in weights:
        pooling["weighted_pooling"] = "learned"
    quotient, remainder = (weights.get(f"emb_l.{number}.weight_{part}") for part in "qr")
    if quotient is not None and remainder is not None:
        operation = "concat" if 2 * quotient.shape[1] == dim else qr_operation
        if operation == "unknown":
            raise UserError(
                f"{loaded.path} has quotient-remainder tables, whose vectors are multiplied or "
                "added, and it does not tell which. Say --qr-operation mult or --qr-operation add, "
                "as in the old command (mult was its default)."
            )
        return TableConfig(
            name,
            variant="qr",
            qr_operation=operation,
            qr_collisions=remainder.shape[0],
            **pooling,
        )
    shorter = weights.get(f"emb_l.{number}.embs.weight")
    if shorter is not None:
        return TableConfig(name, variant="md", md_dim=shorter.shape[1], **pooling)
    return TableConfig(name, **pooling)


def _features(data: Path) -> tuple[FeatureSchema, Path]:
    """Return the schema of a DATASET or of a ``.npz``, and where the DATASET lies or would."""
    if (data / "manifest.json").exists() or data.suffix != ".npz":
        return Dataset.open(data).schema, data
    rows = recognise(data)
    if rows.has_values:
        raise UserError(
            f"{data} has dictionaries of raw values beside it, with which a RUN can predict raw "
            f"rows. Prepare it first (dlrm prepare {data} DATASET), and name that DATASET."
        )
    return criteo.schema(rows.num_embeddings, "").sealed(), data.with_suffix(".dataset")


def _numbers_of(run: Run, info: CheckpointInfo) -> _Numbers:
    """Return what the reference writes of a training beside the tensors, as far as it is known."""
    if (run.path / _NUMBERS).exists():
        return read_json(run.path / _NUMBERS, _Numbers, "run")
    position, config = info.position, run.config
    events = run.log()
    here = dataclasses.asdict(position)
    starts = [event for event in events if event.get("event") == "start"]
    losses = [
        event["loss"]
        for event in events
        if event.get("event") == "report"
        and event["position"]["total_steps"] <= position.total_steps
    ]
    metrics: dict[str, Any] = {}
    for event in events:
        if event.get("event") == "evaluation" and (
            event["position"]["total_steps"] == here["total_steps"]
        ):
            metrics = event["metrics"]
    test_batches = 0
    if (run.dataset / "manifest.json").exists():
        rows = Dataset.open(run.dataset).rows("test")
        test_batches = math.ceil(rows / config.evaluation_batch_size)
    return _Numbers(
        nepochs=config.epochs,
        nbatches=math.ceil(starts[0]["train_rows"] / config.mini_batch_size) if starts else 0,
        nbatches_test=test_batches,
        train_loss=losses[-1] if losses else 0.0,
        # 0 is what the reference begins with: the next test is the best.
        test_acc=metrics.get("accuracy") or 0.0,
        test_auc=metrics.get("auc") or 0.0,
    )


def _converted(
    source: Path, target: Path, tensors: Mapping[str, torch.Tensor], info: CheckpointInfo
) -> Converted:
    return Converted(
        str(source),
        str(target),
        len(tensors),
        info.optimizer,
        info.position.epoch,
        info.position.step,
    )
