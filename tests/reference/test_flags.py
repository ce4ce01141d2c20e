from __future__ import annotations

from pathlib import Path

import pytest

from dlrm import reference
from dlrm.errors import UserError
from dlrm.reference.flags import FLAGS, GROUPS, Flag, read_flags

# Every add_argument of dlrm_s_pytorch.py at adb39923b2e670bf8b7bde694de2a84396e818fa.
REFERENCE = """
activation-function arch-embedding-size arch-interaction-itself arch-interaction-op arch-mlp-bot
arch-mlp-top arch-sparse-feature-size data-generation data-randomize data-set data-size
data-sub-sample-rate data-trace-enable-padding data-trace-file dataset-multiprocessing debug-mode
dist-backend enable-profiling inference-only learning-rate load-model local_rank loss-function
loss-threshold loss-weights lr-decay-start-step lr-num-decay-steps lr-num-warmup-steps
max-ind-range md-flag md-round-dims md-temperature md-threshold memory-map mini-batch-size
mlperf-acc-threshold mlperf-auc-threshold mlperf-bin-loader mlperf-bin-shuffle
mlperf-grad-accum-iter mlperf-logging nepochs num-batches num-indices-per-lookup
num-indices-per-lookup-fixed num-workers numpy-rand-seed optimizer plot-compute-graph print-freq
print-precision print-time print-wall-time processed-data-file qr-collisions qr-flag qr-operation
qr-threshold quantize-emb-with-bit quantize-mlp-with-bit rand-data-dist rand-data-max rand-data-min
rand-data-mu rand-data-sigma raw-data-file round-targets save-model save-onnx sync-dense-params
tensor-board-filename test-freq test-mini-batch-size test-num-workers use-gpu weighted-pooling
""".split()
SUBMISSION = ["org", "platform", "division", "status"]
PORT = ["step", "use-npu", "world_size"]
OURS = ["amp", "run", *(f"mlperf-submission-{name}" for name in SUBMISSION)]
REFUSED = [flag for flag in FLAGS.values() if flag.refused]
DATASET = "--data-generation=dataset"


def other_value(flag: Flag) -> list[str]:
    """The flag with a value that is not its default."""
    if flag.read is None:
        return [flag.name]
    if isinstance(flag.default, bool):
        return [f"{flag.name}={not flag.default}"]
    return [f"{flag.name}=7"]


def table() -> str:
    """The table of docs/reference.md."""
    lines = []
    for title, flags in GROUPS.items():
        lines += [f"### {title.capitalize()}", "", "| flag | default | here |", "|---|---|---|"]
        for flag in flags:
            sets = f" Sets {', '.join(map('`{}`'.format, options(flag)))}." if flag.ours else ""
            lines.append(f"| `{flag.name}` | {flag.default_text()} | {flag.meaning}{sets} |")
        lines.append("")
    return "\n".join(lines)


def options(flag: Flag) -> list[str]:
    return [f"--{field.replace('_', '-')}" for field in flag.ours]


def test_every_flag_of_the_reference_is_known() -> None:
    assert len(REFERENCE) == 76
    names = [f"--{name}" for name in (*REFERENCE, *PORT, *OURS)]
    assert sorted(flag.name for flag in FLAGS.values()) == sorted(names)


def test_the_documented_table_is_the_table(repository: Path) -> None:
    assert table() in (repository / "docs" / "reference.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("flag", REFUSED, ids=lambda flag: flag.name)
def test_what_is_not_supported_is_refused_by_name(flag: Flag) -> None:
    with pytest.raises(UserError) as refusal:
        read_flags([DATASET, *other_value(flag)])
    assert str(refusal.value) == f"not supported by dlrm reference:\n  {flag.name}: {flag.meaning}"


@pytest.mark.parametrize(
    "flag",
    [flag for flag in REFUSED if flag.read and flag.default is not None],
    ids=lambda flag: flag.name,
)
def test_the_default_of_a_refused_flag_asks_for_nothing(flag: Flag) -> None:
    text = "" if flag.default == "" else flag.default_text()
    assert read_flags([DATASET, f"{flag.name}={text}"]) == read_flags([DATASET])


def test_all_refusals_come_at_once() -> None:
    with pytest.raises(UserError, match=r"(?s)--memory-map: .*--debug-mode: "):
        read_flags([DATASET, "--debug-mode", "--memory-map"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--mini-batch=3"], "--mini-batch is not a flag of the reference. Did you mean --mini-b"),
        (["--qqqqqqqq"], "--qqqqqqqq is not a flag of the reference. `dlrm reference --help`"),
        (["--nepochs", "2", "3"], "'3' belongs to no flag"),
        (["--nepochs=two"], "argument --nepochs: invalid int value: 'two'"),
        (["--nepochs"], "argument --nepochs: expected one argument"),
        (["--arch-mlp-bot=13-x"], "expected integers as in 13-512-16, got '13-x'"),
        (["--loss-weights=1"], "expected two numbers as in 0.4-1.6, got '1'"),
        (["--loss-weights=1-a"], "expected two numbers as in 0.4-1.6, got '1-a'"),
        (["--quantize-mlp-with-bit=4"], "expected 8 or 16 or 32, got '4'"),
        (["--quantize-emb-with-bit=16"], "expected 4 or 8 or 32, got '16'"),
        (["--round-targets=maybe"], "expected True or False, got 'maybe'"),
        (["--loss-function=hinge"], "expected mse or bce or wbce, got 'hinge'"),
        (["--mlperf-logging=True"], "--mlperf-logging: ignored explicit argument 'True'"),
        (["--qr-operation=max"], "expected mult or add or concat, got 'max'"),
        (["--weighted-pooling=mean"], "expected fixed or learned, got 'mean'"),
        (["--step=0"], "expected at least 1, or -1 for no limit; got '0'"),
        (["--data-set=terabyte"], "--data-set=terabyte: the Criteo Terabyte data are not"),
        (["--data-generation=internal"], "--data-generation=internal: it takes libraries that"),
        (["--rand-data-dist=zipf"], "expected uniform or gaussian, got 'zipf'"),
        (["--arch-embedding-size=4-x"], "expected integers as in 13-512-16, got '4-x'"),
    ],
)
def test_wrong_input_has_one_clear_message(arguments: list[str], message: str) -> None:
    with pytest.raises(UserError) as error:
        read_flags([DATASET, *arguments])
    assert message in str(error.value)


def test_both_ways_of_writing_a_value_are_read() -> None:
    together = read_flags([DATASET, "--test-freq=-1", "--learning-rate=0.5", "--local_rank=2"])
    apart = read_flags([*DATASET.split("="), *"--test-freq -1 --learning-rate 0.5".split()])
    assert together["learning_rate"] == apart["learning_rate"] == 0.5
    assert together["test_freq"] == apart["test_freq"] == -1
    assert (together["local_rank"], apart["local_rank"]) == (2, -1)


def test_the_last_of_equal_flags_wins() -> None:
    assert read_flags([DATASET, "--nepochs=2", "--nepochs", "3"])["nepochs"] == 3


@pytest.mark.parametrize(("text", "value"), [("True", True), ("False", False), ("0", False)])
def test_a_boolean_means_what_it_says(text: str, value: bool) -> None:
    assert read_flags([DATASET, f"--round-targets={text}"])["round_targets"] is value


def test_names_are_not_abbreviated() -> None:
    with pytest.raises(UserError, match="Did you mean --nepochs"):
        read_flags([DATASET, "--nepoch=2"])


def test_help_lists_every_flag(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        reference.main(["--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    assert all(flag.name in text for flag in FLAGS.values())
    assert "known but refused" in text
    assert max(map(len, text.splitlines())) <= 80
