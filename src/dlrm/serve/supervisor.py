"""The process behind ``dlrm serve``: it starts workers, tells them what to load and when to end.

It answers no requests, and computes nothing: a model is checked in a process of its own, so that
what is loaded by the workers is known to load. Workers are forks of it.
"""

from __future__ import annotations

import json
import logging
import os
import selectors
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from dlrm.config import ServeConfig
from dlrm.errors import EnvironmentFaultError, UserError
from dlrm.serve.metrics import forget_process
from dlrm.serve.model import ServedModel
from dlrm.serve.worker import Place, run_worker

logger = logging.getLogger("dlrm")


def serve(path: Path | str, config: ServeConfig) -> None:
    """Serve a model over HTTP and gRPC until SIGINT or SIGTERM.

    SIGHUP loads the model anew. When requests are first answered, one line of JSON on standard
    output tells the addresses.

    Args:
        path: A BUNDLE or RUN, or a symbolic link to one, which can lead to another at the next
            loading.
        config: Where and how.

    Raises:
        UserError: The model is missing or damaged.
        EnvironmentFaultError: An address is taken, or memory ran out.
    """
    with tempfile.TemporaryDirectory(prefix="dlrm-serve-") as folder:
        _Supervisor(Path(path), config, Path(folder)).run()


_ENDING = "the server is ending."
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD)


@dataclass(eq=False)
class _Child:
    """A process of ours.

    Attributes:
        pid: Its id.
        control: To it.
        began: When it was started.
        loading: How often it was told to load and has not said yet how that went.
        said: What it said, up to an unfinished line.
    """

    pid: int
    control: socket.socket
    began: float
    loading: int = 0
    said: bytes = b""


class _Supervisor:
    def __init__(self, path: Path, config: ServeConfig, folder: Path) -> None:
        self._path = path
        self._config = config
        self._folder = folder
        self._selector = selectors.DefaultSelector()
        self._workers: dict[int, _Child] = {}
        self._checker: _Child | None = None
        self._candidate = ""
        """What the checker looks at."""
        self._asked: list[_Child] = []
        """Workers that wait to be told how a loading went."""
        self._wanted = True
        """The model should be loaded anew."""
        self._served = ""
        """What workers load."""
        self._version = ""
        """Of that, when it was checked."""
        self._outcome = ""
        """Why the last loading failed; empty: it did not."""
        self._announced = False
        self._ends_at: float | None = None
        self._start_at: list[float] = []
        """When workers that died are to be started again."""
        self._failures = 0
        self._signals: list[int] = []

    def run(self) -> None:
        config = self._config
        with ExitStack() as stack:
            stack.enter_context(self._selector)
            listener = stack.enter_context(_listen(config.host, config.port))
            grpc_address = ""
            if config.grpc_port >= 0:
                reserved = stack.enter_context(_reserve(config.host, config.grpc_port))
                grpc_address = _address(config.host, reserved.getsockname()[1])
            self._place = Place(listener, grpc_address, self._folder)
            stack.enter_context(self._noting_signals())
            stack.callback(self._end_children)
            for _ in range(config.workers):
                self._start_worker()
            while self._workers or self._start_at:
                self._step()

    def _children(self) -> list[_Child]:
        return [*self._workers.values(), *([self._checker] if self._checker else [])]

    def _end_children(self) -> None:
        for child in self._children():
            os.kill(child.pid, signal.SIGKILL)
            os.waitpid(child.pid, 0)
        for key in list(self._selector.get_map().values()):
            if isinstance(key.data, _Child):
                key.data.control.close()

    @contextmanager
    def _noting_signals(self) -> Iterator[None]:
        """Let signals wake ``select`` and be dealt with by ``_step``."""

        def note(number: int, frame: FrameType | None) -> None:
            self._signals.append(number)

        self._wakes, self._woken = socket.socketpair()
        with self._wakes, self._woken:
            for each in (self._wakes, self._woken):
                each.setblocking(False)
            signal.set_wakeup_fd(self._woken.fileno(), warn_on_full_buffer=False)
            self._selector.register(self._wakes, selectors.EVENT_READ)
            before = {number: signal.signal(number, note) for number in _SIGNALS}
            try:
                yield
            finally:
                for number, handler in before.items():
                    signal.signal(number, handler)
                signal.set_wakeup_fd(-1)

    def _step(self) -> None:
        """Do what is due, wait for something to happen, and take notice of it."""
        self._do_what_is_due()
        for key, _ in self._selector.select(self._until_something_is_due()):
            if key.fileobj is self._wakes:
                self._wakes.recv(4096)
            else:
                self._hear(key.data)
        while self._signals:
            number = self._signals.pop(0)
            if number == signal.SIGHUP:
                logger.info("SIGHUP: loading %s anew", self._path)
                self._wanted = True
            elif number != signal.SIGCHLD:
                self._end(number)
        self._bury()
        if not (self._wanted or self._checker or self._is_loading()):
            self._answer(self._outcome)

    def _do_what_is_due(self) -> None:
        now = time.monotonic()
        if self._ends_at is not None:
            if now > self._ends_at:
                for pid in self._workers:
                    os.kill(pid, signal.SIGKILL)
            return
        while self._start_at and self._start_at[0] <= now:
            self._start_at.pop(0)
            self._start_worker()
        if self._wanted and self._checker is None and not self._is_loading():
            self._check()

    def _until_something_is_due(self) -> float | None:
        due = [*self._start_at[:1], *([] if self._ends_at is None else [self._ends_at])]
        return max(0.0, min(due) - time.monotonic()) + 0.01 if due else None

    def _is_loading(self) -> bool:
        return any(worker.loading for worker in self._workers.values())

    def _fork(self, work: Callable[[socket.socket], int]) -> _Child:
        ours, theirs = socket.socketpair()
        sys.stdout.flush()
        sys.stderr.flush()
        pid = os.fork()
        if pid == 0:
            self._become_child(ours, theirs, work)
        theirs.close()
        child = _Child(pid, ours, time.monotonic())
        self._selector.register(ours, selectors.EVENT_READ, child)
        return child

    def _become_child(
        self, ours: socket.socket, theirs: socket.socket, work: Callable[[socket.socket], int]
    ) -> NoReturn:
        status = 1
        try:
            signal.set_wakeup_fd(-1)
            for number in _SIGNALS:
                signal.signal(number, signal.SIG_DFL)
            self._selector.close()
            for each in (ours, self._wakes, self._woken):
                each.close()
            for child in self._children():
                child.control.close()
            status = work(theirs)
        except BaseException as error:
            logger.error("a process of the server failed", exc_info=error)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)

    def _start_worker(self) -> None:
        replaces = bool(self._served)
        worker = self._fork(
            lambda control: run_worker(self._config, self._place, control, replaces=replaces)
        )
        self._workers[worker.pid] = worker
        logger.info("process %d is started", worker.pid)
        if replaces:  # it may be long since that was checked
            self._tell_to_load(worker, verified=False)

    def _tell_to_load(self, worker: _Child, *, verified: bool) -> None:
        worker.loading += 1
        _say(worker, {"load": self._served, "version": self._version, "verified": verified})

    def _check(self) -> None:
        """Load the model in a process that is thrown away."""
        self._wanted = False
        self._outcome = ""
        self._candidate = os.path.realpath(self._path)
        path, config = Path(self._candidate), self._config

        def work(control: socket.socket) -> int:
            self._place.listener.close()
            try:
                model = ServedModel.load(path, config.model_name, config.max_request_rows)
                model.warm_up(1)
                outcome = {"kind": "", "error": "", "version": model.version}
            except UserError as error:
                outcome = {"kind": "user", "error": str(error)}
            except (EnvironmentFaultError, MemoryError) as error:
                outcome = {"kind": "environment", "error": str(error)}
            control.sendall(json.dumps(outcome).encode() + b"\n")
            return 0

        self._checker = self._fork(work)

    def _hear(self, child: _Child) -> None:
        """Take what a child says."""
        try:
            content = child.control.recv(1 << 16)
        except ConnectionError:
            content = b""
        if not content:
            self._selector.unregister(child.control)
            child.control.close()
            return
        *lines, child.said = (child.said + content).split(b"\n")
        for line in lines:
            message = json.loads(line)
            if child is self._checker:
                self._take_check(message)
            elif "reload" in message:
                self._asked.append(child)
                self._wanted = True
                if self._ends_at is not None:
                    self._answer(_ENDING)
            else:
                child.loading -= 1
                self._take_loading(child, message)

    def _take_check(self, message: dict[str, str]) -> None:
        if self._ends_at is not None:
            return
        if error := message["error"]:
            if not self._served:
                kind = UserError if message["kind"] == "user" else EnvironmentFaultError
                raise kind(error)
            logger.warning("%s is not served, the earlier model stays: %s", self._candidate, error)
            self._outcome = error
            return
        self._served, self._version = self._candidate, message["version"]
        for worker in self._workers.values():
            self._tell_to_load(worker, verified=True)

    def _take_loading(self, worker: _Child, message: dict[str, str]) -> None:
        if self._ends_at is not None:
            return
        if error := message.get("failed"):
            if not self._announced:
                raise EnvironmentFaultError(f"a process cannot load {self._served}: {error}")
            logger.warning("process %d cannot load %s: %s", worker.pid, self._served, error)
            self._outcome = error
        elif not self._is_loading():
            self._failures = 0
            logger.info("serving version %s of %s", message["loaded"], self._served)
            self._announce()

    def _announce(self) -> None:
        if self._announced:
            return
        self._announced = True
        port = self._place.listener.getsockname()[1]
        addresses = {"http": f"http://{_address(self._config.host, port)}"}
        if self._place.grpc_address:
            addresses["grpc"] = self._place.grpc_address
        sys.stdout.write(json.dumps(addresses) + "\n")
        sys.stdout.flush()

    def _answer(self, error: str) -> None:
        """Tell those who asked how the loading went."""
        for worker in self._asked:
            if worker.pid in self._workers:
                _say(worker, {"reloaded": error})
        self._asked.clear()

    def _bury(self) -> None:
        """Take notice of children that ended."""
        if self._checker is not None and (status := _ended(self._checker)) is not None:
            checker, self._checker = self._checker, None
            self._hear_rest(checker)
            if status != 0 and self._ends_at is None:
                message = f"the process that checked {self._candidate} ended {_how(status)}"
                if not self._served:
                    raise EnvironmentFaultError(f"{message}. Is there memory enough?")
                logger.warning("%s; the earlier model stays", message)
                self._outcome = message
        for worker in list(self._workers.values()):
            status = _ended(worker)
            if status is None:
                continue
            del self._workers[worker.pid]
            forget_process(self._folder, worker.pid)
            if self._ends_at is not None:
                continue
            message = f"process {worker.pid} ended {_how(status)}"
            if not self._announced:
                raise EnvironmentFaultError(f"{message} while the server was being started.")
            self._failures = self._failures + 1 if time.monotonic() - worker.began < 60 else 1
            delay = 0.0 if self._failures == 1 else min(30.0, 2.0 ** (self._failures - 2))
            logger.warning("%s; another is started in %g seconds", message, delay)
            self._start_at.append(time.monotonic() + delay)
            self._start_at.sort()

    def _hear_rest(self, checker: _Child) -> None:
        """Take what a child said before it ended."""
        if checker.control.fileno() < 0:
            return
        self._selector.unregister(checker.control)
        content = checker.said
        while more := checker.control.recv(1 << 16):
            content += more
        checker.control.close()
        if content.strip():
            self._take_check(json.loads(content))

    def _end(self, number: int) -> None:
        """Tell workers to finish; a second time: to end at once."""
        again = self._ends_at is not None
        grace = self._config.drain_seconds + self._config.shutdown_timeout + 5
        self._ends_at = time.monotonic() + (0 if again else grace)
        self._start_at.clear()
        self._answer(_ENDING)
        if not again:
            logger.info("%s: what was accepted is finished", signal.Signals(number).name)
            self._place.listener.close()
        if self._checker is not None:
            os.kill(self._checker.pid, signal.SIGKILL)
        for pid in self._workers:
            os.kill(pid, signal.SIGTERM)


def _say(child: _Child, message: dict[str, Any]) -> None:
    try:
        child.control.sendall(json.dumps(message).encode() + b"\n")
    except OSError:
        pass  # it has ended, which is noticed elsewhere


def _ended(child: _Child) -> int | None:
    """Return the status of a child that has ended."""
    pid, status = os.waitpid(child.pid, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if pid else None


def _how(status: int) -> str:
    return f"by {signal.Signals(-status).name}" if status < 0 else f"with status {status}"


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET


def _address(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _bound(host: str, port: int, option: int) -> socket.socket:
    made = socket.socket(_family(host), socket.SOCK_STREAM)
    try:
        made.setsockopt(socket.SOL_SOCKET, option, 1)
        made.bind((host, port))
    except OSError as error:
        made.close()
        raise EnvironmentFaultError(
            f"cannot listen on {_address(host, port)}: {error.strerror or error}. Choose another "
            "--host, --port or --grpc-port, or end what listens there."
        ) from error
    return made


def _listen(host: str, port: int) -> socket.socket:
    """Return the socket that workers accept HTTP connections from."""
    made = _bound(host, port, socket.SO_REUSEADDR)
    made.listen(1024)
    made.setblocking(False)
    return made


def _reserve(host: str, port: int) -> socket.socket:
    """Return a socket that keeps a port for the workers, which each listen on it themselves."""
    _bound(host, port, socket.SO_REUSEADDR).close()  # of no other server, with whom it would share
    return _bound(host, port, socket.SO_REUSEPORT)
