"""One step on a deep linear net with squared error against its closed form (Bernacchia, Lengyel & Hennequin 2018).

The loss is the mean of |W x - y|^2 / 2 with W = W_L ... W_1. With P the product of the layers above a layer, Q of those
below, S the second moment of x and W* the least squares solution, the layer's gradient is D = P^T (W - W*) S Q^T and
its factors are G = P^T P and A = Q S Q^T: every Gauss-Newton block is kron(G, A) exactly.
"""

from __future__ import annotations

from functools import reduce

import pytest
import torch
from torch import Tensor, nn

import hpc_kfac as hk
from unit.step_oracle import LossCase, exact_blocks, kron, mlp, normal, one_step, solved

close = torch.testing.assert_close
TINY = 1e-10  # damping that leaves no trace


def half_squared_error(outputs: Tensor, target: Tensor) -> Tensor:
    return 0.5 * (outputs - target).square().sum() / len(outputs)


LOSS = LossCase(half_squared_error, hk.SquaredError(weight=0.5))
EXACT = {"loss": LOSS, "fisher": "exact"}


def linear_net(*widths: int) -> nn.Sequential:
    return mlp(*widths, bias=False, activation=nn.Identity)


def data(inputs: int, outputs: int) -> tuple[Tensor, Tensor]:
    return normal(11, inputs, seed=2), normal(11, outputs, seed=3)


def chain(weights: list[Tensor], size: int) -> Tensor:
    """The product of weights that are applied in this order; the identity if there are none."""
    return reduce(lambda product, weight: weight @ product, weights, torch.eye(size, dtype=torch.float64))


def closed_form(model: nn.Module, x: Tensor, target: Tensor) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """D, G and A of every layer by name."""
    layers = [(name, layer.weight.detach()) for name, layer in model.named_children() if isinstance(layer, nn.Linear)]
    weights = [weight for _, weight in layers]
    second_moment, cross_moment = x.T @ x / len(x), target.T @ x / len(x)
    error = chain(weights, x.shape[1]) @ second_moment - cross_moment
    found = {}
    for place, (name, weight) in enumerate(layers):
        above, below = chain(weights[place + 1 :], weight.shape[0]), chain(weights[:place], x.shape[1])
        found[name] = (above.T @ error @ below.T, above.T @ above, below @ second_moment @ below.T)
    return found


def loss_of(model: nn.Module, x: Tensor, target: Tensor) -> float:
    with torch.no_grad():
        return half_squared_error(model(x), target).item()


def move(model: nn.Module, step: float) -> None:
    """Weights minus `step` times what the preconditioner left in `.grad`."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= step * parameter.grad


def least_loss(x: Tensor, target: Tensor) -> float:
    best = torch.linalg.lstsq(x, target).solution
    return 0.5 * (x @ best - target).square().sum().item() / len(x)


@pytest.mark.parametrize("widths", [(4, 3), (4, 5, 3), (4, 4, 2, 5, 3)], ids=str)
def test_factors_and_blocks(widths: tuple[int, ...]) -> None:
    model, (x, target) = linear_net(*widths), data(widths[0], widths[-1])
    step = one_step(model, x, target, **EXACT)
    expected = closed_form(model, x, target)
    assert list(expected) == list(step.updates)
    for name, (gradient, g, a) in expected.items():
        close(step.gradients[name][0], gradient)
        close(step.factor(name, "G")[0], g)
        close(step.factor(name, "A")[0], a)
        close(kron(g[None], a[None]), exact_blocks(model, name, x, target, LOSS))


@pytest.mark.parametrize("damping", [0.1, 1e-3])
def test_step_with_exact_damping(damping: float) -> None:
    model, (x, target) = linear_net(4, 5, 2, 3), data(4, 3)
    step = one_step(model, x, target, **EXACT, method=hk.KFAC(solver="eigen", damping=damping))
    for name, (gradient, g, a) in closed_form(model, x, target).items():
        close(step.updates[name], solved(kron(g[None], a[None]), gradient[None], damping))


def test_step_with_factored_damping() -> None:
    """(G + sqrt(damping) / pi I)^-1 D (A + pi sqrt(damping) I)^-1 with pi^2 = (tr A / a) / (tr G / o)."""
    model, (x, target) = linear_net(4, 5, 2, 3), data(4, 3)
    step = one_step(model, x, target, **EXACT, method=hk.KFAC(damping=0.1, solver="cholesky"))
    for name, (gradient, g, a) in closed_form(model, x, target).items():
        pi = ((a.trace() / len(a)) / (g.trace() / len(g))) ** 0.5
        g_damped = g + 0.1**0.5 / pi * torch.eye(len(g), dtype=g.dtype)
        a_damped = a + 0.1**0.5 * pi * torch.eye(len(a), dtype=a.dtype)
        close(step.updates[name][0], torch.linalg.inv(g_damped) @ gradient @ torch.linalg.inv(a_damped))


def square_net(depth: int) -> nn.Sequential:
    """Layers near the identity, so that inverses of their products are accurate."""
    model = linear_net(*[3] * (depth + 1))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.eye(3) + 0.3 * parameter)
    return model


@pytest.mark.parametrize("solver, damping", [("eigen", TINY), ("cholesky", TINY**2)])
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_natural_gradient_of_a_deep_linear_net(depth: int, solver: str, damping: float) -> None:
    """dW = (1/L) G^-1 D A^-1 moves W straight to W*: the loss falls at -2 (loss - least loss), whatever the depth."""
    model, (x, target) = square_net(depth), data(3, 3)
    step = one_step(model, x, target, **EXACT, method=hk.KFAC(damping=damping, solver=solver))
    for name, (gradient, g, a) in closed_form(model, x, target).items():
        expected = torch.linalg.solve(g, gradient) @ torch.linalg.inv(a)
        close(step.updates[name][0], expected, rtol=1e-7, atol=1e-7)
    before, small = loss_of(model, x, target), 1e-5
    move(model, small / depth)
    slope = (loss_of(model, x, target) - before) / small
    assert slope == pytest.approx(-2 * (before - least_loss(x, target)), rel=1e-4)


def test_one_layer_is_solved_in_one_step() -> None:
    model, (x, target) = linear_net(4, 3), data(4, 3)
    one_step(model, x, target, **EXACT, method=hk.KFAC(solver="eigen", damping=TINY))
    move(model, 1.0)
    assert loss_of(model, x, target) == pytest.approx(least_loss(x, target), rel=1e-8)
