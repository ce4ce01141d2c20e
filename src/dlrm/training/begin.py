"""Begins a training in a RUN folder, and goes on with one that was interrupted."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from dlrm.config import TrainConfig, differences, read_run_config, write_config
from dlrm.data.dataset import Dataset, copy_description
from dlrm.device import memory_faults, open_device
from dlrm.errors import StoppedBySignalError, UserError
from dlrm.files import environment_faults, locked
from dlrm.runs import Run, RunResult, to_resume
from dlrm.schema import read_schema
from dlrm.training.events import Events, JsonLines
from dlrm.training.interruption import noted_signals
from dlrm.training.mlperf import MlperfLog
from dlrm.training.profiling import StepProfiler, trace_file
from dlrm.training.saving import Checkpoints, Progress, Saver
from dlrm.training.tensorboard import TensorBoard
from dlrm.training.trainer import Trainer

logger = logging.getLogger("dlrm")


def train(
    dataset: Path | str,
    run: Path | str,
    config: TrainConfig,
    listeners: Sequence[Events] = (),
    *,
    profile: Path | str | None = None,
) -> RunResult:
    """Train a model on a DATASET into a new RUN folder.

    At SIGINT and SIGTERM, in the main thread, the step is finished and saved.

    Args:
        dataset: A DATASET that ``prepare`` wrote.
        run: The folder to make; it must not hold a run already.
        config: Everything else.
        listeners: Told of every step, report and evaluation.
        profile: Where a trace of some steps goes: a .json or .json.gz file, or a folder.

    Returns:
        What ``RUN/result.json`` holds.

    Raises:
        UserError: An option, the dataset or a checkpoint to continue from does not fit, RUN is
            taken, or the loss is not finite any more.
        EnvironmentFaultError: The disk or the device fails.
        StoppedBySignalError: A KeyboardInterrupt: SIGINT or SIGTERM came, and ``resume`` goes on.
    """
    started = time.perf_counter()
    if not isinstance(config, TrainConfig):
        raise UserError(f"config must be a TrainConfig; got {type(config).__name__}.")
    dataset, run = Path(dataset), Path(run)
    trace = trace_file(Path(profile), run) if profile is not None else None
    data = Dataset.open(dataset)
    device = open_device(config.device, config.local_rank)
    with _training(run):
        refuse_taken_run(run)
        trainer = Trainer(data, _described(data, run, config), device, started=started)
        return _train(trainer, listeners, trace)


def resume(
    run: Path | str,
    dataset: Path | str | None = None,
    listeners: Sequence[Events] = (),
    *,
    profile: Path | str | None = None,
) -> RunResult:
    """Go on with the training of a RUN that was interrupted, bit for bit as if it had not been.

    From its newest checkpoint; from the beginning, where it was interrupted before the first. With
    the options of its ``config.toml``. Of a run that has ended the result is returned.

    Args:
        run: A RUN folder.
        dataset: Where its DATASET is now; None: where it was.
        listeners: Told of every step, report and evaluation.
        profile: Where a trace of some steps goes: a .json or .json.gz file, or a folder.

    Returns:
        What ``RUN/result.json`` holds.

    Raises:
        UserError: It is no RUN, the dataset is another, no checkpoint is undamaged, or the loss is
            not finite any more.
        EnvironmentFaultError: The disk or the device fails.
        StoppedBySignalError: A KeyboardInterrupt: SIGINT or SIGTERM came, and it can go on again.
    """
    started = time.perf_counter()
    run = Path(run)
    trace = trace_file(Path(profile), run) if profile is not None else None
    config, place = read_run_config(run)
    with _training(run):
        if (run / "result.json").exists():
            result = Run.open(run).result()
            logger.info("%s has ended already (%s); its result:", run, result.stopped)
            if trace is not None:
                logger.warning("nothing is trained, so %s is not written", trace)
            return result
        place = Path(dataset) if dataset else place
        if place is None:
            raise UserError(f"{run / 'config.toml'} names no dataset. Name it there.")
        data = Dataset.open(place)
        _refuse_other_features(data, run)
        device = open_device(config.device, config.local_rank)
        described = _described(data, run, config)
        progress = _go_on(described)
        return _train(Trainer(data, described, device, progress, started), listeners, trace)


@contextlib.contextmanager
def _training(run: Path) -> Iterator[None]:
    """Hold a RUN's lock, and leave the caller's generator as it was, from which dropout draws."""
    with locked(run, "run"), torch.random.fork_rng(), memory_faults("train"):
        yield


def _described(data: Dataset, run: Path, config: TrainConfig) -> Run:
    """Describe the RUN of a training on a DATASET.

    Raises:
        UserError: An option names a feature that there is not.
    """
    schema = data.schema.with_max_ind_range(config.max_ind_range)
    feature, names = config.tracking.tensorboard_projector, [each.name for each in schema.sparse]
    if feature and feature not in names:
        raise UserError(
            f"--tensorboard-projector: there is no sparse feature {feature!r}. There are "
            f"{', '.join(names)}."
        )
    return Run(run, schema, config, data.path)


def _go_on(run: Run) -> Progress | None:
    """Find where an interrupted RUN goes on, and put its checkpoints in order.

    Returns:
        How far it had come; None: it begins anew.

    Raises:
        UserError: All its checkpoints are damaged, or were not made for an exact resume.
        EnvironmentFaultError: The disk is full or fails.
    """
    checkpoints = Checkpoints(run.path / "checkpoints", run.config.keep)
    progress = checkpoints.newest_sound()
    if progress is not None:
        logger.info("going on after step %d", progress.position.total_steps)
        checkpoints.name(progress)
    elif run.checkpoint("newest").exists():
        raise UserError(
            f"{run.checkpoint('newest')} lacks what an exact resume takes: it was imported, "
            "or saved by an older dlrm. A new run takes it with --continue-from."
        )
    else:
        logger.info("%s was interrupted before its first checkpoint; it begins anew", run.path)
    checkpoints.clear(progress.position.total_steps if progress else None)
    return progress


def _refuse_other_features(data: Dataset, run: Path) -> None:
    """Refuse a DATASET with other features than a RUN's, before any checkpoint is read."""
    if not (run / "schema.json").exists():
        return  # interrupted before
    expected = read_schema(run, "run").fingerprint
    if data.schema.fingerprint != expected:
        raise UserError(
            f"{data.path} is not the DATASET that {run} was trained on: its fingerprint is "
            f"{data.schema.fingerprint}, expected {expected}. Name the right one."
        )


def _train(trainer: Trainer, listeners: Sequence[Events], trace: Path | None) -> RunResult:
    """Write what a RUN begins with, and train, evaluate and save into it."""
    run, progress, tracking = trainer.run, trainer.progress, trainer.config.tracking
    with environment_faults(f"write to {run.path}"):
        run.path.mkdir(parents=True, exist_ok=True)
        # First of all, so that what was interrupted later can be resumed.
        write_config(run.path / "config.toml", run.config, run.dataset)
        (run.path / "checkpoints").mkdir(exist_ok=True)
    copy_description(run.dataset, run.path, run.schema)
    checkpoints = Checkpoints(run.path / "checkpoints", run.config.keep)
    step = progress.position.total_steps if progress else None
    with contextlib.ExitStack() as opened:
        seconds = progress.seconds if progress else 0.0
        size = progress.log_bytes if progress else 0
        log = opened.enter_context(JsonLines(run.path / "log.jsonl", size, seconds))
        mlperf_log = None
        own: list[Events] = [log]
        if tracking.mlperf_logging:
            size = progress.mlperf_log_bytes if progress else 0
            began = time.time() - trainer.seconds
            mlperf_log = opened.enter_context(MlperfLog(run.path / "mlperf.log", size, began))
            own.append(mlperf_log)
        if tracking.tensorboard:
            own.append(opened.enter_context(TensorBoard(run, trainer.data, step)))

        def flush_logs() -> None:
            log.flush()
            if mlperf_log:
                mlperf_log.flush()

        trainer.interruption = opened.enter_context(noted_signals())
        trainer.listeners = (*own, *listeners)
        with Saver(checkpoints, flush_logs, step) as saver:
            trainer.save_into(saver, log, mlperf_log)
            if trace is None:
                trainer.fit()
            else:
                with contextlib.closing(StepProfiler(trainer.model, trainer.device)) as profiler:
                    trainer.listeners = (*trainer.listeners, profiler)
                    trainer.fit()
                profiler.write(trace)
        return trainer.finish()


@contextlib.contextmanager
def way_on(run: Path, to_go_on: str) -> Iterator[None]:
    """Say of a training that something ends how to go on with it, unless it cannot.

    Args:
        run: The RUN folder.
        to_go_on: What goes on with it.
    """
    try:
        yield
    except StoppedBySignalError as error:
        raise error.with_way_on(to_go_on) from None
    except UserError:
        raise
    except BaseException:
        if is_begun(run):
            logger.warning("%s is unfinished. To go on: %s", run, to_go_on)
        raise


def train_or_resume(
    dataset: Path,
    run: Path,
    config: TrainConfig,
    listeners: Sequence[Events] = (),
    *,
    profile: Path | None = None,
) -> RunResult:
    """Train, or go on with just that, if it was begun and interrupted; see ``train``."""
    refuse_another_training(run, config)
    if is_begun(run):
        return resume(run, dataset, listeners, profile=profile)
    return train(dataset, run, config, listeners, profile=profile)


def is_begun(run: Path) -> bool:
    """Tell whether a RUN folder holds a training, which may have ended."""
    return (run / "config.toml").exists()


def refuse_another_training(run: Path, config: TrainConfig) -> None:
    """Refuse a RUN folder that holds anything but the training that is asked for, or nothing yet.

    Raises:
        UserError: Naming what it holds; of another training, the options that differ.
    """
    if not is_begun(run):
        refuse_taken_run(run)
    elif changed := differences(read_run_config(run)[0], config):
        raise UserError(
            f"{run} holds a run already, with other options than are asked for: "
            f"{', '.join(changed)}. Give those in {run / 'config.toml'} to go on with it, or "
            "choose another folder."
        )


def refuse_taken_run(run: Path) -> None:
    """Refuse a RUN folder that holds anything but what goes into a new one: its DATASET, weights.

    Raises:
        UserError: Naming the folder.
    """
    if run.exists() and not run.is_dir():
        raise UserError(f"{run} is not a folder. Choose another RUN.")
    if (run / "result.json").exists():
        raise UserError(
            f"{run} holds a run already, and it is not overwritten. Choose another folder, or "
            "delete this one."
        )
    if (run / "config.toml").exists():
        raise UserError(
            f"{run} holds a run already that has not ended: it was interrupted, or still goes on. "
            f"{to_resume(run)} goes on with it. Or choose another "
            "folder, or delete this one."
        )
    if run.exists():
        # Of an interrupted preparation or training, what lies beside its target, and hidden.
        hidden = (".*.partial", ".dataset.*")
        others = {path.name for path in run.iterdir() if not any(map(path.match, hidden))}
        others -= {"dataset", "initial.safetensors"}
        if others:
            raise UserError(
                f"{run} is not empty: it holds {', '.join(sorted(others)[:3])}. Choose a new "
                "folder."
            )
