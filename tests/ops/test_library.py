from __future__ import annotations

import json
from pathlib import Path

import pytest

from dlrm.ops import library as module
from dlrm.ops.library import library
from dlrm.ops.stamp import make_stamp


def test_the_native_kernels_are_there() -> None:
    """Everything else would pass without them, slowly."""
    assert library().loaded, library().reason


@pytest.fixture
def built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The stamp of a library that nobody has built."""
    monkeypatch.setattr(module, "_LIBRARY", tmp_path / "_native.so")
    monkeypatch.setattr(module, "_SOURCES", tmp_path / "native")
    (tmp_path / "native").mkdir()
    return tmp_path / "_native.json"


def reason() -> str:
    found = module.library.__wrapped__()
    assert not found.loaded
    return found.reason


def test_a_missing_library_is_said(built: Path) -> None:
    assert reason().startswith("the native kernels are not built. Run `bash test/setup.sh`")
    built.write_text("half a st")
    assert reason().startswith("the native kernels are not built.")


def test_why_a_build_failed_is_said(built: Path) -> None:
    built.write_text('{"failure": "the native kernels could not be built: no g++"}')
    assert reason().startswith("the native kernels could not be built: no g++. Install a C++")


def test_stale_kernels_are_not_loaded(built: Path) -> None:
    built.write_text('{"torch": "1.0", "sources": ""}')
    assert reason().startswith("the native kernels were built with other torch: 1.0, now ")


def test_a_stamp_follows_the_sources(tmp_path: Path) -> None:
    empty = make_stamp(tmp_path)
    (tmp_path / "a.cpp").write_text("int a;")
    first = make_stamp(tmp_path)
    (tmp_path / "a.cpp").write_text("int b;")
    assert len({stamp["sources"] for stamp in (empty, first, make_stamp(tmp_path))}) == 3
    assert set(make_stamp(tmp_path / "none")) == {"torch"}


def test_an_unreadable_library_is_said(built: Path) -> None:
    built.write_text(json.dumps(make_stamp(module._SOURCES)))
    assert reason().startswith("the native kernels cannot be loaded: ")
