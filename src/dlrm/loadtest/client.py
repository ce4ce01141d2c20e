"""A process that offers load: requests that are made ahead, at times that are drawn ahead.

In the open loop a request has a time at which it is due, whatever became of those before it, and
its latency counts from that time: had it to wait in this process, for the processor or for a
connection, that counts too (Schroeder, Wierman and Harchol-Balter, *Open Versus Closed*, 2006). In
the closed loop as many requests as are asked for are always under way; that saturates a server.

The cores are the server's too, so this process imports neither PyTorch nor a model, and has no HTTP
library: of an answer it reads the status and the length.
"""

from __future__ import annotations

import asyncio
import ctypes
import gc
import mmap
import multiprocessing
import os
import platform
import re
import selectors
import signal
import struct
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from dlrm.errors import EnvironmentFaultError

MOST_CONNECTIONS = 900
"""Of a process: ``select`` takes no file descriptor above 1023."""
_HEAD_START = 0.05
"""Seconds until the first request is due, in which closed connections are noticed."""
_DRAIN_SECONDS = 10.0
"""How long answers are waited for after the last request was due."""
_PAUSE = 0.01
"""Seconds until a refused request of the closed loop is followed by another."""
_AT_ONCE = 32
"""Requests that are sent before answers are looked at, when they are late."""
ANSWERED, REFUSED, FAILED = 0, 1, 2
REFUSALS = (429, 503, 504)
"""Statuses for want of room or time."""
REFUSAL_CODES = ("UNAVAILABLE", "RESOURCE_EXHAUSTED", "DEADLINE_EXCEEDED")
GRPC_METHOD = "/inference.GRPCInferenceService/ModelInfer"


@dataclass(frozen=True)
class Target:
    """Where load goes."""

    protocol: Literal["http", "grpc"]
    host: str
    port: int
    connections: int
    """The most of each process; of gRPC, which sends many requests over one, exactly so many."""


@dataclass(frozen=True, eq=False)
class Payloads:
    """n requests in a file, as they go over the wire.

    Attributes:
        file: One after the other: of HTTP with their headers, of gRPC the message.
        ends: (n,) int64, the byte after each.
        rows: (n,) int64, how many rows each asks for.
    """

    file: Path
    ends: npt.NDArray[np.int64]
    rows: npt.NDArray[np.int64]


@dataclass(frozen=True)
class OpenLoop:
    """Poisson arrivals: gaps are exponential."""

    rate: float
    """Requests a second."""
    seconds: float
    seed: int


@dataclass(frozen=True)
class ClosedLoop:
    """So many requests under way at any time."""

    outstanding: int
    seconds: float


@dataclass(frozen=True, eq=False)
class Outcome:
    """What became of n requests; times are in seconds since the first could be due.

    Attributes:
        due: (n,) float64, when each should have been sent; in the closed loop when it was.
        sent: (n,) float64, when it was written to a connection; NaN: never.
        answered: (n,) float64, when its answer was there; NaN: never.
        status: (n,) int8, ANSWERED, REFUSED (for want of room or time) or FAILED.
        rows: (n,) int64.
        cpu_seconds: Processor time of the client.
        seconds: Of the whole.
        failures: What went wrong, and how often.
    """

    due: npt.NDArray[np.float64]
    sent: npt.NDArray[np.float64]
    answered: npt.NDArray[np.float64]
    status: npt.NDArray[np.int8]
    rows: npt.NDArray[np.int64]
    cpu_seconds: float
    seconds: float
    failures: Counter[str] = field(repr=False)

    @staticmethod
    def joined(parts: Sequence[Outcome]) -> Outcome:
        """Return the outcome of several processes that ran at a time."""
        return Outcome(
            np.concatenate([part.due for part in parts]),
            np.concatenate([part.sent for part in parts]),
            np.concatenate([part.answered for part in parts]),
            np.concatenate([part.status for part in parts]),
            np.concatenate([part.rows for part in parts]),
            cpu_seconds=sum(part.cpu_seconds for part in parts),
            seconds=max(part.seconds for part in parts),
            failures=sum((part.failures for part in parts), Counter()),
        )


class Clients:
    """Client processes; a context manager.

    Args:
        count: How many; load is spread over them evenly. Poisson arrivals that meet are Poisson
            arrivals.
        target: The server.
        payloads: What is sent, in turn, from the beginning when they are through.
    """

    def __init__(self, count: int, target: Target, payloads: Payloads) -> None:
        # A new interpreter, since a fork of this process would have its threads' locks.
        context = multiprocessing.get_context("spawn")
        self._pipes: list[Connection] = []
        self._processes = []
        for number in range(count):
            ours, theirs = context.Pipe()
            start = number * len(payloads.ends) // count
            process = context.Process(
                target=_run, args=(theirs, target, payloads, start), daemon=True
            )
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    def __enter__(self) -> Clients:
        return self

    def __exit__(self, *error: object) -> None:
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.join(5)
            process.terminate()

    def offer(self, rate: float, seconds: float, seed: int) -> Outcome:
        """Send requests at times that do not depend on answers.

        Args:
            rate: Requests a second.
            seconds: How long.
            seed: Of their times.

        Raises:
            EnvironmentFaultError: A client process died.
        """
        count = len(self._pipes)
        loads = [OpenLoop(rate / count, seconds, seed * count + each) for each in range(count)]
        return self._do(loads)

    def saturate(self, outstanding: int, seconds: float) -> Outcome:
        """Send a request whenever one is answered.

        Args:
            outstanding: Requests under way at any time, at least one a process.
            seconds: How long.

        Raises:
            EnvironmentFaultError: A client process died.
        """
        count = len(self._pipes)
        shares = [
            (outstanding * (each + 1)) // count - (outstanding * each) // count
            for each in range(count)
        ]
        return self._do([ClosedLoop(max(1, share), seconds) for share in shares])

    def _do(self, loads: Sequence[OpenLoop | ClosedLoop]) -> Outcome:
        try:
            for pipe, load in zip(self._pipes, loads, strict=True):
                pipe.send(load)
            return Outcome.joined([pipe.recv() for pipe in self._pipes])
        except (EOFError, OSError) as error:
            raise EnvironmentFaultError(
                "a client process of the load died: see its message above, or memory ran out."
            ) from error


def _run(pipe: Connection, target: Target, payloads: Payloads, position: int) -> None:
    """Offer what comes through a pipe, until it is closed; what a client process does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal; whoever started this ends it
    # epoll, which is the default, rounds times up to milliseconds.
    loop = asyncio.SelectorEventLoop(selectors.SelectSelector())
    asyncio.set_event_loop(loop)
    gc.disable()  # of the requests that are kept nothing is circular
    ask_for_short_turns()
    load = _Load(loop, target, payloads, position)
    while True:
        try:
            asked = pipe.recv()
        except EOFError:
            return
        pipe.send(loop.run_until_complete(load.run(asked)))


_SCHED_SETATTR = {"x86_64": 314, "aarch64": 274}
_TURN_NANOSECONDS = 100_000


def ask_for_short_turns() -> None:
    """Ask Linux to let this process run as soon as it wants to, and for a moment only.

    It gets no larger share of a processor. Where the server takes all of them, requests would else
    be sent late by one of its turns, some 3 ms. Before Linux 6.12 nothing changes.
    """
    if platform.machine() in _SCHED_SETATTR and sys.platform == "linux":
        # struct sched_attr of linux/sched/types.h: size, policy, flags, nice, priority, runtime,
        # deadline, period.
        nice = os.getpriority(os.PRIO_PROCESS, 0)
        attributes = struct.pack("=IIQiIQQQ", 48, 0, 0, nice, 0, _TURN_NANOSECONDS, 0, 0)
        ctypes.CDLL(None).syscall(_SCHED_SETATTR[platform.machine()], 0, attributes, 0)


class _Request:
    """A request under way."""

    __slots__ = ("answered", "due", "failure", "finished", "payload", "rows", "sent", "status")

    def __init__(
        self, due: float, payload: memoryview, rows: int, finished: Callable[[_Request], None]
    ) -> None:
        self.due = due
        self.sent = self.answered = float("nan")
        self.payload = payload
        self.rows = rows
        self.status = FAILED
        self.failure = "no answer"
        self.finished = finished


class _Transport(Protocol):
    def send(self, request: _Request) -> None:
        """Send a request, and call its ``finished`` when it is answered or failed."""

    async def abort(self) -> None:
        """Give up what is under way; the requests stay failed."""


class _Load:
    """Offers loads one after the other, over connections that stay open."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        target: Target,
        payloads: Payloads,
        position: int,
    ) -> None:
        self._loop = loop
        self._target = target
        self._payloads = payloads
        self._position = position
        with open(payloads.file, "rb") as file:
            self._bytes = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        ends = payloads.ends.tolist()
        self._spans = list(zip([0, *ends[:-1]], ends, payloads.rows.tolist(), strict=True))
        self._transport: _Transport | None = None

    async def run(self, load: OpenLoop | ClosedLoop) -> Outcome:
        if self._transport is None:
            self._transport = (
                _Grpc(self._target)
                if self._target.protocol == "grpc"
                else _Http(self._loop, self._target)
            )
        began = self._loop.time()
        processor = time.process_time()
        start = began + _HEAD_START
        self._requests: list[_Request] = []
        self._under_way = 0
        self._end = start + load.seconds
        self._all_done = self._loop.create_future()
        if isinstance(load, OpenLoop):
            self._due = (start + arrivals(load)).tolist()
            self._loop.call_at(start, self._send_due)
        else:
            self._due = []
            for _ in range(load.outstanding):
                self._loop.call_at(start, self._send_next, self._requests)
        try:
            async with asyncio.timeout_at(self._end + _DRAIN_SECONDS):
                await self._all_done
        except TimeoutError:
            await self._transport.abort()
        requests = self._requests
        return Outcome(
            np.array([each.due for each in requests]) - start,
            np.array([each.sent for each in requests]) - start,
            np.array([each.answered for each in requests]) - start,
            np.array([each.status for each in requests], np.int8),
            np.array([each.rows for each in requests], np.int64),
            time.process_time() - processor,
            self._loop.time() - began,
            Counter(each.failure for each in requests if each.status == FAILED),
        )

    def _send_due(self) -> None:
        """Send what is due in the open loop, and come back when the next one is."""
        now = self._loop.time()
        due = self._due
        number = len(self._requests)
        for _ in range(_AT_ONCE):
            if number == len(due) or due[number] > now:
                break
            self._send(due[number], self._finished_open)
            number += 1
        if number < len(due):
            self._loop.call_at(due[number], self._send_due)
        elif not self._under_way:
            self._done()

    def _finished_open(self, request: _Request) -> None:
        request.answered = self._loop.time()
        self._under_way -= 1
        if not self._under_way and len(self._requests) == len(self._due):
            self._done()

    def _send_next(self, run: list[_Request]) -> None:
        """Send one in the closed loop, if its run is not over."""
        now = self._loop.time()
        if run is not self._requests:
            return
        if now < self._end:
            self._send(now, self._finished_closed)
        elif not self._under_way:
            self._done()

    def _finished_closed(self, request: _Request) -> None:
        request.answered = self._loop.time()
        self._under_way -= 1
        if request.status == ANSWERED:
            self._send_next(self._requests)
        else:
            self._loop.call_later(_PAUSE, self._send_next, self._requests)

    def _done(self) -> None:
        if not self._all_done.done():
            self._all_done.set_result(None)

    def _send(self, due: float, finished: Callable[[_Request], None]) -> None:
        start, end, rows = self._spans[self._position]
        self._position = (self._position + 1) % len(self._spans)
        request = _Request(due, self._bytes[start:end], rows, finished)
        self._requests.append(request)
        self._under_way += 1
        assert self._transport is not None
        self._transport.send(request)


def arrivals(load: OpenLoop) -> npt.NDArray[np.float64]:
    """Return when requests are due, ascending, in seconds from the beginning; at least one is."""
    generator = np.random.default_rng(load.seed)
    mean = load.rate * load.seconds
    # Given their number, Poisson arrivals are uniform in time.
    count = max(1, generator.poisson(mean))
    return np.sort(generator.random(count)) * load.seconds


class _Http:
    """HTTP/1.1 connections that stay open, each with one request at a time."""

    def __init__(self, loop: asyncio.AbstractEventLoop, target: Target) -> None:
        self._loop = loop
        self._target = target
        self._idle: list[_HttpConnection] = []
        self._waiting: deque[_Request] = deque()
        self._open: set[_HttpConnection] = set()
        self._connecting: set[asyncio.Task[None]] = set()

    def send(self, request: _Request) -> None:
        if self._idle:
            self._idle.pop().send(request)
            return
        self._waiting.append(request)
        opening = len(self._connecting)
        if opening < len(self._waiting) and len(self._open) + opening < self._target.connections:
            task = self._loop.create_task(self._connect())
            self._connecting.add(task)
            task.add_done_callback(self._connecting.discard)

    async def abort(self) -> None:
        self._waiting.clear()
        for connection in list(self._open):
            connection.abort()
        await asyncio.sleep(0)

    async def _connect(self) -> None:
        try:
            await self._loop.create_connection(
                lambda: _HttpConnection(self), self._target.host, self._target.port
            )
        except OSError as error:
            if self._waiting and not self._open:
                request = self._waiting.popleft()
                request.failure = f"cannot connect: {error}"
                request.finished(request)

    def opened(self, connection: _HttpConnection) -> None:
        self._open.add(connection)
        self.idle(connection)

    def idle(self, connection: _HttpConnection) -> None:
        """Take the connection that can be used next."""
        if self._waiting:
            connection.send(self._waiting.popleft())
        else:
            self._idle.append(connection)

    def closed(self, connection: _HttpConnection) -> None:
        self._open.discard(connection)
        if connection in self._idle:
            self._idle.remove(connection)
        if self._waiting:
            request = self._waiting.popleft()
            self.send(request)


_CONTENT_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
_CLOSES = re.compile(rb"\r\nconnection: *close", re.IGNORECASE)


class _HttpConnection(asyncio.Protocol):
    """One connection: writes a request, and reads the status and length of its answer."""

    def __init__(self, pool: _Http) -> None:
        self._pool = pool
        self._request: _Request | None = None
        self._buffer = bytearray()
        self._needed = 0
        self._status = 0
        self._closes = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._loop = asyncio.get_running_loop()
        self._pool.opened(self)

    def send(self, request: _Request) -> None:
        self._request = request
        request.sent = self._loop.time()
        self._transport.write(request.payload)

    def data_received(self, data: bytes) -> None:
        buffer = self._buffer
        buffer += data
        if not self._needed:
            end = buffer.find(b"\r\n\r\n")
            if end < 0:
                return
            length = _CONTENT_LENGTH.search(buffer, 0, end)
            if not buffer.startswith(b"HTTP/1.") or length is None:
                self._fail("an answer that is no HTTP/1.1 with a Content-Length")
                return
            self._status = int(buffer[9:12])
            self._closes = _CLOSES.search(buffer, 0, end) is not None
            self._needed = end + 4 + int(length[1])
        if len(buffer) >= self._needed:
            self._answered()

    def _answered(self) -> None:
        request, self._request = self._request, None
        if request is not None:
            if self._status == 200:
                # A probability takes 4 bytes, or at least 2 characters.
                enough = len(self._buffer) >= 2 * request.rows
                request.status = ANSWERED if enough else FAILED
                request.failure = "an answer that is too short"
            elif self._status in REFUSALS:
                request.status = REFUSED
            else:
                request.failure = f"status {self._status}: {self._text()}"
        self._buffer.clear()
        self._needed = 0
        if request is not None:
            request.finished(request)
        if self._closes:
            self._transport.close()
        else:
            self._pool.idle(self)

    def _text(self) -> str:
        _, _, body = self._buffer.partition(b"\r\n\r\n")
        return body[:200].decode(errors="replace")

    def _fail(self, reason: str) -> None:
        request, self._request = self._request, None
        if request is not None:
            request.failure = reason
            request.finished(request)
        self._transport.abort()

    def abort(self) -> None:
        self._request = None
        self._transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self._pool.closed(self)
        self._fail("the connection was closed before the answer")


class _Grpc:
    """Connections of gRPC, in turn: a server of several processes shares them out."""

    def __init__(self, target: Target) -> None:
        import grpc.aio

        self._error = grpc.aio.AioRpcError
        options = (
            ("grpc.use_local_subchannel_pool", 1),  # else they are one connection
            ("grpc.max_send_message_length", -1),
            ("grpc.max_receive_message_length", -1),
        )
        address = f"{target.host}:{target.port}"
        channels = [grpc.aio.insecure_channel(address, options) for _ in range(target.connections)]
        # Without serializers, bytes go as they are.
        self._calls: list[Any] = [channel.unary_unary(GRPC_METHOD) for channel in channels]
        self._turn = 0
        self._tasks: set[asyncio.Task[None]] = set()

    def send(self, request: _Request) -> None:
        self._turn = (self._turn + 1) % len(self._calls)
        task = asyncio.get_running_loop().create_task(self._call(self._calls[self._turn], request))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _call(self, call: Any, request: _Request) -> None:
        request.sent = asyncio.get_running_loop().time()
        try:
            answer = await call(bytes(request.payload))
        except self._error as error:
            name = error.code().name
            request.status = REFUSED if name in REFUSAL_CODES else FAILED
            request.failure = f"{name}: {(error.details() or '')[:200]}"
        else:
            enough = len(answer) >= 4 * request.rows
            request.status = ANSWERED if enough else FAILED
            request.failure = "an answer that is too short"
        request.finished(request)

    async def abort(self) -> None:
        for task in list(self._tasks):
            task.cancel()
        await asyncio.sleep(0)
