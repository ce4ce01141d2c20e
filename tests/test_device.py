import os
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from dlrm.device import (
    available_cores,
    memory_faults,
    open_device,
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
    with pytest.raises(EnvironmentFaultError, match=r"cuda:0 .* but 0 such.*--device cpu"):
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
