"""Rows of CSV files: what a cell means, in the native parser and the plain one."""

from __future__ import annotations

import csv
import gzip
import io
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dlrm.data import csv_rows
from dlrm.data.csv_rows import Header, parse_row, read_csv_blocks, read_header, split_cells
from dlrm.data.raw_rows import RawRows
from dlrm.data.row_parser import MARGIN, BadFieldError
from dlrm.errors import UserError
from dlrm.ops.library import Library, library
from dlrm.schema import DenseFeature, FeatureSchema, SparseFeature

SCHEMA = FeatureSchema(
    label="click",
    dense=(DenseFeature("age"), DenseFeature("price")),
    sparse=(SparseFeature("ad", 10), SparseFeature("site", 10)),
    source_format="test",
    split_rule="none",
)
TEXT = """\
site,note,age,click,ad,price
0000000a,"a ""note"", with, commas",-3,1,FFffFFff,7
,,,0.0,,2147483647
"00000001",x,"12.00",1.,"0000000b","-0"
"""
LABELS = [1, 0, 1]
DENSE = [[0, 7], [0, 2147483647], [12, 0]]
SPARSE = [[0xFFFFFFFF, 10], [0, 0], [11, 1]]


@pytest.fixture(params=["native", "plain"])
def parser(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "plain":
        monkeypatch.setattr(csv_rows, "library", lambda: Library(False, "plain"))
    elif not library().loaded:
        pytest.skip(library().reason)
    else:  # what it refuses would go to the plain one

        def refuse(line: bytes, header: Header) -> None:
            raise AssertionError(line)

        monkeypatch.setattr(csv_rows, "parse_row", refuse)
    return str(request.param)


def as_list(block: RawRows) -> list[int]:
    assert block.labels is not None
    labels: list[int] = block.labels.tolist()
    return labels


def written(folder: Path, content: str | bytes) -> Path:
    path = folder / "rows.csv"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


@pytest.mark.parametrize("separator", [",", ";", "\t"])
@pytest.mark.parametrize("kind", ["LF", "CRLF", "BOM", "gzip", "unterminated"])
def test_rows_are_read(tmp_path: Path, parser: str, separator: str, kind: str) -> None:
    rows = csv.reader(io.StringIO(TEXT))
    text = io.StringIO()
    csv.writer(text, delimiter=separator, lineterminator="\n").writerows(rows)
    content = text.getvalue().encode()
    if kind == "CRLF":
        content = content.replace(b"\n", b"\r\n")
    elif kind == "BOM":
        content = b"\xef\xbb\xbf" + content
    elif kind == "gzip":
        content = gzip.compress(content)
    elif kind == "unterminated":
        content = content[:-1]
    blocks = list(read_csv_blocks(written(tmp_path, content), SCHEMA))
    assert [label for block in blocks for label in as_list(block)] == LABELS
    assert np.concatenate([block.dense for block in blocks]).tolist() == DENSE
    assert np.concatenate([block.sparse for block in blocks]).tolist() == SPARSE
    assert (blocks[-1].end.line, blocks[-1].end.row) == (4, 3)


def test_rows_without_a_label_have_none(tmp_path: Path, parser: str) -> None:
    text = "ad,site,age,price\n0000000b,,5,6\n"
    (block,) = read_csv_blocks(written(tmp_path, text), SCHEMA)
    assert block.labels is None
    assert (block.dense.tolist(), block.sparse.tolist()) == ([[5, 6]], [[11, 0]])
    (block,) = read_csv_blocks(written(tmp_path, "ad,site,age,price\n"), SCHEMA)
    assert (len(block), block.dense.shape, block.sparse.shape) == (0, (0, 2), (0, 2))


def test_reading_goes_on_from_the_end_of_any_block(tmp_path: Path) -> None:
    rows = [f"{n:08x},{n},{n % 2},,{n + 1}" for n in range(100)]
    path = written(tmp_path, "\n".join(["ad,age,click,site,price", *rows, ""]))
    blocks = list(read_csv_blocks(path, SCHEMA, block_bytes=200))
    assert len(blocks) > 5
    assert np.concatenate([block.sparse for block in blocks])[:, 0].tolist() == list(range(100))
    for number, block in enumerate(blocks):
        rest = list(read_csv_blocks(path, SCHEMA, start=block.end, block_bytes=200))
        assert [(each.end, each.dense.tolist()) for each in rest] == [
            (each.end, each.dense.tolist()) for each in blocks[number + 1 :]
        ]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("a,1,1,,2,3", r"line 2, column 1 \(ad\): expected 8 hexadecimal digits.*, got 'a'"),
        ("0000000a,x,1,,2,", r"line 2, column 2 \(age\): expected an integer or nothing, got 'x'"),
        ("0000000a,1.5,1,,2,", r"column 2 \(age\).*got '1.5'"),
        ("0000000a,2147483648,1,,2,", r"column 2 \(age\): expected an integer of at most"),
        (
            "0000000a,1,2,,2,",
            r"column 3 \(click\): expected a label, 0 or 1, got '2'\. Mend that line, or rename",
        ),
        ("0000000a,1,,,2,", r"column 3 \(click\): expected a label, 0 or 1, got ''"),
        ("5db9164,1,1,,2,", r"column 1 \(ad\).*got '5db9164'\. Leading zeros are.*write 05db9164"),
        (
            "1e15,1,1,,2,",
            r"got '1e15'\. Leading zeros are lost, and it is 00001e15; or a spreadsheet took the "
            r"id for a number, and digits are lost: get the file again, and keep its columns as t",
        ),
        ("12E+15,1,1,,2,", r"column 1 \(ad\).*got '12E\+15'\. A spreadsheet took the id for a num"),
        ("0x0000000a,1,1,,2,", r"column 1 \(ad\).*got '0x0000000a'\. Leave 0x away"),
        ("305419896,1,1,,2,", r"got '305419896'\. If it is a number in decimal.* write 12345678"),
        ("0000000a,NULL,1,,2,", r"column 2 \(age\).*'NULL'\. Leave it empty where a value"),
        (
            "0000000a,1,1,,2",
            r"line 2, column 6 \(note\): expected 6 cells separated by commas, got 5",
        ),
        ("0000000a,1,1,,2,,", r"column 7 \(no column\): expected 6 cells.*got 7"),
        ("", r"line 2, column 1 .*got a blank line\. Remove that line: every line is"),
        ('0000000a,1,1,,2,"open', r"column 6 \(note\): expected a closing quote in the same line"),
        ('"0000000a"b,1,1,,2,', r"column 1 \(ad\): expected the end of the cell after its quote"),
        ("0000000a, 1,1,,2,", r"column 2 \(age\).*got ' 1'\. Remove the spaces around it"),
    ],
)
def test_a_malformed_row_is_named(tmp_path: Path, row: str, message: str) -> None:
    text = f"ad,age,click,site,price,note\n{row}\n"
    with pytest.raises(UserError, match=rf"rows\.csv, .*{message}"):
        list(read_csv_blocks(written(tmp_path, text), SCHEMA))
    good = "0000000a,1,1,,2,\n" * 30
    path = written(tmp_path, f"ad,age,click,site,price,note\n{good}{row}\n")
    with pytest.raises(UserError, match=r"rows\.csv, line 32, column"):
        list(read_csv_blocks(path, SCHEMA, block_bytes=100))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        (
            "ad,age,click\n",
            "line 1: the header lacks the columns price, site of the model's 4; it has ad, age, "
            r"click\. Add them, with an empty cell where a value is missing\.",
        ),
        ("ad,age,Site,price\n", r"lacks the column site .*Rename Site to site; or add it"),
        (
            "a|b\n",
            r"line 1: expected a header, .*commas, semicolons or tabs; got 'a\|b'\. It lacks the "
            r"columns age, price, ad, site of the model's 4; it has a\|b\.",
        ),
        ("ad,age,site,price\r1,2,3,4\r", r"line 1: expected lines that end in LF or CRLF, got CR"),
        ("\ufeffad,age".encode("utf-16-le"), "is text in UTF-16: expected UTF-8. Save it as"),
        ("ad,age,site,price,age\n", "names the column age 2 times, expected once"),
        ("ad,click,age,site,price,click\n", "names the column click 2 times, expected once"),
    ],
)
def test_a_header_that_does_not_fit_is_refused(
    tmp_path: Path, text: str | bytes, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        list(read_csv_blocks(written(tmp_path, text), SCHEMA))


CELLS = st.one_of(
    st.sampled_from(["", "0", "1", "-5", "7.0", "7.", "1.0", ".0", "--1", "00000000a", '"', '""']),
    st.from_regex(r"\A-?[0-9]{1,20}(\.[0-9]{0,2})?\Z"),
    st.from_regex(r"\A[0-9a-fA-F]{7,9}\Z"),
    st.text(st.characters(codec="utf-8", exclude_characters="\n\r"), max_size=6),
)


@given(st.lists(st.lists(CELLS, min_size=6, max_size=6), min_size=1, max_size=4), st.booleans())
def test_the_native_parser_agrees_with_the_definition(rows: list[list[str]], quoted: bool) -> None:
    """And cells with what Python's reader of CSV takes them for."""
    if not library().loaded:
        pytest.skip(library().reason)
    header = read_header(Path("x"), b"site,note,age,click,ad,price", SCHEMA)
    lines = []
    for row in rows:
        text = io.StringIO()
        quoting = csv.QUOTE_ALL if quoted else csv.QUOTE_MINIMAL
        csv.writer(text, lineterminator="", quoting=quoting).writerow(row)
        lines.append(text.getvalue().encode())
        assert list(split_cells(lines[-1], b",")) == [cell.encode() for cell in row]
    buffer = bytearray(MARGIN - 1) + b"\n" + b"\n".join([*lines, b""])
    try:
        expected = [parse_row(line, header) for line in lines]
    except BadFieldError as error:
        with pytest.raises(UserError, match=rf"column {error.column + 1} "):
            csv_rows._parse_block(Path("x"), buffer, header, 0)
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.delattr(csv_rows, "parse_row")
        labels, dense, sparse = csv_rows._parse_block(Path("x"), buffer, header, 0)
    found = zip(labels.tolist(), dense.tolist(), sparse.tolist(), strict=True)
    assert list(found) == expected


@given(st.text(st.sampled_from('01",;a.\t'), max_size=12))
def test_lines_that_may_be_broken(line: str) -> None:
    """The native parser takes what the plain one takes, and nothing else."""
    if not library().loaded:
        pytest.skip(library().reason)
    schema = FeatureSchema("click", (DenseFeature("a"),), (), "test", "none")
    header = read_header(Path("x"), b"b,a", schema)
    buffer = bytearray(MARGIN - 1) + b"\n" + line.encode() + b"\n"
    parsed: list[bytes] = []

    def note(line: bytes, header: Header) -> tuple[int, list[int], list[int]]:
        parsed.append(line)
        return parse_row(line, header)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(csv_rows, "parse_row", note)
        try:
            dense = csv_rows._parse_block(Path("x"), buffer, header, 0)[1].tolist()
        except UserError:
            dense = None
    try:
        expected = [parse_row(line.encode(), header)[1]]
    except BadFieldError:
        expected = None
    assert dense == expected
    assert bool(parsed) == (expected is None)
