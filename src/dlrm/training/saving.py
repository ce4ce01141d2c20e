"""What an exact resume takes: a RUN's checkpoints by step, and beside each how far it had come.

``step-000001000.safetensors`` is the same for equal runs. ``step-000001000.json`` is written after
it and names its checksum; only then the checkpoint counts. ``newest.safetensors`` and
``best.safetensors`` are further names of two of them, for whoever evaluates or predicts.
"""

from __future__ import annotations

import hashlib
import logging
import re
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Self

import msgspec
import torch
from torch import Tensor

from dlrm.checkpoint import CheckpointInfo, Position, save_checkpoint, verify
from dlrm.config import TrainConfig
from dlrm.device import available_memory
from dlrm.errors import EnvironmentFaultError, UserError
from dlrm.files import (
    FORMAT_VERSION,
    atomic_write,
    check_version,
    environment_faults,
    link_or_copy,
)
from dlrm.model.dlrm import DLRM
from dlrm.ops.library import advise_huge_pages
from dlrm.training.meter import Metered
from dlrm.training.optimizer import Optimizer

logger = logging.getLogger("dlrm")

Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class Progress:
    """How far a run had come when a checkpoint was saved, beside what the checkpoint says."""

    position: Position
    config: TrainConfig
    first_step: int
    """Steps that had been taken before the run began, where it continued another's checkpoint."""
    metered: Metered
    random_state: tuple[bytes, ...]
    """Of PyTorch's generators: the CPU's, and the device's if that is another."""
    best_auc: float | None
    """Of the best evaluation so far; None: there is none."""
    best_step: int | None
    """The steps in all after which the best checkpoint was saved; None: there is none."""
    train_loss: float | None
    """Of the last report; None: there is none."""
    train_samples: int
    """Up to the last report."""
    train_seconds: float
    """Up to the last report."""
    seconds: float
    """Since the run began, interruptions left out."""
    skipped_steps: int
    stopped: str
    """Why training is over; empty: it is not."""
    evaluation_due: bool
    """An evaluation of this step was interrupted."""
    log_bytes: int
    """How much of ``log.jsonl`` belongs to it."""
    machine: dict[str, str | int]
    """Versions and hardware that results depend on bit by bit."""
    mlperf_log_bytes: int = 0
    """How much of ``mlperf.log`` belongs to it, where that is written."""
    checksum: str = ""
    """Of the file with the tensors."""


class _Stored(msgspec.Struct):
    progress: msgspec.Raw
    sha256: str
    """Of ``progress`` as it stands there."""
    format_version: str


class _Best(msgspec.Struct):
    """The part of a progress that says what is kept beside it."""

    best_step: int | None


_LARGEST_PROGRESS = 1 << 20


class Checkpoints:
    """The checkpoints of a RUN.

    Args:
        folder: ``RUN/checkpoints``.
        keep: How many of the newest are kept. The best of its time is kept beside each.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        self._folder = folder
        self._keep = keep

    def tensors_file(self, step: int) -> Path:
        """Return the file with the tensors of a checkpoint."""
        return self._folder / f"step-{step:09}.safetensors"

    def progress_file(self, step: int) -> Path:
        """Return the file with the progress of a checkpoint."""
        return self._folder / f"step-{step:09}.json"

    def steps(self) -> list[int]:
        """Return the steps of all checkpoints, damaged ones included, ascending."""
        names = [path.name for path in self._folder.glob("step-*.json")]
        found = [re.fullmatch(r"step-([0-9]{9,})\.json", name) for name in names]
        return sorted(int(match[1]) for match in found if match)

    def newest_sound(self) -> Progress | None:
        """Return the newest checkpoint that is undamaged, with the best of its time; None: no save.

        Raises:
            UserError: All are damaged.
        """
        faults: dict[int, str] = {}
        lacking: tuple[int, int] | None = None  # the newest whose best is damaged, and that one
        for step in reversed(self.steps()):
            progress = self._read_or_warn(step, faults)
            if progress is None:
                continue
            best = progress.best_step
            if best is None or best == step or self._read_or_warn(best, faults):
                if faults:
                    logger.warning("going on from the checkpoint before, of step %d", step)
                return progress
            lacking = lacking or (step, best)
        if not faults:
            return None
        why, remedy = (
            next(iter(faults.values())),
            (
                "If newest.safetensors there or best.safetensors is undamaged, a new run takes its "
                "weights with --continue-from."
            ),
        )
        if lacking:
            newest, best = lacking
            why = f"{faults[best]} That is the best so far, which an exact result may need."
            path = self.tensors_file(newest)
            remedy = f"A new run takes the newest weights with --continue-from {path}."
        raise UserError(
            f"{self._folder} has no checkpoint left that can be resumed exactly: {why} {remedy}"
        )

    def _read_or_warn(self, step: int, faults: dict[int, str]) -> Progress | None:
        """Read a checkpoint; None, and noted, where it is damaged."""
        if step in faults:
            return None
        try:
            return self.read(step)
        except UserError as error:
            logger.warning("%s", error)
            faults[step] = str(error)
            return None

    def read(self, step: int) -> Progress:
        """Read the progress of a checkpoint, and verify both of its files.

        Raises:
            UserError: One is missing or damaged.
        """
        path = self.progress_file(step)
        try:
            if path.stat().st_size > _LARGEST_PROGRESS:
                raise ValueError(f"it has {path.stat().st_size} bytes")
            stored = msgspec.json.decode(path.read_bytes(), type=_Stored)
            check_version(stored.format_version, path)
            if hashlib.sha256(stored.progress).hexdigest() != stored.sha256:
                raise ValueError("its content does not have the checksum that it names")
            progress = msgspec.json.decode(stored.progress, type=Progress)
        except UserError:
            raise
        except (OSError, ValueError) as error:
            raise UserError(f"{path} is damaged: {error}.") from error
        tensors = self.tensors_file(step)
        if verify(tensors) != progress.checksum or progress.position.total_steps != step:
            raise UserError(f"{path} and {tensors.name} do not belong together: one is damaged.")
        return progress

    def save(
        self,
        tensors: Tensors,
        info: CheckpointInfo,
        progress: Progress,
        flush_log: Callable[[], None],
    ) -> None:
        """Write a checkpoint; ``name`` is what lets the names lead to it.

        Args:
            tensors: Weights and optimizer state.
            info: What the file with the tensors says of itself.
            progress: The rest; its checksum is filled in.
            flush_log: Makes what ``progress.log_bytes`` counts durable.

        Raises:
            UserError: A tensor is not finite.
            EnvironmentFaultError: The disk is full or fails.
        """
        name = first_not_finite(tensors)
        if name is not None:
            raise UserError(
                f"{name} is not finite after {progress.position.total_steps} steps: training has "
                "diverged. Lower --learning-rate, or warm up. What was saved before is kept."
            )
        step = progress.position.total_steps
        checksum = save_checkpoint(self.tensors_file(step), tensors, info)
        try:
            flush_log()
            encoded = msgspec.json.encode(replace(progress, checksum=checksum))
            digest = hashlib.sha256(encoded).hexdigest()
            stored = _Stored(msgspec.Raw(encoded), digest, FORMAT_VERSION)
            with atomic_write(self.progress_file(step)) as file:
                file.write(msgspec.json.encode(stored))
        except EnvironmentFaultError:
            if step not in self.steps():  # it does not count, and takes room
                self._remove(self.tensors_file(step))
            raise

    def name(self, progress: Progress) -> None:
        """Let ``newest`` and ``best`` be names of a checkpoint and of the best of its time.

        Raises:
            EnvironmentFaultError: The disk is full or fails.
        """
        for name, step in (
            ("newest", progress.position.total_steps),
            ("best", progress.best_step),
        ):
            path = self._folder / f"{name}.safetensors"
            if step is not None:
                link_or_copy(self.tensors_file(step), path)
            else:
                self._remove(path)

    def clear(self, newest: int | None) -> None:
        """Remove what an interrupted save left.

        Args:
            newest: The step of the newest sound checkpoint; damaged ones after it stay until
                another is saved.
        """
        if newest is not None:
            self.remove_surplus(newest, after=False)
        steps = set(self.steps())
        for path in self._folder.glob(".*.partial"):
            self._remove(path)
        for path in self._folder.glob("step-*.safetensors"):
            match = re.fullmatch(r"step-([0-9]{9,})\.safetensors", path.name)
            if match and int(match[1]) not in steps:
                self._remove(path)

    def remove_surplus(self, newest: int, *, after: bool = True) -> None:
        """Keep the newest and the best of their times.

        Args:
            newest: The step of the newest sound checkpoint.
            after: Remove those that come after it too, which were damaged, and left.

        Raises:
            EnvironmentFaultError: The disk fails.
        """
        steps = [step for step in self.steps() if after or step <= newest]
        kept = set([step for step in steps if step <= newest][-self._keep :])
        for step in tuple(kept):
            try:
                stored = msgspec.json.decode(self.progress_file(step).read_bytes(), type=_Stored)
                best = msgspec.json.decode(stored.progress, type=_Best).best_step
            except (OSError, ValueError):
                continue  # damaged; whoever resumes is told
            if best is not None:
                kept.add(best)
        for step in set(steps) - kept:
            self._remove(self.progress_file(step))  # first, so that none seems to lack its tensors
            self._remove(self.tensors_file(step))

    def _remove(self, path: Path) -> None:
        with environment_faults(f"remove {path}"):
            path.unlink(missing_ok=True)


def tensors_of(model: DLRM, optimizer: Optimizer) -> dict[str, Tensor]:
    """Return what a checkpoint holds, by name: weights and optimizer state, not copied."""
    tensors = {f"model.{name}": value for name, value in model.state_dict().items()}
    return tensors | {f"optimizer.{name}": value for name, value in optimizer.state().items()}


def first_not_finite(tensors: Tensors) -> str | None:
    """Return the first tensor's name that holds a NaN or an infinity, without its prefix."""
    for name, tensor in tensors.items():
        # In pieces, so that what is computed from one stays in the cache.
        if not all(piece.isfinite().all() for piece in torch.split(tensor.reshape(-1), 1 << 20)):
            return name.removeprefix("model.")
    return None


class Saver:
    """Saves a training's checkpoints, one at a time, while the training goes on.

    At a step's end everything is copied, and a thread writes the copy. Where memory is short of
    that one copy, the training waits instead. A full disk does not end it.

    Leave it as a context, so that no save is cut off and the copy's memory is given back.

    Args:
        checkpoints: Where they go.
        flush_log: Makes the log durable.
        saved_step: The step of the newest checkpoint; None: there is none.

    Attributes:
        saved_step: The same, of what is known to be saved.
        failed: What could not be saved, until the trainer looks.
    """

    def __init__(
        self,
        checkpoints: Checkpoints,
        flush_log: Callable[[], None],
        saved_step: int | None = None,
    ) -> None:
        self._checkpoints = checkpoints
        self._flush_log = flush_log
        self.saved_step = saved_step
        self.failed: list[tuple[Progress, EnvironmentFaultError]] = []
        self._thread: threading.Thread | None = None
        self._outcome: tuple[Progress, BaseException | None] | None = None
        self._unnamed: Progress | None = None  # saved, but newest and best do not lead to it yet
        self._was_short = False
        self._room: Tensors | None = None
        self._touching: threading.Thread | None = None
        self._touched_enough = threading.Event()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            self.settle()
        except UserError:
            if error is None:
                raise
        finally:
            self._stop_touching()
            self._room = None

    def make_room(self, tensors: Tensors) -> None:
        """Take the memory of the copy before the first save is due, while training goes on.

        A page costs most when it is touched for the first time: for Kaggle's tables seconds, for
        which the training would stand still.

        Args:
            tensors: Weights and optimizer state.
        """
        self._room = self._allocate(tensors)
        if self._room is not None:
            self._touching = threading.Thread(
                target=self._touch, args=(self._room,), name="make room"
            )
            self._touching.start()

    def _touch(self, room: Tensors) -> None:
        for tensor in room.values():
            content = tensor.view(-1).view(torch.uint8).numpy()
            for start in range(0, len(content), _TOUCHED_BYTES):
                if self._touched_enough.is_set():
                    return
                content[start : start + _TOUCHED_BYTES : _PAGE_BYTES] = 0

    def _stop_touching(self) -> None:
        if self._touching is not None:
            self._touched_enough.set()
            self._touching.join()
            self._touching = None

    @property
    def is_busy(self) -> bool:
        """Whether a save is being written."""
        return self._thread is not None and self._thread.is_alive()

    def save(
        self, tensors: Tensors, info: CheckpointInfo, progress: Progress, *, wait: bool = False
    ) -> None:
        """Save a checkpoint, after the one that is being written.

        Args:
            tensors: Weights and optimizer state; they may change when this returns.
            info: What the file with the tensors says of itself.
            progress: The rest.
            wait: Return when it is saved.

        Raises:
            UserError: A tensor is not finite, of this checkpoint or the one before.
        """
        self.settle()
        copied = None if wait else self._copy(tensors)
        if copied is None:
            self._write(tensors, info, progress)
            self.settle()
        else:
            self._thread = threading.Thread(
                target=self._write, args=(copied, info, progress), name="save"
            )
            self._thread.start()

    def settle(self) -> None:
        """Wait until nothing is being written, and see how that went.

        Raises:
            UserError: A tensor was not finite.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._outcome is None:
            return
        (progress, error), self._outcome = self._outcome, None
        step = progress.position.total_steps
        if error is None:
            self.saved_step = step
        elif isinstance(error, EnvironmentFaultError):
            self.failed.append((progress, error))
            newest = "none" if self.saved_step is None else f"that of step {self.saved_step}"
            logger.warning(
                "the checkpoint of step %d could not be saved (the newest there is: %s): %s",
                step,
                newest,
                error,
            )
        else:
            raise error

    def name(self) -> EnvironmentFaultError | None:
        """Let the names lead to what is saved, where they do not yet, and remove what is too many.

        Each save does so; if that failed, the checkpoint counts all the same.

        Returns:
            Why it failed, if it did.
        """
        if self._unnamed is None:
            return None
        try:
            self._checkpoints.name(self._unnamed)
            self._checkpoints.remove_surplus(self._unnamed.position.total_steps)
        except EnvironmentFaultError as error:
            return error
        self._unnamed = None
        return None

    def _write(self, tensors: Tensors, info: CheckpointInfo, progress: Progress) -> None:
        error: BaseException | None = None
        try:
            try:
                self._checkpoints.save(tensors, info, progress, self._flush_log)
                self._unnamed = progress
            finally:
                if fault := self.name():
                    logger.warning(
                        "newest and best of the checkpoints do not lead to what is saved yet: %s",
                        fault,
                    )
        except BaseException as caught:
            error = caught
        self._outcome = (progress, error)

    def _copy(self, tensors: Tensors) -> Tensors | None:
        """Copy everything into memory, if there is room for it."""
        self._stop_touching()
        if self._room is None:
            self._room = self._allocate(tensors)
        if self._room is not None:
            for name, tensor in tensors.items():
                self._room[name].copy_(tensor)
        return self._room

    def _allocate(self, tensors: Tensors) -> Tensors | None:
        """Return memory for a copy, not touched yet, if there is room for it."""
        needed = sum(tensor.nbytes for tensor in tensors.values())
        available = available_memory()
        if needed > available - _MEMORY_LEFT:
            if not self._was_short:
                self._was_short = True
                logger.warning(
                    "training waits while checkpoints are written: a copy of %.1f GB does not fit "
                    "into the %.1f GB of memory that are available",
                    needed / 1e9,
                    available / 1e9,
                )
            return None
        room = {}
        for name, tensor in tensors.items():
            room[name] = torch.empty(tensor.shape, dtype=tensor.dtype)
            advise_huge_pages(room[name])
        return room


_MEMORY_LEFT = 256 << 20
"""What a copy leaves to everybody else."""
_TOUCHED_BYTES = 64 << 20
"""Of the copy's memory: what is touched before it is looked whether that is still needed."""
_PAGE_BYTES = 4096
