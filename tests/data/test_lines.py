from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dlrm.data.lines import read_lines

MARGIN = 3
LONGEST = 10
TEXT = st.lists(
    st.one_of(st.binary(max_size=30), st.sampled_from([b"\n", b"\r\n", b"a" * LONGEST])),
    max_size=12,
).map(b"".join)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("lines") / "text"


def blocks_of(path: Path, block_bytes: int, offset: int = 0, **options: Any) -> list[Any]:
    """Each block's lines, its end, and whether its last line has an end."""
    blocks = read_lines(
        path,
        margin=MARGIN,
        block_bytes=block_bytes,
        max_line_bytes=LONGEST,
        offset=offset,
        skip_long=True,
        **options,
    )
    found = []
    for block in blocks:
        assert block.buffer[MARGIN - 1 :: len(block.buffer) - MARGIN] == b"\n\n"
        lines = bytes(block.buffer[MARGIN:-1]).split(b"\n")
        found.append((lines, block.end, block.is_terminated))
    return found


# What begins so is taken for what it says it is: gzip, zip, zstd, bzip2, xz.
PACKED = (b"\x1f\x8b", b"PK\x03\x04", b"\x28\xb5\x2f\xfd", b"BZh", b"\xfd7zXZ")


@settings(deadline=None, max_examples=300)
@given(TEXT, st.integers(1, 60), st.booleans())
@example(b"\xfd7zXZ", 1, False)
def test_blocks_are_as_many_whole_lines_as_fit(
    path: Path, text: bytes, block_bytes: int, packed: bool
) -> None:
    path.write_bytes(gzip.compress(text) if packed or text.startswith(PACKED) else text)
    blocks = blocks_of(path, block_bytes)
    begin = 0
    for index, (lines, end, is_terminated) in enumerate(blocks):
        content = text[begin:end]
        assert is_terminated == content.endswith(b"\n")
        whole = content.removesuffix(b"\n").split(b"\n")
        assert len(lines) == len(whole)
        for line, given_line in zip(whole, lines, strict=True):
            if len(line.removesuffix(b"\r")) <= LONGEST:
                assert given_line == line
            else:  # perhaps cut off
                assert line.startswith(given_line)
                assert len(given_line.removesuffix(b"\r")) > LONGEST
        if len(content) > block_bytes and index < len(blocks) - 1:
            # No line end in the first bytes: the block ends with the line, or with what was read
            # to find its end.
            assert b"\n" not in content[:block_bytes]
        elif index < len(blocks) - 1:
            assert b"\n" not in text[end : begin + block_bytes]
        assert blocks_of(path, block_bytes, begin) == blocks[index:]
        begin = end
    assert begin == len(text)
    assert blocks_of(path, block_bytes, begin) == []
