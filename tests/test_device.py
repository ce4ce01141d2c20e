import os
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from dlrm import device as device_module
from dlrm.device import (
    autocast,
    available_cores,
    gradient_scaler,
    memory_faults,
    open_device,
    profiler_activities,
    synchronize,
    use_available_cores,
)
from dlrm.errors import EnvironmentFaultError


class StandIn:
    """Plays torch.cuda or torch.npu with two cards."""

    def __init__(self, count: int = 2) -> None:
        self.count = count
        self.chosen: list[int] = []
        self.synchronized: list[torch.device] = []

    def is_available(self) -> bool:
        return self.count > 0

    def device_count(self) -> int:
        return self.count

    def set_device(self, index: int) -> None:
        self.chosen.append(index)

    def synchronize(self, device: torch.device) -> None:
        self.synchronized.append(device)


def test_cpu_uses_the_cores_this_process_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3})
    try:
        assert open_device("cpu", 5) == torch.device("cpu")
        assert torch.get_num_threads() == before  # a library leaves the process as it is
        use_available_cores()
        assert torch.get_num_threads() == available_cores() == 1
    finally:
        torch.set_num_threads(before)


def test_cuda_opens_the_card_of_the_local_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in = StandIn()
    monkeypatch.setattr(torch, "cuda", stand_in)
    device = open_device("cuda", 1)
    assert device == torch.device("cuda", 1)
    assert stand_in.chosen == [1]
    synchronize(device)
    assert stand_in.synchronized == [device]


def test_npu_opens_through_torch_npu(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in = StandIn()
    monkeypatch.setitem(sys.modules, "torch_npu", ModuleType("torch_npu"))
    monkeypatch.setattr(torch, "npu", stand_in, raising=False)
    # PyTorch knows no device type "npu" until torch_npu has registered it.
    monkeypatch.setattr(
        torch, "device", lambda kind, index: SimpleNamespace(type=kind, index=index)
    )
    device = open_device("npu", 1)
    assert (device.type, device.index) == ("npu", 1)
    assert stand_in.chosen == [1]


def test_a_missing_card_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "cuda", StandIn(count=2))
    with pytest.raises(EnvironmentFaultError, match=r"cuda:2 was asked for, but 2 .* visible"):
        open_device("cuda", 2)
    monkeypatch.setattr(torch, "cuda", StandIn(count=0))
    with pytest.raises(EnvironmentFaultError, match=r"no cuda device is visible.*--device cpu"):
        open_device("cuda", 0)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_npu", None)  # import raises ImportError
    with pytest.raises(EnvironmentFaultError, match=r"torch_npu cannot be imported.*CANN"):
        open_device("npu", 0)


def test_synchronizing_the_cpu_does_nothing() -> None:
    synchronize(torch.device("cpu"))


def test_memory_that_runs_out_is_an_environment_fault() -> None:
    with (
        pytest.raises(EnvironmentFaultError, match=r"cannot train: .*Free some memory"),
        memory_faults("train"),
    ):
        torch.empty(2**60)
    with pytest.raises(RuntimeError, match="another"), memory_faults("train"):
        raise RuntimeError("another")


def test_mixed_precision_of_each_device(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, torch.dtype | None]] = []
    monkeypatch.setattr(torch, "autocast", lambda kind, dtype: asked.append((kind, dtype)))
    monkeypatch.setattr(torch.amp, "GradScaler", lambda kind: f"scales on {kind}")
    devices = [SimpleNamespace(type=kind) for kind in ("cpu", "cuda", "npu")]
    for device in devices:
        autocast(device, "O1")  # type: ignore[arg-type]
        with autocast(device, "O0"):  # type: ignore[arg-type]
            pass
    assert asked == [("cpu", torch.bfloat16), ("cuda", torch.float16), ("npu", torch.float16)]
    scalers = [gradient_scaler(device, "O1") for device in devices]  # type: ignore[arg-type]
    assert scalers == [None, "scales on cuda", "scales on npu"]
    assert [gradient_scaler(device, "O0") for device in devices] == [None] * 3  # type: ignore[arg-type]


def test_a_profiler_records_what_a_device_lets_it() -> None:
    cpu, cuda = torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA
    recorded = [
        profiler_activities(SimpleNamespace(type=kind))  # type: ignore[arg-type]
        for kind in ("cpu", "cuda", "npu")
    ]
    assert recorded == [[cpu], [cpu, cuda], [cpu]]


def test_npu_is_waited_for_through_torch_npu(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in = StandIn()
    monkeypatch.setitem(sys.modules, "torch_npu", ModuleType("torch_npu"))
    monkeypatch.setattr(torch, "npu", stand_in, raising=False)
    device = SimpleNamespace(type="npu", index=0)
    synchronize(device)  # type: ignore[arg-type]
    assert stand_in.synchronized == [device]


@pytest.mark.parametrize("version", [1, 2])
def test_available_memory_is_what_the_machine_and_the_cgroup_leave(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: int
) -> None:
    free = device_module.available_memory()
    assert 1 << 20 < free < 1 << 50
    names = {
        1: ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat"),
        2: ("memory.max", "memory.current", "memory.stat"),
    }[version]
    monkeypatch.setattr(device_module, "_CGROUP", tmp_path)
    (tmp_path / "memory").mkdir()
    for limit, used, expected in ((10**6, 7 * 10**5, 4 * 10**5), (10**6, 3 * 10**6, 0)):
        idle = "total_inactive_file" if version == 1 else "inactive_file"
        for name, content in zip(names, (limit, used, f"file 5\n{idle} 100000"), strict=True):
            (tmp_path / name).write_text(f"{content}\n")
        assert device_module.available_memory() == expected
    (tmp_path / names[0]).write_text("max\n")
    assert device_module.available_memory() > 10**6
