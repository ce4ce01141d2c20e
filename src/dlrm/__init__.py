"""DLRM for PyTorch: from raw click logs to a trained, evaluated model.

The public surface, versioned by semver, is what ``__all__`` names::

    import dlrm

    dlrm.prepare("train.txt", "dataset")
    dlrm.train("dataset", "run", dlrm.TrainConfig(epochs=1))  # interrupted: dlrm.resume("run")
    dlrm.evaluate("run", "test").metrics.auc
    dlrm.load("run").predict(table)

Everything else can change without notice. Names are imported when they are first used, so that
``import dlrm`` is quick.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from dlrm.version import __version__

if TYPE_CHECKING:
    from dlrm.config import (
        GenerateConfig,
        LossConfig,
        ModelConfig,
        OptimizerConfig,
        PrepareConfig,
        QuantizationConfig,
        SynthesizeConfig,
        TableConfig,
        TrackingConfig,
        TrainConfig,
    )
    from dlrm.data.generation import generate
    from dlrm.data.prepare import prepare
    from dlrm.data.synthetic import synthesize
    from dlrm.errors import EnvironmentFaultError, UserError
    from dlrm.evaluation import evaluate
    from dlrm.model.dlrm import DLRM
    from dlrm.prediction import load
    from dlrm.training.begin import resume, train

__all__ = [
    "DLRM",
    "EnvironmentFaultError",
    "GenerateConfig",
    "LossConfig",
    "ModelConfig",
    "OptimizerConfig",
    "PrepareConfig",
    "QuantizationConfig",
    "SynthesizeConfig",
    "TableConfig",
    "TrackingConfig",
    "TrainConfig",
    "UserError",
    "__version__",
    "evaluate",
    "generate",
    "load",
    "prepare",
    "resume",
    "synthesize",
    "train",
]

_HOMES = {
    "DLRM": "dlrm.model.dlrm",
    "EnvironmentFaultError": "dlrm.errors",
    "UserError": "dlrm.errors",
    "evaluate": "dlrm.evaluation",
    "generate": "dlrm.data.generation",
    "load": "dlrm.prediction",
    "prepare": "dlrm.data.prepare",
    "resume": "dlrm.training.begin",
    "synthesize": "dlrm.data.synthetic",
    "train": "dlrm.training.begin",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'dlrm' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES.get(name, "dlrm.config")), name)
