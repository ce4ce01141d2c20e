"""The reference implementation's command line, checkpoints and log: dlrm_s_pytorch.py, here.

The only place that knows the old flags. ``docs/reference.md`` says how it differs.
"""

from __future__ import annotations

from collections.abc import Sequence

from dlrm.reference.request import Request, parse

__all__ = ["Request", "main", "parse"]


def main(arguments: Sequence[str]) -> None:
    """Run a command line of the reference: prepare, train and test as it would.

    Args:
        arguments: Everything after ``dlrm reference``.

    Raises:
        UserError: A flag is unknown, refused or wrong, or an input file is.
        EnvironmentFaultError: The disk or the device fails.
        SystemExit: Help was asked for (0).
    """
    request = parse(arguments)
    from dlrm.reference.runner import run  # torch waits until it is needed, so that help is quick

    run(request)
