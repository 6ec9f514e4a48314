"""Heat maps of layers over steps, and spectra of factors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from os.path import commonprefix
from typing import Any

import numpy as np

from hpc_kfac.reporting.drawing import Picture, draw, markers, style
from hpc_kfac.reporting.history import History
from hpc_kfac.reporting.rows import Numbers
from hpc_kfac.reporting.spectra import Spectra

COLUMNS = 60
"""So many columns a heat map has at most."""
WRITTEN = 8
"""With so many columns or fewer, numbers are written into the cells."""
MOST_NAMES = 60
LONGEST_NAME = 28
ROUND_OFF = 1e8
"""Float32 factors know no larger condition."""
FACTORS = {
    "condition": ("Condition of factors", True),
    "trace": ("Trace of factors", True),
    "effective_rank": ("Effective rank of factors", True),
}
LAYERS = {
    "layer_update": ("Size of update by weights, before the learning rate", True),
    "layer_staleness": ("Staleness in steps", False),
    "layer_cosine": ("Cosine of update and gradient", False),
    "layer_curvature_share": ("Curvature share", False),
}
"""By column: title, and whether the scale of the colours is logarithmic."""


def heat_maps(history: History) -> tuple[list[Picture], list[str]]:
    """Heat maps of what the rows tell of layers and factors, and the titles of those that they tell nothing of."""
    pictures, missing = [], []
    sources = [(f"factors/{name}/", history.evaluation, look) for name, look in FACTORS.items()]
    sources += [(f"{name}/", history.train, look) for name, look in LAYERS.items()]
    for prefix, columns, look in sources:
        found = history.below(prefix, columns)
        if any(np.isfinite(column).any() for column in found.values()):
            name = prefix.rstrip("/").rpartition("/")[2].removeprefix("layer_")
            title, log = look
            file = f"{name}_{history.label}"
            pictures.append(_heat_map(file, found, columns["step"], f"{title}, run {history.label}", log))
        else:
            missing.append(look[0])
    return pictures, missing


def _heat_map(file: str, rows: dict[str, Numbers], step: Numbers, title: str, log: bool) -> Picture:
    names, whole = list(rows), np.array(list(rows.values()))
    there = np.isfinite(whole).any(axis=0)  # the last row of a start that was stopped may have no figures of layers
    values, last = _in_columns(whole[:, there], step[there])
    crossed = "not known"
    if file.startswith("condition"):
        values, crossed = np.where(values > ROUND_OFF, np.nan, values), "singular to round-off"
    xlabel = f"steps; crossed: {crossed}" if np.isnan(values).any() else "steps"
    known = values[np.isfinite(values) & ((values > 0) | (not log))]

    def paint(axes: Any) -> None:
        from matplotlib.colors import LogNorm, Normalize
        from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

        low, high = (float(known.min()), float(known.max())) if len(known) else (1.0, 1.0)
        log_scale = log and high > 10 * low > 0
        norm = LogNorm(low, high) if log_scale else Normalize(low, high if high > low else low + 1.0)
        edges = np.concatenate([[0.0], last])
        axes.patch.set(hatch="xx", facecolor="white", edgecolor="#999999")
        mesh = axes.pcolormesh(
            edges, np.arange(len(names) + 1), np.ma.masked_invalid(values), norm=norm, cmap="cividis"
        )
        numbers = FuncFormatter(lambda value, _: f"{value:.3g}")
        ticks = LogLocator(subs=(1, 2, 5) if high < 200 * low else (1,)) if log_scale else None
        bar = axes.figure.colorbar(mesh, cax=axes.inset_axes((1.02, 0, 0.035, 1)), format=numbers, ticks=ticks)
        bar.ax.yaxis.set_minor_formatter(NullFormatter())
        axes.invert_yaxis()
        every = -(-len(names) // MOST_NAMES)
        axes.set_yticks(
            np.arange(len(names))[::every] + 0.5, _short(names)[::every], fontsize=9 if len(names) <= 30 else 6
        )
        axes.set_xlabel(xlabel)
        axes.grid(visible=False)
        if len(last) <= WRITTEN and len(names) <= 24:
            _write(axes, values, edges, norm)

    ends = [f"{name} {value:.3g}" for name, value in zip(names, values[:, -1], strict=True) if np.isfinite(value)]
    shown = ", ".join(ends[:24]) + (f" and {len(ends) - 24} more" if len(ends) > 24 else "")
    alt = f"{title} against steps, a row for each of {len(names)}. At the end: {shown or 'none known'}."
    height = min(12.0, max(2.2, 1.0 + 0.22 * len(names)))
    return draw(file, title, alt, paint, height)


def _short(names: Sequence[str]) -> list[str]:
    """Names of layers; of long ones without the modules that all are in, and without their middle."""
    if max(map(len, names)) > LONGEST_NAME:
        common = commonprefix(names).rfind(".") + 1
        names = [name[common:] for name in names]
    half = LONGEST_NAME // 2
    return [name if len(name) <= LONGEST_NAME else f"{name[: half - 1]}…{name[-half:]}" for name in names]


def _write(axes: Any, values: Numbers, edges: Numbers, norm: Any) -> None:
    """Numbers in the cells, in black or white, whichever is read more easily."""
    middles = (edges[:-1] + edges[1:]) / 2
    for (row, column), value in np.ndenumerate(values):
        if np.isfinite(value):
            color = "black" if float(norm(value)) > 0.5 else "white"
            text = f"{value:.1e}" if value >= 1e4 else f"{value:.2g}" if value < 100 else f"{value:.0f}"
            axes.text(middles[column], row + 0.5, text, color=color, ha="center", va="center", fontsize=7)


def _in_columns(values: Numbers, step: Numbers) -> tuple[Numbers, Numbers]:
    """Means of rows in at most `COLUMNS` columns [names, columns], and the last step of each column."""
    starts = np.unique(np.linspace(0, len(step), min(COLUMNS, len(step)) + 1).astype(int)[:-1])
    ends = np.append(starts[1:], len(step))
    known = np.isfinite(values)
    counts = np.add.reduceat(known, starts, axis=1, dtype=np.float64)
    sums = np.add.reduceat(np.where(known, values, 0.0), starts, axis=1)
    means = np.divide(sums, counts, out=np.full_like(sums, np.nan), where=counts > 0)
    last = np.maximum.accumulate(step[ends - 1])
    return means, last + 1e-9 * np.arange(len(last))


def spectrum(history: History, spectra: Spectra) -> Picture | None:
    """Eigenvalues of the chosen factors, the largest first; None without any."""
    if not spectra.values:
        return None

    def paint(axes: Any) -> None:
        labels = _short(list(spectra.values))
        for number, values in enumerate(spectra.values.values()):
            positive = np.where(values > 0, values, np.nan)
            places = np.arange(1, len(positive) + 1) / len(positive)
            look = {**style(number), **markers(number, len(places)), "linewidth": 1.4}
            axes.plot(places, positive, label=labels[number], **look)
        axes.set(yscale="log", xlabel="share of the eigenvalues, the largest first", ylabel="eigenvalue")
        largest = max(float(values[0]) for values in spectra.values.values())
        smallest = min(float(values[values > 0].min()) for values in spectra.values.values() if (values > 0).any())
        axes.set_ylim(max(smallest / 2, 1e-12 * largest), 2 * largest)

    parts = "; ".join(
        f"{name}: {len(spectra.values[name])} eigenvalues, largest {spectra.values[name][0]:.3g}, condition"
        f" {found['condition']:.2g}, effective rank {found['effective_rank']:.3g}"
        for name, found in spectra.figures.items()
    )
    title = f"Spectra of factors at step {spectra.step}, run {history.label}"
    return draw(f"spectrum_{history.label}", title, f"{title}. {parts}.", paint, 4.0)


def spectrum_rows(spectra: Spectra) -> Iterator[tuple[str, ...]]:
    """A table: factor, size, condition, trace, effective rank; its head comes first."""
    yield ("factor", "eigenvalues", "condition", "trace", "effective rank")
    for name, found in spectra.figures.items():
        condition = found["condition"]
        words = f"{condition:.2e}" if condition <= ROUND_OFF else "singular to round-off"
        yield (
            name,
            str(len(spectra.values[name])),
            words,
            f"{found['trace']:.4g}",
            f"{found['effective_rank']:.3g}",
        )
