"""The queue, with models that score as told."""

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from dlrm.config import ServeConfig
from dlrm.data.batch import Batch
from dlrm.serve import batching
from dlrm.serve.batching import Batcher
from dlrm.serve.model import Scores
from dlrm.serve.protocol import RefusedError


class Model:
    """Gives each row its first dense feature, and waits before that until it is let."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.begun = threading.Semaphore(0)
        self.may_end = threading.Semaphore(0)
        self.fails = False

    def score(self, requests: Sequence[Batch]) -> list[Scores]:
        self.batches.append([len(rows) for rows in requests])
        self.begun.release()
        assert self.may_end.acquire(timeout=10)
        if self.fails:
            raise ZeroDivisionError
        return [Scores(rows.dense_features[:, 0].numpy(), np.zeros(0)) for rows in requests]


class Noted:
    """The metrics that a batcher tells of."""

    def __init__(self) -> None:
        self.waiting = -1
        self.queue_rows = self

    def set(self, rows: int) -> None:
        self.waiting = rows

    def batch(self, rows: int, seconds: float) -> None:
        assert rows > 0
        assert 0 < seconds < 20


def rows(count: int, value: float = 0.0) -> Batch:
    return Batch(torch.full((count, 1), value), torch.zeros(count, 0), None)


Scenario = Callable[[Batcher, Model], Awaitable[Any]]


@pytest.fixture
def play(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """A function that runs a scenario with a batcher of one thread, and few rows at once."""

    def run(scenario: Scenario, at_once: int = 0, **options: Any) -> Any:
        monkeypatch.setattr(batching, "AT_ONCE", at_once)

        async def main() -> Any:
            noted = Noted()
            batcher = Batcher(ServeConfig(**{"threads": 1} | options), noted)  # type: ignore[arg-type]
            model = Model()
            async with asyncio.timeout(20):
                outcome = await scenario(batcher, model)
                model.may_end.release(100)
                await batcher.close()
            assert noted.waiting == 0
            return outcome

        return asyncio.run(main())

    return run


def ask(batcher: Batcher, model: Any, count: int, value: float = 0.0, timeout: float = 60):  # type: ignore[no-untyped-def]
    return asyncio.create_task(batcher.score(model, rows(count, value), timeout))


async def begun(model: Model) -> None:
    assert await asyncio.to_thread(model.begun.acquire, timeout=10)


def test_what_waits_while_a_batch_is_scored_is_the_next_batch(play: Callable[..., Any]) -> None:
    async def scenario(batcher: Batcher, model: Model) -> list[list[float]]:
        tasks = [ask(batcher, model, 1, 9)]
        await begun(model)
        tasks += [ask(batcher, model, count, count) for count in (3, 4, 2, 20, 1)]
        await asyncio.sleep(0)
        model.may_end.release(100)
        found = [(await task).probabilities.tolist() for task in tasks]
        assert model.batches == [[1], [3, 4], [2], [20], [1]]
        return found

    found = play(scenario, max_batch_rows=8)
    assert found == [[9.0], [3.0] * 3, [4.0] * 4, [2.0] * 2, [20.0] * 20, [1.0]]


def test_a_few_rows_do_not_wait_for_a_thread(play: Callable[..., Any]) -> None:
    async def scenario(batcher: Batcher, model: Model) -> None:
        first = ask(batcher, model, 4)
        await begun(model)
        other = Model()
        other.may_end.release(9)
        assert len((await batcher.score(other, rows(3), None)).probabilities) == 3  # type: ignore[arg-type]
        waits = ask(batcher, model, 4)
        await asyncio.sleep(0)
        behind = ask(batcher, other, 3)  # of what waits already
        await asyncio.sleep(0)
        assert other.batches == [[3]]
        model.may_end.release(9)
        await asyncio.gather(first, waits, behind)
        assert (model.batches, other.batches) == ([[4], [4]], [[3], [3]])

    play(scenario, at_once=3)


def test_models_are_not_mixed(play: Callable[..., Any]) -> None:
    async def scenario(batcher: Batcher, model: Model) -> None:
        other = Model()
        other.may_end.release(9)
        tasks = [ask(batcher, model, 1)]
        await begun(model)
        tasks += [ask(batcher, each, 1) for each in (model, other, other, model)]
        await asyncio.sleep(0)
        model.may_end.release(9)
        await asyncio.gather(*tasks)
        assert (model.batches, other.batches) == ([[1], [1], [1]], [[1, 1]])

    play(scenario)


def test_a_full_queue_refuses_and_recovers(play: Callable[..., Any]) -> None:
    async def scenario(batcher: Batcher, model: Model) -> None:
        tasks = [ask(batcher, model, 5)]
        await begun(model)
        tasks += [ask(batcher, model, 6), ask(batcher, model, 4)]
        await asyncio.sleep(0)
        with pytest.raises(RefusedError, match="10 rows waiting, and takes 10") as caught:
            await batcher.score(model, rows(1), 60)  # type: ignore[arg-type]
        assert (caught.value.status, caught.value.retry_after) == (503, 1)
        model.may_end.release(9)
        await asyncio.gather(*tasks)
        large = await batcher.score(model, rows(50), 60)  # type: ignore[arg-type]
        assert len(large.probabilities) == 50

    play(scenario, max_queue_rows=10)


def test_who_is_late_or_gone_is_not_scored(play: Callable[..., Any]) -> None:
    async def scenario(batcher: Batcher, model: Model) -> None:
        first = ask(batcher, model, 1)
        await begun(model)
        late, gone, kept = (
            ask(batcher, model, c, timeout=t) for c, t in ((2, 0.01), (3, 9), (4, 9))
        )
        await asyncio.sleep(0)
        gone.cancel()
        await asyncio.sleep(0.02)
        model.may_end.release(9)
        assert len((await kept).probabilities) == 4
        await first
        with pytest.raises(RefusedError, match="deadline") as caught:
            await late
        assert caught.value.status == 504
        assert model.batches == [[1], [4]]

    play(scenario)


def test_a_request_waits_for_others_as_long_as_told(play: Callable[..., Any]) -> None:
    async def scenario(batcher: Batcher, model: Model) -> float:
        model.may_end.release(9)
        began = time.monotonic()
        first = ask(batcher, model, 1)
        await asyncio.sleep(0.02)
        await asyncio.gather(first, ask(batcher, model, 2))
        assert model.batches == [[1, 2]]
        took = time.monotonic() - began
        await asyncio.gather(*(ask(batcher, model, 4) for _ in range(2)))
        assert model.batches[1:] == [[4, 4]]
        assert time.monotonic() - began - took < 0.25  # full, so it did not wait
        return took

    assert 0.3 <= play(scenario, batch_wait_ms=300.0, max_batch_rows=8) < 2


def test_a_failure_reaches_those_it_hit_alone(play: Callable[..., Any]) -> None:
    async def scenario(batcher: Batcher, model: Model) -> None:
        model.fails = True
        model.may_end.release(9)
        with pytest.raises(ZeroDivisionError):
            await ask(batcher, model, 1)
        model.fails = False
        assert len((await ask(batcher, model, 3)).probabilities) == 3

    play(scenario)


def test_a_thread_goes_on_when_another_takes_the_batch_that_both_wait_for(
    play: Callable[..., Any],
) -> None:
    async def scenario(batcher: Batcher, model: Model) -> int:
        model.may_end.release(1000)
        for _ in range(30):
            await asyncio.gather(*(ask(batcher, model, 1) for _ in range(4)))
        return sum(thread.name.startswith("scoring-") for thread in threading.enumerate())

    assert play(scenario, threads=4, batch_wait_ms=2) == 4


def test_no_rows_may_wait_too(play: Callable[..., Any]) -> None:
    async def scenario(batcher: Batcher, model: Model) -> int:
        tasks = [ask(batcher, model, 1), ask(batcher, model, 1), ask(batcher, model, 0)]
        await begun(model)
        model.may_end.release(9)
        return len((await asyncio.gather(*tasks))[2].probabilities)

    assert play(scenario) == 0
