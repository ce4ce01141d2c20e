"""Raw rows of Criteo's logs: the only place that knows 13 and 26.

A row is a line of tab-separated fields: a label (0 or 1; absent in Kaggle's test.txt), 13 integers
and 26 ids of 8 hexadecimal digits. An integer or id may be empty, which means missing. The Kaggle
challenge and the 1TB click logs have the same rows.
"""

from __future__ import annotations

import logging
import re
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import IO, Literal

import numpy as np
import numpy.typing as npt

from dlrm.data.lines import GZIP, LineBlock, read_lines
from dlrm.data.row_parser import (
    MARGIN,
    MAX_LINE_BYTES,
    BadLine,
    Layout,
    ParsedBlock,
    Reason,
    parse_block,
    shown,
)
from dlrm.device import available_cores
from dlrm.errors import UserError
from dlrm.files import environment_faults
from dlrm.schema import DenseFeature, FeatureSchema, SparseFeature

SOURCE_FORMAT = "criteo-kaggle"
LABEL = "label"
DENSE_NAMES = tuple(f"int_{index}" for index in range(13))
SPARSE_NAMES = tuple(f"cat_{index}" for index in range(26))

BLOCK_BYTES = 4 << 20
"""Bytes parsed at a time: large enough that Python's share is small, small enough that the arrays
of a block are no burden."""
BLOCK_MEMORY = 4 * BLOCK_BYTES
"""Memory that a block takes while it is parsed, about: its text, its rows in pieces, and whole."""
_HEAD_BYTES = 1 << 20
_TAB = b"\t"
_NAME = re.compile(rb"[\"']?[A-Za-z_]\w*[\"']?")
_OTHER_SEPARATORS = {b",": "commas", b";": "semicolons", b" ": "spaces"}
_FEATURES = len(DENSE_NAMES) + len(SPARSE_NAMES)
FIELDS = (_FEATURES, _FEATURES + 1)
"""How many a row has, without and with a label."""
logger = logging.getLogger("dlrm")


@dataclass(frozen=True)
class Position:
    """A place between two lines of a file.

    Attributes:
        offset: Bytes of the text before it, unpacked if the file is packed.
        line: Lines before it.
        row: Accepted rows before it.
    """

    offset: int = 0
    line: int = 0
    row: int = 0


@dataclass(frozen=True)
class RejectedLine:
    """A line that was skipped.

    Attributes:
        line: Its number in the file, from 1.
        reason: What is wrong, in one word.
        message: What is wrong, in full.
    """

    line: int
    reason: Reason
    message: str


@dataclass(frozen=True, eq=False)
class RawBlock:
    """The rows of consecutive lines of a file, n of them; none if every line was rejected.

    Attributes:
        start: Where the lines begin.
        end: Where they end, and reading can go on.
        labels: (n,) uint8 zeros and ones, or None where rows have no label.
        dense: (n, 13) int32; missing and negative values are 0.
        sparse: (n, 26) uint32 values of the hexadecimal ids; missing ones are 0.
        missing: (13,) in how many rows each integer is missing.
        rejected: How many lines are no rows, by reason, the commonest first.
        examples: The first of them, up to ``EXAMPLES`` of each reason.
        is_terminated: Whether the last line has a line end; only a file's last may lack it.
    """

    start: Position
    end: Position
    labels: npt.NDArray[np.uint8] | None
    dense: npt.NDArray[np.int32]
    sparse: npt.NDArray[np.uint32]
    missing: npt.NDArray[np.int64]
    rejected: Mapping[Reason, int]
    examples: tuple[RejectedLine, ...]
    is_terminated: bool

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.dense)


def schema(num_embeddings: tuple[int, ...], split_rule: str) -> FeatureSchema:
    """Describe Criteo's features.

    Args:
        num_embeddings: Rows of each of the 26 tables.
        split_rule: How rows are split, in words.
    """
    return FeatureSchema(
        label=LABEL,
        dense=tuple(DenseFeature(name) for name in DENSE_NAMES),
        sparse=tuple(
            SparseFeature(name, count)
            for name, count in zip(SPARSE_NAMES, num_embeddings, strict=True)
        ),
        source_format=SOURCE_FORMAT,
        split_rule=split_rule,
    )


def estimate_rows(path: Path) -> int:
    """Return about how many rows a file of raw rows has, from the first of them."""
    with environment_faults(f"read {path}"):
        size = path.stat().st_size
        with open(path, "rb") as content:
            head = content.read(_HEAD_BYTES)
    unpacked = head
    if head.startswith(GZIP):
        with suppress(zlib.error):  # reading it will say what is wrong
            unpacked = zlib.decompressobj(zlib.MAX_WBITS | 16).decompress(head)
    lines = unpacked.count(b"\n")
    if not lines:
        return 1
    bytes_of_row = len(head) * (unpacked.rfind(b"\n") + 1) / len(unpacked) / lines
    return round(size / bytes_of_row)


def read_blocks(
    path: Path,
    *,
    labelled: bool | None = None,
    start: Position | None = None,
    bad_rows: Literal["error", "skip"] = "error",
    block_bytes: int = BLOCK_BYTES,
    threads: int | None = None,
    observe: Callable[[bytes], None] | None = None,
    file: IO[bytes] | None = None,
) -> Iterator[RawBlock]:
    """Read a file of rows in order, plain or packed with gzip, in bounded memory.

    Lines may end in LF or CRLF. A file whose last line has no end is read, with a warning. What a
    block holds does not depend on threads; to read on from a block's end gives the blocks that an
    uninterrupted reading gives (where ``labelled`` is told).

    Args:
        path: train.txt, test.txt, day_0 or a file like them.
        labelled: Whether rows begin with a label; None: as the number of fields of the first line
            says, or of the first that can be a row if bad ones are skipped.
        start: Where to begin; None: at the beginning. A file packed with gzip is unpacked from its
            beginning all the same.
        bad_rows: What a malformed line is: an error, or skipped and counted.
        block_bytes: Bytes of the lines that are parsed at a time.
        threads: How many to parse on; None: as many as there are cores.
        observe: Called with every run of bytes as they are in the file, packed or not, in order.
            With it the file is read from its beginning, wherever ``start`` is.
        file: The file, opened, in the place of ``path``, which then is its name in messages.

    Raises:
        UserError: The file is missing, empty, cut short or packed otherwise, or a row is malformed;
            the first such row of the file is named by line and column.
        EnvironmentFaultError: The file cannot be read.
    """
    position = start or Position()
    threads = threads or available_cores()
    blocks = read_lines(
        path,
        margin=MARGIN,
        block_bytes=block_bytes,
        max_line_bytes=MAX_LINE_BYTES,
        offset=position.offset,
        skip_long=bad_rows == "skip",
        observe=observe,
        file=file,
    )
    with environment_faults(f"read {path}"), ThreadPoolExecutor(threads) as pool:
        first = next(blocks, None)
        if first is None:
            if position.offset:
                return
            raise UserError(f"{path} is empty. Check that it was downloaded or unpacked whole.")
        inferred = labelled is None
        if labelled is None:
            labelled = _has_label(path, first, position.line, skip=bad_rows == "skip")
        layout = Layout(labelled, len(DENSE_NAMES), len(SPARSE_NAMES))
        unread = chain([first], blocks)
        parsing: deque[tuple[LineBlock, Future[ParsedBlock]]] = deque()
        failure: Exception | None = None
        while True:
            # One block more than there are threads, so that none waits for the reader.
            while failure is None and len(parsing) <= threads:
                try:
                    block = next(unread, None)
                except Exception as error:  # raised once the blocks before it are read
                    failure = error
                    break
                if block is None:
                    break
                future = pool.submit(
                    parse_block, block.buffer, layout, first_only=bad_rows == "error"
                )
                parsing.append((block, future))
            if not parsing:
                break
            block, future = parsing.popleft()
            parsed = future.result()
            examples = tuple(
                RejectedLine(
                    position.line + bad.index + 1,
                    bad.error.reason,
                    _message(path, position.line, bad, labelled=labelled, inferred=inferred),
                )
                for bad in parsed.examples
            )
            if examples and bad_rows == "error":
                raise UserError(examples[0].message)
            if not block.is_terminated:
                logger.warning(
                    "%s: the last line has no line end; it is read as it is, but the file may be "
                    "cut short",
                    path,
                )
            end = Position(
                block.end, position.line + parsed.lines, position.row + len(parsed.dense)
            )
            yield RawBlock(
                position,
                end,
                parsed.labels,
                parsed.dense,
                parsed.sparse,
                parsed.missing,
                dict(parsed.rejected.most_common()),
                examples,
                block.is_terminated,
            )
            position = end
        if failure is not None:
            raise failure


def _has_label(path: Path, block: LineBlock, lines_before: int, *, skip: bool) -> bool:
    """Tell from the number of fields of a first line whether rows have labels.

    Args:
        path: For messages.
        block: The first lines.
        lines_before: How many lines of the file are before them.
        skip: Look on for a line of either number of fields.
    """
    lines = bytes(block.buffer[MARGIN:-1]).split(b"\n")
    for line in lines if skip else lines[:1]:
        fields = line.count(_TAB) + 1
        if fields in FIELDS:
            return fields == _FEATURES + 1
    first = lines[0]
    remedy = _line_remedy(first, lines_before, labelled=False)
    raise UserError(
        f"{path}, line {lines_before + 1}: expected {_FEATURES + 1} tab-separated fields (a label, "
        f"{len(DENSE_NAMES)} integers, {len(SPARSE_NAMES)} ids) or {_FEATURES} (no label), got "
        f"{first.count(_TAB) + 1}: {shown(first)}. {remedy}"
    )


def _line_remedy(line: bytes, row: int, *, labelled: bool) -> str:
    """Return what to do about a malformed line.

    Args:
        line: All of it.
        row: Its number in the file, from 0.
        labelled: Whether rows must have a label.
    """
    features = len(DENSE_NAMES) + len(SPARSE_NAMES)
    for separator, name in _OTHER_SEPARATORS.items():
        if _TAB not in line and line.count(separator) + 1 in (features, features + 1):
            return f"Its fields are separated by {name}: put tabs in their place."
    if row == 0 and _NAME.fullmatch(line.split(_TAB)[0]):
        return "It looks like a header: remove it, every line must be a row."
    if row == 0 and labelled and line.count(_TAB) + 1 == features:
        return (
            "It has no label, as in Criteo's test.txt, which cannot be trained on: name train.txt."
        )
    return "Mend or remove that line, or get the file again."


def _message(path: Path, lines_before: int, bad: BadLine, *, labelled: bool, inferred: bool) -> str:
    """Say what is wrong with a line, and what to do.

    Args:
        path: Its file.
        lines_before: Lines of the file before its block.
        bad: The line.
        labelled: Whether rows begin with a label.
        inferred: Whether that is what the first line was taken for.
    """
    names = ((LABEL,) if labelled else ()) + DENSE_NAMES + SPARSE_NAMES
    column = bad.error.column
    name = names[column] if column < len(names) else "beyond the last"
    number = lines_before + bad.index
    # What the first row is taken for matters if it, or a row unlike it, may have lost a field.
    doubtful = number == 0 or bad.line.count(_TAB) + 1 != len(names)
    reason = (
        f" (the first row has {len(names)} fields, so rows are read as "
        f"{'labelled' if labelled else 'unlabelled'})"
    )
    return (
        f"{path}, line {number + 1}, column {column + 1} ({name}): expected {bad.error.expected}, "
        f"got {bad.error.got}{reason if inferred and doubtful else ''}. "
        f"{bad.error.remedy or _line_remedy(bad.line, number, labelled=labelled)}"
    )
