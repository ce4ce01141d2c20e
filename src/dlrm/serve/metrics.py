"""What a server tells Prometheus; of all its processes together."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

_LATENCY_BUCKETS = (
    0.0005, 0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.045, 0.06, 0.1, 0.25, 1,
)  # fmt: skip
_ROW_BUCKETS = tuple(float(1 << exponent) for exponent in range(15))


class Metrics:
    """The metrics of one process, kept in files that all of a server's processes read.

    Args:
        folder: Where the files are.
    """

    def __init__(self, folder: Path) -> None:
        # The package looks at this when it is imported.
        os.environ["PROMETHEUS_MULTIPROC_DIR"] = str(folder)
        import prometheus_client as prometheus

        self._folder = folder
        own = prometheus.CollectorRegistry()
        self._requests = prometheus.Counter(
            "dlrm_requests_total",
            "Requests answered, by protocol, method and code.",
            ("protocol", "method", "code"),
            registry=own,
        )
        self._seconds = prometheus.Histogram(
            "dlrm_request_seconds",
            "From an infer request's head (gRPC: its message) to its answer.",
            ("protocol",),
            buckets=_LATENCY_BUCKETS,
            registry=own,
        )
        self._batch_rows = prometheus.Histogram(
            "dlrm_batch_rows", "Rows scored together.", buckets=_ROW_BUCKETS, registry=own
        )
        self._batch_seconds = prometheus.Histogram(
            "dlrm_batch_seconds", "Time to score a batch.", buckets=_LATENCY_BUCKETS, registry=own
        )
        self.queue_rows = prometheus.Gauge(
            "dlrm_queue_rows", "Rows that wait.", multiprocess_mode="livesum", registry=own
        )
        self.connections = prometheus.Gauge(
            "dlrm_connections",
            "Open HTTP connections.",
            multiprocess_mode="livesum",
            registry=own,
        )
        self.rows = prometheus.Counter("dlrm_rows_total", "Rows scored.", registry=own)
        self.unknown_ids = prometheus.Counter(
            "dlrm_unknown_ids_total",
            "Sparse values that have no id of their own.",
            registry=own,
        )
        self._models = prometheus.Gauge(
            "dlrm_model_info",
            "1 for the model's version that is served, 0 for earlier ones.",
            ("model", "version"),
            multiprocess_mode="livemax",
            registry=own,
        )
        self.loads = prometheus.Counter(
            "dlrm_loads_total", "Models loaded, by outcome.", ("outcome",), registry=own
        )
        self._served: tuple[str, str] | None = None

    def request(self, protocol: str, method: str, code: str) -> None:
        """Count an answered request."""
        self._requests.labels(protocol, method, code).inc()

    def answered(self, protocol: str, seconds: float) -> None:
        """Note how long an infer request took."""
        self._seconds.labels(protocol).observe(seconds)

    def batch(self, rows: int, seconds: float) -> None:
        """Note a batch that was scored."""
        self._batch_rows.observe(rows)
        self._batch_seconds.observe(seconds)

    def model(self, name: str, version: str) -> None:
        """Note which model is served from now on."""
        if self._served is not None:
            self._models.labels(*self._served).set(0)
        self._models.labels(name, version).set(1)
        self._served = name, version

    def text(self) -> tuple[bytes, str]:
        """Return what /metrics answers, of all processes, and its content type."""
        import prometheus_client as prometheus
        from prometheus_client.multiprocess import MultiProcessCollector

        registry: CollectorRegistry = prometheus.CollectorRegistry()
        MultiProcessCollector(registry, str(self._folder))  # type: ignore[no-untyped-call]
        return prometheus.generate_latest(registry), prometheus.CONTENT_TYPE_LATEST


def forget_process(folder: Path, pid: int) -> None:
    """Drop the gauges of a process that has ended; its counters stay."""
    for path in folder.glob(f"gauge_live*_{pid}.db"):
        path.unlink(missing_ok=True)
