"""The server that is measured: one of our own in another process, or one that runs already."""

from __future__ import annotations

import http.client
import json
import os
import shlex
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlsplit

from dlrm.errors import EnvironmentFaultError, UserError
from dlrm.runs import family

_STOP_SECONDS = 60.0
_TICKS = os.sysconf("SC_CLK_TCK")
_LISTENS = "0A"
"""A socket's state in ``/proc/net/tcp``."""
LOCALHOST = "127.0.0.1"


@dataclass(frozen=True)
class Server:
    """Where a server listens.

    Attributes:
        host: Its name or address.
        port: Of HTTP.
        grpc_port: Of gRPC.
        pid: The first of its processes; None: it is on another machine, or somebody else's.
    """

    host: str
    port: int
    grpc_port: int
    pid: int | None = None

    @property
    def http(self) -> str:
        """Host and port of HTTP."""
        return f"{self.host}:{self.port}"

    @property
    def grpc(self) -> str:
        """Host and port of gRPC."""
        return f"{self.host}:{self.grpc_port}"

    def get(self, path: str) -> Any:
        """Return what a path answers, as JSON.

        Raises:
            UserError: There is no server, or it answers otherwise.
        """
        connection = http.client.HTTPConnection(self.host, self.port, timeout=10)
        try:
            connection.request("GET", path)
            answer = connection.getresponse()
            body = answer.read()
            if answer.status != 200:
                raise UserError(
                    f"http://{self.http}{path} answers with status {answer.status}: "
                    f"{body[:200].decode(errors='replace')}. Expected a server of the Open "
                    "Inference Protocol; is the model's name right?"
                )
            return json.loads(body)
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise UserError(
                f"http://{self.http}{path} is not answered as expected: {error}. Start "
                "`dlrm serve`, or name the right address."
            ) from error
        finally:
            connection.close()

    def cpu_seconds(self) -> float:
        """Return the processor time that its processes have taken so far; NaN: not known."""
        if self.pid is None:
            return float("nan")
        return sum(map(_cpu_seconds, family(self.pid)))

    def resident_bytes(self) -> int:
        """Return the memory that its processes hold alone or share with each other (PSS)."""
        assert self.pid is not None
        return sum(map(_proportional_bytes, family(self.pid)))


@dataclass(frozen=True)
class OwnServer(Server):
    """A server that was started here.

    Attributes:
        process: What was started.
        log: Its standard error.
    """

    process: subprocess.Popen[bytes] = field(kw_only=True)
    log: IO[bytes] = field(kw_only=True)

    def said(self) -> str:
        """Return what it has written on standard error."""
        return _content(self.log)


def _content(log: IO[bytes]) -> str:
    # Not by seeking, which would move the place where the server writes.
    return os.pread(log.fileno(), os.fstat(log.fileno()).st_size, 0).decode(errors="replace")


def _stat(process: int) -> list[str]:
    """Return the fields of ``/proc/PID/stat`` from the third on; 0 of a process that has ended."""
    try:
        with open(f"/proc/{process}/stat") as file:
            return file.read().rpartition(")")[2].split()
    except OSError:
        return ["0"] * 50


def _cpu_seconds(process: int) -> float:
    fields = _stat(process)
    return (int(fields[11]) + int(fields[12])) / _TICKS  # utime and stime: 14 and 15 in proc(5)


def _parent(process: int) -> int:
    return int(_stat(process)[1])


def _proportional_bytes(process: int) -> int:
    try:
        with open(f"/proc/{process}/smaps_rollup") as file:
            lines = dict(line.split(":", 1) for line in file if ":" in line)
    except OSError:
        return 0
    return 1024 * int(lines["Pss"].split()[0])


def server_at(url: str, grpc_port: int) -> Server:
    """Return the server at an address such as http://localhost:8000.

    Raises:
        UserError: It is no such address.
    """
    try:
        parts = urlsplit(url)
        port = parts.port or 80
    except ValueError as error:
        raise UserError(f"--url {url!r} is no address: {error}.") from error
    if parts.scheme != "http" or not parts.hostname or parts.path.strip("/"):
        raise UserError(f"--url must be like http://localhost:8000; got {url!r}.")
    return Server(parts.hostname, port, grpc_port, listening(parts.hostname, port))


def listening(host: str, port: int) -> int | None:
    """Return the process that listens on a port; of several that share it, the one they are from.

    None: it is on another machine, or somebody else's.
    """
    try:
        # Of other machines an address cannot be bound.
        socket.create_server((socket.gethostbyname(host), 0)).close()
    except OSError:
        return None
    sockets = set()
    for table in ("tcp", "tcp6"):
        with suppress(OSError), open(f"/proc/net/{table}") as file:
            for fields in map(str.split, file.readlines()[1:]):
                if fields[3] == _LISTENS and int(fields[1].rpartition(":")[2], 16) == port:
                    sockets.add(f"socket:[{fields[9]}]")
    parents = {
        int(each): _parent(int(each))
        for each in os.listdir("/proc")
        if each.isdecimal() and not sockets.isdisjoint(_open_files(int(each)))
    }
    return next((each for each, parent in parents.items() if parent not in parents), None)


def _open_files(process: int) -> Iterator[str]:
    """Give what a process's file descriptors lead to; nothing of somebody else's."""
    with suppress(OSError):
        for each in os.listdir(f"/proc/{process}/fd"):
            with suppress(OSError):
                yield os.readlink(f"/proc/{process}/fd/{each}")


@contextmanager
def own_server(
    model: Path,
    model_name: str = "dlrm",
    options: str = "",
    *,
    program: Sequence[str] = (sys.executable, "-m", "dlrm"),
    environment: Mapping[str, str] | None = None,
) -> Iterator[OwnServer]:
    """Serve a model in a process of its own, on free ports of this machine, until the context ends.

    Args:
        model: A BUNDLE or a RUN.
        model_name: What it calls the model.
        options: More of ``dlrm serve``'s, as in a shell.
        program: The command ``dlrm``.
        environment: Its variables; None: ours.

    Raises:
        UserError: The server does not take the model or the options.
        EnvironmentFaultError: It does not become ready.
    """
    command = [*program, "serve", str(model), "--host", LOCALHOST]
    command += ["--port", "0", "--grpc-port", "0", "--model-name", model_name]
    command += shlex.split(options)
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=log,
            env=environment,
        )
        try:
            yield _when_ready(process, log)
        finally:
            process.terminate()
            try:
                process.wait(_STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            assert process.stdout is not None
            process.stdout.close()


def _when_ready(process: subprocess.Popen[bytes], log: IO[bytes]) -> OwnServer:
    """Wait for the line in which a server tells where it listens."""
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        status = process.wait()
        said = "\n".join(_content(log).strip().splitlines()[-5:])
        message = f"dlrm serve did not start: {said}"
        raise UserError(message) if status == 2 else EnvironmentFaultError(message)
    places = json.loads(line)
    # Port 0: it has no gRPC.
    http_port, grpc_port = (
        int(places.get(each, ":0").rpartition(":")[2]) for each in ("http", "grpc")
    )
    pid = listening(LOCALHOST, http_port) or process.pid  # another, if a wrapper was started
    return OwnServer(LOCALHOST, http_port, grpc_port, pid, process=process, log=log)
