"""What tests ask a server over HTTP."""

from __future__ import annotations

import http.client
import time
from email.message import Message

from dlrm.loadtest.server import OwnServer, Server

INFER = "/v2/models/dlrm/infer"


def ask(
    server: Server, method: str, path: str, body: bytes | str = b"", **headers: str
) -> tuple[int, Message, bytes]:
    """Status, headers and content of an answer; of a header's name ``_`` stands for ``-``."""
    connection = http.client.HTTPConnection(server.host, server.port, timeout=30)
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    connection.request(method, path, body, names)
    answer = connection.getresponse()
    content = answer.read()
    connection.close()
    return answer.status, answer.headers, content


def wait_for(server: OwnServer, text: str, times: int = 1) -> None:
    """Wait until a server has written something on standard error."""
    end = time.monotonic() + 30
    while server.said().count(text) < times:
        assert time.monotonic() < end, server.said()
        time.sleep(0.02)
