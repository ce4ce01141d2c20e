"""From the reference's flags to our configuration, and to the commands that say the same."""

from __future__ import annotations

import dataclasses
import hashlib
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

_PROCESSED_NAME = "kaggleAdDisplayChallenge_processed.npz"  # in the raw file's folder
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
            second = ["dlrm", "evaluate", run, "--split", "test", "--checkpoint", "newest"]
            for field in ("device", "local_rank"):
                second += _option(field, getattr(self.train, field), getattr(TrainConfig, field))
            second += _options(self.quantization)
        else:
            second = ["dlrm", "train", dataset, "--run", run, *_options(self.train)]
        commands = [first, second]
        if self.save_onnx:
            commands.append(["dlrm", "export", run, str(self.save_onnx), "--checkpoint", "newest"])
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
            source, dataset = _data_paths(values["raw_data_file"], values["processed_data_file"])
            prepare = _preparation(values, settings, source)
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
            dense_features=values["arch_mlp_bot"][0],
            notes=tuple(notes),
        )
    except UserError as error:
        raise in_reference_terms(error) from error


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
    if source.suffix == ".npz":
        # Its rows are chosen and its values numbered already: only ids can be taken modulo.
        chosen |= {"max_ind_range": 0, "data_sub_sample_rate": 0.0}
    return _build(PrepareConfig, chosen)


def _generation(values: Mapping[str, Any], settings: Mapping[str, Any]) -> GenerateConfig:
    acting = dict(settings)
    if values["data_generation"] != "synthetic":
        del acting["data_trace_file"]
    return _build(GenerateConfig, {**acting, "dense_features": values["arch_mlp_bot"][0]})


def _generated_path(config: GenerateConfig, run: str) -> Path:
    """Return where made-up rows go: beside the RUN, under a name that tells them from others."""
    content = hashlib.sha256(msgspec.json.encode(config)).hexdigest()
    folder = Path(run).parent if run else Path("runs")
    return folder / f"{config.data_generation}-{content[:12]}.dataset"


def _data_paths(raw: str, processed: str) -> tuple[Path, Path]:
    """Return the source and the DATASET."""
    if not processed and not raw:
        raise UserError(
            "there are no data: name Criteo's train.txt with --raw-data-file, or a finished .npz "
            "of the reference with --processed-data-file, or make rows up with "
            "--data-generation=random."
        )
    finished = Path(processed) if processed else Path(raw).with_name(_PROCESSED_NAME)
    if finished.suffix != ".npz":
        raise UserError(f"--processed-data-file must end in .npz; got {finished}.")
    dataset = finished.with_suffix(".dataset")
    if finished.exists():
        return finished, dataset
    if not raw:
        raise UserError(
            f"{finished} does not exist. Check --processed-data-file, or name Criteo's train.txt "
            "with --raw-data-file to prepare it from."
        )
    return Path(raw), dataset


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
    "data_size",
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
        "lr_decay_start_step": (values["lr_num_decay_steps"] == 0, "without --lr-num-decay-steps"),
        "mlperf_acc_threshold": (not values["mlperf_logging"], "without --mlperf-logging"),
        "mlperf_auc_threshold": (not values["mlperf_logging"], "without --mlperf-logging"),
        "save_model": (
            values["test_freq"] <= 0 or values["inference_only"],
            "unless training is tested: a model is saved after a test. Use --test-freq",
        ),
        "tensor_board_filename": (
            values["inference_only"],
            "with --inference-only: nothing is trained",
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
    already = {
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
