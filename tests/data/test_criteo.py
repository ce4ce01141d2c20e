from __future__ import annotations

import errno
import gzip
import os
import re
import threading
import tracemalloc
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dlrm.data import criteo, row_parser
from dlrm.data.criteo import Position, RawBlock, RejectedLine, read_blocks
from dlrm.errors import EnvironmentFaultError, UserError
from dlrm.ops.library import Library, library

INTEGERS = st.one_of(
    st.just(b""),
    st.integers(-50, 5000).map(lambda value: b"%d" % value),
    st.integers(-(2**63), 2**31 - 1).map(lambda value: b"%d" % value),
    st.sampled_from([b"-0", b"007", b"2147483647", b"-9223372036854775808", b"0" * 40 + b"1"]),
)
IDS = st.one_of(
    st.just(b""),
    st.integers(0, 2**32 - 1).map(lambda value: b"%08x" % value),
    st.text("0123456789abcdefABCDEF", min_size=8, max_size=8).map(str.encode),
)
LINES = st.tuples(
    st.sampled_from([b"0", b"1"]),
    st.lists(INTEGERS, min_size=13, max_size=13),
    st.lists(IDS, min_size=26, max_size=26),
).map(lambda row: b"\t".join([row[0], *row[1], *row[2]]))
LINE_END = st.sampled_from([b"\n", b"\r\n"])
# What is likely to be wrong with a field, beside what bytes may hold at all.
BYTES = st.one_of(st.sampled_from(list(b'\t\n\r \0"-+.0aAgxX\xff')), st.integers(0, 255))

# What begins so is taken for what it says it is: gzip, zip, zstd, bzip2, xz.
PACKED = (b"\x1f\x8b", b"PK\x03\x04", b"\x28\xb5\x2f\xfd", b"BZh", b"\xfd7zXZ")


class MalformedError(Exception):
    def __init__(self, line: int) -> None:
        super().__init__(line)
        self.line = line


def oracle_row(line: bytes, *, labelled: bool = True) -> list[int] | None:
    """A line as label (where there is one), 13 integers and 26 values; None if it is no row."""
    line = line.removesuffix(b"\r")
    fields = line.split(b"\t")
    if not labelled:
        fields.insert(0, b"0")
    if len(line) > 1 << 20 or len(fields) != 40 or fields[0] not in (b"0", b"1"):
        return None
    row = [int(fields[0])]
    for field in fields[1:14]:
        if not re.fullmatch(rb"(-?[0-9]+)?", field):
            return None
        value = int(field or b"0")
        if not -(2**63) <= value < 2**31:
            return None
        row.append(max(value, 0))
    for field in fields[14:]:
        if not re.fullmatch(rb"([0-9A-Fa-f]{8})?", field):
            return None
        row.append(int(field or b"0", 16))
    return row if labelled else row[1:]


def oracle_lines(content: bytes) -> list[bytes]:
    lines = content.split(b"\n")
    return lines if lines[-1] else lines[:-1]


def oracle(content: bytes, *, labelled: bool = True) -> list[list[int]]:
    """Every row of a file."""
    lines = oracle_lines(content)
    if not lines:
        raise MalformedError(0)
    rows = []
    for number, line in enumerate(lines, start=1):
        row = oracle_row(line, labelled=labelled)
        if row is None:
            raise MalformedError(number)
        rows.append(row)
    return rows


def rows_of(block: RawBlock) -> list[list[int]]:
    assert block.dense.dtype == np.int32
    assert block.sparse.dtype == np.uint32
    columns = [block.dense.astype(np.int64), block.sparse.astype(np.int64)]
    if block.labels is not None:
        assert block.labels.dtype == np.uint8
        columns.insert(0, block.labels[:, None].astype(np.int64))
    return np.concatenate(columns, axis=1).tolist()  # type: ignore[no-any-return]


def rows_in(blocks: list[RawBlock]) -> list[list[int]]:
    return [row for block in blocks for row in rows_of(block)]


def parsed(path: Path, **options: Any) -> list[list[int]]:
    rows = []
    position = Position()
    for block in read_blocks(path, **options):
        assert block.start == position
        assert block.end.row - block.start.row == len(block)
        position = block.end
        rows.extend(rows_of(block))
    return rows


@pytest.fixture(scope="module", params=["native", "plain"], autouse=True)
def parser(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every test runs with both parsers."""
    with pytest.MonkeyPatch.context() as patch:
        found = library() if request.param == "native" else Library(False, "for a test")
        assert found.loaded is (request.param == "native"), found.reason
        patch.setattr(row_parser, "library", lambda: found)
        yield request.param


@pytest.fixture(scope="session")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("criteo") / "train.txt"


def agrees_with_oracle(scratch: Path, content: bytes, **options: Any) -> None:
    """Check that the first bad line is named, and that all others are read if bad ones are not."""
    scratch.write_bytes(content)
    if content.startswith(PACKED):  # taken for what it says it is
        with pytest.raises(UserError, match=f"{re.escape(str(scratch))}.* gzip"):
            parsed(scratch, labelled=True, **options)
        return
    lines = oracle_lines(content)
    if lines:
        blocks = list(read_blocks(scratch, labelled=True, bad_rows="skip", **options))
        rows = [oracle_row(line) for line in lines]
        assert rows_in(blocks) == [row for row in rows if row is not None]
        accepted = [line for line, row in zip(lines, rows, strict=True) if row is not None]
        empty = [[not field for field in line.split(b"\t")[1:14]] for line in accepted]
        missing = np.sum([block.missing for block in blocks], axis=0)
        assert missing.tolist() == np.sum([[False] * 13, *empty], axis=0).tolist()
        examples = [example for block in blocks for example in block.examples]
        assert [example.line for example in examples] == [
            number for number, row in enumerate(rows, start=1) if row is None
        ]
        counted = sum((Counter(block.rejected) for block in blocks), Counter[str]())
        assert counted == Counter(example.reason for example in examples)
        assert blocks[-1].end == Position(len(content), len(lines), len(lines) - len(examples))
    try:
        expected = oracle(content)
    except MalformedError as malformed:
        place = f"line {malformed.line}," if malformed.line else "is empty"
        with pytest.raises(UserError, match=re.escape(f"{scratch}")) as caught:
            parsed(scratch, labelled=True, **options)
        assert place in str(caught.value)
    else:
        assert parsed(scratch, labelled=True, **options) == expected


def test_a_hand_made_row(scratch: Path) -> None:
    integers = ["1", "", "-1", "0", "2147483647", *[""] * 8]
    ids = ["0000000a", "FFFFFFFF", "", "deadBEEF", *[""] * 22]
    scratch.write_text("\t".join(["1", *integers, *ids]) + "\n")
    (block,) = read_blocks(scratch)
    assert block.labels is not None
    assert block.labels.tolist() == [1]
    assert block.dense.tolist() == [[1, 0, 0, 0, 2147483647, *[0] * 8]]
    assert block.sparse.tolist() == [[10, 0xFFFFFFFF, 0, 0xDEADBEEF, *[0] * 22]]


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(LINES, LINE_END), min_size=1, max_size=8), st.integers(1, 5000))
def test_valid_rows_are_read_as_they_are(
    scratch: Path, lines: list[tuple[bytes, bytes]], block_bytes: int
) -> None:
    content = b"".join(line + end for line, end in lines)
    scratch.write_bytes(content)
    assert parsed(scratch, block_bytes=block_bytes) == oracle(content)
    scratch.write_bytes(content[:-1])
    assert parsed(scratch, block_bytes=block_bytes) == oracle(content)


@settings(deadline=None, max_examples=60)
@given(st.lists(LINES, min_size=1, max_size=8), st.integers(1, 5000))
def test_rows_without_label(scratch: Path, lines: list[bytes], block_bytes: int) -> None:
    content = b"".join(line[2:] + b"\n" for line in lines)
    scratch.write_bytes(content)
    expected = oracle(content, labelled=False)
    assert parsed(scratch, block_bytes=block_bytes) == expected
    assert parsed(scratch, block_bytes=block_bytes, labelled=False) == expected


@settings(deadline=None, max_examples=120)
@given(
    st.lists(LINES, min_size=1, max_size=4),
    st.sampled_from(["replace", "insert", "delete"]),
    BYTES,
    st.floats(0, 1, exclude_max=True),
    st.sampled_from([50, 700, 1 << 20]),
)
def test_a_single_changed_byte_is_read_or_named(
    scratch: Path, lines: list[bytes], change: str, byte: int, place: float, block_bytes: int
) -> None:
    content = bytearray(b"".join(line + b"\n" for line in lines))
    position = int(place * len(content))
    if change == "insert":
        content.insert(position, byte)
    elif change == "replace":
        content[position] = byte
    else:
        del content[position]
    agrees_with_oracle(scratch, bytes(content), block_bytes=block_bytes)


@settings(deadline=None, max_examples=80)
@given(st.lists(LINES, min_size=1, max_size=3), st.integers(0, 39), st.binary(max_size=12))
@example([b"\t" * 39], 0, b"BZh")
@example([b"\t" * 39], 0, b"\x1f\x8b")
def test_any_field_is_read_or_named(
    scratch: Path, lines: list[bytes], column: int, field: bytes
) -> None:
    fields = lines[-1].split(b"\t")
    fields[column] = field
    agrees_with_oracle(scratch, b"\n".join([*lines[:-1], b"\t".join(fields), b""]))


def test_every_truncation_is_read_or_named(scratch: Path, made_up_lines: object) -> None:
    content = made_up_lines(2)  # type: ignore[operator]
    for length in range(len(content)):
        agrees_with_oracle(scratch, content[:length])


ROW = b"0\t" + b"\t".join([b"1"] * 13) + b"\t" + b"\t".join([b"0123abcd"] * 26)


def with_field(column: int, field: bytes) -> bytes:
    fields = ROW.split(b"\t")
    fields[column - 1] = field
    return b"\t".join(fields)


REMEDIES = {
    "a blank line": "Remove that line: every line is a row.",
    "'0123abc'": "Leading zeros are lost, as in a spreadsheet that took ids for numbers: write "
    "00123abc, or get the file again and keep its columns as text.",
    "'-'": "Leave it empty where a value is missing.",
    "' 5'": "Remove the spaces around it.",
    "'5 '": "Remove the spaces around it.",
}


@pytest.mark.parametrize(
    ("line", "place", "expected", "got"),
    [
        (b"", "column 1 (label)", "40 tab-separated fields", "a blank line"),
        (ROW[:-9], "column 40 (cat_25)", "40 tab-separated fields", "39: '0\\t1\\t"),
        (ROW + b"\t", "column 41 (beyond the last)", "40 tab-separated fields", "41: '0\\t1\\t"),
        (with_field(15, b"0123abcg"), "column 15 (cat_0)", "8 hexadecimal", "'0123abcg'"),
        (with_field(40, b"0123abc"), "column 40 (cat_25)", "8 hexadecimal", "'0123abc'"),
        (with_field(16, b"-123abcd"), "column 16 (cat_1)", "8 hexadecimal", "'-123abcd'"),
        (with_field(2, b"1.5"), "column 2 (int_0)", "an integer or nothing", "'1.5'"),
        (with_field(2, b"one"), "column 2 (int_0)", "an integer or nothing", "'one'"),
        (with_field(3, b"-"), "column 3 (int_1)", "an integer or nothing", "'-'"),
        (with_field(3, b"+5"), "column 3 (int_1)", "an integer or nothing", "'+5'"),
        (with_field(3, b" 5"), "column 3 (int_1)", "an integer or nothing", "' 5'"),
        (with_field(3, b"5 "), "column 3 (int_1)", "an integer or nothing", "'5 '"),
        (with_field(3, b"0x1f"), "column 3 (int_1)", "an integer or nothing", "'0x1f'"),
        (with_field(3, b"1e3"), "column 3 (int_1)", "an integer or nothing", "'1e3'"),
        (
            with_field(4, b"9" * 19),
            "column 4 (int_2)",
            "an integer of at most 2147483647 (32 bits)",
            "'9999999999",
        ),
        (
            with_field(4, b"2147483648"),
            "column 4 (int_2)",
            "an integer of at most 2147483647 (32 bits)",
            "'2147483648'",
        ),
        (with_field(4, b"-" + b"9" * 19), "column 4 (int_2)", "an integer of 64 bits", "'-999999"),
        (
            with_field(4, b"9" * 5000),
            "column 4 (int_2)",
            "an integer of at most 2147483647 (32 bits)",
            "'999999",
        ),
        (with_field(1, b"2"), "column 1 (label)", "a label, 0 or 1", "'2'"),
        (with_field(1, b""), "column 1 (label)", "a label, 0 or 1", "''"),
        (with_field(1, b"01"), "column 1 (label)", "a label, 0 or 1", "'01'"),
        (with_field(1, b'"0"'), "column 1 (label)", "a label, 0 or 1", "'\"0\"'"),
        (with_field(20, b'"23abcd"'), "column 20 (cat_5)", "8 hexadecimal", "'\"23abcd\"'"),
        (with_field(5, b'"1'), "column 5 (int_3)", "an integer or nothing", "'\"1'"),
        (with_field(5, b"\0"), "column 5 (int_3)", "an integer or nothing", "'\\x00'"),
        (with_field(21, b"\0" * 8), "column 21 (cat_6)", "8 hexadecimal", "'\\x00\\x00"),
        (with_field(21, b"\xff" * 8), "column 21 (cat_6)", "8 hexadecimal", "'\\xff\\xff"),
    ],
)
@pytest.mark.parametrize("rows_before", [1, 3])
def test_a_malformed_line_is_named(
    scratch: Path, line: bytes, place: str, expected: str, got: str, rows_before: int
) -> None:
    scratch.write_bytes(b"\n".join([*[ROW] * rows_before, line, ROW, b"also bad", b""]))
    with pytest.raises(UserError) as caught:
        list(read_blocks(scratch, block_bytes=100))
    message = str(caught.value).replace(
        " (the first row has 40 fields, so rows are read as labelled)", ""
    )
    assert message.startswith(f"{scratch}, line {rows_before + 1}, {place}: expected {expected}")
    assert f", got {got}" in message
    assert message.endswith(REMEDIES.get(got, "Mend or remove that line, or get the file again."))
    assert len(message) < 400


@pytest.mark.parametrize("line", [b"", b"0", ROW + b"\t", b"\xff\xfe", ROW.replace(b"\t", b" ")])
def test_a_first_line_of_neither_kind_is_named(scratch: Path, line: bytes) -> None:
    scratch.write_bytes(line + b"\n")
    with pytest.raises(UserError, match=r"line 1: expected 40 .* or 39 \(no label\), got"):
        list(read_blocks(scratch))


def test_an_unlabelled_row_among_labelled_ones_is_named(scratch: Path) -> None:
    scratch.write_bytes(ROW + b"\n" + ROW[2:] + b"\n")
    with pytest.raises(UserError, match=r"line 2, column 40 .*: expected 40 .* got 39"):
        list(read_blocks(scratch))


HEADER = b"\t".join(
    [
        b"label",
        *(b"int_%d" % index for index in range(13)),
        *(b"cat_%d" % index for index in range(26)),
    ]
)
SHOWN = repr(ROW)[1:41] + "…"
SHOWN_UNLABELLED = repr(ROW[2:])[1:41] + "…"
TABS = "put tabs in their place."


@pytest.mark.parametrize(
    ("content", "labelled", "message"),
    [
        # A test.txt where rows with labels are needed.
        (
            ROW[2:],
            True,
            "line 1, column 40 (cat_25): expected 40 tab-separated fields, got 39: "
            f"{SHOWN_UNLABELLED}. It has no label, as in Criteo's test.txt, which cannot be "
            "trained on: name train.txt.",
        ),
        # Other separators, in the first line and in a later one.
        (ROW.replace(b"\t", b","), True, f"separated by commas: {TABS}"),
        (ROW.replace(b"\t", b","), None, f"separated by commas: {TABS}"),
        (ROW.replace(b"\t", b" "), None, f"separated by spaces: {TABS}"),
        (ROW[2:].replace(b"\t", b";"), None, f"separated by semicolons: {TABS}"),
        (ROW + b"\n" + ROW.replace(b"\t", b","), None, f"separated by commas: {TABS}"),
        # Headers, of all columns, without the label, and of more columns.
        (HEADER, True, "got 'label'. It looks like a header: remove it, every line must be a row."),
        (
            HEADER[6:],
            None,
            "unlabelled). It looks like a header: remove it, every line must be a row.",
        ),
        (b"Id\t" + HEADER, None, "It looks like a header: remove it, every line must be a row."),
        # Compressed files.
        (
            b"PK\x03\x04",
            True,
            "line 1, column 1: expected tab-separated text, plain or packed with gzip, got a file "
            "packed with zip. Unpack it first.",
        ),
        # A labelled row that lost its last field is taken for an unlabelled one.
        (
            ROW[:-9],
            None,
            "line 1, column 14 (cat_0): expected 8 hexadecimal digits or nothing, got '1' (the "
            "first row has 39 fields, so rows are read as unlabelled). Mend or remove that line, "
            "or get the file again.",
        ),
        # One that lost an integer could be unlabelled, until another row follows.
        (
            ROW[2:] + b"\n" + ROW,
            None,
            "line 2, column 40 (beyond the last): expected 39 tab-separated fields, got 40: "
            f"{SHOWN} (the first row has 39 fields, so rows are read as unlabelled). Mend or "
            "remove that line, or get the file again.",
        ),
    ],
)
def test_what_to_do_is_said(
    scratch: Path, content: bytes, labelled: bool | None, message: str
) -> None:
    scratch.write_bytes(content + b"\n")
    with pytest.raises(UserError) as caught:
        list(read_blocks(scratch, labelled=labelled))
    assert str(caught.value).startswith(f"{scratch}, line ")
    assert str(caught.value).endswith(message)


def test_an_endless_line_is_refused_without_being_read_whole(scratch: Path) -> None:
    with open(scratch, "wb") as file:
        file.write(ROW + b"\n")
        file.truncate(1 << 34)  # 16 GiB of NUL bytes, which take no room on disk
    seen = 0

    def observe(chunk: bytes) -> None:
        nonlocal seen
        seen += len(chunk)

    expected = r"line 2, column 1 .*: expected a line of at most 1048576 bytes, got '\\x00"
    with pytest.raises(UserError, match=expected):
        list(read_blocks(scratch, observe=observe))
    assert seen < 1 << 25


LONGEST = b"0" * ((1 << 20) - len(ROW))


@pytest.mark.parametrize("block_bytes", [1 << 14, (1 << 20) + 1, 1 << 22])
@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
def test_the_longest_line(scratch: Path, block_bytes: int, end: bytes) -> None:
    longest = with_field(2, LONGEST + b"1")
    assert len(longest) == 1 << 20
    longer = with_field(2, LONGEST + b"01")
    for packed in (False, True):
        content = end.join([ROW, longest, with_field(1, b"1"), longer, b"", with_field(2, b"7")])
        scratch.write_bytes(gzip.compress(content, 1) if packed else content)
        blocks = list(read_blocks(scratch, block_bytes=block_bytes, bad_rows="skip"))
        rows = [ROW, ROW, with_field(1, b"1"), with_field(2, b"7")]
        assert rows_in(blocks) == [oracle_row(row) for row in rows]
        assert [(bad.line, bad.reason) for block in blocks for bad in block.examples] == [
            (4, "too long"),
            (5, "blank"),
        ]
        assert blocks[-1].end == Position(len(content), 6, 4)
        with pytest.raises(UserError, match=r"line 4, .* a line of at most 1048576 bytes, got '0"):
            parsed(scratch, block_bytes=block_bytes)


def test_a_line_of_any_length_is_skipped_in_little_memory(scratch: Path) -> None:
    length = 1 << 30
    with open(scratch, "wb") as file:
        file.write(ROW + b"\n")
        file.seek(length, 1)
        file.write(b"\n" + ROW + b"\n")
    tracemalloc.start()
    try:
        blocks = list(read_blocks(scratch, bad_rows="skip"))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert rows_in(blocks) == oracle(ROW + b"\n" + ROW)
    assert blocks[-1].end == Position(length + 2 * len(ROW) + 3, 3, 2)
    ((bad,),) = [block.examples for block in blocks if block.examples]
    assert (bad.line, bad.reason) == (2, "too long")
    assert len(bad.message) < 400
    assert peak < 32 << 20


def test_line_ends_of_windows_are_accepted(scratch: Path) -> None:
    for content in (b"\r\n".join([ROW, ROW, b""]), ROW + b"\r\n" + ROW + b"\n", ROW + b"\r"):
        scratch.write_bytes(content)
        for block_bytes in (len(ROW) + 1, 1 << 20):  # the first cuts between \r and \n
            assert parsed(scratch, block_bytes=block_bytes) == oracle(content)


def test_a_missing_last_line_end_is_warned_of(
    scratch: Path, caplog: pytest.LogCaptureFixture
) -> None:
    scratch.write_bytes(ROW + b"\n" + ROW + b"\n")
    assert len(parsed(scratch)) == 2
    assert not caplog.records
    scratch.write_bytes(ROW + b"\n" + ROW)
    assert len(parsed(scratch)) == 2
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert "the last line has no line end" in record.getMessage()


def test_missing_files(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    for path, message in [
        (tmp_path / "absent", "does not exist"),
        (tmp_path / "empty" / "below", "does not exist"),
        (tmp_path, "is a folder"),
        (tmp_path / "empty", "is empty"),
    ]:
        with pytest.raises(UserError, match=message):
            list(read_blocks(path))


def test_the_first_bad_line_of_many_blocks_is_named(scratch: Path) -> None:
    lines = [ROW] * 2000
    lines[700] = lines[650] = lines[1999] = with_field(1, b"5")
    scratch.write_bytes(b"\n".join([*lines, b""]))
    with pytest.raises(UserError, match="line 651, column 1 "):
        list(read_blocks(scratch, block_bytes=5000))


def test_reading_can_stop_early(scratch: Path) -> None:
    scratch.write_bytes((ROW + b"\n") * 2000)
    threads = threading.active_count()
    blocks = read_blocks(scratch, block_bytes=5000)
    assert len(next(blocks)) > 0
    blocks.close()  # type: ignore[attr-defined]
    assert threading.active_count() == threads


def test_what_was_read_is_observed_in_order(scratch: Path, made_up_lines: object) -> None:
    content = made_up_lines(100)  # type: ignore[operator]
    scratch.write_bytes(content)
    seen: list[bytes] = []
    list(read_blocks(scratch, block_bytes=999, observe=seen.append))
    assert b"".join(seen) == content


def same_blocks(blocks: list[RawBlock], expected: list[RawBlock]) -> bool:
    """Whether blocks are equal in all they hold."""
    assert len(blocks) == len(expected)
    for block, other in zip(blocks, expected, strict=True):
        for name, value in vars(other).items():
            assert np.array_equal(getattr(block, name), value), name
    return True


def damaged(content: bytes) -> bytes:
    """The same lines, some of them malformed."""
    lines = content.splitlines(keepends=True)
    for number in (3, 4, 40, 41, 77):
        lines[number] = lines[number].replace(b"\t", b" ", 1)
    lines[50] = b"\n"
    return b"".join(lines)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("observed", [False, True])
@pytest.mark.parametrize("block_bytes", [1, 300, 2000, 1 << 20])
def test_reading_goes_on_from_the_end_of_any_block(
    scratch: Path, made_up_lines: Any, packed: bool, observed: bool, block_bytes: int
) -> None:
    content = damaged(made_up_lines(100))
    stored = gzip.compress(content) if packed else content
    scratch.write_bytes(stored)
    options: dict[str, Any] = {
        "labelled": True,
        "bad_rows": "skip",
        "block_bytes": block_bytes,
    }
    whole = list(read_blocks(scratch, **options))
    assert len(whole) == {1: 100, 300: 99, 2000: 13, 1 << 20: 1}[block_bytes]
    for number in range(0, len(whole), 9):
        block = whole[number]
        assert content[: block.end.offset].count(b"\n") == block.end.line
        seen: list[bytes] = []
        observe = seen.append if observed else None
        rest = list(read_blocks(scratch, start=block.end, observe=observe, **options))
        assert same_blocks(rest, whole[number + 1 :])
        assert not observed or b"".join(seen) == stored
        # In other blocks there are the same rows and line numbers.
        options_of_others = {**options, "block_bytes": 777}
        others = list(read_blocks(scratch, start=block.end, **options_of_others))
        assert rows_in(others) == rows_in(rest)
        assert [bad for other in others for bad in other.examples] == [
            bad for other in rest for bad in other.examples
        ]


@pytest.mark.parametrize("packed", [False, True])
def test_a_start_beyond_the_end_is_refused(scratch: Path, packed: bool) -> None:
    content = ROW + b"\n"
    scratch.write_bytes(gzip.compress(content) if packed else content)
    assert list(read_blocks(scratch, start=Position(len(content), 1, 1))) == []
    with pytest.raises(UserError) as caught:
        list(read_blocks(scratch, start=Position(len(content) + 1, 1, 1)))
    assert str(caught.value) == (
        f"{scratch} has {len(content)} bytes of text, and was to be read on from byte "
        f"{len(content) + 1}. It was cut short or replaced: get the same file again, or start over."
    )


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(0, 20000), max_size=4), st.integers(100, 30000))
def test_gzip_is_read_as_what_it_unpacks_to(
    scratch: Path, made_up_lines: Any, cuts: list[int], block_bytes: int
) -> None:
    content = damaged(made_up_lines(100))
    options: dict[str, Any] = {"bad_rows": "skip", "block_bytes": block_bytes}
    scratch.write_bytes(content)
    plain = list(read_blocks(scratch, **options))
    # Of several members, some of them empty, with the padding of a tape between and after them.
    places = sorted([0, *cuts, len(content)])
    members = [
        gzip.compress(content[begin:end]) + bytes(begin % 3) for begin, end in pairwise(places)
    ]
    scratch.write_bytes(b"".join(members))
    seen: list[bytes] = []
    assert same_blocks(list(read_blocks(scratch, observe=seen.append, **options)), plain)
    assert b"".join(seen) == b"".join(members)


def test_every_cut_of_a_gzip_is_named(scratch: Path, made_up_lines: Any) -> None:
    content = made_up_lines(3)
    packed = gzip.compress(content, mtime=0) + gzip.compress(content, mtime=0)
    scratch.write_bytes(packed[: len(packed) // 2])
    assert parsed(scratch) == oracle(content)
    for length in [*range(2, len(packed) // 2), *range(len(packed) // 2 + 1, len(packed))]:
        scratch.write_bytes(packed[:length])
        with pytest.raises(UserError) as caught:
            parsed(scratch)
        assert str(caught.value) == (
            f"{scratch} is cut short at byte {length}, before the end of its gzip data. Get the "
            "file again."
        )


def test_a_damaged_gzip_is_named(scratch: Path, made_up_lines: Any) -> None:
    packed = bytearray(gzip.compress(made_up_lines(20), mtime=0))
    for position in (3, 10, len(packed) // 2, len(packed) - 5, len(packed) - 1):
        packed[position] ^= 0xFF
        scratch.write_bytes(packed)
        with pytest.raises(UserError, match=r"is damaged near byte|is cut short at byte|, line 1"):
            parsed(scratch)
        packed[position] ^= 0xFF
    scratch.write_bytes(packed + b"more")
    with pytest.raises(UserError, match=r"damaged near byte .* \(Error -3 .* header check\)\. Get"):
        parsed(scratch)


def test_an_empty_gzip_is_named(scratch: Path) -> None:
    scratch.write_bytes(gzip.compress(b""))
    with pytest.raises(UserError, match="is empty"):
        parsed(scratch)


def test_a_bad_row_is_named_rather_than_what_is_wrong_behind_it(scratch: Path) -> None:
    content = with_field(1, b"5") + b"\n" + (ROW + b"\n") * 2000
    scratch.write_bytes(gzip.compress(content)[:-1])
    for threads in (1, 50):
        with pytest.raises(UserError, match="line 1, column 1 "):
            list(read_blocks(scratch, block_bytes=5000, threads=threads))
        blocks = []
        with pytest.raises(UserError, match="cut short"):
            blocks.extend(read_blocks(scratch, block_bytes=5000, threads=threads, bad_rows="skip"))
        assert blocks[-1].end.row > 1950


@pytest.mark.parametrize("packed", [False, True])
def test_a_failing_disk_is_named(scratch: Path, packed: bool) -> None:
    content = (ROW + b"\n") * 2000
    scratch.write_bytes(gzip.compress(content) if packed else content)

    def fail(chunk: bytes) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with pytest.raises(EnvironmentFaultError, match=f"cannot read {scratch}: Input/output error"):
        list(read_blocks(scratch, block_bytes=5000, observe=fail))


def test_a_pipe_is_read(tmp_path: Path, made_up_lines: Any) -> None:
    content = made_up_lines(100)
    pipe = tmp_path / "pipe"
    for stored in (content, gzip.compress(content)):
        os.mkfifo(pipe)

        def write(stored: bytes = stored) -> None:
            with open(pipe, "wb", buffering=0) as file:
                for byte in stored[:10]:
                    file.write(bytes([byte]))
                file.write(stored[10:])

        writer = threading.Thread(target=write)
        writer.start()
        assert parsed(pipe, block_bytes=3000) == oracle(content)
        writer.join()
        pipe.unlink()


REASONS = {
    "blank": b"",
    "fields": ROW + b"\t",
    "label": with_field(1, b"2"),
    "integer": with_field(5, b"1.0"),
    "id": with_field(20, b"0x23abcd"),
    "too long": b"0" * ((1 << 20) + 1),
}


@pytest.mark.parametrize("labelled", [True, None])
@pytest.mark.parametrize("piece_bytes", [1, 1000, 1 << 23])
def test_skipped_lines_are_counted_by_reason(
    scratch: Path, labelled: bool | None, piece_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(row_parser, "PIECE_BYTES", piece_bytes)
    lines = [b"", b"label\tand\tmore", ROW]
    for count, line in enumerate(REASONS.values(), start=1):
        lines += [line] * count + [ROW]
    lines += [b""] * 30
    scratch.write_bytes(b"\n".join([*lines, b""]))
    (block,) = read_blocks(scratch, labelled=labelled, bad_rows="skip", block_bytes=1 << 24)
    assert rows_of(block) == [oracle_row(ROW)] * 7
    assert list(block.rejected.items()) == [
        ("blank", 32), ("too long", 6), ("id", 5), ("integer", 4), ("fields", 3), ("label", 3),
    ]  # fmt: skip
    assert block.end == Position(scratch.stat().st_size, len(lines), 7)
    assert Counter(bad.reason for bad in block.examples) == {
        "blank": row_parser.EXAMPLES, "too long": 6, "id": 5, "integer": 4, "fields": 3, "label": 3,
    }  # fmt: skip
    blank, header = block.examples[:2]
    if labelled:
        assert blank.message == (
            f"{scratch}, line 1, column 1 (label): expected 40 tab-separated fields, got a blank "
            "line. Remove that line: every line is a row."
        )
        assert header.message.startswith(f"{scratch}, line 2, column 4 (int_2): expected 40")
    for bad in block.examples:
        scratch.write_bytes(ROW + b"\n" + lines[bad.line - 1] + b"\n" + ROW + b"\n")
        with pytest.raises(UserError) as caught:
            parsed(scratch, labelled=labelled)
        skipping = read_blocks(scratch, labelled=labelled, bad_rows="skip")
        (again,) = [bad for block in skipping for bad in block.examples]
        assert again == RejectedLine(2, bad.reason, str(caught.value))


def test_a_file_without_any_row_can_be_skipped_through(scratch: Path) -> None:
    scratch.write_bytes(b"none\nat all\n")
    (block,) = read_blocks(scratch, labelled=True, bad_rows="skip")
    assert len(block) == 0
    assert block.labels is not None
    assert block.labels.shape == (0,)
    assert block.dense.shape == (0, 13)
    assert block.sparse.shape == (0, 26)
    assert block.end == Position(12, 2, 0)
    with pytest.raises(UserError, match=r"line 1: expected 40 .* got 1: 'none'"):
        list(read_blocks(scratch, bad_rows="skip"))


def fuzzed_line(generator: np.random.Generator, line: bytes) -> bytes:
    """A line with one to three changes; most are no rows."""
    changed = bytearray(line)
    for _ in range(generator.integers(1, 4)):
        position = int(generator.integers(len(changed) + 1))
        kind = generator.integers(6)
        byte = bytes([generator.integers(256)])
        if kind == 0:
            changed[position : position + 1] = byte
        elif kind == 1:
            changed[position:position] = generator.choice([b"\t", b"-", b"0", b"\0", b"f", b"\r"])
        elif kind == 2:
            del changed[position : position + int(generator.integers(1, 12))]
        elif kind == 3:
            changed[position:position] = b"9" * int(generator.integers(1, 25))
        elif kind == 4:
            fields = bytes(changed).split(b"\t")
            fields[generator.integers(len(fields))] = generator.choice(fields)
            changed = bytearray(b"\t".join(fields))
        else:
            changed[position:position] = byte * int(generator.integers(1, 4))
    return bytes(changed).replace(b"\n", b"")


@pytest.mark.parametrize(
    "count",
    [pytest.param(3000, id="few"), pytest.param(100_000, id="many", marks=pytest.mark.long)],
)
def test_fuzzed_lines(
    scratch: Path, made_up_lines: Any, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(row_parser, "PIECE_BYTES", 9000)
    generator = np.random.default_rng(count)
    good = made_up_lines(500).splitlines()
    lines = []
    for _ in range(count):
        line = good[generator.integers(len(good))]
        lines.append(line if generator.random() < 0.3 else fuzzed_line(generator, line))
    scratch.write_bytes(b"\n".join([*lines, b""]))
    rows = [oracle_row(line) for line in lines]
    blocks = list(read_blocks(scratch, labelled=True, bad_rows="skip", block_bytes=100_000))
    assert rows_in(blocks) == [row for row in rows if row is not None]
    assert sum(sum(block.rejected.values()) for block in blocks) == rows.count(None)
    assert 0.2 * count < rows.count(None) < 0.7 * count
    bad = {number for number, row in enumerate(rows, start=1) if row is None}
    for block in blocks:
        # The first of each reason are described.
        assert Counter(example.reason for example in block.examples) == {
            reason: min(number, row_parser.EXAMPLES) for reason, number in block.rejected.items()
        }
        numbers = [example.line for example in block.examples]
        assert numbers == sorted(bad & set(numbers))
        if sum(block.rejected.values()) == len(numbers):
            assert set(numbers) == {n for n in bad if block.start.line < n <= block.end.line}
    with pytest.raises(UserError, match=f"line {min(bad)}, column"):
        parsed(scratch, labelled=True)


def test_the_schema_describes_the_rows() -> None:
    schema = criteo.schema(tuple(range(1, 27)), "a rule")
    assert [feature.name for feature in schema.dense] == [f"int_{index}" for index in range(13)]
    assert [feature.name for feature in schema.sparse] == [f"cat_{index}" for index in range(26)]
    assert schema.num_embeddings == tuple(range(1, 27))
    assert schema.source_format == "criteo-kaggle"


def test_golden_rows(shared_data: Path) -> None:
    path = shared_data / "golden" / "train.txt"
    assert parsed(path) == oracle(path.read_bytes())


@pytest.mark.parametrize(("name", "labelled"), [("train.txt", True), ("test.txt", False)])
def test_real_rows(shared_data: Path, name: str, labelled: bool) -> None:
    path = shared_data / "criteo" / "kaggle" / name
    assert parsed(path) == oracle(path.read_bytes(), labelled=labelled)
