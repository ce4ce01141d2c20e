"""The page as Chromium shows it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from browsing import CONTRAST
from dlrm.report.page import write_report
from dlrm.schema import read_schema, write_schema

VIEWS = [(scheme, width) for scheme in ("light", "dark") for width in (1280, 400)]

# Boxes of all texts of a figure, which must lie within it and neither on each other nor on the
# legend's lines. Of a rotated text the box is the one around it as it is seen.
TEXTS = """
() => [...document.querySelectorAll('figure svg')].map(svg => {
  const outer = svg.getBoundingClientRect();
  const texts = [...svg.querySelectorAll('text')].map(text => {
    const box = text.getBoundingClientRect();
    return {text: text.textContent, left: box.left - outer.left, right: box.right - outer.left,
            top: box.top - outer.top, bottom: box.bottom - outer.top};
  });
  const samples = [...svg.querySelectorAll('[id*="legend"] path')].map(path => {
    const box = path.getBoundingClientRect();
    return {text: 'line in the legend', left: box.left - outer.left, right: box.right - outer.left,
            top: box.top - outer.top - 5, bottom: box.bottom - outer.top + 5};
  });
  return {samples, title: svg.querySelector('title').textContent, width: outer.width,
          height: outer.height, texts};
})
"""


@pytest.fixture(scope="module")
def report(runs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page with a run and features whose names are longer than there is room."""
    folder = tmp_path_factory.mktemp("page")
    run = shutil.copytree(runs / "dlrm", folder / ("a-very-long-name-of-a-run-" * 3))
    other = shutil.copytree(runs / "logistic", folder / "logistic regression with all defaults")
    schema = read_schema(run, "run")
    dense = (replace(schema.dense[0], name="time_since_the_last_visit_in_seconds"),)
    write_schema(run, replace(schema, dense=(*dense, *schema.dense[1:])))
    compared = [runs / "dlrm", other, runs / "logistic"]
    return write_report(run, folder / "report.html", compare=compared, importance_rows=500)


@pytest.fixture(scope="module", params=["report", "embeddings"])
def file(request: pytest.FixtureRequest) -> Path:
    """A page."""
    path: Path = request.getfixturevalue(request.param)
    return path


@pytest.fixture(scope="module", params=VIEWS, ids=lambda view: f"{view[0]}-{view[1]}")
def view(request: pytest.FixtureRequest, chromium: Any, file: Path) -> Iterator[Any]:
    """The page in a window, with all that was requested and said while it opened."""
    scheme, width = request.param
    context = chromium.new_context(
        viewport={"width": width, "height": 900}, color_scheme=scheme, offline=True
    )
    page = context.new_page()
    page.said = []
    page.on("console", lambda message: page.said.append(message.text))
    page.on("pageerror", lambda error: page.said.append(str(error)))
    page.on("request", lambda asked: page.said.append(asked.url))
    page.goto(file.as_uri())
    page.figures = {"report.html": 7, "embeddings.html": 5}[file.name]
    yield page
    context.close()


def test_nothing_is_requested_and_nothing_goes_wrong(view: Any, file: Path) -> None:
    assert [each for each in view.said if not each.startswith("data:")] == [file.as_uri()]


def test_nothing_is_wider_than_the_window(view: Any) -> None:
    widths = view.evaluate("() => [document.documentElement.scrollWidth, window.innerWidth]")
    assert widths[0] <= widths[1]
    assert (
        view.evaluate("() => [...document.querySelectorAll('figure svg')].length") == view.figures
    )


def test_in_a_wide_window_no_table_is_cut(view: Any) -> None:
    if view.viewport_size["width"] < 1280:
        pytest.skip("tables scroll in narrow windows")
    cut = view.evaluate(
        "() => [...document.querySelectorAll('section > .scroll, section > div > .scroll')]"
        ".filter(box => box.scrollWidth > box.clientWidth)"
        ".map(box => [box.ariaLabel, box.scrollWidth, box.clientWidth])"
    )
    assert cut == []


def test_no_label_is_cut_or_lies_on_another(view: Any) -> None:
    for figure in view.evaluate(TEXTS):
        texts = figure["texts"]
        assert len(texts) >= 5
        for text in texts:
            where = f"{figure['title']}: {text}"
            assert text["left"] >= -0.5, where
            assert text["top"] >= -0.5, where
            assert text["right"] <= figure["width"] + 0.5, where
            assert text["bottom"] <= figure["height"] + 0.5, where
        for number, one in enumerate(texts):
            for other in [*texts[number + 1 :], *figure["samples"]]:
                across = min(one["right"], other["right"]) - max(one["left"], other["left"])
                down = min(one["bottom"], other["bottom"]) - max(one["top"], other["top"])
                # Boxes are as high as a line; letters are not.
                assert across <= 0.5 or down <= 4, f"{figure['title']}: {one} {other}"


def test_text_is_large_enough_to_read(view: Any) -> None:
    heights = view.evaluate(
        "() => [...document.querySelectorAll('figure text:not([transform*=\"-90\"])')].map("
        "t => t.getBoundingClientRect().height)"
    )
    assert min(heights) >= 9.5


def test_contrast_is_enough(view: Any) -> None:
    found = view.evaluate(CONTRAST)
    assert len(found) > 200
    assert [each for each in found if each["ratio"] < each["least"]] == []


def test_in_print_it_is_light_and_nothing_is_cut(chromium: Any, file: Path) -> None:
    context = chromium.new_context(color_scheme="dark", viewport={"width": 688, "height": 1000})
    page = context.new_page()
    page.goto(file.as_uri())
    page.emulate_media(media="print")
    paper = page.evaluate("() => getComputedStyle(document.body).backgroundColor")
    assert paper == "rgb(255, 255, 255)"
    widths = page.evaluate("() => [document.documentElement.scrollWidth, window.innerWidth]")
    assert widths[0] <= widths[1]
    assert page.pdf(format="A4").startswith(b"%PDF")
    context.close()
