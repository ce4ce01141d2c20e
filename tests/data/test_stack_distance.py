from __future__ import annotations

import dataclasses
import logging
import time
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dlrm.config import GenerateConfig
from dlrm.data import stack_distance
from dlrm.data.batch import Bags
from dlrm.data.dataset import Dataset, Rows, write_dataset
from dlrm.data.generation import generate
from dlrm.data.stack_distance import (
    Accesses,
    NativeStack,
    PlainStack,
    StackDistances,
    measure,
    write_stack_distances,
)
from dlrm.errors import UserError
from dlrm.ops.library import library
from dlrm.schema import DenseFeature, FeatureSchema, SparseFeature

KINDS = [
    pytest.param(
        NativeStack,
        id="native",
        marks=pytest.mark.skipif(not library().loaded, reason=library().reason),
    ),
    pytest.param(PlainStack, id="plain"),
]
Kind = type[NativeStack] | type[PlainStack]
ITEMS = st.lists(st.integers(0, 9), max_size=60)


@pytest.fixture
def few_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let gaps be closed every few accesses."""
    monkeypatch.setattr(stack_distance, "_FEWEST_SLOTS", 1)


def int32(*values: int) -> npt.NDArray[np.int32]:
    return np.array(values, np.int32)


def naive_distances(items: list[int]) -> list[int]:
    """By the definition: the distinct items since the last access to the same one."""
    found = []
    for place, item in enumerate(items):
        before = items[:place]
        if item not in before:
            found.append(0)
        else:
            last = place - 1 - before[::-1].index(item)
            found.append(len(set(items[last:place])))
    return found


def naive_draws(uniforms: list[float], drawn: StackDistances, *, padding: bool) -> list[int]:
    """With a list whose last item is on top."""
    stack = list(range(len(drawn.ids)))
    pairs = list(zip(drawn.distances.tolist(), drawn.cumulative.tolist(), strict=True))
    fresh, found = 0, []
    for u in uniforms:
        if fresh < pairs[-1][0]:
            u = u * max(share for distance, share in pairs if distance <= fresh)
        elif padding:
            u = (1 - pairs[0][1]) * u + pairs[0][1]
        distance = next((distance for distance, share in pairs if u <= share), pairs[-1][0])
        item = stack.pop(-distance) if distance else stack.pop(0)
        fresh += distance == 0
        stack.append(item)
        found.append(item)
    return found


def test_a_known_sequence() -> None:
    """a b b c a d a: the third distinct one back, and so on."""
    measured = measure([int32(7, 3, 3), int32(5, 7, 4, 7)], 8)
    assert measured.ids.tolist() == [7, 3, 5, 4]
    # Distances 0 0 1 0 3 0 2.
    assert measured.distances.tolist() == [0, 1, 2, 3]
    np.testing.assert_allclose(measured.cumulative, np.array([4, 5, 6, 7]) / 7)


def test_a_table_beyond_what_slots_can_number_is_refused() -> None:
    with pytest.raises(UserError, match="a table of 1073741825 rows is too large"):
        measure([int32(1)], 2**30 + 1)


def test_padding_adds_new_accesses() -> None:
    """Seven accesses, the largest distance 3: three more at distance 0."""
    measured = measure([int32(7, 3, 3, 5, 7, 4, 7)], 8, padding=True)
    np.testing.assert_allclose(measured.cumulative, np.array([7, 8, 9, 10]) / 10)
    assert measure([int32(0, 1)], 2, padding=True).cumulative.tolist() == [1]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.usefixtures("few_slots")
def test_distances_are_those_of_the_definition(kind: Kind) -> None:
    @settings(deadline=None, max_examples=150)
    @given(items=ITEMS, cut=st.integers(0, 60))
    def check(items: list[int], cut: int) -> None:
        stack = kind(10)
        found = [*stack.distances(int32(*items[:cut])), *stack.distances(int32(*items[cut:]))]
        assert found == naive_distances(items)

    check()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.usefixtures("few_slots")
def test_draws_are_those_of_a_list(kind: Kind) -> None:
    @settings(deadline=None, max_examples=150)
    @given(
        trace=st.lists(st.integers(0, 9), min_size=1, max_size=60),
        uniforms=st.lists(st.floats(0, 1), max_size=80),
        padding=st.booleans(),
        cut=st.integers(0, 80),
    )
    def check(trace: list[int], uniforms: list[float], padding: bool, cut: int) -> None:
        drawn = measure([int32(*trace)], 10)
        stack = kind(len(drawn.ids), full=True)
        found = [
            each
            for part in (uniforms[:cut], uniforms[cut:])
            for each in stack.draw(np.array(part, np.float64), drawn, padding=padding)
        ]
        assert found == naive_draws(uniforms, drawn, padding=padding)

    check()


@pytest.mark.skipif(not library().loaded, reason=library().reason)
def test_both_kinds_agree_on_long_sequences() -> None:
    generator = np.random.default_rng(0)
    items = (generator.pareto(0.5, 30_000) % 3000).astype(np.int32)
    assert (NativeStack(3000).distances(items) == PlainStack(3000).distances(items)).all()
    drawn = measure([items], 3000)
    uniforms = generator.random(20_000)
    one, other = (
        kind(len(drawn.ids), full=True).draw(uniforms, drawn, padding=False)
        for kind in (NativeStack, PlainStack)
    )
    assert (one == other).all()


@pytest.mark.skipif(not library().loaded, reason=library().reason)
@pytest.mark.parametrize("item", [-1, 10])
def test_an_item_out_of_range_is_refused(item: int) -> None:
    with pytest.raises(RuntimeError, match="item out of range"):
        NativeStack(10).distances(int32(1, item))


def test_the_first_id_is_always_drawn_first_and_new_ones_in_their_order() -> None:
    drawn = StackDistances(np.array([4, 2, 9]), int32(0), np.array([1.0]))
    ids = Accesses(drawn, 10, "f").draw(np.random.default_rng(0).random(7))
    assert ids.tolist() == [4, 2, 9, 4, 2, 9, 4]


def test_with_padding_nothing_is_new_once_all_have_occurred() -> None:
    drawn = measure([int32(*range(5), *range(5))], 5)
    assert drawn.distances.tolist() == [0, 5]
    uniforms = np.random.default_rng(0).random(1000)
    padded = Accesses(drawn, 5, "f", padding=True).draw(uniforms)
    assert padded.tolist() == list(range(5)) * 200  # in turn, at distance 5
    assert naive_distances(padded.tolist()[:50])[5:] == [5] * 45


def test_ids_beyond_the_table_are_taken_modulo(caplog: pytest.LogCaptureFixture) -> None:
    drawn = StackDistances(np.array([4, 12]), int32(0), np.array([1.0]))
    with caplog.at_level(logging.WARNING, "dlrm"):
        assert Accesses(drawn, 10, "shop", padding=False).draw(np.ones(2)).tolist() == [4, 2]
    assert "for shop are of ids up to 12, and its table has 10 rows" in caplog.text


def test_a_file_holds_what_was_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the pieces that it is read and written in."""
    items = (np.random.default_rng(1).pareto(0.7, 3000) % 400).astype(np.int32)
    measured = measure([items], 400)
    path = tmp_path / "dist.log"
    contents = set()
    for piece in (1, 3, 17, 1 << 20):
        monkeypatch.setattr(stack_distance, "_PIECE", piece)
        measured.write(path)
        contents.add(path.read_bytes())
        read = StackDistances.read(path)
        for field in dataclasses.fields(StackDistances):
            found, expected = getattr(read, field.name), getattr(measured, field.name)
            assert found.dtype == expected.dtype
            assert found.tolist() == expected.tolist()  # shares to the last bit
    assert len(contents) == 1


def test_a_file_of_the_references_format_is_read(tmp_path: Path) -> None:
    path = tmp_path / "dist_emb_0.log"
    for end in ("", "\n"):
        path.write_text("3, 1, 2\n0, 1, 3\n0.5, 0.75, 1.0" + end)
        read = StackDistances.read(path)
        assert read.ids.tolist() == [3, 1, 2]
        assert read.distances.tolist() == [0, 1, 3]
        assert read.cumulative.tolist() == [0.5, 0.75, 1]
    read.write(path)
    assert path.read_text() == "3, 1, 2\n0, 1, 3\n0.5, 0.75, 1.0\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "could not convert|invalid|expected at least one id"),
        ("1, x\n0\n1.0\n", "does not hold stack distances: invalid literal"),
        ("1\n0\none\n", "could not convert string to float"),
        ("1\n99999999999\n1.0\n", "does not hold stack distances"),
        ("-1, 2\n0\n1.0\n", "expected at least one id, none negative"),
        ("1, 2\n0, 1\n1.0\n", "expected as many shares as distances"),
        ("1, 2\n1, 2\n0.5, 1.0\n", "expected distances that rise from 0"),
        ("1, 2\n0, 2, 1\n0.5, 0.6, 1.0\n", "expected distances that rise from 0"),
        ("1, 2\n0, 3\n0.5, 1.0\n", "expected no distance above the number of ids"),
        ("1, 2\n0, 1\n0.5, 0.9\n", "expected shares that rise to 1"),
        ("1, 2\n0, 1, 2\n0.5, 0.4, 1.0\n", "expected shares that rise to 1"),
        ("1, 2\n0, 1\n0.0, 1.0\n", "expected shares that rise to 1"),
        ("1, 2\n0, 1\nnan, 1.0\n", "expected shares that rise to 1"),
    ],
)
def test_a_file_that_cannot_be_is_refused(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "dist.log"
    path.write_text(content)
    with pytest.raises(UserError, match=message) as refusal:
        StackDistances.read(path)
    assert str(refusal.value).startswith(str(path))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"absent\.log is not a file.*dlrm stack-distances"):
        StackDistances.read(tmp_path / "absent.log")


ROWS = 20_000
TABLES = (3000, 40)
SCHEMA = FeatureSchema(
    label="label",
    dense=(DenseFeature("d"),),
    sparse=tuple(SparseFeature(f"s_{i}", rows) for i, rows in enumerate(TABLES)),
    source_format="made-up",
    split_rule="none",
)


@pytest.fixture(scope="module")
def columns() -> npt.NDArray[np.int32]:
    """Ids with locality: long-tailed, and recent ones again and again."""
    generator = np.random.default_rng(3)
    ids = np.stack(
        [generator.integers(0, 1 + (generator.random(ROWS) ** 4 * n).astype(int)) for n in TABLES],
        1,
    )
    for row in range(1, ROWS):
        for column in range(2):
            if generator.random() < 0.4:
                ids[row, column] = ids[max(0, row - generator.geometric(0.1)), column]
    return ids.astype(np.int32)


@pytest.fixture(scope="module")
def dataset(columns: npt.NDArray[np.int32], tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    labels = np.zeros(ROWS, np.uint8)
    rows = Rows(labels, np.zeros((ROWS, 1), np.int32), columns)
    path = tmp_path_factory.mktemp("traced") / "dataset"
    return write_dataset(path, SCHEMA, {"train": [rows[:7000], rows[7000:]]})


def test_a_trace_of_a_dataset_generates_the_same_distances(
    dataset: Dataset, columns: npt.NDArray[np.int32], tmp_path: Path
) -> None:
    """The largest difference of the cumulative shares is that of two samples (Kolmogorov-Smirnov).

    Accesses are not independent, so that the bound is a few times the independent one.
    """
    written = write_stack_distances(dataset.path, tmp_path / "dist_j.log")
    assert list(written.values()) == [tmp_path / "dist_0.log", tmp_path / "dist_1.log"]
    config = GenerateConfig(
        data_generation="synthetic",
        data_size=ROWS,
        num_embeddings=TABLES,
        dense_features=1,
        data_trace_file=str(tmp_path / "dist_j.log"),
    )
    generated = generate(tmp_path / "again", config)
    rows = Rows.concatenate(list(generated.stored_rows("train", 0, ROWS)))
    for column, table in enumerate(TABLES):
        before = PlainStack(table).distances(columns[:, column])
        after = PlainStack(table).distances(np.ascontiguousarray(rows.sparse[:, column]))
        # While not all distances are possible yet, the reference cuts the distribution off.
        settled = slice(ROWS // 4, None)
        shares = [
            np.cumsum(np.bincount(each[settled], minlength=table + 1)) / len(each[settled])
            for each in (before, after)
        ]
        difference = np.abs(shares[0] - shares[1]).max()
        assert difference < 3 * 1.63 * np.sqrt(2 / (0.75 * ROWS)), (column, difference)
        # And the ids are those of the column, which other tables' are not.
        assert set(rows.sparse[:, column].tolist()) <= set(columns[:, column].tolist())
    shuffled = np.random.default_rng(0).permutation(columns[:, 0])
    scrambled = np.bincount(PlainStack(TABLES[0]).distances(shuffled), minlength=TABLES[0] + 1)
    expected = np.bincount(PlainStack(TABLES[0]).distances(columns[:, 0]), minlength=TABLES[0] + 1)
    assert (
        np.abs(np.cumsum(scrambled - expected)).max() / ROWS > 0.1
    )  # order matters in this column


def test_what_is_measured_is_the_chosen_split_and_features(
    dataset: Dataset, columns: npt.NDArray[np.int32], tmp_path: Path
) -> None:
    written = write_stack_distances(
        dataset.path, tmp_path / "one.log", features=["s_1"], padding=True
    )
    assert written == {"s_1": tmp_path / "one.log"}
    expected = measure([np.ascontiguousarray(columns[:, 1])], 40, padding=True)
    assert StackDistances.read(tmp_path / "one.log").cumulative.tolist() == (
        expected.cumulative.tolist()
    )
    with pytest.raises(UserError, match="there is no id whose stack distances"):
        write_stack_distances(dataset.path, tmp_path / "j.log", split="test")
    with pytest.raises(UserError, match=r"no sparse feature 's_2'\. There are s_0, s_1"):
        write_stack_distances(dataset.path, tmp_path / "j.log", features=["s_2"])
    for name in ("x.log", "project.json"):
        with pytest.raises(UserError, match=rf"{name} is to be the name of 2 files, each of ano"):
            write_stack_distances(dataset.path, tmp_path / name)
    with pytest.raises(UserError, match=r"j\.log is to be the name of 1 files, each of another"):
        write_stack_distances(dataset.path, tmp_path / "j.log", features=["s_1", "s_1"])
    with pytest.raises(UserError, match="absent is not a folder"):
        write_stack_distances(dataset.path, tmp_path / "absent" / "j.log")


def test_files_are_numbered_as_the_tables_that_are_generated_from_them(
    dataset: Dataset, columns: npt.NDArray[np.int32], tmp_path: Path
) -> None:
    pattern = tmp_path / "project_j.json"
    written = write_stack_distances(dataset.path, pattern, features=["s_1", "s_0"])
    assert written == {name: tmp_path / f"project_{n}.json" for n, name in enumerate(written)}
    assert list(written) == ["s_1", "s_0"]
    config = GenerateConfig(
        data_generation="synthetic",
        data_size=3,
        num_embeddings=TABLES[::-1],
        data_trace_file=str(pattern),
    )
    (rows,) = generate(tmp_path / "dataset", config).stored_rows("train", 0, 1)
    assert rows.sparse[0].tolist() == [columns[0, 1], columns[0, 0]]

    with pytest.raises(UserError, match=r"project_0\.json exists\. .*--overwrite"):
        write_stack_distances(dataset.path, pattern, features=["s_0"])
    before = written["s_0"].read_bytes()
    write_stack_distances(dataset.path, pattern, features=["s_0"], overwrite=True)
    assert written["s_1"].read_bytes() == before


def test_unknown_ids_and_lists_are_measured(tmp_path: Path) -> None:
    schema = dataclasses.replace(
        SCHEMA, sparse=(SCHEMA.sparse[0], SparseFeature("many", 9, multi_hot=True))
    )
    bags = Bags.of_lengths(int32(3, 4, 3, 8), np.array([2, 0, 2]))
    rows = Rows(
        np.zeros(3, np.uint8), np.zeros((3, 1), np.int32), int32(5, -1, 5)[:, None], (bags,)
    )
    data = write_dataset(tmp_path / "dataset", schema, {"train": [rows]})
    written = write_stack_distances(data.path, tmp_path / "j.log")
    single, several = map(StackDistances.read, written.values())
    assert (single.ids.tolist(), single.distances.tolist()) == ([5], [0, 1])
    assert (several.ids.tolist(), several.distances.tolist()) == ([3, 4, 8], [0, 2])


@pytest.mark.long
def test_forty_million_accesses_take_less_than_a_minute() -> None:
    if not library().loaded:
        pytest.skip(library().reason)
    generator = np.random.default_rng(0)
    started = time.perf_counter()
    runs = (generator.integers(0, 10**7, 10**6).astype(np.int32) for _ in range(40))
    measured = measure(runs, 10**7)
    assert time.perf_counter() - started < 60
    assert len(measured.ids) > 9_500_000
