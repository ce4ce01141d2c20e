"""The two kinds of failure that are not a bug of ours, and the exit status of each.

Every message says what is wrong, where, what was expected, what was found and what to do.
"""


class UserError(ValueError):
    """The user's input or options are wrong; the command line ends with status 2."""


class EnvironmentFaultError(RuntimeError):
    """The disk, memory or a device fails us; the command line ends with status 3."""
