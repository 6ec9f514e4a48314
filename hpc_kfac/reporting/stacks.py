"""Where time, traffic and memory go."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from hpc_kfac.reporting.drawing import (
    COLORS,
    HATCHES,
    Picture,
    curve,
    draw,
    mark,
    marks_in_words,
    style,
)
from hpc_kfac.reporting.history import AXES, History
from hpc_kfac.reporting.rows import Numbers

BARS = 40
"""So many bars show the course of a run."""
SMALL = 0.01
"""Phases that take a smaller share of the time are shown as one in the stacks."""


def phase_stack(history: History) -> Picture | None:
    """Seconds a step by phase, mean over ranks, stacked, over the steps; None without any."""
    means, steps = _figures(history, "phases", "mean"), history.train["steps"]
    edges = _edges(history.train["step"])
    if not means or edges is None:
        return None
    bars = {name: _binned(column, steps, history.train["step"], edges) for name, column in means.items()}
    total = sum(float(np.nansum(column)) for column in means.values())
    shown = {name: bar for name, bar in bars.items() if float(np.nansum(means[name])) >= SMALL * total}
    others = [bar for name, bar in bars.items() if name not in shown]
    if others:
        shown["other"] = np.sum(others, axis=0)
    whole = _binned(history.train["step_seconds"] * steps, steps, history.train["step"], edges)

    def paint(axes: Any) -> None:
        heights = np.cumsum(list(shown.values()), axis=0)
        for number in reversed(range(len(shown))):  # the legend begins with what is on top
            bar = list(shown.values())[number]
            axes.bar(
                edges[:-1], 1e3 * bar, np.diff(edges), 1e3 * (heights[number] - bar), align="edge",
                label=_words(list(shown)[number]), color=_pale(number), hatch=HATCHES[number % len(HATCHES)],
                edgecolor="#333333", linewidth=0.3,
            )  # fmt: skip
        axes.stairs(1e3 * whole, edges, baseline=None, color="black", linewidth=1.6, label="whole step, by the clock")
        axes.set(xlabel=AXES["step"], ylabel="ms a step")
        axes.set_xlim(edges[0], edges[-1])
        mark(axes, [history], "step")

    per_step = {name: float(np.nansum(column)) / max(float(steps.sum()), 1.0) for name, column in means.items()}
    parts = ", ".join(f"{_words(name)} {1e3 * value:.3g}" for name, value in _by_size(per_step) if value > 0)
    alt = f"Stacked milliseconds a step by phase, mean over ranks, against steps. Over the run: {parts}."
    return draw(
        f"phases_{history.label}",
        f"Time of a step by phase, run {history.label}",
        alt + marks_in_words([history]),
        paint,
        4.6,
    )


def phase_spread(history: History) -> Picture | None:
    """Milliseconds a step by phase with the range over ranks; None without any."""
    return _spread(history, "phases", "Time by phase, range over ranks", "ms a step", 1e3)


def traffic_spread(history: History) -> Picture | None:
    """Kilobytes a step that a rank hands to collectives, by operation, with the range over ranks; None without any."""
    return _spread(history, "traffic", "Traffic by operation, range over ranks", "kB a step of a rank", 1e-3)


def traffic(histories: Sequence[History]) -> Picture | None:
    """Bytes a step of all operations together, against steps; None without any."""
    totals = []
    for history in histories:
        means = _figures(history, "traffic", "mean")
        steps = np.where(history.train["steps"] > 0, history.train["steps"], np.nan)
        totals.append(np.nansum(list(means.values()), axis=0) / steps if means else None)
    return _against_steps(histories, totals, "traffic", "Traffic of a rank", "bytes a step")


def memory(histories: Sequence[History]) -> Picture | None:
    """Resident memory of the largest rank, against steps; None without any."""
    columns = [history.train.get("memory/resident/max") for history in histories]
    return _against_steps(histories, columns, "memory", "Memory of the largest rank", "bytes resident")


def _against_steps(
    histories: Sequence[History], columns: Sequence[Numbers | None], name: str, title: str, ylabel: str
) -> Picture | None:
    there = [(n, h, c) for n, (h, c) in enumerate(zip(histories, columns, strict=True)) if c is not None and len(c)]
    if not there:
        return None

    def paint(axes: Any) -> None:
        from matplotlib.ticker import EngFormatter

        for number, history, column in there:
            label = history.label if len(histories) > 1 else None
            curve(axes, history.train["step"], column, label=label, linewidth=1.4, **style(number))
        axes.set(xlabel=AXES["step"], ylabel=ylabel)
        axes.set_ylim(0, 1.08 * max(float(np.nanmax(column)) for _, _, column in there) or 1.0)
        axes.yaxis.set_major_formatter(EngFormatter("B"))
        axes.margins(x=0.01)
        mark(axes, histories, "step")

    ranges = "; ".join(
        f"run {h.label} {np.nanmean(c) / 1e6:.4g} MB in the mean, {np.nanmax(c) / 1e6:.4g} MB at most"
        for _, h, c in there
        if np.isfinite(c).any()
    )
    return draw(name, f"{title} against steps", f"{title} against steps: {ranges}.{marks_in_words(histories)}", paint)


def _spread(history: History, group: str, title: str, xlabel: str, scale: float) -> Picture | None:
    steps = max(float(history.train["steps"].sum()), 1.0)
    table = {
        figure: {name: scale * float(np.nansum(c)) / steps for name, c in _figures(history, group, figure).items()}
        for figure in ("min", "mean", "max")
    }
    names = [name for name, value in _by_size(table["mean"]) if value > 0][::-1]
    if not names:
        return None
    title = f"{title}, run {history.label}"
    ranks = history.facts.get("ranks", "?")

    def paint(axes: Any) -> None:
        mean = np.array([table["mean"][name] for name in names])
        low, high = (np.array([table[figure][name] for name in names]) for figure in ("min", "max"))
        reach = np.maximum([mean - low, high - mean], 0.0)
        axes.barh(range(len(names)), mean, color="#9FC5E0", edgecolor="#333333", linewidth=0.5)
        axes.errorbar(mean, range(len(names)), xerr=reach, fmt="none", ecolor="black", capsize=4, linewidth=1.2)
        for place, (value, end) in enumerate(zip(mean, high, strict=True)):
            axes.annotate(f"{value:.3g}", (max(end, value), place), (5, 0), textcoords="offset points", va="center")
        axes.set_yticks(range(len(names)), [_words(name) for name in names])
        axes.set_xlabel(f"{xlabel}; mean, smallest and largest of {ranks} rank(s)")
        axes.grid(visible=False, axis="y")
        axes.margins(x=0.12)

    parts = "; ".join(
        f"{_words(name)} {table['mean'][name]:.3g} ({table['min'][name]:.3g} to {table['max'][name]:.3g})"
        for name in names[::-1]
    )
    height = max(2.0, 0.9 + 0.27 * len(names))
    return draw(f"{group}_ranks_{history.label}", title, f"{title}, {xlabel}: {parts}.", paint, height)


def _figures(history: History, group: str, figure: str) -> dict[str, Numbers]:
    below = history.below(f"{group}/")
    return {name.removesuffix(f"/{figure}"): c for name, c in below.items() if name.endswith(f"/{figure}")}


def _edges(step: Numbers) -> Numbers | None:
    """Borders of bars of equal width that hold rows."""
    if not len(step):
        return None
    count = min(BARS, len(np.unique(step)))
    return np.linspace(0.0, float(step[-1]) or 1.0, count + 1)


def _binned(sums: Numbers, steps: Numbers, step: Numbers, edges: Numbers) -> Numbers:
    """Sums of rows, by steps of rows, in each bin; a row counts where its middle lies."""
    known = np.isfinite(sums)
    middle = (step - steps / 2)[known]
    total, _ = np.histogram(middle, edges, weights=sums[known])
    count, _ = np.histogram(middle, edges, weights=steps[known])
    return np.divide(total, count, out=np.zeros(len(total)), where=count > 0)


def _by_size(values: dict[str, float]) -> list[tuple[str, float]]:
    return sorted(values.items(), key=lambda entry: -entry[1])


def _words(name: str) -> str:
    return name.replace("_", " ")


def _pale(number: int) -> tuple[float, float, float]:
    """A light shade, under hatches."""
    from matplotlib.colors import to_rgb

    red, green, blue = to_rgb(COLORS[number % len(COLORS)])
    return (0.6 + 0.4 * red, 0.6 + 0.4 * green, 0.6 + 0.4 * blue)
