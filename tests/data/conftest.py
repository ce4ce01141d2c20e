"""Made-up rows in Criteo's format."""

from __future__ import annotations

from collections.abc import Callable

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
