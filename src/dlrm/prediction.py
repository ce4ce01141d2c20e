"""Raw rows to click probabilities, through the very encoding and transform of training."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from dlrm import bundles
from dlrm.bundles import BITS, BUNDLE, WEIGHTS, Bundle, is_bundle
from dlrm.checkpoint import checksum_of
from dlrm.config import Amp, DeviceKind, QuantizationConfig, TrainConfig
from dlrm.data import vocabulary
from dlrm.data.batch import Batch, check_batch, make_batch
from dlrm.data.table import rows_from_table
from dlrm.data.vocabulary import Encoder
from dlrm.device import open_device
from dlrm.errors import UserError
from dlrm.model.dlrm import DLRM
from dlrm.model.quantized import FULL, quantize, refuse_quantization
from dlrm.model.score import Scorer
from dlrm.runs import Run, Which
from dlrm.schema import FeatureSchema

CPU = torch.device("cpu")


class Predictor:
    """A trained model that takes raw rows, or rows that are prepared already.

    Args:
        schema: Of the features.
        config: Of the training.
        model: In evaluation mode.
        encoder: Raw values to ids; None: they are not known.
        opened: The RUN or BUNDLE.
        identity: What the bits of probabilities depend on, by what it is called in messages; empty:
            nobody can tell. A BUNDLE has that of the RUN that it was exported from.
    """

    def __init__(
        self,
        schema: FeatureSchema,
        config: TrainConfig,
        model: DLRM,
        encoder: Encoder | None,
        opened: Run | Bundle,
        identity: Mapping[str, str] | None = None,
    ) -> None:
        self.schema = schema
        self.config = config
        self.model = model
        self.encoder = encoder
        self.opened = opened
        self.identity = dict(identity or {})
        self._scorer = Scorer(model, config.loss, config.amp)
        if self.identity and not self.scores_alone:
            # Without the kernels a row's last bits depend on the others of its batch.
            self.identity["--evaluation-batch-size"] = str(config.evaluation_batch_size)

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
        return self._scorer(batch)

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
        encoder = self.encoder or Encoder.open(self.opened.path, self.schema)  # which is refused
        ids, unknown = encoder.encode(values)
        return self.score_encoded(dense, ids), unknown

    def score_encoded(
        self, dense: npt.NDArray[np.int32], ids: npt.NDArray[np.int32]
    ) -> npt.NDArray[np.float32]:
        """Score rows whose values are encoded, as ``encoder`` does.

        Args:
            dense: (n, number of dense features), missing and negative values already 0.
            ids: (n, F), -1 for an empty bag.

        Returns:
            Probabilities, (n,).
        """
        step = self.config.evaluation_batch_size
        parts = [np.zeros(0, np.float32)]
        for start in range(0, len(dense), step):
            rows = slice(start, start + step)
            batch = make_batch(self.schema, dense[rows], ids[rows], None)
            parts.append(self._scorer(batch))
        return np.concatenate(parts)

    @property
    def scores_alone(self) -> bool:
        """Whether several threads may score at a time, each with the same bits as all together."""
        return self._scorer.is_native


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
    if (Path(path) / WEIGHTS).exists():
        raise UserError(f"{path} is a BUNDLE without its {BUNDLE}. Copy or export it again.")
    run = Run.open(Path(path))
    if not run.checkpoint(checkpoint).exists():  # before the vocabularies are read
        raise UserError(
            f"{path} has no checkpoint {checkpoint!r}: the run was interrupted before its first "
            "evaluation (`dlrm train --resume` goes on with it; what was saved since is called "
            "newest), or the name is not one of best and newest."
        )
    run.warn_if_unfinished()
    encoder = _encoder(run.path, run.schema, verified=verified)
    model = run.load_model(checkpoint, open_device(device, local_rank), verified=verified)
    config = run.config if amp is None else replace(run.config, amp=amp)
    refuse_quantization(quantization, model.device, config)
    quantize(model, quantization)
    checksum = checksum_of(run.checkpoint(checkpoint))
    identity = _identity(checksum, run.schema, config, quantization, device)
    return Predictor(run.schema, config, model, encoder, run, identity)


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
    encoder = _encoder(bundle.path, bundle.schema, verified=True, remedy=bundles.REMEDY)
    model = bundle.load_model(device)
    quantize(model, quantization)
    if tables != "none":
        quantization = replace(quantization, quantize_emb_with_bit=BITS[tables])
    checksum = bundle.info.trained.checkpoint_sha256
    identity = _identity(checksum, bundle.schema, config, quantization, device.type)
    return Predictor(bundle.schema, config, model, encoder, bundle, identity)


def _encoder(
    path: Path, schema: FeatureSchema, *, verified: bool, remedy: str = vocabulary.REMEDY
) -> Encoder | None:
    if not schema.encodes_values:
        return None
    return Encoder.open(path, schema, verified=verified, remedy=remedy)


def _identity(
    checksum: str,
    schema: FeatureSchema,
    config: TrainConfig,
    quantization: QuantizationConfig,
    device: str,
) -> dict[str, str]:
    """Return ``Predictor.identity``.

    Args:
        checksum: Of the checkpoint that was loaded or exported; empty: it has none.
        schema: Of its features.
        config: Of its training.
        quantization: Of how many bits weights are.
        device: Where to compute.
    """
    if not checksum:
        return {}
    model = hashlib.sha256(msgspec.json.encode([config.model, config.loss])).hexdigest()
    return {
        "the checkpoint": checksum,
        "the features or their vocabularies": schema.sealed().fingerprint,
        "the model's configuration": model,
        "--amp": config.amp,
        "--device": device,
        "--quantize-mlp-with-bit": str(quantization.quantize_mlp_with_bit),
        "--quantize-emb-with-bit": str(quantization.quantize_emb_with_bit),
    }
