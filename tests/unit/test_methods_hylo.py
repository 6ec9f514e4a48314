"""HyLo against the sample-matrix method that it compresses."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hpc_kfac.layers.batch import LayerShape
from hpc_kfac.methods.method import Method, State
from hpc_kfac.methods.rows.hylo import HyLo
from hpc_kfac.methods.rows.sample_matrix import SampleMatrix
from unit.fake_batch import FakeBatch, correlated_batch

close = torch.testing.assert_close
SHAPE, DAMPING = LayerShape(2, 5, 4), 0.3


def update(method: Method, batch: FakeBatch, damping: float = DAMPING) -> Tensor:
    state = method.statistics(batch, {}, SHAPE)
    state |= method.refresh(state, SHAPE, damping)
    return method.precondition(batch.gradient(), state, SHAPE, damping)


@pytest.mark.parametrize("select", ["kid", "kis", "switch"])
@pytest.mark.parametrize("rows", [11, 14])
def test_with_all_rows_it_is_the_sample_matrix(select: str, rows: int) -> None:
    batch = correlated_batch(2, 11, 1, 4, 5)
    found = update(HyLo(damping=DAMPING, rows=rows, select=select), batch)
    close(found, update(SampleMatrix(damping=DAMPING, rows=11), batch), rtol=1e-6, atol=1e-6)


def test_interpolation_is_exact_where_the_rows_span_all() -> None:
    """Samples that are copies of five: five rows stand for all of them; importance sampling only about."""
    few = correlated_batch(2, 5, 1, 4, 5)
    batch = FakeBatch(few.x.repeat_interleave(4, 1), few.g.repeat_interleave(4, 1))
    exact = update(SampleMatrix(damping=DAMPING, rows=20), batch)
    close(update(HyLo(damping=DAMPING, rows=5, select="kid"), batch), exact, rtol=1e-5, atol=1e-5)


def test_more_rows_are_nearer_and_interpolation_nearer_than_sampling() -> None:
    batch = correlated_batch(2, 40, 1, 4, 5)
    exact = update(SampleMatrix(damping=DAMPING, rows=40), batch)
    errors = {
        (select, rows): float((update(HyLo(damping=DAMPING, rows=rows, select=select), batch) - exact).norm())
        for select in ("kid", "kis")
        for rows in (5, 15, 30)
    }
    for select in ("kid", "kis"):
        assert errors[select, 30] < errors[select, 15] < errors[select, 5]
    assert all(errors["kid", rows] < errors["kis", rows] for rows in (5, 15, 30))


def test_importance_sampling_keeps_the_trace() -> None:
    batch = correlated_batch(1, 200, 1, 4, 5)
    shape = LayerShape(1, 5, 4)
    trace = (batch.x.square().sum(-1) * batch.g.square().sum(-1)).sum() / 200
    state = HyLo(rows=20, select="kis").statistics(batch, {}, shape)
    kept = (state["X"].square().sum(-1) * state["R"].square().sum(-1)).sum()
    assert kept == pytest.approx(trace.item())


def test_it_switches_by_the_gradients_length() -> None:
    method = HyLo(damping=DAMPING, rows=4, switch_above=0.2)
    batch = correlated_batch(2, 11, 1, 4, 5)
    off_diagonal = {}
    state: State = {}
    for name, scale in (("first", 1.0), ("calm", 1.1), ("moving", 2.0)):
        state |= method.statistics(FakeBatch(batch.x, batch.g * scale), state, SHAPE)
        coupling = state["coupling"]
        off_diagonal[name] = float((coupling - torch.diag_embed(coupling.diagonal(dim1=1, dim2=2))).norm())
    assert off_diagonal["first"] > 0 and off_diagonal["calm"] == 0 and off_diagonal["moving"] > 0


@pytest.mark.parametrize("select", ["kid", "kis"])
def test_ranks_rows_add_up(select: str) -> None:
    """Two ranks that keep all their rows make the sample matrix of both."""
    whole = correlated_batch(2, 12, 1, 4, 5)
    parts = [FakeBatch(whole.x[:, i : i + 6], whole.g[:, i : i + 6]) for i in (0, 6)]
    method = HyLo(damping=DAMPING, rows=6, select=select)
    shares = []
    for part in parts:
        part.ranks = 2  # type: ignore[misc]
        shares.append(method.statistics(part, {}, SHAPE))
    state = {name: torch.cat([share[name] for share in shares], dim=1) for name in shares[0]}
    state |= method.refresh(state, SHAPE, DAMPING)
    found = method.precondition(whole.gradient(), state, SHAPE, DAMPING)
    close(found, update(SampleMatrix(damping=DAMPING, rows=12), whole), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 30.0])
@pytest.mark.parametrize("kind", ["one sample", "zero gradient", "rank one", "zero inputs"])
@pytest.mark.parametrize("select", ["kid", "kis"])
def test_degenerate_input(select: str, kind: str, scale: float) -> None:
    batch = correlated_batch(2, 1 if kind == "one sample" else 9, 1, 4, 5)
    x, g = batch.x * scale, batch.g * scale
    g = torch.zeros_like(g) if kind == "zero gradient" else g
    x = torch.zeros_like(x) if kind == "zero inputs" else x
    if kind == "rank one":
        x, g = x[:, :1].expand_as(x), g[:, :1].expand_as(g)
    batch = FakeBatch(x, g)
    found = update(HyLo(rows=4, select=select, damping=DAMPING), batch)
    assert bool(torch.isfinite(found).all()) and float((found * batch.gradient()).sum()) >= 0


@pytest.mark.parametrize("scale", [1e2, 1e4])
@pytest.mark.parametrize("kind", ["rank one", "full rank"])
def test_sampled_rows_stand_a_kernel_far_above_the_damping(kind: str, scale: float) -> None:
    batch = correlated_batch(2, 9, 1, 4, 5)
    x, g = batch.x * scale, batch.g * scale
    if kind == "rank one":
        x, g = x[:, :1].expand_as(x), g[:, :1].expand_as(g)
    batch = FakeBatch(x, g)
    found = update(HyLo(rows=4, select="kis", damping=DAMPING), batch)
    assert float((found * batch.gradient()).sum()) > 0


def test_bad_settings_are_named() -> None:
    with pytest.raises(ValueError, match="select is 'all'"):
        HyLo(select="all")
    with pytest.raises(ValueError, match="switch_above is 0"):
        HyLo(switch_above=0)
