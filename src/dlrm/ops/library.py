"""The native kernels' library: found, checked and loaded once, or else the reason why not."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dlrm.ops.stamp import make_stamp

_LIBRARY = Path(__file__).with_name("_native.so")
_SOURCES = Path(__file__).parents[3] / "native"
_REBUILD = "Run `bash test/setup.sh`, or `pip install --no-build-isolation --editable .`"


@dataclass(frozen=True)
class Library:
    """Whether there are native kernels."""

    loaded: bool
    """Whether ``torch.ops.dlrm`` has them."""
    reason: str
    """Why, or why not, in words."""


@functools.cache
def library() -> Library:
    """Load the native kernels, if they are there and fit the sources and the version of torch."""
    stamp_file = _LIBRARY.with_suffix(".json")
    try:
        stamp = json.loads(stamp_file.read_bytes())
    except (OSError, ValueError):
        return Library(False, f"the native kernels are not built. {_REBUILD}")
    if failure := stamp.get("failure"):
        return Library(False, f"{failure}. Install a C++ compiler, then build again: {_REBUILD}")
    for what, expected in make_stamp(_SOURCES).items():
        if stamp.get(what) != expected:
            return Library(
                False,
                f"the native kernels were built with other {what}: {stamp.get(what)}, now "
                f"{expected}. {_REBUILD}",
            )
    try:
        torch.ops.load_library(str(_LIBRARY))  # type: ignore[no-untyped-call]
    except OSError as error:
        return Library(False, f"the native kernels cannot be loaded: {error}. {_REBUILD}")
    _register_fakes()
    return Library(True, "built and loaded")


def advise_huge_pages(tensor: Tensor) -> None:
    """Ask for large pages where a large tensor lies, before it is touched.

    Rows of tables are touched in no order, and each small page costs a fault the first time, and a
    search for its address most other times.
    """
    if tensor.device.type == "cpu" and library().loaded:
        torch.ops.dlrm.advise_huge_pages(tensor)


def _register_fakes() -> None:
    """Tell PyTorch's tracers what the kernels return; most write to their arguments instead."""
    for name in (
        "advise_huge_pages",
        "to_panels",
        "mlp_forward",
        "mlp_backward",
        "mlp_update",
        "embed_interact",
        "embed_interact_backward",
        "tables_update",
    ):
        torch.library.register_fake(f"dlrm::{name}", lambda *_arguments: None)
    torch.library.register_fake(
        "dlrm::loss_gradient",
        lambda logits, *_arguments: logits.new_empty((), dtype=torch.float64),
    )
    torch.library.register_fake(
        "dlrm::forward",
        lambda dense_features, *_arguments: dense_features.new_empty(len(dense_features)),
    )
