"""The reference implementation's command line, checkpoints and log: dlrm_s_pytorch.py, here.

The only place that knows the old flags. ``docs/reference.md`` says how it differs.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from dlrm.reference.request import Request, parse

__all__ = ["Request", "main", "parse"]


def main(arguments: Sequence[str]) -> None:
    """Run a command line of the reference: prepare, train and test as it would.

    One that was interrupted while it trained goes on when it is given again.

    Args:
        arguments: Everything after ``dlrm reference``.

    Raises:
        UserError: A flag is unknown, refused or wrong, or an input file is.
        EnvironmentFaultError: The disk or the device fails.
        StoppedBySignalError: SIGINT or SIGTERM came while training.
        SystemExit: Help was asked for (0).
    """
    request = parse(arguments)
    # torch waits until it is needed, so that help is quick
    from dlrm.reference.runner import run
    from dlrm.training.begin import way_on

    command = ["dlrm", "reference", *arguments]
    if not any(argument.partition("=")[0] == "--run" for argument in arguments):
        command.append(f"--run={request.run}")
    with way_on(request.run, shlex.join(command)):
        run(request)
