"""Layers without statistics, gradients of unusual kinds, and statistics that cannot be worked out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hpc_kfac as hk

EVERY = hk.Schedule(statistics=1, refresh=1)


class Headed(nn.Module):
    """A net with a layer that no loss comes from."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head, self.unused = nn.Linear(5, 7), nn.Linear(7, 3), nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).tanh())


def batch(samples: int = 16) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(samples, 5, generator=generator), torch.randint(0, 3, (samples,), generator=generator)


def made(**settings: Any) -> tuple[Headed, torch.optim.SGD, hk.Preconditioner]:
    model = Headed()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return model, optimizer, hk.Preconditioner(model, optimizer, **settings)


@pytest.mark.parametrize("first", [16, 0])
@pytest.mark.parametrize("schedule", [EVERY, hk.Schedule()], ids=["every step", "default"])
@pytest.mark.parametrize("name", hk.METHODS)
def test_a_layer_without_statistics_takes_its_plain_gradient(name: str, schedule: hk.Schedule, first: int) -> None:
    """The unused head has none, and of an empty batch there are none of any layer."""
    settings = {"schedule": schedule, "step_control": None, "fisher": "empirical"}
    model, optimizer, preconditioner = made(method=hk.METHODS[name](), **settings)
    for samples in (first, 0, 16):
        x, labels = batch(samples)
        optimizer.zero_grad()
        F.cross_entropy(model(x), labels, reduction="sum").backward()
        plain = None if model.head.weight.grad is None else model.head.weight.grad.clone()
        report = preconditioner.step()
        assert (report.applied, report.failures, model.unused.weight.grad) == (True, 0, None)
        if not preconditioner.factors("head") and name in ("kfac", "ekfac", "kpsvd", "mkor", "eva"):
            torch.testing.assert_close(model.head.weight.grad, plain)
        optimizer.step()
    assert all(bool(p.isfinite().all()) for p in model.parameters())


def with_graph(model: Headed, x: Tensor, labels: Tensor) -> None:
    F.cross_entropy(model(x), labels).backward(create_graph=True)


def given(model: Headed, x: Tensor, labels: Tensor) -> None:
    loss = F.cross_entropy(model(x), labels)
    used = [*model.body.parameters(), *model.head.parameters()]
    for parameter, gradient in zip(used, torch.autograd.grad(loss, used, create_graph=True), strict=True):
        parameter.grad = gradient


def ordinary(model: Headed, x: Tensor, labels: Tensor) -> None:
    F.cross_entropy(model(x), labels).backward()


def plain(model: Headed, x: Tensor, labels: Tensor) -> None:
    ordinary(model, x, labels)
    model.head.bias.grad = torch.ones(3)


def expanded(model: Headed, x: Tensor, labels: Tensor) -> None:
    plain(model, x, labels)
    model.head.bias.grad = torch.ones(1).expand(3)


def of_inference(model: Headed, x: Tensor, labels: Tensor) -> None:
    plain(model, x, labels)
    with torch.inference_mode():
        for parameter in [*model.body.parameters(), *model.head.parameters()]:
            assert parameter.grad is not None
            parameter.grad = parameter.grad + 0


@pytest.mark.filterwarnings("ignore:Using backward")
@pytest.mark.parametrize("control", [None, hk.KLClip(1e-9), hk.Orthogonal()])
@pytest.mark.parametrize("kind", [with_graph, given, expanded, of_inference])
def test_gradients_of_unusual_kinds(kind: Callable[..., None], control: Any) -> None:
    found = []
    for backward in (kind, ordinary if kind in (with_graph, given) else plain):
        model, optimizer, preconditioner = made(step_control=control, skip=["body"])
        preconditioner.capture.paused = kind is given  # of which there are no statistics
        for _ in range(2):
            optimizer.zero_grad()
            backward(model, *batch())
            assert preconditioner.step().applied
            optimizer.step()
        found.append([p.detach().clone() for p in model.parameters()])
    for value, right in zip(*found, strict=True):
        torch.testing.assert_close(value, right)


@pytest.mark.filterwarnings("ignore:the statistics of")
def test_statistics_that_cannot_be_worked_out_are_left_out() -> None:
    """Of so large rows rounding leaves no positive definite remainder."""
    model, optimizer, preconditioner = made(method=hk.METHODS["hylo"](select="kid"), schedule=EVERY)
    for size in (1.0, 1e15, 1.0):
        x, labels = batch(64)
        optimizer.zero_grad()
        (size * F.cross_entropy(model(x * min(size, 1e3)), labels, reduction="sum")).backward()
        assert preconditioner.step().applied
        optimizer.step()
    assert all(bool(p.isfinite().all()) for p in model.parameters())


@pytest.mark.parametrize("fisher", ["empirical", "sampled"])
@pytest.mark.parametrize(("schedule", "at"), [(EVERY, 1), (EVERY, 4), (hk.Schedule(100, 100), 1)])
def test_a_weight_of_another_shape_is_refused(schedule: hk.Schedule, at: int, fisher: str) -> None:
    model, optimizer, preconditioner = made(schedule=schedule, fisher=fisher)

    def step() -> None:
        outputs = model(batch()[0])
        preconditioner.observe(outputs)
        F.cross_entropy(outputs, batch()[1]).backward()
        del outputs  # the graph remembers shapes
        preconditioner.step()
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(at):
        step()
    model.head.weight.data, model.head.bias.data = torch.randn(8, 7), torch.zeros(8)
    told = r"^layer 'head': its weight has the shape \[8, 7\], and had \[3, 7\] when .*; change the model first"
    with pytest.raises(hk.Refused, match=told):
        step()
