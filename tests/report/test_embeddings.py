from __future__ import annotations

import dataclasses
import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dlrm.cli import parse
from dlrm.config import write_config
from dlrm.data.dataset import Rows
from dlrm.embeddings import CommonValues, common_values, count_ids
from dlrm.errors import EnvironmentFaultError, UserError
from dlrm.report import embeddings as embeddings_page
from dlrm.report.embeddings import visualize
from dlrm.report.projection import feature_similarity
from dlrm.runs import Run


def table(page: str, caption: str) -> list[list[str]]:
    """The rows of a table."""
    (body,) = re.findall(f"<caption>{caption}</caption>.*?<tbody>(.*?)</tbody>", page, re.DOTALL)
    rows = re.findall(r"<tr.*?</tr>", body, re.DOTALL)
    return [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row) for row in rows]


def points(page: str, key: str) -> dict[int, Any]:
    """Where a figure's points lie, by group of click rates, from 1."""
    (figure,) = re.findall(rf'<svg[^>]*aria-labelledby="{key}-title.*?</svg>', page, re.DOTALL)
    found: dict[int, Any] = {}
    for use in re.findall(r"<use [^>]*>", figure.split("legend_1")[0]):
        if group := re.search(r"var\(--rate-(\d)\)", use):
            place = [float(number) for number in re.findall(r'\b[xy]="([^"]+)"', use)]
            found.setdefault(int(group[1]), []).append(place)
    return {group: np.array(places) for group, places in found.items()}


def of_run(run: Run, name: str, most: int) -> CommonValues:
    place = [feature.name for feature in run.schema.sparse].index(name)
    model = run.load_model("best", torch.device("cpu"))
    (found,) = common_values(run, model, run.open_dataset(), [place], most)
    return found


def test_its_figures_are_those_of_the_run(embeddings: Path, runs: Path) -> None:
    page = embeddings.read_text()
    run = Run.open(runs / "dlrm")
    common = of_run(run, "cat_3", 150)
    assert len(common.values) == 150 < common.distinct
    row = next(row for row in table(page, "At a glance") if row[0] == "cat_3")
    assert row[2:] == [
        f"{next(f.num_embeddings for f in run.schema.sparse if f.name == 'cat_3'):,}",
        f"{common.distinct:,}",
        "150",
        f"{common.counts.sum() / run.open_dataset().rows('train'):.1%}",
    ]
    listed = table(page, "Map of cat_3")
    assert [row[0] for row in listed] == common.values[:20]
    assert [row[1] for row in listed] == [f"{count:,}" for count in common.counts[:20]]
    rates = common.clicks / common.counts
    assert [row[2] for row in listed] == [f"{rate:.1%}" for rate in rates[:20]]
    for place, row in enumerate(listed):
        distances = np.linalg.norm(common.vectors - common.vectors[place], axis=1)
        near = np.argsort(distances, kind="stable")[1:11]
        assert row[4] == ", ".join(common.values[other] for other in near[:3])
        assert row[3] == f"{common.clicks[near].sum() / common.counts[near].sum():.1%}"
    lengths = np.linalg.norm(common.vectors, axis=1)
    by_count = table(page, "Length and frequency, cat_3")
    assert sum(int(row[1]) for row in by_count) == 150
    tens = (common.counts >= 10) & (common.counts < 100)
    (row,) = (row for row in by_count if row[0] == "10 to 99")
    assert row[1:] == [f"{tens.sum():,}", f"{lengths[tens].mean():.4f}"]
    assert sum(map(len, points(page, "feature-3-map").values())) == 150
    assert sum(map(len, points(page, "feature-3-lengths").values())) == 150


@pytest.fixture
def grouped(runs: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run in which cat_3 has two groups of vectors: of values clicked more often, and less."""
    run = Run.open(runs / "dlrm")
    data = run.open_dataset()
    ((counts, clicks),) = count_ids(data, run.schema, [3])
    train = data.manifest.splits["train"]
    often = clicks * train.rows > counts * train.clicks
    model = run.load_model("best", torch.device("cpu"))
    vectors = np.random.default_rng(0).normal(scale=0.3, size=(len(counts), 4))
    vectors[:, 1] += 100 * often + 40 * (clicks + 5) / (counts + 20)
    model.sparse_arch.split(model.sparse_arch.arena.detach())[3][:] = torch.from_numpy(vectors)
    monkeypatch.setattr(Run, "load_model", lambda *_: model)
    return run.path


def test_vectors_in_two_groups_are_two_groups_on_the_page(grouped: Path, tmp_path: Path) -> None:
    path = visualize(grouped, tmp_path / "page.html", features=["cat_3"], values=100)
    page = path.read_text()
    ((_, correlation, *_),) = table(page, "At a glance")
    assert float(correlation) > 0.9
    shown = points(page, "feature-3-map")
    rarely = np.concatenate([shown[group] for group in (1, 2) if group in shown])
    often = np.concatenate([shown[group] for group in (4, 5) if group in shown])
    assert min(len(rarely), len(often)) >= 10
    across = np.linalg.norm(rarely[:, None] - often, axis=2)
    for own in (rarely, often):
        within = np.linalg.norm(own[:, None] - own, axis=2)
        np.fill_diagonal(within, np.inf)
        assert across.min() > within.min(axis=1).max()


def test_similarity_is_of_the_vectors_of_rows(runs: Path) -> None:
    run = Run.open(runs / "dlrm")
    model, data = run.load_model("best", torch.device("cpu")), run.open_dataset()
    with torch.no_grad():
        tables = model.sparse_arch.split(model.sparse_arch.arena)
        tables[4][:], tables[5][:] = tables[9][:1], tables[9][:1]
        for place, scale in ((2, 1), (3, -3)):
            tables[place][0::2], tables[place][1::2] = scale * 0.1, scale * 0.2
    found = feature_similarity(run, model, data, [2, 3, 4, 5], 4000)
    assert found.rows == 4000
    assert found.constant == ["cat_4", "cat_5"]
    assert sorted(found.names) == ["(dense)", "cat_2", "cat_3"]
    # By hand: parities of ids, whose correlation squared it is.
    taken = Rows.concatenate(list(data.spread_rows("train", 4000)))
    correlation = np.corrcoef(taken.sparse[:, 2] % 2, taken.sparse[:, 3] % 2)[0, 1]
    place, other = found.names.index("cat_2"), found.names.index("cat_3")
    assert found.matrix[place, other] == pytest.approx(correlation**2, rel=1e-3)
    np.testing.assert_allclose(np.diag(found.matrix), 1)


def test_equal_runs_give_equal_pages(embeddings: Path, runs: Path, tmp_path: Path) -> None:
    again = visualize(
        shutil.copytree(runs / "dlrm", tmp_path / "dlrm"), features=["cat_2", "cat_3"], values=150
    )
    assert again == tmp_path / "dlrm/embeddings.html"
    written = again.read_text().replace(str(tmp_path), str(runs))
    assert written == embeddings.read_text()


def test_unnamed_those_furthest_beyond_chance_are_drawn(
    grouped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embeddings_page, "_FEATURES", 1)
    page = visualize(grouped, tmp_path / "page.html", values=60).read_text()
    assert "Map of cat_3" in page
    assert len(re.findall("<svg", page)) == 3
    run = Run.open(grouped)
    overview = table(page, "At a glance")
    assert sorted(row[0] for row in overview) == sorted(each.name for each in run.schema.sparse)
    few = [row for row in overview if int(row[4].replace(",", "")) < 50]
    assert few
    assert {row[1] for row in few} == {"-"}


def test_the_command_line_says_where_the_page_is(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "page.html"
    words = ["visualize", str(runs / "dlrm"), "--features", "cat_3", "--values", "20"]
    parse([*words, "--output", str(output), "--checkpoint", "newest"]).execute()
    assert json.loads(capsys.readouterr().out) == {"embeddings": str(output)}
    page = output.read_text()
    assert "20 points, one a value" in page
    assert f"{' '.join(['dlrm', *words])} --checkpoint newest</code>" in page


def test_what_cannot_be_shown_is_refused(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = runs / "dlrm"
    with pytest.raises(UserError, match=r"no sparse feature 'cat_39'\. There are cat_0, cat_1"):
        visualize(run, features=["cat_2", "cat_39"])
    with pytest.raises(UserError, match="--values must be at least 10; got 9"):
        visualize(run, values=9)
    with pytest.raises(UserError, match=r"cat_8 has \d values in the training rows"):
        visualize(run, features=["cat_3", "cat_8"], values=20)
    with pytest.raises(UserError, match="is not a folder"):
        visualize(run, tmp_path / "nowhere/page.html")
    with pytest.raises(UserError, match="is of a baseline"):
        visualize(runs / "logistic")
    moved = shutil.copytree(run, tmp_path / "moved")
    write_config(moved / "config.toml", Run.open(run).config, tmp_path / "gone")
    with pytest.raises(
        UserError, match=r"gone, the DATASET .* is gone\. Name where it is now with"
    ):
        visualize(moved)
    assert visualize(moved, dataset=runs / "dataset", features=["cat_3"], values=20).exists()
    monkeypatch.setitem(sys.modules, "sklearn.manifold", None)
    with pytest.raises(EnvironmentFaultError, match="dlrm visualize needs scikit-learn"):
        visualize(run)


def test_without_clicks_there_is_nothing_to_colour(
    runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = Run.open(runs / "dlrm").open_dataset()
    split = dataclasses.replace(data.manifest.splits["train"], clicks=0)
    manifest = dataclasses.replace(data.manifest, splits=data.manifest.splits | {"train": split})
    clickless = dataclasses.replace(data, manifest=manifest)
    monkeypatch.setattr(Run, "open_dataset", lambda *_: clickless)
    with pytest.raises(UserError, match="have the same label, so values have no click rates"):
        visualize(runs / "dlrm")
