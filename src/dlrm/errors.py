"""The two kinds of failure that are not a bug of ours, the exit status of each, and a stop.

Every message says what is wrong, where, what was expected, what was found and what to do.
"""


class UserError(ValueError):
    """The user's input or options are wrong; the command line ends with status 2."""


class EnvironmentFaultError(RuntimeError):
    """The disk, memory or a device fails us; the command line ends with status 3."""


class StoppedBySignalError(KeyboardInterrupt):
    """SIGINT or SIGTERM ended a training between two steps; the status is 130 or 143.

    Attributes:
        number: The signal.
    """

    def __init__(self, number: int, message: str) -> None:
        super().__init__(message)
        self.number = number
