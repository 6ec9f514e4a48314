"""What all pictures share: size, line styles that need no colour, a legend, marks on the axis."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hpc_kfac.cluster.errors import InputError
from hpc_kfac.reporting.history import History
from hpc_kfac.reporting.rows import Numbers

WIDTH, HEIGHT, DPI = 5.2, 3.5, 160
"""Inches, and dots in one: letters stay readable when a picture is as wide as a phone."""
BINS = 300
"""A curve of more than twice as many points is drawn by its mean, smallest and largest value in so many bins."""
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#56B4E9", "#E69F00", "#8A6D00")
LINES: tuple[Any, ...] = ("-", "--", "-.", ":", (0, (6, 1, 1, 1, 1, 1)), (0, (8, 2)), (0, (1, 3)), (0, (3, 1, 1, 1)))
MARKERS = "os^Dv*Px"
HATCHES = ("", "///", "...", "xxx", "\\\\\\", "ooo", "---", "|||", "+++", "**", "//..", "xx--")
GAP = 0.06
"""Inches between what is drawn and the rim."""


@dataclass
class Picture:
    """A picture that is ready to be shown.

    Attributes:
        name: of its file, without the ending.
        title: short, for the page.
        alt: what is to be seen on it, for those who do not see it.
        png: its bytes.
    """

    name: str
    title: str
    alt: str
    png: bytes


def need_matplotlib() -> None:
    """Makes matplotlib ready to draw into files.

    Raises:
        InputError: it is not installed.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise InputError(f"report needs matplotlib: {error}; pip install 'hpc-kfac[report]'") from error
    matplotlib.use("Agg")
    matplotlib.rcParams.update({"font.size": 9.5, "axes.grid": True, "grid.alpha": 0.3})
    matplotlib.rcParams.update({"hatch.linewidth": 0.5, "axes.spines.top": False, "axes.spines.right": False})


def draw(name: str, title: str, alt: str, paint: Callable[[Any], None], height: float = HEIGHT) -> Picture:
    """Draws one picture, with a legend below it of what has a label.

    Args:
        name: of its file.
        title: of the picture.
        alt: words for it.
        paint: is given the axes.
        height: inches.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure((WIDTH, height), DPI)
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    paint(axes)
    renderer = canvas.get_renderer()
    head = figure.text(GAP / WIDTH, 1 - GAP / height, title, va="top", fontsize=10).get_window_extent(renderer).height
    _fit(axes, head + GAP * DPI, _legend_height(axes, renderer), renderer)
    image = io.BytesIO()
    canvas.print_png(image)
    return Picture(name, title, alt, image.getvalue())


def _legend_height(axes: Any, renderer: Any) -> float:
    """Draws a legend at the foot of the figure; its height in dots, 0 without any."""
    handles, labels = axes.get_legend_handles_labels()
    if not labels:
        return 0.0
    columns = max(1, min(len(labels), 66 // (8 + max(map(len, labels)))))
    legend = axes.figure.legend(
        handles, labels, ncols=columns, loc="lower center", fontsize=9, frameon=False, handlelength=3.2,
        columnspacing=1.2, borderaxespad=0.1,
    )  # fmt: skip
    return float(legend.get_window_extent(renderer).height)


def _fit(axes: Any, above: float, below: float, renderer: Any) -> None:
    """Gives axes all of the figure but what their own labels need and so many dots above and below them.

    matplotlib's layouts do this, too, and take longer for it than for the drawing.
    """
    frame, whole = axes.get_window_extent(renderer), axes.get_tightbbox(renderer)
    width, height = axes.figure.canvas.get_width_height()
    gap = GAP * DPI
    left, right = frame.x0 - whole.x0 + gap, whole.x1 - frame.x1 + gap
    bottom, top = frame.y0 - whole.y0 + gap + below, whole.y1 - frame.y1 + gap + above
    axes.set_position((left / width, bottom / height, 1 - (left + right) / width, 1 - (bottom + top) / height))


def style(number: int) -> dict[str, Any]:
    """Colour and line of the curve of this number; no two are alike in both."""
    turn, place = divmod(number, len(LINES))
    return {"color": COLORS[(place + turn) % len(COLORS)], "linestyle": LINES[place]}


def markers(number: int, points: int) -> dict[str, Any]:
    """Marks on a curve of so many points; together with the line, no two curves are alike without colour."""
    turn, place = divmod(number, len(MARKERS))
    every = max(1, min(points, 2 * BINS) // 10)
    return {"marker": MARKERS[(place + turn) % len(MARKERS)], "markersize": 4.5, "markevery": every}


def envelope(x: Numbers, y: Numbers, bins: int = BINS) -> tuple[Numbers, Numbers, Numbers, Numbers]:
    """A curve of few points: the bins' mean x, and mean, smallest and largest y. NaN is left out.

    Args:
        x: ascending.
        y: of the same length.
        bins: of equal width; a curve of up to twice as many points stays as it is.
    """
    known = np.isfinite(x) & np.isfinite(y)
    x, y = x[known], y[known]
    if len(x) <= 2 * bins:
        return x, y, y, y
    edges = np.linspace(x[0], x[-1], bins + 1)[:-1]
    starts = np.unique(np.searchsorted(x, edges))
    counts = np.diff(starts, append=len(x))
    mean_x, mean_y = (np.add.reduceat(values, starts) / counts for values in (x, y))
    return mean_x, mean_y, np.minimum.reduceat(y, starts), np.maximum.reduceat(y, starts)


def curve(axes: Any, x: Numbers, y: Numbers, **look: Any) -> None:
    """Draws a curve, with the range in each bin behind it if it is a long one."""
    x, y, low, high = envelope(x, y)
    axes.plot(x, y, **look)
    if low is not y:
        axes.fill_between(x, low, high, color=look.get("color"), alpha=0.15, linewidth=0)


def log_if_wide(axes: Any, columns: Sequence[Numbers], factor: float = 10.0) -> None:
    """A logarithmic scale where no value is negative and the largest is many times the smallest that is not 0."""
    values = np.concatenate([column[np.isfinite(column)] for column in columns] or [np.empty(0)])
    positive = values[values > 0]
    if len(positive) and values.min() >= 0 and positive.max() > factor * positive.min():
        axes.set_yscale("log")


def mark(axes: Any, histories: Sequence[History], axis: str) -> None:
    """Marks checkpoints by triangles on the axis, restarts and rollbacks by upright lines with their name."""
    below = axes.get_xaxis_transform()
    for number, history in enumerate(histories):
        color, height = style(number)["color"], 0.015 + min(0.04, 0.3 / len(histories)) * number
        places = history.at(history.marks.checkpoints, axis)
        axes.plot(places, np.full(len(places), height), "^", ms=4, color=color, transform=below, clip_on=False)
        whose = f" {history.label}" if len(histories) > 1 else ""
        for words, steps, line in (
            ("restart", history.marks.restarts, (0, (4, 3))),
            ("rollback", history.marks.rollbacks, (0, (1, 2))),
        ):
            for place in history.at(steps, axis):
                axes.axvline(place, color=color, linestyle=line, linewidth=0.9)
                axes.text(
                    place, 0.99, words + whose, color=color, rotation=90, ha="right", va="top", fontsize=7.5,
                    transform=below, bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.3},
                )  # fmt: skip


def marks_in_words(histories: Sequence[History]) -> str:
    """What `mark` shows."""
    parts = []
    for history in histories:
        whose = f" of {history.label}" if len(histories) > 1 else ""
        for words, steps in (
            ("checkpoints", history.marks.checkpoints),
            ("restarts", history.marks.restarts),
            ("rollbacks", history.marks.rollbacks),
        ):
            if steps:
                parts.append(f"{words}{whose} at step {_listed(steps)}")
    return f" Marked: {'; '.join(parts)}." if parts else ""


def _listed(steps: Sequence[int]) -> str:
    shown = [str(step) for step in steps]
    return ", ".join(shown if len(shown) <= 6 else [*shown[:3], "...", *shown[-2:]])
