"""Training: the loop, and what a run leaves behind."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from dlrm.checkpoint import (
    CheckpointInfo,
    Position,
    load_optimizer_state,
    load_weights,
    read_info,
    save_checkpoint,
)
from dlrm.config import TrainConfig, write_config
from dlrm.data.batch import Batch
from dlrm.data.dataset import Dataset, copy_description
from dlrm.device import memory_faults, open_device, synchronize
from dlrm.errors import UserError
from dlrm.evaluation import SplitResult, evaluate_split
from dlrm.files import environment_faults, link_or_copy, locked
from dlrm.model.dlrm import DLRM, initialize
from dlrm.runs import (
    Run,
    RunResult,
    hardware,
    peak_memory_bytes,
    versions,
)
from dlrm.schema import Split
from dlrm.trace import part, waiting
from dlrm.training.events import Evaluation, Events, JsonLines, Report, Start, Stop
from dlrm.training.optimizer import Optimizer, learning_rate
from dlrm.training.profiling import StepProfiler, trace_file
from dlrm.training.step import choose_step


def train(
    dataset: Path | str,
    run: Path | str,
    config: TrainConfig,
    listeners: Sequence[Events] = (),
    *,
    profile: Path | str | None = None,
) -> RunResult:
    """Train a model on a DATASET into a new RUN folder.

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
    """
    started = time.perf_counter()
    if not isinstance(config, TrainConfig):
        raise UserError(f"config must be a TrainConfig; got {type(config).__name__}.")
    dataset, run = Path(dataset), Path(run)
    trace = trace_file(Path(profile)) if profile is not None else None
    data = Dataset.open(dataset)
    device = open_device(config.device, config.local_rank)
    # Dropout draws from PyTorch's own generator, which is the caller's again afterwards.
    with locked(run, "run"), torch.random.fork_rng(), memory_faults("train"):
        refuse_taken(run)
        schema = data.schema.with_max_ind_range(config.max_ind_range)
        trainer = Trainer(data, Run(run, schema, config, dataset), device)
        with environment_faults(f"write to {run}"):
            (run / "checkpoints").mkdir(parents=True, exist_ok=True)
        copy_description(dataset, run, schema)
        write_config(run / "config.toml", config, dataset)
        with JsonLines(run / "log.jsonl") as log:
            trainer.listeners = (log, *listeners)
            if trace is None:
                trainer.fit()
            else:
                with contextlib.closing(StepProfiler(trainer.model, device)) as profiler:
                    trainer.listeners = (*trainer.listeners, profiler)
                    trainer.fit()
                profiler.write(trace)
            return trainer.finish(started)


def refuse_taken(run: Path) -> None:
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
            "Choose another folder, or delete this one; --continue-from takes its newest "
            "checkpoint, if it has one."
        )
    if run.exists():
        others = {path.name for path in run.iterdir()} - {"dataset", "initial.safetensors"}
        if others:
            raise UserError(
                f"{run} is not empty: it holds {', '.join(sorted(others)[:3])}. Choose a new "
                "folder."
            )


class Trainer:
    """The state of a training, and the loop over it.

    Args:
        data: Where batches come from.
        run: The folder (which exists by the time ``fit`` is called), the schema and the
            configuration.
        device: Where to compute.

    Raises:
        UserError: The checkpoint to continue from does not fit.
    """

    def __init__(self, data: Dataset, run: Run, device: torch.device) -> None:
        self.data = data
        self.run = run
        self.config = config = run.config
        self.device = device
        self.listeners: Sequence[Events] = ()

        self.train_rows = data.rows("train")
        batches = math.ceil(self.train_rows / config.mini_batch_size)
        if config.num_batches and config.num_batches < batches:
            batches = config.num_batches
            self.train_rows = batches * config.mini_batch_size
        if batches == 0:
            raise UserError(f"{data.path} has no training rows. Prepare it from more rows.")
        self.steps_per_epoch = batches

        torch.manual_seed(config.seed)  # dropout
        self.model = DLRM(run.schema, config.model, device=device)
        self.optimizer = Optimizer(self.model, config.optimizer, config.seed)
        self.position = Position()
        scaler_state = None
        if config.continue_from:
            scaler_state = self._continue_from(Path(config.continue_from)).gradient_scaler
        else:
            self.draw_weights()
        if 0 < config.max_steps <= self.position.total_steps:
            raise UserError(
                f"{config.continue_from} was saved after {self.position.total_steps} steps, so "
                f"with --max-steps {config.max_steps} nothing is left to train. Ask for more."
            )
        self.first_step = self.optimizer.steps = self.position.total_steps
        self.step = choose_step(self.model, self.optimizer, config.loss, config.amp)
        if self.step.scaler and scaler_state:
            self.step.scaler.load_state_dict(scaler_state)

        self.best_auc = -math.inf
        self.stopped = ""
        self.train_samples = 0
        self.train_seconds = 0.0
        self.train_loss = math.nan
        # The newest evaluation and the step it was made at, so that the last is not made twice.
        self._evaluated: tuple[int, SplitResult] | None = None

    def fit(self) -> None:
        """Train until all epochs are done, or a limit or target is reached."""
        start = Start(
            self.config,
            self.position,
            self.steps_per_epoch,
            self.train_rows,
            self.step.kernels,
            self.step.reason,
        )
        for listener in self.listeners:
            listener.on_start(start)
        self.model.train()
        while self.position.epoch < self.config.epochs and not self.stopped:
            batches = self.data.batches(
                "train",
                self.config.mini_batch_size,
                schema=self.run.schema,
                first_batch=self.position.step,
                num_batches=self.steps_per_epoch - self.position.step,
            )
            with contextlib.closing(batches):
                self._train_on(batches)
            if self.position.step == self.steps_per_epoch:
                self.position = replace(self.position, epoch=self.position.epoch + 1, step=0)
        self.stopped = self.stopped or "all epochs done"
        for listener in self.listeners:
            listener.on_stop(Stop(self.position, self.stopped))

    def _train_on(self, batches: Iterable[Batch]) -> None:
        """Train on the batches of a pass, or until a limit or target is reached."""
        config = self.config
        meter = _Meter(self.device)
        for batch in waiting(batches, "wait for data"):
            position = self.position
            self.position = position = replace(
                position, step=position.step + 1, total_steps=position.total_steps + 1
            )
            rate = learning_rate(config.optimizer, position.total_steps)
            with part("step"):
                loss = self.step(batch.to(self.device), rate)
            meter.add(loss, len(batch))
            for listener in self.listeners:
                listener.on_step(position, len(batch))
            if position.total_steps == config.max_steps:
                self.stopped = f"the limit of {config.max_steps} steps"
            last = position.step == self.steps_per_epoch or bool(self.stopped)
            evaluates = config.test_freq >= 0 and (
                last or (config.test_freq > 0 and position.step % config.test_freq == 0)
            )
            if last or evaluates or position.step % config.print_freq == 0:
                self._report(meter, rate)
            if evaluates:
                self._evaluate_and_save()
                meter = _Meter(self.device)  # an evaluation is no training time
            if self.stopped:
                return

    def finish(self, started: float) -> RunResult:
        """Save what is not saved yet, evaluate validation and test, and write the result.

        Args:
            started: ``time.perf_counter()`` at the start of the run.
        """
        config, run = self.config, self.run
        if self._evaluated is None or self._evaluated[0] != self.position.total_steps:
            self._save(is_best=self._evaluated is None)
        which = config.report_checkpoint
        if which == "best" and not run.checkpoint("best").samefile(run.checkpoint("newest")):
            load_weights(run.checkpoint("best"), self.model)
            self._evaluated = None
        results: dict[str, SplitResult] = {}
        splits: tuple[Split, ...] = ("validation", "test")
        for split in splits:
            results[split] = self._evaluate(split)
            run.write_predictions(split, results[split].probabilities)
        result = RunResult(
            epochs=self.position.epoch + self.position.step / self.steps_per_epoch,
            train_samples=self.train_samples,
            train_steps=self.position.total_steps - self.first_step,
            samples_per_second=self.train_samples / max(self.train_seconds, 1e-9),
            seconds=time.perf_counter() - started,
            peak_memory_bytes=peak_memory_bytes(),
            checkpoint=which,
            stopped=self.stopped,
            metrics={split: result.metrics for split, result in results.items()},
            unknown_ids={split: result.unknown_ids for split, result in results.items()},
            kernels=self.step.kernels,
            kernels_reason=self.step.reason,
            amp_type=config.amp,
            device=str(self.device),
            versions=versions(),
            hardware=hardware(self.device),
            skipped_steps=self.step.skipped_steps,
        )
        run.write_result(result)
        return result

    def draw_weights(self) -> None:
        """Draw the initial weights as the reference does."""
        initialize(self.model, self._initial_random_state())

    def _initial_random_state(self) -> np.random.RandomState:
        """Return the generator from which the reference would draw its weights."""
        random_state = np.random.RandomState(self.config.seed)
        days = self.data.manifest.train_days
        for _ in range(2):  # once for its training set, once for its test set
            if self.config.initial_draws == "total":
                random_state.permutation(sum(days))
            elif self.config.initial_draws == "day":
                for rows in days:
                    random_state.permutation(rows)
        return random_state

    def _continue_from(self, path: Path) -> CheckpointInfo:
        info = read_info(path)
        if info.optimizer not in ("", self.config.optimizer.optimizer):
            raise UserError(
                f"{path} holds the state of {info.optimizer}, and --optimizer "
                f"{self.config.optimizer.optimizer} was asked for. Use the same optimizer."
            )
        for what, theirs, ours in (
            ("features", info.schema_fingerprint, self.run.schema.fingerprint),
            ("rows and order", info.dataset_fingerprint, self.data.manifest.fingerprint),
        ):
            if theirs not in ("", ours):
                raise UserError(
                    f"{path} was trained on another DATASET: the fingerprint of its {what} is "
                    f"{theirs}, and that of {self.data.path} is {ours}. Use the DATASET it was "
                    "trained on."
                )
        if info.mini_batch_size not in (0, self.config.mini_batch_size):
            raise UserError(
                f"{path} was saved with --mini-batch-size {info.mini_batch_size}, in which its "
                f"position is counted; got {self.config.mini_batch_size}. Use the same."
            )
        load_weights(path, self.model)
        if info.optimizer:
            self.optimizer.load_state(load_optimizer_state(path))
        self.position = info.position
        if self.position.step >= self.steps_per_epoch:
            self.position = replace(self.position, epoch=self.position.epoch + 1, step=0)
        if self.position.epoch >= self.config.epochs:
            raise UserError(
                f"{path} was saved after {self.position.epoch} epochs, so with --epochs "
                f"{self.config.epochs} nothing is left to train. Ask for more epochs."
            )
        return info

    def _report(self, meter: _Meter, rate: float) -> None:
        loss, samples, steps, seconds = meter.read()
        self.train_loss = loss
        self.train_samples += samples
        self.train_seconds += seconds
        if not math.isfinite(loss):
            raise UserError(
                f"the loss is {loss} in the {steps} steps up to step {self.position.step} of epoch "
                f"{self.position.epoch}: training has diverged. Lower --learning-rate (it is "
                f"{rate}), or warm up. The newest checkpoint holds the last evaluation's weights."
            )
        report = Report(
            self.position,
            self.steps_per_epoch,
            loss,
            1000 * seconds / steps,
            samples / seconds,
            rate,
        )
        for listener in self.listeners:
            listener.on_report(report)

    def _evaluate(self, split: Split) -> SplitResult:
        evaluated = self._evaluated
        if (
            evaluated
            and split == self.config.selection_split
            and evaluated[0] == self.position.total_steps
        ):
            return evaluated[1]
        return evaluate_split(
            self.model,
            self.data,
            split,
            self.run.schema,
            self.config,
            num_batches=self.config.num_batches,
        )

    def _evaluate_and_save(self) -> None:
        for listener in self.listeners:
            listener.on_evaluation_start(self.position, self.steps_per_epoch)
        result = self._evaluate(self.config.selection_split)
        self._evaluated = (self.position.total_steps, result)
        metrics = result.metrics
        is_best = not metrics.auc <= self.best_auc  # an undefined AUC (one class) counts as new
        self.best_auc = max(self.best_auc, metrics.auc)
        self._save(is_best)
        evaluation = Evaluation(
            self.position,
            self.steps_per_epoch,
            self.config.selection_split,
            metrics,
            is_best,
            self.train_loss,
            self.model,
            self.optimizer,
        )
        for listener in self.listeners:
            listener.on_evaluation(evaluation)
        for name, value, target in (
            ("auc", metrics.auc, self.config.target_auc),
            ("accuracy", metrics.accuracy, self.config.target_accuracy),
        ):
            if target and value >= target:
                self.stopped = f"target reached: {name} {value:.6f} ≥ {target}"

    def _save(self, is_best: bool) -> None:
        tensors = {f"model.{name}": value for name, value in self.model.state_dict().items()}
        tensors |= {f"optimizer.{name}": value for name, value in self.optimizer.state().items()}
        info = CheckpointInfo(
            self.position,
            self.config.model,
            self.run.schema.fingerprint,
            self.config.optimizer.optimizer,
            self.data.manifest.fingerprint,
            self.config.mini_batch_size,
            self.step.scaler.state_dict() if self.step.scaler else None,
        )
        save_checkpoint(self.run.checkpoint("newest"), tensors, info)
        if is_best:
            link_or_copy(self.run.checkpoint("newest"), self.run.checkpoint("best"))


class _Meter:
    """Mean loss, rows and seconds since it was made or last read."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._restart()

    def _restart(self) -> None:
        self._loss = torch.zeros((), dtype=torch.float64, device=self._device)
        self._samples = 0
        self._steps = 0
        synchronize(self._device)
        self._since = time.perf_counter()

    def add(self, loss: torch.Tensor, samples: int) -> None:
        self._loss.add_(loss, alpha=samples)
        self._samples += samples
        self._steps += 1

    def read(self) -> tuple[float, int, int, float]:
        """Return mean loss, samples, steps and seconds, and start anew."""
        loss = self._loss.item() / self._samples
        read = (loss, self._samples, self._steps, time.perf_counter() - self._since)
        self._restart()
        return read
