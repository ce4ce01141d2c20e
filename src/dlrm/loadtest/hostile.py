"""A load of hostile requests with good ones among them, and what has to come of it.

Every good request is answered right, or refused for want of room; whatever is wrong with a hostile
one, it is answered with a status of 4xx and a message, or its connection is closed; and the
server's memory does not grow.
"""

from __future__ import annotations

import asyncio
import gzip
import json
import math
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dlrm.loadtest import payloads
from dlrm.loadtest.client import GRPC_METHOD, REFUSAL_CODES, REFUSALS
from dlrm.loadtest.server import Server
from dlrm.prediction import load
from dlrm.progress import progress
from dlrm.serve.messages import MESSAGES

TOLERANCE = 1e-6
"""Of a probability."""
_GOOD_REQUESTS = 300
"""Different ones that are made."""
_MOST_ROWS = 20
_UNKNOWN_SHARE = 0.1
"""Of the sparse values of good requests: values that the vocabularies, all but certainly, lack."""
_AT_A_TIME = 24
_SLOW_SECONDS = (0.2, 2.0)
"""How long a slow client does nothing before it goes."""
_ANSWER_SECONDS = 60.0
_MOST_COMPLAINTS = 20
_SAMPLES = 50
"""How often memory is looked at."""
_GOOD_CODES = (
    "INVALID_ARGUMENT",
    "NOT_FOUND",
    "OUT_OF_RANGE",
    "UNIMPLEMENTED",
    "RESOURCE_EXHAUSTED",
)
"""Of gRPC, for hostile requests; a message that is too large exhausts resources."""


@dataclass
class HostileResult:
    """What came of a hostile load."""

    sent: Counter[str] = field(default_factory=Counter)
    """Requests by kind."""
    answers: dict[str, Counter[str]] = field(default_factory=dict)
    """By kind, how often there was which answer."""
    good_right: int = 0
    good_refused: int = 0
    largest_difference: float = 0.0
    """Between a good request's probability and what the model gives."""
    complaints: list[str] = field(default_factory=list)
    """What should not have been, the first ones."""
    complaint_count: int = 0
    resident_bytes: list[int] = field(default_factory=list)
    """Memory of the server, at even distances; none where it is not our own."""

    def complain(self, text: str) -> None:
        """Note what should not have been."""
        self.complaint_count += 1
        if len(self.complaints) < _MOST_COMPLAINTS:
            self.complaints.append(text)

    def growth(self) -> float:
        """Return by what share the largest memory of the second half exceeds that of the first."""
        half = len(self.resident_bytes) // 2
        if not half:
            return math.nan
        return max(self.resident_bytes[half:]) / max(self.resident_bytes[:half]) - 1


@dataclass(frozen=True, eq=False)
class _Good:
    """A good request and what answers it."""

    inputs: list[payloads.Tensor]
    probabilities: npt.NDArray[np.float32]


_Kind = Callable[["HostileLoad"], Awaitable[None]]


class HostileLoad:
    """Sends hostile and good requests.

    Args:
        model: The BUNDLE or RUN that is served.
        server: The server.
        model_name: What it calls the model.
        max_body: Bytes that it takes as a request.
        seed: Of the requests.

    Raises:
        UserError: The model is missing or damaged, or takes no raw rows.
    """

    def __init__(
        self,
        model: Path,
        server: Server,
        *,
        model_name: str = "dlrm",
        max_body: int = 8 << 20,
        seed: int = 1,
    ) -> None:
        self._server = server
        self._name = model_name
        self._max_body = max_body
        self._host = server.http
        self._path = f"/v2/models/{model_name}/infer"
        self._random = np.random.default_rng(seed)
        self._good = _good_requests(model, self._random)
        self._result = HostileResult()

    async def run(self, requests: int) -> HostileResult:
        """Send so many requests and return what came of them."""
        import grpc.aio

        kinds = list(_KINDS)
        shares = np.array([_KINDS[kind][1] for kind in kinds])
        drawn = self._random.choice(len(kinds), requests, p=shares / shares.sum())
        bar = progress("hostile load", requests, unit="requests")
        pending = iter(drawn.tolist())
        every = max(1, requests // _SAMPLES)
        done = 0

        async def work() -> None:
            nonlocal done
            for number in pending:
                kind = kinds[number]
                self._result.sent[kind] += 1
                try:
                    async with asyncio.timeout(_ANSWER_SECONDS):
                        await _KINDS[kind][0](self)
                except TimeoutError:
                    self._complain(kind, f"no answer within {_ANSWER_SECONDS:.0f} seconds")
                except OSError as error:
                    self._count(kind, type(error).__name__)
                    if kind in _GOOD_KINDS or isinstance(error, ConnectionRefusedError):
                        self._complain(kind, f"{type(error).__name__}: {error}")
                done += 1
                bar.update()
                if done % every == 0 and self._server.pid is not None:
                    self._result.resident_bytes.append(self._server.resident_bytes())

        async with grpc.aio.insecure_channel(self._server.grpc, _CHANNEL_OPTIONS) as channel:
            self._call = channel.unary_unary(GRPC_METHOD)
            async with asyncio.TaskGroup() as group:
                for _ in range(min(_AT_A_TIME, requests)):
                    group.create_task(work())
        return self._result

    def _count(self, kind: str, answer: str) -> None:
        self._result.answers.setdefault(kind, Counter())[answer] += 1

    def _complain(self, kind: str, text: str) -> None:
        self._result.complain(f"{kind}: {text}")

    def _pick(self) -> _Good:
        return self._good[self._random.integers(len(self._good))]

    def _below(self, limit: int) -> int:
        return int(self._random.integers(limit))

    # Good requests.

    async def good_json(self) -> None:
        """A good request in JSON."""
        good = self._pick()
        data = payloads.http_request(good.inputs, self._name, self._host, "json")
        self._check_http("good JSON", good, await self._exchange(data))

    async def good_binary(self) -> None:
        """A good request with binary tensors."""
        good = self._pick()
        data = payloads.http_request(good.inputs, self._name, self._host, "binary")
        self._check_http("good binary", good, await self._exchange(data))

    async def good_grpc(self) -> None:
        """A good request over gRPC."""
        good = self._pick()
        encoding: payloads.Encoding = "json" if self._below(2) else "binary"
        message = payloads.grpc_request(good.inputs, self._name, encoding)
        code, details, answer = await self._ask_grpc(message)
        self._count("good gRPC", code)
        if code in REFUSAL_CODES:
            self._result.good_refused += 1
        elif code != "OK":
            self._complain("good gRPC", f"{code} {details}")
        else:
            response = MESSAGES["ModelInferResponse"].FromString(answer)
            found = np.frombuffer(response.raw_output_contents[0], "<f4")
            self._check("good gRPC", good, found)

    def _check_http(self, kind: str, good: _Good, answer: _Answer | None) -> None:
        self._count(kind, "closed" if answer is None else str(answer.status))
        if answer is None:
            self._complain(kind, "the connection was closed without an answer")
        elif answer.status in REFUSALS:
            self._result.good_refused += 1
        elif answer.status != 200:
            self._complain(kind, f"status {answer.status}: {answer.body[:200]!r}")
        elif answer.json_length is not None:
            self._check(kind, good, np.frombuffer(answer.body[answer.json_length :], "<f4"))
        else:
            content = json.loads(answer.body)
            self._check(kind, good, np.array(content["outputs"][0]["data"]))

    def _check(self, kind: str, good: _Good, found: npt.NDArray[Any]) -> None:
        expected = good.probabilities
        if len(found) != len(expected):
            self._complain(kind, f"{len(found)} probabilities, expected {len(expected)}")
            return
        difference = float(np.abs(found - expected).max())
        self._result.largest_difference = max(self._result.largest_difference, difference)
        if difference <= TOLERANCE:
            self._result.good_right += 1
        else:
            self._complain(kind, f"probabilities differ by {difference}")

    # Hostile ones over HTTP.

    async def malformed_json(self) -> None:
        """JSON that is cut off, garbled, nested without end, or other than the protocol's."""
        body = self._body()
        choice = self._below(6)
        if choice == 0:
            body = body[: self._below(len(body) - 1)]
        elif choice == 1:
            body = b"[" * 50_000
        elif choice == 2:
            body = self._random.bytes(self._below(2000) + 1)
        elif choice == 3:
            others = (b"null", b"3", b'"dlrm"', b"[]", b"{}", b'{"inputs":{}}', b'{"inputs":[3]}')
            body = others[self._below(len(others))]
        elif choice == 4:
            body = body.replace(b'"inputs"', b'"inptus"', 1)
        else:
            body = b"\xff\xfe" + body
        await self._refused("malformed JSON", self._post(body))

    async def wrong_tensors(self) -> None:
        """Good JSON whose tensors are not the model's: shape, type, name, count or values."""
        content = json.loads(self._body())
        inputs = content["inputs"]
        chosen = inputs[self._below(len(inputs))]
        choice = self._below(9)
        if choice == 0:
            chosen["shape"] = [chosen["shape"][0] + 1, *chosen["shape"][1:]]
        elif choice == 1:
            chosen["shape"] = [[-1], [2**31, 2**31], [], [1] * 40, [0], ["1"]][self._below(6)]
        elif choice == 2:
            chosen["datatype"] = ("FP128", "", "BOOL", "INT9999")[self._below(4)]
        elif choice == 3:
            chosen["name"] = "no such feature" + "!" * self._below(300)
        elif choice == 4:
            inputs.append(dict(chosen))
        elif choice == 5:
            inputs.remove(chosen)
        elif choice == 6:
            chosen["data"] = [{"a": 1}] * len(chosen["data"])
        elif choice == 7:
            other = "no hexadecimal" if chosen["datatype"] == "BYTES" else 2**40
            chosen["data"] = [other] * len(chosen["data"])
        else:
            content["outputs"] = [{"name": "no such output"}]
        await self._refused("wrong tensors", self._post(json.dumps(content).encode()))

    async def truncated_binary(self) -> None:
        """Binary tensors that end early, lie about their length, or are of another type."""
        good = self._pick()
        whole = payloads.http_request(good.inputs, self._name, self._host, "binary")
        headers, _, body = whole.partition(b"\r\n\r\n")
        length = int(headers.rpartition(b": ")[2])
        choice = self._below(4)
        if choice == 0:
            body = body[: length + self._below(len(body) - length)]
        elif choice == 1:
            length = (0, length - 1, length + 1, len(body) + 10, 10**11)[self._below(5)]
        elif choice == 2:
            header = json.loads(body[:length])
            size = (-1, 2**40, "7", 0, 1.5)[self._below(5)]
            header["inputs"][0]["parameters"]["binary_data_size"] = size
            encoded = json.dumps(header).encode()
            body = encoded + body[length:]
            length = len(encoded)
        else:
            body += self._random.bytes(1 + self._below(100))
        await self._refused(
            "truncated binary", self._post(body, f"Inference-Header-Content-Length: {length}")
        )

    async def huge_body(self) -> None:
        """A body beyond the limit: announced, sent in chunks, or packed."""
        size = self._max_body + 1 + self._below(1 << 20)
        choice = self._below(4)
        if choice == 0:  # announced, and hardly begun
            await self._refused("huge body", self._head(10**12) + b"{" * 1000)
        elif choice == 1:
            packed = gzip.compress(b" " * size, 1)
            await self._refused("huge body", self._post(packed, "Content-Encoding: gzip"))
        elif choice == 2:
            chunk = b"%x\r\n" % (1 << 16) + b" " * (1 << 16) + b"\r\n"
            head = self._lines("Transfer-Encoding: chunked")
            data = head + chunk * (size // (1 << 16) + 1) + b"0\r\n\r\n"
            await self._refused("huge body", data)
        else:
            rows = 10**5
            content = {"inputs": [{"name": "sparse", "shape": [rows, 1], "datatype": "BYTES",
                                   "data": ["00000000"] * rows}]}  # fmt: skip
            await self._refused("huge body", self._post(json.dumps(content).encode()))

    async def slow_client(self) -> None:
        """A client that sends part of a request, waits, and goes or sends the rest."""
        good = self._pick()
        data = payloads.http_request(good.inputs, self._name, self._host, "binary")
        cut = 1 + self._below(len(data) - 1)
        reader, writer = await self._connect()
        try:
            writer.write(data[:cut])
            await writer.drain()
            await asyncio.sleep(self._random.uniform(*_SLOW_SECONDS))
            if self._below(2):
                self._count("slow client", "gone")
                return
            writer.write(data[cut:])
            answer = await _read_answer(reader)
            self._check_http("slow client", good, answer)
        finally:
            _reset(writer)

    async def dropped_connection(self) -> None:
        """A client that goes before its answer is there, or never says anything."""
        good = self._pick()
        data = payloads.http_request(good.inputs, self._name, self._host, "json")
        choice = self._below(3)
        _, writer = await self._connect()
        try:
            if choice:
                writer.write(data if choice == 1 else data[: self._below(len(data))])
                await writer.drain()
            self._count("dropped connection", "gone")
        finally:
            _reset(writer)

    async def no_http(self) -> None:
        """Bytes that are no HTTP, other methods and paths, headers without end."""
        choice = self._below(7)
        body = self._body()
        data = (
            self._random.bytes(1 + self._below(3000)) + b"\r\n\r\n",
            self._lines() + b"",
            b"PUT" + self._post(body)[4:],
            self._post(body).replace(self._path.encode(), b"/v2/models/../../etc/passwd", 1),
            self._post(body, "X-Long: " + "x" * 100_000),
            self._post(body, *[f"X-{number}: y" for number in range(5000)]),
            self._post(body).replace(b"Content-Length: ", b"Content-Length: -", 1),
        )[choice]
        await self._refused("no HTTP", data, may_close=True)

    async def broken_body(self) -> None:
        """A body that is packed or sent otherwise than its headers tell, or than anybody offers."""
        body = self._body()
        packed = gzip.compress(body, 1)
        cut = packed[: self._below(len(packed))]
        encoded = "Content-Encoding: gzip"
        chunked = self._lines("Transfer-Encoding: chunked") + b"%x\r\n%b\r\n" % (len(body), body)
        variants = (
            self._post(cut, encoded),
            self._post(packed + b"?", encoded),
            self._post(body, encoded),
            self._post(packed, f"{encoded}, gzip"),
            self._post(packed, "Content-Encoding: br"),
            self._post(body, "Expect: the unexpected"),
            chunked + b"no number\r\n",
            chunked.replace(b"chunked", b"gzip, chunked", 1) + b"0\r\n\r\n",
            self._lines("Transfer-Encoding: chunked", f"Content-Length: {len(body)}") + body,
            self._lines(f"Content-Length: {len(body)}", "Content-Length: 3") + body,
        )
        await self._refused("broken body", variants[self._below(len(variants))])

    # Hostile ones over gRPC.

    async def bad_grpc(self) -> None:
        """Messages that are no ModelInferRequest, or a wrong one."""
        good = self._pick()
        message = payloads.grpc_request(good.inputs, self._name, "binary")
        choice = self._below(5)
        if choice == 0:
            message = b"\xff" + self._random.bytes(self._below(1000))
        elif choice == 1:
            message = message[: len(message) - 1 - self._below(len(message) // 2)]
        else:
            request = MESSAGES["ModelInferRequest"].FromString(message)
            if choice == 2:
                request.raw_input_contents.pop()
            elif choice == 3:
                request.model_name = "no such model"
            else:
                request.raw_input_contents[0] = request.raw_input_contents[0][:-1]
            message = request.SerializeToString()
        await self._refused_grpc("bad gRPC", message)

    async def huge_grpc(self) -> None:
        """A message beyond the limit."""
        await self._refused_grpc("huge gRPC", bytes(self._max_body + 100))

    async def no_grpc(self) -> None:
        """Bytes on the port of gRPC that are no HTTP/2."""
        _, writer = await asyncio.open_connection(self._server.host, self._server.grpc_port)
        try:
            preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" if self._below(2) else b""
            writer.write(preface + self._random.bytes(1 + self._below(3000)))
            await writer.drain()
            self._count("no gRPC", "gone")
        finally:
            _reset(writer)

    # What they share.

    def _body(self) -> bytes:
        """Return the JSON of a good request."""
        data = payloads.http_request(self._pick().inputs, self._name, self._host, "json")
        return data.partition(b"\r\n\r\n")[2]

    def _lines(self, *headers: str) -> bytes:
        lines = [f"POST {self._path} HTTP/1.1", f"Host: {self._host}", *headers]
        return "\r\n".join([*lines, "", ""]).encode()

    def _head(self, length: int, *headers: str) -> bytes:
        return self._lines(f"Content-Length: {length}", *headers)

    def _post(self, body: bytes, *headers: str) -> bytes:
        return self._head(len(body), *headers) + body

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection(self._server.host, self._server.port)

    async def _exchange(self, data: bytes) -> _Answer | None:
        """Send bytes on a connection of their own; None: it was closed without an answer."""
        reader, writer = await self._connect()
        try:
            writer.write(data)
            sending = asyncio.create_task(writer.drain())
            answer = await _read_answer(reader)  # which may come before all is sent
            sending.cancel()
            await asyncio.gather(sending, return_exceptions=True)
            return answer
        finally:
            _reset(writer)

    async def _refused(self, kind: str, data: bytes, *, may_close: bool = False) -> None:
        """Send what has to be refused with a message."""
        answer = await self._exchange(data)
        self._count(kind, "closed" if answer is None else str(answer.status))
        if answer is None:
            if not may_close:
                self._complain(kind, f"the connection was closed without an answer: {data[:200]!r}")
            return
        if answer.status in REFUSALS:
            return
        told = b'"error"' in answer.body and b"Traceback" not in answer.body
        if not 400 <= answer.status < 500 or not told:
            text = f"status {answer.status}, {answer.body[:200]!r}, to {data[:300]!r}"
            self._complain(kind, text)

    async def _ask_grpc(self, message: bytes) -> tuple[str, str, bytes]:
        """Return code, details and answer of a call."""
        import grpc.aio

        try:
            return "OK", "", await self._call(message, timeout=_ANSWER_SECONDS)
        except grpc.aio.AioRpcError as error:
            return error.code().name, error.details() or "", b""

    async def _refused_grpc(self, kind: str, message: bytes) -> None:
        code, details, _ = await self._ask_grpc(message)
        self._count(kind, code)
        if code not in (*_GOOD_CODES, *REFUSAL_CODES) or "Traceback" in details:
            self._complain(kind, f"{code} {details[:200]}, to {message[:100]!r}")


def _good_requests(model: Path, generator: np.random.Generator) -> list[_Good]:
    predictor = load(model)
    schema = predictor.schema
    sizes = generator.integers(1, _MOST_ROWS + 1, _GOOD_REQUESTS)
    rows = payloads.made_up_rows(schema, model, int(sizes.sum()), generator)
    unknown = generator.random(rows.values.shape) < _UNKNOWN_SHARE
    others = generator.integers(0, 2**32, rows.values.shape, dtype=np.uint32)
    rows = payloads.PayloadRows(rows.dense, np.where(unknown, others, rows.values))
    found = []
    for number, (end, size) in enumerate(zip(np.cumsum(sizes), sizes, strict=True)):
        some = rows[int(end - size) : int(end)]
        user_share = 0.5 * (number % 2)
        inputs = payloads.tensors(schema, some, user_share)
        whole = payloads.with_one_user(some, user_share)
        probabilities, _ = predictor.predict_rows(whole.dense, whole.values)
        found.append(_Good(inputs, probabilities))
    return found


@dataclass(frozen=True)
class _Answer:
    """Of HTTP."""

    status: int
    body: bytes
    json_length: int | None


async def _read_answer(reader: asyncio.StreamReader) -> _Answer | None:
    """Read an answer; None: the connection was closed without one."""
    try:
        head = await reader.readuntil(b"\r\n\r\n")
        lines = head.decode("latin-1").split("\r\n")
        pairs = (line.partition(":") for line in lines[1:])
        headers = {name.strip().lower(): value.strip() for name, _, value in pairs}
        body = await reader.readexactly(int(headers.get("content-length", 0)))
    except (asyncio.IncompleteReadError, ConnectionError):
        return None
    length = headers.get("inference-header-content-length")
    return _Answer(int(lines[0].split()[1]), body, None if length is None else int(length))


def _reset(writer: asyncio.StreamWriter) -> None:
    """Close a connection at once, whatever is under way."""
    writer.transport.abort()


_CHANNEL_OPTIONS = (
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
)
_KINDS: dict[str, tuple[_Kind, float]] = {
    "good JSON": (HostileLoad.good_json, 12),
    "good binary": (HostileLoad.good_binary, 12),
    "good gRPC": (HostileLoad.good_grpc, 12),
    "malformed JSON": (HostileLoad.malformed_json, 12),
    "wrong tensors": (HostileLoad.wrong_tensors, 16),
    "truncated binary": (HostileLoad.truncated_binary, 12),
    "huge body": (HostileLoad.huge_body, 1),
    "broken body": (HostileLoad.broken_body, 8),
    "slow client": (HostileLoad.slow_client, 1),
    "dropped connection": (HostileLoad.dropped_connection, 8),
    "no HTTP": (HostileLoad.no_http, 5),
    "bad gRPC": (HostileLoad.bad_grpc, 8),
    "huge gRPC": (HostileLoad.huge_grpc, 0.2),
    "no gRPC": (HostileLoad.no_grpc, 1),
}
"""What is sent, and how often beside the others."""
_GOOD_KINDS = ("good JSON", "good binary", "good gRPC")
