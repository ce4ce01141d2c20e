"""Requests wait here for the threads that score them, several at a time.

While a batch is scored requests collect; the next batch is what is there then. The threads take
their work themselves, so that they never wait for the event loop. A few rows that find the queue
empty are scored in the event loop: to hand them to a thread and back takes longer than that.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from dlrm.config import ServeConfig
from dlrm.device import available_cores
from dlrm.serve.metrics import Metrics
from dlrm.serve.model import Scores, ServedModel
from dlrm.serve.protocol import RefusedError
from dlrm.serve.rows import Rows

AT_ONCE = 8
"""Rows of a request that need not wait for a thread."""


@dataclass(eq=False)
class _Job:
    model: ServedModel
    rows: Rows
    count: int
    arrival: float
    deadline: float
    answer: asyncio.Future[Scores]
    gone: bool = False
    """Nobody waits for its answer any more."""


class Batcher:
    """A queue and the threads that empty it.

    Args:
        config: Limits.
        metrics: Learn of batches and of the queue.
    """

    def __init__(self, config: ServeConfig, metrics: Metrics) -> None:
        self._config = config
        self._metrics = metrics
        self._loop = asyncio.get_running_loop()
        self._jobs: deque[_Job] = deque()
        self._queued_rows = 0
        self._changed = threading.Condition()
        self._closing = False
        count = config.threads or max(1, available_cores() // config.workers)
        self._threads = [
            threading.Thread(target=self._run, name=f"scoring-{number}", daemon=True)
            for number in range(count)
        ]
        for thread in self._threads:
            thread.start()

    async def score(self, model: ServedModel, rows: Rows, timeout: float) -> Scores:
        """Wait for the scores of a request's rows.

        Args:
            model: What scores them.
            rows: The rows.
            timeout: Seconds after which nobody waits any more.

        Raises:
            RefusedError: The queue is full (503), or the deadline passed while they waited (504).
        """
        count = len(rows)
        now = time.monotonic()
        if count <= AT_ONCE and not self._jobs and not self._config.batch_wait_ms:
            (scores,) = self._score(model, [rows], count)
            return scores
        job = _Job(model, rows, count, now, now + timeout, self._loop.create_future())
        with self._changed:
            if self._jobs and self._queued_rows + count > self._config.max_queue_rows:
                raise RefusedError(
                    503,
                    f"the server has {self._queued_rows} rows waiting, and takes "
                    f"{self._config.max_queue_rows}. Try again later, or send fewer.",
                    retry_after=1,
                )
            self._jobs.append(job)
            self._queued_rows += count
            self._metrics.queue_rows.set(self._queued_rows)
            self._changed.notify()
        try:
            return await job.answer
        except asyncio.CancelledError:
            job.gone = True
            raise

    async def close(self) -> None:
        """Score what was accepted, and end the threads."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        for thread in self._threads:
            await asyncio.to_thread(thread.join)

    def _run(self) -> None:
        while jobs := self._next_batch():
            late = [job for job in jobs if job.deadline < time.monotonic()]
            kept = [job for job in jobs if not job.gone and job not in late]
            failures: list[tuple[_Job, Exception]] = [
                (job, RefusedError(504, "the deadline passed while the request waited."))
                for job in late
            ]
            answers: list[Scores] = []
            if kept:
                try:
                    answers = self._score(
                        kept[0].model, [job.rows for job in kept], sum(job.count for job in kept)
                    )
                except Exception as error:
                    failures += [(job, error) for job in kept]
                    kept = []
            try:
                self._loop.call_soon_threadsafe(_deliver, kept, answers, failures)
            except RuntimeError:  # the loop has ended, and with it all who waited
                return

    def _score(self, model: ServedModel, requests: Sequence[Rows], count: int) -> list[Scores]:
        began = time.perf_counter()
        scores = model.score(requests)
        self._metrics.batch(count, time.perf_counter() - began)
        return scores

    def _next_batch(self) -> list[_Job]:
        """Wait for jobs, and take those that are scored together; none: closing."""
        config = self._config
        with self._changed:
            while not self._others_have_come():
                if self._closing:
                    return []
                self._changed.wait()
            jobs: list[_Job] = []
            rows = 0
            while self._jobs:
                job = self._jobs[0]
                fits = (
                    rows + job.count <= config.max_batch_rows and job.model is jobs[0].model
                    if jobs
                    else True
                )
                if not fits:
                    break
                jobs.append(self._jobs.popleft())
                rows += job.count
            self._queued_rows -= rows
            self._metrics.queue_rows.set(self._queued_rows)
            return jobs

    def _others_have_come(self) -> bool:
        """Let the oldest job be joined by others; returns whether another thread left any."""
        config = self._config
        while self._jobs and self._queued_rows < config.max_batch_rows and not self._closing:
            left = self._jobs[0].arrival + config.batch_wait_ms / 1000 - time.monotonic()
            if left <= 0 or not self._changed.wait(left):
                break
        return bool(self._jobs)


def _deliver(
    jobs: Sequence[_Job], answers: Sequence[Scores], failures: Sequence[tuple[_Job, Exception]]
) -> None:
    for job, scores in zip(jobs, answers, strict=True):
        if not job.answer.done():
            job.answer.set_result(scores)
    for job, error in failures:
        if not job.answer.done():
            job.answer.set_exception(error)
