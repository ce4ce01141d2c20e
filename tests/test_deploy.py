"""What deploy/ holds fits what it starts."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import tyro

from dlrm.cli import Serve
from dlrm.config import ServeConfig


@pytest.fixture
def unit(repository: Path) -> str:
    return (repository / "deploy" / "dlrm-serve.service").read_text()


@pytest.fixture
def containerfile(repository: Path) -> str:
    return (repository / "deploy" / "Containerfile").read_text()


def served(command: str) -> Serve:
    """What a command line asks for; it ends the test where it cannot be parsed."""
    arguments = shlex.split(command)
    return tyro.cli(Serve, args=arguments[arguments.index("serve") + 1 :])


def test_the_unit_starts_a_server(unit: str) -> None:
    (command,) = re.findall("^ExecStart=(.*)$", unit, re.MULTILINE)
    assert served(command).model == Path("/srv/dlrm/current")


def test_the_unit_waits_until_accepted_requests_are_answered(unit: str) -> None:
    (seconds,) = re.findall(r"^TimeoutStopSec=(\d+)$", unit, re.MULTILINE)
    assert int(seconds) > ServeConfig.drain_seconds + ServeConfig.shutdown_timeout


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="no systemd-analyze")
def test_systemd_takes_the_unit(unit: str, tmp_path: Path) -> None:
    path = tmp_path / "dlrm-serve.service"
    path.write_text(unit.replace("/opt/dlrm/bin/dlrm", "/bin/true"))
    result = subprocess.run(
        ["systemd-analyze", "verify", path], capture_output=True, text=True, check=False
    )
    assert (result.returncode, result.stderr) == (0, "")


def test_the_container_starts_a_server_on_the_ports_it_names(containerfile: str) -> None:
    (usage,) = re.findall(r"^#     --volume \S+ dlrm (serve .*)$", containerfile, re.MULTILINE)
    options = served(usage).options
    (ports,) = re.findall("^EXPOSE (.*)$", containerfile, re.MULTILINE)
    assert ports.split() == [str(options.port), str(options.grpc_port)]
    assert f":{options.port}/v2/health/ready" in containerfile


def test_the_container_takes_no_torch_for_cuda(
    containerfile: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (check,) = re.findall(r"python -c '(import sys, torch.*?)'", containerfile, re.DOTALL)
    for cuda, told in ((None, "None"), ("13.0", "torch 2.13.0 is built for CUDA. ")):
        torch = SimpleNamespace(version=SimpleNamespace(cuda=cuda), __version__="2.13.0")
        monkeypatch.setitem(sys.modules, "torch", torch)
        with pytest.raises(SystemExit) as ended:
            exec(check, {})
        assert str(ended.value.code).startswith(told)


def test_the_container_is_made_of_what_is_there(containerfile: str, repository: Path) -> None:
    copied = re.findall("^COPY (?!--from)(.*) \\S+$", containerfile, re.MULTILINE)
    assert copied == ["requirements.txt", "."]
    for name in re.findall(r"-[rc] (\S+\.txt)", containerfile):
        assert (repository / name).is_file()
    assert re.search(r"^serve = ", (repository / "pyproject.toml").read_text(), re.MULTILINE)
