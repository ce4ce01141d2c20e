"""A trace of some training steps, and what their parts cost."""

from __future__ import annotations

import shutil
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dlrm.checkpoint import Position
from dlrm.device import profiler_activities
from dlrm.errors import UserError
from dlrm.files import atomic_write, environment_faults
from dlrm.model.dlrm import DLRM
from dlrm.trace import recording
from dlrm.training.events import Events, Start, Stop

SKIPPED_STEPS = 20
"""Steps before the recorded ones, in which buffers are made and caches filled."""
RECORDED_STEPS = 30
"""Bounds the size of a trace: some megabytes with plain operators."""

PARTS = {
    "wait for data": "data wait",
    "sparse_arch": "gather",
    "interaction_arch": "interaction",
    "dense_arch": "MLPs",
    "over_arch": "MLPs",
    "loss": "loss",
    "backward": "backward",
    "update": "update",
    # The native kernels, each an operator.
    "dlrm::embed_interact": "gather and interaction",
    "dlrm::to_panels": "MLPs",
    "dlrm::mlp_forward": "MLPs",
    "dlrm::loss_gradient": "loss",
    "dlrm::mlp_backward": "backward, MLPs",
    "dlrm::embed_interact_backward": "backward, interaction",
    "dlrm::mlp_update": "update, MLPs",
    "dlrm::tables_update": "update, tables",
}
"""Ranges of a trace, and the part of a step that each belongs to. No range lies in another."""


class StepProfiler(Events):
    """Records some steps of a training; a listener.

    Args:
        model: Its boxes become ranges of the trace.
        device: Where it computes.
        skip: Steps to let pass first; fewer where the training is too short.
        steps: How many to record.
    """

    def __init__(
        self,
        model: DLRM,
        device: torch.device,
        skip: int = SKIPPED_STEPS,
        steps: int = RECORDED_STEPS,
    ) -> None:
        self._model = model
        self._skip = skip
        self._steps = steps
        self._seen = 0
        self._profile = torch.profiler.profile(activities=profiler_activities(device))
        self._recording: ExitStack | None = None
        self.recorded_steps = 0
        self.recorded_seconds = 0.0

    def on_start(self, start: Start) -> None:
        """Record from the first step on where there are few."""
        steps = start.steps_per_epoch * start.config.epochs
        if start.config.max_steps:
            steps = min(steps, start.config.max_steps)
        if steps - start.position.total_steps < self._skip + self._steps:
            self._skip = 0
            self._begin()

    def on_step(self, position: Position, samples: int) -> None:
        """Begin or end the recording when it is due."""
        if self._recording is not None:
            self.recorded_steps += 1
            if self.recorded_steps == self._steps:
                self.close()
        self._seen += 1
        if self._seen == self._skip:
            self._begin()

    def on_stop(self, stop: Stop) -> None:
        """End a recording that training was too short for."""
        self.close()

    def _begin(self) -> None:
        with ExitStack() as stack:
            stack.enter_context(self._profile)
            stack.enter_context(recording())
            for name, module in self._model.named_children():
                for handle in _range_of(module, name):
                    stack.callback(handle.remove)
            self._recording = stack.pop_all()
        self._since = time.perf_counter()

    def close(self) -> None:
        """End the recording, if it goes on."""
        if self._recording is not None:
            self.recorded_seconds = time.perf_counter() - self._since
            self._recording.close()
            self._recording = None

    def write(self, path: Path) -> None:
        """Write the trace as JSON that Perfetto and chrome://tracing open.

        Args:
            path: Ends in ``.json`` or ``.json.gz``.
        """
        with (
            environment_faults(f"write {path}"),
            tempfile.TemporaryDirectory() as scratch,
        ):
            exported = Path(scratch) / path.name
            self._profile.export_chrome_trace(str(exported))
            with open(exported, "rb") as source, atomic_write(path) as file:
                shutil.copyfileobj(source, file)

    def milliseconds_per_step(self) -> dict[str, float]:
        """Return what each part of a step took, by the names of ``PARTS``."""
        parts: dict[str, float] = {}
        for event in self._profile.key_averages():
            if event.key in PARTS:
                name = PARTS[event.key]
                milliseconds = event.cpu_time_total / 1000 / max(self.recorded_steps, 1)
                parts[name] = parts.get(name, 0.0) + milliseconds
        return {name: parts[name] for name in dict.fromkeys(PARTS.values()) if name in parts}


def trace_file(path: Path, run: Path) -> Path:
    """Return the file that ``--profile`` means: of a folder, ``trace.json`` in it.

    Args:
        path: What was given.
        run: A folder that may be missing yet.

    Raises:
        UserError: It cannot be a trace, or its folder is missing.
    """
    if path.is_dir():
        return path / "trace.json"
    if not path.name.endswith((".json", ".json.gz")):
        raise UserError(
            f"--profile: {path} is neither a folder nor the name of a .json or .json.gz file. "
            "Choose one of these."
        )
    if path.parent != run and not path.parent.is_dir():
        raise UserError(f"--profile: {path.parent} is not a folder. Make it.")
    return path


def _range_of(module: nn.Module, name: str) -> list[Any]:
    """Make every call of a module a range."""
    open_ranges: list[Any] = []

    def enter(module: nn.Module, inputs: Any) -> None:
        open_ranges.append(torch.profiler.record_function(name))
        open_ranges[-1].__enter__()

    def leave(module: nn.Module, inputs: Any, output: Any) -> None:
        open_ranges.pop().__exit__(None, None, None)

    return [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
