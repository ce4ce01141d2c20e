"""Starting, reloading, losing a process and ending, while clients go on."""

import http.client
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc

from asking import INFER, ask, wait_for
from dlrm.config import ServeConfig
from dlrm.errors import EnvironmentFaultError, UserError
from dlrm.prediction import load
from dlrm.serve.model import ServedModel
from dlrm.serve.supervisor import _Child, _Supervisor, serve

ROWS = slice(0, 3)
_BETWEEN = 0.003
"""Seconds between a client's requests: loading a model needs the cores too."""


class Load:
    """Clients that ask and check the answers until they are told to stop, or the server ends.

    Args:
        server: Whom they ask.
        client: What they ask.
        expected: By version, the right answers.
    """

    def __init__(self, server: Any, client: Any, expected: dict[str, Any]) -> None:
        self._server = server
        self._client = client
        self._expected = expected
        self._stopped = threading.Event()
        self.versions: list[str] = []
        self.faults: list[str] = []
        works = (self._over_http, self._over_http, self._over_grpc, self._look_whether_ready)
        self._threads = [threading.Thread(target=self._guarded, args=(work,)) for work in works]
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        self._stopped.set()
        self.join()

    def join(self) -> None:
        """Wait until the server has said that it ends."""
        for thread in self._threads:
            thread.join(30)
            assert not thread.is_alive()

    def wait_for(self, version: str) -> None:
        end = time.monotonic() + 20
        while self.versions[-4:].count(version) < 4:
            assert time.monotonic() < end, (self.faults, self._server.said())
            time.sleep(0.01)

    def _guarded(self, work: Any) -> None:
        try:
            while not self._stopped.is_set():
                work()
        except Exception as error:
            self.faults.append(repr(error))

    def _check(self, version: str, found: Any) -> None:
        np.testing.assert_allclose(found, self._expected[version][ROWS], atol=1e-6)
        self.versions.append(version)

    def _over_http(self) -> None:
        connection = http.client.HTTPConnection(self._server.host, self._server.port, timeout=20)
        body = self._client.json(ROWS)
        while not self._stopped.is_set():
            connection.request("POST", INFER, body)
            answer = connection.getresponse()
            content = json.loads(answer.read())
            assert answer.status == 200, content
            self._check(content["model_version"], content["outputs"][0]["data"])
            time.sleep(_BETWEEN)
        connection.close()

    def _over_grpc(self) -> None:
        with tritonclient.grpc.InferenceServerClient(self._server.grpc) as infers:
            tensors = self._client.tensors(tritonclient.grpc, ROWS)
            while not self._stopped.is_set():
                answer = infers.infer("dlrm", tensors)
                self._check(answer.get_response().model_version, answer.as_numpy("probabilities"))
                time.sleep(_BETWEEN)

    def _look_whether_ready(self) -> None:
        """Stop when the server no longer wants requests, as a load balancer would."""
        connection = http.client.HTTPConnection(self._server.host, self._server.port, timeout=20)
        connection.request("GET", "/v2/health/ready")
        if connection.getresponse().status != 200:
            self._stopped.set()
        connection.close()
        time.sleep(0.02)


def version_of(run: Path) -> str:
    return ServedModel.load(run, "dlrm", 8).version


def test_no_request_is_lost_by_reloads_and_at_the_end(
    start_server: Any, train_run: Any, run: Path, client: Any, tmp_path: Path
) -> None:
    other = train_run(tmp_path / "other", seed=2)
    broken = tmp_path / "broken"
    shutil.copytree(other, broken)
    checkpoint = broken / "checkpoints" / "best.safetensors"
    checkpoint.write_bytes(checkpoint.read_bytes()[:-1])
    link = tmp_path / "link"

    def lead_to(target: Path) -> None:
        new = tmp_path / "new"
        new.symlink_to(target)
        new.rename(link)

    first, second = version_of(run), version_of(other)
    expected = {first: client.expected, second: load(other).predict(client.columns)}
    assert np.abs(expected[first] - expected[second]).max() > 1e-3
    lead_to(run)
    with start_server(link, "--workers", "2", "--drain-seconds", "0.5") as server:
        clients = Load(server, client, expected)
        clients.wait_for(first)

        lead_to(other)
        server.process.send_signal(signal.SIGHUP)
        clients.wait_for(second)
        lead_to(run)
        assert load_anew(server) == (200, {})
        clients.wait_for(first)

        # Who goes before a reload is over does not keep others from asking for one.
        for _ in range(3):
            with socket.create_connection((server.host, server.port)) as gone:
                gone.sendall(b"POST /v2/repository/models/dlrm/load HTTP/1.1\r\nHost: a\r\n\r\n")
        assert load_anew(server) == (200, {})

        lead_to(broken)
        status, answer = load_anew(server)
        assert status == 400
        assert str(checkpoint) in answer["error"]
        assert "the earlier one stays" in answer["error"]
        server.process.send_signal(signal.SIGHUP)
        wait_for(server, "is not served, the earlier model stays", times=2)
        clients.wait_for(first)
        lead_to(run)
        clients.stop()
        assert clients.faults == []

        lost = int(re.findall(r"process (\d+) is started", server.said())[0])
        os.kill(lost, signal.SIGKILL)
        wait_for(server, f"process {lost} ended by SIGKILL; another is started")
        wait_for(server, "is started\n", times=3)
        assert ask(server, "POST", INFER, client.json(ROWS))[0] == 200

        clients = Load(server, client, expected)
        clients.wait_for(first)
        server.process.send_signal(signal.SIGTERM)
        clients.join()
        assert clients.faults == []
        assert server.process.wait(10) == 0
        assert "Traceback" not in server.said()


def load_anew(server: Any) -> tuple[int, Any]:
    status, _, content = ask(server, "POST", "/v2/repository/models/dlrm/load")
    return status, json.loads(content)


def test_what_cannot_be_served_ends_with_a_message(
    quick_dlrm: dict[str, str], run: Path, server: Any, tmp_path: Path
) -> None:
    def fails(*arguments: str) -> tuple[int, str]:
        ended = subprocess.run(
            ["dlrm", "serve", *arguments],
            env=quick_dlrm,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert ended.stdout == ""
        return ended.returncode, ended.stderr

    free = ("--port", "0", "--grpc-port", "0")
    status, message = fails(str(tmp_path), *free)
    assert (status, str(tmp_path) in message) == (2, True)
    for option, address in (("--port", server.http), ("--grpc-port", server.grpc)):
        status, message = fails(str(run), *free, option, address.split(":")[1])
        assert (status, f"cannot listen on {address}" in message) == (3, True)
    status, message = fails(str(run), *free, "--model-name", "a/b")
    assert (status, "--model-name must be" in message) == (2, True)


def runs(process: int) -> bool:
    """Whether a process is there, and not only waits for its parent to take notice of its end."""
    try:
        return Path(f"/proc/{process}/stat").read_text().split()[2] != "Z"
    except OSError:
        return False


def test_processes_do_not_outlive_their_supervisor(start_server: Any, run: Path) -> None:
    with start_server(run, "--workers", "2") as server:
        workers = [int(each) for each in re.findall(r"process (\d+) is started", server.said())]
        supervisors = {Path(f"/proc/{each}/stat").read_text().split()[3] for each in workers}
        (supervisor,) = supervisors
        held = folder_of(workers[0])
        assert held.exists()
        os.kill(int(supervisor), signal.SIGKILL)
        end = time.monotonic() + 20
        while any(map(runs, workers)):
            assert time.monotonic() < end
            time.sleep(0.02)
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection((server.host, server.port), timeout=5)
    assert not held.exists()


def folder_of(worker: int) -> Path:
    """The temporary folder of a server."""
    mapped = Path(f"/proc/{worker}/maps").read_text()
    return Path(re.findall(r"(/\S*/dlrm-serve-[^/]*)/", mapped)[0])


def test_a_server_that_does_not_start_leaves_nothing_open(
    server: Any, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    before = os.listdir("/proc/self/fd")
    with pytest.raises(EnvironmentFaultError, match="cannot listen"):
        serve(run, ServeConfig(port=0, grpc_port=server.grpc_port))
    assert (os.listdir("/proc/self/fd"), os.listdir(tmp_path)) == (before, [])


def test_connections_are_limited(start_server: Any, run: Path) -> None:
    with start_server(run, "--max-connections", "2", "--grpc-port", "-1") as server:
        address = (server.host, server.port)
        connections = [http.client.HTTPConnection(*address, timeout=20) for _ in range(3)]
        found = []
        for connection in connections:
            connection.request("GET", "/v2/health/live")
            answer = connection.getresponse()
            found.append((answer.status, json.loads(answer.read())))
        assert found[:2] == [(200, {"live": True})] * 2
        assert found[2] == (503, {"error": "the server has too many connections."})
        connections[0].close()
        for connection in connections[1:]:
            connection.close()


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("port", 1 << 16, "--port must be in 0 … 65535; got 65536"),
        ("grpc_port", -2, "--grpc-port must be in -1 … 65535; got -2"),
        ("grpc_port", 8000, "must differ"),
        ("workers", 0, "--workers must be at least 1"),
        ("threads", -1, "--threads must not be negative"),
        ("batch_wait_ms", 2000.0, "--batch-wait-ms must be in 0 … 1000"),
        ("read_timeout", 0.0, "--read-timeout must be a positive number"),
        ("drain_seconds", -1.0, "--drain-seconds must be in 0 … 3600"),
        ("access_log", 1.5, "--access-log must be in 0 … 1"),
        ("max_body", "many", "--max-body"),
    ],
)
def test_options_that_mean_nothing_are_refused(field: str, value: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        ServeConfig(**{field: value})


@pytest.mark.parametrize("seconds", [0.0, 0.2, 0.4])
def test_a_server_that_is_stopped_before_it_is_ready_ends_well(
    quick_dlrm: dict[str, str], run: Path, tmp_path: Path, seconds: float
) -> None:
    log = tmp_path / "log"
    with open(log, "w") as file:
        process = subprocess.Popen(
            ["dlrm", "serve", str(run), "--port", "0", "--grpc-port", "0", "--drain-seconds", "0"],
            env=quick_dlrm,
            stdout=subprocess.DEVNULL,
            stderr=file,
        )
    end = time.monotonic() + 20
    while "is started" not in log.read_text():
        assert time.monotonic() < end, log.read_text()
        time.sleep(0.01)
    time.sleep(seconds)
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 0, log.read_text()
    assert "Traceback" not in log.read_text()


def test_what_is_on_its_way_at_the_end_is_answered_and_nobody_else_waits(
    start_server: Any, run: Path, client: Any
) -> None:
    body = client.json(ROWS)
    head = f"POST {INFER} HTTP/1.1\r\nHost: a\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    with start_server(run, "--drain-seconds", "0.5", "--grpc-port", "-1") as server:
        silent, begun, asking = (
            socket.create_connection((server.host, server.port), timeout=10) for _ in range(3)
        )
        begun.sendall(head[:20])
        asking.sendall(head + body[:-20])
        kept = http.client.HTTPConnection(server.host, server.port, timeout=10)
        kept.request("POST", INFER, body)
        assert kept.getresponse().read()
        server.process.send_signal(signal.SIGTERM)
        began = time.monotonic()
        time.sleep(1.5)
        assert server.process.poll() is None
        asking.sendall(body[-20:])
        assert asking.recv(1 << 16).startswith(b"HTTP/1.1 200 ")
        for other in (silent, begun, kept.sock):
            assert other.recv(1) == b""
            other.close()
        assert server.process.wait(10) == 0
        assert time.monotonic() - began < 8
        asking.close()


def test_a_process_that_is_told_to_load_twice_has_loaded_when_it_has_said_so_twice() -> None:
    supervisor = _Supervisor(Path("model"), ServeConfig(), Path("folder"))
    supervisor._announced = True
    ours, theirs = socket.socketpair()
    with supervisor._selector, ours, theirs:
        worker = supervisor._workers[1] = _Child(1, ours, 0.0)
        for _ in range(2):
            supervisor._tell_to_load(worker, verified=True)
        for still in (True, False):
            theirs.sendall(b'{"loaded": "1"}\n')
            supervisor._hear(worker)
            assert supervisor._is_loading() == still
