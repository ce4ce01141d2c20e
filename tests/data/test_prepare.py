from __future__ import annotations

import errno
import gzip
import hashlib
import json
import logging
import os
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from dlrm.config import PrepareConfig, Shuffle
from dlrm.data import criteo, plan
from dlrm.data import dataset as dataset_module
from dlrm.data import prepare as prepare_module
from dlrm.data.dataset import Dataset, Rows, read_part
from dlrm.data.numbering import FeatureNumberings
from dlrm.data.plan import size_text
from dlrm.data.prepare import memory_bytes, prepare
from dlrm.data.sources import raw_source
from dlrm.data.splits import StoredOrder
from dlrm.data.vocabulary import Encoder, Vocabulary
from dlrm.errors import EnvironmentFaultError, UserError
from dlrm.schema import SPLITS, Split

FIXTURE = Path(__file__).parent / "fixtures"
IN_FILE_ORDER: tuple[Split, ...] = ("train", "test", "validation")


def stored(dataset: Dataset, split: Split) -> Rows:
    parts = dataset.manifest.splits[split].parts
    runs = [run for part in parts for run in read_part(dataset.path, part, dataset.schema)]
    return Rows.concatenate(runs)


def in_file_order(dataset: Dataset) -> Rows:
    return Rows.concatenate([stored(dataset, split) for split in IN_FILE_ORDER])


def numbered(content: bytes, modulus: int = 0) -> tuple[list[list[int]], list[list[int]]]:
    """Ids by first appearance, (rows, 26), and each feature's values in order of their ids."""
    vocabularies: list[dict[int, int]] = [{} for _ in range(26)]
    ids = []
    for line in content.splitlines():
        row = []
        for feature, field in enumerate(line.split(b"\t")[14:]):
            value = int(field or b"0", 16)
            value = value % modulus if modulus else value
            row.append(vocabularies[feature].setdefault(value, len(vocabularies[feature])))
        ids.append(row)
    return ids, [list(vocabulary) for vocabulary in vocabularies]


@pytest.fixture
def content(made_up_lines: Callable[..., bytes]) -> bytes:
    return made_up_lines(100)


@pytest.fixture
def source(tmp_path: Path, content: bytes) -> Path:
    path = tmp_path / "source" / "train.txt"
    path.parent.mkdir()
    path.write_bytes(content)
    return path


NO_SHUFFLE = PrepareConfig(shuffle="none")


@pytest.mark.parametrize("modulus", [0, 1000, 7])
def test_every_value_is_stored_where_it_belongs(
    source: Path, content: bytes, tmp_path: Path, modulus: int
) -> None:
    config = PrepareConfig(shuffle="none", max_ind_range=modulus)
    dataset = prepare(source, tmp_path / "dataset", config)
    rows = in_file_order(dataset)
    ids, vocabularies = numbered(content, modulus)
    fields = [line.split(b"\t") for line in content.splitlines()]
    assert rows.labels.tolist() == [int(row[0]) for row in fields]
    integers = [[max(0, int(field or b"0")) for field in row[1:14]] for row in fields]
    assert rows.dense.tolist() == integers
    assert rows.sparse.tolist() == ids

    assert dataset.schema.num_embeddings == tuple(map(len, vocabularies))
    assert {feature.value_modulus for feature in dataset.schema.sparse} == {modulus}
    for feature, values in zip(dataset.schema.sparse, vocabularies, strict=True):
        path = dataset.path / "vocabulary" / feature.vocabulary
        vocabulary = Vocabulary.read(path)
        assert vocabulary.encode(np.array(values, np.uint32)).tolist() == list(range(len(values)))
        column = int(feature.name.removeprefix("cat_"))
        counts = np.bincount([row[column] for row in ids])
        assert vocabulary.counts.tolist() == counts[vocabulary.ids].tolist()


def test_the_manifest(source: Path, content: bytes, tmp_path: Path) -> None:
    config = PrepareConfig(shuffle="day", seed=5)
    dataset = prepare(source, tmp_path / "dataset", config)
    manifest = dataset.manifest
    assert manifest.days == (15, 15, 14, 14, 14, 14, 14)
    assert manifest.train_days == (15, 15, 14, 14, 14, 14)
    assert [dataset.rows(split) for split in IN_FILE_ORDER] == [86, 7, 7]
    assert manifest.options == config
    assert manifest.rows_rejected == 0
    (made_from,) = manifest.sources
    assert made_from.name == "train.txt"
    assert made_from.bytes == len(content)
    assert made_from.sha256 == hashlib.sha256(content).hexdigest()
    assert not made_from.lacks_last_newline
    for split in SPLITS:
        assert manifest.splits[split].clicks == stored(dataset, split).labels.sum()
    text = (dataset.path / "manifest.json").read_text() + (dataset.path / "schema.json").read_text()
    assert str(tmp_path) not in text
    assert dataset.schema.source_format == "criteo-kaggle"
    assert "7 days" in dataset.schema.split_rule


@pytest.mark.parametrize("shuffle", ["none", "day", "total", "reference", "reference-day"])
def test_only_training_rows_are_shuffled(
    source: Path, tmp_path: Path, shuffle: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dataset_module, "BLOCK_BYTES", 2000)  # several blocks and parts
    monkeypatch.setattr(dataset_module, "PART_BYTES", 5000)
    plain = prepare(source, tmp_path / "none", NO_SHUFFLE)
    config = PrepareConfig(shuffle=shuffle)  # type: ignore[arg-type]
    shuffled = prepare(source, tmp_path / "shuffled", config)
    assert len(shuffled.manifest.splits["train"].parts) > 1
    order = stored_order(plain.manifest.train_days, config)
    for split in SPLITS:
        expected, got = stored(plain, split), stored(shuffled, split)
        if split == "train":
            expected = expected[order]
        for name in ("labels", "dense", "sparse"):
            assert (getattr(got, name) == getattr(expected, name)).all()
    assert shuffled.schema == plain.schema


def stored_order(days: tuple[int, ...], config: PrepareConfig) -> list[int]:
    """The training rows in stored order, as tests/data/test_splits.py holds it to be."""
    if config.shuffle == "none":
        return list(range(sum(days)))
    parts, keys = StoredOrder(days, config.shuffle, config.seed, 50).place(np.arange(sum(days)))
    return [int(row) for row in np.lexsort((keys, parts))]


def tree(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_equal_options_give_equal_bytes(source: Path, tmp_path: Path) -> None:
    first = tree(prepare(source, tmp_path / "a", PrepareConfig()).path)
    assert tree(prepare(source, tmp_path / "b", PrepareConfig()).path) == first
    # Nor do they depend on how the file was cut into blocks.
    blocks = criteo.read_blocks
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            criteo,
            "read_blocks",
            lambda path, **options: blocks(path, block_bytes=777, **options),
        )
        assert tree(prepare(source, tmp_path / "c", PrepareConfig()).path) == first
    other = tree(prepare(source, tmp_path / "d", PrepareConfig(seed=124)).path)
    assert other["train/part-00000.arrow"] != first["train/part-00000.arrow"]
    assert other["test/part-00000.arrow"] == first["test/part-00000.arrow"]
    assert other["schema.json"] == first["schema.json"]


def test_values_that_are_hashed_need_no_tables(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise AssertionError

    monkeypatch.setattr(FeatureNumberings, "begin_segment", fail)
    dataset = prepare(source, tmp_path / "dataset", PrepareConfig(hash_buckets=10))
    assert dataset.schema.num_embeddings == (10,) * 26


def test_a_folder_means_its_train_txt(source: Path, tmp_path: Path) -> None:
    assert [file.path for file in raw_source(source.parent, PrepareConfig()).files] == [source]
    dataset = prepare(str(source.parent), str(tmp_path / "deep" / "dataset"))
    assert dataset.path == tmp_path / "deep" / "dataset"


def test_a_finished_dataset_is_returned_at_once(
    source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "dataset"
    prepare(source, path, PrepareConfig())
    inode = (path / "manifest.json").stat().st_ino
    with caplog.at_level(logging.INFO, "dlrm"):
        again = prepare(source, path, PrepareConfig())
    assert "is prepared already" in caplog.text
    assert again.rows("train") == 86
    # The same content at another time and under another name is the same source.
    moved = source.with_name("moved.txt")
    source.rename(moved)
    os.utime(moved, ns=(1, 1))
    prepare(moved, path, PrepareConfig())
    assert (path / "manifest.json").stat().st_ino == inode
    prepare(moved, path, PrepareConfig(), overwrite=True)
    assert (path / "manifest.json").stat().st_ino != inode


def test_a_finished_dataset_needs_neither_a_lock_nor_room(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "dataset"
    prepare(source, path, PrepareConfig())
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=0))
    monkeypatch.setattr(prepare_module, "locked", refused)
    assert prepare(source, path, PrepareConfig()).rows("train") == 86


def refused(*_: object) -> None:
    raise OSError(errno.EROFS, "Read-only file system")


def test_a_dataset_that_another_process_has_made_meanwhile_is_returned(
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    path = tmp_path / "dataset"
    locked = prepare_module.locked

    @contextmanager
    def late(folder: Path, what: str) -> Iterator[None]:
        with monkeypatch.context() as patch:
            patch.setattr(prepare_module, "locked", locked)
            prepare(source, path, PrepareConfig())
        with locked(folder, what):
            yield

    monkeypatch.setattr(prepare_module, "locked", late)
    with caplog.at_level(logging.INFO, "dlrm"):
        assert prepare(source, path, PrepareConfig()).rows("train") == 86
    assert "is prepared already" in caplog.text


def test_the_seed_of_no_shuffle_makes_no_difference(source: Path, tmp_path: Path) -> None:
    path = tmp_path / "dataset"
    prepare(source, path, NO_SHUFFLE)
    inode = (path / "manifest.json").stat().st_ino
    prepare(source, path, PrepareConfig(shuffle="none", seed=7))
    assert (path / "manifest.json").stat().st_ino == inode
    with pytest.raises(UserError, match="--seed 7 is asked for"):
        prepare(source, path, PrepareConfig(shuffle="day", seed=7))


@pytest.mark.parametrize(("shuffle", "kilobytes"), [("total", 32.2), ("none", 31.4)])
def test_a_disk_that_is_too_small_is_said_before_the_work(
    source: Path,
    content: bytes,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    shuffle: Shuffle,
    kilobytes: float,
) -> None:
    # Twice 100 rows of a byte and 39 numbers of 4 bytes, and of those shuffled a key of 8.
    free = int(kilobytes * 1000)
    config = PrepareConfig(shuffle=shuffle)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free - 100))
    monkeypatch.setattr(criteo, "read_blocks", refused)
    path = tmp_path / "deep" / "er" / "dataset"
    with pytest.raises(EnvironmentFaultError) as caught:
        prepare(source, path, config)
    assert str(caught.value) == (
        f"{path} needs about {kilobytes} kB of disk while it is made, and {kilobytes - 0.1:.1f} kB "
        f"are free there. Free some space, or choose another place."
    )
    assert [entry.name for entry in tmp_path.iterdir()] == ["source"]
    monkeypatch.undo()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free))
    assert prepare(source, path, config).rows("train") == 86


def test_the_plan_comes_first(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=10**12))
    monkeypatch.setattr(plan, "available_cores", lambda: 2)
    size = source.stat().st_size
    with caplog.at_level(logging.INFO, "dlrm"):
        prepare(source, tmp_path / "dataset", memory="1.5GiB")
    assert caplog.messages[0] == (
        f"plan: train.txt, {size / 1000:.1f} kB, about 100 rows; a DATASET of about 15.7 kB, with "
        "32.2 kB of disk while it is made (1000.0 GB are free); at most 1.5 GiB of memory; "
        "about 1 s"
    )
    # Then what each stage took.
    stages = [re.fullmatch(r"(\w+) +[0-9]+\.[0-9] s", message) for message in caplog.messages[1:]]
    assert [stage and stage[1] for stage in stages] == ["read", "fit", "arrange", "write", "verify"]


@pytest.mark.parametrize(("cores", "threads"), [(1, 1), (2, 2), (200, 11)])
def test_blocks_are_parsed_on_as_many_threads_as_memory_has_room_for(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cores: int, threads: int
) -> None:
    blocks = criteo.read_blocks
    taken: list[object] = []

    def counted(path: Path, **options: Any) -> object:
        taken.append(options["threads"])
        return blocks(path, **options)

    for module in (prepare_module, criteo):
        monkeypatch.setattr(module, "available_cores", lambda: cores)
    monkeypatch.setattr(criteo, "read_blocks", counted)
    prepare(source, tmp_path / "dataset")
    assert taken == [threads]
    assert threads == cores or (threads + 1) * criteo.BLOCK_MEMORY <= 200 << 20


@pytest.mark.parametrize(("copies", "rows"), [(1, "1,000"), (30, "30,000")])
def test_the_rows_are_estimated_from_the_head(
    tmp_path: Path,
    made_up_lines: Callable[..., bytes],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    copies: int,
    rows: str,
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=0))
    source = tmp_path / "train.txt"
    source.write_bytes(made_up_lines(1000) * copies)
    with caplog.at_level(logging.INFO, "dlrm"), pytest.raises(EnvironmentFaultError):
        prepare(source, tmp_path / "dataset")
    (plan,) = (message for message in caplog.messages if message.startswith("plan"))
    (estimate,) = re.findall("about ([0-9,]+) rows", plan)
    assert int(estimate.replace(",", "")) == pytest.approx(int(rows.replace(",", "")), rel=0.01)


@pytest.mark.parametrize("memory", ["1GiB", "1024 MiB", "1048576k", 1 << 30, "0.001T", "2g"])
def test_the_ceiling_of_memory_is_a_size(memory: int | str) -> None:
    expected = {"0.001T": 1099511627, "2g": 2 << 30}.get(str(memory), 1 << 30)
    assert memory_bytes(memory) == expected


@pytest.mark.parametrize(
    ("memory", "message"),
    [
        ("1023MiB", "must be at least 1GiB, which preparation needs; got 1072693248 bytes"),
        (0, "must be at least 1GiB"),
        ("", "expected a size such as 2GiB or 1536MiB, got ''"),
        ("2 GB GB", "expected a size such as"),
        ("-2GiB", "expected a size such as"),
        ("1e10", "expected a size such as"),
    ],
)
def test_a_ceiling_of_memory_that_is_none_is_refused(
    source: Path, tmp_path: Path, memory: int | str, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        prepare(source, tmp_path / "dataset", memory=memory)
    assert [entry.name for entry in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize(
    ("size", "text"),
    [(157, "0.2 kB"), (2_340_000, "2.3 MB"), (1_000_000_000, "1.0 GB"), (7_196_986_869, "7.2 GB")],
)
def test_sizes_are_readable(size: int, text: str) -> None:
    assert size_text(size) == text


@pytest.mark.parametrize(
    ("options", "difference"),
    [
        ({"seed": 7}, "it was made with --seed 123, and --seed 7 is asked for"),
        ({"shuffle": "day"}, "made with --shuffle total, and --shuffle day is asked for"),
        ({"max_ind_range": 9}, "made with --max-ind-range 0, and --max-ind-range 9 is asked for"),
    ],
)
def test_a_dataset_of_other_options_is_refused(
    source: Path, tmp_path: Path, options: dict[str, object], difference: str
) -> None:
    path = tmp_path / "dataset"
    prepare(source, path, PrepareConfig())
    before = tree(path)
    config = PrepareConfig(**options)  # type: ignore[arg-type]
    with pytest.raises(UserError) as caught:
        prepare(source, path, config)
    message = str(caught.value)
    assert message.startswith(f"{path} is another DATASET: ")
    assert difference in message
    assert message.endswith("or start over with --overwrite.")
    assert tree(path) == before
    assert prepare(source, path, config, overwrite=True).manifest.options == config
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["dataset", "source"]


def test_a_dataset_of_another_source_is_refused(
    source: Path, tmp_path: Path, content: bytes
) -> None:
    path = tmp_path / "dataset"
    prepare(source, path, PrepareConfig())
    other = content[:-1] + (b"0" if content[-2:-1] != b"0" else b"1")
    for changed in (content + content, other[: len(content)]):
        source.write_bytes(changed)
        os.utime(source, ns=(1, 1))
        with pytest.raises(UserError, match=rf"made from train\.txt \({len(content)} bytes\), and"):
            prepare(source, path, PrepareConfig())


def test_a_damaged_or_newer_dataset_is_refused(source: Path, tmp_path: Path) -> None:
    path = tmp_path / "dataset"
    prepare(source, path, PrepareConfig())
    (path / "train" / "part-00000.arrow").write_bytes(b"")
    with pytest.raises(UserError, match=r"is damaged: .*\(--overwrite starts over\.\)"):
        prepare(source, path, PrepareConfig())
    prepare(source, path, PrepareConfig(), overwrite=True)
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps(manifest | {"format_version": "2.0"}))
    with pytest.raises(UserError, match=r"format version '2\.0'.*\(--overwrite starts over\.\)"):
        prepare(source, path, PrepareConfig())
    prepare(source, path, PrepareConfig(), overwrite=True)


def test_another_folder_is_never_overwritten(source: Path, tmp_path: Path) -> None:
    before = tree(source.parent)
    for overwrite in (False, True):
        with pytest.raises(UserError, match="is not empty and no DATASET"):
            prepare(source, source.parent, PrepareConfig(), overwrite=overwrite)
    assert tree(source.parent) == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["source"]


@pytest.fixture
def is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let reading a source for a second time be an error."""
    blocks = criteo.read_blocks
    read: list[Path] = []

    def once(path: Path, **options: Any) -> object:
        assert path not in read
        read.append(path)
        return blocks(path, **options)

    monkeypatch.setattr(criteo, "read_blocks", once)


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.usefixtures("is_read_once")
def test_what_is_put_in_its_place_meanwhile_does_not_cost_the_work(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overwrite: bool
) -> None:
    path = tmp_path / "dataset"
    verify = prepare_module.verify

    def meanwhile(*arguments: Any, **options: Any) -> None:
        verify(*arguments, **options)
        path.mkdir()
        (path / "theirs").touch()

    with monkeypatch.context() as patch:
        patch.setattr(prepare_module, "verify", meanwhile)
        with pytest.raises(UserError, match="is not empty and no DATASET"):
            prepare(source, path, overwrite=overwrite)
    assert [entry.name for entry in path.iterdir()] == ["theirs"]
    with pytest.raises(UserError, match="is not empty and no DATASET"):
        prepare(source, path, overwrite=overwrite)
    shutil.rmtree(path)
    assert prepare(source, path, overwrite=overwrite).rows("train") == 86
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["dataset", "source"]


@pytest.mark.usefixtures("is_read_once")
def test_a_permutation_that_turns_out_too_large_does_not_cost_the_work(
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    path = tmp_path / "dataset"
    config = PrepareConfig(shuffle="reference")
    bytes_of_row = ((1 << 30) - prepare_module._RESERVED_BYTES) // 86 + 1
    monkeypatch.setattr(prepare_module, "permutation_bytes", lambda rows: rows * bytes_of_row)
    monkeypatch.setattr(criteo, "estimate_rows", lambda _: 50)
    with caplog.at_level(logging.WARNING, "dlrm"), pytest.raises(UserError) as caught:
        prepare(source, path, config, memory="1GiB")
    assert str(caught.value) == (
        "--shuffle reference draws a permutation of about 86 rows, for which 444.6 MB of memory "
        "are needed and 444.6 MB are left. Raise --memory to go on, or start over with --shuffle "
        "total --overwrite."
    )
    assert f"{path} is unfinished; the same command goes on with it" in caplog.text
    assert prepare(source, path, config, memory="2GiB").rows("train") == 86
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["dataset", "source"]


def test_threads_have_memory_beside_what_is_held_meanwhile(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pools: list[int] = []

    class Counted(ThreadPoolExecutor):
        def __init__(self, threads: int) -> None:
            pools.append(threads)
            super().__init__(threads)

    monkeypatch.setattr(prepare_module, "ThreadPoolExecutor", Counted)
    monkeypatch.setattr(prepare_module, "available_cores", lambda: 8)
    monkeypatch.setattr(StoredOrder, "nbytes", property(lambda _: 250 << 20))
    prepare(source, tmp_path / "dataset", PrepareConfig(shuffle="reference"), memory="1624MiB")
    # Of 1024 MiB: fit, arrange beside the order, write.
    assert pools == [5, 3, 5]


def test_a_permutation_that_is_too_large_is_refused_before_the_work(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(criteo, "estimate_rows", lambda _: 10**9)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=10**13))
    monkeypatch.setattr(criteo, "read_blocks", refused)
    with pytest.raises(UserError, match=r"12\.0 GB of memory .*Use --shuffle total, or raise"):
        prepare(source, tmp_path / "dataset", PrepareConfig(shuffle="reference-day"))
    assert [entry.name for entry in tmp_path.iterdir()] == ["source"]


def bad_inputs(content: bytes) -> dict[str, tuple[bytes, str]]:
    lines = content.splitlines(keepends=True)

    def with_line_51(change: Callable[[list[bytes]], list[bytes]]) -> bytes:
        fields = change(lines[50].rstrip(b"\n").split(b"\t"))
        return b"".join([*lines[:50], b"\t".join(fields) + b"\n", *lines[51:]])

    def with_field(column: int, field: bytes) -> bytes:
        return with_line_51(lambda fields: [*fields[: column - 1], field, *fields[column:]])

    return {
        "empty": (b"", "is empty"),
        "blank line": (b"".join([*lines[:50], b"\n", *lines[50:]]), "line 51, column 1"),
        "short row": (with_line_51(lambda fields: fields[:-1]), "line 51, column 40"),
        "long row": (with_line_51(lambda fields: [*fields, b""]), "line 51, column 41"),
        "non-hex id": (with_field(15, b"0000000g"), r"line 51, column 15 \(cat_0\)"),
        "short id": (with_field(40, b"0000000"), r"line 51, column 40 \(cat_25\)"),
        "non-integer": (with_field(2, b"1.0"), r"line 51, column 2 \(int_0\)"),
        "beyond 64 bits": (with_field(14, b"9" * 20), r"line 51, column 14 \(int_12\)"),
        "label": (with_field(1, b"2"), r"line 51, column 1 \(label\)"),
        "no label": (with_field(1, b""), r"line 51, column 1 \(label\)"),
        "test.txt": (b"".join(line[2:] for line in lines), "line 1, column 40"),
        "quote": (with_field(15, b'"000000"'), r"line 51, column 15 \(cat_0\)"),
        "NUL bytes": (with_field(3, b"\0"), r"line 51, column 3 \(int_1\)"),
        "too few rows": (b"".join(lines[:13]), "13 rows; expected at least 14"),
    }


@pytest.mark.parametrize("kind", bad_inputs(b"\n" * 60))
@pytest.mark.parametrize("overwrite", [False, True])
def test_bad_input_leaves_nothing(
    source: Path, tmp_path: Path, content: bytes, kind: str, overwrite: bool
) -> None:
    path = tmp_path / "dataset"
    if overwrite:
        prepare(source, path, PrepareConfig())
    before = tree(tmp_path)
    changed, message = bad_inputs(content)[kind]
    bad = source.with_name("bad.txt")
    bad.write_bytes(changed)
    with pytest.raises(UserError, match=message) as caught:
        prepare(bad, path, PrepareConfig(seed=9), overwrite=overwrite)
    assert str(bad) in str(caught.value)
    bad.unlink()
    assert tree(tmp_path) == before
    assert path.exists() is overwrite


def test_line_ends(source: Path, tmp_path: Path, content: bytes) -> None:
    expected = prepare(source, tmp_path / "dataset", PrepareConfig())
    source.write_bytes(content.replace(b"\n", b"\r\n"))
    windows = prepare(source, tmp_path / "windows", PrepareConfig())
    source.write_bytes(content[:-1])
    cut = prepare(source, tmp_path / "cut", PrepareConfig())
    assert cut.manifest.sources[0].lacks_last_newline
    for dataset in (windows, cut):
        assert dataset.manifest.splits == expected.manifest.splits
        assert dataset.schema == expected.schema


def test_a_source_that_changes_meanwhile_is_refused(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks = criteo.read_blocks

    def growing(path: Path, **options: object) -> object:
        yield from blocks(path, **options)  # type: ignore[arg-type]
        with open(path, "ab") as file:
            file.write(b"more")

    monkeypatch.setattr(criteo, "read_blocks", growing)
    with pytest.raises(UserError, match="changed while it was read"):
        prepare(source, tmp_path / "dataset", PrepareConfig())
    assert not (tmp_path / "dataset").exists()


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EDQUOT])
def test_a_full_or_read_only_target(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def refused(*arguments: object) -> None:
        raise OSError(code, os.strerror(code), "here")

    for function in ("fsync", "replace", "mkdir"):
        with monkeypatch.context() as patch:
            patch.setattr(os, function, refused)
            target = tmp_path / "dataset"
            with pytest.raises(EnvironmentFaultError, match=os.strerror(code)):
                prepare(source, target, PrepareConfig())
        assert [entry.name for entry in tmp_path.iterdir()] == ["source"]


def write_npz(path: Path, content: bytes, **changes: npt.NDArray[np.generic]) -> None:
    ids, vocabularies = numbered(content)
    fields = [line.split(b"\t") for line in content.splitlines()]
    arrays: dict[str, npt.NDArray[np.generic]] = {
        "X_cat": np.array(ids, np.float64),
        "X_int": np.array([[max(0, int(x or b"0")) for x in row[1:14]] for row in fields], "i4"),
        "y": np.array([int(row[0]) for row in fields], np.int32),
        "counts": np.array(list(map(len, vocabularies)), np.int32),
    }
    np.savez_compressed(path, **(arrays | changes))  # type: ignore[arg-type]


def test_the_references_prepared_file_gives_the_same_rows(
    source: Path, tmp_path: Path, content: bytes
) -> None:
    npz = tmp_path / "kaggleAdDisplayChallenge_processed.npz"
    write_npz(npz, content)
    expected = prepare(source, tmp_path / "text", PrepareConfig(shuffle="reference"))
    dataset = prepare(npz, tmp_path / "npz", PrepareConfig(shuffle="reference"))
    assert dataset.manifest.splits == expected.manifest.splits
    assert dataset.schema.num_embeddings == expected.schema.num_embeddings
    assert {feature.vocabulary for feature in dataset.schema.sparse} == {""}
    assert not (dataset.path / "vocabulary").exists()
    prepare(npz, tmp_path / "npz", PrepareConfig(shuffle="reference"))
    with pytest.raises(UserError, match=r"--max-ind-range 5 is about raw rows, and .*\.npz holds"):
        prepare(npz, tmp_path / "limited", PrepareConfig(max_ind_range=5))


def test_a_damaged_prepared_file_is_refused(tmp_path: Path, content: bytes) -> None:
    npz = tmp_path / "processed.npz"
    write_npz(npz, content)
    whole = npz.read_bytes()

    def refused(message: str) -> None:
        with pytest.raises(UserError, match=message):
            prepare(npz, tmp_path / "dataset", PrepareConfig())
        assert [entry.name for entry in tmp_path.iterdir()] == ["processed.npz"]

    for length in (0, 3, 100, len(whole) // 2, len(whole) - 1):
        npz.write_bytes(whole[:length])
        refused(r"processed\.npz is damaged, or not written by NumPy: ")
    for position in range(0, len(whole), 211):
        npz.write_bytes(whole[:position] + bytes([whole[position] ^ 0x55]) + whole[position + 1 :])
        try:
            prepare(npz, tmp_path / "dataset", PrepareConfig())
        except UserError:
            continue
        shutil.rmtree(tmp_path / "dataset")  # a byte that nothing depends on
    np.savez(npz, y=np.zeros(5))
    refused(r"processed\.npz is not the reference's: expected an array X_int, got only y")
    np.save(npz.with_suffix(".npy"), np.zeros(5))
    npz.with_suffix(".npy").rename(npz)
    refused(r"processed\.npz is damaged, or not written by NumPy: ")
    for changes, message in [
        ({"y": np.full(100, 2)}, r"array y, at \(0,\): expected .* at least 0 and below 2, got 2"),
        ({"y": np.zeros(99)}, r"array X_int: expected the shape \(99, 13\), got \(100, 13\)"),
        ({"y": np.array(["a"] * 100)}, "array y: expected numbers, got <U1"),
        ({"X_cat": np.full((100, 26), 0.5)}, r"array X_cat, at \(0, 0\): .* got 0\.5"),
        ({"X_cat": np.full((100, 26), np.nan)}, r"array X_cat, at \(0, 0\): .* got nan"),
        ({"X_cat": np.full((100, 26), 999)}, r"array X_cat, at \(0, 0\): .* got 999"),
        ({"counts": np.zeros(26)}, r"array counts, at \(0,\): .* at least 1"),
        ({"y": np.array([object()] * 100)}, "array y is damaged, or not written by NumPy"),
    ]:
        write_npz(npz, content, **changes)  # type: ignore[arg-type]
        refused(message)


def write_reordered_days(folder: Path, content: bytes, days: tuple[int, ...]) -> None:
    """The reference's files of the Terabyte data: a day each, counts and dictionaries."""
    ids, vocabularies = numbered(content)
    fields = [line.split(b"\t") for line in content.splitlines()]
    start = 0
    for day, rows in enumerate(days):
        here = slice(start, start + rows)
        integers = [[max(0, int(x or b"0")) for x in row[1:14]] for row in fields[here]]
        np.savez_compressed(
            folder / f"day_{day}_reordered.npz",
            X_cat=np.array(ids[here], np.int32),
            X_int=np.array(integers, np.int32),
            y=np.array([int(row[0]) for row in fields[here]], np.int32),
        )
        start += rows
    np.savez_compressed(folder / "day_day_count.npz", total_per_file=np.array(days))
    np.savez_compressed(folder / "day_fea_count.npz", counts=np.array([*map(len, vocabularies)]))
    for feature, values in enumerate(vocabularies):
        unique = np.array(values, np.uint32).view(np.int32)
        np.savez_compressed(folder / f"day_fea_dict_{feature}.npz", unique=unique)


def test_the_references_days_give_the_same_rows_and_vocabularies(
    tmp_path: Path, content: bytes
) -> None:
    for name in ("raw", "prepared"):
        (tmp_path / name).mkdir()
    lines = content.splitlines(keepends=True)
    days = (30, 41, 29)
    for day, start in enumerate((0, 30, 71)):
        (tmp_path / "raw" / f"day_{day}").write_bytes(b"".join(lines[start : start + days[day]]))
    write_reordered_days(tmp_path / "prepared", content, days)
    expected = prepare(tmp_path / "raw", tmp_path / "from_raw")
    dataset = prepare(tmp_path / "prepared", tmp_path / "from_prepared")
    assert dataset.manifest.splits == expected.manifest.splits
    assert dataset.manifest.days == expected.manifest.days == days
    assert dataset.manifest.day_clicks == expected.manifest.day_clicks
    assert dataset.schema.sparse == expected.schema.sparse  # checksums of vocabularies included
    assert len(dataset.manifest.sources) == 3 + 2 + 26

    # Without the dictionaries raw rows cannot be encoded.
    for path in (tmp_path / "prepared").glob("day_fea_dict_*"):
        path.unlink()
    bare = prepare(tmp_path / "prepared", tmp_path / "bare")
    assert bare.manifest.splits == expected.manifest.splits
    with pytest.raises(UserError, match="cannot encode raw rows: it has no vocabulary for cat_0"):
        Encoder.open(bare.path, bare.schema)


def test_the_references_numbers_keep_their_splits(tmp_path: Path, content: bytes) -> None:
    ids, vocabularies = numbered(content)
    fields = [line.split(b"\t") for line in content.splitlines()]
    numbers = np.array(
        [
            [int(row[0]), *(max(0, int(x or b"0")) for x in row[1:14]), *values]
            for row, values in zip(fields, ids, strict=True)
        ],
        "<i4",
    )
    source = tmp_path / "bin"
    source.mkdir()
    for split, rows in (("train", slice(60)), ("test", slice(60, 90)), ("val", slice(90, 100))):
        (source / f"day_{split}.bin").write_bytes(numbers[rows].tobytes())
    np.savez(source / "day_fea_count.npz", counts=np.array([*map(len, vocabularies)]))
    dataset = prepare(source, tmp_path / "dataset", PrepareConfig(shuffle="none"))
    assert [dataset.rows(split) for split in IN_FILE_ORDER] == [60, 30, 10]
    rows = in_file_order(dataset)
    assert rows.sparse.tolist() == ids
    assert rows.labels.tolist() == numbers[:, 0].tolist()
    with pytest.raises(UserError, match=r"--split rows: the files of .* are the splits already"):
        prepare(source, tmp_path / "other", PrepareConfig(split="rows"))


def test_golden_rows_are_the_references(shared_data: Path, tmp_path: Path) -> None:
    golden = shared_data / "golden"
    dataset = prepare(golden / "train.txt", tmp_path / "text", NO_SHUFFLE)
    with np.load(golden / "kaggleAdDisplayChallenge_processed.npz") as archive:
        arrays = dict(archive)
    rows = in_file_order(dataset)
    assert (rows.labels == arrays["y"]).all()
    assert (rows.dense == arrays["X_int"]).all()
    assert (rows.sparse == arrays["X_cat"]).all()
    assert dataset.schema.num_embeddings == tuple(arrays["counts"].tolist())

    shuffled = prepare(
        golden / "train.txt", tmp_path / "reference", PrepareConfig(shuffle="reference")
    )
    order = np.random.RandomState(123).permutation(12006)
    assert (stored(shuffled, "train").sparse == arrays["X_cat"][order]).all()


def test_the_golden_npz_gives_the_rows_of_the_text(shared_data: Path, tmp_path: Path) -> None:
    golden = shared_data / "golden"
    dataset = prepare(golden / "train.txt", tmp_path / "text", NO_SHUFFLE)
    npz = golden / "kaggleAdDisplayChallenge_processed.npz"
    from_npz = prepare(npz, tmp_path / "npz", NO_SHUFFLE)
    assert from_npz.manifest.splits == dataset.manifest.splits


def test_real_rows(shared_data: Path, tmp_path: Path) -> None:
    source = shared_data / "criteo" / "kaggle"
    dataset = prepare(source, tmp_path / "dataset", NO_SHUFFLE)
    content = (source / "train.txt").read_bytes()
    ids, vocabularies = numbered(content)
    rows = in_file_order(dataset)
    assert len(rows) == 10001
    assert rows.sparse.tolist() == ids
    assert dataset.schema.num_embeddings == tuple(map(len, vocabularies))


@pytest.mark.parametrize("packed", [False, True])
def test_a_real_day_of_the_terabyte_logs(shared_data: Path, tmp_path: Path, packed: bool) -> None:
    content = (shared_data / "criteo" / "terabyte" / "day_0").read_bytes()
    folder = tmp_path / "logs"
    folder.mkdir()
    source = folder / ("day_0.gz" if packed else "day_0")
    source.write_bytes(gzip.compress(content, 1) if packed else content)
    with pytest.raises(UserError, match="is a single day, of which nothing is held back"):
        prepare(folder, tmp_path / "dataset")
    config = PrepareConfig(split="rows", shuffle="none")
    dataset = prepare(folder, tmp_path / "dataset", config)
    ids, vocabularies = numbered(content)
    fields = [line.split(b"\t") for line in content.splitlines()]
    rows = in_file_order(dataset)
    assert rows.labels.tolist() == [int(row[0]) for row in fields]
    assert rows.dense.tolist() == [[max(0, int(x or b"0")) for x in row[1:14]] for row in fields]
    assert rows.sparse.tolist() == ids
    assert dataset.schema.num_embeddings == tuple(map(len, vocabularies))
    assert dataset.manifest.days == (1429, 1429, 1429, 1429, 1428, 1428, 1428)
    assert sum(dataset.manifest.day_clicks) == 265  # 2.65 %
    (made_from,) = dataset.manifest.sources
    assert (made_from.name, made_from.bytes) == (source.name, source.stat().st_size)
    assert made_from.sha256 == hashlib.sha256(source.read_bytes()).hexdigest()
    # All of it trains.
    everything = prepare(source, tmp_path / "all", PrepareConfig(split="none", shuffle="none"))
    assert [everything.rows(split) for split in SPLITS] == [10000, 0, 0]
    assert everything.manifest.days == (10000,)
    assert stored(everything, "train").sparse.tolist() == ids


def test_a_total_shuffle_keeps_every_real_row_and_spreads_them_evenly(
    shared_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dataset_module, "PART_BYTES", 150_000)
    source = shared_data / "criteo" / "kaggle"
    plain = stored(prepare(source, tmp_path / "none", NO_SHUFFLE), "train")
    dataset = prepare(source, tmp_path / "total", PrepareConfig(shuffle="total"))
    shuffled = stored(dataset, "train")

    def rows(of: Rows) -> list[tuple[object, ...]]:
        return list(
            zip(of.labels.tolist(), map(tuple, of.dense), map(tuple, of.sparse), strict=True)
        )

    before, after = rows(plain), rows(shuffled)
    assert Counter(before) == Counter(after)
    # Where each row that is the only one like it went: runs of rows against runs of places, and
    # against parts.
    only = [row for row, count in Counter(before).items() if count == 1]
    assert len(only) > 8000
    came_from = {row: place for place, row in enumerate(before)}
    went_to = {row: place for place, row in enumerate(after)}
    origins = [came_from[row] for row in only]
    targets = [went_to[row] for row in only]
    ends = np.cumsum([part.rows for part in dataset.manifest.splits["train"].parts])
    assert len(ends) > 5
    parts = np.searchsorted(ends, targets, side="right")
    for places, bins in ((np.array(targets) * 10 // len(after), 10), (parts, len(ends))):
        counts = np.histogram2d(np.array(origins) * 10 // len(before), places, bins=[10, bins])[0]
        expected = np.outer(counts.sum(axis=1), counts.sum(axis=0)) / len(only)
        statistic = ((counts - expected) ** 2 / expected).sum()
        freedom = 9 * (bins - 1)
        assert abs(statistic - freedom) < 4 * np.sqrt(2 * freedom)


def test_malformed_rows_are_skipped_counted_and_described(
    source: Path, tmp_path: Path, content: bytes
) -> None:
    expected = prepare(source, tmp_path / "whole", PrepareConfig())
    lines = content.splitlines(keepends=True)
    bad = [b"\n", lines[0][2:], b"2" + lines[0][1:], b"1\tx" + lines[0][lines[0].index(b"\t", 2) :]]
    source.write_bytes(b"".join([bad[0], *lines[:50], bad[1], bad[2], *lines[50:], bad[3], bad[0]]))
    with pytest.raises(UserError, match=r"train\.txt, line 1, "):
        prepare(source, tmp_path / "strict", PrepareConfig())
    config = PrepareConfig(bad_rows="skip", max_bad_rows=5)
    dataset = prepare(source, tmp_path / "skipped", config)
    assert dataset.manifest.splits == expected.manifest.splits
    assert dataset.schema == expected.schema
    assert dataset.manifest.rows_rejected == 5
    assert dataset.manifest.rejected == {"blank": 2, "fields": 1, "integer": 1, "label": 1}
    examples = dataset.manifest.rejected_examples
    assert [(each.file, each.line, each.reason) for each in examples] == [
        ("train.txt", 1, "blank"),
        ("train.txt", 52, "fields"),
        ("train.txt", 53, "label"),
        ("train.txt", 104, "integer"),
        ("train.txt", 105, "blank"),
    ]
    assert str(tmp_path) not in (dataset.path / "manifest.json").read_text()

    path = tmp_path / "few"
    source.write_bytes(b"\n" * 90 + content)  # of which not all are kept to be shown
    with pytest.raises(UserError) as caught:
        prepare(source, path, PrepareConfig(bad_rows="skip", max_bad_rows=89))
    assert str(caught.value).startswith(
        f"{source}, lines 1 to 190: with those before there are 90 malformed rows, and "
        "--max-bad-rows is 89. Raise it if they may be left out. The first of these lines that is "
        f"malformed: {source}, line 1, column 1 (label): expected "
    )
    assert not path.exists()
    assert not path.with_name(".few.work").exists()


def test_a_dataset_of_version_1_is_read() -> None:
    """Made by the first version, from the made-up train.txt beside it; it must stay readable."""
    dataset = Dataset.open(FIXTURE / "dataset-1.0")
    content = (FIXTURE / "train.txt").read_bytes()
    ids, vocabularies = numbered(content)
    rows = in_file_order(dataset)
    assert rows.labels.tolist() == [int(line[:1]) for line in content.splitlines()]
    assert rows.sparse.tolist() == ids
    assert dataset.schema.num_embeddings == tuple(map(len, vocabularies))
    assert dataset.manifest.options == NO_SHUFFLE
    assert dataset.manifest.sources[0].sha256 == hashlib.sha256(content).hexdigest()
    values = np.array([[values[-1] for values in vocabularies], [12345] * 26], np.uint32)
    encoded = Encoder.open(dataset.path, dataset.schema).encode(values)
    ids, unknown = encoded
    assert ids.tolist() == [[len(values) - 1 for values in vocabularies], [-1] * 26]
    assert unknown.tolist() == [1] * 26
    (batch,) = dataset.batches("test", 100)
    assert len(batch) == 3
