"""Rank 0's voice: a progress bar on a terminal, plain lines in a batch log. Other ranks are silent."""

from __future__ import annotations

import os
import sys
from typing import Any

from tqdm import tqdm


class Console:
    """What the user sees of a run.

    Args:
        speaks: whether this is rank 0.
        progress: "bar", "lines", or "auto": a bar where a terminal is watching.
    """

    def __init__(self, speaks: bool, progress: str = "auto") -> None:
        self._speaks = speaks
        self._draws = progress == "bar" or (progress == "auto" and _terminal())
        self._bar: Any = None

    def start(self, steps: int, done: int = 0) -> None:
        """Begins a run of so many steps, of which some are done."""
        self._steps = steps
        if self._speaks and self._draws:
            self._bar = tqdm(
                total=steps, initial=done, unit="step", dynamic_ncols=True, mininterval=0.2, smoothing=0.05
            )

    def advance(self) -> None:
        """One step is done."""
        if self._bar is not None:
            self._bar.update()

    def go_back(self, step: int) -> None:
        """The steps from this one on are to be done again."""
        if self._bar is not None:
            self._bar.n = step
            self._bar.refresh()

    def row(self, row: dict[str, Any]) -> None:
        """Shows the main figures of a row of metrics."""
        figures = ", ".join(f"{name} {_short(row[name])}" for name in SHOWN if name in row)
        if self._bar is not None:
            self._bar.set_postfix_str(figures)
        else:
            self.say(f"step {row['step']}/{self._steps}  {figures}")

    def say(self, text: str) -> None:
        """Prints a line."""
        if self._bar is not None:
            self._bar.write(text, file=sys.stdout)
        elif self._speaks:
            print(text)
        sys.stdout.flush()

    def close(self) -> None:
        """Leaves the bar as it is."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


SHOWN = ("loss", "train_accuracy", "lr", "damping", "kl_scale", "cosine", "step_seconds")


def _short(value: float) -> str:
    return f"{value:.4g}"


def _terminal() -> bool:
    """Whether a terminal watches: this process, or mpirun, which hands its ranks pipes."""
    if sys.stderr.isatty():
        return True
    try:
        return os.readlink(f"/proc/{os.getppid()}/fd/2").startswith(("/dev/pts/", "/dev/tty"))
    except OSError:
        return False
