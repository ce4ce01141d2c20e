"""Whether an MLPerf log follows a ruleset, by MLCommons' own checker, and in words why not."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from mlperf_logging.compliance_checker import mlp_compliance, mlp_parser

from dlrm.errors import UserError

_TOKEN = ":::MLLOG"
_RULES = Path(mlp_compliance.__file__).parent
_BENCHMARK = re.compile(r"[a-z0-9_]+")
_DIVISIONS = ("closed", "open")

MLPERF_TRAIN_SAMPLES = 4_195_197_692
MLPERF_EVAL_SAMPLES = 89_137_319
"""Rows of Criteo's Terabyte data that the benchmark trains on and evaluates: days 0 … 22, and the
first half of day 23."""


@dataclass(frozen=True)
class Finding:
    """Something that the ruleset wants otherwise."""

    key: str
    """The event's key; empty: the log as a whole."""
    message: str
    """What the checker says."""
    explanation: str
    """What the key is, why a log of ours can lack it, and how to get it."""


@dataclass(frozen=True)
class Compliance:
    """What came of a check."""

    log: str
    checker: str
    """Name and version of the package that checked it."""
    ruleset: str
    rulesets: tuple[str, ...]
    """All that the package has of this benchmark."""
    benchmark: str
    division: str
    compliant: bool
    """Whether the checker finds nothing wrong."""
    findings: tuple[Finding, ...]
    """What it finds wrong."""
    remarks: tuple[str, ...]
    """What it does not look at, and a submission needs besides."""


@dataclass(frozen=True)
class _Event:
    key: str
    value: Any
    metadata: dict[str, Any]


def rulesets_of(benchmark: str) -> tuple[str, ...]:
    """Return the rulesets of MLPerf Training that have a benchmark, the oldest first."""
    found = []
    for path in _RULES.glob(f"training_*/closed_{benchmark}.yaml"):
        name = re.fullmatch(r"training_(\d+\.\d+\.\d+)", path.parent.name)
        # Some still have the file of a benchmark that they no longer take.
        if name and f"'{benchmark}'" in path.with_name("closed_common.yaml").read_text():
            found.append(name[1])
    return tuple(sorted(found, key=lambda each: [int(part) for part in each.split(".")]))


def check(log: Path, ruleset: str = "") -> Compliance:
    """Check an MLPerf log with the checker of the mlperf-logging package.

    Args:
        log: What ``dlrm train --mlperf-logging`` wrote, or any other log of MLPerf Training.
        ruleset: Such as "2.1.0"; empty: the newest that has the log's benchmark.

    Raises:
        UserError: The file is missing or no MLPerf log, or the ruleset is unknown.
    """
    events = _read(log)
    benchmark = _only(events, "submission_benchmark", log) or "dlrm"
    division = _only(events, "submission_division", log) or ""
    # Both become part of the name of a file of rules, whose code is run.
    rulesets = rulesets_of(benchmark) if _BENCHMARK.fullmatch(benchmark) else ()
    if not rulesets:
        raise UserError(
            f"{log} is of the benchmark {benchmark!r}, of which mlperf-logging "
            f"{version('mlperf-logging')} has no rules. Check submission_benchmark in it."
        )
    if division not in (*_DIVISIONS, ""):
        raise UserError(
            f"{log} names the division {division!r}; expected closed or open. Mend "
            "submission_division in it."
        )
    ruleset = ruleset or rulesets[-1]
    if ruleset not in rulesets:
        raise UserError(
            f"there is no ruleset {ruleset} for {benchmark}. mlperf-logging "
            f"{version('mlperf-logging')} has {', '.join(rulesets)}."
        )
    findings = tuple(_findings(log, ruleset, events))
    return Compliance(
        log=str(log),
        checker=f"mlperf-logging {version('mlperf-logging')}",
        ruleset=ruleset,
        rulesets=rulesets,
        benchmark=benchmark,
        division=division,
        compliant=not findings,
        findings=findings,
        remarks=tuple(_remarks(events, benchmark)),
    )


def _read(log: Path) -> list[_Event]:
    """Read a log's events, so that whatever the checker would stumble over is refused by line."""
    try:
        text = log.read_text(encoding="latin-1")  # as the checker does
    except OSError as error:
        raise UserError(f"{log} cannot be read: {error.strerror}. Check the path.") from error
    events = []
    for number, line in enumerate(text.split("\n"), start=1):
        _, token, content = line.rpartition(_TOKEN + " ")
        if not token:
            continue
        try:
            event = json.loads(content)
            float(event["time_ms"])
            key, value, metadata = event["key"], event["value"], event["metadata"]
            if not isinstance(key, str) or not isinstance(metadata, dict):
                raise TypeError("key must be a string, and metadata an object")
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise UserError(
                f"{log}, line {number}: expected {_TOKEN} and a JSON object with time_ms, key, "
                f"value and metadata; got {line[:200]!r} ({error}). It was cut off or changed."
            ) from error
        events.append(_Event(key, value, metadata))
    if not events:
        raise UserError(
            f"{log} holds no MLPerf events: no line has {_TOKEN}. `dlrm train --mlperf-logging` "
            "writes mlperf.log into the RUN."
        )
    return events


def _only(events: Sequence[_Event], key: str, log: Path) -> str | None:
    """Return the value that all events of a key have; None: there is none."""
    values = [event.value for event in events if event.key == key]
    if any(value != values[0] or not isinstance(value, str) for value in values):
        raise UserError(f"{log}: {key} must be one string; got {values}.")
    return values[0] if values else None


def _findings(log: Path, ruleset: str, events: Sequence[_Event]) -> Iterator[Finding]:
    checker = mlp_compliance.make_checker("training", ruleset, quiet=True, werror=False)
    lines, _ = mlp_parser.parse_file(str(log), ruleset=ruleset)
    with _silent_root_logger():
        try:
            checker.check_loglines(lines, f"training_{ruleset}/common.yaml")
        except Exception as error:  # a rule that meets a value of a type it does not expect
            raise UserError(
                f"{log}: the checker's rules cannot judge it: {type(error).__name__}: {error}."
            ) from error
        finally:
            mlp_compliance.enqueued_configs.clear()
    for key, message in checker.overwritable.items():
        yield _finding(key, message, events)
    for message in checker.not_overwritable:
        yield _finding(_key_in(message), message, events)


@contextmanager
def _silent_root_logger() -> Iterator[None]:
    """Keep the checker, which logs to the root, from setting that up."""
    handler = logging.NullHandler()
    logging.getLogger().addHandler(handler)
    try:
        yield
    finally:
        logging.getLogger().removeHandler(handler)


def _key_in(message: str) -> str:
    if "initialized_tensors" in message:
        return "weights_initialization"
    found = re.search(r"Failed checks for (\w+)|occurrence of '(\w+)'", message)
    return (found[1] or found[2]) if found else ""


def _finding(key: str, message: str, events: Sequence[_Event]) -> Finding:
    # What follows is the line and the checker's own state.
    lines = [line for line in message.split("\n") if line.startswith(("CHECK", "failed test:"))]
    short = " ".join(lines) or message.split("\n")[0]
    short = re.sub(r" in line \d+:", ":", short)  # counted from 0, and events alone
    return Finding(key, " ".join(short.split()), _explanation(key, events))


def _explanation(key: str, events: Sequence[_Event]) -> str:
    text = _EXPLANATIONS.get(key)
    if key.startswith("sgd_opt_"):
        text = _SGD
    text = text or "dlrm does not write this key, or writes it otherwise than this ruleset wants."
    if key == "eval_accuracy" and (best := _best(events)) is not None:
        text += f" The best in this log is {best:.6g}."
    if key == "weights_initialization":
        names = [event.metadata.get("tensor") for event in events if event.key == key]
        text += f" This log names {', '.join(map(str, names)) or 'none'}."
    return text


def _best(events: Sequence[_Event]) -> float | None:
    values = [event.value for event in events if event.key == "eval_accuracy"]
    numbers = [value for value in values if isinstance(value, int | float)]
    return max(numbers, default=None)


_SGD = (
    "The benchmark's optimizer is SGD, with a squared decay of the learning rate; this key is one "
    "of its settings. Train with --optimizer sgd."
)
_INTERVAL = (
    "One of the run's intervals. It is missing where the run was cut off: `dlrm train --resume "
    "RUN` goes on and completes the log."
)
_EVALUATIONS = (
    "There was no evaluation while training. Use --test-freq N, or 0 for one at the end of each "
    "pass, instead of -1; or the run was cut off before its first."
)
_EXPLANATIONS = {
    "submission_org": "Who submits. Name it with --mlperf-submission-org.",
    "submission_platform": "The system that trains. Name it with --mlperf-submission-platform.",
    "submission_division": "closed or open; see --mlperf-submission-division.",
    "submission_status": "Where the system is to be had; see --mlperf-submission-status.",
    "submission_benchmark": "Which benchmark it is; dlrm writes dlrm, the first version.",
    "cache_clear": "Whether the system's caches were cleared before; dlrm writes it first of all.",
    "init_start": "Setting up begins. dlrm writes it first of all: the log's beginning is lost.",
    "init_stop": (
        "Setting up has ended: once, after init_start, and in the closed division within 20 "
        "(ruleset 0.7) or 30 minutes. It is missing where the run was cut off before."
    ),
    "run_start": "Training begins, after init_stop. Missing, the run was cut off before.",
    "run_stop": _INTERVAL,
    "block_start": _INTERVAL,
    "block_stop": _INTERVAL,
    "epoch_start": _INTERVAL,
    "epoch_stop": _INTERVAL,
    "eval_start": _EVALUATIONS,
    "eval_stop": _EVALUATIONS,
    "eval_accuracy": (
        "The AUC of an evaluation, with the epoch it was made at. In the closed division one must "
        "reach 0.8025, on the first half of day 23 of Criteo's Terabyte data. A run with a lower "
        "--target-auc, or on other data, does not; the open division takes any AUC, from ruleset "
        "1.0 on."
    ),
    "train_samples": "Rows of a pass; written when training begins.",
    "eval_samples": "Rows of an evaluation; written when training begins.",
    "gradient_accumulation_steps": "Batches a step, 1 here; written when training begins.",
    "global_batch_size": "Rows a step; written when training begins.",
    "opt_base_learning_rate": "The base learning rate; written when training begins.",
    "opt_learning_rate_warmup_steps": "Steps of warm-up; written when training begins.",
    "lr_decay_start_steps": "The step at which the decay starts; written when training begins.",
    "weights_initialization": (
        "Which tensors were drawn at random, one event each. The benchmark's model has embeddings, "
        "3 layers below (512-256-128) and 5 above (1024-1024-512-256-1), and trains from random "
        "weights: --dense-arch-layer-sizes 512 256 128 --embedding-dim 128 --over-arch-layer-sizes "
        "1024 1024 512 256 1, without --continue-from."
    ),
    "": "This is about the log as a whole.",
}


def _remarks(events: Sequence[_Event], benchmark: str) -> Iterator[str]:
    values: dict[str, list[_Event]] = {}
    for event in events:
        values.setdefault(event.key, []).append(event)
    status = [event.metadata.get("status") for event in values.get("run_stop", [])]
    if status and status[-1] != "success":
        yield (
            f"The run's status is {status[-1]}, not success: no evaluation reached a target "
            "(--target-auc, --target-accuracy), or it was stopped. The checker takes any status; a "
            "submission needs success."
        )
    cleared = [event.value for event in values.get("cache_clear", [])]
    if cleared and not any(cleared):
        yield (
            "cache_clear is false: dlrm does not clear the system's caches. A submission clears "
            "them before each run, and says so."
        )
    if "init_checkpoint_step" in values:
        steps = ", ".join(str(event.value) for event in values["init_checkpoint_step"])
        yield (
            f"Training went on from a checkpoint (init_checkpoint_step {steps}): it was "
            "interrupted, or continued another run. The time from run_start to run_stop includes "
            "the interruption, and a submission trains in one go, from random weights."
        )
    if benchmark != "dlrm":
        return
    for key, expected in (
        ("train_samples", MLPERF_TRAIN_SAMPLES),
        ("eval_samples", MLPERF_EVAL_SAMPLES),
    ):
        found = [event.value for event in values.get(key, [])]
        if found and found[0] != expected:
            yield (
                f"{key} is {found[0]}; the benchmark's is {expected}, of Criteo's Terabyte data. "
                "The checker takes any number."
            )


def describe(compliance: Compliance) -> str:
    """Return what came of a check as text."""
    lines = [
        f"{compliance.log}: benchmark {compliance.benchmark}, division "
        f"{compliance.division or 'not named'}",
        f"checked by {compliance.checker} against ruleset {compliance.ruleset} of "
        f"{', '.join(compliance.rulesets)}",
        "",
    ]
    if compliance.compliant:
        lines.append("compliant: the checker finds nothing wrong")
    else:
        lines.append(f"not compliant: the checker finds {len(compliance.findings)} things wrong")
    for finding in compliance.findings:
        lines += ["", finding.key or "the log", f"  {finding.message}", f"  {finding.explanation}"]
    if compliance.remarks:
        lines += ["", "what the checker does not look at:"]
        lines += [f"  - {remark}" for remark in compliance.remarks]
    return "\n".join(lines) + "\n"
