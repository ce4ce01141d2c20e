"""Prepares in forks of one warm process, which may be told to kill themselves on the way.

``python interrupted.py`` reads requests, a line of JSON each, and answers each with a line: how the
fork ended, and what it said. Importing takes seconds and a fork milliseconds, so that hundreds of
interruptions can be tried.
"""

from __future__ import annotations

import builtins
import errno
import gc
import importlib
import io
import json
import logging
import os
import re
import resource
import select
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
from tqdm import tqdm

from dlrm import cli, files
from dlrm.config import PrepareConfig
from dlrm.data import (
    criteo,
    fitting,
    lines,
    numbering,
    plan,
    prepare,
    reading,
    row_parser,
    sources,
    verification,
)
from dlrm.data import dataset as dataset_module
from dlrm.data.dataset import Manifest, WrittenPart
from dlrm.data.fitting import FittedFeature
from dlrm.data.spool import Segment
from dlrm.data.work import Inputs
from dlrm.errors import EnvironmentFaultError, UserError
from dlrm.ops.library import Library, library
from dlrm.schema import FeatureSchema

Tell = Callable[[str, str, str], None]
"""Told of what is about to be done, or was done: the moment, the operation, the file."""


def serve() -> None:
    # Or else each child would do it.
    library()
    # pyarrow imports pandas when it first converts an array of raw rows.
    for module in ("multiprocessing.synchronize", "numpy.random", "pandas", "pyarrow.compute"):
        importlib.import_module(module)
    for kind in (Inputs, Segment, FittedFeature, WrittenPart, Manifest, FeatureSchema):
        msgspec.json.Decoder(kind)
    gc.freeze()  # so that what a fork's collector looks at is not copied
    for line in sys.stdin:
        request = json.loads(line)
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(reader)
            # A lock of this process alone: one that is killed would leave the common one held.
            tqdm.set_lock(threading.RLock())
            _answer(request, writer)
        os.close(writer)
        said = b""
        deadline = time.monotonic() + request.get("kill_after", 600)
        while True:
            wait = max(0.0, deadline - time.monotonic()) if deadline else None
            if not select.select([reader], [], [], wait)[0]:
                os.kill(child, request.get("signal_after", signal.SIGKILL))
                deadline = 0.0
            elif chunk := os.read(reader, 1 << 16):
                said += chunk
            else:
                break
        os.close(reader)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        sys.stdout.write(json.dumps({"status": status, "said": said.decode()}) + "\n")
        sys.stdout.flush()


def _answer(request: dict[str, Any], said: int) -> None:
    os.dup2(said, 1)
    os.dup2(said, 2)
    os.close(said)
    status: Any = 1
    try:
        _set_up(request)
        if "command" in request:
            cli.main(request["command"])
        prepare.prepare(
            request["source"],
            request["dataset"],
            msgspec.convert(request.get("config", {}), PrepareConfig),
            memory=request.get("memory", "2GiB"),
            overwrite=request.get("overwrite", False),
        )
        status = 0
    except SystemExit as end:
        status = end.code
    except (UserError, EnvironmentFaultError) as error:
        status = 2 if isinstance(error, UserError) else 3
        sys.stderr.write(f"error: {error}\n")
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _set_up(request: dict[str, Any]) -> None:
    """Make things as small as a request says, and make it fail where it is to fail."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    # A flush matters when the machine stops, not the process; here it would take most of the time.
    os.fsync = lambda _: None
    if "stdin" in request:
        os.dup2(os.open(request["stdin"], os.O_RDONLY), 0)
        sys.stdin = open(0, closefd=False)
    if "segment_rows" in request:
        reading.SEGMENT_ROWS = request["segment_rows"]
    if "read_bytes" in request:
        blocks = criteo.read_blocks
        criteo.read_blocks = lambda path, **options: blocks(  # type: ignore[assignment]
            path, block_bytes=request["read_bytes"], **options
        )
    for name in ("BLOCK_BYTES", "PART_BYTES"):
        if name.lower() in request:
            setattr(dataset_module, name, request[name.lower()])
    if "table_bytes" in request:
        read_raw = sources.read_raw
        sources.read_raw = lambda *arguments, table_bytes, **options: read_raw(  # type: ignore[assignment]
            *arguments, table_bytes=request["table_bytes"], **options
        )
    if "fit_bytes" in request:
        fitting._LEAST_BYTES = 0
        fit = sources.fit_feature
        sources.fit_feature = lambda *arguments, memory, **options: fit(  # type: ignore[assignment]
            *arguments, memory=request["fit_bytes"], **options
        )
    if "cores" in request:
        for module in (prepare, plan, criteo, verification):
            module.available_cores = lambda: request["cores"]  # type: ignore[attr-defined]
    if request.get("plain"):
        for module in (numbering, row_parser):
            module.library = lambda: Library(False, "plain")  # type: ignore[assignment]
    if "largest_file" in request:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (request["largest_file"],) * 2)
    if "read_error_at" in request:
        lines.open = lambda *arguments, **options: _FailingFile(  # type: ignore[attr-defined]
            arguments[0], request["read_error_at"]
        )
    tell: list[Tell] = []
    if "log" in request:
        log = os.open(request["log"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        tell.append(lambda *event: _log(log, " ".join(event)))
    if "kill_at" in request:
        tell.append(_At(request["kill_at"], _kill))
    if "signal_at" in request:
        number = getattr(signal, request["signal"])
        tell.append(_At(request["signal_at"], lambda: os.kill(os.getpid(), number)))
    if "kill_once" in request:
        tell.append(_KillOnce(Path(request["kill_once"]), request.get("but_not", "$^")))
    if "fail_at" in request:
        tell.append(_FailFrom(request["fail_at"], request["errno"]))
    if tell:
        _watch(request, tell)


class _FailingFile(io.FileIO):
    """A file of which what lies beyond an offset cannot be read."""

    def __init__(self, path: Path, end: int) -> None:
        super().__init__(path, "rb")
        self._end = end

    def read(self, size: int | None = -1) -> bytes:
        if self.tell() >= self._end:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return super().read(size)


def _log(log: int, event: str) -> None:
    os.write(log, (event + "\n").encode())


def _kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
    signal.pause()


class _At:
    """Does something at the n-th event, from 1."""

    def __init__(self, number: int, action: Callable[[], None]) -> None:
        self._left = number
        self._action = action
        self._lock = threading.Lock()

    def __call__(self, moment: str, operation: str, path: str) -> None:
        with self._lock:
            self._left -= 1
            if not self._left:
                self._action()


class _KillOnce:
    """Kills the process at the first event at which none was killed before.

    Args:
        done: Lists the events at which one was killed.
        but_not: A pattern of events at which none is to be killed.
    """

    def __init__(self, done: Path, but_not: str) -> None:
        self._done = set(done.read_text().splitlines()) if done.exists() else set()
        self._log = os.open(done, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        self._but_not = re.compile(but_not)
        self._lock = threading.Lock()

    def __call__(self, moment: str, operation: str, path: str) -> None:
        event = f"{moment} {operation} {path}"
        with self._lock:
            if event not in self._done and not self._but_not.search(event):
                _log(self._log, event)
                _kill()


class _FailFrom:
    """Lets the n-th operation fail, from 1, and all after it but for removals."""

    def __init__(self, number: int, code: int) -> None:
        self._left = number
        self._code = code
        self._lock = threading.Lock()

    def __call__(self, moment: str, operation: str, path: str) -> None:
        if moment != "before" or operation in ("unlink", "rmdir"):
            return
        with self._lock:
            self._left -= 1
            if self._left <= 0:
                raise OSError(self._code, os.strerror(self._code))


def _watch(request: dict[str, Any], tell_all: Sequence[Tell]) -> None:
    """Tell of every write, flush, rename and removal below the folder of the DATASET."""
    root = str(Path(request["dataset"]).resolve().parent)

    def tell(*event: str) -> None:
        for each in tell_all:
            each(*event)

    def short(path: Any, folder: int | None = None) -> str:
        if isinstance(path, int):
            path = os.readlink(f"/proc/self/fd/{path}")
        elif folder is not None:
            path = os.path.join(os.readlink(f"/proc/self/fd/{folder}"), path)
        return os.path.relpath(os.path.abspath(path), root)

    def watched(operation: str, of: int) -> None:
        function = getattr(os, operation)

        def call(*arguments: Any, **options: Any) -> Any:
            path = short(arguments[of], options.get("dir_fd"))
            tell("before", operation, path)
            result = function(*arguments, **options)
            tell("after", operation, path)
            return result

        setattr(os, operation, call)

    class Watched(io.FileIO):
        """A file, each write to which is told of, and happens in two halves."""

        def write(self, content: Any) -> int:
            view = memoryview(content).cast("B")
            path = short(self.name)
            tell("before", "write", path)
            half = super().write(view[: len(view) // 2])
            tell("amid", "write", path)
            written = half + super().write(view[half:])
            tell("after", "write", path)
            return written

    def open_watched(path: Any, mode: str = "r", *arguments: Any, **options: Any) -> Any:
        if mode not in ("wb", "ab"):
            return builtins.open(path, mode, *arguments, **options)
        return io.BufferedWriter(Watched(path, mode, **options), 1 << 20)

    files.open = open_watched  # type: ignore[attr-defined]
    for operation in ("mkdir", "unlink", "rmdir", "fsync"):
        watched(operation, 0)
    watched("replace", 1)


if __name__ == "__main__":
    serve()
