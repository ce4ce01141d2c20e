"""Client processes against a server in this process that does what a test asks."""

from __future__ import annotations

import asyncio
import platform
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from dlrm.loadtest.client import (
    ANSWERED,
    FAILED,
    REFUSED,
    Clients,
    OpenLoop,
    Payloads,
    Target,
    arrivals,
)

BODY = b"x" * 100
ANSWERS = {
    status: b"HTTP/1.1 %d Some\r\nContent-Length: %d\r\n\r\n%b" % (status, len(BODY), BODY)
    for status in (200, 500, 503)
}


@contextmanager
def serving(answer: Callable[[int], bytes]) -> Iterator[int]:
    """Serve on a port; the n-th request gets what ``answer`` gives, which may block everybody."""
    count = 0

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal count
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                await reader.readexactly(int(head.rpartition(b": ")[2]))
                content = answer(count)
                count += 1
                writer.write(content)
                if not content:
                    writer.close()
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    loop = asyncio.new_event_loop()
    server = loop.run_until_complete(asyncio.start_server(connected, "127.0.0.1", 0, backlog=1000))
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    yield server.sockets[0].getsockname()[1]

    async def close() -> None:
        server.close()
        for task in asyncio.all_tasks() - {asyncio.current_task()}:
            task.cancel()
        await asyncio.sleep(0.01)

    asyncio.run_coroutine_threadsafe(close(), loop).result()
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


@pytest.fixture
def requests(tmp_path: Path) -> Payloads:
    """Two requests, of 3 and 5 rows."""
    parts = [b"POST / HTTP/1.1\r\nContent-Length: %d\r\n\r\n" % n + b"y" * n for n in (3000, 70000)]
    (tmp_path / "requests").write_bytes(b"".join(parts))
    ends = np.cumsum([len(part) for part in parts])
    return Payloads(tmp_path / "requests", ends, np.array([3, 5]))


def test_latency_counts_from_when_a_request_was_due(requests: Payloads) -> None:
    """A server that stands still once makes all late that were due meanwhile, not one alone."""
    stall = 0.5

    def answer(number: int) -> bytes:
        if number == 50:
            time.sleep(stall)
        return ANSWERS[200]

    with (
        serving(answer) as port,
        Clients(1, Target("http", "127.0.0.1", port, 300), requests) as all_,
    ):
        outcome = all_.offer(200, 1.5, seed=3)
    assert (outcome.status == ANSWERED).all()
    latency = outcome.answered - outcome.due
    stalled = outcome.due[50]
    for due, took in zip(outcome.due[55:], latency[55:], strict=True):
        if due < stalled + stall - 0.2:
            # Who comes so long after it began waits that much less.
            assert took == pytest.approx(stall - (due - stalled), abs=0.15)
    assert (latency > 0.2).sum() == pytest.approx(200 * 0.3, abs=30)
    assert (outcome.sent >= outcome.due).all()
    assert np.array_equal(outcome.rows, np.resize([3, 5], len(outcome.rows)))


def test_refusals_and_failures_are_told_apart(requests: Payloads) -> None:
    def answer(number: int) -> bytes:
        return (ANSWERS[200], ANSWERS[503], ANSWERS[500], b"", ANSWERS[200])[number % 5]

    with (
        serving(answer) as port,
        Clients(2, Target("http", "127.0.0.1", port, 50), requests) as all_,
    ):
        outcome = all_.offer(400, 0.5, seed=1)
    count = len(outcome.status)
    assert count == pytest.approx(200, abs=50)
    assert (outcome.status == REFUSED).sum() == pytest.approx(count / 5, abs=1)
    assert (outcome.status == FAILED).sum() == pytest.approx(2 * count / 5, abs=1)
    assert outcome.failures.keys() == {
        f"status 500: {BODY.decode()}",
        "the connection was closed before the answer",
    }


def test_an_answer_that_is_too_short_is_a_failure(requests: Payloads) -> None:
    short = b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n"
    long = Payloads(requests.file, requests.ends, np.array([3, 5000]))
    with serving(lambda number: short) as port:
        with Clients(1, Target("http", "127.0.0.1", port, 5), long) as all_:
            outcome = all_.saturate(1, 0.2)
    assert set(outcome.status[outcome.rows == 5000]) == {FAILED}
    assert set(outcome.status[outcome.rows == 3]) == {ANSWERED}


def test_a_saturating_load_keeps_as_many_under_way_as_it_is_told(requests: Payloads) -> None:
    under_way: list[float] = []

    def answer(number: int) -> bytes:
        time.sleep(0.01)
        return ANSWERS[200]

    with (
        serving(answer) as port,
        Clients(2, Target("http", "127.0.0.1", port, 50), requests) as all_,
    ):
        outcome = all_.saturate(6, 1.0)
    for moment in np.linspace(0.2, 0.9, 50):
        under_way.append(((outcome.sent <= moment) & (outcome.answered > moment)).sum())
    assert np.median(under_way) == 6
    # Little's law: the rate, times how long each takes, is how many are under way.
    latency = outcome.answered - outcome.due
    rate = len(latency) / outcome.answered.max()
    assert rate * latency.mean() == pytest.approx(6, rel=0.1)
    assert latency.min() >= 0.01  # which the server takes for each


def test_nothing_that_listens_is_a_failure(requests: Payloads) -> None:
    with serving(lambda number: b"") as port:
        pass
    with Clients(1, Target("http", "127.0.0.1", port, 5), requests) as all_:
        outcome = all_.offer(50, 0.2, seed=1)
    assert (outcome.status == FAILED).all()
    assert all("cannot connect" in failure for failure in outcome.failures)


def test_arrivals_are_poisson() -> None:
    times = arrivals(OpenLoop(rate=500, seconds=100, seed=4))
    assert len(times) == pytest.approx(50_000, abs=4 * np.sqrt(50_000))
    gaps = np.diff(times)
    assert gaps.min() >= 0
    assert times[-1] < 100
    # Of an exponential distribution, the standard deviation is the mean, and 1/e exceed it.
    assert gaps.std() / gaps.mean() == pytest.approx(1, abs=0.02)
    assert (gaps > gaps.mean()).mean() == pytest.approx(np.exp(-1), abs=0.01)
    counts = np.bincount((times * 10).astype(int))
    assert counts.var() / counts.mean() == pytest.approx(1, abs=0.2)
    assert np.array_equal(times, arrivals(OpenLoop(500, 100, 4)))
    assert not np.array_equal(times[:100], arrivals(OpenLoop(500, 100, 5))[:100])


def test_a_client_asks_for_short_turns() -> None:
    kernel = tuple(int(each) for each in re.findall(r"\d+", platform.release())[:2])
    if kernel < (6, 12) or "se.slice" not in Path("/proc/self/sched").read_text():
        pytest.skip("this kernel tells of no turns, or cannot change them")
    asks = (
        "import os; from dlrm.loadtest.client import ask_for_short_turns; os.nice(3); "
        "ask_for_short_turns(); print(open('/proc/self/sched').read(), os.nice(0))"
    )
    command = [sys.executable, "-c", asks]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert re.search(r"se\.slice\s+:\s+100000\n", told)
    assert told.split()[-1] == "3"
