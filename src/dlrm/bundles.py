"""The BUNDLE folder: a trained model with all that scoring raw rows takes, for anybody.

It is a stranger's as likely as not: nothing in it is run, nothing outside it is read (a symbolic
link in it is refused), and all of it is compared with the checksums in ``bundle.json`` before
anything is loaded.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import safetensors
import torch
from torch import Tensor, nn

from dlrm.checkpoint import DTYPES, first_difference, tensor_bytes
from dlrm.config import LossConfig, ModelConfig
from dlrm.errors import UserError
from dlrm.files import (
    FORMAT_VERSION,
    is_plain_name,
    json_bytes,
    read_json,
    safetensors_places,
    sha256,
    write_json,
    write_safetensors,
)
from dlrm.model.dlrm import DLRM
from dlrm.model.embedding import Arena
from dlrm.model.quantized_tables import QuantizedTables, row_bytes
from dlrm.model.variants import PoolingWeights
from dlrm.schema import FeatureSchema, read_schema

T = TypeVar("T")

BUNDLE = "bundle.json"
WEIGHTS = "model.safetensors"
EXAMPLES = "examples.json"

BundleFormat = Literal["torch", "onnx"]
TableBits = Literal["none", "int8", "int4"]
BITS: dict[TableBits, Literal[4, 8, 32]] = {"none": 32, "int8": 8, "int4": 4}
"""Of a number of the tables."""

_ZEROS = "0" * 64


@dataclass(frozen=True)
class StoredFile:
    """A file of a BUNDLE."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Trained:
    """What a BUNDLE's model was trained on and came to: the facts of a model's card."""

    checkpoint: Literal["best", "newest"]
    """Of the RUN: the best on the selection split, or the newest."""
    checkpoint_sha256: str
    """Its checksum."""
    epoch: int
    """Passes that the checkpoint had finished."""
    step: int
    """Steps that it had taken in all."""
    split_rule: str
    """How rows were split, in words."""
    sources: tuple[str, ...] = ()
    """Names of the files that the DATASET was made from; none where they are not known."""
    rows: dict[str, int] = field(default_factory=dict)
    """Of each split of the DATASET; empty where that is gone."""
    clicks: dict[str, int] = field(default_factory=dict)
    """Those that were clicked; likewise."""
    dataset_fingerprint: str = ""
    """Of the DATASET's schema and rows; empty where it is gone."""
    result: dict[str, Any] = field(default_factory=dict)
    """The RUN's ``result.json`` as it stands, with the metrics of each split (null: undefined);
    empty where the training had not ended. Its ``checkpoint`` tells which they are of."""


@dataclass(frozen=True)
class Compared:
    """How much a BUNDLE's probabilities differ from those of the model that was trained."""

    rows: int
    """Rows that were scored."""
    origin: str
    """Where they come from: a split of the DATASET, or ``made up``."""
    raw_rows: int
    """Of these, those that were scored from raw values, through the vocabularies."""
    largest_difference: float
    """Of a probability, between what ``dlrm.load`` gives and the model; where tables are
    quantized, the model with these tables."""
    foreign: str
    """The runtime that the model file was loaded with, and its version."""
    largest_foreign_difference: float
    """Of a probability, between what that runtime gives and the same model."""
    largest_compiled_difference: float | None = None
    """Likewise of the compiled model; None: there is none."""
    quantization_difference: float | None = None
    """Of a probability, largest, between the model with quantized tables and with its own; None:
    they are not quantized."""
    mean_quantization_difference: float | None = None
    """The mean over rows of the same, without sign."""


@dataclass(frozen=True)
class BundleInfo:
    """``bundle.json``: what a BUNDLE is and consists of."""

    sha256: str
    """Of the file as it stands, with 64 zeros in place of this."""
    dlrm: str
    """The version that wrote it."""
    format: BundleFormat
    """For which runtime there is a model file: ``model.pt2`` or ``model.onnx``."""
    inputs: dict[str, tuple[int | str, ...]]
    """Of that file, by name: their shapes; what varies has a name."""
    model: ModelConfig
    loss: LossConfig
    quantize: TableBits
    """Of how many bits the tables are."""
    trained: Trained
    files: dict[str, StoredFile]
    """All others in the folder, by their paths in it."""
    compared: Compared | None = None
    """None only while it is made."""
    compiled: str = ""
    """The file with the model compiled for processors like the one it was exported on; empty:
    there is none."""
    format_version: str = FORMAT_VERSION


@dataclass(frozen=True)
class ExampleRow:
    """A row to try a model with."""

    features: dict[str, int | float | str | list[int] | None]
    """By name. Of raw rows: what ``Predictor.predict`` takes, sparse values as 8 hexadecimal
    digits. Else as they are prepared: dense numbers before the transform, ids (null: none), lists
    of ids."""
    probability: float
    label: float | None
    """None: not known."""


@dataclass(frozen=True)
class Examples:
    """``examples.json``: a handful of rows and what the model gives for them."""

    origin: str
    """A split of the DATASET, or ``made up``."""
    raw: bool
    """Whether features are raw values; else they are prepared."""
    rows: tuple[ExampleRow, ...]
    format_version: str = FORMAT_VERSION


@dataclass(frozen=True)
class Bundle:
    """A BUNDLE folder whose files are what they were when it was written.

    Attributes:
        path: The folder.
        info: ``bundle.json``.
        schema: Of the features.
    """

    path: Path
    info: BundleInfo
    schema: FeatureSchema

    @staticmethod
    def open(path: Path, *, verified: bool = False) -> Bundle:
        """Read a BUNDLE's description, and compare all its files with their checksums.

        Args:
            path: The folder.
            verified: Its checksums were compared already, by the process that started this one,
                say: only names and sizes are compared.

        Raises:
            UserError: A file is missing, damaged, a link, or too many, or of another version; it is
                named.
        """
        _refuse_links(path)
        info = _read(path / BUNDLE, BundleInfo)
        _verify(path, info, contents=not verified)
        return Bundle(path, info, read_schema(path, "bundle"))

    def examples(self) -> Examples:
        """Read its example rows.

        Raises:
            UserError: They are missing or damaged.
        """
        return _read(self.path / EXAMPLES, Examples)

    def load_model(self, device: torch.device) -> DLRM:
        """Build the model, in evaluation mode.

        On a CPU its tables are a memory map of the weights' file, which processes share: a change
        of the file would change or end them.

        Raises:
            UserError: The weights are not those of the model that ``bundle.json`` describes.
        """
        path = self.path / WEIGHTS
        try:
            model = DLRM(self.schema, self.info.model, torch.device("meta"))
        except RuntimeError as error:  # of sizes that no memory has
            raise _damaged(self.path / BUNDLE, str(error).splitlines()[0]) from error
        if self.info.quantize != "none":
            for arena in _tables(model):
                _quantize_nothing(arena, BITS[self.info.quantize])
        try:
            _map_weights(path, model)
        except (safetensors.SafetensorError, OSError) as error:
            raise _damaged(path, str(error)) from error
        if device.type != "cpu":
            model.to(device)
        return model.eval()


REMEDY = "Check the path, or copy or export the bundle again."
"""What to do about a damaged BUNDLE."""


def _read(path: Path, kind: type[T]) -> T:
    return read_json(path, kind, "bundle", if_missing=REMEDY, if_damaged=REMEDY)


def is_bundle(path: Path) -> bool:
    """Tell whether a folder is a BUNDLE rather than a RUN."""
    return (path / BUNDLE).is_file()


def write_info(folder: Path, info: BundleInfo) -> None:
    """Write ``bundle.json`` with its checksum."""
    digest = hashlib.sha256(json_bytes(replace(info, sha256=_ZEROS))).hexdigest()
    write_json(folder / BUNDLE, replace(info, sha256=digest))


def stored_files(folder: Path) -> dict[str, StoredFile]:
    """Return the bytes and checksums of all files in a folder, by their paths in it."""
    return {
        name: StoredFile((folder / name).stat().st_size, sha256(folder / name))
        for name in sorted(_names(folder))
        if (folder / name).is_file()
    }


def write_weights(path: Path, model: DLRM) -> None:
    """Write a model's weights, of quantized tables the codes, by their names in a state dict.

    The tables of an arena lie one after another, so that they can be mapped as one; the first
    begins at a page, which keeps vectors of 64 bytes in one line of the cache.

    Raises:
        EnvironmentFaultError: The disk is full or read-only.
    """
    state = model.state_dict()
    arenas = model.sparse_arch.stored_arenas
    last = [f"sparse_arch.{name}" for arena in _tables(model) for name in arenas[arena]]
    # What is narrower than float32 comes last, so that everything is aligned to its own width.
    ordered = {name: state[name] for name in [*(each for each in state if each not in last), *last]}
    write_safetensors(
        path,
        {
            name: (DTYPES[tensor.dtype], tensor.shape, tensor.nbytes)
            for name, tensor in ordered.items()
        },
        map(tensor_bytes, ordered.values()),
        {"format": "pt"},
        aligned=last[0],
    )


def _tables(model: DLRM) -> Iterable[Arena]:
    """Return the arenas that can be quantized."""
    arenas = model.sparse_arch.stored_arenas
    return (arena for arena in arenas if not isinstance(arena, PoolingWeights))


def _quantize_nothing(arena: Arena, bits: int) -> None:
    """Let an arena on "meta" expect codes."""
    rows, dim = arena.arena.shape
    codes = torch.empty(rows, row_bytes(dim, bits), dtype=torch.uint8, device="meta")
    arena.quantized = QuantizedTables(codes, dim, bits)
    arena.arena = nn.Parameter(torch.empty(0, dim, dtype=arena.arena.dtype), requires_grad=False)


def _map_weights(path: Path, model: DLRM) -> None:
    """Let the tables of a model on "meta" be those of a file, and its layers copies of those."""
    expected = model.state_dict()
    with safetensors.safe_open(path, framework="pt") as file:
        if difference := first_difference(file, expected):
            raise UserError(
                f"{path} does not belong to {path.with_name(BUNDLE)}: {difference}. {REMEDY}"
            )
        for name, parameter in list(model.named_parameters()):
            if name in expected and parameter.is_meta:
                owner, _, own = name.rpartition(".")
                # A copy is aligned as kernels like it, and takes little memory.
                weight = nn.Parameter(file.get_tensor(name).clone(), requires_grad=False)
                setattr(model.get_submodule(owner), own, weight)
    places = safetensors_places(path)
    size = path.stat().st_size
    mapped: Any = torch.UntypedStorage.from_file(str(path), False, size)
    for arena, names in model.sparse_arch.stored_arenas.items():
        parts = [places[f"sparse_arch.{name}"] for name in names]
        ends = [start + length for start, length in parts]
        begin, width = parts[0][0], arena.stored.itemsize
        if ends[:-1] != [start for start, _ in parts[1:]] or begin % width or ends[-1] > size:
            raise _damaged(path, f"the tables from {names[0]} on do not lie one after another")
        tables = _view(mapped, begin, arena.stored)
        if arena.quantized is None:
            arena.arena = nn.Parameter(tables, requires_grad=False)
        else:
            arena.quantized.codes = tables


def _view(mapped: torch.UntypedStorage, offset: int, like: Tensor) -> Tensor:
    """Return a part of a file as a tensor of another's type and shape."""
    empty = torch.empty(0, dtype=like.dtype)
    return empty.set_(mapped, offset // like.itemsize, like.shape, (like.shape[1], 1))


def _verify(path: Path, info: BundleInfo, *, contents: bool) -> None:
    """Compare the files of a folder with what ``bundle.json`` says of them."""
    if contents:
        text = (path / BUNDLE).read_bytes().replace(info.sha256.encode(), _ZEROS.encode(), 1)
        if (digest := hashlib.sha256(text).hexdigest()) != info.sha256:
            raise _damaged(path / BUNDLE, f"its checksum is {digest}, expected {info.sha256}")
    for name in info.files:
        if not _is_place(name):
            what = f"{name!r} is not the name of a file in the bundle or its vocabulary/"
            raise _damaged(path / BUNDLE, what)
    for name in ("schema.json", WEIGHTS, EXAMPLES):
        if name not in info.files:
            raise _damaged(path / BUNDLE, f"it does not name {name}")
    known = {BUNDLE, *info.files, *(str(Path(name).parent) for name in info.files)}
    if surplus := sorted(_names(path) - known):
        raise UserError(
            f"{path / surplus[0]} does not belong to the bundle: {BUNDLE} does not name it. Remove "
            "it, or copy or export the bundle again."
        )
    for name, expected in info.files.items():
        file = path / name
        if not file.is_file():
            raise UserError(f"{file} is missing. {REMEDY}")
        if (size := file.stat().st_size) != expected.bytes:
            raise _damaged(file, f"it has {size} bytes, expected {expected.bytes}")
        if contents and (digest := sha256(file)) != expected.sha256:
            raise _damaged(file, f"its SHA-256 is {digest}, expected {expected.sha256}")


def _damaged(path: Path, what: str) -> UserError:
    return UserError(f"{path} is damaged: {what}. {REMEDY}")


def _is_place(name: str) -> bool:
    folder, slash, file = name.rpartition("/")
    return is_plain_name(file) and folder in ("", "vocabulary") and bool(slash) == bool(folder)


def _refuse_links(path: Path) -> None:
    """Refuse what would lead out of a folder; it itself may have been reached by a link."""
    for name in sorted(_names(path)):
        if (path / name).is_symlink():
            raise UserError(
                f"{path / name} is a symbolic link to {os.readlink(path / name)}, and of a bundle "
                "nothing outside it is read. Remove it, or put in its place what it leads to: "
                "cp -rL copies a folder so."
            )


def _names(folder: Path) -> set[str]:
    """Return the paths within a folder of all that is in it, folders too."""
    return {
        str(Path(here, name).relative_to(folder))
        for here, folders, files in os.walk(folder)
        for name in (*folders, *files)
    }
