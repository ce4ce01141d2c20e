"""The command line: one verb a stage, each parsing its options and calling one function.

Heavy imports wait until a verb runs, so that help is quick.
"""

from __future__ import annotations

import dataclasses
import difflib
import errno
import logging
import os
import signal
import sys
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, Literal, NoReturn, Protocol, TextIO

import msgspec
import tyro

from dlrm.config import (
    Amp,
    BaselineConfig,
    BenchPredictConfig,
    BenchPrepareConfig,
    BenchServeConfig,
    BenchTrainConfig,
    ConvertConfig,
    DeviceKind,
    GenerateConfig,
    InputFormat,
    OutputFormat,
    PrepareConfig,
    QuantizationConfig,
    ServeConfig,
    SynthesizeConfig,
    TableConfig,
    TrainConfig,
    differences,
    read_config,
    read_run_config,
    read_table,
    table_text,
)
from dlrm.errors import EnvironmentFaultError, StoppedBySignalError, UserError
from dlrm.schema import SPLITS, Split
from dlrm.version import __version__

logger = logging.getLogger("dlrm")


class Command(Protocol):
    """A verb with its options, ready to run."""

    def execute(self) -> None:
        """Do it: results go to standard output, messages to standard error."""


@dataclass(frozen=True)
class Synthesize:
    """Make Criteo-shaped data with a planted signal.

    DIRECTORY gets train.txt and test.txt in the Criteo Kaggle format, truth.json with the best
    metrics that any model can reach on them, and the true probability of every row.
    """

    directory: tyro.conf.Positional[Path]
    """The folder to make."""
    options: Annotated[SynthesizeConfig, tyro.conf.arg(name="")]

    def execute(self) -> None:
        """Make the data and print the truth."""
        from dlrm.data.synthetic import synthesize

        _print_json(synthesize(self.directory, self.options))


@dataclass(frozen=True)
class Generate:
    """Make a DATASET of made-up rows of any shape, to measure on without data.

    The reference's generators: any number and size of tables, one id or several a row, ids that are
    independent or that repeat as a real column's do. Labels are drawn too: there is nothing to
    learn (`dlrm synthesize` makes rows with something to learn). A DATASET of the same options that
    is there already is left as it is.
    """

    dataset: tyro.conf.Positional[Path]
    """The folder to make."""
    options: Annotated[GenerateConfig, tyro.conf.arg(name="")] = dataclasses.field(
        default_factory=GenerateConfig
    )
    overwrite: bool = False
    """Replace a DATASET that is there, of other options."""

    def execute(self) -> None:
        """Make the rows and print what they are."""
        from dlrm.data.generation import generate

        data = generate(self.dataset, self.options, overwrite=self.overwrite)
        _print_json(
            {
                "dataset": str(self.dataset),
                "rows": {split: data.rows(split) for split in SPLITS},
                "num_embeddings": sum(data.schema.num_embeddings),
                "fingerprint": data.schema.fingerprint,
            }
        )


@dataclass(frozen=True)
class StackDistances:
    """Write the stack distances of a DATASET's ids, from which `dlrm generate` draws others.

    How many distinct ids of a feature are accessed between two accesses to the same one tells how
    well caches work. FILES is a name in which a j alone stands for the place of the feature among
    --features, from 0: dist_emb_j.log. They are in the reference's format, without any row of the
    data, but with the ids that occur.
    """

    dataset: tyro.conf.Positional[Path]
    """What `dlrm prepare` or `dlrm generate` made."""
    files: tyro.conf.Positional[Path]
    """Where they go."""
    features: tuple[str, ...] = ()
    """The sparse features, by name, in the order of the tables to be generated; by default all."""
    split: Split = "train"
    """Which rows, in their stored order."""
    padding: bool = False
    """Count more new ids than there are, as many as an access at the largest distance has accesses
    on average: for columns in which few are new."""
    overwrite: bool = False
    """Replace files that are there."""

    def execute(self) -> None:
        """Measure and print where the files are."""
        from dlrm.data.stack_distance import write_stack_distances

        written = write_stack_distances(
            self.dataset,
            self.files,
            split=self.split,
            features=self.features,
            padding=self.padding,
            overwrite=self.overwrite,
        )
        _print_json({name: str(path) for name, path in written.items()})


@dataclass(frozen=True)
class Prepare:
    """Turn raw rows into a DATASET that training reads.

    Memory stays below a ceiling, whatever the size of SOURCE. Interrupted, the same command goes on
    where it stopped. A plan is told first: rows, disk, memory, time.

    Of a train.txt, the first 6 of 7 equal runs of rows ("days") become the training split; of
    day_0, day_1 … all but the last. Of the day held back, the first half becomes test and the
    second half validation.
    """

    source: tyro.conf.Positional[Path]
    """Criteo's train.txt or day_0, plain or compressed with gzip; a folder that holds train.txt, or
    day_0, day_1 …; "-" for standard input; or what the reference prepared. With --verify, the
    DATASET."""
    dataset: tyro.conf.Positional[Path | None] = None
    """The folder to make."""
    options: Annotated[PrepareConfig, tyro.conf.arg(name="")] = dataclasses.field(
        default_factory=PrepareConfig
    )
    memory: str = "2GiB"
    """The most memory to use: 1GiB, 1536MiB, 4GiB …"""
    overwrite: bool = False
    """Replace a DATASET that was made from another source or with other options."""
    verify: bool = False
    """Make nothing, but read all of a DATASET and check it: checksums, ids, counts."""

    def execute(self) -> None:
        """Prepare and print the splits, or verify."""
        from dlrm.data.dataset import Dataset
        from dlrm.data.prepare import prepare
        from dlrm.data.verification import verify

        if self.verify:
            others = (self.dataset, self.options, self.memory, self.overwrite)
            if others != (None, PrepareConfig(), Prepare.memory, False):
                raise UserError(
                    "--verify takes one DATASET, no other option, and makes nothing: dlrm prepare "
                    "--verify DATASET"
                )
            _print_json(verify(Dataset.open(self.source)))
            return
        if self.dataset is None:
            raise UserError("name the DATASET to make: dlrm prepare SOURCE DATASET")
        data = prepare(
            self.source, self.dataset, self.options, memory=self.memory, overwrite=self.overwrite
        )
        _print_json(
            {
                "dataset": str(self.dataset),
                "rows": {split: data.rows(split) for split in SPLITS},
                "rows_rejected": data.manifest.rows_rejected,
                "num_embeddings": sum(data.schema.num_embeddings),
                "fingerprint": data.schema.fingerprint,
            }
        )


@dataclass(frozen=True)
class Inspect:
    """Show what is in a DATASET.

    Its splits and days with their click rates; of each feature how often it is missing, the rows of
    its embedding table, and its commonest values.
    """

    dataset: tyro.conf.Positional[Path]
    """What `dlrm prepare` made."""
    json: bool = False
    """Print JSON instead of tables."""

    def execute(self) -> None:
        """Inspect and print."""
        from dlrm.data.inspection import describe, inspect

        inspection = inspect(self.dataset)
        if self.json:
            _print_json(inspection)
        else:
            sys.stdout.write(describe(inspection))


@dataclass(frozen=True)
class Train:
    """Train a model on a DATASET, and evaluate it.

    The best checkpoint is chosen on the validation split; test is looked at once, at the end. RUN
    gets config.toml, log.jsonl, checkpoints/, predictions/ and result.json, and mlperf.log and
    tensorboard/ if asked for. Interrupted, even by SIGKILL, `dlrm train --resume RUN` goes on, with
    the same result bit for bit.
    """

    dataset: tyro.conf.Positional[Path | None] = None
    """What `dlrm prepare` made. With --resume, where it is now if it was moved."""
    run: Path | None = None
    """The folder to make."""
    resume: Path | None = None
    """Go on with the interrupted training of this RUN, with the options it was begun with."""
    options: Annotated[TrainConfig, tyro.conf.arg(name="")] = dataclasses.field(
        default_factory=TrainConfig
    )
    config: Path | None = None
    """A TOML file with defaults for all that follows, such as another run's config.toml."""
    profile: Path | None = None
    """Write a trace of 30 steps, which Perfetto opens: a .json or .json.gz file, or a folder."""

    def execute(self) -> None:
        """Train and print the result."""
        from dlrm.runs import to_resume
        from dlrm.training.begin import resume, train, way_on
        from dlrm.training.events import Console

        if self.resume is not None:
            self._refuse_options_beside_resume(self.resume)
            with way_on(self.resume, to_resume(self.resume)):
                result = resume(self.resume, self.dataset, [Console()], profile=self.profile)
        elif self.dataset is None or self.run is None:
            raise UserError(
                "name the DATASET and the RUN to make: dlrm train DATASET --run RUN; or the RUN to "
                "go on with: dlrm train --resume RUN"
            )
        else:
            with way_on(self.run, to_resume(self.run)):
                result = train(
                    self.dataset, self.run, self.options, [Console()], profile=self.profile
                )
        _print_json(result)

    def _refuse_options_beside_resume(self, run: Path) -> None:
        """Refuse what would make it another training than the one that was begun."""
        given = ["--run"] * (self.run is not None) + ["--config"] * (self.config is not None)
        given += differences(self.options, read_run_config(run)[0])
        if given:
            raise UserError(
                f"--resume goes on with the options in {run / 'config.toml'}, so it does not take "
                f"{', '.join(given)}. Leave that away; or train a new run with --continue-from."
            )


@dataclass(frozen=True)
class Baseline:
    """Train a logistic regression or gradient-boosted trees on a DATASET, to compare with.

    On the same splits, with the metrics and predictions of `dlrm train`, so that `dlrm compare`
    and `dlrm report` show what a DLRM adds. The number of passes or trees is chosen on validation;
    test is looked at once. RUN appears when it is complete. The model itself is not kept.
    """

    dataset: tyro.conf.Positional[Path]
    """What `dlrm prepare` made."""
    run: Path
    """The folder to make."""
    options: Annotated[BaselineConfig, tyro.conf.arg(name="")]

    def execute(self) -> None:
        """Train and print the result."""
        from dlrm.baselines.training import train_baseline

        _print_json(train_baseline(self.dataset, self.run, self.options))


@dataclass(frozen=True)
class Run:
    """From raw rows to a trained, evaluated model and its predictions.

    Prepares SOURCE into a DATASET, trains and evaluates into RUN, where a test.txt lies beside
    train.txt, predicts it into RUN/submission.csv, and if asked to exports a BUNDLE. A plan is
    printed first. Interrupted, the same command goes on where it stopped.
    """

    source: tyro.conf.Positional[Path]
    """Criteo's train.txt, or a folder that holds it and maybe test.txt."""
    run: tyro.conf.Positional[Path]
    """The folder to make, or to go on with."""
    options: Annotated[TrainConfig, tyro.conf.arg(name="")]
    config: Path | None = None
    """A TOML file with defaults for all training options."""
    dataset: Path | None = None
    """Where the DATASET goes, or lies already; by default RUN/dataset."""
    shuffle: Literal["none", "day", "total", "reference", "reference-day"] = "total"
    """Stored order of the training rows, as for `dlrm prepare`."""
    split: Literal["auto", "days", "rows", "none"] = "auto"
    """What is held back from training, as for `dlrm prepare`."""
    export: Path | None = None
    """The BUNDLE to make at the end, as `dlrm export RUN BUNDLE` does."""

    def execute(self) -> None:
        """Run all stages, print what was made, and log what comes next."""
        from dlrm.pipeline import run_all

        prepare_config = PrepareConfig(
            shuffle=self.shuffle, split=self.split, seed=self.options.seed
        )
        made = run_all(
            self.source, self.run, prepare_config, self.options, self.dataset, self.export
        )
        _print_json(made.summary())
        sys.stdout.flush()
        logger.info("%s", made.next_steps())


@dataclass(frozen=True)
class Evaluate:
    """Print the metrics of a run's checkpoint on a split of its DATASET."""

    run: tyro.conf.Positional[Path]
    """What `dlrm train` made."""
    split: Split = "test"
    """Which split."""
    checkpoint: Literal["best", "newest"] = "best"
    """The best on validation, or the newest."""
    dataset: Path | None = None
    """Where the run's DATASET is now; by default where it was."""
    device: DeviceKind = "cpu"
    """Where to compute."""
    local_rank: int = 0
    """Which card of that kind."""
    amp: Amp | None = None
    """Mixed precision (see dlrm train); None: as in training."""
    evaluation_memory: str | None = None
    """The most memory that the metrics take (see dlrm train); None: as in training."""
    decision_threshold: float | None = None
    """Of precision, recall and F1 (see dlrm train); None: as in training."""
    quantize_mlp_with_bit: Literal[8, 16, 32] = 32
    """Of the layers' weights. 8: integers; 16: bfloat16; 32: as in training."""
    quantize_emb_with_bit: Literal[4, 8, 32] = 32
    """Of the embedding tables: integers with a scale and a bias a row; 32: as in training."""

    def execute(self) -> None:
        """Evaluate and print the metrics."""
        from dlrm.evaluation import evaluate

        result = evaluate(
            self.run,
            self.split,
            checkpoint=self.checkpoint,
            dataset=self.dataset,
            device=self.device,
            local_rank=self.local_rank,
            amp=self.amp,
            evaluation_memory=self.evaluation_memory,
            decision_threshold=self.decision_threshold,
            quantization=QuantizationConfig(self.quantize_mlp_with_bit, self.quantize_emb_with_bit),
        )
        _print_json(
            {
                "split": self.split,
                "checkpoint": self.checkpoint,
                **dataclasses.asdict(result.metrics),
                "unknown_ids": result.unknown_ids,
                **({"quantization": result.quantization} if result.quantization else {}),
            }
        )


@dataclass(frozen=True)
class Compare:
    """Tell whether runs differ beyond noise, from their predictions of the same rows.

    `dlrm compare A B` compares two runs, and with more the first with each of the others; `dlrm
    compare A1 A2 A3 --against B1 B2 B3` compares two recipes of which several seeds were trained.
    Differences "on these rows" are of these very models. The verdict is about recipes: whether the
    difference is beyond what another seed would give; it takes three seeds of each or more, or
    --seed-noise. Beside it, what differs in the configurations, and the loss curves.
    """

    runs: Annotated[tyro.conf.Positional[tuple[Path, ...]], tyro.conf.arg(metavar="RUN…")] = ()
    """What `dlrm train` made."""
    against: tuple[Path, ...] = ()
    """Runs of another recipe; RUNS are then seeds of one recipe."""
    split: Literal["validation", "test"] = "test"
    """Whose predictions to compare."""
    seed_noise: float | None = None
    """Standard deviation of the AUC over seeds of a recipe, where it is known."""
    seed_noise_log_loss: float | None = None
    """The same of the log loss."""
    same_rows: bool = False
    """The runs' DATASETs were prepared differently from the same rows in the same order."""
    json: bool = False
    """Print JSON, with all steps of the loss curves, instead of tables."""

    def execute(self) -> None:
        """Compare and print."""
        from dlrm.comparison import compare, describe

        comparison = compare(
            self.runs,
            self.against,
            split=self.split,
            seed_noise=self.seed_noise,
            seed_noise_log_loss=self.seed_noise_log_loss,
            same_rows=self.same_rows,
        )
        if self.json:
            _print_json(comparison)
        else:
            sys.stdout.write(describe(comparison))


@dataclass(frozen=True)
class MlperfCheck:
    """Check an MLPerf log with MLCommons' own checker, and explain what it finds.

    The exit status is 0 if the log follows the ruleset, else 2.
    """

    log: tyro.conf.Positional[Path]
    """What `dlrm train --mlperf-logging` wrote, RUN/mlperf.log; or the RUN."""
    ruleset: str = ""
    """The version of the rules, such as 1.0.0; by default the newest that has the benchmark."""
    json: bool = False
    """Print JSON instead of text."""

    def execute(self) -> None:
        """Check and print."""
        from dlrm.mlperf_check import check, describe

        log = self.log / "mlperf.log" if self.log.is_dir() else self.log
        compliance = check(log, self.ruleset)
        if self.json:
            _print_json(compliance)
        else:
            sys.stdout.write(describe(compliance))
        if not compliance.compliant:
            sys.stdout.flush()
            raise UserError(
                f"{log} does not follow ruleset {compliance.ruleset}: see above what is wrong."
            )


@dataclass(frozen=True)
class Predict:
    """Predict the click probability of raw rows.

    INPUT holds Criteo rows with or without a label, plain or compressed with gzip; or is a CSV file
    whose header names the features, or a Parquet file with a column for each, and maybe the label.
    OUTPUT becomes a CSV file "Id,Predicted", for Criteo's test.txt a valid Kaggle submission,
    compressed if its name ends in .gz; or if its name says so, a .parquet or .arrow file. Either
    may be "-", standard input or output. Interrupted, the same command goes on where it stopped,
    but not with a pipe.
    """

    model: tyro.conf.Positional[Path]
    """A BUNDLE or a RUN; the DATASET is not needed."""
    input: tyro.conf.Positional[Path]
    """Raw rows."""
    output: tyro.conf.Positional[Path]
    """The file to write. With "-" the summary goes to standard error."""
    input_format: InputFormat = "auto"
    """Of INPUT; auto: as its content, or else its name, tells."""
    output_format: OutputFormat = "auto"
    """Of OUTPUT; auto: as its name tells, else CSV."""
    first_id: int | None = None
    """Id of the first row; by default 60000000 for Criteo rows without a label, else 0."""
    overwrite: bool = False
    """Replace OUTPUT if it is there already, and begin anew if another prediction of it was
    interrupted."""
    checkpoint: Literal["best", "newest"] = "best"
    """The best on validation, or the newest."""
    device: DeviceKind = "cpu"
    """Where to compute."""
    local_rank: int = 0
    """Which card of that kind."""
    amp: Amp | None = None
    """Mixed precision (see dlrm train); None: as in training."""
    quantize_mlp_with_bit: Literal[8, 16, 32] = 32
    """Of the layers' weights. 8: integers; 16: bfloat16; 32: as in training."""
    quantize_emb_with_bit: Literal[4, 8, 32] = 32
    """Of the embedding tables: integers with a scale and a bias a row; 32: as in training."""

    def execute(self) -> None:
        """Predict and print a summary."""
        from dlrm.predicting.files import predict_file
        from dlrm.prediction import load

        predictor = load(
            self.model,
            checkpoint=self.checkpoint,
            device=self.device,
            local_rank=self.local_rank,
            amp=self.amp,
            quantization=QuantizationConfig(self.quantize_mlp_with_bit, self.quantize_emb_with_bit),
        )
        summary = predict_file(
            predictor,
            self.input,
            self.output,
            input_format=self.input_format,
            output_format=self.output_format,
            first_id=self.first_id,
            overwrite=self.overwrite,
        )
        _print_json(summary, sys.stderr if self.output == Path("-") else sys.stdout)


@dataclass(frozen=True)
class Export:
    """Write a run's model as a BUNDLE: a folder that scores raw rows, here and elsewhere.

    With dlrm installed it needs nothing else: schema, vocabularies, weights and examples are in it,
    with checksums. A model file of plain operators is for other programs, which give it dense
    features after their transform, and ids of all rows' bags with their offsets. BUNDLE appears
    when both give the model's probabilities, on rows of the run's DATASET or made-up ones.
    """

    run: tyro.conf.Positional[Path]
    """What `dlrm train` made."""
    bundle: tyro.conf.Positional[Path]
    """The folder to make."""
    format: Literal["torch", "onnx"] = "torch"
    """The model file. torch: model.pt2, for torch.export.load; onnx: model.onnx."""
    checkpoint: Literal["best", "newest"] = "best"
    """The best on validation, or the newest."""
    one_id: bool = False
    """The model file takes one id a feature, a matrix, -1 for none, instead of bags of any
    length."""
    quantize: Literal["none", "int8", "int4"] = "none"
    """Of the embedding tables: integers, with a scale and a bias a row."""
    compile: bool = False
    """With --format torch, also write compiled.pt2: compiled by AOTInductor for processors like
    this one. It takes a C++ compiler."""
    dataset: Path | None = None
    """Where the run's DATASET is now; by default where it was."""

    def execute(self) -> None:
        """Export and print what was written, and the largest differences."""
        from dlrm.bundle.export import export

        _print_json(
            export(
                self.run,
                self.bundle,
                format=self.format,
                checkpoint=self.checkpoint,
                one_id=self.one_id,
                quantize=self.quantize,
                compile=self.compile,
                dataset=self.dataset,
            )
        )


@dataclass(frozen=True)
class Serve:
    """Serve a model over HTTP and gRPC, by the Open Inference Protocol.

    Raw or prepared rows in, click probabilities out; /metrics for Prometheus. When requests are
    first answered, the addresses are printed. SIGHUP loads the model anew, and SIGTERM ends the
    server when all that was accepted is answered. It takes three packages more: pip install
    'dlrm[serve]'.
    """

    model: tyro.conf.Positional[Path]
    """A BUNDLE or RUN; or a symbolic link to it, which may lead elsewhere at a SIGHUP."""
    options: Annotated[ServeConfig, tyro.conf.arg(name="")] = dataclasses.field(
        default_factory=ServeConfig
    )

    def execute(self) -> None:
        """Serve until a signal comes."""
        try:
            from dlrm.serve.supervisor import serve
        except ImportError as error:
            raise UserError(
                f"dlrm serve takes packages that are not installed ({error}): pip install "
                "'dlrm[serve]'"
            ) from error

        serve(self.model, self.options)


@dataclass(frozen=True)
class Report:
    """Write one HTML page about a run, of a DLRM or a baseline, that any browser shows offline.

    Summary, the table of published results with this run in it, learning curves, ROC and
    precision-recall curves, calibration, the importance of features, time and memory,
    configuration.
    """

    run: tyro.conf.Positional[Path]
    """What `dlrm train`, `dlrm run` or `dlrm baseline` made."""
    compare: tuple[Path, ...] = ()
    """Other runs on the same DATASET to show beside it."""
    output: Path | None = None
    """The file to write; by default RUN/report.html."""
    dataset: Path | None = None
    """Where the run's DATASET is now; by default where it was. Without it the importance of
    features is left out."""
    truth: Path | None = None
    """The truth.json of made-up data; by default the DATASET's, if it was made from such."""
    importance_rows: int = 10_000
    """Measure the importance of features on so many rows of the test split; 0: do not."""

    def execute(self) -> None:
        """Write the page and print where it is."""
        from dlrm.report.page import write_report

        path = write_report(
            self.run,
            self.output,
            compare=self.compare,
            dataset=self.dataset,
            truth=self.truth,
            importance_rows=self.importance_rows,
        )
        _print_json({"report": str(path)})


@dataclass(frozen=True)
class Visualize:
    """Write one HTML page of pictures of a run's embeddings.

    Of each feature a map in which values that the model takes alike lie together, coloured by click
    rate; the lengths of vectors over how often their values occur; and how alike features are. It
    takes the run's DATASET, and scikit-learn (pip install 'dlrm[baselines]').
    """

    run: tyro.conf.Positional[Path]
    """What `dlrm train` or `dlrm run` made."""
    features: tuple[str, ...] = ()
    """The sparse features to show; by default a table of all, and maps of the 4 whose vectors tell
    most of click rates."""
    values: int = 2000
    """Show so many values of each, the commonest in the training rows."""
    checkpoint: Literal["best", "newest"] = "best"
    """The best on validation, or the newest."""
    output: Path | None = None
    """The file to write; by default RUN/embeddings.html."""
    dataset: Path | None = None
    """Where the run's DATASET is now; by default where it was."""

    def execute(self) -> None:
        """Write the page and print where it is."""
        from dlrm.report.embeddings import visualize

        path = visualize(
            self.run,
            self.output,
            features=self.features,
            values=self.values,
            checkpoint=self.checkpoint,
            dataset=self.dataset,
        )
        _print_json({"embeddings": str(path)})


@dataclass(frozen=True)
class BenchTrain:
    """Measure training beside the time that its matrix multiplications alone take, the floor.

    On made-up rows in a folder for temporary files. Floor, steps on rows in memory, and training
    from disk are measured in turn, on rows that are never repeated.
    """

    options: Annotated[BenchTrainConfig, tyro.conf.arg(name="")]
    json: bool = False
    """Print JSON instead of a table."""

    def execute(self) -> None:
        """Measure and print."""
        from dlrm.bench import bench_train

        result = bench_train(self.options)
        if self.json:
            _print_json(result)
        else:
            sys.stdout.write(result.table())


@dataclass(frozen=True)
class BenchPrepare:
    """Measure preparation of made-up rows, its memory and disk, beside what the machine can do.

    Beside it, in turn: polars.read_csv of the same file, which neither checks rows nor writes
    anything, where polars is installed (pip install polars); and the rate at which the disk takes a
    gigabyte. All in a folder for temporary files.
    """

    options: Annotated[BenchPrepareConfig, tyro.conf.arg(name="")] = dataclasses.field(
        default_factory=BenchPrepareConfig
    )
    json: bool = False
    """Print JSON instead of a table."""

    def execute(self) -> None:
        """Measure and print."""
        from dlrm.bench_prepare import bench_prepare

        result = bench_prepare(self.options)
        if self.json:
            _print_json(result)
        else:
            sys.stdout.write(result.table())


@dataclass(frozen=True)
class BenchServe:
    """Measure how long a server's answers take over the load that is offered to it.

    Starts `dlrm serve MODEL`, or goes to one that runs (--url). First the server is saturated,
    which is MLPerf's Offline scenario; then requests come at random times that wait for no answer,
    at rising rates, its Server scenario; then the highest rate within each limit is searched for,
    and confirmed by a longer run. Latency counts from the time a request was due.
    """

    model: tyro.conf.Positional[Path]
    """The BUNDLE or RUN that is served; requests are made of its vocabularies."""
    options: Annotated[BenchServeConfig, tyro.conf.arg(name="")] = dataclasses.field(
        default_factory=BenchServeConfig
    )
    dataset: Path | None = None
    """The DATASET whose test rows are asked for; by default rows are made up of the values in the
    model's vocabularies."""
    json: bool = False
    """Print JSON instead of a table."""
    picture: Path | None = None
    """Draw latency over load into this file, a .svg, .png or .pdf."""

    def execute(self) -> None:
        """Measure and print."""
        from dlrm.loadtest.bench import bench_serve
        from dlrm.loadtest.picture import draw_latency, refuse_format

        if self.picture is not None:
            refuse_format(self.picture)
        result = bench_serve(self.model, self.options, self.dataset)
        if self.picture is not None:
            draw_latency(result, self.picture)
        if self.json:
            _print_json(result)
        else:
            sys.stdout.write(result.table())


@dataclass(frozen=True)
class BenchPredict:
    """Measure prediction beside its ceilings: preparation of rows alone, and scoring alone.

    From INPUT, which the system caches, into a file in a folder for temporary files. Preparation is
    parsing and encoding; scoring takes encoded rows that lie in memory. All use all cores, and are
    measured in turn.
    """

    model: tyro.conf.Positional[Path]
    """A BUNDLE or a RUN."""
    input: tyro.conf.Positional[Path]
    """Raw rows, as `dlrm predict` takes them."""
    options: Annotated[BenchPredictConfig, tyro.conf.arg(name="")] = dataclasses.field(
        default_factory=BenchPredictConfig
    )
    json: bool = False
    """Print JSON instead of a table."""

    def execute(self) -> None:
        """Measure and print."""
        from dlrm.bench_predict import bench_predict

        result = bench_predict(self.model, self.input, self.options)
        if self.json:
            _print_json(result)
        else:
            sys.stdout.write(result.table())


@dataclass(frozen=True)
class Convert:
    """Turn the reference implementation's .pt into a RUN, or a RUN into such a .pt.

    `dlrm convert MODEL.pt RUN --data DATASET` makes a RUN that dlrm evaluate and predict take,
    and whose newest checkpoint dlrm train --continue-from goes on from; the architecture is
    read off the file. `dlrm convert RUN MODEL.pt` writes a file that the reference's --load-model
    reads. Both keep weights, optimizer state and position.
    """

    source: tyro.conf.Positional[Path]
    """What --save-model wrote; or a RUN."""
    target: tyro.conf.Positional[Path]
    """The RUN to make; or the .pt to write."""
    options: Annotated[ConvertConfig, tyro.conf.arg(name="")]
    data: Path | None = None
    """Of a .pt, the DATASET of the rows that it was trained on, or the .npz that the reference
    prepared of them."""
    checkpoint: Literal["best", "newest"] = "best"
    """Of a RUN, which checkpoint: the best on validation, or the newest."""
    overwrite: bool = False
    """Replace a .pt that is there. (A RUN never is replaced.)"""

    def execute(self) -> None:
        """Convert and print what there was."""
        from dlrm.reference.conversion import export_checkpoint, import_checkpoint

        if self.source.is_dir():
            if self.data is not None or self.options != ConvertConfig():
                raise UserError(
                    f"{self.source} is a folder, so a RUN becomes a .pt, and a RUN tells of itself "
                    "what --data, --qr-operation, --max-ind-range and the loss say. Leave them "
                    "away."
                )
            _print_json(
                export_checkpoint(
                    self.source, self.target, self.checkpoint, overwrite=self.overwrite
                )
            )
            return
        if self.checkpoint != "best" or self.overwrite:
            raise UserError(
                f"{self.source} is no folder, so a .pt becomes a RUN, which is never replaced: "
                "--checkpoint and --overwrite are of the other way. Leave them away."
            )
        if self.data is None:
            raise UserError(
                f"name the DATASET that {self.source} was trained on with --data, or the .npz "
                "that the reference prepared: a .pt does not tell its features"
            )
        _print_json(import_checkpoint(self.source, self.target, self.data, self.options))


@dataclass(frozen=True)
class Reference:
    """Take the reference implementation's command line, verbatim."""

    arguments: tuple[str, ...]
    """Flags of dlrm_s_pytorch.py."""

    def execute(self) -> None:
        """Print the commands that the flags mean here, then run them."""
        from dlrm import reference

        reference.main(self.arguments)


_VERBS: dict[str, tuple[type[Any], str]] = {
    "synthesize": (Synthesize, "make Criteo-shaped data with a known best possible AUC"),
    "generate": (Generate, "make a DATASET of random rows, to measure on"),
    "prepare": (Prepare, "turn raw rows into a DATASET"),
    "inspect": (Inspect, "show what is in a DATASET"),
    "stack-distances": (StackDistances, "write how a DATASET's ids repeat, for generate"),
    "train": (Train, "train a model on a DATASET, and evaluate it"),
    "baseline": (Baseline, "train a logistic regression or trees to compare with"),
    "run": (Run, "prepare, train, evaluate and predict in one go"),
    "evaluate": (Evaluate, "print a run's metrics on a split"),
    "compare": (Compare, "tell whether runs differ beyond noise"),
    "mlperf-check": (MlperfCheck, "check an MLPerf log against MLPerf's rules"),
    "predict": (Predict, "predict the click probability of raw rows"),
    "export": (Export, "write a run's model as a BUNDLE, to use anywhere"),
    "serve": (Serve, "serve a model over HTTP and gRPC"),
    "report": (Report, "write one HTML page about a run"),
    "visualize": (Visualize, "write one HTML page of pictures of a run's embeddings"),
    "bench": (BenchTrain, "measure a stage or a server: `dlrm bench train`"),
    "convert": (Convert, "the reference's .pt to a RUN, and back"),
    "reference": (Reference, "take dlrm_s_pytorch.py's flags, verbatim"),
}


_BENCHES: dict[str, tuple[type[Any], str]] = {
    "train": (BenchTrain, "training beside its matrix multiplications"),
    "prepare": (BenchPrepare, "preparation beside polars and the disk"),
    "predict": (BenchPredict, "prediction beside preparation and scoring alone"),
    "serve": (BenchServe, "a server's latency over the load offered to it"),
}


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run one command and exit.

    The exit status is 0 when done, 1 for a bug, 2 for wrong input or options, 3 when the disk,
    memory or a device fails, 130 or 143 when stopped by SIGINT or SIGTERM.
    """
    # Some libraries swallow the exception that a signal becomes while they are imported, so until
    # that is done a signal ends the process as the system does, with the same status for a shell.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    _log_to_standard_error()
    try:
        command = parse(sys.argv[1:] if arguments is None else arguments)
        from dlrm.device import memory_faults, use_available_cores

        use_available_cores()
        signal.signal(signal.SIGINT, _stop)
        signal.signal(signal.SIGTERM, _stop)
        with memory_faults("go on"):
            command.execute()
        sys.stdout.flush()
    except StoppedBySignalError as error:
        _fail(128 + error.number, error)
    except UserError as error:
        _fail(2, error)
    except EnvironmentFaultError as error:
        _fail(3, error)
    except MemoryError as error:
        _fail(3, f"memory ran out: {error}. Free some, or use smaller batches or fewer rows.")
    except BrokenPipeError:
        # Who read our output has gone; leave nothing for the interpreter's own flush to trip over.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        _fail(3, f"cannot write to standard output: {error.strerror}. Free some space.")
    sys.exit(0)


def parse(arguments: Sequence[str]) -> Command:
    """Parse a command line without running it.

    Args:
        arguments: Everything after ``dlrm``.

    Raises:
        UserError: No such verb, or a configuration file is wrong.
        SystemExit: Help was asked for (0), or an option is wrong (2).
    """
    if not arguments or arguments[0] in ("-h", "--help"):
        sys.stdout.write(_overview())
        sys.exit(0 if arguments else 2)
    verb, *rest = arguments
    if verb == "--version":
        sys.stdout.write(f"dlrm {__version__}\n")
        sys.exit(0)
    if verb not in _VERBS:
        close = difflib.get_close_matches(verb, _VERBS, 1)
        hint = f" Did you mean {close[0]}?" if close else ""
        raise UserError(f"there is no command {verb!r}.{hint} Commands: {', '.join(_VERBS)}.")
    if verb == "reference":
        return Reference(tuple(rest))
    kind = _VERBS[verb][0]
    if verb == "bench":
        stage, *rest = rest or [""]
        if stage in ("-h", "--help"):
            sys.stdout.write(_bench_overview())
            sys.exit(0)
        if stage not in _BENCHES:
            raise UserError(
                f"`dlrm bench` measures one stage, {' or '.join(_BENCHES)}; got {stage!r}."
            )
        kind, verb = _BENCHES[stage][0], f"bench {stage}"
    command: Command = tyro.cli(
        kind,
        prog=f"dlrm {verb}",
        args=rest,
        default=kind(**_defaults(kind, rest)),
        config=(tyro.conf.OmitArgPrefixes, tyro.conf.PositionalMetavarFromFieldName),
        registry=_registry,
    )
    return command


_registry = tyro.constructors.ConstructorRegistry()


@_registry.primitive_rule
def _tables(
    kind: tyro.constructors.PrimitiveTypeInfo,
) -> tyro.constructors.PrimitiveConstructorSpec[tuple[TableConfig, ...]] | None:
    """Read the entries of tables, each one argument."""
    if kind.type != tuple[TableConfig, ...]:
        return None
    return tyro.constructors.PrimitiveConstructorSpec(
        nargs="*",
        metavar="NAME,KEY=VALUE…",
        instance_from_str=lambda arguments: tuple(map(read_table, arguments)),
        is_instance=lambda value: isinstance(value, tuple),
        str_from_instance=lambda tables: [table_text(table) for table in tables],
    )


def _defaults(kind: type[Any], arguments: Sequence[str]) -> dict[str, Any]:
    """Return what a verb's fields are before its flags are read: defaults, then ``--config``."""
    values: dict[str, Any] = {}
    for field in dataclasses.fields(kind):
        if field.name == "options":
            values["options"] = typing.get_type_hints(kind)["options"]()
        elif field.default is not dataclasses.MISSING:
            values[field.name] = field.default
        else:
            values[field.name] = tyro.MISSING
    if file := _value_of("--config", arguments) if "config" in values else None:
        values["options"], dataset = read_config(Path(file))
        if dataset and "source" not in values:
            values["dataset"] = dataset
    elif run := _value_of("--resume", arguments) if "resume" in values else None:
        # Its options, so that those given beside it that differ are found.
        values["options"], _ = read_run_config(Path(run))
    return values


def _value_of(option: str, arguments: Sequence[str]) -> str | None:
    """Return the last value that an option is given."""
    found = None
    for index, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        if name == option:
            found = value if equals else "".join(arguments[index + 1 : index + 2])
    return found


def _overview() -> str:
    verbs = "\n".join(f"  {verb:<15} {text}" for verb, (_, text) in _VERBS.items())
    return (
        "usage: dlrm COMMAND [OPTIONS]\n\n"
        "DLRM for PyTorch: from raw click logs to a trained, evaluated model.\n\n"
        f"{verbs}\n\n"
        "`dlrm COMMAND --help` tells a command's options; `dlrm --version` the version.\n\n"
        "A first run on made-up data:\n"
        "  dlrm synthesize data --rows 100000\n"
        "  dlrm run data my-run\n"
    )


def _bench_overview() -> str:
    stages = "\n".join(f"  {stage:<15} {text}" for stage, (_, text) in _BENCHES.items())
    return (
        "usage: dlrm bench STAGE [OPTIONS]\n\n"
        f"Measure a stage:\n{stages}\n\n"
        "`dlrm bench STAGE --help` tells its options.\n"
    )


def _print_json(value: Any, file: TextIO | None = None) -> None:
    (file or sys.stdout).write(
        msgspec.json.format(msgspec.json.encode(value), indent=2).decode() + "\n"
    )


def _log_to_standard_error() -> None:
    if logger.handlers:
        return
    handler = _Handler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)


class _Handler(logging.Handler):
    """Writes messages to standard error without tearing a progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm

        level = "" if record.levelno < logging.WARNING else f"{record.levelname.lower()}: "
        tqdm.write(f"{level}{self.format(record)}", file=sys.stderr)


def _stop(number: int, frame: FrameType | None) -> NoReturn:
    # As an exception, so that temporary files go.
    _fail(128 + number, f"stopped by {signal.Signals(number).name}")


def _fail(status: int, message: object) -> NoReturn:
    sys.stderr.write(f"dlrm: error: {message}\n")
    sys.exit(status)
