"""Raw rows to click probabilities, through the very encoding and transform of training."""

from __future__ import annotations

import gzip
import logging
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.csv
import torch

from dlrm.bundles import BITS, Bundle, is_bundle
from dlrm.config import Amp, DeviceKind, QuantizationConfig, TrainConfig, size_bytes
from dlrm.data import criteo
from dlrm.data.batch import Batch, check_batch, make_batch
from dlrm.data.table import rows_from_table
from dlrm.data.vocabulary import Encoder
from dlrm.device import open_device
from dlrm.errors import UserError
from dlrm.files import atomic_write
from dlrm.metrics import Metrics, MetricsAccumulator
from dlrm.model.dlrm import DLRM
from dlrm.model.quantized import FULL, quantize, refuse_quantization
from dlrm.model.score import Scorer
from dlrm.progress import progress
from dlrm.runs import Run, Which
from dlrm.schema import FeatureSchema

logger = logging.getLogger("dlrm")

CPU = torch.device("cpu")
FIRST_SUBMISSION_ID = 60000000
"""The Id of the first row of Criteo's test.txt in a Kaggle submission."""


@dataclass(frozen=True)
class PredictionSummary:
    """What a prediction came to."""

    rows: int
    unknown_ids: dict[str, int]
    """By sparse feature with any: values that the vocabulary lacks, taken as the feature's 'other'
    slot or, where it has none, as empty bags."""
    metrics: Metrics | None
    """Where the rows have labels."""


class Predictor:
    """A trained model that takes raw rows, or rows that are prepared already.

    Args:
        schema: Of the features.
        config: Of the training.
        model: In evaluation mode.
        encoder: Raw values to ids; None: they are not known.
        path: The RUN or BUNDLE, for messages.

    Attributes:
        scorer: Of batches that are known to fit the schema.
    """

    def __init__(
        self,
        schema: FeatureSchema,
        config: TrainConfig,
        model: DLRM,
        encoder: Encoder | None,
        path: Path,
    ) -> None:
        self.schema = schema
        self.config = config
        self.model = model
        self.encoder = encoder
        self._path = path
        self.scorer = Scorer(model, config.loss, config.amp)

    def predict(self, table: pa.Table | Mapping[str, Any]) -> npt.NDArray[np.float32]:
        """Return the click probability of each row, (n,).

        Args:
            table: A column for each feature of the schema, by name, raw: dense features are
                integers, sparse ones strings of 8 hexadecimal digits or integers below 2**32;
                null where missing. Other columns are left alone.

        Raises:
            UserError: A column is missing or holds something else, or there are no vocabularies.
        """
        dense, values = rows_from_table(table, self.schema)
        return self.predict_rows(dense, values)[0]

    def score(self, batch: Batch) -> npt.NDArray[np.float32]:
        """Return the click probabilities, (B,), of rows that are prepared already.

        Args:
            batch: Dense features after the transform (``log(x + 1)``) and ids, each below its
                feature's ``num_embeddings``; of a DATASET's rows, ``Dataset.batches`` makes such.

        Raises:
            UserError: A shape or type does not fit the model, or an id is out of its range.
        """
        check_batch(batch, self.schema)
        return self.scorer(batch)

    def encode(
        self, values: npt.NDArray[np.uint32]
    ) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]:
        """Return the ids of raw sparse values, and how many are unknown: see ``Encoder.encode``.

        Raises:
            UserError: There are no vocabularies.
        """
        encoder = self.encoder or Encoder.open(self._path, self.schema)  # which is refused
        return encoder.encode(values)

    def predict_rows(
        self, dense: npt.NDArray[np.int32], values: npt.NDArray[np.uint32]
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
        """Score parsed rows.

        Args:
            dense: (n, number of dense features), missing and negative values already 0.
            values: (n, F), missing values 0.

        Returns:
            Probabilities, (n,), and for each sparse feature, (F,), how many values were unknown.

        Raises:
            UserError: There are no vocabularies.
        """
        ids, unknown = self.encode(values)
        step = self.config.evaluation_batch_size
        parts = [np.zeros(0, np.float32)]
        for start in range(0, len(dense), step):
            rows = slice(start, start + step)
            batch = make_batch(self.schema, dense[rows], ids[rows], None)
            parts.append(self.scorer(batch))
        return np.concatenate(parts), unknown


def load(
    path: Path | str,
    *,
    checkpoint: Which = "best",
    device: DeviceKind = "cpu",
    local_rank: int = 0,
    amp: Amp | None = None,
    quantization: QuantizationConfig = FULL,
    verified: bool = False,
) -> Predictor:
    """Load a trained model; its DATASET is not needed.

    It takes raw rows if the values behind the ids are known (``predict``), and prepared ones in any
    case (``score``).

    Args:
        path: A RUN or a BUNDLE.
        checkpoint: Of a RUN, "best" on the selection split, or "newest".
        device: Where to compute.
        local_rank: Which card of that kind.
        amp: Whether matrices are multiplied in lower precision; None: for a RUN as in training, for
            a BUNDLE not.
        quantization: Of how many bits weights are, where they are not quantized already.
        verified: Checksums were compared already, by the process that started this one, say: they
            are not computed again.

    Raises:
        UserError: The run or bundle is missing or damaged, or ``quantization`` or ``checkpoint``
            does not go with the rest.
        EnvironmentFaultError: The device is missing.
    """
    if is_bundle(Path(path)):
        bundle = Bundle.open(Path(path), verified=verified)
        if checkpoint not in ("best", bundle.info.trained.checkpoint):
            raise UserError(
                f"{path} holds the {bundle.info.trained.checkpoint} checkpoint alone. Export the "
                f"RUN again with --checkpoint {checkpoint}, or leave that away."
            )
        opened = open_device(device, local_rank)
        return load_bundle(bundle, device=opened, amp=amp or "O0", quantization=quantization)
    run = Run.open(Path(path))
    if not run.checkpoint(checkpoint).exists():  # before the vocabularies are read
        raise UserError(
            f"{path} has no checkpoint {checkpoint!r}: the run was interrupted before its first "
            "evaluation (`dlrm train --resume` goes on with it; what was saved since is called "
            "newest), or the name is not one of best and newest."
        )
    encoder = _encoder(run.path, run.schema, verified=verified)
    model = run.load_model(checkpoint, open_device(device, local_rank), verified=verified)
    config = run.config if amp is None else replace(run.config, amp=amp)
    refuse_quantization(quantization, model.device, config)
    quantize(model, quantization)
    return Predictor(run.schema, config, model, encoder, run.path)


def load_bundle(
    bundle: Bundle,
    *,
    device: torch.device = CPU,
    amp: Amp = "O0",
    quantization: QuantizationConfig = FULL,
) -> Predictor:
    """Load the model of a BUNDLE that is open, whose checksums were compared then.

    Args:
        bundle: The bundle.
        device: Where to compute.
        amp: Whether matrices are multiplied in lower precision.
        quantization: Of how many bits weights are.

    Raises:
        UserError: A file is damaged, or ``quantization`` does not go with the rest.
    """
    config = TrainConfig(model=bundle.info.model, loss=bundle.info.loss, amp=amp)
    refuse_quantization(quantization, device, config)
    tables = bundle.info.quantize
    if tables != "none" and (quantization.quantize_emb_with_bit != 32 or device.type != "cpu"):
        raise UserError(
            f"{bundle.path} has tables of {BITS[tables]} bits already, for --device cpu. Leave "
            "--quantize-emb-with-bit and --device away, or export the RUN again without --quantize."
        )
    encoder = _encoder(bundle.path, bundle.schema, verified=True)
    model = bundle.load_model(device)
    quantize(model, quantization)
    return Predictor(bundle.schema, config, model, encoder, bundle.path)


def _encoder(path: Path, schema: FeatureSchema, *, verified: bool) -> Encoder | None:
    return Encoder.open(path, schema, verified=verified) if schema.encodes_values else None


def predict_file(
    predictor: Predictor,
    source: Path,
    output: Path,
    *,
    first_id: int | None = None,
    overwrite: bool = False,
) -> PredictionSummary:
    """Score a file of raw Criteo rows into a CSV file ``Id,Predicted``, Kaggle's submission format.

    Args:
        predictor: The model.
        source: Rows with or without a label.
        output: Appears when it is complete; compressed with gzip where its name ends in ``.gz``.
        first_id: The first row's Id; None: 60000000 for rows without a label, as in Kaggle's
            submissions, and 0 for rows with one.
        overwrite: Replace an output that is there already.

    Raises:
        UserError: A row is malformed, the output is there already, or its folder is not.
        EnvironmentFaultError: The disk is full or read-only.
    """
    if not source.is_file():
        raise UserError(f"{source} is not a file. Name a file of raw rows.")
    if not output.parent.is_dir():
        raise UserError(f"{output.parent} is not a folder, so {output} cannot be written. Make it.")
    if first_id is not None and first_id < 0:
        raise UserError(f"--first-id must not be negative; got {first_id}.")
    if output.exists() and output.samefile(source):
        raise UserError(f"{output} is the input too. Choose another output.")
    if output.exists() and not overwrite:
        raise UserError(
            f"{output} is there already, and is not overwritten. Choose another output, or replace "
            "it with --overwrite."
        )
    unknown = np.zeros(len(predictor.schema.sparse), np.int64)
    rows = 0
    config = predictor.config
    memory = size_bytes(config.evaluation_memory, "--evaluation-memory")
    with (
        atomic_write(output) as written,
        _packed_as_named(output, written) as file,
        MetricsAccumulator(
            memory=memory, folder=output.parent, threshold=config.decision_threshold
        ) as accumulator,
    ):
        labelled = False
        schema = pa.schema([("Id", pa.int64()), ("Predicted", pa.float32())])
        options = pa.csv.WriteOptions(quoting_style="none", include_header=False)
        file.write(b"Id,Predicted\n")
        with (
            pa.csv.CSVWriter(file, schema, write_options=options) as writer,
            progress("predict", source.stat().st_size, unit="B", unit_scale=True) as bar,
        ):
            for block in criteo.read_blocks(source, observe=lambda run: bar.update(len(run))):
                if first_id is None:
                    first_id = FIRST_SUBMISSION_ID if block.labels is None else 0
                probabilities, unknown_in_block = predictor.predict_rows(block.dense, block.sparse)
                ids = np.arange(first_id + rows, first_id + rows + len(probabilities))
                writer.write_batch(pa.record_batch([ids, probabilities], schema=schema))
                rows += len(probabilities)
                unknown += unknown_in_block
                if block.labels is not None:
                    labelled = True
                    accumulator.add(block.labels, probabilities)
        metrics = accumulator.metrics() if labelled else None
    names = [feature.name for feature in predictor.schema.sparse]
    counted = {name: int(count) for name, count in zip(names, unknown, strict=True) if count}
    if unknown.sum() > rows * len(names) / 2:
        logger.warning(
            "%s: %.0f%% of the categorical values were never seen in training; is it other data "
            "than the model was trained on?",
            source,
            100 * unknown.sum() / (rows * len(names)),
        )
    return PredictionSummary(rows, counted, metrics)


def _packed_as_named(path: Path, file: IO[bytes]) -> AbstractContextManager[Any]:
    """Return what to write to, so that a file is compressed if its name says so."""
    if path.suffix != ".gz":
        return nullcontext(file)
    # Without name and time, so that equal predictions give equal bytes.
    return gzip.GzipFile(filename="", mode="wb", fileobj=file, mtime=0)
