"""Trains in forks of one warm process, which may be told to kill themselves on the way.

``python interrupted_training.py`` reads requests, a line of JSON each, and answers each with a
line: how the fork ended, and what it said. It is to training what ``tests/data/interrupted.py`` is
to preparation, and watches files with the same code.
"""

from __future__ import annotations

import contextlib
import errno
import importlib
import io
import logging
import os
import re
import resource
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import torch

sys.path.append(str(Path(__file__).parents[1] / "data"))
interrupted = importlib.import_module("interrupted")

from dlrm import cli, comparison, device, evaluation  # noqa: E402
from dlrm.checkpoint import Position  # noqa: E402
from dlrm.config import ModelConfig, TrainConfig  # noqa: E402
from dlrm.data import criteo  # noqa: E402
from dlrm.errors import EnvironmentFaultError, StoppedBySignalError, UserError  # noqa: E402
from dlrm.predicting import files  # noqa: E402
from dlrm.report import page  # noqa: E402
from dlrm.training import begin, events, saving, trainer  # noqa: E402
from dlrm.training.events import Console, Events  # noqa: E402
from dlrm.training.step import EagerStep  # noqa: E402

SIGNALS = {
    "kill_at_step": signal.SIGKILL,
    "term_at_step": signal.SIGTERM,
    "int_at_step": signal.SIGINT,
}


class AtStep(Events):
    """Does something after the n-th step of this process, from 1."""

    def __init__(self, number: int, action: Callable[[], None]) -> None:
        self._left = number
        self._action = action

    def on_step(self, position: Position, samples: int) -> None:
        self._left -= 1
        if not self._left:
            self._action()


def train_once(dataset: Path) -> None:
    """Do what each fork would do first; in one thread, since a fork has no other."""
    torch.set_num_threads(1)
    model = ModelConfig(
        embedding_dim=2, dense_arch_layer_sizes=(2,), over_arch_layer_sizes=(1,), dropout=0.1
    )
    for module in ("docstring_parser", "dlrm.reference.runner", "tyro"):
        importlib.import_module(module)
    for dropout in (0.0, 0.1):
        config = TrainConfig(model=replace(model, dropout=dropout), max_steps=2)
        with tempfile.TemporaryDirectory() as folder:
            begin.train(dataset, Path(folder) / "run", config)
            page.write_report(Path(folder) / "run", importance_rows=0)


def answer(request: dict[str, Any], said: int) -> None:
    os.dup2(said, 1)
    os.dup2(said, 2)
    os.close(said)
    if "stdout" in request:
        os.dup2(os.open(request["stdout"], os.O_WRONLY), 1)
    status: Any = 1
    try:
        listeners = set_up(request)
        if "command" in request:
            cli.main(request["command"])
        elif "config" in request:
            config = msgspec.convert(request["config"], TrainConfig)
            begin.train(request["dataset"], request["run"], config, listeners)
        else:
            begin.resume(request["run"], request.get("dataset"), listeners)
        status = 0
    except SystemExit as end:
        status = end.code
    except (UserError, EnvironmentFaultError, StoppedBySignalError) as error:
        kinds = {UserError: 2, EnvironmentFaultError: 3, StoppedBySignalError: 4}
        status = kinds[type(error)]
        sys.stderr.write(f"error: {error}\n")
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


class FullDisk:
    """Lets what needs room on the disk fail while it is full."""

    def __init__(self) -> None:
        self.is_full = False

    def fill(self) -> None:
        self.is_full = True

    def empty(self) -> None:
        self.is_full = False

    def __call__(self, moment: str, operation: str, path: str) -> None:
        if self.is_full and operation in ("write", "mkdir", "link"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def open(self, path: Any, mode: str, **options: Any) -> io.FileIO:
        disk = self

        class Log(io.FileIO):
            def write(self, content: Any) -> int:
                disk("before", "write", "log.jsonl")
                return super().write(content)

        return Log(path, mode)


def set_up(request: dict[str, Any]) -> list[Events]:
    """Make it fail where a request says so."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    os.chdir(request.get("cwd", "."))
    # A flush matters when the machine stops, not the process; here it would take most of the time.
    os.fsync = lambda _: None
    if not request.get("overlap"):  # so that it is certain what is saved when it is killed
        saving.Saver._copy = lambda *_: None  # type: ignore[method-assign]
    if "read_bytes" in request:  # of predictions, with a journal after each block
        blocks = criteo.read_blocks
        criteo.read_blocks = lambda path, **options: blocks(  # type: ignore[assignment]
            path, block_bytes=request["read_bytes"], **options
        )
        files.Work = partial(files.Work, seconds=0)  # type: ignore[misc,assignment]
    if request.get("no_links"):
        os.link = refuse_link
    if request.get("plain"):
        trainer.choose_step = EagerStep  # type: ignore[assignment]
    listeners: list[Events] = []
    for name, number in SIGNALS.items():
        if name in request:
            listeners.append(AtStep(request[name], lambda it=number: os.kill(os.getpid(), it)))
    if "command" in request:  # which has its own listener, and takes all cores
        device.use_available_cores = lambda: None
        on_step = Console.on_step

        def tell(console: Console, position: Position, samples: int) -> None:
            on_step(console, position, samples)
            for listener in listeners:
                listener.on_step(position, samples)

        Console.on_step = tell  # type: ignore[method-assign]
    if "signal_in_evaluation" in request:
        evaluate = trainer.evaluate_split
        left = [request["signal_in_evaluation"]]

        def stop(*arguments: Any, **options: Any) -> Any:
            left[0] -= 1
            if not left[0]:
                os.kill(os.getpid(), signal.SIGTERM)
            return evaluate(*arguments, **options)

        trainer.evaluate_split = stop  # type: ignore[assignment]
    told: list[Any] = []
    if "log" in request:
        log = os.open(request["log"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        told.append(lambda *event: interrupted._log(log, " ".join(event)))
    if "kill_once" in request:
        told.append(interrupted._KillOnce(Path(request["kill_once"]), request["but_not"]))
    if "full_from" in request:
        disk = FullDisk()
        listeners.append(AtStep(request["full_from"], disk.fill))
        if "full_to" in request:
            listeners.append(AtStep(request["full_to"], disk.empty))
        told.append(disk)
        events.open = disk.open  # type: ignore[attr-defined]
    if "address_space" in request:  # beyond what is taken already
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + request["address_space"],) * 2)
    if "fault_at" in request:
        fault = Fault(request["fault_at"], request["fault"], request.get("disk"))
        told.append(fault)
        on_each_step(listeners, fault)
        scorer = evaluation.Scorer

        def scorer_watched(*arguments: Any) -> Any:
            fault("before", "score", "")
            return scorer(*arguments)

        evaluation.Scorer = scorer_watched  # type: ignore[assignment,misc]
        compare_rows = comparison.compare_rows

        def compare_watched(*arguments: Any, **options: Any) -> Any:
            fault("before", "compare", "")
            return compare_rows(*arguments, **options)

        comparison.compare_rows = compare_watched
    if told:
        watch(request["run"], told)
    return listeners


def refuse_link(source: Any, target: Any, **options: Any) -> None:
    raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))


def on_each_step(listeners: list[Events], fault: Fault) -> None:
    class EachStep(Events):
        def on_step(self, position: Position, samples: int) -> None:
            fault("after", "step", str(position.total_steps))

    listeners.append(EachStep())


class Fault:
    """Lets something happen at the first event that a pattern matches.

    Args:
        pattern: Of events: the moment, the operation, the file.
        kind: A signal; or "disk full"; or "out of memory".
        disk: A small file system, which is filled; None: no write works any more.
    """

    def __init__(self, pattern: str, kind: str, disk: str | None) -> None:
        self._pattern = re.compile(pattern)
        self._kind = kind
        self._disk = disk
        self._happened = False

    def __call__(self, moment: str, operation: str, path: str) -> None:
        if not self._happened and self._pattern.search(f"{moment} {operation} {path}"):
            self._happened = True
            if self._kind in signal.Signals.__members__:
                os.kill(os.getpid(), signal.Signals[self._kind])
            elif self._kind == "out of memory":
                raise MemoryError("not enough for this")
            elif self._disk:
                fill(Path(self._disk) / "ballast")
        if self._happened and self._kind == "disk full" and not self._disk:
            if operation in ("write", "mkdir", "link"):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def fill(ballast: Path) -> None:
    with contextlib.suppress(OSError), io.FileIO(ballast, "w") as file:
        for size in (1 << 16, 1):
            with contextlib.suppress(OSError):
                while True:
                    file.write(bytes(size))


def watch(run: str, tell: list[Any]) -> None:
    """Tell of every write, flush, rename, link and removal beside and below a RUN."""
    interrupted._watch({"dataset": run}, tell)
    root = Path(run).resolve().parent
    link = os.link

    def call(source: Any, target: Any, **options: Any) -> None:
        path = os.path.relpath(target, root)
        for each in tell:
            each("before", "link", path)
        link(source, target, **options)
        for each in tell:
            each("after", "link", path)

    os.link = call


if __name__ == "__main__":
    train_once(Path(sys.argv[1]))
    interrupted._answer = answer
    interrupted.serve()
