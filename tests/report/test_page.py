from __future__ import annotations

import dataclasses
import html
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import msgspec
import numpy as np
import pytest

from dlrm.baselines.training import train_baseline
from dlrm.comparison import compare
from dlrm.config import BaselineConfig, PrepareConfig, write_config
from dlrm.data.prepare import prepare
from dlrm.errors import UserError
from dlrm.metrics import compute_metrics
from dlrm.report.figures import draw_bars
from dlrm.report.page import write_report
from dlrm.runs import open_run
from dlrm.schema import read_schema, write_schema

HOSTILE = "<script>alert(1)</script>$x^2$&\"'"


@pytest.fixture(scope="module")
def page(runs: Path) -> str:
    path = write_report(runs / "dlrm", compare=[runs / "logistic"], importance_rows=500)
    assert path == runs / "dlrm/report.html"
    return path.read_text()


@pytest.fixture(params=["report", "embeddings"])
def any_page(request: pytest.FixtureRequest) -> tuple[str, int]:
    """A page and how many figures it has."""
    if request.param == "report":
        return request.getfixturevalue("page"), 7
    return request.getfixturevalue("embeddings").read_text(), 5


def texts(page: str) -> list[str]:
    """The text of every element, as a reader sees it."""
    found: list[str] = []

    class Reader(HTMLParser):
        def handle_data(self, data: str) -> None:
            if data.strip():
                found.append(" ".join(data.split()))

    Reader().feed(page)
    return found


def test_it_says_how_many_features_are_drawn(page: str) -> None:
    assert "Drawn are the 25 of 39 features with the largest drop" in page


def test_its_figures_are_those_of_the_result(page: str, runs: Path) -> None:
    result = open_run(runs / "dlrm").result()
    test, validation = result.metrics["test"], result.metrics["validation"]
    shown = texts(page)
    for name, text in (
        ("auc", "ROC AUC"),
        ("log_loss", "log loss (nats)"),
        ("calibration", "calibration (predicted / observed clicks)"),
        ("average_precision", "average precision"),
        ("f1", "F1"),
    ):
        place = shown.index(text)
        values = [f"{getattr(split, name):.6f}" for split in (validation, test)]
        assert shown[place + 1 : place + 3] == values
    low, high = test.auc_interval
    headline = f"This DLRM has a test AUC of {test.auc:.4f} (95% interval {low:.4f} to {high:.4f})"
    truth = msgspec.json.decode((runs / "raw/truth.json").read_bytes())["test"]["auc"]
    assert f"{headline}, where {truth:.4f} is the best possible." in shown
    assert f"{result.samples_per_second:,.0f} samples/s" in shown
    deciles = test.calibration_by_decile
    place = shown.index("tenth")
    rows = shown[place + 4 : place + 4 + 4 * len(deciles)]
    assert [int(row.replace(",", "")) for row in rows[1::4]] == [d.samples for d in deciles]
    assert [float(row) for row in rows[2::4]] == [round(d.predicted, 4) for d in deciles]
    (difference, _) = compare([runs / "dlrm", runs / "logistic"]).differences
    low, high = difference.on_rows.interval
    assert f"{difference.difference:+.4f} ({low:+.4f} to {high:+.4f})" in shown


def test_it_needs_nothing_but_itself(any_page: tuple[str, int]) -> None:
    page, _ = any_page
    addresses = set(re.findall(r"""(?:src|href|url)\s*[=(]\s*["']?([^"')\s>]+)""", page))
    assert all(each.startswith(("#", "data:,")) for each in addresses)
    assert "<script" not in page
    # Namespaces are names, and the only addresses.
    assert set(re.findall(r"https?://[^\"\s<]+", page)) <= {"http://www.w3.org/2000/svg"}


def test_every_figure_says_what_it_shows(any_page: tuple[str, int]) -> None:
    page, number = any_page
    figures = re.findall(r"<svg.*?</svg>", page, re.DOTALL)
    assert len(figures) == number
    ids = re.findall(r'\sid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    for figure in figures:
        labelled = re.search(r'aria-labelledby="(\S+) (\S+)"', figure)
        assert labelled
        for target in labelled.groups():
            assert re.search(rf'id="{target}">[^<]{{10,}}<', figure)
        for target in re.findall(r'(?:href="|url\()#([^")]+)', figure):
            assert target in ids
        assert "DejaVu" not in figure
        assert not re.search(r"#0[1234]0[1234]0\d", figure)  # colours that stand for a role
        assert "var(--ink)" in figure


def test_equal_runs_give_equal_pages(runs: Path, tmp_path: Path) -> None:
    pages = [
        write_report(runs / "dlrm", tmp_path / f"{i}.html", importance_rows=0).read_bytes()
        for i in range(2)
    ]
    assert pages[0] == pages[1]


def test_a_baseline_has_a_page_too(runs: Path, tmp_path: Path) -> None:
    shown = texts(write_report(runs / "logistic", tmp_path / "r.html").read_text())
    auc = open_run(runs / "logistic").result().metrics["test"].auc
    assert any(
        text.startswith(f"This logistic regression has a test AUC of {auc:.4f}") for text in shown
    )
    assert "Not measured: the model of a baseline is not kept." in shown
    assert "Pass over the training rows" in shown
    assert "logistic-CPU" in shown


def test_without_its_dataset_a_sentence_says_so(runs: Path, tmp_path: Path) -> None:
    run = shutil.copytree(runs / "dlrm", tmp_path / "moved")
    write_config(run / "config.toml", open_run(run).config, tmp_path / "gone")
    shown = texts(write_report(run).read_text())
    assert any(text.startswith("Not measured: the DATASET cannot be used") for text in shown)
    assert not any("best possible" in text for text in shown)
    path = write_report(run, dataset=runs / "dataset", importance_rows=100)
    assert any("Measured on 100 rows" in text for text in texts(path.read_text()))
    path = write_report(run, truth=runs / "raw/truth.json")
    assert any("is the best possible" in text for text in texts(path.read_text()))
    with pytest.raises(UserError, match="gone is not a folder"):
        write_report(run, dataset=tmp_path / "gone")


def test_names_and_paths_are_escaped(runs: Path, tmp_path: Path) -> None:
    run = shutil.copytree(runs / "dlrm", tmp_path / HOSTILE.replace("/", ""))
    schema = read_schema(run, "run")
    dense = (dataclasses.replace(schema.dense[0], name=HOSTILE), *schema.dense[1:])
    write_schema(run, dataclasses.replace(schema, dense=dense))
    page = write_report(run, importance_rows=200).read_text()
    assert "<script" not in page
    assert page.count(html.escape(HOSTILE[:8])) > 2  # as in the title and the table of features
    assert HOSTILE in texts(page)
    assert "<script" not in draw_bars("k", HOSTILE, HOSTILE, [(HOSTILE, 0.1, 0.0, 0.2)], "x").svg
    assert "$x^2$" in draw_bars("k", "t", "d", [("$x^2$", 0.1, 0.0, 0.2)], "x").svg


def test_runs_on_other_rows_do_not_compare(runs: Path, raw_rows: Path, tmp_path: Path) -> None:
    prepare(raw_rows, tmp_path / "other", PrepareConfig())
    config = BaselineConfig(model="logistic", passes=1)
    train_baseline(tmp_path / "other", tmp_path / "run", config)
    with pytest.raises(UserError, match="are of different rows"):
        write_report(runs / "dlrm", tmp_path / "r.html", compare=[tmp_path / "run"])
    with pytest.raises(UserError, match="takes at most 4 runs"):
        write_report(runs / "dlrm", tmp_path / "r.html", compare=[runs / "logistic"] * 5)
    with pytest.raises(UserError, match="is not a folder"):
        write_report(runs / "dlrm", tmp_path / "nowhere/r.html")
    with pytest.raises(UserError, match="--importance-rows must not be negative"):
        write_report(runs / "dlrm", tmp_path / "r.html", importance_rows=-1)


def test_a_split_of_one_label_has_no_curves(runs: Path, tmp_path: Path) -> None:
    run = shutil.copytree(runs / "logistic", tmp_path / "run")
    opened = open_run(run)
    zeros = np.zeros(5, np.uint8)
    with opened.write_predictions("test", "f") as predictions:
        predictions.add(zeros, np.full(5, 0.25, np.float32))
    result = opened.result()
    metrics = result.metrics | {"test": compute_metrics(zeros, np.full(5, 0.25, np.float32))}
    opened.write_result(dataclasses.replace(result, metrics=metrics))
    shown = texts(write_report(run).read_text())
    assert "This logistic regression was tested on 5 rows; its AUC is undefined." in shown
    assert any("do not have both labels" in text for text in shown)
    assert "ROC curve, test" not in shown


def test_a_page_replaces_pages_alone(runs: Path, tmp_path: Path) -> None:
    other = tmp_path / "config.toml"
    other.write_text("precious = true")
    with pytest.raises(UserError, match=r"config\.toml is there already, and is no HTML page"):
        write_report(runs / "dlrm", other)
    assert other.read_text() == "precious = true"
    page = tmp_path / "page.html"
    page.write_text("<!DOCTYPE html>old")
    assert "old" not in write_report(runs / "dlrm", page, importance_rows=0).read_text()[:30]


def test_a_run_that_has_not_ended_is_refused(runs: Path, tmp_path: Path) -> None:
    run = shutil.copytree(runs / "dlrm", tmp_path / "run")
    (run / "result.json").unlink()
    with pytest.raises(UserError, match=r"is not a complete run: .*`dlrm train --resume"):
        write_report(run)
