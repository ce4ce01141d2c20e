"""The folder in which a DATASET is made, hidden beside it.

A record in it tells what the DATASET is made from, and with which options. Without that record
whatever is in the folder means nothing, but for what came through a pipe. To be removed, the folder
first gets another name, so that nobody finds a part of it.
"""

from __future__ import annotations

import os
import shutil
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from dlrm.config import PrepareConfig
from dlrm.data.dataset import Source
from dlrm.files import (
    FORMAT_VERSION,
    environment_faults,
    flush_folder,
    read_json,
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
