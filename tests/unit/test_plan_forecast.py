"""Forecasts of large models from their shapes alone, against published figures."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import hpc_kfac as hk
from hpc_kfac.planning.candidates import Choice, candidates, evaluate, largest_fraction, recommend, settings_to_paste
from hpc_kfac.planning.clocks import Conditions
from hpc_kfac.planning.forecast import Case, Forecast, forecast
from hpc_kfac.planning.machine import load
from hpc_kfac.planning.memory import curvature_bytes
from hpc_kfac.planning.model_costs import ModelCosts
from hpc_kfac.planning.run import read_run
from hpc_kfac.planning.times import Settings
from hpc_kfac.training import config

A100 = load("a100")
KFAC = Settings(hk.KFAC(), hk.Precision(), hk.KLClip())


@pytest.fixture(scope="module")
def resnet50() -> ModelCosts:
    return read_run([], "resnet50").costs()


@pytest.fixture(scope="module")
def bert_large() -> ModelCosts:
    return read_run([], "bert_large").costs()


def case(placement: hk.Kaisa, ranks: int, settings: Settings = KFAC, samples: float = 32) -> Case:
    return Case(settings, placement, hk.Schedule(1, 1), ranks, samples)


def curvature(found: Forecast) -> float:
    """Bytes of the mean rank."""
    assert found.problem is not None
    held = curvature_bytes(found.problem)
    return float((held["factors"] + held["solved"]).mean())


def test_parameters_and_flops_as_published(resnet50: ModelCosts, bert_large: ModelCosts) -> None:
    """He et al. 2016: 25.6 million, 4.1e9 multiply-adds forward; Devlin et al. 2019: 340 million."""
    assert resnet50.parameter_bytes / 4 == 25_557_032
    assert resnet50.forward.total_flops(1) / 2e9 == pytest.approx(4.1, rel=0.01)
    assert bert_large.parameter_bytes / 4e6 == pytest.approx(340, rel=0.02)
    # A multiply-add for every weight and position, 334e6 with the output's, and attention's scores and sums.
    dense = 2 * 512 * (sum(s.outputs * s.inputs for s in bert_large.shapes.values() if s.blocks == 1) + 1024 * 30522)
    attention = 24 * 4 * 512**2 * 1024
    assert bert_large.forward.total_flops(1) == pytest.approx(dense + attention, rel=0.01)


def test_factor_elements_of_resnet50_as_published(resnet50: ModelCosts) -> None:
    """Shi et al. 2021 (SPD-KFAC): packed triangles of 62.3 million elements for A and 14.6 million for G."""
    dense = [shape for shape in resnet50.shapes.values() if shape.blocks == 1]  # no norm layers
    assert len(dense) == 54
    for side, published in (("inputs", 62.3e6), ("outputs", 14.6e6)):
        sizes = [getattr(shape, side) for shape in dense]
        assert sum(size * (size + 1) // 2 for size in sizes) == pytest.approx(published, rel=0.005)


@pytest.mark.parametrize("fraction", [1 / 64, 0.25, 0.5, 1.0])
def test_memory_against_the_fraction_as_published(
    fraction: float, resnet50: ModelCosts, bert_large: ModelCosts
) -> None:
    """Pauloski et al. 2021 (KAISA): factors everywhere, their eigenvectors on a share f of the ranks."""
    settings = replace(KFAC, method=hk.KFAC(solver="eigen"))
    for costs in (resnet50, bert_large):
        squares = 4 * sum(s.inputs**2 + s.outputs**2 for s in costs.shapes.values() if s.blocks == 1)
        found = forecast(costs, case(hk.Kaisa(fraction), 64, settings), A100)
        assert curvature(found) == pytest.approx(squares * (1 + fraction), rel=0.01)


def test_local_factors_scale_as_published(resnet50: ModelCosts) -> None:
    """Zhang et al. 2022 (DP-KFAC): curvature once among all ranks, no factor traffic, less time."""
    for ranks in (8, 64):
        common = forecast(resnet50, case(hk.Kaisa(1.0), ranks), A100)
        local = forecast(resnet50, case(hk.Kaisa(0.0, factors="local"), ranks), A100)
        assert curvature(local) == pytest.approx(curvature(common) / ranks)
        assert not {"reduce", "scatter", "broadcast"} & set(local.traffic)
        assert local.peak < common.peak and local.seconds < common.seconds
        assert sum(local.traffic.values()) < sum(common.traffic.values()) / 2


def test_more_ranks_shorten_refreshes_up_to_the_layers_as_published(resnet50: ModelCosts) -> None:
    """Osawa et al. 2020 (SP-NGD): decompositions fall until each rank has a layer at most, then stay."""
    settings = replace(KFAC, averaging="owner")
    makespans = [
        forecast(resnet50, case(hk.Kaisa(0.0, factors="owner"), ranks, settings), A100).makespan[0]
        for ranks in (2, 4, 16, 64, 1024)
    ]
    assert makespans[0] > makespans[1] > makespans[2] >= makespans[3] and makespans[0] > 4 * makespans[3]
    assert makespans[3] == pytest.approx(makespans[4])


def test_a_model_of_ten_billion_weights_takes_no_memory_here() -> None:
    run = read_run([], "gpt_10b")
    costs = run.costs()
    assert costs.parameter_bytes == pytest.approx(4 * 10.1e9, rel=0.01)
    found = forecast(costs, Case(run.settings, hk.Kaisa(0.0, factors="owner"), run.schedule, 64, 1), load("h200"))
    assert found.peak > 3 * costs.parameter_bytes  # weights, gradients and messages
    assert torch.cuda.memory_allocated() == 0


def test_the_largest_fraction_that_fits(resnet50: ModelCosts) -> None:
    """Between the bytes of two neighbouring fractions the smaller is found; below the least, none."""
    peaks = {f: forecast(resnet50, case(hk.Kaisa(f), 8), A100).peak for f in (0.125, 0.25, 0.5, 1.0)}
    assert sorted(peaks.values()) == list(peaks.values())
    for fraction, above in ((0.125, 0.25), (0.25, 0.5), (0.5, 1.0)):
        limit = (peaks[fraction] + peaks[above]) / 2
        found = largest_fraction(resnet50, case(hk.Kaisa(0.0), 8), A100, limit)
        assert found is not None and found[0] == fraction and found[1].peak == peaks[fraction]
    assert largest_fraction(resnet50, case(hk.Kaisa(0.0), 8), A100, peaks[0.125] - 1) is None


def test_what_is_recommended_fits_is_fast_and_can_be_pasted(resnet50: ModelCosts, tmp_path: Path) -> None:
    choice = Choice(["kfac", "none"], [hk.Schedule(10, 100)], [None])
    tried = [
        evaluate(resnet50, candidate, A100, Conditions())
        for candidate in candidates(KFAC, "kfac", hk.Kaisa(), choice, 64, 32)
    ]
    found = {c.placement: c.found for c in tried if c.found is not None}
    best, reason = recommend(tried, 80e9)
    assert best is not None and best.found is not None and not best.samples_alone
    others = [c for c in tried if c.method == "kfac" and not c.samples_alone and c.found is not None]
    assert all(best.found.seconds <= 1.01 * c.found.seconds for c in others if c.found is not None)
    path = tmp_path / "run.yaml"
    path.write_text(settings_to_paste(best, 32))
    given = config.parse([str(path)])
    assert given.parts["placement"]() == best.case.placement and given.run.global_batch == 64 * 32
    assert given.parts["schedule"]() == best.case.schedule and given.run.averaging == best.case.settings.averaging
    least = min(found.values(), key=lambda f: f.peak)
    nothing, reason = recommend(tried, least.peak / 10)
    assert nothing is None and "nothing fits: the least is" in reason


def test_what_cannot_be_says_why(resnet50: ModelCosts) -> None:
    choice = Choice(["kfac"], [hk.Schedule(10, 100)], [None])
    own = hk.Kaisa(0.3)
    tried = [
        evaluate(resnet50, candidate, A100, Conditions()) for candidate in candidates(KFAC, "kfac", own, choice, 64, 32)
    ]
    assert tried[0].found is None and "0.3" in tried[0].refused
    assert recommend(tried, 80e9)[0] is not None


@pytest.mark.parametrize("name", ["resnet50", "bert_large"])
def test_sixteen_thousand_ranks_are_simulated_in_seconds(name: str, request: pytest.FixtureRequest) -> None:
    costs = request.getfixturevalue(name)
    start = time.process_time()
    found = forecast(costs, case(hk.Kaisa(0.5), 16_384), load("frontier"))
    assert time.process_time() - start < 10
    assert found.seconds > forecast(costs, case(hk.Kaisa(0.5), 16), load("frontier")).seconds
