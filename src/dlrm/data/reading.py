"""From a source to a spool: rows are read, checked, thinned out and numbered, in their order."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt

from dlrm.config import PrepareConfig
from dlrm.data import criteo
from dlrm.data.numbering import FeatureNumberings
from dlrm.data.prepared import Block, PreparedRows
from dlrm.data.source_files import PIPE, SourceFile, require_unchanged
from dlrm.data.spool import Columns, RejectedRow, Segment, Spool
from dlrm.data.vocabulary import taken_modulo
from dlrm.errors import UserError

SEGMENT_ROWS = 1 << 18
"""Rows of a segment, about: what is numbered, written and, if need be, read again at a time."""
_EXAMPLES = 20
"""Skipped rows that are kept to be shown."""

_Values = npt.NDArray[np.uint32]


def read_raw(
    files: Sequence[SourceFile],
    spool: Spool,
    config: PrepareConfig,
    *,
    table_bytes: int,
    threads: int,
    progress: Callable[[int], object],
) -> None:
    """Read raw rows into a spool, from where it ends.

    Args:
        files: Of raw rows, in order.
        spool: Empty, or what an interrupted preparation of the same source left.
        config: What becomes of rows and values.
        table_bytes: Memory for the numbers of values.
        threads: How many to parse and to number on.
        progress: Told of the bytes of the source that were read.

    Raises:
        UserError: A row is malformed, or there are too many such rows.
        EnvironmentFaultError: A disk is full or fails.
    """
    with (
        _named_as_source(files[0]),
        ThreadPoolExecutor(threads) as pool,
        ThreadPoolExecutor(1) as writer,
    ):
        reader = _RawReader(files, spool, config, table_bytes, threads, progress, pool, writer)
        for number, file in enumerate(files):
            last = reader.last
            if last is None or last.file < number:
                reader.read_file(number, criteo.Position())
            elif last.file == number and not last.source_sha256:
                reader.read_file(number, criteo.Position(last.end, last.lines))
            else:
                progress(file.bytes)


@contextmanager
def _named_as_source(file: SourceFile) -> Iterator[None]:
    """Name in errors what a user knows: not the file to which a pipe was copied."""
    try:
        yield
    except UserError as error:
        if file.name != PIPE:
            raise
        raise UserError(str(error).replace(str(file.path), "standard input")) from error


def read_prepared(rows: PreparedRows, spool: Spool, *, progress: Callable[[int], object]) -> None:
    """Read rows that are numbered already into a spool, from where it ends.

    Args:
        rows: What the reference has prepared.
        spool: Empty, or what an interrupted preparation of the same rows left.
        progress: Told of the rows that were read.

    Raises:
        UserError: A file is damaged.
        EnvironmentFaultError: A disk is full or fails.
    """
    progress(spool.rows)
    pending: list[Block] = []
    for block in rows.blocks(spool.rows):
        pending.append(block)
        progress(len(block[0]))
        if sum(len(labels) for labels, _, _ in pending) >= SEGMENT_ROWS:
            _append_prepared(spool, pending)
            pending = []
    if pending:
        _append_prepared(spool, pending)


def _append_prepared(spool: Spool, blocks: Sequence[Block]) -> None:
    labels, dense, ids = (np.concatenate(each) for each in zip(*blocks, strict=True))
    segment = Segment(
        number=len(spool.segments),
        file=0,
        end=0,
        lines=0,
        first_row=spool.rows,
        rows=len(labels),
        first_candidate=spool.rows,
        candidates=len(labels),
    )
    spool.append(segment, Columns(labels, list(dense.T), list(ids.T), _NO_VALUES), [])


class _RawReader:
    def __init__(
        self,
        files: Sequence[SourceFile],
        spool: Spool,
        config: PrepareConfig,
        table_bytes: int,
        threads: int,
        progress: Callable[[int], object],
        pool: ThreadPoolExecutor,
        writer: ThreadPoolExecutor,
    ) -> None:
        self._files = files
        self._spool = spool
        self._config = config
        self._threads = threads
        self._progress = progress
        self._pool = pool
        self._writer = writer
        self._writing: Future[None] | None = None
        self.last = spool.segments[-1] if spool.segments else None
        """The last segment, which may still be on its way to the disk."""
        self._rejected = sum(sum(segment.rejected.values()) for segment in spool.segments)
        self._examples = sum(len(segment.examples) for segment in spool.segments)
        # The reference draws a number for each row, day by day; one stream gives the same numbers.
        self._random_state = np.random.RandomState(config.seed)
        if self.last is not None and config.data_sub_sample_rate:
            self._skip_draws(self.last.first_candidate + self.last.candidates)
        self._numberings = FeatureNumberings(len(criteo.SPARSE_NAMES), table_bytes)
        if self.last is not None:
            list(pool.map(self._restore, range(len(criteo.SPARSE_NAMES))))

    def _restore(self, feature: int) -> None:
        assert self.last is not None
        values = [
            self._spool.new_values(segment.number, feature)
            for segment in self._spool.segments
            if segment.generations[feature] == self.last.generations[feature]
        ]
        self._numberings.restore(feature, self.last.generations[feature], values)

    def read_file(self, number: int, start: criteo.Position) -> None:
        """Read a file of the source, or the rest of one that was read up to ``start``."""
        file = self._files[number]
        digest = hashlib.sha256()

        def observe(chunk: bytes) -> None:
            digest.update(chunk)
            self._progress(len(chunk))

        blocks: list[criteo.RawBlock] = []
        rows, end = 0, start
        is_terminated = True
        if self.last and self.last.file == number:
            is_terminated = not self.last.lacks_last_newline
        for block in criteo.read_blocks(
            file.path,
            labelled=True,
            observe=observe,
            start=start,
            bad_rows=self._config.bad_rows,
            threads=self._threads,
        ):
            blocks.append(block)
            rows, end, is_terminated = rows + len(block), block.end, block.is_terminated
            if rows >= SEGMENT_ROWS:
                self._write_segment(number, blocks, end, lacks_last_newline=not is_terminated)
                blocks, rows = [], 0
        require_unchanged([file])
        self._write_segment(
            number, blocks, end, digest.hexdigest(), lacks_last_newline=not is_terminated
        )
        self._wait()

    def _write_segment(
        self,
        file: int,
        blocks: Sequence[criteo.RawBlock],
        end: criteo.Position,
        source_sha256: str = "",
        *,
        lacks_last_newline: bool = False,
    ) -> None:
        labels = np.concatenate([np.zeros(0, np.uint8), *(block.labels for block in blocks)])
        dense = np.concatenate([_NO_DENSE, *(block.dense for block in blocks)])
        candidates = len(labels)
        kept = self._kept(labels)
        if kept is not None:
            labels, dense = labels[kept], dense[kept]
        sparse, new_values = self._numbered(blocks, kept)
        last = self.last
        segment = Segment(
            number=0 if last is None else last.number + 1,
            file=file,
            end=end.offset,
            lines=end.line,
            first_row=0 if last is None else last.end_row,
            rows=len(labels),
            first_candidate=0 if last is None else last.first_candidate + last.candidates,
            candidates=candidates,
            generations=tuple(self._numberings.generations),
            new_values=tuple(map(len, new_values)),
            missing=tuple(sum((block.missing for block in blocks), _NO_MISSING).tolist()),
            rejected=self._count_rejected(file, blocks),
            examples=self._take_examples(file, blocks),
            source_sha256=source_sha256,
            lacks_last_newline=lacks_last_newline,
        )
        columns = Columns(
            labels, list(dense.T), sparse, _NO_VALUES if kept is None else kept.astype(np.uint32)
        )
        self._wait()
        self._writing = self._writer.submit(self._spool.append, segment, columns, new_values)
        self.last = segment

    def _wait(self) -> None:
        """Wait until the last segment is written, or raise what came in the way."""
        if self._writing is not None:
            self._writing.result()
            self._writing = None

    def _skip_draws(self, count: int) -> None:
        """Draw the numbers of rows that were read already."""
        for start in range(0, count, SEGMENT_ROWS):
            self._random_state.random_sample(min(SEGMENT_ROWS, count - start))

    def _kept(self, labels: npt.NDArray[np.uint8]) -> npt.NDArray[np.int64] | None:
        """Return the rows that sub-sampling leaves; None: all."""
        rate = self._config.data_sub_sample_rate
        if not rate:
            return None
        return np.flatnonzero(
            (labels == 1) | (self._random_state.random_sample(len(labels)) >= rate)
        )

    def _numbered(
        self, blocks: Sequence[criteo.RawBlock], kept: npt.NDArray[np.int64] | None
    ) -> tuple[list[npt.NDArray[np.integer]], list[_Values]]:
        """Return each sparse column, and the values that are new in it."""
        if not self._config.hash_buckets:
            self._numberings.begin_segment(sum(map(len, blocks)))

        def number(feature: int) -> tuple[npt.NDArray[np.integer], _Values]:
            values = np.concatenate([_NO_VALUES, *(block.sparse[:, feature] for block in blocks)])
            if kept is not None:
                values = values[kept]
            values = taken_modulo(values, self._config.max_ind_range)
            if self._config.hash_buckets:
                return values, _NO_VALUES
            return self._numberings.number(feature, values)

        numbered = list(self._pool.map(number, range(len(criteo.SPARSE_NAMES))))
        return [each[0] for each in numbered], [each[1] for each in numbered]

    def _count_rejected(self, file: int, blocks: Sequence[criteo.RawBlock]) -> dict[str, int]:
        counted: Counter[str] = Counter()
        for block in blocks:
            counted.update(block.rejected)
            self._rejected += sum(block.rejected.values())
            if self._rejected > self._config.max_bad_rows:
                path = self._files[file].path
                raise UserError(
                    f"{path}, lines {block.start.line + 1} to {block.end.line}: with those before "
                    f"there are {self._rejected} malformed rows, and --max-bad-rows is "
                    f"{self._config.max_bad_rows}. Raise it if they may be left out. The first of "
                    f"these lines that is malformed: {block.examples[0].message}"
                )
        return dict(counted)

    def _take_examples(
        self, file: int, blocks: Sequence[criteo.RawBlock]
    ) -> tuple[RejectedRow, ...]:
        name = self._files[file].name
        lines = [line for block in blocks for line in block.examples][: _EXAMPLES - self._examples]
        self._examples += len(lines)
        path = str(self._files[file].path)  # which is no part of the DATASET
        return tuple(
            RejectedRow(name, line.line, line.reason, line.message.replace(path, name))
            for line in lines
        )


_NO_DENSE = np.zeros((0, len(criteo.DENSE_NAMES)), np.int32)
_NO_MISSING = np.zeros(len(criteo.DENSE_NAMES), np.int64)
_NO_VALUES = np.zeros(0, np.uint32)
