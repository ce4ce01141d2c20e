"""Measures preparation, with its memory and disk, beside what the machine can do.

Beside it are measured, in turn: polars' reader of the same file, where polars is installed, which
neither checks rows nor writes anything; and the rate at which this disk takes a gigabyte.
Preparation has a process of its own, so that its memory is no other's.
"""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from dlrm.config import BenchPrepareConfig, PrepareConfig, SynthesizeConfig
from dlrm.data.prepare import memory_bytes, prepare
from dlrm.data.synthetic import synthesize
from dlrm.device import use_available_cores
from dlrm.errors import EnvironmentFaultError
from dlrm.files import environment_faults
from dlrm.progress import progress
from dlrm.runs import family, hardware, measured_on, versions

_SAMPLE_SECONDS = 0.05
_CEILING_BYTES = 1 << 30
_POLARS = """
import sys, time, polars
started = time.perf_counter()
polars.read_csv(sys.argv[1], separator="\\t", has_header=False)
print(time.perf_counter() - started)
"""


@dataclass(frozen=True)
class BenchPrepareResult:
    """What preparation reaches: medians over the rounds, and the most of memory and disk."""

    rows_per_second: float
    """From the raw file to the DATASET, without the start of Python and the import of libraries."""
    stages: dict[str, float]
    """Seconds of each; one begins where the last has ended."""
    peak_memory_bytes: int
    """Of its own, files that are mapped or cached not counted."""
    peak_disk_bytes: int
    """Of the DATASET and what it is made from, without the raw file."""
    dataset_bytes: int
    source_bytes: int
    disk_bytes_per_second: float
    """Written to a file and flushed."""
    polars_rows_per_second: float | None
    """None: polars is not installed."""
    share_of_polars: float | None
    """Of its rate; the median of the rounds' shares."""
    config: BenchPrepareConfig
    hardware: dict[str, str | int]
    versions: dict[str, str]

    def table(self) -> str:
        """Return the result as text."""
        stages = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in self.stages.items())
        lines = [
            f"{self.config.rows:,} made-up rows ({self.source_bytes / 1e9:.2f} GB), "
            f"{self.config.rounds} rounds",
            measured_on(self.hardware, self.versions),
            "",
            f"{'':32}{'rows/s':>12}",
            f"{'from raw file to DATASET':32}{self.rows_per_second:12,.0f}",
        ]
        if self.polars_rows_per_second is None:
            lines.append("polars.read_csv: not measured, since polars is not installed")
        else:
            lines.append(f"{'polars.read_csv':32}{self.polars_rows_per_second:12,.0f}")
        lines += [
            "",
            stages,
            f"at most {self.peak_memory_bytes / 2**30:.2f} GiB of memory (--memory "
            f"{self.config.memory}), {self.peak_disk_bytes / 1e9:.2f} GB of disk for a DATASET of "
            f"{self.dataset_bytes / 1e9:.2f} GB",
            f"the disk takes {self.disk_bytes_per_second / 1e6:,.0f} MB/s",
        ]
        if self.share_of_polars is not None:
            lines += ["", f"{self.share_of_polars:.3f} of the rate of polars.read_csv"]
        return "\n".join(lines) + "\n"


@dataclass(frozen=True)
class _Prepared:
    """One preparation."""

    seconds: float
    stages: dict[str, float]
    peak_memory_bytes: int
    peak_disk_bytes: int
    dataset_bytes: int


def bench_prepare(config: BenchPrepareConfig) -> BenchPrepareResult:
    """Measure preparation, polars and the disk in turn.

    Args:
        config: Of how many rows, how often, with which options.

    Raises:
        UserError: An option of the preparation is wrong.
        EnvironmentFaultError: The disk is too small, or the process that prepares was killed.
    """
    memory_bytes(config.memory)  # what is wrong is refused before rows are made
    prepared: list[_Prepared] = []
    polars: list[float] = []
    disk: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        raw = Path(folder) / "raw"
        synthesize(raw, SynthesizeConfig(rows=config.rows, test_rows=0, scale=config.scale))
        source = raw / "train.txt"
        with environment_faults(f"read {source}"), open(source, "rb") as file:
            while file.read(1 << 24):  # into the page cache, as far as it fits
                pass
        for _ in progress("bench prepare", config.rounds, range(config.rounds)):
            dataset = Path(folder) / "dataset"
            prepared.append(_in_own_process(source, dataset, config))
            shutil.rmtree(dataset)
            if importlib.util.find_spec("polars"):
                polars.append(_polars_seconds(source))
            disk.append(_disk_bytes_per_second(Path(folder)))
        source_bytes = source.stat().st_size
    seconds = [each.seconds for each in prepared]
    return BenchPrepareResult(
        rows_per_second=config.rows / statistics.median(seconds),
        stages={
            name: statistics.median(each.stages[name] for each in prepared)
            for name in prepared[0].stages
        },
        peak_memory_bytes=max(each.peak_memory_bytes for each in prepared),
        peak_disk_bytes=max(each.peak_disk_bytes for each in prepared),
        dataset_bytes=prepared[0].dataset_bytes,
        source_bytes=source_bytes,
        disk_bytes_per_second=statistics.median(disk),
        polars_rows_per_second=config.rows / statistics.median(polars) if polars else None,
        share_of_polars=(
            statistics.median(its / ours for its, ours in zip(polars, seconds, strict=True))
            if polars
            else None
        ),
        config=config,
        hardware=hardware(torch.device("cpu")),
        versions=versions(),
    )


def _in_own_process(source: Path, dataset: Path, config: BenchPrepareConfig) -> _Prepared:
    """Prepare in a process of its own, and watch its memory and disk."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(
        target=_prepare,
        args=(sender, source, dataset, config.prepare, config.memory),
        daemon=True,
    )
    process.start()
    sender.close()
    assert process.pid
    folders = (dataset, dataset.with_name(f".{dataset.name}.work"))
    most_memory = most_disk = 0
    while not receiver.poll(_SAMPLE_SECONDS):
        most_memory = max(most_memory, _memory_bytes(process.pid))
        most_disk = max(most_disk, _disk_bytes(folders))
    try:
        answer: tuple[float, dict[str, float]] | Exception = receiver.recv()
    except EOFError:
        process.join()
        raise EnvironmentFaultError(
            f"the process that prepared was ended (exit status {process.exitcode}), for want of "
            "memory perhaps. Prepare fewer --rows, or free some memory."
        ) from None
    process.join()
    if isinstance(answer, Exception):
        raise answer
    size = _disk_bytes([dataset])
    return _Prepared(*answer, most_memory, max(most_disk, size), size)


def _prepare(
    sender: Connection, source: Path, dataset: Path, config: PrepareConfig, memory: str
) -> None:
    """Prepare, and send the seconds of all and of each stage, or what it failed with."""
    use_available_cores()
    stages: dict[str, float] = {}
    try:
        started = time.perf_counter()
        prepare(source, dataset, config, memory=memory, observe=stages.__setitem__)
        sender.send((time.perf_counter() - started, stages))
    except Exception as error:
        sender.send(error)


def _memory_bytes(root: int) -> int:
    """Return the anonymous and shared memory of a process and its descendants."""
    total = 0
    for process in family(root):
        try:
            status = Path(f"/proc/{process}/status").read_text()
        except (FileNotFoundError, ProcessLookupError):  # it has ended
            continue
        for name in ("RssAnon", "RssShmem"):
            if found := re.search(rf"^{name}:\s+([0-9]+) kB$", status, re.MULTILINE):
                total += int(found[1]) * 1024
    return total


def _disk_bytes(folders: Sequence[Path]) -> int:
    """Return the disk that folders take, which may change meanwhile."""
    total = 0
    for folder in folders:
        for here, _, names in os.walk(folder):
            for name in names:
                try:
                    total += os.stat(os.path.join(here, name)).st_blocks * 512
                except FileNotFoundError:
                    continue
    return total


def _polars_seconds(source: Path) -> float:
    """Return the seconds of polars.read_csv, in a process of its own."""
    command = [sys.executable, "-c", _POLARS, str(source)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    if ended.returncode:
        raise EnvironmentFaultError(
            f"polars.read_csv of {source} failed (exit status {ended.returncode}): "
            f"{ended.stderr.strip()[-300:]} Use fewer --rows, or uninstall polars."
        )
    return float(ended.stdout)


def _disk_bytes_per_second(folder: Path) -> float:
    """Return how fast a disk takes a gigabyte, flushed."""
    block = os.urandom(1 << 22)
    path = folder / "ceiling"
    started = time.perf_counter()
    with environment_faults(f"write {path}"):
        with open(path, "wb") as file:
            for _ in range(_CEILING_BYTES // len(block)):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
        seconds = time.perf_counter() - started
        path.unlink()
    return _CEILING_BYTES / seconds
