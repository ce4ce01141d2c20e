from __future__ import annotations

import json
import math
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dlrm.cli import main
from dlrm.config import BenchServeConfig
from dlrm.errors import UserError
from dlrm.loadtest import bench
from dlrm.loadtest.bench import BenchServeResult, Point, summary
from dlrm.loadtest.client import ANSWERED, FAILED, REFUSED, Outcome
from dlrm.loadtest.picture import refuse_format
from dlrm.loadtest.server import OwnServer, Server, listening, server_at


def outcome(latencies_ms: list[float], *, status: list[int] | None = None) -> Outcome:
    count = len(latencies_ms)
    due = np.arange(count) / 100
    return Outcome(
        due=due,
        sent=due + 0.0005,
        answered=due + np.array(latencies_ms) / 1000,
        status=np.array(status or [ANSWERED] * count, np.int8),
        rows=np.full(count, 3),
        cpu_seconds=0.5,
        seconds=2.0,
        failures=Counter(),
    )


def test_percentiles_are_of_all_that_was_offered() -> None:
    latencies = [float(number) for number in range(100, 0, -1)]  # 100 ms … 1 ms
    point = summary(outcome(latencies), 100, 1.0, 1.5)
    assert (point.p50_ms, point.p90_ms, point.p99_ms) == pytest.approx((50, 90, 99))
    assert point.holds(99.0001)
    assert not point.holds(98.9)
    assert (point.client_cores, point.server_cores) == (0.25, 1.5)
    assert point.late_p99_ms == pytest.approx(0.5)
    # All were due before 1 s, and answered in it but the last ones: 99 at 990 ms + 1 ms, …
    assert (
        point.rows_per_second == 3 * (np.arange(100) / 100 + np.array(latencies) / 1e3 <= 1).sum()
    )


def test_a_refused_or_failed_request_was_answered_within_no_limit() -> None:
    status = [ANSWERED] * 98 + [REFUSED, FAILED]
    point = summary(outcome([5.0] * 100, status=status), 100, 1.0)
    assert (point.p50_ms, point.p90_ms) == pytest.approx((5, 5))
    assert point.p99_ms is None
    assert not point.holds(1e9)
    assert (point.refused, point.failed) == (1, 1)
    # One of a hundred may fail.
    point = summary(outcome([5.0] * 100, status=[ANSWERED] * 99 + [REFUSED]), 100, 1.0)
    assert point.p99_ms == pytest.approx(5)


def test_a_client_that_sends_late_is_told() -> None:
    found = outcome([5.0] * 100)
    assert summary(found, 100, 1.0).kept_up
    late = replace(found, sent=found.due + 0.004)
    assert not summary(late, 100, 1.0).kept_up  # 4 of the 5 ms are the client's
    slow = replace(late, answered=found.due + 0.05)
    assert summary(slow, 100, 1.0).kept_up  # 4 of 50
    never = replace(found, sent=np.where(np.arange(100) < 50, found.sent, np.nan))
    assert summary(never, 100, 1.0).late_p99_ms > 1000


class Queue(bench._Measure):
    """A server whose p99 is 10 ms / (1 - rate / 1000), as a queue's would be."""

    def __init__(self, config: BenchServeConfig, *, longer: float = 1.0) -> None:
        self._config = config
        self._longer = longer
        self.offered: list[tuple[float, float]] = []

    def at(self, rate: float, seconds: float) -> Point:
        self.offered.append((rate, seconds))
        is_long = seconds == self._config.confirm_seconds
        p99 = 10 / (1 - rate / 1000) if rate < 1000 else math.inf
        p99 *= self._longer if is_long else 1
        return replace(POINT, rate=rate, rows_per_second=270 * rate,
                       p99_ms=p99 if p99 < math.inf else None)  # fmt: skip


POINT = summary(outcome([5.0]), 1000, 1.0)
OFFLINE = replace(POINT, rate=1000, rows_per_second=270_000)


def test_the_highest_rate_within_a_limit_is_found() -> None:
    queue = Queue(BenchServeConfig())
    points = queue.rising(OFFLINE)
    assert [point.rate for point in points] == pytest.approx([100 * n for n in range(1, 11)])
    held = queue.held(30, points, OFFLINE)
    # 10 / (1 - r) = 30 where r is 2/3: between 600 and 700, halved three times.
    assert held.point is not None
    assert held.point.rate == pytest.approx(662.5)
    assert held.share_of_offline == pytest.approx(0.6625)
    assert queue.offered[-1] == (pytest.approx(662.5), 60.0)
    assert len(points) == 13  # what was tried on the way is in the picture too
    assert queue.held(60, points, OFFLINE).point.rate == pytest.approx(825)  # 833 is the limit


def test_a_rate_that_a_longer_run_does_not_confirm_is_lowered() -> None:
    queue = Queue(BenchServeConfig(), longer=1.2)
    held = queue.held(30, queue.rising(OFFLINE), OFFLINE)
    # 12 / (1 - r) = 30 where r is 0.6.
    assert held.point is not None
    assert held.point.rate == pytest.approx(662.5 * 0.9)
    hopeless = Queue(BenchServeConfig(), longer=10)
    assert hopeless.held(30, hopeless.rising(OFFLINE), OFFLINE).point is None
    assert len([1 for _, seconds in hopeless.offered if seconds == 60]) == 8


def test_a_disturbance_at_a_low_rate_does_not_end_the_search() -> None:
    queue = Queue(BenchServeConfig())
    points = queue.rising(OFFLINE)
    points[1] = replace(points[1], p99_ms=500.0)  # at 200 requests/s
    assert queue.held(30, points, OFFLINE).point.rate == pytest.approx(662.5)


def test_rates_stop_rising_where_nothing_can_hold() -> None:
    queue = Queue(BenchServeConfig(rates=(999.0, 100.0, 5000.0, 9000.0), limits_ms=(20.0,)))
    assert [point.rate for point in queue.rising(OFFLINE)] == [100, 999]
    assert queue.held(5, queue.rising(OFFLINE), OFFLINE).point is None


def test_options_that_mean_nothing_are_refused() -> None:
    for options, message in (
        ({"seconds": 0.0}, "--seconds must be a positive number"),
        ({"rates": (0.0,)}, "--rates must be positive"),
        ({"limits_ms": ()}, "--limits-ms: name at least one"),
        ({"clients": 0}, "--clients must be at least 1"),
        ({"user_share": 1.5}, "--user-share must be in 0 … 1"),
        ({"url": "http://x", "server_options": "--workers 2"}, "--server-options are for"),
    ):
        with pytest.raises(UserError, match=message):
            BenchServeConfig(**options)


@pytest.fixture
def few_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "_REQUESTS", {"server": 40, "single": 300})
    monkeypatch.setattr(bench, "_WARM_UP_SECONDS", 0.1)


@pytest.mark.usefixtures("few_requests")
@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_a_server_is_measured(
    served: Server,
    small_bundle: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    protocol: str,
) -> None:
    url = f"http://{served.http}"
    picture = tmp_path / "latency.svg"
    words = f"bench serve {small_bundle} --url {url} --grpc-port {served.grpc_port} --json"
    words += f" --protocol {protocol} --scenario single --rates 50 100 --limits-ms 1000"
    words += f" --seconds 0.3 --confirm-seconds 0.4 --picture {picture}"
    with pytest.raises(SystemExit) as ended:
        main(words.split())
    assert ended.value.code == 0
    result = json.loads(capsys.readouterr().out)
    assert [point["rate"] for point in result["points"]] == [50, 100]
    for point in result["points"]:
        assert point["requests"] == pytest.approx(0.3 * point["rate"], abs=25)
        assert (point["failed"], point["refused"]) == (0, 0)
        assert 0 < point["p50_ms"] <= point["p90_ms"] <= point["p99_ms"]
        assert 0 < point["server_cores"] < 3
    assert result["offline"]["rows_per_second"] > 0
    (held,) = result["held"]
    assert held["point"]["rate"] == 100  # no higher one was offered
    assert held["point"]["seconds"] == 0.4
    share = held["point"]["rows_per_second"] / result["offline"]["rows_per_second"]
    assert held["share_of_offline"] == pytest.approx(share)
    assert result["request_rows"] == 1
    text = picture.read_text()
    assert text.startswith("<?xml")


@pytest.mark.usefixtures("few_requests")
def test_samples_are_asked_of_a_server_of_its_own(small_bundle: Path, dataset: Path) -> None:
    config = BenchServeConfig(
        rates=(20.0,), limits_ms=(2000.0,), seconds=0.5, confirm_seconds=0.5,
        server_options="--workers 1 --drain-seconds 0", clients=2, encoding="json",
    )  # fmt: skip
    result = bench.bench_serve(small_bundle, config, dataset)
    assert 200 < result.request_rows < 340
    (point,) = result.points
    assert (point.failed, point.refused) == (0, 0)
    assert 0 < point.server_cores < 3
    assert 0 < point.client_cores < 2
    text = result.table()
    assert f"test rows of {dataset}" in text
    assert "p99 ≤ 2000 ms: 20.0 requests/s" in text


def test_a_server_that_runs_on_this_machine_is_found(served: OwnServer) -> None:
    there = server_at(f"http://localhost:{served.port}", served.grpc_port)
    assert there.pid == served.pid
    before = there.cpu_seconds()
    for _ in range(100):
        there.get("/card")
    assert there.cpu_seconds() > before
    assert listening("127.0.0.1", 9) is None
    assert listening("192.0.2.1", served.port) is None  # which no machine has
    assert math.isnan(Server("192.0.2.1", 80, 0).cpu_seconds())


def test_processor_time_that_is_not_known_has_no_column() -> None:
    points = [replace(POINT, server_cores=cores) for cores in (1.25, None)]
    known, unknown = (
        BenchServeResult(
            point, 4, [point], [], "rows", 1e3, 2, BenchServeConfig(), {"cores": 2}, {"torch": "2"}
        ).table()
        for point in points
    )
    assert re.search(r"client  server\n.* 0\.25    1\.25\n", known)
    assert re.search(r"client\n.* 0\.25\n", unknown)
    assert "the server's is not to be seen from here" in unknown


def test_a_server_of_another_model_or_none_is_refused(
    served: Server, start_server: Any, small_bundle: Path, tmp_path: Path
) -> None:
    url = f"http://{served.http}"
    with pytest.raises(UserError, match=r"status 404: .*is the model's name right"):
        bench.bench_serve(small_bundle, BenchServeConfig(url=url, model_name="other"))
    with pytest.raises(UserError, match="is not answered as expected"):
        bench.bench_serve(small_bundle, BenchServeConfig(url="http://127.0.0.1:9"))
    with pytest.raises(UserError, match="must be like http://localhost:8000"):
        bench.bench_serve(small_bundle, BenchServeConfig(url="ftp://x"))
    with pytest.raises(UserError, match=r"(?s)dlrm serve did not start: .*missing"):
        start_server(tmp_path / "missing").__enter__()
    with pytest.raises(UserError, match=r"must end in one of \.svg, \.png, \.pdf"):
        refuse_format(tmp_path / "picture.gif")
