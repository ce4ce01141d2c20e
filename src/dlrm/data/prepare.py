"""A source to a DATASET, in four stages that each leave finished files behind.

    read      the source → a spool of numbered rows       (data/reading.py)
    fit       numbers → vocabularies and ids              (data/fitting.py)
    arrange   the spool → runs, sorted by part            (data/arranging.py)
    write     runs and spool → the parts of each split    (data/arranging.py)

Memory is bounded: a segment, a run and a part are of limited size, and the tables of values start
anew when they reach theirs. What is being made lies in a hidden folder beside the DATASET; when a
preparation was interrupted, the same command finds there what is finished, and goes on.
"""

from __future__ import annotations

import ctypes
import dataclasses
import logging
import math
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np

from dlrm.config import PrepareConfig, complete, size_bytes
from dlrm.data import criteo
from dlrm.data.arranging import Arranger, Runs
from dlrm.data.dataset import (
    Dataset,
    Manifest,
    Rows,
    StoredSplit,
    WrittenPart,
    part_name,
    part_rows,
    publish,
    refuse_taken_dataset,
    remove_replaced,
    stored_split,
    write_part,
)
from dlrm.data.fitting import FittedFeature
from dlrm.data.plan import Plan
from dlrm.data.source_files import PIPE, require_utf8
from dlrm.data.sources import RawSource, RowSource, find_source, piped_source
from dlrm.data.splits import (
    RULES,
    SplitRows,
    StoredOrder,
    day_lengths,
    hold_back_last,
    permutation_bytes,
)
from dlrm.data.spool import Spool
from dlrm.data.synthetic import truth_of
from dlrm.data.verification import verify
from dlrm.data.work import Inputs, Work, as_source, find_differences
from dlrm.device import available_cores
from dlrm.errors import EnvironmentFaultError, UserError
from dlrm.files import (
    FORMAT_VERSION,
    environment_faults,
    locked,
    read_json,
    size_text,
    write_json,
)
from dlrm.progress import progress
from dlrm.schema import SPLITS, FeatureSchema, Split

T = TypeVar("T")

logger = logging.getLogger("dlrm")

DEFAULT_MEMORY = 2 << 30
MINIMUM_MEMORY = 1 << 30

_DEFAULTS = PrepareConfig()
_LONGEST_NAME = 240
"""Of a DATASET: the hidden names beside it are a little longer."""
_RESERVED_BYTES = 600 << 20
"""Of the memory ceiling: what the program itself, blocks being parsed and segments take."""
_WORKER_BYTES = 200 << 20
"""What making one run or part takes, about."""
_PARSING_BYTES = 200 << 20
"""Of what is reserved: what blocks take that are being parsed."""
_RUNS = 64
_MOST_SEGMENTS_PER_RUN = 4


def prepare(
    source: Path | str,
    dataset: Path | str,
    config: PrepareConfig = _DEFAULTS,
    *,
    memory: int | str = DEFAULT_MEMORY,
    overwrite: bool = False,
    observe: Callable[[str, float], None] | None = None,
) -> Dataset:
    """Turn raw rows into a DATASET.

    A DATASET that was made from the same source with the same options is returned as it is, and an
    interrupted preparation goes on where it stopped. The result does not depend on ``memory``, nor
    on the number of cores, nor on interruptions.

    Args:
        source: Criteo's train.txt, plain or compressed with gzip, a folder that holds it, a folder
            with day_0, day_1 … of the 1TB click logs, one of these days, "-" for standard input, or
            a .npz that the reference implementation prepared.
        dataset: The folder to make.
        config: Splits, order, and which values get an embedding of their own.
        memory: The most memory to use, in bytes or as "2GiB"; at least 1 GiB.
        overwrite: Replace a DATASET that is there, whatever it was made from.
        observe: Called with the name of each stage that is done, and the seconds that it took.

    Returns:
        The DATASET, opened.

    Raises:
        UserError: The source is missing or malformed, or ``dataset`` holds something else; nothing
            is written then.
        EnvironmentFaultError: A disk fails, is too small or read-only.
    """
    memory = memory_bytes(memory)
    dataset = _named(Path(dataset))
    config = complete(config)  # so that equal options give equal bytes
    found = None if str(source) == PIPE else find_source(Path(source), config)
    work = Work(dataset)
    # First without the lock, which a finished DATASET in a read-only place does not need.
    if found and not overwrite and not (work.is_published or work.is_left_over):
        if finished := _finished(dataset, found, config):
            return finished
    with _new_parents(dataset), locked(dataset, "dataset"):
        if work.is_published and (finished := _published(dataset, work, found, config)):
            return finished
        work.tidy()
        if found and not overwrite and (finished := _finished(dataset, found, config)):
            return finished
        refuse_taken_dataset(dataset, overwrite=overwrite)
        if found is None:
            found = _piped(dataset, work, config, overwrite=overwrite)
        preparation = _Preparation(found, dataset, work, config, memory, overwrite)
        try:
            preparation.check()
        except UserError:
            if not work.is_begun:  # what came through a pipe is of no use then
                work.remove()
            raise
        with preparation.kept_if_worth_it():
            preparation.run(observe)
    return Dataset.open(dataset)


def _named(dataset: Path) -> Path:
    """Return a path whose last part is the folder's own name, as "." and "x/.." have none.

    Raises:
        UserError: There is no such path, or it cannot be written down.
    """
    require_utf8(str(dataset))
    if dataset.name in ("", ".."):
        dataset = Path(os.path.abspath(dataset))
    if not dataset.name or len(os.fsencode(dataset.name)) > _LONGEST_NAME:
        raise UserError(
            f"{dataset} cannot be a DATASET. Name a folder to make, with a name of at most "
            f"{_LONGEST_NAME} bytes."
        )
    return dataset


def memory_bytes(memory: int | str) -> int:
    """Return a number of bytes given as such or as text: 2GiB, 1536 MiB, 4G.

    Raises:
        UserError: It is neither, or less than 1 GiB.
    """
    if isinstance(memory, str):
        memory = size_bytes(memory, "--memory")
    if memory < MINIMUM_MEMORY:
        raise UserError(
            f"--memory must be at least 1GiB, which preparation needs; got {memory} bytes."
        )
    return memory


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


def _published(
    dataset: Path, work: Work, source: RowSource | None, config: PrepareConfig
) -> Dataset | None:
    """Tidy up after a process that was killed once its DATASET was in place.

    Returns:
        The DATASET, if it is the one that is asked for now.
    """
    is_same = not work.differences(source.files if source else None, config)
    remove_replaced(dataset)
    work.remove()
    if not is_same or not (dataset / "manifest.json").exists():
        return None
    found = Dataset.open(dataset)
    options = found.manifest.options or PrepareConfig()
    files = source.files if source else None
    return None if find_differences(found.manifest.sources, options, files, config) else found


def _half_made(dataset: Path, differences: Sequence[str]) -> UserError:
    return UserError(
        f"{dataset} is half made already, by a preparation that was interrupted: "
        f"{'; '.join(differences)}. Repeat that command to go on with it, choose another DATASET, "
        "or start over with --overwrite."
    )


def _piped(dataset: Path, work: Work, config: PrepareConfig, *, overwrite: bool) -> RawSource:
    """Copy standard input to the disk, unless that was done before an interruption."""
    if work.is_begun and not overwrite:
        if differences := work.differences(None, config):
            raise _half_made(dataset, differences)
    try:
        return piped_source(work.piped, config, anew=overwrite)
    except BaseException:
        with suppress(EnvironmentFaultError):  # what went wrong before is to be told
            work.tidy()
        raise


class _MendableError(UserError):
    """An error after which what is finished is of use to the same command, or to a mended one."""


class _Preparation:
    """A DATASET in the making.

    Args:
        source: Where its rows come from.
        dataset: Where it goes.
        work: The folder in which it is made.
        config: How.
        memory: The most to use, in bytes.
        overwrite: Whether to replace what is there.
    """

    def __init__(
        self,
        source: RowSource,
        dataset: Path,
        work: Work,
        config: PrepareConfig,
        memory: int,
        overwrite: bool,
    ) -> None:
        self.source = source
        self.dataset = dataset
        self.work = work
        self.config = config
        self.ceiling = memory
        self.memory = memory - _RESERVED_BYTES
        """Of the ceiling, what tables, runs and parts may take."""
        self.overwrite = overwrite
        self.workers = self._workers_beside(0)
        # One block more than there are threads is being parsed.
        threads = _PARSING_BYTES // criteo.BLOCK_MEMORY - 1
        self.parsers = max(1, min(available_cores(), threads))

    def _workers_beside(self, held: int) -> int:
        """Return how many threads have memory to work in, beside what is held meanwhile."""
        return max(1, min(available_cores(), (self.memory - held) // _WORKER_BYTES))

    @contextmanager
    def kept_if_worth_it(self) -> Iterator[None]:
        """Leave nothing behind after an error, but what the same command can go on with."""
        try:
            yield
        except BaseException as error:
            is_useless = isinstance(error, UserError) and not isinstance(error, _MendableError)
            is_begun = self.work.piped.exists() or (self._spool / "segment-00000.json").exists()
            if is_begun and not is_useless:
                logger.warning(
                    "%s is unfinished; the same command goes on with it (or delete %s)",
                    self.dataset,
                    self.work.folder,
                )
            else:
                self._remove_work()
            raise

    def _remove_work(self) -> None:
        with suppress(EnvironmentFaultError):  # what went wrong before is to be told
            self.work.remove()

    def check(self) -> None:
        """Look at what an earlier process left and at the disk, and tell the plan.

        Raises:
            UserError: What is there was begun with another source or other options.
            EnvironmentFaultError: The disk is too small.
        """
        if not self.work.is_begun:
            self.work.clear()
        elif not (differences := self.work.differences(self.source.files, self.config)):
            logger.info("going on with the interrupted preparation of %s", self.dataset)
        elif self.overwrite:
            self.work.clear()
        else:
            raise _half_made(self.dataset, differences)
        rows = self.source.expected_rows()
        plan = Plan(
            names=tuple(file.name for file in self.source.files),
            source_bytes=self.source.bytes,
            rows=rows,
            shuffled=self.config.shuffle != "none",
            made_bytes=self.work.bytes,
            ceiling=self.ceiling,
        )
        plan.tell(self.dataset)
        self._require_permutable(rows)

    def _require_permutable(self, rows: int) -> None:
        """Refuse an order that would take too much memory.

        Raises:
            UserError: It does; what was read is of use with more.
        """
        needed = permutation_bytes(rows)
        if self.config.shuffle in ("reference", "reference-day") and needed > self.memory:
            remedy = (
                "Raise --memory to go on, or start over with --shuffle total --overwrite."
                if self.work.is_begun
                else "Use --shuffle total, or raise --memory."
            )
            raise _MendableError(
                f"--shuffle {self.config.shuffle} draws a permutation of about {rows:,} rows, for "
                f"which {size_text(needed)} of memory are needed and {size_text(self.memory)} are "
                f"left. {remedy}"
            )

    @property
    def _spool(self) -> Path:
        return self.work.folder / "spool"

    def run(self, observe: Callable[[str, float], None] | None) -> None:
        """Go through all stages, from where an earlier process stopped, each of them observed."""
        stage = partial(_stage, observe=observe)
        self.work.begin(Inputs(tuple(map(as_source, self.source.files)), self.config))
        spool = Spool(self._spool)
        with stage("read"):
            self.source.read(spool, self.config, table_bytes=self.memory, threads=self.parsers)
        days = self._days(spool)
        split = days.split
        with stage("fit"):
            fitted = self._fit(spool, split)
        schema = self._schema(fitted)
        arranger = Arranger(spool, schema, fitted, self.work.folder)
        with stage("arrange"):
            runs = self._arrange(spool, split, schema, arranger)
        with stage("write"):
            splits = self._write(split, schema, arranger, runs)
        manifest = Manifest(
            splits=splits,
            schema_fingerprint=schema.fingerprint,
            sources=self.source.records(spool),
            options=self.config,
            days=split.days,
            day_clicks=days.clicks,
            missing=_sum_missing([segment.missing for segment in spool.segments]),
            rows_dropped=sum(segment.candidates - segment.rows for segment in spool.segments),
            rows_rejected=sum(sum(segment.rejected.values()) for segment in spool.segments),
            rejected=_sum_counts([segment.rejected for segment in spool.segments]),
            rejected_examples=tuple(row for each in spool.segments for row in each.examples),
        )
        for each, rows in split.ranges.items():
            assert splits[each].rows == len(rows)  # what comes out is what went in
        assert sum(each.clicks for each in splits.values()) == sum(days.clicks)
        with stage("verify"):
            verify(Dataset(self.work.dataset, schema, manifest), workers=self.workers)
        self._keep_truth(manifest)
        try:
            publish(self.work.dataset, self.dataset, schema, manifest, overwrite=self.overwrite)
        except UserError as error:  # something was put there meanwhile
            raise _MendableError(str(error)) from error
        self.work.remove()

    def _keep_truth(self, manifest: Manifest) -> None:
        """Put the truth of made-up rows beside them, where it is that of their splits."""
        if len(self.source.files) != 1 or manifest.rows_rejected or manifest.rows_dropped:
            return
        rows, clicks = sum(manifest.days), sum(manifest.day_clicks)
        truth = truth_of(self.source.files[0].path, rows, clicks)
        if truth and truth.test.samples == manifest.splits["test"].rows:
            write_json(self.work.dataset / "truth.json", truth)

    def _days(self, spool: Spool) -> _Days:
        """Cut the rows into days and splits, unless that was done before segments were removed."""
        record = self.work.folder / "days.json"
        if record.exists():
            return read_json(record, _Days, "preparation")
        split = self._split(spool)
        clicks = np.zeros(len(split.days), np.int64)
        ends = np.cumsum(split.days)
        for segment in spool.segments:
            clicked = np.flatnonzero(spool.labels(segment.number)) + segment.first_row
            days = np.searchsorted(ends, clicked, side="right")
            clicks += np.bincount(days, minlength=len(clicks))
        cut = _Days(split, tuple(clicks.tolist()))
        write_json(record, cut)
        return cut

    def _split(self, spool: Spool) -> SplitRows:
        """Cut the rows of the spool into days and splits.

        Raises:
            UserError: A split would be empty.
        """
        name = str(self.source.files[0].path if len(self.source.files) == 1 else "the source")
        by_day = self.source.rows_by_day(spool)
        if fixed := self.source.fixed_split:
            split = fixed
        elif self.source.split == "none":
            split = SplitRows(by_day, 0, 0)
        elif self.source.split == "days":
            split = hold_back_last(by_day)
        else:
            last = spool.segments[-1]
            # The days are cut before rows are dropped.
            days = day_lengths(last.first_candidate + last.candidates, name)
            ends = [_rows_before(spool, end) for end in np.cumsum(days).tolist()]
            split = hold_back_last(tuple(np.diff([0, *ends]).tolist()))
        for each, rows in split.ranges.items():
            if not rows and (each == "train" or self.source.split != "none"):
                raise UserError(
                    f"{name} leaves no rows for the {each} split: its days have "
                    f"{', '.join(map(str, split.days))} rows. Use more rows, or another --split."
                )
        return split

    def _fit(self, spool: Spool, split: SplitRows) -> list[FittedFeature]:
        if self.config.hash_buckets:
            return []
        vocabularies = self.work.dataset / "vocabulary"
        if self.source.has_values:
            with environment_faults(f"write to {vocabularies}"):
                vocabularies.mkdir(exist_ok=True)
        train_rows = len(split.ranges["train"])

        memory = self.memory // self.workers

        def fit(feature: int) -> FittedFeature:
            file = vocabularies / _vocabulary_name(feature)
            return self.source.fit(
                spool,
                feature,
                file,
                self.work.folder,
                self.config,
                train_rows=train_rows,
                memory=memory,
            )

        return self._each("fit", range(len(criteo.SPARSE_NAMES)), fit, "vocabularies")

    def _schema(self, fitted: Sequence[FittedFeature]) -> FeatureSchema:
        buckets = self.config.hash_buckets
        sizes = [each.num_embeddings for each in fitted] or [buckets] * len(criteo.SPARSE_NAMES)
        schema = criteo.schema(tuple(sizes), RULES[self.source.split])
        sparse = [
            dataclasses.replace(
                feature, value_modulus=self.config.max_ind_range, hash_buckets=buckets
            )
            for feature in schema.sparse
        ]
        for index, each in enumerate(fitted):
            sparse[index] = dataclasses.replace(
                sparse[index],
                vocabulary=_vocabulary_name(index) if each.vocabulary_sha256 else "",
                vocabulary_sha256=each.vocabulary_sha256,
                other_id=each.other_id,
            )
        return dataclasses.replace(schema, sparse=tuple(sparse)).sealed()

    def _arrange(
        self, spool: Spool, split: SplitRows, schema: FeatureSchema, arranger: Arranger
    ) -> Runs | None:
        """Write runs of training rows, sorted by part; None where rows keep their order."""
        if self.config.shuffle == "none":
            return None
        train = split.ranges["train"]
        self._require_permutable(len(train))
        order = StoredOrder(
            split.train_days, self.config.shuffle, self.config.seed, part_rows(schema)
        )
        segments = list(spool.segments_of(train))
        # Not by memory or cores, so that it is the same when an interrupted one goes on.
        size = min(_MOST_SEGMENTS_PER_RUN, math.ceil(len(segments) / _RUNS))
        grouped = [segments[start : start + size] for start in range(0, len(segments), size)]

        def arrange(number: int) -> Path:
            path = self.work.folder / f"run-{number:05}.rows"
            if not path.exists():
                arranger.write_run(path, grouped[number], order, len(train))
            for segment in grouped[number]:
                if segment.end_row <= len(train):
                    spool.remove_rows(segment.number)
            return path

        paths = self._each("arrange", range(len(grouped)), arrange, "runs", held=order.nbytes)
        return Runs(paths, order.parts, schema)

    def _write(
        self,
        split: SplitRows,
        schema: FeatureSchema,
        arranger: Arranger,
        runs: Runs | None,
    ) -> dict[Split, StoredSplit]:
        """Write the parts of all splits."""
        step = part_rows(schema)
        jobs: list[tuple[Split, int, Callable[[], Iterator[Rows]]]] = []
        for each, rows in split.ranges.items():
            if each == "train" and runs:
                for number in range(runs.parts):
                    jobs.append((each, number, partial(runs.part, number)))
            else:
                for number, start in enumerate(range(rows.start, rows.stop, step)):
                    some = range(start, min(start + step, rows.stop))
                    jobs.append((each, number, partial(arranger.in_order, some)))

        def write(job: int) -> WrittenPart:
            each, number, make = jobs[job]
            record = self.work.folder / f"part-{each}-{number:05}.json"
            if record.exists():
                return read_json(record, WrittenPart, "preparation")
            written = write_part(self.work.dataset, part_name(each, number), schema, make())
            write_json(record, written)
            return written

        held = runs.nbytes if runs else 0
        written = self._each("write", range(len(jobs)), write, "parts", held=held)
        return {
            each: stored_split(
                part for (split_, _, _), part in zip(jobs, written, strict=True) if split_ == each
            )
            for each in SPLITS
        }

    def _each(
        self,
        stage: str,
        items: Sequence[int],
        work: Callable[[int], T],
        unit: str,
        *,
        held: int = 0,
    ) -> list[T]:
        """Work on items on several threads, with a progress bar; return the results in order.

        Args:
            stage: Its name.
            items: Numbers of what is to be done.
            work: Does one.
            unit: What an item is, in the plural.
            held: Bytes of memory that all of them use together.
        """
        pool = ThreadPoolExecutor(self._workers_beside(held))
        try:
            return list(progress(stage, len(items), pool.map(work, items), unit=unit))
        finally:
            pool.shutdown(cancel_futures=True)


@contextmanager
def _stage(name: str, observe: Callable[[str, float], None] | None) -> Iterator[None]:
    """Tell how long a stage took, and give back the memory that it freed."""
    started = time.perf_counter()
    yield
    # The C library keeps hundreds of megabytes that threads freed, for themselves.
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):  # glibc's alone
        trim(0)
    seconds = time.perf_counter() - started
    logger.info("%-8s %7.1f s", name, seconds)
    if observe:
        observe(name, seconds)


@dataclass(frozen=True)
class _Days:
    split: SplitRows
    clicks: tuple[int, ...]
    """Of each day."""
    format_version: str = FORMAT_VERSION


def _vocabulary_name(feature: int) -> str:
    return f"{criteo.SPARSE_NAMES[feature]}.arrow"


def _rows_before(spool: Spool, candidate: int) -> int:
    """Return how many rows are left of the first so many well-formed ones."""
    for segment in spool.segments:
        within = candidate - segment.first_candidate
        if within <= segment.candidates:
            if segment.rows == segment.candidates:
                return segment.first_row + within
            candidates = spool.candidates(segment.number)
            return segment.first_row + int(np.searchsorted(candidates, within))
    raise AssertionError(candidate)


def _sum_missing(missing: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    return tuple(map(sum, zip(*missing, strict=True)))


def _sum_counts(counts: Sequence[Mapping[str, int]]) -> dict[str, int]:
    total: Counter[str] = Counter()
    for each in counts:
        total.update(each)
    return dict(sorted(total.items()))


def _finished(dataset: Path, source: RowSource, config: PrepareConfig) -> Dataset | None:
    """Open a DATASET, if there is one; it must be made from this source with these options.

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
    options = found.manifest.options or PrepareConfig()
    if differences := find_differences(found.manifest.sources, options, source.files, config):
        raise UserError(
            f"{dataset} is another DATASET: {'; '.join(differences)}. Choose another one, or start "
            "over with --overwrite."
        )
    names = ", ".join(str(file.path) for file in source.files)
    logger.info("%s is prepared already from %s with these options", dataset, names)
    return found
