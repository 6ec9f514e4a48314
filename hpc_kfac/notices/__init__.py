"""What a run is told of its own script: a warning where training goes on, a refusal where it has no meaning."""

from __future__ import annotations

import warnings


class Refused(RuntimeError):
    """What the script does has no meaning for the preconditioner; the message names thing, value and mend."""


class CurvatureWarning(UserWarning):
    """Something that a user should know of the curvature of the model; training goes on."""


class Notices:
    """Warnings, each of them once in a run and on one rank's console.

    Args:
        rank: of this process; rank 0 speaks.
    """

    def __init__(self, rank: int = 0) -> None:
        self._rank = rank
        self._said: set[str] = set()

    def once(self, about: str, text: str) -> None:
        """Warns, unless something was said about this already.

        Args:
            about: what the warning is about, such as a layer's name with the kind of the warning.
            text: names the thing, its value and the mend.
        """
        if about in self._said:
            return
        self._said.add(about)
        if self._rank == 0:
            warnings.warn(text, CurvatureWarning, stacklevel=2)
