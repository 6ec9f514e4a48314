"""Eigenvalues of factors, from the newest checkpoint of a run."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from hpc_kfac.checkpoint import BrokenCheckpoint, inspect
from hpc_kfac.checkpoint.manifest import read_manifest
from hpc_kfac.checkpoint.sets import list_sets
from hpc_kfac.linalg.spectrum import eigenvalues, figures
from hpc_kfac.reporting.history import matching
from hpc_kfac.reporting.rows import Numbers

SHOWN = 6
"""So many factors are in one picture, if none are asked for."""
MOST = 12
LARGEST_SET = 2 * 10**9
"""Bytes of a checkpoint that is still read for a report."""


@dataclass
class Spectra:
    """Eigenvalues of a run's factors.

    Attributes:
        step: of the checkpoint; None if there is none that can be read.
        values: by "layer factor", all eigenvalues, the largest first.
        figures: by "layer factor": condition, trace and effective rank.
        notes: what is missing, and why.
    """

    step: int | None = None
    values: dict[str, Numbers] = field(default_factory=dict)
    figures: dict[str, dict[str, float]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def read_spectra(run: Path, patterns: list[str]) -> Spectra:
    """Reads the newest checkpoint that is in order, and decomposes factors.

    Args:
        run: its folder.
        patterns: fnmatch patterns of "layer factor"; without any, those of the first, middle and last layer are taken.
    """
    found = Spectra()
    for path in list_sets(run / "checkpoints"):
        try:
            manifest = read_manifest(path)
            if manifest.size > LARGEST_SET:
                found.notes.append(f"Checkpoint {path.name} has {manifest.size / 1e9:.1f} GB, too much for a report.")
                return found
            factors = inspect.factors(path)
        except (BrokenCheckpoint, OSError, ValueError, LookupError) as error:
            found.notes.append(f"Checkpoint {path.name} cannot be used: {error}.")
            continue
        found.step = manifest.step
        for name in _chosen(list(factors), patterns):
            values = eigenvalues(factors[name])
            if values is None:
                found.notes.append(f"{name} is too large or not finite.")
                continue
            found.figures[name] = figures(values)
            found.values[name] = np.sort(values.flatten().numpy())[::-1]
        if not factors:
            found.notes.append("The method keeps no symmetric factors.")
        elif not found.values and patterns:
            found.notes.append(f"No factor is named like {' or '.join(patterns)}; there are {', '.join(factors)}.")
        return found
    found.notes.append("There is no checkpoint that can be read.")
    return found


def _chosen(names: list[str], patterns: list[str]) -> list[str]:
    if patterns:
        return matching(names, patterns)[:MOST]
    layers = list(dict.fromkeys(name.rpartition(" ")[0] for name in names))
    places = dict.fromkeys((0, len(layers) // 2, len(layers) - 1)) if layers else {}
    return [name for place in places for name in names if name.rpartition(" ")[0] == layers[place]][:SHOWN]
