"""The shell scripts, in a copy of the repository whose Python only notes its calls."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

# Behaves as far as the scripts see: it is a Python of $FAKE_VERSION, makes environments with a
# copy of itself in them, and imports torch where $FAKE_TORCH says so.
FAKE_PYTHON = r"""#!/usr/bin/env bash
set -eu
case "$1 ${2-}" in
  *version_info\ \<*) [[ $FAKE_VERSION != 3.10 ]] ;;
  *version_info*) echo "$FAKE_VERSION" ;;
  *_base_executable*) echo "$0" ;;
  *"import torch"*)
    case $0 in */.venv/bin/python) where=venv ;; *) where=base ;; esac
    [[ $FAKE_TORCH == *$where* ]] && echo 2.4.0+vendor ;;
  "-m venv")
    echo "venv ${*:3:$#-3}" >>"$CALLS"
    target=${*: -1}
    rm -rf "$target"
    mkdir -p "$target/bin"
    cp "$0" "$target/bin/python" ;;
  "-m pip")
    [[ $3 != --version ]] || exit 0
    sleep "${FAKE_PIP_SECONDS-0}"
    echo "pip ${*:3}" >>"$CALLS"
    [[ -z ${FAKE_PIP_FAILS-} ]] || { echo "ERROR: no route to host"; exit "$FAKE_PIP_FAILS"; } ;;
  "-m dlrm")
    printf '%s\n' dlrm "${@:3}" . >>"$CALLS"
    for argument; do
      case $argument in
        --run=*) run=${argument#--run=} && mkdir -p "$run" && touch "$run/result.json" ;;
        --inference-only) rm "$run/result.json" ;;
      esac
    done ;;
  -c*) [[ -z $2 ]] || { shift 2; echo "table" "$@"; } ;;
esac
"""


class Copy:
    """A copy of the repository as far as the scripts need it."""

    def __init__(self, folder: Path, repository: Path) -> None:
        self.root = folder / "a clone"  # with a space, as in "My Projects"
        for name in ("test", "native"):
            shutil.copytree(repository / name, self.root / name)
        for name in ("requirements.txt", "requirements-dev.txt", "pyproject.toml", "setup.py"):
            shutil.copy(repository / name, self.root)
        self.python = folder / "python3"
        self.python.write_text(FAKE_PYTHON)
        self.python.chmod(0o755)
        self.log = folder / "calls"
        self.environment = {
            "PATH": os.environ["PATH"],
            "PYTHON": str(self.python),
            "CALLS": str(self.log),
            "FAKE_VERSION": "3.11",
            "FAKE_TORCH": "",
        }

    def start(self, script: str, *arguments: str, **variables: str) -> subprocess.Popen[str]:
        self.log.write_text("")
        return subprocess.Popen(
            ["bash", str(self.root / "test" / script), *arguments],
            env=self.environment | variables,
            cwd=self.root.parent,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    def run(
        self, script: str, *arguments: str, status: int = 0, **variables: str
    ) -> tuple[str, str]:
        process = self.start(script, *arguments, **variables)
        output, errors = process.communicate(timeout=60)
        assert process.returncode == status, errors
        return output, errors

    def calls(self) -> list[str]:
        return self.log.read_text().splitlines()

    def setup_calls(self) -> list[str]:
        """What setup did, without the options that all installations share."""
        shared = r"install --quiet --disable-pip-version-check --no-input --root-user-action=ignore"
        return [re.sub(f"{shared} ", "", call) for call in self.calls()]


@pytest.fixture
def copy(tmp_path: Path, repository: Path) -> Copy:
    return Copy(tmp_path, repository)


def torch_pin(copy: Copy) -> str:
    return copy.root.joinpath("requirements.txt").read_text().split("torch==")[1].split()[0]


def test_scripts_parse(repository: Path) -> None:
    for script in (*repository.glob("test/*.sh"), repository / ".ci" / "run"):
        subprocess.run(["bash", "-n", script], check=True)


def test_setup_installs_torch_then_the_rest_then_the_package(copy: Copy) -> None:
    _, errors = copy.run("setup.sh")
    venv = copy.root / ".venv"
    assert copy.setup_calls() == [
        "venv --clear",
        f"pip torch=={torch_pin(copy)}",
        f"pip -r {venv}/requirements.txt",
        f"pip --no-deps --no-build-isolation --editable {copy.root}",
    ]
    rest = (venv / "requirements.txt").read_text()
    assert "numpy==" in rest
    assert "torch==" not in rest
    assert re.fullmatch(r"(setup: [^\n]+ … \d+ s\n){4}", errors)


def test_setup_is_quiet_when_done(copy: Copy) -> None:
    copy.run("setup.sh", "--dev")
    for arguments in ((), ("--dev",)):
        assert copy.run("setup.sh", *arguments) == ("", "")
        assert copy.calls() == []


def test_setup_adds_the_tools_to_what_is_there(copy: Copy) -> None:
    copy.run("setup.sh")
    copy.run("setup.sh", "--dev")
    assert f"pip -r {copy.root}/requirements-dev.txt" in copy.setup_calls()
    assert not any(call.startswith(("venv", "pip torch")) for call in copy.setup_calls())


def test_setup_follows_changed_requirements(copy: Copy) -> None:
    copy.run("setup.sh")
    requirements = copy.root / "requirements.txt"
    requirements.write_text(requirements.read_text().replace("numpy==", "numpy==1"))
    copy.run("setup.sh")
    assert [call.split()[1] for call in copy.setup_calls()] == ["-r", "--no-deps"]
    requirements.write_text(re.sub("torch==.*", "torch==9.9", requirements.read_text()))
    copy.run("setup.sh")
    assert copy.setup_calls()[0] == "pip torch==9.9"


def test_setup_makes_a_moved_environment_anew(copy: Copy) -> None:
    copy.run("setup.sh")
    copy.root = copy.root.rename(copy.root.with_name("moved"))
    copy.run("setup.sh")
    assert copy.setup_calls()[0] == "venv --clear"


def test_setup_makes_an_interrupted_environment_anew(copy: Copy) -> None:
    copy.run("setup.sh", FAKE_PIP_FAILS="143", status=3)
    copy.run("setup.sh")
    assert copy.setup_calls()[0] == "venv --clear"


def test_setup_goes_on_after_a_failed_installation(copy: Copy) -> None:
    _, errors = copy.run("setup.sh", FAKE_PIP_FAILS="1", status=3)
    assert "    ERROR: no route to host\n" in errors
    assert errors.endswith(
        f"setup: installing torch=={torch_pin(copy)} failed: see above. "
        "Check network, disk space and package index; then try again.\n"
    )
    copy.run("setup.sh")
    assert copy.setup_calls()[0] == f"pip torch=={torch_pin(copy)}"


def test_setup_takes_torch_alone_from_its_index(copy: Copy) -> None:
    copy.run("setup.sh", DLRM_TORCH_INDEX="file:///wheels")
    with_index = [call for call in copy.setup_calls() if "file:///wheels" in call]
    assert with_index == [f"pip --index-url file:///wheels torch=={torch_pin(copy)}"]


@pytest.mark.parametrize("where", ["base and venv", "venv"])
def test_setup_keeps_a_torch_that_is_there(copy: Copy, where: str) -> None:
    _, errors = copy.run("setup.sh", FAKE_TORCH=where)
    sees_system = " --system-site-packages" if "base" in where else ""
    assert copy.setup_calls()[0] == f"venv --clear{sees_system}"
    assert not any(call.startswith("pip torch") for call in copy.setup_calls())
    assert "setup: keeping torch 2.4.0+vendor, which is there already" in errors


def test_two_setups_at_once_install_once(copy: Copy) -> None:
    first = copy.start("setup.sh", FAKE_PIP_SECONDS="0.1")
    second = copy.start("setup.sh", FAKE_PIP_SECONDS="0.1")
    assert [process.wait(timeout=60) for process in (first, second)] == [0, 0]
    outputs = [process.communicate()[1] for process in (first, second)]
    assert sum("waiting for another setup" in output for output in outputs) == 1
    assert sum(call.startswith("venv") for call in copy.calls()) == 1


def test_setup_refuses_an_old_or_missing_python(copy: Copy) -> None:
    _, errors = copy.run("setup.sh", FAKE_VERSION="3.10", status=3)
    assert "is Python 3.10; 3.11 or newer is needed" in errors
    _, errors = copy.run("setup.sh", PYTHON="no-such-python", status=3)
    assert "there is no no-such-python" in errors
    assert copy.calls() == []
    _, errors = copy.run("setup.sh", "--devel", status=2)
    assert errors == "setup: unknown option --devel; known: --dev\n"


def dlrm_calls(copy: Copy) -> list[list[str]]:
    """The arguments of each call of dlrm."""
    calls: list[list[str]] = []
    for line in copy.calls():
        if line == "dlrm":
            calls.append([])
        elif line != "." and calls:
            calls[-1].append(line)
    return calls


@pytest.fixture
def criteo(copy: Copy) -> Path:
    """A folder of raw rows, beside the copy."""
    folder = copy.root.parent / "click logs"
    folder.mkdir()
    for name in ("train.txt", "test.txt"):
        (folder / name).write_text("rows\n")
    return folder


@pytest.mark.parametrize(
    "form", [["--data_path=click logs"], ["--data_path", "click logs"], ["--data-path=click logs/"]]
)
def test_training_on_given_data(copy: Copy, criteo: Path, form: list[str]) -> None:
    output, _ = copy.run("train_full_1p.sh", "--learning-rate", "0.2", *form, "--use-npu")
    training, prediction = dlrm_calls(copy)
    assert training[0] == "reference"
    assert f"--raw-data-file={criteo}/train.txt" in training
    assert training[-3:] == ["--learning-rate", "0.2", "--use-npu"]
    run = next(Path(flag[6:]) for flag in training if flag.startswith("--run="))
    assert run.name == "run-1"
    assert run.parent.parent == copy.root / "output"
    # The data may be read-only.
    processed = next(flag for flag in training if flag.startswith("--processed-data-file="))
    assert f"={run.parent}/" in processed
    files = [str(run), f"{criteo}/test.txt", f"{run}/submission.csv"]
    assert prediction == ["predict", *files, "--checkpoint", "newest"]
    assert output.endswith(f"\ntable {run}\n")


def test_every_training_has_a_folder_of_its_own(copy: Copy, criteo: Path) -> None:
    runs = []
    for script in ("train_full_1p.sh", "train_full_1p.sh", "train_performance_1p.sh"):
        copy.run(script, f"--data_path={criteo}")
        runs += [flag for flag in dlrm_calls(copy)[0] if flag.startswith("--run=")]
    assert [run[-5:] for run in runs] == ["run-1", "run-2", "run-3"]
    assert len({run[:-5] for run in runs}) == 1


@pytest.mark.parametrize("flag", ["-h", "--help"])
@pytest.mark.parametrize(
    ("script", "summary"),
    [
        ("train_full_1p.sh", "The main job on one device: raw rows to a trained, evaluated DLRM"),
        ("train_performance_1p.sh", "The throughput run: test/train_full_1p.sh, stopped after"),
    ],
)
def test_help_is_printed_before_anything_is_set_up(
    copy: Copy, script: str, summary: str, flag: str
) -> None:
    output, errors = copy.run(script, "--learning-rate=0.2", flag)
    assert output.startswith(summary)
    assert f"  bash test/{script} [--data_path=DIR] [flags of the reference" in output
    assert "dlrm reference --help" in output
    assert "set -euo" not in output
    assert max(map(len, output.splitlines())) <= 100
    assert errors == ""
    assert copy.calls() == []
    assert not (copy.root / "output").exists()


@pytest.mark.parametrize("there", [False, True], ids=["no test.txt", "an empty test.txt"])
def test_training_without_test_rows(copy: Copy, criteo: Path, there: bool) -> None:
    (criteo / "test.txt").unlink()
    if there:
        (criteo / "test.txt").touch()
    copy.run("train_full_1p.sh", f"--data_path={criteo}")
    assert [call[0] for call in dlrm_calls(copy)] == ["reference"]


def test_testing_a_model_alone_has_no_row_of_the_table(copy: Copy, criteo: Path) -> None:
    output, _ = copy.run("train_full_1p.sh", f"--data_path={criteo}", "--inference-only")
    assert [call[0] for call in dlrm_calls(copy)] == ["reference", "predict"]
    assert "table" not in output


def test_training_without_data_makes_some(copy: Copy) -> None:
    output, _ = copy.run("train_full_1p.sh")
    making, training = dlrm_calls(copy)
    data = copy.root / "output" / "synthetic"
    assert making[:2] == ["synthesize", str(data)]
    assert int(making[making.index("--rows") + 1]) >= 500_000
    assert f"--raw-data-file={data}/train.txt" in training
    assert output.endswith(f"{data}/truth.json\n")


def test_the_performance_run_is_cut_short_unless_told(copy: Copy, criteo: Path) -> None:
    copy.run("train_performance_1p.sh", f"--data_path={criteo}", "--step=7")
    steps = [flag for flag in dlrm_calls(copy)[0] if flag.startswith("--step")]
    assert steps == ["--step=1000", "--step=7"]


@pytest.mark.parametrize("form", [["--data_path="], ["--data_path"], ["--data_path=elsewhere"]])
def test_training_refuses_a_folder_without_rows(copy: Copy, form: list[str]) -> None:
    _, errors = copy.run("train_full_1p.sh", *form, status=2)
    assert "--data_path must name a folder that holds train.txt" in errors
    assert copy.calls() == []


def test_the_main_job_on_a_few_rows(tmp_path: Path, repository: Path) -> None:
    if not (repository / ".venv" / ".ready-run").exists():
        pytest.skip("test/setup.sh has not made the environment")
    data = tmp_path / "data"
    dlrm = [sys.executable, "-m", "dlrm"]
    subprocess.run([*dlrm, "synthesize", data, "--rows", "7000", "--test-rows", "100"], check=True)
    script = repository / "test" / "train_performance_1p.sh"
    result = subprocess.run(
        ["bash", script, "--data_path=data", "--step=3", "--learning-rate=0.5"],
        cwd=tmp_path,
        text=True,
        stdout=subprocess.PIPE,
        check=True,
    )
    found = re.search(r"^predictions of test.txt: (.*)$", result.stdout, re.MULTILINE)
    assert found is not None
    submission = Path(found[1])
    try:
        assert len(submission.read_text().splitlines()) == 101
        assert "learning_rate = 0.5" in (submission.parent / "config.toml").read_text()
        assert re.search(r"^\| 1p-CPU +\| 0\.\d{4} \| 0\.\d{4} +\|", result.stdout, re.MULTILINE)
    finally:
        shutil.rmtree(submission.parent.parent)
