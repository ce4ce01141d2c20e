"""The one place that knows which devices there are: cpu, cuda (NVIDIA), npu (Ascend).

Not run on CUDA or NPU hardware yet; tested through stand-ins.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import torch

from dlrm.config import DeviceKind
from dlrm.errors import EnvironmentFaultError


def open_device(kind: DeviceKind, local_rank: int = 0) -> torch.device:
    """Return a device that is really there.

    Args:
        kind: Which kind of device.
        local_rank: Which card of that kind; ignored for cpu.

    Raises:
        EnvironmentFaultError: The device, or the package that drives it, is missing.
    """
    if kind == "cpu":
        return torch.device("cpu")
    backend = _backend(kind)
    count = backend.device_count() if backend.is_available() else 0
    if local_rank >= count:
        raise EnvironmentFaultError(
            f"device {kind}:{local_rank} was asked for, but {count} such devices are visible. "
            "Choose a --local-rank that is there, or --device cpu."
        )
    backend.set_device(local_rank)
    return torch.device(kind, local_rank)


@contextmanager
def memory_faults(action: str) -> Iterator[None]:
    """Turn PyTorch's failure to allocate memory into an EnvironmentFaultError naming the action."""
    try:
        yield
    except RuntimeError as error:  # of which torch.OutOfMemoryError is one
        if "can't allocate memory" not in str(error) and "out of memory" not in str(error):
            raise
        raise EnvironmentFaultError(
            f"cannot {action}: {str(error).splitlines()[0]}. Free some memory, or use a smaller "
            "embedding dimension, batch or --max-ind-range."
        ) from error


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was asked to; needed before reading a clock."""
    if device.type != "cpu":
        _backend("cuda" if device.type == "cuda" else "npu").synchronize(device)


def use_available_cores() -> None:
    """Compute on as many threads as there are cores for this process.

    PyTorch's own choice looks at the CPU affinity but not at the cgroup's quota. This changes the
    whole process, so it is for a program to call and not for a library.
    """
    torch.set_num_threads(available_cores())


def available_cores() -> int:
    """Return how many cores this process may use: its CPU affinity and cgroup quota, at least 1."""
    cores = len(os.sched_getaffinity(0))
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
    except (OSError, ValueError):
        return cores
    return cores if quota == "max" else max(1, min(cores, int(quota) // int(period)))


def _backend(kind: DeviceKind) -> ModuleType:
    if kind == "npu":
        try:
            importlib.import_module("torch_npu")  # registers torch.npu
        except ImportError as error:
            raise EnvironmentFaultError(
                "device npu was asked for, but the package torch_npu cannot be imported "
                f"({error}). Install the torch_npu that matches torch {torch.__version__} and "
                "Ascend's CANN, or choose --device cpu."
            ) from error
    backend: ModuleType = getattr(torch, kind)
    return backend
