"""DLRM for PyTorch: from raw click logs to a trained, evaluated model."""

from dlrm.version import __version__

__all__ = ["__version__"]
