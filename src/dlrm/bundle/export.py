"""A RUN's model in a folder of its own, with all that scoring raw rows takes."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dlrm.bundles import (
    BITS,
    EXAMPLES,
    WEIGHTS,
    Bundle,
    BundleFormat,
    BundleInfo,
    Compared,
    ExampleRow,
    Examples,
    TableBits,
    Trained,
    is_bundle,
    stored_files,
    write_info,
    write_weights,
)
from dlrm.checkpoint import read_info, verify
from dlrm.config import QuantizationConfig
from dlrm.data.batch import Bags, Batch, make_batch
from dlrm.data.dataset import Dataset, Rows, copy_description, in_blocks
from dlrm.device import available_cores
from dlrm.errors import EnvironmentFaultError, UserError
from dlrm.files import atomic_folder, refuse_taken_folder, write_json
from dlrm.model.quantized import quantize as quantize_model
from dlrm.model.score import Scorer
from dlrm.prediction import CPU, Predictor, load_bundle
from dlrm.runs import Run, Which
from dlrm.schema import FeatureSchema
from dlrm.version import __version__

if TYPE_CHECKING:
    import onnx

logger = logging.getLogger("dlrm")

Probabilities = npt.NDArray[np.float32]

TOLERANCE = 1e-5
"""By how much a probability may differ from the model's."""
MODEL_FILES: dict[BundleFormat, str] = {"torch": "model.pt2", "onnx": "model.onnx"}
COMPILED = "compiled.pt2"
_COMPARED_ROWS = 4096
_COMPARED_BATCH = 1000  # so that several sizes are compared
_EXAMPLES = 8


@dataclass(frozen=True)
class Export:
    """What an export came to."""

    format: BundleFormat
    files: dict[str, int]
    """By their paths in the BUNDLE, their bytes; vocabularies as ``vocabulary/``, together."""
    inputs: dict[str, tuple[int | str, ...]]
    """Of the model file, by name, their shapes; what varies has a name."""
    checkpoint: Which
    quantize: TableBits
    compiled: str
    """The file with the compiled model; empty: there is none."""
    compared: Compared


@dataclass(frozen=True)
class _Sample:
    """Rows to compare on."""

    origin: str
    """A split of the DATASET, or ``made up``."""
    blocks: Sequence[Rows]
    """As they are stored; those that are made up have no labels that mean anything."""


@dataclass(frozen=True)
class _Foreign:
    """A model file in a runtime that is not ours."""

    runtime: str
    """And its version."""
    score: Callable[[Batch], Probabilities]


def export(
    run: Path | str,
    folder: Path | str,
    *,
    format: BundleFormat = "torch",
    checkpoint: Which = "best",
    one_id: bool = False,
    quantize: TableBits = "none",
    compile: bool = False,
    dataset: Path | str | None = None,
) -> Export:
    """Write a RUN's model as a BUNDLE, and compare what it gives with the model.

    FOLDER appears when it is complete and gives the model's probabilities to 1e-5, both by
    ``dlrm.load`` and in the runtime of its format: on rows of the RUN's DATASET, from raw values
    where these are known; where the DATASET is gone, on made-up rows.

    Args:
        run: A RUN folder.
        folder: The folder to make.
        format: The runtime to write a model file for.
        checkpoint: "best" on the selection split, or "newest".
        one_id: The model file takes one id a feature, (B, F), negative for none, instead of ids and
            offsets.
        quantize: Store the tables in 8 or 4 bits a number. Probabilities are then compared with
            those of the model with such tables.
        compile: Also compile the model for this kind of processor, by AOTInductor ("torch" only).
            Where there is no compiler, a message says so.
        dataset: Where its DATASET is now; None: where it was when the run was trained.

    Raises:
        UserError: The run is missing or damaged, FOLDER is taken, ``dataset`` is not its DATASET,
            or an option does not suit its features or another option.
        EnvironmentFaultError: A package is missing, the disk fails, or what the runtime computes
            differs.
    """
    if format == "onnx":
        refuse_missing_packages()
    opened = Run.open(Path(run))
    if one_id and opened.schema.multi_hot_features:
        raise UserError(
            f"--one-id: {opened.schema.multi_hot_features[0].name} has several ids a row. Export "
            "without it."
        )
    if compile and format != "torch":
        raise UserError(f"--compile goes with --format torch; got --format {format}.")
    data = _dataset(opened, dataset)
    sample = _sample(opened.schema, data)
    schema, loss = opened.schema, opened.config.loss
    with atomic_folder(Path(folder), "bundle") as partial:
        checksum = verify(opened.checkpoint(checkpoint))
        model = opened.load_model(checkpoint, CPU, verified=True)
        trained = _scores(Scorer(model, loss), sample, schema)
        expected = trained
        if quantize != "none":
            quantize_model(model, QuantizationConfig(quantize_emb_with_bit=BITS[quantize]))
            expected = _scores(Scorer(model, loss), sample, schema)
        # Copies: a BUNDLE that serves must not change with its RUN or DATASET.
        copy_description(opened.path, partial, schema, linked=False)
        write_weights(partial / WEIGHTS, model)
        del model  # from here on there is one copy of the tables, in the file
        info = BundleInfo(
            sha256="",
            dlrm=__version__,
            format=format,
            inputs=_inputs(schema, one_id=one_id),
            model=opened.config.model,
            loss=loss,
            quantize=quantize,
            trained=_trained(opened, checkpoint, checksum, data),
            files={},
        )
        bundle = Bundle(partial, info, schema)
        foreign = _write_model_file(bundle, one_id=one_id)
        compiled = _compile(bundle, one_id=one_id) if compile else None
        predictor = load_bundle(bundle)
        found, whole = _predicted(predictor, sample)
        _refuse_other(found, expected, "dlrm.load gives with it")
        others = [each for each in (foreign, compiled) if each]
        scores = [_scores(each.score, sample, schema) for each in others]
        for each, other in zip(others, scores, strict=True):
            _refuse_other(other, expected, f"{each.runtime} gives with it")
        quantization = _differences(expected, trained) if quantize != "none" else None
        compared = Compared(
            rows=len(expected),
            origin=sample.origin,
            raw_rows=int(whole.sum()),
            largest_difference=_largest(found, expected),
            foreign=foreign.runtime,
            largest_foreign_difference=_largest(scores[0], expected),
            largest_compiled_difference=_largest(scores[1], expected) if compiled else None,
            quantization_difference=None if quantization is None else float(quantization.max()),
            mean_quantization_difference=(
                None if quantization is None else float(quantization.mean())
            ),
        )
        write_json(partial / EXAMPLES, _examples(predictor, sample, found, whole))
        info = replace(
            info,
            compared=compared,
            compiled=COMPILED if compiled else "",
            files=stored_files(partial),
        )
        write_info(partial, info)
        Bundle.open(partial, verified=True)
        return Export(
            format,
            _sizes(partial, info),
            info.inputs,
            checkpoint,
            quantize,
            info.compiled,
            compared,
        )


def export_once(run: Path, folder: Path) -> None:
    """Export the best checkpoint as ``export`` does by default; leave a BUNDLE of it as it is.

    Raises:
        UserError: As ``export``; FOLDER may also hold a BUNDLE of another checkpoint.
        EnvironmentFaultError: As ``export``.
    """
    if not is_bundle(folder):
        compared = export(run, folder).compared
        logger.info(
            "exported into %s; probabilities of %d rows differ by up to %.1e",
            *(folder, compared.rows, compared.largest_foreign_difference),
        )
        return
    there = Bundle.open(folder).info.trained.checkpoint_sha256
    if there != verify(Run.open(run).checkpoint("best")):
        raise UserError(
            f"{folder} is a bundle of another checkpoint than the best of {run}, and is not "
            "overwritten. Choose another bundle."
        )
    logger.info("exported into %s already", folder)


def refuse_taken_bundle(run: Path, folder: Path) -> None:
    """Refuse, before a RUN is trained, a BUNDLE folder that cannot be its.

    Raises:
        UserError: There is something else, or the RUN has not ended, and so it is another's.
    """
    if is_bundle(folder) and (run / "result.json").exists():
        return
    refuse_taken_folder(folder, "bundle")


def refuse_missing_packages() -> None:
    """Refuse to export where a package is missing that exporting to ONNX takes.

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


def model_inputs(batch: Batch, *, one_id: bool) -> dict[str, Tensor]:
    """Return a batch as the inputs of a model file.

    Args:
        batch: On a CPU; with ``one_id`` each bag has one id or none.
        one_id: Whether the file takes one id a feature.
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
    return inputs


def _inputs(schema: FeatureSchema, *, one_id: bool) -> dict[str, tuple[int | str, ...]]:
    dense: dict[str, tuple[int | str, ...]] = {"dense_features": ("rows", len(schema.dense))}
    if one_id:
        return dense | {"sparse_features": ("rows", len(schema.sparse))}
    return dense | {"sparse_features": ("ids",), "offsets": (f"{len(schema.sparse)} rows + 1",)}


def _write_model_file(bundle: Bundle, *, one_id: bool) -> _Foreign:
    """Write the model file of a BUNDLE, and open it in its runtime."""
    path = bundle.path / MODEL_FILES[bundle.info.format]
    model, loss = bundle.load_model(CPU), bundle.info.loss
    if bundle.info.format == "torch":
        from dlrm.bundle.program import exported_program, open_program, write_program

        write_program(path, exported_program(model, loss, one_id=one_id))
        return _of_torch("torch.export", open_program(path, bundle.path / WEIGHTS), one_id=one_id)
    import onnx
    import onnxruntime

    from dlrm.bundle.graph import onnx_model, write_onnx

    graph = onnx_model(model, loss, bundle.path / WEIGHTS, one_id=one_id)
    _describe(graph, bundle.schema)
    write_onnx(path, graph)
    onnx.checker.check_model(path, full_check=True)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = available_cores()
    session = onnxruntime.InferenceSession(path, options, ["CPUExecutionProvider"])

    def score(batch: Batch) -> Probabilities:
        inputs = model_inputs(batch, one_id=one_id)
        found: Probabilities
        (found,) = session.run(None, {name: each.numpy() for name, each in inputs.items()})
        return found

    return _Foreign(f"onnxruntime {onnxruntime.__version__}", score)


def _compile(bundle: Bundle, *, one_id: bool) -> _Foreign | None:
    """Compile the model of a BUNDLE, and open it; None: there is no compiler."""
    from dlrm.bundle.program import (
        compile_program,
        exported_program,
        missing_compiler,
        open_compiled,
    )

    if reason := missing_compiler():
        logger.warning("the model is not compiled: %s", reason)
        return None
    path = bundle.path / COMPILED
    program = exported_program(bundle.load_model(CPU), bundle.info.loss, one_id=one_id)
    compile_program(path, program)
    return _of_torch("AOTInductor", open_compiled(path, bundle.path / WEIGHTS), one_id=one_id)


def _of_torch(runtime: str, model: Callable[..., Tensor], *, one_id: bool) -> _Foreign:
    def score(batch: Batch) -> Probabilities:
        with torch.inference_mode():
            found: Probabilities = model(**model_inputs(batch, one_id=one_id)).numpy()
        return found

    return _Foreign(f"{runtime} {torch.__version__}", score)


def _describe(proto: onnx.ModelProto, schema: FeatureSchema) -> None:
    """Write into a graph which feature each column of its inputs is."""
    described = {
        "dense_features": [feature.name for feature in schema.dense],
        "dense_transform": schema.dense[0].transform,
        "sparse_features": [
            {"name": feature.name, "num_embeddings": feature.num_embeddings}
            for feature in schema.sparse
        ],
        "schema_fingerprint": schema.fingerprint,
    }
    proto.metadata_props.add(key="dlrm", value=msgspec.json.encode(described).decode())


def _dataset(run: Run, dataset: Path | str | None) -> Dataset | None:
    """Return the DATASET of a run; None where it is not where it was."""
    try:
        return run.open_dataset(Path(dataset) if dataset else None)
    except UserError as error:
        if dataset:
            raise
        logger.info("comparing on made-up rows: %s", error)
        return None


def _trained(run: Run, checkpoint: Which, checksum: str, data: Dataset | None) -> Trained:
    """Return what a model's card tells of its training."""
    position = read_info(run.checkpoint(checkpoint)).position
    result = run.path / "result.json"
    splits = data.manifest.splits if data else {}
    return Trained(
        checkpoint=checkpoint,
        checkpoint_sha256=checksum,
        epoch=position.epoch,
        step=position.total_steps,
        split_rule=run.schema.split_rule,
        sources=tuple(source.name for source in data.manifest.sources) if data else (),
        rows={name: split.rows for name, split in splits.items()},
        clicks={name: split.clicks for name, split in splits.items()},
        dataset_fingerprint=data.manifest.fingerprint if data else "",
        result=msgspec.json.decode(result.read_bytes()) if result.exists() else {},
    )


def _sample(schema: FeatureSchema, data: Dataset | None) -> _Sample:
    """Return rows to compare on."""
    for split in ("test", "validation", "train"):
        if data and data.rows(split):
            stored = data.stored_rows(split, 0, _COMPARED_ROWS)
            return _Sample(split, list(in_blocks(stored, _COMPARED_BATCH)))
    return _Sample("made up", list(_made_up(schema)))


def _made_up(schema: FeatureSchema) -> Iterator[Rows]:
    """Yield random rows; bags have 0, 1 or, where the schema has such, up to 3 ids."""
    random = np.random.default_rng(0)
    for rows in (_COMPARED_BATCH, 1, 7):
        dense = random.exponential(50, (rows, len(schema.dense)))
        one_id = [feature.num_embeddings for feature in schema.one_id_features]
        ids = random.integers(-1, one_id, (rows, len(one_id)), np.int32)
        bags = []
        for feature in schema.multi_hot_features:
            lengths = random.integers(min(feature.num_embeddings, 3) + 1, size=rows)
            own = random.integers(feature.num_embeddings, size=lengths.sum(), dtype=np.int32)
            bags.append(Bags.of_lengths(own, lengths))
        stored = dense.astype(np.float32) if schema.stores_floats else dense.astype(np.int32)
        yield Rows(np.zeros(rows, np.uint8), stored, ids, tuple(bags))


def _batch(rows: Rows, schema: FeatureSchema) -> Batch:
    return make_batch(schema, rows.dense, rows.sparse, None, rows.bags)


def _scores(
    score: Callable[[Batch], Probabilities], sample: _Sample, schema: FeatureSchema
) -> Probabilities:
    return np.concatenate([score(_batch(rows, schema)) for rows in sample.blocks])


def _predicted(
    predictor: Predictor, sample: _Sample
) -> tuple[Probabilities, npt.NDArray[np.bool_]]:
    """Return what a predictor gives, and for which rows it was given raw values, (n,) each."""
    found, whole = [], []
    for rows in sample.blocks:
        probabilities = predictor.score(_batch(rows, predictor.schema))
        is_raw = np.zeros(len(rows), np.bool_)
        if predictor.schema.takes_raw_rows:
            assert predictor.encoder
            values, is_raw = predictor.encoder.decode(rows.sparse)
            dense = rows.dense[is_raw].astype(np.int32)
            probabilities[is_raw] = predictor.predict_rows(dense, values[is_raw])[0]
        found.append(probabilities)
        whole.append(is_raw)
    return np.concatenate(found), np.concatenate(whole)


def _examples(
    predictor: Predictor,
    sample: _Sample,
    probabilities: Probabilities,
    whole: npt.NDArray[np.bool_],
) -> Examples:
    """Return a few of the rows, spread over the probabilities; all raw, where any is."""
    raw = bool(whole.any())
    candidates = np.flatnonzero(whole) if raw else np.arange(len(whole))
    ranked = candidates[np.argsort(probabilities[candidates], kind="stable")]
    chosen = ranked[np.linspace(0, len(ranked) - 1, min(_EXAMPLES, len(ranked))).astype(int)]
    rows = Rows.concatenate(sample.blocks)[chosen]
    made_up = sample.origin == "made up"
    return Examples(
        sample.origin,
        raw,
        tuple(
            ExampleRow(features, float(probability), None if made_up else float(label))
            for features, probability, label in zip(
                _features(predictor, rows, raw=raw), probabilities[chosen], rows.labels, strict=True
            )
        ),
    )


def _features(predictor: Predictor, rows: Rows, *, raw: bool) -> Iterator[dict[str, Any]]:
    """Yield rows as ``ExampleRow.features``."""
    schema = predictor.schema
    columns: dict[str, list[Any]] = {
        feature.name: rows.dense[:, place].tolist() for place, feature in enumerate(schema.dense)
    }
    single, several = itertools.count(), iter(rows.bags)
    values = predictor.encoder.decode(rows.sparse)[0] if raw and predictor.encoder else None
    for feature in schema.sparse:
        if feature.multi_hot:
            bags = next(several)
            columns[feature.name] = [bags[row : row + 1].ids.tolist() for row in range(len(rows))]
            continue
        place = next(single)
        if values is not None:
            columns[feature.name] = [f"{value:08x}" for value in values[:, place]]
        else:
            columns[feature.name] = [
                None if id_ < 0 else id_ for id_ in rows.sparse[:, place].tolist()
            ]
    for row in zip(*columns.values(), strict=True):
        yield dict(zip(columns, row, strict=True))


def _differences(found: Probabilities, expected: Probabilities) -> npt.NDArray[np.float64]:
    return np.abs(found.astype(np.float64) - expected)


def _largest(found: Probabilities, expected: Probabilities) -> float:
    return float(_differences(found, expected).max())


def _refuse_other(found: Probabilities, expected: Probabilities, what: str) -> None:
    largest = _largest(found, expected)
    if not largest <= TOLERANCE:
        raise EnvironmentFaultError(
            f"what was exported is not the model: probabilities that {what} differ from the "
            f"model's by up to {largest:.2g}; expected at most {TOLERANCE:g}. Nothing was written. "
            "Try another version of that runtime, or report it."
        )


def _sizes(folder: Path, info: BundleInfo) -> dict[str, int]:
    sizes: dict[str, int] = {"bundle.json": (folder / "bundle.json").stat().st_size}
    for name, file in info.files.items():
        shown = "vocabulary/" if name.startswith("vocabulary/") else name
        sizes[shown] = sizes.get(shown, 0) + file.bytes
    return sizes
