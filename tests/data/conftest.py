"""Made-up rows in Criteo's format, and a process that prepares them as it is told."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

MadeUpLines = Callable[..., bytes]


@pytest.fixture(scope="session")
def made_up_lines() -> MadeUpLines:
    """A function that makes n lines of a train.txt, of few distinct values, some missing."""

    def make(rows: int, seed: int = 0) -> bytes:
        generator = np.random.default_rng(seed)
        lines = []
        for _ in range(rows):
            integers = [
                b"" if generator.random() < 0.2 else b"%d" % generator.integers(-2, 50)
                for _ in range(13)
            ]
            ids = [
                b"" if generator.random() < 0.1 else b"%08x" % (generator.integers(1, 40) << 25)
                for _ in range(26)
            ]
            lines.append(b"\t".join([b"%d" % generator.integers(2), *integers, *ids]) + b"\n")
        return b"".join(lines)

    return make


@pytest.fixture
def quick_path() -> Iterator[Path]:
    """A folder for many small files, in memory where there is room for them."""
    memory = Path("/dev/shm")
    has_room = os.access(memory, os.W_OK) and shutil.disk_usage(memory).free > 50 << 20
    with tempfile.TemporaryDirectory(dir=memory if has_room else None) as folder:
        yield Path(folder)


@pytest.fixture(scope="session")
def warm(start_warm: Callable[..., Any]) -> Any:
    """A function that prepares in a process of its own, which may be told to fail."""
    return start_warm(Path(__file__).parent / "interrupted.py")
