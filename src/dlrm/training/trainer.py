"""Training: the loop, and what a run leaves behind."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from dlrm.checkpoint import (
    CheckpointInfo,
    Position,
    link_checkpoint,
    load_optimizer_state,
    load_weights,
    read_info,
    save_checkpoint,
)
from dlrm.config import TrainConfig, write_config
from dlrm.data.dataset import Dataset, copy_description
from dlrm.device import open_device, synchronize
from dlrm.errors import UserError
from dlrm.evaluation import SplitResult, evaluate_split
from dlrm.files import environment_faults, locked
from dlrm.model.dlrm import DLRM, initialize
from dlrm.runs import (
    Run,
    RunResult,
    hardware,
    peak_memory_bytes,
    versions,
)
from dlrm.schema import Split
from dlrm.training.events import Evaluation, Events, JsonLines, Report, Start, Stop
from dlrm.training.optimizer import Optimizer, learning_rate
from dlrm.training.step import EagerStep

logger = logging.getLogger("dlrm")


def train(
    dataset: Path | str, run: Path | str, config: TrainConfig, listeners: Sequence[Events] = ()
) -> RunResult:
    """Train a model on a DATASET into a new RUN folder.

    Args:
        dataset: A DATASET that ``prepare`` wrote.
        run: The folder to make; it must not hold a run already.
        config: Everything else.
        listeners: Told of every step, report and evaluation.

    Returns:
        What ``RUN/result.json`` holds.

    Raises:
        UserError: An option, the dataset or a checkpoint to continue from does not fit, RUN is
            taken, or the loss is not finite any more.
        EnvironmentFaultError: The disk or the device fails.
    """
    started = time.perf_counter()
    dataset, run = Path(dataset), Path(run)
    data = Dataset.open(dataset)
    device = open_device(config.device, config.local_rank)
    with locked(run, "run"):
        refuse_taken(run)
        trainer = Trainer(
            data,
            Run(run, data.schema.with_max_ind_range(config.max_ind_range), config, dataset),
            device,
        )
        with environment_faults(f"write to {run}"):
            (run / "checkpoints").mkdir(parents=True, exist_ok=True)
            copy_description(dataset, run, trainer.run.schema)
            write_config(run / "config.toml", config, dataset)
            with JsonLines(run / "log.jsonl") as log:
                trainer.listeners = (log, *listeners)
                trainer.fit()
                return trainer.finish(started)


def refuse_taken(run: Path) -> None:
    """Refuse a RUN folder that holds a run already.

    Raises:
        UserError: Naming the folder.
    """
    if (run / "config.toml").exists() or run.is_file():
        raise UserError(
            f"{run} holds a run already, and it is not overwritten. Choose another folder, or "
            "delete this one."
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
        self.optimizer = Optimizer(self.model, config.optimizer)
        self.position = Position()
        if config.continue_from:
            self._continue_from(Path(config.continue_from))
        else:
            initialize(self.model, self._initial_random_state())
        self.step = EagerStep(self.model, self.optimizer, config.loss)

        self.best_auc = -math.inf
        self.best_accuracy = -math.inf
        self.stopped = ""
        self.train_samples = 0
        self.train_seconds = 0.0
        self.train_loss = math.nan
        # The newest evaluation and the step it was made at, so that the last is not made twice.
        self._evaluated: tuple[int, SplitResult] | None = None

    def fit(self) -> None:
        """Train until all epochs are done, or a limit or target is reached."""
        config, epoch_steps = self.config, self.steps_per_epoch
        self._notify_start()
        self.model.train()
        while self.position.epoch < config.epochs and not self.stopped:
            meter = _Meter(self.device)
            for batch in self.data.batches(
                "train",
                config.mini_batch_size,
                schema=self.run.schema,
                first_batch=self.position.step,
                num_batches=epoch_steps - self.position.step,
            ):
                total_steps = self.position.total_steps + 1
                rate = learning_rate(config.optimizer, total_steps)
                loss = self.step(batch.to(self.device), rate)
                meter.add(loss, len(batch))
                self.position = replace(
                    self.position, step=self.position.step + 1, total_steps=total_steps
                )
                for listener in self.listeners:
                    listener.on_step(self.position, len(batch))
                step = self.position.step
                last = step == epoch_steps or total_steps == config.max_steps
                evaluates = config.test_freq >= 0 and (
                    last or (config.test_freq > 0 and step % config.test_freq == 0)
                )
                if last or evaluates or step % config.print_freq == 0:
                    self._report(meter, rate)
                if evaluates:
                    self._evaluate_and_save()
                if last or evaluates:
                    # What lies between is no training time.
                    meter = _Meter(self.device)
                if total_steps == config.max_steps:
                    self.stopped = f"the limit of {config.max_steps} steps"
                if self.stopped:
                    break
            if self.position.step == epoch_steps:
                self.position = replace(self.position, epoch=self.position.epoch + 1, step=0)
        self.stopped = self.stopped or "all epochs done"
        for listener in self.listeners:
            listener.on_stop(Stop(self.position, self.stopped))

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
            train_steps=self.position.total_steps,
            samples_per_second=self.train_samples / max(self.train_seconds, 1e-9),
            seconds=time.perf_counter() - started,
            peak_memory_bytes=peak_memory_bytes(),
            checkpoint=which,
            stopped=self.stopped,
            metrics={split: result.metrics for split, result in results.items()},
            unknown_ids={split: result.unknown_ids for split, result in results.items()},
            kernels="plain",
            kernels_reason="there are no native kernels in this version",
            amp_type="O0",
            device=str(self.device),
            versions=versions(),
            hardware=hardware(self.device),
        )
        run.write_result(result)
        return result

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

    def _continue_from(self, path: Path) -> None:
        info = read_info(path)
        if info.optimizer not in ("", self.config.optimizer.optimizer):
            raise UserError(
                f"{path} holds the state of {info.optimizer}, and --optimizer "
                f"{self.config.optimizer.optimizer} was asked for. Use the same optimizer."
            )
        if info.schema_fingerprint not in ("", self.run.schema.fingerprint):
            raise UserError(
                f"{path} was trained on a DATASET with fingerprint {info.schema_fingerprint}; "
                f"{self.data.path} has {self.run.schema.fingerprint}. Use the DATASET it was "
                "trained on."
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

    def _notify_start(self) -> None:
        start = Start(self.config, self.position, self.steps_per_epoch, self.train_rows)
        for listener in self.listeners:
            listener.on_start(start)

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
        return evaluate_split(self.model, self.data, split, self.run.schema, self.config)

    def _evaluate_and_save(self) -> None:
        for listener in self.listeners:
            listener.on_evaluation_start(self.position, self.steps_per_epoch)
        result = self._evaluate(self.config.selection_split)
        self._evaluated = (self.position.total_steps, result)
        metrics = result.metrics
        is_best = not metrics.auc <= self.best_auc  # an undefined AUC (one class) counts as new
        self.best_auc = max(self.best_auc, metrics.auc)
        self.best_accuracy = max(self.best_accuracy, metrics.accuracy)
        self._save(is_best)
        evaluation = Evaluation(
            self.position,
            self.steps_per_epoch,
            self.config.selection_split,
            metrics,
            is_best,
            self.best_auc,
            self.best_accuracy,
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
        )
        save_checkpoint(self.run.checkpoint("newest"), tensors, info)
        if is_best:
            link_checkpoint(self.run.checkpoint("newest"), self.run.checkpoint("best"))


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
        self._loss += loss.double() * samples
        self._samples += samples
        self._steps += 1

    def read(self) -> tuple[float, int, int, float]:
        """Return mean loss, samples, steps and seconds, and start anew."""
        loss = self._loss.item() / self._samples
        read = (loss, self._samples, self._steps, time.perf_counter() - self._since)
        self._restart()
        return read
