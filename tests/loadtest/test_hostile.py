"""A hostile load with good requests among it; ``benchmarks/hostile_load.py`` is the large one."""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
import pytest

from dlrm.loadtest import hostile
from dlrm.loadtest.hostile import HostileLoad, HostileResult
from dlrm.loadtest.server import Server


def test_good_requests_among_hostile_ones_are_answered_right(
    small_bundle: Path, served: Server
) -> None:
    load = HostileLoad(small_bundle, served)
    result = asyncio.run(load.run(600))
    assert result.complaints == []
    assert sum(result.sent.values()) == 600
    good = sum(result.sent[kind] for kind in ("good JSON", "good binary", "good gRPC"))
    assert good > 150
    assert result.good_right + result.good_refused >= good
    assert result.good_right > 0.8 * good
    assert result.largest_difference <= 1e-6
    assert set(result.answers["malformed JSON"]) <= {"400", "503"}
    assert set(result.answers["truncated binary"]) <= {"400", "503"}
    assert served.get("/v2/health/ready") == {"ready": True}
    assert len(result.resident_bytes) == 50
    assert min(result.resident_bytes) > 50e6


def test_a_wrong_answer_is_noticed(small_bundle: Path, served: Server) -> None:
    """What the load takes for right is what the model gives, so others are complained of."""
    load = HostileLoad(small_bundle, served)
    for good in load._good:
        good.probabilities[0] += 2e-6
    result = asyncio.run(load.run(40))
    good = sum(result.sent[kind] for kind in hostile._GOOD_KINDS)
    assert result.complaint_count >= good > 5
    assert "probabilities differ by" in result.complaints[0]


def test_growth_is_that_of_the_second_half() -> None:
    assert HostileResult(resident_bytes=[50, 100, 90, 110]).growth() == pytest.approx(0.1)
    assert HostileResult(resident_bytes=[100, 100, 90, 80]).growth() == pytest.approx(-0.1)
    assert np.isnan(HostileResult().growth())
