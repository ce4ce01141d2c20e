"""One line of JSON a request on standard error, of some or all of them."""

from __future__ import annotations

import random
import sys
import time

import msgspec


class AccessLog:
    """Writes lines.

    Args:
        share: Of the requests that are written: 0 none, 1 all.
    """

    def __init__(self, share: float) -> None:
        self._share = share

    def note(
        self, protocol: str, method: str, code: str, milliseconds: float, client: str | None
    ) -> None:
        """Write a request's line, or not."""
        if self._share < 1 and random.random() >= self._share:
            return
        line = {
            "time": round(time.time(), 3),
            "protocol": protocol,
            "method": method,
            "code": code,
            "milliseconds": round(milliseconds, 3),
            "client": client,
        }
        sys.stderr.write(msgspec.json.encode(line).decode() + "\n")
