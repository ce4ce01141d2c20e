"""What a server does with a request, whatever way it came."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from dlrm.config import ServeConfig, size_bytes
from dlrm.serve.batching import Batcher
from dlrm.serve.metrics import Metrics
from dlrm.serve.model import OUTPUTS, ServedModel
from dlrm.serve.protocol import (
    EXTENSIONS,
    InferAnswer,
    InferRequest,
    RefusedError,
    refuse_outputs,
    wrong,
)
from dlrm.serve.rows import Rows
from dlrm.version import __version__

logger = logging.getLogger("dlrm")

_LARGE_BYTES = 1 << 16
"""What is larger is read in a thread, since the event loop would stand still for a millisecond."""

Reload = Callable[[], Awaitable[str]]
"""Loads the model anew in all processes; returns why it could not, or nothing."""


class Service:
    """One process's part of a server.

    Args:
        config: Limits.
        metrics: Of this process.
        batcher: Scores rows.
        reload: What a client's wish to load the model leads to.

    Attributes:
        model: What is served; None: it is being loaded.
        draining: The server is ending: it answers, but asks to be sent no more.
    """

    def __init__(
        self, config: ServeConfig, metrics: Metrics, batcher: Batcher, reload: Reload
    ) -> None:
        self.config = config
        self.metrics = metrics
        self.model: ServedModel | None = None
        self.draining = False
        self._batcher = batcher
        self._large = ThreadPoolExecutor(1, "reading")
        self._large_bytes = 0
        self._most_large_bytes = 4 * size_bytes(config.max_body, "--max-body")
        self._reload = reload

    @property
    def ready(self) -> bool:
        """Whether requests are welcome."""
        return self.model is not None and not self.draining

    def serve(self, model: ServedModel) -> None:
        """Answer with another model from now on; who waits still gets the earlier one's answer."""
        self.model = model
        self.metrics.model(model.name, model.version)

    def find(self, name: str, version: str) -> ServedModel:
        """Return the model of a name and version.

        Raises:
            RefusedError: There is none (404), or not now (503).
        """
        if self.model is None:
            raise RefusedError(503, "the model is being loaded.", retry_after=1)
        self.model.refuse_other(name, version)
        return self.model

    def is_model_ready(self, name: str, version: str) -> bool:
        """Tell whether requests to a model are answered.

        Raises:
            RefusedError: There is no such model (404).
        """
        if not self.ready:
            return False
        self.find(name, version)
        return True

    def metadata(self) -> dict[str, Any]:
        """Return what the protocol tells of a server."""
        return {"name": "dlrm", "version": __version__, "extensions": list(EXTENSIONS)}

    def index(self, *, only_ready: bool) -> list[dict[str, str]]:
        """Return what the repository extension tells of the one model there is."""
        if self.ready and self.model is not None:
            entry = {"name": self.model.name, "version": self.model.version, "state": "READY"}
        elif only_ready:
            return []
        else:
            entry = {"name": self.config.model_name, "version": "", "state": "UNAVAILABLE"}
            entry["reason"] = "ending" if self.draining else "loading"
        return [entry]

    async def load(self, name: str) -> None:
        """Load the model anew from its path.

        Raises:
            RefusedError: It is another's name (404), or the model there is not served (400).
        """
        if name != self.config.model_name:
            raise RefusedError(404, f"there is no model {name[:100]!r}.")
        if reason := await self._reload():
            raise RefusedError(400, f"the model was not loaded, the earlier one stays: {reason}")

    async def infer(
        self,
        model: ServedModel,
        read: Callable[[], InferRequest],
        size: int,
        timeout: float | None = None,
    ) -> InferAnswer:
        """Answer an infer request.

        Args:
            model: What ``find`` gave.
            read: Gives what is asked for, or refuses it.
            size: Of what it reads: bytes of JSON, or 8 times as many of binary tensors.
            timeout: Seconds that the client waits; None: it did not say other than in the request.

        Raises:
            RefusedError: It is wrong (4xx), or there is no room or time for it (503, 504).
        """
        began = time.monotonic()
        request, rows = await self._read(model, read, size)
        waits = [self.config.request_timeout, timeout, request.timeout]
        left = min(each for each in waits if each is not None) - (time.monotonic() - began)
        scores = await self._batcher.score(model, rows, left)
        if not np.isfinite(scores.probabilities).all():
            raise wrong(
                "the model gives no number as probability of a row: a prepared feature of it is "
                "too large, or the model's weights are damaged."
            )
        self.metrics.rows.inc(len(scores.probabilities))
        if unknown := int(scores.unknown_ids.sum()):
            self.metrics.unknown_ids.inc(unknown)
        outputs = {
            "probabilities": ("FP32", scores.probabilities),
            "unknown_ids": ("INT32", scores.unknown_ids),
        }
        return InferAnswer(model.name, model.version, request, outputs)

    async def _read(
        self, model: ServedModel, read: Callable[[], InferRequest], size: int
    ) -> tuple[InferRequest, Rows]:
        if size <= _LARGE_BYTES:
            return _read(model, read)
        if self._large_bytes and self._large_bytes + size > self._most_large_bytes:
            raise RefusedError(
                503,
                f"the server has large requests of {self._large_bytes} bytes to read first. Try "
                "again later, or send fewer rows.",
                retry_after=1,
            )
        self._large_bytes += size
        try:
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(self._large, _read, model, read)
        finally:
            self._large_bytes -= size


def _read(model: ServedModel, read: Callable[[], InferRequest]) -> tuple[InferRequest, Rows]:
    request = read()
    refuse_outputs(request, OUTPUTS)
    return request, model.reader.read(request.inputs)


def log_failure(what: str, error: BaseException) -> str:
    """Log a bug of ours, and return what a client is told of it."""
    name = secrets.token_hex(6)
    logger.error("%s failed, error %s", what, name, exc_info=error)
    return f"the server failed; its log has the reason as error {name}."


class Stopwatch:
    """Milliseconds since it was made."""

    def __init__(self) -> None:
        self._began = time.perf_counter()

    def __call__(self) -> float:
        """Return them."""
        return 1e3 * (time.perf_counter() - self._began)
