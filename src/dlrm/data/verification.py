"""Whether a DATASET is whole: every byte, row, id and label against its manifest and schema."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from dlrm.data.dataset import Dataset, Part, read_part
from dlrm.data.vocabulary import Vocabulary
from dlrm.device import available_cores
from dlrm.errors import UserError
from dlrm.files import environment_faults, sha256
from dlrm.progress import progress
from dlrm.schema import SPLITS, SparseFeature, Split


@dataclass(frozen=True)
class Verification:
    """What was verified."""

    rows: dict[Split, int]
    click_rate: dict[Split, float]
    parts: int
    vocabularies: int


def verify(dataset: Dataset, *, workers: int = 0) -> Verification:
    """Read all of a DATASET and check it.

    Args:
        dataset: The DATASET.
        workers: On how many threads, each of which takes some 40 MB; 0: as many as there are cores.

    Checksums and lengths of parts and vocabularies, types, ranges of ids and labels, the number of
    rows and of clicks of each split and in all, and that each vocabulary numbers its values one to
    one, below ``num_embeddings``.

    Raises:
        UserError: The first file that is not as it should be.
        EnvironmentFaultError: The disk fails.
    """
    parts = [part for split in SPLITS for part in dataset.manifest.splits[split].parts]
    features = [feature for feature in dataset.schema.sparse if feature.vocabulary]

    def clicks(part: Part) -> int:
        _check_sum(dataset, part.file, part.sha256)
        runs = read_part(dataset.path, part, dataset.schema)
        return sum(int(np.count_nonzero(run.clicked)) for run in runs)

    with ThreadPoolExecutor(workers or available_cores()) as pool:
        list(pool.map(lambda feature: _check_vocabulary(dataset, feature), features))
        shown = progress("verify", len(parts), pool.map(clicks, parts), unit="parts")
        clicks_of = dict(zip((part.file for part in parts), shown, strict=True))
    rates = {}
    for split in SPLITS:
        stored = dataset.manifest.splits[split]
        for what, expected, got in (
            ("rows", stored.rows, sum(part.rows for part in stored.parts)),
            ("clicks", stored.clicks, sum(clicks_of[part.file] for part in stored.parts)),
        ):
            if expected != got:
                raise UserError(
                    f"{dataset.path / 'manifest.json'}: expected {expected} {what} in the {split} "
                    f"split, got {got}. Prepare the dataset again."
                )
        rates[split] = stored.clicks / stored.rows if stored.rows else float("nan")
    manifest = dataset.manifest
    for what, days, expected in (
        ("rows", manifest.days, sum(split.rows for split in manifest.splits.values())),
        ("clicks", manifest.day_clicks, sum(split.clicks for split in manifest.splits.values())),
    ):
        if days and sum(days) != expected:
            raise UserError(
                f"{dataset.path / 'manifest.json'}: expected {expected} {what} on all days, as in "
                f"all splits, got {sum(days)}. Prepare the dataset again."
            )
    rows = {split: dataset.rows(split) for split in SPLITS}
    return Verification(rows, rates, len(parts), len(features))


def _check_vocabulary(dataset: Dataset, feature: SparseFeature) -> None:
    """Check a vocabulary a record batch at a time, with a byte for each id in memory."""
    name = f"vocabulary/{feature.vocabulary}"
    _check_sum(dataset, name, feature.vocabulary_sha256)
    known = feature.num_embeddings - (feature.other_id >= 0)
    seen = np.zeros(known, bool)
    size, last = 0, -1
    for part in Vocabulary.read_parts(dataset.path / name):
        values = part.values.astype(np.int64)
        if (np.diff(values, prepend=last) <= 0).any():
            raise _damaged(dataset, name, "its values are not ascending")
        if len(part) and (part.ids.min() < 0 or part.ids.max() >= known):
            raise _damaged(dataset, name, f"its ids are not all in 0 … {known - 1}")
        seen[part.ids] = True
        size, last = size + len(part), int(values[-1])
    if size != known or not seen.all():
        raise _damaged(dataset, name, f"its ids are not 0 … {known - 1}, each once")


def _check_sum(dataset: Dataset, name: str, expected: str) -> None:
    path = dataset.path / name
    if not path.is_file():
        raise _damaged(dataset, name, "it is missing")
    with environment_faults(f"read {path}"):
        found = sha256(path)
    if found != expected:
        raise _damaged(dataset, name, f"its SHA-256 is {found}, expected {expected}")


def _damaged(dataset: Dataset, name: str, reason: str) -> UserError:
    return UserError(f"{dataset.path / name} is damaged: {reason}. Prepare the dataset again.")
