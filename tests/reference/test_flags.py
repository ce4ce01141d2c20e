from __future__ import annotations

import dataclasses
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
    with pytest.raises(UserError, match=r"(?s)--dist-backend: .*--world_size: "):
        read_flags([DATASET, "--dist-backend=gloo", "--world_size=2"])


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
        (["--data-set=avazu"], "expected kaggle or terabyte, got 'avazu'"),
        (["--mlperf-grad-accum-iter=0"], "expected at least 1, got '0'"),
        (["--data-generation=internal"], "--data-generation=internal: it takes libraries that"),
        (["--rand-data-dist=zipf"], "expected uniform or gaussian, got 'zipf'"),
        (["--arch-embedding-size=4-x"], "expected integers as in 13-512-16, got '4-x'"),
    ],
)
def test_wrong_input_has_one_clear_message(arguments: list[str], message: str) -> None:
    with pytest.raises(UserError) as error:
        read_flags([DATASET, *arguments])
    assert message in str(error.value)


# Of each flag a value, and what it takes to have an effect.
ROWS = "--data-generation=random"
GAUSSIAN = f"{ROWS} --rand-data-dist=gaussian --rand-data-max=1"
LARGE = "--data-set=terabyte --memory-map --mlperf-logging --raw-data-file=input/day"
QR, MD, LOGGED = "--qr-flag", "--md-flag", "--mlperf-logging"
EFFECTS = {
    "activation-function=sigmoid": None,
    "arch-embedding-size=40-50": ROWS,
    "arch-interaction-itself": "",
    "arch-interaction-op=cat": "",
    "arch-mlp-bot=13-9-2": "",
    "arch-mlp-top=7-1": "",
    "arch-sparse-feature-size=4 --arch-mlp-bot=13-4": "",
    "data-generation=synthetic": "",
    "data-randomize=day": "",
    "data-set=terabyte": "--raw-data-file=input/day",
    "data-size=9": ROWS,
    "data-sub-sample-rate=0.5": "",
    "data-trace-enable-padding=True": "--data-generation=synthetic",
    "data-trace-file=t_j.log": "--data-generation=synthetic",
    "dataset-multiprocessing": "",
    "debug-mode": "",
    "dist-backend=gloo": None,
    "enable-profiling": "",
    "inference-only": "--load-model=m.pt",
    "learning-rate=0.5": "",
    "load-model=m.pt": "",
    "local_rank=1": "--use-gpu",
    "loss-function=bce": "",
    "loss-threshold=0.1": "",
    "loss-weights=1-2": "--loss-function=wbce",
    "lr-decay-start-step=6": "--lr-num-decay-steps=7",
    "lr-num-decay-steps=7": "",
    "lr-num-warmup-steps=5": "",
    "max-ind-range=9": "",
    "md-flag": "",
    "md-round-dims": MD,
    "md-temperature=0.1": MD,
    "md-threshold=9": MD,
    "memory-map": "",
    "mini-batch-size=7": "",
    "mlperf-acc-threshold=0.7": f"{LOGGED} --test-freq=5",
    "mlperf-auc-threshold=0.7": f"{LOGGED} --test-freq=5",
    "mlperf-bin-loader": LARGE,
    "mlperf-bin-shuffle": LARGE,
    "mlperf-grad-accum-iter=3": LOGGED,
    "mlperf-logging": "",
    "nepochs=2": "",
    "num-batches=9": "",
    "num-indices-per-lookup=3": ROWS,
    "num-indices-per-lookup-fixed=True": ROWS,
    "num-workers=2": "",
    "numpy-rand-seed=7": "",
    "optimizer=adagrad": "",
    "plot-compute-graph": "",
    "print-freq=10": "",
    "print-precision=3": "--debug-mode",
    "print-time": "",
    "print-wall-time": "",
    "processed-data-file=other.npz": "",
    "qr-collisions=7": QR,
    "qr-flag": "",
    "qr-operation=add": QR,
    "qr-threshold=9": QR,
    "quantize-emb-with-bit=8": "--inference-only --load-model=m.pt",
    "quantize-mlp-with-bit=8": "--inference-only --load-model=m.pt",
    "rand-data-dist=gaussian": ROWS,
    "rand-data-max=0": GAUSSIAN,
    "rand-data-min=0.5": GAUSSIAN,
    "rand-data-mu=0.3": GAUSSIAN,
    "rand-data-sigma=0.2": GAUSSIAN,
    "raw-data-file=other/train.txt": "",
    "round-targets=True": ROWS,
    "save-model=m.pt": "--test-freq=2",
    "save-onnx": "",
    "sync-dense-params=False": None,
    "tensor-board-filename=run_kaggle_pt": "",
    "test-freq=10": "",
    "test-mini-batch-size=9": "",
    "test-num-workers=2": "",
    "use-gpu": "",
    "weighted-pooling=learned": "",
}


def test_every_flag_of_the_reference_has_a_value_here() -> None:
    assert sorted(flag.partition("=")[0] for flag in EFFECTS) == sorted(REFERENCE)


@pytest.mark.parametrize("flag", EFFECTS)
def test_each_flag_has_an_effect_or_is_refused_by_name(flag: str) -> None:
    needs = EFFECTS[flag]
    base = [DATASET, "--raw-data-file=train.txt", "--arch-mlp-bot=13-2", "--run=runs/r"]
    if needs is None:
        with pytest.raises(UserError, match=f"--{flag.partition('=')[0]}: "):
            reference.parse([*base, f"--{flag}"])
        return
    base += needs.split()
    without, asked = reference.parse(base), reference.parse([*base, *f"--{flag}".split()])
    assert asked != without
    told = [note for note in asked.notes if flag.partition("=")[0] in note]
    # What changes nothing else has a note that says so.
    assert dataclasses.replace(asked, notes=without.notes) != without or told
    assert not any("has no effect" in note for note in told)


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
