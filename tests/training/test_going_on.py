"""``dlrm run`` and ``dlrm reference`` that are interrupted, and given again."""

from __future__ import annotations

import json
import re
import shlex
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dlrm import cli
from dlrm.errors import UserError

KILLED = -signal.SIGKILL
OPTIONS = (
    "--embedding-dim 2 --dense-arch-layer-sizes 2 --over-arch-layer-sizes 1 "
    "--mini-batch-size 64 --print-freq 7 --test-freq 15 --save-every-steps 4"
).split()
REFERENCE = (
    "--arch-sparse-feature-size=2 --arch-mlp-bot=13-2 --arch-mlp-top=1 "
    "--data-generation=dataset --loss-function=bce --mini-batch-size=64 "
    "--test-mini-batch-size=4096 --learning-rate=0.5 --print-freq=7 --test-freq=10 --nepochs=2"
).split()


@pytest.fixture(scope="module")
def warm(start_warm: Callable[..., Any], dataset: Path) -> Any:
    """A function that runs a command in a process of its own."""
    process = start_warm(Path(__file__).parent / "interrupted_training.py", dataset)

    def ask(run: Path, command: list[str], **request: Any) -> Any:
        return process(run=run, command=list(map(str, command)), **request)

    return ask


def content(run: Path) -> dict[str, bytes]:
    """What a run comes to, but for what has times or its own name in it."""
    files = {
        str(path.relative_to(run)): path.read_bytes()
        for path in run.rglob("*")
        if path.is_file() and path.suffix in (".safetensors", ".arrow", ".csv")
    }
    result = json.loads((run / "result.json").read_text())
    files["metrics"] = json.dumps(result["metrics"]).encode()
    return files


def test_dlrm_run_goes_on_in_every_stage(warm: Any, raw_rows: Path, tmp_path: Path) -> None:
    whole, run = tmp_path / "whole", tmp_path / "runs" / "run"
    assert warm(whole, ["run", raw_rows, whole, *OPTIONS]).status == 0
    command = ["run", raw_rows, run, *OPTIONS]
    killed = tmp_path / "killed"
    answer = warm(run, command, term_at_step=6)
    assert answer.status == 143, answer.said
    assert answer.said.endswith(
        "dlrm: error: stopped by SIGTERM after step 6; step 6 is saved. To go on: repeat the same "
        "command.\n"
    )
    assert warm(run, command, kill_at_step=17).status == KILLED
    # Then wherever something is written that has to do with more than checkpoints; before a write
    # there is what was there after the one before.
    but_not = "^(after|before write)|fsync|mkdir|checkpoints|schema|vocabulary|validation"
    kill = {"kill_once": killed, "but_not": but_not}
    for _ in range(40):
        answer = warm(run, command, **kill)
        if answer.status != KILLED:
            break
    assert answer.status == 0, answer.said
    places = set(killed.read_text().splitlines())
    assert {"before replace run/predictions/test.arrow", "before replace run/result.json"} <= places
    assert "amid write run/.submission.csv.partial" in places
    assert content(run) == content(whole)
    assert not list(run.rglob("*.partial"))
    again = warm(run, command)
    assert again.status == 0
    assert "has ended already" in again.said
    assert content(run) == content(whole)


def test_dlrm_run_goes_on_with_a_preparation(warm: Any, raw_rows: Path, tmp_path: Path) -> None:
    run = tmp_path / "runs" / "run"
    run.parent.mkdir()
    command = ["run", raw_rows, run, *OPTIONS]
    killed = tmp_path / "killed"
    kill = {
        "kill_once": killed,
        "but_not": "^(after|amid)|fsync|vocabulary|unlink|part-|write|fitted-0(?!00)",
    }
    taken_up = 0
    for _ in range(100):
        answer = warm(run, command, **kill)
        taken_up += "going on with the interrupted preparation" in answer.said
        assert answer.status == KILLED, answer.said
        if (run / "config.toml").exists():
            break
    assert taken_up > 3
    assert any("manifest.json" in line for line in killed.read_text().splitlines())


def test_another_training_is_not_gone_on_with(raw_rows: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = ["run", raw_rows, run, *OPTIONS, "--max-steps=2"]

    def ask(*options: str) -> None:
        cli.parse([*map(str, command), *options]).execute()

    ask()
    before = content(run)
    other = "with other options than are asked for: "
    for change, message in (
        (["--max-steps=3"], f"{other}--max-steps. Give those in {run / 'config.toml'}"),
        (["--epochs=2", "--keep=3", "--dropout=0.5"], f"{other}--dropout, --epochs, --keep. "),
        (["--seed=5"], f"{other}--seed. "),
        (["--shuffle=none"], "it was made with --shuffle total, and --shuffle none is asked for"),
    ):
        with pytest.raises(UserError) as caught:
            ask(*change)
        assert message in str(caught.value)
    assert content(run) == before


def test_dlrm_reference_goes_on_and_its_log_and_model_are_those_of_one_go(
    warm: Any, raw_rows: Path, tmp_path: Path
) -> None:
    def flags(folder: Path) -> list[Any]:
        folder.mkdir()
        data = [f"--raw-data-file={raw_rows / 'train.txt'}"]
        data += [f"--processed-data-file={tmp_path / 'processed.npz'}"]
        return ["reference", *REFERENCE, *data, f"--save-model={folder / 'model.pt'}"]

    whole, here = tmp_path / "whole", tmp_path / "here"
    command = flags(whole)
    expected = warm(whole / "run", [*command, f"--run={whole / 'run'}"])
    assert expected.status == 0, expected.said
    assert f"\nthe run is in {whole / 'run'}\n" in expected.said
    command = flags(here)
    run = here / "runs/reference-001"  # as it is called without --run
    answer = warm(run, command, cwd=here, term_at_step=33)
    assert answer.status == 143
    to_go_on = shlex.join(["dlrm", *map(str, command), "--run=runs/reference-001"])
    assert answer.said.endswith(f"step 33 is saved. To go on: {to_go_on}\n")
    said = [answer.said]
    answer = warm(run, command, cwd=here, kill_at_step=25)
    assert answer.status == KILLED
    said.append(answer.said)
    # The best of before counts, so that not every test is the best, and saved.
    assert "# note: it goes on after step 33" in answer.said
    answer = warm(run, [*shlex.split(to_go_on)[1:]], cwd=here)
    assert answer.status == 0, answer.said
    said.append(answer.said)
    assert content(run) == content(whole / "run")
    assert (here / "model.pt").read_bytes() == (whole / "model.pt").read_bytes()

    def told(text: str) -> list[str]:
        pattern = r"(?:Finished training it|Testing at|  ?accuracy|Saving model).*"
        lines = re.findall(pattern, text.replace(str(here), "").replace(str(whole), ""))
        return list(dict.fromkeys(lines))

    assert told("\n".join(said)) == told(expected.said)
    assert expected.said.count("Saving model") < expected.said.count("Testing at")
    # What has ended is not gone on with: the next one is made.
    assert warm(run, command, cwd=here, kill_at_step=1).status == KILLED
    assert (here / "runs/reference-002/config.toml").exists()
    # Nor is another training.
    other = [*command, "--learning-rate=0.1"]
    assert warm(run, other, cwd=here, kill_at_step=1).status == KILLED
    assert (here / "runs/reference-003/config.toml").exists()


def test_dlrm_reference_goes_on_from_a_loaded_model(
    warm: Any, raw_rows: Path, tmp_path: Path
) -> None:
    data = [f"--raw-data-file={raw_rows / 'train.txt'}"]
    data += [f"--processed-data-file={tmp_path / 'processed.npz'}"]
    command = ["reference", *REFERENCE, *data]
    model = tmp_path / "model.pt"
    run, whole = tmp_path / "run", tmp_path / "whole"
    first = [*command, "--step=20", f"--save-model={model}", f"--run={tmp_path / 'first'}"]
    assert warm(tmp_path / "first", first).status == 0
    loaded = [*command, f"--load-model={model}"]
    assert warm(whole, [*loaded, f"--run={whole}"]).status == 0
    loaded += [f"--run={run}"]
    for when in ({"kill_at_step": 3}, {"kill_at_step": 30}, {"int_at_step": 8}):
        answer = warm(run, loaded, **when)
        assert answer.status == (130 if "int_at_step" in when else KILLED), answer.said
    answer = warm(run, loaded)
    assert answer.status == 0, answer.said
    assert content(run) == content(whole)
