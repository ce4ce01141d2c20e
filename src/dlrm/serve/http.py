"""The service over HTTP: the protocol's paths, /metrics, and limits that keep a process alive."""

from __future__ import annotations

import asyncio
import logging
import re
import time
import zlib
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

import msgspec
from aiohttp import HttpVersion11, web
from aiohttp.http import RawRequestMessage

from dlrm.config import size_bytes
from dlrm.serve.access import AccessLog
from dlrm.serve.card import page
from dlrm.serve.protocol import RefusedError, read_http, write_http, wrong
from dlrm.serve.service import Service, Stopwatch, log_failure

_JSON = "application/json"
_BINARY = "application/octet-stream"
_HEADER_LENGTH = "Inference-Header-Content-Length"
_PACK_BYTES = 1024
"""Answers of more bytes are compressed for clients that ask for it."""

_WINDOW_BITS = {"gzip": 31, "x-gzip": 31, "deflate": 15}
"""Of the encodings of bodies, zlib's name for their formats."""

_ARRIVAL_SECONDS = 0.2
"""In which a request arrives whose connection was accepted last."""

Handler = Callable[["Http", web.BaseRequest, dict[str, str]], Awaitable[web.Response]]


class Http:
    """Answers HTTP requests with a service.

    Args:
        service: What answers them.
        access: Who learns of them.
    """

    def __init__(self, service: Service, access: AccessLog) -> None:
        self._service = service
        self._access = access
        self._max_body = size_bytes(service.config.max_body, "--max-body")
        self.server = _Server(self, service, self._max_body)

    async def __call__(self, request: web.BaseRequest) -> web.Response:
        """Answer a request; whatever happens, as the protocol says."""
        busy = self.server.busy
        busy.add(request.protocol)
        try:
            return await self._answered(request)
        finally:
            busy.discard(request.protocol)

    async def _answered(self, request: web.BaseRequest) -> web.Response:
        took = Stopwatch()
        method = "other"
        try:
            method, handler, found = _route(request)
            _refuse_expectations(request)
            response = await handler(self, request, found)
        except RefusedError as error:
            response = _refusal(error)
        except asyncio.CancelledError:  # the client has gone, and the transport with it
            self._service.metrics.request("http", method, "gone")
            raise
        except Exception as error:
            message = log_failure(f"{request.method} {request.path}", error)
            response = _answer({"error": message}, 500)
        if self._service.draining:
            response.force_close()
        milliseconds = took()
        self._service.metrics.request("http", method, str(response.status))
        if method == "infer":
            self._service.metrics.answered("http", milliseconds / 1e3)
        self._access.note("http", method, str(response.status), milliseconds, request.remote)
        return response

    async def _body(self, request: web.BaseRequest) -> bytes:
        """Read the body of a request, unpacked.

        Raises:
            RefusedError: It is too large (413), comes too slowly (408), is packed or sent otherwise
                than is offered (415), or is damaged.
        """
        limit = self._max_body
        if (request.content_length or 0) > limit:
            raise _too_large(limit)
        encoding = _header(request, "Content-Encoding").lower()
        if encoding not in ("", "identity", *_WINDOW_BITS):
            raise RefusedError(
                415,
                f"the body's Content-Encoding is {encoding[:40]!r}; expected gzip, deflate or "
                "none.",
            )
        transfer = _header(request, "Transfer-Encoding").lower()
        if transfer not in ("", "chunked"):
            raise RefusedError(
                415, f"the Transfer-Encoding is {transfer[:40]!r}; expected chunked or none."
            )
        if _header(request, "Expect") and request.version >= HttpVersion11:
            await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            request.writer.output_size = 0
        try:
            async with asyncio.timeout(self._service.config.read_timeout):
                body = await request.read()
        except web.HTTPRequestEntityTooLarge as error:
            raise _too_large(limit) from error
        except TimeoutError as error:
            raise RefusedError(
                408,
                f"the body did not arrive within {self._service.config.read_timeout:g} seconds.",
            ) from error
        except web.RequestPayloadError as error:
            raise wrong(str(error)) from error
        if encoding in _WINDOW_BITS:
            return await asyncio.to_thread(_unpacked, body, encoding, limit)
        return body

    async def live(self, request: web.BaseRequest, found: dict[str, str]) -> web.Response:
        """Whether the process runs."""
        return _answer({"live": True})

    async def ready(self, request: web.BaseRequest, found: dict[str, str]) -> web.Response:
        """Whether requests are answered."""
        ready = self._service.ready
        return _answer({"ready": ready}, 200 if ready else 503)

    async def model_ready(self, request: web.BaseRequest, found: dict[str, str]) -> web.Response:
        """Whether requests to a model are answered."""
        ready = self._service.is_model_ready(found["model"], found["version"])
        return _answer({"name": found["model"], "ready": ready}, 200 if ready else 503)

    async def server_metadata(
        self, request: web.BaseRequest, found: dict[str, str]
    ) -> web.Response:
        """What the server is."""
        return _answer(self._service.metadata())

    async def model_metadata(self, request: web.BaseRequest, found: dict[str, str]) -> web.Response:
        """What a model takes and gives."""
        return _answer(self._service.find(found["model"], found["version"]).metadata())

    async def infer(self, request: web.BaseRequest, found: dict[str, str]) -> web.Response:
        """The model's answer."""
        model = self._service.find(found["model"], found["version"])
        body = await self._body(request)
        length = _header(request, _HEADER_LENGTH)
        if not re.fullmatch(r"[0-9]{0,12}", length):
            raise wrong(f"{_HEADER_LENGTH} must be a number of bytes; got {length[:40]!r}.")
        header = int(length) if length else None
        size = len(body) if header is None else header + len(body) // 8
        answer = await self._service.infer(model, partial(read_http, body, header), size)
        content, json_length = write_http(answer)
        response = web.Response(body=content, content_type=_BINARY if json_length else _JSON)
        if json_length is not None:
            response.headers[_HEADER_LENGTH] = str(json_length)
        if len(content) > _PACK_BYTES:
            response.enable_compression()
        return response

    async def index(self, request: web.BaseRequest, found: dict[str, str]) -> web.Response:
        """Which models there are."""
        options = _options(await self._body(request))
        return _answer(self._service.index(only_ready=options.get("ready") is True))

    async def load(self, request: web.BaseRequest, found: dict[str, str]) -> web.Response:
        """Load the model anew."""
        _options(await self._body(request))
        await self._service.load(found["model"])
        return _answer({})

    async def unload(self, request: web.BaseRequest, found: dict[str, str]) -> web.Response:
        """Refuse to be without a model."""
        raise wrong("the model is not unloaded: the server has no other. End the server instead.")

    async def page(self, request: web.BaseRequest, found: dict[str, str]) -> web.Response:
        """A page for people."""
        shown = page()
        headers = {
            "Content-Security-Policy": shown.policy,
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",
            "Cache-Control": "no-cache",
        }
        response = web.Response(
            body=shown.content, content_type="text/html", charset="utf-8", headers=headers
        )
        response.enable_compression()
        return response

    async def card(self, request: web.BaseRequest, found: dict[str, str]) -> web.Response:
        """What the page shows of the model."""
        return _answer(self._service.find(self._service.config.model_name, "").card)

    async def metrics(self, request: web.BaseRequest, found: dict[str, str]) -> web.Response:
        """What Prometheus asks for."""
        text, kind = self._service.metrics.text()
        return web.Response(body=text, headers={"Content-Type": kind})


_NAME = r"(?P<model>[^/]+)"
_VERSION = r"(?:/versions/(?P<version>[^/]+))?"
_ROUTES: tuple[tuple[str, str, str, Handler], ...] = (
    ("GET", r"/v2/health/live", "live", Http.live),
    ("GET", r"/v2/health/ready", "ready", Http.ready),
    ("GET", r"/v2/?", "server_metadata", Http.server_metadata),
    ("GET", rf"/v2/models/{_NAME}{_VERSION}", "model_metadata", Http.model_metadata),
    ("GET", rf"/v2/models/{_NAME}{_VERSION}/ready", "model_ready", Http.model_ready),
    ("POST", rf"/v2/models/{_NAME}{_VERSION}/infer", "infer", Http.infer),
    ("POST", r"/v2/repository/index", "index", Http.index),
    ("POST", rf"/v2/repository/models/{_NAME}/load", "load", Http.load),
    ("POST", rf"/v2/repository/models/{_NAME}/unload", "unload", Http.unload),
    ("GET", r"/metrics", "metrics", Http.metrics),
    ("GET", r"/", "page", Http.page),
    ("GET", r"/card", "card", Http.card),
)
"""HTTP's method, the path, the name in metrics, and what answers."""
_COMPILED = [(verb, re.compile(path), name, of) for verb, path, name, of in _ROUTES]


def _route(request: web.BaseRequest) -> tuple[str, Handler, dict[str, str]]:
    verbs = []
    for verb, path, name, handler in _COMPILED:
        if match := path.fullmatch(request.path):
            if request.method == verb or (request.method == "HEAD" and verb == "GET"):
                return name, handler, match.groupdict(default="")
            verbs += [verb, "HEAD"] if verb == "GET" else [verb]
    if verbs:
        message = f"{request.path[:200]} takes {' and '.join(verbs)} alone."
        raise RefusedError(405, message, allow=verbs)
    raise RefusedError(404, f"there is nothing at {request.path[:200]}.")


def _header(request: web.BaseRequest, name: str) -> str:
    """Return the value of a header; of one that comes several times, the list of its values."""
    return ", ".join(request.headers.getall(name, ())).strip()


def _refuse_expectations(request: web.BaseRequest) -> None:
    expected = _header(request, "Expect")
    if expected.lower() not in ("", "100-continue"):
        raise RefusedError(
            417, f"the request expects {expected[:40]!r} of the server; it offers 100-continue."
        )


def _unpacked(body: bytes, encoding: str, limit: int) -> bytes:
    """Return a body unpacked.

    Args:
        body: As it came.
        encoding: One of ``_WINDOW_BITS``.
        limit: Bytes that it may have.

    Raises:
        RefusedError: It has more (413), or is damaged.
    """
    bits = _WINDOW_BITS[encoding]
    if encoding == "deflate" and body[:1] and body[0] & 15 != zlib.DEFLATED:
        bits = -bits  # the bare format, which some send by that name
    unpacks = zlib.decompressobj(bits)
    try:
        content = unpacks.decompress(body, limit + 1)
    except zlib.error as error:
        raise wrong(f"the body is damaged, it is no {encoding}: {error}.") from error
    if len(content) > limit:
        raise _too_large(limit)
    if not unpacks.eof:
        raise wrong(f"the body is cut off: its {encoding} has no end.")
    if unpacks.unused_data:
        raise wrong(
            f"the body has {len(unpacks.unused_data)} bytes behind the end of its {encoding}."
        )
    return content


def _options(body: bytes) -> dict[str, Any]:
    if not body:
        return {}
    try:
        return msgspec.json.decode(body, type=dict[str, Any])
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise wrong(f"the body is no JSON object: {error}.") from error


def _answer(content: Any, status: int = 200) -> web.Response:
    return web.Response(body=msgspec.json.encode(content), status=status, content_type=_JSON)


def _refusal(error: RefusedError) -> web.Response:
    response = _answer({"error": str(error)}, error.status)
    if error.retry_after:
        response.headers["Retry-After"] = str(error.retry_after)
    if error.allow:
        response.headers["Allow"] = ", ".join(error.allow)
    if error.status in (408, 413):
        response.force_close()
    return response


def _too_large(limit: int) -> RefusedError:
    return RefusedError(413, f"the body is larger than {limit} bytes. Send several requests.")


def _no_http(fault: str) -> str:
    """Return what a client is told of what the parser found: its words, and where."""
    lines = [line.strip() for line in fault.splitlines()]
    shown = " ".join(line for line in lines if line not in ("", "^", "b''"))
    return f"this cannot be read as HTTP: {shown[:300].rstrip(':')}."


class _Connection(web.RequestHandler):
    """A connection whose failures are told as the protocol tells them."""

    def data_received(self, data: bytes) -> None:
        """Take bytes; a body in which they cannot be read any more has failed."""
        super().data_received(data)
        # aiohttp tells of a fault when what came before it is answered, which would wait for the
        # rest of its body.
        if self._messages and not isinstance(fault := self._messages[-1][0], RawRequestMessage):
            bodies = [body for _, body in self._messages]
            if self._current_request is not None:
                bodies.append(self._current_request.content)
            for body in bodies:
                if not body.is_eof():
                    body.set_exception(web.RequestPayloadError(_no_http(fault.message)))

    def log_exception(self, *args: Any, **kw: Any) -> None:
        """Log what ended a connection, unless a client sent it."""
        error = kw.get("exc_info")
        if isinstance(error, BaseException) and not isinstance(error, web.RequestPayloadError):
            log_failure("a connection", error)

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """Answer a request that could not be read, or whose answer could not be made."""
        if status >= 500 and exc is not None:
            text = log_failure("a connection", exc)
        else:
            text = _no_http(message or "")
        response = _answer({"error": text}, status)
        response.force_close()
        return response


class _Server(web.Server):
    """Makes connections, as many as there may be."""

    def __init__(self, http: Http, service: Service, max_body: int) -> None:
        super().__init__(
            http, request_factory=_request_factory(max_body), handler_cancellation=True
        )
        self.busy: set[web.RequestHandler] = set()
        """Connections that a request comes from."""
        self._metrics = service.metrics
        self._max_connections = service.config.max_connections
        self._idle_timeout = service.config.idle_timeout

    def __call__(self) -> web.RequestHandler:
        return _Connection(
            self,
            loop=asyncio.get_running_loop(),
            keepalive_timeout=self._idle_timeout,
            access_log=None,  # type: ignore[arg-type]  # which means none
            logger=logging.getLogger("dlrm.http"),
            lingering_time=1.0,
            max_headers=64,
            # aiohttp's takes gzip that is cut off, and other encodings by what is installed.
            auto_decompress=False,
        )

    async def end(self, timeout: float) -> None:
        """Answer what has been asked, then close every connection.

        ``shutdown`` reads nothing more of requests of which a part is still on its way.

        Args:
            timeout: Seconds that requests may take.
        """
        until = time.monotonic() + timeout
        await asyncio.sleep(_ARRIVAL_SECONDS)
        while True:
            for connection in self.connections:
                if connection not in self.busy:
                    connection.close()
            if not self.busy or time.monotonic() > until:
                break
            await asyncio.sleep(0.02)
        await self.shutdown(max(0.5, until - time.monotonic()))

    def connection_made(self, handler: web.RequestHandler, transport: asyncio.Transport) -> None:
        super().connection_made(handler, transport)
        self._metrics.connections.set(len(self.connections))
        if len(self.connections) > self._max_connections:
            content = b'{"error":"the server has too many connections."}'
            transport.write(
                b"HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\n"
                b"Retry-After: 1\r\nConnection: close\r\nContent-Length: %d\r\n\r\n%s"
                % (len(content), content)
            )
            transport.close()

    def connection_lost(
        self, handler: web.RequestHandler, exc: BaseException | None = None
    ) -> None:
        super().connection_lost(handler, exc)
        self._metrics.connections.set(len(self.connections))


def _request_factory(limit: int) -> Any:
    def make(message: Any, payload: Any, protocol: Any, writer: Any, task: Any) -> web.BaseRequest:
        loop = asyncio.get_running_loop()
        return web.BaseRequest(
            message, payload, protocol, writer, task, loop, client_max_size=limit
        )

    return make
