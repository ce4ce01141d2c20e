"""Send a server a hostile load with good requests among it.

    python benchmarks/hostile_load.py BUNDLE [--requests 100000]

Serves BUNDLE in a process of its own. Malformed JSON, wrong shapes, huge bodies, slow clients,
dropped connections, truncated tensors, bad messages of gRPC, and good requests with and without
unknown ids. The exit status is 1 if a good request was answered wrongly or not at all, if anything
else was answered with a status of 5xx other than a refusal for want of room, or if memory grew by
more than 5%.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from pathlib import Path

from dlrm.loadtest.hostile import HostileLoad
from dlrm.loadtest.server import own_server

MOST_GROWTH = 0.05


def main() -> None:
    """Send the load and print what came of it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--requests", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--server-options", default="", help="of dlrm serve, as in a shell")
    options = parser.parse_args()
    with own_server(options.bundle, options=options.server_options) as server:
        load = HostileLoad(options.bundle, server, seed=options.seed)
        began = time.perf_counter()
        result = asyncio.run(load.run(options.requests))
        seconds = time.perf_counter() - began
        still_ready = server.get("/v2/health/ready")
    memory = [each / 1e6 for each in result.resident_bytes]
    report = {
        "requests": sum(result.sent.values()),
        "seconds": round(seconds, 1),
        "answers": {kind: dict(counts) for kind, counts in sorted(result.answers.items())},
        "good_right": result.good_right,
        "good_refused": result.good_refused,
        "largest_difference": result.largest_difference,
        "complaints": result.complaint_count,
        "first_complaints": result.complaints,
        "resident_mb": [round(each) for each in memory],
        "growth": result.growth(),
        "still_ready": still_ready,
    }
    print(json.dumps(report, indent=2))
    if result.complaint_count or not result.growth() <= MOST_GROWTH:  # nor may it be unknown
        sys.exit(1)


if __name__ == "__main__":
    main()
