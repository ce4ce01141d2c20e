"""The service over gRPC."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Any

import grpc
import grpc.aio
from google.protobuf.message import DecodeError

from dlrm.config import size_bytes
from dlrm.serve.access import AccessLog
from dlrm.serve.messages import MESSAGES, METHODS, SERVICE
from dlrm.serve.protocol import RefusedError, read_grpc, write_grpc, wrong
from dlrm.serve.service import Service, Stopwatch, log_failure

_CODES = {
    400: grpc.StatusCode.INVALID_ARGUMENT,
    404: grpc.StatusCode.NOT_FOUND,
    413: grpc.StatusCode.INVALID_ARGUMENT,
    503: grpc.StatusCode.UNAVAILABLE,
    504: grpc.StatusCode.DEADLINE_EXCEEDED,
}


class Rpc:
    """Answers gRPC calls with a service.

    Args:
        service: What answers them.
        access: Who learns of them.
    """

    def __init__(self, service: Service, access: AccessLog) -> None:
        self._service = service
        self._access = access
        limit = size_bytes(service.config.max_body, "--max-body")
        self.server = grpc.aio.server(
            options=(
                ("grpc.max_receive_message_length", limit),
                ("grpc.so_reuseport", 1),
                ("grpc.max_connection_idle_ms", int(1000 * service.config.idle_timeout)),
            ),
            maximum_concurrent_rpcs=service.config.max_connections,
        )
        handlers = {name: self._handler(name) for name in METHODS}
        self.server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler(SERVICE, handlers),)
        )

    def _handler(self, name: str) -> Any:
        answer = getattr(self, f"_{name}")
        kind = MESSAGES[f"{name}Request"]

        async def handle(content: bytes, context: Any) -> Any:
            took = Stopwatch()
            code = grpc.StatusCode.OK
            try:
                try:
                    request = kind.FromString(content)
                except DecodeError as error:
                    raise wrong(f"the message is no {name}Request.") from error
                return await answer(request, context)
            except RefusedError as error:
                code = _CODES[error.status]
                await context.abort(code, str(error))
            except asyncio.CancelledError:
                code = grpc.StatusCode.CANCELLED
                raise
            except Exception as error:
                if isinstance(error, grpc.aio.AbortError):
                    raise
                code = grpc.StatusCode.INTERNAL
                await context.abort(code, log_failure(name, error))
            finally:
                milliseconds = took()
                self._service.metrics.request("grpc", name, code.name)
                if name == "ModelInfer" and code is not grpc.StatusCode.CANCELLED:
                    self._service.metrics.answered("grpc", milliseconds / 1e3)
                self._access.note("grpc", name, code.name, milliseconds, context.peer())

        return grpc.unary_unary_rpc_method_handler(
            handle,
            response_serializer=MESSAGES[f"{name}Response"].SerializeToString,
        )

    async def _ServerLive(self, request: Any, context: Any) -> Any:  # noqa: N802
        return MESSAGES["ServerLiveResponse"](live=True)

    async def _ServerReady(self, request: Any, context: Any) -> Any:  # noqa: N802
        return MESSAGES["ServerReadyResponse"](ready=self._service.ready)

    async def _ModelReady(self, request: Any, context: Any) -> Any:  # noqa: N802
        ready = self._service.is_model_ready(request.name, request.version)
        return MESSAGES["ModelReadyResponse"](ready=ready)

    async def _ServerMetadata(self, request: Any, context: Any) -> Any:  # noqa: N802
        return MESSAGES["ServerMetadataResponse"](**self._service.metadata())

    async def _ModelMetadata(self, request: Any, context: Any) -> Any:  # noqa: N802
        metadata = self._service.find(request.name, request.version).metadata()
        return MESSAGES["ModelMetadataResponse"](**metadata)

    async def _ModelInfer(self, request: Any, context: Any) -> Any:  # noqa: N802
        model = self._service.find(request.model_name, request.model_version)
        size = request.ByteSize() // 8
        waits = context.time_remaining()
        answer = await self._service.infer(model, partial(read_grpc, request), size, waits)
        return write_grpc(answer)

    async def _RepositoryIndex(self, request: Any, context: Any) -> Any:  # noqa: N802
        models = self._service.index(only_ready=request.ready)
        return MESSAGES["RepositoryIndexResponse"](models=models)

    async def _RepositoryModelLoad(self, request: Any, context: Any) -> Any:  # noqa: N802
        await self._service.load(request.model_name)
        return MESSAGES["RepositoryModelLoadResponse"]()

    async def _RepositoryModelUnload(self, request: Any, context: Any) -> Any:  # noqa: N802
        raise wrong("the model is not unloaded: the server has no other. End the server instead.")
