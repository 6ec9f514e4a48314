"""Curves of all runs in one picture: loss, accuracy, damping, KL scale, learning rate."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from hpc_kfac.reporting.drawing import Picture, curve, draw, log_if_wide, mark, markers, marks_in_words, style
from hpc_kfac.reporting.history import AXES, History
from hpc_kfac.reporting.rows import Numbers

FIGURES = {
    "loss": ("loss", "test_loss"),
    "accuracy": ("train_accuracy", "test_accuracy"),
    "squared error": ("train_squared_error", "test_squared_error"),
}
"""What is shown of training and of evaluations: columns of either."""
CONTROLS = {"damping": "damping", "kl_scale": "KL scale", "lr": "learning rate"}


def progress(histories: Sequence[History]) -> Iterator[Picture]:
    """Loss, and accuracy or squared error where there is one, against steps, samples and seconds."""
    for words, (training, test) in FIGURES.items():
        if any(known(h.train, training) or known(h.evaluation, test) for h in histories):
            for axis in AXES:
                yield _progress(histories, words, training, test, axis)


def controls(histories: Sequence[History]) -> Iterator[Picture]:
    """Damping, KL scale and learning rate against steps; what no run has is left out."""
    for name, words in CONTROLS.items():
        if any(known(h.train, name) for h in histories):
            yield _control(histories, name, words)


def missing_controls(histories: Sequence[History]) -> list[str]:
    """Those that no run has."""
    return [words for name, words in CONTROLS.items() if not any(known(h.train, name) for h in histories)]


def known(columns: dict[str, Numbers], name: str) -> bool:
    """Whether a column has a number at all."""
    return name in columns and bool(np.isfinite(columns[name]).any())


def ending(columns: dict[str, Numbers], name: str) -> str:
    """The last number of a column, in words."""
    if not known(columns, name):
        return "none"
    column = columns[name]
    return f"{column[np.isfinite(column)][-1]:.4g}"


def _progress(histories: Sequence[History], words: str, training: str, test: str, axis: str) -> Picture:
    def paint(axes: Any) -> None:
        seen = []
        for number, history in enumerate(histories):
            whose, look = f"{history.label} " if len(histories) > 1 else "", style(number)
            if known(history.train, training):
                seen.append(history.train[training])
                curve(axes, history.train[axis], seen[-1], label=f"{whose}train", linewidth=1, **look)
            if known(history.evaluation, test):
                seen.append(history.evaluation[test])
                look |= {"linewidth": 1.7, "markerfacecolor": "white", **markers(number, len(seen[-1]))}
                curve(axes, history.evaluation[axis], seen[-1], label=f"{whose}test", **look)
        if words != "accuracy":
            log_if_wide(axes, seen, 5.0)
        axes.set(xlabel=AXES[axis], ylabel=words)
        axes.margins(x=0.01)
        mark(axes, histories, axis)

    last = "; ".join(
        f"run {h.label} ends at {ending(h.train, training)} in training and {ending(h.evaluation, test)} in test"
        for h in histories
    )
    alt = f"{words.capitalize()} against {AXES[axis]}: {last}.{marks_in_words(histories)}"
    return draw(f"{words.replace(' ', '_')}_{axis}", f"{words.capitalize()} against {AXES[axis]}", alt, paint)


def _control(histories: Sequence[History], name: str, words: str) -> Picture:
    def paint(axes: Any) -> None:
        seen = []
        for number, history in enumerate(histories):
            if known(history.train, name):
                seen.append(history.train[name])
                label = history.label if len(histories) > 1 else None
                curve(axes, history.train["step"], seen[-1], label=label, linewidth=1.4, **style(number))
        if name != "lr":
            log_if_wide(axes, seen)
        axes.set(xlabel=AXES["step"], ylabel=words)
        axes.margins(x=0.01)
        mark(axes, histories, "step")

    ranges = []
    for history in histories:
        if known(history.train, name):
            column = history.train[name]
            low, high = np.nanmin(column), np.nanmax(column)
            ranges.append(f"run {history.label} from {low:.3g} to {high:.3g}, at last {ending(history.train, name)}")
    title = f"{words[0].upper()}{words[1:]} against steps"
    return draw(name, title, f"{title}: {'; '.join(ranges)}.{marks_in_words(histories)}", paint)
