"""From the reference's flags to our configuration, and to the commands that say the same."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import re
import shlex
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from dlrm.config import (
    GenerateConfig,
    PrepareConfig,
    QuantizationConfig,
    Shuffle,
    TrainConfig,
    read_run_config,
)
from dlrm.errors import UserError
from dlrm.reference.flags import FLAGS, read_flags

E = TypeVar("E", bound=Exception)
T = TypeVar("T")

_PROCESSED_NAMES = {  # in the raw file's folder
    "kaggle": "kaggleAdDisplayChallenge_processed.npz",
    "terabyte": "terabyte_processed.npz",
}
_SHUFFLES: Mapping[str, Shuffle] = {"none": "none", "day": "reference-day", "total": "reference"}
# Said even where they are the defaults, so that a command can be read without knowing those.
_ESSENTIAL = (
    "shuffle",
    "embedding_dim",
    "dense_arch_layer_sizes",
    "over_arch_layer_sizes",
    "interaction",
    "loss",
    "optimizer",
    "learning_rate",
    "epochs",
    "mini_batch_size",
    "seed",
)


@dataclass(frozen=True)
class Request:
    """What a command line of the reference asks for, in our terms."""

    prepare: PrepareConfig | GenerateConfig
    """How the DATASET is prepared, or made up."""
    train: TrainConfig
    source: Path | None
    """Criteo's train.txt, or a .npz that the reference prepared; None: rows are made up."""
    dataset: Path
    """Where the DATASET lies or goes."""
    run: Path
    """Where the RUN goes."""
    load_model: Path | None
    """A .pt to start from; ``train.continue_from`` is what it is converted to."""
    save_model: Path | None
    """Where a .pt of the best test goes."""
    save_onnx: Path | None
    """The folder where the model goes as ONNX."""
    inference_only: bool
    quantization: QuantizationConfig
    """Of the model that inference tests."""
    mlperf_logging: bool
    print_time: bool
    print_wall_time: bool
    debug_mode: bool
    print_precision: int
    plot_compute_graph: bool
    """Into RUN/graph.dot."""
    profile: Path | None
    """Where a trace goes."""
    dense_features: int
    """The number that --arch-mlp-bot begins with."""
    notes: tuple[str, ...]
    """What a reader should know of flags that do not do what their names suggest."""

    def commands(self) -> list[str]:
        """Return the ``dlrm`` commands that do the same, ready for a shell."""
        dataset, run = str(self.dataset), str(self.run)
        verb = ["generate"] if self.source is None else ["prepare", str(self.source)]
        first = ["dlrm", *verb, dataset, *_options(self.prepare)]
        if self.inference_only:
            second = ["dlrm", "convert", str(self.load_model), run, "--data", dataset]
            second += _options(self.train.loss)
            if self.train.model.embedding_variant == "qr":
                joined = self.train.model.qr_operation
                second += _option("qr_operation", joined) if joined != "concat" else []
            second += _option("max_ind_range", self.train.max_ind_range, 0)
            third = ["dlrm", "evaluate", run, "--split", "test", "--checkpoint", "newest"]
            for field in ("device", "local_rank"):
                third += _option(field, getattr(self.train, field), getattr(TrainConfig, field))
            commands = [first, second, [*third, *_options(self.quantization)]]
        else:
            second = ["dlrm", "train", dataset, "--run", run, *_options(self.train)]
            second += ["--profile", str(self.profile)] if self.profile else []
            commands = [first, second]
        if self.save_onnx:
            commands.append(
                [
                    *("dlrm", "export", run, str(self.save_onnx)),
                    *("--format", "onnx", "--checkpoint", "newest"),
                ]
            )
        return [shlex.join(command) for command in commands]


def parse(arguments: Sequence[str]) -> Request:
    """Read a command line of the reference; nothing is written.

    Args:
        arguments: Everything after ``dlrm reference``.

    Raises:
        UserError: A flag is unknown or refused, or a value is wrong.
        SystemExit: Help was asked for (0).
    """
    values = read_flags(arguments)
    if values["use_gpu"] and values["use_npu"]:
        raise UserError("--use-gpu and --use-npu name two devices. Choose one.")
    if values["qr_flag"] and values["md_flag"]:
        raise UserError(
            "--qr-flag and --md-flag store the same tables in two ways. Choose one; in a file for "
            "dlrm train --config each table can have its own."
        )
    if values["inference_only"] and not values["load_model"]:
        raise UserError("--inference-only needs a model to test. Name one with --load-model.")

    idle = _idle(values)
    notes = _notes(values, idle)
    values = values | {key: FLAGS[key].default for key in idle}

    settings = _settings(values)
    if values["qr_flag"]:
        settings["qr_initial_values"] = "reference"
        if values["qr_operation"] == "concat":
            # The reference's is the length of each of the two vectors.
            settings["embedding_dim"] *= 2
    source: Path | None = None
    prepare: PrepareConfig | GenerateConfig
    try:
        if values["data_generation"] == "dataset":
            source, dataset = _data_paths(values)
            prepare = _preparation(values, settings, source)
            if values["memory_map"]:
                settings["initial_draws"] = "none"
            notes += _of_large_data(values, source)
        else:
            prepare = made_up = _generation(values, settings)
            dataset = _generated_path(made_up, values["run"])
            # All rows that are made up are used, and no permutation is drawn before the weights.
            settings["num_batches"] = 0
            settings["initial_draws"] = "none"
    except UserError as error:
        raise in_reference_terms(error) from error
    settings["report_checkpoint"] = "newest"
    settings["selection_split"] = "test"
    if settings["evaluation_batch_size"] < 0:
        settings["evaluation_batch_size"] = settings["mini_batch_size"]
    notes += _in_steps(settings)

    def training(run: Path) -> TrainConfig:
        initial = str(run / "initial.safetensors") if values["load_model"] else ""
        return _build(TrainConfig, {**settings, "continue_from": initial})

    try:
        if values["run"]:
            run = Path(values["run"])
        else:
            run = _free_run(None if values["inference_only"] else training, dataset)
        return Request(
            prepare=prepare,
            train=training(run),
            source=source,
            dataset=dataset,
            run=run,
            load_model=_optional_path(values["load_model"]),
            save_model=_optional_path(values["save_model"]),
            save_onnx=run / "bundle" if values["save_onnx"] else None,
            quantization=_build(QuantizationConfig, settings),
            inference_only=values["inference_only"],
            mlperf_logging=values["mlperf_logging"],
            print_time=values["print_time"],
            print_wall_time=values["print_wall_time"],
            debug_mode=values["debug_mode"],
            print_precision=values["print_precision"],
            plot_compute_graph=values["plot_compute_graph"],
            profile=run / "trace.json" if values["enable_profiling"] else None,
            dense_features=values["arch_mlp_bot"][0],
            notes=tuple(notes),
        )
    except UserError as error:
        raise in_reference_terms(error) from error


def _in_steps(settings: dict[str, Any]) -> list[str]:
    """Count in steps what the flags count in mini-batches; return notes of what does not fit."""
    notes, each = [], settings["accumulate_batches"]
    for field, name in (
        ("print_freq", "print-freq"),
        ("test_freq", "test-freq"),
        ("max_steps", "step"),
    ):
        batches = settings[field]
        if each > 1 and batches > 0:
            settings[field] = steps = math.ceil(batches / each)
            if batches % each:
                notes.append(
                    f"--{name}={batches} is taken as {steps * each}, whole steps of {each} "
                    "mini-batches (--mlperf-grad-accum-iter)"
                )
    return notes


def in_reference_terms(error: E) -> E:
    """Return an error about our options with the reference's names for them beside it."""
    names: dict[str, list[str]] = {}
    for flag in FLAGS.values():
        for option in (f"--{field.replace('_', '-')}" for field in flag.ours):
            if option != flag.name and re.search(rf"{option}(?![\w-])", str(error)):
                names.setdefault(option, []).append(flag.name)
    if not names:
        return error
    meant = ", ".join(f"{ours} is set by {' or '.join(them)}" for ours, them in names.items())
    return type(error)(f"{str(error).rstrip('.')}. Here {meant}.")


def _preparation(
    values: Mapping[str, Any], settings: Mapping[str, Any], source: Path
) -> PrepareConfig:
    chosen = {**settings, "shuffle": _SHUFFLES[values["data_randomize"]]}
    if values["memory_map"]:
        chosen["shuffle"] = values["data_randomize"]
    if source.suffix == ".bin" or source.name == "day":
        # Prepared, and in the order in which the reference reads them.
        chosen["shuffle"] = "total" if values["mlperf_bin_shuffle"] else "none"
    if source.suffix in (".npz", ".bin") or source.name == "day":
        # Its rows are chosen and its values numbered already: only ids can be taken modulo.
        chosen |= {"max_ind_range": 0, "data_sub_sample_rate": 0.0}
    return _build(PrepareConfig, chosen)


def _generation(values: Mapping[str, Any], settings: Mapping[str, Any]) -> GenerateConfig:
    acting = dict(settings)
    if values["data_generation"] != "synthetic":
        del acting["data_trace_file"]
    if values["num_batches"] > 0:
        del acting["data_size"]
    return _build(GenerateConfig, {**acting, "dense_features": values["arch_mlp_bot"][0]})


def _generated_path(config: GenerateConfig, run: str) -> Path:
    """Return where made-up rows go: beside the RUN, under a name that tells them from others."""
    content = hashlib.sha256(msgspec.json.encode(config)).hexdigest()
    folder = Path(run).parent if run else Path("runs")
    return folder / f"{config.data_generation}-{content[:12]}.dataset"


def _data_paths(values: Mapping[str, Any]) -> tuple[Path, Path]:
    """Return the source and the DATASET."""
    raw, processed = values["raw_data_file"], values["processed_data_file"]
    if not processed and not raw:
        raise UserError(
            "there are no data: name Criteo's train.txt with --raw-data-file, or a finished .npz "
            "of the reference with --processed-data-file, or make rows up with "
            "--data-generation=random."
        )
    usual = _PROCESSED_NAMES[values["data_set"]]
    finished = Path(processed) if processed else Path(raw).with_name(usual)
    if finished.suffix != ".npz":
        raise UserError(f"--processed-data-file must end in .npz; got {finished}.")
    dataset = finished.with_suffix(".dataset")
    numbers = finished.with_name(f"{finished.stem}_train.bin")
    if values["mlperf_bin_loader"] and numbers.exists():
        return numbers, dataset
    if finished.exists():
        return finished, dataset
    if not raw:
        raise UserError(
            f"{finished} does not exist. Check --processed-data-file, or name Criteo's train.txt "
            "with --raw-data-file to prepare it from."
        )
    return _days(Path(raw)) if values["data_set"] == "terabyte" else Path(raw), dataset


def _days(beginning: Path) -> Path:
    """Return the source that a file a day means, whose names begin so."""
    if beginning.name != "day":
        raise UserError(
            f"--raw-data-file: with --data-set=terabyte it is expected to end in /day, which the "
            f"names day_0, day_1 … of the files begin with; got {beginning}. Rename them."
        )
    folder = beginning.parent
    is_raw = any(re.fullmatch(r"day_[0-9]+(\.gz)?", path.name) for path in folder.glob("day_*"))
    return beginning if not is_raw and any(folder.glob("day_*_reordered.npz")) else folder


def _free_run(training: Callable[[Path], TrainConfig] | None, dataset: Path) -> Path:
    """Return the RUN to make: the newest, if it is just this training and was interrupted."""
    newest, number = None, 1
    while (run := Path("runs") / f"reference-{number:03d}").exists():
        newest, number = run, number + 1
    if newest and training and _is_interrupted(newest, training(newest), dataset):
        return newest
    return run


def _is_interrupted(run: Path, config: TrainConfig, dataset: Path) -> bool:
    # A model that was only imported has no log.
    if (run / "result.json").exists() or not (run / "log.jsonl").exists():
        return False
    try:
        begun, place = read_run_config(run)
    except UserError:
        return False
    return begun == config and place is not None and place.resolve() == dataset.resolve()


def _optional_path(text: str) -> Path | None:
    return Path(text) if text else None


def _settings(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return values by our fields' names."""
    settings = {}
    for key, value in values.items():
        flag = FLAGS[key]
        for field in flag.ours:
            if (ours := flag.convert(value)) is not None:
                settings[field] = ours
    return settings


def _build(kind: type[T], settings: Mapping[str, Any]) -> T:
    """Build a dataclass, and those nested in it, from the settings that it has fields for."""
    types = typing.get_type_hints(kind)
    chosen = {}
    for name, field_type in types.items():
        if dataclasses.is_dataclass(field_type):
            chosen[name] = _build(typing.cast(type[Any], field_type), settings)
        elif name in settings:
            chosen[name] = settings[name]
    return kind(**chosen)


_OF_FILES = (
    "data_set",
    "memory_map",
    "raw_data_file",
    "processed_data_file",
    "data_randomize",
    "max_ind_range",
    "data_sub_sample_rate",
    "dataset_multiprocessing",
)
_OF_GAUSSIAN = tuple(f"rand_data_{name}" for name in ("min", "max", "mu", "sigma"))
_OF_TRACES = ("data_trace_file", "data_trace_enable_padding")
_OF_MADE_UP_ROWS = (
    "arch_embedding_size",
    "num_indices_per_lookup",
    "num_indices_per_lookup_fixed",
)


def _idle(values: Mapping[str, Any]) -> dict[str, str]:
    """Return the flags that were given and have no effect beside the others, and why."""
    kind, distribution = values["data_generation"], values["rand_data_dist"]
    is_gaussian = (kind, distribution) == ("random", "gaussian")
    no_effect = {
        **dict.fromkeys(_OF_FILES, (kind != "dataset", "on made-up rows")),
        **dict.fromkeys(_OF_MADE_UP_ROWS, (kind == "dataset", "with --data-generation=dataset")),
        "data_size": (
            kind == "dataset" or values["num_batches"] > 0,
            "with --data-generation=dataset" if kind == "dataset" else "beside --num-batches",
        ),
        **dict.fromkeys(_OF_TRACES, (kind != "synthetic", "without --data-generation=synthetic")),
        "rand_data_dist": (kind != "random", "without --data-generation=random"),
        **dict.fromkeys(_OF_GAUSSIAN, (not is_gaussian, "without --rand-data-dist=gaussian")),
        "loss_weights": (values["loss_function"] != "wbce", "without --loss-function=wbce"),
        "arch_interaction_itself": (
            values["arch_interaction_op"] != "dot",
            "without --arch-interaction-op=dot",
        ),
        **{
            f"{variant}_{name}": (not values[f"{variant}_flag"], f"without --{variant}-flag")
            for variant, names in {
                "qr": ("threshold", "operation", "collisions"),
                "md": ("threshold", "temperature", "round_dims"),
            }.items()
            for name in names
        },
        **dict.fromkeys(
            ("mlperf_bin_loader", "mlperf_bin_shuffle"),
            (
                not (
                    values["memory_map"]
                    and values["mlperf_logging"]
                    and values["data_set"] == "terabyte"
                ),
                "without --memory-map, --mlperf-logging and --data-set=terabyte",
            ),
        ),
        "mlperf_grad_accum_iter": (not values["mlperf_logging"], "without --mlperf-logging"),
        **dict.fromkeys(
            ("mlperf_acc_threshold", "mlperf_auc_threshold"),
            (
                not values["mlperf_logging"] or values["test_freq"] <= 0,
                "without --mlperf-logging and --test-freq",
            ),
        ),
        "print_precision": (not values["debug_mode"], "without --debug-mode"),
        "lr_decay_start_step": (values["lr_num_decay_steps"] == 0, "without --lr-num-decay-steps"),
        "save_model": (
            values["test_freq"] <= 0 or values["inference_only"],
            "unless training is tested: a model is saved after a test. Use --test-freq",
        ),
        **dict.fromkeys(
            ("enable_profiling", "tensor_board_filename"),
            (values["inference_only"], "with --inference-only: nothing is trained"),
        ),
        **dict.fromkeys(
            ("quantize_mlp_with_bit", "quantize_emb_with_bit"),
            (not values["inference_only"], "without --inference-only"),
        ),
        "local_rank": (
            not values["use_gpu"] and not values["use_npu"] and values["local_rank"] > 0,
            "on the CPU",
        ),
    }
    return {
        key: when
        for key, (idle, when) in no_effect.items()
        if idle and values[key] != FLAGS[key].default
    }


def _notes(values: Mapping[str, Any], idle: Mapping[str, str]) -> list[str]:
    """Return a note for each flag that was given and changes nothing here."""
    already: dict[str, str] = {
        "num_workers": "one background thread reads here",
        "test_num_workers": "one background thread reads here",
        "dataset_multiprocessing": "preparation uses the cores that it may use in any case",
    }
    if values["data_generation"] == "dataset":
        already["round_targets"] = "the labels are 0 and 1 already"
    name = values["tensor_board_filename"]
    moved = name and "tensor_board_filename" not in idle
    return [
        *(f"{FLAGS[key].name} has no effect {when}" for key, when in idle.items()),
        *[f"--tensor-board-filename={name}: event files are in RUN/tensorboard"] * bool(moved),
        *(
            f"{FLAGS[key].name} changes nothing: {reason}"
            for key, reason in already.items()
            if values[key] != FLAGS[key].default
        ),
    ]


def _of_large_data(values: Mapping[str, Any], source: Path) -> list[str]:
    """Return notes on the flags that the reference reads large data with."""
    notes = []
    if values["memory_map"]:
        notes.append(
            "--memory-map: preparation takes limited memory in any case; the training rows are in "
            "an order of our own, since the reference draws no permutation then"
        )
    if values["mlperf_bin_loader"] and source.suffix != ".bin":
        notes.append(
            "--mlperf-bin-loader changes nothing: a DATASET holds bare numbers, and is read in "
            "large blocks, in any case"
        )
    if values["mlperf_bin_shuffle"]:
        notes.append(
            "--mlperf-bin-shuffle: rows are shuffled when they are prepared, not when they are read"
        )
    return notes


def _options(config: Any) -> list[str]:
    """Return a configuration as flags: what differs from the defaults, and the essential."""
    options: list[str] = []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            options += _options(value)
        elif field.name in _ESSENTIAL:
            options += _option(field.name, value)
        else:
            options += _option(field.name, value, field.default)
    return options


def _option(name: str, value: Any, default: Any = None) -> list[str]:
    flag = f"--{name.replace('_', '-')}"
    if value == default:
        return []
    if isinstance(value, bool):
        return [flag] if value else []
    if isinstance(value, tuple):
        return [flag, *(str(part) for part in value)]
    return [flag, str(value)]
