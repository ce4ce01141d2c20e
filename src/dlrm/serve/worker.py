"""A process that answers requests, until its supervisor ends or tells it to."""

from __future__ import annotations

import asyncio
import ctypes
import gc
import json
import logging
import os
import resource
import shutil
import signal
import socket
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dlrm.config import ServeConfig
from dlrm.errors import EnvironmentFaultError, UserError
from dlrm.serve.access import AccessLog
from dlrm.serve.batching import Batcher
from dlrm.serve.http import Http
from dlrm.serve.metrics import Metrics
from dlrm.serve.model import ServedModel
from dlrm.serve.service import Service

logger = logging.getLogger("dlrm")

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_KEPT_BYTES = 1 << 25  # the most that glibc takes for M_MMAP_THRESHOLD


@dataclass(frozen=True)
class Place:
    """What a worker shares with others.

    Attributes:
        listener: Of HTTP; all workers accept from it.
        grpc_address: Which each worker binds anew; empty: no gRPC.
        metrics: A folder.
    """

    listener: socket.socket
    grpc_address: str
    metrics: Path


def run_worker(config: ServeConfig, place: Place, control: socket.socket, *, replaces: bool) -> int:
    """Answer requests; returns the exit status of the process.

    Args:
        config: Limits.
        place: Where.
        control: To the supervisor: it tells what to load, and is told how that went.
        replaces: Others answer meanwhile, so this one takes no connections before it has a model.
    """
    # A batch is scored by one thread: a team of them waits for its slowest, whose core may be busy
    # with requests or somebody else's work. On two busy cores that is 20 ms instead of 2.
    torch.set_num_threads(1)
    _keep_memory()
    _allow_files(2 * config.max_connections + 256)
    # The event loop waits at most so long for a thread that reads a large request.
    sys.setswitchinterval(0.001)
    return asyncio.run(_Worker(config, place, control).run(replaces=replaces))


def _keep_memory() -> None:
    """Let the C library keep what is freed for the next request, as far as it can be told to.

    It would give a batch's memory back to the system and get it anew, page by page, for the next.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):  # glibc's
        for option in (_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD):
            libc.mallopt(option, _KEPT_BYTES)


def _allow_files(count: int) -> None:
    """Raise how many files and connections may be open, as far as that goes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < count:
        most = count if hard == resource.RLIM_INFINITY else min(count, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


class _Worker:
    def __init__(self, config: ServeConfig, place: Place, control: socket.socket) -> None:
        self._config = config
        self._place = place
        self._control = control
        self._told: list[asyncio.Future[str]] = []
        self._ends = asyncio.Event()

    async def run(self, *, replaces: bool) -> int:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._ends.set)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # meant for the supervisor
        reader, self._writer = await asyncio.open_connection(sock=self._control)
        self._metrics = metrics = Metrics(self._place.metrics)
        batcher = Batcher(self._config, metrics)
        self._service = Service(self._config, metrics, batcher, self._ask_for_reload)
        if replaces and not await self._load(json.loads(await reader.readline() or b"{}")):
            return 1
        access = AccessLog(self._config.access_log)
        http = Http(self._service, access)
        listening = await loop.create_server(http.server, sock=self._place.listener)
        rpc = None
        if self._place.grpc_address:
            from dlrm.serve.rpc import Rpc

            rpc = Rpc(self._service, access)
            rpc.server.add_insecure_port(self._place.grpc_address)
            await rpc.server.start()
        listens = asyncio.create_task(self._listen(reader))
        await self._ends.wait()

        # Those who send requests learn first that they should no more, and what they send until
        # then is answered.
        self._service.draining = True
        await asyncio.sleep(self._config.drain_seconds)
        listening.close()
        grace = self._config.shutdown_timeout
        stopping = [http.server.end(grace)]
        if rpc is not None:
            stopping.append(rpc.server.stop(grace))
        await asyncio.gather(*stopping)
        await batcher.close()
        if listens.done():  # the supervisor was killed, and removes nothing any more
            shutil.rmtree(self._place.metrics, ignore_errors=True)
        listens.cancel()
        return 0

    async def _listen(self, reader: asyncio.StreamReader) -> None:
        """Do what the supervisor says."""
        while line := await reader.readline():
            message = json.loads(line)
            if "load" in message:
                await self._load(message)
            else:
                for each in self._told:
                    if not each.done():  # its client may have gone
                        each.set_result(message["reloaded"])
                self._told.clear()
        self._ends.set()  # without a supervisor nobody could end this process

    async def _load(self, message: dict[str, Any]) -> bool:
        """Load what a message names, serve it, and say how that went; returns whether it did."""
        if not message:  # the supervisor has ended
            return False
        outcome: dict[str, Any]
        path = Path(message["load"])
        try:
            model = await asyncio.to_thread(self._load_and_warm_up, path, message["verified"])
            if model.version != message["version"]:
                raise UserError(
                    f"{path} has changed since it was checked: it is version {model.version}, "
                    f"expected {message['version']}. Load it anew."
                )
        except (UserError, EnvironmentFaultError) as error:
            outcome = {"failed": str(error)}
        except Exception as error:
            logger.error("cannot load %s", path, exc_info=error)
            outcome = {"failed": f"{type(error).__name__}: {error}"}
        else:
            self._service.serve(model)
            # What is there now stays: to look through it for garbage takes tens of milliseconds.
            gc.unfreeze()
            gc.collect()
            gc.freeze()
            outcome = {"loaded": model.version}
        (how,) = outcome
        self._metrics.loads.labels(how).inc()
        self._say(outcome)
        return how == "loaded"

    def _load_and_warm_up(self, path: Path, verified: bool) -> ServedModel:
        name, most_rows = self._config.model_name, self._config.max_request_rows
        model = ServedModel.load(path, name, most_rows, verified=verified)
        model.warm_up(self._config.max_batch_rows)
        return model

    async def _ask_for_reload(self) -> str:
        told: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._told.append(told)
        self._say({"reload": os.getpid()})
        return await told

    def _say(self, message: dict[str, Any]) -> None:
        self._writer.write(json.dumps(message).encode() + b"\n")
