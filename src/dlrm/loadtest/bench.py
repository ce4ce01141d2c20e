"""Measures a server under load: how long answers take over how much is asked.

The scenarios are MLPerf inference's. Offline: as much as the server takes, with always more
requests under way than it works on. Server: Poisson arrivals that do not wait for answers, at
rising rates; the figure is the highest rate at which 99 of 100 requests are answered within a
limit. A request that is refused or fails was not answered within any. Both with the same server,
protocol and requests.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from dlrm.bench import made_up_batches
from dlrm.config import BenchServeConfig
from dlrm.data.dataset import Dataset
from dlrm.errors import UserError
from dlrm.loadtest import payloads
from dlrm.loadtest.client import (
    ANSWERED,
    FAILED,
    REFUSED,
    Clients,
    Outcome,
    Payloads,
    Target,
)
from dlrm.loadtest.server import Server, own_server, server_at
from dlrm.progress import progress
from dlrm.runs import hardware, measured_on, versions
from dlrm.schema import FeatureSchema, read_schema

_OUTSTANDING = (4, 16, 64)
"""Requests under way when a server is saturated; the best rate counts."""
_SHARES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
"""Of the saturated rate: the rising rates."""
_WARM_UP_SECONDS = 2.0
_HOPELESS = 5
"""Rates do not rise further when p99 is so many times the highest limit."""
_BISECTIONS = 3
_STEP_DOWN = 0.9
"""To the next rate when a longer run does not confirm one."""
_CONFIRMATIONS = 8
_LATE_MS = 1.0
_LATE_SHARE = 0.1
"""The client kept up when 99 of 100 requests were sent not later than so many milliseconds, or this
share of the 99th percentile, which counts that too."""
_REQUESTS = {"server": 1000, "single": 20_000}
"""Different ones that are made. Of samples, 270,000 rows: their vectors do not fit into caches."""
_HTTP_CONNECTIONS = 512
_GRPC_CONNECTIONS = 4
_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Point:
    """What became of requests that were offered at one rate."""

    rate: float
    """Offered requests a second; of a saturated server, answered ones."""
    rows_per_second: float
    """Answered rows a second."""
    seconds: float
    requests: int
    refused: int
    """For want of room or time (503, 504, 429)."""
    failed: int
    """Answered otherwise, or not at all."""
    p50_ms: float | None
    """From the time a request was due to its answer; None: not even so many were answered."""
    p90_ms: float | None
    p99_ms: float | None
    late_p99_ms: float
    """How long after they were due requests were sent."""
    kept_up: bool
    """Whether that is little."""
    client_cores: float
    """Processor time of the client, a second."""
    server_cores: float | None
    """Of the server; None: it is on another machine, or somebody else's."""
    failures: dict[str, int]
    """What went wrong, and how often."""

    def holds(self, limit_ms: float) -> bool:
        """Tell whether 99 of 100 requests were answered within a limit."""
        return self.p99_ms is not None and self.p99_ms <= limit_ms


@dataclass(frozen=True)
class Held:
    """The highest offered load that keeps a limit."""

    limit_ms: float
    point: Point | None
    """Of the longer run that confirmed it; None: no rate that was tried does."""
    share_of_offline: float | None
    """Its rows a second, of those of the saturated server."""


@dataclass(frozen=True)
class BenchServeResult:
    """What a server reaches."""

    offline: Point
    """Saturated."""
    offline_outstanding: int
    """Requests under way then."""
    points: list[Point]
    """At rising rates."""
    held: list[Held]
    rows: str
    """Where they are from."""
    request_bytes: float
    """The mean."""
    request_rows: float
    """The mean."""
    config: BenchServeConfig
    hardware: dict[str, str | int]
    versions: dict[str, str]

    def table(self) -> str:
        """Return the figures as text."""
        config = self.config
        if self.offline.server_cores is None:
            whose = "client: processor time, in cores (the server's is not to be seen from here)"
        else:
            whose = "client and server: processor time, in cores"
        lines = [
            f"{config.scenario}: {self.request_rows:,.0f} rows and "
            f"{self.request_bytes / 1e3:,.1f} kB a request, {config.protocol}, "
            f"{config.encoding}; {self.rows}",
            measured_on(self.hardware, self.versions),
            "",
            f"saturated, {self.offline_outstanding} requests under way: "
            f"{self.offline.rows_per_second:,.0f} rows/s, {self.offline.rate:,.1f} requests/s",
            "",
            f"{'requests/s':>10}{'rows/s':>10}{'p50 ms':>9}{'p90 ms':>9}{'p99 ms':>9}{'refused':>9}"
            f"{'failed':>8}{'sent late p99':>15}{'client':>8}"
            + ("" if self.offline.server_cores is None else f"{'server':>8}"),
            *map(_line, self.points),
            "",
            f"{whose}; late sending counts in the latencies",
        ]
        for held in self.held:
            if held.point is None:
                lines.append(f"p99 ≤ {held.limit_ms:g} ms: at none of these rates")
                continue
            is_highest = all(point.rate <= held.point.rate for point in self.points)
            lines.append(
                f"p99 ≤ {held.limit_ms:g} ms: {held.point.rate:,.1f} requests/s"
                f"{' or more, no higher rate was offered' if is_highest else ''}, "
                f"{held.point.rows_per_second:,.0f} rows/s, {held.share_of_offline:.0%} of "
                f"saturated (p99 {held.point.p99_ms:.1f} ms over {held.point.seconds:.0f} s)"
            )
        if not all(point.kept_up for point in self.points):
            lines.append(
                "The client did not keep up at rates marked with *: their latencies are partly "
                "its own. Give it cores of its own, or use --clients."
            )
        failures: dict[str, int] = {}
        for point in self.points:
            for what, count in point.failures.items():
                failures[what] = failures.get(what, 0) + count
        lines += [f"failed {count} times: {what}" for what, count in failures.items()]
        return "\n".join(lines) + "\n"


def _line(point: Point) -> str:
    server = "" if point.server_cores is None else f"{point.server_cores:8.2f}"
    late = f"{point.late_p99_ms:.1f} ms{' ' if point.kept_up else '*'}"
    return (
        f"{point.rate:10,.1f}{point.rows_per_second:10,.0f}{_ms(point.p50_ms)}{_ms(point.p90_ms)}"
        f"{_ms(point.p99_ms)}{point.refused:9,}{point.failed:8,}{late:>15}"
        f"{point.client_cores:8.2f}{server}"
    )


def _ms(value: float | None) -> str:
    return f"{'-':>9}" if value is None else f"{value:9.1f}"


def bench_serve(
    model: Path, config: BenchServeConfig, dataset: Path | None = None
) -> BenchServeResult:
    """Measure a server: saturated, then at rising rates, then what it holds.

    Args:
        model: The BUNDLE or RUN that is served.
        config: What to measure.
        dataset: The DATASET whose test rows are asked for; None: rows are made up.

    Raises:
        UserError: The model or the server is not what is expected.
        EnvironmentFaultError: The server does not start, or a client process dies.
    """
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="dlrm-bench-")))
        server = (
            server_at(config.url, config.grpc_port)
            if config.url
            else stack.enter_context(own_server(model, config.model_name, config.server_options))
        )
        requests, rows = make_payloads(model, server, config, dataset, folder / "requests")
        is_http = config.protocol == "http"
        target = Target(
            config.protocol,
            server.host,
            server.port if is_http else server.grpc_port,
            _HTTP_CONNECTIONS if is_http else _GRPC_CONNECTIONS,
        )
        clients = stack.enter_context(Clients(config.clients, target, requests))
        measure = _Measure(server, clients, config)
        outstanding, offline = measure.saturated()
        points = measure.rising(offline)
        held = [measure.held(limit, points, offline) for limit in config.limits_ms]
    return BenchServeResult(
        offline=offline,
        offline_outstanding=outstanding,
        points=sorted(points, key=lambda point: point.rate),
        held=held,
        rows=rows,
        request_bytes=float(requests.ends[-1] / len(requests.ends)),
        request_rows=float(requests.rows.mean()),
        config=config,
        hardware=hardware(_CPU),
        versions=versions(),
    )


def make_payloads(
    model: Path, server: Server, config: BenchServeConfig, dataset: Path | None, file: Path
) -> tuple[Payloads, str]:
    """Write the requests of a scenario into a file; return them, and where their rows are from.

    Args:
        model: The BUNDLE or RUN that is served.
        server: That serves it.
        config: The scenario.
        dataset: Whose test rows are asked for; None: they are made up.
        file: To write.

    Raises:
        UserError: The server does not serve it, or its rows cannot be made.
    """
    schema = read_schema(model, "model")
    described = server.get(f"/v2/models/{config.model_name}")
    accepted = {each["name"] for each in described["inputs"]}
    generator = np.random.default_rng(config.seed)
    count = _REQUESTS[config.scenario]
    sizes = np.ones(count, np.int64)
    if config.scenario == "server":
        sizes = payloads.sample_sizes(count, generator)
    inputs: Iterator[list[payloads.Tensor]]
    features = {each.name for each in schema.dense} | {each.name for each in schema.sparse}
    if features <= accepted:
        rows, origin = _raw_rows(model, schema, dataset, int(sizes.sum()), generator)
        ends = np.cumsum(sizes)
        inputs = (
            payloads.tensors(schema, rows[end - size : end], config.user_share)
            for end, size in zip(ends.tolist(), sizes.tolist(), strict=True)
        )
    elif {"dense_features", "sparse_features"} <= accepted:
        origin = "made-up prepared rows, because the model takes no raw ones"
        batches = (next(made_up_batches(schema, size, seed=config.seed + number))
                   for number, size in enumerate(sizes.tolist()))  # fmt: skip
        inputs = map(payloads.prepared_tensors, batches)
    else:
        raise UserError(
            f"the server's {config.model_name} takes {', '.join(sorted(accepted))}; expected the "
            f"features of {model}. Name the model that it serves."
        )
    requests: Iterator[bytes]
    if config.protocol == "grpc":
        requests = (payloads.grpc_request(each, config.model_name, config.encoding)
                    for each in inputs)  # fmt: skip
    else:
        requests = (payloads.http_request(each, config.model_name, server.http, config.encoding)
                    for each in inputs)  # fmt: skip
    bar = progress("requests", count, requests, unit="requests")
    return payloads.write_payloads(file, iter(bar), sizes), origin


def _raw_rows(
    model: Path,
    schema: FeatureSchema,
    dataset: Path | None,
    count: int,
    generator: np.random.Generator,
) -> tuple[payloads.PayloadRows, str]:
    if dataset is None:
        rows = payloads.made_up_rows(schema, model, count, generator)
        return rows, "made-up rows whose values are as frequent as in the model's vocabularies"
    data = Dataset.open(dataset)
    if data.schema.fingerprint != schema.fingerprint:
        raise UserError(
            f"{data.path} is not the DATASET that {model} was trained on: its fingerprint is "
            f"{data.schema.fingerprint}, expected {schema.fingerprint}. Name the right one with "
            "--dataset, or leave that away."
        )
    return payloads.stored_rows(data, model, count, generator), f"test rows of {data.path}"


class _Measure:
    """Offers load after load.

    Args:
        server: Whose processor time counts.
        clients: Who offer it.
        config: For how long.
    """

    def __init__(self, server: Server, clients: Clients, config: BenchServeConfig) -> None:
        self._server = server
        self._clients = clients
        self._config = config
        self._runs = 0
        rates = len(config.rates) or len(_SHARES)
        total = 1 + len(_OUTSTANDING) + rates + len(config.limits_ms) * (_BISECTIONS + 1)
        self._bar = progress("bench serve", total, unit="runs")

    def saturated(self) -> tuple[int, Point]:
        """Return how many requests under way give the best rate, and that."""
        seconds = self._config.seconds
        self._run(partial(self._clients.saturate, _OUTSTANDING[0], _WARM_UP_SECONDS))
        found = []
        for outstanding in _OUTSTANDING:
            outcome, server_cores = self._run(partial(self._clients.saturate, outstanding, seconds))
            # At first not all are under way, and at last not all any more.
            window = outcome.answered[outcome.status == ANSWERED]
            window = window[(window > 0.1 * seconds) & (window <= seconds)]
            rate = len(window) / (0.9 * seconds)
            point = summary(outcome, rate, seconds, server_cores)
            inside = (outcome.answered > 0.1 * seconds) & (outcome.answered <= seconds)
            rows = outcome.rows[inside & (outcome.status == ANSWERED)].sum() / (0.9 * seconds)
            found.append((outstanding, replace(point, rows_per_second=float(rows))))
        best = max(found, key=lambda each: each[1].rows_per_second)
        if best[1].rows_per_second == 0:
            failures = ", ".join(best[1].failures) or "all were refused"
            raise UserError(f"the server answered none of the requests: {failures}.")
        return best

    def rising(self, offline: Point) -> list[Point]:
        """Offer rising rates, until nothing higher can hold a limit."""
        rates = self._config.rates or [share * offline.rate for share in _SHARES]
        points = []
        hopeless = _HOPELESS * max(self._config.limits_ms)
        for rate in sorted(rates):
            points.append(self.at(rate, self._config.seconds))
            if not points[-1].holds(hopeless):
                break
        return points

    def held(self, limit_ms: float, points: list[Point], offline: Point) -> Held:
        """Search for the highest rate that holds a limit, and confirm it by a longer run.

        Args:
            limit_ms: Of the 99th percentile.
            points: What was measured; what is measured now is added.
            offline: For the share.
        """
        # The highest that held, whatever failed below it: a short run fails when something else
        # needs the machine for a moment. A longer run decides.
        lowest = max((point.rate for point in points if point.holds(limit_ms)), default=0.0)
        highest = min((point.rate for point in points if point.rate > lowest), default=math.inf)
        for _ in range(_BISECTIONS if highest < math.inf else 0):
            points.append(self.at((lowest + highest) / 2, self._config.seconds))
            if points[-1].holds(limit_ms):
                lowest = points[-1].rate
            else:
                highest = points[-1].rate
        rate = lowest
        for _ in range(_CONFIRMATIONS if rate > 0 else 0):
            point = self.at(rate, self._config.confirm_seconds)
            if point.holds(limit_ms):
                return Held(limit_ms, point, point.rows_per_second / offline.rows_per_second)
            rate *= _STEP_DOWN
        return Held(limit_ms, None, None)

    def at(self, rate: float, seconds: float) -> Point:
        """Offer one rate."""
        seed = self._config.seed + self._runs
        outcome, server_cores = self._run(partial(self._clients.offer, rate, seconds, seed))
        return summary(outcome, rate, seconds, server_cores)

    def _run(self, load: Callable[[], Outcome]) -> tuple[Outcome, float | None]:
        self._runs += 1
        before = self._server.cpu_seconds()
        outcome = load()
        cores = (self._server.cpu_seconds() - before) / outcome.seconds
        self._bar.update()
        return outcome, None if math.isnan(cores) else cores


def summary(
    outcome: Outcome, rate: float, seconds: float, server_cores: float | None = None
) -> Point:
    """Return what became of requests in few numbers.

    Args:
        outcome: Of the requests.
        rate: That was offered.
        seconds: In which they were due.
        server_cores: The server's processor time a second.
    """
    is_answered = outcome.status == ANSWERED
    latency = np.sort(np.where(is_answered, outcome.answered - outcome.due, np.inf))
    # What was never sent was late for as long as it was waited for.
    sent = np.where(np.isnan(outcome.sent), outcome.seconds, outcome.sent)
    late_ms = 1e3 * _quantile(np.sort(sent - outcome.due), 0.99)
    p50, p90, p99 = (1e3 * _quantile(latency, share) for share in (0.5, 0.9, 0.99))
    in_time = is_answered & (outcome.answered <= seconds)
    return Point(
        rate=rate,
        rows_per_second=float(outcome.rows[in_time].sum() / seconds),
        seconds=seconds,
        requests=len(latency),
        refused=int((outcome.status == REFUSED).sum()),
        failed=int((outcome.status == FAILED).sum()),
        p50_ms=p50 if p50 < math.inf else None,
        p90_ms=p90 if p90 < math.inf else None,
        p99_ms=p99 if p99 < math.inf else None,
        late_p99_ms=late_ms,
        kept_up=late_ms <= max(_LATE_MS, _LATE_SHARE * p99 if p99 < math.inf else 0),
        client_cores=outcome.cpu_seconds / outcome.seconds,
        server_cores=server_cores,
        failures=dict(outcome.failures),
    )


def _quantile(ascending: npt.NDArray[np.float64], share: float) -> float:
    """Return the least value that at least this share of values do not exceed."""
    return float(ascending[math.ceil(share * len(ascending)) - 1])
