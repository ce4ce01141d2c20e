"""``mlperf.log``: a training as MLPerf Training's events, through MLCommons' own package.

The keys are those that the rulesets of benchmark dlrm (v1) want, 0.7 to 2.1, in the order and with
the numbering of epochs of the benchmark's reference: a pass is an epoch and a block, the first is
number 1, and an evaluation in the middle of it is at 1.5. ``dlrm mlperf-check`` checks a log.
"""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

from mlperf_logging.mllog import constants as keys
from mlperf_logging.mllog.mllog import MLLogger

from dlrm.checkpoint import Position
from dlrm.config import OptimizerConfig, TrainConfig
from dlrm.training.events import AppendedLog, Evaluation, Start, Stop
from dlrm.training.optimizer import EPSILON

BENCHMARK = "dlrm"
LR_DECAY_START_STEPS = "lr_decay_start_steps"
SGD_BASE_LEARNING_RATE = "sgd_opt_base_learning_rate"
SGD_DECAY_POLY_POWER = "sgd_opt_learning_rate_decay_poly_power"
SGD_DECAY_STEPS = "sgd_opt_learning_rate_decay_steps"
"""What the rulesets want of the schedule, and the package has no constants for."""


class MlperfLog(AppendedLog):
    """Writes ``mlperf.log``.

    What a resumed run had logged up to its checkpoint stays, and the log goes on as if there had
    been no interruption, but for ``init_checkpoint_step``, which tells of it.

    Args:
        path: The file.
        size: What of the file to keep, in bytes; 0: it is made anew.
        began: When the run began to set itself up, in seconds since 1970.
    """

    def __init__(self, path: Path, size: int, began: float) -> None:
        super().__init__(path, size)
        self._lines = _Lines()
        events = logging.Logger("dlrm.mlperf")  # of its own: nothing else hears what it is told
        events.addHandler(self._lines)
        # The place of an event in our source is logged without the folder it is installed in.
        source = Path(__file__).parents[2]
        self._log = MLLogger(events, default_stack_offset=2, root_dir=re.escape(str(source)))
        self._steps_per_epoch = 0
        self._position = Position()
        self._size_before_evaluation: int | None = None
        self._epoch: int | None = None  # the pass that has begun and not ended, counted from 0
        self._is_running = False
        self._goes_on = self.size > 0
        if not self._goes_on:
            milliseconds = int(began * 1000)
            # A submission clears the system's caches first. Nobody here does.
            self._event(keys.CACHE_CLEAR, False, time_ms=milliseconds)
            self._start(keys.INIT_START, time_ms=milliseconds)

    @property
    def size(self) -> int:
        """Bytes that belong to a checkpoint of this moment.

        An evaluation that has begun is not among them: whoever resumes begins it again.
        """
        size = self._size_before_evaluation
        return super().size if size is None else size

    def on_start(self, start: Start) -> None:
        """Log who submits and how training is set up; of a resumed run, that it goes on."""
        self._steps_per_epoch = start.steps_per_epoch
        self._position = position = start.position
        self._is_running = True
        if start.resumed and self._goes_on:
            if position.step:
                self._epoch = position.epoch
            self._event(keys.INIT_CHECKPOINT_STEP, position.total_steps)
            return
        config = start.config
        self._log_submission(config)
        self._event(keys.SEED, config.seed)
        self._event(keys.GLOBAL_BATCH_SIZE, config.step_rows)
        self._event(keys.GRADIENT_ACCUMULATION_STEPS, config.accumulate_batches)
        self._log_optimizer(config.optimizer)
        if position.total_steps:
            self._event(keys.INIT_CHECKPOINT_STEP, position.total_steps)
        else:
            self._log_initial_weights(config)
        self._end(keys.INIT_STOP)
        self._start(keys.RUN_START)
        self._event(keys.TRAIN_SAMPLES, start.train_rows)
        self._event(keys.EVAL_SAMPLES, start.evaluation_rows)

    def on_pass_start(self, position: Position) -> None:
        """Log the end of the pass before, and that this one begins, unless it goes on."""
        if self._epoch == position.epoch:
            return
        self._end_pass()
        self._epoch = position.epoch
        number = position.epoch + 1
        metadata = {keys.FIRST_EPOCH_NUM: number, keys.EPOCH_COUNT: 1}
        self._start(keys.BLOCK_START, metadata=metadata)
        self._start(keys.EPOCH_START, metadata={keys.EPOCH_NUM: number})

    def on_step(self, position: Position, samples: int) -> None:
        """Note how far training has come."""
        self._position = position

    def on_evaluation_start(self, position: Position, steps_per_epoch: int) -> None:
        """Log that an evaluation begins."""
        self._size_before_evaluation = self.size
        self._start(keys.EVAL_START, metadata=self._at(position))

    def on_evaluation(self, evaluation: Evaluation) -> None:
        """Log the AUC, which MLPerf calls this benchmark's accuracy."""
        metadata = self._at(evaluation.position)
        self._event(keys.EVAL_ACCURACY, evaluation.metrics.auc, metadata=metadata)
        self._end(keys.EVAL_STOP, metadata=metadata)
        self._size_before_evaluation = None

    def on_stop(self, stop: Stop) -> None:
        """Log that the run has ended, with success where a target was reached."""
        self._end_run(keys.SUCCESS if stop.target_reached else keys.ABORTED)

    def on_error(self, error: BaseException) -> None:
        """Log that the run was aborted, if it had not ended."""
        if self._is_running:
            self._end_run(keys.ABORTED)

    def _log_submission(self, config: TrainConfig) -> None:
        tracking = config.tracking
        self._event(keys.SUBMISSION_BENCHMARK, BENCHMARK)
        self._event(keys.SUBMISSION_ORG, tracking.mlperf_submission_org)
        self._event(keys.SUBMISSION_DIVISION, tracking.mlperf_submission_division)
        self._event(keys.SUBMISSION_STATUS, tracking.mlperf_submission_status)
        self._event(keys.SUBMISSION_PLATFORM, tracking.mlperf_submission_platform)

    def _log_optimizer(self, config: OptimizerConfig) -> None:
        self._event(keys.OPT_NAME, config.optimizer)
        self._event(keys.OPT_BASE_LR, config.learning_rate)
        self._event(keys.OPT_LR_WARMUP_STEPS, config.warmup_steps)
        self._event(LR_DECAY_START_STEPS, config.decay_start_step)
        if config.optimizer == "sgd":
            self._event(SGD_BASE_LEARNING_RATE, config.learning_rate)
            self._event(SGD_DECAY_POLY_POWER, 2)
            self._event(SGD_DECAY_STEPS, config.decay_steps)
        else:
            self._event(keys.OPT_LR_DECAY_STEPS, config.decay_steps)
            self._event(keys.OPT_ADAGRAD_LR_DECAY, 0)
            self._event(keys.OPT_ADAGRAD_INITIAL_ACCUMULATOR_VALUE, 0)
            self._event(keys.OPT_ADAGRAD_EPSILON, EPSILON)

    def _log_initial_weights(self, config: TrainConfig) -> None:
        """Log that each tensor was drawn, under the names that the ruleset lists."""
        sizes = config.model
        names = [f"bottom_mlp_dense{1 + i}" for i in range(len(sizes.dense_arch_layer_sizes))]
        names += [f"top_mlp_dense{1 + i}" for i in range(len(sizes.over_arch_layer_sizes))]
        for name in ("embeddings", *names):
            self._event(keys.WEIGHTS_INITIALIZATION, metadata={"tensor": name})

    def _at(self, position: Position) -> dict[str, float]:
        """Return the metadata of an evaluation."""
        epoch = 1 + position.epoch + position.step / self._steps_per_epoch
        return {keys.EPOCH_NUM: epoch, keys.STEP_NUM: position.total_steps}

    def _end_pass(self) -> None:
        if self._epoch is None:
            return
        number = self._epoch + 1
        self._epoch = None
        self._end(keys.EPOCH_STOP, metadata={keys.EPOCH_NUM: number})
        self._end(keys.BLOCK_STOP, metadata={keys.FIRST_EPOCH_NUM: number})

    def _end_run(self, status: str) -> None:
        self._is_running = False
        self._end_pass()
        metadata = {keys.STATUS: status} | self._at(self._position)
        self._end(keys.RUN_STOP, metadata=metadata)

    def _event(self, key: str, value: object = None, **options: Any) -> None:
        self._log.event(key, value, **options)
        self._write_lines()

    def _start(self, key: str, **options: Any) -> None:
        self._log.start(key, **options)
        self._write_lines()

    def _end(self, key: str, **options: Any) -> None:
        self._log.end(key, **options)
        self._write_lines()

    def _write_lines(self) -> None:
        # Not from within the package, which takes an error of the disk for one of its own.
        for line in self._lines.taken():
            self._append(line.encode())


class _Lines(logging.Handler):
    """Keeps what the package logs until it is taken."""

    def __init__(self) -> None:
        super().__init__()
        self._kept: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        assert record.levelno == logging.INFO, record.getMessage()
        self._kept.append(record.getMessage())

    def taken(self) -> list[str]:
        kept, self._kept = self._kept, []
        return kept
