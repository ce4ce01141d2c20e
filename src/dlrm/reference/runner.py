"""Runs what a command line of the reference asks for."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
from pathlib import Path

from dlrm.bundle.export import export, refuse_missing_packages
from dlrm.checkpoint import save_checkpoint
from dlrm.config import GenerateConfig, PrepareConfig
from dlrm.data.dataset import Dataset
from dlrm.data.generation import generate
from dlrm.data.prepare import prepare
from dlrm.data.sources import find_source
from dlrm.device import open_device
from dlrm.errors import EnvironmentFaultError, UserError
from dlrm.evaluation import evaluate
from dlrm.files import environment_faults
from dlrm.model.quantized import refuse_quantization
from dlrm.reference.checkpoint import ReferenceCheckpoint, convert, read_checkpoint
from dlrm.reference.conversion import write_run
from dlrm.reference.debug import ComputeGraph, DebugPrints, write_graph
from dlrm.reference.log import ProgressBar, ReferenceLog, announce_loaded, say
from dlrm.reference.request import Request, in_reference_terms
from dlrm.runs import Run
from dlrm.training.begin import (
    is_begun,
    refuse_another_training,
    refuse_taken_run,
    train_or_resume,
)
from dlrm.training.events import Events

logger = logging.getLogger("dlrm")


def run(request: Request) -> None:
    """Print the commands that a request means, then do the same.

    Raises:
        UserError: An input file or an option is wrong, or RUN is taken.
        EnvironmentFaultError: The disk or the device fails.
    """
    try:
        _run(request)
    except (UserError, EnvironmentFaultError) as error:
        raise in_reference_terms(error) from error


def _run(request: Request) -> None:
    # What can be refused is refused before the long work starts.
    if request.inference_only:
        refuse_taken_run(request.run)
    else:
        refuse_another_training(request.run, request.train)
    if isinstance(request.prepare, PrepareConfig):
        assert request.source
        find_source(request.source, request.prepare)
    if request.save_model and not request.save_model.parent.is_dir():
        raise UserError(
            f"--save-model: {request.save_model.parent} is not a folder. Make it, or choose "
            "another place."
        )
    if request.save_onnx:
        refuse_missing_packages()
    loaded = read_checkpoint(request.load_model) if request.load_model else None
    device = open_device(request.train.device, request.train.local_rank)
    refuse_quantization(request.quantization, device, request.train)
    _announce(request, str(device))

    data = _prepare(request)
    dense_features = len(data.schema.dense)
    if request.dense_features != dense_features:
        say(
            f"# note: the data have {dense_features} dense features, so --arch-mlp-bot begins with "
            f"{dense_features}, not {request.dense_features}"
        )
    test_batches = math.ceil(data.rows("test") / request.train.evaluation_batch_size)
    log = ReferenceLog(request, test_batches, loaded)
    if loaded is None:
        _train(request, data, log)
    elif request.inference_only:
        _import(loaded, request, data)
        announce_loaded(loaded, request.mlperf_logging)
        config = request.train
        if request.debug_mode or request.plot_compute_graph:
            model = Run.open(request.run).load_model("newest", device)
            if request.debug_mode:
                DebugPrints(request, data).show(model)
            if request.plot_compute_graph:
                write_graph(request.run / "graph.dot", model, data, config)
        say("time/loss/accuracy (if enabled):")
        say("Testing for inference only")
        result = evaluate(
            request.run,
            "test",
            checkpoint="newest",
            device=config.device,
            local_rank=config.local_rank,
            quantization=request.quantization,
        )
        log.report_test(result.metrics)
        if told := result.quantization:
            low, high = told.auc_difference_interval
            say(
                f"# quantized: tables {told.table_bytes:,} of {told.full_table_bytes:,} bytes, "
                f"MLPs {told.layer_bytes:,} of {told.full_layer_bytes:,}; AUC "
                f"{told.auc_difference:+.6f} (95% interval {low:+.6f} to {high:+.6f})"
            )
    else:
        _continue(loaded, request, data, log)
    if request.save_onnx:
        exported = export(request.run, request.save_onnx, format="onnx", checkpoint="newest")
        compared = exported.compared
        say(
            f"# {request.save_onnx / 'model.onnx'}: in onnxruntime, probabilities of "
            f"{compared.rows} rows differ by up to {compared.largest_foreign_difference:.1e}"
        )
    # Not among the reference's lines on standard output, which others parse.
    logger.info("the run is in %s", request.run)


def _announce(request: Request, device: str) -> None:
    say("# The same in our own commands:")
    prepare_command, *others = request.commands()
    say(prepare_command)
    if request.load_model and not request.inference_only:
        say(
            f"# ({request.load_model} is converted to {request.train.continue_from} here; dlrm "
            "convert makes a RUN of it, with such a checkpoint)"
        )
    for command in others:
        say(command)
    for note in request.notes:
        say(f"# note: {note}")
    say("Using CPU..." if device == "cpu" else f"Using {device}...")


def _prepare(request: Request) -> Dataset:
    try:
        return _make(request)
    except UserError as error:
        if not (request.dataset / "manifest.json").exists():
            raise
        say(f"# {error}")
        say(f"# {request.dataset} is made anew, as with --overwrite")
    return _make(request, overwrite=True)


def _make(request: Request, *, overwrite: bool = False) -> Dataset:
    if isinstance(request.prepare, GenerateConfig):
        return generate(request.dataset, request.prepare, overwrite=overwrite)
    assert request.source
    return prepare(request.source, request.dataset, request.prepare, overwrite=overwrite)


def _train(request: Request, data: Dataset, log: ReferenceLog) -> None:
    listeners: list[Events] = [ProgressBar(), log]
    if request.debug_mode:
        listeners.append(DebugPrints(request, data))
    if request.plot_compute_graph:
        listeners.append(ComputeGraph(request.run / "graph.dot", data))
    train_or_resume(request.dataset, request.run, request.train, listeners, profile=request.profile)


def _continue(
    loaded: ReferenceCheckpoint, request: Request, data: Dataset, log: ReferenceLog
) -> None:
    say(f"Loading saved model {loaded.path}")
    initial = Path(request.train.continue_from)
    try:
        refuse_another_training(request.run, request.train)
        if not is_begun(request.run):
            schema = data.schema.with_max_ind_range(request.train.max_ind_range)
            converted = convert(
                loaded, schema, request.train.model, request.train.accumulate_batches
            )
            with environment_faults(f"write to {request.run}"):
                request.run.mkdir(parents=True, exist_ok=True)
            save_checkpoint(initial, *converted)
        announce_loaded(loaded, request.mlperf_logging)
        _train(request, data, log)
    finally:
        if not (request.run / "config.toml").exists():  # refused before it began
            initial.unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                request.run.rmdir()


def _import(loaded: ReferenceCheckpoint, request: Request, data: Dataset) -> None:
    """Make a RUN of a ``.pt``, which can be evaluated and predicts as if it was trained here."""
    say(f"Loading saved model {loaded.path}")
    config = dataclasses.replace(request.train, continue_from="")
    schema = data.schema.with_max_ind_range(config.max_ind_range)
    write_run(loaded, Run(request.run, schema, config, request.dataset))
