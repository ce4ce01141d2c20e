"""Training that is killed or stopped, and goes on as if nothing had happened.

Trainings run in forks of one process (``interrupted_training.py`` beside this), so that none can
lean on what another left in memory.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

import dlrm
from dlrm.checkpoint import Position
from dlrm.config import (
    ModelConfig,
    OptimizerConfig,
    PrepareConfig,
    TableConfig,
    TrainConfig,
    write_config,
)
from dlrm.data.batch import Batch
from dlrm.data.dataset import Dataset
from dlrm.data.prepare import prepare
from dlrm.errors import EnvironmentFaultError, UserError
from dlrm.training import saving
from dlrm.training.events import Events
from dlrm.training.saving import Checkpoints
from dlrm.training.step import EagerStep

KILLED = -9
STOPPED = 4  # of the driver, for a StoppedBySignalError
MODEL = ModelConfig(embedding_dim=4, dense_arch_layer_sizes=(8, 4), over_arch_layer_sizes=(8, 1))
# 41 steps a pass, of which the last is short. Reports, evaluations and checkpoints fall apart.
CONFIG = TrainConfig(
    model=MODEL,
    optimizer=OptimizerConfig("sgd", 0.05),
    mini_batch_size=64,
    epochs=2,
    print_freq=7,
    test_freq=15,
    save_every_steps=4,
    save_every_minutes=0,
)
KINDS = {
    "sgd": {},
    "adagrad": {"optimizer": OptimizerConfig("adagrad", 0.01)},
    "rowwise_adagrad": {"optimizer": OptimizerConfig("rowwise_adagrad", 0.01)},
}
EAGER = {
    "dropout": {"model": replace(MODEL, dropout=0.3)},
    "bfloat16": {
        "model": replace(MODEL, embedding_dtype="bfloat16"),
        "optimizer": OptimizerConfig("rowwise_adagrad", 0.01),
    },
}
# Of the 26 tables the largest, and one of each other kind. The kernels take the first set.
VARIANTS = {
    "qr and weighed": replace(
        MODEL,
        embedding_variant="qr",
        qr_threshold=20,
        tables=(
            TableConfig("cat_0", weighted_pooling="learned"),
            TableConfig("cat_1", weighted_pooling="fixed"),
            TableConfig("cat_2", "qr", "add", 3),
        ),
    ),
    "md and concat": replace(
        MODEL,
        embedding_variant="md",
        md_threshold=20,
        weighted_pooling="learned",
        tables=(TableConfig("cat_2", "qr", "concat", 3), TableConfig("cat_3", "qr", "mult")),
    ),
}


Warm = Callable[..., Any]


@pytest.fixture(scope="module")
def warm(start_warm: Callable[..., Any], dataset: Path) -> Warm:
    """A function that trains in a process of its own (``interrupted_training.py``)."""
    process = start_warm(Path(__file__).parent / "interrupted_training.py", dataset)

    def ask(run: Path, dataset: Path | None = None, **request: Any) -> Any:
        if dataset is not None:
            request["dataset"] = dataset
        if "config" in request:
            request["config"] = asdict(request["config"])
        return process(run=run, **request)

    return ask


def log_of(run: Path) -> list[dict[str, Any]]:
    """What was logged, times and rates aside."""
    times = {
        "seconds",
        "milliseconds_per_step",
        "data_wait_milliseconds",
        "samples_per_second",
    }
    lines = [json.loads(line) for line in (run / "log.jsonl").read_bytes().splitlines()]
    return [{name: line[name] for name in line.keys() - times} for line in lines]


def outcome(run: Path) -> dict[str, Any]:
    """All that a run comes to, times and rates aside."""
    files = [
        *(run / "checkpoints").glob("*.safetensors"),
        *(run / "predictions").glob("*.arrow"),
    ]
    result = json.loads((run / "result.json").read_text())
    for name in ("seconds", "samples_per_second", "peak_memory_bytes"):
        assert result.pop(name) > 0
    return {
        "files": {path.name: path.read_bytes() for path in files},
        "log": log_of(run),
        "result": result,
    }


def assert_equal(run: Path, expected: dict[str, Any]) -> None:
    found = outcome(run)
    for part in expected:
        if part == "files":
            assert found[part].keys() == expected[part].keys()
            differ = [name for name in found[part] if found[part][name] != expected[part][name]]
            assert differ == []
        else:
            assert found[part] == expected[part]
    assert not list(run.rglob("*.partial"))


def whole(warm: Warm, run: Path, dataset: Path, **request: Any) -> dict[str, Any]:
    """What a training comes to that nothing interrupts."""
    answer = warm(run, dataset, **request)
    assert answer.status == 0, answer.said
    return outcome(run)


def go_on_through(
    warm: Warm, run: Path, dataset: Path, config: TrainConfig, steps: list[int], **request: Any
) -> list[int]:
    """Train and resume, killed after so many steps of each process; return where each went on."""
    answer = warm(run, dataset, config=config, kill_at_step=steps[0], **request)
    assert answer.status == KILLED, answer.said
    begun = []
    for step in [*steps[1:], None]:
        kill = {} if step is None else {"kill_at_step": step}
        answer = warm(run, **kill, **request)
        assert answer.status == (0 if step is None else KILLED), answer.said
        found = re.search(r"going on after step (\d+)", answer.said)
        begun.append(int(found[1]) if found else 0)
        assert found or "begins anew" in answer.said
        assert "WARNING" not in answer.said
    return begun


@pytest.mark.parametrize(
    ("change", "plain"),
    [
        *(pytest.param(KINDS[kind], False, id=f"{kind}-native") for kind in KINDS),
        # Dropout's is sgd, and bfloat16's is rowwise_adagrad.
        *(pytest.param(KINDS[kind], True, id=f"{kind}-plain",
                       marks=() if kind == "adagrad" else pytest.mark.long) for kind in KINDS),
        *(pytest.param(EAGER[kind], True, id=kind) for kind in EAGER),
    ],
)  # fmt: skip
def test_killed_at_random_steps_it_ends_as_if_it_had_not_been(
    warm: Warm, dataset: Path, tmp_path: Path, change: dict[str, Any], plain: bool
) -> None:
    config = replace(CONFIG, **change)
    expected = whole(warm, tmp_path / "whole", dataset, config=config, plain=plain)
    kernels = expected["result"]["kernels"]
    assert kernels == "plain" if plain else kernels in ("native", "plain")
    generator = random.Random(f"{change} {plain}")
    steps = [generator.randint(6, 15) for _ in range(5)]
    begun = go_on_through(warm, tmp_path / "run", dataset, config, steps, plain=plain, overlap=True)
    assert begun[-1] > 0
    assert all(step % 4 == 0 or step % 41 % 15 == 0 or step % 41 == 0 for step in begun)
    assert_equal(tmp_path / "run", expected)
    assert {event["event"] for event in expected["log"]} == {
        "start",
        "report",
        "evaluation",
        "stop",
    }


@pytest.mark.parametrize(
    ("variant", "kind", "plain"),
    [
        ("qr and weighed", "adagrad", False),
        ("qr and weighed", "sgd", True),
        ("md and concat", "adagrad", True),
        ("md and concat", "bfloat16", True),
        *(
            pytest.param(*case, marks=pytest.mark.long)
            for case in [
                *(("qr and weighed", kind, False) for kind in ("sgd", "rowwise_adagrad")),
                *(("qr and weighed", kind, True) for kind in ("adagrad", "rowwise_adagrad")),
                *(("md and concat", kind, True) for kind in ("sgd", "rowwise_adagrad")),
            ]
        ),
    ],
)
def test_embedding_variants_end_as_if_they_had_not_been_killed(
    warm: Warm, dataset: Path, tmp_path: Path, variant: str, kind: str, plain: bool
) -> None:
    change = {**KINDS, **EAGER}[kind]
    dtype = change.get("model", MODEL).embedding_dtype
    model = replace(VARIANTS[variant], embedding_dtype=dtype)
    config = replace(CONFIG, **{**change, "model": model}, epochs=1, num_batches=20)
    expected = whole(warm, tmp_path / "whole", dataset, config=config, plain=plain)
    assert expected["result"]["kernels"] == ("plain" if plain else "native")
    begun = go_on_through(warm, tmp_path / "run", dataset, config, [6, 7], plain=plain)
    assert begun == [4, 8]
    assert_equal(tmp_path / "run", expected)


@pytest.mark.parametrize("plain", [False, True], ids=["native", "plain"])
def test_accumulated_steps_end_as_if_they_had_not_been_killed(
    warm: Warm, dataset: Path, tmp_path: Path, plain: bool
) -> None:
    config = replace(
        CONFIG,
        mini_batch_size=16,
        accumulate_batches=4,
        epochs=1,
        num_batches=60,
        **KINDS["adagrad"],
    )
    expected = whole(warm, tmp_path / "whole", dataset, config=config, plain=plain)
    assert expected["result"]["train_steps"] == 15
    begun = go_on_through(warm, tmp_path / "run", dataset, config, [6, 7], plain=plain)
    assert begun == [4, 8]
    assert_equal(tmp_path / "run", expected)


def test_killed_after_every_step(warm: Warm, dataset: Path, tmp_path: Path) -> None:
    config = replace(CONFIG, epochs=1, num_batches=9, test_freq=4, save_every_steps=1)
    expected = whole(warm, tmp_path / "whole", dataset, config=config)
    begun = go_on_through(warm, tmp_path / "run", dataset, config, [2] * 8)
    # The second step of each process is not saved when it is killed.
    assert begun == list(range(1, 9))
    assert_equal(tmp_path / "run", expected)


def test_a_target_or_limit_that_was_reached_is_not_trained_past(
    warm: Warm, dataset: Path, tmp_path: Path
) -> None:
    for name, change in (
        ("target", {"target_auc": 0.01}),
        ("limit", {"max_steps": 15, "test_freq": 5}),
        ("unevaluated", {"max_steps": 15, "test_freq": -1}),
        ("saved", {"max_steps": 15, "test_freq": -1, "save_every_steps": 5}),
    ):
        config = replace(CONFIG, **change)
        here, there = tmp_path / name, tmp_path / f"{name}-whole"
        expected = whole(warm, there, dataset, config=config)
        assert expected["result"]["train_steps"] == 15
        # As if it was killed before the result was written.
        answer = warm(here, dataset, config=config)
        assert answer.status == 0, answer.said
        (here / "result.json").unlink()
        answer = warm(here)
        assert answer.status == 0, answer.said
        assert "going on after step 15" in answer.said
        assert_equal(here, expected)


def test_what_continues_another_runs_checkpoint_can_be_resumed(
    warm: Warm, dataset: Path, tmp_path: Path
) -> None:
    assert warm(tmp_path / "first", dataset, config=replace(CONFIG, max_steps=10)).status == 0
    initial = tmp_path / "first/checkpoints/newest.safetensors"
    config = replace(CONFIG, continue_from=str(initial))
    expected = whole(warm, tmp_path / "whole", dataset, config=config)
    assert expected["result"]["train_steps"] == 72
    begun = go_on_through(warm, tmp_path / "run", dataset, config, [1, 9])
    assert begun == [0, 16]
    assert_equal(tmp_path / "run", expected)
    initial.unlink()  # it is read at the beginning alone
    (tmp_path / "run/result.json").unlink()
    assert warm(tmp_path / "run").status == 0
    assert_equal(tmp_path / "run", expected)


def test_a_run_that_has_ended_is_not_trained_and_its_result_is_returned(
    dataset: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = replace(CONFIG, max_steps=3)
    result = dlrm.train(dataset, tmp_path / "run", config)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with caplog.at_level("INFO", "dlrm"):
        assert dlrm.resume(tmp_path / "run", profile=tmp_path / "trace.json") == result
    assert "has ended already (the limit of 3 steps)" in caplog.text
    assert f"nothing is trained, so {tmp_path / 'trace.json'} is not written" in caplog.text
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_dataset_that_moved_is_named_and_another_is_refused(
    warm: Warm, raw_rows: Path, tmp_path: Path
) -> None:
    prepare(raw_rows, tmp_path / "dataset", PrepareConfig())
    expected = whole(warm, tmp_path / "whole", tmp_path / "dataset", config=CONFIG)
    run = tmp_path / "run"
    assert warm(run, tmp_path / "dataset", config=CONFIG, kill_at_step=20).status == KILLED
    (tmp_path / "dataset").rename(tmp_path / "moved")
    answer = warm(run)
    assert answer.status == 2
    assert f"{tmp_path / 'dataset'} is not a folder" in answer.said

    prepare(raw_rows, tmp_path / "features", PrepareConfig(max_ind_range=3))
    fingerprints = [
        Dataset.open(tmp_path / name).schema.fingerprint for name in ("features", "moved")
    ]
    with pytest.raises(
        UserError, match=r"(?s)features is not the DATASET.*{}.*{}".format(*fingerprints)
    ):
        dlrm.resume(run, tmp_path / "features")
    prepare(raw_rows, tmp_path / "unshuffled", PrepareConfig(shuffle="none"))
    with pytest.raises(UserError, match="another DATASET: the fingerprint of its rows and order"):
        dlrm.resume(run, tmp_path / "unshuffled")

    answer = warm(run, tmp_path / "moved")
    assert answer.status == 0, answer.said
    assert_equal(run, expected)
    assert dlrm.evaluate(run, "test").metrics.samples > 0  # it is known where the DATASET is now


def test_a_changed_option_is_refused_by_name_unless_it_changes_no_result(
    warm: Warm, dataset: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    assert warm(run, dataset, config=CONFIG, kill_at_step=20).status == KILLED
    config = run / "config.toml"
    text = config.read_text()
    config.write_text(text.replace("learning_rate = 0.05", "learning_rate = 0.1"))
    with pytest.raises(UserError, match=r"was changed since .*: --learning-rate\. Change it back"):
        dlrm.resume(run)
    config.write_text(text.replace("keep = 2", "keep = 3"))
    assert warm(run).status == 0
    assert len(list((run / "checkpoints").glob("step-*.json"))) >= 3


def test_no_run_and_a_run_of_an_older_version_are_refused(dataset: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nothing does not exist\. Check the path\."):
        dlrm.resume(tmp_path / "nothing")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(UserError, match=r"is not a run: config\.toml is missing"):
        dlrm.resume(tmp_path)
    dlrm.train(dataset, tmp_path / "run", replace(CONFIG, max_steps=3))
    (tmp_path / "run/result.json").unlink()
    for path in (tmp_path / "run/checkpoints").glob("step-*.json"):
        path.unlink()
    with pytest.raises(UserError, match=r"lacks what an exact resume takes.*--continue-from"):
        dlrm.resume(tmp_path / "run")


def test_another_machine_is_told_of(
    warm: Warm, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    assert warm(tmp_path / "run", dataset, config=CONFIG, kill_at_step=20).status == KILLED
    monkeypatch.setattr("dlrm.training.trainer.versions", lambda: {"torch": "9.9"})
    dlrm.resume(tmp_path / "run")
    assert re.search(
        r"torch was [0-9.+a-z]+ when the checkpoint was saved, and is 9\.9 now", caplog.text
    )
    assert "dlrm was 0.1.0 when" in caplog.text


def test_the_newest_and_the_best_checkpoints_are_kept(
    warm: Warm, dataset: Path, tmp_path: Path
) -> None:
    for keep in (1, 3):
        run = tmp_path / str(keep)
        config = replace(CONFIG, keep=keep, test_freq=0)
        answer = warm(run, dataset, config=config, kill_at_step=70)
        assert answer.status == KILLED
        folder = run / "checkpoints"
        names = sorted(path.name for path in folder.iterdir())
        newest = [68, 64, 60][:keep]
        kept = [f"step-{step:09}" for step in (41, *reversed(newest))]
        assert names == [
            "best.safetensors",
            "newest.safetensors",
            *(f"{name}.{kind}" for name in kept for kind in ("json", "safetensors")),
        ]
        assert (folder / "best.safetensors").samefile(folder / f"{kept[0]}.safetensors")
        assert (folder / "newest.safetensors").samefile(folder / f"{kept[-1]}.safetensors")


def test_checkpoints_are_saved_by_the_clock(warm: Warm, dataset: Path, tmp_path: Path) -> None:
    config = replace(CONFIG, save_every_steps=0, save_every_minutes=1e-9, test_freq=0)
    assert warm(tmp_path / "often", dataset, config=config, kill_at_step=20).status == KILLED
    assert "going on after step 19" in warm(tmp_path / "often").said
    config = replace(config, save_every_minutes=1000)
    assert warm(tmp_path / "seldom", dataset, config=config, kill_at_step=20).status == KILLED
    assert "begins anew" in warm(tmp_path / "seldom").said


@pytest.mark.parametrize(
    ("name", "status"), [("term_at_step", 143), ("int_at_step", 130)], ids=["SIGTERM", "SIGINT"]
)
def test_a_signal_saves_the_step_and_the_command_goes_on(
    warm: Warm, dataset: Path, tmp_path: Path, name: str, status: int
) -> None:
    expected = whole(warm, tmp_path / "whole", dataset, config=CONFIG)
    run = tmp_path / "the run"
    run.mkdir()
    write_config(tmp_path / "config.toml", CONFIG, dataset)
    begin = ["train", "--config", str(tmp_path / "config.toml"), "--run", str(run)]
    go_on = ["train", "--resume", str(run)]
    signal_name = "SIG" + name[: -len("_at_step")].upper()
    total = 0
    for command, step in ((begin, 3), (go_on, 6), (go_on, 32), (go_on, 30)):
        answer = warm(run, command=command, **{name: step})
        assert answer.status == status, answer.said
        total += step
        # At an end of a pass too (step 41), and where an evaluation follows (step 71).
        assert answer.said.count("error: ") == 1
        assert (
            f"dlrm: error: stopped by {signal_name} after step {total}; step {total} is saved. To "
            f"go on: dlrm train --resume '{run}'\n"
        ) in answer.said
        assert (run / f"checkpoints/step-{total:09}.json").exists()
    answer = warm(run, command=go_on)
    assert answer.status == 0, answer.said
    assert f'"stopped": "{expected["result"]["stopped"]}"' in answer.said
    assert_equal_but_for_older_checkpoints(run, expected)


def assert_equal_but_for_older_checkpoints(run: Path, expected: dict[str, Any]) -> None:
    """What a signal saved may lie where otherwise the checkpoint before the newest does."""
    for path in (run / "checkpoints").glob("step-*"):
        if path.name not in expected["files"]:
            path.unlink()
    found = {path.name for path in (run / "checkpoints").glob("*.safetensors")}
    files = {
        name: content
        for name, content in expected["files"].items()
        if name in found or not name.startswith("step-")
    }
    assert_equal(run, {**expected, "files": files})


def test_python_gets_a_keyboard_interrupt_and_its_handlers_back(
    dataset: Path, tmp_path: Path
) -> None:
    class Stopping(Events):
        def on_step(self, position: Position, samples: int) -> None:
            signal.raise_signal(signal.SIGINT)

    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(KeyboardInterrupt, match=r"stopped by SIGINT after step 1; step 1 is saved"):
        dlrm.train(dataset, tmp_path / "run", CONFIG, [Stopping()])
    assert handlers == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    (error,) = [event for event in log_of(tmp_path / "run") if event["event"] == "error"]
    assert error["kind"] == "StoppedBySignalError"
    with ThreadPoolExecutor(1) as pool:  # in another thread signals are left alone
        pool.submit(dlrm.resume, tmp_path / "run").result()
    assert handlers == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]


def test_a_second_signal_does_not_wait(dataset: Path, tmp_path: Path) -> None:
    class Impatient(Events):
        def on_step(self, position: Position, samples: int) -> None:
            for _ in range(2):
                signal.raise_signal(signal.SIGINT)

    # Python's own handler, whatever the command line has put there in this process.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt) as caught:
            dlrm.train(dataset, tmp_path / "run", CONFIG, [Impatient()])
    finally:
        signal.signal(signal.SIGINT, before)
    assert str(caught.value) == ""
    assert not list((tmp_path / "run/checkpoints").iterdir())


def test_a_signal_in_an_evaluation_does_not_wait_for_it(
    warm: Warm, dataset: Path, tmp_path: Path
) -> None:
    expected = whole(warm, tmp_path / "whole", dataset, config=CONFIG)
    run = tmp_path / "run"
    answer = warm(run, dataset, config=CONFIG, signal_in_evaluation=1)
    assert answer.status == 4, answer.said
    assert "stopped by SIGTERM after step 15; step 15 is saved" in answer.said
    assert "evaluation" not in {event["event"] for event in log_of(run)}
    answer = warm(run, signal_in_evaluation=3)  # the one that is made up for, and two more
    assert answer.status == 4, answer.said
    assert "stopped by SIGTERM after step 41; step 41 is saved" in answer.said
    # Of the last evaluations, of validation and test, only the one of test is made again.
    answer = warm(run, signal_in_evaluation=5)
    assert answer.status == 4, answer.said
    assert "stopped by SIGTERM after step 82; step 82 is saved" in answer.said
    assert not (run / "result.json").exists()
    assert warm(run).status == 0
    assert_equal(run, expected)


# Of steps, whose files are written alike, but some; and none of the points after something
# was done that are the points before what comes next.
REPEATED = r"^after (mkdir|write|fsync|unlink)|vocabulary|step-0000000(?!04|15)"


@pytest.mark.parametrize(
    ("but_not", "no_links"),
    [
        pytest.param(REPEATED, False, id="some"),
        pytest.param(REPEATED, True, id="some, without hard links", marks=pytest.mark.long),
        pytest.param("$^", False, id="everywhere", marks=pytest.mark.long),
    ],
)
def test_killed_at_every_write_flush_rename_and_removal(
    warm: Warm, dataset: Path, tmp_path: Path, but_not: str, no_links: bool
) -> None:
    """Each process is killed at the first point at which none before it was."""
    config = replace(CONFIG, optimizer=OptimizerConfig("rowwise_adagrad", 0.01), epochs=1)
    expected = whole(warm, tmp_path / "whole", dataset, config=config)
    killed_at = tmp_path / "killed"
    run = tmp_path / "here" / "run"
    run.parent.mkdir()
    kill = {"kill_once": killed_at, "but_not": but_not, "no_links": no_links}
    for _ in range(1000):
        begun = (run / "config.toml").exists()
        answer = warm(run, **kill) if begun else warm(run, dataset, config=config, **kill)
        assert "WARNING" not in answer.said
        if answer.status != KILLED:
            break
    assert answer.status == 0, answer.said
    assert_equal(run, expected)
    events = killed_at.read_text().splitlines()
    kinds = {tuple(event.split(" ")[:2]) for event in events}
    operations = {"mkdir", "fsync", "replace", "link", "unlink", "write"}
    assert kinds >= {("before", operation) for operation in operations} | {("amid", "write")}
    for name in ("step-000000015.safetensors", "step-000000015.json", "best.safetensors"):
        assert any(name in event for event in events)


def test_a_checkpoint_is_flushed_renamed_and_its_folder_flushed(
    warm: Warm, dataset: Path, tmp_path: Path
) -> None:
    log = tmp_path / "events"
    config = replace(CONFIG, max_steps=16, save_every_steps=4, test_freq=8)
    assert warm(tmp_path / "run", dataset, config=config, log=log).status == 0
    events = [line.split(" ", 2) for line in log.read_text().splitlines()]
    written: set[str] = set()
    flushed: set[str] = set()
    renamed: list[str] = []
    for place, (moment, operation, path) in enumerate(events):
        if (moment, operation) == ("after", "write"):
            written.add(path)
            flushed.discard(path)
        elif (moment, operation) == ("after", "fsync"):
            flushed.add(path)
        elif (moment, operation) == ("before", "replace"):
            folder, _, name = path.rpartition("/")
            partial = f"{folder}/.{name}.partial"
            # What is written is flushed; a link to a file has been.
            assert partial in flushed or ("after", "link", partial) in map(tuple, events[:place])
            assert events[place + 1 : place + 4] == [
                ["after", "replace", path],
                ["before", "fsync", folder],
                ["after", "fsync", folder],
            ]
            renamed.append(path.removeprefix("run/checkpoints/"))
            if name.endswith(".json") and name.startswith("step-"):
                # Last, when what it stands for is durable: its tensors, and its part of the log.
                assert renamed[-2] == name.replace(".json", ".safetensors")
                assert "run/log.jsonl" in flushed
    step_4 = ["step-000000004.safetensors", "step-000000004.json", "newest.safetensors"]
    step_8 = [name.replace("4", "8") for name in step_4] + ["best.safetensors"]
    start = renamed.index(step_4[0])
    assert renamed[start : start + 7] == step_4 + step_8
    # What is too many is removed when the new is there, the part that makes it count first.
    removed = [
        path for moment, operation, path in events if (moment, operation) == ("after", "unlink")
    ]
    assert [Path(path).name for path in removed if "step-" in path and "partial" not in path][
        :2
    ] == [
        "step-000000004.json",
        "step-000000004.safetensors",
    ]


def test_what_an_interrupted_save_left_is_removed(warm: Warm, killed: Path, tmp_path: Path) -> None:
    run = copy_of(killed, tmp_path)
    folder = run / "checkpoints"
    for kind in ("safetensors", "json"):  # as if it was killed before it removed them
        shutil.copy(folder / f"step-000000016.{kind}", folder / f"step-000000007.{kind}")
    (folder / "step-000000024.safetensors").touch()  # and before this counts
    (folder / ".step-000000024.json.partial").touch()
    answer = warm(run, kill_at_step=1)
    assert answer.status == KILLED
    assert "WARNING" not in answer.said
    assert {path.name for path in folder.iterdir()} == {
        path.name for path in (killed / "checkpoints").iterdir()
    }


@pytest.fixture(scope="module")
def killed(warm: Warm, dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A RUN that was killed after step 22; checkpoints are of steps 15 (the best), 16 and 20."""
    run = tmp_path_factory.mktemp("killed") / "run"
    assert warm(run, dataset, config=replace(CONFIG, epochs=1), kill_at_step=22).status == KILLED
    names = sorted(path.name for path in (run / "checkpoints").glob("step-*.json"))
    assert names == [f"step-{step:09}.json" for step in (15, 16, 20)]
    return run


def copy_of(run: Path, folder: Path) -> Path:
    return Path(shutil.copytree(run, folder / "run"))


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "absent"])
@pytest.mark.parametrize("kind", ["safetensors", "json"])
def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_is_taken(
    warm: Warm, dataset: Path, killed: Path, tmp_path: Path, damage: str, kind: str
) -> None:
    run = copy_of(killed, tmp_path)
    expected = whole(warm, tmp_path / "whole", dataset, config=replace(CONFIG, epochs=1))
    path = run / f"checkpoints/step-000000020.{kind}"
    content = path.read_bytes()
    if damage == "flip":
        flip(path, len(content) // 2)
    elif damage == "absent":
        path.unlink()
    else:
        path.write_bytes(content[: len(content) // 2] if damage == "cut" else b"")
    answer = warm(run)
    assert answer.status == 0, answer.said
    assert "going on after step 16" in answer.said
    if (damage, kind) != ("absent", "json"):  # then it is as if it was never finished
        assert "WARNING going on from the checkpoint before, of step 16" in answer.said
        (warning,) = re.findall(
            "WARNING (.*damaged.*|.*cannot be read.*|.*does not exist.*)", answer.said
        )
        assert str(path) in warning
    assert_equal(run, expected)


def test_every_flipped_byte_and_every_truncation_is_noticed(killed: Path, tmp_path: Path) -> None:
    run = copy_of(killed, tmp_path)
    checkpoints = Checkpoints(run / "checkpoints", 2)
    assert checkpoints.read(20).position.total_steps == 20
    for kind in ("json", "safetensors"):
        path = run / f"checkpoints/step-000000020.{kind}"
        content = path.read_bytes()
        step = max(1, len(content) // 50)
        for place in {*range(0, len(content), step), *range(0, 300, 7)}:
            damaged = bytearray(content)
            damaged[place] ^= 1
            for bad in (damaged, content[:place]):
                path.write_bytes(bad)
                with pytest.raises(UserError):
                    checkpoints.read(20)
        path.write_bytes(content + b" ")
        if kind == "safetensors":
            with pytest.raises(UserError):
                checkpoints.read(20)
        path.write_bytes(content)
    assert checkpoints.read(20).position.total_steps == 20


def test_a_progress_of_any_size_is_not_read_into_memory(killed: Path, tmp_path: Path) -> None:
    run = copy_of(killed, tmp_path)
    with open(run / "checkpoints/step-000000020.json", "r+b") as file:
        file.truncate(1 << 40)
    with pytest.raises(UserError, match=r"is damaged: it has 1099511627776 bytes"):
        Checkpoints(run / "checkpoints", 2).read(20)


def test_a_damaged_best_checkpoint_is_noticed_and_none_left_is_an_error(
    warm: Warm, killed: Path, tmp_path: Path
) -> None:
    run = copy_of(killed, tmp_path)
    for name in ("step-000000015", "best"):  # which a copy has made two files
        flip(run / f"checkpoints/{name}.safetensors", -1)
    with pytest.raises(UserError, match="is damaged: its checksum is expected"):
        dlrm.evaluate(run, "validation", checkpoint="best")
    assert dlrm.evaluate(run, "validation", checkpoint="newest").metrics.samples > 0
    answer = warm(run)
    assert answer.status == 2
    assert re.search(
        r"error: .*/checkpoints has no checkpoint left that can be resumed exactly: "
        r".*step-000000015\.safetensors is damaged.* That is the best so far, .*"
        r"--continue-from .*/step-000000020\.safetensors",
        answer.said,
    )
    assert answer.said.count("WARNING ") == 1


WRITING: dict[str, dict[str, bool]] = {
    "waiting": {},
    "overlapping": {"overlap": True},
    "overlapping, without hard links": {"overlap": True, "no_links": True},
}
"""How checkpoints are written: a copy while training goes on, or not; and given names."""


@pytest.mark.parametrize("how", WRITING)
def test_a_disk_that_is_full_for_a_while_ends_nothing(
    warm: Warm, dataset: Path, tmp_path: Path, how: str
) -> None:
    expected = whole(warm, tmp_path / "whole", dataset, config=CONFIG)
    fault = {"full_from": 10, "full_to": 30}
    answer = warm(tmp_path / "run", dataset, config=CONFIG, **fault, **WRITING[how])
    assert answer.status == 0, answer.said
    lost = re.findall(r"WARNING the checkpoint of step (\d+) could not be saved", answer.said)
    if how == "waiting":
        assert lost == ["12", "15", "16", "20", "24", "28"]
        assert "(the newest there is: that of step 8)" in answer.said
    else:  # that of 8 may still be written when the disk fills, that of 28 when it has room
        assert [step for step in lost if step not in ("8", "28")] == ["12", "15", "16", "20", "24"]
    assert answer.said.count("log.jsonl waits until the disk has room") == 1
    # Of the log no line is lost, and what was saved afterwards is as if nothing had happened; but
    # where the best could not be saved, the next evaluation is the best that is there.
    evaluations = [event for event in expected["log"] if event["event"] == "evaluation"]
    assert [event["is_best"] for event in evaluations[:2]] == [True, False]
    evaluations[1]["is_best"] = True
    assert_equal(tmp_path / "run", expected)


@pytest.mark.parametrize("how", WRITING)
def test_what_cannot_be_saved_at_the_end_is_an_error_and_can_be_gone_on_with(
    warm: Warm, dataset: Path, tmp_path: Path, how: str
) -> None:
    expected = whole(warm, tmp_path / "whole", dataset, config=CONFIG)
    run = tmp_path / "run"
    answer = warm(run, dataset, config=CONFIG, full_from=70, **WRITING[how])
    assert answer.status == 3, answer.said
    assert re.search(
        r"error: cannot write .*step-000000082\.safetensors: No space left on device.*"
        r"Free some space",
        answer.said,
    )
    assert not (run / "result.json").exists()
    answer = warm(run, full_from=3, term_at_step=6, **WRITING[how])  # nor can a signal save then
    assert answer.status == 4, answer.said
    found = re.search(r"stopped by SIGTERM after step (\d+); step (\d+) is saved", answer.said)
    assert found
    stopped, saved = map(int, found.groups())
    assert stopped == saved + 6
    # An overlapping save of step 68 may still have been written when the disk was full.
    assert saved == 68 or (saved == 64 and how != "waiting")
    answer = warm(run, **WRITING[how])
    assert answer.status == 0, answer.said
    assert f"going on after step {saved}" in answer.said
    assert_equal(run, expected)


@pytest.mark.parametrize("how", WRITING)
def test_a_small_disk_fills_and_once_there_is_room_it_goes_on(
    warm: Warm, dataset: Path, tmp_path: Path, how: str
) -> None:
    expected = whole(warm, tmp_path / "whole", dataset, config=CONFIG)
    size = len(expected["files"]["newest.safetensors"])
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=10m", "tmpfs", str(disk)]
    if os.geteuid() or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("file systems cannot be mounted here; a full disk is made up above")
    try:
        run = disk / "run"
        assert warm(run, dataset, config=CONFIG, kill_at_step=10).status == KILLED
        (disk / "ballast").write_bytes(b"")
        with contextlib.suppress(OSError), open(disk / "ballast", "wb", buffering=0) as file:
            while True:
                file.write(b"x" * 4096)
        answer = warm(run, **WRITING[how])
        assert answer.status == 3, answer.said
        assert "No space left on device" in answer.said
        assert "Traceback" not in answer.said
        names = {path.name for path in (run / "checkpoints").glob("step-*.safetensors")}
        assert names >= {"step-000000008.safetensors"}
        assert size > 4096
        (disk / "ballast").unlink()
        answer = warm(run, **WRITING[how])
        assert answer.status == 0, answer.said
        assert_equal(run, expected)
    finally:
        subprocess.run(["umount", str(disk)], check=True)


class Poisoned(EagerStep):
    """After so many steps, a weight is not a number."""

    poisoned_at = 10

    def __call__(self, batch: Batch, rate: float) -> torch.Tensor:
        if self.optimizer.steps == self.poisoned_at:
            with torch.no_grad():
                self.model.over_arch.layers[0].weight[0, 0] = math.nan
        return super().__call__(batch, rate)


def test_a_loss_that_is_not_finite_names_step_batch_and_tensor_and_keeps_what_was_saved(
    warm: Warm, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(CONFIG, print_freq=1000, optimizer=OptimizerConfig("sgd", 0.0))
    run = tmp_path / "run"
    monkeypatch.setattr("dlrm.training.trainer.choose_step", Poisoned)
    with pytest.raises(UserError) as caught:
        dlrm.train(dataset, run, config)
    assert re.search(
        r"the loss is nan at step 11 of epoch 0, whose batch is rows 640 to 703 of the training "
        r"split: training has diverged\. Lower --learning-rate.*The first tensor that is not "
        r"finite is (dense_arch\.|sparse_arch\.|over_arch\.)\S+; what was saved before is kept",
        str(caught.value),
    )
    assert Checkpoints(run / "checkpoints", 2).steps() == [4, 8]
    assert dlrm.evaluate(run, "test", checkpoint="newest").metrics.auc > 0
    with pytest.raises(UserError, match="at step 11 of epoch 0"):  # and again
        dlrm.resume(run)
    monkeypatch.undo()
    assert dlrm.resume(run).train_steps == 82


def test_weights_that_are_not_finite_are_not_saved_though_the_loss_is(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Overflowing(EagerStep):
        def __call__(self, batch: Batch, rate: float) -> torch.Tensor:
            loss = super().__call__(batch, rate)
            if self.optimizer.steps == 12:  # a checkpoint is due after it
                with torch.no_grad():
                    self.model.over_arch.layers[0].weight[0, 0] = math.inf
            return loss

    monkeypatch.setattr("dlrm.training.trainer.choose_step", Overflowing)
    with pytest.raises(UserError, match=r"diverged") as caught:
        dlrm.train(dataset, tmp_path / "run", replace(CONFIG, max_steps=12, test_freq=-1))
    assert "over_arch.layers.0.weight is not finite after 12 steps" in str(caught.value)
    assert Checkpoints(tmp_path / "run/checkpoints", 2).steps() == [4, 8]


def test_training_goes_on_while_a_copy_is_written_and_waits_where_memory_is_short(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    config = replace(CONFIG, optimizer=OptimizerConfig("adagrad", 0.01), max_steps=14, keep=99)
    released = threading.Event()
    steps_when_saved: list[int] = []
    save = Checkpoints.save

    class Releasing(Events):
        steps = 0

        def on_step(self, position: Position, samples: int) -> None:
            self.steps = position.total_steps
            if position.total_steps == 7:
                released.set()

    listener = Releasing()

    def wait(self: Checkpoints, tensors: Any, info: Any, *rest: Any) -> None:
        if info.position.total_steps == 4:
            assert released.wait(60), "training does not go on"
        steps_when_saved.append(listener.steps)
        save(self, tensors, info, *rest)

    with monkeypatch.context() as patched:
        patched.setattr(Checkpoints, "save", wait)
        dlrm.train(dataset, tmp_path / "overlapping", config, [listener])
    assert steps_when_saved[0] >= 7  # of what is after step 4
    monkeypatch.setattr("dlrm.training.saving.available_memory", lambda: 1 << 20)
    dlrm.train(dataset, tmp_path / "waiting", config)
    assert caplog.text.count("training waits while checkpoints are written: a copy of") == 1
    assert_equal(tmp_path / "waiting", outcome(tmp_path / "overlapping"))
    names = {path.name for path in (tmp_path / "waiting/checkpoints").glob("step-*.safetensors")}
    assert names == {f"step-{step:09}.safetensors" for step in (4, 8, 12, 14)}


def test_a_checkpoint_names_no_best_that_was_lost_while_it_was_due(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(CONFIG, max_steps=18, keep=99)
    reached = threading.Event()
    save = Checkpoints.save

    class Reaching(Events):
        def on_step(self, position: Position, samples: int) -> None:
            if position.total_steps == 16:
                reached.set()

    def lose(self: Checkpoints, tensors: Any, info: Any, *rest: Any) -> None:
        if info.position.total_steps == 15:
            assert reached.wait(60), "training does not go on"
            raise EnvironmentFaultError("no space left")
        save(self, tensors, info, *rest)

    monkeypatch.setattr(Checkpoints, "save", lose)
    dlrm.train(dataset, tmp_path / "run", config, [Reaching()])
    checkpoints = Checkpoints(tmp_path / "run/checkpoints", config.keep)
    assert checkpoints.read(16).best_step is None
    assert checkpoints.read(18).best_step == 18


@pytest.mark.parametrize("fault", ["link_or_copy", "remove_surplus"])
def test_a_checkpoint_counts_though_its_names_are_behind(
    dataset: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    fault: str,
) -> None:
    config = replace(CONFIG, max_steps=18)
    dlrm.train(dataset, tmp_path / "whole", config)
    expected = outcome(tmp_path / "whole")

    class Failing(Events):
        """While those steps are the newest, a checkpoint is written, and nothing else succeeds."""

        def __init__(self, steps: range) -> None:
            self._steps = steps

        def on_step(self, position: Position, samples: int) -> None:
            if position.total_steps == self._steps.start:
                place = saving if fault == "link_or_copy" else Checkpoints
                patched.setattr(place, fault, self.fail)
            elif position.total_steps == self._steps.stop:
                patched.undo()

        def fail(self, *arguments: Any, **options: Any) -> None:
            raise EnvironmentFaultError("the disk fails")

    def train(name: str, steps: range) -> None:
        dlrm.train(dataset, tmp_path / name, config, [Failing(steps)])

    # Over the evaluation after step 15, whose checkpoint is the best.
    with monkeypatch.context() as patched:
        train("a while", range(13, 18))
    assert "newest and best of the checkpoints do not lead to what is saved yet" in caplog.text
    assert "could not be saved" not in caplog.text
    assert_equal(tmp_path / "a while", expected)

    with monkeypatch.context() as patched:
        with pytest.raises(EnvironmentFaultError, match="the disk fails"):
            train("the end", range(13, 99))
        checkpoints = Checkpoints(tmp_path / "the end/checkpoints", config.keep)
        assert checkpoints.read(18).best_step in (15, 18)
    assert dlrm.resume(tmp_path / "the end").train_steps == 18
    assert_equal(tmp_path / "the end", expected)


@pytest.mark.parametrize("plain", [False, True], ids=["native", "plain"])
@pytest.mark.parametrize("kind", KINDS)
def test_stopped_by_sigterm_at_random_steps_it_ends_as_if_it_had_not_been(
    warm: Warm, dataset: Path, tmp_path: Path, kind: str, plain: bool
) -> None:
    config = replace(CONFIG, **KINDS[kind])
    expected = whole(warm, tmp_path / "whole", dataset, config=config, plain=plain, overlap=True)
    run = tmp_path / "run"
    generator = random.Random(f"{kind} {plain}")
    total, first = 0, {"dataset": dataset, "config": config}
    for _ in range(4):
        step = generator.randint(1, 25)
        answer = warm(run, plain=plain, overlap=True, term_at_step=step, **first)
        total, first = total + step, {}
        assert answer.status == STOPPED, answer.said
        assert f"stopped by SIGTERM after step {total}; step {total} is saved" in answer.said
    answer = warm(run, plain=plain, overlap=True)
    assert answer.status == 0, answer.said
    assert_equal_but_for_older_checkpoints(run, expected)


LONG_SETS = [("SIGKILL", KILLED), ("SIGTERM", STOPPED)]


@pytest.mark.long
@pytest.mark.parametrize(("signal_name", "status"), LONG_SETS, ids=[name for name, _ in LONG_SETS])
@pytest.mark.parametrize("plain", [False, True], ids=["native", "plain"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_hundred_signals(
    warm: Warm,
    dataset: Path,
    tmp_path: Path,
    kind: str,
    plain: bool,
    signal_name: str,
    status: int,
) -> None:
    """2,000 steps; each process gets a signal after some steps, or after some time, anywhere."""
    config = replace(
        CONFIG, mini_batch_size=16, epochs=20, max_steps=2000, test_freq=50, **KINDS[kind]
    )
    expected = whole(warm, tmp_path / "whole", dataset, config=config, plain=plain, overlap=True)
    assert expected["result"]["train_steps"] == 2000
    run = tmp_path / "run"
    generator = random.Random(kind)
    at_step = {"SIGKILL": "kill_at_step", "SIGTERM": "term_at_step"}[signal_name]
    number = signal.Signals[signal_name]
    # Of what SIGTERM stops nothing is lost, so that all of 100 fit into fewer steps each.
    lost = number == signal.SIGKILL
    sent: Counter[str] = Counter()
    answer = warm(run, dataset, config=config, plain=plain, overlap=True, **{at_step: 1})
    assert answer.status == status
    sent["step"] += 1
    while sent.total() < 100:
        if sent.total() % 2:
            how, when = "step", {at_step: generator.randint(5, 35 if lost else 15)}
        else:
            after = generator.uniform(0.05, 0.25) if lost else generator.uniform(0.0, 0.06)
            how, when = "time", {"kill_after": after, "signal_after": number}
            if lost:  # a fast machine would be at the end before the hundredth
                when[at_step] = 25
        answer = warm(run, plain=plain, overlap=True, **when)
        # Before and after it trains, SIGTERM ends a process that has no handler for it.
        assert answer.status in (status, -number), answer.said
        sent[how] += 1
    assert sent["step"] >= 50
    answer = warm(run, plain=plain, overlap=True)
    assert answer.status == 0, answer.said
    if lost:
        assert_equal(run, expected)
    else:
        assert_equal_but_for_older_checkpoints(run, expected)
