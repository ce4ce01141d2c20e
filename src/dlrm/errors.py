"""The two kinds of failure that are not a bug of ours, the exit status of each, and a stop.

Every message says what is wrong, where, what was expected, what was found and what to do.
"""

from __future__ import annotations


class UserError(ValueError):
    """The user's input or options are wrong; the command line ends with status 2."""


class EnvironmentFaultError(RuntimeError):
    """The disk, memory or a device fails us; the command line ends with status 3."""


class StoppedBySignalError(KeyboardInterrupt):
    """SIGINT or SIGTERM ended a training between two steps; the status is 130 or 143.

    Args:
        number: The signal.
        what: Where training was, and what is saved.
        to_go_on: What goes on with it.
    """

    def __init__(self, number: int, what: str, to_go_on: str) -> None:
        super().__init__(f"{what} To go on: {to_go_on}")
        self.number = number
        self._what = what

    def with_way_on(self, to_go_on: str) -> StoppedBySignalError:
        """Return it with another way to go on."""
        return StoppedBySignalError(self.number, self._what, to_go_on)
