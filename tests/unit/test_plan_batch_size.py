"""The noisy quadratic model: closed forms, the published direction, and a run's own spectrum."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from hpc_kfac.cluster.errors import InputError
from hpc_kfac.cluster.ranks import Ranks
from hpc_kfac.planning import batch_size
from hpc_kfac.planning.batch_size import Spectrum, half_efficient, preconditioners, report, steps
from hpc_kfac.training import config
from hpc_kfac.training.run import run


def test_steps_are_those_of_the_recursion() -> None:
    """One direction without noise to speak of: (1 - eta h)^2 per step at the largest rate below 2 / h that is tried."""
    spectrum = Spectrum(np.array([1.0, 0.01]), np.array([1.0, 1.0]))
    found = steps(spectrum, 1e12, np.ones(2))
    best = min(
        next(
            k for k in range(1, 10**5) if (spectrum.values * ((1 - eta * spectrum.values) ** (2 * k))).sum() <= 0.00202
        )
        for eta in batch_size.ETAS[60:]
    )
    assert found == pytest.approx(best, rel=0.01, abs=1.5)


def test_the_critical_batch_grows_with_the_preconditioner() -> None:
    """Zhang et al. 2019, h = 1 / i: batches at 50 % efficiency of about 2 048, 8 192, 32 768 and 262 144."""
    values = 1.0 / np.arange(1, 10_001)
    spectrum = Spectrum.of(values)
    found = []
    for p in list(preconditioners(spectrum).values()):
        found.append(half_efficient(batch_size.BATCHES, [steps(spectrum, b, p) for b in batch_size.BATCHES]))
    for ours, published in zip(found, (2048, 8192, 32768, 262144), strict=True):
        assert ours is not None and published / 4 <= ours <= 4 * published
    assert found == sorted(found, key=lambda batch: batch or 0)


def test_a_runs_own_spectrum(tmp_path: Path) -> None:
    run(
        config.parse(
            ["--max_steps", "20", "--method", "kfac", "--run_dir", str(tmp_path), "--name", "one", "--resume", "auto"]
        ),
        Ranks(),
    )
    text = report(tmp_path / "one", [8, 64, 512])
    assert "first loss" in text and "damped inverse" in text and "50 % efficient" in text
    assert re.search(r"This run takes 128 samples a step; 256 would take 0\.\d\d of its steps .*: more ranks", text)
    spectrum, coverage = batch_size.measured(tmp_path / "one")
    # The distance to the minimum is such that the model's first loss is the run's.
    first = float((spectrum.values * spectrum.counts).sum()) * spectrum.start / 2
    assert f"{first:.4g}" in coverage


def test_a_run_without_curvature_is_told(tmp_path: Path) -> None:
    run(
        config.parse(
            ["--max_steps", "2", "--method", "none", "--run_dir", str(tmp_path), "--name", "one", "--resume", "auto"]
        ),
        Ranks(),
    )
    with pytest.raises(InputError, match="no layer with factors A and G; give a run of kfac"):
        report(tmp_path / "one")
    with pytest.raises(InputError):
        report(tmp_path / "nowhere")
