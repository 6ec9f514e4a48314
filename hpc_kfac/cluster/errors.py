"""What ends a run with one message, and with which exit status."""

from __future__ import annotations


class LaunchError(RuntimeError):
    """The way the ranks were started cannot work; the message says why and what to do."""


class InputError(ValueError):
    """What the user gave cannot be used; the message names the thing, the value and the mend."""


class RunStopped(RuntimeError):
    """The run cannot go on; the message says at which step, and what was good last."""


class LossBlewUp(RunStopped):
    """The run is worse than when it began; it may go on from an earlier checkpoint."""


class RunInterrupted(RuntimeError):
    """The run was asked to stop, and can go on later."""


class DataError(ValueError):
    """A data file is missing, damaged or not what it should be; the message names file, value and mend."""


EXPECTED = (InputError, DataError, LaunchError, RunStopped, RunInterrupted)
INTERRUPTED = 75
"""Exit status of a run that wants to be started again: EX_TEMPFAIL of sysexits.h."""


def exit_status(error: BaseException) -> int:
    """Of a process that ends by this: 75 asks to be started again, 2 is for what the user gave, 1 for the rest."""
    if isinstance(error, RunInterrupted):
        return INTERRUPTED
    return 2 if isinstance(error, EXPECTED) and not isinstance(error, RunStopped) else 1
