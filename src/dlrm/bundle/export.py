"""A RUN's model in a folder that other programs load."""

from __future__ import annotations

import logging
from collections.abc import Generator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import numpy as np
import torch

from dlrm.data.batch import Batch
from dlrm.data.dataset import Dataset
from dlrm.device import available_cores
from dlrm.errors import EnvironmentFaultError, UserError
from dlrm.files import atomic_folder
from dlrm.model.score import Scorer
from dlrm.runs import Run, Which
from dlrm.schema import FeatureSchema

if TYPE_CHECKING:
    import onnx

logger = logging.getLogger("dlrm")

INLINE_BYTES = 1 << 29
"""Weights that take more lie in a file of their own, beside the graph."""
TOLERANCE = 1e-5
"""By how much a probability may differ from the model's."""
_COMPARED_ROWS = 4096
_COMPARED_BATCH = 1000  # so that several sizes are compared


@dataclass(frozen=True)
class Export:
    """What an export came to."""

    format: str
    files: dict[str, int]
    """By name, their bytes."""
    inputs: dict[str, tuple[int | str, ...]]
    """By name, their shapes; what varies has a name."""
    checkpoint: Which
    compared_rows: int
    """Rows that both the model and what was exported gave probabilities of."""
    compared_with: str
    """Where these come from: a split of the DATASET, or made up."""
    largest_difference: float
    """Between the two, of a probability."""


def export(
    run: Path | str,
    folder: Path | str,
    *,
    checkpoint: Which = "best",
    one_id: bool = False,
    dataset: Path | str | None = None,
    inline_bytes: int = INLINE_BYTES,
) -> Export:
    """Write a RUN's model as ``FOLDER/model.onnx``, and compare the two.

    Weights of more than ``inline_bytes`` lie in ``FOLDER/model.onnx.data``. FOLDER appears when it
    is complete and gives the model's probabilities, in onnxruntime, to 1e-5: on rows of the RUN's
    DATASET, where that is there, else on made-up rows.

    Args:
        run: A RUN folder.
        folder: The folder to make.
        checkpoint: "best" on the selection split, or "newest".
        one_id: Take one id a feature, (B, F), negative for none, instead of ids and offsets.
        dataset: Where its DATASET is now; None: where it was when the run was trained.
        inline_bytes: See above.

    Raises:
        UserError: The run is missing or damaged, FOLDER is taken, ``dataset`` is not its DATASET,
            or one_id does not suit its features.
        EnvironmentFaultError: A package is missing, the disk fails, or what onnxruntime computes
            differs.
    """
    refuse_missing_packages()
    import onnx
    import onnxruntime

    from dlrm.bundle.graph import onnx_model, write_onnx

    opened = Run.open(Path(run))
    if one_id and opened.schema.multi_hot_features:
        raise UserError(
            f"--one-id: {opened.schema.multi_hot_features[0].name} has several ids a row. Export "
            "without it."
        )
    data = _dataset(opened, dataset)
    model = opened.load_model(checkpoint, torch.device("cpu"))
    exported = onnx_model(model, opened.config.loss, one_id=one_id)
    _describe(exported.proto, opened)
    with atomic_folder(Path(folder), "bundle") as partial:
        files = write_onnx(partial / "model.onnx", exported, inline_bytes=inline_bytes)
        onnx.checker.check_model(files[0], full_check=True)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = available_cores()
        session = onnxruntime.InferenceSession(files[0], options, ["CPUExecutionProvider"])
        rows, largest = 0, 0.0
        origin, batches = _rows(opened, data)
        with closing(batches):
            scorer = Scorer(model, opened.config.loss)
            for batch in batches:
                found = session.run(None, onnx_inputs(batch, one_id=one_id))[0]
                largest = max(largest, float(np.abs(found - scorer(batch)).max()))
                rows += len(batch)
        if not largest <= TOLERANCE:
            raise EnvironmentFaultError(
                f"what was exported gives other probabilities in onnxruntime "
                f"{onnxruntime.__version__} than the model, by up to {largest:.2g}; expected at "
                f"most {TOLERANCE:g}. Nothing was written. Try another version of onnxruntime."
            )
        return Export(
            "onnx",
            {path.name: path.stat().st_size for path in files},
            {each.name: tuple(each.shape) for each in session.get_inputs()},
            checkpoint,
            rows,
            origin,
            largest,
        )


def refuse_missing_packages() -> None:
    """Refuse to export where a package is missing that exporting takes.

    Raises:
        EnvironmentFaultError: Naming what to install.
    """
    try:
        # Not where modules are usually imported, since these packages are not everybody's.
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
    except ImportError as error:
        raise EnvironmentFaultError(
            f"export to ONNX needs a package that cannot be imported ({error}). Install what it "
            "takes: pip install 'dlrm[onnx]'"
        ) from error


def onnx_inputs(batch: Batch, *, one_id: bool) -> dict[str, np.ndarray]:
    """Return a batch as the inputs of an exported graph.

    Args:
        batch: On a CPU; with ``one_id`` each bag has one id or none.
        one_id: Whether the graph takes one id a feature.
    """
    ids, offsets = batch.sparse_features, batch.offsets
    if one_id and offsets is not None:
        matrix = torch.full((offsets.numel() - 1,), -1)
        matrix[offsets.diff() > 0] = ids
        ids = matrix.view(len(batch), -1)
    inputs = {"dense_features": batch.dense_features, "sparse_features": ids}
    if not one_id:
        inputs["sparse_features"] = ids.flatten()
        inputs["offsets"] = torch.arange(ids.numel() + 1) if offsets is None else offsets
    return {name: tensor.numpy() for name, tensor in inputs.items()}


def _dataset(run: Run, dataset: Path | str | None) -> Dataset | None:
    """Return the DATASET of a run; None where it is not where it was."""
    try:
        return run.open_dataset(Path(dataset) if dataset else None)
    except UserError as error:
        if dataset:
            raise
        logger.info("comparing on made-up rows: %s", error)
        return None


def _rows(run: Run, data: Dataset | None) -> tuple[str, Generator[Batch, None, None]]:
    """Return rows to compare on, and where they come from."""
    for split in ("test", "validation", "train"):
        if data and data.rows(split):
            batches = data.batches(
                split,
                _COMPARED_BATCH,
                schema=run.schema,
                num_batches=_COMPARED_ROWS // _COMPARED_BATCH + 1,
            )
            return split, batches
    return "made up", _made_up(run.schema)


def _made_up(schema: FeatureSchema) -> Generator[Batch, None, None]:
    """Yield batches of random rows; bags have 0, 1 or, where the schema has such, up to 3 ids."""
    random = np.random.default_rng(0)
    limits = schema.num_embeddings
    for rows in (_COMPARED_BATCH, 1, 7):
        most = [min(n, 3 if f.multi_hot else 1) for n, f in zip(limits, schema.sparse, strict=True)]
        lengths = random.integers(np.add(most, 1), size=(rows, len(most)))
        ids = random.integers(np.repeat(np.tile(limits, rows), lengths.ravel()))
        yield Batch(
            torch.from_numpy(random.random((rows, len(schema.dense)), np.float32) * 5),
            torch.from_numpy(ids),
            None,
            torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)])),
        )


def _describe(proto: onnx.ModelProto, run: Run) -> None:
    """Write into a graph which feature each column of its inputs is."""
    described = {
        "dense_features": [feature.name for feature in run.schema.dense],
        "dense_transform": run.schema.dense[0].transform,
        "sparse_features": [
            {"name": feature.name, "num_embeddings": feature.num_embeddings}
            for feature in run.schema.sparse
        ],
        "schema_fingerprint": run.schema.fingerprint,
    }
    proto.metadata_props.add(key="dlrm", value=msgspec.json.encode(described).decode())
