"""How many samples a step can use: the noisy quadratic model (Zhang et al. 2019) on a curvature spectrum.

Along each eigenvector of the curvature the error has a mean square s, the gradient's noise the variance h / B:

    s <- (1 - eta p h)^2 s + eta^2 p^2 h / B,      loss = 1/2 sum h s,      p = h^-gamma or 1 / (h + damping)

eta is optimised for every batch B. Where B is small, twice the batch takes half the steps; where it is large, as many.
A batch is at 50 % efficiency where it first takes twice the samples of the smallest batch.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from tabulate import tabulate

from hpc_kfac.checkpoint import BrokenCheckpoint
from hpc_kfac.checkpoint.inspect import factors, one_set
from hpc_kfac.cluster.errors import InputError

GAMMAS = (0.0, 0.25, 0.5, 0.75)
BATCHES = tuple(2**k for k in range(0, 24))
BINS = 400
TARGET = 0.002
"""Share of the first loss that is to be reached; near 0.01 for h = 1/i, i up to 10 000, as in the paper."""
ETAS = np.concatenate([np.logspace(-6.0, 0.0, 61)[:-1], np.linspace(1.0, 1.99, 20)])
"""Learning rates, in shares of the largest that is stable for B = infinity, halved."""


@dataclass(frozen=True)
class Spectrum:
    """Eigenvalues with how often each comes.

    Attributes:
        values: [k], above 0.
        counts: [k].
        start: s at the start, along every eigenvector.
    """

    values: np.ndarray
    counts: np.ndarray
    start: float = 1.0

    @classmethod
    def of(cls, values: np.ndarray, start: float = 1.0, floor: float = 1e-12) -> Spectrum:
        """In bins of equal ratio, each with its mean; what is below floor times the largest is left out."""
        values = values[values > floor * values.max()]
        edges = np.geomspace(values.min() * (1 - 1e-9), values.max() * (1 + 1e-9), BINS + 1)
        place = np.clip(np.searchsorted(edges, values) - 1, 0, BINS - 1)
        counts = np.bincount(place, minlength=BINS).astype(float)
        sums = np.bincount(place, weights=values, minlength=BINS)
        filled = counts > 0
        return cls(sums[filled] / counts[filled], counts[filled], start)


def steps(spectrum: Spectrum, batch: float, preconditioner: np.ndarray, target: float = TARGET) -> float:
    """Steps to the target under the best learning rate; infinite where none reaches it.

    Args:
        spectrum: of the curvature.
        batch: B.
        preconditioner: p for each value of the spectrum.
        target: share of the first loss.
    """
    h, counts = spectrum.values, spectrum.counts
    weights = 0.5 * counts * h
    goal = target * float((weights * spectrum.start).sum())
    curvature = preconditioner * h
    best = math.inf
    for eta in ETAS / curvature.max():
        shrink = (1.0 - eta * curvature) ** 2
        limit = eta**2 * preconditioner**2 * h / batch / np.maximum(1.0 - shrink, 1e-300)
        if float((weights * limit).sum()) < goal:
            best = min(best, _reached(weights, shrink, limit, spectrum.start, goal, best))
    return best


def _reached(
    weights: np.ndarray, shrink: np.ndarray, limit: np.ndarray, start: float, goal: float, best: float
) -> float:
    """The number of steps after which the loss is at the goal; infinite if it is above `best`."""

    def loss(count: float) -> float:
        return float((weights * (shrink**count * (start - limit) + limit)).sum())

    low, high = 0.0, 1.0
    while loss(high) > goal:
        low, high = high, 2.0 * high
        if low > best:
            return math.inf
    while high - low > max(1.0, 1e-3 * high):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if loss(middle) > goal else (low, middle)
    return high


def half_efficient(batches: Sequence[int], needed: Sequence[float]) -> int | None:
    """The first batch that takes at least twice the samples of the smallest; None where none does."""
    for batch, count in zip(batches, needed, strict=True):
        if batch * count >= 2 * batches[0] * needed[0]:
            return batch
    return None


def preconditioners(spectrum: Spectrum, damping: float | None = None) -> dict[str, np.ndarray]:
    """p by name: powers of the curvature and, with a damping, its damped inverse."""
    found = {f"gamma {gamma:g}": spectrum.values**-gamma for gamma in GAMMAS}
    if damping is not None:
        mean = float((spectrum.values * spectrum.counts).sum() / spectrum.counts.sum())
        found[f"damped inverse ({damping:g} of the mean)"] = 1.0 / (spectrum.values + damping * mean)
    return found


def report(run: Path, batches: Sequence[int] | None = None, damping: float = 0.1) -> str:
    """What batches a run can use, by its newest checkpoint's spectrum.

    Args:
        run: its folder, or a checkpoint.
        batches: to be tried, rising; powers of two by default.
        damping: share of the mean curvature.

    Raises:
        InputError: the run has no spectrum.
    """
    spectrum, coverage = measured(run)
    tried = sorted(batches or BATCHES)
    lines = [
        f"{run}: spectrum of {int(spectrum.counts.sum())} directions from {spectrum.values.min():.3g} to"
        f" {spectrum.values.max():.3g}; {coverage}",
        f"Steps from the first loss to {TARGET:g} of it, by batch (noisy quadratic model, best learning rate):",
    ]
    shown = [batch for batch in tried if batch in tried[:: max(1, len(tried) // 8)] or batch == tried[-1]]
    rows: list[list[Any]] = [["p", *shown, "50 % efficient"]]
    for name, p in preconditioners(spectrum, damping).items():
        needed = [steps(spectrum, batch, p) for batch in tried]
        critical = half_efficient(tried, needed)
        figures = [f"{needed[tried.index(batch)]:.4g}" for batch in shown]
        rows.append([name, *figures, f"above {tried[-1]}" if critical is None else str(critical)])
    sides = ["left", *["right"] * len(shown), "left"]
    lines.append(tabulate(rows, headers="firstrow", tablefmt="plain", disable_numparse=True, colalign=sides))
    lines.append(
        "Ranks that raise the batch beyond the last column still shorten training, by less than half their share."
    )
    return "\n".join([*lines, *_verdict(run, spectrum, damping)])


def _verdict(run: Path, spectrum: Spectrum, damping: float) -> list[str]:
    """Whether more ranks help the run itself, where it has its settings beside it."""
    file = run / "settings.yaml"
    if not file.exists():
        return []
    batch = int(yaml.safe_load(file.read_text())["global_batch"])
    name, p = list(preconditioners(spectrum, damping).items())[-1]
    share = steps(spectrum, 2 * batch, p) / steps(spectrum, batch, p)
    verdict = "more ranks still help" if share < 0.75 else "more ranks hardly help"
    return [
        f"This run takes {batch} samples a step; {2 * batch} would take {share:.2f} of its steps ({name}): {verdict}."
    ]


def measured(run: Path) -> tuple[Spectrum, str]:
    """The spectrum of a run's Kronecker products, and what it covers.

    The loss at the start, where the run's metrics have it, scales the distance to the minimum.

    Raises:
        InputError: there is no checkpoint with factors.
    """
    try:
        layers: dict[str, dict[str, np.ndarray]] = {}
        for name, factor in factors(one_set(run)).items():
            layer, _, key = name.rpartition(" ")
            layers.setdefault(layer, {})[key] = torch.linalg.eigvalsh(factor).numpy()
    except (BrokenCheckpoint, OSError) as error:
        raise InputError(str(error)) from error
    pieces = []
    for sides in layers.values():
        if set(sides) == {"A", "G"}:
            pieces.append((sides["G"][..., :, None] * sides["A"][..., None, :]).ravel())
        elif set(sides) == {"A"}:
            pieces.append(sides["A"].ravel())
    if not pieces:
        raise InputError(f"{run} has no layer with factors A and G; give a run of kfac, ekfac or a relative")
    values = np.concatenate(pieces)
    spectrum = Spectrum.of(values)
    coverage = f"{len(pieces)} of {len(layers)} layers"
    first = _first_loss(run)
    if first is not None:
        scale = 2.0 * first / float((spectrum.values * spectrum.counts).sum())
        spectrum = Spectrum(spectrum.values, spectrum.counts, scale)
        coverage += f", first loss {first:.4g}"
    return spectrum, coverage


def _first_loss(run: Path) -> float | None:
    metrics = run / "metrics.jsonl"
    if not metrics.exists():
        return None
    for line in metrics.read_text().splitlines():
        row = json.loads(line)
        if row.get("kind") == "train" and "loss" in row:
            return float(row["loss"])
    return None
