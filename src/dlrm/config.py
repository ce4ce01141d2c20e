"""Every option of every stage, as typed dataclasses: the one way to configure anything.

A dataclass's fields are the command line's flags (``mini_batch_size`` is ``--mini-batch-size``)
and the keys of a configuration file; the text under a field is its help.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
import tomllib
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import msgspec
import tomli_w

from dlrm.errors import UserError
from dlrm.files import FORMAT_VERSION, atomic_write, check_version

T = TypeVar("T")

Shuffle = Literal["none", "day", "total", "reference", "reference-day"]
DeviceKind = Literal["cpu", "cuda", "npu"]
Amp = Literal["O0", "O1"]
InputFormat = Literal["auto", "criteo", "csv", "parquet"]
OutputFormat = Literal["auto", "csv", "parquet", "arrow"]
EmbeddingVariant = Literal["full", "qr", "md"]
QrOperation = Literal["mult", "add", "concat"]
QrInitialValues = Literal["small", "reference"]
WeightedPooling = Literal["none", "fixed", "learned"]

MINIMUM_MEMORY = 32 << 20
"""Of evaluation, in bytes."""


def require(condition: bool, message: str) -> None:
    """Raise UserError(message) unless the condition holds."""
    if not condition:
        raise UserError(message)


_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


def size_bytes(text: str, option: str) -> int:
    """Return a number of bytes given as text: 2GiB, 1536 MiB, 4G.

    Args:
        text: The size.
        option: The flag that it was given with, for the message.

    Raises:
        UserError: It is no size.
    """
    match = re.fullmatch(r"\s*([0-9]{1,15}(?:\.[0-9]{1,15})?)\s*([KMGT]?)(?:iB|B)?\s*", text, re.I)
    if not match:
        raise UserError(f"{option}: expected a size such as 2GiB or 1536MiB, got {text!r}.")
    return int(float(match[1]) * _UNITS[match[2].upper()])


def _require_types(config: Any) -> None:
    """Refuse values that are not of their field's type, which Python lets through."""
    for name, kind in typing.get_type_hints(type(config)).items():
        value = getattr(config, name)
        if dataclasses.is_dataclass(kind):
            fits = isinstance(value, typing.cast(type[Any], kind))
        else:
            try:
                fits = msgspec.convert(value, kind) is not None
            except msgspec.ValidationError:
                fits = False
        if not fits:
            expected = getattr(kind, "__name__", "") if isinstance(kind, type) else ""
            choices = ", ".join(map(repr, typing.get_args(kind)))
            raise UserError(
                f"--{name.replace('_', '-')}: expected {expected or 'one of ' + choices}, got "
                f"{value!r}"
            )


@dataclass(frozen=True)
class SynthesizeConfig:
    """What ``dlrm synthesize`` writes."""

    rows: int = 500_000
    """Rows of train.txt."""
    test_rows: int = 50_000
    """Rows of test.txt, which has no labels; 0: it is not written."""
    scale: float = 0.01
    """Cardinality of the sparse features: 1 gives Kaggle's (33.8 million values), 0.01 a
    hundredth."""
    seed: int = 123
    """Equal seeds give equal files."""

    def __post_init__(self) -> None:
        """Refuse what cannot be made."""
        _require_types(self)
        require(self.rows >= 14, f"--rows must be at least 14, two a day; got {self.rows}")
        require(self.test_rows >= 0, f"--test-rows must not be negative; got {self.test_rows}")
        require(0 < self.scale <= 1, f"--scale must be above 0 and at most 1; got {self.scale}")
        require(0 <= self.seed < 2**32, f"--seed must be in 0 … 2**32-1; got {self.seed}")


@dataclass(frozen=True)
class GenerateConfig:
    """Which rows ``dlrm generate`` makes up; the names and draws are the reference's."""

    data_generation: Literal["random", "synthetic"] = "random"
    """How ids are drawn. random: independently, by --rand-data-dist. synthetic: so that they
    repeat as the stack distances of --data-trace-file say."""
    data_size: int = 100_000
    """Training rows."""
    num_batches: int = 0
    """So many mini-batches of training rows instead of --data-size; 0: --data-size."""
    mini_batch_size: int = 128
    """Rows that are drawn at a time: the same number as in training gives the reference's
    batches."""
    test_rows: int = 0
    """Rows of the validation and of the test split, drawn after those for training; 0: both are
    the training rows again, as in the reference."""
    dense_features: int = 13
    """How many dense features there are, each uniform in 0 … 1."""
    num_embeddings: tuple[int, ...] = (10_000,) * 8
    """Rows of each embedding table, a table for each sparse feature."""
    num_indices_per_lookup: int = 1
    """The most ids a sparse feature has in a row. Equal ones of a row are stored once."""
    num_indices_per_lookup_fixed: bool = False
    """Draw just so many ids, instead of 1 to --num-indices-per-lookup."""
    rand_data_dist: Literal["uniform", "gaussian"] = "uniform"
    """Of random ids: uniform over a table, or normal, limited to --rand-data-min … max."""
    rand_data_min: float = 0.0
    """The lowest id of gaussian."""
    rand_data_max: float = 1.0
    """The highest id of gaussian."""
    rand_data_mu: float = -1.0
    """Mean of gaussian; -1: midway between --rand-data-min and --rand-data-max."""
    rand_data_sigma: float = 1.0
    """Standard deviation of gaussian."""
    data_trace_file: str = ""
    """What `dlrm stack-distances` wrote; a j alone in the file's name stands for the table's
    number, from 0."""
    data_trace_enable_padding: bool = False
    """Once all ids of a trace have occurred, draw none anew: each id repeats a recent one."""
    soft_labels: bool = False
    """Labels are uniform in 0 … 1, instead of 0 or 1; metrics take those above 0.5 as clicks."""
    seed: int = 123
    """Equal options give equal rows."""

    def __post_init__(self) -> None:
        """Refuse what cannot be drawn."""
        _require_types(self)
        for name in ("data_size", "mini_batch_size", "dense_features", "num_indices_per_lookup"):
            value = getattr(self, name)
            require(value >= 1, f"--{name.replace('_', '-')} must be at least 1; got {value}")
        for name in ("num_batches", "test_rows"):
            value = getattr(self, name)
            require(value >= 0, f"--{name.replace('_', '-')} must not be negative; got {value}")
        sizes = self.num_embeddings
        require(
            len(sizes) > 0 and min(sizes) >= 1 and max(sizes) < 2**31,
            f"--num-embeddings: expected at least one table of 1 … 2**31-1 rows; got {sizes}",
        )
        require(0 <= self.seed < 2**32, f"--seed must be in 0 … 2**32-1; got {self.seed}")
        self._refuse_idle()
        if self.data_generation == "synthetic":
            require(
                self.data_trace_file != "",
                "--data-generation synthetic needs --data-trace-file: `dlrm stack-distances` "
                "writes one",
            )
        elif self.rand_data_dist == "gaussian":
            least, most = self.rand_data_min, self.rand_data_max
            require(
                0 <= least <= most < min(sizes),
                "--rand-data-min … --rand-data-max must be ids of every table, 0 … "
                f"{min(sizes) - 1}; got {least} … {most}",
            )
            require(
                0 <= self.rand_data_sigma < math.inf and math.isfinite(self.rand_data_mu),
                "--rand-data-sigma must not be negative, and --rand-data-mu be finite; got "
                f"{self.rand_data_sigma} and {self.rand_data_mu}",
            )

    def _refuse_idle(self) -> None:
        for needed, value, names in (
            ("data_generation", "synthetic", ("data_trace_file", "data_trace_enable_padding")),
            ("data_generation", "random", ("rand_data_dist",)),
            ("rand_data_dist", "gaussian", _OF_GAUSSIAN),
        ):
            for name in names:
                require(
                    getattr(self, needed) == value
                    or getattr(self, name) == getattr(GenerateConfig, name),
                    f"--{name.replace('_', '-')} goes with --{needed.replace('_', '-')} {value}; "
                    f"got {getattr(self, needed)}",
                )
        require(
            self.num_batches == 0 or self.data_size == GenerateConfig.data_size,
            "--data-size and --num-batches (of --mini-batch-size rows) both tell how many training "
            f"rows there are; got {self.data_size} and {self.num_batches}. Give one of them",
        )

    @property
    def train_rows(self) -> int:
        """Training rows, whichever option tells."""
        return self.num_batches * self.mini_batch_size or self.data_size


_OF_GAUSSIAN = ("rand_data_min", "rand_data_max", "rand_data_mu", "rand_data_sigma")


@dataclass(frozen=True)
class PrepareConfig:
    """How raw rows become a DATASET."""

    shuffle: Shuffle = "total"
    """Stored order of the training rows: as in the source (none), shuffled within each day (day) or
    across all training days (total); reference and reference-day are the permutations that the
    reference implementation draws from the same seed for its 'total' and 'day'."""
    seed: int = 123
    """Seed of the shuffle and of --data-sub-sample-rate."""
    split: Literal["auto", "days", "rows", "none"] = "auto"
    """What is held back from training. days: of the last day (file), the first half is test and the
    second validation; rows: the same of the last of 7 equal runs of rows; none: nothing. auto: rows
    for a train.txt, days for day_0, day_1 …"""
    days: tuple[int, ...] = ()
    """Of a folder with day_0, day_1 …, use only these, in this order; by default all, ascending."""
    vocabulary: Literal["all", "train"] = "all"
    """Number the values of all rows, as the reference does, or only those that occur in training
    rows: others then share one more row of the table, the 'other' slot."""
    min_frequency: int = 1
    """Values that occur less often than this share the 'other' slot."""
    max_ind_range: int = 0
    """Take every raw categorical value modulo this number before numbering it; 0: leave it."""
    hash_buckets: int = 0
    """Hash every categorical value into so many rows of each table, without any vocabulary; 0:
    number the values."""
    data_sub_sample_rate: float = 0.0
    """Drop a row that was not clicked with this probability, on every day, those of test and
    validation too."""
    bad_rows: Literal["error", "skip"] = "error"
    """What to do with a malformed row: stop, or skip and count it."""
    max_bad_rows: int = 1000
    """With --bad-rows skip, stop when there are more than so many."""

    def __post_init__(self) -> None:
        """Refuse values that mean nothing."""
        _require_types(self)
        require(0 <= self.seed < 2**32, f"--seed must be in 0 … 2**32-1; got {self.seed}")
        require(
            0 <= self.max_ind_range < 2**31,
            f"--max-ind-range must be in 0 … 2**31-1 (0: no limit); got {self.max_ind_range}",
        )
        require(
            0 <= self.hash_buckets < 2**31,
            f"--hash-buckets must be in 0 … 2**31-1 (0: no hashing); got {self.hash_buckets}",
        )
        require(self.min_frequency >= 1, f"--min-frequency must be ≥ 1; got {self.min_frequency}")
        require(
            0 <= self.data_sub_sample_rate < 1,
            f"--data-sub-sample-rate must be in [0, 1); got {self.data_sub_sample_rate}",
        )
        require(self.max_bad_rows >= 0, f"--max-bad-rows must be ≥ 0; got {self.max_bad_rows}")
        require(
            min(self.days, default=0) >= 0 and len(set(self.days)) == len(self.days),
            f"--days must be different numbers, none negative; got {self.days}",
        )
        require(
            not self.hash_buckets or (self.vocabulary == "all" and self.min_frequency == 1),
            "--hash-buckets needs no vocabulary, so it goes with neither --vocabulary train nor "
            "--min-frequency",
        )


@dataclass(frozen=True)
class TableConfig:
    """How one sparse feature's table is stored, and how the vectors of its bags are summed."""

    name: str
    """The sparse feature."""
    variant: EmbeddingVariant = "full"
    """full: a vector for each id; qr: quotient-remainder tables; md: shorter vectors."""
    qr_operation: QrOperation = "mult"
    """How the vectors of quotient and remainder are joined."""
    qr_collisions: int = 4
    """Rows of the remainder's table: so many ids share a row of the quotient's."""
    qr_initial_values: QrInitialValues = "small"
    """As of a model's --qr-initial-values."""
    md_dim: int = 0
    """Length of the vectors of variant md."""
    weighted_pooling: WeightedPooling = "none"
    """fixed or learned: each id has a weight, which its vector is multiplied by."""

    def __post_init__(self) -> None:
        """Refuse what does not fit together."""
        _require_types(self)
        require(bool(self.name), "--tables: an entry needs the name of a sparse feature first")
        at = f"--tables {self.name}"
        for variant, names in _VARIANT_OPTIONS.items():
            for name in names:
                require(
                    self.variant == variant
                    or getattr(self, name, None) == getattr(TableConfig, name, None),
                    f"{at}: {name} goes with variant={variant}; got variant={self.variant}",
                )
        require(
            1 <= self.qr_collisions < 2**31,
            f"{at}: qr_collisions must be in 1 … 2**31-1; got {self.qr_collisions}",
        )
        require(
            self.variant != "md" or self.md_dim >= 1,
            f"{at}: variant=md needs md_dim, the length of its vectors; got {self.md_dim}",
        )
        require(
            self.variant != "qr" or self.weighted_pooling == "none",
            f"{at}: weighted_pooling does not go with variant=qr, where an id has no vector of its "
            "own in a bag",
        )


@dataclass(frozen=True)
class ModelConfig:
    """The architecture; sizes that follow from the data are in the schema."""

    embedding_dim: int = 16
    """Length of an embedding vector, the same for all tables."""
    dense_arch_layer_sizes: tuple[int, ...] = (512, 256, 64, 16)
    """Output sizes of the bottom MLP's layers; for 'dot' the last must equal embedding_dim."""
    over_arch_layer_sizes: tuple[int, ...] = (512, 256, 1)
    """Output sizes of the top MLP's layers; the last must be 1, the logit."""
    interaction: Literal["dot", "cat"] = "dot"
    """How dense and sparse vectors meet: pairwise dot products, or concatenation alone."""
    interaction_itself: bool = False
    """Include each vector's dot product with itself."""
    dropout: float = 0.0
    """Probability of dropping a hidden activation of the top MLP while training."""
    embedding_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """What embedding tables are stored in. The narrow types halve their memory; an update is
    computed in float32 and rounded at random, so that small updates count on average."""
    embedding_variant: EmbeddingVariant = "full"
    """How large tables are stored. full: a vector for each id; qr: quotient-remainder tables, of
    which two together give an id's vector; md: mixed dimensions, shorter vectors that are projected
    to embedding_dim."""
    qr_threshold: int = 200
    """With qr, tables of more rows than this are stored so."""
    qr_operation: QrOperation = "mult"
    """With qr, how the vectors of quotient and remainder are joined: product, sum, or one after the
    other, each then of half the length."""
    qr_collisions: int = 4
    """With qr, so many ids share a row of the quotient's table, and the remainder's has so many
    rows."""
    qr_initial_values: QrInitialValues = "small"
    """With qr, small: an id's first vector is as of a whole table; reference: both tables are drawn
    as the reference does, uniform from √(1/n) to 1, with which add and concat learn little."""
    md_threshold: int = 200
    """With md, tables of more rows than this have shorter vectors."""
    md_temperature: float = 0.3
    """With md, how fast vectors become shorter: a table of n rows has vectors of
    embedding_dim * (least n / n) ** this."""
    md_round_dims: bool = False
    """With md, round lengths to the nearest power of 2."""
    weighted_pooling: WeightedPooling = "none"
    """Multiply the vector of each id by a weight of its own before a bag is summed: 1 at first, and
    then learned or fixed, which keeps those of --continue-from."""
    tables: tuple[TableConfig, ...] = ()
    """Tables that are stored in another way than the options above say, such as
    cat_2,variant=qr,qr_collisions=16 cat_5,variant=md,md_dim=4 cat_8,weighted_pooling=learned.
    What an entry does not say is as in a whole table without weights."""

    def __post_init__(self) -> None:
        """Refuse sizes that do not fit together."""
        _require_types(self)
        self._require_variants()
        sizes = (self.embedding_dim, *self.dense_arch_layer_sizes, *self.over_arch_layer_sizes)
        require(all(size > 0 for size in sizes), f"every layer size must be positive; got {sizes}")
        require(
            bool(self.dense_arch_layer_sizes) and bool(self.over_arch_layer_sizes),
            "both MLPs need at least one layer",
        )
        require(
            self.dense_arch_layer_sizes[-1] == self.embedding_dim,
            "the last of --dense-arch-layer-sizes must equal --embedding-dim, since both kinds of "
            f"vectors meet in the interaction; got {self.dense_arch_layer_sizes[-1]} and "
            f"{self.embedding_dim}",
        )
        require(
            self.over_arch_layer_sizes[-1] == 1,
            "the last of --over-arch-layer-sizes must be 1, the logit; got "
            f"{self.over_arch_layer_sizes[-1]}",
        )
        require(
            self.interaction == "dot" or not self.interaction_itself,
            "--interaction-itself goes with --interaction dot: 'cat' has no products",
        )
        require(0 <= self.dropout < 1, f"--dropout must be in [0, 1); got {self.dropout}")

    def _require_variants(self) -> None:
        for variant, names in _VARIANT_OPTIONS.items():
            for name in names:
                require(
                    self.embedding_variant == variant
                    or getattr(self, name, None) == getattr(ModelConfig, name, None),
                    f"--{name.replace('_', '-')} goes with --embedding-variant {variant}; got "
                    f"--embedding-variant {self.embedding_variant}",
                )
        for name, least in (("qr_threshold", 0), ("md_threshold", 0), ("qr_collisions", 1)):
            value = getattr(self, name)
            require(
                least <= value < 2**31,
                f"--{name.replace('_', '-')} must be in {least} … 2**31-1; got {value}",
            )
        require(
            0 <= self.md_temperature < float("inf"),
            f"--md-temperature must not be negative; got {self.md_temperature}",
        )
        require(
            self.embedding_variant != "qr" or self.weighted_pooling == "none",
            f"--weighted-pooling {self.weighted_pooling} does not go with --embedding-variant qr, "
            "where an id has no vector of its own in a bag. Name the tables to be weighed with "
            "--tables",
        )
        joined = [self.qr_operation, *(table.qr_operation for table in self.tables)]
        require(
            "concat" not in joined or self.embedding_dim % 2 == 0,
            "--embedding-dim must be even where quotient and remainder are concatenated, since "
            f"each gives half of it; got {self.embedding_dim}",
        )
        named = [table.name for table in self.tables]
        for table in self.tables:
            require(
                table.md_dim <= self.embedding_dim,
                f"--tables {table.name}: md_dim must be at most --embedding-dim; got "
                f"{table.md_dim} and {self.embedding_dim}",
            )
            require(named.count(table.name) == 1, f"--tables has {table.name} twice")


_VARIANT_OPTIONS: Mapping[str, tuple[str, ...]] = {
    "qr": ("qr_threshold", "qr_operation", "qr_collisions", "qr_initial_values"),
    "md": ("md_threshold", "md_temperature", "md_round_dims", "md_dim"),
}
"""Those that one variant alone takes, of a model or of a table."""


@dataclass(frozen=True)
class LossConfig:
    """What training minimises."""

    loss: Literal["bce", "wbce", "mse"] = "bce"
    """Binary cross-entropy, the same with a weight for each label, or squared error of the
    probability."""
    loss_weights: tuple[float, float] = (1.0, 1.0)
    """Weights of label 0 and label 1 in 'wbce'."""
    loss_threshold: float = 0.0
    """Clamp probabilities to [t, 1-t], in the metrics too; 0: do not."""

    def __post_init__(self) -> None:
        """Refuse values that mean nothing."""
        _require_types(self)
        require(
            0 <= self.loss_threshold < 0.5,
            f"--loss-threshold must be in [0, 0.5); got {self.loss_threshold}",
        )
        require(
            self.loss == "wbce" or self.loss_weights == (1.0, 1.0),
            f"--loss-weights goes with --loss wbce; got --loss {self.loss}",
        )
        require(
            all(weight >= 0 for weight in self.loss_weights),
            f"--loss-weights must not be negative; got {self.loss_weights}",
        )


@dataclass(frozen=True)
class OptimizerConfig:
    """How weights move."""

    optimizer: Literal["sgd", "adagrad", "rowwise_adagrad"] = "sgd"
    """rowwise_adagrad keeps one accumulator a row of a table, and is adagrad elsewhere."""
    learning_rate: float = 0.1
    """Base learning rate."""
    warmup_steps: int = 0
    """Steps of linear warm-up."""
    decay_start_step: int = 0
    """Step at which the polynomial (squared) decay starts."""
    decay_steps: int = 0
    """Length of the decay in steps; 0: no decay."""

    def __post_init__(self) -> None:
        """Refuse schedules that overlap."""
        _require_types(self)
        require(self.learning_rate >= 0, f"--learning-rate must be ≥ 0; got {self.learning_rate}")
        steps = (self.warmup_steps, self.decay_start_step, self.decay_steps)
        require(min(steps) >= 0, f"numbers of steps must not be negative; got {steps}")
        require(
            self.decay_steps > 0 or self.decay_start_step == 0,
            "--decay-start-step goes with --decay-steps, the length of the decay; got "
            f"{self.decay_start_step} and 0",
        )
        require(
            self.decay_steps == 0 or self.decay_start_step >= self.warmup_steps,
            "the decay must not start before the warm-up ends; got --decay-start-step "
            f"{self.decay_start_step} and --warmup-steps {self.warmup_steps}",
        )


@dataclass(frozen=True)
class TrackingConfig:
    """What a run writes for other programs to look at; it changes no result."""

    mlperf_logging: bool = False
    """Write RUN/mlperf.log, the events of MLPerf Training's benchmark dlrm (v1), which `dlrm
    mlperf-check` checks."""
    mlperf_submission_org: str = ""
    """Who submits, in mlperf.log."""
    mlperf_submission_platform: str = ""
    """The name of the system that trains, in mlperf.log."""
    mlperf_submission_division: Literal["closed", "open"] = "closed"
    """closed: the benchmark's model, data and target; open: any."""
    mlperf_submission_status: Literal["onprem", "cloud", "preview", "research"] = "onprem"
    """Where the system is to be had."""
    tensorboard: bool = False
    """Write event files for TensorBoard into RUN/tensorboard: loss, metrics, learning rate,
    samples/s, wait for data."""
    tensorboard_projector: str = ""
    """With --tensorboard, the sparse feature whose embedding vectors TensorBoard's projector shows
    when training has ended, with value, count and click rate; empty: none."""
    tensorboard_projector_rows: int = 10_000
    """How many of its vectors: those of the commonest values."""

    def __post_init__(self) -> None:
        """Refuse what has no effect."""
        _require_types(self)
        require(
            self.tensorboard or not self.tensorboard_projector,
            "--tensorboard-projector goes with --tensorboard",
        )
        require(
            self.mlperf_logging
            or not (self.mlperf_submission_org or self.mlperf_submission_platform),
            "--mlperf-submission-org and -platform go with --mlperf-logging",
        )
        require(
            self.tensorboard_projector_rows >= 1,
            "--tensorboard-projector-rows must be at least 1; got "
            f"{self.tensorboard_projector_rows}",
        )


@dataclass(frozen=True)
class TrainConfig:
    """A training run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    epochs: int = 1
    """Passes over the training rows."""
    mini_batch_size: int = 128
    """Rows a step, or of each of the --accumulate-batches of a step."""
    accumulate_batches: int = 1
    """Add up the gradients of so many mini-batches before the weights move: a step of as many rows
    in the memory of one mini-batch. Steps are what all other options count, but for
    --num-batches."""
    evaluation_batch_size: int = 16384
    """Rows a batch in evaluation."""
    evaluation_memory: str = "512MiB"
    """The most memory that the metrics of an evaluation take, at 4 bytes a row; at least 32MiB.
    What is beyond is sorted on disk, in RUN."""
    decision_threshold: float = 0.5
    """Precision, recall and F1 count a row as predicted to click above this probability."""
    test_freq: int = 0
    """Evaluate every so many steps of an epoch and at its end; 0: at its end only; -1: not before
    training has ended."""
    print_freq: int = 1000
    """Report the mean loss every so many steps."""
    num_batches: int = 0
    """Use only the first so many batches of each split in every pass; 0: all."""
    max_steps: int = 0
    """Stop training after so many steps in all; 0: no limit."""
    target_auc: float = 0.0
    """Stop once the AUC of the selection split reaches this; 0: never."""
    target_accuracy: float = 0.0
    """Stop once the accuracy of the selection split reaches this (0 … 1); 0: never."""
    selection_split: Literal["validation", "test"] = "validation"
    """The split that periodic evaluation, the best checkpoint and the targets look at. Choosing
    on test makes the test metrics optimistic; the reference implementation does it."""
    max_ind_range: int = 0
    """Take every id modulo this number when a batch is read, so that no table has more rows; 0:
    leave ids as prepared."""
    seed: int = 123
    """Fixes initial weights and everything else that is random."""
    initial_draws: Literal["none", "day", "total"] = "none"
    """Draw and discard the permutations that the reference implementation draws before its
    initial weights when it shuffles so; 'none' matches its --data-randomize=none."""
    report_checkpoint: Literal["best", "newest"] = "best"
    """The checkpoint whose metrics and predictions a run ends with."""
    continue_from: str = ""
    """A checkpoint (.safetensors) whose weights, optimizer state and position to start from."""
    device: DeviceKind = "cpu"
    """Where to compute."""
    local_rank: int = 0
    """Which card of that kind."""
    amp: Amp = "O0"
    """Mixed precision: O0 computes in float32; O1 multiplies matrices in bfloat16 on a cpu, and in
    float16 with gradient scaling on cuda and npu. Weights, loss and sigmoid stay float32."""
    save_every_steps: int = 0
    """Save a checkpoint every so many steps, beside those at evaluations; 0: do not."""
    save_every_minutes: float = 10.0
    """Save a checkpoint when the newest is so old; 0: do not."""
    keep: int = 2
    """Keep so many of the newest checkpoints, and the best."""

    def __post_init__(self) -> None:
        """Refuse values that mean nothing."""
        _require_types(self)
        for name in (
            *("epochs", "mini_batch_size", "accumulate_batches", "evaluation_batch_size"),
            *("print_freq", "keep"),
        ):
            value = getattr(self, name)
            require(value >= 1, f"--{name.replace('_', '-')} must be at least 1; got {value}")
        require(
            self.num_batches % self.accumulate_batches == 0,
            "--num-batches must be a multiple of --accumulate-batches, since a step takes so many; "
            f"got {self.num_batches} and {self.accumulate_batches}",
        )
        require(self.test_freq >= -1, f"--test-freq must be at least -1; got {self.test_freq}")
        for name in ("num_batches", "max_steps", "max_ind_range", "save_every_steps"):
            value = getattr(self, name)
            require(value >= 0, f"--{name.replace('_', '-')} must not be negative; got {value}")
        require(
            0 <= self.save_every_minutes < float("inf"),
            f"--save-every-minutes must not be negative; got {self.save_every_minutes}",
        )
        for name in ("target_auc", "target_accuracy"):
            value = getattr(self, name)
            require(0 <= value <= 1, f"--{name.replace('_', '-')} must be in 0 … 1; got {value}")
            require(
                value == 0 or self.test_freq >= 0,
                f"--{name.replace('_', '-')} is looked at in evaluations while training, and with "
                "--test-freq -1 there is none; leave one of them away",
            )
        require(
            size_bytes(self.evaluation_memory, "--evaluation-memory") >= MINIMUM_MEMORY,
            f"--evaluation-memory must be at least 32MiB; got {self.evaluation_memory}",
        )
        require(
            0 <= self.decision_threshold <= 1,
            f"--decision-threshold must be in 0 … 1; got {self.decision_threshold}",
        )
        require(0 <= self.seed < 2**32, f"--seed must be in 0 … 2**32-1; got {self.seed}")
        require(self.local_rank >= 0, f"--local-rank must not be negative; got {self.local_rank}")

    @property
    def step_rows(self) -> int:
        """Rows of a step: of all mini-batches whose gradients are added up."""
        return self.mini_batch_size * self.accumulate_batches


@dataclass(frozen=True)
class ConvertConfig:
    """What a ``.pt`` does not tell of itself, as far as it differs from the usual."""

    loss: LossConfig = field(default_factory=LossConfig)
    qr_operation: Literal["unknown", "mult", "add"] = "unknown"
    """Of quotient-remainder tables, whether their vectors are multiplied or added: the old
    --qr-operation. (concat is seen.)"""
    max_ind_range: int = 0
    """The old --max-ind-range: ids are taken modulo this number; 0: they are not."""

    def __post_init__(self) -> None:
        """Refuse values that mean nothing."""
        _require_types(self)
        require(
            self.max_ind_range >= 0,
            f"--max-ind-range must not be negative; got {self.max_ind_range}",
        )


@dataclass(frozen=True)
class QuantizationConfig:
    """Of how many bits weights are for inference; 32: as they were trained."""

    quantize_mlp_with_bit: Literal[8, 16, 32] = 32
    """Of the layers. 8: integers; 16: bfloat16."""
    quantize_emb_with_bit: Literal[4, 8, 32] = 32
    """Of the embedding tables: integers, with a scale and a bias a row."""

    def __post_init__(self) -> None:
        """Refuse other numbers."""
        _require_types(self)


@dataclass(frozen=True)
class BenchTrainConfig:
    """What ``dlrm bench train`` measures."""

    architecture: Literal["kaggle", "kaggle-64", "kaggle-128", "mlperf"] = "kaggle"
    """Criteo Kaggle's 26 tables with vectors of 16, 64 or 128, or MLPerf's DLRM."""
    max_table_rows: int = -1
    """Limit of every table's rows; 0: none; -1: none for kaggle (33.8 million rows, 2.2 GB), and a
    million for the others."""
    mini_batch_size: int = 128
    """Rows a step."""
    scattered: bool = False
    """Scatter ids over their tables as hashing does, instead of numbering frequent ones first as
    `dlrm prepare` all but does."""
    optimizer: Literal["sgd", "adagrad", "rowwise_adagrad"] = "sgd"
    """How weights move."""
    embedding_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """What embedding tables are stored in."""
    amp: Amp = "O0"
    """Mixed precision; the floor is measured in float32 all the same."""
    device: DeviceKind = "cpu"
    """Where to compute."""
    local_rank: int = 0
    """Which card of that kind."""
    pairs: int = 20
    """How often floor and training are measured in turn; the medians are the result."""
    seed: int = 123
    """Of the made-up rows and the initial weights."""

    def __post_init__(self) -> None:
        """Refuse values that mean nothing."""
        _require_types(self)
        for name in ("mini_batch_size", "pairs"):
            value = getattr(self, name)
            require(value >= 1, f"--{name.replace('_', '-')} must be at least 1; got {value}")
        require(
            self.max_table_rows >= -1,
            f"--max-table-rows must be at least -1; got {self.max_table_rows}",
        )
        require(0 <= self.seed < 2**32, f"--seed must be in 0 … 2**32-1; got {self.seed}")
        require(self.local_rank >= 0, f"--local-rank must not be negative; got {self.local_rank}")


@dataclass(frozen=True)
class BenchPrepareConfig:
    """What ``dlrm bench prepare`` measures."""

    rows: int = 1_000_000
    """How many rows are made up, about 240 bytes each."""
    scale: float = 1.0
    """Cardinality of their sparse features, as for `dlrm synthesize`: 1 is Kaggle's."""
    memory: str = "2GiB"
    """The most memory to use, as for `dlrm prepare`."""
    rounds: int = 3
    """How often preparation and its ceilings are measured in turn; the medians are the result."""
    prepare: PrepareConfig = field(default_factory=PrepareConfig)
    """How rows become a DATASET."""

    def __post_init__(self) -> None:
        """Refuse values that mean nothing."""
        _require_types(self)
        SynthesizeConfig(rows=self.rows, scale=self.scale)  # which refuses what is wrong
        require(self.rounds >= 1, f"--rounds must be at least 1; got {self.rounds}")


@dataclass(frozen=True)
class BenchPredictConfig:
    """What ``dlrm bench predict`` measures."""

    rows: int = 500_000
    """Of the input the first so many, or all it has; encoded, they have to fit into memory."""
    rounds: int = 5
    """How often prediction and its ceilings are measured in turn; the medians are the result."""

    def __post_init__(self) -> None:
        """Refuse values that mean nothing."""
        _require_types(self)
        for name in ("rows", "rounds"):
            value = getattr(self, name)
            require(value >= 1, f"--{name} must be at least 1; got {value}")


@dataclass(frozen=True)
class ServeConfig:
    """How ``dlrm serve`` serves a model."""

    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0: every one of the machine."""
    port: int = 8000
    """For HTTP; 0: any that is free."""
    grpc_port: int = 8001
    """For gRPC; 0: any that is free; -1: no gRPC."""
    model_name: str = "dlrm"
    """What clients call the model."""
    workers: int = 1
    """Processes that answer, on the same ports, each with its share of the cores. They share the
    tables."""
    threads: int = 0
    """Threads of a process that score, each a batch of its own; 0: one a core of its share."""
    max_batch_rows: int = 256
    """Score at most so many rows of several requests together; more make no row cheaper, and leave
    other threads without work."""
    batch_wait_ms: float = 0.0
    """Let a request wait so many milliseconds for others, though a thread is free. Whatever comes
    while none is free is taken together anyway."""
    max_queue_rows: int = 8192
    """Refuse requests while so many rows wait in a process."""
    max_request_rows: int = 4096
    """The most rows of a request."""
    max_body: str = "8MiB"
    """The largest body of an HTTP request, unpacked, and the largest message of gRPC."""
    max_connections: int = 1024
    """The most open HTTP connections of a process, and the most calls of gRPC under way."""
    read_timeout: float = 10.0
    """Seconds in which the body of a request has to arrive."""
    idle_timeout: float = 60.0
    """Seconds after which a connection is closed on which no request arrives."""
    request_timeout: float = 10.0
    """Seconds after which a request that still waits to be scored is refused."""
    drain_seconds: float = 1.0
    """Seconds between SIGTERM, from which on the server says that it is not ready, and the time
    when it takes no more connections: as long as a load balancer takes to notice."""
    shutdown_timeout: float = 30.0
    """Seconds after that in which accepted requests have to be answered."""
    access_log: float = 0.0
    """Share of the requests that are logged, as JSON lines on standard error: 0 none, 1 all.
    Failures on our side are always logged."""

    def __post_init__(self) -> None:
        """Refuse values that mean nothing."""
        _require_types(self)
        for name, least in (("port", 0), ("grpc_port", -1)):
            value = getattr(self, name)
            flag = f"--{name.replace('_', '-')}"
            require(least <= value < 1 << 16, f"{flag} must be in {least} … 65535; got {value}")
        require(
            self.port != self.grpc_port or self.port == 0,
            f"--port and --grpc-port must differ; both are {self.port}",
        )
        require(
            re.fullmatch(r"[A-Za-z0-9_.-]{1,100}", self.model_name) is not None,
            "--model-name must be 1 to 100 letters, digits and _.-, because it is part of "
            f"addresses; got {self.model_name!r}",
        )
        for name in ("workers", "max_batch_rows", "max_request_rows", "max_queue_rows",
                     "max_connections"):  # fmt: skip
            value = getattr(self, name)
            require(value >= 1, f"--{name.replace('_', '-')} must be at least 1; got {value}")
        require(self.threads >= 0, f"--threads must not be negative; got {self.threads}")
        for name in ("read_timeout", "idle_timeout", "request_timeout", "shutdown_timeout"):
            value = getattr(self, name)
            flag = f"--{name.replace('_', '-')}"
            require(0 < value < math.inf, f"{flag} must be a positive number; got {value}")
        require(
            0 <= self.drain_seconds <= 3600,
            f"--drain-seconds must be in 0 … 3600; got {self.drain_seconds}",
        )
        require(
            0 <= self.batch_wait_ms <= 1000,
            f"--batch-wait-ms must be in 0 … 1000; got {self.batch_wait_ms}",
        )
        require(0 <= self.access_log <= 1, f"--access-log must be in 0 … 1; got {self.access_log}")
        size_bytes(self.max_body, "--max-body")


@dataclass(frozen=True)
class BenchServeConfig:
    """What ``dlrm bench serve`` measures."""

    scenario: Literal["server", "single"] = "server"
    """server: requests of 100 to 700 rows, one user and candidates, with the sizes of MLPerf's
    samples. single: requests of one row."""
    protocol: Literal["http", "grpc"] = "http"
    """How requests go."""
    encoding: Literal["binary", "json"] = "binary"
    """Whether tensors go as bytes, or as JSON; with gRPC, as raw or typed contents."""
    user_share: float = 0.5
    """Of samples, the share of features that are the user's, sent once a request: the first of
    either kind. 0: every candidate has its own."""
    rates: tuple[float, ...] = ()
    """Requests a second to offer; by default 10% to 100% of what a saturated server answers."""
    limits_ms: tuple[float, ...] = (30.0, 60.0)
    """Search for the highest rate with 99% of the answers within so many milliseconds."""
    seconds: float = 10.0
    """Offer each rate so long."""
    confirm_seconds: float = 60.0
    """Offer a rate so long to confirm that it holds a limit."""
    clients: int = 1
    """Processes that offer load, outside the server's."""
    url: str = ""
    """HTTP address of a server that runs, such as http://localhost:8000; by default one is started,
    and ended."""
    grpc_port: int = 8001
    """Of that server, for gRPC."""
    model_name: str = "dlrm"
    """What the server calls the model."""
    server_options: str = ""
    """More options of the server that is started, as `dlrm serve` takes them: "--workers 2"."""
    seed: int = 123
    """Of the rows and of the times of requests."""

    def __post_init__(self) -> None:
        """Refuse values that mean nothing."""
        _require_types(self)
        for name in ("seconds", "confirm_seconds"):
            value = getattr(self, name)
            flag = f"--{name.replace('_', '-')}"
            require(0 < value < math.inf, f"{flag} must be a positive number; got {value}")
        for name in ("rates", "limits_ms"):
            values = getattr(self, name)
            flag = f"--{name.replace('_', '-')}"
            good = all(0 < value < math.inf for value in values)
            require(good, f"{flag} must be positive numbers; got {values}")
        require(len(self.limits_ms) > 0, "--limits-ms: name at least one limit")
        require(
            not (self.url and self.server_options),
            "--server-options are for a server that is started, and --url names one that runs",
        )
        require(self.clients >= 1, f"--clients must be at least 1; got {self.clients}")
        require(
            0 <= self.user_share <= 1,
            f"--user-share must be in 0 … 1; got {self.user_share}",
        )
        require(
            0 < self.grpc_port < 1 << 16, f"--grpc-port must be in 1 … 65535; got {self.grpc_port}"
        )
        require(0 <= self.seed < 2**31, f"--seed must be in 0 … 2**31-1; got {self.seed}")


@dataclass(frozen=True)
class BaselineConfig:
    """What ``dlrm baseline`` trains in a DLRM's place."""

    model: Literal["logistic", "lightgbm"] = "lightgbm"
    """logistic: logistic regression (scikit-learn); lightgbm: gradient-boosted trees (LightGBM)."""
    learning_rate: float = 0.0
    """Step size of logistic's SGD, shrinkage of lightgbm's trees; 0: 0.002 and 0.05."""
    max_rows: int = 0
    """Train on so many of the training rows, evenly spread over them; 0: on all."""
    seed: int = 123
    """Equal seeds give equal results."""
    passes: int = 20
    """logistic: the most passes over the training rows; it stops at the first that does not lower
    the log loss of the validation split."""
    l2: float = 1e-6
    """logistic: weight of the squared norm of the coefficients."""
    trees: int = 1000
    """lightgbm: the most trees."""
    patience: int = 50
    """lightgbm: stop after so many trees that have not lowered the log loss of the validation
    split."""
    num_leaves: int = 63
    """lightgbm: the most leaves of a tree."""
    max_categories: int = 256
    """lightgbm: a sparse feature with at most so many ids is split by id; any other by how often
    its value occurs in training rows, and how often it was clicked there."""

    def __post_init__(self) -> None:
        """Refuse values that mean nothing, and options of the other model."""
        _require_types(self)
        require(
            0 <= self.learning_rate <= 1e6,
            f"--learning-rate must be in 0 … 1e6; got {self.learning_rate}",
        )
        require(
            self.max_rows == 0 or self.max_rows >= 2,
            f"--max-rows must be 0 (all) or at least 2; got {self.max_rows}",
        )
        require(0 <= self.seed < 2**31, f"--seed must be in 0 … 2**31-1; got {self.seed}")
        require(0 <= self.l2 < float("inf"), f"--l2 must not be negative; got {self.l2}")
        for name, least in (("passes", 1), ("trees", 1), ("patience", 1), ("num_leaves", 2)):
            value = getattr(self, name)
            require(
                value >= least, f"--{name.replace('_', '-')} must be at least {least}; got {value}"
            )
        require(
            self.num_leaves <= 2**17,
            f"--num-leaves must be at most {2**17}; got {self.num_leaves}",
        )
        require(
            0 <= self.max_categories <= 2**15,
            f"--max-categories must be in 0 … {2**15}; got {self.max_categories}",
        )
        for model, names in _BASELINE_OPTIONS.items():
            for name in names:
                require(
                    self.model == model or getattr(self, name) == getattr(BaselineConfig, name),
                    f"--{name.replace('_', '-')} goes with --model {model}; got --model "
                    f"{self.model}",
                )


_BASELINE_OPTIONS: Mapping[str, tuple[str, ...]] = {
    "logistic": ("passes", "l2"),
    "lightgbm": ("trees", "patience", "num_leaves", "max_categories"),
}
"""Those that one model alone takes."""


def read_table(text: str) -> TableConfig:
    """Return the entry that a flag means: ``cat_2,variant=qr,qr_collisions=16``.

    Raises:
        UserError: It is none.
    """
    name, *settings = text.split(",")
    values: dict[str, str] = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals or key in values:
            raise UserError(
                f"--tables {text}: expected a sparse feature's name and then key=value, each once, "
                "as in cat_2,variant=qr,qr_collisions=16"
            )
        values[key] = value
    _refuse_unknown_keys(values, TableConfig, Path("--tables"), prefix="")
    try:
        return complete(msgspec.convert({"name": name, **values}, TableConfig, strict=False))
    except msgspec.ValidationError as error:
        if isinstance(error.__cause__, UserError):
            raise error.__cause__ from None
        raise UserError(f"--tables {text}: {_told(error, TableConfig)}. Correct it.") from error


def table_text(table: TableConfig) -> str:
    """Return an entry as ``read_table`` reads it."""
    settings = [
        f"{each.name}={getattr(table, each.name)}"
        for each in dataclasses.fields(table)
        if each.name != "name" and getattr(table, each.name) != each.default
    ]
    return ",".join([table.name, *settings])


def write_config(path: Path, config: TrainConfig | BaselineConfig, dataset: Path) -> None:
    """Write the configuration of a run and its DATASET's place; ``dlrm train --config`` reads it.

    That of a baseline says so: ``kind`` is "baseline".
    """
    place = dataset.resolve()
    if place.is_relative_to(path.parent.resolve()):
        place = place.relative_to(path.parent.resolve())  # so that the folder can be moved
    content: Mapping[str, Any] = {
        "format_version": FORMAT_VERSION,
        **({"kind": "baseline"} if isinstance(config, BaselineConfig) else {}),
        "dataset": str(place),
        **msgspec.to_builtins(config),
    }
    with atomic_write(path) as file:
        tomli_w.dump(content, file)


def read_config(path: Path) -> tuple[TrainConfig, Path | None]:
    """Read a configuration file: defaults where it is silent.

    Returns:
        The configuration, and the DATASET it names, relative to the file's folder (None: none).

    Raises:
        UserError: The file is missing, not TOML, of another version or of a baseline, or has an
            unknown key or a wrong value.
    """
    config, dataset = _read_any_config(path)
    if isinstance(config, BaselineConfig):
        raise UserError(
            f"{path} is of a baseline ({config.model}), which has no checkpoint: dlrm compare and "
            "dlrm report take it, and nothing that needs a model does. Name a run that dlrm train "
            "made."
        )
    return config, dataset


def read_run_config(run: Path) -> tuple[TrainConfig, Path | None]:
    """Read a RUN's ``config.toml``; see ``read_config``.

    Raises:
        UserError: The folder is no RUN; or as of ``read_config``.
    """
    return read_config(_run_config_file(run))


def read_any_run_config(run: Path) -> tuple[TrainConfig | BaselineConfig, Path | None]:
    """Read the ``config.toml`` of a RUN, be it a DLRM's or a baseline's.

    Raises:
        UserError: As of ``read_run_config``, but for baselines.
    """
    return _read_any_config(_run_config_file(run))


def _run_config_file(run: Path) -> Path:
    path = run / "config.toml"
    if not run.exists():
        raise UserError(f"{run} does not exist. Check the path.")
    if not path.exists():
        raise UserError(
            f"{run} is not a run: config.toml is missing. Name a folder that dlrm train made."
        )
    return path


def _read_any_config(path: Path) -> tuple[TrainConfig | BaselineConfig, Path | None]:
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist. Check the path.") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as error:
        raise UserError(f"{path} cannot be read as TOML: {error}. Mend it.") from error
    check_version(str(content.pop("format_version", FORMAT_VERSION)), path)
    dataset = content.pop("dataset", "")
    if not isinstance(dataset, str):
        raise UserError(f"{path}: dataset must be the path of a DATASET; got {dataset!r}.")
    kind = content.pop("kind", "dlrm")
    if kind not in ("dlrm", "baseline"):
        raise UserError(f"{path}: kind must be 'dlrm' or 'baseline'; got {kind!r}.")
    place = path.parent / dataset if dataset else None
    if kind == "baseline":
        return _from_builtins(content, BaselineConfig, path), place
    return _from_builtins(content, TrainConfig, path), place


def _from_builtins(content: Mapping[str, Any], kind: type[T], source: Path) -> T:
    """Build a configuration from a file's keys and values; defaults where it is silent.

    Args:
        content: Keys as the dataclass's fields, tables for nested dataclasses.
        kind: The dataclass.
        source: The file, for messages.

    Raises:
        UserError: An unknown key, or a value of a wrong type or meaning.
    """
    _refuse_unknown_keys(content, kind, source, prefix="")
    try:
        return complete(msgspec.convert(content, kind))
    except msgspec.ValidationError as error:
        raise UserError(f"{source}: {_told(error, kind)}. Correct the value.") from error


def _told(error: msgspec.ValidationError, kind: Any) -> str:
    """Return what is wrong with a value, and where there are few the choices, which msgspec omits.

    Args:
        error: Its message ends in the value's place, as `$.model.tables[0].variant`.
        kind: The dataclass that is the root.
    """
    place = re.search(r"`\$\.([^`]*)`$", str(error))
    for name in re.findall(r"[a-z_]\w*", place[1] if place else ""):
        kind = typing.get_type_hints(kind)[name]
        if typing.get_origin(kind) is tuple:
            kind = typing.get_args(kind)[0]
    if typing.get_origin(kind) is not Literal:
        return str(error)
    return f"{error}; expected one of {', '.join(map(str, typing.get_args(kind)))}"


def complete(config: T) -> T:
    """Return an equal configuration that has its defaults written when it is encoded.

    Those of a dataclass that msgspec has decoded are only the class's, and are left out.
    """
    values: dict[str, Any] = {}
    for each in dataclasses.fields(typing.cast(Any, config)):
        value = getattr(config, each.name)
        if isinstance(value, tuple):
            value = tuple(complete(part) if _is_config(part) else part for part in value)
        values[each.name] = complete(value) if _is_config(value) else value
    return type(config)(**values)


def _is_config(value: Any) -> bool:
    return dataclasses.is_dataclass(value) and not isinstance(value, type)


def differences(one: Any, other: Any) -> list[str]:
    """Return the options, as flags, in which two configurations of a kind differ."""
    found = []
    for each in dataclasses.fields(one):
        value, theirs = getattr(one, each.name), getattr(other, each.name)
        if dataclasses.is_dataclass(value):
            found += differences(value, theirs)
        elif value != theirs:
            found.append(f"--{each.name.replace('_', '-')}")
    return found


def _refuse_unknown_keys(
    content: Mapping[str, Any], kind: type[Any], source: Path, prefix: str
) -> None:
    types = typing.get_type_hints(kind)
    for key, value in content.items():
        if key not in types:
            close = difflib.get_close_matches(key, types, 1)
            hint = f"did you mean {prefix}{close[0]}?" if close else f"known: {', '.join(types)}."
            for table, nested in types.items():
                if dataclasses.is_dataclass(nested) and key in typing.get_type_hints(nested):
                    hint = f"it belongs into the table [{table}]."
            raise UserError(f"{source} has an unknown key {prefix}{key}; {hint}")
        if dataclasses.is_dataclass(types[key]) and isinstance(value, Mapping):
            _refuse_unknown_keys(value, typing.cast(type[Any], types[key]), source, f"{key}.")
        if types[key] == tuple[TableConfig, ...] and isinstance(value, list):
            for entry in value:
                if isinstance(entry, Mapping):
                    _refuse_unknown_keys(entry, TableConfig, source, f"{key}.")
