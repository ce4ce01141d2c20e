"""Raw rows to a DATASET: read, fit vocabularies, split, order, write.

Rows are held in memory meanwhile: up to about 400 bytes each, while vocabularies are fitted.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from dlrm.config import PrepareConfig
from dlrm.data import criteo, reference_npz, vocabulary
from dlrm.data.dataset import Dataset, Rows, Source, block_rows, new_dataset, refuse_taken
from dlrm.data.splits import RULE, split_rows, training_order
from dlrm.data.vocabulary import Vocabulary
from dlrm.device import available_cores
from dlrm.errors import EnvironmentFaultError, UserError
from dlrm.files import environment_faults, locked, sha256
from dlrm.progress import progress
from dlrm.schema import FeatureSchema

logger = logging.getLogger("dlrm")


_DEFAULTS = PrepareConfig()
_HEAD_BYTES = 1 << 20


def prepare(
    source: Path | str,
    dataset: Path | str,
    config: PrepareConfig = _DEFAULTS,
    *,
    overwrite: bool = False,
) -> Dataset:
    """Turn raw rows into a DATASET.

    A DATASET that was made from the same source with the same options is returned as it is.

    Args:
        source: Criteo's train.txt, a folder that holds it, or a .npz that the reference
            implementation prepared.
        dataset: The folder to make.
        config: Shuffle, seed and limit of values.
        overwrite: Replace a DATASET that is there, whatever it was made from.

    Returns:
        The DATASET, opened.

    Raises:
        UserError: The source is missing or malformed, or ``dataset`` holds something else; nothing
            is written then.
        EnvironmentFaultError: A disk fails, is too small or read-only.
    """
    file, dataset = raw_file(Path(source)), Path(dataset)
    # First without the lock, which a finished DATASET in a read-only place does not need.
    if not overwrite and (found := _finished(dataset, file, config)):
        return found
    with _new_parents(dataset), locked(dataset, "dataset"):
        if not overwrite and (found := _finished(dataset, file, config)):
            return found
        refuse_taken(dataset, overwrite=overwrite)
        _require_space(dataset, estimate_bytes(estimate_rows(file)))
        before = _identify(file)
        raw = _read_npz(file, config) if file.suffix == ".npz" else _read_text(file, config)
        if _identify(file) != before:
            raise UserError(f"{file} changed while it was read. Prepare it once it is complete.")
        described = dataclasses.replace(
            before, sha256=raw.sha256, lacks_last_newline=raw.lacks_last_newline
        )
        _write(dataset, raw, described, config, overwrite=overwrite)
    return Dataset.open(dataset)


def raw_file(source: Path) -> Path:
    """Return the file that a source means.

    Raises:
        UserError: There is none.
    """
    if not source.exists():
        raise UserError(f"{source} does not exist. Name Criteo's train.txt or its folder.")
    if not source.is_dir():
        return source
    file = source / "train.txt"
    if file.is_file():
        return file
    if (source / "day_0").exists() or (source / "day_0.gz").exists():
        raise UserError(
            f"{source} holds day_0, the 1TB click logs, which this version does not read. Name a "
            "folder with the Kaggle challenge's train.txt."
        )
    raise UserError(f"{source} is a folder without train.txt. Name the file, or its folder.")


def estimate_rows(file: Path) -> int:
    """Return about how many rows a source has, from the length of the first ones of a text.

    Of a .npz that the reference prepared, and of a pipe, nothing is known beforehand: 0.

    Raises:
        EnvironmentFaultError: It cannot be read.
    """
    if file.suffix == ".npz" or not file.is_file():
        return 0
    with environment_faults(f"read {file}"):
        size = file.stat().st_size
        with open(file, "rb") as text:
            head = text.read(_HEAD_BYTES)
    lines = head.count(b"\n")
    return round(size * lines / (head.rfind(b"\n") + 1)) if lines else 1


def estimate_bytes(rows: int) -> int:
    """Return about how much disk the rows of a DATASET take."""
    features = len(criteo.DENSE_NAMES) + len(criteo.SPARSE_NAMES)
    return rows * (1 + 4 * features)


def size_text(size: int) -> str:
    """Return a number of bytes for a reader: 15.7 kB, 3.1 MB, 7.2 GB."""
    for unit, length in (("GB", 1e9), ("MB", 1e6)):
        if size >= length:
            return f"{size / length:.1f} {unit}"
    return f"{size / 1e3:.1f} kB"


def _require_space(dataset: Path, needed: int) -> None:
    folder = dataset.absolute().parent
    with environment_faults(f"write to {folder}"):
        free = shutil.disk_usage(folder).free
    if free < needed:
        raise EnvironmentFaultError(
            f"{dataset} needs about {size_text(needed)} of disk, and {size_text(free)} are free in "
            f"{folder}. Free some space, or choose another place."
        )


@contextmanager
def _new_parents(dataset: Path) -> Iterator[None]:
    """Remove the folders that were made for a DATASET to lie in, if it is not made after all."""
    missing = [folder for folder in dataset.absolute().parents if not folder.exists()]
    try:
        yield
    except BaseException:
        with suppress(OSError):  # one is not empty: something else uses it
            for folder in missing:
                folder.rmdir()
        raise


@dataclass(frozen=True, eq=False)
class _RawRows:
    """A source read whole, its rows in their order."""

    rows: Rows
    schema: FeatureSchema
    vocabularies: Sequence[Vocabulary]
    sha256: str
    lacks_last_newline: bool = False


def _read_text(file: Path, config: PrepareConfig) -> _RawRows:
    digest = hashlib.sha256()
    last = b""
    label_blocks: list[npt.NDArray[np.uint8]] = []
    dense_blocks: list[npt.NDArray[np.int32]] = []
    sparse_blocks: list[npt.NDArray[np.uint32]] = []

    with progress("read", file.stat().st_size, unit="B", unit_scale=True) as bar:

        def observe(chunk: bytes) -> None:
            nonlocal last
            digest.update(chunk)
            bar.update(len(chunk))
            last = chunk[-1:]

        for block in criteo.read_blocks(file, labelled=True, observe=observe):
            assert block.labels is not None  # it was read as labelled
            label_blocks.append(block.labels)
            dense_blocks.append(block.dense)
            sparse_blocks.append(block.sparse)
    split_rows(sum(map(len, label_blocks)), str(file))  # refuse too few before the work
    labels, dense = np.concatenate(label_blocks), np.concatenate(dense_blocks)
    dense_blocks.clear()  # its memory is what fitting needs
    sparse = np.empty((len(labels), len(criteo.SPARSE_NAMES)), np.int32)

    def fit(feature: int) -> Vocabulary:
        values = [block[:, feature] for block in sparse_blocks]
        fitted, sparse[:, feature] = vocabulary.fit(values, value_modulus=config.max_ind_range)
        return fitted

    with ThreadPoolExecutor(available_cores()) as pool:
        features = range(len(criteo.SPARSE_NAMES))
        vocabularies = list(
            progress("fit", len(features), pool.map(fit, features), unit="vocabularies")
        )
    schema = criteo.schema(tuple(map(len, vocabularies)), RULE, value_modulus=config.max_ind_range)
    rows = Rows(labels, dense, sparse)
    return _RawRows(rows, schema, vocabularies, digest.hexdigest(), last != b"\n")


def _read_npz(file: Path, config: PrepareConfig) -> _RawRows:
    if config.max_ind_range:
        raise UserError(
            f"--max-ind-range {config.max_ind_range} limits raw values, which {file} does not "
            "hold. Prepare from train.txt, or limit ids with --max-ind-range of `dlrm train`."
        )
    rows, num_embeddings = reference_npz.read(file)
    schema = criteo.schema(num_embeddings, RULE, value_modulus=0)
    return _RawRows(rows, schema, (), sha256(file))


def _write(
    dataset: Path, raw: _RawRows, source: Source, config: PrepareConfig, *, overwrite: bool
) -> None:
    split = split_rows(len(raw.rows), source.name)
    order = training_order(split.days[:-1], config.shuffle, config.seed)
    step = block_rows(raw.schema)

    with (
        new_dataset(
            dataset,
            raw.schema,
            raw.vocabularies,
            overwrite=overwrite,
            sources=(source,),
            options=config,
            days=split.days,
        ) as writer,
        progress("write", len(raw.rows), unit="rows", unit_scale=True) as bar,
    ):

        def runs(indices: npt.NDArray[np.int64]) -> Iterator[Rows]:
            for start in range(0, len(indices), step):
                run = raw.rows[indices[start : start + step]]
                yield run
                bar.update(len(run))

        writer.append("train", runs(order))
        writer.append("validation", runs(np.array(split.validation)))
        writer.append("test", runs(np.array(split.test)))


def _identify(file: Path) -> Source:
    """Describe a file without reading it."""
    with environment_faults(f"read {file}"):
        status = file.stat()
    return Source(file.name, status.st_size, status.st_mtime_ns, sha256="")


def _finished(dataset: Path, file: Path, config: PrepareConfig) -> Dataset | None:
    """Open a DATASET, if there is one; it must be made from this file with these options.

    Raises:
        UserError: It was made otherwise, or is damaged.
    """
    with environment_faults(f"read {dataset}"):
        if not (dataset / "manifest.json").exists():
            return None
    try:
        found = Dataset.open(dataset)
    except UserError as error:
        raise UserError(f"{error} (--overwrite starts over.)") from error
    differences = []
    now = _identify(file)
    if not any(_is_same(source, now, file) for source in found.manifest.sources):
        names = [f"{source.name} ({source.bytes} bytes)" for source in found.manifest.sources]
        differences.append(
            f"it was made from {', '.join(names) or 'made-up rows'}, and {file} ({now.bytes} "
            "bytes) has other content"
        )
    options = found.manifest.options or PrepareConfig()
    for field in dataclasses.fields(PrepareConfig):
        expected, got = getattr(config, field.name), getattr(options, field.name)
        # Without a shuffle its seed makes no difference.
        idle = field.name == "seed" and config.shuffle == options.shuffle == "none"
        if expected != got and not idle:
            flag = f"--{field.name.replace('_', '-')}"
            differences.append(f"it was made with {flag} {got}, and {flag} {expected} is asked for")
    if differences:
        raise UserError(
            f"{dataset} is another DATASET: {'; '.join(differences)}. Choose another one, or start "
            "over with --overwrite."
        )
    logger.info("%s is prepared already from %s with these options", dataset, file)
    return found


def _is_same(made_from: Source, now: Source, file: Path) -> bool:
    """Tell whether a file is still what it was; its content is read only if its time changed."""
    return made_from.bytes == now.bytes and (
        made_from.mtime_ns == now.mtime_ns or made_from.sha256 == sha256(file)
    )
