"""The folder in which a DATASET is made, hidden beside it.

A record in it tells what the DATASET is made from, and with which options. Without that record
whatever is in the folder means nothing, but for what came through a pipe. To be removed, the folder
first gets another name, so that nobody finds a part of it.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from dlrm.config import PrepareConfig
from dlrm.data.dataset import Source
from dlrm.data.source_files import PIPE, SourceFile
from dlrm.errors import UserError
from dlrm.files import (
    FORMAT_VERSION,
    environment_faults,
    flush_folder,
    read_json,
    sha256,
    write_json,
)
from dlrm.schema import SPLITS


@dataclass(frozen=True)
class Inputs:
    """What a preparation was begun with; what it makes depends on nothing else."""

    sources: tuple[Source, ...]
    options: PrepareConfig
    format_version: str = FORMAT_VERSION


class Work:
    """The folder in which a DATASET is made.

    Args:
        dataset: Where the DATASET goes.

    Attributes:
        folder: The folder.
        dataset: The DATASET in it, until it is complete and goes to its place.
        piped: What came through a pipe.
    """

    def __init__(self, dataset: Path) -> None:
        self.folder = dataset.with_name(f".{dataset.name}.work")
        self.dataset = self.folder / "dataset"
        self.piped = self.folder / "source.spool"
        self._record = self.folder / "inputs.json"
        self._gone = dataset.with_name(f".{dataset.name}.gone")

    @property
    def is_begun(self) -> bool:
        """Whether there is a preparation that can be gone on with."""
        return self._record.exists() and self.dataset.exists()

    @property
    def is_published(self) -> bool:
        """Whether the DATASET is in its place, and only the removal of this folder is missing."""
        return self._record.exists() and not self.dataset.exists()

    @property
    def is_left_over(self) -> bool:
        """Whether a process was killed while it set the folder up, or while it removed it."""
        parts = (self._record, self.piped)
        is_bare = self.folder.exists() and not any(path.exists() for path in parts)
        return is_bare or self._gone.exists()

    @property
    def bytes(self) -> int:
        """Size of all that is made already."""
        files = (path for path in self.folder.rglob("*") if path.is_file() and path != self.piped)
        return sum(path.stat().st_size for path in files)

    def begun_with(self) -> Inputs:
        """Return what the preparation was begun with.

        Raises:
            UserError: It was begun by a version that cannot be read.
        """
        return read_json(self._record, Inputs, "preparation")

    def differences(self, files: Sequence[SourceFile] | None, config: PrepareConfig) -> list[str]:
        """Say in what the preparation that was begun differs from the one that is asked for.

        Args:
            files: What is asked for; None: standard input, whatever comes.
            config: Likewise.
        """
        try:
            begun = self.begun_with()
        except UserError as error:
            return [str(error).removesuffix(".")]
        if begun.format_version != FORMAT_VERSION:
            return [
                f"it was begun by a dlrm that writes format version {begun.format_version}, and "
                f"this one writes {FORMAT_VERSION}"
            ]
        return find_differences(begun.sources, begun.options, files, config)

    def begin(self, inputs: Inputs) -> None:
        """Make the folders, and the record that they are used for these inputs."""
        with environment_faults(f"write to {self.folder}"):
            for split in SPLITS:
                (self.dataset / split).mkdir(parents=True, exist_ok=True)
        write_json(self._record, inputs)

    def clear(self) -> None:
        """Remove all but what came through a pipe."""
        with environment_faults(f"write to {self.folder}"):
            self._record.unlink(missing_ok=True)
            for path in self.folder.iterdir() if self.folder.exists() else ():
                if path.is_dir():
                    shutil.rmtree(path)
                elif path != self.piped:
                    path.unlink()

    def remove(self) -> None:
        """Remove the folder and all that is in it.

        A process that is killed meanwhile has removed all of it or nothing, as far as others see;
        ``tidy`` removes what is left on the disk.
        """
        if not self.folder.exists():
            return
        with environment_faults(f"write to {self.folder}"):
            with suppress(OSError):  # a disk that is full may let files be removed all the same
                os.replace(self.folder, self._gone)
                # Or else, after a power cut, what lacks files already may have its old name.
                flush_folder(self._gone.parent)
            self._record.unlink(missing_ok=True)
            for folder in (self._gone, self.folder):
                if folder.exists():
                    shutil.rmtree(folder)

    def tidy(self) -> None:
        """Remove what a process left that was killed while it set the folder up, or removed it."""
        if self._gone.exists():
            with environment_faults(f"write to {self._gone}"):
                shutil.rmtree(self._gone)
        if self.is_left_over:
            self.remove()


def as_source(file: SourceFile) -> Source:
    """Describe a file of a source before it is read, its checksum not known yet."""
    return Source(file.name, file.bytes, file.mtime_ns, sha256="")


def find_differences(
    sources: Sequence[Source],
    options: PrepareConfig,
    files: Sequence[SourceFile] | None,
    config: PrepareConfig,
) -> list[str]:
    """Say in what a preparation differs from the one that is asked for.

    Args:
        sources: What it was made from.
        options: How.
        files: What is asked for; None: standard input, whatever comes.
        config: Likewise.
    """
    differences = []
    made_from = _listed([(each.name, each.bytes) for each in sources]) or "made-up rows"
    if files is None:
        if [each.name for each in sources] != [PIPE]:
            differences.append(f"it was made from {made_from}, and standard input is asked for")
    elif len(sources) != len(files) or not all(map(_is_same, sources, files)):
        now = _listed([(str(each.path), each.bytes) for each in files])
        known = all(each.sha256 for each in sources)
        differences.append(
            f"it was made from {made_from}, and {now} "
            + ("has other content" if known else "is another file, or was changed since")
        )
    for field in dataclasses.fields(PrepareConfig):
        expected, got = getattr(config, field.name), getattr(options, field.name)
        # Without a shuffle or drawing its seed makes no difference.
        idle = field.name == "seed" and all(
            each.shuffle == "none" and not each.data_sub_sample_rate for each in (config, options)
        )
        if expected != got and not idle:
            flag = f"--{field.name.replace('_', '-')}"
            differences.append(f"it was made with {flag} {got}, and {flag} {expected} is asked for")
    return differences


def _listed(files: Sequence[tuple[str, int]]) -> str:
    shown = [f"{name} ({size} bytes)" for name, size in files]
    return ", ".join(shown if len(shown) < 4 else [shown[0], "…", shown[-1]])


def _is_same(made_from: Source, now: SourceFile) -> bool:
    """Tell whether a file is still what it was; its content is read only if its time changed.

    Of a preparation that was interrupted the content's checksum is not known yet.
    """
    if made_from.bytes != now.bytes:
        return False
    if made_from.mtime_ns == now.mtime_ns:
        return True
    with environment_faults(f"read {now.path}"):
        return bool(made_from.sha256) and made_from.sha256 == sha256(now.path)
