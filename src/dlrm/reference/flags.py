"""The reference's flags in one table: parser, help, refusals and documentation come from it.

The names and defaults are those of dlrm_s_pytorch.py (facebookresearch/dlrm at
adb39923b2e670bf8b7bde694de2a84396e818fa), and of the flags that its Ascend port adds.
"""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

from dlrm.config import TrackingConfig
from dlrm.errors import UserError


@dataclass(frozen=True)
class Flag:
    """A flag of the reference and what becomes of it."""

    name: str
    default: Any
    """The reference's; it applies where the flag is absent."""
    meaning: str
    """What the flag does here; of a refused one, why it is refused and what to do instead."""
    read: Callable[[str], Any] | None = None
    """Turns its value from text; None: a switch without a value."""
    ours: tuple[str, ...] = ()
    """The fields of our configuration that it sets."""
    convert: Callable[[Any], Any] = lambda value: value
    """From its value to ours."""
    refused: bool = False
    """Whether it is refused where it asks for anything but the reference's default."""
    refused_values: Mapping[str, str] = field(default_factory=dict)
    """Values that the reference takes and we do not, each with what to do instead."""

    @property
    def key(self) -> str:
        """The name as an identifier."""
        return self.name.removeprefix("--").replace("-", "_")

    def default_text(self) -> str:
        """Return the default as it would be written."""
        if self.read is None:
            return "off"
        if self.default in (None, ""):
            return "none"
        if isinstance(self.default, tuple):
            return "-".join(str(number) for number in self.default)
        return str(self.default)


def _integers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split("-"))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"expected integers as in 13-512-16, got {text!r}"
        ) from None


def _two_numbers(text: str) -> tuple[float, ...]:
    try:
        numbers = tuple(float(part) for part in text.split("-"))
    except ValueError:
        numbers = ()
    if len(numbers) != 2:
        raise argparse.ArgumentTypeError(f"expected two numbers as in 0.4-1.6, got {text!r}")
    return numbers


def _boolean(text: str) -> bool:
    words = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
    if text.lower() not in words:
        raise argparse.ArgumentTypeError(f"expected True or False, got {text!r}")
    return words[text.lower()]


def _step_limit(text: str) -> int:
    limit = int(text)
    if limit < 1 and limit != -1:
        raise argparse.ArgumentTypeError(f"expected at least 1, or -1 for no limit; got {text!r}")
    return limit


def _at_least_1(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, got {text!r}")
    return number


def _not_negative(number: int) -> int:
    return max(0, number)


def _choice(*values: str) -> Callable[[str], str]:
    def choose(text: str) -> str:
        if text not in values:
            raise argparse.ArgumentTypeError(f"expected {' or '.join(values)}, got {text!r}")
        return text

    return choose


def _bits(*choices: int) -> Callable[[str], int]:
    choose = _choice(*map(str, choices))
    return lambda text: int(choose(text))


def _refused(name: str, default: Any, why: str, read: Callable[[str], Any] | None = None) -> Flag:
    """Describe a flag that is refused; without ``read``, its default tells how its value reads."""
    if read is None and default is not False:
        kind: type[Any] = type(default)
        readers: Mapping[type[Any], Callable[[str], Any]] = {
            tuple: _integers,
            bool: _boolean,
            type(None): str,
        }
        read = readers.get(kind, kind)
    return Flag(name, default, why, read, refused=True)


GROUPS: Mapping[str, tuple[Flag, ...]] = {
    "model": (
        Flag(
            "--arch-sparse-feature-size",
            2,
            "Length of an embedding vector.",
            int,
            ("embedding_dim",),
        ),
        Flag(
            "--arch-mlp-bot",
            (4, 3, 2),
            "Sizes of the bottom MLP. The first is the number of dense features, which is taken "
            "from the data.",
            _integers,
            ("dense_arch_layer_sizes",),
            lambda sizes: sizes[1:],
        ),
        Flag(
            "--arch-mlp-top",
            (4, 2, 1),
            "Sizes of the top MLP's layers; its input size follows from the interaction.",
            _integers,
            ("over_arch_layer_sizes",),
        ),
        Flag(
            "--arch-interaction-op",
            "dot",
            "How vectors meet: dot or cat.",
            _choice("dot", "cat"),
            ("interaction",),
        ),
        Flag(
            "--arch-interaction-itself",
            False,
            "Include each vector's product with itself; acts with --arch-interaction-op=dot.",
            ours=("interaction_itself",),
        ),
        Flag(
            "--qr-flag",
            False,
            "Store tables of more rows than --qr-threshold as quotient-remainder tables, drawn as "
            "the reference does (--qr-initial-values reference).",
            ours=("embedding_variant",),
            convert=lambda on: "qr" if on else None,
        ),
        Flag(
            "--qr-threshold",
            200,
            "Tables of at most so many rows stay whole; acts with --qr-flag.",
            int,
            ("qr_threshold",),
        ),
        Flag(
            "--qr-operation",
            "mult",
            "How the vectors of quotient and remainder are joined: mult, add or concat; acts with "
            "--qr-flag. With concat a feature's vector, and the bottom MLP's last layer, has twice "
            "--arch-sparse-feature-size, and so have the tables that stay whole, with which the "
            "reference stops.",
            _choice("mult", "add", "concat"),
            ("qr_operation",),
        ),
        Flag(
            "--qr-collisions",
            4,
            "Rows of the remainder's table; acts with --qr-flag.",
            int,
            ("qr_collisions",),
        ),
        Flag(
            "--md-flag",
            False,
            "Give tables of more rows than --md-threshold shorter vectors, projected to "
            "--arch-sparse-feature-size.",
            ours=("embedding_variant",),
            convert=lambda on: "md" if on else None,
        ),
        Flag(
            "--md-threshold",
            200,
            "Tables of at most so many rows have whole vectors, with which the reference stops; "
            "acts with --md-flag.",
            int,
            ("md_threshold",),
        ),
        Flag(
            "--md-temperature",
            0.3,
            "How fast vectors become shorter with a table's rows; acts with --md-flag.",
            float,
            ("md_temperature",),
        ),
        Flag(
            "--md-round-dims",
            False,
            "Round the lengths of vectors to powers of 2, with which the reference stops; acts "
            "with --md-flag.",
            ours=("md_round_dims",),
        ),
        Flag(
            "--weighted-pooling",
            None,
            "Multiply each id's vector by a weight of its own, 1 at first: fixed (it stays 1) or "
            "learned. Not with --qr-flag, as in the reference; it goes with --md-flag.",
            _choice("fixed", "learned"),
            ("weighted_pooling",),
        ),
    ),
    "loss and optimizer": (
        Flag(
            "--loss-function",
            "mse",
            "mse, bce or wbce.",
            _choice("mse", "bce", "wbce"),
            ("loss",),
        ),
        Flag(
            "--loss-weights",
            (1.0, 1.0),
            "Weights of label 0 and label 1; acts with --loss-function=wbce.",
            _two_numbers,
            ("loss_weights",),
        ),
        Flag(
            "--loss-threshold",
            0.0,
            "Clamp probabilities to [t, 1-t], in the metrics too; 0: do not.",
            float,
            ("loss_threshold",),
        ),
        Flag(
            "--optimizer",
            "sgd",
            "sgd, adagrad or rwsadagrad (row-wise Adagrad).",
            _choice("sgd", "adagrad", "rwsadagrad"),
            ("optimizer",),
            lambda name: {"rwsadagrad": "rowwise_adagrad"}.get(name, name),
        ),
        Flag("--learning-rate", 0.01, "Base learning rate.", float, ("learning_rate",)),
        Flag(
            "--lr-num-warmup-steps",
            0,
            "Steps of linear warm-up. Unlike in the reference, a decay need not be configured.",
            int,
            ("warmup_steps",),
        ),
        Flag(
            "--lr-decay-start-step",
            0,
            "Step at which the squared polynomial decay starts.",
            int,
            ("decay_start_step",),
        ),
        Flag(
            "--lr-num-decay-steps",
            0,
            "Length of the decay; 0: no decay.",
            int,
            ("decay_steps",),
        ),
    ),
    "data": (
        Flag(
            "--data-generation",
            "random",
            "dataset: rows of a file. random, synthetic: made-up rows, see below.",
            _choice("dataset", "random", "synthetic", "internal"),
            ("data_generation",),
            lambda kind: None if kind == "dataset" else kind,
            refused_values={
                "internal": "it takes libraries that were never published. Use random, synthetic "
                "or dataset"
            },
        ),
        Flag(
            "--data-set",
            "kaggle",
            "kaggle: rows of one file, train.txt. terabyte: of a file a day, day_0 … day_23, the "
            "last of which is for evaluation.",
            _choice("kaggle", "terabyte"),
        ),
        Flag(
            "--raw-data-file",
            "",
            "Criteo's train.txt. Needed unless --processed-data-file is a finished .npz. With "
            "--data-set=terabyte what the days' names begin with, as in FOLDER/day for "
            "FOLDER/day_0 (or day_0.gz); or, where there are no raw days, "
            "FOLDER/day_0_reordered.npz.",
            str,
        ),
        Flag(
            "--processed-data-file",
            "",
            "NAME.npz. Where it exists it is read as it is. The DATASET lies beside it as "
            "NAME.dataset, and is made where it is missing or was made with other options. By "
            "default kaggleAdDisplayChallenge_processed.npz (or terabyte_processed.npz) in the "
            "folder of --raw-data-file. A finished NAME_train.bin, NAME_test.bin and NAME_val.bin "
            "are read with --mlperf-bin-loader.",
            str,
        ),
        Flag(
            "--data-randomize",
            "total",
            "Order of the training rows, by the reference's own permutation: none, day (shuffled "
            "within each day) or total (across the training days). With --memory-map by our own, "
            "in limited memory.",
            _choice("none", "day", "total"),
            ("shuffle", "initial_draws"),
        ),
        Flag(
            "--max-ind-range",
            -1,
            "Take raw values modulo N before they are numbered (not of a finished .npz), and ids "
            "modulo N when a batch is made; at most 0: do not.",
            int,
            ("max_ind_range",),
            _not_negative,
        ),
        Flag(
            "--num-batches",
            0,
            "Use only the first N batches of each split; at most 0: all. Of made-up rows, make so "
            "many batches instead of --data-size rows.",
            int,
            ("num_batches",),
            _not_negative,
        ),
        Flag(
            "--data-sub-sample-rate",
            0.0,
            "Drop a row without a click with this probability, on all days. The draws are the "
            "reference's, from --numpy-rand-seed.",
            float,
            ("data_sub_sample_rate",),
        ),
        Flag(
            "--round-targets",
            False,
            "True or False: whether made-up labels are 0 and 1, or anything between. Labels of a "
            "file are 0 and 1 already.",
            _boolean,
            ("soft_labels",),
            lambda on: not on,
        ),
        Flag(
            "--memory-map",
            False,
            "Preparation takes limited memory in any case. With it the order of the training rows "
            "is our own shuffle's (--shuffle total or day) and not the reference's permutation, "
            "which takes 8 bytes a row of memory and which the reference does not draw then.",
        ),
        Flag(
            "--mlperf-bin-loader",
            False,
            "Read NAME_train.bin of --processed-data-file, where it is; acts with --memory-map, "
            "--mlperf-logging and --data-set=terabyte. Otherwise the DATASET is such a file "
            "already.",
        ),
        Flag(
            "--mlperf-bin-shuffle",
            False,
            "Taken, with a note: rows are shuffled when they are prepared (--data-randomize); the "
            "reference draws its batches in another order instead.",
        ),
        Flag(
            "--num-workers",
            0,
            "Taken, with a note: here one background thread reads, and keeps up.",
            int,
        ),
        Flag("--test-num-workers", -1, "As --num-workers.", int),
        Flag(
            "--dataset-multiprocessing",
            False,
            "Taken, with a note: preparation uses the cores that it may use in any case.",
        ),
    ),
    "made-up data": (
        Flag(
            "--arch-embedding-size",
            (4, 3, 2),
            "Rows of each embedding table. Of files, they follow from the data.",
            _integers,
            ("num_embeddings",),
        ),
        Flag(
            "--data-size",
            1,
            "Rows to train on; the same are tested.",
            int,
            ("data_size",),
        ),
        Flag(
            "--num-indices-per-lookup",
            10,
            "The most ids that a table is looked up with at once; equal ones count once.",
            int,
            ("num_indices_per_lookup",),
        ),
        Flag(
            "--num-indices-per-lookup-fixed",
            False,
            "True or False: draw just so many, instead of 1 to so many.",
            _boolean,
            ("num_indices_per_lookup_fixed",),
        ),
        Flag(
            "--rand-data-dist",
            "uniform",
            "How --data-generation=random draws ids: uniform or gaussian.",
            _choice("uniform", "gaussian"),
            ("rand_data_dist",),
        ),
        *(
            Flag(
                f"--rand-data-{name}",
                default,
                f"{meaning}; acts with --rand-data-dist=gaussian.",
                float,
                (f"rand_data_{name}",),
            )
            for name, default, meaning in (
                ("min", 0.0, "The lowest id"),
                ("max", 1.0, "The highest id, which every table must have"),
                ("mu", -1.0, "The mean, or -1 for that of the lowest and the highest id"),
                ("sigma", 1.0, "The standard deviation"),
            )
        ),
        Flag(
            "--data-trace-file",
            "./input/dist_emb_j.log",
            "With --data-generation=synthetic: the stack distances of each table's ids; a j alone "
            "in the file's name stands for its number. `dlrm stack-distances` writes such.",
            str,
            ("data_trace_file",),
        ),
        Flag(
            "--data-trace-enable-padding",
            False,
            "True or False: draw no new ids once all can have occurred; acts with "
            "--data-generation=synthetic.",
            _boolean,
            ("data_trace_enable_padding",),
        ),
    ),
    "training": (
        Flag("--mini-batch-size", 1, "Rows a step.", int, ("mini_batch_size",)),
        Flag(
            "--mlperf-grad-accum-iter",
            1,
            "Add up the gradients of N mini-batches before the weights move; acts with "
            "--mlperf-logging. (The reference drops all gradients but the last mini-batch's.) "
            "Losses and tests come after whole steps of N.",
            _at_least_1,
            ("accumulate_batches",),
        ),
        Flag("--nepochs", 1, "Passes over the training rows.", int, ("epochs",)),
        Flag(
            "--step",
            -1,
            "Of the Ascend port: stop training after N steps in all; -1: do not.",
            _step_limit,
            ("max_steps",),
            _not_negative,
        ),
        Flag(
            "--numpy-rand-seed",
            123,
            "Seed of the order and of the initial weights.",
            int,
            ("seed",),
        ),
        Flag(
            "--use-gpu",
            False,
            "Compute on a CUDA device. Unlike in the reference it is an error if there is none.",
            ours=("device",),
            convert=lambda on: "cuda" if on else None,
        ),
        Flag(
            "--use-npu",
            False,
            "Of the Ascend port: compute on an Ascend NPU.",
            ours=("device",),
            convert=lambda on: "npu" if on else None,
        ),
        Flag(
            "--local_rank",
            -1,
            "Which card to use; at most 0: the first. Without effect on the CPU.",
            int,
            ("local_rank",),
            _not_negative,
        ),
        Flag(
            "--amp",
            "O0",
            "Ours: mixed precision, O0 or O1. The Ascend port's published figures are O1's.",
            str,
            ("amp",),
        ),
    ),
    "testing and output": (
        Flag(
            "--print-freq",
            1,
            "Print the mean loss every N steps of an epoch.",
            int,
            ("print_freq",),
        ),
        Flag(
            "--print-time",
            False,
            "Print the milliseconds a step, loading included; without it, -1.00.",
        ),
        Flag("--print-wall-time", False, "Print the time of day beside the loss."),
        Flag(
            "--debug-mode",
            False,
            "Print the architecture, the first 3 mini-batches, and the weights before and after "
            "training, or with --inference-only once, long tensors shortened.",
        ),
        Flag(
            "--print-precision",
            5,
            "Digits of the weights that --debug-mode prints.",
            _at_least_1,
        ),
        Flag(
            "--enable-profiling",
            False,
            "Write a trace of 30 steps to RUN/trace.json, as dlrm train --profile does.",
        ),
        Flag(
            "--plot-compute-graph",
            False,
            "Write the graph of operations behind a mini-batch's loss to RUN/graph.dot, which "
            "Graphviz draws (dot -Tsvg). The reference stops with an error.",
        ),
        Flag(
            "--test-freq",
            -1,
            "Test every N steps of an epoch and at its end; at most 0: not while training.",
            int,
            ("test_freq",),
            lambda steps: steps if steps > 0 else -1,
        ),
        Flag(
            "--test-mini-batch-size",
            -1,
            "Rows a batch in tests; negative: as --mini-batch-size.",
            int,
            ("evaluation_batch_size",),
        ),
        Flag(
            "--mlperf-logging",
            False,
            "Print recall, precision, F1, average precision and AUC after each test, choose the "
            "best by AUC instead of accuracy, and write MLPerf's events into RUN/mlperf.log.",
            ours=("mlperf_logging",),
        ),
        Flag(
            "--mlperf-acc-threshold",
            0.0,
            "Stop once the test accuracy (0 … 1) reaches this; acts with --mlperf-logging and "
            "--test-freq.",
            float,
            ("target_accuracy",),
        ),
        Flag(
            "--mlperf-auc-threshold",
            0.0,
            "Stop once the test AUC reaches this; acts with --mlperf-logging and --test-freq.",
            float,
            ("target_auc",),
        ),
        Flag(
            "--load-model",
            "",
            "A .pt of the reference to continue from: weights, optimizer state and position.",
            str,
            ("continue_from",),
        ),
        Flag(
            "--save-model",
            "",
            "Write a .pt that the reference can load whenever a test is the best so far.",
            str,
        ),
        Flag(
            "--quantize-mlp-with-bit",
            32,
            "With --inference-only: bits of the MLPs' weights. 8: integers; 16: bfloat16 (the "
            "reference: float16).",
            _bits(8, 16, 32),
            ("quantize_mlp_with_bit",),
        ),
        Flag(
            "--quantize-emb-with-bit",
            32,
            "With --inference-only: bits of the embedding tables.",
            _bits(4, 8, 32),
            ("quantize_emb_with_bit",),
        ),
        Flag(
            "--save-onnx",
            False,
            "Write the final model as ONNX into RUN/bundle, as `dlrm export --format onnx` does.",
        ),
        Flag("--inference-only", False, "Test --load-model once, without training."),
        Flag(
            "--tensor-board-filename",
            "",
            "Write event files for TensorBoard into RUN/tensorboard, whatever the name. Where it "
            "is absent none are written; the reference's default is run_kaggle_pt.",
            str,
            ("tensorboard",),
            lambda name: True if name else None,
        ),
        *(
            Flag(
                f"--mlperf-submission-{name}",
                getattr(TrackingConfig, f"mlperf_submission_{name}"),
                f"Ours: {meaning}, in RUN/mlperf.log.",
                str,
                (f"mlperf_submission_{name}",),
            )
            for name, meaning in {
                "org": "who submits",
                "platform": "the name of the system",
                "division": "closed or open",
                "status": "onprem, cloud, preview or research",
            }.items()
        ),
        Flag("--run", "", "Ours: the RUN folder to make; by default runs/reference-NNN.", str),
    ),
    "known but refused": (
        _refused(
            "--activation-function",
            "relu",
            "The reference ignores it and always uses relu. Drop it.",
        ),
        _refused(
            "--sync-dense-params",
            True,
            "For several devices, which are not supported yet. Drop it.",
        ),
        _refused(
            "--dist-backend",
            "",
            "Several processes are not supported yet. Drop it, and start one.",
        ),
        _refused(
            "--world_size",
            1,
            "Of the Ascend port. Several processes are not supported yet. Use 1, or drop it.",
        ),
    ),
}

FLAGS: Mapping[str, Flag] = {flag.key: flag for flags in GROUPS.values() for flag in flags}


def read_flags(arguments: Sequence[str]) -> dict[str, Any]:
    """Return the value of every flag that is not refused, by ``Flag.key``.

    Both ``--flag=value`` and ``--flag value`` are read, and the last of several wins.

    Args:
        arguments: The reference's command line, without the program.

    Raises:
        UserError: A flag is unknown or refused, or a value is wrong.
        SystemExit: Help was asked for (0).
    """
    namespace, rest = _parser().parse_known_args(list(arguments))
    if rest:
        _refuse_unknown(rest)
    given: dict[str, Any] = vars(namespace)
    refusals = [
        f"{flag.name}: {flag.meaning}"
        for key, flag in FLAGS.items()
        if flag.refused and key in given and given[key] != flag.default
    ]
    if refusals:
        raise UserError("not supported by dlrm reference:\n  " + "\n  ".join(refusals))
    values = {key: given.get(key, flag.default) for key, flag in FLAGS.items() if not flag.refused}
    for key, value in values.items():
        flag = FLAGS[key]
        if value in flag.refused_values:
            origin = "" if key in given else " (the reference's default)"
            raise UserError(f"{flag.name}={value}{origin}: {flag.refused_values[value]}.")
    return values


def _refuse_unknown(rest: Sequence[str]) -> NoReturn:
    unknown = [argument for argument in rest if argument.startswith("-")]
    if not unknown:
        raise UserError(
            f"{rest[0]!r} belongs to no flag. Write flags as --flag=value or --flag value; "
            "`dlrm reference --help` lists them."
        )
    name = unknown[0].partition("=")[0]
    close = difflib.get_close_matches(name, [flag.name for flag in FLAGS.values()], 1)
    hint = f"Did you mean {close[0]}? " if close else ""
    raise UserError(
        f"{name} is not a flag of the reference. {hint}`dlrm reference --help` lists all flags."
    )


class _Parser(argparse.ArgumentParser):
    """Raises instead of exiting."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}. `dlrm reference --help` lists all flags.")


_DESCRIPTION = """\
Take the command line of the reference implementation, dlrm_s_pytorch.py, as it
is: print the dlrm commands that it means, run them, and log in the reference's
format. Where a flag is absent the reference's default applies.
"""

_EPILOG = """\
example:
  dlrm reference --data-generation=dataset --raw-data-file=data/train.txt \\
      --arch-sparse-feature-size=16 --arch-mlp-bot=13-512-256-64-16 \\
      --arch-mlp-top=512-256-1 --loss-function=bce --learning-rate=0.1 \\
      --mini-batch-size=128 --print-freq=100 --print-time --test-freq=1000 \\
      --test-mini-batch-size=16384 --mlperf-logging
"""


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=28, width=80)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="dlrm reference",
        usage="dlrm reference FLAGS…",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
        formatter_class=_HelpFormatter,
    )
    for title, flags in GROUPS.items():
        group = parser.add_argument_group(title)
        for flag in flags:
            text = flag.meaning.replace("%", "%%")
            if flag.read is None:
                group.add_argument(flag.name, dest=flag.key, action="store_true", help=text)
            else:
                text += "" if flag.refused else f" Default: {flag.default_text()}."
                group.add_argument(
                    flag.name, dest=flag.key, type=flag.read, metavar="VALUE", help=text
                )
    return parser
