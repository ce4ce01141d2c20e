"""Rows per second of `dlrm prepare`, its memory and disk, beside what the machine can do.

Ceilings of the same run: polars.read_csv of the same file, which neither checks rows nor writes
anything, and the rate at which this disk takes a gigabyte.

    pip install -r benchmarks/requirements.txt
    python benchmarks/prepare_throughput.py [--rows 1000000 10000000] [--memory 2GiB] [--json]
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch

from dlrm.config import SynthesizeConfig
from dlrm.data.synthetic import synthesize
from dlrm.runs import hardware, versions

STAGE = re.compile(r"^(read|fit|arrange|write|verify) +([0-9.]+) s$", re.MULTILINE)
PREPARE = """
import sys, time
import dlrm.data.prepare
from dlrm import cli
command = cli.parse(["prepare", *sys.argv[1:]])
cli._log_to_standard_error()
started = time.perf_counter()
command.execute()
print("finished", time.perf_counter() - started, file=sys.stderr)
"""
POLARS = """
import sys, time, polars
started = time.perf_counter()
rows = len(polars.read_csv(sys.argv[1], separator="\\t", has_header=False))
print(rows, time.perf_counter() - started)
"""


def process_tree(root: int) -> list[int]:
    """Return a process and its descendants."""
    tree = [root]
    for process in tree:
        for task in Path(f"/proc/{process}/task").glob("*/children"):
            tree += map(int, task.read_text().split())
    return tree


def memory_bytes(root: int) -> int:
    """Return the anonymous and shared memory of a process tree."""
    total = 0
    for process in process_tree(root):
        status = Path(f"/proc/{process}/status").read_text()
        for name in ("RssAnon", "RssShmem"):
            total += int(status.split(f"{name}:")[1].split()[0]) * 1024
    return total


def disk_bytes(folders: list[Path]) -> int:
    """Return the disk that folders take."""
    total = 0
    for path in (path for folder in folders for path in folder.rglob("*")):
        try:
            total += path.stat().st_blocks * 512
        except FileNotFoundError:  # removed meanwhile
            continue
    return total


def measured_prepare(
    source: Path, dataset: Path, memory: str, options: list[str]
) -> dict[str, Any]:
    """Run `dlrm prepare`, sampling memory every 50 ms and disk every second."""
    # As polars is measured: without the start of Python and the import of libraries.
    command = [sys.executable, "-c", PREPARE, str(source), str(dataset)]
    started = time.perf_counter()
    process = subprocess.Popen(
        [*command, "--memory", memory, *options],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    messages: list[str] = []
    assert process.stderr is not None
    reader = threading.Thread(target=lambda: messages.extend(process.stderr or []))
    reader.start()
    peak_memory = peak_disk = samples = 0
    while process.poll() is None:
        try:
            peak_memory = max(peak_memory, memory_bytes(process.pid))
        except (FileNotFoundError, IndexError, ProcessLookupError):
            break  # it has ended
        if samples % 20 == 0:
            work = dataset.with_name(f".{dataset.name}.work")
            peak_disk = max(peak_disk, disk_bytes([work, dataset]))
        samples += 1
        time.sleep(0.05)
    process.wait()
    process_seconds = time.perf_counter() - started
    reader.join()
    if process.returncode:
        raise SystemExit("".join(messages))
    return {
        "seconds": float(messages[-1].split()[1]),
        "process_seconds": process_seconds,
        "stages": {name: float(time_) for name, time_ in STAGE.findall("".join(messages))},
        "peak_memory_bytes": peak_memory,
        "peak_disk_bytes": peak_disk,
        "dataset_bytes": disk_bytes([dataset]),
    }


def disk_bytes_per_second(folder: Path, size: int = 1 << 30) -> float:
    """Return how fast a disk takes a gigabyte, flushed."""
    block = os.urandom(1 << 22)
    path = folder / "ceiling"
    started = time.perf_counter()
    with open(path, "wb") as file:
        for _ in range(size // len(block)):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
    seconds = time.perf_counter() - started
    path.unlink()
    return size / seconds


def polars_seconds(source: Path) -> float:
    """Return the seconds of polars.read_csv, in a process of its own."""
    output = subprocess.run(
        [sys.executable, "-c", POLARS, str(source)], capture_output=True, text=True, check=True
    ).stdout
    return float(output.split()[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[1_000_000, 10_000_000])
    parser.add_argument("--memory", default="2GiB")
    parser.add_argument("--scale", type=float, default=1.0, help="of `dlrm synthesize`")
    parser.add_argument("--folder", type=Path, help="where to work; default: a temporary folder")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    arguments, options = parser.parse_known_args()
    results = []
    with tempfile.TemporaryDirectory(dir=arguments.folder) as scratch:
        for rows in arguments.rows:
            folder = Path(scratch) / str(rows)
            config = SynthesizeConfig(rows=rows, test_rows=0, scale=arguments.scale)
            synthesize(folder, config)
            source = folder / "train.txt"
            with open(source, "rb") as file:  # into the page cache, as far as it fits
                while file.read(1 << 24):
                    pass
            polars = polars_seconds(source) if rows <= 10_000_000 else None
            result = measured_prepare(source, folder / "dataset", arguments.memory, options)
            result |= {
                "rows": rows,
                "source_bytes": source.stat().st_size,
                "memory": arguments.memory,
                "rows_per_second": rows / result["seconds"],
                "polars_rows_per_second": polars and rows / polars,
                "share_of_polars": polars and polars / result["seconds"],
                "disk_bytes_per_second": disk_bytes_per_second(folder),
            }
            results.append(result)
            shutil.rmtree(folder)
    machine = hardware(torch.device("cpu"))
    if arguments.json:
        report = {"results": results, "hardware": machine, "versions": versions()}
        sys.stdout.write(json.dumps(report, indent=2) + "\n")
        return
    print(f"{machine}\n{versions()}")
    for result in results:
        stages = ", ".join(f"{name} {seconds} s" for name, seconds in result["stages"].items())
        print(
            f"{result['rows']:,} rows ({result['source_bytes'] / 1e9:.2f} GB), start to finish: "
            f"{result['seconds']:.1f} s, {result['rows_per_second']:,.0f} rows/s\n"
            f"  {stages}; the whole process {result['process_seconds']:.1f} s\n"
            f"  at most {result['peak_memory_bytes'] / 2**30:.2f} GiB of memory (ceiling "
            f"{result['memory']}), {result['peak_disk_bytes'] / 1e9:.2f} GB of disk for a DATASET "
            f"of {result['dataset_bytes'] / 1e9:.2f} GB\n"
            f"  disk: {result['disk_bytes_per_second'] / 1e6:,.0f} MB/s written and flushed"
        )
        if result["share_of_polars"]:
            print(
                f"  polars.read_csv: {result['polars_rows_per_second']:,.0f} rows/s; share "
                f"{result['share_of_polars']:.2f}"
            )


if __name__ == "__main__":
    main()
