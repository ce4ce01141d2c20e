"""The one place that knows what devices there are and can do: cpu, cuda (NVIDIA), npu (Ascend).

Run on a CUDA card, with plain operators; not on NPU hardware yet, which stand-ins play in tests.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Literal

import torch

from dlrm.config import Amp, DeviceKind
from dlrm.errors import EnvironmentFaultError


@dataclass(frozen=True)
class MixedPrecision:
    """How a kind of device computes under ``--amp O1``."""

    dtype: torch.dtype
    """What matrices are multiplied in."""
    scales_gradients: bool
    """Whether gradients are scaled up, so that small ones do not vanish."""


# bfloat16 has float32's range of exponents, so that nothing vanishes; float16 has not.
_MIXED_PRECISION: Mapping[str, MixedPrecision] = {
    "cpu": MixedPrecision(torch.bfloat16, scales_gradients=False),
    "cuda": MixedPrecision(torch.float16, scales_gradients=True),
    "npu": MixedPrecision(torch.float16, scales_gradients=True),
}


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
    if not count:
        raise EnvironmentFaultError(f"no {kind} device is visible. Use --device cpu.")
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
        _backend_of(device).synchronize(device)


def random_state(device: torch.device) -> tuple[bytes, ...]:
    """Return the state of the generators that training on a device draws from."""
    states = [torch.get_rng_state()]
    if device.type != "cpu":
        states.append(_backend_of(device).get_rng_state(device))
    return tuple(state.numpy().tobytes() for state in states)


def set_random_state(device: torch.device, states: Sequence[bytes]) -> None:
    """Take over what ``random_state`` returned."""
    tensors = [torch.frombuffer(bytearray(state), dtype=torch.uint8) for state in states]
    torch.set_rng_state(tensors[0])
    if device.type != "cpu" and len(tensors) > 1:
        _backend_of(device).set_rng_state(tensors[1], device)


def autocast(device: torch.device, amp: Amp) -> AbstractContextManager[object]:
    """Return a context in which a model's forward pass computes as ``--amp`` asks for."""
    if amp == "O0":
        return nullcontext()
    return torch.autocast(device.type, _MIXED_PRECISION[device.type].dtype)


def gradient_scaler(device: torch.device, amp: Amp) -> torch.amp.GradScaler | None:
    """Return what scales the loss and unscales its gradients, or None where that is not needed."""
    if amp == "O0" or not _MIXED_PRECISION[device.type].scales_gradients:
        return None
    return torch.amp.GradScaler(device.type)


def fused_tables_location(device: torch.device) -> Literal["HOST", "DEVICE"] | None:
    """Return where fbgemm keeps the tables of a device, in its words; None: it is not used there.

    fbgemm runs on a CPU too, where our own operators are faster.
    """
    return "DEVICE" if device.type == "cuda" else None


def profiler_activities(device: torch.device) -> list[torch.profiler.ProfilerActivity]:
    """Return what ``torch.profiler`` can record; of an NPU, the host's side alone."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    return activities


def use_available_cores() -> None:
    """Compute on as many threads as there are cores for this process.

    PyTorch's own choice looks at the CPU affinity but not at the cgroup's quota. This changes the
    whole process, so it is for a program to call and not for a library.
    """
    torch.set_num_threads(available_cores())


@contextmanager
def lone_threads(count: int, *, alone: bool = True) -> Iterator[ThreadPoolExecutor]:
    """Make threads in each of which PyTorch's operators compute without others.

    What is not begun yet when the context ends is not done.

    Args:
        count: How many.
        alone: False: as elsewhere, with as many as PyTorch takes.
    """
    before = torch.get_num_threads()
    threads = 1 if alone else before
    with ThreadPoolExecutor(
        count, "dlrm-lone", initializer=torch.set_num_threads, initargs=(threads,)
    ) as pool:
        try:
            yield pool
        finally:
            pool.shutdown(cancel_futures=True)
            # Each thread has a number of its own, but one that starts takes the last that was set.
            torch.set_num_threads(before)


def available_cores() -> int:
    """Return how many cores this process may use: its CPU affinity and cgroup quota, at least 1."""
    cores = len(os.sched_getaffinity(0))
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
    except (OSError, ValueError):
        return cores
    return cores if quota == "max" else max(1, min(cores, int(quota) // int(period)))


def available_memory() -> int:
    """Return how many bytes this process could still take: what is free, or its cgroup's rest."""
    try:
        meminfo = Path("/proc/meminfo").read_text()
    except OSError:  # not Linux: as if there was none
        return 0
    available = 1024 * int(meminfo.split("MemAvailable:")[1].split()[0])
    for folder, limit, used, idle in _CGROUPS:
        try:
            rest = int((_CGROUP / folder / limit).read_text())
            rest -= int((_CGROUP / folder / used).read_text())
            # Pages of files that were not used lately are given up when memory is asked for.
            lines = (_CGROUP / folder / "memory.stat").read_text().splitlines()
            rest += int(dict(line.split() for line in lines)[idle])
        except (OSError, ValueError, KeyError):  # another version, or no limit
            continue
        available = min(available, rest)
    return max(0, available)


_CGROUP = Path("/sys/fs/cgroup")
_CGROUPS = (
    ("", "memory.max", "memory.current", "inactive_file"),
    ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)
"""Of either version: the folder, the files of the limit and of what is used, a row of the rest."""


def _backend_of(device: torch.device) -> ModuleType:
    return _backend("cuda" if device.type == "cuda" else "npu")


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
