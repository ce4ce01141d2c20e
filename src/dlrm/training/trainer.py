"""The training loop: steps, reports, evaluations, checkpoints, and the result."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import signal
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from dlrm.checkpoint import (
    CheckpointInfo,
    Position,
    load_optimizer_state,
    load_weights,
    read_info,
)
from dlrm.config import TrackingConfig, differences
from dlrm.data.batch import Batch
from dlrm.data.dataset import Dataset
from dlrm.device import random_state, set_random_state
from dlrm.errors import EnvironmentFaultError, StoppedBySignalError, UserError
from dlrm.evaluation import SplitResult, evaluate_split
from dlrm.metrics import Metrics
from dlrm.model.dlrm import DLRM, initialize, whole_table_bytes
from dlrm.model.variants import larger_than_whole
from dlrm.predictions import PredictionsWriter
from dlrm.runs import (
    Run,
    RunResult,
    hardware,
    peak_memory_bytes,
    to_resume,
    versions,
)
from dlrm.schema import Split
from dlrm.trace import part, waiting
from dlrm.training.events import (
    TARGET_REACHED,
    Evaluation,
    Events,
    Finish,
    JsonLines,
    Report,
    Start,
    Stop,
)
from dlrm.training.interruption import InterruptedNow, Interruption
from dlrm.training.meter import Meter, Metered
from dlrm.training.mlperf import MlperfLog
from dlrm.training.optimizer import Optimizer, learning_rate
from dlrm.training.saving import Progress, Saver, first_not_finite, tensors_of
from dlrm.training.step import choose_step

logger = logging.getLogger("dlrm")

_NOT_TRAINING = (
    *("--save-every-steps", "--save-every-minutes", "--keep", "--evaluation-memory"),
    *(f"--{field.name.replace('_', '-')}" for field in dataclasses.fields(TrackingConfig)),
)
"""Options that change no result."""


@dataclass(frozen=True)
class _Evaluated:
    """An evaluation on the selection split, so that the last is not made twice."""

    step: int
    """Steps taken in all when it was made."""
    result: SplitResult
    is_written: bool
    """Whether its predictions are."""


class Trainer:
    """The state of a training, and the loop over it.

    Args:
        data: Where batches come from.
        run: The folder (which exists by the time ``fit`` is called), the schema and the
            configuration.
        device: Where to compute.
        progress: Of the checkpoint in the folder that training goes on from; None: it begins.
        started: ``time.perf_counter()`` when it was asked for; None: now.

    Raises:
        UserError: The checkpoint to go on or to continue from does not fit.
    """

    def __init__(
        self,
        data: Dataset,
        run: Run,
        device: torch.device,
        progress: Progress | None = None,
        started: float | None = None,
    ) -> None:
        self.data = data
        self.run = run
        self.config = config = run.config
        self.device = device
        self.progress = progress
        self.listeners: Sequence[Events] = ()
        self.interruption = Interruption()
        self._started = time.perf_counter() if started is None else started
        self._saver: Saver | None = None

        self.train_rows = data.rows("train")
        if config.num_batches:
            self.train_rows = min(self.train_rows, config.num_batches * config.mini_batch_size)
        batches = math.ceil(self.train_rows / config.step_rows)
        if batches == 0:
            raise UserError(f"{data.path} has no training rows. Prepare it from more rows.")
        self.steps_per_epoch = batches

        torch.manual_seed(config.seed)  # dropout
        self.model = DLRM(run.schema, config.model, device=device)
        whole, stored = (
            whole_table_bytes(run.schema, config.model),
            self.model.sparse_arch.table_bytes,
        )
        if stored != whole:
            logger.info(
                "the embedding tables take %.1f MB; each whole, they would take %.1f MB",
                stored / 1e6,
                whole / 1e6,
            )
        if larger := larger_than_whole(
            self.model.tables, run.schema.num_embeddings, config.model.embedding_dim
        ):
            logger.warning(
                "the tables of %s take more so than whole ones would: lower --qr-collisions or "
                "md_dim, or raise --qr-threshold or --md-threshold",
                ", ".join(larger),
            )
        self.optimizer = Optimizer(self.model, config.optimizer, config.seed)
        self.position = Position()
        scaler_state = None
        if progress:
            scaler_state = self._go_on(progress).gradient_scaler
        elif config.continue_from:
            scaler_state = self._continue_from(Path(config.continue_from)).gradient_scaler
        else:
            self.draw_weights()
        if progress is None and 0 < config.max_steps <= self.position.total_steps:
            raise UserError(
                f"{config.continue_from} was saved after {self.position.total_steps} steps, so "
                f"with --max-steps {config.max_steps} nothing is left to train. Ask for more."
            )
        self.first_step = self.optimizer.steps = self.position.total_steps
        self.step = choose_step(
            self.model,
            self.optimizer,
            config.loss,
            config.amp,
            part_rows=config.mini_batch_size if config.accumulate_batches > 1 else 0,
        )
        if self.step.scaler and scaler_state:
            self.step.scaler.load_state_dict(scaler_state)

        self.best_auc = -math.inf
        self.best_step: int | None = None
        self._best_before: tuple[float, int | None] = (self.best_auc, self.best_step)
        self._lost_step: int | None = None  # the last that could not be saved
        self.stopped = ""
        self.train_samples = 0
        self.train_seconds = 0.0
        self.train_loss = math.nan
        self._evaluation_due = False
        self._machine = self._describe_machine()
        self._evaluated: _Evaluated | None = None  # the newest
        self._meter = Meter(device, progress.metered if progress else Metered())
        if progress:
            self._restore(progress)

    def _restore(self, progress: Progress) -> None:
        """Take over everything that is neither weights, optimizer state nor position."""
        self._started -= progress.seconds
        self.first_step = progress.first_step
        if progress.best_auc is not None:
            self.best_auc = progress.best_auc
        self.best_step = progress.best_step
        self.stopped = progress.stopped
        self.train_samples = progress.train_samples
        self.train_seconds = progress.train_seconds
        if progress.train_loss is not None:
            self.train_loss = progress.train_loss
        if progress.skipped_steps:
            self.step.skipped_steps = progress.skipped_steps
        self._evaluation_due = progress.evaluation_due
        machine = self._machine
        for name in sorted(machine.keys() | progress.machine.keys()):
            before, now = progress.machine.get(name, "unknown"), machine.get(name, "unknown")
            if before != now:
                logger.warning(
                    "%s was %s when the checkpoint was saved, and is %s now: results may differ "
                    "in their last bits from those of a run without an interruption",
                    name,
                    before,
                    now,
                )
        set_random_state(self.device, progress.random_state)

    @property
    def seconds(self) -> float:
        """Since the run began, interruptions left out."""
        return time.perf_counter() - self._started

    def save_into(self, saver: Saver, log: JsonLines, mlperf_log: MlperfLog | None) -> None:
        """Save checkpoints while training; without this call none is saved.

        Args:
            saver: Writes them.
            log: Its size is noted in each.
            mlperf_log: The same; None: it is not written.
        """
        self._saver = saver
        self._log = log
        self._mlperf_log = mlperf_log
        self._saved_at = time.monotonic()

    def fit(self) -> None:
        """Train until all epochs are done, or a limit or target is reached.

        Raises:
            UserError: The loss or a weight is not finite any more.
            StoppedBySignalError: A signal came; the last step is saved.
        """
        start = Start(
            self.config,
            self.position,
            self.steps_per_epoch,
            self.train_rows,
            self._evaluation_rows(),
            self.step.kernels,
            self.step.reason,
            self.model,
            resumed=self.progress is not None,
        )
        for listener in self.listeners:
            listener.on_start(start)
        if self._saver:
            self._saver.make_room(tensors_of(self.model, self.optimizer))
        self.model.train()
        if self._evaluation_due:
            self._evaluate_and_save()
        self._end_epoch()
        while self.position.epoch < self.config.epochs and not self.stopped:
            batches = self.data.batches(
                "train",
                self.config.step_rows,
                schema=self.run.schema,
                first_batch=self.position.step,
                num_batches=self.steps_per_epoch - self.position.step,
            )
            for listener in self.listeners:
                listener.on_pass_start(self.position)
            with contextlib.closing(batches):
                self._train_on(batches)
            self._end_epoch()
        self.stopped = self.stopped or "all epochs done"
        self._save_last()
        for listener in self.listeners:
            listener.on_stop(Stop(self.position, self.stopped))

    def _evaluation_rows(self) -> int:
        rows, config = self.data.rows(self.config.selection_split), self.config
        limit = config.num_batches * config.evaluation_batch_size
        return min(rows, limit) if limit else rows

    def _end_epoch(self) -> None:
        """Count a pass that is complete."""
        if self.position.step >= self.steps_per_epoch:
            self.position = replace(self.position, epoch=self.position.epoch + 1, step=0)

    def _train_on(self, batches: Iterable[Batch]) -> None:
        """Train on the batches of a pass, or until a limit or target is reached."""
        config, meter = self.config, self._meter
        watched = self.device.type == "cpu"  # elsewhere a look at a loss would wait for the device
        meter.go_on()
        for batch in waiting(batches, "wait for data", meter.waited):
            position = self.position
            self.position = position = replace(
                position, step=position.step + 1, total_steps=position.total_steps + 1
            )
            rate = learning_rate(config.optimizer, position.total_steps)
            with part("step"):
                loss = self.step(batch.to(self.device), rate)
            self._look_at_saver()
            if watched and not math.isfinite(loss.item()):
                first = (position.step - 1) * config.step_rows
                last_row = min(first + config.step_rows, self.train_rows) - 1
                raise self._diverged(
                    loss.item(),
                    f"at step {position.step} of epoch {position.epoch}, whose batch is rows "
                    f"{first} to {last_row} of the training split",
                    rate,
                )
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
                self._report(rate)
            if evaluates:
                self._evaluate_and_save()
                meter.go_on()  # an evaluation is no training time
            elif self._save_is_due():
                meter.pause()
                self._save()
                meter.go_on()
            if self.interruption.number:
                meter.pause()
                raise self._stopped_by_signal()
            if self.stopped:
                return

    def _save_is_due(self) -> bool:
        config = self.config
        if self._saver is None:
            return False
        every = config.save_every_steps
        if every and self.position.total_steps % every == 0:
            return True
        age = time.monotonic() - self._saved_at
        return 0 < config.save_every_minutes <= age / 60 and not self._saver.is_busy

    def _stopped_by_signal(self) -> StoppedBySignalError:
        """Save, if that is not done, and return what to raise."""
        assert self._saver
        self._look_at_saver(wait=True)
        if self._saver.saved_step != self.position.total_steps:
            self._save(wait=True)
        return self._stop_message()

    def _stop_message(self) -> StoppedBySignalError:
        assert self._saver
        saved = self._saver.saved_step
        number = self.interruption.number
        return StoppedBySignalError(
            number,
            f"stopped by {signal.Signals(number).name} after step {self.position.total_steps}; "
            f"{'nothing' if saved is None else f'step {saved}'} is saved.",
            to_resume(self.run.path),
        )

    def _save_last(self) -> None:
        """Save the end of training, if it was not evaluated, or could not be saved then."""
        step = self.position.total_steps
        self._look_at_saver(wait=True)
        if self._saver is None:
            return
        # Saved before its evaluation it names another best; and none, if there was no evaluation.
        named = self.best_step is not None and self._lost_step != step
        if self._saver.saved_step != step or not named:
            auc = -math.inf
            if self._evaluated and self._evaluated.step == step:
                auc = self._evaluated.result.metrics.auc
            if self.best_step is None or not auc <= self.best_auc:
                self.best_auc, self.best_step = max(self.best_auc, auc), step
            if fault := self._save(wait=True):
                raise fault
        if fault := self._saver.name():
            raise fault

    def finish(self) -> RunResult:
        """Evaluate validation and test, and write the result."""
        try:
            with self.interruption.at_once():
                return self._finish()
        except InterruptedNow:
            raise self._stop_message() from None

    def _finish(self) -> RunResult:
        config, run = self.config, self.run
        which = config.report_checkpoint
        if which == "best" and not run.checkpoint("best").samefile(run.checkpoint("newest")):
            load_weights(run.checkpoint("best"), self.model)
            self._evaluated = None
        results: dict[str, SplitResult] = {}
        splits: tuple[Split, ...] = ("validation", "test")
        for split in splits:
            evaluated = self._evaluated if split == config.selection_split else None
            if (
                evaluated is None
                or evaluated.step != self.position.total_steps
                or not evaluated.is_written
            ):
                evaluated = self._evaluate(split, lambda metrics: True)
            results[split] = evaluated.result
        result = RunResult(
            epochs=self.position.epoch + self.position.step / self.steps_per_epoch,
            train_samples=self.train_samples,
            train_steps=self.position.total_steps - self.first_step,
            samples_per_second=self.train_samples / max(self.train_seconds, 1e-9),
            seconds=self.seconds,
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
            table_bytes=self.model.sparse_arch.table_bytes,
            whole_table_bytes=whole_table_bytes(run.schema, config.model),
        )
        finish = Finish(self.position, result, self.model)
        for listener in self.listeners:
            listener.on_finish(finish)
        run.write_result(result)  # last: a RUN with a result is not gone on with
        return result

    def draw_weights(self) -> None:
        """Draw the initial weights as the reference does."""
        generator = torch.Generator().manual_seed(self.config.seed)
        initialize(self.model, self._initial_random_state(), generator)

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

    def _go_on(self, progress: Progress) -> CheckpointInfo:
        """Take over what a checkpoint of this run holds, which is verified."""
        path = self.run.checkpoint("newest")
        changed = [
            option
            for option in differences(progress.config, self.config)
            if option not in _NOT_TRAINING
        ]
        if changed:
            raise UserError(
                f"{self.run.path / 'config.toml'} was changed since {path} was saved: "
                f"{', '.join(changed)}. Change it back, or train a new run with --continue-from."
            )
        info = self._load(path, verified=True)
        self.position = info.position
        return info

    def _continue_from(self, path: Path) -> CheckpointInfo:
        """Take over what a checkpoint of another run holds."""
        info = self._load(path)
        self.position = info.position
        self._end_epoch()
        if self.position.epoch >= self.config.epochs:
            raise UserError(
                f"{path} was saved after {self.position.epoch} epochs, so with --epochs "
                f"{self.config.epochs} nothing is left to train. Ask for more epochs."
            )
        return info

    def _load(self, path: Path, *, verified: bool = False) -> CheckpointInfo:
        """Load weights and optimizer state, if they are of this DATASET and these options."""
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
        if info.mini_batch_size not in (0, self.config.step_rows):
            raise UserError(
                f"{path} was saved with steps of {info.mini_batch_size} rows, in which its "
                f"position is counted (--mini-batch-size times --accumulate-batches); got "
                f"{self.config.step_rows}. Use the same."
            )
        load_weights(path, self.model, verified=verified)
        if info.optimizer:
            self.optimizer.load_state(load_optimizer_state(path))
        return info

    def _diverged(self, loss: float, where: str, rate: float) -> UserError:
        """Return what to raise when a loss is not finite."""
        name = first_not_finite(tensors_of(self.model, self.optimizer))
        return UserError(
            f"the loss is {loss} {where}: training has diverged. Lower --learning-rate (it is "
            f"{rate}), or warm up. The first tensor that is not finite is {name or 'the loss'}; "
            "what was saved before is kept."
        )

    def _report(self, rate: float) -> None:
        read = self._meter.read()
        self.train_loss = loss = read.loss / read.samples
        self.train_samples += read.samples
        self.train_seconds += read.seconds
        if not math.isfinite(loss):  # of a device, where not every step is looked at
            steps, position = read.steps, self.position
            raise self._diverged(
                loss,
                f"in the {steps} steps up to step {position.step} of epoch {position.epoch}",
                rate,
            )
        report = Report(
            self.position,
            self.steps_per_epoch,
            loss,
            1000 * read.seconds / read.steps,
            1000 * read.data_wait_seconds / read.steps,
            read.samples / read.seconds,
            rate,
        )
        for listener in self.listeners:
            listener.on_report(report)

    def _evaluate(
        self, split: Split, is_wanted: Callable[[Metrics], bool] | None = None
    ) -> _Evaluated:
        """Evaluate a split.

        Args:
            split: Which split.
            is_wanted: Tells of its metrics whether its predictions are kept; None: none are
                written.
        """
        writing: AbstractContextManager[PredictionsWriter | None] = contextlib.nullcontext()
        if is_wanted:
            writing = self.run.write_predictions(split, self.data.manifest.fingerprint)
        is_written = False
        with writing as predictions:
            result = evaluate_split(
                self.model,
                self.data,
                split,
                self.run.schema,
                self.config,
                num_batches=self.config.num_batches,
                folder=self.run.path,
                predictions=predictions,
            )
            if is_wanted and predictions:
                predictions.is_wanted = is_written = is_wanted(result.metrics)
        return _Evaluated(self.position.total_steps, result, is_written)

    def _evaluate_and_save(self) -> None:
        for listener in self.listeners:
            listener.on_evaluation_start(self.position, self.steps_per_epoch)
        self._evaluation_due = True
        config = self.config
        # What is likely to be the run's result, so that it is not evaluated once more.
        is_last = bool(self.stopped) or (
            self.position.step == self.steps_per_epoch and self.position.epoch + 1 == config.epochs
        )
        writes = is_last or bool(config.target_auc or config.target_accuracy)

        def ends(metrics: Metrics) -> bool:
            return is_last or bool(self._reached(metrics))

        try:
            with self.interruption.at_once():
                try:
                    evaluated = self._evaluate(config.selection_split, ends if writes else None)
                except EnvironmentFaultError:
                    if not writes:
                        raise
                    # The disk may be full. First what was trained is saved; at the end predictions
                    # are tried again.
                    evaluated = self._evaluate(config.selection_split)
        except InterruptedNow:
            raise self._stopped_by_signal() from None
        self._look_at_saver(wait=True)  # whether the best so far is saved
        self._evaluation_due = False
        self._evaluated = evaluated
        metrics = evaluated.result.metrics
        is_best = not metrics.auc <= self.best_auc  # an undefined AUC (one class) counts as new
        if is_best:
            self._best_before = (self.best_auc, self.best_step)
            self.best_step = self.position.total_steps
        self.best_auc = max(self.best_auc, metrics.auc)
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
        self.stopped = self._reached(metrics) or self.stopped
        self._save()

    def _reached(self, metrics: Metrics) -> str:
        """Tell which target an evaluation reaches; empty: none."""
        for name, value, target in (
            ("accuracy", metrics.accuracy, self.config.target_accuracy),
            ("auc", metrics.auc, self.config.target_auc),
        ):
            if target and value >= target:
                return f"{TARGET_REACHED}: {name} {value:.6f} ≥ {target}"
        return ""

    def _save(self, *, wait: bool = False) -> EnvironmentFaultError | None:
        """Save a checkpoint, and return why one was not saved, if that is known."""
        if self._saver is None:
            return None
        self._look_at_saver(wait=True)  # whether the best so far, which this one names, is saved
        info = CheckpointInfo(
            self.position,
            self.config.model,
            self.run.schema.fingerprint,
            self.config.optimizer.optimizer,
            self.data.manifest.fingerprint,
            self.config.step_rows,
            self.step.scaler.state_dict() if self.step.scaler else None,
        )
        tensors = tensors_of(self.model, self.optimizer)
        self._saver.save(tensors, info, self._progress(), wait=wait)
        self._saved_at = time.monotonic()
        return self._look_at_saver()

    def _look_at_saver(self, *, wait: bool = False) -> EnvironmentFaultError | None:
        """See how saving went, where it has ended; return why it failed, if it did."""
        saver = self._saver
        if saver is None:
            return None
        if wait or not saver.is_busy:
            saver.settle()
        fault: EnvironmentFaultError | None = None
        for progress, error in saver.failed:
            fault = error
            self._lost_step = progress.position.total_steps
            if progress.best_step == self.best_step == progress.position.total_steps:
                self.best_auc, self.best_step = self._best_before
        saver.failed.clear()
        return fault

    def _progress(self) -> Progress:
        return Progress(
            position=self.position,
            config=self.config,
            first_step=self.first_step,
            metered=self._meter.state(),
            random_state=random_state(self.device),
            best_auc=self.best_auc if math.isfinite(self.best_auc) else None,
            best_step=self.best_step,
            train_loss=self.train_loss if math.isfinite(self.train_loss) else None,
            train_samples=self.train_samples,
            train_seconds=self.train_seconds,
            seconds=self.seconds,
            skipped_steps=self.step.skipped_steps,
            stopped=self.stopped,
            evaluation_due=self._evaluation_due,
            log_bytes=self._log.size,
            machine=self._machine,
            mlperf_log_bytes=self._mlperf_log.size if self._mlperf_log else 0,
        )

    def _describe_machine(self) -> dict[str, str | int]:
        """Return what results depend on bit by bit."""
        described = hardware(self.device)
        del described["cores"]
        return {**versions(), **described, "kernels": self.step.kernels}
