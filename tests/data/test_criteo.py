from __future__ import annotations

import gzip
import re
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dlrm.data import criteo
from dlrm.data.criteo import read_blocks
from dlrm.errors import UserError

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


class MalformedError(Exception):
    def __init__(self, line: int) -> None:
        super().__init__(line)
        self.line = line


def oracle(content: bytes, *, labelled: bool = True) -> list[list[int]]:
    """Every row of a file as label (where there is one), 13 integers and 26 values."""
    lines = content.split(b"\n")
    if not lines[-1]:
        lines.pop()
    if not lines:
        raise MalformedError(0)
    rows = []
    for number, line in enumerate(lines, start=1):
        fields = line.removesuffix(b"\r").split(b"\t")
        if not labelled:
            fields.insert(0, b"0")
        if len(fields) != 40 or fields[0] not in (b"0", b"1"):
            raise MalformedError(number)
        row = [int(fields[0])]
        for field in fields[1:14]:
            if not re.fullmatch(rb"(-?[0-9]+)?", field):
                raise MalformedError(number)
            value = int(field or b"0")
            if not -(2**63) <= value < 2**31:
                raise MalformedError(number)
            row.append(max(value, 0))
        for field in fields[14:]:
            if not re.fullmatch(rb"([0-9A-Fa-f]{8})?", field):
                raise MalformedError(number)
            row.append(int(field or b"0", 16))
        rows.append(row if labelled else row[1:])
    return rows


def parsed(path: Path, **options: object) -> list[list[int]]:
    rows = []
    for block in read_blocks(path, **options):  # type: ignore[arg-type]
        assert block.first_row == len(rows)
        assert block.dense.dtype == np.int32
        assert block.sparse.dtype == np.uint32
        columns = [block.dense.astype(np.int64), block.sparse.astype(np.int64)]
        if block.labels is not None:
            assert block.labels.dtype == np.uint8
            columns.insert(0, block.labels[:, None].astype(np.int64))
        rows.extend(np.concatenate(columns, axis=1).tolist())
    return rows


@pytest.fixture(scope="session")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("criteo") / "train.txt"


def agrees_with_oracle(scratch: Path, content: bytes, **options: object) -> None:
    scratch.write_bytes(content)
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


@settings(deadline=None, max_examples=300)
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


@settings(deadline=None, max_examples=200)
@given(st.lists(LINES, min_size=1, max_size=3), st.integers(0, 39), st.binary(max_size=12))
def test_any_field_is_read_or_named(
    scratch: Path, lines: list[bytes], column: int, field: bytes
) -> None:
    fields = lines[-1].split(b"\t")
    fields[column] = field
    agrees_with_oracle(scratch, b"\n".join([*lines[:-1], b"\t".join(fields), b""]))


def test_every_truncation_is_read_or_named(scratch: Path, made_up_lines: object) -> None:
    content = made_up_lines(3)  # type: ignore[operator]
    for length in range(len(content)):
        agrees_with_oracle(scratch, content[:length])


ROW = b"0\t" + b"\t".join([b"1"] * 13) + b"\t" + b"\t".join([b"0123abcd"] * 26)


def with_field(column: int, field: bytes) -> bytes:
    fields = ROW.split(b"\t")
    fields[column - 1] = field
    return b"\t".join(fields)


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
    assert message.endswith("Mend or remove that line, or get the file again.")
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
            gzip.compress(ROW),
            None,
            "line 1, column 1: expected tab-separated text, got a file compressed with gzip. "
            "Unpack it first: this version reads plain text.",
        ),
        (
            b"PK\x03\x04",
            True,
            "compressed with zip. Unpack it first: this version reads plain text.",
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

    with pytest.raises(UserError, match=r"line 2, column 1 .*: expected a line shorter than 65536"):
        list(read_blocks(scratch, observe=observe))
    assert seen < 1 << 25


def test_the_longest_line(scratch: Path) -> None:
    zeros = b"0" * (criteo.MAX_LINE_BYTES - len(ROW) - 1)
    longest = with_field(2, zeros + b"1")
    assert len(longest) == criteo.MAX_LINE_BYTES - 1
    for block_bytes in (1000, 1 << 20):
        scratch.write_bytes(ROW + b"\n" + longest + b"\n")
        assert parsed(scratch, block_bytes=block_bytes) == oracle(ROW + b"\n" + ROW)
        scratch.write_bytes(ROW + b"\n" + with_field(2, zeros + b"01") + b"\n")
        with pytest.raises(UserError, match=r"line 2, .* a line shorter than"):
            parsed(scratch, block_bytes=block_bytes)


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


def test_the_schema_describes_the_rows() -> None:
    schema = criteo.schema(tuple(range(1, 27)), "a rule", value_modulus=5)
    assert [feature.name for feature in schema.dense] == [f"int_{index}" for index in range(13)]
    assert [feature.name for feature in schema.sparse] == [f"cat_{index}" for index in range(26)]
    assert schema.num_embeddings == tuple(range(1, 27))
    assert {feature.value_modulus for feature in schema.sparse} == {5}
    assert schema.source_format == "criteo-kaggle"


def test_golden_rows(shared_data: Path) -> None:
    path = shared_data / "golden" / "train.txt"
    assert parsed(path) == oracle(path.read_bytes())


@pytest.mark.parametrize(("name", "labelled"), [("train.txt", True), ("test.txt", False)])
def test_real_rows(shared_data: Path, name: str, labelled: bool) -> None:
    path = shared_data / "criteo" / "kaggle" / name
    assert parsed(path) == oracle(path.read_bytes(), labelled=labelled)
