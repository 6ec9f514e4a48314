"""K-FAC's factors and steps against those of curvlinops, an independent implementation, in float64.

curvlinops gives the curvature of the loss as it is: for a sum over M terms M times ours, which is always that of the
mean. Its empirical factors of MSELoss with reduction "mean" are those of a loss times sqrt(C), C the outputs.
"""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hpc_kfac as hk
from unit.step_oracle import DAMPING, Outcome, finish, kron, mlp, normal, preconditioner_of, randomised, solved

curvlinops = pytest.importorskip(
    "curvlinops",
    reason="curvlinops is not installed (pip install --no-deps curvlinops-for-pytorch and what it imports)",
)

close = torch.testing.assert_close
SAMPLES, CLASSES = 6, 3
FISHERS = {"empirical": "empirical", "exact": "type-2"}


class Sequence(nn.Module):
    """Token-wise layers [N, T, d]; the logits are [N, C, T] with a term for every token, or [N, C] of their mean."""

    def __init__(self, pooled: bool) -> None:
        super().__init__()
        self.first, self.second, self.pooled = nn.Linear(4, 5), nn.Linear(5, CLASSES, bias=False), pooled

    def forward(self, x: Tensor) -> Tensor:
        logits = self.second(self.first(x).tanh())
        return logits.mean(1) if self.pooled else logits.transpose(1, 2)


def convolutions() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 3, 3, stride=2, padding=1),
        nn.Tanh(),
        nn.Conv2d(3, 4, (2, 1), dilation=(1, 2), padding=(0, 1), bias=False),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(4 * 2 * 5, CLASSES),
    )


MODELS: dict[str, tuple[nn.Module, tuple[int, ...], tuple[int, ...]]] = {  # model, shape of a sample, of its labels
    "linear": (mlp(4, 5, CLASSES), (4,), ()),
    "no bias": (mlp(4, 5, CLASSES, bias=False), (4,), ()),
    "convolutions": (randomised(convolutions()), (2, 5, 5), ()),
    "tokens": (randomised(Sequence(pooled=False)), (7, 4), (7,)),
    "pooled tokens": (randomised(Sequence(pooled=True)), (7, 4), ()),
}


def batch(name: str) -> tuple[nn.Module, Tensor, Tensor]:
    model, sample, label = MODELS[name]
    labels = torch.randint(CLASSES, (SAMPLES, *label), generator=torch.Generator().manual_seed(3))
    return deepcopy(model), normal(SAMPLES, *sample, seed=2), labels


def ours(
    model: nn.Module, x: Tensor, y: Tensor, criterion: nn.Module, distribution: hk.OutputDistribution, **settings: Any
) -> Outcome:
    preconditioner = preconditioner_of(model, **settings)
    model.zero_grad()
    outputs = model(x)
    preconditioner.observe(outputs, loss=distribution)
    criterion(outputs, y).backward()
    outcome = finish(preconditioner, model)
    preconditioner.capture.remove()
    return outcome


def theirs(
    model: nn.Module, x: Tensor, y: Tensor, criterion: nn.Module, fisher: str, approximation: str
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A and G by module name, weight and bias as one matrix."""
    operator = curvlinops.KFACLinearOperator(
        model,
        criterion,
        [p for p in model.parameters() if p.requires_grad],
        [(x, y)],
        check_deterministic=False,
        fisher_type=fisher,
        kfac_approx=approximation,
        separate_weight_and_bias=False,
    )
    operator.compute_kronecker_factors()
    return operator._input_covariances, operator._gradient_covariances


def check(outcome: Outcome, a_factors: dict[str, Tensor], g_factors: dict[str, Tensor], scale: float = 1.0) -> None:
    """Factor by factor, and the step against a dense solve with curvlinops' factors."""
    assert set(outcome.updates) == set(a_factors) == set(g_factors)
    for name, a in a_factors.items():
        g = g_factors[name] * scale
        close(outcome.factor(name, "A")[0], a)
        close(outcome.factor(name, "G")[0], g)
        close(outcome.updates[name], solved(kron(g[None], a[None]), outcome.gradients[name]))


@pytest.mark.parametrize("approximation", ["expand", "reduce"])
@pytest.mark.parametrize("fisher", FISHERS)
@pytest.mark.parametrize("name", MODELS)
def test_cross_entropy(name: str, fisher: str, approximation: str) -> None:
    model, x, y = batch(name)
    criterion = nn.CrossEntropyLoss()
    found = ours(model, x, y, criterion, hk.CrossEntropy(), fisher=fisher, weight_sharing=approximation)
    check(found, *theirs(model, x, y, criterion, FISHERS[fisher], approximation))


@pytest.mark.parametrize("approximation", ["expand", "reduce"])
@pytest.mark.parametrize("name", MODELS)
def test_forward_only(name: str, approximation: str) -> None:
    """G is the identity and only A is kept: FOOF (Benzing 2022)."""
    model, x, y = batch(name)
    criterion, method = nn.CrossEntropyLoss(), hk.KFAC(solver="eigen", damping=DAMPING, output_structure="identity")
    found = ours(model, x, y, criterion, hk.CrossEntropy(), method=method, weight_sharing=approximation)
    a_factors, g_factors = theirs(model, x, y, criterion, "forward-only", approximation)
    for layer, a in a_factors.items():
        assert set(found.preconditioner.factors(layer)) == {"A"}
        close(found.factor(layer, "A")[0], a)
        expected = solved(kron(g_factors[layer][None], a[None]), found.gradients[layer])
        close(found.updates[layer], expected)


@pytest.mark.parametrize("fisher", FISHERS)
@pytest.mark.parametrize("loss", ["squared error", "binary cross entropy"])
@pytest.mark.parametrize("name", ["linear", "convolutions", "pooled tokens"])
def test_mean_over_outputs(name: str, loss: str, fisher: str) -> None:
    model, x, _ = batch(name)
    y = torch.rand(SAMPLES, CLASSES, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    if loss == "squared error":
        criterion, distribution = nn.MSELoss(), hk.SquaredError()
    else:
        criterion, distribution, y = nn.BCEWithLogitsLoss(), hk.BinaryCrossEntropy(), y.round()
    found = ours(model, x, y, criterion, distribution, fisher=fisher)
    a_factors, g_factors = theirs(model, x, y, criterion, FISHERS[fisher], "expand")
    check(found, a_factors, g_factors, 1 / CLASSES if fisher == "empirical" else 1.0)


@pytest.mark.parametrize("approximation", ["expand", "reduce"])
@pytest.mark.parametrize("fisher", FISHERS)
def test_sum_over_terms(fisher: str, approximation: str) -> None:
    model, x, y = batch("pooled tokens")
    target = F.one_hot(y, CLASSES).double()
    for criterion, distribution, labels in (
        (nn.CrossEntropyLoss(reduction="sum"), hk.CrossEntropy(reduction="sum"), y),
        (nn.MSELoss(reduction="sum"), hk.SquaredError(weight=1.0, reduction="sum"), target),
    ):
        found = ours(model, x, labels, criterion, distribution, fisher=fisher, weight_sharing=approximation)
        check(found, *theirs(model, x, labels, criterion, FISHERS[fisher], approximation), 1 / SAMPLES)
