import json
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from dlrm import cli
from dlrm.config import ModelConfig, TableConfig, TrainConfig, read_config, write_config
from dlrm.errors import UserError
from dlrm.files import locked

SMALL = (
    "--embedding-dim 4 --dense-arch-layer-sizes 8 4 --over-arch-layer-sizes 8 1 --print-freq 10"
).split()


RunDlrm = Callable[..., subprocess.CompletedProcess[str]]


def run_process(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "dlrm", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture
def run_dlrm(quick_dlrm: dict[str, str]) -> RunDlrm:
    """The same without the seconds that importing PyTorch takes each time."""

    def run(*arguments: object) -> subprocess.CompletedProcess[str]:
        command = ["dlrm", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, env=quick_dlrm, check=False)

    return run


def error_of(result: subprocess.CompletedProcess[str], status: int) -> str:
    """Return the message, after checking that it is one message and no traceback."""
    assert result.returncode == status, result.stderr
    assert "Traceback" not in result.stderr
    assert result.stdout == ""
    lines = [line for line in result.stderr.splitlines() if line.startswith("dlrm: error: ")]
    assert len(lines) == 1
    return lines[0]


def test_all_stages_by_hand_and_in_one_go_agree(
    run_dlrm: RunDlrm, raw_rows: Path, tmp_path: Path
) -> None:
    prepared = run_dlrm("prepare", raw_rows, tmp_path / "dataset")
    assert prepared.returncode == 0, prepared.stderr
    assert json.loads(prepared.stdout)["rows"]["train"] > 2500
    trained = run_dlrm("train", tmp_path / "dataset", "--run", tmp_path / "run", *SMALL)
    assert trained.returncode == 0, trained.stderr
    assert "loss" in trained.stderr
    result = json.loads(trained.stdout)
    assert result == json.loads((tmp_path / "run/result.json").read_text())
    evaluated = run_dlrm("evaluate", tmp_path / "run", "--split", "test")
    assert json.loads(evaluated.stdout)["auc"] == result["metrics"]["test"]["auc"]
    predicted = run_dlrm("predict", tmp_path / "run", raw_rows / "test.txt", tmp_path / "out.csv")
    assert json.loads(predicted.stdout)["rows"] == 300

    everything = run_process("run", raw_rows, tmp_path / "all", *SMALL)
    assert everything.returncode == 0, everything.stderr
    assert "plan: train.txt, " in everything.stderr
    told, words = json.loads(everything.stdout), everything.stderr.splitlines()[-1]
    assert told["metrics"]["test"]["auc"] == result["metrics"]["test"]["auc"]
    assert all(Path(told[name]).exists() for name in ("run", "dataset", "report", "submission"))
    assert words.endswith(f"Next: dlrm export {tmp_path / 'all'} BUNDLE, then dlrm serve BUNDLE")
    checkpoint = "checkpoints/best.safetensors"
    assert (tmp_path / "all" / checkpoint).read_bytes() == (
        tmp_path / "run" / checkpoint
    ).read_bytes()
    submission = (tmp_path / "all/submission.csv").read_text()
    assert submission == (tmp_path / "out.csv").read_text()


def test_made_up_rows_are_generated_measured_and_drawn_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def execute(*arguments: object) -> dict[str, object]:
        capsys.readouterr()
        cli.parse([str(argument) for argument in arguments]).execute()
        printed: dict[str, object] = json.loads(capsys.readouterr().out)
        return printed

    one, other, files = tmp_path / "one", tmp_path / "other", tmp_path / "dist_emb_j.log"
    sizes = "--num-embeddings 50 7 --dense-features 3 --mini-batch-size 32".split()
    made = execute("generate", one, "--data-size", 300, "--num-indices-per-lookup", 4, *sizes)
    assert made["rows"] == {"train": 300, "validation": 300, "test": 300}
    assert made["num_embeddings"] == 57
    assert execute("stack-distances", one, files) == {
        "cat_0": str(tmp_path / "dist_emb_0.log"),
        "cat_1": str(tmp_path / "dist_emb_1.log"),
    }
    synthetic = ["--data-generation", "synthetic", "--data-trace-file", files]
    made = execute("generate", other, *synthetic, "--num-batches", 2, "--test-rows", 9, *sizes)
    assert made["rows"] == {"train": 64, "validation": 9, "test": 9}
    with pytest.raises(UserError, match="start over with --overwrite"):
        execute("generate", other, *sizes)
    assert execute("generate", other, "--overwrite", *sizes)["rows"] != made["rows"]


def test_a_runs_own_configuration_repeats_it(
    run_dlrm: RunDlrm, dataset: Path, tmp_path: Path
) -> None:
    first = run_dlrm("train", dataset, "--run", tmp_path / "a", *SMALL, "--learning-rate", "0.3")
    assert first.returncode == 0, first.stderr
    config = tmp_path / "a/config.toml"
    # The DATASET is in the file too; a flag wins over the file.
    again = run_dlrm("train", "--config", config, "--run", tmp_path / "b")
    assert again.returncode == 0, again.stderr
    other = run_dlrm("train", "--config", config, "--run", tmp_path / "c", "--seed", "5")
    assert other.returncode == 0, other.stderr
    a, b, c = ((tmp_path / run / "checkpoints/best.safetensors").read_bytes() for run in "abc")
    assert a == b
    assert a != c


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("epoch = 2", "unknown key epoch; did you mean epochs?"),
        ("learning_rate = 0.2", "unknown key learning_rate; it belongs into the table [optimizer]"),
        ("dataset = 3", "dataset must be the path of a DATASET; got 3"),
        ("format_version = 2.0", "format version '2.0'; this dlrm reads"),
        ("[model]\nembedding_dims = 2", "unknown key model.embedding_dims"),
        ("epochs = 'two'", "Expected `int`, got `str` - at `$.epochs`"),
        ("epochs = -1", "--epochs must be at least 1; got -1"),
        ("epochs = ", "cannot be read as TOML"),
        ("format_version = '9.0'", "format version '9.0'; this dlrm reads"),
    ],
)
def test_a_wrong_configuration_file_is_refused(
    run_dlrm: RunDlrm, tmp_path: Path, content: str, message: str
) -> None:
    (tmp_path / "c.toml").write_text(content)
    result = run_dlrm("train", "d", "--run", "r", "--config", tmp_path / "c.toml")
    assert message in error_of(result, 2)


def test_config_file_values_lie_between_defaults_and_flags(tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text("epochs = 3\nseed = 7\n[model]\ndropout = 0.5\n")
    arguments = ["train", "d", "--run", "r", f"--config={tmp_path / 'c.toml'}", "--seed", "8"]
    command = cli.parse(arguments)
    assert isinstance(command, cli.Train)
    assert command.dataset == Path("d")
    assert (command.options.epochs, command.options.seed) == (3, 8)
    assert command.options.model.dropout == 0.5
    assert command.options.mini_batch_size == TrainConfig().mini_batch_size


def test_tables_are_named_one_by_one(tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text('[[model.tables]]\nname = "cat_0"\nvariant = "qr"\n')
    arguments = ["train", "d", "--run", "r", f"--config={tmp_path / 'c.toml'}"]
    command = cli.parse(arguments)
    assert isinstance(command, cli.Train)
    assert command.options.model.tables == (TableConfig("cat_0", "qr"),)
    entries = ["cat_2,variant=qr,qr_operation=add,qr_collisions=16", "cat_5,variant=md,md_dim=4"]
    command = cli.parse([*arguments, "--tables", *entries, "--seed", "8"])
    assert isinstance(command, cli.Train)
    assert command.options.seed == 8
    assert command.options.model.tables == (
        TableConfig("cat_2", "qr", "add", 16),
        TableConfig("cat_5", "md", md_dim=4),
    )


def test_an_entry_of_tables_that_is_wrong_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.parse(["train", "d", "--run", "r", "--tables", "cat_2,variant=qr,qr_collision=3"])
    assert stopped.value.code == 2
    said = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert "unknown key qr_collision; did you mean qr_collisions?" in said


def test_a_resolved_configuration_has_every_default(tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text("epochs = 3\n[model]\ndropout = 0.5\n")
    config, _ = read_config(tmp_path / "c.toml")
    write_config(tmp_path / "resolved.toml", config, tmp_path / "dataset")
    resolved = tomllib.loads((tmp_path / "resolved.toml").read_text())
    assert resolved["seed"] == TrainConfig().seed
    assert resolved["model"]["embedding_dim"] == TrainConfig().model.embedding_dim
    assert read_config(tmp_path / "resolved.toml") == (config, tmp_path / "dataset")


def test_help_lists_every_command_and_is_quick_to_import() -> None:
    overview = run_process("--help")
    assert overview.returncode == 0
    for verb in cli._VERBS:
        assert f"\n  {verb} " in overview.stdout
    assert run_process().returncode == 2
    script = "import sys, dlrm.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


@pytest.mark.parametrize("verb", cli._VERBS)
def test_every_command_has_help(run_dlrm: RunDlrm, verb: str) -> None:
    result = run_dlrm(verb, "--help")
    assert result.returncode == 0
    assert f"dlrm {verb}" in result.stdout


def test_wrong_commands_and_options_end_with_2(run_dlrm: RunDlrm, tmp_path: Path) -> None:
    assert "no command 'trainn'" in error_of(run_dlrm("trainn"), 2)
    assert run_dlrm("train", tmp_path, "--run", "r", "--epochs", "x").returncode == 2
    assert run_dlrm("train", tmp_path, "--run", "r", "--epohcs", "1").returncode == 2
    assert "is not a run: config.toml" in error_of(run_dlrm("evaluate", tmp_path), 2)
    message = error_of(run_dlrm("train", tmp_path / "none", "--run", tmp_path / "r"), 2)
    assert "none" in message
    assert not (tmp_path / "r").exists()


def test_a_missing_device_ends_with_3(run_dlrm: RunDlrm, dataset: Path, tmp_path: Path) -> None:
    result = run_dlrm("train", dataset, "--run", tmp_path / "r", "--device", "npu")
    assert "torch_npu cannot be imported" in error_of(result, 3)
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_training_with_its_status(
    dataset: Path, tmp_path: Path, number: signal.Signals, status: int
) -> None:
    command = [sys.executable, "-m", "dlrm", "train", str(dataset), "--run", "r"]
    process = subprocess.Popen(
        [*command, "--epochs", "100000"], cwd=tmp_path, stderr=subprocess.PIPE, text=True
    )
    log = tmp_path / "r/log.jsonl"
    deadline = time.monotonic() + 60
    while not (log.exists() and "evaluation" in log.read_text()):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(number)
    _, messages = process.communicate(timeout=60)
    assert process.returncode == status
    assert "Traceback" not in messages
    assert "To go on: dlrm train --resume r\n" in messages


def test_results_go_to_a_closed_pipe_quietly(dataset: Path) -> None:
    script = f'"{sys.executable}" -m dlrm --help | true; exit ${{PIPESTATUS[0]}}'
    result = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=False)
    assert "Traceback" not in result.stderr


def test_parse_refuses_an_unknown_command() -> None:
    with pytest.raises(UserError, match="no command 'x'"):
        cli.parse(["x"])


def test_a_whole_run_can_be_moved(run_dlrm: RunDlrm, raw_rows: Path, tmp_path: Path) -> None:
    made = run_dlrm("run", raw_rows, tmp_path / "run", *SMALL)
    assert made.returncode == 0, made.stderr
    before = run_dlrm("evaluate", tmp_path / "run")
    (tmp_path / "run").rename(tmp_path / "moved")
    assert run_dlrm("evaluate", tmp_path / "moved").stdout == before.stdout != ""


def test_a_signal_during_start_up_ends_the_process_at_once(dataset: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "dlrm", "train", str(dataset), "--run", "r"]
    for delay in (0.2, 0.5, 0.8):
        process = subprocess.Popen(
            [*command, "--epochs", "100000"], cwd=tmp_path, stderr=subprocess.PIPE, text=True
        )
        time.sleep(delay)
        process.send_signal(signal.SIGINT)
        _, messages = process.communicate(timeout=30)
        assert process.returncode in (130, -signal.SIGINT)
        assert "Traceback" not in messages or process.returncode == -signal.SIGINT
        shutil.rmtree(tmp_path / "r", ignore_errors=True)


def test_an_interrupted_run_is_named_as_such(
    run_dlrm: RunDlrm, dataset: Path, tmp_path: Path
) -> None:
    (tmp_path / "r").mkdir()
    (tmp_path / "r/config.toml").write_text(f"dataset = {str(dataset)!r}\n")
    message = error_of(run_dlrm("train", dataset, "--run", tmp_path / "r"), 2)
    assert "holds a run already that has not ended" in message
    assert f"dlrm train --resume {tmp_path / 'r'} goes on with it" in message


def test_options_beside_resume_are_refused_by_name(dataset: Path, tmp_path: Path) -> None:
    run = tmp_path / "r"
    run.mkdir()
    config = replace(TrainConfig(), epochs=3, model=replace(ModelConfig(), dropout=0.5))
    write_config(run / "config.toml", config, dataset)
    for options, named in (
        (["--epochs", "1"], "--epochs"),  # the default, and yet another than the run's
        (["--learning-rate=0.5", "--dropout", "0.1"], "--dropout, --learning-rate"),
        (["--run", "elsewhere"], "--run"),
        (["--config", str(run / "config.toml")], "--config"),
    ):
        command = cli.parse(["train", f"--resume={run}", *options])
        with pytest.raises(UserError, match=f"so it does not take {named}. Leave that away"):
            command.execute()
    same = cli.parse(["train", "moved", "--resume", str(run), "--epochs", "3"])
    assert isinstance(same, cli.Train)
    same._refuse_options_beside_resume(run)
    assert same.dataset == Path("moved")
    with pytest.raises(UserError, match=r"is not a run: config\.toml is missing"):
        cli.parse(["train", "--resume", str(tmp_path)])
    for arguments in (["train"], ["train", "d"], ["train", "--run", "r"]):
        with pytest.raises(UserError, match="name the DATASET and the RUN to make"):
            cli.parse(arguments).execute()


def test_a_run_that_goes_on_elsewhere_is_not_resumed(dataset: Path, tmp_path: Path) -> None:
    write_config(tmp_path / "config.toml", TrainConfig(), dataset)
    with (
        locked(tmp_path, "run"),
        pytest.raises(UserError, match="is being written by another process"),
    ):
        cli.parse(["train", "--resume", str(tmp_path)]).execute()
