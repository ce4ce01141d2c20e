"""Checkpoints: one safetensors file with weights, optimizer state and position.

Tensors are ``model.NAME`` and ``optimizer.NAME.STATE``; the header's metadata holds one JSON
document, ``dlrm``, with the rest, and a checksum of the file. It names no time, host or path, so
equal runs give equal bytes; what belongs to the run alone lies beside it (``training/saving.py``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import safetensors
import torch
from torch import Tensor

from dlrm.config import ModelConfig
from dlrm.errors import UserError
from dlrm.files import FORMAT_VERSION, check_version, verify_safetensors, write_safetensors
from dlrm.model.dlrm import DLRM


@dataclass(frozen=True)
class Position:
    """How far training has come."""

    epoch: int = 0
    """Finished passes over the training rows."""
    step: int = 0
    """Steps taken in the current pass."""
    total_steps: int = 0
    """Steps taken in all."""


@dataclass(frozen=True)
class CheckpointInfo:
    """What a checkpoint says of itself beside its tensors."""

    position: Position
    model: ModelConfig
    schema_fingerprint: str
    optimizer: str
    """Which optimizer's state it holds; empty: none."""
    dataset_fingerprint: str = ""
    """Of the rows and their order, which the position refers to; empty: not known."""
    mini_batch_size: int = 0
    """Rows of a step, all its mini-batches counted, in which the position counts; 0: not known."""
    gradient_scaler: dict[str, int | float] | None = None
    """What ``torch.amp.GradScaler.state_dict`` returns; None: gradients were not scaled."""
    format_version: str = FORMAT_VERSION


DTYPES = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.uint8: "U8",
}
"""What safetensors calls the types of weights, and of the codes of quantized tables."""


def save_checkpoint(path: Path, tensors: Mapping[str, Tensor], info: CheckpointInfo) -> str:
    """Write a checkpoint; it appears complete or not at all.

    Args:
        path: A ``.safetensors`` file.
        tensors: Weights as ``model.NAME``, optimizer state as ``optimizer.NAME.STATE``.
        info: The rest.

    Returns:
        Its checksum, which is in it too.

    Raises:
        EnvironmentFaultError: The disk is full or read-only.
    """
    return write_safetensors(
        path,
        {
            name: (DTYPES[tensor.dtype], tensor.shape, tensor.nbytes)
            for name, tensor in tensors.items()
        },
        map(tensor_bytes, tensors.values()),
        {"dlrm": msgspec.json.encode(info, order="deterministic").decode()},
        checksum=True,
    )


def tensor_bytes(tensor: Tensor) -> memoryview:
    """Return the bytes of a tensor, of one on a CPU a view."""
    flat = tensor.detach().cpu().contiguous().view(-1)
    return flat.view(torch.uint8).numpy().data


def read_info(path: Path) -> CheckpointInfo:
    """Read what a checkpoint says of itself, without its tensors.

    Raises:
        UserError: It is missing, damaged, of another version, or not one of ours.
    """
    with _open(path) as file:
        content = (file.metadata() or {}).get("dlrm", "")
    try:
        version = msgspec.json.decode(content).get("format_version", "")
        check_version(version, path)
        return msgspec.json.decode(content, type=CheckpointInfo)
    except (msgspec.MsgspecError, AttributeError) as error:
        raise UserError(
            f"{path} is not a checkpoint of dlrm: {error}. Choose a file from a RUN's checkpoints "
            "folder."
        ) from error


def verify(path: Path) -> str:
    """Read all of a checkpoint, and compare it with its checksum.

    Returns:
        The checksum; empty where format 1.1 had none yet.

    Raises:
        UserError: It is missing, damaged, of another version, or not one of ours.
    """
    info = read_info(path)
    try:
        checksum = verify_safetensors(path)
        if not checksum and info.format_version not in ("1.0", "1.1"):
            raise UserError(f"{path} is damaged: its checksum is missing.")
    except UserError as error:
        raise UserError(f"{error} Use another checkpoint of the run.") from error
    except OSError as error:
        raise _unreadable(path, error) from error
    return checksum


def checksum_of(path: Path) -> str:
    """Return the checksum that a checkpoint says it has; empty where format 1.1 had none yet.

    Raises:
        UserError: It is missing or damaged.
    """
    with _open(path) as file:
        return str((file.metadata() or {}).get("sha256", ""))


def load_weights(path: Path, model: DLRM, *, verified: bool = False) -> None:
    """Copy a checkpoint's weights into a model.

    Args:
        path: The checkpoint.
        model: Of its architecture.
        verified: Its checksum was verified already.

    Raises:
        UserError: The checkpoint is missing, damaged, or of another architecture; it names the
            first tensor that differs.
    """
    if not verified:
        verify(path)
    expected = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    with _open(path) as file:
        if difference := first_difference(file, expected, "model."):
            raise UserError(
                f"{path} is a checkpoint of another architecture: {difference}. Use the model "
                "options, the --embedding-dtype among them, and the DATASET that it was trained "
                "with."
            )
        with torch.no_grad():
            for name, tensor in expected.items():
                tensor.copy_(file.get_tensor(name))


def first_difference(file: Any, expected: Mapping[str, Tensor], prefix: str = "") -> str:
    """Tell the first tensor of a safetensors file that is not as expected; empty: all are.

    Args:
        file: Opened by ``safetensors.safe_open``.
        expected: By name, tensors of the right shape and type.
        prefix: Tensors whose names begin otherwise are left alone.
    """
    found: dict[str, tuple[Any, str]] = {}
    for name in file.keys():
        if name.startswith(prefix):
            part = file.get_slice(name)
            found[name] = tuple(part.get_shape()), part.get_dtype()
    for name in sorted(expected.keys() | found.keys()):
        tensor = expected.get(name)
        shape = "no such tensor" if tensor is None else tuple(tensor.shape)
        got, dtype = found.get(name, ("no such tensor", ""))
        if got != shape:
            return f"{name} is expected to have shape {shape}, got {got}"
        if tensor is not None and dtype != DTYPES[tensor.dtype]:
            return f"{name} is expected to be stored as {DTYPES[tensor.dtype]}, got {dtype}"
    return ""


def load_optimizer_state(path: Path) -> dict[str, Tensor]:
    """Return a checkpoint's optimizer state by name, without the prefix ``optimizer.``."""
    with _open(path) as file:
        return {
            name.removeprefix("optimizer."): file.get_tensor(name)
            for name in file.keys()
            if name.startswith("optimizer.")
        }


def _open(path: Path) -> safetensors.safe_open:
    if path.is_dir():
        inside = path / "checkpoints" / "newest.safetensors"
        hint = f"{inside}, for instance" if inside.exists() else "in a RUN's checkpoints folder"
        raise UserError(f"{path} is a folder. Name the file of a checkpoint: {hint}.")
    if not path.exists():
        raise UserError(
            f"{path} does not exist. Check the path; a run that was interrupted before its first "
            "evaluation has no best checkpoint: go on with `dlrm train --resume`, or take "
            "--checkpoint newest, if one was saved."
        )
    try:
        return safetensors.safe_open(path, framework="pt")
    except (safetensors.SafetensorError, OSError) as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> UserError:
    return UserError(
        f"{path} cannot be read as a checkpoint: {error}. Check the path; if the file is damaged, "
        "use another checkpoint of the run."
    )
