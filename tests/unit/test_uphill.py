"""An update that points uphill is not taken: the layer takes its gradient, and that is counted and told."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hpc_kfac as hk
from hpc_kfac.distributed.communicator import Communicator
from unit.step_oracle import DOUBLE
from unit.thread_ranks import on_ranks

close = torch.testing.assert_close
CONTROLS = [hk.KLClip(1e-3), hk.TrustRegion(1e-3), hk.FixedNorm(momentum=0.0), hk.Orthogonal(momentum=0.0), None]


class Uphill(hk.KFAC):
    """K-FAC that turns round in layers with five inputs."""

    def precondition(self, gradient: Tensor, *args: Any, **more: Any) -> Tensor:
        update = super().precondition(gradient, *args, **more)
        return update.neg_() if gradient.shape[2] == 5 else update


def net() -> nn.Sequential:
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    for p in model.parameters():
        nn.init.normal_(p, generator=generator)
    return model


def one_step(method: hk.Method, control: Any, comm: Any = "serial", **more: Any) -> tuple[Any, ...]:
    """Gradients before and after a step, and its report and preconditioner."""
    model = net()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    preconditioner = hk.Preconditioner(
        model, sgd, method=method, step_control=control, schedule=hk.Schedule(1, 1), precision=DOUBLE, comm=comm, **more
    )
    preconditioner._executor.overlap = False
    preconditioner._executor.begin(())
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    model(x).square().mean().backward()
    layers = preconditioner.capture.layers
    before = {name: layer.gradient().clone() for name, layer in layers.items()}
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        report = preconditioner.step(log=True)
    after = {name: layer.gradient().clone() for name, layer in layers.items()}
    return before, after, report, [str(warning.message) for warning in told]


@pytest.mark.parametrize("control", CONTROLS, ids=lambda control: type(control).__name__)
def test_the_layer_takes_its_gradient(control: Any) -> None:
    before, after, report, told = one_step(Uphill(), control)
    _, right, other, quiet = one_step(hk.KFAC(), control)
    assert report.applied and report.uphill == ("0",) and other.uphill == () and not quiet
    assert len(told) == 1 and "layer '0'" in told[0] and "uphill" in told[0] and "Uphill" in told[0]
    assert report.layers["0"].cosine < 0 < report.layers["2"].cosine
    scale = float((after["0"] * before["0"]).sum() / before["0"].square().sum())
    assert scale > 0
    close(after["0"], scale * before["0"])
    if isinstance(control, hk.FixedNorm):
        close(after["0"].norm(), right["0"].norm())
    elif control is None:
        assert scale == 1.0
    else:  # the bound is that of what is taken
        products = [before["0"].square().sum(), (before["2"] * right["2"] / other.kl_scale).sum()]
        total = float(sum(products)) * control.weight(0.1)
        assert report.kl_scale == pytest.approx(min(1.0, math.sqrt(control.kappa / total))) == pytest.approx(scale)
    close(after["2"] / report.kl_scale, right["2"] / other.kl_scale)


def test_the_gradient_that_was_preconditioned_counts() -> None:
    """Momentum may point against the latest gradient: that is no fault of the curvature."""
    model = net()
    sgd = torch.optim.SGD(model.parameters(), lr=0.0)
    control = hk.FixedNorm(momentum=0.95)
    preconditioner = hk.Preconditioner(model, sgd, step_control=control, schedule=hk.Schedule(1, 1), precision=DOUBLE)
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for sign in (1.0, 1.0, -0.01):
        model.zero_grad()
        (sign * model(x).square().mean()).backward()
        latest = preconditioner.capture.layers["0"].gradient().clone()
        report = preconditioner.step()
        assert report.applied and report.uphill == ()
    assert float((latest * preconditioner.capture.layers["0"].gradient()).sum()) < 0


@pytest.mark.filterwarnings("ignore::hpc_kfac.CurvatureWarning")
@pytest.mark.parametrize("control", CONTROLS, ids=lambda control: type(control).__name__)
def test_all_ranks_decide_alike(control: Any) -> None:
    """Whoever preconditions the layer, bit by bit."""

    def work(comm: Communicator) -> list[tuple[Any, ...]]:
        return [one_step(Uphill(), control, comm, placement=hk.Kaisa(fraction)) for fraction in (0.0, 1.0)]

    found = [each for rank in on_ranks(2, work) for each in rank]
    assert all(report.uphill == ("0",) for _, _, report, _ in found)
    for _, after, _, _ in found[1:]:
        assert all(torch.equal(tensor, found[0][1][name]) for name, tensor in after.items())
